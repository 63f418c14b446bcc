"""A trained model of Keras' layers as one of this package's, and back: wherever they are.

Most tests take SimpleRNN, LSTM and GRU in turn, of which some are slow; the tests of what
no layer has to do with, such as preprocessing, take SimpleRNN alone.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import FLOAT32, B, D, H, T, few, relative_error, rng, without_graphs
from keras import layers

from keras_bptt import (
    BPTT,
    BPTTGRU,
    BPTTLSTM,
    BPTTRNN,
    RandomizedTruncation,
    Truncation,
    convert,
)
from keras_bptt.layers.inside import layers_inside

HOSTS = {BPTTRNN: layers.SimpleRNN, BPTTLSTM: layers.LSTM, BPTTGRU: layers.GRU}
EVERY = HOSTS | {BPTT: layers.RNN}
OURS = {host: layer for layer, host in HOSTS.items()}


@pytest.fixture(autouse=True)
def _without_gpu(monkeypatch):
    """Where there is one, `convert` warns, and a warning is an error here."""
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: [])


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
class OwnLSTM(layers.LSTM):
    """Of which nobody knows what else it computes."""


@keras.saving.register_keras_serializable(package="test_convert")
class OwnRNN(layers.RNN):
    """The same."""


@keras.saving.register_keras_serializable(package="test_convert")
def squared_error(y, prediction):
    return tf.reduce_mean(tf.square(y - prediction), axis=-1)


def plain(host):
    return [host(H, activation="relu"), layers.Dense(2)]


def many(host):
    """Masks, states that go from layer to layer, a layer that is called twice."""
    x = keras.Input((None, D))
    twice = host(H, return_sequences=True, zero_output_for_mask=True)
    h = twice(layers.Masking(0.0)(x))
    h = twice(layers.Dense(D)(h))
    h, *states = host(7, return_sequences=True, return_state=True)(h)
    last = host(7, go_backwards=True, dropout=0.1)(h, initial_state=states)
    return keras.Model(x, layers.Concatenate()([last, layers.Dense(2)(states[-1])]))


def inner(host):
    body = [keras.Input((None, D)), host(H, return_sequences=True)]
    return [keras.Sequential(body), layers.BatchNormalization(), *plain(host)]


# Each made of a class of Keras.
MODELS = {
    "plain": plain,
    "masks, states, shared": many,
    "Bidirectional": lambda host: [
        layers.Bidirectional(host(H, recurrent_dropout=0.2), "mul"),
        layers.Dense(3),
    ],
    "two directions": lambda host: [
        layers.Bidirectional(host(H), backward_layer=host(5, go_backwards=True))
    ],
    "TimeDistributed": lambda host: [
        layers.Reshape((-1, 1, D)),
        layers.TimeDistributed(host(H)),
    ],
    "a model inside": inner,
    "a layer inside": lambda host: [Residual(host(D, return_sequences=True))],
    "float64": lambda host: [host(H, dtype="float64", use_bias=False)],
}


def each_host(*slow):
    """The classes of Keras; those that are named take long, together."""
    hosts = few([(host,) for host in OURS], lambda host: host.__name__ not in slow)
    return pytest.mark.parametrize("host", hosts, ids=[h.__name__ for h in OURS])


def each_model(*fast):
    """The models of each class; for GRU, and LSTM but for those that are named, slow."""
    cases = [(name, host) for name in MODELS for host in OURS]
    names = [f"{name}-{host.__name__}" for name, host in cases]
    quick = {layers.SimpleRNN: MODELS, layers.LSTM: fast, layers.GRU: ()}
    chosen = few(cases, lambda name, host: name in quick[host])
    return pytest.mark.parametrize(("name", "host"), chosen, ids=names)


def model_of(name, host=layers.SimpleRNN):
    keras.utils.set_random_seed(3)
    model = MODELS[name](host)
    if not isinstance(model, keras.Model):
        model = keras.Sequential([keras.Input((None, D)), *model])
    if host is not layers.SimpleRNN:  # else gates near 1/2 make outputs small
        model.set_weights([2 * w for w in model.get_weights()])
    return model


def data():
    x = rng(1).normal(size=(B, T, D)).astype("float32")
    x[0, 3:] = 0  # what Masking masks
    return x


RECURRENT = {each.__name__ for each in (*HOSTS, *OURS)}


def recurrent(node):
    """The class names of all recurrent layers in a serialized model."""
    if isinstance(node, dict):
        found = [name for value in node.values() for name in recurrent(value)]
        name = node.get("class_name")
        return found + [name] * (name in RECURRENT)
    if isinstance(node, list | tuple):
        return [name for value in node for name in recurrent(value)]
    return []


def classes(model):
    return set(recurrent(keras.saving.serialize_keras_object(model)))


@without_graphs()
@each_model("masks, states, shared", "Bidirectional")
def test_there_and_back(name, host):
    model, x = model_of(name, host), data()
    expected = model(x)
    assert np.std(expected) > 0.1
    there = convert(model, truncation=2)
    back = convert(there, to=host)
    assert [classes(m) for m in (model, there, back)] == [
        {host.__name__},
        {OURS[host].__name__},
        {host.__name__},
    ]
    assert [layer.name for layer in there.layers] == [m.name for m in model.layers]
    assert relative_error(there(x), expected) < SAME
    assert relative_error(back(x), expected) < SAME
    # A copy: what becomes of it does not touch the model.
    there.set_weights([w + 1 for w in there.get_weights()])
    assert relative_error(there(x), expected) > 0.1
    np.testing.assert_array_equal(model(x), expected)


@each_host()
def test_back_to_the_same_configuration(host):
    model = model_of("Bidirectional", host)
    options = {"checkpoint_every": "sqrt", "adjoint_max_growth": 2}
    there = convert(model, truncation=3, jit_compile=False, **options)
    for to in host, "keras":
        assert convert(there, to=to).get_config() == model.get_config()


@each_host()
def test_options_are_those_of_every_layer(host):
    model = model_of("Bidirectional", host)
    options = {
        "truncation": Truncation(4, 2),
        "checkpoint_every": 3,
        "adjoint_clipnorm": 0.5,
        "adjoint_max_growth": 2,
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


def of_all_kinds():
    """And two layers that are of another kind, whatever they compute."""
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((None, D)),
            layers.SimpleRNN(H, return_sequences=True, name="plain"),
            layers.Bidirectional(layers.LSTM(5, return_sequences=True), name="both"),
            layers.RNN(layers.LSTMCell(4), return_sequences=True, name="cell"),
            OwnLSTM(3, return_sequences=True, name="own"),
            layers.GRU(4, reset_after=False, name="last"),
        ]
    )


def kinds(model):
    """The class of each layer; of a Bidirectional those of both its layers."""
    found = []
    for layer in model.layers:
        pair = [
            getattr(layer, f"{way}_layer", layer) for way in ("forward", "backward")
        ]
        assert type(pair[0]) is type(pair[1])
        found.append(type(pair[0]))
    return found


@without_graphs()
def test_every_kind_at_once():
    model, x = of_all_kinds(), data()
    model.set_weights([2 * w for w in model.get_weights()])
    ours, expected = [BPTTRNN, BPTTLSTM, BPTT, OwnLSTM, BPTTGRU], model(x)
    assert np.std(expected) > 0.1
    there = convert(model)
    assert kinds(there) == ours
    assert relative_error(there(x), expected) < SAME
    window = convert(there, truncation=2)
    assert kinds(window) == ours
    found = [each for _, each in layers_inside(window) if type(each) in EVERY]
    assert [each.truncation for each in found] == [Truncation(2)] * 5
    back = convert(window, to="keras")
    assert kinds(back) == kinds(model)
    assert back.get_config() == model.get_config()
    assert relative_error(back(x), expected) < SAME


@keras.saving.register_keras_serializable(package="test_convert")
class Leaky(layers.Layer):
    """A cell of a user's own."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = self.state_size = units

    def build(self, shape):
        self.W = self.add_weight(shape=(shape[-1], self.units))
        self.U = self.add_weight(shape=(self.units, self.units))

    def call(self, x, states):
        h = 0.8 * states[0] + 0.2 * keras.ops.tanh(x @ self.W + states[0] @ self.U)
        return h, [h]

    def get_config(self):
        return super().get_config() | {"units": self.units}


