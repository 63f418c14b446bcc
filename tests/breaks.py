"""The package broken, one thing at a time, to show that the tests can fail.

A break puts something wrong in the place of an attribute of a module or a class. Such a
seam is found by its name alone, so that it may be written in another way and its break
stays. Each break gives wrong numbers and no error: a user would be told nothing.
"""

import contextlib
import pkgutil
import sys
import types
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import keras
import tensorflow as tf

from keras_bptt.engine.clipping import Arriving
from keras_bptt.runtime.explicit import vjp
from keras_bptt.runtime.tensors import beside, mapped
from keras_bptt.truncation import Truncation


class Break(NamedTuple):
    """What is broken.

    Attributes:
        check: the name of the check in `test_breaks.py` that catches it.
        seam: the name of the attribute, from the package on.
        change: a function of what the attribute is; it returns what it becomes.
        everywhere: whether it changes in all modules that have imported it too.
    """

    check: str
    seam: str
    change: Callable
    everywhere: bool = False

    @contextlib.contextmanager
    def made(self):
        """A context in which the package is broken."""
        owner, _, name = f"keras_bptt.{self.seam}".rpartition(".")
        owner = pkgutil.resolve_name(owner)
        original, owners = getattr(owner, name), [owner]
        if self.everywhere:
            modules = [m for n, m in sys.modules.items() if n.startswith("keras_bptt.")]
            owners = [m for m in modules if vars(m).get(name) is original]
        with contextlib.ExitStack() as stack:
            wrong = self.change(original)
            for owner in owners:
                stack.enter_context(mock.patch.object(owner, name, wrong))
            yield


# --- What a function is changed to


def turned(tensors):
    """Each with its steps in the other order."""
    return tuple(tf.reverse(t, [0]) for t in tensors)


def takes(change=None, **fixed):
    """A change: the function takes other arguments.

    Args:
        change: a function of the positional arguments; it returns others.
        **fixed: arguments by name.
    """

    def changed(original):
        def function(*args, **named):
            args = args if change is None else change(*args)
            return original(*args, **named | fixed)

        return function

    return changed


def gives(change):
    """A change: the function gives `change` of its result."""
    return lambda original: lambda *args, **named: change(original(*args, **named))


def instead(function):
    """A change: another function stands there."""
    return lambda original: function


first = instead(lambda x, *_: x)
second = instead(lambda _, x, *__: x)


def zeros(structure):
    return mapped(tf.zeros_like, structure)


def reversed_rows(structure):
    """Of each example what belongs to another."""
    return mapped(lambda t: t[::-1], structure)


# --- The cell and the recursion back


def slopes(activation, function):
    """A change: f' of a known activation is another function of f."""
    known = getattr(keras.activations, activation)
    return lambda slopes: {**slopes, known: function}


def at_zero(cell, weights, point, *rest):
    """At h = 0, where the slope of tanh is 1."""
    return cell, weights, point._replace(after=zeros(point.after)), *rest


def without_noise(*args):
    return *args[:-1], (None, None)


def of_states_after(cell, weights, x, point, *rest):
    before = [[h] for h in point.after]
    return cell, weights, x, point._replace(before=before), *rest


def untransposed(original):
    """J_f(z) u."""

    def function(activation, z, u):
        def transposed(v):
            return original(activation, z, v)

        return vjp(transposed, (tf.zeros_like(u),), u)[0]

    return function


def a_step_late(terms, t):
    return terms._replace(cotangent=tf.roll(terms.cotangent, 1, axis=1)), t


def x_alone_reversed(original):
    return lambda options, x, mask: (original(options, x, None)[0], mask)


def forgotten_sum(result):
    """The sum of |e_s| begins anew at each step."""
    scale, new = result
    return scale, new._replace(sent=zeros(new.sent))


def every_one_scaled(original):
    """Adjoints that no step reads are scaled as well."""

    def scaled(options, scale, adjoints):
        return tuple(tf.cast(beside(scale, a), a.dtype) * a for a in adjoints)

    return scaled


# --- Windows, blocks, and parts of the batch


