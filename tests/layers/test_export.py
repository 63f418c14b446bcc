"""Configuration, saving, training with `fit`, and models that leave without the package."""

import copy
import functools
import itertools
import json
import os
import pathlib
import pickle
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    FLOAT32,
    B,
    D,
    H,
    T,
    few,
    needs_keras,
    random_inputs,
    random_weights,
    relative_error,
    rng,
    without_graphs,
)

from keras_bptt import BPTTRNN, RandomizedTruncation, Truncation


@keras.saving.register_keras_serializable(package="test_export")
def wave(z):
    return tf.sin(z) + 0.1 * z


# --- Configuration

NOT_DEFAULT = {
    "units": 7,
    "activation": "gelu",
    "use_bias": False,
    "kernel_initializer": "he_normal",
    "recurrent_initializer": keras.initializers.Orthogonal(0.5),
    "bias_initializer": "ones",
    "kernel_regularizer": "l1",
    "recurrent_regularizer": keras.regularizers.L2(0.3),
    "bias_regularizer": "l2",
    "activity_regularizer": "l1",
    "kernel_constraint": "non_neg",
    "recurrent_constraint": keras.constraints.MaxNorm(3),
    "bias_constraint": "unit_norm",
    "dropout": 0.1,
    "recurrent_dropout": 0.2,
    "return_sequences": True,
    "return_state": True,
    "go_backwards": True,
    "stateful": True,
    "unroll": 4,
    "zero_output_for_mask": True,
    "seed": 5,
    "name": "named",
    "dtype": "mixed_bfloat16",
    "trainable": False,
}


@pytest.mark.parametrize("name", NOT_DEFAULT)
def test_config_keeps_every_argument(name):
    """One at a time, next to what SimpleRNN makes of it."""
    options = {"units": 3, "name": "rnn"} | {name: NOT_DEFAULT[name]}
    layer = BPTTRNN(**options)
    config = layer.get_config()
    assert config == keras.layers.SimpleRNN(**options).get_config()
    assert BPTTRNN.from_config(config).get_config() == config
    # These two do not reach the configuration of SimpleRNN in every version of Keras.
    if name not in ("activity_regularizer", "seed"):
        assert config[name] != BPTTRNN(3, name="rnn").get_config()[name]


@pytest.mark.parametrize(
    "activation",
    [
        "tanh",
        None,
        wave,
        pytest.param(
            keras.layers.ReLU(2.0),
            marks=needs_keras("3.10", "reading an activation that is a layer"),
        ),
    ],
)
def test_config_round_trip(activation):
    layer = BPTTRNN(H, activation=activation, return_sequences=True)
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    assert config["registered_name"] == "keras_bptt>BPTTRNN"
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is BPTTRNN
    x = random_inputs().astype("float32")
    again.build(x.shape)
    layer.build(x.shape)
    again.set_weights(layer.get_weights())
    np.testing.assert_array_equal(again(x), layer(x))


def test_config_goes_to_simplernn_and_back():
    config = BPTTRNN(H, activation="relu", return_state=True).get_config()
    config = keras.layers.SimpleRNN.from_config(config).get_config()
    assert BPTTRNN.from_config(config).get_config() == config


# --- Models


def small_model(layer, mask_value=None):
    """A functional model of unknown batch and length."""
    inputs = keras.Input((None, D))
    x = inputs if mask_value is None else keras.layers.Masking(mask_value)(inputs)
    return keras.Model(inputs, layer(x))


def training_data():
    """Whether the running sum of the first feature is positive: solved by memory."""
    x = rng(3).normal(size=(64, T, D)).astype("float32")
    return x, (x[..., 0].sum(1, keepdims=True) > 0).astype("float32")


