"""How the layer runs: what XLA compiles, in which pieces, on how many cores.

None of it may change a result: every test that computes something compares with SimpleRNN.
"""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    FLOAT64,
    MODES,
    WAYS,
    B,
    D,
    H,
    T,
    assert_same,
    evaluate,
    few,
    pair,
    random_inputs,
    relative_error,
    rng,
)
from plain_rnn import Recurrence
from tensorflow.core.protobuf import saved_model_pb2

import keras_bptt.cells.activations
import keras_bptt.engine.backward
import keras_bptt.engine.blocks
import keras_bptt.engine.forward
import keras_bptt.engine.parts
from keras_bptt import BPTTRNN
from keras_bptt.cells.cell import Point
from keras_bptt.engine.adjoints import Terms, plain_pass
from keras_bptt.engine.clipping import Arriving
from keras_bptt.engine.states import states_pass
from keras_bptt.runtime.execution import within_xla

ANY_LENGTH = tf.TensorSpec((None, None, D), tf.float64)


def compiled_parts(graph_def):
    """How many functions of a graph XLA must compile."""
    functions = graph_def.library.function
    return sum(
        "_XlaMustCompile" in f.attr and f.attr["_XlaMustCompile"].b for f in functions
    )


def parts_of(training, timesteps=T, sequence=True, within=None, **options):
    """How many parts of a step and its gradient are compiled, each on its own."""
    layer = BPTTRNN(H, return_sequences=sequence, **options)
    layer.build((B, timesteps, D))

    @tf.function(jit_compile=within)
    def step(x):
        with tf.GradientTape() as tape:
            y = layer(x, training=training)
        return tape.gradient(y, layer.trainable_variables)

    graph = step.get_concrete_function(tf.TensorSpec((B, timesteps, D))).graph
    return compiled_parts(graph.as_graph_def())


def holes(batch, steps):
    mask = rng(2).random((batch, steps)) < 0.6
    if batch > 1:
        mask[-1] = False
    return mask


def step_of(layer, **call):
    """The outputs for x and a mask, and the gradients of a loss that tells steps apart."""

    def step(x, mask=None):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, mask=mask, training=True, **call)
            loss = tf.reduce_sum(y**3 * tf.cos(tf.cast(tf.range(H), y.dtype)))
        return y, *tape.gradient(loss, [x, *layer.trainable_variables])

    return step


def assert_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert relative_error(a, b) < FLOAT64


# --- What is compiled


@pytest.mark.parametrize(
    ("options", "in_training", "in_inference"),
    [
        # One for each direction; states that inference did not keep are computed again.
        ({}, 2, 0),
        ({"sequence": False}, 2, 0),
        ({"jit_compile": True}, 2, 2),
        ({"jit_compile": True, "sequence": False}, 2, 3),
        ({"jit_compile": False}, 0, 0),
        ({"unroll": True}, 0, 0),
        ({"unroll": True, "jit_compile": True}, 2, 2),
        # XLA compiles all of it.
        ({"within": True}, 0, 0),
        ({"within": True, "timesteps": None}, 0, 0),
    ],
    ids=str,
)
def test_what_is_compiled(options, in_training, in_inference):
    assert parts_of(True, **options) == in_training
    assert parts_of(False, **options) == in_inference


@pytest.mark.parametrize("timesteps", [None, pytest.param(12, marks=pytest.mark.slow)])
def test_exports_hold_no_compiled_part(tmp_path, timesteps):
    """What XLA compiles neither loads where it is missing nor converts to ONNX."""
    model = keras.Sequential([keras.Input((timesteps, D)), BPTTRNN(H)])
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 12, D)), np.ones((4, H)), verbose=0)
    model.export(tmp_path / "export", verbose=False)
    tf.saved_model.save(model, tmp_path / "saved_model")
    for folder in tmp_path.iterdir():
        saved = saved_model_pb2.SavedModel()
        saved.ParseFromString((folder / "saved_model.pb").read_bytes())
        (meta_graph,) = saved.meta_graphs
        # Those of the gradient, which is saved with the model, among them.
        assert len(meta_graph.graph_def.library.function) > 5
        assert compiled_parts(meta_graph.graph_def) == 0


def test_xla_is_recognised():
    """Else the layer would nest its own compiled parts, and loops, in what is compiled."""
    seen = []

    def body(i):
        seen.append(within_xla())
        return i + 1

    def loop():
        return tf.while_loop(lambda i: i < 3, body, [tf.constant(0)])

    for wrap, expected in ((MODES["graph"], False), (MODES["xla"], True)):
        seen.clear()
        wrap(loop)()
        wrap(lambda: tf.function(loop)())()
        assert seen and set(seen) == {expected}
    assert not within_xla()


