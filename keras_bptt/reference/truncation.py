"""Truncated backpropagation through time as its definition reads: path by path.

The brute force that a fast implementation is compared with. Like `reference.py` it is
NumPy, float64 and plain loops, and shares no code with what it judges.

The real steps of an example are those that its mask lets through, all without one. They
are counted s = 1 ... N, so that padding of any kind counts for nothing. With r the factor
of recurrent dropout,

    h_t = f(x_t W + (r h_{t-1}) U + b)      at a real step
    h_t = h_{t-1}                           at a masked step, whatever x_t is

A path leads from the loss of a step, the cotangent e_t, back from state to state. Time is
cut into blocks of `stride` real steps, from the end. Step s lies in the block that ends at

    E(s) = N - stride floor((N - s) / stride)

and of the paths of its loss those are kept that end in

    delta_j = dL/dz_j   with max(1, E(s) - steps + 1) <= j <= s
    h_0                 where E(s) <= steps

that is, the walk ends at step E(s) - steps + 1, or else at h_0. A cotangent at a masked
step belongs to the last real step before it; to h_0 where there is none.

Every link that a path leads along multiplies it, with factor_t = 1 but for randomized
truncation and for the first real step:

    a_t     -> delta_t = a_t * f'(z_t)                at a real step
    delta_t -> a_{t-1} = factor_t r (delta_t U^T)
    a_t     -> a_{t-1} = a_t                          at a masked step

References: Williams & Peng, "An efficient gradient-based algorithm for on-line training of
recurrent network trajectories", 1990. Tallec & Ollivier, "Unbiasing truncated
backpropagation through time", arXiv:1705.08209. Graves, "Generating sequences with
recurrent neural networks", arXiv:1308.0850 (clipping inside the recursion).
"""

import numbers
from typing import NamedTuple

import numpy as np

from keras_bptt.reference.simple_rnn import (
    ACTIVATIONS,
    Array,
    HiddenGradients,
    _by_step,
    _checked,
    _pair,
)


def truncated_gradients(
    x: Array,
    W: Array,
    U: Array,
    b: Array,
    h_0: Array,
    f: str | tuple,
    e: Array,
    *,
    steps: int | None,
    stride: int | None = None,
    mask: Array | None = None,
    recurrent_dropout: Array | None = None,
    factors: Array | None = None,
) -> HiddenGradients:
    """The sums over the kept paths, each walked for itself.

    `e` is any cotangent of h_1 ... h_T, (batch, timesteps, units), of the states as the
    mask leaves them; that of a returned state adds to e_T. `steps=None` keeps all paths,
    `stride=None` means `steps`. `mask` is boolean (batch, timesteps), `recurrent_dropout`
    (batch, units). `factors` (batch, timesteps) has at t the factor of the link from the
    real step before t into t; where t is masked or the first real step it is not read.

    `adjoint` is the sum over the kept paths that touch h_t, those that only pass through a
    masked step included. It is dL/dh_t in full where all are kept.

    >>> one, x = np.ones((1, 1)), np.zeros((1, 4, 1))
    >>> e = np.array([[[0.0], [1.0], [0.0], [1.0]]])  # L = h_2 + h_4
    >>> problem = x, one, 0.5 * one, one[0], 4 * one, "linear", e
    >>> truncated_gradients(*problem, steps=2).delta.ravel().tolist()
    [0.5, 1.0, 0.5, 1.0]
    >>> d = truncated_gradients(*problem, steps=3, stride=1)
    >>> d.delta.ravel().tolist(), d.d_initial_state.item()
    ([0.5, 1.25, 0.5, 1.0], 0.25)
    """
    problem = _Problem(x, W, U, b, h_0, f, e, mask, recurrent_dropout, factors)
    d, rows = _rows(problem, steps, stride)
    for row in rows:
        for loss in sorted(row.e):
            first = row.block_end(row.count[loss]) - row.steps + 1
            a = row.e[loss]
            for t in range(loss, 0, -1):
                a = row.back(t, a)
                if row.mask[t] and row.count[t] == first > 1:
                    break
            else:
                row.dh_0 += a
    return d


