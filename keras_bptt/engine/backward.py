"""The way back: the gradients of everything, from the cotangents of the outputs.

Only the adjoints are sequential, and they alone are computed step by step, in the passes of
`adjoints` and `windows`. The products that make the gradients of the weights, the inputs
and the outputs are one matrix product a block of steps, made while it is in cache. They are
left to the graph, which multiplies faster on a CPU, and prunes d_x where nobody asks for it
(but for a loop over blocks, which computes all that it returns).

Weights come in the dtype in which they are stored, and their gradients leave in it. All
else is of the dtype of the states.
"""

import dataclasses
from collections.abc import Callable

import tensorflow as tf

from keras_bptt.engine.adjoints import Terms, plain_pass
from keras_bptt.engine.blocks import (
    blocks_like,
    blocks_of,
    checkpoint_blocks,
    continued,
    cut,
    in_one_piece,
    padded,
    walk,
)
from keras_bptt.engine.clipping import arriving
from keras_bptt.engine.draws import along_time
from keras_bptt.engine.kept import (
    computed_again,
    from_storage,
    number_of_tensors,
    point_of,
)
from keras_bptt.engine.masks import (
    filler,
    for_states,
    masked_steps,
    processing_order,
    unpadded,
    visible,
)
from keras_bptt.engine.options import Arguments, Options
from keras_bptt.engine.output_layer import bias_gradient, sent_back
from keras_bptt.engine.parts import joined, split, summed
from keras_bptt.engine.windows import level_pass, rows_of, sent_to_start, sliding_pass
from keras_bptt.runtime.execution import call, within_xla
from keras_bptt.runtime.tensors import (
    beside,
    cast_to,
    mapped,
    size_of,
    sum_of_products,
    to_batch_major,
    to_time_major,
    where,
    wide,
)


def backward(options, constants, outputs, kept, cotangents, arguments):
    """The gradients of the arguments, `Arguments` of them.

    Args:
        outputs, cotangents: (y, states), and of each its cotangent.
        kept: what the forward pass kept, for each part of the batch.
    """
    steps, truncation = size_of(arguments.x, 1), options.truncation
    given = constants, outputs, kept, cotangents, arguments
    if truncation is None or isinstance(steps, int):
        return gradients(options, *given)
    # Where one window holds all: full backpropagation, by the same program. In windows, XLA
    # would compile for every number of steps.
    return tf.cond(
        steps <= truncation.steps,
        lambda: gradients(options.whole, *given),
        lambda: gradients(options.but(jit_compile=False), *given),
    )


def gradients(options, constants, outputs, kept, cotangents, arguments):
    """`backward`, in one of its ways."""
    x, stored, states, stored_output, _ = arguments
    dtype = states[0].dtype
    weights = options.cell.cast_weights(stored, dtype)
    output_layer = cast_to(dtype, stored_output)
    # The forward pass may have had a truncation where there is none now: see `backward`.
    every = number_of_tensors(options.cell, states, weights)
    told = options.checkpoint_every is None and len(kept[0]) < every
    y = outputs[0] if told else None
    parts = split(len(kept), (constants, x, states, y, cotangents))
    found = [
        gradients_of_part(options, weights, output_layer, *both)
        for both in zip(kept, parts, strict=True)
    ]
    d_x, d_weights, d_states, d_output, d_zeros = zip(*found, strict=True)
    return Arguments(
        joined(d_x),
        _summed(d_weights, stored),
        joined(d_states),
        _summed(d_output, stored_output),
        joined(d_zeros),
    )


def _summed(parts, stored):
    each = zip(stored, zip(*parts, strict=True), strict=True)
    return tuple(summed(sums, w.dtype) for w, sums in each)


def gradients_of_part(options, weights, output_layer, kept, part):
    """The gradients of a part of the batch; those of weights are in wide numbers."""
    constants, x, states, y, cotangents = part
    mask, noise, factors, draws = constants
    x, mask = processing_order(options, x, mask)
    seen = visible(options, mask)
    dy, d_last = _by_place(options, seen, cotangents)
    run_back, arrived = plain_pass, arriving(options, d_last)
    blocks = blocks_of_backward(options, x, options.cell.cost(weights).numbers, kept)
    windows = options.truncation is not None
    if windows and options.checkpoint_every is None:
        run_back, blocks = level_pass, blocks.in_one()
        kept = [in_one_piece(pieces) for pieces in kept]
    elif windows:
        run_back, arrived = sliding_pass, rows_of(options.truncation, arrived)
    sequences = tuple(padded(t, blocks) for t in (mask, seen, dy, factors))
    fill, along = filler(x, mask), continued(x, blocks)

    def inputs(start, size, m):
        return unpadded(cut(along, start, size), m, fill)

    numbers = along_time(options.cell, draws, blocks)
    if options.checkpoint_every is None:
        stored = from_storage(options, kept, y, mask, states, blocks)
    else:
        given = weights, noise, kept, inputs, numbers
        stored = computed_again(options, *given, blocks)
    real = None if mask is None else size_of(x, 1) - masked_steps(mask)
    block = _Block(
        options,
        weights,
        output_layer,
        noise,
        run_back,
        stored,
        inputs,
        numbers,
        sequences,
        x.shape[2:] if x.dtype.is_floating else None,
        (blocks.steps, real),
    )
    sums = mapped(lambda w: tf.zeros_like(w, wide(w.dtype)), (weights, output_layer))
    carry, found, _ = walk(
        block, (arrived, *sums), blocks, block.shapes, size_of(x, 0), reverse=True
    )
    arrived, d_weights, d_output = carry
    d_states = arrived.adjoints
    if run_back is sliding_pass:
        d_states = sent_to_start(options.truncation, arrived)
    if output_layer and dy is not None:
        d_output = (d_output[0], *[bias_gradient(dy)] * len(d_output[1:]))
    found = tuple(_in_order(options, in_one_piece(pieces)) for pieces in found)
    d_x, *d_zeros = found if x.dtype.is_floating else (None, *found)
    return d_x, d_weights, d_states, d_output, tuple(d_zeros)


