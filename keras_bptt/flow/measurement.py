"""What is measured of one call of a layer: how the gradient flows back through it.

Given the cotangents that the call receives: its deltas and adjoints as they are in
training, which are by-products of the backward pass (`linearised`); and what a single loss
sends back, from the cotangent of one step, with the layer's truncation and clipping, and
without. These are cached graphs, in which the weights' gradients, that nobody asks for, are
pruned. And the states, beside what has come in, and what is known of their inside.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_bptt.engine.draws import drawn
from keras_bptt.engine.masks import filler, packing, processing_order, unpadded
from keras_bptt.engine.recurrence import recurrence
from keras_bptt.engine.states import states_pass
from keras_bptt.flow.inside import Watched, watched
from keras_bptt.flow.lags import Lags, followed
from keras_bptt.runtime import execution
from keras_bptt.runtime.tensors import (
    filled,
    mapped,
    size_of,
    to_batch_major,
    to_time_major,
)
from keras_bptt.truncation import Truncation


class Measured(NamedTuple):
    """Numbers for each example and step, in the order of processing; masked steps are NaN.

    Attributes:
        adjoint_norms: of all states jointly (examples, timesteps); inf where one is not
            finite. So are the others.
        state_adjoint_norms: of each state (states, examples, timesteps).
        delta_norms: None where the cell has not one delta.
        state_norms: of all states jointly.
        state_growth: the largest of these as a multiple of all that has come in until then.
        arrives: whether what the loss sends to the layer is finite.
        lags, free_lags: as the layer truncates and clips; without.
        inside: what is known of the inside of its steps, by name.
    """

    adjoint_norms: np.ndarray
    state_adjoint_norms: np.ndarray
    delta_norms: np.ndarray | None
    state_norms: np.ndarray
    state_growth: float
    arrives: bool
    lags: Lags
    free_lags: Lags
    inside: dict[str, Watched]

    @classmethod
    def joined(cls, several):
        """Of several calls of a layer: as if their examples had come in one."""
        adjoint, of_states, delta, states, growth, arrives, own, free, inside = zip(
            *several, strict=True
        )
        steps = max(norms.shape[1] for norms in adjoint)

        def stacked(arrays):
            """One below the other, ending together."""
            padded = [
                np.pad(
                    a,
                    [(0, 0)] * (a.ndim - 1) + [(steps - a.shape[-1], 0)],
                    constant_values=np.nan,
                )
                for a in arrays
            ]
            return np.concatenate(padded, axis=-2)

        return cls(
            stacked(adjoint),
            stacked(of_states),
            None if delta[0] is None else stacked(delta),
            stacked(states),
            max(growth),
            all(arrives),
            Lags.joined(own),
            Lags.joined(free),
            {
                name: Watched.joined([each[name] for each in inside], stacked)
                for name in inside[0]
            },
        )

    @property
    def finite(self):
        """Whether the gradient is, at every real step."""
        numbers = [self.adjoint_norms, self.free_lags.reached]
        numbers += [] if self.delta_norms is None else [self.delta_norms]
        return self.arrives and not any(np.isinf(n).any() for n in numbers)


def measured(call, cotangents, scale, loss_steps):
    """The numbers of one call, given the gradients by its outputs."""
    options = call.options
    free = options.whole.but(adjoint_clipnorm=None, adjoint_max_growth=None)
    e = _cotangents(free, call.constants, cotangents, call.arguments)
    arrives = all(map(_finite, e))
    packed = _packed(call, e)
    in_order = dict(
        return_sequences=True, zero_output_for_mask=False, go_backwards=False
    )
    sent = _norms(e)[-1].numpy()
    shown = (options.cell.recurs or [True] * len(e))[options.cell.output]

    def sent_back(policy, constants):
        each = policy.but(**in_order)

        def back(places):
            given = constants, places, packed.e, packed.arguments
            return execution.run(_sent_back, each, *given)

        return followed(back, packed.of(sent), packed.real, loss_steps, shown)

    constants = packed.constants
    unthinned = constants._replace(link_factors=None)
    free_lags, delta, a = sent_back(free, unthinned)
    own_lags = free_lags
    if options != free or constants.link_factors is not None:
        own_lags, delta, a = sent_back(options, constants)
    a = packed.in_place(a / scale)
    delta = packed.in_place(delta / scale) if delta.size else None
    of_steps = _of_steps(free.but(**in_order), unthinned, packed.arguments)
    norms, growth = _states(options.cell, of_steps, packed)
    inside = {
        name: watched(*each, packed.real, packed.in_place)
        for name, each in _inside(call, packed, of_steps).items()
    }
    return Measured(
        a[-1], a[:-1], delta, norms, growth, arrives, own_lags, free_lags, inside
    )


class _Packed(NamedTuple):
    """A call with each example's masked steps first, so that lag k is k places back."""

    arguments: tuple
    constants: tuple
    e: tuple
    order: np.ndarray | None
    unpacked: np.ndarray | None

    @property
    def real(self):
        """Which steps are, or None: all."""
        mask = self.constants.mask
        return None if mask is None else mask.numpy()

    def of(self, norms):
        """(batch, timesteps) in packed order, 0 at masked steps."""
        if self.order is None:
            return norms
        return np.where(self.real, np.take_along_axis(norms, self.order, 1), 0)

    def in_place(self, norms):
        """(..., batch, timesteps) in the order of processing; NaN at masked steps."""
        if self.order is None:
            return norms
        places = np.empty_like(norms)
        order = np.broadcast_to(self.order, norms.shape)
        np.put_along_axis(places, order, norms, -1)
        return np.where(self.unpacked, places, np.nan)


