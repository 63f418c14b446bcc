"""BPTTRNN with an output layer against an RNN and a Dense layer with the same weights.

What a SimpleRNN has not, such as a truncation, a BPTTRNN without an output layer has: then
that stands below the Dense layer. Outputs, the returned state and all gradients under
random cotangents, option by option; then losses, shapes, configuration and saving.
"""

import itertools
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    FLOAT32,
    FLOAT64,
    MIXED_MASK,
    MODES,
    WAYS,
    B,
    D,
    H,
    T,
    assert_near,
    assert_same,
    draw_call,
    evaluate,
    examples,
    few,
    needs_keras,
    plain,
    random_inputs,
    random_weights,
    relative_error,
    rng,
    without_graphs,
)
from hypothesis import given
from hypothesis import strategies as st

from keras_bptt import BPTTRNN, RandomizedTruncation, Truncation, reference

O = 2  # noqa: E741
STATE = random_inputs(B, H, seed=5)
# Arguments that SimpleRNN does not take.
OURS = {"truncation", "checkpoint_every", "adjoint_clipnorm", "jit_compile"}


class Stack(keras.layers.Layer):
    """An RNN and, at every step or after the last, a Dense layer."""

    def __init__(self, rnn, dense, **options):
        super().__init__(**options)
        self.rnn, self.dense = rnn, dense
        self.supports_masking = True

    def build(self, shape):
        self.rnn.build(shape)
        step = [self.rnn.units]
        distributed = isinstance(self.dense, keras.layers.TimeDistributed)
        self.dense.build((None, *[None] * distributed, *step))
        self.built = True

    def call(self, x, initial_state=None, mask=None, training=False):
        outputs = self.rnn(x, initial_state=initial_state, mask=mask, training=training)
        y, *state = tf.nest.flatten(outputs)
        return [self.dense(y), *state] if state else self.dense(y)

    def compute_mask(self, x, mask=None):
        return self.rnn.compute_mask(x, mask)


def output_weights(units=H, outputs=O, use_bias=True, seed=8):
    random = rng(seed)
    V = random.normal(size=(units, outputs)) / np.sqrt(units)
    return [V, random.normal(size=outputs)] if use_bias else [V]


def pair(units=H, features=D, outputs=O, g=None, distribute=False, **options):
    """The stack and the layer, with the same weights; float64 if unsaid."""
    options = {"dtype": "float64"} | options
    layer_class = BPTTRNN if OURS & options.keys() else keras.layers.SimpleRNN
    of_dense = ("use_bias", "kernel_regularizer", "bias_regularizer")
    of_dense += ("kernel_constraint", "bias_constraint", "dtype")
    dense = keras.layers.Dense(
        outputs, g, **{name: options[name] for name in of_dense if name in options}
    )
    dtype = options["dtype"]
    if distribute:
        dense = keras.layers.TimeDistributed(dense, dtype=dtype)
    theirs = Stack(layer_class(units, **options), dense, dtype=dtype)
    ours = BPTTRNN(units, output_units=outputs, output_activation=g, **options)
    use_bias = options.get("use_bias", True)
    weights = random_weights(features, units, use_bias)
    weights += output_weights(units, outputs, use_bias)
    for layer in (theirs, ours):
        layer.build((B if options.get("stateful") else None, None, features))
        layer.set_weights(weights)
    return theirs, ours


def compare(x, mode="plain", tolerance=FLOAT64, *, dead=(), options=None, **call):
    options = options or {}
    theirs, ours = pair(**options)
    draws = ("dropout", "recurrent_dropout", "truncation")
    random = any(map(options.get, draws)) and call.get("training")
    expected = evaluate(theirs, x, plain(mode, random), **call)
    assert_same(evaluate(ours, x, mode, **call), expected, tolerance, dead)


# --- Output activations


@keras.saving.register_keras_serializable(package="test_output_layer")
def wave(p):
    return tf.sin(p) + 0.1 * p


def centred(p):
    """A user's function that mixes units, and not symmetrically."""
    return tf.tanh(p) + 0.5 * tf.sin(tf.cumsum(p, axis=-1))


