"""What is measured of one call of a layer: how the gradient flows back through it.

Given the cotangents that the call receives: delta_t and a_t as they are in training, which
are by-products of the backward pass (`linearised`); and what a single loss sends back, from
the cotangent of one step, with the layer's truncation and clipping, and without. These are
cached graphs, in which the weights' gradients, that nobody asks for, are pruned. And the
states, beside what has come in.
"""

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_bptt.engine.masks import packing, processing_order
from keras_bptt.engine.recurrence import recurrence
from keras_bptt.runtime.execution import run as graphed
from keras_bptt.runtime.tensors import filled, mapped, size_of
from keras_bptt.truncation import Truncation

# A unit is saturated where f' is less than a twentieth of its largest value: for tanh where
# |h| > 0.975. A relu is inactive where it is 0.
_SATURATED = 0.05
_OFF = {
    "tanh": lambda h: 1 - h * h < _SATURATED,
    "sigmoid": lambda h: h * (1 - h) < _SATURATED / 4,
    "relu": lambda h: h <= 0,
}


class Lags(NamedTuple):
    """Sums of norms by lag, over single losses: |a_{s-k}|, and |e_s| of the same losses."""

    reached: np.ndarray
    sent: np.ndarray
    last_step_only: bool

    @property
    def share(self):
        """How much of a loss reaches k steps back; up to the longest lag there is."""
        size = int(np.sum(self.sent > 0))
        with np.errstate(invalid="ignore"):
            return self.reached[:size] / self.sent[:size]

    @classmethod
    def joined(cls, several):
        reached, sent, last = zip(*several, strict=True)
        size = max(map(len, sent))

        def total(sums):
            return sum(np.pad(s, (0, size - len(s))) for s in sums)

        return cls(total(reached), total(sent), all(last))


class Measured(NamedTuple):
    """Numbers for each example and step, in the order of processing; masked steps are NaN.

    Attributes:
        adjoint_norms, delta_norms, state_norms: (examples, timesteps); inf where one is not
            finite.
        state_growth: the largest |h_t| as a multiple of all that has come in until then.
        arrives: whether what the loss sends to the layer is finite.
        lags, free_lags: as the layer truncates and clips; without.
        off: the share of units that are saturated or, of a relu, inactive (examples,
            timesteps). None: another activation.
        always_off: which units are so at every step of every example (units,), or None.
    """

    adjoint_norms: np.ndarray
    delta_norms: np.ndarray
    state_norms: np.ndarray
    state_growth: float
    arrives: bool
    lags: Lags
    free_lags: Lags
    off: np.ndarray | None
    always_off: np.ndarray | None

    @classmethod
    def joined(cls, several):
        """Of several calls of a layer: as if their examples had come in one."""
        adjoint, delta, states, growth, arrives, own, free, off, always = zip(
            *several, strict=True
        )
        steps = max(norms.shape[1] for norms in adjoint)

        def stacked(arrays):
            """One below the other, ending together."""
            fill = [(steps - a.shape[1], 0) for a in arrays]
            padded = [
                np.pad(a, ((0, 0), f), constant_values=np.nan)
                for a, f in zip(arrays, fill, strict=True)
            ]
            return np.concatenate(padded)

        return cls(
            stacked(adjoint),
            stacked(delta),
            stacked(states),
            max(growth),
            all(arrives),
            Lags.joined(own),
            Lags.joined(free),
            None if off[0] is None else stacked(off),
            None if off[0] is None else np.all(always, axis=0),
        )

    @property
    def finite(self):
        """Whether the gradient is, at every real step."""
        numbers = self.adjoint_norms, self.delta_norms, self.free_lags.reached
        return self.arrives and not any(np.isinf(n).any() for n in numbers)


