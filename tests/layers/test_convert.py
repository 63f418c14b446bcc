"""A trained model of SimpleRNN as one of BPTTRNN, and back: wherever the layer is."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import FLOAT32, B, D, H, T, relative_error, rng, without_graphs
from keras import layers

from keras_bptt import BPTTRNN, RandomizedTruncation, Truncation, convert
from keras_bptt.layers.inside import layers_inside

# Two sums of the same numbers in float32, in another order.
SAME = 1e-6


@keras.saving.register_keras_serializable(package="test_convert")
class Residual(layers.Layer):
    """A layer of a user's own, with a recurrent one in its configuration."""

    def __init__(self, rnn, **kwargs):
        super().__init__(**kwargs)
        self.rnn = rnn

    def build(self, shape):
        self.rnn.build(shape)

    def call(self, x):
        return x + self.rnn(x)

    def get_config(self):
        rnn = keras.saving.serialize_keras_object(self.rnn)
        return super().get_config() | {"rnn": rnn}

    @classmethod
    def from_config(cls, config):
        rnn = keras.saving.deserialize_keras_object(config.pop("rnn"))
        return cls(rnn, **config)


@keras.saving.register_keras_serializable(package="test_convert")
def squared_error(y, prediction):
    return tf.reduce_mean(tf.square(y - prediction), axis=-1)


def plain():
    return [layers.SimpleRNN(H, activation="relu"), layers.Dense(2)]


def many():
    """Masks, states that go from layer to layer, a layer that is called twice."""
    x = keras.Input((None, D))
    twice = layers.SimpleRNN(H, return_sequences=True, zero_output_for_mask=True)
    h = twice(layers.Masking(0.0)(x))
    h = twice(layers.Dense(D)(h))
    h, state = layers.SimpleRNN(7, return_sequences=True, return_state=True)(h)
    last = layers.SimpleRNN(7, go_backwards=True, dropout=0.1)(h, initial_state=state)
    return keras.Model(x, layers.Concatenate()([last, layers.Dense(2)(state)]))


def inner():
    body = [keras.Input((None, D)), layers.SimpleRNN(H, return_sequences=True)]
    return [keras.Sequential(body), layers.BatchNormalization(), *plain()]


MODELS = {
    "plain": plain,
    "masks, states, shared": many,
    "Bidirectional": lambda: [
        layers.Bidirectional(layers.SimpleRNN(H, recurrent_dropout=0.2), "mul"),
        layers.Dense(3),
    ],
    "two directions": lambda: [
        layers.Bidirectional(
            layers.SimpleRNN(H), backward_layer=layers.SimpleRNN(5, go_backwards=True)
        )
    ],
    "TimeDistributed": lambda: [
        layers.Reshape((-1, 1, D)),
        layers.TimeDistributed(layers.SimpleRNN(H)),
    ],
    "a model inside": inner,
    "a layer inside": lambda: [Residual(layers.SimpleRNN(D, return_sequences=True))],
    "float64": lambda: [layers.SimpleRNN(H, dtype="float64", use_bias=False)],
}


def model_of(name):
    keras.utils.set_random_seed(3)
    parts = MODELS[name]()
    if isinstance(parts, keras.Model):
        return parts
    return keras.Sequential([keras.Input((None, D)), *parts])


def data():
    x = rng(1).normal(size=(B, T, D)).astype("float32")
    x[0, 3:] = 0  # what Masking masks
    return x


def recurrent(node):
    """The class names of all recurrent layers in a serialized model."""
    if isinstance(node, dict):
        found = [name for value in node.values() for name in recurrent(value)]
        name = node.get("class_name")
        return found + [name] * (name in ("SimpleRNN", "BPTTRNN"))
    if isinstance(node, list | tuple):
        return [name for value in node for name in recurrent(value)]
    return []


def classes(model):
    return set(recurrent(keras.saving.serialize_keras_object(model)))


