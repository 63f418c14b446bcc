"""Backpropagation through time in a GRU, as on paper: NumPy, float64, plain loops.

Read this file to learn the equations, or compare with it to test an implementation. The
plain RNN in `simple_rnn` comes first. Like it, this file shares no code with the rest of
the package.

Row vectors, as Keras computes. The pre-activation p_t holds those of the three gates side
by side, p_t = (p_z, p_r, p_h), in Keras' order, and so do W, U and b. For t = 1 ... T,

    z   = sigma(p_z)                    update gate: how much of h_{t-1} stays
    r   = sigma(p_r)                    reset gate: how much of h_{t-1} the candidate sees
    hh  = phi(p_h)                      candidate
    h_t = z * h_{t-1} + (1 - z) * hh    what the layer shows

The reset gate acts after the product with U, as cuDNN has it, or before, as the paper:

    reset_after=True      q_t = h_{t-1} U + b_1
                          p_t = x_t W + b_0 + (q_z, q_r, r * q_h)
    reset_after=False     q_t = (h_{t-1} U_z, h_{t-1} U_r, (r * h_{t-1}) U_h)
                          p_t = x_t W + b + q_t

Backward, for t = T ... 1, with the cotangents e_t of h_t, and e^h of the returned last
state, so that a_T = e_T + e^h,

    delta_z = a_t * (h_{t-1} - hh) * sigma'(p_z)
    delta_h = a_t * (1 - z) * phi'(p_h)

    reset_after=True
        delta_r = delta_h * q_h * sigma'(p_r)
        gamma_t = (delta_z, delta_r, r * delta_h)          dL/dq_t
        dL/dU   = sum_t h_{t-1}^T gamma_t
        dL/db   = sum_t sum_batch (delta_t, gamma_t)       row 0 of b, row 1
        a_{t-1} = e_{t-1} + a_t * z + gamma_t U^T

    reset_after=False, with v = dL/d(r * h_{t-1})
        v       = delta_h U_h^T
        delta_r = v * h_{t-1} * sigma'(p_r)
        gamma_t = delta_t                                  dL/dq_t
        dL/dU   = sum_t (h_{t-1}^T delta_z, h_{t-1}^T delta_r, (r * h_{t-1})^T delta_h)
        dL/db   = sum_t sum_batch delta_t
        a_{t-1} = e_{t-1} + a_t * z + delta_z U_z^T + delta_r U_r^T + v * r

    both
        delta_t = (delta_z, delta_r, delta_h)
        dL/dx_t = delta_t W^T
        dL/dW   = sum_t x_t^T delta_t

with e_0 = 0: a_0 = dL/dh_0. A masked step does nothing, whatever x_t is:

    h_t = h_{t-1}      delta_t = gamma_t = 0      a_{t-1} = e_{t-1} + a_t

    symbol   Keras name            shape                        gradient
    x_t      inputs                (B, T, D)                    d_inputs
    W        kernel                (D, 3 H)                     d_kernel
    U        recurrent_kernel      (H, 3 H)                     d_recurrent_kernel
    b        bias                  (2, 3 H); before: (3 H,)     d_bias
    h_0      initial_state         (B, H)                       d_initial_state
    phi      activation
    sigma    recurrent_activation
    p_t      pre-activation        (B, T, 3 H)                  delta
    q_t      its recurrent side    (B, T, 3 H)                  recurrent_delta
    h_t      hidden state, output  (B, T, H)                    adjoint

with B batch, T timesteps, D features and H units. One thing differs from what a Keras layer
returns under a mask: before the first real step the layer's output is zero, h_t is h_0.

References: Cho et al., "Learning phrase representations using RNN encoder-decoder for
statistical machine translation", arXiv:1406.1078.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from keras_bptt.reference.gated import AXES, by_step, checked
from keras_bptt.reference.simple_rnn import (
    ACTIVATIONS,
    Array,
    Pair,
    Steps,
    _by_step,
    _pair,
    _stacked,
)

_AXES = AXES | {"W": "features, 3 units", "U": "units, 3 units", "b": "3 units"}
_AXES_RESET_AFTER = _AXES | {"b": "sides, 3 units"}


class GRUForward(NamedTuple):
    """Hidden states and pre-activations, (batch, timesteps, ...)."""

    h: Array
    p: Array


@dataclass(frozen=True, eq=False)
class GRUGradients:
    """Gradients of a GRU, each in the shape of what it belongs to."""

    d_inputs: Array
    d_kernel: Array
    d_recurrent_kernel: Array
    d_bias: Array
    d_initial_state: Array
    adjoint: Array  # a_t, dL/dh_t in full
    delta: Array  # dL/dp_t
    recurrent_delta: Array  # gamma_t, dL/dq_t


def gru_forward(
    x: Array,
    W: Array,
    U: Array,
    b: Array | None = None,
    h_0: Array | None = None,
    *,
    activation: str | tuple = "tanh",
    recurrent_activation: str | tuple = "sigmoid",
    reset_after: bool = True,
    mask: Array | None = None,
) -> GRUForward:
    """The state of every step.

    None stands for a bias or a state of zeros, or for no mask; a mask is boolean, (batch,
    timesteps), and False at the steps to pass over. An activation is a name in
    `ACTIVATIONS` or a pair (value, derivative) of elementwise functions.

    A gate z that is half open makes a moving average, h_t = (h_{t-1} + x_t) / 2:

    >>> x, W, U = np.array([[[4.0], [2.0], [8.0]]]), np.eye(3)[2:3], np.zeros((1, 3))
    >>> gru_forward(x, W, U, activation="linear").h.ravel().tolist()
    [2.0, 2.0, 5.0]
    """
    phi = _pair("activation", activation, ACTIVATIONS)
    sigma = _pair("recurrent_activation", recurrent_activation, ACTIVATIONS)
    axes = _AXES_RESET_AFTER if reset_after else _AXES
    x, U, W, b, h_0, mask = checked(axes, x=x, U=U, W=W, b=b, h_0=h_0, mask=mask)
    h, p = _states(*by_step(x, mask), W, U, b, h_0, phi, sigma, reset_after)
    del h[0]
    return GRUForward(_stacked(h), _stacked(p))


def gru_gradients(
    x: Array,
    W: Array,
    U: Array,
    b: Array | None = None,
    h_0: Array | None = None,
    *,
    e: Array | None = None,
    e_h_T: Array | None = None,
    activation: str | tuple = "tanh",
    recurrent_activation: str | tuple = "sigmoid",
    reset_after: bool = True,
    mask: Array | None = None,
) -> GRUGradients:
    """Every gradient, from the cotangents of h_1 ... h_T and of the returned last state.

    `e` is (batch, timesteps, units), `e_h_T` is (batch, units), and None stands for zeros.
    The other arguments are those of `gru_forward`.

    >>> x, W, U = np.array([[[4.0], [2.0], [8.0]]]), np.eye(3)[2:3], np.zeros((1, 3))
    >>> d = gru_gradients(x, W, U, e_h_T=np.ones((1, 1)), activation="linear")
    >>> d.adjoint.ravel().tolist(), d.d_initial_state.item()
    ([0.25, 0.5, 1.0], 0.125)
    """
    phi = _pair("activation", activation, ACTIVATIONS)
    sigma = _pair("recurrent_activation", recurrent_activation, ACTIVATIONS)
    arrays = {"x": x, "U": U, "W": W, "b": b, "h_0": h_0, "mask": mask}
    axes = _AXES_RESET_AFTER if reset_after else _AXES
    x, U, W, b, h_0, mask, e, e_h_T = checked(axes, **arrays, e=e, e_h_T=e_h_T)
    T, (x, m) = x.shape[1], by_step(x, mask)
    h, p = _states(x, m, W, U, b, h_0, phi, sigma, reset_after)
    back = _back_reset_after if reset_after else _back_reset_before
    e = {0: np.zeros_like(h_0), **_by_step(e)}
    dx, dW, dU, db = {}, np.zeros_like(W), np.zeros_like(U), np.zeros_like(b)
    a, delta, gamma = {T: e[T] + e_h_T}, {}, {}
    for t in range(T, 0, -1):
        a_t = np.where(m[t], a[t], 0.0)  # makes delta_t and gamma_t zero where masked
        delta[t], gamma[t], dU_t, a_before = back(a_t, p[t], h[t - 1], U, b, phi, sigma)
        dx[t] = delta[t] @ W.T
        dW += x[t].T @ delta[t]
        dU += dU_t
        sides = [delta[t], gamma[t]] if reset_after else delta[t]
        db += np.sum(sides, axis=-2)
        a[t - 1] = e[t - 1] + np.where(m[t], a_before, a[t])
    dh_0 = a.pop(0)
    by_t = _stacked(a), _stacked(delta), _stacked(gamma)
    return GRUGradients(_stacked(dx), dW, dU, db, dh_0, *by_t)


def _states(
    x: Steps,
    m: Steps,
    W: Array,
    U: Array,
    b: Array,
    h_0: Array,
    phi: Pair,
    sigma: Pair,
    reset_after: bool,
) -> tuple[Steps, Steps]:
    step = _step_reset_after if reset_after else _step_reset_before
    h, p = {0: h_0}, {}
    for t in sorted(x):
        h_t, p[t] = step(x[t], h[t - 1], W, U, b, phi, sigma)
        h[t] = np.where(m[t], h_t, h[t - 1])
    return h, p


def _step_reset_after(x, h, W, U, b, phi, sigma):
    """h_t and p_t, of h = h_{t-1}."""
    q_z, q_r, q_h = np.split(h @ U + b[1], 3, axis=-1)
    x_z, x_r, x_h = np.split(x @ W + b[0], 3, axis=-1)
    p_z = x_z + q_z
    p_r = x_r + q_r
    z, r = sigma.value(p_z), sigma.value(p_r)
    p_h = x_h + r * q_h
    hh = phi.value(p_h)
    return z * h + (1.0 - z) * hh, np.concatenate([p_z, p_r, p_h], axis=-1)


def _step_reset_before(x, h, W, U, b, phi, sigma):
    U_z, U_r, U_h = np.split(U, 3, axis=-1)
    x_z, x_r, x_h = np.split(x @ W + b, 3, axis=-1)
    p_z = x_z + h @ U_z
    p_r = x_r + h @ U_r
    z, r = sigma.value(p_z), sigma.value(p_r)
    p_h = x_h + (r * h) @ U_h
    hh = phi.value(p_h)
    return z * h + (1.0 - z) * hh, np.concatenate([p_z, p_r, p_h], axis=-1)


def _back_reset_after(a, p, h, U, b, phi, sigma):
    """delta_t, gamma_t, the step's part of dL/dU and of a_{t-1}, of h = h_{t-1}."""
    p_z, p_r, p_h = np.split(p, 3, axis=-1)
    z, r, hh = sigma.value(p_z), sigma.value(p_r), phi.value(p_h)
    _, _, q_h = np.split(h @ U + b[1], 3, axis=-1)
    delta_z = a * (h - hh) * sigma.derivative(p_z)
    delta_h = a * (1.0 - z) * phi.derivative(p_h)
    delta_r = delta_h * q_h * sigma.derivative(p_r)
    delta = np.concatenate([delta_z, delta_r, delta_h], axis=-1)
    gamma = np.concatenate([delta_z, delta_r, r * delta_h], axis=-1)
    dU = h.T @ gamma
    return delta, gamma, dU, a * z + gamma @ U.T


def _back_reset_before(a, p, h, U, b, phi, sigma):
    p_z, p_r, p_h = np.split(p, 3, axis=-1)
    z, r, hh = sigma.value(p_z), sigma.value(p_r), phi.value(p_h)
    U_z, U_r, U_h = np.split(U, 3, axis=-1)
    delta_z = a * (h - hh) * sigma.derivative(p_z)
    delta_h = a * (1.0 - z) * phi.derivative(p_h)
    v = delta_h @ U_h.T  # dL/d(r * h_{t-1})
    delta_r = v * h * sigma.derivative(p_r)
    delta = np.concatenate([delta_z, delta_r, delta_h], axis=-1)
    dU = np.concatenate([h.T @ delta_z, h.T @ delta_r, (r * h).T @ delta_h], axis=-1)
    return delta, delta, dU, a * z + delta_z @ U_z.T + delta_r @ U_r.T + v * r