ACTIVATIONS = {
    "none": None,
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "softmax": "softmax",
    "relu": "relu",
    "function": wave,
    "mixing function": centred,
    "tf.nn.softmax": tf.nn.softmax,
    "LeakyReLU layer": keras.layers.LeakyReLU(negative_slope=0.4, dtype="float64"),
}


@pytest.mark.parametrize(
    ("name", "sequence", "mode"),
    few(
        itertools.product(ACTIVATIONS, [True, False], WAYS),
        lambda name, sequence, mode: (
            (mode == "plain" and sequence != (name in ("none", "softmax", "relu")))
            or (name, sequence, mode) == ("softmax", True, "xla")
        ),
    ),
)
def test_output_activation(name, sequence, mode):
    options = {"g": ACTIVATIONS[name], "return_sequences": sequence, "outputs": 3}
    compare(random_inputs(), mode, options=options, state=STATE, training=True)


def test_equals_time_distributed_dense():
    options = {"g": "softmax", "return_sequences": True, "distribute": True}
    compare(random_inputs(), options=options, mask=MIXED_MASK)
    compare(random_inputs(), options=options)


@pytest.mark.parametrize(
    ("f", "mode"),
    few(
        itertools.product(["relu", "gelu", "softmax"], WAYS),
        lambda f, mode: f in ("gelu", "softmax") and mode == "plain",
    ),
)
def test_activation_below(f, mode):
    options = {"activation": f, "g": "softmax", "return_sequences": True}
    compare(random_inputs(), mode, options=options, mask=MIXED_MASK, training=True)


@pytest.mark.parametrize("f", ["tanh", "relu"])
@without_graphs()
def test_equals_the_reference_under_a_loss(f):
    """The cheat sheet to its end: o_t, l, and the gradients of everything."""
    _, layer = pair(activation=f, g="softmax", outputs=3, return_sequences=True)
    x, y = random_inputs(), rng(4).dirichlet(np.ones(3), size=(B, T))
    W, U, b, V, c = layer.get_weights()
    functions = {"f": f, "g": "softmax", "loss": "categorical_crossentropy"}
    network = reference.Network(W, U, b, V, c, STATE, **functions)
    sources = [tf.constant(x), tf.constant(STATE)]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        o = layer(sources[0], initial_state=sources[1], training=True)
        # Its default: the mean over the batch and the steps. The reference sums the batch.
        loss = B * keras.losses.CategoricalCrossentropy(dtype="float64")(y, o)
    got = tape.gradient(loss, [*sources, *(v.value for v in layer.trainable_variables)])
    run, d = (f(x, y, network) for f in (reference.forward, reference.gradients))
    assert relative_error(o, run.o) < FLOAT64
    assert relative_error(loss, run.loss) < FLOAT64
    names = (
        "inputs initial_state kernel recurrent_kernel bias output_kernel output_bias"
    )
    for name, gradient in zip(names.split(), got, strict=True):
        assert relative_error(gradient, getattr(d, f"d_{name}")) < FLOAT64, name


# --- Options