@keras.saving.register_keras_serializable(package="test_convert")
class Mixes(Leaky):
    """Treats no example alone."""

    def call(self, x, states):
        h, _ = super().call(x, states)
        h = h - keras.ops.mean(h, axis=0)
        return h, [h]


def model_of_cells():
    """Cells of Keras and one of a user's own, a stack, masks, states that go on."""
    x = keras.Input((None, D))
    sequence = {"return_sequences": True}
    h = layers.Masking(0.0)(x)
    h = layers.Bidirectional(layers.RNN(layers.GRUCell(4, dropout=0.2), **sequence))(h)
    h = layers.RNN([layers.LSTMCell(3), Leaky(5)], **sequence)(h)
    h, *states = layers.RNN(layers.LSTMCell(H), return_state=True, **sequence)(h)
    h = layers.RNN(layers.LSTMCell(H), go_backwards=True)(h, initial_state=states)
    model = keras.Model(x, layers.Dense(2)(h))
    model.compile("adam", "mse")
    return model


def test_cells_there_and_back():
    """RNN(cell) becomes BPTT(cell), with options; a trained model goes on as it was."""
    model = model_of_cells()
    x, y = rng(1).normal(size=(B, T, D)), rng(2).normal(size=(B, 2))
    x[0, 3:] = 0
    model.fit(x, y, verbose=0)
    ours = convert(model, truncation=T, checkpoint_every=2)
    found = [layer for _, layer in layers_inside(ours) if isinstance(layer, layers.RNN)]
    assert [type(layer) for layer in found] == [BPTT] * 5
    given = {(layer.truncation, layer.checkpoint_every) for layer in found}
    assert given == {(Truncation(T), 2)}
    back = convert(ours, to=layers.RNN)

    def configs(model):  # not of the model, whose masks older versions number anew
        found = [each for _, each in layers_inside(model)]
        return [each.get_config() for each in found if isinstance(each, layers.RNN)]

    assert configs(back) == configs(model)
    expected = model.predict(x, verbose=0)
    for copy in (ours, back):
        assert relative_error(copy.predict(x, verbose=0), expected) < SAME
        assert copy.optimizer.iterations == 1
        copy.fit(x, y, verbose=0)
        assert copy.optimizer.iterations == 2


