"""The backward pass over windows, all of them at once: k2 steps, however long the sequence.

Time is cut into n blocks of k1 steps, which are rows of the batch. The window of a block is
its own k1 steps and those before, k2 in all: it ends with the block, and begins k2 steps
before that end. Chunks, k1 = k2, are blocks. Other windows overlap, and a step belongs to
k2 / k1 of them.

No window is copied. At first each window is in its own block, where its losses are: k1
steps back in all blocks at once. What leaves a block is carried into the one before, and k1
more steps take every window through that, without losses; and so on, until k2 steps are
done, one after the other. The deltas of a step add up. Each level costs what the first
does, and memory is two deltas for each step, whatever k2 / k1 is.
"""

import dataclasses

import tensorflow as tf

from keras_bptt.engine.masks import masked_steps
from keras_bptt.engine.passes import steps_back
from keras_bptt.runtime.tensors import at_most, filled, shifted, size_of, total, where, widened


def windows_pass(options, valid, U, ds, h, z, e, mask, r, factors):
    """`passes.backward_pass` over all windows of a truncation.

    Args:
        options: of the recurrence, with the truncation.
        valid, factors: None.
        ds: what comes back to the last step.
        U, h, z, e, mask, r: as `backward_pass` has them, for the whole sequence. The mask
            is False before the first real step of an example, nowhere else.

    Returns:
        What the windows send to h_0, and delta, time-major, the sum over all windows.
    """
    del valid, factors
    k1, k2 = options.truncation.stride, options.truncation.steps
    levels, rest = (k2 - 1) // k1 + 1, (k2 - 1) % k1 + 1
    steps, batch = size_of(h if z is None else z, 0), size_of(ds, 0)
    n = (steps + k1 - 1) // k1
    missing, place = n * k1 - steps, 0
    if mask is None and levels == 1:
        # Steps to fill the first block, at its end: nothing comes back to there.
        place = k1 - missing
    elif mask is None and not at_most(missing, 0):
        # Before its first step, for windows to pass through to h_0.
        mask = tf.ones([batch, steps], tf.bool)
    h, z = (filled(t, missing, place) for t in (h, z))
    e, mask = (filled(t, missing, place, axis=1) for t in (e, mask))
    before = masked_steps(mask)
    # A step of all blocks is read where it is: (n, batch, units) as n * batch rows.
    h, z = (
        t if t is None else tf.reshape(t, [n, k1, batch, t.shape[2]]) for t in (h, z)
    )
    mask = mask if mask is None else mask[:, :, None]
    e, m = (
        t if t is None else tf.reshape(t, [batch, n, k1, t.shape[2]]) for t in (e, mask)
    )
    r = r if r is None else tf.tile(r, [n, 1])
    # A loop of one step is none.
    single = dataclasses.replace(
        options, truncation=None, unroll=options.unroll or k1 == 1
    )

    def rows(t):
        return tf.reshape(t, [n * batch, t.shape[2]])

    def level(i, carry, size):
        """Take every window `size` steps back from the end of the block it is in."""

        def inputs(t):
            t += k1 - size
            h_t, z_t = (x if x is None else rows(x[:, t]) for x in (h, z))
            e_t, m_t = (
                x if x is None else rows(tf.transpose(x[:, :, t], [1, 0, 2]))
                for x in (e, m)
            )
            return h_t, z_t, losses(i, e_t), m_t, None

        return steps_back(single, U, r, carry, inputs, size)

    def losses(i, e_t):
        """Of the windows at level i: at first those of their blocks, then none."""
        if options.adjoint_clipnorm is None or m is None:
            return e_t if isinstance(i, int) and i == 0 else None
        # But an example that one window holds has all its losses there, for to clip it in
        # several would make a difference to what it is without its padding.
        one = n * k1 - before[:, 0] <= k2
        last = tf.range(n)[:, None] == n - 1 - i
        return where(rows(tf.where(one, last, tf.equal(i, 0))[..., None]), e_t)

    def sent_to_h_0(a, size):
        """What has got to the first real step, `size` steps from the end of a block."""
        first = (tf.range(n)[:, None, None] + 1) * k1 - size
        a = tf.reshape(a, [n, batch, U.shape[0]])
        return total(where(first <= before, a), 0)

    def body(i, a, home, delta):
        a, more = level(i, shifted(a, -batch), k1)
        return i + 1, a, home + widened(a[:batch]), delta + widened(more)

    a, delta = level(0, filled(ds, (n - 1) * batch), k1)
    if levels == 1:
        home = sent_to_h_0(a, k1)
    else:
        state = (1, a, widened(a[:batch]), widened(delta))
        _, a, home, delta = tf.while_loop(lambda i, *_: i < levels - 1, body, state)
        # The last level may be shorter.
        a, more = level(levels - 1, shifted(a, -batch), rest)
        home += sent_to_h_0(a, rest)
        delta = tf.concat([delta[:-rest], delta[-rest:] + widened(more)], 0)
    home, delta = tf.cast(home, ds.dtype), tf.cast(delta, ds.dtype)
    delta = tf.reshape(delta, [k1, n, batch, U.shape[0]])
    delta = tf.reshape(tf.transpose(delta, [1, 0, 2, 3]), [n * k1, batch, U.shape[0]])
    if at_most(missing, 0):
        return home, delta
    return home, tf.concat([delta[:place], delta[place + missing :]], 0)
