"""Configuration, files, and models that leave without the package.

Every layer of `twins.LAYERS` with every option goes out and comes back: as a
configuration, a `.keras` file, weights, a SavedModel in a process that has no keras_bptt.
"""

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
    FLOAT64,
    B,
    D,
    H,
    few,
    needs_keras,
    random_inputs,
    relative_error,
    rng,
    without_graphs,
)
from twins import LAYERS, OWN, fill, layer_of, sine

from keras_bptt import BPTTRNN, RandomizedTruncation, Truncation

T = 7


@pytest.fixture(params=[n for n, row in LAYERS.items() if isinstance(row.layer, type)])
def name(request):
    """The name of a layer."""
    return request.param


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
NOT_OF_THE_HOST = {
    "truncation": [
        Truncation(3),
        Truncation(5, stride=2),
        RandomizedTruncation(2.5),
        RandomizedTruncation(4, seed=7),
    ],
    "checkpoint_every": [1, 20, "sqrt", np.int64(5)],
    "adjoint_clipnorm": [1.5, 2],
    "adjoint_max_growth": [1.0, 3],
    "jit_compile": [True, False],
    "output_units": [3],
}


@pytest.mark.parametrize("argument", NOT_DEFAULT)
def test_config_keeps_every_argument_of_the_host(name, argument):
    """One at a time, next to what the host makes of it."""
    make, host = LAYERS[name].layer, LAYERS[name].host
    options = {"units": 3, "name": "rnn"} | {argument: NOT_DEFAULT[argument]}
    config = make(**options).get_config()
    assert config == host(**options).get_config()
    assert make.from_config(config).get_config() == config
    # These two do not reach the configuration of SimpleRNN in every version of Keras.
    if argument not in ("activity_regularizer", "seed"):
        assert config[argument] != make(3, name="rnn").get_config()[argument]


def test_config_says_nothing_of_what_was_not_asked_for(name):
    """So the host can take it."""
    make, host = LAYERS[name].layer, LAYERS[name].host
    layer = make(H)
    assert layer.jit_compile == "auto"
    assert all(getattr(layer, key) is None for key in OWN if key != "jit_compile")
    config = make(H, activation="relu", return_state=True).get_config()
    theirs = host.from_config(config).get_config()
    assert theirs == config == make.from_config(theirs).get_config()


@pytest.mark.parametrize(
    ("argument", "value"),
    [(key, value) for key, values in NOT_OF_THE_HOST.items() for value in values],
    ids=str,
)
def test_config_keeps_what_is_not_of_the_host(name, argument, value):
    """Through JSON; the host, which would give another gradient, refuses it."""
    layer = LAYERS[name].layer(H, **{argument: value})
    assert getattr(layer, argument) == value
    config = json.loads(json.dumps(layer.get_config()))
    written = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    assert written["registered_name"] == f"keras_bptt>{name}"
    for again in (
        LAYERS[name].layer.from_config(config),
        keras.saving.deserialize_keras_object(written),
        keras.models.clone_model(keras.Sequential([layer])).layers[0],
    ):
        assert type(again) is LAYERS[name].layer
        assert getattr(again, argument) == value
        assert again.get_config() == layer.get_config()
    with pytest.raises((TypeError, ValueError)):
        LAYERS[name].host.from_config(config)


@pytest.mark.parametrize(
    "activation",
    [
        None,
        sine,
        pytest.param(
            keras.layers.ReLU(2.0),
            marks=needs_keras("3.10", "reading an activation that is a layer"),
        ),
    ],
)
def test_config_keeps_a_function(name, activation):
    """Of the cell and of the output layer."""
    options = {"activation": activation, "output_activation": activation}
    layer = LAYERS[name].layer(H, output_units=2, **options)
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    again = keras.saving.deserialize_keras_object(config)
    x = random_inputs(B, T, D).astype("float32")
    again.build(x.shape)
    layer.build(x.shape)
    again.set_weights(layer.get_weights())
    np.testing.assert_array_equal(again(x), layer(x))