def classifier(layer):
    model = keras.Sequential(
        [keras.Input((None, D)), layer, keras.layers.Dense(1, activation="sigmoid")]
    )
    model.compile(keras.optimizers.Adam(0.02), "binary_crossentropy")
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"jit_compile": "auto"},
        pytest.param({"jit_compile": True}, marks=pytest.mark.slow),
        pytest.param({"run_eagerly": True}, marks=pytest.mark.slow),
    ],
    ids=["auto", "xla", "eager"],
)
def test_fit_lowers_the_loss_as_simplernn_does(options):
    losses = []
    for layer_class in (keras.layers.SimpleRNN, BPTTRNN):
        keras.utils.set_random_seed(1)
        model = classifier(layer_class(H))
        model.compile(keras.optimizers.Adam(0.02), "binary_crossentropy", **options)
        fit = model.fit(*training_data(), epochs=5, batch_size=16, verbose=0)
        losses.append(fit.history["loss"])
    assert losses[1][-1] < 0.9 * losses[1][0]
    # Twenty steps of Adam, which divides by the size of the gradient, and so lets the
    # rounding of small ones through.
    assert relative_error(losses[1], losses[0]) < 50 * FLOAT32


def test_clone_model():
    model = classifier(BPTTRNN(H, return_sequences=False, activation="relu"))
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    x, _ = training_data()
    np.testing.assert_array_equal(clone(x), model(x))
    assert type(clone.layers[0]) is BPTTRNN


def test_clone_model_puts_it_in_the_place_of_simplernn():
    """How a trained model takes the layer in."""
    model = classifier(keras.layers.SimpleRNN(H, activation="relu"))

    def replace(layer):
        if type(layer) is keras.layers.SimpleRNN:
            return BPTTRNN.from_config(layer.get_config())
        return layer.__class__.from_config(layer.get_config())

    clone = keras.models.clone_model(model, clone_function=replace)
    clone.set_weights(model.get_weights())
    x, _ = training_data()
    assert type(clone.layers[0]) is BPTTRNN
    assert relative_error(clone(x), model(x)) < FLOAT32


@pytest.mark.parametrize(
    "wrapped",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["layer", "Bidirectional"],
)
def test_keras_file(wrapped, tmp_path):
    """Weights and the state of the optimizer: training goes on as if nothing was."""
    layer = BPTTRNN(H, activation=wave, recurrent_regularizer="l2")
    model = classifier(keras.layers.Bidirectional(layer) if wrapped else layer)
    x, y = training_data()
    model.fit(x, y, verbose=0, shuffle=False)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), model(x))
    assert loaded.optimizer.iterations.numpy() == 2
    for each in (model, loaded):
        each.fit(x, y, verbose=0, shuffle=False)
    for got, expected in zip(loaded.get_weights(), model.get_weights(), strict=True):
        assert relative_error(got, expected) < FLOAT32


def test_weights_file(tmp_path):
    model, other = classifier(BPTTRNN(H)), classifier(BPTTRNN(H))
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    x, _ = training_data()
    np.testing.assert_array_equal(other(x), model(x))


def test_copies():
    model = small_model(BPTTRNN(H))
    x, _ = training_data()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.layers[1]) is BPTTRNN
        np.testing.assert_array_equal(other(x), model(x))


# --- Without the package

LAYERS = {
    "last output": {},
    "softmax": {"activation": "softmax", "return_sequences": True},
    "backwards": {"go_backwards": True, "activation": "gelu"},
    "mask": {"return_sequences": True},
    "mixed precision": {"dtype": "mixed_bfloat16"},
    "chunks, checkpoints, output layer": {
        "truncation": 2,
        "checkpoint_every": 3,
        "output_units": 5,
        "return_sequences": True,
    },
    # Its cotangents are those of the state alone: the loss reads the last output.
    "windows, state": {
        "truncation": Truncation(3, 2),
        "return_sequences": True,
        "return_state": True,
    },
    "clipped": {"adjoint_clipnorm": 0.5, "checkpoint_every": "sqrt"},
    # Off where `training` is false.
    "randomised": {"truncation": RandomizedTruncation(2, seed=4)},
}
# By tf.saved_model.save and ExportArchive in place of model.export.
SAVED = {"mask, softmax": {"activation": "softmax", "return_sequences": True}}
ARCHIVED = {"sliding window": {"truncation": Truncation(4, 1)}}
KEYS = [
    f"{how} {name}"
    for how, layers in (("export", LAYERS), ("save", SAVED), ("archive", ARCHIVED))
    for name in layers
]
# In every mode by default, and in one; the rest takes long, together.
IN_ALL_MODES = ("export mask",)
IN_ONE_MODE = (
    "save mask, softmax",
    "export chunks, checkpoints, output layer",
)
PADDING = -9.0
# Another batch and another length than any at which the model was traced.
EXAMPLES = [(B, T), (2, 9)]
# Each must work after the others.
MODES = ["graph", "eager", "xla", "graph again"]

