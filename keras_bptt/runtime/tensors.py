"""What TensorFlow's own operations do not do safely: fill with zeros, cut, shift, add up.

* XLA on a CPU (TensorFlow 2.21) multiplies a padded product by other tensors in a loop and
  writes past its end, where the rows are of four float64 or eight float32
  (`tests/upstream/xla_pad_in_loop.py`). It makes a pad not only of tf.pad, but of a
  concatenation with a constant and of the gradient of a slice. So no pass over time pads:
  zeros are chosen by place (and see `slices`).
* A sum of many numbers in half precision loses most of them: 4096 + 1 is 4096 in float16,
  256 + 1 is 256 in bfloat16. So what adds over steps, examples, blocks or windows adds in
  `wide` numbers, and whoever asked for the sum rounds it once.
"""

import tensorflow as tf


def size_of(x, axis):
    """A size of `x`, an integer where it is known."""
    return tf.shape(x)[axis] if x.shape[axis] is None else x.shape[axis]


def at_most(size, most):
    """Whether a size is known to be no more than that."""
    return isinstance(size, int) and size <= most


def where(mask, x):
    """x where the mask is true, else 0, whatever x is there."""
    return x if mask is None or x is None else tf.where(mask, x, tf.zeros_like(x))


def chosen(mask, x, y):
    """x where the mask (rows, 1) is true, else y, both (rows, ...)."""
    return x if mask is None else tf.where(beside(mask, x), x, y)


def beside(t, x):
    """`t` (..., 1) with as many axes as `x` (...), those beyond of size 1."""
    if len(x.shape) < len(t.shape):  # a number for each row
        return tf.squeeze(t, -1)
    for _ in range(len(x.shape) - len(t.shape)):
        t = tf.expand_dims(t, -1)
    return t


def to_time_major(x):
    """(batch, timesteps, ...) of (timesteps, batch, ...), and the other way round."""
    return x if x is None else tf.transpose(x, [1, 0, *range(2, len(x.shape))])


to_batch_major = to_time_major


def mapped(function, structure):
    """The function of each tensor of a structure; None stays None."""
    return tf.nest.map_structure(
        lambda t: None if t is None else function(t), structure
    )


# --- Zeros


def shifted(x, by, axis=0):
    """`x` moved `by` places towards the end of the axis, or to its begin if negative.

    The places that it leaves are zero.
    """
    size = size_of(x, axis)
    source = tf.range(size) - by
    real = along((source >= 0) & (source < size), x, axis)
    return where(real, tf.roll(x, by, axis))


def filled(x, number, place=0, axis=0):
    """`x` with `number` zeros before this place of the axis. Not to be differentiated."""
    if x is None or at_most(number, 0):
        return x
    size = size_of(x, axis)
    to = tf.range(size + number)
    source = tf.where(to < place, to, to - number)
    real = (to < place) | (to >= place + number)
    source = tf.clip_by_value(source, 0, tf.maximum(size - 1, 0))
    filled = where(along(real, x, axis), tf.gather(x, source, axis=axis))
    sizes = x.shape.as_list()
    known = isinstance(number, int) and sizes[axis] is not None
    sizes[axis] = sizes[axis] + number if known else None
    return tf.ensure_shape(filled, sizes)


def repeated(x, number, place=0, axis=0):
    """`x` with `number` places more before this place of an axis, like the nearest one.

    For what a step is differentiated at: zeros might be where it has no derivative.
    """
    if at_most(number, 0):
        return x
    size = size_of(x, axis)
    to = tf.range(size + number)
    source = tf.where(to < place, to, tf.maximum(to - number, place - 1))
    last = tf.maximum(size - 1, 0)
    x = tf.gather(x, tf.clip_by_value(source, 0, last), axis=axis)
    sizes = x.shape.as_list()
    known = isinstance(number, int) and isinstance(size, int)
    sizes[axis] = size + number if known else None
    return tf.ensure_shape(x, sizes)


def along(places, x, axis):
    """Truth values of the places of an axis, beside `x`."""
    return tf.reshape(places, [-1] + [1] * (len(x.shape) - axis - 1))


def joined_pieces(pieces):
    """Consecutive pieces as one tensor."""
    return pieces[0] if len(pieces) == 1 else tf.concat(pieces, 0)


def cast_to(dtype, structure):
    """The tensors of a structure, of this dtype; None stays None."""
    return mapped(lambda t: tf.cast(t, dtype), structure)


# --- Products and sums


def product(x, matrix):
    """x times a matrix, for x of one step or of many."""
    if len(x.shape) == 2:
        return tf.matmul(x, matrix)
    return tf.tensordot(x, matrix, 1)


def times(factor, x):
    """The factor, if there is one, times `x`."""
    return x if factor is None else factor * x


def in_turn(*functions):
    """What the functions return, each called when the former is done.

    For products each of which has work for all cores.
    """
    results = []
    for function in functions:
        with tf.control_dependencies(results[-1:]):
            results.append(function())
    return results


def wide(dtype):
    """The dtype to add numbers of this one in."""
    return dtype if dtype.size > 2 else tf.float32


def widened(x):
    return tf.cast(x, wide(x.dtype))


def total(x, axis):
    """The sum over some axes, in wide numbers."""
    return tf.reduce_sum(widened(x), axis)


def sum_of_products(left, right):
    """sum over steps and batch of left^T right, as one matrix product, in wide numbers.

    `left` may be a list of consecutive pieces: a product for each, and no copy.
    """
    if isinstance(left, list) and len(left) > 1:
        start, sums = 0, []
        for piece in left:
            end = None if piece is left[-1] else start + piece.shape[0]
            sums.append(sum_of_products(piece, right[start:end]))
            start = end
        return sum(sums[1:], sums[0])
    left = left[0] if isinstance(left, list) else left
    flat = [tf.reshape(widened(x), [-1, x.shape[-1]]) for x in (left, right)]
    return tf.matmul(*flat, transpose_a=True)