# --- Weights


@pytest.mark.parametrize("truncation", [None, *NOT_OF_THE_HOST["truncation"]], ids=str)
def test_weights_are_those_of_the_host(name, truncation):
    """They go both ways; a seed is no weight."""
    ours = layer_of(name, truncation=truncation)
    theirs = LAYERS[name].host(H, dtype="float64")
    theirs.build((B, None, D))
    names = [
        [(w.name, tuple(w.shape)) for w in layer.weights] for layer in (theirs, ours)
    ]
    assert names[0] == names[1]
    x = random_inputs(B, T, D)
    for source, target in ((ours, theirs), (theirs, ours)):
        fill(source, seed=9 + (source is ours))
        before = relative_error(target(x), source(x))
        target.set_weights(source.get_weights())
        assert before > 1e-2
        assert relative_error(target(x), source(x)) < FLOAT64


# --- Models

PADDING = -9.0
MODELS = {
    "plain": {"activation": sine, "recurrent_regularizer": "l2"},
    "chunks": {"truncation": 3, "adjoint_clipnorm": 1.5},
    "windows": {"truncation": Truncation(5, stride=2), "adjoint_max_growth": 2.0},
    "randomized": {"truncation": RandomizedTruncation(2.5, seed=7)},
    "checkpoints": {"checkpoint_every": "sqrt"},
    "output layer": {"output_units": 3, "output_activation": "softmax"},
}


def model_of(name, mask=True, wrap=lambda layer: layer, **options):
    """A functional model of unknown batch and length, with a mask."""
    options = {"return_sequences": True, "jit_compile": False} | options
    inputs = keras.Input((None, D))
    x = keras.layers.Masking(PADDING)(inputs) if mask else inputs
    model = keras.Model(inputs, wrap(LAYERS[name].layer(H, **options))(x))
    fill(model)
    return model


def inputs_of(i=0, batch=B, steps=T, masked=True):
    x = random_inputs(batch, steps, D, seed=i).astype("float32")
    if masked:
        x[rng(i + 9).random((batch, steps)) < 0.3] = PADDING
        x[0] = PADDING
    return x


def train(model, x):
    if not model.compiled:
        model.compile(keras.optimizers.Adam(0.02), "mse", run_eagerly=True)
    model.train_on_batch(x, np.tanh(random_inputs(*model(x).shape, seed=3)))


@pytest.mark.parametrize(
    ("kind",),
    few(
        [(kind,) for kind in [*MODELS, "both directions"]],
        lambda kind: kind not in ("plain", "chunks", "checkpoints"),
    ),
)
def test_keras_file(name, kind, tmp_path):
    """Options, weights and the state of the optimizer: training goes on as if nothing was.

    Keras keeps of a generator the seed, not how often it was asked.
    """
    both = {} if kind in MODELS else {"wrap": keras.layers.Bidirectional}
    model, x = model_of(name, **both, **MODELS.get(kind, MODELS["plain"])), inputs_of()
    if kind != "randomized":
        train(model, x)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), model(x))
    before = model.get_weights()
    for each in (model, loaded):
        train(each, x)
    for got, want, old in zip(
        loaded.get_weights(), model.get_weights(), before, strict=True
    ):
        np.testing.assert_array_equal(got, want)
        assert np.any(want != old)


def replaced(name, model, tmp_path):
    """How a trained model of Keras takes the layer in."""

    def replace(layer):
        host, make = LAYERS[name].host, LAYERS[name].layer
        return (make if type(layer) is host else type(layer)).from_config(
            layer.get_config()
        )

    inputs, options = keras.Input((None, D)), {"return_sequences": True}
    x = keras.layers.Masking(PADDING)(inputs)
    theirs = keras.Model(inputs, LAYERS[name].host(H, activation=sine, **options)(x))
    clone = keras.models.clone_model(theirs, clone_function=replace)
    clone.set_weights(model.get_weights())
    return clone


