"""What is kept between the two passes, and how the backward pass has a block of it.

Either the states of all steps and what the cell saves: the pieces that the blocks of the
forward pass made, but for the state that the outputs tell. Or, with `checkpoint_every`, the
states before the blocks: then a block is computed again when its turn comes, by the same
pass from the same numbers.
"""

import tensorflow as tf

from keras_bptt.engine.blocks import cut, padded
from keras_bptt.engine.masks import visible
from keras_bptt.engine.states import states_pass
from keras_bptt.runtime.execution import call
from keras_bptt.runtime.tensors import (
    beside,
    chosen,
    joined_pieces,
    mapped,
    to_time_major,
    where,
)


def outputs_tell(options, mask, output_layer):
    """Whether the outputs tell the state that the cell shows, so that it need not be kept.

    With a mask they might too, where they are not hidden; to read it out of them takes
    longer than to keep it. With a truncation, whose windows want it in one piece anyway,
    that is worth the memory.
    """
    windows = options.truncation is not None and not options.zero_output_for_mask
    hidden = mask is not None and not windows
    every_one = options.return_sequences and options.checkpoint_every is None
    return every_one and not hidden and not output_layer


def kept_tensors(options, mask, states, weights, output_layer):
    """Which of the states and, counted on, of what the cell saves are kept beside y."""
    told = outputs_tell(options, mask, output_layer)
    every = range(number_of_tensors(options.cell, states, weights))
    return tuple(i for i in every if not (told and i == options.cell.output))


def number_of_tensors(cell, states, weights):
    """Of the states and of what is kept of what the cell saves."""
    saved = cell.shapes(weights).saved if cell.keeps_saved else ()
    return len(states) + len(saved)


def from_storage(options, kept, y, mask, initial, blocks):
    """A function of a block: the states before it, those after its steps, what is saved.

    Args:
        kept: consecutive pieces of each tensor that was kept, time-major.
        y: the outputs, batch-major, where they tell a state; else None.
    """
    place, number = options.cell.output, len(initial)
    kept = [padded(pieces, blocks, axis=0) for pieces in kept]
    y, seen = padded(y, blocks), padded(visible(options, mask), blocks)

    def at(start, size):
        found = [cut(pieces, start, size, axis=0) for pieces in kept]
        if y is not None:
            # What the outputs hide before the first real step is the initial state.
            shown, hidden = cut(seen, start, size), initial[place][:, None]
            h = chosen(shown, cut(y, start, size), hidden)
            found.insert(place, to_time_major(h))
        return tuple(found)

    def stored(start, size, valid, m):
        del valid, m
        if isinstance(start, int):
            first = initial
            if start > 0:
                first = mapped(lambda t: t[0], at(start - 1, 1)[:number])
        else:
            before = at(tf.maximum(start - 1, 0), 1)[:number]
            first = tuple(
                tf.where(start > 0, b[0], s)
                for b, s in zip(before, initial, strict=True)
            )
        found = at(start, size)
        return first, found[:number], found[number:]

    return stored


def computed_again(options, weights, noise, starts, inputs, numbers, blocks):
    """The same, from the states before the blocks, each (blocks, batch, ...).

    Args:
        inputs: a function of start, size and mask: x of these steps, batch-major.
        numbers: a function of start and size: their random numbers.
    """
    cell, number = options.cell, len(starts)
    static = options, tuple(range(number_of_tensors(cell, starts, weights)))
    of_steps = mapped(lambda t: t[:, None], noise)

    def again(start, size, valid, m):
        # With one block its size may be a tensor.
        place = 0 if isinstance(start, int) and start == 0 else start // blocks.size
        first = tuple(t[place] for t in starts)
        of_all = (*of_steps, *numbers(start, size))
        drive = cell.project(weights, inputs(start, size, m), of_all)
        given = valid, weights, noise, first, drive, m
        _, *found = call(states_pass, static, options.jit_compile, *given)
        return first, tuple(found[:number]), tuple(found[number:])

    return again


def point_of(cell, weights, x, noise, numbers, first, after, saved, mask):
    """Where the steps of a block are differentiated, from what is stored of them.

    Args:
        x: a function: their inputs, time-major, none of them padding.
        numbers: their random numbers, time-major.
        first: the states before the block.
        mask: bool (timesteps, batch, 1), or None.

    Returns:
        The point, and of each state before the steps its consecutive pieces.
    """
    pieces = [[s[None], a[:-1]] for s, a in zip(first, after, strict=True)]
    drive = before = None
    again = "saved" in cell.wants and not cell.keeps_saved
    if again or "before" in cell.wants:
        before = tuple(map(joined_pieces, pieces))
    if again or "drive" in cell.wants:
        drive = cell.project(weights, x(), (*noise, *numbers))
    if again:
        _, saved = cell.step(weights, drive, before, noise)
    saved = tuple(s if mask is None else where(beside(mask, s), s) for s in saved)
    point = cell.point(drive=drive, before=before, after=after, saved=saved)
    return point, pieces
