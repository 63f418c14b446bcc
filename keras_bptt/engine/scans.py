"""Two scans over time, each with a written-out gradient, each the other's derivative.

    states        h_t = f(z_t + (r * h_{t-1}) U)
    adjoint_scan  v_t = e_t + S * v' + P * L(Q * v'),  v' = v_{t+1} (reverse) or v_{t-1}
                  S, P, Q of the link between the two

The backward pass of `states` is one `adjoint_scan`; the backward pass of an `adjoint_scan`
is another one over the same links, in the other direction, with P and Q exchanged and L
transposed. So the pair is closed under differentiation: derivatives of every order are
scans, and TensorFlow never differentiates a loop. All tensors are time-major,
(timesteps, batch, units). Link t joins step t and the one before it. The first, to h_0, is
no part of `adjoint_scan`: it is there so that there are as many links as steps, and never
none. `docs/bptt.md` derives the equations.
"""

import dataclasses

import tensorflow as tf

from keras_bptt.cells.activations import Activation
from keras_bptt.runtime.execution import run
from keras_bptt.runtime.explicit import explicit, vjp
from keras_bptt.engine.loops import at, scan
from keras_bptt.runtime.tensors import (
    one,
    shifted,
    size_of,
    sum_of_products,
    where,
    widened,
)


@dataclasses.dataclass(frozen=True)
class States:
    """Static options of `states`."""

    activation: Activation
    unroll: bool = False
    adjoint_clipnorm: float | None = None


def states_step(options, U, r):
    """One step of `states`, as `scan` takes it."""

    def step(h, z, m):
        new = options.activation.function(z + tf.matmul(h if r is None else r * h, U))
        h = new if m is None else tf.where(m, new, h)
        return h, h

    return step


def states_loop(options, z, U, h_0, mask, r):
    """The values of `states`."""
    step = states_step(options, U, r)
    steps = size_of(z, 0)
    return scan(step, h_0, lambda t: at(t, z, mask), steps, unroll=options.unroll)[1]


def states(options: States, z, U, h_0, mask=None, r=None, factors=None):
    """h_t = f(z_t + (r * h_{t-1}) U) where m_t, else h_{t-1}: the nonlinear forward scan.

    Args:
        options: activation f, whether to unroll, and the norm to which a step's adjoint is
            clipped, or None.
        z: (timesteps, batch, units), the input's share of the pre-activation.
        U: (units, units), the recurrent kernel.
        h_0: (batch, units), the initial state.
        mask: bool (timesteps, batch, 1), False where the state is to stay, or None.
        r: (batch, units), the recurrent dropout factor, or None. It has no gradient.
        factors: (timesteps, batch, 1), what a gradient is multiplied by where it passes
            from step t to h_{t-1}, 1 where that is h_0; or None. They have no gradient, and
            truncate that of h: it is then not the derivative of the values.

    Returns:
        h (timesteps, batch, units). Its gradient, with cotangent e, is
        a = adjoint_scan(e, S=1-m, P=r, Q=m f', M=U^T), delta = m f'(z) a,
        dz = delta, dU = sum_t (r h_{t-1})^T delta_t, dh_0 = (1-m_1) a_1 + r (delta_1 U^T);
        with factors P = r factors_{t+1}, clipped e, S and P times the scale of a_t.
    """

    def forward(*args):
        return (run(states_loop, options, *args, mask, r),), ()

    def backward(args, outputs, residuals, cotangents):
        known = mask, r, factors
        return _states_gradient(options, *args, *known, *outputs, *cotangents)

    return explicit(forward, backward)(z, U, h_0)[0]


def previous_states(h, h_0, r=None):
    """r h_0, r h_1, ... r h_{T-1}: what each step multiplies by U."""
    first = tf.range(size_of(h, 0))[:, None, None] == 0
    before = tf.where(first, h_0, tf.roll(h, 1, 0))
    return before if r is None else r * before


def _states_gradient(options, z, U, h_0, mask, r, factors, h, e):
    f, most = options.activation, options.adjoint_clipnorm
    if most is not None:
        # What clips the gradient of h is a constant in the derivatives of this gradient,
        # those of h are exact.
        exact = dataclasses.replace(options, adjoint_clipnorm=None)
        h = states(exact, z, U, h_0, mask, r, factors)
    zero = tf.zeros_like(z)
    real = tf.ones_like(z, tf.bool)
    real = real if mask is None else mask & real
    before = previous_states(h, h_0, r)
    if factors is not None:
        # The same numbers, whose gradient the factors truncate.
        number = tf.stop_gradient(before)
        before = number + factors * (before - number)
    # The pre-activation at a masked step may be NaN (padding); it must not reach f'.
    pre = tf.where(real, z + tf.tensordot(before, U, 1), zero)

    S = tf.cast(~real, z.dtype)
    P = tf.ones_like(S) if r is None else r + tf.zeros_like(S)
    P = P if factors is None else factors * P
    U_T = tf.transpose(U)
    if f.mixes:
        Q = tf.cast(real, z.dtype)
        link, points = AdjointScan(True, f, unroll=options.unroll), [pre]
    else:
        Q = slope = tf.where(real, f.slope(pre, h), zero)
        link, points = AdjointScan(True, unroll=options.unroll), []
    if most is not None:
        # Cut off: else TensorFlow differentiates the loop that makes it.
        s = tf.stop_gradient(
            run(clip_loop, (link, most), e, S, P, Q, U_T, real, *points)
        )
        e, S, P = s * e, shifted(s, 1) * S, shifted(s, 1) * P
    a = adjoint_scan(link, e, S, P, Q, U_T, *points)
    delta = f.vjp(pre, tf.where(real, a, zero)) if f.mixes else slope * a
    back, a_1 = tf.matmul(one(delta, 0), U_T), one(a, 0)
    d_h_0 = where(~real[0], a_1) + (back if r is None else r * back)
    d_U = tf.cast(sum_of_products(before, delta), U.dtype)
    return delta, d_U, d_h_0