def clipped_gradients(
    x: Array,
    W: Array,
    U: Array,
    b: Array,
    h_0: Array,
    f: str | tuple,
    e: Array,
    *,
    adjoint_clipnorm: float | None = None,
    adjoint_max_growth: float | None = None,
    steps: int | None,
    stride: int | None = None,
    mask: Array | None = None,
    recurrent_dropout: Array | None = None,
    factors: Array | None = None,
) -> HiddenGradients:
    """The same with every adjoint clipped to a norm, before delta and before it recurs.

    Clipping is not linear in e, so a path has no share of its own: what is clipped is the
    sum over the losses of a block, a recursion over the block's window. The windows of an
    example then add up. At a real step of a window,

        a_t <- a_t min(1, r_t / |a_t|)                 |a_t| over the units of an example

    with a limit r_t of one of two kinds, or the smaller of both,

        r_t = adjoint_clipnorm
        r_t = adjoint_max_growth sum over s >= t of |e_s|

    The sum is over the real steps s of the block, those whose losses the window is for. To
    e_s belong the cotangents at s and at the masked steps that follow it: |e_s| is the norm
    of their sum. A cotangent before the first real step is one of h_0, and never counts.

    A masked step and h_0 are no steps, and what reaches them is not clipped. `adjoint` is
    the sum of the windows' clipped adjoints. Where `steps` >= N there is one window,
    whatever `stride` is: padding must not make several of it.

    >>> one, x = np.ones((1, 1)), np.zeros((1, 3, 1))
    >>> problem = x, one, 4 * one, one[0], one, "linear", np.array([[[0.0], [1.0], [0.5]]])
    >>> d = clipped_gradients(*problem, steps=None, adjoint_clipnorm=2.0)
    >>> d.adjoint.ravel().tolist(), d.d_initial_state.item()
    ([2.0, 2.0, 0.5], 8.0)
    >>> d = clipped_gradients(*problem, steps=None, adjoint_max_growth=2.0)
    >>> d.adjoint.ravel().tolist(), d.d_initial_state.item()
    ([3.0, 3.0, 0.5], 12.0)
    """
    _check_limits(adjoint_clipnorm, adjoint_max_growth)
    problem = _Problem(x, W, U, b, h_0, f, e, mask, recurrent_dropout, factors)
    d, rows = _rows(problem, steps, stride)
    for row in rows:
        end = {t: row.block_end(row.count[t]) for t in row.e}  # 0 before the first step
        for block in sorted(set(end.values())):
            first = block - row.steps + 1
            a = np.zeros_like(row.dh_0)
            e_s = np.zeros_like(row.dh_0)  # of the real step that is to come
            sent = 0.0  # the sum of |e_s|
            for t in sorted(row.e, reverse=True):
                if row.count[t] > block:
                    continue
                if end[t] == block:
                    a = a + row.e[t]
                    e_s = e_s + row.e[t]
                if row.mask[t]:
                    sent = sent + np.linalg.norm(e_s)
                    e_s = np.zeros_like(e_s)
                    a = _clipped(a, _limit(adjoint_clipnorm, adjoint_max_growth, sent))
                a = row.back(t, a)
                if row.mask[t] and row.count[t] == first > 1:
                    break
            else:
                row.dh_0 += a
    return d


def _limit(adjoint_clipnorm, adjoint_max_growth, sent):
    """r_t, where so much has been sent: the sum of |e_s| over s >= t."""
    limits = []
    if adjoint_clipnorm is not None:
        limits.append(adjoint_clipnorm)
    if adjoint_max_growth is not None:
        limits.append(adjoint_max_growth * sent)
    return min(limits)


def _clipped(a, limit):
    norm = np.linalg.norm(a)
    return a * (limit / norm) if norm > limit else a


class _Problem(NamedTuple):
    """What gradients are of; `_rows` checks it, and fills in what is None."""

    x: Array
    W: Array
    U: Array
    b: Array
    h_0: Array
    f: str | tuple
    e: Array
    mask: Array | None
    r: Array | None
    factors: Array | None


