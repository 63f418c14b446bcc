"""Backpropagation through time in an LSTM, as on paper: NumPy, float64, plain loops.

Read this file to learn the equations, or compare with it to test an implementation. The
plain RNN in `simple_rnn` comes first. Like it, this file shares no code with the rest of
the package.

Row vectors, as Keras computes. The pre-activation z_t holds those of the four gates side by
side, z_t = (z_i, z_f, z_g, z_o), in Keras' order. For t = 1 ... T,

    z_t = x_t W + h_{t-1} U + b
    i   = sigma(z_i)                    input gate
    f   = sigma(z_f)                    forget gate
    g   = phi(z_g)                      candidate
    o   = sigma(z_o)                    output gate
    c_t = f * c_{t-1} + i * g
    h_t = o * phi(c_t)                  what the layer shows

and backward, for t = T ... 1, with the cotangents e_t of h_t, and e^h and e^c of the
returned last states, so that a^h_T = e_T + e^h and a^c_T = e^c,

    u         = a^c_t + a^h_t * o * phi'(c_t)       both ways that c_t acts: on, and by h_t
    delta_i   = u * g * sigma'(z_i)
    delta_f   = u * c_{t-1} * sigma'(z_f)
    delta_g   = u * i * phi'(z_g)
    delta_o   = a^h_t * phi(c_t) * sigma'(z_o)
    delta_t   = (delta_i, delta_f, delta_g, delta_o)
    dL/dx_t   = delta_t W^T
    dL/dW     = sum_t x_t^T delta_t
    dL/dU     = sum_t h_{t-1}^T delta_t
    dL/db     = sum_t sum_batch delta_t
    a^h_{t-1} = e_{t-1} + delta_t U^T               e_0 = 0: a^h_0 = dL/dh_0
    a^c_{t-1} = u * f                               a^c_0 = dL/dc_0

A masked step does nothing, whatever x_t is:

    h_t = h_{t-1}      c_t = c_{t-1}      delta_t = 0
    a^h_{t-1} = e_{t-1} + a^h_t           a^c_{t-1} = a^c_t

    symbol      Keras name            shape       gradient
    x_t         inputs                (B, T, D)   d_inputs
    W           kernel                (D, 4 H)    d_kernel
    U           recurrent_kernel      (H, 4 H)    d_recurrent_kernel
    b           bias                  (4 H,)      d_bias
    h_0         initial_state[0]      (B, H)      d_initial_h
    c_0         initial_state[1]      (B, H)      d_initial_c
    phi         activation
    sigma       recurrent_activation
    z_t         pre-activation        (B, T, 4 H) delta
    h_t         hidden state, output  (B, T, H)   adjoint_h
    c_t         cell state            (B, T, H)   adjoint_c

with B batch, T timesteps, D features and H units. One thing differs from what a Keras layer
returns under a mask: before the first real step the layer's output is zero, h_t is h_0.

References: Hochreiter & Schmidhuber, "Long short-term memory", 1997. Gers, Schmidhuber,
Cummins, "Learning to forget: continual prediction with LSTM", 2000 (the forget gate).
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

_AXES = AXES | {"W": "features, 4 units", "U": "units, 4 units", "b": "4 units"}


class LSTMForward(NamedTuple):
    """Hidden states, cell states and pre-activations, (batch, timesteps, ...)."""

    h: Array
    c: Array
    z: Array


@dataclass(frozen=True, eq=False)
class LSTMGradients:
    """Gradients of an LSTM, each in the shape of what it belongs to."""

    d_inputs: Array
    d_kernel: Array
    d_recurrent_kernel: Array
    d_bias: Array
    d_initial_h: Array
    d_initial_c: Array
    adjoint_h: Array  # a^h_t, dL/dh_t in full
    adjoint_c: Array  # a^c_t, dL/dc_t through all but h_t
    delta: Array  # dL/dz_t


def lstm_forward(
    x: Array,
    W: Array,
    U: Array,
    b: Array | None = None,
    h_0: Array | None = None,
    c_0: Array | None = None,
    *,
    activation: str | tuple = "tanh",
    recurrent_activation: str | tuple = "sigmoid",
    mask: Array | None = None,
) -> LSTMForward:
    """The states of every step.

    None stands for a bias or a state of zeros, or for no mask; a mask is boolean, (batch,
    timesteps), and False at the steps to pass over. An activation is a name in
    `ACTIVATIONS` or a pair (value, derivative) of elementwise functions.

    Gates held open by a large bias make an integrator of inputs, c_t = c_{t-1} + x_t:

    >>> x, W, U = np.array([[[1.0], [2.0], [4.0]]]), np.eye(4)[2:3], np.zeros((1, 4))
    >>> b = np.array([99.0, 99.0, 0.0, 99.0])
    >>> lstm_forward(x, W, U, b, activation="linear").c.ravel().tolist()
    [1.0, 3.0, 7.0]
    """
    phi = _pair("activation", activation, ACTIVATIONS)
    sigma = _pair("recurrent_activation", recurrent_activation, ACTIVATIONS)
    x, U, W, b, h_0, c_0, mask = checked(
        _AXES, x=x, U=U, W=W, b=b, h_0=h_0, c_0=c_0, mask=mask
    )
    h, c, z = _states(*by_step(x, mask), W, U, b, h_0, c_0, phi, sigma)
    del h[0], c[0]
    return LSTMForward(_stacked(h), _stacked(c), _stacked(z))


def lstm_gradients(
    x: Array,
    W: Array,
    U: Array,
    b: Array | None = None,
    h_0: Array | None = None,
    c_0: Array | None = None,
    *,
    e: Array | None = None,
    e_h_T: Array | None = None,
    e_c_T: Array | None = None,
    activation: str | tuple = "tanh",
    recurrent_activation: str | tuple = "sigmoid",
    mask: Array | None = None,
) -> LSTMGradients:
    """Every gradient, from the cotangents of h_1 ... h_T and of the returned last states.

    `e` is (batch, timesteps, units), `e_h_T` and `e_c_T` are (batch, units), and None
    stands for zeros. The other arguments are those of `lstm_forward`.

    An integrator hands its adjoint on as it is; that is what the cell state is for:

    >>> x, W, U = np.array([[[1.0], [2.0], [4.0]]]), np.eye(4)[2:3], np.zeros((1, 4))
    >>> b = np.array([99.0, 99.0, 0.0, 99.0])
    >>> d = lstm_gradients(x, W, U, b, e_c_T=np.ones((1, 1)), activation="linear")
    >>> d.adjoint_c.ravel().tolist(), d.d_inputs.ravel().tolist()
    ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    >>> d.d_kernel.tolist(), d.d_initial_c.item()
    ([[0.0, 0.0, 7.0, 0.0]], 1.0)
    """
    phi = _pair("activation", activation, ACTIVATIONS)
    sigma = _pair("recurrent_activation", recurrent_activation, ACTIVATIONS)
    arrays = {"x": x, "U": U, "W": W, "b": b, "h_0": h_0, "c_0": c_0, "mask": mask}
    x, U, W, b, h_0, c_0, mask, e, e_h_T, e_c_T = checked(
        _AXES, **arrays, e=e, e_h_T=e_h_T, e_c_T=e_c_T
    )
    T, (x, m) = x.shape[1], by_step(x, mask)
    h, c, z = _states(x, m, W, U, b, h_0, c_0, phi, sigma)
    e = {0: np.zeros_like(h_0), **_by_step(e)}
    dx, dW, dU, db = {}, np.zeros_like(W), np.zeros_like(U), np.zeros_like(b)
    a_h, a_c, delta = {T: e[T] + e_h_T}, {T: e_c_T}, {}
    for t in range(T, 0, -1):
        z_i, z_f, z_g, z_o = np.split(z[t], 4, axis=-1)
        i, f, o = sigma.value(z_i), sigma.value(z_f), sigma.value(z_o)
        g = phi.value(z_g)
        u = a_c[t] + a_h[t] * o * phi.derivative(c[t])
        delta_i = u * g * sigma.derivative(z_i)
        delta_f = u * c[t - 1] * sigma.derivative(z_f)
        delta_g = u * i * phi.derivative(z_g)
        delta_o = a_h[t] * phi.value(c[t]) * sigma.derivative(z_o)
        delta[t] = np.concatenate([delta_i, delta_f, delta_g, delta_o], axis=-1)
        delta[t] = np.where(m[t], delta[t], 0.0)
        dx[t] = delta[t] @ W.T
        dW += x[t].T @ delta[t]
        dU += h[t - 1].T @ delta[t]
        db += delta[t].sum(axis=0)
        a_h[t - 1] = e[t - 1] + np.where(m[t], delta[t] @ U.T, a_h[t])
        a_c[t - 1] = np.where(m[t], u * f, a_c[t])
    dh_0, dc_0 = a_h.pop(0), a_c.pop(0)
    by_t = _stacked(a_h), _stacked(a_c), _stacked(delta)
    return LSTMGradients(_stacked(dx), dW, dU, db, dh_0, dc_0, *by_t)


def _states(
    x: Steps,
    m: Steps,
    W: Array,
    U: Array,
    b: Array,
    h_0: Array,
    c_0: Array,
    phi: Pair,
    sigma: Pair,
) -> tuple[Steps, Steps, Steps]:
    h, c, z = {0: h_0}, {0: c_0}, {}
    for t in sorted(x):
        z[t] = x[t] @ W + h[t - 1] @ U + b
        z_i, z_f, z_g, z_o = np.split(z[t], 4, axis=-1)
        i, f, o = sigma.value(z_i), sigma.value(z_f), sigma.value(z_o)
        g = phi.value(z_g)
        c_t = f * c[t - 1] + i * g
        h_t = o * phi.value(c_t)
        c[t] = np.where(m[t], c_t, c[t - 1])
        h[t] = np.where(m[t], h_t, h[t - 1])
    return h, c, z