OPTIONS = {
    "last output": {},
    "sequence": {"return_sequences": True},
    "last output and state": {"return_state": True},
    "sequence and state": {"return_sequences": True, "return_state": True},
    "no bias": {"use_bias": False, "return_sequences": True},
    "backwards": {"go_backwards": True, "return_state": True},
    "backwards, sequence": {"go_backwards": True, "return_sequences": True},
    "unrolled, sequence": {"unroll": True, "return_sequences": True},
    "zero output": {"zero_output_for_mask": True, "return_state": True},
    "zero output, sequence": {"zero_output_for_mask": True, "return_sequences": True},
    "zero output, no bias": {
        "zero_output_for_mask": True,
        "return_sequences": True,
        "use_bias": False,
    },
    "both dropouts, backwards": {
        "dropout": 0.4,
        "recurrent_dropout": 0.4,
        "seed": 3,
        "go_backwards": True,
        "return_sequences": True,
        "return_state": True,
    },
    "regularizers": {
        "kernel_regularizer": "l2",
        # Not L1, which some versions of Keras have in float32 alone.
        "recurrent_regularizer": keras.regularizers.L2(0.2),
        "bias_regularizer": keras.regularizers.L2(0.3),
    },
    # From here on beside a BPTTRNN without an output layer.
    "chunks": {"truncation": 2, "return_sequences": True, "return_state": True},
    "chunks, last output": {"truncation": 2, "return_state": True},
    "sliding": {"truncation": Truncation(2, stride=1), "return_sequences": True},
    "overlapping, backwards": {
        "truncation": Truncation(3, stride=2),
        "return_sequences": True,
        "go_backwards": True,
    },
    "randomized": {
        "truncation": RandomizedTruncation(2.0, seed=4),
        "return_sequences": True,
    },
    "clipped": {"adjoint_clipnorm": 0.7, "return_sequences": True},
    "clipped, chunks": {
        "adjoint_clipnorm": 0.7,
        "truncation": 2,
        "return_sequences": True,
    },
    "checkpoints": {"checkpoint_every": 2, "return_sequences": True},
    "checkpoints, last output": {"checkpoint_every": "sqrt", "return_state": True},
    "checkpoints, chunks": {
        "checkpoint_every": 2,
        "truncation": Truncation(3, stride=2),
        "return_sequences": True,
    },
    "compiled": {"jit_compile": True, "return_sequences": True},
    "not compiled": {"jit_compile": False, "return_sequences": True},
    "two steps an iteration": {
        "unroll": 2,
        "jit_compile": "auto",
        "return_sequences": True,
    },
}
# With a mask, for all that is computed without one is computed with it too.
FEW_OPTIONS = {
    ("last output and state", "xla"),
    ("sequence and state", "graph"),
    ("no bias", "plain"),
    ("zero output, sequence", "plain"),
    ("zero output, no bias", "plain"),
    ("backwards", "plain"),
    ("both dropouts, backwards", "plain"),
    ("regularizers", "plain"),
    ("chunks", "plain"),
    ("chunks, last output", "plain"),
    ("overlapping, backwards", "plain"),
    ("randomized", "graph"),
    ("clipped, chunks", "plain"),
    ("checkpoints", "graph"),
    ("checkpoints, chunks", "plain"),
    ("compiled", "eager"),
    ("two steps an iteration", "plain"),
}


@pytest.mark.parametrize(
    ("name", "masked", "mode"),
    few(
        itertools.product(OPTIONS, [False, True], WAYS),
        lambda name, masked, mode: masked and (name, mode) in FEW_OPTIONS,
    ),
)
def test_option(name, masked, mode):
    mask = {"mask": MIXED_MASK} if masked else {}
    call = {"state": STATE, "training": True, **mask}
    # No window is as long as the sequence; a draw may end every path to h_0.
    dead = ("d_state0",) if "truncation" in OPTIONS[name] else ()
    options = OPTIONS[name] | {"g": "sigmoid"}
    compare(random_inputs(), mode, options=options, dead=dead, **call)


def test_regularizers_apply_to_the_output_layer():
    options = OPTIONS["regularizers"]
    theirs, ours = pair(**options)
    assert relative_error(sum(ours.losses), sum(theirs.losses)) < FLOAT64
    without = BPTTRNN(H, dtype="float64", **options)
    without.build((None, None, D))
    without.set_weights(ours.get_weights()[:3])
    V, c = ours.get_weights()[3:]
    of_output = 0.01 * np.sum(V**2) + 0.3 * np.sum(c**2)
    assert float(sum(ours.losses) - sum(without.losses)) == pytest.approx(of_output)


@pytest.mark.parametrize("sequence", [False, True], ids=["last output", "sequence"])
@without_graphs()
def test_activity_regularizer(sequence):
    """Of what the layer returns: outputs, and the state where it is one of them."""
    layers = pair(return_sequences=sequence, return_state=sequence, g="tanh")
    for layer in layers:
        layer.activity_regularizer = keras.regularizers.L2(0.3)
    expected, got = (evaluate(layer, random_inputs()) for layer in layers)
    assert_same(got, expected)
    assert float(sum(layers[0].losses)) > 0


def test_constraint():
    """One step of training leaves V and c where it leaves those of a Dense layer."""
    weights = []
    for layer in pair(
        kernel_constraint="non_neg",
        recurrent_constraint=keras.constraints.MaxNorm(0.7),
        bias_constraint="unit_norm",
    ):
        model = keras.Sequential([layer])
        model.dtype_policy = "float64"
        model.compile("sgd", "mse")
        model.train_on_batch(random_inputs(), random_inputs(B, O))
        weights.append(model.get_weights())
    for expected, got in zip(*weights, strict=True):
        assert relative_error(got, expected) < FLOAT64
    assert np.min(weights[1][3]) == 0
    assert np.linalg.norm(weights[1][4]) == pytest.approx(1)


