"""Split the batch over the cores: parts of a graph that may run side by side.

A step's product is too small for two cores to share, but examples do not depend on each
other: two halves of the batch are two recurrences, which TensorFlow runs at the same time
where each is one operation of the graph, compiled by XLA.
"""

import tensorflow as tf

from keras_bptt.engine.blocks import LOOP_SIZE, USUAL_BATCH
from keras_bptt.runtime.execution import cores, within_xla
from keras_bptt.runtime.tensors import size_of, widened

# Measured on two cores. Multiply-adds of a step above which XLA itself shares the product.
SHARED_PRODUCT = 2**23
# Multiply-adds of a pass: below, it takes no longer than what the parts cost.
LEAST_WORK = 2**24
# Examples of a part: a product of fewer rows is slower for each. Parts: more are untried.
FEWEST_EXAMPLES, MOST_SHARDS = 4, 4


def shards_of(x, U, jit_compile):
    """How many shards the batch of `x` (batch, timesteps, features) is to be cut into."""
    if not jit_compile or within_xla():
        return 1
    batch = USUAL_BATCH if x.shape[0] is None else x.shape[0]
    steps = LOOP_SIZE if x.shape[1] is None else x.shape[1]
    step = batch * U.shape[0] ** 2
    if step > SHARED_PRODUCT or step * steps < LEAST_WORK:
        return 1
    return max(1, min(cores(), MOST_SHARDS, batch // FEWEST_EXAMPLES))


def split(count, structure):
    """`structure` of tensors (batch, ...), cut along the batch; None stays None."""
    if count == 1:
        return [structure]
    batch = next(size_of(t, 0) for t in tf.nest.flatten(structure) if t is not None)
    edges = [batch * i // count for i in range(count + 1)]

    def part(i):
        return tf.nest.map_structure(
            lambda t: None if t is None else t[edges[i] : edges[i + 1]], structure
        )

    return [part(i) for i in range(count)]


def joined(parts):
    """The parts as one tensor."""
    return parts[0] if len(parts) == 1 else tf.concat(parts, 0)


def summed(parts, dtype):
    """Their sum: what all parts add to the gradient of a weight, which is of this dtype."""
    return tf.cast(tf.add_n([widened(part) for part in parts]), dtype)