def test_activation_that_xla_cannot_compile():
    """Any function works: this one is Python's business."""

    def own(z):
        z = tf.convert_to_tensor(z)
        return tf.ensure_shape(tf.py_function(tf.tanh, [z], z.dtype), z.shape)

    theirs, _ = pair(return_sequences=True)
    _, ours = pair(return_sequences=True, activation=own)
    x = random_inputs()
    assert_same(evaluate(ours, x, "graph", training=True), evaluate(theirs, x))
    ours.jit_compile = True
    with pytest.raises(ValueError, match="XLA cannot compile.*jit_compile='auto'"):
        ours(x)


# --- The batch in parts


@pytest.fixture
def sharded(monkeypatch):
    """Three cores, and no work too small to share them."""
    monkeypatch.setattr(keras_bptt.engine.parts, "cores", lambda: 3)
    monkeypatch.setattr(keras_bptt.engine.parts, "LEAST_WORK", 0)
    monkeypatch.setattr(keras_bptt.engine.parts, "FEWEST_EXAMPLES", 1)
    calls = []
    original = keras_bptt.engine.parts.split

    def split(count, structure):
        calls.append(count)
        return original(count, structure)

    for module in (keras_bptt.engine.forward, keras_bptt.engine.backward):
        monkeypatch.setattr(module, "split", split)
    yield calls
    assert set(calls) <= {1, 2, 3} and max(calls) > 1, "nothing was split"


def test_shards_of_a_batch_of_any_size(sharded):
    """A part may be empty where only run time tells the size."""
    noise = {"dropout": 0.3, "recurrent_dropout": 0.3, "seed": 2}
    theirs, ours = map(step_of, pair(return_sequences=True, **noise))
    specs = tf.TensorSpec((None, 6, D), tf.float64), tf.TensorSpec((None, 6), bool)
    ours = tf.function(ours, input_signature=specs)
    for batch in (1, 2, 7):
        given = tf.constant(random_inputs(batch, 6, D)), tf.constant(holes(batch, 6))
        assert_equal(ours(*given), theirs(*given))
    nothing = tf.zeros((0, 6, D), tf.float64), tf.zeros((0, 6), bool)
    assert not any(np.any(t) for t in ours(*nothing))


# --- Lengths that only run time tells


@pytest.mark.parametrize(
    "compiled", few([(False,), (True,)], lambda compiled: compiled)
)
def test_a_forward_pass_in_a_graph_under_an_eager_tape(compiled):
    """Each pass is cut as its own graph allows, whatever the other's was."""
    theirs, ours = pair()
    call = tf.function(
        lambda x, **_: ours(x, training=True), jit_compile=compiled or None
    )
    x, gradients = tf.constant(random_inputs(B, 13, D)), []
    for function, layer in ((call, ours), (theirs, theirs)):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(function(x) ** 3)
        gradients.append(tape.gradient(loss, layer.trainable_variables))
    assert_equal(*gradients)


@pytest.mark.parametrize(
    ("activation", "sequence", "masked", "mode"),
    few(
        itertools.product(["tanh", "gelu"], *[[False, True]] * 2, ["graph", "xla"]),
        lambda activation, sequence, masked, mode: (
            activation == "tanh" and sequence and masked == (mode == "xla")
        ),
    ),
)
def test_one_graph_for_all_lengths(activation, sequence, masked, mode):
    """Blocks are of 4 steps here: less than one, whole ones, and whole ones and a rest.

    A mask hides steps that only pad the last block: one case has none.
    """
    theirs, ours = pair(
        activation=activation, return_sequences=sequence, go_backwards=True
    )
    specs = [ANY_LENGTH] + [tf.TensorSpec((None, None), bool)] * masked
    in_graph = tf.function(
        step_of(ours), input_signature=specs, jit_compile=mode == "xla" or None
    )
    for steps in (3, 8, 9):
        given = [tf.constant(random_inputs(B, steps, D))]
        given += [tf.constant(holes(B, steps))] * masked
        assert_equal(in_graph(*given), step_of(theirs)(*given))