@without_graphs()
def test_frozen():
    theirs, ours = pair(return_sequences=True)
    theirs.trainable = ours.trainable = False
    results = [evaluate(layer, random_inputs()) for layer in (theirs, ours)]
    assert list(results[1]) == ["y0", "d_x"]
    assert_same(results[1], results[0])
    ours.trainable = True
    ours.output_layer.trainable = False
    got = evaluate(ours, random_inputs())
    assert list(got) == ["y0", "d_x", "d_0_kernel", "d_1_recurrent_kernel", "d_2_bias"]


@pytest.mark.parametrize("sequence", [False, True], ids=["last output", "sequence"])
@without_graphs()
def test_stateful(sequence):
    """What goes on from call to call is h_T, not o_T."""
    theirs, ours = pair(stateful=True, return_sequences=sequence, g="tanh")
    for call in range(3):
        x = random_inputs(seed=call)
        expected, got = (evaluate(layer, x) for layer in (theirs, ours))
        assert_same(got, expected)
        np.testing.assert_allclose(ours.states[0], theirs.rnn.states[0], rtol=FLOAT64)
    assert ours.states[0].shape == (B, H)


class Both(keras.layers.Layer):
    """Two stacks, the second of which goes backwards."""

    def __init__(self, there, back, **options):
        super().__init__(**options)
        self.there, self.back = there, back
        self.supports_masking = True

    def call(self, x, mask=None, training=False):
        y = self.there(x, mask=mask, training=training)
        z = self.back(x, mask=mask, training=training)
        return tf.concat([y, tf.reverse(z, [1]) if len(z.shape) == 3 else z], -1)


@pytest.mark.parametrize("sequence", [False, True], ids=["last output", "sequence"])
@without_graphs()
def test_bidirectional(sequence):
    options = {"return_sequences": sequence, "g": "softmax", "outputs": 3}
    # Keras' Bidirectional sets it for sequences: y_t is 0 at masked steps, o_t is g(c).
    told = options | {"zero_output_for_mask": sequence}
    there, back = pair(**told)[0], pair(**told, go_backwards=True)[0]
    theirs = Both(there, back, dtype="float64")
    layer = BPTTRNN(
        H,
        output_units=3,
        output_activation="softmax",
        return_sequences=sequence,
        dtype="float64",
    )
    ours = keras.layers.Bidirectional(layer, dtype="float64")
    ours.build((B, T, D))
    there.set_weights([w + 0.1 for w in there.get_weights()])
    ours.set_weights([*there.get_weights(), *back.get_weights()])
    assert ours.compute_output_shape((B, T, D)) == (B, *[T] * sequence, 6)
    call = {"mask": MIXED_MASK, "training": True}
    results = [evaluate(layer, random_inputs(), **call) for layer in (theirs, ours)]
    assert_same(results[1], results[0])


@without_graphs()
def test_time_distributed():
    theirs, ours = (
        keras.layers.TimeDistributed(layer, dtype="float64") for layer in pair(g="tanh")
    )
    x = random_inputs(B, 2, T, D)
    for layer in (theirs, ours):
        layer.build(x.shape)
    assert_same(evaluate(ours, x), evaluate(theirs, x))


@without_graphs()
def test_one_below_another():
    """Outputs go on as the inputs of the next layer."""
    results = []
    for i in range(2):
        first = pair(return_sequences=True, g="softmax", outputs=3)[i]
        second = pair(features=3, units=5, outputs=2)[i]
        model = keras.Sequential([first, second])
        model.dtype_policy = keras.DTypePolicy("float64")
        results.append(evaluate(model, random_inputs(), training=True))
    assert_same(results[1], results[0])


