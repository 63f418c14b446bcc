"""The recurrence made of differentiable operations: what its higher derivatives are of.

The first derivative is written out, in `forward` and `backward`. Its own derivatives are
those of the functions here, composed of `higher_orders.states`, which is closed under
differentiation. They are exact, and the first pays nothing for them.
"""

import functools

import tensorflow as tf

from keras_bptt.engine.draws import drawn
from keras_bptt.engine.higher_orders import Known, states
from keras_bptt.engine.masks import (
    filler,
    for_states,
    masked_steps,
    processing_order,
    read_out,
    unpadded,
)
from keras_bptt.engine.options import Arguments, Constants
from keras_bptt.engine.output_layer import shown
from keras_bptt.engine.windows import held_by_one
from keras_bptt.runtime.slices import one, part, placed
from keras_bptt.runtime.tensors import (
    beside,
    chosen,
    filled,
    mapped,
    repeated,
    size_of,
    to_batch_major,
    to_time_major,
    wide,
)


def in_wide_numbers(composed):
    """`composed`, for numbers of any dtype: in half precision its sums would lose most."""

    @functools.wraps(composed)
    def widened(options, constants, arguments):
        narrow = arguments.states[0].dtype
        dtype = wide(narrow)
        if dtype == narrow:
            return composed(options, constants, arguments)

        def cast(t):
            return tf.cast(t, dtype) if t.dtype.is_floating else t

        options = options.but(cell=options.cell.called_with(narrow))
        outputs = composed(options, *mapped(cast, (constants, arguments)))
        return mapped(lambda y: tf.cast(y, narrow), outputs)

    return widened


@in_wide_numbers
def composed(options, constants, arguments):
    """(y, states), of all steps or, with a truncation, of all windows."""
    if arguments.zeros:
        raise NotImplementedError(
            "An observed recurrence has first derivatives alone. Received: a derivative of "
            "its adjoints. Differentiate the recurrence without observing it."
        )
    options.cell.check_higher_orders()
    over = over_steps if options.truncation is None else over_windows
    return over(options, constants, arguments)


def over_steps(options, constants, arguments):
    """The recurrence over all that it is given."""
    place, output_layer = options.cell.output, arguments.output_layer
    _, mask = processing_order(options, arguments.x, constants.mask)
    after = every_state(options, constants, arguments)
    last = mapped(lambda s: one(s, size_of(s, 0) - 1), after)
    y = None
    if options.return_sequences:
        y = shown(to_batch_major(after[place]), output_layer)
    return read_out(options, mask, y, last[place], output_layer), last


def every_state(options, constants, arguments):
    """The states of all steps, time-major."""
    x, weights, initial, *_ = arguments
    x, mask = processing_order(options, x, constants.mask)
    inputs = to_time_major(unpadded(x, mask, filler(x, mask)))
    of_steps, factors = to_time_major(for_states(mask)), None
    if constants.link_factors is not None:
        k = to_time_major(for_states(constants.link_factors))
        k = chosen(of_steps, k, tf.ones_like(k))
        factors = tuple(beside(k, s[None]) for s in initial)
    draws, numbers = drawn(options.cell, constants.draws, size_of(x, 1)), ()
    if draws is not None:
        numbers = mapped(to_time_major, draws.numbers)
    known = Known(constants.noise, of_steps, factors, numbers)
    return states(options, known, inputs, initial, weights)


def over_windows(options, constants, arguments):
    """The recurrence over all windows of a truncation, each from a state that is given.

    It holds a copy of every window, k2 / k1 times the sequence.
    """
    x, weights, initial, output_layer, _ = arguments
    k1, k2 = options.truncation.stride, options.truncation.steps
    steps = size_of(x, 1)
    n = (steps + k1 - 1) // k1
    # The window of the first block begins so many steps before the sequence.
    missing = n * k1 - steps + k2 - k1
    mask = constants.mask
    mask = tf.ones(tf.shape(x)[:2], tf.bool) if mask is None else mask
    before_real = masked_steps(mask)
    starts = _starts(options, constants, arguments, missing, n)
    x, mask = placed(x, missing, steps + missing, 1), filled(mask, missing, axis=1)
    first = tf.range(n) * k1

    def windows(t):
        t = tf.gather(t, first[:, None] + tf.range(k2), axis=1)
        return tf.reshape(t, [-1, k2, *t.shape[3:]])

    def in_windows(t):
        return tf.reshape(t, [-1, n, *t.shape[1:]])

    noise = mapped(lambda t: tf.repeat(t, n, axis=0), constants.noise)
    draws = drawn(options.cell, constants.draws, steps)
    if draws is not None:
        numbers = tuple(windows(repeated(t, missing, axis=1)) for t in draws.numbers)
        draws = draws._replace(numbers=numbers)
    y, last = over_steps(
        options.whole,
        Constants(windows(mask), noise, draws=draws),
        Arguments(windows(x), weights, starts),
    )
    y = in_windows(y)
    last = mapped(lambda s: one(in_windows(s), n - 1, axis=1), last)
    of_blocks = part(y, k2 - k1, k1, axis=2)
    of_blocks = tf.reshape(of_blocks, [-1, n * k1, *y.shape[3:]])
    of_blocks = part(of_blocks, n * k1 - steps, steps, axis=1)
    if options.clips:
        fill = steps - k2
        fill = fill if isinstance(fill, int) else tf.maximum(fill, 0)
        of_last = placed(one(y, n - 1, axis=1), fill, fill + k2, axis=1)
        of_last = part(of_last, fill + k2 - steps, steps, axis=1)
        held = held_by_one(options, steps - before_real)
        of_blocks = chosen(held[:, :, None], of_last, of_blocks)
    return shown(of_blocks, output_layer), last


def _starts(options, constants, arguments, missing, n):
    """The states before each window, of which only the initial ones have a gradient."""
    first = tf.range(n) * options.truncation.stride
    every = every_state(options, constants, mapped(tf.stop_gradient, arguments))
    at_start = first[None] <= missing + masked_steps(constants.mask)

    def of(state, s_0):
        state = tf.stop_gradient(to_batch_major(state))
        state = filled(state, missing, axis=1)
        state = tf.gather(state, tf.maximum(first - 1, 0), axis=1)
        state = tf.where(beside(at_start[..., None], state), s_0[:, None], state)
        return tf.reshape(state, [-1, *s_0.shape[1:]])

    return tuple(map(of, every, arguments.states))