CONSUMER = """
import json, sys
sys.modules["keras_bptt"] = None  # an import of it fails
import numpy as np
import tensorflow as tf

folder = sys.argv[1]
results = {}
for name, asked in json.loads(sys.argv[2]).items():
    loaded = tf.saved_model.load(f"{folder}/{name}")
    if hasattr(loaded, "serve"):
        call = loaded.serve
    else:
        signature = loaded.signatures["serving_default"]
        call = lambda x, f=signature: list(f(x).values())[0]

    def gradient(x, cotangent):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.nest.flatten(call(x))[-1]
            loss = tf.reduce_sum(tf.cast(y, tf.float32) * cotangent)
        # All shapes differ; the names are others here.
        weights = sorted(tape.watched_variables(), key=lambda v: str(v.shape))
        return y, tape.gradient(loss, [x, *weights])

    modes = {
        "graph": tf.function(gradient, reduce_retracing=True),
        "eager": gradient,
        "xla": tf.function(gradient, jit_compile=True),
        "graph again": tf.function(gradient),
    }
    for mode in asked:
        function = modes[mode]
        for i in range(2):
            with np.load(f"{folder}/{name}.npz") as data:
                x, cotangent = (tf.constant(data[f"{k}{i}"]) for k in ("x", "c"))
            y, gradients = function(x, cotangent)
            results[f"{name}/{mode}/{i}/y"] = tf.cast(y, tf.float32).numpy()
            for k, g in enumerate(gradients):
                results[f"{name}/{mode}/{i}/d{k}"] = g.numpy()
np.savez(f"{folder}/results.npz", **results)
"""


def example(i, masked):
    x = rng(i).normal(size=(*EXAMPLES[i], D)).astype("float32")
    if masked:
        x[rng(i + 9).random(EXAMPLES[i]) < 0.3] = PADDING
        x[0] = PADDING
    return x


@without_graphs()
def first_order(model, x, cotangent):
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.nest.flatten(model(x))[-1]
        loss = tf.reduce_sum(tf.cast(y, tf.float32) * cotangent)
    weights = sorted(model.trainable_variables, key=lambda v: str(tuple(v.shape)))
    return y, tape.gradient(loss, [x, *(v.value for v in weights)])


