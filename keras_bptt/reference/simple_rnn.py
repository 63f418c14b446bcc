"""Backpropagation through time as on paper: NumPy, float64, plain loops.

Read this file to learn the equations, or compare with it to test an implementation. It
shares no code with the rest of the package, and it is too slow to train with.

Row vectors, as Keras computes: an example is a row. For t = 1 ... T,

    z_t = x_t W + h_{t-1} U + b
    h_t = f(z_t)                        f elementwise
    o_t = g(h_t V + c)                  g elementwise, or a softmax over the units
    L   = (1/T) sum_t l(y_t, o_t)       averaged over time, summed over batch and units

and backward, for t = T ... 1, with delta_{T+1} = 0,

    q_t     = dL/do_t * g'(h_t V + c)   of a softmax o_t * (dL/do_t - <dL/do_t, o_t>)
    e_t     = q_t V^T                   dL/dh_t through o_t alone: the cotangent
    a_t     = e_t + delta_{t+1} U^T     dL/dh_t in full: the adjoint
    delta_t = a_t * f'(z_t)             dL/dz_t

    symbol  Keras name        cheat sheet  shape      gradient
    x_t     inputs            x_t          (B, T, D)  d_inputs
    W       kernel            W_hx^T       (D, H)     d_kernel
    U       recurrent_kernel  W_hh^T       (H, H)     d_recurrent_kernel
    b       bias              b_h          (H,)       d_bias
    h_0     initial_state     h_0          (B, H)     d_initial_state
    V       output_kernel     W_oh^T       (H, O)     d_output_kernel
    c       output_bias       b_o          (O,)       d_output_bias
    z_t     pre-activation    inside f     (B, T, H)  delta
    h_t     hidden state      h_t          (B, T, H)  adjoint
    o_t     outputs           o_t          (B, T, O)  d_outputs

with B batch, T timesteps, D features, H units and O outputs: (batch, timesteps, ...).
The cheat sheet writes columns, h_t = f(W_hh h_{t-1} + W_hx x_t + b_h): its weights, and
their gradients, are the transposes of those of Keras.

References: Werbos, "Backpropagation through time: what it does and how to do it", 1990.
Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks",
arXiv:1211.5063. Zhang et al., "Dive into Deep Learning", section "Backpropagation
Through Time". A cheat sheet on RNNs and BPTT, whose equations these are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
Steps = dict[int, Array]  # step number, counted as on paper -> (batch, ...)


class Pair(NamedTuple):
    """A function and its derivative: f(z), f'(z), or l(y, o), dl/do(y, o)."""

    value: Callable[..., Any]
    derivative: Callable[..., Any]


def _sigmoid(z: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * z))


def _no_slope(s: Array) -> Array:
    raise TypeError("A softmax mixes the units: it has a Jacobian in place of a slope.")


def _softmax(s: Array) -> Array:
    powers = np.exp(s - np.max(s, axis=-1, keepdims=True))
    return powers / np.sum(powers, axis=-1, keepdims=True)


# f' is a function of the pre-activation z. At its kink relu has slope 0, as TensorFlow.
ACTIVATIONS = {
    "linear": Pair(lambda z: z, np.ones_like),
    "tanh": Pair(np.tanh, lambda z: 1.0 - np.tanh(z) ** 2),
    "sigmoid": Pair(_sigmoid, lambda z: _sigmoid(z) * _sigmoid(-z)),
    "relu": Pair(lambda z: np.maximum(z, 0.0), lambda z: np.where(z > 0, 1.0, 0.0)),
    "softplus": Pair(lambda z: np.logaddexp(0.0, z), _sigmoid),
    "elu": Pair(
        lambda z: np.where(z > 0, z, np.expm1(np.minimum(z, 0.0))),
        lambda z: np.exp(np.minimum(z, 0.0)),
    ),
}
# A softmax mixes the units: it has a Jacobian in place of a slope. For g alone.
OUTPUT_ACTIVATIONS = ACTIVATIONS | {"softmax": Pair(_softmax, _no_slope)}
# Of one output unit; l(y_t, o_t) is the sum over units and batch. The outputs that go
# into binary_crossentropy are logits: g = "linear"; those into categorical_crossentropy
# are probabilities: g = "softmax". The inner product makes dL/do_t = y_t / T whatever o_t
# is: with it y are any cotangents of the outputs, times T.
LOSSES = {
    "squared_error": Pair(lambda y, o: 0.5 * (o - y) ** 2, lambda y, o: o - y),
    "binary_crossentropy": Pair(
        lambda y, o: np.logaddexp(0.0, o) - y * o, lambda y, o: _sigmoid(o) - y
    ),
    "categorical_crossentropy": Pair(lambda y, o: -y * np.log(o), lambda y, o: -y / o),
    "inner_product": Pair(lambda y, o: y * o, lambda y, o: y),
}


