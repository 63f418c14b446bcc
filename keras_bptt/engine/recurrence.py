"""The recurrence: a cell's step repeated over time, differentiable in all its arguments.

Its first derivative is written out (`forward`, `backward`), its derivatives of higher order
are those of `composed`. What a truncation asks for beyond the way back stands here: steps
are counted in real (unmasked) ones, so an example is packed first, its masked steps, then
its real ones, which then end where the sequence ends; and where the last output alone is
asked for, there is one window, from a state that another recurrence computed without a
gradient. Nothing that grows with the number of steps is kept then.
"""

import tensorflow as tf

from keras_bptt.engine.backward import backward
from keras_bptt.engine.composed import composed
from keras_bptt.engine.draws import drawn, of_steps
from keras_bptt.engine.forward import forward
from keras_bptt.engine.kept import kept_tensors
from keras_bptt.engine.masks import (
    link_factors,
    masked_steps,
    packing,
    processing_order,
    read_out,
    unpacking,
)
from keras_bptt.engine.options import Arguments, Constants, Options
from keras_bptt.engine.output_layer import last_output
from keras_bptt.runtime.explicit import Derivation, cut_off, explicit_first_order
from keras_bptt.runtime.slices import part
from keras_bptt.runtime.tensors import at_most, chosen, mapped, size_of, widened


def backward_or_again(options, constants, outputs, kept, cotangents, arguments):
    """`backward`; where nothing was kept, the forward pass goes first once more."""
    _, weights, states, output_layer, _ = arguments
    needed = kept_tensors(options, constants.mask, states, weights, output_layer)
    if not options.keep_states and (needed or options.checkpoint_every is not None):
        _, kept = forward(options.but(keep_states=True), constants, arguments)
    return backward(options, constants, outputs, kept, cotangents, arguments)


DERIVATION = Derivation(forward, backward_or_again, composed)


def recurrence(options: Options, constants: Constants, arguments: Arguments):
    """Run the recurrence, differentiable with respect to every tensor of the arguments.

    Returns:
        (y, states): the outputs (batch, timesteps, ...) with `return_sequences`, else the
        last one (batch, ...); and the tuple of the last states.
    """
    if arguments.output_layer and not options.return_sequences:
        V_c = arguments.output_layer
        y, states = recurrence(options, constants, arguments._replace(output_layer=()))
        return last_output(y, V_c), states
    options = options.but(observed=bool(arguments.zeros))
    x, mask = arguments.x, constants.mask
    if mask is not None:
        x = tf.ensure_shape(x, [None, mask.shape[1], *[None] * (len(x.shape) - 2)])
        arguments = arguments._replace(x=x)
    if options.truncation is None or at_most(size_of(x, 1), options.truncation.steps):
        return _over_all(options.whole, constants, arguments)
    return _over_windows(options, constants, arguments)


def _over_all(options, constants, arguments):
    constants = constants._replace(
        link_factors=link_factors(options, constants),
        draws=_at_once(options, constants, arguments),
    )
    return explicit_first_order(DERIVATION, options, constants, arguments)


def _at_once(options, constants, arguments):
    """The draws: as numbers where the states of all steps are kept too."""
    if options.keep_states and options.checkpoint_every is None:
        return drawn(options.cell, constants.draws, size_of(arguments.x, 1))
    return constants.draws


def _over_windows(options, constants, arguments):
    """The recurrence, its gradient truncated."""
    asked, mask = options, constants.mask
    options = options.but(go_backwards=False, zero_output_for_mask=False)
    # What belongs to steps: first step first and, where there is a mask, packed.
    sequences = arguments.x, *arguments.zeros
    sequences = [processing_order(asked, t, None)[0] for t in sequences]
    if mask is not None:
        _, mask = processing_order(asked, arguments.x, mask)
        places = packing(mask)
        *sequences, packed = (_gathered(options, t, places) for t in (*sequences, mask))
        draws = drawn(options.cell, constants.draws, size_of(arguments.x, 1))
        if draws is not None:
            numbers = tuple(_gathered(options, t, places) for t in draws.numbers)
            draws = draws._replace(numbers=numbers)
        constants = constants._replace(mask=packed, draws=draws)
    x, *zeros = sequences
    arguments = arguments._replace(x=x, zeros=tuple(zeros))
    if not options.return_sequences:
        _, last = _last_window(options, constants, arguments)
        return read_out(asked, mask, None, last[options.cell.output]), last
    constants = constants._replace(draws=_at_once(options, constants, arguments))
    y, last = explicit_first_order(DERIVATION, options, constants, arguments)
    if mask is not None:
        # In wide numbers, for a step that is shown often has a sum of cotangents.
        y = tf.cast(_gathered(options, widened(y), unpacking(mask)), y.dtype)
    return read_out(asked, mask, y, None, arguments.output_layer), last


def _last_window(options, constants, arguments):
    """The recurrence over all steps, whose gradient is that of the last window alone."""
    steps = size_of(arguments.x, 1)
    start = steps - options.truncation.steps
    end = start
    if not isinstance(start, int):
        # One step at least, for XLA cannot walk none. Where there is none it is not used.
        start, end = tf.maximum(start, 0), tf.maximum(start, 1)
    mask, draws = constants.mask, constants.draws
    before = constants._replace(draws=of_steps(draws, 0, end))
    window = constants._replace(draws=of_steps(draws, start, steps - start))
    # No real step lies before the window: it begins at the initial state.
    at_start = tf.reshape(tf.equal(start, 0), [1, 1])
    if mask is not None:
        before = before._replace(mask=mask[:, :end])
        window = window._replace(mask=mask[:, start:])
        at_start = masked_steps(mask) >= start
    numbers = mapped(cut_off, arguments._replace(x=arguments.x[:, :end], zeros=()))
    unkept = options.whole.but(keep_states=False, observed=False)
    _, states = _over_all(unkept, before, numbers)
    states = tuple(
        chosen(at_start, initial, tf.stop_gradient(state))
        for initial, state in zip(arguments.states, states, strict=True)
    )
    x, *zeros = (
        part(t, start, steps - start, axis=1) for t in (arguments.x, *arguments.zeros)
    )
    arguments = arguments._replace(x=x, states=states, zeros=tuple(zeros))
    return _over_all(options.whole, window, arguments)


def _gathered(options, t, places):
    """The steps of `t` at these places; as they are where one window holds all of them."""
    steps = size_of(t, 1)
    if not isinstance(steps, int):
        places = tf.where(steps <= options.truncation.steps, tf.range(steps), places)
    return tf.gather(t, places, batch_dims=1)