def longer_window(more):
    """A change: the function of options takes those of a window of more steps."""

    def change(options, *rest):
        steps, stride = options.truncation.steps, options.truncation.stride
        return options.but(truncation=Truncation(steps + more, stride)), *rest

    return takes(change)


def noise_of_others(options, valid, weights, noise, *rest):
    return options, valid, weights, reversed_rows(noise), *rest


def from_the_end(options, valid, weights, noise, arrived, terms, last, real):
    """Steps are counted from the end of a block, not of the sequence."""
    return options, valid, weights, noise, arrived, terms, terms.size - 1, real


def without_sums(block, *rest):
    """For a walk whose blocks all begin to add up anew."""

    def forgetful(start, size, valid, carry):
        return block(start, size, valid, (carry[0], *zeros(carry[1:])))

    return forgetful, *rest


def rounded_sums(block, *rest):
    """For a walk between whose blocks sums are in half precision."""

    def rounded(start, size, valid, carry):
        arrived, *sums = carry
        sums = mapped(lambda t: tf.cast(tf.cast(t, "float16"), t.dtype), sums)
        return block(start, size, valid, (arrived, *sums))

    return rounded, *rest


def saved_late(original):
    """Each step of a block has the saved tensors of the one before."""

    def from_storage(*args):
        stored = original(*args)

        def wrong(*block):
            first, after, saved = stored(*block)
            return first, after, mapped(lambda t: tf.roll(t, 1, 0), saved)

        return wrong

    return from_storage


def other_checkpoints(options, weights, noise, starts, *rest):
    return options, weights, noise, reversed_rows(tuple(starts)), *rest


def again_without_mask(*args):
    return *args[:-1], None


def again_without_noise(static, valid, weights, noise, *rest):
    return static, valid, weights, (None, None), *rest


def noise_exchanged(parts):
    """Where there are several parts, each example has the noise of another of its part."""
    if len(parts) == 1:
        return parts
    return [
        (known._replace(noise=reversed_rows(known.noise)), *others)
        for known, *others in parts
    ]


# --- Derivatives, of higher order too; sums


def behind(after, initial):
    """The states after the next step, in the place of those before each."""
    return tf.concat([after[1:], initial[None]], 0)


def at_fixed_states(link, known, weights_back, point, v):
    return link, known, weights_back, mapped(tf.stop_gradient, point), v


def constant_layer(h, layer):
    return h, mapped(tf.stop_gradient, tuple(layer))


def without_factors(options, constants, *rest):
    return options, constants._replace(link_factors=None), *rest


def nothing_cut_off(tf):
    """TensorFlow whose `stop_gradient` lets gradients pass."""
    return types.SimpleNamespace(**{**vars(tf), "stop_gradient": tf.identity})


def inner_outputs(original):
    """`explicit` whose backward pass sees the outputs that are cut off."""

    def explicit(forward, backward):
        inner = []

        def remembered(*args):
            outputs, residuals = forward(*args)
            inner.append(outputs)
            return outputs, residuals

        def of_inner(args, outputs, *rest):
            return backward(args, inner[-1], *rest)

        return original(remembered, of_inner)

    return explicit


def draws_turned(draws):
    """The random numbers of the steps in the other order."""
    if draws is None:
        return None
    return draws._replace(numbers=mapped(lambda t: t[:, ::-1], draws.numbers))


def last_of_each(slices, output):
    """The rows that were gathered, each once."""
    places = slices.indices[:, None]
    return tf.tensor_scatter_nd_update(tf.zeros_like(output), places, slices.values)


def in_half(left, right):
    left = tf.concat(left, 0) if isinstance(left, list) else left
    flat = [tf.reshape(t, [-1, t.shape[-1]]) for t in (left, right)]
    return tf.cast(tf.matmul(*flat, transpose_a=True), tf.float32)


CELL = "cells.simple_rnn.SimpleRNN."
ADJOINTS = "engine.adjoints."
DERIVED = "cells.derived."
BACKWARD = "engine.backward."
COMPOSED = "engine.composed."
EXPLICIT = "runtime.explicit."
HIGHER = "engine.higher_orders."
MASKS = "engine.masks."
RECURRENCE = "engine.recurrence."
WINDOWS = "engine.windows."

