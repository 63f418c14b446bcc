"""The two passes over one block of steps: what is sequential, step after step.

Everything else, the products that make the weights' gradients and those of the inputs, is
left to the caller. What comes from the caller of the layer is batch-major, (batch,
timesteps, ...), and read where it is; what a pass stacks is time-major, (timesteps, batch,
...), and stays so: no pass lays anything out anew.
"""

import tensorflow as tf

from keras_bptt.engine.loops import at, batch_major_at, scan
from keras_bptt.engine.scans import clip_scale, states_step
from keras_bptt.runtime.tensors import size_of, where


def forward_pass(static, valid, U, h_0, z, mask, r):
    """h_t = f(z_t + (r h_{t-1}) U) where m_t, else h_{t-1}.

    Args:
        static: the options of the recurrence; whether the states are wanted.
        valid: how many of the steps count, None: all.
        U, h_0, mask, r: as `recurrence.recurrence` has them, for these steps.
        z: (batch, timesteps, units), the inputs' share of the pre-activation.

    Returns:
        (h_T, h) with h time-major or, where the states are not wanted, (h_T,).
    """
    options, stacked = static
    mask = for_units(mask)
    last, h = scan(
        states_step(options.states, U, r),
        h_0,
        lambda t: batch_major_at(t, z, mask),
        size_of(z, 1),
        valid=valid,
        unroll=options.unroll,
        stacked=stacked,
    )
    return (last, h) if stacked else (last,)


def backward_pass(options, valid, U, a, h, z, e, mask, r, factors):
    """a_t = e_t + delta_{t+1} U^T and delta_t = a_t f'(z_t), from the last step back.

    Args:
        options: of the recurrence.
        valid: how many of the steps count, None: all.
        U, mask, r, factors: as `recurrence.recurrence` has them.
        a: what later steps send back to the last one of these.
        h, z: the states, where f' is a function of them, else the pre-activation, both
            time-major; the other is None.
        e: the cotangents e_t, batch-major. None: none but what `a` holds.

    Returns:
        What these steps send back to the one before, and delta, time-major: 0 at steps
        that do not count.
    """
    mask, factors = for_units(mask), for_units(factors)

    def inputs(t):
        return at(t, h, z) + batch_major_at(t, e, mask, factors)

    steps = size_of(h if z is None else z, 0)
    return steps_back(options, U, r, a, inputs, steps, valid)


def steps_back(options, U, r, a, inputs, size, valid=None):
    """`size` steps of the backward recursion; `inputs(t)` are the terms of step t."""
    return scan(
        adjoint_step(options, U, r),
        a,
        inputs,
        size,
        valid=valid,
        reverse=True,
        unroll=options.unroll,
    )


def adjoint_step(options, U, r):
    """One step back, from its h_t or z_t, e_t, mask and factor, each of which may be None.

    The carry is a_t without its own e_t: what later steps send back.
    """
    f, r_max, U_T = options.activation, options.adjoint_clipnorm, tf.transpose(U)

    def step(carry, h, z, e, m, xi):
        a = carry if e is None else e + carry
        inward = where(m, a if r_max is None else a * clip_scale(a, r_max))
        delta = f.vjp_at_output(h, inward) if z is None else f.vjp(z, inward)
        back = tf.matmul(delta, U_T)
        back = back if r is None else r * back
        back = back if xi is None else xi * back
        return back if m is None else tf.where(m, back, a), delta

    return step


def project(x, W, b):
    """x_t W + b."""
    z = tf.tensordot(x, W, 1)
    return z if b is None else z + b


def dropped(factors, x):
    """`x` (batch, timesteps, ...) times `factors` (batch, ...), the same at every step."""
    return x if factors is None else factors[:, None] * x


def for_units(x):
    """`x` (batch, timesteps), the same for all units: (batch, timesteps, 1)."""
    # Of a mask of unknown sizes LiteRT takes no x[:, :, None].
    return None if x is None else tf.expand_dims(x, 2)


def to_time_major(x):
    return tf.transpose(x, [1, 0, 2])


to_batch_major = to_time_major
