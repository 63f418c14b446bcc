"""What checkpoints are for: what is kept between the passes, and what is not.

The states before the blocks, and no tensor of all states; the blocks are computed again,
also after TensorFlow has optimised the graph.
"""

import contextlib
import math
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf
from helpers import relative_error, without_graphs
from plain_rnn import MODULES, Constants, Recurrence, arguments_of
from tensorflow.python.eager import context  # no public name tells what grappler makes
from test_checkpoints import EVERY, SHAPE, B, D, H, T, bound
from test_recurrence import random_problem

import keras_bptt.engine.blocks
import keras_bptt.engine.forward
from keras_bptt.cells.activations import resolve


@pytest.mark.parametrize("every", EVERY, ids=str)
@pytest.mark.parametrize("steps", ["known", "unknown"])
@pytest.mark.parametrize("sequences", [True, False], ids=["sequences", "last"])
def test_kept_are_the_states_before_the_blocks(every, steps, sequences):
    options = Recurrence(
        resolve(tf.tanh, H, "float64"),
        return_sequences=sequences,
        checkpoint_every=every,
    )
    arrays = random_problem(SHAPE, 1.2)[:5]
    specs = [tf.TensorSpec(a.shape, "float64") for a in arrays]
    if steps == "unknown":
        specs[0] = tf.TensorSpec([None, None, D], "float64")

    @tf.function(input_signature=specs)
    def forward(*arguments):
        arguments = arguments_of(*arguments)
        outputs, kept = keras_bptt.engine.forward.forward(
            options, Constants(), arguments
        )
        return outputs, kept

    with without_graphs() if steps == "known" else contextlib.nullcontext():
        _, kept = forward(*map(tf.constant, arrays))
    root = 3 if steps == "known" else 4
    size = root if every == "sqrt" else every
    ((kept,),) = kept
    assert kept.shape == (math.ceil(T / size), B, H)
    x, W, U, h, b = arrays
    for t in range(T):
        if t % size == 0:
            assert relative_error(kept[t // size], h) < 1e-12
        h = np.tanh(x[:, t] @ W + h @ U + b)


def nodes(graph_def):
    yield from graph_def.node
    for function in graph_def.library.function:
        yield from function.node_def


def largest_tensor(every, mode, jit_compile, output_units=None):
    """The most numbers in one tensor of a traced training step, by the static shapes."""
    steps, features, units = 24, 2, 7
    problem = random_problem((B, steps, features, units), 1.0, False)
    x, W, U, h_0, b = (tf.constant(a) for a in problem[:5])
    others, sequences = [], output_units is not None
    if sequences:
        others = [tf.ones([units, output_units], "float64")]
    function = bound(
        units=units,
        return_sequences=sequences,
        checkpoint_every=every,
        jit_compile=jit_compile,
    )

    @tf.function(jit_compile=mode == "xla", autograph=False)
    def step(x, W, U, h_0, b, *others):
        arguments = [W, U, b, *others]
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            y, _ = function(x, W, U, h_0, b, *others)
            loss = tf.reduce_sum(y**2)
        return tape.gradient(loss, arguments)

    graph = step.get_concrete_function(x, W, U, h_0, b, *others).graph
    sizes = [
        math.prod(dim.size for dim in shape.dim)
        for node in nodes(graph.as_graph_def(add_shapes=True))
        for shape in node.attr["_output_shapes"].list.shape
        if not shape.unknown_rank and all(dim.size >= 0 for dim in shape.dim)
    ]
    # Of what is made block by block too: the walk has come to the functions.
    assert max(sizes) >= B * steps * features
    return max(sizes) / (B * steps * units)


@pytest.mark.parametrize(
    ("mode", "jit_compile", "output_units"),
    [
        ("graph", False, None),
        ("graph", True, None),
        ("graph", True, 1),
        ("xla", False, None),
    ],
)
def test_no_tensor_of_all_states(monkeypatch, mode, jit_compile, output_units):
    """At most about a third of them, whereas without checkpoints there is one."""
    monkeypatch.setattr(keras_bptt.engine.blocks, "NUMBERS", 2**20)
    assert largest_tensor(None, mode, jit_compile, output_units) >= 1
    for every in (4, "sqrt"):
        assert largest_tensor(every, mode, jit_compile, output_units) < 0.4
    # More blocks than are parts of the graph.
    assert largest_tensor(1, mode, jit_compile, output_units) == 1, (
        "24 checkpoints of 24"
    )


def activations(modules, every, steps=12):
    """How many times f stands in the graph that grappler makes of a gradient.

    f is sigmoid: of its slope, h (1 - h), grappler makes no operation together with h.
    """
    problem = random_problem((B, steps, D, H), 1.0, False)
    function = bound("sigmoid", modules=modules, unroll=True, checkpoint_every=every)

    @tf.function(autograph=False)
    def run(arguments, cotangents):
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            outputs = function(*arguments)
        return tape.gradient(outputs, arguments, cotangents)

    tensors = [tf.constant(array) for array in problem]
    context.context().enable_run_metadata()
    try:
        run(tensors[:5], tensors[5:])
        made = context.context().export_run_metadata().function_graphs
    finally:
        context.context().disable_run_metadata()
    (graphs,) = made
    return sum(n.op == "Sigmoid" for n in nodes(graphs.post_optimization_graph))


def test_blocks_are_computed_again():
    """The optimised graph does not take them from the forward pass, and keep them.

    But for the last block, which the backward pass begins with.
    """
    assert activations(MODULES, None) == 12
    for every in (2, 3, 4):
        assert activations(MODULES, every) >= 12 + (12 - every)
    # The control: what tells one block of the walk from another is what prevents it.
    with mock.patch.object(
        keras_bptt.engine.blocks.tf,
        "control_dependencies",
        lambda _: contextlib.nullcontext(),
    ):
        assert activations(MODULES, 3) == 12
