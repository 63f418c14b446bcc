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

A product with m or c is always a `tf.where`, for masked steps may hold NaN.

Only h and delta are sequential. Time is walked in blocks of steps: the products with W,
and those that make dW, dU, db and dx, are one matrix product a block, made while it is in
cache. So neither all z nor all delta ever exist, and h alone is kept for the backward pass.

This is the first derivative, written out. Its own derivatives are those of the same
recurrence composed of `scans.states`, which is closed under differentiation: derivatives of
every order are exact, and the first pays nothing for them.
"""

import dataclasses
from typing import NamedTuple

import tensorflow as tf

from keras_bptt.activations import Activation
from keras_bptt.blocks import cut, walk
from keras_bptt.explicit import Derivation, explicit_first_order
from keras_bptt.scans import (
    States,
    at,
    previous_states,
    scan,
    size_of,
    states,
    states_step,
    sum_of_products,
)


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """Static options, named as in Keras.

    `keep_states` says whether the forward pass is to keep h, where the outputs do not tell
    it, for a backward pass that is likely to come. One that comes nevertheless computes h
    again.
    """

    activation: Activation
    return_sequences: bool = False
    zero_output_for_mask: bool = False
    go_backwards: bool = False
    unroll: bool = False
    keep_states: bool = True

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


def composed(options, constants, x, W, U, h_0, *b):
    """The recurrence made of differentiable operations."""
    x, mask = processing_order(options, x, constants.mask)
    inputs = where(mask, dropped(constants, to_time_major(x)))
    z = project(inputs, W, *b)
    h = states(options.states, z, U, h_0, mask, constants.r)
    return read_out(options, mask, h, h[-1])


def forward(options, constants, x, W, U, h_0, *b):
    """Return the outputs; and h (timesteps, batch, units), if it is to be kept."""
    x, mask = processing_order(options, x, constants.mask)
    step = states_step(options.states, U, constants.r)
    told = options.return_sequences and mask is None
    needed = options.return_sequences or options.keep_states

    def block(start, size, carry):
        inputs = to_time_major(cut(x, 1, start, size))
        z = project(dropped(constants, inputs), W, *b)
        m = cut(mask, 0, start, size)
        h, states = scan(
            step, *carry, lambda t: at(t, z, m), size, unroll=options.unroll
        )
        return (h,), states if needed else None

    width = U.shape[0] if needed else None
    (last,), h = walk(block, (h_0,), size_of(x, 1), width, unroll=options.unroll)
    outputs = read_out(options, mask, h, last)
    return outputs, (h,) if options.keep_states and not told else ()


def backward(options, constants, outputs, residuals, cotangents, *arguments):
    """Return the gradients of x, W, U, h_0 and, where there is one, b."""
    x, W, U, h_0, *b = arguments
    x, mask = processing_order(options, x, constants.mask)
    seen = visible(options, mask)
    step = adjoint_step(options.activation, U, constants.r)
    known_slope = options.activation.slope_of_output is not None
    dy, ds = cotangents
    if residuals:
        (h,) = residuals
    elif options.return_sequences and mask is None:
        h = to_time_major(outputs[0])
    else:
        again = dataclasses.replace(options, keep_states=True)
        _, (h,) = forward(again, constants, *arguments)
    e = where(seen, to_time_major(dy)) if options.return_sequences else None

    def block(start, size, carry):
        a, d_W, d_U, *d_b = carry
        m = cut(mask, 0, start, size)
        # What a masked step holds (NaN, perhaps) must not meet its delta, which is 0.
        inputs = to_time_major(cut(x, 1, start, size))
        inputs = where(m, dropped(constants, inputs))
        before = tf.where(start > 0, h[tf.maximum(start - 1, 0)], h_0)
        before = previous_states(cut(h, 0, start, size), before, constants.r)
        z = None
        if not known_slope:
            z = where(m, project(inputs, W, *b) + tf.tensordot(before, U, 1))

        def step_inputs(i):
            return *at(start + i, h if z is None else None, e), *at(i, z, m)

        a, delta = scan(step, a, step_inputs, size, reverse=True, unroll=options.unroll)
        d_x = dropped(constants, tf.tensordot(delta, W, [[2], [1]]))
        d_W += sum_of_products(inputs, delta)
        d_U += sum_of_products(before, delta)
        d_b = [d + tf.reduce_sum(delta, [0, 1]) for d in d_b]
        return (a, d_W, d_U, *d_b), d_x

    if not options.return_sequences:
        ds += dy if seen is None else where(seen[-1], dy)
    carry = (ds, tf.zeros_like(W), tf.zeros_like(U), *map(tf.zeros_like, b))
    steps, width = size_of(x, 1), W.shape[0]
    (d_h_0, d_W, d_U, *d_b), d_x = walk(
        block, carry, steps, width, reverse=True, unroll=options.unroll
    )
    d_x = to_batch_major(tf.reverse(d_x, [0]) if options.go_backwards else d_x)
    return d_x, d_W, d_U, d_h_0, *d_b


def adjoint_step(f, U, r):
    """One step back. The carry is a_t without its own e_t: what later steps send back."""
    U_T = tf.transpose(U)

    def step(carry, h, e, z, m):
        a = carry if e is None else e + carry
        inward = where(m, a)
        delta = inward * f.slope_of_output(h) if z is None else f.vjp(z, inward)
        back = tf.matmul(delta, U_T)
        back = back if r is None else r * back
        return back if m is None else tf.where(m, back, a), delta

    return step


def project(x, W, *b):
    """x_t W + b."""
    z = tf.tensordot(x, W, 1)
    return z + b[0] if b else z


def dropped(constants, x):
    """d x_t, for steps (timesteps, batch, features)."""
    return x if constants.d is None else constants.d * x


def read_out(options, mask, h, last):
    """Return (y, h_T)."""
    seen = visible(options, mask)
    if options.return_sequences:
        return to_batch_major(where(seen, h)), last
    return last if seen is None else where(seen[-1], last), last


def visible(options, mask):
    """c_t (timesteps, batch, 1): where the output is the state; elsewhere it is 0.

    The same map takes a cotangent of the outputs back to e_t.
    """
    if mask is None or options.zero_output_for_mask:
        return mask
    # From the first unmasked step on. Rows without one are 0 throughout.
    first = tf.argmax(tf.cast(mask, tf.int32), 0, output_type=tf.int32)
    steps = tf.range(tf.shape(mask)[0])[:, None, None]
    return (steps >= first) & tf.reduce_any(mask, 0)


def processing_order(options, x, mask):
    """x (batch, timesteps, features) and m (timesteps, batch, 1), first step first."""
    if mask is not None:
        mask = tf.transpose(mask)[:, :, None]
    if options.go_backwards:
        return tf.reverse(x, [1]), mask if mask is None else tf.reverse(mask, [0])
    return x, mask


def to_time_major(x):
    return tf.transpose(x, [1, 0, 2])


to_batch_major = to_time_major


def where(mask, x):
    """x where the mask is true, else 0, whatever x is there."""
    return x if mask is None else tf.where(mask, x, tf.zeros_like(x))