@dataclasses.dataclass(frozen=True)
class AdjointScan:
    """Static options of `adjoint_scan`; what L is.

    Attributes:
        reverse: v' = v_{t+1}, from the last step to the first.
        activation: None for L(u) = u M, or a mixing activation f. With it
            L(u) = (J_f(z)^T u) M, or its transpose L(u) = J_f(z) (u M).
        transposed: which of the two.
        unroll: write every step into the graph.
    """

    reverse: bool
    activation: Activation | None = None
    transposed: bool = False
    unroll: bool = False

    def transpose(self):
        return dataclasses.replace(
            self, reverse=not self.reverse, transposed=not self.transposed
        )

    def apply(self, u, M, z=None):
        """L(u), at one link or at all."""
        if self.activation is None:
            return tf.tensordot(u, M, 1)
        if self.transposed:
            return self.activation.jvp(z, tf.tensordot(u, M, 1))
        return tf.tensordot(self.activation.vjp(z, u), M, 1)


def adjoint_loop(options, e, S, P, Q, M, z=None):
    """The loop of `adjoint_scan`, without a gradient of its own."""

    def through(v, S, P, Q, z):
        return S * v + P * options.apply(Q * v, M, z)

    def back(arrived, e, *link):
        v = e + arrived
        return through(v, *link), v

    def forth(v, e, *link):
        v = e + through(v, *link)
        return v, v

    return scan(
        back if options.reverse else forth,
        tf.zeros_like(e[0]),
        lambda t: at(t, e, S, P, Q, z),
        size_of(e, 0),
        reverse=options.reverse,
        unroll=options.unroll,
    )[1]


def clip_loop(options, e, S, P, Q, M, real, z=None):
    """The scales s_t of the scan v_t = s_t (e_t + S v' + P L(Q v')), from the last step."""
    link, most = options

    def step(arrived, e, S, P, Q, real, z):
        v = e + arrived
        s = tf.where(real, clip_scale(v, most), tf.ones_like(v))
        v = s * v
        return S * v + P * link.apply(Q * v, M, z), s

    return scan(
        step,
        tf.zeros_like(e[0]),
        lambda t: at(t, e, S, P, Q, real, z),
        size_of(e, 0),
        reverse=True,
        unroll=link.unroll,
    )[1]


def clip_scale(a, most):
    """min(1, most / |a|), with |a| over the units of an example."""
    # By its largest number, whose square would not overflow.
    numbers = widened(a)
    largest = tf.reduce_max(tf.abs(numbers), -1, keepdims=True)
    ratio = tf.math.divide_no_nan(numbers, largest)
    norm = largest * tf.norm(ratio, axis=-1, keepdims=True)
    return tf.cast(tf.where(norm > most, most / norm, tf.ones_like(norm)), a.dtype)


def adjoint_scan(options: AdjointScan, e, S, P, Q, M, *z):
    """v_t = e_t + S v' + P L(Q v'): the linear scan of adjoints, of either direction.

    Args:
        options: the direction and L.
        e: (timesteps, batch, units), what enters at each step.
        S, P, Q: (timesteps, batch, units), the coefficients of the links.
        M: (units, units), the matrix of L.
        *z: (timesteps, batch, units), where a mixing activation is linearised.

    Returns:
        v (timesteps, batch, units). With cotangent c, w = adjoint_scan of c in the other
        direction with P and Q exchanged and L transposed is its gradient by e; those of S,
        P, Q, M, z are products of v at a link's source and w at its end.
    """

    def forward(*args):
        return (run(adjoint_loop, options, *args),), ()

    def backward(args, outputs, residuals, cotangents):
        return _adjoint_gradient(options, *outputs, *cotangents, *args)

    return explicit(forward, backward)(e, S, P, Q, M, *z)[0]


def _adjoint_gradient(options, v, c, e, S, P, Q, M, *z):
    transposed, M_T = options.transpose(), tf.transpose(M)
    w = adjoint_scan(transposed, c, S, Q, P, M_T, *z)
    end, source = (shifted(w, 1), v) if options.reverse else (w, shifted(v, 1))
    u, d_through = Q * source, P * end
    through = options.apply(u, M, *z)
    back = transposed.apply(d_through, M_T, *z)
    if z:
        d_L = vjp(lambda *args: options.apply(u, *args), (M, *z), (d_through,))
    else:
        d_L = [tf.cast(sum_of_products(u, d_through), M.dtype)]
    return w, end * source, end * through, source * back, *d_L
