"""delta_t and a_t themselves: two zeros are added to the recurrence, and have gradients.

    z_t = x_t W + b + p_t + h_{t-1} U       p_t = 0     dL/dp_t = delta_t
    h_t = f(z_t) + k_t                      k_t = 0     dL/dk_t = a_t, the adjoint

Both are what a wider recurrence computes, of twice as many units. The first half are the
units as they are. The second half are linear, get k_t and nothing else, and go wherever the
first half goes, so that they are always 0 and what would change h_t can be seen:

    [x_t p_t k_t]  (W 0)      [h_{t-1} 0]  (U 0)      f beside the identity      [b 0]
                   (I 0)                   (U 0)
                   (0 I)

So the numbers come out of the very backward pass that trains the layer, with its masks,
dropout, truncation, clipping and checkpoints, and no line of that pass knows about it. The
price is that of twice as many units, four times the products of each step.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math

import tensorflow as tf

from keras_bptt.cells.activations import Activation
from keras_bptt.runtime.tensors import size_of
from keras_bptt.engine.truncated import truncated_recurrence

_observer = contextvars.ContextVar("observer", default=None)


@contextlib.contextmanager
def observed(observer):
    """Within it every layer's recurrence is `observer(layer, ...)`.

    The other arguments, and what it returns, are those of `truncated_recurrence`. Only what
    is called (or traced) within it is observed, and only in this thread.
    """
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def recurrence_of(layer, *arguments):
    """`truncated_recurrence`, or what an observer makes of it."""
    observer = _observer.get()
    if observer is None:
        return truncated_recurrence(*arguments)
    return observer(layer, *arguments)


def zeros_of(x, U):
    """p and k side by side: (batch, timesteps, 2 units), in the order of x."""
    return tf.zeros([size_of(x, 0), size_of(x, 1), 2 * U.shape[0]], x.dtype)


def probed_recurrence(options, constants, zeros, x, W, U, h_0, b=None, V=None, c=None):
    """`truncated_recurrence`, also differentiable by the `zeros` of `zeros_of`.

    Their gradient is delta beside a, zero at masked steps, in the order of x: the last step
    processed comes first where the options say `go_backwards`. With windows that overlap it
    is the sum over the windows; with `adjoint_clipnorm` a is what is left by clipping.
    """
    units = U.shape[0]
    wide = dataclasses.replace(
        options, activation=_beside_identity(options.activation, units)
    )
    if options.adjoint_clipnorm is not None:
        # The norm of a wide adjoint is that of two equal halves.
        wide = dataclasses.replace(
            wide, adjoint_clipnorm=math.sqrt(2) * options.adjoint_clipnorm
        )
    d, r = constants.d, constants.r
    if d is not None:
        d = tf.concat([d, tf.ones([size_of(d, 0), 2 * units], d.dtype)], 1)
    if r is not None:
        r = tf.concat([r, r], 1)
    x = tf.concat([x, zeros], 2)
    W = tf.concat(
        [tf.pad(W, [[0, 0], [0, units]]), tf.eye(2 * units, dtype=W.dtype)], 0
    )
    U = tf.pad(tf.concat([U, U], 0), [[0, 0], [0, units]])
    h_0 = tf.pad(h_0, [[0, 0], [0, units]])
    b = None if b is None else tf.pad(b, [[0, units]])
    V = None if V is None else tf.concat([V, V], 0)
    constants = constants._replace(d=d, r=r)
    y, state = truncated_recurrence(wide, constants, x, W, U, h_0, b, V, c)
    return (_summed(y, units) if V is None else y), _summed(state, units)


def linearised(options, constants, *arguments):
    """Return the outputs, and a function from their cotangents (dy, ds) to delta and a.

    delta and a are (batch, timesteps, units), in the order of processing. The other
    arguments are those of `truncated_recurrence`.
    """
    x, _, U, *_ = arguments
    zeros = zeros_of(x, U)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(zeros)
        outputs = probed_recurrence(options, constants, zeros, *arguments)

    def back(*cotangents):
        gradient = tape.gradient(outputs, zeros, cotangents)
        gradient = tf.reverse(gradient, [1]) if options.go_backwards else gradient
        return tf.split(gradient, 2, axis=2)

    return outputs, back


@functools.lru_cache(maxsize=256)
def _beside_identity(activation, units):
    """f for the first units, the identity for as many others.

    Cached, since the function is part of the key of a graph.
    """

    def beside(function, ones):
        def both(z):
            return tf.concat([function(z[..., :units]), ones(z[..., units:])], -1)

        return both

    slope = activation.slope_of_output
    return Activation(
        beside(activation.function, tf.identity),
        None if slope is None else beside(slope, tf.ones_like),
        activation.mixes,
    )


def _summed(h, units):
    return h[..., :units] + h[..., units:]