def test_new_lengths_compile_nothing_new(monkeypatch):
    """XLA compiles for shapes: every block of every length must have the same."""
    shapes = []
    original = keras_bptt.runtime.execution.call

    def call(function, options, jit_compile, valid, *tensors):
        assert jit_compile
        found = [t for t in tf.nest.flatten(tensors) if t is not None]
        shapes.append([t.shape[1:].as_list() for t in found])
        return original(function, options, jit_compile, valid, *tensors)

    for module in (keras_bptt.engine.forward, keras_bptt.engine.backward):
        monkeypatch.setattr(module, "call", call)
    model = keras.Sequential([keras.Input((None, D)), BPTTRNN(H)])
    model.compile("sgd", "mse")
    for steps in (5, 6, 7, 31, 2):
        loss = model.train_on_batch(np.ones((B, steps, D)), np.ones((B, H)))
        assert np.isfinite(loss)
    # The first length is compiled as it is, all others in blocks.
    assert len(shapes) == 2 * 2
    for shape in shapes:
        assert None not in [size for sizes in shape if sizes for size in sizes]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_number_of_steps_is_no_constant_of_a_compiled_pass(backward):
    """Else XLA would compile for each number of steps that a last block may have."""
    activation = keras_bptt.cells.activations.resolve(
        keras.activations.tanh, H, "float32"
    )
    options, noise = Recurrence(activation), (None, None)

    @tf.function(jit_compile=True)
    def call(valid, W, U, state, z, h):
        given = valid, (W, U), noise
        if backward:
            terms = Terms(Point(None, None, (h,), None), z)
            return plain_pass(options, *given, Arriving((state,)), terms)
        return states_pass((options, (0,)), *given, (state,), (z,), None)

    shapes = [(), (D, H), (H, H), (B, H), (B, T, H), (T, B, H)]
    tensors = [tf.ones(s, tf.float32 if s else tf.int32) for s in shapes]
    # What XLA takes for a constant is no parameter of the program.
    hlo = call.experimental_get_compiler_ir(*tensors)(stage="hlo")
    assert hlo.partition("ENTRY")[2].count(" parameter(") == len(tensors)


@pytest.mark.parametrize(
    ("masked", "sequence", "jit_compile"),
    few(itertools.product([False, True], repeat=3), lambda *options: all(options)),
)
def test_eager_steps_of_several_batches_and_lengths(
    monkeypatch, masked, sequence, jit_compile
):
    """The forward pass may be traced for any batch, the backward pass for one alone."""
    monkeypatch.setattr(keras_bptt.engine.blocks, "NUMBERS", 8 * B * H)
    theirs, ours = pair(return_sequences=sequence)
    ours.jit_compile = jit_compile
    for batch, steps in ((B, 12), (2 * B, 12), (B, 12), (2, 33)):
        x = random_inputs(batch, steps, D)
        call = {"mask": holes(batch, steps) if masked else None, "training": True}
        expected = evaluate(theirs, x, "plain", **call)
        assert_same(evaluate(ours, x, **call), expected)


# --- Several steps an iteration


@pytest.mark.parametrize(
    "mode", few([(mode,) for mode in WAYS], lambda mode: mode in ("plain", "graph"))
)
def test_unroll_by_a_number(mode):
    """That divides the number of steps, does not, equals it, exceeds it."""
    theirs, ours = pair(return_sequences=True)
    x = random_inputs()
    expected = evaluate(theirs, x, "plain")
    for unroll in (2,) if mode == "graph" else (1, 2, 3, 5, 8):
        ours.unroll = unroll
        assert_same(evaluate(ours, x, mode), expected)


def test_iterations_of_a_loop(monkeypatch):
    """The number of steps an iteration is the one asked for, of a length known or not."""
    monkeypatch.setattr(keras_bptt.engine.blocks, "NUMBERS", 2**19)

    def products(unroll):
        layer = BPTTRNN(H, unroll=unroll)
        layer.build((B, 30, D))
        call = tf.function(lambda x: layer(x))
        graph = call.get_concrete_function(tf.TensorSpec((B, 30, D))).graph
        functions = graph.as_graph_def().library.function
        return max(sum(node.op == "MatMul" for node in f.node_def) for f in functions)

    assert products(3) == 3
    assert products(10) == 10
    assert BPTTRNN(H, unroll=3)(keras.Input((None, D))).shape == (None, H)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unroll": 4},
        {"unroll": True},
        {"jit_compile": False},
        {"jit_compile": True},
    ],
    ids=str,
)
def test_config(options):
    layer = BPTTRNN(H, **options)
    config = layer.get_config()
    assert config.get("jit_compile", "auto") == options.get("jit_compile", "auto")
    assert config["unroll"] == options.get("unroll", False)
    assert BPTTRNN.from_config(config).get_config() == config


@pytest.mark.parametrize(
    ("name", "value"),
    [("unroll", value) for value in (0, -1, 2.0, "all", None)]
    + [("jit_compile", value) for value in (None, 1, "always")],
)
def test_wrong_options_raise(name, value):
    with pytest.raises(ValueError, match=f"`{name}`.*Received: {name}="):
        BPTTRNN(H, **{name: value})