def test_a_cell_that_no_layer_of_this_package_takes():
    """The copy raises, at its first call; one kind of layer can be converted without it."""
    rnn = layers.RNN(Mixes(3), return_sequences=True)
    model = keras.Sequential([keras.Input((T, D)), rnn, layers.LSTM(2)])
    with pytest.raises(ValueError, match="each example"):
        convert(model)(np.ones((B, T, D)))
    copy = convert(model, to=BPTTLSTM)
    assert [type(layer) for layer in copy.layers] == [layers.RNN, BPTTLSTM]


@pytest.mark.parametrize(
    "layer", few([(layer,) for layer in EVERY], lambda layer: layer is not BPTTGRU)
)
def test_one_kind_alone(layer):
    """Of a class that is named; options go to no other."""
    model = of_all_kinds()
    theirs = kinds(model)
    of_host = {host: layer for layer, host in EVERY.items()}
    ours = [of_host.get(each, each) for each in theirs]
    expected = [layer if of_host.get(each) is layer else each for each in theirs]
    there = convert(convert(model, to=layer), to=layer, adjoint_clipnorm=0.5)
    assert kinds(there) == expected
    there = convert(
        convert(model, adjoint_clipnorm=0.1), to=layer, adjoint_clipnorm=0.5
    )
    for _, each in layers_inside(there):
        if type(each) in EVERY:
            assert each.adjoint_clipnorm == (0.5 if type(each) is layer else 0.1)
    back = convert(there, to=EVERY[layer])
    assert kinds(back) == [EVERY[layer] if each is layer else each for each in ours]


@each_host("SimpleRNN", "GRU")
@without_graphs()
def test_encoder_and_decoder(host):
    """The states of one are those that the other begins with: h and c of an LSTM."""
    x, y = keras.Input((None, D)), keras.Input((None, 2))
    _, *states = host(H, return_state=True, name="encoder")(x)
    decoder = host(H, return_sequences=True, name="decoder")
    h = decoder(y, initial_state=states)
    model = keras.Model([x, y], layers.Dense(2, "softmax")(h))
    model.set_weights([rng(8).normal(size=w.shape) for w in model.get_weights()])
    inputs = [data(), rng(5).normal(size=(B, T, 2)).astype("float32")]
    there = convert(model, checkpoint_every=2)
    assert classes(there) == {OURS[host].__name__}
    expected = model(inputs)
    for copy in there, convert(there, to="keras"):
        assert relative_error(copy(inputs), expected) < SAME
        assert relative_error(copy([0 * inputs[0], inputs[1]]), expected) > 0.1