class Network(NamedTuple):
    """The weights, the initial state, f, g and l.

    The functions are names (`ACTIVATIONS`, `OUTPUT_ACTIVATIONS`, `LOSSES`) or pairs (value,
    derivative): `(np.sin, np.cos)`, or `(l, dl_do)`, both functions of y and o. f, and g
    but for "softmax", must be elementwise: any other function that mixes units has no
    slope, and what comes out here would be wrong.
    """

    W: Array
    U: Array
    b: Array
    V: Array
    c: Array
    h_0: Array
    f: str | tuple = "tanh"
    g: str | tuple = "linear"
    loss: str | tuple = "squared_error"


class Forward(NamedTuple):
    """Hidden states, pre-activations and outputs (batch, timesteps, ...), and L."""

    h: Array
    z: Array
    o: Array
    loss: float


@dataclass(frozen=True, eq=False)
class HiddenGradients:
    """Gradients of the hidden layer, each in the shape of what it belongs to."""

    d_inputs: Array
    d_kernel: Array
    d_recurrent_kernel: Array
    d_bias: Array
    d_initial_state: Array
    adjoint: Array  # a_t, dL/dh_t in full
    delta: Array  # dL/dz_t


@dataclass(frozen=True, eq=False)
class Gradients(HiddenGradients):
    """Gradients of the whole network: the hidden layer's, and those above it."""

    d_output_kernel: Array
    d_output_bias: Array
    d_losses: float  # dL/dl_t, the same for every t
    d_outputs: Array  # dL/do_t
    cotangents: Array  # e_t


def _by_step(array: Array) -> Steps:
    """(batch, timesteps, ...) by step number 1 ... T; any other number raises."""
    return {t: array[:, t - 1] for t in range(1, array.shape[1] + 1)}


def _stacked(steps: Steps) -> Array:
    """(batch, timesteps, ...), of the steps 1 ... T."""
    return np.stack([steps[t] for t in sorted(steps)], axis=1)


def _hidden_states(
    x: Steps, W: Array, U: Array, b: Array, h_0: Array, f: Pair
) -> tuple[Steps, Steps]:
    h, z = {0: h_0}, {}
    for t in sorted(x):
        z[t] = x[t] @ W + h[t - 1] @ U + b
        h[t] = f.value(z[t])
    return h, z


def forward(x: Array, y: Array, network: Network) -> Forward:
    """The network and its loss, for inputs x and targets y."""
    W, U, b, V, c, h_0, *functions = network
    f, g, loss = _functions(*functions)
    x, W, U, b, h_0, V, c, y = _checked(x=x, W=W, U=U, b=b, h_0=h_0, V=V, c=c, y=y)
    T, y = x.shape[1], _by_step(y)
    h, z = _hidden_states(_by_step(x), W, U, b, h_0, f)
    del h[0]
    o = {t: g.value(h[t] @ V + c) for t in h}
    L = sum(float(np.sum(loss.value(y[t], o[t]))) for t in o) / T
    return Forward(_stacked(h), _stacked(z), _stacked(o), L)


def gradients(x: Array, y: Array, network: Network) -> Gradients:
    """Every gradient of the cheat sheet.

    >>> one, x, y = np.ones((1, 1)), np.ones((1, 2, 1)), np.zeros((1, 2, 1))
    >>> network = Network(one, 2 * one, one[0], one, one[0], 0 * one, f="linear")
    >>> run, d = forward(x, y, network), gradients(x, y, network)
    >>> run.h.ravel().tolist(), run.o.ravel().tolist(), run.loss
    ([2.0, 6.0], [3.0, 7.0], 14.5)
    >>> d.cotangents.ravel().tolist(), d.adjoint.ravel().tolist()
    ([1.5, 3.5], [8.5, 3.5])
    >>> d.d_recurrent_kernel.item(), d.d_output_kernel.item()
    (7.0, 24.0)
    """
    W, U, b, V, c, h_0, *functions = network
    f, g, loss = _functions(*functions)
    x, W, U, b, h_0, V, c, y = _checked(x=x, W=W, U=U, b=b, h_0=h_0, V=V, c=c, y=y)
    T, y = x.shape[1], _by_step(y)
    h, _ = _hidden_states(_by_step(x), W, U, b, h_0, f)
    d_l = 1.0 / T  # dL/dl_t
    d_o, e, dV, dc = {}, {}, np.zeros_like(V), np.zeros_like(c)
    for t in range(1, T + 1):
        s = h[t] @ V + c
        o = g.value(s)
        d_o[t] = d_l * loss.derivative(y[t], o)  # dL/do_t
        if g.value is _softmax:
            q = o * (d_o[t] - np.sum(d_o[t] * o, axis=-1, keepdims=True))
        else:
            q = d_o[t] * g.derivative(s)
        dV += h[t].T @ q
        dc += q.sum(axis=0)
        e[t] = q @ V.T
    e = _stacked(e)
    hidden = hidden_gradients(x, W, U, b, h_0, f, e)
    return Gradients(
        **vars(hidden),
        d_output_kernel=dV,
        d_output_bias=dc,
        d_losses=d_l,
        d_outputs=_stacked(d_o),
        cotangents=e,
    )