def test_mask_of_a_masking_layer_reaches_the_loss():
    x, y = random_inputs(), random_inputs(B, T, O)
    x[~MIXED_MASK] = -1.0
    losses = []
    for layer in pair(return_sequences=True, g="tanh"):
        model = keras.Sequential([keras.layers.Masking(-1.0, dtype="float64"), layer])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        losses.append([model.train_on_batch(x, y) for _ in range(2)])
    assert relative_error(losses[1], losses[0]) < FLOAT32
    assert losses[1][1] < losses[1][0]


# --- Types and shapes


@pytest.mark.parametrize(
    ("name",),
    few(
        [("sequence and state",), ("checkpoints",), ("chunks",)],
        lambda name: name == "sequence and state",
    ),
)
def test_float32(name):
    options = OPTIONS[name] | {"dtype": "float32", "g": "softmax"}
    dead = ("d_state0",) if name == "chunks" else ()
    call = {"state": STATE, "mask": MIXED_MASK, "training": True, "dead": dead}
    compare(random_inputs(), tolerance=FLOAT32, options=options, **call)


@pytest.mark.parametrize(
    ("policy", "mode"),
    few(
        itertools.product(["mixed_float16", "mixed_bfloat16"], WAYS),
        lambda policy, mode: (
            mode == ("graph" if policy == "mixed_float16" else "plain")
        ),
    ),
)
def test_mixed_precision(policy, mode):
    """As in `test_layers.test_mixed_precision`: some 20 roundings, on both sides."""
    tolerance = 40 * {"mixed_float16": 2**-11, "mixed_bfloat16": 2**-8}[policy]
    options = {"return_sequences": True, "return_state": True, "g": "tanh"}
    x, call = random_inputs(), {"state": STATE, "training": True}
    exact = evaluate(pair(**options, dtype="float32")[0], x, **call)
    theirs, ours = pair(**options, dtype=policy)
    expected = evaluate(theirs, x, **call)
    got = evaluate(ours, x, mode, **call)
    assert_same(got, expected, tolerance)
    for name in got:
        assert relative_error(got[name], exact[name]) < tolerance / 2, name
    assert got["d_3_kernel"].dtype == got["d_4_bias"].dtype == np.float32
    assert got["y0"].dtype != np.float32


def test_weights_are_those_of_the_cell_then_of_the_output_layer():
    _, ours = pair(features=D)
    assert [w.name for w in ours.weights] == [
        *("kernel", "recurrent_kernel", "bias", "kernel", "bias")
    ]
    shapes = [(D, H), (H, H), (H,), (H, O), (O,)]
    assert [tuple(w.shape) for w in ours.weights] == shapes
    assert ours.output_layer.kernel is ours.weights[3]


def one_fifth(shape, dtype=None):
    return 0.2 * tf.ones(shape, dtype)


class Constant(keras.initializers.Initializer):
    """Without a configuration of its own, which Keras does not ask for."""

    def __init__(self, value):
        self.value = value

    def __call__(self, shape, dtype=None):
        return self.value * tf.ones(shape, dtype)


@pytest.mark.parametrize(
    "initializer", ["glorot_uniform", keras.initializers.HeNormal(), "orthogonal"]
)
def test_weights_of_one_shape_do_not_get_the_same_numbers(initializer):
    layer = BPTTRNN(
        H,
        output_units=H,
        kernel_initializer=initializer,
        recurrent_initializer="glorot_uniform",
        bias_initializer=keras.initializers.RandomNormal(),
    )
    layer.build((None, None, H))
    W, U, b, V, c = layer.get_weights()
    for first, second in itertools.combinations((W, U, V), 2):
        assert np.max(np.abs(first - second)) > 1e-2
    assert np.max(np.abs(b - c)) > 1e-3
    # Of the same kind all the same.
    if initializer == "orthogonal":
        np.testing.assert_allclose(V.T @ V, np.eye(H), atol=1e-5)


@pytest.mark.parametrize("initializer", [one_fifth, Constant(0.2), "ones"])
def test_any_initializer(initializer):
    layer = BPTTRNN(H, kernel_initializer=initializer, output_units=O)
    layer.build((None, None, D))
    value = 1.0 if initializer == "ones" else 0.2
    assert np.all(layer.output_layer.kernel == np.float32(value))
    assert np.all(layer.cell.kernel == np.float32(value))
    assert not np.any(layer.output_layer.bias)


