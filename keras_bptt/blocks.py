"""Walk over time in blocks of steps, so that what is made on the way is small.

Tensors are batch-major, (batch, timesteps, ...), where they come from the caller; what is
stacked step by step is time-major, (timesteps, batch, ...). How time is cut:

* Where the number of steps is known, block by block in Python: a few blocks, each a part of
  the graph. What a block returns is kept as it is, and what nobody asks for (the gradient
  of the inputs, often) is pruned from the graph.
* Where only run time tells it, in a loop over blocks of one size. Inputs are padded to
  whole blocks, and the last block is told how many of its steps count. So one compiled
  block serves every length.
* Where there are very many and nothing is kept of them, in the same loop.
* Where XLA compiles the whole, in the same loop: a program of a few blocks would take it
  a few times as long to compile.
"""

from typing import NamedTuple

import tensorflow as tf

from keras_bptt.execution import within_xla
from keras_bptt.loops import size_of, stack

# What a block holds of the states, in numbers: 6 MB of float32. Fewer, longer blocks are
# quicker: between two of them one part of the batch waits for the products of another. But
# z and delta take a block each, which is to stay small beside h.
NUMBERS = 3 * 2**19
# About the most blocks that are parts of the graph, and their fewest steps: each block
# costs what some steps do.
MOST, FEWEST_STEPS = 16, 16
# Steps of a block in a loop: near this where the number of steps is known, else this. A
# longer one pads short sequences to more.
COMPILED_SIZE, LOOP_SIZE = 128, 64
USUAL_BATCH = 32  # where the batch is not known


class Blocks(NamedTuple):
    """Steps cut into blocks: `count` of `size`, less what they exceed `steps` by.

    Attributes:
        steps: the number of steps, an integer or a tensor.
        size: of a block, an integer; or `steps`, where they are one block.
        in_loop: whether the walk is a loop in the graph, not one in Python.
    """

    steps: int | tf.Tensor
    size: int
    in_loop: bool

    @property
    def count(self):
        if self.size is self.steps:
            return 1
        return (self.steps + self.size - 1) // self.size

    @property
    def whole(self):
        """Whether all blocks are known to be whole."""
        return isinstance(self.steps, int) and self.steps % self.size == 0

    def in_one(self):
        """The same steps as one block."""
        return Blocks(self.steps, self.steps, False)


def blocks_of(x, units, unroll, kept=True):
    """How to cut the steps of `x` (batch, timesteps, features) for so many units.

    Where nothing that the blocks make is `kept`, no block is longer for more steps.
    """
    steps = size_of(x, 1)
    if not isinstance(steps, int):
        return Blocks(steps, LOOP_SIZE, True)
    if unroll is True:
        return Blocks(steps, steps, False)
    if within_xla():
        size = divisor(steps, steps // COMPILED_SIZE)
        size = min(steps, COMPILED_SIZE) if size is None else size
        return Blocks(steps, size, size < steps)
    batch = USUAL_BATCH if x.shape[0] is None else x.shape[0]
    numbers = steps * batch * units
    count = min(MOST, steps // FEWEST_STEPS, round(numbers / NUMBERS))
    size = divisor(steps, count)
    if not kept and numbers > MOST * NUMBERS:
        size = max(FEWEST_STEPS, NUMBERS // max(1, batch * units))
        return Blocks(steps, divisor(steps, steps // size) or size, True)
    return Blocks(steps, size or -(-steps // max(count, 1)), False)


def blocks_like(pieces):
    """Blocks that are the pieces: where the other pass knew more, or less, of the sizes."""
    sizes = [piece.shape[0] for piece in pieces]
    return Blocks(sum(sizes), sizes[0], False)


def divisor(steps, count):
    """The size of equal blocks, `count` to twice as many; None: there is none."""
    counts = range(max(count, 1), max(2 * count, 2))
    return next((steps // n for n in counts if steps % n == 0), None)


def walk(block, carry, blocks, width, *, reverse=False):
    """Run `carry, output = block(start, size, valid, carry)` over time.

    Args:
        block: the function of steps start ... start + size - 1, of which the first `valid`
            count; None: all do.
        carry: tuple of tensors, what goes from block to block.
        blocks: how time is cut.
        width: the outputs of a block are (size, batch, width). None: there are none.
        reverse: from the last block to the first. Outputs stand at their steps' places.

    Returns:
        The last carry, and the outputs: consecutive pieces (..., batch, width), those of
        the steps alone. From a loop it is one piece.
    """
    steps, size, count = blocks.steps, blocks.size, blocks.count
    if not blocks.in_loop:
        pieces, before = [None] * count, ()
        for j in reversed(range(count)) if reverse else range(count):
            start = j * size if j else 0
            length = size if count == 1 else min(size, steps - start)
            # One block at a time: what runs ahead piles up.
            with tf.control_dependencies(before):
                carry, pieces[j] = block(start, length, None, carry)
            before = carry
        return carry, pieces

    def body(i, carry, array):
        j = count - 1 - i if reverse else i
        start = j * size
        valid = None if blocks.whole else tf.minimum(size, steps - start)
        new, output = block(start, size, valid, carry)
        new = tuple(
            tf.ensure_shape(n, c.shape) for n, c in zip(new, carry, strict=True)
        )
        return i + 1, new, array if width is None else array.write(j, output)

    array = 0
    if width is not None:
        shape = [size, None, width]
        array = tf.TensorArray(carry[0].dtype, count, element_shape=shape)
    # The next block may begin, no more: what runs ahead piles up.
    _, carry, array = tf.while_loop(
        lambda i, *_: i < count, body, (0, carry, array), parallel_iterations=2
    )
    if width is None:
        return carry, [None]
    batch = tf.shape(carry[0])[0]
    outputs = stack(array, [size, batch, width])
    outputs = tf.reshape(outputs, [count * size, batch, width])
    outputs = outputs if blocks.whole else outputs[:steps]
    known = steps if isinstance(steps, int) else None
    return carry, [tf.ensure_shape(outputs, [known, None, width])]


def padded(x, blocks, axis=1):
    """`x`, a tensor or consecutive pieces of it, as `cut` is to find it."""
    if x is None or not blocks.in_loop:
        return x
    x = in_one_piece(x)
    if blocks.whole:
        return x
    missing = blocks.count * blocks.size - size_of(x, axis)
    before = [[0, 0]] * axis
    after = [[0, 0]] * (len(x.shape) - axis - 1)
    return tf.pad(x, [*before, [0, missing], *after])


def cut(x, start, size, axis=1):
    """Steps start ... start + size - 1 of `x`, a tensor or consecutive pieces of it."""
    if x is None:
        return None
    if isinstance(x, list | tuple):
        if len(x) > 1:  # all but the last of one length
            place, start = divmod(start, x[0].shape[axis])
            x = x[place:]
        x = x[0]
    if isinstance(start, int):
        # A size that only run time tells is that of the one block.
        if not isinstance(size, int) or (start == 0 and size == x.shape[axis]):
            return x
        return x[start : start + size] if axis == 0 else x[:, start : start + size]
    sizes = [size_of(x, i) for i in range(len(x.shape))]
    begin = [0] * len(sizes)
    begin[axis], sizes[axis] = start, size
    # XLA takes a start that is computed, as long as the size is not.
    return tf.slice(x, begin, sizes)


def in_one_piece(pieces):
    """The pieces (timesteps, ...) as one tensor."""
    if not isinstance(pieces, list | tuple):
        return pieces
    return pieces[0] if len(pieces) == 1 else tf.concat(pieces, 0)