def hidden_gradients(
    x: Array, W: Array, U: Array, b: Array, h_0: Array, f: str | tuple, e: Array
) -> HiddenGradients:
    """The recursion: the full adjoint times the *immediate* derivative of each step.

    `e` is any cotangent of h_1 ... h_T, (batch, timesteps, units). Whatever computes a
    loss from the hidden states, e is all of it that matters here.

    >>> one, x = np.ones((1, 1)), np.zeros((1, 3, 1))
    >>> e = np.array([[[0.0], [0.0], [1.0]]])  # L = h_3
    >>> d = hidden_gradients(x, one, 0.5 * one, one[0], 4 * one, "linear", e)
    >>> d.adjoint.ravel().tolist(), d.d_initial_state.item()
    ([0.25, 0.5, 1.0], 0.125)
    """
    f = _pair("f", f, ACTIVATIONS)
    x, W, U, b, h_0, e = _checked(x=x, W=W, U=U, b=b, h_0=h_0, e=e)
    T, x, e = x.shape[1], _by_step(x), _by_step(e)
    h, z = _hidden_states(x, W, U, b, h_0, f)
    dx, dW, dU, db = {}, np.zeros_like(W), np.zeros_like(U), np.zeros_like(b)
    a, delta = {}, {T + 1: np.zeros_like(h_0)}  # nothing follows h_T, so a_T = e_T
    for t in range(T, 0, -1):
        a[t] = e[t] + delta[t + 1] @ U.T
        delta[t] = a[t] * f.derivative(z[t])
        dx[t] = delta[t] @ W.T
        dW += x[t].T @ delta[t]
        dU += h[t - 1].T @ delta[t]
        db += delta[t].sum(axis=0)
    dh_0 = delta[1] @ U.T
    del delta[T + 1]
    return HiddenGradients(_stacked(dx), dW, dU, db, dh_0, _stacked(a), _stacked(delta))


def nested_product_gradients(
    x: Array, W: Array, U: Array, b: Array, h_0: Array, f: str | tuple, e: Array
) -> HiddenGradients:
    """The nested product: each cotangent times the *total* derivative of its state.

    Every path from h_t back to an earlier step i is walked for itself, T (T + 1) / 2 of
    them, along dh_t/dh_i = J_{i+1} ... J_t with J_j = dh_j/dh_{j-1} = U diag(f'(z_j)).
    The same numbers as `hidden_gradients`, at a far higher price.
    """
    f = _pair("f", f, ACTIVATIONS)
    x, W, U, b, h_0, e = _checked(x=x, W=W, U=U, b=b, h_0=h_0, e=e)
    T, x, e = x.shape[1], _by_step(x), _by_step(e)
    h, z = _hidden_states(x, W, U, b, h_0, f)
    slope = {t: f.derivative(z[t]) for t in z}
    J = {t: U * slope[t][:, np.newaxis, :] for t in z}  # one matrix per example
    dx = {t: np.zeros_like(x[t]) for t in x}
    a, delta = ({t: np.zeros_like(h_0) for t in x} for _ in range(2))
    dW, dU, db, dh_0 = (np.zeros_like(array) for array in (W, U, b, h_0))
    for t in range(1, T + 1):
        for i in range(1, t + 1):
            path = np.broadcast_to(np.eye(len(U)), J[t].shape)  # dh_t/dh_i
            for j in range(i + 1, t + 1):
                path = path @ J[j]
            a_ti = np.einsum("bn,bmn->bm", e[t], path)  # the share of e_t in a_i
            delta_ti = a_ti * slope[i]
            dW += x[i].T @ delta_ti
            dU += h[i - 1].T @ delta_ti
            db += delta_ti.sum(axis=0)
            dx[i] += delta_ti @ W.T
            dh_0 += delta_ti @ U.T if i == 1 else 0.0
            a[i] += a_ti
            delta[i] += delta_ti
    return HiddenGradients(_stacked(dx), dW, dU, db, dh_0, _stacked(a), _stacked(delta))