def _packed(call, e):
    options, constants = call.options, call.constants
    x, mask = processing_order(options, call.arguments.x, constants.mask)
    draws = drawn(options.cell, constants.draws, size_of(x, 1))
    order = unpacked = None
    if mask is not None:
        order, unpacked = packing(mask).numpy(), mask.numpy()

        def gathered(t):
            return tf.gather(t, order, batch_dims=1)

        x, mask, e, factors = mapped(gathered, (x, mask, e, constants.link_factors))
        if draws is not None:
            draws = draws._replace(numbers=mapped(gathered, draws.numbers))
        e = mapped(lambda t: tf.where(_beside(mask, t), t, tf.zeros_like(t)), e)
        constants = constants._replace(mask=mask, link_factors=factors)
    arguments = call.arguments._replace(x=x, output_layer=())
    return _Packed(arguments, constants._replace(draws=draws), e, order, unpacked)


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


def _cotangents(options, constants, cotangents, arguments):
    """e_t of each step and state, in the order of processing."""
    if constants.mask is not None or arguments.output_layer:
        # With windows of one step it is the adjoint.
        single = options.but(truncation=Truncation(1))
        plain = constants._replace(link_factors=None)
        return execution.run(_adjoints, single, plain, cotangents, arguments)
    dy, d_states = cotangents
    steps = size_of(arguments.x, 1)
    e = [filled(d[:, None], steps - 1, axis=1) for d in d_states]
    shown = options.cell.output
    e[shown] += (
        dy if options.return_sequences else filled(dy[:, None], steps - 1, axis=1)
    )
    return tuple(e)


def _adjoints(options, constants, cotangents, arguments):
    _, back = linearised(options, constants, arguments)
    _, adjoints = back(cotangents)
    return adjoints


def _sent_back(options, constants, places, e, arguments):
    """Of the loss at each place the norms of what it sends back.

    A negative place means all losses together.

    Returns:
        Of the delta (places, batch, timesteps), or (places, 0) where the cell has none or
        several; of each state that a step reads and of all of them (places, states + 1,
        batch, timesteps).
    """
    _, back = linearised(options, constants, arguments)
    shown, cell = options.cell.output, options.cell

    def norms(s):
        here = (tf.range(size_of(e[0], 1)) == s) | (s < 0)
        e_s = [tf.where(_beside(here[None], t), t, tf.zeros_like(t)) for t in e]
        # Of the others only the last ones leave the layer.
        last = [t[:, -1] for t in e_s]
        last[shown] = tf.zeros_like(last[shown])
        deltas, a = back((e_s[shown], last))
        delta = _norms(deltas)[0] if len(deltas) == 1 else tf.zeros([0], tf.float64)
        return delta, _norms(_read(cell, a))

    # One by one: together they would take so many times the memory, and no less time.
    how = {"fn_output_signature": (tf.float64,) * 2, "parallel_iterations": 1}
    return tf.map_fn(norms, places, **how)


def _read(cell, tensors):
    """Those of the states that a step reads; all where it reads none."""
    return cell.recurring(tensors) or list(tensors)


class _Steps(NamedTuple):
    """Of all steps, batch-major and in packed order: inputs, states before and after.

    `alone` are the states after a step from states that are zero.
    """

    x: tf.Tensor
    before: tuple
    after: tuple
    alone: tuple


def _of_steps(options, constants, arguments):
    cell = options.cell
    x, _, initial, *_ = arguments
    weights = cell.cast_weights(arguments.weights, initial[0].dtype)
    arguments = arguments._replace(weights=weights)
    return _Steps(*execution.run(_all_steps, options, constants, arguments))


