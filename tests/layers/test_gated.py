"""BPTTLSTM and BPTTGRU: what is of gates alone. All else is in `test_contract.py`."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    FLOAT64,
    B,
    D,
    H,
    assert_same,
    evaluate,
    random_inputs,
    relative_error,
    rng,
)
from twins import Unknown, host_of, layer_of, states_of, twins

from keras_bptt import BPTTGRU, BPTTLSTM, reference
from keras_bptt.layers import compiled_step as compiling

T = 9
MASK = rng(4).random((B, T)) < 0.7
MASK[:, 0] = True
LAYERS = {"BPTTLSTM": BPTTLSTM, "BPTTGRU": BPTTGRU}
KINDS = {
    "LSTM": ("BPTTLSTM", {}, reference.lstm_gradients, {}),
    "GRU": ("BPTTGRU", {}, reference.gru_gradients, {}),
    "GRU, reset before": (
        "BPTTGRU",
        {"reset_after": False},
        reference.gru_gradients,
        {"reset_after": False},
    ),
}

every_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_reference(kind):
    """Written out in NumPy: the equations that the docstrings state."""
    name, options, gradients, given = KINDS[kind]
    layer = layer_of(name, return_sequences=True, return_state=True, **options)
    x, states = random_inputs(B, T, D), states_of(name)
    call = {"mask": MASK, "training": True, "state": states}
    got, random = evaluate(layer, x, "graph", **call), rng(2)  # what `evaluate` draws
    e, *last = [random.normal(size=got[f"y{i}"].shape) for i in range(1 + len(states))]
    weights = [w.numpy() for w in layer.weights[:3]]
    named = dict(zip(("e_h_T", "e_c_T"), last, strict=False))
    d = gradients(x, *weights, *states, e=e, **named, mask=MASK, **given)
    expected = {"d_x": d.d_inputs, "d_0_kernel": d.d_kernel, "d_2_bias": d.d_bias}
    expected |= {"d_1_recurrent_kernel": d.d_recurrent_kernel}
    of_states = (
        [d.d_initial_h, d.d_initial_c] if "LSTM" in kind else [d.d_initial_state]
    )
    expected |= {f"d_state{i}": array for i, array in enumerate(of_states)}
    assert_same({k: v for k, v in got.items() if k in expected}, expected)


TORCH = {"BPTTLSTM": "LSTM", "BPTTGRU": "GRU"}


@pytest.mark.filterwarnings("ignore:CUDA initialization")
@every_layer
def test_outputs_and_gradients_are_those_of_torch(name):
    """PyTorch orders the gates of a GRU r, z, n, and has two biases of both layers."""
    torch = pytest.importorskip("torch")
    layer = layer_of(name, return_sequences=True)
    x = random_inputs(B, T, D)
    got = evaluate(layer, x, "graph", training=True)
    gates = 4 if name == "BPTTLSTM" else 3
    order = [0, 1, 2, 3] if name == "BPTTLSTM" else [1, 0, 2]

    def ordered(array):
        """The last axis with its gates in the other order, which is its own inverse."""
        pieces = np.split(array, gates, axis=-1)
        return np.concatenate([pieces[i] for i in order], axis=-1)

    W, U, b = (ordered(w.numpy()) for w in layer.weights[:3])
    b_x, b_h = b if b.ndim == 2 else (b, np.zeros_like(b))
    theirs = getattr(torch.nn, TORCH[name])(D, H, batch_first=True, dtype=torch.float64)
    for parameter, value in zip(theirs.parameters(), (W.T, U.T, b_x, b_h), strict=True):
        parameter.data = torch.tensor(value)
    inputs = torch.tensor(x, requires_grad=True)
    y, _ = theirs(inputs)
    y.backward(torch.tensor(rng(2).normal(size=y.shape)))
    d_W, d_U, d_x, d_h = (p.grad.numpy() for p in theirs.parameters())
    d_b = d_x if b.ndim == 1 else np.stack([d_x, d_h])
    expected = {"y0": y.detach().numpy(), "d_x": inputs.grad.numpy()}
    expected |= {"d_0_kernel": ordered(d_W.T), "d_1_recurrent_kernel": ordered(d_U.T)}
    assert_same(got, expected | {"d_2_bias": ordered(d_b)}, 1e-12)


# --- What is kept


@pytest.mark.parametrize(
    ("name", "options", "saved", "deltas"),
    [
        ("BPTTLSTM", {}, 4 * H, 4 * H),
        ("BPTTLSTM", {"recurrent_dropout": 0.3}, 4 * H, 4 * H),
        # Those of both sides of r, and once more the three of a side, joined.
        ("BPTTGRU", {}, 4 * H, 6 * H),
        ("BPTTGRU", {"reset_after": False}, 3 * H, 3 * H),
    ],
    ids=str,
)
def test_what_is_kept_of_a_step(name, options, saved, deltas):
    """What a derivation by hand keeps: gates, and deltas of the pre-activations."""
    layer = layer_of(name, **options)
    x, states = tf.zeros((B, T, D), "float64"), layer.get_initial_state(B)
    step = layer._step(x, states, training=True)
    shapes = step.cell.shapes(step.weights)
    assert sum(int(np.prod(s)) for s in shapes.saved) == saved
    assert sum(int(np.prod(s)) for s in shapes.deltas) == deltas


@every_layer
def test_no_product_for_what_is_frozen(name):
    """Nor once it is toggled, though the step has been traced before."""
    layer = layer_of(name)
    x, states = tf.zeros((B, T, D), "float64"), layer.get_initial_state(B)
    for trainable in (True, False, True):
        layer.trainable = trainable
        trained = layer._step(x, states, training=True).cell.division.trace.trained
        assert set(trained) == {trainable}


# --- Dropout


@pytest.mark.parametrize("options", [{}, {"recurrent_dropout": 0.4}], ids=str)
@pytest.mark.parametrize("implementation", [1, 2])
@every_layer
def test_factors_of_each_gate(name, implementation, options):
    """As Keras draws them: some of each gate, or one for all of them."""
    options = {"dropout": 0.4, "seed": 3, "implementation": implementation} | options
    # Keras' own layer, which would try cuDNN first, fails with several factors.
    theirs = host_of(name, dtype="float64", use_cudnn=False, **options)
    ours = layer_of(name, **options)
    several = implementation == 1 or "recurrent_dropout" in options
    drawn = ours.cell.get_dropout_mask(tf.ones((B, D), "float64"))
    ours.cell.reset_dropout_mask()
    ours.cell.seed_generator.state.assign(theirs.cell.seed_generator.state)
    assert isinstance(drawn, list) == several
    x = random_inputs(B, T, D)
    expected = evaluate(theirs, x, "plain", training=True)
    assert_same(evaluate(ours, x, "graph", training=True), expected)


@every_layer
def test_factors_like_a_state_of_unknown_size(name):
    theirs, ours = twins(name, recurrent_dropout=0.4, seed=3)
    x, call = random_inputs(B, T, D), {"state": states_of(name), "training": True}
    expected = evaluate(theirs, x, "plain", **call)
    assert_same(evaluate(Unknown(ours), x, "graph", **call), expected)


@every_layer
def test_a_share_of_1_is_ignored(name):
    """By Keras' cells with gates, other than by SimpleRNN's."""
    theirs, ours = twins(name, dropout=1.0, recurrent_dropout=1.0)
    x = random_inputs(B, T, D)
    expected = evaluate(theirs, x, "plain", training=True)
    assert_same(evaluate(ours, x, "plain", training=True), expected)


# --- Activations


class Scaled:
    """A user's function with a number that may change."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, z):
        return tf.tanh(self.scale * z)


