"""The way back through the windows of a truncation: which rows go through the recursion.

Time is cut into n blocks of k1 steps. The window of a block is its own k1 steps and those
before, k2 in all: it ends with the block, and begins k2 steps before that end. Chunks, k1 =
k2, are blocks. Other windows overlap, and a step belongs to k2 / k1 of them: its deltas add
up. No window is copied; each is a row of the batch, beside the others.

* `level_pass` takes all windows back at once. At first each is in its own block, where its
  losses are: k1 steps back in all blocks. What leaves a block is carried into the one
  before, and k1 more steps take every window through that, without losses; and so on, until
  k2 steps are done, one after the other, however long the sequence is. Each level costs
  what the first does, and memory is two deltas for each step, whatever k2 / k1 is.
* `sliding_pass` goes step by step, as long as the sequence, and lean: the windows that hold
  a step go back through it together, k2 / k1 of them. The youngest is that of the block the
  step is in. On entering the next block each window becomes the next older one, and none
  goes on after k2 steps. It is for states that are computed again block by block, where the
  other would need all of them at once.
"""

from typing import NamedTuple

import tensorflow as tf

from keras_bptt.cells.cell import Point
from keras_bptt.engine.adjoints import Terms, steps_back
from keras_bptt.engine.clipping import Arriving
from keras_bptt.engine.masks import masked_steps
from keras_bptt.engine.options import Options
from keras_bptt.runtime.tensors import (
    at_most,
    beside,
    chosen,
    filled,
    mapped,
    repeated,
    shifted,
    size_of,
    to_time_major,
    total,
    where,
    widened,
)


def held_by_one(options, real):
    """Whether one window holds all of an example, of so many real steps.

    Its losses then all enter the last window, where adjoints are clipped. To clip them in
    several windows would make a difference to the same example without its padding, whose
    gradient is that of full backpropagation.
    """
    return (
        real <= options.truncation.steps if options.clips else tf.zeros_like(real) > 0
    )


def rows_of(truncation, arrived):
    """What comes back to the last step in each window: the youngest has it, first."""
    more = _windows(truncation) - 1
    return mapped(lambda t: filled(t, more * size_of(t, 0), size_of(t, 0)), arrived)


def sliding_pass(options, valid, weights, noise, arrived, terms, last, real):
    """`adjoints.plain_pass` over the windows of a truncation, step by step.

    Args:
        options, valid, weights, noise, terms: as there. The mask is False before the first
            real step of an example, nowhere else.
        arrived: as `rows_of` has it, (windows * batch, ...).
        last: how many steps there are after the first of these.
        real: how many real steps an example has (batch, 1), where there is a mask.
    """
    k1, k2 = options.truncation.stride, options.truncation.steps
    number, batch = _windows(options.truncation), size_of(arrived.adjoints[0], 0)
    batch = batch // number
    age = tf.repeat(tf.range(number), batch)[:, None]

    def each(structure):
        return mapped(
            lambda t: tf.tile(t, [number] + [1] * (len(t.shape) - 1)), structure
        )

    def around(step):
        def step_of_windows(arrived, read):
            terms, later = read
            point, e, m, _ = each(tuple(terms))
            block, done = later // k1, later % k1
            older = tf.equal(done, 0) & (later > 0)
            alive = age * k1 + done < k2

            def moved(t):
                t = tf.where(older, shifted(t, batch), t)
                return where(beside(alive, t), t)

            # Before its first real step all that an example has goes on to its start.
            arrived = tf.nest.map_structure(lambda t: chosen(m, moved(t), t), arrived)
            entry = 0
            if m is not None:
                entry = tf.where(each(held_by_one(options, real)), block, 0)
            e = None if e is None else where(beside(tf.equal(age, entry), e), e)
            arrived, outputs = step(arrived, Terms(point, e, m))
            return arrived, [_over_windows(t, number) for t in outputs]

        return step_of_windows

    def read(t):
        return terms.at(t), last - t

    noise = each(noise)
    return steps_back(
        options, weights, noise, arrived, read, terms.size, valid, around, batch
    )


def sent_to_start(truncation, arrived):
    """What all windows send to the initial states."""
    number = _windows(truncation)
    return tuple(_over_windows(a, number) for a in arrived.adjoints)


def level_pass(options, valid, weights, noise, arrived, terms):
    """`adjoints.plain_pass` over all windows of a truncation, of the whole sequence.

    The mask is False before the first real step of an example, nowhere else. What is
    returned in the place of `arrived` is what the windows send to the initial states.
    """
    del valid
    k1, k2 = options.truncation.stride, options.truncation.steps
    levels, rest = (k2 - 1) // k1 + 1, (k2 - 1) % k1 + 1
    dtype, batch = arrived.adjoints[0].dtype, size_of(arrived.adjoints[0], 0)
    blocks = _Blocks.of(options, terms, batch, levels)

    def level(i, arrived, size):
        """Take every window `size` steps back from the end of the block it is in."""
        # A loop of one step is none.
        single = options.whole.but(unroll=options.unroll or k1 == 1)

        def read(t):
            return blocks.at(t + k1 - size, i)

        return steps_back(single, weights, blocks.tiled(noise), arrived, read, size)

    def carried(arrived):
        return mapped(lambda t: shifted(t, -batch), arrived)

    def left(arrived):
        """What the first block sends to the initial states."""
        return tuple(widened(a[:batch]) for a in arrived.adjoints)

    def body(i, arrived, home, outputs):
        arrived, more = level(i, carried(arrived), k1)
        return i + 1, arrived, _sum(home, left(arrived)), _sum(outputs, more)

    arrived = mapped(lambda t: filled(t, (blocks.n - 1) * batch), arrived)
    arrived, outputs = level(0, arrived, k1)
    if levels == 1:
        home = blocks.sent_to_start(arrived, k1)
    else:
        state = (1, arrived, left(arrived), mapped(widened, outputs))
        state = tf.while_loop(lambda i, *_: i < levels - 1, body, state)
        _, arrived, home, outputs = state
        # The last level may be shorter.
        arrived, more = level(levels - 1, carried(arrived), rest)
        home = _sum(home, blocks.sent_to_start(arrived, rest))
        outputs = [
            tf.concat([t[:-rest], t[-rest:] + widened(m)], 0)
            for t, m in zip(outputs, more, strict=True)
        ]
    home = tuple(tf.cast(t, dtype) for t in home)
    return Arriving(home), [blocks.in_order(tf.cast(t, dtype)) for t in outputs]


