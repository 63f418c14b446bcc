"""What a mask and the order of processing mean for inputs, outputs and counts of steps.

A mask m_t is bool (batch, timesteps), False at steps to skip. `options` are those of the
recurrence.
"""

import tensorflow as tf

from keras_bptt.runtime.tensors import beside, chosen, size_of, where, widened


def processing_order(options, x, mask):
    """x (batch, timesteps, ...) and m (batch, timesteps), first step first."""
    if options.go_backwards:
        return tf.reverse(x, [1]), mask if mask is None else tf.reverse(mask, [1])
    return x, mask


def passed_on(mask, new, before):
    """`new` at a real step; at a masked one (mask (batch, 1) is False) all stays."""
    return tf.nest.map_structure(lambda n, b: chosen(mask, n, b), new, before)


def read_out(options, mask, y, last, output_layer=()):
    """The outputs: y of all steps where it is asked for, else of the last state.

    What is hidden is 0; of an output layer it is the bias, the output for a state of 0.
    """
    seen = visible(options, mask)
    if not options.return_sequences:
        return last if seen is None else where(beside(seen[:, -1], last), last)
    _, *c = output_layer or [None]
    if not c or seen is None:
        return where(None if seen is None else beside(seen, y), y)
    # In wide numbers, for the gradient of c is a sum over what is hidden.
    shown = tf.where(beside(seen, y), widened(y), widened(c[0]))
    return tf.cast(shown, y.dtype)


def visible(options, mask):
    """c_t (batch, timesteps, 1): where the output is the state; elsewhere it is 0.

    The same map takes a cotangent of the outputs back to e_t.
    """
    if mask is None or options.zero_output_for_mask:
        return for_states(mask)
    # From the first unmasked step on. Rows without one are 0 throughout.
    first = tf.argmax(tf.cast(mask, tf.int32), 1, output_type=tf.int32)[:, None]
    steps = tf.range(tf.shape(mask)[1])
    return for_states((steps >= first) & tf.reduce_any(mask, 1, keepdims=True))


def for_states(x):
    """`x` (batch, timesteps), the same for a whole state: (batch, timesteps, 1)."""
    # Of a mask of unknown sizes LiteRT takes no x[:, :, None].
    return None if x is None else tf.expand_dims(x, 2)


def link_factors(options, constants):
    """The factors, 1 where a link comes from the initial state: at the first real step."""
    xi, mask = constants.link_factors, constants.mask
    if xi is None:
        return None
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


def filler(x, mask):
    """What stands in the place of masked inputs: an example's first real one.

    So that no cell meets what padding may hold (NaN, say), nor an input that is none. An
    example without a real step has that of another one; without any they are zeros.
    """
    if mask is None:
        return None
    first = tf.argmax(tf.cast(mask, tf.int32), 1, output_type=tf.int32)
    found = tf.gather(x, first, batch_dims=1)
    real = tf.reduce_any(mask, 1, keepdims=True)
    found = where(beside(real, found), found)
    # The last example with a real step; by a maximum, for an argmax of no example raises.
    numbers = tf.where(real[:, 0], tf.range(size_of(x, 0)), 0)
    another = tf.maximum(tf.reduce_max(numbers), 0) + tf.zeros_like(first)
    found = tf.where(beside(real, found), found, tf.gather(found, another))
    return tf.stop_gradient(found)[:, None]


def unpadded(x, mask, fill):
    """`x` (batch, timesteps, ...) with `fill` in the place of masked inputs."""
    return x if mask is None else chosen(for_states(mask), x, fill)


def packing(mask):
    """The order in which an example's masked steps come first, then its unmasked ones."""
    return tf.argsort(tf.cast(mask, tf.int32), 1, stable=True)


def unpacking(mask):
    """For each step the place of the last unmasked one up to it, in packed order.

    Before the first one, where there is none, it is any place.
    """
    return tf.maximum(masked_steps(mask) + real_steps_up_to(mask) - 1, 0)
