"""The layer with checkpoints against `keras.layers.SimpleRNN`, whose weights it has.

Options, modes and lengths; then configuration, saving, `fit` and wrong arguments. That the
gradient of a truncation stays what it is without checkpoints is compared with the layer's
own.
"""

import functools
import itertools
import json
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    FLOAT32,
    FLOAT64,
    MODES,
    B,
    D,
    H,
    assert_near,
    assert_same,
    draw_call,
    evaluate,
    examples,
    few,
    pair,
    plain,
    random_inputs,
    random_weights,
    relative_error,
    rng,
    without_graphs,
)
from hypothesis import given
from hypothesis import strategies as st

from keras_bptt import BPTTRNN, RandomizedTruncation, Truncation

T = 8
STATE = random_inputs(B, H, seed=5)
# Row by row: holes after a masked start, a masked end, nothing but masked steps.
MASK = np.array([[0, 1, 1, 0, 1, 1, 1, 1], [1] * 3 + [0] * 5, [0] * 8], bool)


def pair_of(every, own=None, **options):
    """A SimpleRNN, and a BPTTRNN with checkpoints; `own` are options that only it has."""
    theirs, twin = pair(**options)
    options = {"dtype": "float64"} | options | (own or {})
    batch, features = options.pop("batch", B), options.pop("features", D)
    options.pop("radius", None)
    ours = BPTTRNN(options.pop("units", H), checkpoint_every=every, **options)
    ours.build((batch, None, features))
    ours.cell.set_weights(twin.cell.get_weights())
    return theirs, ours


def check(every, mode="eager", options=None, own=None, **call):
    """BPTTRNN with checkpoints against SimpleRNN."""
    options = options or {}
    random = options.get("dropout") or options.get("recurrent_dropout")
    theirs, ours = pair_of(every, own, **options)
    x = random_inputs(B, T, D)
    expected = evaluate(theirs, x, plain(mode, random), **call)
    assert_same(evaluate(ours, x, mode, **call), expected)


def some(chosen, *axes):
    """The chosen cases; and all others of the axes, which take long, together."""
    others = (case for case in itertools.product(*axes) if case not in chosen)
    return [*chosen, *(pytest.param(*case, marks=pytest.mark.slow) for case in others)]


# --- Against SimpleRNN

OPTIONS = {
    "last output": {},
    "sequence and state": {"return_sequences": True, "return_state": True},
    "no bias": {"use_bias": False, "return_state": True},
    "backwards": {"go_backwards": True, "return_sequences": True},
    "zero output": {"zero_output_for_mask": True, "return_sequences": True},
    "gelu": {"activation": "gelu", "return_sequences": True},
    "softmax": {"activation": "softmax", "return_sequences": True},
    "both dropouts": {
        "dropout": 0.3,
        "recurrent_dropout": 0.3,
        "return_sequences": True,
        "seed": 3,
    },
    "unrolled": {"unroll": True, "return_sequences": True},
    # Not L1, which some versions of Keras have in float32 alone.
    "regularized": {
        "recurrent_regularizer": "l2",
        "kernel_regularizer": keras.regularizers.L2(0.2),
    },
}


@pytest.mark.parametrize(
    ("option", "masked", "mode", "every", "training"),
    some(
        [
            *(
                (option, True, "plain", [3, "sqrt"][i % 2], True)
                for i, option in enumerate(OPTIONS)
            ),
            ("sequence and state", False, "eager", 2, False),
            ("both dropouts", False, "graph", "sqrt", True),
            ("sequence and state", True, "xla", 3, True),
            ("last output", False, "graph", 20, False),
        ],
        OPTIONS,
        [False, True],
        MODES,
        [3, "sqrt"],
        [True],
    ),
)
def test_option(option, masked, mode, every, training):
    call = {"mask": MASK} if masked else {}
    check(
        every,
        mode=mode,
        options=OPTIONS[option],
        state=STATE,
        training=training,
        **call,
    )


@pytest.mark.parametrize(
    ("jit_compile", "option", "mode"),
    some(
        [
            (True, "last output", "graph"),
            pytest.param(False, "sequence and state", "graph", marks=pytest.mark.slow),
        ],
        [True, "auto"],
        OPTIONS,
        ["eager", "graph"],
    ),
)
def test_compiled_and_not(jit_compile, option, mode):
    options, own = OPTIONS[option], {"jit_compile": jit_compile}
    call = {"mask": MASK, "state": STATE, "training": True}
    if options.get("dropout") and jit_compile:
        pytest.skip("XLA draws other masks from the same seed")
    check(3, mode=mode, options=options, own=own, **call)