@each_host()
@without_graphs()
def test_a_stateful_layer_begins_anew(host):
    x = keras.Input((None, D), batch_size=B)
    model = keras.Model(x, host(H, stateful=True)(x))
    first, second = (model(data()).numpy() for _ in range(2))
    assert relative_error(second, first) > 0.05
    there = convert(model)
    assert there.layers[1].stateful
    assert relative_error(there(data()), first) < SAME
    assert relative_error(there(data()), second) < SAME


def test_what_no_configuration_holds():
    """Two arguments of LSTM and GRU; the layers of this package have no use for either."""
    layer = layers.LSTM(3, use_cudnn=False, implementation=1)
    there = convert(layer)
    assert there.use_cudnn is False  # as every layer of this package has it
    back = convert(there, to="keras")
    assert back.use_cudnn == "auto" and back.cell.implementation == 2
    mixed = keras.Sequential([layer, layers.SimpleRNN(2)])
    assert convert(mixed, to=BPTTRNN).layers[0].use_cudnn == "auto"
    assert layer.use_cudnn is False and layer.cell.implementation == 1


# Of the layers of Keras: what their pages say cuDNN can compute.
CUDNN = {
    "LSTM": (lambda: layers.LSTM(3, name="one"), "one"),
    "GRU": (lambda: layers.GRU(3, name="one"), "one"),
    "use_cudnn=True": (lambda: layers.LSTM(3, use_cudnn=True, name="one"), "one"),
    "Bidirectional": (
        lambda: layers.Bidirectional(layers.LSTM(3, dropout=0.1, name="one")),
        "forward_one, backward_one",
    ),
    "SimpleRNN": (lambda: layers.SimpleRNN(3), None),
    "use_cudnn=False": (lambda: layers.LSTM(3, use_cudnn=False), None),
    "activation": (lambda: layers.LSTM(3, activation="relu"), None),
    "gates": (lambda: layers.LSTM(3, recurrent_activation="hard_sigmoid"), None),
    "no bias": (lambda: layers.GRU(3, use_bias=False), None),
    "unroll": (lambda: layers.GRU(3, unroll=True), None),
    "dropout": (lambda: layers.LSTM(3, recurrent_dropout=0.1), None),
    "reset_after": (lambda: layers.GRU(3, reset_after=False), None),
    "option": (lambda: BPTTLSTM(3), None),
}


@pytest.mark.parametrize("name", CUDNN)
def test_that_the_copy_runs_no_cudnn_is_said_where_there_is_a_gpu(name, monkeypatch):
    make, names = CUDNN[name]
    model = keras.Sequential([make()], name="net")
    convert(model, unroll=2)  # pytest makes an error of every warning
    visible = {"GPU": ["one"], "CPU": ["one"]}
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: visible[kind])
    if names is None:
        there = convert(model, unroll=2)
    else:
        words = f"GPU.* Keras runs {names} of 'net' with cuDNN.* not been measured"
        with pytest.warns(UserWarning, match=words) as raised:
            there = convert(model, unroll=2)
        assert len(raised) == 1 and raised[0].filename == __file__
    convert(there, to="keras")
    convert(there, truncation=2)


CHANGES = {
    "truncation": (Truncation(3, 1), Truncation(2)),
    "checkpoint_every": (4, "sqrt"),
    "adjoint_clipnorm": (0.5, 0.07),
    "jit_compile": (False, True),
}


@pytest.mark.parametrize("name", CHANGES)
@each_host("LSTM", "GRU")
@without_graphs()
def test_an_option_alone_changes(name, host):
    """Everywhere in the model; the others stay, and so do outputs and configuration."""
    model, x = convert(model_of("Bidirectional", host)), data()
    for value in (*CHANGES[name], {"jit_compile": "auto"}.get(name)):
        before = model.layers[0].forward_layer.get_config()
        model = convert(model, **{name: value})
        for layer in (model.layers[0].forward_layer, model.layers[0].backward_layer):
            assert getattr(layer, name) == value
        after = model.layers[0].forward_layer.get_config()
        before.pop(name, None), after.pop(name, None)
        assert after == before
        if value is not True:
            expected = model_of("Bidirectional", host)
            expected.set_weights(model.get_weights())
            assert relative_error(model(x), expected(x)) < SAME
    assert name not in model.layers[0].forward_layer.get_config()


