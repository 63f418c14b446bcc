"""What is kept of h between the two passes, and how the backward pass has a block of it.

Either all of h: the outputs, where they tell it, else the pieces that the blocks of the
forward pass made. Or, with `checkpoint_every`, the states before the blocks: then a block
is computed again when its turn comes, by the same pass from the same numbers.
"""

import tensorflow as tf

from keras_bptt.engine.blocks import cut, padded
from keras_bptt.runtime.execution import call
from keras_bptt.engine.passes import dropped, forward_pass, project, to_time_major


def outputs_are_states(options, mask, V):
    """Whether the outputs tell all of h, so that it need not be kept beside them."""
    every_one = options.return_sequences and options.checkpoint_every is None
    return every_one and mask is None and V is None


def from_outputs(y, h_0, blocks):
    """A function of start and size: h of these steps, time-major, and the state before.

    y is h, batch-major.
    """
    y = padded(y, blocks)
    return _stored(lambda start, size: to_time_major(cut(y, start, size)), h_0)


def from_pieces(pieces, h_0, blocks):
    """The same, of consecutive pieces of h, time-major."""
    h = padded(pieces, blocks, axis=0)
    return _stored(lambda start, size: cut(h, start, size, axis=0), h_0)


def _stored(states_of, h_0):
    def states(start, size, valid, m):
        del valid, m
        if isinstance(start, int):
            first = h_0 if start == 0 else states_of(start - 1, 1)[0]
        else:
            before = states_of(tf.maximum(start - 1, 0), 1)[0]
            first = tf.where(start > 0, before, h_0)
        return states_of(start, size), first

    return states


def computed_again(options, starts, blocks, x, d, r, W, U, b):
    """The same, from the states before the blocks (blocks, batch, units)."""

    def states(start, size, valid, m):
        # With one block its size may be a tensor.
        place = 0 if isinstance(start, int) and start == 0 else start // blocks.size
        first = starts[place]
        z = project(dropped(d, cut(x, start, size)), W, b)
        arguments = valid, U, first, z, m, r
        _, h = call(forward_pass, (options, True), options.jit_compile, *arguments)
        return h, first

    return states
