"""The one recursion forward: s_t = step(drive_t, s_{t-1}) where m_t, else s_{t-1}."""

import tensorflow as tf

from keras_bptt.engine.loops import scan
from keras_bptt.engine.masks import for_states, passed_on
from keras_bptt.runtime.tensors import mapped, size_of


def states_pass(static, valid, weights, noise, before, drive, mask):
    """The cell's step, one after the other.

    Args:
        static: the options of the recurrence; which of the states and of what is saved are
            wanted of all steps.
        valid: how many of the steps count, None: all.
        before: the states before the first step.
        drive, mask: batch-major.

    Returns:
        The last states, and of the wanted tensors all steps, time-major.
    """
    options, stacked = static
    cell, mask = options.cell, for_states(mask)

    def step(states, terms):
        drive, m = terms
        after, saved = cell.step(weights, drive, states, noise)
        after = passed_on(m, after, states)
        return after, [(*after, *saved)[i] for i in stacked]

    def read(t):
        return mapped(lambda x: x[:, t], (drive, mask))

    shapes = cell.shapes(weights)
    shapes = [(*shapes.states, *shapes.saved)[i] for i in stacked]
    steps = size_of(tf.nest.flatten(drive)[0], 1)
    last, tensors = scan(
        step, before, read, steps, shapes, valid=valid, unroll=options.unroll
    )
    return last, *tensors