@every_layer
def test_a_function_that_changes_is_seen(name):
    functions = {"activation": Scaled(1.0), "recurrent_activation": Scaled(0.5)}
    theirs, ours = twins(name, **functions)
    x, results = random_inputs(B, T, D), []
    for scale in (1.0, 0.3):
        functions["activation"].scale = scale
        expected = evaluate(theirs, x, training=True)
        results.append(evaluate(ours, x, training=True))
        assert_same(results[-1], expected)
    assert relative_error(results[1]["y0"], results[0]["y0"]) > 1e-2


@every_layer
def test_an_activation_that_is_set_is_seen(name):
    theirs, ours = twins(name)
    x = random_inputs(B, T, D)
    for activation in (keras.activations.tanh, keras.activations.relu):
        theirs.cell.activation = ours.cell.activation = activation
        assert_same(
            evaluate(ours, x, training=True), evaluate(theirs, x, training=True)
        )


@every_layer
def test_a_weight_in_an_activation_has_its_gradient(name):
    slope = tf.Variable(0.7, dtype="float64")
    gradients = []
    for layer in twins(name, activation=lambda z: tf.tanh(slope * z)):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(random_inputs(B, T, D), training=True) ** 2)
        gradients.append(tape.gradient(loss, slope))
    assert abs(float(gradients[1])) > 1e-2
    assert relative_error(gradients[1], gradients[0]) < FLOAT64


def test_a_step_of_functions_of_keras_is_traced_once(monkeypatch):
    """Whatever the layer; an eager call costs no tracing then."""
    traced, trace = [], compiling.trace
    monkeypatch.setattr(
        compiling, "trace", lambda *args: traced.append(args[0]) or trace(*args)
    )
    compiling._of_keras.cache_clear()
    for _ in range(2):
        layer = layer_of("BPTTLSTM", units=3)
        layer(random_inputs(B, T, D), training=True)
        layer(random_inputs(B, T + 1, D), training=True)
    assert traced == ["LSTM"]
    layer_of("BPTTLSTM", units=4)(random_inputs(B, T, D), training=True)
    assert traced == ["LSTM"] * 2


REFUSED = {
    "shape": (lambda z: z[:, :1], "keep shape and dtype.*returns one like it"),
    "dtype": (lambda z: tf.cast(z, "float32"), "keep shape and dtype"),
    "examples": (lambda z: z - tf.reduce_mean(z, 0), "each example"),
    "number": (lambda z: z - tf.reduce_mean(z), "each example"),
    "random": (lambda z: z + tf.random.normal(tf.shape(z), dtype=z.dtype), "random"),
}


