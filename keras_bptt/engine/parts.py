"""Split the batch over the cores: parts of a graph that may run side by side.

A step's product is too small for two cores to share, but examples do not depend on each
other: two halves of the batch are two recurrences, which TensorFlow runs at the same time
where each is one operation of the graph, compiled by XLA.
"""

import tensorflow as tf

from keras_bptt.runtime.execution import cores, within_xla
from keras_bptt.runtime.tensors import mapped, size_of, widened

# Measured on two cores, kernels of 16k to 4M numbers. Multiply-adds of a row, as many as
# its kernel has numbers, above which cores had better read one kernel together: 8 MB.
SHARED_KERNEL = 2**21
# Multiply-adds of a pass: below, it takes no longer than what the parts cost.
LEAST_WORK = 2**24
# Examples of a part: a product of fewer rows is slower for each. Parts: more are untried.
FEWEST_EXAMPLES, MOST_PARTS = 4, 4
# Examples and steps, where they are not known.
USUAL_BATCH, USUAL_STEPS = 32, 64


def parts_of(x, cost, jit_compile):
    """How many parts the batch of `x` (batch, timesteps, ...) is to be cut into.

    Args:
        cost: of the cell.
    """
    if not jit_compile or within_xla():
        return 1
    batch = USUAL_BATCH if x.shape[0] is None else x.shape[0]
    steps = USUAL_STEPS if x.shape[1] is None else x.shape[1]
    work = batch * steps * cost.products
    if cost.products > SHARED_KERNEL or work < LEAST_WORK:
        return 1
    return max(1, min(cores(), MOST_PARTS, batch // FEWEST_EXAMPLES))


def split(count, structure):
    """`structure` of tensors (batch, ...), cut along the batch; None stays None."""
    if count == 1:
        return [structure]
    batch = next(size_of(t, 0) for t in tf.nest.flatten(structure) if t is not None)
    edges = [batch * i // count for i in range(count + 1)]

    def part(i):
        return mapped(lambda t: t[edges[i] : edges[i + 1]], structure)

    return [part(i) for i in range(count)]


def joined(parts):
    """The parts, structures of tensors, as one."""
    if len(parts) == 1:
        return parts[0]
    return tf.nest.map_structure(lambda *each: _joined(each), *parts)


def _joined(parts):
    return None if parts[0] is None else tf.concat(parts, 0)


def summed(parts, dtype):
    """Their sum: what all parts add to the gradient of a weight, which is of this dtype."""
    return tf.cast(tf.add_n([widened(part) for part in parts]), dtype)