def measured(call, cotangents, scale, loss_steps):
    """The numbers of one call, given the gradients by its outputs."""
    options, constants = call.options, call.constants
    x, weights, initial, *_ = call.arguments
    free = options.whole.but(adjoint_clipnorm=None, adjoint_max_growth=None)
    e = _cotangents(free, constants, cotangents, call.arguments)

    # Each example's masked steps first, so that lag k is k places from its last real step.
    x, mask = processing_order(options, x, constants.mask)
    order, real, factors = None, None, constants.link_factors
    if mask is not None:
        order, real = packing(mask).numpy(), mask.numpy()
        given = (x, mask, e, factors)
        x, mask, e, factors = (
            t if t is None else tf.gather(t, order, batch_dims=1) for t in given
        )
        e = tf.where(mask[:, :, None], e, tf.zeros_like(e))
    arguments = call.arguments._replace(x=x, output_layer=())
    packed = dict(return_sequences=True, zero_output_for_mask=False, go_backwards=False)

    def sent_back(policy, factors):
        each = policy.but(**packed)
        given = constants._replace(mask=mask, link_factors=factors)

        def back(places):
            return graphed(_sent_back, each, given, places, e, arguments)

        return _lags(back, _norms(e), mask, loss_steps)

    free_lags, *norms = sent_back(free, None)
    own_lags = free_lags
    if options != free or factors is not None:
        own_lags, *norms = sent_back(options, factors)
    delta, a = (_in_place(n.numpy() / scale, order, real) for n in norms)
    each = free.but(**packed)
    given = constants._replace(mask=mask, link_factors=None)
    h, alone = (t.numpy() for t in graphed(_states, each, given, arguments))
    growth = 0.0
    if _finite(weights[1]):
        growth = _growth(
            h, alone, initial[0].numpy(), None if mask is None else mask.numpy()
        )
    states = _in_place(_state_norms(h), order, real)
    off = _off(call.layer.activation, h, order, real)
    return Measured(a, delta, states, growth, _finite(e), own_lags, free_lags, *off)


def linearised(options, constants, arguments):
    """Return (y, states), and a function from their cotangents to deltas and adjoints.

    Both are tuples, of each delta and each state of the cell (batch, timesteps, ...), in
    the order of processing, 0 at masked steps. With windows that overlap they are the sums
    over the windows; clipped adjoints are what is left by clipping.
    """
    shapes = options.cell.shapes(arguments.weights)
    rows = [size_of(arguments.x, 0), size_of(arguments.x, 1)]
    dtype = arguments.states[0].dtype
    zeros = tuple(
        tf.zeros([*rows, *shape], dtype) for shape in (*shapes.states, *shapes.deltas)
    )
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(zeros)
        outputs = recurrence(options, constants, arguments._replace(zeros=zeros))

    def back(cotangents):
        found = tape.gradient(outputs, zeros, cotangents)
        if options.go_backwards:
            found = [tf.reverse(t, [1]) for t in found]
        number = len(shapes.states)
        return tuple(found[number:]), tuple(found[:number])

    return outputs, back


def _states(options, constants, arguments):
    """h_t; and what it would be without a recurrence, f(x_t W + b)."""
    h, _ = recurrence(options, constants, arguments)
    W, U, *b = arguments.weights
    (h_0,) = arguments.states
    alone = arguments._replace(
        weights=(W, tf.zeros_like(U), *b), states=(tf.zeros_like(h_0),)
    )
    alone, _ = recurrence(options, constants, alone)
    return h, alone


def _cotangents(options, constants, cotangents, arguments):
    """e_t of each step, in the order of processing."""
    if constants.mask is not None or arguments.output_layer:
        # With windows of one step it is the adjoint.
        single = options.but(truncation=Truncation(1))
        plain = constants._replace(link_factors=None)
        return graphed(_adjoint, single, plain, cotangents, arguments)
    dy, (ds,) = cotangents

    def of_last(t):
        return filled(t[:, None], size_of(arguments.x, 1) - 1, axis=1)

    return (dy if options.return_sequences else of_last(dy)) + of_last(ds)


def _adjoint(options, constants, cotangents, arguments):
    _, back = linearised(options, constants, arguments)
    _, (a,) = back(cotangents)
    return a