def test_same_global_seed_gives_the_same_numbers():
    weights = []
    for _ in range(2):
        keras.utils.set_random_seed(4)
        layer = BPTTRNN(H, output_units=O)
        layer.build((None, None, D))
        weights.append(layer.get_weights())
    for first, second in zip(*weights, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("sequence", [False, True], ids=["last output", "sequence"])
@pytest.mark.parametrize("state", [False, True], ids=["alone", "state"])
def test_shapes(state, sequence):
    options = {"return_sequences": sequence, "return_state": state}
    layer = BPTTRNN(H, output_units=O, output_activation="softmax", **options)
    for batch, steps in ((None, None), (B, T)):
        inputs = keras.Input(batch_shape=(batch, steps, D))
        shapes = [tuple(y.shape) for y in tf.nest.flatten(layer(inputs))]
        expected = [(batch, steps, O) if sequence else (batch, O)]
        expected += [(batch, H)] * state
        assert shapes == expected
        got = layer.compute_output_shape((batch, steps, D))
        assert [tuple(s) for s in (got if state else [got])] == expected
    traced = []

    @tf.function(input_signature=[tf.TensorSpec((None, T, D))])
    def call(x):
        outputs = tf.nest.flatten(layer(x, training=True))
        traced.append([y.shape.as_list() for y in outputs])
        return outputs

    got = [tuple(y.shape) for y in call(tf.zeros((B, T, D)))]
    assert got == expected
    assert traced == [[[None, *shape[1:]] for shape in expected]]


@pytest.mark.parametrize(
    ("batch", "steps", "masked"), [(0, T, True), (B, 1, True), (1, 1, False)]
)
@without_graphs()
def test_sizes(batch, steps, masked):
    mask = {"mask": rng(1).random((batch, steps)) < 0.8} if masked else {}
    options = {"return_sequences": True, "return_state": True, "g": "softmax"}
    theirs, ours = pair(**options)
    call = {"state": random_inputs(batch, H, seed=5), "training": True, **mask}
    x = random_inputs(batch, steps, D)
    expected = evaluate(theirs, x, **call)
    assert_same(evaluate(ours, x, **call), expected, dead=expected)


# --- Losses

TARGETS = {
    "categorical_crossentropy": lambda: np.eye(3)[rng(4).integers(0, 3, (B, T))],
    "sparse_categorical_crossentropy": lambda: rng(4).integers(0, 3, (B, T)),
    "binary_crossentropy": lambda: rng(4).integers(0, 2, (B, T, 3)),
}


@pytest.mark.parametrize(
    ("loss", "how", "sequence"),
    few(
        itertools.product(
            TARGETS, ["graph", "run_eagerly", "jit_compile"], [True, False]
        ),
        lambda loss, how, sequence: (
            (loss[:6], how, sequence)
            in [
                ("catego", "graph", True),
                ("binary", "run_eagerly", True),
                ("sparse", "graph", False),
            ]
        ),
    ),
)
def test_losses_find_the_logits(loss, how, sequence):
    """Of probabilities that are clipped to 1e-7 no loss is more than 16."""
    g = "sigmoid" if loss[:6] == "binary" else "softmax"
    y = TARGETS[loss]() if sequence else TARGETS[loss]()[:, -1]
    results = []
    for layer in pair(g=g, outputs=3, return_sequences=sequence, dtype="float32"):
        W, U, b, V, c = layer.get_weights()
        layer.set_weights([W, U, b, V, np.array([90.0, -90.0, 1.0])])
        model = keras.Sequential([layer])
        flags = {} if how == "graph" else {how: True}
        model.compile(keras.optimizers.SGD(0.1), loss, **flags)
        value = model.train_on_batch(random_inputs().astype("float32"), y)
        results.append([value, *model.get_weights()])
    assert results[1][0] > 16.2
    for got, expected in zip(results[1], results[0], strict=True):
        assert relative_error(got, expected) < FLOAT32
    before = output_weights(outputs=3)[0]
    assert relative_error(results[1][4], before) > 1e-3, "nothing was learned"


@pytest.mark.parametrize(
    ("options",),
    few(
        [({},), ({"checkpoint_every": 3},), ({"truncation": 3},)],
        lambda options: not options,
    ),
)
def test_fit_lowers_the_loss(options):
    """The sign of a feature's running sum, at every step: solved by memory."""
    keras.utils.set_random_seed(1)
    x = rng(3).normal(size=(64, T, D)).astype("float32")
    y = (np.cumsum(x[..., 0], 1) > 0).astype("float32")
    layer = BPTTRNN(
        16,
        output_units=2,
        output_activation="softmax",
        return_sequences=True,
        **options,
    )
    model = keras.Sequential([keras.Input((None, D)), layer])
    model.compile(keras.optimizers.Adam(0.02), "sparse_categorical_crossentropy")
    losses = model.fit(x, y, epochs=8, batch_size=16, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]


# --- Derivatives of other kinds


@pytest.mark.parametrize(
    ("sequence",), few([(False,), (True,)], lambda sequence: not sequence)
)
def test_jacobian(sequence):
    theirs, ours = pair(return_sequences=sequence, g="softmax", outputs=3)
    x, jacobians = tf.constant(random_inputs(2, 3, D)), []
    for layer in (theirs, ours):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = layer(x, training=True)
        V = layer.trainable_variables[3].value
        jacobians.append(tape.jacobian(y, [x, V], experimental_use_pfor=layer is ours))
    for got, expected in zip(jacobians[1], jacobians[0], strict=True):
        assert got.shape == expected.shape
        assert relative_error(got, expected) < FLOAT64


@pytest.mark.parametrize("sequence", [False, True], ids=["last output", "sequence"])
@without_graphs()
def test_second_derivative(sequence):
    results = []
    for layer in pair(return_sequences=sequence, g="softmax", outputs=3):
        x = tf.constant(random_inputs())
        sources = [x, *(v.value for v in layer.trainable_variables)]
        with tf.GradientTape() as outer:
            outer.watch(sources)
            with tf.GradientTape() as inner:
                inner.watch(sources)
                y = layer(x, mask=MIXED_MASK, training=True)
                loss = tf.reduce_sum(y**2 * rng(2).normal(size=y.shape))
            first = inner.gradient(loss, sources)
            random = rng(3)
            scalar = tf.add_n(
                [tf.reduce_sum(g * random.normal(size=g.shape)) for g in first]
            )
        results.append(outer.gradient(scalar, sources))
    for got, expected in zip(results[1], results[0], strict=True):
        assert np.max(np.abs(expected)) > 1e-3
        assert relative_error(got, expected) < FLOAT64


# --- Combinations


@st.composite
def problems(draw):
    flag = st.booleans()
    size = st.integers(1, 4)
    batch, features, units, outputs = draw(st.tuples(size, size, size, size))
    time = draw(st.one_of(size, st.sampled_from([8, 11])))
    options = {
        "units": units,
        "features": features,
        "outputs": outputs,
        "activation": draw(st.sampled_from(["tanh", "relu", "gelu", centred])),
        "g": draw(st.sampled_from([None, "sigmoid", "softmax", wave])),
        "use_bias": draw(flag),
        "return_sequences": draw(flag),
        "return_state": draw(flag),
        "go_backwards": draw(flag),
        "zero_output_for_mask": draw(flag),
        "dropout": draw(st.sampled_from([0.0, 0.3])),
        "recurrent_dropout": draw(st.sampled_from([0.0, 0.3])),
        "seed": draw(st.integers(0, 9)),
        "kernel_regularizer": draw(st.sampled_from([None, "l2"])),
    }
    if draw(flag):
        steps = draw(st.integers(1, time + 1))
        kinds = [
            None,
            Truncation(steps),
            Truncation(steps, draw(st.integers(1, steps))),
        ]
        options |= {
            "truncation": draw(st.sampled_from(kinds)),
            "checkpoint_every": draw(st.sampled_from([None, 1, 3, "sqrt"])),
            "jit_compile": draw(st.sampled_from([False, "auto"])),
        }
    x, call = draw_call(draw, batch, time, features, units)
    call["training"] = draw(flag)
    return options, call, x, draw(st.sampled_from(list(MODES)))


def check_combination(problem):
    options, call, x, mode = problem
    theirs, ours = pair(**options)
    expected = evaluate(theirs, x, plain(mode), **call)
    got = evaluate(ours, x, mode, **call)
    assert_near(got, expected)


@examples(3, derandomize=True)
@given(problems())
def test_combination(problem):
    check_combination(problem)


@pytest.mark.slow
@examples(200)
@given(problems())
def test_many_combinations(problem):
    check_combination(problem)


# --- Configuration and saving


@pytest.mark.parametrize(
    "g",
    [
        None,
        "softmax",
        wave,
        pytest.param(
            keras.layers.ReLU(2.0),
            marks=needs_keras("3.10", "reading an activation that is a layer"),
        ),
    ],
)
def test_config_round_trip(g):
    layer = BPTTRNN(H, output_units=O, output_activation=g, return_sequences=True)
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    again = keras.saving.deserialize_keras_object(config)
    assert again.output_layer.units == O
    assert again.get_config() == layer.get_config()
    x = random_inputs().astype("float32")
    again.build(x.shape)
    layer.build(x.shape)
    again.set_weights(layer.get_weights())
    np.testing.assert_array_equal(again(x), layer(x))
    # Not silently a layer that returns its states.
    with pytest.raises((TypeError, ValueError)):
        keras.layers.SimpleRNN.from_config(layer.get_config())


def test_config_without_an_output_layer_says_nothing_of_it():
    assert not [key for key in BPTTRNN(H).get_config() if key.startswith("output")]
    assert BPTTRNN(H).output_layer is None


def classifier():
    layer = BPTTRNN(
        H,
        output_units=3,
        output_activation="softmax",
        return_sequences=True,
        kernel_regularizer="l2",
    )
    inputs = keras.Input((None, D))
    model = keras.Model(inputs, layer(keras.layers.Masking(-9.0)(inputs)))
    layer.set_weights([*random_weights(), *output_weights(outputs=3)])
    return model


def test_keras_file(tmp_path):
    """Weights and the state of the optimizer: training goes on as if nothing was."""
    model = classifier()
    model.compile(keras.optimizers.Adam(0.02), "sparse_categorical_crossentropy")
    x, y = random_inputs().astype("float32"), rng(4).integers(0, 3, (B, T))
    x[~MIXED_MASK] = -9.0
    model.train_on_batch(x, y)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), model(x))
    for each in (model, loaded):
        each.train_on_batch(x, y)
    for got, expected in zip(loaded.get_weights(), model.get_weights(), strict=True):
        assert relative_error(got, expected) < FLOAT32


