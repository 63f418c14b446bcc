"""What is measured of a layer while its model computes a loss and its gradient.

A model is run once, eagerly, under a tape, which gives the cotangents that each call of a
layer receives. The rest is measured of that call alone, by the probe of `probe.py`: delta_t
and a_t as they are in training; and what a single loss sends back, from the cotangent of
one step, with the layer's truncation and clipping, and without. These are cached graphs, in
which the weights' gradients, that nobody asks for, are pruned.
"""

import dataclasses
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_bptt.execution import run as graphed
from keras_bptt.explicit import cut_off
from keras_bptt.masks import packing, processing_order
from keras_bptt.probe import linearised, observed
from keras_bptt.tensors import filled, size_of
from keras_bptt.truncated import truncated_recurrence
from keras_bptt.truncation import Truncation

# A unit is saturated where f' is less than a twentieth of its largest value: for tanh where
# |h| > 0.975. A relu is inactive where it is 0.
_SATURATED = 0.05
_OFF = {
    "tanh": lambda h: 1 - h * h < _SATURATED,
    "sigmoid": lambda h: h * (1 - h) < _SATURATED / 4,
    "relu": lambda h: h <= 0,
}


class Call(NamedTuple):
    """One call of a layer: what it was given, and what its loss sends back to it."""

    layer: keras.Layer
    options: object
    constants: object
    arguments: tuple
    outputs: tuple