def save(model, how, path):
    signature = [tf.TensorSpec((None, None, D))]
    if how == "export":
        model.export(path, verbose=False)
    elif how == "save":
        call = tf.function(model, input_signature=signature)
        tf.saved_model.save(model, path, signatures=call)
    else:
        archive = keras.export.ExportArchive()
        archive.track(model)
        archive.add_endpoint("serve", model.call, input_signature=signature)
        archive.write_out(path, verbose=False)


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory, request):
    """Expected results by model, and those of one fresh process that loads them all."""
    folder = tmp_path_factory.mktemp("models")
    items = request.session.items
    tests = [i for i in items if "reloaded" in getattr(i, "fixturenames", ())]
    asked = {
        (test.callspec.params["key"], test.callspec.params["mode"]) for test in tests
    }
    modes = {key: [m for m in MODES if (key, m) in asked] for key in KEYS}
    modes = {key: of_key for key, of_key in modes.items() if of_key}
    expected = {}
    for key in modes:
        how, name = key.split(" ", 1)
        options = (LAYERS | SAVED | ARCHIVED)[name]
        masked = name.startswith("mask")
        layer = BPTTRNN(H, **options)
        model = small_model(layer, PADDING if masked else None)
        layer.cell.set_weights(random_weights())
        save(model, how, str(folder / key))
        arrays = {}
        for i in range(2):
            x = example(i, masked)
            shape = tf.nest.flatten(model(x))[-1].shape
            c = rng(7).normal(size=shape).astype("float32")
            arrays |= {f"x{i}": x, f"c{i}": c}
            expected[key, i] = first_order(model, x, c)
        np.savez(folder / f"{key}.npz", **arrays)

    finished = subprocess.run(
        [sys.executable, "-c", CONSUMER, str(folder), json.dumps(modes)],
        capture_output=True,
        text=True,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr
    with np.load(folder / "results.npz") as data:
        return expected, dict(data)


@pytest.mark.parametrize(
    ("key", "mode"),
    few(
        itertools.product(KEYS, MODES),
        lambda key, mode: (
            key in IN_ALL_MODES or (key in IN_ONE_MODE and mode == "graph")
        ),
    ),
)
def test_saved_model_without_the_package(key, mode, reloaded):
    """Predictions and gradients, at any batch and length, in a process without it."""
    expected, results = reloaded
    # The rounding of bfloat16, 2^-8 next to 1, over some 20 roundings.
    tolerance = 20 * 2**-8 if "mixed" in key else FLOAT32
    for i in range(2):
        y, gradients = expected[key, i]
        got = f"{key}/{mode}/{i}"
        assert relative_error(results[f"{got}/y"], tf.cast(y, tf.float32)) < tolerance
        for k, gradient in enumerate(gradients):
            assert np.max(np.abs(gradient)) > 1e-3
            assert relative_error(results[f"{got}/d{k}"], gradient) < tolerance, k
        assert f"{got}/d{len(gradients)}" not in results


def test_export_does_not_ask_for_xla(tmp_path):
    """An exported graph must load, and convert, where there is no XLA."""
    model = small_model(BPTTRNN(H))
    model.export(tmp_path / "model", verbose=False)
    graph = tf.saved_model.load(tmp_path / "model").signatures["serving_default"].graph
    functions = graph.as_graph_def().library.function
    assert functions
    for function in functions:
        assert not function.attr["_XlaMustCompile"].b
        assert "PyFunc" not in {node.op for node in function.node_def}


def test_one_step_an_iteration_is_one_loop():
    """Of a sequence: no block, no rest, and one write, which is what ONNX knows."""
    writes = {}
    for unroll in (1, False):
        model = small_model(BPTTRNN(H, return_sequences=True, unroll=unroll))
        call = tf.function(model, input_signature=[tf.TensorSpec((None, None, D))])
        graph = call.get_concrete_function().graph.as_graph_def()
        nodes = [n.op for f in graph.library.function for n in f.node_def]
        writes[unroll] = nodes.count("TensorListSetItem")
    assert writes[1] == 1 < writes[False]


def test_prediction_does_not_change_in_a_model():
    """`predict`, in batches that do not divide the examples, as SimpleRNN's."""
    x, _ = training_data()
    outputs = []
    for layer_class in (keras.layers.SimpleRNN, BPTTRNN):
        model = small_model(layer_class(H), 0.0)
        model.set_weights(random_weights())
        outputs.append(model.predict(x, batch_size=10, verbose=0))
    assert relative_error(outputs[1], outputs[0]) < FLOAT32


# --- What TensorFlow keeps and what it does not


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """A model with windows, exported, and where."""
    inputs = keras.Input((None, D), name="x")
    model = keras.Model(inputs, BPTTRNN(H, truncation=Truncation(3, 2))(inputs))
    path = tmp_path_factory.mktemp("windows") / "model"
    model.export(path, verbose=False)
    return model, path


# In another process a LookupError. In the one that exported, TensorFlow finds the function
# of the exported graph under the same name, whose tensors it must not use.
NO_GRADIENT = pytest.raises(
    (LookupError, TypeError), match="No gradient defined|cannot be accessed"
)


def test_second_derivatives_of_a_loaded_model_raise(windows):
    """TensorFlow saves none; a wrong number would be the other way to say so."""
    loaded = tf.saved_model.load(windows[1])
    x = tf.constant(example(0, False))
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = tf.reduce_sum(loaded.serve(x) ** 2)
        penalty = tf.reduce_sum(inner.gradient(y, x) ** 2)
    with NO_GRADIENT:
        outer.gradient(penalty, loaded.trainable_variables)


def test_a_gradient_that_was_not_saved_raises(windows, tmp_path):
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    signature = [tf.TensorSpec((None, None, D))]
    call = tf.function(windows[0], input_signature=signature)
    tf.saved_model.save(windows[0], tmp_path, signatures=call, options=options)
    loaded = tf.saved_model.load(tmp_path)
    x = tf.constant(example(0, False))
    with tf.GradientTape() as tape:
        tape.watch(x)
        (y,) = loaded.signatures["serving_default"](x).values()
    np.testing.assert_allclose(y, windows[0](x), rtol=1e-5, atol=1e-6)
    with NO_GRADIENT:
        tape.gradient(y, x)


@pytest.mark.parametrize("name", ["jacobian", "batch_jacobian"])
def test_jacobian_of_a_loaded_model(name, windows):
    """TensorFlow's vectorised one cannot take the saved gradient, and says so."""
    model, path = windows
    loaded = tf.saved_model.load(path)
    x = tf.constant(example(0, False))

    def jacobian(call, **options):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = call(x)
        return getattr(tape, name)(y, x, **options)

    with pytest.raises((ValueError, TypeError, LookupError)):
        jacobian(loaded.serve)
    one_by_one = functools.partial(jacobian, experimental_use_pfor=False)
    got = tf.function(one_by_one)(loaded.serve)
    assert relative_error(got, tf.function(one_by_one)(model)) < FLOAT32
    # Of windows of 3 steps: what lies before them has no part.
    assert np.all(got[..., 0, :] == 0) and np.any(got[..., -1, :] != 0)


@needs_keras("3.15", "training a TFSMLayer")
def test_loaded_model_in_keras(windows):
    """As a layer, which `fit` trains with the gradient that was exported."""
    model, path = windows
    x = example(0, False)
    y = rng(5).normal(size=(B, H)).astype("float32")
    served = keras.layers.TFSMLayer(path, call_endpoint="serve")
    models = keras.models.clone_model(model), keras.Sequential([served])
    models[0].set_weights(model.get_weights())
    for each in models:
        each.compile(keras.optimizers.SGD(0.5), "mse")
        each.fit(x, y, epochs=3, verbose=0)
    trained = models[0].get_weights()
    for got, expected, before in zip(
        served.trainable_weights, trained, model.get_weights(), strict=True
    ):
        assert np.max(np.abs(expected - before)) > 1e-3
        assert relative_error(got, expected) < FLOAT32


def test_state_leaves_with_the_model(tmp_path):
    """It goes on from where it was, and is reset by an endpoint of its own."""
    layer = BPTTRNN(H, stateful=True, return_sequences=True)
    model = keras.Sequential([keras.Input((None, D), batch_size=B), layer])
    x = example(0, False)
    model(x[:, ::-1])
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", model.call, [tf.TensorSpec((B, None, D))])

    def reset():
        layer.reset_state()
        return tf.constant(True)

    archive.add_endpoint("reset", reset, [])
    archive.write_out(tmp_path, verbose=False)
    loaded = tf.saved_model.load(tmp_path)
    goes_on, anew = model(x), keras.models.clone_model(model)
    anew.set_weights(model.get_weights())
    assert relative_error(loaded.serve(x), goes_on) < FLOAT32
    loaded.reset()
    chunks = [loaded.serve(chunk) for chunk in np.split(x, [1, 3], axis=1)]
    assert relative_error(np.concatenate(chunks, axis=1), anew(x)) < FLOAT32
    assert relative_error(goes_on, anew(x)) > 0.01


@pytest.mark.slow
def test_saved_model_cli(windows, tmp_path):
    """The command line of TensorFlow shows the signature, and runs it."""
    model, path = windows
    command = pathlib.Path(sys.executable).with_name("saved_model_cli")
    x = example(1, False)
    np.save(tmp_path / "x.npy", x)
    signature = ["--tag_set", "serve", "--signature_def", "serving_default"]
    results = [
        subprocess.run(
            [command, *arguments, "--dir", path, *signature],
            capture_output=True,
            text=True,
            timeout=300,
        )
        for arguments in (
            ["show"],
            ["run", "--inputs", f"x={tmp_path / 'x.npy'}", "--outdir", tmp_path],
        )
    ]
    for finished in results:
        assert finished.returncode == 0, finished.stderr
    assert f"shape: (-1, -1, {D})" in results[0].stdout
    assert relative_error(np.load(tmp_path / "output_0.npy"), model(x)) < FLOAT32