def cloned(name, model, tmp_path):
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    return clone


def from_weights_file(name, model, tmp_path):
    clone = keras.models.clone_model(model)
    model.save_weights(tmp_path / "model.weights.h5")
    clone.load_weights(tmp_path / "model.weights.h5")
    return clone


COPIES = {
    "clone": cloned,
    "clone of the host": replaced,
    "weights file": from_weights_file,
    "deepcopy": lambda name, model, path: copy.deepcopy(model),
    "pickle": lambda name, model, path: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("kind", ["plain", "output layer"])
@pytest.mark.parametrize("how", COPIES)
def test_copies(name, kind, how, tmp_path):
    if (how, kind) == ("clone of the host", "output layer"):
        pytest.skip("which has none")
    model, x = model_of(name, **MODELS[kind]), inputs_of()
    copied = COPIES[how](name, model, tmp_path)
    assert type(copied.layers[-1]) is LAYERS[name].layer
    np.testing.assert_allclose(copied(x), model(x), rtol=0, atol=0)


def test_prediction_does_not_change_in_a_model(name):
    """`predict`, in batches that do not divide the examples, as the host's."""
    x = inputs_of(batch=23)
    ours = model_of(name)
    inputs = keras.Input((None, D))
    theirs = LAYERS[name].host(H, return_sequences=True)
    theirs = keras.Model(inputs, theirs(keras.layers.Masking(PADDING)(inputs)))
    theirs.set_weights(ours.get_weights())
    got, expected = (m.predict(x, batch_size=10, verbose=0) for m in (ours, theirs))
    assert relative_error(got, expected) < FLOAT32


# --- Without the package

SEQUENCE = {"return_sequences": True}
LEAVING = {
    "mask": SEQUENCE,
    "last output": {},
    "softmax": {"activation": "softmax"} | SEQUENCE,
    "backwards": {"go_backwards": True, "activation": "gelu"},
    "mixed precision": {"dtype": "mixed_bfloat16"},
    "chunks, checkpoints, output layer": {
        "truncation": 2,
        "checkpoint_every": 3,
        "output_units": 5,
    }
    | SEQUENCE,
    # Its cotangents are those of the state alone: the loss reads the last output.
    "windows, state": {"truncation": Truncation(3, 2), "return_state": True} | SEQUENCE,
    "clipped": {"adjoint_clipnorm": 0.5, "checkpoint_every": "sqrt"},
    # Off where `training` is false.
    "randomized": {"truncation": RandomizedTruncation(2, seed=4)},
}
# By tf.saved_model.save and ExportArchive in place of model.export.
SAVED = {"mask, softmax": {"activation": "softmax"} | SEQUENCE}
ARCHIVED = {"sliding window": {"truncation": Truncation(4, 1)}}
KEYS = [
    f"{how}/{layer}/{case}"
    for layer in LAYERS
    for how, cases in (("export", LEAVING), ("save", SAVED), ("archive", ARCHIVED))
    for case in cases
]
# By default in every mode, and in one; the rest takes long, together.
IN_ALL_MODES = ("export/BPTTRNN/mask",)
IN_ONE_MODE = [f"export/{n}/chunks, checkpoints, output layer" for n in LAYERS]
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
    asked = {(t.callspec.params["key"], t.callspec.params["mode"]) for t in tests}
    modes = {key: [m for m in MODES if (key, m) in asked] for key in KEYS}
    modes = {key: of_key for key, of_key in modes.items() if of_key}
    expected = {}
    for key in modes:
        how, name, case = key.split("/")
        masked = case.startswith("mask")
        options = {"return_sequences": False, "jit_compile": "auto"}
        options |= (LEAVING | SAVED | ARCHIVED)[case]
        model = model_of(name, mask=masked, **options)
        save(model, how, str(folder / key))
        arrays = {}
        for i, (batch, steps) in enumerate(EXAMPLES):
            x = inputs_of(i, batch, steps, masked)
            c = (
                rng(7)
                .normal(size=tf.nest.flatten(model(x))[-1].shape)
                .astype("float32")
            )
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


@pytest.mark.parametrize("kind", ["plain", "output layer"])
def test_export_does_not_ask_for_xla(name, kind, tmp_path):
    """An exported graph must load, and convert, where there is no XLA."""
    model = model_of(name, **MODELS[kind] | {"jit_compile": "auto"})
    model.export(tmp_path / "model", verbose=False)
    graph = tf.saved_model.load(tmp_path / "model").signatures["serving_default"].graph
    functions = graph.as_graph_def().library.function
    assert functions
    for function in functions:
        assert not function.attr["_XlaMustCompile"].b
        assert "PyFunc" not in {node.op for node in function.node_def}


def test_one_step_an_iteration_is_one_loop(name):
    """Of a sequence: no block, no rest, and one write, which is what ONNX knows."""
    writes = {}
    for unroll in (1, False):
        model = model_of(name, mask=False, unroll=unroll)
        signature = [tf.TensorSpec((None, None, D))]
        call = tf.function(model, input_signature=signature, autograph=False)
        graph = call.get_concrete_function().graph.as_graph_def()
        nodes = [n.op for f in graph.library.function for n in f.node_def]
        writes[unroll] = nodes.count("TensorListSetItem")
    assert writes[1] == 1 < writes[False]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "windows", "checkpoints", "output layer"])
