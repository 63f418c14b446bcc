"""Walk over time in blocks of steps, whose slices stay in cache."""

import tensorflow as tf

from keras_bptt.scans import size_of, stack

# Steps a block. Shorter ones cost time for each block, longer ones memory: what a block
# computes and does not keep.
SIZE = 128


def walk(block, carry, steps, width, *, reverse=False, unroll=False):
    """Run `carry, output = block(start, size, carry)` over time; join the outputs.

    Args:
        block: the function of steps start ... start + size - 1.
        carry: tuple of tensors, what goes from block to block.
        steps: the number of steps, an integer or, where only run time tells, a tensor.
        width: the outputs of a block are (size, batch, width). None: there are none.
        reverse: from the last block to the first. Outputs stand at their steps' places.
        unroll: make one block of all steps.

    Returns:
        The last carry and the joined outputs (steps, batch, width).
    """
    size = block_size(steps, unroll)
    if isinstance(steps, int) and steps % size == 0:
        count, rest = steps // size, None
    else:
        # The last block has 1 to `size` steps: an empty one would be a case of its own.
        count = (steps - 1) // size
        rest = steps - count * size
    if rest is None and count == 1:
        return block(0, steps, carry)

    def body(i, carry, array):
        j = count - 1 - i if reverse else i
        new, output = block(j * size, size, carry)
        new = tuple(
            tf.ensure_shape(n, c.shape) for n, c in zip(new, carry, strict=True)
        )
        return i + 1, new, array if width is None else array.write(j, output)

    def full_blocks(carry):
        array = 0
        if width is not None:
            shape = [size if isinstance(size, int) else None, None, width]
            # Never without an element: XLA compiles the loop also where it does not run.
            array = tf.TensorArray(
                carry[0].dtype, tf.maximum(count, 1), element_shape=shape
            )
        _, carry, array = tf.while_loop(
            lambda i, *_: i < count, body, (0, carry, array)
        )
        if width is None:
            return carry, None
        batch = tf.shape(carry[0])[0]
        outputs = stack(array, [size, batch, width])
        # Of the one element that there always is nothing is left where count is 0.
        outputs = tf.reshape(outputs, [-1, batch, width])[: count * size]
        known = count * size if isinstance(count, int) else None
        return carry, tf.ensure_shape(outputs, [known, None, width])

    if rest is None:
        return full_blocks(carry)
    if reverse:
        carry, last = block(count * size, rest, carry)
        carry, outputs = full_blocks(carry)
    else:
        carry, outputs = full_blocks(carry)
        carry, last = block(count * size, rest, carry)
    return carry, None if width is None else tf.concat([outputs, last], 0)


def block_size(steps, unroll):
    """A divisor of `steps` near SIZE where there is one: no shorter block then."""
    if not isinstance(steps, int):
        return tf.minimum(SIZE, steps)
    if unroll or steps <= SIZE:
        return steps
    sizes = [size for size in range(SIZE // 2, 2 * SIZE + 1) if steps % size == 0]
    return min(sizes, key=lambda size: abs(size - SIZE), default=SIZE)


def cut(x, axis, start, size):
    """Steps start ... start + size - 1 of `x`; None stays None."""
    if x is None:
        return None
    begin, sizes = [0, 0, 0], [size_of(x, axis) for axis in range(3)]
    begin[axis], sizes[axis] = start, size
    # XLA takes a start that is computed, as long as the size is not.
    return tf.slice(x, begin, sizes)