@pytest.mark.parametrize("file", [False, True], ids=["in memory", "file"])
def test_weights_go_to_a_clone(file, tmp_path):
    model = classifier()
    clone = keras.models.clone_model(model)
    x = random_inputs().astype("float32")
    assert relative_error(clone(x), model(x)) > 1e-2
    if file:
        model.save_weights(tmp_path / "model.weights.h5")
        clone.load_weights(tmp_path / "model.weights.h5")
    else:
        clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(clone(x), model(x))


@pytest.mark.slow
def test_export(tmp_path):
    """The gradient of what was reloaded, at another batch and another length."""
    model = classifier()
    model.export(tmp_path, verbose=False)
    loaded = tf.saved_model.load(tmp_path)
    x = random_inputs(2, 9, D).astype("float32")
    x[rng(5).random((2, 9)) < 0.3] = -9.0
    c = rng(2).normal(size=(2, 9, 3)).astype("float32")

    def gradients(call, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = call(x)
            loss = tf.reduce_sum(y * c)
        weights = {tuple(v.shape): v for v in tape.watched_variables()}
        order = [weights[shape] for shape in ((D, H), (H, H), (H,), (H, 3), (3,))]
        return y, *tape.gradient(loss, [x, *order])

    theirs = pair(return_sequences=True, outputs=3, g="softmax", dtype="float32")[0]
    mask = ~np.all(x == -9.0, axis=2)
    expected = gradients(lambda x: theirs(x, mask=mask), tf.constant(x))
    for mode in ("graph", "eager", "xla"):
        got = MODES[mode](lambda x: gradients(loaded.serve, x))(tf.constant(x))
        for a, b in zip(got, expected, strict=True):
            assert np.max(np.abs(b)) > 1e-3
            assert relative_error(a, b) < FLOAT32, mode
    graph = loaded.signatures["serving_default"].graph.as_graph_def()
    assert not any(f.attr["_XlaMustCompile"].b for f in graph.library.function)
