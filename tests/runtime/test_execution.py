"""How the layer runs: what XLA compiles, in which pieces, on how many cores.

None of it may change a result: every test that computes something compares with SimpleRNN.
"""

import itertools
import json

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
    compare,
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

slow = pytest.mark.slow


def compiled_parts(graph_def):
    """How many functions of a graph XLA must compile."""
    functions = graph_def.library.function
    return sum(
        "_XlaMustCompile" in f.attr and f.attr["_XlaMustCompile"].b for f in functions
    )


def parts_of(training, sequence=True, **options):
    layer = BPTTRNN(H, return_sequences=sequence, **options)
    layer.build((B, T, D))

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            y = layer(x, training=training)
        return tape.gradient(y, layer.trainable_variables)

    graph = step.get_concrete_function(tf.TensorSpec((B, T, D))).graph
    return compiled_parts(graph.as_graph_def())


@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize(
    ("jit_compile", "in_training", "in_inference"),
    [("auto", True, False), (True, True, True), (False, False, False)],
)
def test_what_is_compiled(jit_compile, in_training, in_inference, sequence):
    training = parts_of(True, sequence, jit_compile=jit_compile)
    inference = parts_of(False, sequence, jit_compile=jit_compile)
    # One for each direction; states that inference did not keep are computed again.
    assert training == 2 * in_training
    assert inference == (2 if sequence else 3) * in_inference


def test_auto_is_the_default():
    assert BPTTRNN(H).jit_compile == "auto"


@pytest.mark.parametrize(
    ("how", "timesteps"),
    few(
        itertools.product(["export", "saved_model"], [None, 12]),
        lambda how, timesteps: (how == "export") == (timesteps is None),
    ),
)
def test_exports_hold_no_compiled_part(tmp_path, how, timesteps):
    """What XLA compiles neither loads where it is missing nor converts to ONNX."""
    model = keras.Sequential([keras.Input((timesteps, D)), BPTTRNN(H)])
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 12, D)), np.ones((4, H)), verbose=0)
    if how == "export":
        model.export(tmp_path, verbose=False)
    else:
        tf.saved_model.save(model, tmp_path)
    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString((tmp_path / "saved_model.pb").read_bytes())
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


@pytest.mark.parametrize("timesteps", [T, None])
def test_inside_xla_nothing_is_compiled_on_its_own(timesteps):
    layer = BPTTRNN(H)
    layer.build((B, timesteps, D))

    @tf.function(jit_compile=True)
    def call(x):
        return layer(x, training=True)

    graph = call.get_concrete_function(tf.TensorSpec((B, timesteps, D))).graph
    assert compiled_parts(graph.as_graph_def()) == 0


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


def holes(batch, steps):
    mask = rng(2).random((batch, steps)) < 0.6
    mask[-1] = False
    return mask


@pytest.mark.parametrize(
    ("batch", "sequence", "masked"),
    few(
        itertools.product([2, 5], [False, True], [False, True]),
        lambda batch, sequence, masked: batch == 5 and sequence and masked,
    ),
)
def test_shards(sharded, batch, sequence, masked):
    compare(
        random_inputs(batch, 7, D),
        "graph",
        options={
            "return_sequences": sequence,
            "return_state": True,
            "dropout": 0.3,
            "recurrent_dropout": 0.3,
            "seed": 2,
            "batch": batch,
        },
        state=rng(3).normal(size=(batch, H)),
        training=True,
        **({"mask": holes(batch, 7)} if masked else {}),
    )


def test_shards_of_a_batch_of_any_size(sharded):
    """A part may be empty where only run time tells the size."""
    steps = []
    for layer in pair(return_sequences=True):

        @tf.function(input_signature=[tf.TensorSpec((None, 6, D), tf.float64)])
        def step(x, layer=layer):
            with tf.GradientTape() as tape:
                y = layer(x, training=True)
                loss = tf.reduce_sum(y**3)
            return y, *tape.gradient(loss, layer.trainable_variables)

        steps.append(step)
    for batch in (0, 1, 2, 7):
        x = tf.constant(random_inputs(batch, 6, D))
        results = [[t.numpy() for t in step(x)] for step in steps]
        for expected, got in zip(*results, strict=True):
            assert got.shape == expected.shape
            assert relative_error(got, expected) < FLOAT64 if batch else not np.any(got)


@pytest.mark.parametrize("compiled", [pytest.param(False, marks=slow), True])
def test_a_forward_pass_in_a_graph_under_an_eager_tape(compiled):
    """Each pass is cut as its own graph allows, whatever the other's was."""
    theirs, ours = pair()
    x = tf.constant(random_inputs(B, 13, D))
    gradients = []
    for layer in (theirs, ours):
        call = tf.function(
            lambda x, layer=layer: layer(x, training=True),
            jit_compile=(compiled and layer is ours) or None,
        )
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(call(x) ** 3)
        gradients.append(tape.gradient(loss, layer.trainable_variables))
    for got, expected in zip(*reversed(gradients), strict=True):
        assert relative_error(got, expected) < FLOAT64


