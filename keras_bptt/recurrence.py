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

Two options change the first of these. Randomised truncation multiplies delta_{t+1} U^T by
a factor xi_{t+1}; clipping takes s_t a_t for a_t, s_t = min(1, adjoint_clipnorm / |a_t|).

A product with m or c is always a `tf.where`, for masked steps may hold NaN.

Only h and delta are sequential, and they alone are computed step by step, in the two passes
of `passes.py`. Time is walked in blocks of steps: the products with W, and those that make
dW, dU, db and dx, are one matrix product a block, made while it is in cache. So neither all
z nor all delta ever exist, and h alone is kept for the backward pass. A pass may be
compiled by XLA, and run for parts of the batch at the same time; the products are left to
the graph, which multiplies faster on a CPU, and prunes dx where nobody asks for it (but for
a loop over blocks, which computes all that it returns).

This is the first derivative, written out. Its own derivatives are those of the same
recurrence composed of `scans.states`, which is closed under differentiation: derivatives of
every order are exact, and the first pays nothing for them.
"""

import dataclasses
from typing import NamedTuple

import tensorflow as tf

from keras_bptt.activations import Activation
from keras_bptt.blocks import blocks_like, blocks_of, cut, in_one_piece, padded, walk
from keras_bptt.execution import call, within_xla
from keras_bptt.explicit import Derivation, explicit_first_order
from keras_bptt.masks import link_factors, processing_order, read_out, visible
from keras_bptt.passes import (
    backward_pass,
    dropped,
    forward_pass,
    project,
    to_batch_major,
    to_time_major,
    where,
)
from keras_bptt.scans import States, previous_states, states, sum_of_products
from keras_bptt.shards import joined, shards_of, split, summed
from keras_bptt.truncation import Truncation
from keras_bptt.windows import windows_pass


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """Static options, named as in Keras.

    `keep_states` says whether the forward pass is to keep h, where the outputs do not tell
    it, for a backward pass that is likely to come. One that comes nevertheless computes h
    again. `jit_compile` says whether XLA compiles the two passes. `truncation` is for
    `truncated.py`, which cuts the sequence; here all of it is one piece.
    """

    activation: Activation
    return_sequences: bool = False
    zero_output_for_mask: bool = False
    go_backwards: bool = False
    unroll: bool | int = False
    keep_states: bool = True
    jit_compile: bool = False
    truncation: Truncation | None = None
    adjoint_clipnorm: float | None = None

    @property
    def states(self) -> States:
        return States(self.activation, self.unroll, self.adjoint_clipnorm)


class Constants(NamedTuple):
    """Tensors that have no gradient; what is None is left out of the computation.

    Attributes:
        mask: bool (batch, timesteps), False at steps to skip.
        d: input dropout factors (batch, features), the same at every step.
        r: recurrent dropout factors (batch, units), the same at every step.
        factors: (batch, timesteps), in the order of processing: what a gradient is
            multiplied by where it passes from a step to the one before. Not used where that
            is h_0, and at masked steps.
    """

    mask: tf.Tensor | None = None
    d: tf.Tensor | None = None
    r: tf.Tensor | None = None
    factors: tf.Tensor | None = None


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
    if constants.factors is not None:
        constants = constants._replace(factors=link_factors(options, constants))
    derivation = Derivation(forward, backward, composed)
    return explicit_first_order(derivation, options, constants, x, W, U, h_0, *b)


def composed(options, constants, x, W, U, h_0, *b):
    """The recurrence made of differentiable operations."""
    x, mask = processing_order(options, x, constants.mask)
    inputs = dropped(constants.d, x)
    m = None
    if mask is not None:
        inputs = where(mask[:, :, None], inputs)
        m = tf.transpose(mask)[:, :, None]
    z = project(to_time_major(inputs), W, *b)
    xi = constants.factors
    xi = None if xi is None else tf.transpose(xi)[:, :, None]
    h = states(options.states, z, U, h_0, m, constants.r, xi)
    return read_out(options, mask, to_batch_major(h), h[-1])


def forward(options, constants, x, W, U, h_0, *b):
    """Return the outputs; and h, if it is to be kept and not told by them.

    It is kept as it comes: for each shard of the batch consecutive pieces.
    """
    count = shards_of(x, U, options.jit_compile)
    parts = [
        forward_of_shard(options, *shard, W, U, *b)
        for shard in split(count, (constants, x, h_0))
    ]
    y, h_T, h = zip(*parts, strict=True)
    kept = options.keep_states and not outputs_are_states(options, constants)
    return (joined(y), joined(h_T)), h if kept else ()


def forward_of_shard(options, constants, x, h_0, W, U, *b):
    """Return y, h_T and the pieces of h."""
    mask, d, r, _ = constants
    x, mask = processing_order(options, x, mask)
    stacked = options.return_sequences or options.keep_states
    blocks = blocks_of(x, U.shape[0], options.unroll, stacked)
    if options.return_sequences and not blocks.in_loop:
        # One piece, which need not be copied: z takes no more than y will.
        blocks = blocks.in_one()
    inputs, real = padded(x, blocks), padded(mask, blocks)

    def block(start, size, valid, carry):
        z = project(dropped(d, cut(inputs, start, size)), W, *b)
        arguments = valid, U, *carry, z, cut(real, start, size), r
        static = options, stacked
        h_T, *h = call(forward_pass, static, options.jit_compile, *arguments)
        return (h_T,), h[0] if stacked else None

    (h_T,), h = walk(block, (h_0,), blocks, U.shape[0] if stacked else None)
    y = to_batch_major(in_one_piece(h)) if options.return_sequences else None
    return *read_out(options, mask, y, h_T), tuple(h)


def backward(options, constants, outputs, residuals, cotangents, *arguments):
    """Return the gradients of x, W, U, h_0 and, where there is one, b."""
    h, y = residuals, None
    if not h and outputs_are_states(options, constants):
        y = outputs[0]
    elif not h:
        again = dataclasses.replace(options, keep_states=True)
        _, h = forward(again, constants, *arguments)
    return gradients(options, constants, h, y, cotangents, *arguments)


def gradients(options, constants, h, y, cotangents, x, W, U, h_0, *b):
    """`backward`, given the pieces of h for each shard or, without any, h as one `y`."""
    count = len(h) or shards_of(x, U, options.jit_compile)
    shards = split(count, (constants, x, h_0, y, *cotangents))
    parts = [
        backward_of_shard(options, *shard, pieces, W, U, *b)
        for shard, pieces in zip(shards, h or [None] * count, strict=True)
    ]
    d_x, d_W, d_U, d_h_0, *d_b = zip(*parts, strict=True)
    return joined(d_x), summed(d_W), summed(d_U), joined(d_h_0), *map(summed, d_b)


def backward_of_shard(options, constants, x, h_0, y, dy, ds, h, W, U, *b):
    """`gradients` of a shard. With a truncation the pass is that over all windows."""
    mask, d, r, factors = constants
    x, mask = processing_order(options, x, mask)
    seen = visible(options, mask)
    e = dy if options.return_sequences else None
    if e is None:
        ds += dy if seen is None else where(seen[:, -1], dy)
    blocks = blocks_of(x, U.shape[0], options.unroll)
    run_back = backward_pass
    if options.truncation is not None:
        blocks, run_back = blocks.in_one(), windows_pass
    if h and len(h) > 1 and not within_xla():
        blocks = blocks_like(h)
    given = (x, mask, seen, e, y, factors)
    x, mask, seen, e, y, factors = (padded(t, blocks) for t in given)
    h = padded(h, blocks, axis=0)

    def states_of(start, size):
        if y is None:
            return cut(h, start, size, axis=0)
        return to_time_major(cut(y, start, size))

    def state_before(start):
        if isinstance(start, int):
            return h_0 if start == 0 else states_of(start - 1, 1)[0]
        return tf.where(start > 0, states_of(tf.maximum(start - 1, 0), 1)[0], h_0)

    def block(start, size, valid, carry):
        a, d_W, d_U, *d_b = carry
        m, c, e_t, xi = (cut(t, start, size) for t in (mask, seen, e, factors))
        h_t, first = states_of(start, size), state_before(start)

        def inputs():
            # What a masked step holds (NaN, perhaps) must not meet its delta, which is 0.
            real = None if m is None else m[:, :, None]
            return to_time_major(where(real, dropped(d, cut(x, start, size))))

        z = None
        if options.activation.slope_of_output is None:
            z = project(inputs(), W, *b)
            z += tf.tensordot(previous_states(h_t, first, r), U, 1)
            z = z if m is None else where(tf.transpose(m)[:, :, None], z)
        h_z = (h_t, None) if z is None else (None, z)
        arguments = valid, U, a, *h_z, where(c, e_t), m, r, xi
        a, delta = call(run_back, options, options.jit_compile, *arguments)
        # First the recurrence, which others wait for; then the products, one after the
        # other, for each has work for all cores.
        with tf.control_dependencies([delta]):
            # The first state apart from the others, which stay where they are.
            before = [s if r is None else r * s for s in (first[None], h_t[:-1])]
            d_U += sum_of_products(before[0], delta[:1])
            d_U += sum_of_products(before[1], delta[1:])
        with tf.control_dependencies([d_U]):
            d_W += sum_of_products(inputs(), delta)
        with tf.control_dependencies([d_W]):
            d_b = [later + tf.reduce_sum(delta, [0, 1]) for later in d_b]
        d_x = tf.tensordot(delta, W, [[2], [1]])
        return (a, d_W, d_U, *d_b), d_x if d is None else d * d_x

    carry = (ds, tf.zeros_like(W), tf.zeros_like(U), *map(tf.zeros_like, b))
    (d_h_0, d_W, d_U, *d_b), d_x = walk(block, carry, blocks, W.shape[0], reverse=True)
    d_x = to_batch_major(in_one_piece(d_x))
    d_x = tf.reverse(d_x, [1]) if options.go_backwards else d_x
    return d_x, d_W, d_U, d_h_0, *d_b


def outputs_are_states(options, constants):
    return options.return_sequences and constants.mask is None
