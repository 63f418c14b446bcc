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

With checkpoints a block is what lies between two of them.
"""

import math
from typing import NamedTuple

import tensorflow as tf

from keras_bptt.engine.loops import array, same_shapes, stack
from keras_bptt.engine.parts import USUAL_BATCH
from keras_bptt.runtime.execution import within_xla
from keras_bptt.runtime.tensors import filled, repeated, size_of

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


class Blocks(NamedTuple):
    """Steps cut into blocks: `count` of `size`, less what they exceed `steps` by.

    Attributes:
        steps: the number of steps, an integer or a tensor.
        size: of a block; or `steps`, where they are one block.
        in_loop: whether the walk is a loop in the graph, not one in Python.
    """

    steps: int | tf.Tensor
    size: int | tf.Tensor
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


def blocks_of(x, numbers, unroll, kept=True):
    """How to cut the steps of `x` (batch, timesteps, ...), each of so many numbers a row.

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
    step = batch * numbers
    numbers = steps * step
    count = min(MOST, steps // FEWEST_STEPS, round(numbers / NUMBERS))
    size = divisor(steps, count)
    if not kept and numbers > MOST * NUMBERS:
        size = max(FEWEST_STEPS, NUMBERS // max(1, step))
        return Blocks(steps, divisor(steps, steps // size) or size, True)
    return Blocks(steps, size or -(-steps // max(count, 1)), False)


def checkpoint_blocks(x, every, unroll):
    """The steps of `x` (batch, timesteps, ...) between checkpoints.

    Args:
        every: how many steps, or "sqrt": the root of their number, rounded up. Where that
            number is not known, to the next power of two, for XLA compiles a block for each
            size that comes.
        unroll: as True every step is written into the graph.
    """
    steps = size_of(x, 1)
    if not isinstance(steps, int):
        if every == "sqrt":
            sizes = tf.constant([2**i for i in range(16)])
            every = tf.reduce_min(tf.where(sizes**2 >= steps, sizes, 2**16))
        return Blocks(steps, every, True)
    size = math.isqrt(steps - 1) + 1 if every == "sqrt" else min(every, steps)
    count = -(-steps // size)
    in_loop = count > (1 if within_xla() else MOST) and unroll is not True
    return Blocks(steps, size, in_loop)


def blocks_like(pieces):
    """Blocks that are the pieces: where the other pass knew more, or less, of the sizes."""
    sizes = [piece.shape[0] for piece in pieces]
    return Blocks(sum(sizes), sizes[0], False)


def divisor(steps, count):
    """The size of equal blocks, `count` to twice as many; None: there is none."""
    counts = range(max(count, 1), max(2 * count, 2))
    return next((steps // n for n in counts if steps % n == 0), None)


def walk(block, carry, blocks, shapes, batch, *, reverse=False, starts=False):
    """Run `carry, outputs = block(start, size, valid, carry)` over time.

    Args:
        block: the function of steps start ... start + size - 1, of which the first `valid`
            count; None: all do.
        carry: tensors that go from block to block; the first tells the dtype of the
            outputs.
        blocks: how time is cut.
        shapes: of each output (size, batch, ...) the shape of a row.
        batch: how many rows an output has.
        reverse: from the last block to the first. Outputs stand at their steps' places.
        starts: whether to keep the carry as it is before each block.

    Returns:
        The last carry; for each output consecutive pieces (..., batch, ...), those of the
        steps alone, from a loop one piece; and the starts, each (blocks, ...), or None.
    """
    if not blocks.in_loop:
        return _walk_in_python(block, carry, blocks, shapes, reverse, starts)
    steps, size, count = blocks.steps, blocks.size, blocks.count

    def body(i, carry, arrays):
        j = count - 1 - i if reverse else i
        valid = None if blocks.whole else tf.minimum(size, steps - j * size)
        new, outputs = block(j * size, size, valid, carry)
        outputs = [*outputs, *carry] if starts else outputs
        arrays = [a.write(j, o) for a, o in zip(arrays, outputs, strict=True)]
        return i + 1, same_shapes(new, carry), arrays

    first = tf.nest.flatten(carry)[0]
    known = size if isinstance(size, int) else None
    places = [([known, None, *shape], [size, batch, *shape]) for shape in shapes]
    places += [(t.shape, tf.shape(t)) for t in carry] if starts else []
    arrays = [array(first.dtype, count, *place) for place in places]
    # The next block may begin, no more: what runs ahead piles up.
    _, carry, arrays = tf.while_loop(
        lambda i, *_: i < count, body, (0, carry, arrays), parallel_iterations=2
    )
    kept = None
    if starts:
        arrays, kept = arrays[: len(shapes)], arrays[len(shapes) :]
        kept = [
            stack(each, count, tf.shape(t)) for each, t in zip(kept, carry, strict=True)
        ]
    known = steps if isinstance(steps, int) else None
    outputs = []
    for each, shape in zip(arrays, shapes, strict=True):
        output = stack(each, count, [size, batch, *shape])
        output = tf.reshape(output, [count * size, batch, *shape])
        output = output if blocks.whole else output[:steps]
        outputs.append([tf.ensure_shape(output, [known, None, *shape])])
    return carry, outputs, kept


def _walk_in_python(block, carry, blocks, shapes, reverse, starts):
    """`walk` as parts of the graph, one for each block."""
    steps, size, count = blocks.steps, blocks.size, blocks.count
    outputs, kept = [[None] * count for _ in shapes], [None] * count
    for j in reversed(range(count)) if reverse else range(count):
        start = j * size if j else 0
        length = size if count == 1 else min(size, steps - start)
        kept[j] = carry
        # Serialise the blocks: otherwise several are alive at once, and TensorFlow merges
        # recomputation with the forward pass, keeping its states.
        with tf.control_dependencies(tf.nest.flatten(carry)):
            carry, pieces = block(start, length, None, carry)
        for output, piece in zip(outputs, pieces, strict=True):
            output[j] = piece
    if not starts:
        return carry, outputs, None
    return carry, outputs, [tf.stack(each) for each in zip(*kept, strict=True)]


def padded(x, blocks, axis=1):
    """`x`, a tensor or consecutive pieces of it, as `cut` is to find it."""
    if x is None or not blocks.in_loop:
        return x
    x = in_one_piece(x)
    if blocks.whole:
        return x
    steps = size_of(x, axis)
    return filled(x, blocks.count * blocks.size - steps, steps, axis)


def continued(x, blocks):
    """`padded`, for inputs: with the last one again, for zeros might be no input."""
    if not blocks.in_loop or blocks.whole:
        return x
    return repeated(
        x, blocks.count * blocks.size - size_of(x, 1), size_of(x, 1), axis=1
    )


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