# --- Lengths that only run time tells


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
    options = {"return_sequences": sequence, "go_backwards": True}
    theirs, ours = pair(activation=activation, **options)

    def step(x, mask, layer):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, mask=mask if masked else None, training=True)
            loss = tf.reduce_sum(y * tf.cos(tf.cast(tf.range(H), y.dtype)))
        return y, *tape.gradient(loss, [x, *layer.trainable_variables])

    signature = [
        tf.TensorSpec((None, None, D), tf.float64),
        tf.TensorSpec((None, None), bool),
    ]
    ours_in_graph = tf.function(
        lambda x, mask: step(x, mask, ours),
        input_signature=signature,
        jit_compile=mode == "xla" or None,
    )
    for steps in (3, 4, 9):
        x = tf.constant(random_inputs(B, steps, D))
        mask = tf.constant(holes(B, steps))
        expected = step(x, mask, theirs)
        for got, want in zip(ours_in_graph(x, mask), expected, strict=True):
            assert got.shape == want.shape
            assert relative_error(got, want) < FLOAT64


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


@pytest.mark.parametrize("jit_compile", [pytest.param(False, marks=slow), True])
@pytest.mark.parametrize("sequence", [pytest.param(False, marks=slow), True])
@pytest.mark.parametrize("masked", [pytest.param(False, marks=slow), True])
def test_eager_steps_of_several_batches_and_lengths(
    monkeypatch, masked, sequence, jit_compile
):
    """The forward pass may be traced for any batch, the backward pass for one alone."""
    monkeypatch.setattr(keras_bptt.engine.blocks, "NUMBERS", 8 * B * H)
    theirs, ours = pair(return_sequences=sequence)
    ours.jit_compile = jit_compile
    for batch, steps in ((B, 12), (2 * B, 12), (B, 12), (B, 17), (2, 33), (2 * B, 33)):
        x = random_inputs(batch, steps, D)
        call = {"mask": holes(batch, steps) if masked else None, "training": True}
        expected = evaluate(theirs, x, "plain", **call)
        assert_same(evaluate(ours, x, **call), expected)


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


def test_unrolled_layers_are_not_compiled_by_themselves():
    assert parts_of(True, unroll=True) == 0
    assert parts_of(True, unroll=True, jit_compile=True) == 2


# --- Several steps an iteration


@pytest.mark.parametrize(
    ("unroll", "mode"),
    few(
        itertools.product([1, 2, 3, 5, 8], WAYS),
        lambda unroll, mode: mode == "plain" or (unroll, mode) == (2, "graph"),
    ),
)
def test_unroll_by_a_number(unroll, mode):
    """That divides the number of steps, does not, equals it, exceeds it."""
    theirs, _ = pair(return_sequences=True)
    _, ours = pair(return_sequences=True, unroll=1)
    ours.unroll = unroll
    x = random_inputs()
    assert_same(evaluate(ours, x, mode), evaluate(theirs, x))


def test_iterations_of_a_loop(monkeypatch):
    """The number of steps an iteration is the one asked for."""
    monkeypatch.setattr(keras_bptt.engine.blocks, "NUMBERS", 2**19)

    def products(unroll):
        layer = BPTTRNN(H, unroll=unroll)
        layer.build((B, 30, D))
        call = tf.function(lambda x: layer(x))
        graph = call.get_concrete_function(
            tf.TensorSpec((B, 30, D))
        ).graph.as_graph_def()
        counts = [
            sum(node.op == "MatMul" for node in f.node_def)
            for f in graph.library.function
        ]
        return max(counts)

    assert products(3) == 3
    assert products(10) == 10


def test_unroll_by_a_number_needs_no_known_length():
    layer = BPTTRNN(H, unroll=3)
    outputs = layer(keras.Input((None, D)))
    assert outputs.shape == (None, H)


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
    config = json.loads(json.dumps(layer.get_config()))
    assert config.get("jit_compile", "auto") == options.get("jit_compile", "auto")
    assert config["unroll"] == options.get("unroll", False)
    again = BPTTRNN.from_config(config)
    assert again.get_config() == layer.get_config()


@pytest.mark.parametrize("unroll", [0, -1, 2.0, "all", None])
def test_wrong_unroll(unroll):
    with pytest.raises(ValueError, match=r"`unroll`.*Received: unroll="):
        BPTTRNN(H, unroll=unroll)


@pytest.mark.parametrize("jit_compile", [None, 1, "always"])
def test_wrong_jit_compile(jit_compile):
    with pytest.raises(ValueError, match=r"`jit_compile`.*Received: jit_compile="):
        BPTTRNN(H, jit_compile=jit_compile)
