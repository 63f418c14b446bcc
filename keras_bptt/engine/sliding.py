"""The backward pass over windows, step by step: as long as the sequence, and lean.

`windows.py` takes all windows back at once, which needs all states at once. Where they are
computed again block by block, the windows that hold a step go back through it together, k2
/ k1 of them, as rows beside each other. The youngest is that of the block the step is in,
whose losses are its own. On entering the next block of k1 steps each window becomes the
next older one, and none goes on after k2 steps.
"""

import tensorflow as tf

from keras_bptt.engine.loops import at, batch_major_at, scan
from keras_bptt.engine.passes import adjoint_step
from keras_bptt.runtime.tensors import filled, shifted, size_of, total, where


def rows_of(truncation, ds):
    """What comes back to the last step in each window (windows, batch, units)."""
    return filled(ds[None], _windows(truncation) - 1, 1)


def sliding_pass(options, valid, U, rows, h, z, e, mask, r, last, real):
    """`passes.backward_pass` over the windows of a truncation.

    Args:
        options: of the recurrence, with the truncation.
        valid, U, h, z, e, mask, r: as `backward_pass` has them. The mask is False before
            the first real step of an example, nowhere else.
        rows: what comes back to the last of these steps, as `rows_of` has it.
        last: how many steps there are after the first of these.
        real: how many unmasked steps an example has (batch, 1), where there is a mask.

    Returns:
        What these steps send back to the one before, (windows, batch, units), and delta,
        time-major, the sum over the windows.
    """
    k1, k2 = options.truncation.stride, options.truncation.steps
    number, units = _windows(options.truncation), U.shape[0]
    mask = mask if mask is None else mask[:, :, None]
    age = tf.range(number)[:, None, None]
    adjoint = adjoint_step(options, U, None if r is None else tf.tile(r, [number, 1]))

    def each(t):
        return t if t is None else tf.tile(t, [number, 1])

    def step(rows, h, z, e, m, later):
        block, done = later // k1, later % k1
        new = tf.where(tf.equal(done, 0) & (later > 0), shifted(rows, 1), rows)
        new = where(age * k1 + done < k2, new)
        # Before its first real step all that an example has goes on to h_0.
        rows = new if m is None else tf.where(m, new, rows)
        entry = 0
        if options.adjoint_clipnorm is not None and m is not None:
            # As in `windows.py`: an example that one window holds has all its losses there.
            entry = tf.where(real <= k2, block, 0)
        rows += where(tf.equal(age, entry), e)
        flat = tf.reshape(rows, [-1, units])
        back, delta = adjoint(flat, each(h), each(z), None, each(m), None)
        back, delta = (tf.reshape(t, tf.shape(rows)) for t in (back, delta))
        return back, tf.cast(total(delta, 0), delta.dtype)

    def inputs(t):
        return *at(t, h, z), *batch_major_at(t, e, mask), last - t

    steps = size_of(h if z is None else z, 0)
    return scan(
        step,
        rows,
        inputs,
        steps,
        valid=valid,
        reverse=True,
        unroll=options.unroll,
        like=rows[0],
    )


def _windows(truncation):
    """The most windows that hold one step."""
    return (truncation.steps - 1) // truncation.stride + 1
