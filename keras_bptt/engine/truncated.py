"""The recurrence with a truncated gradient: windows of it instead of the whole.

The outputs are those of the recurrence. Of the gradient those paths are kept that
`truncation.Truncation` states: time is cut into blocks of k1 = stride steps from its end,
and for the losses of a block the recurrence begins k2 = steps steps before the block's end,
at a state that is a constant.

* Where the last output alone is asked for there is one window: the recurrence over the last
  k2 steps, from a state that another one computed without a gradient. Nothing that grows
  with the number of steps is kept.
* For a sequence the backward pass is that of the recurrence, but that `windows.py` takes
  the place of the loop over all steps.

Steps are counted in unmasked ones. So an example is packed first: its masked steps, then
its real ones, which then end where the sequence ends.

Derivatives of higher order are those of the recurrence over all windows. They hold a copy
of every window, k2 / k1 times the sequence.
"""

import dataclasses

import tensorflow as tf

from keras_bptt.engine import fused
from keras_bptt.engine import recurrence as full
from keras_bptt.runtime.explicit import Derivation, cut_off, explicit_first_order
from keras_bptt.engine.masks import (
    masked_steps,
    packing,
    processing_order,
    read_out,
    unpacking,
    visible,
)
from keras_bptt.engine.passes import project
from keras_bptt.engine.recurrence import Constants, in_wide_numbers
from keras_bptt.runtime.tensors import (
    at_most,
    filled,
    one,
    part,
    placed,
    size_of,
    widened,
)


def truncated_recurrence(options, constants, x, W, U, h_0, b=None, V=None, c=None):
    """`recurrence.recurrence`, its gradient truncated by `options.truncation`, if any."""
    if V is not None and not options.return_sequences:
        h, state = truncated_recurrence(options, constants, x, W, U, h_0, b)
        return full.last_output(h, V, c), state
    mask = constants.mask
    if mask is not None:
        x = tf.ensure_shape(x, [None, mask.shape[1], None])
    if options.truncation is None or at_most(size_of(x, 1), options.truncation.steps):
        return full.recurrence(_whole(options), constants, x, W, U, h_0, b, V, c)
    x, mask = processing_order(options, x, mask)
    asked = options
    options = dataclasses.replace(
        options, go_backwards=False, zero_output_for_mask=False
    )
    if mask is not None:
        x, packed = (_gathered(options, t, packing(mask)) for t in (x, mask))
        constants = constants._replace(mask=packed)
    arguments = options, constants, x, W, U, h_0, b
    if not options.return_sequences:
        _, last = last_window(*arguments)
        return read_out(asked, mask, None, last)
    derivation = Derivation(forward, backward, composed)
    y, last = explicit_first_order(derivation, *arguments, V, c)
    if mask is not None:
        # In wide numbers, for a step that is shown often has a sum of cotangents.
        y = tf.cast(_gathered(options, widened(y), unpacking(mask)), y.dtype)
    return read_out(asked, mask, y, last, c)


def last_window(options, constants, x, W, U, h_0, b):
    """The recurrence over all steps, whose gradient is that of the last window alone."""
    cut = size_of(x, 1) - options.truncation.steps
    end = cut
    if not isinstance(cut, int):
        # One step at least, for XLA cannot walk none. Where there is none it is not used.
        cut, end = tf.maximum(cut, 0), tf.maximum(cut, 1)
    mask, before, window = constants.mask, constants, constants
    # No real step lies before the window: it begins at h_0.
    at_h_0 = cut == 0
    if mask is not None:
        before = constants._replace(mask=mask[:, :end])
        window = constants._replace(mask=mask[:, cut:])
        at_h_0 = masked_steps(mask) >= cut
    numbers = map(cut_off, (x[:, :end], W, U, h_0, b))
    unkept = dataclasses.replace(_whole(options), keep_states=False)
    _, state = full.recurrence(unkept, before, *numbers)
    start = tf.where(at_h_0, h_0, cut_off(state))
    x = part(x, cut, size_of(x, 1) - cut, axis=1)
    return full.recurrence(_whole(options), window, x, W, U, start, b)


def forward(options, constants, x, W, U, h_0, b, V, c):
    """Return the outputs, and what is kept of h: nothing, where they tell it."""
    told = V is None and options.checkpoint_every is None
    options = dataclasses.replace(
        _whole(options), keep_states=options.keep_states and not told
    )
    return fused.forward(options, constants, x, W, U, h_0, b, V, c)


