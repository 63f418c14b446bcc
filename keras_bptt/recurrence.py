"""The mathematics of the layer: from inputs and weights to outputs, and back.

Forward, for t = 1 ... T, with mask m, input dropout d and recurrent dropout r:

    z_t = (d x_t) W + b + (r h_{t-1}) U
    h_t = f(z_t)  where m_t,  else h_{t-1}
    y_t = c_t h_t,  c_t = 1 from the first unmasked step on, else 0

Backward, for t = T ... 1, with e_t = c_t dy_t + [t = T] ds the cotangent of h_t:

    a_t     = e_t + (1 - m_{t+1}) a_{t+1} + r (delta_{t+1} U^T)        the adjoint dL/dh_t
    delta_t = m_t f'(z_t) a_t                                          dL/dz_t
    dW = sum_t (d x_t)^T delta_t     dU = sum_t (r h_{t-1})^T delta_t     db = sum_t delta_t
    dx_t = d (delta_t W^T)           dh_0 = (1 - m_1) a_1 + r (delta_1 U^T)

Only h and delta are sequential; all else is one matrix product over all steps. Only h is
kept for the backward pass. A product with m or c above is always a `tf.where` below, for
masked steps may hold NaN.

This is the first derivative, written out. Its own derivatives are those of the same
recurrence composed of `scans.states`, which is closed under differentiation: derivatives of
every order are exact, and the first pays nothing for them.
"""

import dataclasses
from typing import NamedTuple

import tensorflow as tf

from keras_bptt.activations import Activation
from keras_bptt.explicit import Derivation, explicit_first_order
from keras_bptt.scans import (
    States,
    previous_states,
    scan,
    states,
    states_loop,
    sum_of_products,
)


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """Static options, named as in Keras."""

    activation: Activation
    return_sequences: bool = False
    zero_output_for_mask: bool = False
    go_backwards: bool = False
    unroll: bool = False

    @property
    def states(self) -> States:
        return States(self.activation, self.unroll)


class Constants(NamedTuple):
    """Tensors that have no gradient; what is None is left out of the computation.

    Attributes:
        mask: bool (batch, timesteps), False at steps to skip.
        d: input dropout factors (batch, features), the same at every step.
        r: recurrent dropout factors (batch, units), the same at every step.
    """

    mask: tf.Tensor | None = None
    d: tf.Tensor | None = None
    r: tf.Tensor | None = None


def recurrence(options: Recurrence, constants: Constants, x, W, U, h_0, *b):
    """Run the recurrence, differentiable with respect to every tensor but the constants.

    Args:
        options: activation and modes.
        constants: mask and dropout factors.
        x: inputs (batch, timesteps, features).
        W: kernel (features, units).
        U: recurrent_kernel (units, units).
        h_0: initial_state (batch, units).
        *b: bias (units,), or nothing.

    Returns:
        (y, h_T): outputs (batch, timesteps, units) with `return_sequences`, else the last
        one (batch, units); and the last state (batch, units).
    """

    derivation = Derivation(forward, backward, composed)
    return explicit_first_order(derivation, options, constants, x, W, U, h_0, *b)


def forward(options, constants, *args):
    """Return the outputs, and h (timesteps, batch, units) for the backward pass."""
    return outputs_and_states(states_loop, options, constants, *args)


def composed(options, constants, *args):
    """Return the outputs, made of differentiable operations."""
    return outputs_and_states(states, options, constants, *args)[0]


def outputs_and_states(states, options, constants, x, W, U, h_0, *b):
    """Return (y, h_T) and h, with `states` the scan to use."""
    mask = time_major_mask(options, constants)
    z = project(time_major_inputs(options, constants, x), W, *b)
    h = states(options.states, z, U, h_0, mask, constants.r)
    if options.return_sequences:
        y = to_batch_major(shown(options, mask, h))
    else:
        y = last_shown(options, mask, h[-1])
    return (y, h[-1]), h


def backward(options, constants, h, cotangents, x, W, U, h_0, *b):
    """Return the gradients of x, W, U, h_0 and, where there is one, b."""
    mask = time_major_mask(options, constants)
    # What a masked step holds (NaN, perhaps) must not meet its delta, which is 0.
    x = where(mask, time_major_inputs(options, constants, x))
    before = previous_states(h, h_0, constants.r)
    if options.activation.slope_of_output is None:
        z = where(mask, project(x, W, *b) + tf.tensordot(before, U, 1))
    else:
        z = None
    dy, ds = cotangents
    if options.return_sequences:
        e, carry = shown(options, mask, to_time_major(dy)), ds
    else:
        e, carry = tf.zeros_like(h), ds + last_shown(options, mask, dy)
    d_h_0, delta = adjoint_loop(options, constants, mask, h, z, U, e, carry)

    d_x = tf.tensordot(delta, W, [[2], [1]])
    d_x = to_batch_major(tf.reverse(d_x, [0]) if options.go_backwards else d_x)
    d_x = d_x if constants.d is None else d_x * constants.d[:, None]
    d_b = [tf.reduce_sum(delta, [0, 1])] if b else []
    return d_x, sum_of_products(x, delta), sum_of_products(before, delta), d_h_0, *d_b


def adjoint_loop(options, constants, mask, h, z, U, e, carry):
    """Return dh_0 and delta (timesteps, batch, units).

    The carry is what reaches a step's state from later steps and the returned state:
    a_t without its own e_t. Where there is no e, all of the cotangent is in it.
    """
    f, U_T = options.activation, tf.transpose(U)

    def step(carry, e, h, z, m):
        a = e + carry
        inward = where(m, a)
        delta = inward * f.slope_of_output(h) if z is None else f.vjp(z, inward)
        back = tf.matmul(delta, U_T)
        back = back if constants.r is None else constants.r * back
        return back if m is None else tf.where(m, back, a), delta

    h = h if z is None else None
    return scan(step, carry, e, (h, z, mask), reverse=True, unroll=options.unroll)


def project(x, W, *b):
    """x_t W + b for all steps."""
    z = tf.tensordot(x, W, 1)
    return z + b[0] if b else z


def time_major_inputs(options, constants, x):
    """d x_t in the order in which the steps are processed."""
    x = x if constants.d is None else x * constants.d[:, None]
    x = to_time_major(x)
    return tf.reverse(x, [0]) if options.go_backwards else x


def time_major_mask(options, constants):
    """m_t (timesteps, batch, 1) in the order in which the steps are processed."""
    if constants.mask is None:
        return None
    mask = tf.transpose(constants.mask)[:, :, None]
    return tf.reverse(mask, [0]) if options.go_backwards else mask


def to_time_major(x):
    return tf.transpose(x, [1, 0, 2])


to_batch_major = to_time_major


def where(mask, x):
    """x where the mask is true, else 0, whatever x is there."""
    return x if mask is None else tf.where(mask, x, tf.zeros_like(x))


def shown(options, mask, h):
    """c_t h_t for all steps; the same map takes a cotangent of the outputs back to e."""
    if mask is None or options.zero_output_for_mask:
        return where(mask, h)
    # c_t = 1 from the first unmasked step on. Rows without one have c_t = 0 throughout.
    first = tf.argmax(tf.cast(mask, tf.int32), 0, output_type=tf.int32)
    steps = tf.range(tf.shape(mask)[0])[:, None, None]
    return where((steps >= first) & tf.reduce_any(mask, 0), h)


def last_shown(options, mask, h):
    """c_T h_T; also the map that takes the cotangent of the last output back."""
    if mask is None:
        return h
    seen = mask[-1] if options.zero_output_for_mask else tf.reduce_any(mask, 0)
    return where(seen, h)