def literal_reading_gradients(
    x: Array, W: Array, U: Array, b: Array, h_0: Array, f: str | tuple, e: Array
) -> HiddenGradients:
    """WRONG, kept to show the trap: the full adjoint times the *total* derivative.

    So reads sum_t (dL/dh_t)(dh_t/dU) where dL/dh_t is defined by the recursion and
    dh_t/dU is expanded over earlier steps: what flows through h_{t+1} is in both. With
    T = 2, f linear, L = h_2, the gradient of U is h_1 + U h_0 = 2.5 + 0.5 * 3:

    >>> one, x, e = np.ones((1, 1)), np.array([[[1], [0]]]), np.array([[[0], [1]]])
    >>> problem = x, one, 0.5 * one, 0 * one[0], 3 * one, "linear", e
    >>> hidden_gradients(*problem).d_recurrent_kernel.item()
    4.0
    >>> literal_reading_gradients(*problem).d_recurrent_kernel.item()  # h_1 + 2 U h_0
    5.5
    """
    a = hidden_gradients(x, W, U, b, h_0, f, e).adjoint
    return nested_product_gradients(x, W, U, b, h_0, f, a)


def central_differences(
    function: Callable[[Array], float], array: Array, epsilon: float = 1e-5
) -> Array:
    """The gradient of a scalar function, from two calls per entry of `array`.

    The error is about epsilon^2 |L'''| / 6 from the curvature and 1e-16 |L| / epsilon
    from rounding: 1e-10 at the default, for numbers near 1. No kink may lie within
    epsilon of `array`.

    >>> central_differences(lambda w: np.sum(w**2), np.array([1.0, -3.0])).round(9)
    array([ 2., -6.])
    """
    if not epsilon > 0:
        raise ValueError(f"`epsilon` must be positive. Received: epsilon={epsilon}.")
    array = np.asarray(array, dtype=np.float64)
    gradient = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        step = np.zeros_like(array)
        step[index] = epsilon
        rise = function(array + step) - function(array - step)
        if np.ndim(rise):
            raise ValueError(
                f"`function` must return a scalar. Received: shape {np.shape(rise)}."
            )
        gradient[index] = rise / (2.0 * epsilon)
    return gradient


_AXES = {
    "x": "batch timesteps features",
    "W": "features units",
    "U": "units units",
    "b": "units",
    "h_0": "batch units",
    "V": "units outputs",
    "c": "outputs",
    "y": "batch timesteps outputs",
    "e": "batch timesteps units",
    "mask": "batch timesteps",
    "recurrent_dropout": "batch units",
    "factors": "batch timesteps",
}


def _checked(**arrays: Array) -> list[Array]:
    """The arrays in float64; the first one to name an axis decides its size."""
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        axes, shape = _AXES[name].split(), np.shape(array)
        if len(axes) != len(shape) or any(
            sizes.setdefault(axis, size) != size
            for axis, size in zip(axes, shape, strict=True)
        ):
            allowed = ", ".join(f"{axis}={sizes.get(axis, 'any')}" for axis in axes)
            raise ValueError(
                f"`{name}` must have shape ({allowed}). Received: shape {shape}."
            )
    if sizes["timesteps"] == 0:
        raise ValueError("`x` must have one time step or more. Received: timesteps=0.")
    return [np.asarray(array, dtype=np.float64) for array in arrays.values()]


def _functions(*names: str | tuple) -> list[Pair]:
    """f, g and l of a network."""
    tables = ACTIVATIONS, OUTPUT_ACTIVATIONS, LOSSES
    pairs = list(map(_pair, ("f", "g", "loss"), names, tables))
    _, g, loss = names
    if loss == "categorical_crossentropy" and g in set(ACTIVATIONS) - {"sigmoid"}:
        raise ValueError(
            "`loss` 'categorical_crossentropy' is of probabilities: `g` must be 'softmax', "
            f"'sigmoid' or a pair of functions. Received: g={g!r}."
        )
    return pairs


def _pair(name: str, choice: str | tuple, table: dict[str, Pair]) -> Pair:
    if isinstance(choice, str) and choice in table:
        return table[choice]
    if isinstance(choice, tuple) and len(choice) == 2 and all(map(callable, choice)):
        return Pair(*choice)
    raise ValueError(
        f"`{name}` must be one of {', '.join(table)}, or a pair of functions (value, "
        f"derivative). Received: {name}={choice!r}."
    )