@pytest.mark.parametrize("every", [2, "sqrt"])
def test_stateful(every):
    """The state goes on from batch to batch, as that of SimpleRNN."""
    results = []
    first, second = (random_inputs(B, T, D, seed=seed) for seed in (1, 4))
    for layer in pair_of(every, stateful=True, return_sequences=True):
        with without_graphs():
            layer(tf.constant(first), training=True)
            results.append(evaluate(layer, second, training=True))
    assert_same(results[1], results[0])


@pytest.mark.parametrize(
    ("masked", "every"),
    few(
        itertools.product([False, True], [3, "sqrt"]),
        lambda masked, every: masked == (every == 3),
    ),
)
def test_bidirectional(masked, every):
    results = []
    for layer_class, own in (
        (keras.layers.SimpleRNN, {}),
        (BPTTRNN, {"checkpoint_every": every}),
    ):
        inner = layer_class(H, return_sequences=True, dtype="float64", **own)
        layer = keras.layers.Bidirectional(inner, dtype="float64")
        layer.build((B, T, D))
        layer.set_weights([*random_weights(), *random_weights(seed=7)])
        call = {"mask": MASK} if masked else {}
        x = random_inputs(B, T, D)
        with without_graphs():
            results.append(evaluate(layer, x, training=True, **call))
        if own:
            assert layer.forward_layer.checkpoint_every == every
            assert layer.backward_layer.checkpoint_every == every
    assert_same(results[1], results[0])


@pytest.mark.parametrize(
    ("policy", "tolerance"),
    [("float32", FLOAT32), ("mixed_bfloat16", 40 * 2**-8)],
)
def test_other_precisions(policy, tolerance):
    """In bfloat16 what SimpleRNN gives in float64, to the rounding of some 40 sums."""
    options = {"return_sequences": True, "return_state": True}
    theirs, _ = pair(**options)
    _, ours = pair_of(3, dtype=policy, **options)
    x, call = random_inputs(B, T, D), {"state": STATE, "mask": MASK}
    with without_graphs():
        expected = evaluate(theirs, x, **call)
        got = evaluate(ours, x, training=True, **call)
    assert got["d_0_kernel"].dtype == np.float32
    assert got["d_x"].dtype == got["y0"].dtype == ours.compute_dtype
    for name, array in expected.items():
        assert np.all(np.isfinite(got[name].astype("float32"))), name
        assert relative_error(got[name], array) < tolerance, name


@pytest.mark.parametrize(
    ("every", "mode"),
    few(
        itertools.product([3, "sqrt"], MODES),
        lambda every, mode: (every, mode) == ("sqrt", "graph"),
    ),
)
def test_one_model_for_several_lengths(every, mode):
    """Of unknown length where it is traced; then one graph for all."""
    models = []
    for layer in pair_of(every, return_sequences=True):
        inputs = keras.Input((None, D), dtype="float64")
        models.append(keras.Model(inputs, layer(inputs)))
    weights = [[v.value for v in model.trainable_variables] for model in models]

    def gradients(x, c, i):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = models[i](x, training=True)
            loss = tf.reduce_sum(c * y)
        return y, *tape.gradient(loss, [x, *weights[i]])

    wanted = functools.partial(gradients, i=0)
    got = functools.partial(gradients, i=1)
    if mode != "eager":
        specs = [tf.TensorSpec((None, None, n), "float64") for n in (D, H)]
        compiled = mode == "xla"
        got = tf.function(got, input_signature=specs, jit_compile=compiled)
    for batch, steps in ((B, T), (2, 17), (4, 1), (1, 9)):
        x, c = random_inputs(batch, steps, D), random_inputs(batch, steps, H, seed=2)
        pairs = zip(got(tf.constant(x), c), wanted(tf.constant(x), c), strict=True)
        for a, b in pairs:
            assert relative_error(a, b) < FLOAT64


# --- Combinations