@without_graphs()
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name):
    model, x = model_of(name), data()
    expected = model(x)
    assert np.std(expected) > 0.1
    there = convert(model, truncation=2)
    back = convert(there, to=layers.SimpleRNN)
    assert [classes(m) for m in (model, there, back)] == [
        {"SimpleRNN"},
        {"BPTTRNN"},
        {"SimpleRNN"},
    ]
    assert [layer.name for layer in there.layers] == [m.name for m in model.layers]
    assert relative_error(there(x), expected) < SAME
    assert relative_error(back(x), expected) < SAME
    # A copy: what becomes of it does not touch the model.
    there.set_weights([w + 1 for w in there.get_weights()])
    assert relative_error(there(x), expected) > 0.1
    np.testing.assert_array_equal(model(x), expected)


def test_back_to_the_same_configuration():
    model = model_of("Bidirectional")
    there = convert(model, truncation=3, checkpoint_every="sqrt", jit_compile=False)
    back = convert(there, to=layers.SimpleRNN)
    assert back.get_config() == model.get_config()


def test_options_are_those_of_every_layer():
    model = model_of("Bidirectional")
    options = {
        "truncation": Truncation(4, 2),
        "checkpoint_every": 3,
        "adjoint_clipnorm": 0.5,
        "jit_compile": False,
    }
    both = convert(model, **options).layers[0]
    for layer in (both.forward_layer, both.backward_layer):
        assert {name: getattr(layer, name) for name in options} == options
    randomized = convert(model, truncation=RandomizedTruncation(4, seed=2)).layers[0]
    assert randomized.forward_layer.truncation == RandomizedTruncation(4, seed=2)


def both_kinds():
    return keras.Sequential(
        [
            keras.Input((None, D)),
            BPTTRNN(H, return_sequences=True, truncation=7, jit_compile=False),
            layers.SimpleRNN(5),
        ]
    )


def test_layers_that_are_there_already_get_the_options_too():
    """And keep what is not named; without options they stay as they are."""
    there = convert(both_kinds(), truncation=2)
    assert [layer.truncation.steps for layer in there.layers] == [2, 2]
    assert [layer.jit_compile for layer in there.layers] == [False, "auto"]
    there = convert(both_kinds())
    assert [layer.truncation for layer in there.layers] == [Truncation(7), None]


CHANGES = {
    "truncation": (Truncation(3, 1), Truncation(2)),
    "checkpoint_every": (4, "sqrt"),
    "adjoint_clipnorm": (0.5, 0.07),
    "jit_compile": (False, True),
}


@pytest.mark.parametrize("name", CHANGES)
@without_graphs()
def test_an_option_alone_changes(name):
    """Everywhere in the model; the others stay, and so do outputs and configuration."""
    model, x = convert(model_of("Bidirectional")), data()
    for value in (*CHANGES[name], {"jit_compile": "auto"}.get(name)):
        before = model.layers[0].forward_layer.get_config()
        model = convert(model, **{name: value})
        for layer in (model.layers[0].forward_layer, model.layers[0].backward_layer):
            assert getattr(layer, name) == value
        after = model.layers[0].forward_layer.get_config()
        before.pop(name, None), after.pop(name, None)
        assert after == before
        if value is not True:
            expected = model_of("Bidirectional")
            expected.set_weights(model.get_weights())
            assert relative_error(model(x), expected(x)) < SAME
    assert name not in model.layers[0].forward_layer.get_config()


@pytest.mark.parametrize("name", MODELS)
@without_graphs()
def test_an_option_alone_changes_wherever_the_layer_is(name):
    model, x = convert(model_of(name)), data()
    there = convert(model, adjoint_clipnorm=0.07)
    found = [each for _, each in layers_inside(there) if type(each) is BPTTRNN]
    assert found and {each.adjoint_clipnorm for each in found} == {0.07}
    assert relative_error(there(x), model(x)) < SAME
    found = [each for _, each in layers_inside(model) if type(each) is BPTTRNN]
    assert {each.adjoint_clipnorm for each in found} == {None}