def test_saved_training_step(name, kind, tmp_path):
    """The gradient itself, saved as part of a graph, for any batch and length."""
    layer = layer_of(name, jit_compile=False, **MODELS[kind] | SEQUENCE)
    units = layer.output_units or H

    def gradients(x, c):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(c * layer(x, training=True))
        return tape.gradient(loss, [v.value for v in layer.trainable_variables])

    step = tf.Module()
    step.weights = [v.value for v in layer.trainable_variables]
    shapes = [(None, None, D), (None, None, units)]
    signature = [tf.TensorSpec(shape, tf.float64) for shape in shapes]
    step.gradients = tf.function(gradients, input_signature=signature)
    tf.saved_model.save(step, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    for batch, steps in ((B, T), (2, 12), (4, 3)):
        x, c = random_inputs(batch, steps, D), random_inputs(batch, steps, units)
        pairs = zip(loaded.gradients(x, c), gradients(tf.constant(x), c), strict=True)
        for got, expected in pairs:
            assert relative_error(got, expected) < FLOAT64


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
    x = tf.constant(inputs_of(masked=False))
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
    x = tf.constant(inputs_of(masked=False))
    with tf.GradientTape() as tape:
        tape.watch(x)
        (y,) = loaded.signatures["serving_default"](x).values()
    np.testing.assert_allclose(y, windows[0](x), rtol=1e-5, atol=1e-6)
    with NO_GRADIENT:
        tape.gradient(y, x)


@pytest.mark.parametrize(
    "name", ["jacobian", pytest.param("batch_jacobian", marks=pytest.mark.slow)]
)
def test_jacobian_of_a_loaded_model(name, windows):
    """TensorFlow's vectorised one cannot take the saved gradient, and says so."""
    model, path = windows
    loaded = tf.saved_model.load(path)
    x = tf.constant(inputs_of(masked=False))

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
    x = inputs_of(masked=False)
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


def test_state_leaves_with_the_model(name, tmp_path):
    """It goes on from where it was, and is reset by an endpoint of its own."""
    layer = LAYERS[name].layer(H, stateful=True, return_sequences=True)
    model = keras.Sequential([keras.Input((None, D), batch_size=B), layer])
    x = inputs_of(masked=False)
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
    x = inputs_of(1, 2, 9, masked=False)
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
