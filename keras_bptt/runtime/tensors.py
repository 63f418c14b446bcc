"""What TensorFlow's own operations do not do safely: fill with zeros, cut, shift, add up.

* XLA on a CPU (TensorFlow 2.21) multiplies a padded product by other tensors in a loop and
  writes past its end, where the rows are of four float64 or eight float32
  (`tests/upstream/xla_pad_in_loop.py`). It makes a pad not only of tf.pad, but of a
  concatenation with a constant and of the gradient of a slice. So no pass over time pads:
  zeros are chosen by place.
* A sum of many numbers in half precision loses most of them: 4096 + 1 is 4096 in float16,
  256 + 1 is 256 in bfloat16. So what adds over steps, examples, blocks or windows adds in
  `wide` numbers, and whoever asked for the sum rounds it once.
"""

import tensorflow as tf

from keras_bptt.runtime.explicit import explicit, local


def size_of(x, axis):
    """A size of `x`, an integer where it is known."""
    return tf.shape(x)[axis] if x.shape[axis] is None else x.shape[axis]


def at_most(size, most):
    """Whether a size is known to be no more than that."""
    return isinstance(size, int) and size <= most


def where(mask, x):
    """x where the mask is true, else 0, whatever x is there."""
    return x if mask is None or x is None else tf.where(mask, x, tf.zeros_like(x))


# --- Zeros


def shifted(x, by, axis=0):
    """`x` moved `by` places towards the end of the axis, or to its begin if negative.

    The places that it leaves are zero.
    """
    size = size_of(x, axis)
    source = tf.range(size) - by
    real = _along((source >= 0) & (source < size), x, axis)
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
    filled = where(_along(real, x, axis), tf.gather(x, source, axis=axis))
    sizes = x.shape.as_list()
    known = isinstance(number, int) and sizes[axis] is not None
    sizes[axis] = sizes[axis] + number if known else None
    return tf.ensure_shape(filled, sizes)


def part(x, start, size, axis=0):
    """Places start ... start + size - 1 of an axis, with a gradient that is not a pad."""

    def forward(x):
        return (_sliced(x, start, size, axis),), ()

    def backward(args, outputs, residuals, cotangents):
        whole = size_of(args[0], axis)
        return [placed(cotangents[0], local(start), local(whole), axis)]

    return explicit(forward, backward)(x)[0]


def one(x, place, axis=0):
    """One place of an axis, with a gradient that is not a pad."""
    return tf.squeeze(part(x, place, 1, axis), axis)


def placed(x, start, size, axis):
    """An axis of `size` places with `x` at start and zeros beside it."""

    def forward(x):
        after = size - start - size_of(x, axis)
        x = filled(x, after, size_of(x, axis), axis)
        return (filled(x, start, 0, axis),), ()

    def backward(args, outputs, residuals, cotangents):
        number = size_of(args[0], axis)
        return [part(cotangents[0], local(start), local(number), axis)]

    return explicit(forward, backward)(x)[0]


def _sliced(x, start, size, axis):
    begin = [0] * len(x.shape)
    sizes = [size_of(x, i) for i in range(len(x.shape))]
    begin[axis], sizes[axis] = start, size
    return tf.slice(x, begin, sizes)


def _along(places, x, axis):
    """Truth values of the places of an axis, beside `x`."""
    return tf.reshape(places, [-1] + [1] * (len(x.shape) - axis - 1))


# --- Sums


def wide(dtype):
    """The dtype to add numbers of this one in."""
    return dtype if dtype.size > 2 else tf.float32


def widened(x):
    return tf.cast(x, wide(x.dtype))


def total(x, axis):
    """The sum over some axes, in wide numbers."""
    return tf.reduce_sum(widened(x), axis)


def sum_of_products(left, right):
    """sum over steps and batch of left^T right, as one matrix product, in wide numbers."""
    flat = [tf.reshape(widened(x), [-1, x.shape[-1]]) for x in (left, right)]
    return tf.matmul(*flat, transpose_a=True)
