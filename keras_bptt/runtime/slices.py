"""Parts of a tensor and zeros beside it, each the gradient of the other, and never a pad.

Of the gradient of a slice TensorFlow makes a pad: `tensors` says why there may be none.
"""

import tensorflow as tf

from keras_bptt.runtime.explicit import explicit, local
from keras_bptt.runtime.tensors import along, filled, size_of, where


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
        if x.shape[axis] == 1:  # no need to lay it out
            return (where(along(tf.range(size) == start, x, axis), x),), ()
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