def test_an_output_layer_stays():
    layer = BPTTRNN(H, output_units=2, output_activation="sigmoid", dropout=0.1)
    model, x = keras.Sequential([keras.Input((None, D)), layer]), data()
    there = convert(model, truncation=2, unroll=3)
    assert there.layers[0].output_layer.units == 2
    assert relative_error(there(x), model(x)) < SAME
    own = model.layers[0].get_config()
    assert there.layers[0].get_config() == own | {
        "truncation": keras.saving.serialize_keras_object(Truncation(2)),
        "unroll": 3,
    }


def gradients_of(model, x, y):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((y - model(x, training=True)) ** 2)
    return [g.numpy() for g in tape.gradient(loss, model.trainable_variables)]


def test_training_goes_on_with_the_option():
    """The moments of the optimizer, and from the next step on the gradient of a window."""
    x, y = data(), rng(2).normal(size=(B, 2)).astype("float32")
    model = convert(model_of("plain"), jit_compile=False)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", run_eagerly=True)
    model.fit(x, y, epochs=2, verbose=0)
    there = convert(model, truncation=1)
    assert there.optimizer.iterations.numpy() == 2
    full, window = (gradients_of(each, x, y) for each in (model, there))
    # A window of one step: h_{t-1} counts as given.
    layer = BPTTRNN(H, "relu", truncation=1, jit_compile=False)
    reference = keras.Sequential([keras.Input((None, D)), layer, layers.Dense(2)])
    reference.set_weights(model.get_weights())
    for got, expected in zip(window, gradients_of(reference, x, y), strict=True):
        assert relative_error(got, expected) < FLOAT32
    assert relative_error(window[1], full[1]) > 0.1
    moments = [v.numpy() for v in model.optimizer.variables if "momentum" in v.path]
    before = there.get_weights()
    there.fit(x, y, verbose=0)
    for b, a, m, g in zip(before, there.get_weights(), moments, window, strict=True):
        np.testing.assert_allclose(a, b + 0.9 * m - 0.1 * g, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("unroll", [1, 3, True, False])
@without_graphs()
def test_unroll_alone_changes(unroll):
    body = [keras.Input((T, D)), layers.SimpleRNN(H), layers.Dense(2)]
    model, x = keras.Sequential(body), data()
    there = convert(convert(model, unroll=2), unroll=unroll)
    assert there.layers[0].get_config()["unroll"] is unroll or unroll == 3
    assert there.layers[0].get_config()["unroll"] == unroll
    assert relative_error(there(x), model(x)) < SAME
    if isinstance(unroll, bool):
        for each in (model, there):
            back = convert(each, to=layers.SimpleRNN, unroll=unroll)
            assert back.layers[0].unroll is unroll
            assert classes(back) == {"SimpleRNN"}
            assert relative_error(back(x), model(x)) < SAME


def test_one_step_an_iteration_for_onnx():
    """What the converter asks for: no list is written more than once an iteration."""
    model = convert(keras.Sequential([keras.Input((None, D)), layers.SimpleRNN(H)]))
    model.layers[0].return_sequences = True
    call = tf.function(
        convert(model, unroll=1), input_signature=[tf.TensorSpec((None, None, D))]
    )
    graph = call.get_concrete_function().graph.as_graph_def()
    nodes = [n.op for f in graph.library.function for n in f.node_def]
    assert nodes.count("TensorListSetItem") == 1


def test_number_of_steps_an_iteration():
    """SimpleRNN would take it for all of them, of which there is no known number."""
    layer = BPTTRNN(H, unroll=3)
    model = keras.Sequential([keras.Input((None, D)), layer])
    back = convert(model, to=layers.SimpleRNN)
    assert back.layers[0].unroll is False
    known = keras.Sequential([keras.Input((T, D)), BPTTRNN(H, unroll=True)])
    assert convert(known, to=layers.SimpleRNN).layers[0].unroll is True


@pytest.mark.parametrize("loss", ["mse", squared_error], ids=["Keras", "own"])
def test_training_goes_on(loss):
    """Weights, what `compile` was told and the optimizer's moments: the same next steps."""
    model, x = model_of("plain"), data()
    y = rng(2).normal(size=(B, 2)).astype("float32")
    optimizer = keras.optimizers.Adam(0.01)
    model.compile(optimizer, loss, metrics=["mae"], run_eagerly=True)
    model.fit(x, y, epochs=2, verbose=0)
    there = convert(model)
    assert there.optimizer.iterations.numpy() == 2
    histories = [m.fit(x, y, epochs=3, verbose=0).history for m in (model, there)]
    assert histories[0].keys() == histories[1].keys() == {"loss", "mae"}
    assert histories[0]["loss"][-1] < histories[0]["loss"][0]
    for name, values in histories[0].items():
        assert relative_error(histories[1][name], values) < FLOAT32
    # Moments of zero would take steps of another size.
    for ours, theirs in zip(there.get_weights(), model.get_weights(), strict=True):
        assert relative_error(ours, theirs) < FLOAT32


def test_an_optimizer_of_other_weights():
    """Frozen after `compile`: which of its variables belong to what is left?"""
    model = model_of("plain")
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    model.layers[0].trainable = False
    with pytest.raises(ValueError, match=r"trainable now.*Received: 12 .* has 6"):
        convert(model)
    model.compile("adam", "mse")
    assert not convert(model).layers[0].trainable


def test_neither_built_nor_compiled():
    model = keras.Sequential([layers.SimpleRNN(H)])
    there = convert(model)
    assert not there.built and not there.compiled
    assert there(data()).shape == (B, H)


def test_one_layer():
    layer = layers.SimpleRNN(H)
    layer.build((None, None, D))
    there = convert(layer)
    assert type(there) is BPTTRNN
    assert relative_error(there(data()), layer(data())) < SAME


def test_lambdas():
    """Safe mode is for files: what is in memory has run already."""
    body = [layers.SimpleRNN(H), layers.Lambda(lambda y: 2 * y, output_shape=(H,))]
    model = keras.Sequential([keras.Input((None, D)), *body])
    assert relative_error(convert(model)(data()), model(data())) < SAME


def test_weights_file_of_the_other_class(tmp_path):
    """Which BPTTRNN cannot load: through a model of SimpleRNN and `convert`."""
    model, empty = model_of("plain"), model_of("plain")
    empty.set_weights([0 * w for w in empty.get_weights()])
    model.save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match="made of SimpleRNN.*keras_bptt.convert"):
        convert(empty).load_weights(tmp_path / "model.weights.h5")
    empty.load_weights(tmp_path / "model.weights.h5")
    assert relative_error(convert(empty)(data()), model(data())) < SAME


