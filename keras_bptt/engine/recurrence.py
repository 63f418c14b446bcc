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

With the weights V and c of an output layer the outputs are, in place of y_t,

    p_t = y_t V + c

the pre-activations of the layer's outputs o_t = g(p_t), and with q_t = dL/dp_t in place of
dy_t

    e_t = c_t (q_t V^T) + [t = T] ds     dV = sum_t y_t^T q_t     dc = sum_t q_t

The first derivative is written out, in `fused.py`. Its own derivatives are those of the
same recurrence composed of `scans.states`, which is closed under differentiation:
derivatives of every order are exact, and the first pays nothing for them.
"""

import dataclasses
import functools
from typing import NamedTuple

import tensorflow as tf

from keras_bptt.cells.activations import Activation
from keras_bptt.runtime.explicit import (
    Derivation,
    explicit,
    explicit_first_order,
    refuse_forward_mode,
)
from keras_bptt.engine.fused import backward, forward
from keras_bptt.engine.masks import link_factors, processing_order, read_out
from keras_bptt.engine.passes import dropped, project, to_batch_major, to_time_major
from keras_bptt.engine.scans import States, states
from keras_bptt.runtime.tensors import one, size_of, sum_of_products, total, where, wide
from keras_bptt.truncation import Truncation


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """Static options, named as in Keras.

    `keep_states` says whether the forward pass is to keep h, where the outputs do not tell
    it, for a backward pass that is likely to come. One that comes nevertheless computes h
    again. `jit_compile` says whether XLA compiles the two passes. `truncation` is for
    `truncated.py`, which cuts the sequence; here all of it is one piece.
    `checkpoint_every` says after how many steps a state is kept, an integer or "sqrt";
    None: all are.
    """

    activation: Activation
    return_sequences: bool = False
    zero_output_for_mask: bool = False
    go_backwards: bool = False
    unroll: bool | int = False
    keep_states: bool = True
    jit_compile: bool = False
    truncation: Truncation | None = None
    checkpoint_every: int | str | None = None
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


def recurrence(
    options: Recurrence, constants: Constants, x, W, U, h_0, b=None, V=None, c=None
):
    """Run the recurrence, differentiable with respect to every tensor but the constants.

    Args:
        options: activation and modes.
        constants: mask and dropout factors.
        x: inputs (batch, timesteps, features).
        W: kernel (features, units). Weights may be of a wider dtype than x, as they are
            stored; their gradients then are too.
        U: recurrent_kernel (units, units).
        h_0: initial_state (batch, units).
        b: bias (units,), or None.
        V: output_kernel (units, outputs), or None: no output layer. With
            `return_sequences`; for a last output see `last_output`.
        c: output_bias (outputs,), or None.

    Returns:
        (y, h_T): outputs (batch, timesteps, units) with `return_sequences`, else the last
        one (batch, units); and the last state (batch, units). With V, p in place of y.
    """
    if constants.factors is not None:
        constants = constants._replace(factors=link_factors(options, constants))
    derivation = Derivation(forward, backward, composed)
    return explicit_first_order(derivation, options, constants, x, W, U, h_0, b, V, c)


def last_output(h, V, c):
    """h V + c (batch, outputs) of the last state; its gradients are sums over examples."""

    def forward(h, V, *c):
        V, *c = (tf.cast(w, h.dtype) for w in (V, *c))
        return (project(h, V, *(c or [None])),), ()

    def backward(args, outputs, residuals, cotangents):
        (h, V, *c), (q,) = args, cotangents
        d_h = tf.matmul(q, tf.cast(V, q.dtype), transpose_b=True)
        d_V = tf.cast(sum_of_products(h, q), V.dtype)
        return d_h, d_V, *(tf.cast(total(q, 0), bias.dtype) for bias in c)

    given = [h, V] if c is None else [h, V, c]
    refuse_forward_mode(given)
    return explicit(forward, backward)(*given)[0]


def in_wide_numbers(composed):
    """`composed`, for numbers of any dtype: in half precision its sums would lose most."""

    @functools.wraps(composed)
    def widened(options, constants, *arguments):
        x, *_ = arguments
        dtype = wide(x.dtype)
        if dtype == x.dtype:
            return composed(options, constants, *arguments)

        def cast(t):
            return tf.cast(t, dtype) if t is not None and t.dtype.is_floating else t

        activation = options.activation.called_with(x.dtype)
        options = dataclasses.replace(options, activation=activation)
        constants, arguments = tf.nest.map_structure(cast, (constants, arguments))
        outputs = composed(options, constants, *arguments)
        return [tf.cast(y, x.dtype) for y in outputs]

    return widened


@in_wide_numbers
def composed(options, constants, x, W, U, h_0, b, V, c):
    """The recurrence made of differentiable operations."""
    x, mask = processing_order(options, x, constants.mask)
    inputs = dropped(constants.d, x)
    m = None
    if mask is not None:
        inputs = where(mask[:, :, None], inputs)
        m = tf.transpose(mask)[:, :, None]
    z = project(to_time_major(inputs), W, b)
    xi = constants.factors
    xi = None if xi is None else tf.transpose(xi)[:, :, None]
    h = states(options.states, z, U, h_0, m, constants.r, xi)
    shown = h if V is None else project(h, V, c)
    last = one(h, size_of(h, 0) - 1)
    return read_out(options, mask, to_batch_major(shown), last, c)