class _Blocks(NamedTuple):
    """The terms of all steps, cut into blocks of k1, each a row of the batch.

    A step of all blocks is read where it is: (n, batch, ...) as n * batch rows.

    Attributes:
        options: of the recurrence.
        batch, n: examples, and blocks of each.
        point, cotangent, mask: the terms, (n, k1, batch, ...) or (batch, n, k1, ...).
        missing, place: how many steps fill the first block, and before which one.
        before: how many steps an example has before its first real one (batch, 1).
    """

    options: Options
    batch: int | tf.Tensor
    n: int | tf.Tensor
    point: Point
    cotangent: tf.Tensor | None
    mask: tf.Tensor | None
    missing: int | tf.Tensor
    place: int | tf.Tensor
    before: int | tf.Tensor

    @classmethod
    def of(cls, options, terms, batch, levels):
        k1, steps, mask, place = options.truncation.stride, terms.size, terms.mask, 0
        n = (steps + k1 - 1) // k1
        missing = n * k1 - steps
        if mask is None and levels == 1:
            # Steps to fill the first block, at its end: nothing comes back to there.
            place = k1 - missing
        elif mask is None and not at_most(missing, 0):
            # Before its first step, for windows to pass through to the initial states.
            mask = tf.ones([batch, steps, 1], tf.bool)
        before = 0 if mask is None else missing + masked_steps(mask[:, :, 0])

        def in_blocks(t):
            t = repeated(t, missing, place)
            return tf.reshape(t, [n, k1, batch, *t.shape[2:]])

        def of_batch(t):
            t = filled(t, missing, place, axis=1)
            return tf.reshape(t, [batch, n, k1, *t.shape[2:]])

        point = mapped(in_blocks, terms.point)
        e, mask = mapped(of_batch, (terms.cotangent, mask))
        return cls(options, batch, n, point, e, mask, missing, place, before)

    def at(self, t, level):
        """The terms of step t of each block, at this level of windows."""
        e, m = mapped(
            lambda x: self._rows(to_time_major(x[:, :, t])), (self.cotangent, self.mask)
        )
        point = mapped(lambda x: self._rows(x[:, t]), self.point)
        return Terms(point, self._entering(level, e), m)

    def tiled(self, noise):
        return mapped(lambda t: tf.tile(t, [self.n] + [1] * (len(t.shape) - 1)), noise)

    def _rows(self, t):
        return tf.reshape(t, [self.n * self.batch, *t.shape[2:]])

    def _entering(self, level, e):
        """The losses of windows at a level: at first those of their blocks, then none."""
        if e is None or self.mask is None or not self.options.clips:
            return e if isinstance(level, int) and level == 0 else None
        later = tf.range(self.n)[::-1, None]
        real = self.n * self.options.truncation.stride - self.before[:, 0]
        entry = tf.where(held_by_one(self.options, real), later, 0)
        enters = self._rows(tf.equal(entry, level)[..., None])
        return where(beside(enters, e), e)

    def sent_to_start(self, arrived, size):
        """What has got to the first real step, `size` steps from the end of a block."""
        n, k1 = self.n, self.options.truncation.stride
        first = (tf.range(n)[:, None, None] + 1) * k1 - size

        def of(a):
            a = tf.reshape(a, [n, self.batch, *a.shape[1:]])
            return total(where(beside(first <= self.before, a), a), 0)

        return tuple(map(of, arrived.adjoints))

    def in_order(self, t):
        """(timesteps, batch, ...) of outputs (k1, n * batch, ...)."""
        n, k1, place = self.n, self.options.truncation.stride, self.place
        t = to_time_major(tf.reshape(t, [k1, n, self.batch, *t.shape[2:]]))
        t = tf.reshape(t, [n * k1, self.batch, *t.shape[3:]])
        if at_most(self.missing, 0):
            return t
        return tf.concat([t[:place], t[place + self.missing :]], 0)


def _sum(to, more):
    """Both structures, added in wide numbers."""
    return tf.nest.map_structure(lambda t, m: t + widened(m), to, more)


def _windows(truncation):
    """The most windows that hold one step."""
    return (truncation.steps - 1) // truncation.stride + 1


def _over_windows(t, number):
    """The sum over the windows, of rows (windows * batch, ...)."""
    each = tf.reshape(t, [number, -1, *t.shape[1:]])
    return tf.cast(total(each, 0), t.dtype)