def _sent_back(options, constants, places, e, arguments):
    """Of the loss at each place the norms of delta and a (places, batch, timesteps).

    A negative place means all losses together.
    """
    (_, states), back = linearised(options, constants, arguments)
    states = mapped(tf.zeros_like, states)

    def norms(s):
        here = (tf.range(size_of(e, 1)) == s) | (s < 0)
        e_s = tf.where(here[None, :, None], e, tf.zeros_like(e))
        (delta,), (a,) = back((e_s, states))
        return _norms(delta), _norms(a)

    # One by one: together they would take so many times the memory, and no less time.
    how = {"fn_output_signature": (tf.float64,) * 2, "parallel_iterations": 1}
    return tf.map_fn(norms, places, **how)


def _lags(back, sent, mask, loss_steps):
    """What single losses send back, and the norms of delta and a; in packed order."""
    sent = sent.numpy()
    steps = sent.shape[1]
    real = np.ones(sent.shape, bool) if mask is None else mask.numpy()
    losses = np.flatnonzero(np.any(sent > 0, axis=0))
    lags = Lags(np.zeros(steps), np.zeros(steps), losses.tolist() == [steps - 1])
    places = _spread(losses, loss_steps)
    delta, a = back(tf.constant([-1, *places], tf.int32))
    for s, alone in zip(places, a[1:].numpy(), strict=True):
        reached = np.where(real, alone, 0)[:, s::-1]
        lags.reached[: s + 1] += reached.sum(0)
        lags.sent[: s + 1] += np.where(real[:, s::-1], sent[:, s, None], 0).sum(0)
    return lags, delta[0], a[0]


def _state_norms(h):
    """|h_t| in float64, where no finite one overflows; inf where one is not finite."""
    h = np.abs(h.astype(np.float64))
    largest = h.max(-1, keepdims=True, initial=1e-300)
    with np.errstate(invalid="ignore"):  # inf / inf
        norms = largest[..., 0] * np.linalg.norm(h / largest, axis=-1)
    return np.where(np.isnan(norms), np.inf, norms)


def _growth(h, alone, h_0, real):
    """The largest |h_t| as a multiple of what has come in: |h_0| + sum |f(x_s W + b)|.

    Where no step multiplies by more than 1, sigma_max(U) max f' <= 1, it is at most 1. A
    NaN is no growth, an overflow of finite numbers is; 0 where something else than the
    recurrence overflows.
    """
    h = np.where(np.isnan(h), 0, h)
    alone = (
        _state_norms(alone) if real is None else np.where(real, _state_norms(alone), 0)
    )
    came_in = _state_norms(h_0)[:, None] + np.cumsum(alone, axis=1)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        growth = np.where(np.isfinite(came_in), _state_norms(h) / came_in, 0)
    growth = growth if real is None else np.where(real, growth, 0)
    return float(np.nan_to_num(growth, nan=0, posinf=np.inf).max(initial=0))


def _finite(t):
    return bool(tf.reduce_all(tf.math.is_finite(t)))


def _spread(places, number):
    """So many of the places: the last, and one of each equal part of the others.

    At golden sections of the parts, so that they have no common period with blocks.
    """
    if len(places) <= number:
        return places
    part = len(places) / number
    back = [int((i + i * 0.6180339887498949 % 1) * part) for i in range(number)]
    return places[::-1][back]


def _off(activation, h, order, real):
    """`off` and `always_off` of `Measured`, from h in packed order."""
    name = getattr(activation, "__name__", None)
    if name not in _OFF or activation is not getattr(keras.activations, name):
        return None, None
    off = _OFF[name](h.astype(np.float64))
    share = _in_place(off.mean(2), order, real)
    always = (
        off if real is None else off | ~np.take_along_axis(real, order, 1)[..., None]
    )
    return share, always.all((0, 1))


def _in_place(array, order, real):
    """(batch, timesteps) from packed order; NaN at masked steps."""
    if real is None:
        return array
    places = np.empty_like(array)
    np.put_along_axis(places, order, array, axis=1)
    return np.where(real, places, np.nan)


def _norms(t):
    """Norms over the units; inf where there is NaN, which is for masked steps.

    In float64, for the squares of float32 would overflow.
    """
    norms = tf.norm(tf.cast(t, tf.float64), axis=-1)
    return tf.where(tf.math.is_nan(norms), tf.constant(np.inf, tf.float64), norms)