@each_model()
@without_graphs()
def test_an_option_alone_changes_wherever_the_layer_is(name, host):
    model, x = convert(model_of(name, host)), data()
    there = convert(model, adjoint_clipnorm=0.07)
    found = [each for _, each in layers_inside(there) if type(each) is OURS[host]]
    assert found and {each.adjoint_clipnorm for each in found} == {0.07}
    assert relative_error(there(x), model(x)) < SAME
    found = [each for _, each in layers_inside(model) if type(each) is OURS[host]]
    assert {each.adjoint_clipnorm for each in found} == {None}


@each_host("GRU")
@without_graphs()
def test_an_output_layer_stays(host):
    layer = OURS[host](H, output_units=2, output_activation="sigmoid", dropout=0.1)
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
@each_host("LSTM", "GRU")
@without_graphs()
def test_unroll_alone_changes(unroll, host):
    body = [keras.Input((T, D)), host(H), layers.Dense(2)]
    model, x = keras.Sequential(body), data()
    there = convert(convert(model, unroll=2), unroll=unroll)
    assert there.layers[0].get_config()["unroll"] is unroll or unroll == 3
    assert there.layers[0].get_config()["unroll"] == unroll
    assert relative_error(there(x), model(x)) < SAME
    if isinstance(unroll, bool):
        for each in (model, there):
            back = convert(each, to=host, unroll=unroll)
            assert back.layers[0].unroll is unroll
            assert classes(back) == {host.__name__}
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


@each_host()
def test_number_of_steps_an_iteration(host):
    """Keras would take it for all of them, of which there is no known number."""
    layer = OURS[host](H, unroll=3)
    model = keras.Sequential([keras.Input((None, D)), layer])
    back = convert(model, to=host)
    assert back.layers[0].unroll is False
    known = keras.Sequential([keras.Input((T, D)), OURS[host](H, unroll=True)])
    assert convert(known, to=host).layers[0].unroll is True


@pytest.mark.parametrize(
    ("host", "loss"),
    few(
        [(host, loss) for host in OURS for loss in ("mse", squared_error)],
        lambda host, loss: (
            (host, loss) in [(layers.SimpleRNN, squared_error), (layers.LSTM, "mse")]
        ),
    ),
)
def test_training_goes_on(host, loss):
    """Weights, what `compile` was told and the optimizer's moments: the same next steps.

    And back in Keras' layer again.
    """
    model, x = model_of("plain", host), data()
    y = rng(2).normal(size=(B, 2)).astype("float32")
    optimizer = keras.optimizers.Adam(0.01)
    model.compile(optimizer, loss, metrics=["mae"], run_eagerly=True)
    model.fit(x, y, epochs=2, verbose=0)
    there = convert(model)
    back = convert(there, to="keras")
    assert there.optimizer.iterations.numpy() == 2
    models = (model, convert(there, jit_compile=False), back)
    histories = [m.fit(x, y, epochs=3, verbose=0).history for m in models]
    assert histories[0]["loss"][-1] < histories[0]["loss"][0]
    for copy, history in zip(models[1:], histories[1:], strict=True):
        assert history.keys() == histories[0].keys() == {"loss", "mae"}
        for name, values in histories[0].items():
            np.testing.assert_allclose(history[name], values, rtol=1e-6)
        # Moments of zero would take steps of another size.
        for ours, theirs in zip(copy.get_weights(), model.get_weights(), strict=True):
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


@each_host()
@without_graphs()
def test_one_layer(host):
    layer = host(H)
    layer.build((None, None, D))
    there = convert(layer)
    assert type(there) is OURS[host]
    assert relative_error(there(data()), layer(data())) < SAME


def test_lambdas():
    """Safe mode is for files: what is in memory has run already."""
    body = [layers.SimpleRNN(H), layers.Lambda(lambda y: 2 * y, output_shape=(H,))]
    model = keras.Sequential([keras.Input((None, D)), *body])
    assert relative_error(convert(model)(data()), model(data())) < SAME