class Recorder:
    """Keeps the recurrences of the layers that are wanted, and watches their outputs."""

    def __init__(self, tape, wanted):
        self.tape, self.wanted = tape, wanted
        self.calls, self.seen = [], []

    def __call__(self, layer, options, constants, *arguments):
        self.seen.append(layer.name)
        if not self.wanted(layer):
            return truncated_recurrence(options, constants, *arguments)
        if not tf.executing_eagerly():
            raise ValueError(
                f"The gradient flow of a layer is measured where the model calls it "
                f"eagerly. Received: {layer.name}, called inside a tf.function. Take the "
                "tf.function, or the tf.map_fn, off the model for the measurement."
            )
        # Not compiled: for a single run it would not pay.
        options = dataclasses.replace(
            options, keep_states=True, unroll=False, jit_compile=False
        )
        outputs = truncated_recurrence(options, constants, *arguments)
        # The output and the state may be one tensor, which would have both cotangents.
        outputs = tuple(map(tf.identity, outputs))
        self.tape.watch(outputs)
        arguments = tf.nest.map_structure(cut_off, arguments)
        self.calls.append(Call(layer, options, constants, arguments, outputs))
        return outputs


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
        adjoint_norms, delta_norms: (examples, timesteps).
        lags, free_lags: as the layer truncates and clips; without.
        off: the share of units that are saturated or, of a relu, inactive (examples,
            timesteps). None: another activation.
        always_off: which units are so at every step of every example (units,), or None.
    """

    adjoint_norms: np.ndarray
    delta_norms: np.ndarray
    lags: Lags
    free_lags: Lags
    off: np.ndarray | None
    always_off: np.ndarray | None

    @classmethod
    def joined(cls, several):
        """Of several calls of a layer: as if their examples had come in one."""
        adjoint, delta, own, free, off, always = zip(*several, strict=True)
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
            Lags.joined(own),
            Lags.joined(free),
            None if off[0] is None else stacked(off),
            None if off[0] is None else np.all(always, axis=0),
        )


def run(model, x, loss, wanted, training):
    """Run the model and `loss(y_pred)`; return the calls, their cotangents, and all names.

    The state of the model stays as it is: what stateful layers, batch normalisation, seeds
    and metrics would assign goes to the scope, and with it.
    """
    scope = keras.StatelessScope(collect_losses=True)
    # Of the outputs of these layers alone: what lies before them needs no gradient.
    with tf.GradientTape(watch_accessed_variables=False) as tape, scope:
        recorder = Recorder(tape, wanted)
        with observed(recorder):
            value = loss(model(x, training=training))
    sources = [call.outputs for call in recorder.calls]
    zero = tf.UnconnectedGradients.ZERO
    gradients = tape.gradient(value, sources, unconnected_gradients=zero)
    return list(zip(recorder.calls, gradients, strict=True)), recorder.seen


def measured(call, cotangents, scale, loss_steps):
    """The numbers of one call, given the gradients by its outputs."""
    options, constants = call.options, call.constants
    x, W, U, h_0, b, *_ = call.arguments
    free = dataclasses.replace(options, truncation=None, adjoint_clipnorm=None)
    e = _cotangents(free, constants, cotangents, *call.arguments)

    # Each example's masked steps first, so that lag k is k places from its last real step.
    x, mask = processing_order(options, x, constants.mask)
    order, real, factors = None, None, constants.factors
    if mask is not None:
        order, real = packing(mask).numpy(), mask.numpy()
        given = (x, mask, e, factors)
        x, mask, e, factors = (
            t if t is None else tf.gather(t, order, batch_dims=1) for t in given
        )
        e = tf.where(mask[:, :, None], e, tf.zeros_like(e))
    arguments = x, W, U, h_0, b, None, None
    packed = dict(return_sequences=True, zero_output_for_mask=False, go_backwards=False)

    def sent_back(policy, factors):
        each = dataclasses.replace(policy, **packed)
        given = constants._replace(mask=mask, factors=factors)

        def back(places):
            return graphed(_sent_back, each, given, places, e, *arguments)

        return _lags(back, _norms(e), mask, loss_steps)

    h, free_lags, *norms = sent_back(free, None)
    own_lags = free_lags
    if options != free or factors is not None:
        _, own_lags, *norms = sent_back(options, factors)
    delta, a = (_in_place(n.numpy() / scale, order, real) for n in norms)
    off = _off(call.layer.activation, h, order, real)
    return Measured(a, delta, own_lags, free_lags, *off)


def _cotangents(options, constants, cotangents, *arguments):
    """e_t of each step, in the order of processing."""
    x, *_, V, _ = arguments
    if constants.mask is not None or V is not None:
        # With windows of one step it is the adjoint.
        single = dataclasses.replace(options, truncation=Truncation(1))
        plain = constants._replace(factors=None)
        return graphed(_adjoint, single, plain, cotangents, *arguments)
    dy, ds = cotangents

    def of_last(t):
        return filled(t[:, None], size_of(x, 1) - 1, axis=1)

    return (dy if options.return_sequences else of_last(dy)) + of_last(ds)


def _adjoint(options, constants, cotangents, *arguments):
    _, back = linearised(options, constants, *arguments)
    return back(*cotangents)[1]


def _sent_back(options, constants, places, e, *arguments):
    """h, and of the loss at each place the norms of delta and a (places, batch, timesteps).

    Of all losses at a place that is negative.
    """
    (h, state), back = linearised(options, constants, *arguments)
    state = tf.zeros_like(state)

    def norms(s):
        here = (tf.range(size_of(e, 1)) == s) | (s < 0)
        delta, a = back(tf.where(here[None, :, None], e, tf.zeros_like(e)), state)
        return _norms(delta), _norms(a)

    # One by one: together they would take so many times the memory, and no less time.
    how = {"fn_output_signature": (tf.float64,) * 2, "parallel_iterations": 1}
    return h, *tf.map_fn(norms, places, **how)


def _lags(back, sent, mask, loss_steps):
    """h, what single losses send back, and the norms of delta and a; in packed order."""
    sent = sent.numpy()
    steps = sent.shape[1]
    real = np.ones(sent.shape, bool) if mask is None else mask.numpy()
    losses = np.flatnonzero(np.any(sent > 0, axis=0))
    lags = Lags(np.zeros(steps), np.zeros(steps), losses.tolist() == [steps - 1])
    places = _spread(losses, loss_steps)
    h, delta, a = back(tf.constant([-1, *places], tf.int32))
    for s, alone in zip(places, a[1:].numpy(), strict=True):
        reached = np.where(real, alone, 0)[:, s::-1]
        lags.reached[: s + 1] += reached.sum(0)
        lags.sent[: s + 1] += np.where(real[:, s::-1], sent[:, s, None], 0).sum(0)
    return h, lags, delta[0], a[0]


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
    off = _OFF[name](h.numpy().astype(np.float64))
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
