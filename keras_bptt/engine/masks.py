"""What a mask and the order of processing mean for inputs, outputs and counts of steps.

A mask m_t is bool (batch, timesteps), False at steps to skip. `options` are those of the
recurrence.
"""

import tensorflow as tf

from keras_bptt.engine.passes import for_units
from keras_bptt.runtime.tensors import where, widened


def processing_order(options, x, mask):
    """x (batch, timesteps, features) and m (batch, timesteps), first step first."""
    if options.go_backwards:
        return tf.reverse(x, [1]), mask if mask is None else tf.reverse(mask, [1])
    return x, mask


def read_out(options, mask, h, last, c=None):
    """Return (y, h_T); of an output layer, whose bias is c, (p, h_T) for h V + c."""
    seen = visible(options, mask)
    if options.return_sequences:
        if c is None or seen is None:
            return where(seen, h), last
        # In wide numbers, for the gradient of c is a sum over what is hidden.
        shown = tf.where(seen, widened(h), widened(c))
        return tf.cast(shown, h.dtype), last
    return last if seen is None else where(seen[:, -1], last), last


def visible(options, mask):
    """c_t (batch, timesteps, 1): where the output is the state; elsewhere it is 0.

    The same map takes a cotangent of the outputs back to e_t.
    """
    if mask is None or options.zero_output_for_mask:
        return for_units(mask)
    # From the first unmasked step on. Rows without one are 0 throughout.
    first = tf.argmax(tf.cast(mask, tf.int32), 1, output_type=tf.int32)[:, None]
    steps = tf.range(tf.shape(mask)[1])
    return for_units((steps >= first) & tf.reduce_any(mask, 1, keepdims=True))


def link_factors(options, constants):
    """The factors, 1 where a link comes from h_0: at the first unmasked step."""
    xi, mask = constants.factors, constants.mask
    if mask is None:
        return tf.where(tf.range(tf.shape(xi)[1]) == 0, tf.ones_like(xi), xi)
    mask = tf.reverse(mask, [1]) if options.go_backwards else mask
    return tf.where(mask & (real_steps_up_to(mask) == 1), tf.ones_like(xi), xi)


def real_steps_up_to(mask):
    """How many unmasked steps there are up to each one."""
    return tf.cumsum(tf.cast(mask, tf.int32), 1)


def masked_steps(mask):
    """How many masked steps an example has: (batch, 1), or 0 without a mask."""
    if mask is None:
        return 0
    return tf.reduce_sum(tf.cast(~mask, tf.int32), 1, keepdims=True)


def packing(mask):
    """The order in which an example's masked steps come first, then its unmasked ones."""
    return tf.argsort(tf.cast(mask, tf.int32), 1, stable=True)


def unpacking(mask):
    """For each step the place of the last unmasked one up to it, in packed order.

    Before the first one, where there is none, it is any place.
    """
    return tf.maximum(masked_steps(mask) + real_steps_up_to(mask) - 1, 0)
