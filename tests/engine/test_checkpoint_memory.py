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
from plain_rnn import Constants, Recurrence, arguments_of
from tensorflow.python.eager import context  # no public name tells what grappler makes
from test_checkpoints import EVERY
from test_recurrence import bound, first_order, random_problem, tensors_of

import keras_bptt.engine.blocks
import keras_bptt.engine.forward
from keras_bptt.cells.activations import resolve

SHAPE = B, T, D, H, _ = 5, 9, 4, 3, 2


@pytest.mark.parametrize(
    ("every", "sequences", "known"),
    [
        *((every, place % 2 == 0, True) for place, every in enumerate(EVERY)),
        ("sqrt", False, False),
    ],
)
def test_kept_are_the_states_before_the_blocks(every, sequences, known):
    activation = resolve(tf.tanh, H, "float64")
    options = Recurrence(activation, return_sequences=sequences, checkpoint_every=every)
    arrays = random_problem(SHAPE)[:5]
    specs = [tf.TensorSpec(a.shape, "float64") for a in arrays]
    if not known:
        specs[0] = tf.TensorSpec([None, None, D], "float64")

    @tf.function(input_signature=specs)
    def forward(*tensors):
        return keras_bptt.engine.forward.forward(
            options, Constants(), arguments_of(*tensors)
        )

    with without_graphs() if known else contextlib.nullcontext():
        _, kept = forward(*map(tf.constant, arrays))
    root = 3 if known else 4
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


def largest_tensor(every, mode, jit_compile, layer):
    """The most numbers in one tensor of a traced training step, by the static shapes.

    As a share of all states. With an output layer the outputs are of one number.
    """
    steps, features, units = 12, 2, 7
    shape = B, steps, features, units, 1
    problem = random_problem(shape, 1.0, layer, "bV" if layer else "b")
    tensors, _ = tensors_of(problem, {})
    function = bound(
        return_sequences=layer, checkpoint_every=every, jit_compile=jit_compile
    )

    @tf.function(jit_compile=mode == "xla", autograph=False)
    def step(tensors):
        return first_order(function)(tensors, {})[1]

    graph = step.get_concrete_function(tensors).graph
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
    ("mode", "jit_compile", "layer"),
    [
        ("graph", False, False),
        ("graph", True, False),
        ("graph", True, True),
        ("xla", False, False),
    ],
)
def test_no_tensor_of_all_states(monkeypatch, mode, jit_compile, layer):
    """At most about a third of them, whereas without checkpoints there is one."""
    monkeypatch.setattr(keras_bptt.engine.blocks, "NUMBERS", 2**20)
    given = mode, jit_compile, layer
    assert largest_tensor(None, *given) >= 1
    assert largest_tensor("sqrt", *given) < 0.4
    # More blocks than are parts of the graph.
    monkeypatch.setattr(keras_bptt.engine.blocks, "MOST", 8)
    assert largest_tensor(1, *given) == 1, "12 checkpoints of 12"
    monkeypatch.setattr(keras_bptt.engine.blocks, "MOST", 2)
    assert largest_tensor(4, *given) < 0.4


def activations(every, steps=12):
    """How many times f stands in the graph that grappler makes of a gradient.

    f is sigmoid: of its slope, h (1 - h), grappler makes no operation together with h.
    """
    tensors, _ = tensors_of(random_problem((B, steps, D, H, 1), 1.0, False), {})
    function = bound("sigmoid", unroll=True, checkpoint_every=every)

    @tf.function(autograph=False)
    def run(tensors):
        return first_order(function)(tensors, {})[1]

    context.context().enable_run_metadata()
    try:
        run(tensors)
        made = context.context().export_run_metadata().function_graphs
    finally:
        context.context().disable_run_metadata()
    (graphs,) = made
    return sum(n.op == "Sigmoid" for n in nodes(graphs.post_optimization_graph))


def test_blocks_are_computed_again():
    """The optimised graph does not take them from the forward pass, and keep them.

    But for the last block, which the backward pass begins with.
    """
    assert activations(None) == 12
    for every in (2, 3, 4):
        assert activations(every) >= 12 + (12 - every)
    # The control: what tells one block of the walk from another is what prevents it.
    with mock.patch.object(
        keras_bptt.engine.blocks.tf,
        "control_dependencies",
        lambda _: contextlib.nullcontext(),
    ):
        assert activations(3) == 12