class Attributes(keras.Model):
    """Makes its layers itself, and its configuration says nothing of them."""

    made = layers.SimpleRNN

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._first = self.made(H, return_sequences=True)
        self.blocks = [layers.Dense(D), {"last": layers.Bidirectional(self.made(5))}]

    def call(self, x):
        return self.blocks[1]["last"](self.blocks[0](self._first(x)))


class AttributesOfBPTTRNN(Attributes):
    made = BPTTRNN


class Given(keras.Model):
    """Gets what no configuration can have, and has no `get_config`."""

    def __init__(self, made, **kwargs):
        super().__init__(**kwargs)
        self.rnn = made(H)


# An older Keras makes a configuration of any class.
REFUSED = "makes them itself"
try:
    keras.saving.serialize_keras_object(Given(layers.SimpleRNN))
except NotImplementedError:
    REFUSED = "a class has none"


@keras.saving.register_keras_serializable(package="test_convert")
class MadeInside(layers.Layer):
    """The same as a layer, of which a copy can be made."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.rnn = layers.SimpleRNN(H, return_sequences=True)

    def build(self, shape):
        self.rnn.build(shape)

    def call(self, x):
        return self.rnn(x)


def lstm():
    return keras.Sequential([keras.Input((None, D)), layers.LSTM(3), layers.Dense(2)])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda m: convert("model.keras"),
            ["keras.Model", "'model.keras'", "str", "keras.models.load_model"],
        ),
        (lambda m: convert([m, m]), ["keras.Model", "of type list", "one by one"]),
        (
            lambda m: convert(m, to=layers.LSTM),
            ["BPTTRNN or keras.layers.Simple", "LSTM"],
        ),
        (lambda m: convert(m, to="SimpleRNN"), ["the class", "'SimpleRNN'"]),
        (lambda m: convert(m, units=3), ["truncation, checkpoint_every", "units=3"]),
        (lambda m: convert(m, truncate=3), ["Did you mean 'truncation'?"]),
        (lambda m: convert(m, clipnorm=3), ["Did you mean 'adjoint_clipnorm'?"]),
        (lambda m: convert(m, truncation=0), ["positive integer", "truncation=0"]),
        (lambda m: convert(m, unroll=0), ["`unroll`", "unroll=0"]),
        (lambda m: convert(m, unroll="yes"), ["`unroll`", "unroll='yes'"]),
        (lambda m: convert(m, unroll=None), ["`unroll`", "unroll=None"]),
        (
            lambda m: convert(convert(m), to=layers.SimpleRNN, unroll=1),
            ["`unroll` of a SimpleRNN must be True", "unroll=1", "Pass False"],
        ),
        (
            lambda m: convert(convert(m), to=layers.SimpleRNN, truncation=3),
            ["may be unroll:", "truncation=3"],
        ),
        (
            lambda m: convert(convert(m)),
            ["hold a SimpleRNN", "holds BPTTRNN alone", "such as truncation=20"],
        ),
        (
            lambda m: convert(m, to=layers.SimpleRNN),
            ["hold a BPTTRNN", "holds SimpleRNN alone", "such as unroll=True"],
        ),
        (lambda m: convert(lstm()), ["hold a SimpleRNN", "holds none: LSTM, Dense"]),
        (
            lambda m: convert(lstm(), truncation=3),
            ["hold a SimpleRNN", "or a BPTTRNN, to get the options", "none: LSTM"],
        ),
        (
            lambda m: convert(Attributes(name="net")),
            [
                "in its configuration",
                "model='net', which makes them itself: ",
                "blocks[1]['last'].forward_layer, blocks[1]['last'].backward_layer",
                "_first",
                "new.set_weights",
            ],
        ),
        (
            lambda m: convert(AttributesOfBPTTRNN(), truncation=3),
            ["makes them itself: _first, blocks[1]['last'].forward_layer"],
        ),
        (
            lambda m: convert(Given(layers.SimpleRNN, name="net")),
            [REFUSED, "rnn.", "get_config"],
        ),
        (
            lambda m: convert(keras.Sequential([MadeInside()])),
            ["makes them itself: layers[0].rnn."],
        ),
        (
            lambda m: convert(BPTTRNN(3, output_units=2, name="r"), layers.SimpleRNN),
            ["output layer", "'r'", "output_units=2"],
        ),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError) as raised:
        call(model_of("plain"))
    for word in words:
        assert word in str(raised.value)


def test_layers_that_a_class_makes_are_warned_of():
    """Where others are converted: the copy says that it is not what it seems."""
    model = keras.Sequential([keras.Input((None, D)), MadeInside(), *plain()])
    with pytest.warns(
        UserWarning, match=r"could not be converted.*: layers\[0\]\.rnn\. Change"
    ):
        there = convert(model)
    assert type(there.layers[0].rnn) is layers.SimpleRNN
    assert type(there.layers[1]) is BPTTRNN
    assert relative_error(there(data()), model(data())) < SAME


@pytest.mark.filterwarnings("error")
def test_nothing_is_warned_of_where_all_are_converted():
    for name in MODELS:
        convert(convert(model_of(name), truncation=3), checkpoint_every=None)


def test_what_preprocessing_has_adapted_to_is_copied():
    """Statistics are derived when weights load, vocabularies are in no weight."""
    x = (5 + 3 * rng(6).normal(size=(B, T, D))).astype("float32")
    scale, words = layers.Normalization(), layers.TextVectorization()
    inside = layers.Normalization(axis=None)
    scale.adapt(x)
    inside.adapt(x[..., :1])
    words.adapt(["one two three", "two three", "three"])
    numbers = keras.Sequential(
        [
            keras.Input((None, D)),
            scale,
            keras.Sequential([keras.Input((None, D)), inside, layers.SimpleRNN(H)]),
        ]
    )
    text = keras.Sequential(
        [
            keras.Input((), dtype="string"),
            words,
            layers.Embedding(9, D, mask_zero=True),
            layers.SimpleRNN(H),
        ]
    )
    sentences = tf.constant(["three one", "two", "one unknown two"])
    for model, inputs in (numbers, x), (text, sentences):
        copy = convert(model, jit_compile=False)
        np.testing.assert_allclose(copy(inputs), model(inputs), atol=SAME)
        back = convert(copy, to=layers.SimpleRNN)
        np.testing.assert_allclose(back(inputs), model(inputs), atol=SAME)


@keras.saving.register_keras_serializable(package="test_convert")
class Centred(layers.Layer):
    """A layer of a user's own that makes another, and derives what it computes with."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.scale = layers.Normalization(axis=None)
        self.twice = self.add_weight(shape=(), initializer="zeros", trainable=False)
        self.factor = 0.0

    def build(self, shape):
        if not self.scale.built:
            self.scale.build(shape)

    def call(self, x):
        return self.factor * self.scale(x)

    def load_own_variables(self, store):
        super().load_own_variables(store)
        self.factor = 2.0 * float(self.twice)


