"""Derivatives of every order: two scans over time, each the other's derivative.

    states        s_t = step(x_t, s_{t-1}; w)
    linear_scan   v_t = e_t + k_{t+1} J_{t+1}^T v_{t+1}, from the last step back (pull), or
                  v_t = e_t + J_t (k_t v_{t-1}), from the first one on (push)

with J_t = d step / d s_{t-1}. The gradient of `states` is a pull; the gradient of a pull is
a push over the same links, and the other way round; the gradients by the points at which
the step is linearised are those of one batch of all links. So the pair is closed under
differentiation, and TensorFlow never differentiates a loop.

All tensors are time-major. Link t joins step t and the one before it. The first, to the
initial state, is no part of a linear scan: it is there so that there are as many links as
steps, and never none.

What a backward pass does beside the derivative is a constant here: truncation's factors and
the scales of clipping are the factors k of the links.
"""

import dataclasses
from typing import NamedTuple

import tensorflow as tf

from keras_bptt.cells.cell import Cell
from keras_bptt.engine.clipping import Arriving, arriving, clipped, scaled
from keras_bptt.engine.loops import scan
from keras_bptt.engine.masks import passed_on
from keras_bptt.runtime.execution import run
from keras_bptt.runtime.explicit import explicit, vjp
from keras_bptt.runtime.slices import one
from keras_bptt.runtime.tensors import beside, chosen, mapped, shifted, size_of


class Known(NamedTuple):
    """Tensors that have no gradient; what is None is left out.

    Attributes:
        noise: the cell's.
        numbers: its random numbers of every step, (timesteps, batch, ...) each.
        mask: bool (timesteps, batch, 1), False where the state is to stay.
        factors: of the links, for each state (timesteps, batch, ...), 1 at masked steps
            and at the first real one.
    """

    noise: tuple
    mask: tf.Tensor | None = None
    factors: tuple | None = None
    numbers: tuple = ()

    @property
    def of_all_steps(self):
        """What a cell reads beside the inputs of all steps."""
        return (*self.noise, *self.numbers)


def states(options, known, x, initial, weights):
    """The states of all steps, each (timesteps, batch, ...).

    Args:
        options: of the recurrence: its cell, limits of the adjoint, and `unroll`.
        known: see `Known`. The factors truncate the gradient, which is then not the
            derivative of the values.
        x: inputs (timesteps, batch, ...), none of them padding.
        initial, weights: the initial states and the weights; all have a gradient.
    """

    def forward(x, initial, weights):
        return run(_states_loop, options, known, x, initial, weights), ()

    def backward(args, outputs, residuals, cotangents):
        return _gradient_of_states(options, known, *args, outputs, cotangents)

    return explicit(forward, backward)(x, initial, weights)


def _states_loop(options, known, x, initial, weights):
    cell = options.cell
    drive = cell.project(weights, x, known.of_all_steps)

    def step(before, read):
        drive, mask = read
        after, _ = cell.step(weights, drive, before, known.noise)
        after = passed_on(mask, after, before)
        return after, after

    _, after = scan(
        step,
        initial,
        lambda t: mapped(lambda x: x[t], (drive, known.mask)),
        size_of(x, 0),
        cell.shapes(weights).states,
        unroll=options.unroll,
    )
    return tuple(after)


def _gradient_of_states(options, known, x, initial, weights, after, e):
    """As the backward pass has it, made of differentiable operations of all steps."""
    if options.clips:
        # What clips the gradient of the states is a constant in the derivatives of this
        # gradient; those of the states are exact.
        exact = options.but(adjoint_clipnorm=None, adjoint_max_growth=None)
        after = states(exact, known, x, initial, weights)
    before = tuple(map(_before, after, initial))
    if known.factors is not None:
        # The same numbers, whose gradient the factors truncate.
        numbers = tuple(map(tf.stop_gradient, before))
        before = tuple(
            n + k * (b - n)
            for n, k, b in zip(numbers, known.factors, before, strict=True)
        )
    cell, noise = options.cell, known.noise
    drive = saved = None
    if cell.wants & {"drive", "saved"}:
        drive = cell.project(weights, x, known.of_all_steps)
        _, saved = cell.step(weights, drive, before, noise)
    point = cell.point(drive=drive, before=before, after=after, saved=saved)
    weights_back = cell.weights_back(weights)
    link, links = Link(cell, reverse=True, unroll=options.unroll), known
    if options.clips:
        scales = _scales(options, known, e, point, weights_back)
        e = tuple(s * v for s, v in zip(scales, e, strict=True))
        # The scale of a step multiplies what has come over the link into it.
        factors = tuple(shifted(s, 1) for s in scales)
        if known.factors is not None:
            pairs = zip(known.factors, factors, strict=True)
            factors = tuple(k * s for k, s in pairs)
        links = links._replace(factors=factors)
    a = linear_scan(link, links, e, point, weights_back)

    _, deltas = cell.step_back(weights_back, point, a, noise)
    deltas = tuple(chosen(known.mask, d, tf.zeros_like(d)) for d in deltas)
    everything = point._replace(before=[[b] for b in before])
    given = everything, deltas, known.of_all_steps
    d_weights, d_x = cell.gradients(weights, lambda: x, *given)
    # The link into the first step, which nothing truncates.
    first, a_1 = mapped(lambda t: one(t, 0), (point, a))
    whole = Known(noise, None if known.mask is None else known.mask[0])
    d_initial = link.apply(whole, weights_back, first, a_1)
    return d_x, d_initial, d_weights


