"""Tries a traced step with numbers: shapes and dependences that a graph does not tell.

A tensor of as many rows as examples looks like one of examples times heads, whose first
axis is unknown too; and rows may be reversed, sorted or added up along the first axis. So
the step runs a few times: for two numbers of rows, and with some of the rows moved.
"""

import numpy as np
import tensorflow as tf

from keras_bptt.cells.dependence import SEED
from keras_bptt.cells.refusals import mixes
from keras_bptt.runtime.explicit import vjp
from keras_bptt.runtime.subgraphs import Traced, has_rows

# Of rows: neither is a multiple of the other, nor likely a size of anything else.
FEW, MANY = 3, 7


def probed(name, trace):
    """The trace, with its graph told which tensors have a row for each example.

    Raises:
        ValueError: where a row of a result depends on another row of what is given.
    """
    graph = trace.graph
    for rows in (FEW, MANY):
        trace.drawing.check(name, rows)
    leaves = [trace.x, *trace.before, *trace.noise, *trace.draws, *trace.adjoints]
    candidates = [
        t
        for op in graph.operations
        for t in op.outputs
        if has_rows(t)
        and t.dtype not in (tf.variant, tf.resource, tf.string)
        and not trace.of(t, SEED)  # what leads to the draws
    ]
    results = [*trace.after, trace.d_x, *trace.d_before]
    results = [t for t in results if t is not None]
    run = _runner(graph, [*candidates, *results], [*leaves, *trace.inputs])
    random = np.random.default_rng(0)
    inputs = [_numbers(random, t, t.shape) for t in trace.inputs]

    def drawn(rows):
        return [_numbers(random, t, [rows, *t.shape[1:]]) for t in leaves]

    base, other = drawn(MANY), drawn(MANY)
    found = {rows: run([t[:rows] for t in base], inputs) for rows in (FEW, MANY)}
    number = len(candidates)
    not_rows = {
        t.name
        for i, t in enumerate(candidates)
        if any(values[i].shape[0] != rows for rows, values in found.items())
    }
    few, expected = found[FEW][number:], found[MANY][number:]
    for tensor, some, every in zip(results, few, expected, strict=True):
        close = 1e-2 if tensor.dtype.size == 2 else 1e-4
        if not np.allclose(some, every[:FEW], close, close, equal_nan=True):
            raise ValueError(
                mixes(name, f"{tensor.op.name}, which their number changes")
            )
    for moved in _halves(MANY):
        mixed = [
            np.where(moved.reshape([-1] + [1] * (b.ndim - 1)), o, b)
            for b, o in zip(base, other, strict=True)
        ]
        changed = run(mixed, inputs)[number:]
        for tensor, new, old in zip(results, changed, expected, strict=True):
            if not np.array_equal(new[~moved], old[~moved], equal_nan=True):
                raise ValueError(mixes(name, tensor.op.name))
    own = graph.has_own_gradients and _has_own_gradient(trace, random)
    return trace._replace(graph=Traced(graph.graph, not_rows), own_gradient=own)


def _has_own_gradient(trace, random):
    """Whether the gradients are others than those of the operations of the step."""
    weights = [w for w, moves in zip(trace.read, trace.trained, strict=True) if moves]
    sources = [trace.x] * trace.x.dtype.is_floating + [*trace.before, *weights]
    written = [*[trace.d_x] * trace.x.dtype.is_floating, *trace.d_before]
    written += [d for d, t in zip(trace.d_weights, trace.trained, strict=True) if t]
    leaves = [trace.x, *trace.before, *trace.noise, *trace.draws, *trace.read]
    step = trace.graph.part(trace.after, leaves)
    known = [d for d in written if d is not None]
    back = trace.graph.part(known, [*leaves, *trace.adjoints])

    def numbers(tensors):
        shapes = [[MANY, *t.shape[1:]] if has_rows(t) else t.shape for t in tensors]
        pairs = zip(tensors, shapes, strict=True)
        return [tf.constant(_numbers(random, *pair)) for pair in pairs]

    @tf.function(autograph=False)
    def both(values, adjoints):
        plain = dict(
            zip(leaves_by_name, vjp(step, (values,), adjoints)[0], strict=True)
        )
        return [plain[t.name] for t in sources], back([*values, *adjoints])

    leaves_by_name = [t.name for t in leaves]
    with tf.init_scope():
        given = numbers(leaves), numbers(trace.adjoints)
        # As a graph, whatever else is to run without one: no tape records in here.
        plain, found = both.get_concrete_function(*given)(*given)
    found = iter(found)
    close = 5e-2 if trace.before[0].dtype.size == 2 else 1e-4
    for own, other in zip(written, plain, strict=True):
        own = np.zeros_like(other) if own is None else next(found)
        if not np.allclose(own, other, close, close, equal_nan=True):
            return True
    return False


def _runner(graph, outputs, inputs):
    """A function of the values of leaves and of other inputs to those of the outputs."""
    part = graph.part(outputs, inputs)
    signature = [
        tf.TensorSpec([None, *t.shape[1:]] if has_rows(t) else t.shape, t.dtype)
        for t in inputs
    ]
    function = tf.function(lambda *v: part(v), signature, autograph=False)

    def run(leaves, others):
        with tf.init_scope():
            given = map(tf.convert_to_tensor, [*leaves, *others])
            return [t.numpy() for t in function(*given)]

    return run


def _numbers(random, tensor, shape):
    dtype = tensor.dtype
    if dtype.is_floating:
        return (0.5 * random.normal(size=shape)).astype(dtype.as_numpy_dtype)
    return random.integers(0, 2, shape).astype(dtype.as_numpy_dtype)


def _halves(rows):
    """Sets of rows such that of any two, some set holds the one and not the other."""
    rows = np.arange(rows)
    for bit in range(int(rows.max()).bit_length()):
        yield rows >> bit & 1 == 0
        yield rows >> bit & 1 == 1
