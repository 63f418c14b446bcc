"""A layer that was changed, quantized, or raised: it answers as it is now, or says no."""

import copy

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    FLOAT64,
    B,
    D,
    H,
    T,
    assert_same,
    evaluate,
    few,
    needs_keras,
    pair,
    random_inputs,
    relative_error,
    rng,
)

from keras_bptt import BPTTRNN

# --- The cell


@pytest.mark.parametrize(
    "activation",
    [keras.activations.relu, tf.nn.softmax, tf.sin],
    ids=["relu", "softmax", "sin"],
)
@pytest.mark.parametrize("called", [False, True])
def test_another_activation(activation, called):
    """Known, mixing, unknown: outputs and gradients, as of SimpleRNN."""
    layers = pair(return_sequences=True)
    for layer in layers:
        if called:
            layer(random_inputs(), training=True)
        layer.cell.activation = activation
    theirs, ours = layers
    x = random_inputs()
    expected = evaluate(theirs, x, "plain", training=True)
    assert_same(evaluate(ours, x, training=True), expected)
    assert ours.get_config() | {"name": ""} == theirs.get_config() | {"name": ""}


def test_no_activation():
    """As to a cell: linear."""
    theirs, ours = pair(activation="linear")
    ours(random_inputs())
    ours.cell.activation = None
    x = random_inputs()
    assert_same(evaluate(ours, x), evaluate(theirs, x, "plain"))


def test_an_activation_that_is_set_is_checked():
    _, layer = pair()
    layer.cell.activation = lambda z: tf.reverse(z, [0])
    with pytest.raises(ValueError, match="mixes them"):
        layer(random_inputs())


def test_other_dropout_and_weights():
    layers = pair(return_sequences=True, dropout=0.3, seed=1)
    for layer in layers:
        layer(random_inputs())
        layer.cell.dropout, layer.cell.recurrent_dropout = 0.0, 0.5
        layer.cell.kernel = tf.constant(rng(8).normal(size=(D, H)))
    x = random_inputs()
    expected, got = (layer(x, training=True) for layer in layers)
    assert relative_error(got, expected) < FLOAT64


class Leaky(keras.layers.SimpleRNNCell):
    """A cell of another recurrence."""

    def call(self, sequence, states, training=False):
        output, _ = super().call(sequence, states, training)
        output = 0.9 * states[0] + 0.1 * output
        return output, [output]


class Layer(BPTTRNN):
    def __init__(self, units, cell=Leaky, **options):
        super().__init__(units, **options)
        self.cell = cell(units)


@pytest.mark.parametrize("cell", [Leaky, keras.layers.GRUCell])
@pytest.mark.parametrize("symbolic", [False, True])
def test_a_cell_of_its_own(symbolic, cell):
    """It would be ignored."""
    x = keras.Input((T, D)) if symbolic else random_inputs()
    with pytest.raises(
        ValueError, match=rf"{cell.__name__}.*keras\.layers\.RNN\(cell\)"
    ):
        Layer(H, cell)(x)


def test_a_cell_that_is_set_before_build():
    layer = BPTTRNN(H)
    layer.cell = Leaky(H)
    with pytest.raises(ValueError, match="never calls it.*Leaky"):
        layer(random_inputs())


def test_a_cell_whose_call_is_replaced():
    layer = BPTTRNN(H)
    layer.cell.call = lambda x, states, training=False: (states[0], states)
    with pytest.raises(ValueError, match="whose `call` is its own"):
        layer(random_inputs())


class Named(keras.layers.SimpleRNNCell):
    """The same recurrence, and what is allowed beside it."""

    def get_initial_state(self, batch_size=None):
        return [tf.ones([batch_size, self.units])]


def test_a_cell_of_the_same_recurrence():
    layer = Layer(H, Named)
    x = random_inputs().astype("float32")
    y = layer(x)
    plain = BPTTRNN(H)
    plain.build(x.shape)
    plain.set_weights(layer.get_weights())
    np.testing.assert_allclose(y, plain(x, initial_state=tf.ones([B, H])), atol=1e-6)


def test_units_do_not_change():
    layer = BPTTRNN(H, output_units=3)
    layer(random_inputs())
    for name in ("units", "output_units", "output_activation"):
        with pytest.raises(AttributeError, match=name):
            setattr(layer, name, 2)
    assert (layer.units, layer.output_units) == (H, 3)
    layer.cell.units = H + 1
    with pytest.raises(ValueError, match=rf"built with {H} units.*cell.units={H + 1}"):
        layer(random_inputs())


# --- Options


@pytest.mark.parametrize(
    ("name", "value"),
    [("adjoint_clipnorm", 0.1), ("truncation", 2), ("go_backwards", True)],
)
def test_an_option_that_is_set_counts(name, value):
    """In the next eager call, and in the next graph of `fit`, as is documented."""
    x = random_inputs().astype("float32")
    y = rng(2).normal(size=(B, T, H)).astype("float32")
    models = []
    for early in (True, False):
        layer = BPTTRNN(H, return_sequences=True, **({name: value} if early else {}))
        model = keras.Sequential([keras.Input((T, D)), layer])
        model.compile(keras.optimizers.SGD(1.0), "mse")
        models.append(model)
    expected, got = models
    start = [rng(i).normal(size=w.shape) for i, w in enumerate(got.get_weights())]

    def trained(model):
        model.set_weights(start)
        model.train_on_batch(x, y)
        return np.concatenate([w.ravel() for w in model.get_weights()])

    plain = trained(got)
    setattr(got.layers[0], name, value)
    np.testing.assert_array_equal(trained(got), plain)
    got.make_train_function(force=True)
    assert relative_error(trained(got), trained(expected)) < 1e-5
    assert relative_error(trained(got), plain) > 1e-3