@pytest.mark.parametrize("which", ["activation", "recurrent_activation"])
@pytest.mark.parametrize("name", REFUSED)
def test_activations_that_are_refused(name, which):
    function, words = REFUSED[name]
    layer = BPTTGRU(H, dtype="float64", **{which: function})
    with pytest.raises(ValueError, match=f"(?s){words}"):
        layer(random_inputs(B, T, D), training=True)


# --- cuDNN


@every_layer
def test_cudnn_is_refused_in_words(name):
    layer, host = LAYERS[name], LAYERS[name].__name__.removeprefix("BPTT")
    for value in (True, 1, "yes", None):
        words = f"'auto' or False.*use_cudnn={value!r}.*keras.layers.{host} for cuDNN"
        with pytest.raises(ValueError, match=words):
            layer(H, use_cudnn=value)
    for value in ("auto", False):
        assert layer(H, use_cudnn=value).use_cudnn is False
        assert "use_cudnn" not in layer(H, use_cudnn=value).get_config()


@every_layer
def test_bidirectional_computes_nothing_in_its_place(name, monkeypatch):
    """Keras fuses both directions of an LSTM in one cuDNN call, where it may."""
    layer = keras.layers.Bidirectional(LAYERS[name](H, truncation=2))
    layer.build((B, T, D))
    for fused in ("_can_attempt_fused_lstm", "_can_attempt_fused_gru"):
        if hasattr(layer, fused):  # since Keras 3.15
            assert not getattr(layer, fused)(mask=None)
    # On a device that has cuDNN the layers would say so to `compile`.
    assert layer.forward_layer.supports_jit and layer.backward_layer.supports_jit


# --- Errors


ERRORS = {
    "units": (lambda make: make(0), "`units` must be a positive integer"),
    "misspelled": (
        lambda make: make(3, recurent_activation="tanh"),
        r"Did you mean `recurrent_activation`.*help\(keras_bptt.BPTT(LSTM|GRU)\)",
    ),
    "features": (
        lambda make: make(3)(np.zeros((B, T), "float32")),
        "takes inputs of shape .batch, timesteps, features",
    ),
    "output": (lambda make: make(3, output_activation="tanh"), "`output_units`"),
    "another cell": (
        lambda make: with_cell(make(H), keras.layers.SimpleRNNCell(H)),
        "never calls it.*BPTT.cell",
    ),
}


def with_cell(layer, cell):
    layer.cell = cell
    return layer(np.zeros((B, T, D), "float32"))


@pytest.mark.parametrize("error", ERRORS)
@every_layer
def test_errors(name, error):
    call, words = ERRORS[error]
    with pytest.raises(ValueError, match=f"(?s){words}"):
        call(LAYERS[name])


@pytest.mark.parametrize(
    ("name", "states", "words"),
    [
        ("BPTTLSTM", [(B, H)], "2 states as `initial_state`.*Received: 1"),
        ("BPTTLSTM", [(B, H), (B, H + 1)], "2 states.*one state for each example"),
        ("BPTTGRU", [(B, H)] * 2, "one `initial_state`.*Received: 2"),
        ("BPTTGRU", [(B + 1, H)], "one `initial_state`"),
    ],
)
def test_wrong_states(name, states, words):
    with pytest.raises(ValueError, match=f"(?s){words}"):
        layer_of(name)(
            random_inputs(B, T, D), initial_state=list(map(tf.zeros, states))
        )


@every_layer
def test_weights_of_the_host_in_a_file(name, tmp_path):
    """They are not found there, and the error says how they get in."""
    host = keras.Sequential([keras.Input((T, D)), host_of(name)])
    host.save_weights(path := tmp_path / "host.weights.h5")
    ours = keras.Sequential([keras.Input((T, D)), layer_of(name)])
    host = name.removeprefix("BPTT")
    with pytest.raises(
        ValueError, match=f"of this {name}.*those of a {host} .*convert"
    ):
        ours.load_weights(path)


# --- Long, in half precision


ROUNDING = {"mixed_float16": 2**-11, "mixed_bfloat16": 2**-8}


@pytest.mark.slow
@pytest.mark.parametrize("policy", ROUNDING)
@every_layer
def test_ten_thousand_steps_in_half_precision(name, policy):
    """No gradient is off by more than twice what Keras' own layer's is."""
    x, errors = 0.5 * random_inputs(B, 10_000, D), []
    call = {"training": True}
    options = {"return_sequences": True, "radius": 0.3}
    exact = evaluate(host_of(name, dtype="float32", **options), x, "graph", **call)
    theirs = host_of(name, dtype=policy, **options)
    ours = layer_of(name, dtype=policy, **options)
    for layer in (theirs, ours):
        got = evaluate(layer, x, "graph", **call)
        errors.append({key: relative_error(got[key], exact[key]) for key in exact})
    for key, error in errors[1].items():
        assert error < 2 * max(errors[0][key], ROUNDING[policy]), (key, errors)