def backward(options, constants, outputs, kept, cotangents, *arguments):
    """Return the gradients of x, W, U, h_0 and, where there are such, b, V and c."""
    x, _, _, h_0, _, V, _ = arguments
    h = None
    if V is None and options.checkpoint_every is None:
        h = states_of(options, constants.mask, outputs[0], h_0)
    elif not kept:
        again = dataclasses.replace(_whole(options), keep_states=True)
        _, kept = fused.forward(again, constants, *arguments)

    def gradients(options):
        return fused.gradients(options, constants, kept, h, cotangents, *arguments)

    steps = size_of(x, 1)
    if isinstance(steps, int):
        return gradients(options)
    # Where one window holds all: full backpropagation, by the same program. In windows, XLA
    # would compile for every number of steps.
    return tf.cond(
        steps <= options.truncation.steps,
        lambda: gradients(_whole(options)),
        lambda: gradients(dataclasses.replace(options, jit_compile=False)),
    )


@in_wide_numbers
def composed(options, constants, x, W, U, h_0, b, V, c):
    """The recurrence over all windows, made of differentiable operations."""
    policy, units = options.truncation, U.shape[0]
    mask, d, r, _ = constants
    steps = size_of(x, 1)
    n = (steps + policy.stride - 1) // policy.stride
    # The window of the first block begins so many steps before the sequence.
    missing = n * policy.stride - steps + policy.steps - policy.stride
    h = full.composed(
        _whole(options), constants, *map(cut_off, (x, W, U, h_0, b)), None, None
    )
    h = filled(cut_off(states_of(options, mask, h[0], h_0)), missing, axis=1)
    mask = tf.ones(tf.shape(x)[:2], tf.bool) if mask is None else mask
    x, mask = placed(x, missing, steps + missing, 1), filled(mask, missing, axis=1)
    first = tf.range(n) * policy.stride

    def windows(t):
        t = tf.gather(t, first[:, None] + tf.range(policy.steps), axis=1)
        return tf.reshape(t, [-1, policy.steps, *t.shape[3:]])

    at_h_0 = first <= masked_steps(mask)
    starts = tf.gather(h, tf.maximum(first - 1, 0), axis=1)
    starts = tf.where(at_h_0[..., None], h_0[:, None], starts)
    each = Constants(windows(mask), _repeated(d, n), _repeated(r, n))
    starts = tf.reshape(starts, [-1, units])
    weights = W, U, starts, b, None, None
    y, last = full.composed(_whole(options), each, windows(x), *weights)
    y = tf.reshape(y, [-1, n, policy.steps, units])
    last = one(tf.reshape(last, [-1, n, units]), n - 1, axis=1)
    of_blocks = part(y, policy.steps - policy.stride, policy.stride, axis=2)
    of_blocks = tf.reshape(of_blocks, [-1, n * policy.stride, units])
    of_blocks = part(of_blocks, n * policy.stride - steps, steps, axis=1)

    def shown(h):
        return h if V is None else project(h, V, c)

    if options.adjoint_clipnorm is None:
        return shown(of_blocks), last
    # As in `windows.py`: an example that one window holds has all its losses there.
    whole = masked_steps(mask) - missing >= steps - policy.steps
    fill = steps - policy.steps
    fill = fill if isinstance(fill, int) else tf.maximum(fill, 0)
    of_last = placed(one(y, n - 1, axis=1), fill, fill + policy.steps, axis=1)
    of_last = part(of_last, fill + policy.steps - steps, steps, axis=1)
    return shown(tf.where(whole[..., None], of_last, of_blocks)), last


def states_of(options, mask, y, h_0):
    """h, from the outputs: what they hide before the first real step is h_0."""
    return y if mask is None else tf.where(visible(options, mask), y, h_0[:, None])


def _gathered(options, t, places):
    """The steps of `t` at these places; as they are where one window holds all of them."""
    steps = size_of(t, 1)
    if not isinstance(steps, int):
        places = tf.where(steps <= options.truncation.steps, tf.range(steps), places)
    return tf.gather(t, places, batch_dims=1)


def _repeated(t, n):
    """(batch, ...) for each of n blocks."""
    return None if t is None else tf.repeat(t, n, axis=0)


def _whole(options):
    """The options without a truncation: the recurrence over all that it is given."""
    return dataclasses.replace(options, truncation=None)