# --- After an error


def unknown_to_xla(z):
    z = tf.convert_to_tensor(z)
    return tf.ensure_shape(tf.py_function(tf.tanh, [z], z.dtype), z.shape)


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("where", ["eager", "graph", "fit"])
def test_a_call_that_raised_leaves_nothing(where, stateful):
    """Dropout masks above all: those of a graph are out of scope in the next call."""
    layer = BPTTRNN(
        H,
        unknown_to_xla,
        dropout=0.5,
        recurrent_dropout=0.5,
        stateful=stateful,
        return_sequences=True,
        jit_compile=True,
    )
    x = tf.constant(random_inputs(), tf.float32)
    model = keras.Sequential([keras.Input(batch_shape=(B, T, D)), layer])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="XLA cannot compile"):
        if where == "fit":
            model.fit(x, tf.zeros([B, T, H]), batch_size=B, verbose=0)
        else:
            call = tf.function(layer) if where == "graph" else layer
            call(x, training=True)
    layer.jit_compile = False
    if not stateful:  # of another batch: a mask that stayed would be too short
        assert layer(tf.concat([x, x], 0), training=True).shape == (2 * B, T, H)
    first = layer(x, training=True)
    if stateful:
        assert np.any(layer.states[0].value != 0)
        layer.reset_state()
    second = layer(x, training=True)
    assert np.all(np.isfinite(first)) and np.any(first != second), "the same masks"


def test_a_wrong_activation_leaves_no_weights():
    """The layer can still be built, and for other inputs."""
    layer = BPTTRNN(H, lambda z: tf.reverse(z, [0]))
    with pytest.raises(ValueError, match="mixes them"):
        layer(random_inputs())
    assert not layer.weights
    layer.cell.activation = keras.activations.tanh
    assert layer(random_inputs(B, T, D + 1)).shape == (B, H)


# --- The output layer, quantized and adapted


@needs_keras("3.12", "`quantize` of every Dense of a model")
@pytest.mark.parametrize(
    ("sequence", "mode"),
    few(
        [(False, "int8"), (False, "float8"), (True, "int8"), (True, "float8")],
        lambda sequence, mode: sequence == (mode == "int8"),
    ),
)
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`")
def test_quantized_output_layer(sequence, mode, tmp_path):
    """As a Dense behind the layer is: the same numbers, also from a file."""
    x = random_inputs().astype("float32")
    ours = keras.Sequential(
        [
            keras.Input((None, D)),
            BPTTRNN(
                H,
                return_sequences=sequence,
                output_units=3,
                output_activation="softmax",
            ),
        ]
    )
    theirs = keras.Sequential(
        [
            keras.Input((None, D)),
            keras.layers.SimpleRNN(H, return_sequences=sequence),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    theirs.set_weights(ours.get_weights())
    exact = ours(x)
    for model in (ours, theirs):
        model.quantize(mode)
    np.testing.assert_allclose(ours(x), theirs(x), atol=1e-6)
    assert np.max(np.abs(ours(x) - exact)) > 1e-4, "nothing was quantized"
    ours.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(x), ours(x), atol=1e-6)
    if mode == "float8":  # which is for training
        results = []
        for model in (ours, theirs):
            model.compile(keras.optimizers.SGD(0.5), "mse")
            fitted = model.fit(x, 0 * ours(x), epochs=3, shuffle=False, verbose=0)
            results.append(fitted.history["loss"])
        np.testing.assert_allclose(*results, rtol=1e-4)


def test_adapted_output_layer():
    """LoRA: its matrices take part in outputs and gradients."""
    layer = BPTTRNN(H, return_sequences=True, output_units=3)
    plain = BPTTRNN(H, return_sequences=True)
    x = random_inputs().astype("float32")
    plain(x)
    layer(x)
    plain.set_weights([w.numpy() for w in layer.cell.weights])
    g = layer.output_layer
    g.enable_lora(2)
    g.lora_kernel_b.assign(rng(3).normal(size=(2, 3)))
    results = []
    for call in (layer, lambda x: g(plain(x))):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(call(x) ** 2)
        results.append(
            [loss, *tape.gradient(loss, [g.lora_kernel_a.value, g.lora_kernel_b.value])]
        )
    for got, expected in zip(*results, strict=True):
        assert relative_error(got, expected) < 1e-4


class Doubled(keras.layers.Dense):
    def call(self, inputs, training=None):
        return 2 * super().call(inputs, training)


def test_another_output_layer():
    """One of another computation is called, not taken for a product."""
    layer = BPTTRNN(H, return_sequences=True, output_units=3)
    x = random_inputs().astype("float32")
    layer.output_layer = Doubled(3)
    y = layer(x)
    plain = BPTTRNN(H, return_sequences=True, output_units=3)
    plain.build(x.shape)
    plain.set_weights(layer.get_weights())
    np.testing.assert_allclose(y, 2 * plain(x), atol=1e-6)


def test_a_copy_is_whole():
    layer = BPTTRNN(H, output_units=3)
    x = random_inputs().astype("float32")
    y = layer(x)
    twin = copy.deepcopy(layer)
    twin.cell.kernel.assign(0 * twin.cell.kernel)
    np.testing.assert_array_equal(layer(x), y)
    assert np.any(twin(x) != y)