def _all_steps(options, constants, arguments):
    cell, (x, weights, initial, *_) = options.cell, arguments
    mask, noise = constants.mask, constants.noise
    x = unpadded(x, mask, filler(x, mask))
    of_steps = mapped(lambda t: t[:, None], noise)
    numbers = () if constants.draws is None else constants.draws.numbers
    drive = cell.project(weights, x, (*of_steps, *numbers))
    static, given = (options, tuple(range(len(initial)))), (initial, drive, mask)
    how = options.jit_compile
    _, *after = execution.call(states_pass, static, how, None, weights, noise, *given)
    before = tuple(
        tf.concat([s_0[None], s[:-1]], 0) for s_0, s in zip(initial, after, strict=True)
    )
    zeros = mapped(tf.zeros_like, before)
    alone, _ = cell.step(weights, mapped(to_time_major, drive), zeros, noise)
    return x, *(mapped(to_batch_major, tuple(s)) for s in (before, after, alone))


def _inside(call, packed, of_steps):
    """What is known of the inside of the steps, (batch, timesteps, units) each."""
    x, before, after, _ = of_steps
    batch, steps = x.shape[:2]

    def rows(t):
        return tf.reshape(t, [batch * steps, *t.shape[2:]])

    noise = mapped(lambda t: tf.repeat(t, steps, axis=0), packed.constants.noise)
    found = call.step.insides(rows(x), *mapped(rows, (before, after)), noise)

    def in_steps(t):
        return t.numpy().reshape(batch, steps, *t.shape[1:])

    return {
        name: (each.function, in_steps(each.values), each.holds)
        for name, each in found.items()
    }


def _states(cell, of_steps, packed):
    """The norms of the states, and the largest as a multiple of what has come in.

    That is |s_0| + sum |s alone|, where each step begins at states of zero. Where no step
    of a plain RNN multiplies by more than 1, sigma_max(U) max f' <= 1, it is at most 1. A
    NaN is no growth, an overflow of finite numbers is; 0 where something else than the
    recurrence overflows, such as a weight that is not finite.
    """
    real = packed.real
    after, before, alone = (
        _read(cell, s) for s in (of_steps.after, of_steps.before, of_steps.alone)
    )
    norms = packed.in_place(_state_norms(after))
    if not all(map(_finite, packed.arguments.weights)):
        return norms, 0.0
    first = _state_norms([s[:, :1] for s in before])
    came_in = _state_norms(alone)
    came_in = came_in if real is None else np.where(real, came_in, 0)
    came_in = first + np.cumsum(came_in, axis=1)
    grown = _state_norms(after, nan=0)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        growth = np.where(np.isfinite(came_in), grown / came_in, 0)
    growth = growth if real is None else np.where(real, growth, 0)
    return norms, float(np.nan_to_num(growth, nan=0, posinf=np.inf).max(initial=0))


def _state_norms(states, nan=np.inf):
    """|s_t| of all states in float64, where no finite one overflows.

    Where one is not finite it is inf; of a NaN what is said.
    """
    rows = [_flat(s).numpy().astype(np.float64) for s in states if s.dtype.is_floating]
    s = np.abs(np.concatenate(rows, axis=-1))
    s = np.where(np.isnan(s), nan, s)
    largest = s.max(-1, keepdims=True, initial=1e-300)
    with np.errstate(invalid="ignore"):  # inf / inf
        norms = largest[..., 0] * np.linalg.norm(s / largest, axis=-1)
    return np.where(np.isnan(norms), np.inf, norms)


def _norms(tensors):
    """The norms of each tensor (batch, timesteps, ...), and of all of them jointly.

    inf where there is NaN, which is for masked steps. In float64, for the squares of
    float32 would overflow.
    """
    wide = [_flat(tf.cast(t, tf.float64)) for t in tensors]
    norms = tf.stack([tf.norm(t, axis=-1) for t in [*wide, tf.concat(wide, -1)]])
    return tf.where(tf.math.is_nan(norms), tf.constant(np.inf, tf.float64), norms)


def _flat(t):
    """(batch, timesteps, numbers)."""
    sizes = tf.shape(t)[:2]
    return tf.reshape(t, tf.concat([sizes, [t.shape[2:].num_elements()]], 0))


def _beside(mask, t):
    """`mask` (batch, timesteps) with the axes of `t`."""
    return tf.reshape(mask, tf.concat([tf.shape(mask), [1] * (len(t.shape) - 2)], 0))


def _finite(t):
    return bool(tf.reduce_all(tf.math.is_finite(t))) if t.dtype.is_floating else True
