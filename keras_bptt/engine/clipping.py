"""Clipping inside the recursion: the adjoint of a step is limited before it goes on.

    s_t = min(1, r_t / |a_t|)       s_t a_t is what makes delta_t and what recurs

with |a_t| over all states of an example that recur. Two options set the limit r_t:

    adjoint_clipnorm = r            r_t = r
    adjoint_max_growth = g          r_t = g sum over s >= t of |e_s|

The second is carried in the recursion: the sum of the norms of all cotangents e_s that have
come in, over the same steps and the same window as the adjoint. A cotangent at a masked
step belongs to the last real step before it, so it waits until that step comes. With both
options the smaller limit holds. In derivatives of higher order s_t is a constant.
"""

import functools
from typing import NamedTuple

import tensorflow as tf

from keras_bptt.runtime.tensors import beside, size_of, wide, widened


class Arriving(NamedTuple):
    """What comes back to a step from the later ones; all (rows, ...).

    Attributes:
        adjoints: of each state.
        sent: with `adjoint_max_growth` the sum of |e_s| so far (rows, 1); else empty.
        waiting: with `adjoint_max_growth`, for each state, cotangents that wait for a real
            step; else empty.
    """

    adjoints: tuple
    sent: tuple = ()
    waiting: tuple = ()


def arriving(options, cotangents):
    """What comes back to the last step: the cotangents of its states."""
    if options.adjoint_max_growth is None:
        return Arriving(cotangents)
    first = cotangents[0]
    sent = tf.zeros([size_of(first, 0), 1], wide(first.dtype))
    return Arriving(cotangents, (sent,), cotangents)


def entered(options, arrived, e):
    """`arrived` with the cotangent e of this step's output."""
    if e is None:
        return arrived

    def added(states):
        place = options.cell.output
        return (*states[:place], states[place] + e, *states[place + 1 :])

    waiting = added(arrived.waiting) if arrived.waiting else ()
    return arrived._replace(adjoints=added(arrived.adjoints), waiting=waiting)


def clipped(options, arrived):
    """The scale s (rows, 1) of the adjoints of a real step, and what it leaves to go on."""
    size = norm(options.cell.recurring(arrived.adjoints))
    limits, sent = [], ()
    if options.adjoint_clipnorm is not None:
        limits.append(tf.constant(options.adjoint_clipnorm, size.dtype))
    if options.adjoint_max_growth is not None:
        sent = (arrived.sent[0] + norm(arrived.waiting),)
        limits.append(options.adjoint_max_growth * sent[0])
    limit = functools.reduce(tf.minimum, limits)
    scale = tf.where(size > limit, limit / size, tf.ones_like(size))
    waiting = tuple(map(tf.zeros_like, arrived.waiting))
    return scale, Arriving((), sent, waiting)


def scaled(options, scale, adjoints):
    """The adjoints that recur, times the scale; the others as they are."""
    flags = options.cell.recurs or [True] * len(adjoints)
    return tuple(
        tf.cast(beside(scale, a), a.dtype) * a if recurs else a
        for a, recurs in zip(adjoints, flags, strict=True)
    )


def norm(tensors):
    """The norm of all numbers of a row, (rows, 1), in wide numbers."""
    rows = [tf.reshape(widened(t), [size_of(t, 0), -1]) for t in tensors]
    # By the largest number, whose square would not overflow.
    largest = [tf.reduce_max(tf.abs(row), 1, keepdims=True) for row in rows]
    largest = functools.reduce(tf.maximum, largest)
    squares = [
        tf.reduce_sum(tf.math.divide_no_nan(row, largest) ** 2, 1, keepdims=True)
        for row in rows
    ]
    return largest * tf.sqrt(sum(squares[1:], squares[0]))
