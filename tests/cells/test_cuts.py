"""The cut against all others; and what is simplified, with numbers."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from helpers import rng

from keras_bptt.cells.cuts import NEVER, Impossible, cut
from keras_bptt.runtime.simplify import simplified
from keras_bptt.runtime.subgraphs import Traced


def random_graph(random, size):
    """Operations of one output each, which read some of those before."""
    tensors = []
    for number in range(size):
        inputs = [t for t in tensors if random.random() < 0.4]
        operation = SimpleNamespace(name=f"op{number}", inputs=inputs)
        tensors.append(SimpleNamespace(name=f"t{number}", op=operation))
    return tensors


def cost_of(wanted, kept, keeping, computing):
    """What it costs to have the wanted tensors, where these are kept and no others."""
    cost, waiting, seen = 0, list(wanted), set()
    while waiting:
        tensor = waiting.pop()
        if tensor.name in seen:
            continue
        seen.add(tensor.name)
        if keeping(tensor) == 0 or tensor.name in kept:
            cost += keeping(tensor)
        else:
            cost += computing(tensor.op)
            waiting += tensor.op.inputs
    return cost


@pytest.mark.parametrize("seed", range(20))
def test_no_other_choice_costs_less(seed):
    random = rng(seed)
    tensors = random_graph(random, 9)
    keep = {t.name: int(random.choice([0, 3, 10, 40, NEVER])) for t in tensors}
    again = {t.op.name: int(random.choice([0, 1, 5, 60])) for t in tensors}
    given = (lambda t: keep[t.name]), (lambda op: again[op.name])
    wanted = tensors[-2:]
    names = [t.name for t in tensors]
    least = min(
        cost_of(wanted, set(kept), *given)
        for number in range(len(names) + 1)
        for kept in itertools.combinations(names, number)
    )
    found = {t.name for t in cut(wanted, *given)}
    assert cost_of(wanted, found, *given) == least


def test_what_is_impossible_raises():
    leaf = SimpleNamespace(name="x", op=SimpleNamespace(name="placeholder", inputs=[]))
    with pytest.raises(Impossible):
        cut([leaf], lambda t: NEVER, lambda op: NEVER)


def slices(x):
    return tf.concat([x[:, 4:], x[:, 1:3] ** 2, x[:, :4]], 1), x[:, 2] ** 2, x[:, None]


def parts(x):
    return [part**2 for part in (x[:, :2], x[:, 2:5], x[:, 5:])]


def concat(x):
    """Along each axis but that of rows, said from either end."""
    y = tf.concat([x[:, :1], tf.sin(x), x[:, 2:4] ** 2], -1)
    z = tf.concat([tf.stack([x, 2 * x], 2), tf.stack([x**2], 2)], 2)
    return y**2, z**2


def broadcast(x):
    return x * tf.reduce_mean(x, -1, keepdims=True) + tf.reduce_sum(x**2, 1)[:, None]


@pytest.mark.parametrize(
    ("function", "gone"),
    [
        (slices, "StridedSliceGrad"),
        (parts, "StridedSliceGrad"),
        (concat, "ConcatOffset"),
        (broadcast, "BroadcastGradientArgs"),
    ],
)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_gradient_that_is_simplified_is_the_same(function, gone, rows):
    def whole(x, random):
        y = tf.nest.flatten(function(x))
        weights = [
            tf.reshape(random[:, :1], [-1] + [1] * (len(t.shape) - 1)) for t in y
        ]
        loss = [tf.reduce_sum(tf.sin(t) * w) for t, w in zip(y, weights, strict=True)]
        return tf.gradients(loss, x)[0]

    row = tf.TensorSpec([None, 6], tf.float64)
    graph = tf.function(whole, autograph=False).get_concrete_function(row, row).graph
    lean, new_name = simplified(graph)
    assert gone in {op.type for op in graph.get_operations()}
    traced = Traced(lean)
    inputs = [lean.get_tensor_by_name(new_name(t.name)) for t in graph.inputs[:2]]
    output = lean.get_tensor_by_name(new_name(graph.outputs[0].name))
    part = traced.part([output], inputs)
    assert gone not in {op.type for op in part.operations}
    x, random = (tf.constant(rng(i).normal(size=(rows, 6))) for i in range(2))
    expected = tf.function(whole, autograph=False)(x, random)
    np.testing.assert_allclose(part([x, random])[0], expected, rtol=1e-12)