def test_state_that_is_derived_where_weights_load():
    """In an order of attributes that the copy does not have."""
    x = (5 + 3 * rng(6).normal(size=(B, T, D))).astype("float32")
    own, scale = Centred(), layers.Normalization()
    scale.adapt(x)
    own.scale.adapt(x[..., :1])
    own.twice.assign(0.7)
    own.factor = 1.4
    model = keras.Sequential(
        [keras.Input((None, D)), own, scale, layers.SimpleRNN(H), layers.Dense(2)]
    )
    model.last, model.scale = model.layers[3], scale
    model.not_called = layers.Normalization()
    model.part = keras.Model(model.inputs, model.layers[1].output)
    np.testing.assert_allclose(convert(model)(x), model(x), atol=SAME)


def test_table_that_has_adapted_to_nothing():
    words = layers.TextVectorization()
    model = keras.Sequential([keras.Input((), dtype="string"), words])
    model.add(layers.Embedding(9, D))
    model.add(layers.SimpleRNN(H))
    copy = convert(model)
    assert type(copy.layers[-1]) is BPTTRNN
    np.testing.assert_array_equal(copy.get_weights()[0], model.get_weights()[0])


def test_what_fine_tuning_has_added_stays_apart():
    """As weights of their own, which a file would merge with the kernel."""
    model = model_of("plain")
    model.layers[1].enable_lora(1)
    random = rng(7)
    model.set_weights([random.normal(size=w.shape) for w in model.get_weights()])
    copy = convert(model)
    if not copy.layers[1].lora_enabled:
        pytest.skip("This Keras does not keep it in the configuration")
    for ours, theirs in zip(copy.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(copy(data()), model(data()), atol=1e-5)
