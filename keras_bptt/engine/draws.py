"""The random numbers of every step, of a cell that draws some.

They are drawn for the whole batch in groups of steps, each from the call's seed and the
number of the group. So a step of an example has the same numbers however time and the batch
are cut, with checkpoints or without, in the pass back as in the one forward; and since they
are drawn outside of what XLA compiles, whose numbers would be others, with it or without.

Where the states of all steps are kept, so are they. Else a block draws its own.
"""

import tensorflow as tf

from keras_bptt.engine.blocks import continued, cut
from keras_bptt.engine.options import Draws
from keras_bptt.runtime.slices import part
from keras_bptt.runtime.tensors import mapped, size_of, to_batch_major

# Steps that are drawn at once, and the most groups that are parts of the graph.
GROUP, MOST = 64, 16


def draws_of(seeds, batch):
    """The `Draws` of a call, of so many examples; None where it has no seeds."""
    if not seeds:
        return None
    seeds = tf.stack([tf.cast(seed, tf.int64) for seed in seeds])
    every = tf.broadcast_to(seeds, [batch, *seeds.shape])
    return Draws(every, tf.range(batch), tf.zeros([batch, batch, 0]))


def of_steps(draws, start, size):
    """Those of `size` steps from this one on."""
    if draws is None:
        return None
    more = tf.fill(tf.shape(draws.example), start)
    numbers = mapped(lambda t: part(t, start, size, axis=1), draws.numbers)
    before = more if draws.start is None else draws.start + more
    return draws._replace(start=before, numbers=numbers)


def drawn(cell, draws, steps):
    """The draws of so many steps, as numbers."""
    if draws is None or draws.numbers is not None:
        return draws
    return draws._replace(numbers=_numbers(cell, draws, 0, steps))


def along_time(cell, draws, blocks):
    """A function of start and size: the numbers of these steps (batch, size, ...)."""
    if draws is None:
        return lambda start, size: ()
    if draws.numbers is None:
        return lambda start, size: _numbers(cell, draws, start, size)
    numbers = mapped(lambda t: continued(t, blocks), draws.numbers)
    return lambda start, size: mapped(lambda t: cut(t, start, size), numbers)


def _numbers(cell, draws, start, size):
    seeds = tf.unstack(tf.reduce_max(draws.seeds, 0))
    batch = size_of(draws.whole, 1)
    if draws.start is not None:
        start += tf.maximum(tf.reduce_max(draws.start), 0)
    first = start // GROUP
    if isinstance(start, int) and isinstance(size, int):
        count = (start + size - 1) // GROUP - first + 1
    else:
        count = (size + GROUP - 2) // GROUP + 1

    def group(i):
        numbers = cell.draw([_seed(s, first + i) for s in seeds], batch * GROUP)
        return [tf.reshape(t, [batch, GROUP, *t.shape[1:]]) for t in numbers]

    offset = start - first * GROUP
    return tuple(
        tf.gather(part(t, offset, size, axis=1), draws.example)
        for t in _side_by_side(group, count)
    )


def _seed(seed, group):
    """A seed for a group of steps: both numbers of it unlike those of any other group.

    A step that draws again adds 1 to the second; so the number of the group, or of the
    call, may not stand in it as it is.
    """
    folded = tf.random.experimental.stateless_fold_in(seed, group)
    whole = {"minval": None, "maxval": None, "dtype": seed.dtype}
    return tf.random.stateless_uniform([2], folded, **whole)


def _side_by_side(group, count):
    """All groups, each (batch, steps, ...), one after the other."""
    first = group(0)
    if isinstance(count, int) and count <= MOST:
        each = [first, *map(group, range(1, count))]
        return [tf.concat(groups, 1) for groups in zip(*each, strict=True)]
    like = [tf.TensorSpec([None, *t.shape[1:]], t.dtype) for t in first]
    found = []
    for t in tf.map_fn(group, tf.range(count), fn_output_signature=like):
        # (groups, batch, steps, ...)
        shape = [size_of(t, 1), count * GROUP, *t.shape[3:]]
        found.append(tf.reshape(to_batch_major(t), shape))
    return found
