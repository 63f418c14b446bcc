"""The way forward: the states of all steps, and what is kept of them.

Time is walked in blocks of steps. What the inputs drive is one matrix product a block, and
so is what an output layer shows, made while it is in cache: neither ever exists for all
steps. What is sequential alone runs step by step, in a loop that XLA may compile, for parts
of the batch at the same time.
"""

import math

from keras_bptt.engine.blocks import (
    blocks_of,
    checkpoint_blocks,
    continued,
    cut,
    in_one_piece,
    padded,
    walk,
)
from keras_bptt.engine.draws import along_time
from keras_bptt.engine.kept import kept_tensors
from keras_bptt.engine.masks import filler, processing_order, read_out, unpadded
from keras_bptt.engine.output_layer import shown
from keras_bptt.engine.parts import joined, parts_of, split
from keras_bptt.engine.states import states_pass
from keras_bptt.runtime.execution import call
from keras_bptt.runtime.tensors import cast_to, mapped, size_of, to_batch_major


def forward(options, constants, arguments):
    """Return (y, states), and what is kept for the backward pass.

    It is kept as it comes: for each part of the batch consecutive pieces of each tensor or,
    with `checkpoint_every`, the states before the blocks, each (blocks, batch, ...).
    """
    x, weights, states, output_layer, _ = arguments
    dtype = states[0].dtype
    weights = options.cell.cast_weights(weights, dtype)
    output_layer = cast_to(dtype, output_layer)
    count = parts_of(x, options.cell.cost(weights), options.jit_compile)
    parts = [
        forward_of_part(options, weights, output_layer, *part)
        for part in split(count, (constants, x, states))
    ]
    outputs, kept = zip(*parts, strict=True)
    return joined(outputs), kept


def forward_of_part(options, weights, output_layer, constants, x, states):
    """Return (y, states), and what is kept: a list for each tensor."""
    cell, every = options.cell, options.checkpoint_every
    mask, noise, _, draws = constants
    x, mask = processing_order(options, x, mask)
    checkpoints = options.keep_states and every is not None
    kept = ()
    if options.keep_states and not checkpoints:
        kept = kept_tensors(options, mask, states, weights, output_layer)
    # What leaves the blocks, and what the loop in them is to stack.
    sequence = (cell.output,) * options.return_sequences
    leaving = tuple(sorted({*kept, *(() if output_layer else sequence)}))
    stacked = tuple(sorted({*leaving, *sequence}))
    if every is None:
        numbers = cell.cost(weights).numbers
        blocks = blocks_of(x, numbers, options.unroll, bool(leaving))
    else:
        blocks = checkpoint_blocks(x, every, options.unroll)
    # One loop that writes one step an iteration is what converters to ONNX know. With an
    # output layer it has the drive and the states of all steps at a time.
    plain = stacked and options.unroll == 1 and not options.jit_compile
    copied = blocks.in_loop or output_layer or not options.return_sequences
    outputs_of_row = cell.shapes(weights).states[cell.output]
    small = cell.cost(weights).numbers <= math.prod(outputs_of_row)
    if every is None and (plain or (small and not copied)):
        # One piece, which need not be copied, where the drive takes no more than the
        # outputs do.
        blocks = blocks.in_one()
    fill, inputs, real = filler(x, mask), continued(x, blocks), padded(mask, blocks)
    of_steps = mapped(lambda t: t[:, None], noise)
    numbers = along_time(cell, draws, blocks)

    def block(start, size, valid, before):
        m = cut(real, start, size)
        x = unpadded(cut(inputs, start, size), m, fill)
        drive = cell.project(weights, x, (*of_steps, *numbers(start, size)))
        given = valid, weights, noise, before, drive, m
        static = options, stacked
        after, *tensors = call(states_pass, static, options.jit_compile, *given)
        by_index = dict(zip(stacked, tensors, strict=True))
        outputs = [by_index[i] for i in leaving]
        if output_layer and options.return_sequences:
            outputs.append(shown(by_index[cell.output], output_layer))
        return after, outputs

    of_cell = cell.shapes(weights)
    shapes = [(*of_cell.states, *of_cell.saved)[i] for i in leaving]
    if output_layer and options.return_sequences:
        *rows, _ = of_cell.states[cell.output]
        shapes.append((*rows, output_layer[0].shape[1]))
    last, outputs, starts = walk(
        block, states, blocks, shapes, size_of(x, 0), starts=checkpoints
    )
    y = None
    if options.return_sequences:
        place = -1 if output_layer else leaving.index(cell.output)
        y = to_batch_major(in_one_piece(outputs[place]))
    y = read_out(options, mask, y, last[cell.output], output_layer)
    by_index = dict(zip(leaving, outputs, strict=False))
    return (y, last), starts if checkpoints else [by_index[i] for i in kept]