def _scales(options, known, e, point, weights_back):
    """For each state the scales of its adjoints, 1 where it does not recur."""
    # Cut off: else TensorFlow differentiates the loop that makes it.
    scale = run(_scales_loop, options, known, e, point, weights_back)
    scale = tf.stop_gradient(scale)
    recurs = options.cell.recurs or [True] * len(e)
    return [
        tf.cast(beside(scale, v), v.dtype) if r else tf.ones_like(v)
        for v, r in zip(e, recurs, strict=True)
    ]


def _before(after, initial):
    """The states before each step."""
    first = tf.range(size_of(after, 0)) == 0
    first = tf.reshape(first, [-1] + [1] * (len(after.shape) - 1))
    return tf.where(first, initial, tf.roll(after, 1, 0))


@dataclasses.dataclass(frozen=True)
class Link:
    """What a linear scan applies at a link, static.

    Attributes:
        cell: whose step is linearised.
        reverse: J^T, from the last step to the first; else J, from the first to the last.
        unroll: write every step into the graph.
    """

    cell: Cell
    reverse: bool
    unroll: bool | int = False

    def transpose(self):
        return dataclasses.replace(self, reverse=not self.reverse)

    def apply(self, known, weights_back, point, v):
        """k J^T v or J k v at one link or at all, differentiable by all of it."""

        def back(v):
            return self.cell.step_back(weights_back, point, v, known.noise)[0]

        if self.reverse:
            return _product(known.factors, passed_on(known.mask, back(v), v))
        v = _product(known.factors, v)
        # The transpose of the linear map.
        forth = vjp(back, (mapped(tf.zeros_like, v),), v)[0]
        return passed_on(known.mask, tuple(forth), v)


def linear_scan(link, known, e, point, weights_back):
    """v_t = e_t + J^T_{t+1} v_{t+1} where the link is `reverse`, else e_t + J_t v_{t-1}.

    Args:
        e: what enters at each step, for each state.
        point, weights_back: what the cell's `step_back` reads, of each step.

    Returns:
        v, for each state. Its gradient by e is the scan of the cotangents by the transposed
        link; the others are those of one batch of all links, from v at a link's source to
        that at its end.
    """
    # Else a tape that watches what they were made of would record the loop.
    known = mapped(tf.stop_gradient, known)

    def forward(e, point, weights_back):
        return run(_linear_loop, link, known, e, point, weights_back), ()

    def backward(args, outputs, residuals, cotangents):
        _, point, weights_back = args
        w = linear_scan(link.transpose(), known, cotangents, point, weights_back)
        source, end = outputs, tuple(shifted(t, 1) for t in w)
        if not link.reverse:
            source, end = tuple(shifted(t, 1) for t in outputs), w

        def all_links(point, weights_back):
            return link.apply(known, weights_back, point, source)

        return w, *vjp(all_links, (point, weights_back), end)

    return explicit(forward, backward)(e, point, weights_back)


def _linear_loop(link, known, e, point, weights_back):
    def apply(there, point, v):
        return link.apply(Known(known.noise, *there), weights_back, point, v)

    def back(arrived, read):
        e, point, *there = read
        v = _sum(e, arrived)
        return apply(there, point, v), v

    def forth(v, read):
        e, point, *there = read
        v = _sum(e, apply(there, point, v))
        return v, v

    step = back if link.reverse else forth
    zeros = tuple(tf.zeros_like(t[0]) for t in e)
    shapes = [t.shape[2:] for t in e]
    return _scan_links(step, link, known, e, point, zeros, shapes)


def _scales_loop(options, known, e, point, weights_back):
    """The scales s_t (timesteps, batch, 1) of the adjoints, as clipping has them."""
    link = Link(options.cell, reverse=True, unroll=options.unroll)

    def step(arrived, read):
        e, point, mask, factors = read
        waiting = _sum(e, arrived.waiting) if arrived.waiting else ()
        arrived = Arriving(_sum(e, arrived.adjoints), arrived.sent, waiting)
        scale, new = clipped(options, arrived)
        v = scaled(options, scale, arrived.adjoints)
        unmasked = Known(known.noise, None, factors)
        back = link.apply(unmasked, weights_back, point, v)
        arrived = passed_on(mask, new._replace(adjoints=back), arrived)
        return arrived, [chosen(mask, scale, tf.ones_like(scale))]

    zeros = tuple(tf.zeros_like(t[0]) for t in e)
    carry = arriving(options, zeros)
    (scale,) = _scan_links(step, link, known, e, point, carry, [(1,)])
    return scale


def _scan_links(step, link, known, e, point, carry, shapes):
    _, outputs = scan(
        step,
        carry,
        lambda t: mapped(lambda x: x[t], (e, point, known.mask, known.factors)),
        size_of(e[0], 0),
        shapes,
        reverse=link.reverse,
        unroll=link.unroll,
    )
    return tuple(outputs)


def _product(factors, v):
    if factors is None:
        return v
    return tuple(k * t for k, t in zip(factors, v, strict=True))


def _sum(some, others):
    return tuple(a + b for a, b in zip(some, others, strict=True))