BREAKS = {
    # The cell.
    "step_back with U": Break("steps", CELL + "weights_back", gives(tf.transpose)),
    "step_back at h = 0": Break("steps", CELL + "step_back", takes(at_zero)),
    "slope of tanh": Break(
        "steps", "cells.activations._KNOWN", slopes("tanh", lambda h: 1 - h)
    ),
    "Jacobian not transposed": Break(
        "log_softmax", "cells.activations.Activation.vjp", untransposed
    ),
    "dU of the states after": Break(
        "steps", CELL + "gradients", takes(of_states_after)
    ),
    "step_back without r": Break("masks", CELL + "step_back", takes(without_noise)),
    "dW without d, dU without r": Break(
        "masks", CELL + "gradients", takes(without_noise)
    ),
    # The recursion back.
    "cotangents a step late": Break("steps", ADJOINTS + "Terms.at", takes(a_step_late)),
    "cotangents of the last states lost": Break(
        "steps", BACKWARD + "arriving", takes(lambda options, e: (options, zeros(e)))
    ),
    "no factor at a link": Break(
        "factors",
        ADJOINTS + "Terms.at",
        takes(lambda terms, t: (terms._replace(factor=None), t)),
    ),
    "a factor at the initial state": Break(
        "factors",
        RECURRENCE + "link_factors",
        instead(lambda options, constants: constants.link_factors),
    ),
    "adjoints not clipped": Break(
        "clipped", ADJOINTS + "scaled", instead(lambda options, scale, a: a)
    ),
    "the batch clipped as one": Break(
        "clipped",
        "engine.clipping.norm",
        gives(lambda sizes: tf.ones_like(sizes) * tf.norm(sizes)),
    ),
    "cotangents of later steps forgotten": Break(
        "growth", ADJOINTS + "clipped", gives(forgotten_sum)
    ),
    "what is no state clipped": Break(
        "two states, clipped", ADJOINTS + "scaled", every_one_scaled
    ),
    # Masks and the order of steps.
    "masked steps taken": Break("masks", "engine.states.passed_on", second),
    "masked steps taken back": Break("masks", ADJOINTS + "passed_on", second),
    "deltas of masked steps": Break("masks", ADJOINTS + "chosen", second),
    "cotangents of hidden outputs": Break(
        "masks", BACKWARD + "visible", instead(lambda *_: None)
    ),
    "padding taken for inputs": Break("masks", MASKS + "unpadded", first, True),
    "masked outputs repeated": Break(
        "masks, zero",
        MASKS + "visible",
        takes(lambda options, mask: (options.but(zero_output_for_mask=False), mask)),
        True,
    ),
    "mask not reversed": Break(
        "backwards", MASKS + "processing_order", x_alone_reversed, True
    ),
    "gradients in the order of processing": Break(
        "backwards",
        BACKWARD + "_in_order",
        takes(lambda options, t: (options.but(go_backwards=False), t)),
    ),
    # Windows, all at once.
    "a window a step too long": Break(
        "windows", BACKWARD + "level_pass", longer_window(1)
    ),
    "a window a step too short": Break(
        "windows", BACKWARD + "level_pass", longer_window(-1)
    ),
    "what windows send to the initial states lost": Break(
        "windows",
        BACKWARD + "level_pass",
        gives(lambda result: (Arriving(zeros(result[0].adjoints)), result[1])),
    ),
    "outputs in packed order": Break(
        "windows",
        RECURRENCE + "unpacking",
        instead(lambda mask: tf.zeros_like(mask, tf.int32) + tf.range(mask.shape[1])),
    ),
    "hidden outputs shown": Break(
        "windows", MASKS + "visible", instead(lambda *_: None), True
    ),
    "masked steps before a window not counted": Break(
        "chunks", WINDOWS + "masked_steps", gives(zeros)
    ),
    "the first block filled at its beginning": Break(
        "long chunks",
        WINDOWS + "repeated",
        takes(lambda x, number, place=0: (x, number, 0)),
    ),
    "noise of another example": Break(
        "windows, dropout", BACKWARD + "level_pass", takes(noise_of_others)
    ),
    "several windows of one that holds all": Break(
        "windows, clipped", WINDOWS + "held_by_one", gives(tf.zeros_like), True
    ),
    "the last window a step too long": Break(
        "last window", RECURRENCE + "_last_window", longer_window(1)
    ),
    "the last window never begins at the initial state": Break(
        "last window", RECURRENCE + "chosen", instead(lambda mask, x, y: y + 0 * x)
    ),
    # Random numbers of every step.
    "the way back finds other draws": Break(
        "draws",
        BACKWARD + "along_time",
        takes(lambda cell, draws, blocks: (cell, draws_turned(draws), blocks)),
    ),
    "a block computed again draws anew": Break(
        "draws, checkpoints",
        BACKWARD + "computed_again",
        takes(
            lambda options, weights, noise, starts, inputs, numbers, blocks: (
                *(options, weights, noise, starts, inputs),
                lambda start, size: numbers(start + 1, size),
                blocks,
            )
        ),
    ),
    "the last window draws as the first steps do": Break(
        "draws, last window",
        RECURRENCE + "of_steps",
        instead(lambda draws, start, size: draws),
    ),
    "second derivatives of other draws": Break(
        "draws, second order", COMPOSED + "drawn", gives(draws_turned)
    ),
    # Windows step by step.
    "sliding windows that go on": Break(
        "sliding", BACKWARD + "sliding_pass", longer_window(1)
    ),
    "losses in every window": Break("sliding", WINDOWS + "where", second),
    "steps counted from the end of a checkpoint's block": Break(
        "sliding", BACKWARD + "sliding_pass", takes(from_the_end)
    ),
    "masked steps counted as real": Break(
        "sliding, clipped", BACKWARD + "masked_steps", gives(zeros)
    ),
    # Blocks and checkpoints, parts of the batch.
    "a block cut a step early": Break(
        "blocks",
        BACKWARD + "cut",
        takes(lambda x, start, size: (x, max(start - 1, 0), size)),
    ),
    "the steps that fill the last block taken back": Break(
        "blocks",
        BACKWARD + "plain_pass",
        takes(lambda options, valid, *rest: (options, None, *rest)),
    ),
    "the sums of other blocks lost": Break(
        "blocks", BACKWARD + "walk", takes(without_sums)
    ),
    "saved tensors of the step before": Break(
        "two states", BACKWARD + "from_storage", saved_late
    ),
    "the checkpoint of another block": Break(
        "checkpoints", BACKWARD + "computed_again", takes(other_checkpoints)
    ),
    "computed again without the mask": Break(
        "checkpoints", "engine.kept.states_pass", takes(again_without_mask)
    ),
    "computed again without noise": Break(
        "checkpoints", "engine.kept.states_pass", takes(again_without_noise)
    ),
    "the sums of one part": Break(
        "parts", BACKWARD + "summed", takes(lambda parts, dtype: (parts[:1], dtype))
    ),
    "noise of another example of the part": Break(
        "parts", "engine.parts.split", gives(noise_exchanged), True
    ),
    # The output layer.
    "V not transposed": Break(
        "output layer",
        BACKWARD + "sent_back",
        instead(lambda q, layer: tf.tensordot(q, layer[0], 1)),
    ),
    "dV of the states before": Break(
        "output layer",
        BACKWARD + "sum_of_products",
        takes(lambda h, q: (tf.roll(h, 1, 0), q)),
    ),
    "dc lost": Break("output layer", BACKWARD + "bias_gradient", gives(zeros)),
    "dc of one example": Break(
        "last output", "engine.output_layer.total", instead(lambda q, axis: q[0])
    ),
    "hidden outputs without c": Break(
        "output layer, masks", MASKS + "read_out", takes(lambda *args: args[:4]), True
    ),
    # Derivatives of second order.
    "masked steps, second order": Break("second order", HIGHER + "passed_on", second),
    "the initial state's second derivative lost": Break(
        "second order",
        HIGHER + "_gradient_of_states",
        gives(lambda d: (d[0], zeros(d[1]), d[2])),
    ),
    "an output layer without a second derivative": Break(
        "second order", COMPOSED + "shown", takes(constant_layer)
    ),
    "windows that never begin at the initial state": Break(
        "second order, windows",
        COMPOSED + "_starts",
        gives(lambda starts: mapped(tf.stop_gradient, starts)),
    ),
    "scales of clipping lost": Break(
        "second order, clipped", HIGHER + "_scales_loop", gives(tf.ones_like)
    ),
    "factors lost, second order": Break(
        "second order, factors", COMPOSED + "over_steps", takes(without_factors)
    ),
    "states before from the wrong side": Break(
        "states", HIGHER + "_before", instead(behind)
    ),
    "a link that is not transposed": Break(
        "linear scan", HIGHER + "Link.transpose", first
    ),
    "links at fixed states": Break(
        "linear scan", HIGHER + "Link.apply", takes(at_fixed_states)
    ),
    # The joint of forward and backward; sums.
    "the inner outputs": Break("outputs", EXPLICIT + "explicit", inner_outputs),
    "residuals with a gradient": Break("residuals", EXPLICIT + "tf", nothing_cut_off),
    "an example that is taken twice counted once": Break(
        "gathered", EXPLICIT + "_dense", instead(last_of_each)
    ),
    "products in half precision": Break(
        "half precision", "runtime.tensors.sum_of_products", instead(in_half), True
    ),
    "sums of blocks in half precision": Break(
        "half precision, blocks", BACKWARD + "walk", takes(rounded_sums)
    ),
    # Cells compiled from one step.
    "a weight without a gradient": Break(
        "any cell",
        DERIVED + "Derived.weights_from",
        gives(lambda weights: [tf.stop_gradient(weights[0]), *weights[1:]]),
    ),
    "adjoints of a compiled cell too small": Break(
        "any cell",
        DERIVED + "Derived.step_back",
        gives(lambda found: (mapped(lambda a: 0.9 * a, found[0]), found[1])),
    ),
    "deltas of a compiled cell in another order": Break(
        "any cell",
        DERIVED + "Derived.gradients",
        takes(
            lambda self, w, x, point, d, *rest: (self, w, x, point, turned(d), *rest)
        ),
    ),
    # The steps of LSTM and GRU.
    "a cell state that fades": Break(
        "LSTM",
        "cells.lstm.LSTM.__call__",
        takes(
            lambda self, x, states, *rest: (
                self,
                x,
                [states[0], 0.9 * states[1]],
                *rest,
            )
        ),
    ),
    "an output of the cell state before": Break(
        "LSTM",
        "cells.lstm.LSTM.__call__",
        gives(lambda found: (tf.tanh(found[1][1]) * found[0], found[1])),
    ),
    "a reset gate on the other side": Break(
        "GRU",
        "cells.gru.GRU._reset_before",
        lambda _: (
            lambda self, p, h, U, b, factors: self._reset_after(p, h, U, b, factors)
        ),
    ),
    "factors of one gate for all": Break(
        "GRU",
        "cells.gru.of_gates",
        takes(
            lambda rows, kernel, factors, number: (
                rows,
                kernel,
                list(factors[:1]) * len(factors),
                number,
            )
        ),
    ),
    # What is measured of the gradient.
    "a state's norms for another's": Break(
        "flow", "flow.measurement._norms", gives(lambda norms: tf.reverse(norms, [0]))
    ),
    "a gate for another": Break(
        "flow",
        "cells.lstm.LSTM.insides",
        gives(lambda gates: dict(zip(gates, [*gates.values()][::-1], strict=True))),
    ),
    "masked steps among the real ones": Break(
        "flow", "flow.measurement._Packed.of", lambda _: lambda self, norms: norms
    ),
    "some of the losses for all": Break(
        "flow",
        "flow.lags._spread",
        takes(lambda places, number: (places, number // 2)),
    ),
    "factors of another example": Break(
        "any cell, dropout",
        DERIVED + "_Lead.spread",
        gives(lambda factors: tf.roll(factors, 1, 0)),
    ),
}