def _by_place(options, seen, cotangents):
    """The cotangents of the outputs of all steps, or None, and of the last states."""
    dy, d_last = cotangents
    if options.return_sequences:
        return dy, d_last
    place = options.cell.output
    shown = dy if seen is None else where(beside(seen[:, -1], dy), dy)
    return None, (*d_last[:place], d_last[place] + shown, *d_last[place + 1 :])


def _in_order(options, t):
    """(batch, timesteps, ...) in the order of x, from the order of processing."""
    t = to_batch_major(t)
    return tf.reverse(t, [1]) if options.go_backwards else t


@dataclasses.dataclass
class _Block:
    """The way back through a block of steps, as `walk` takes it.

    Attributes:
        run_back: the pass of the recursion.
        stored: a function of a block, from `kept`.
        inputs: a function of start, size and mask: x of these steps, none of it padding.
        numbers: a function of start and size: their random numbers.
        sequences: the mask, where outputs are visible, their cotangents and the factors of
            links, all (batch, timesteps, ...).
        features: the shape of a row of x, or None: it has no gradient.
        lengths: how many steps there are, and of each example how many real ones.
    """

    options: Options
    weights: tuple
    output_layer: tuple
    noise: tuple
    run_back: Callable
    stored: Callable
    inputs: Callable
    numbers: Callable
    sequences: tuple
    features: tf.TensorShape | None
    lengths: tuple

    @property
    def shapes(self):
        """Of the outputs: the gradients of x and, if it is observed, of the zeros."""
        shapes = self.options.cell.shapes(self.weights)
        observed = (*shapes.states, *shapes.deltas) if self.options.observed else ()
        return [*[self.features] * (self.features is not None), *observed]

    def __call__(self, start, size, valid, carry):
        options, cell, weights = self.options, self.options.cell, self.weights
        arrived, sums, output_sums = carry
        mask, seen, e, factors = (cut(t, start, size) for t in self.sequences)
        first, after, saved = self.stored(start, size, valid, mask)
        e = e if seen is None or e is None else where(beside(seen, e), e)
        if self.output_layer and e is not None:
            e, q = sent_back(e, self.output_layer), to_time_major(e)

        def inputs():
            return to_time_major(self.inputs(start, size, mask))

        real, numbers = (
            for_states(mask),
            mapped(to_time_major, self.numbers(start, size)),
        )
        given = cell, weights, inputs, self.noise, numbers
        point, before = point_of(*given, first, after, saved, to_time_major(real))
        terms = Terms(point, e, real, for_states(factors))
        given = valid, weights, self.noise, arrived, terms
        if self.run_back is sliding_pass:
            steps, number = self.lengths
            given += tf.convert_to_tensor(steps - 1 - start), number
        arrived, found = call(self.run_back, options, options.jit_compile, *given)
        count = len(cell.shapes(weights).deltas)
        deltas, adjoints = tuple(found[:count]), found[count:]
        # First the recursion, which others wait for.
        with tf.control_dependencies(deltas):
            point = point._replace(before=before)
            noise = (*self.noise, *numbers)
            more, d_x = cell.gradients(weights, inputs, point, deltas, noise)
        sums = tuple(s + m for s, m in zip(sums, more, strict=True))
        if self.output_layer and e is not None:
            with tf.control_dependencies(more):
                d_V = sum_of_products(after[cell.output], q)
            output_sums = (output_sums[0] + d_V, *output_sums[1:])
        found = [d_x] * (self.features is not None)
        found += [*adjoints, *deltas] if options.observed else []
        return (arrived, sums, output_sums), found


def blocks_of_backward(options, x, numbers, kept):
    """How to cut time: as what was kept is cut, where it is."""
    if options.checkpoint_every is not None:
        return checkpoint_blocks(x, options.checkpoint_every, options.unroll)
    pieces = kept[0] if kept else []
    if len(pieces) > 1 and not within_xla():
        return blocks_like(pieces)
    return blocks_of(x, numbers, options.unroll)
