"""The output layer that a layer may own: as a Dense behind it, in what losses see too.

Options, masks, states, wrappers and files of it are part of `test_contract.py` and
`test_saving.py`.
"""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    FLOAT32,
    FLOAT64,
    MIXED_MASK,
    WAYS,
    B,
    D,
    H,
    T,
    assert_same,
    evaluate,
    few,
    random_inputs,
    relative_error,
    rng,
    without_graphs,
)
from twins import centred, fill, host_of, sine
from unrolled import Unrolled

from keras_bptt import BPTTRNN, reference

O = 3  # noqa: E741
STATE = random_inputs(B, H, seed=5)
SEQUENCE = {"return_sequences": True}


def pair(g=None, distribute=False, **options):
    """A SimpleRNN and a Dense above it, and the layer, with the same weights."""
    options = {"dtype": "float64"} | SEQUENCE | options
    ours = BPTTRNN(H, output_units=O, output_activation=g, **options)
    ours.build((B, None, D))
    fill(ours)
    if not distribute:
        theirs = host_of("BPTTRNN", output_units=O, output_activation=g, **options)
    else:
        dense = keras.layers.Dense(O, g, dtype="float64")
        dense = keras.layers.TimeDistributed(dense, dtype="float64")
        dense.build((None, None, H))
        theirs = Unrolled(host_of("BPTTRNN", **options), dense)
    theirs.set_weights(ours.get_weights())
    return theirs, ours


# --- Output activations

ACTIVATIONS = {
    "none": None,
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "softmax": "softmax",
    "relu": "relu",
    "function": sine,
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
    theirs, ours = pair(ACTIVATIONS[name], return_sequences=sequence)
    call = {"state": STATE, "training": True}
    expected = evaluate(theirs, random_inputs(), "plain", **call)
    assert_same(evaluate(ours, random_inputs(), mode, **call), expected)


@pytest.mark.parametrize("mask", [{}, {"mask": MIXED_MASK}], ids=["no mask", "mask"])
def test_equals_time_distributed_dense(mask):
    theirs, ours = pair("softmax", distribute=True)
    expected = evaluate(theirs, random_inputs(), "plain", **mask)
    assert_same(evaluate(ours, random_inputs(), "plain", **mask), expected)


@pytest.mark.parametrize("f", ["tanh", "relu"])
@without_graphs()
def test_equals_the_reference_under_a_loss(f):
    """The cheat sheet to its end: o_t, l, and the gradients of everything."""
    _, layer = pair("softmax", activation=f)
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


# --- Its weights


def test_regularizers_apply_to_the_output_layer():
    """As those of the kernel and of the bias."""
    options = {
        "kernel_regularizer": "l2",
        "bias_regularizer": keras.regularizers.L2(0.3),
    }
    _, ours = pair(**options)
    without = BPTTRNN(H, dtype="float64", **options)
    without.build((None, None, D))
    without.set_weights(ours.get_weights()[:3])
    V, c = ours.get_weights()[3:]
    of_output = 0.01 * np.sum(V**2) + 0.3 * np.sum(c**2)
    assert float(sum(ours.losses) - sum(without.losses)) == pytest.approx(of_output)


@without_graphs()
def test_frozen_output_layer():
    _, ours = pair()
    ours.output_layer.trainable = False
    got = evaluate(ours, random_inputs())
    assert list(got) == ["y0", "d_x", "d_0_kernel", "d_1_recurrent_kernel", "d_2_bias"]


def test_weights_are_those_of_the_cell_then_of_the_output_layer():
    _, ours = pair()
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
    for layer in pair(g, return_sequences=sequence, dtype="float32"):
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
    assert relative_error(results[1][4], V) > 1e-3, "nothing was learned"


def test_mask_of_a_masking_layer_reaches_the_loss():
    x, y = random_inputs(), random_inputs(B, T, O)
    x[~MIXED_MASK] = -1.0
    losses = []
    for layer in pair("tanh"):
        model = keras.Sequential([keras.layers.Masking(-1.0, dtype="float64"), layer])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        losses.append([model.train_on_batch(x, y) for _ in range(2)])
    assert relative_error(losses[1], losses[0]) < FLOAT32
    assert losses[1][1] < losses[1][0]


@pytest.mark.parametrize(
    ("sequence",), few([(False,), (True,)], lambda sequence: not sequence)
)
def test_jacobian(sequence):
    theirs, ours = pair("softmax", return_sequences=sequence)
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