class _Row:
    """One example: its states, its real steps counted, and its part of the sums."""

    def __init__(self, n, d, problem, steps, stride):
        x, W, U, b, h_0, f, e, mask, r, factors = problem
        row = slice(n, n + 1)  # still (batch, ...): the equations read as on paper
        x, e, r, h = _by_step(x[row]), _by_step(e[row]), r[row], h_0[row]
        self.x, self.e, self.W, self.U, self.r = x, e, W, U, r
        self.mask = {t: bool(mask[n, t - 1]) for t in x}
        self.count = {t: int(np.sum(mask[n, :t])) for t in x}  # real steps up to t
        self.N = self.count[max(x)]
        everything = steps is None or steps >= self.N
        self.steps = self.N if everything else steps
        self.stride = self.N if everything else stride or steps
        self.slope, self.factor, self.before = {}, {}, {}
        for t in x:
            if self.mask[t]:
                self.before[t] = r * h
                z = x[t] @ W + self.before[t] @ U + b
                self.slope[t], h = f.derivative(z), f.value(z)
                self.factor[t] = factors[n, t - 1] if self.count[t] > 1 else 1.0
        # Views: what is added to them is added to the gradients of the batch.
        self.dx, self.a, self.delta = (
            _by_step(array[row]) for array in (d.d_inputs, d.adjoint, d.delta)
        )
        self.dW, self.dU, self.db = d.d_kernel, d.d_recurrent_kernel, d.d_bias
        self.dh_0 = d.d_initial_state[row]

    def block_end(self, s):
        """E(s); 0 for s = 0, of which every path leads to h_0 unharmed."""
        return self.N - self.stride * ((self.N - s) // self.stride) if s else 0

    def back(self, t, a):
        """Add a share of a_t to all that it is a share of, and lead it on to h_{t-1}."""
        self.a[t] += a
        if not self.mask[t]:
            return a
        delta = a * self.slope[t]
        self.delta[t] += delta
        self.dW += self.x[t].T @ delta
        self.dU += self.before[t].T @ delta
        self.db += delta.sum(axis=0)
        self.dx[t] += delta @ self.W.T
        return self.factor[t] * self.r * (delta @ self.U.T)


def _rows(problem, steps, stride):
    """Gradients of zeros, and the examples, which add to them."""
    x, W, U, b, h_0, f, e, mask, r, factors = problem
    f = _pair("f", f, ACTIVATIONS)
    x, W, U, b, h_0, e = _checked(x=x, W=W, U=U, b=b, h_0=h_0, e=e)
    mask = np.ones(x.shape[:2], bool) if mask is None else np.asarray(mask)
    if mask.dtype != bool:
        raise ValueError(f"`mask` must be boolean. Received: dtype {mask.dtype}.")
    r = np.ones_like(h_0) if r is None else r
    factors = np.ones(x.shape[:2]) if factors is None else factors
    _, _, _, r, factors = _checked(
        x=x, h_0=h_0, mask=mask, recurrent_dropout=r, factors=factors
    )
    _check_window(steps, stride)
    d = HiddenGradients(*(np.zeros_like(array) for array in (x, W, U, b, h_0, e, e)))
    problem = _Problem(x, W, U, b, h_0, f, e, mask, r, factors)
    return d, [_Row(n, d, problem, steps, stride) for n in range(len(x))]


def _check_window(steps, stride):
    if steps is not None and not (_is_number(steps, numbers.Integral) and steps > 0):
        raise ValueError(
            "`steps` must be a positive integer or None (all paths). Received: "
            f"steps={steps!r}."
        )
    if stride is not None and not (
        _is_number(stride, numbers.Integral) and steps and 0 < stride <= steps
    ):
        raise ValueError(
            "`stride` must be a positive integer, at most `steps`, or None (as many as "
            f"`steps`). Received: stride={stride!r}, steps={steps!r}."
        )


def _check_limits(adjoint_clipnorm, adjoint_max_growth):
    if adjoint_clipnorm is None and adjoint_max_growth is None:
        raise ValueError(
            "`adjoint_clipnorm` must be a positive number, or `adjoint_max_growth` a "
            "finite number of at least 1, or both. Received: None for each. To clip "
            "nothing call `truncated_gradients`."
        )
    norm, growth = adjoint_clipnorm, adjoint_max_growth
    if norm is not None and not (_is_number(norm) and norm > 0):
        raise ValueError(
            "`adjoint_clipnorm` must be a positive number, the largest |a_t| of an "
            f"example, or None (no such limit). Received: adjoint_clipnorm={norm!r}."
        )
    if growth is not None and not (_is_number(growth) and 1 <= growth < np.inf):
        raise ValueError(
            "`adjoint_max_growth` must be a finite number of at least 1, the largest |a_t| "
            "as a multiple of the sum of |e_s| over s >= t, or None (no such limit). "
            f"Received: adjoint_max_growth={growth!r}."
        )


def _is_number(value, kind=numbers.Real):
    return isinstance(value, kind) and not isinstance(value, bool)