@each_host()
@without_graphs()
def test_weights_file_of_the_other_class(host, tmp_path):
    """Which our layer cannot load: through a model of Keras' and `convert`."""
    model, empty = model_of("plain", host), model_of("plain", host)
    empty.set_weights([0 * w for w in empty.get_weights()])
    model.save_weights(tmp_path / "model.weights.h5")
    words = f"made of {host.__name__}, then take keras_bptt.convert"
    with pytest.raises(ValueError, match=words):
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


def neither():
    """Recurrent layers that are not converted."""
    own = OwnRNN(layers.LSTMCell(3), return_sequences=True)
    return keras.Sequential([keras.Input((None, D)), own, OwnLSTM(2)])


def gated():
    return keras.Sequential([keras.Input((None, D)), layers.LSTM(3), layers.Dense(2)])


ALL = (
    "a SimpleRNN, an LSTM, a GRU or an RNN",
    "a BPTTRNN, a BPTTLSTM, a BPTTGRU or a BPTT",
)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda m: convert("model.keras"),
            ["keras.Model", "'model.keras'", "str", "keras.models.load_model"],
        ),
        (lambda m: convert([m, m]), ["keras.Model", "of type list", "one by one"]),
        (
            lambda m: convert(m, to=layers.ConvLSTM2D),
            [
                "'keras_bptt' or 'keras'",
                "BPTTRNN, BPTTLSTM, BPTTGRU or BPTT or "
                "keras.layers.SimpleRNN, LSTM, GRU or RNN",
                "to=<class 'keras.",
                "Pass one of them",
            ],
        ),
        (lambda m: convert(m, to="SimpleRNN"), ["the class", "'SimpleRNN'"]),
        (lambda m: convert(m, to=OwnLSTM), ["the class", "OwnLSTM"]),
        (
            lambda m: convert(m, to=[BPTTRNN, BPTTLSTM]),
            ["to=[<class", "for two kinds of layers convert twice"],
        ),
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
            lambda m: convert(convert(m), to="keras", unroll=3),
            [f"`unroll` of {ALL[0]} must", "to BPTTRNN, BPTTLSTM, BPTTGRU or BPTT."],
        ),
        (
            lambda m: convert(convert(gated()), to=layers.LSTM, adjoint_clipnorm=1.0),
            ["for the LSTM of", "may be unroll:", "adjoint_clipnorm=1.0"],
        ),
        (
            lambda m: convert(gated(), use_cudnn=False),
            ["BPTTLSTM, BPTTGRU or BPTT of the copy may be", "use_cudnn=False"],
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
        (
            lambda m: convert(convert(gated())),
            [f"hold {ALL[0]}, to become {ALL[1]}", "holds BPTTLSTM alone"],
        ),
        (
            lambda m: convert(gated(), to="keras"),
            [f"hold {ALL[1]}, to become {ALL[0]}", "holds LSTM alone"],
        ),
        (
            lambda m: convert(gated(), to=BPTTRNN),
            [
                "hold a SimpleRNN, to become a BPTTRNN",
                "holds none: LSTM, Dense",
                "Pass to='keras_bptt'",
            ],
        ),
        (
            lambda m: convert(convert(gated()), to=layers.SimpleRNN),
            ["hold a BPTTRNN, to", "holds none: BPTTLSTM, Dense", "Pass to='keras'"],
        ),
        (
            lambda m: convert(m, to=layers.LSTM),
            ["hold a BPTTLSTM, to become an LSTM", "holds none: SimpleRNN, Dense."],
        ),
        (
            lambda m: convert(neither()),
            ["hold a SimpleRNN", "holds none: OwnRNN, OwnLSTM."],
        ),
        (
            lambda m: convert(neither(), truncation=3),
            ["hold a SimpleRNN", f"or {ALL[1]}, to get the options", "none: OwnRNN"],
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
        (
            lambda m: convert(BPTTLSTM(3, output_units=2, name="r"), "keras"),
            ["A BPTTLSTM", "an LSTM", "'r'", "output_units=2", "keras.layers.Dense"],
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
    model = keras.Sequential(
        [keras.Input((None, D)), MadeInside(), layers.SimpleRNN(H)]
    )
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