@st.composite
def problems(draw):
    flag = st.booleans()
    size = st.integers(1, 4)
    batch, features, units = draw(st.tuples(size, size, size))
    time = draw(st.one_of(st.integers(1, 9), st.sampled_from([12, 17])))
    # Keras warns of a softmax of one unit, which is 1.
    activations = ["tanh", "gelu", "softmax"] if units > 1 else ["tanh", "gelu"]
    options = {
        "units": units,
        "features": features,
        "batch": batch,
        "activation": draw(st.sampled_from(activations)),
        "use_bias": draw(flag),
        "return_sequences": draw(flag),
        "return_state": draw(flag),
        "go_backwards": draw(flag),
        "zero_output_for_mask": draw(flag),
        "unroll": draw(st.sampled_from([False, False, True])),
    }
    x, call = draw_call(draw, batch, time, features, units)
    call["training"] = draw(st.sampled_from([True, True, False]))
    every = draw(st.one_of(st.integers(1, time + 2), st.just("sqrt")))
    own = {"jit_compile": draw(st.sampled_from([False, False, "auto"]))}
    return every, options, own, call, x, draw(st.sampled_from(list(MODES)))


def check_combination(problem):
    every, options, own, call, x, mode = problem
    theirs, ours = pair_of(every, own, **options)
    expected = evaluate(theirs, x, **call)
    got = evaluate(ours, x, mode, **call)
    assert_near(got, expected)


@examples(3, derandomize=True)
@given(problems())
def test_combination(problem):
    check_combination(problem)


@pytest.mark.slow
@examples(300)
@given(problems())
def test_many_combinations(problem):
    check_combination(problem)


# --- With a truncation

POLICIES = {
    "chunks": Truncation(3),
    "overlapping": Truncation(5, stride=2),
    "randomized": RandomizedTruncation(2.5, seed=7),
}


def layer_of(every, policy=None, seed=0, **options):
    options = {"dtype": "float64", "jit_compile": False} | options
    layer = BPTTRNN(H, truncation=policy, checkpoint_every=every, **options)
    layer.build((None, None, D))
    layer.cell.set_weights(random_weights(seed=seed))
    return layer


@pytest.mark.parametrize(
    ("policy", "sequence", "clip", "mode"),
    few(
        itertools.product(POLICIES, [True, False], [None, 0.7], ["plain", "graph"]),
        lambda *case: (
            case
            in [
                ("overlapping", True, 0.7, "plain"),
                ("overlapping", False, None, "plain"),
                ("chunks", True, None, "plain"),
                ("randomized", True, 0.7, "plain"),
                ("randomized", False, None, "plain"),
            ]
        ),
    ),
)
def test_truncation(policy, sequence, clip, mode):
    """The gradient of the same layer without checkpoints; of the same draw."""
    options = {"return_sequences": sequence, "adjoint_clipnorm": clip}
    layers = [layer_of(every, POLICIES[policy], **options) for every in (None, 3)]
    layers.append(layer_of(3, **options))
    expected, got, whole = (
        evaluate(
            layer, random_inputs(B, T, D), mode, state=STATE, mask=MASK, training=True
        )
        for layer in layers
    )
    # Of the paths to the initial state none may be left.
    assert_same(got, expected, dead=() if sequence else ("d_state0",))
    name = "d_1_recurrent_kernel"
    assert relative_error(whole[name], got[name]) > 1e-2, "the policy changed nothing"


def test_randomized_truncation_draws_once_a_call():
    """A gradient that is asked for again, and computes again, sees the same draw."""
    x = tf.constant(random_inputs(B, T, D))

    def gradients(layer, times=2):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x, training=True) ** 2)
        return [tape.gradient(loss, x).numpy() for _ in range(times)]

    policy = POLICIES["randomized"]
    layer = layer_of(2, policy, return_sequences=True)
    first, again = gradients(layer)
    np.testing.assert_array_equal(again, first)
    (second,) = gradients(layer, 1)
    assert relative_error(second, first) > 1e-2
    same = layer_of(2, policy, return_sequences=True)
    for want in (first, second):
        np.testing.assert_array_equal(gradients(same, 1)[0], want)


# --- Configuration, saving and training


@pytest.mark.parametrize("every", [1, 20, "sqrt", np.int64(5)])
def test_config_round_trip(every):
    layer = BPTTRNN(H, checkpoint_every=every)
    assert layer.checkpoint_every == every
    config = json.loads(json.dumps(layer.get_config()))
    again = BPTTRNN.from_config(config)
    assert again.checkpoint_every == every
    assert again.get_config() == layer.get_config()
    with pytest.raises((TypeError, ValueError)):
        keras.layers.SimpleRNN.from_config(config)


def test_config_without_checkpoints_goes_to_simplernn():
    config = BPTTRNN(H).get_config()
    assert BPTTRNN(H).checkpoint_every is None
    assert keras.layers.SimpleRNN.from_config(config).get_config() == config


def model_of(every, **options):
    """A functional model of unknown length, with a mask."""
    layer = BPTTRNN(H, checkpoint_every=every, **options)
    inputs = keras.Input((None, D))
    x = keras.layers.Masking(-9.0)(inputs)
    model = keras.Model(inputs, layer(x))
    layer.cell.set_weights(random_weights())
    model.compile(keras.optimizers.Adam(0.02), "mse")
    return model


def padded_inputs():
    x = random_inputs(B, T, D).astype("float32")
    x[~MASK] = -9.0
    return x


@pytest.mark.parametrize("every", ["sqrt", pytest.param(3, marks=pytest.mark.slow)])
def test_keras_file(every, tmp_path):
    """Training goes on as if nothing was."""
    model = model_of(every, return_sequences=True, jit_compile=False)
    x, y = padded_inputs(), random_inputs(B, T, H, seed=3)
    model.train_on_batch(x, y)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.layers[-1].checkpoint_every == every
    for each in (model, loaded):
        each.train_on_batch(x, y)
    for got, want in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("every", "jit_compile"),
    some([("sqrt", False)], [3, "sqrt"], [False, "auto"]),
)
def test_fit_as_without_checkpoints(every, jit_compile):
    """Batches of two sizes, of one length each; the loss falls as it does without."""
    x = random_inputs(40, 10, D).astype("float32")
    y = np.repeat(x[..., :1].sum(1), H, 1)
    losses = []
    for c in (every, None):
        model = model_of(c, jit_compile=jit_compile)
        fit = model.fit(x, y, epochs=3, batch_size=16, shuffle=False, verbose=0)
        losses.append(fit.history["loss"])
    assert losses[0][-1] < 0.95 * losses[0][0]
    assert relative_error(*losses) < 10 * FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize("every", [3, "sqrt"])
@pytest.mark.parametrize("sequence", [True, False])
def test_export_has_a_gradient(every, sequence, tmp_path):
    """Another batch and another length than any at which it was traced."""
    model = model_of(every, return_sequences=sequence)
    model.export(tmp_path, verbose=False)
    loaded = tf.saved_model.load(tmp_path)
    twin = keras.layers.SimpleRNN(H, return_sequences=sequence)
    twin.build((None, None, D))
    twin.set_weights(model.get_weights())
    mask = rng(5).random((2, 9)) < 0.7
    x = np.where(mask[..., None], random_inputs(2, 9, D), -9.0).astype("float32")

    def gradients(call, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = call(x)
            loss = tf.reduce_sum(y * rng(2).normal(size=y.shape))
        weights = {tuple(v.shape): v for v in tape.watched_variables()}
        order = [weights[shape] for shape in ((D, H), (H, H), (H,))]
        return y, *tape.gradient(loss, [x, *order])

    expected = gradients(lambda x: twin(x, mask=tf.constant(mask)), tf.constant(x))
    for mode in ("graph", "eager"):
        got = MODES[mode](functools.partial(gradients, loaded.serve))(tf.constant(x))
        for a, b in zip(got, expected, strict=True):
            assert relative_error(a, b) < FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize("every", ["sqrt", 3])
def test_saved_training_step(every, tmp_path):
    """The gradient itself, saved as part of a graph."""
    theirs, layer = pair_of(every, {"jit_compile": False}, return_sequences=True)

    class Step(tf.Module):
        def __init__(self):
            self.weights = [v.value for v in layer.trainable_variables]

        @tf.function(
            input_signature=[
                tf.TensorSpec((None, None, D), tf.float64),
                tf.TensorSpec((None, None, H), tf.float64),
            ]
        )
        def gradients(self, x, c):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(c * layer(x, training=True))
            return tape.gradient(loss, self.weights)

    tf.saved_model.save(Step(), str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    for batch, steps in ((B, T), (2, 12), (4, 3)):
        x = random_inputs(batch, steps, D)
        expected = list(evaluate(theirs, x).values())[2:]
        c = rng(2).normal(size=(batch, steps, H))
        got = loaded.gradients(tf.constant(x), tf.constant(c))
        for a, b in zip(got, expected, strict=True):
            assert relative_error(a, b) < FLOAT64


# --- Wrong arguments


@pytest.mark.parametrize("every", [0, -1, 2.5, True, "log", [3]], ids=str)
def test_wrong_argument(every):
    said = (
        "`checkpoint_every` must be a positive integer, the number of steps from one state "
        "that is kept to the next, 'sqrt' (the square root of the number of timesteps), or "
        f"None (every state is kept). Received: checkpoint_every={every!r}."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        BPTTRNN(H, checkpoint_every=every)
