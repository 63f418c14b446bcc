"""The recurrence and its first derivative, fused: what trains a model.

The equations are those of `recurrence.py`. Only h and delta are sequential, and they alone
are computed step by step, in the two passes of `passes.py`. Time is walked in blocks of
steps: the products with W and V, and those that make the gradients of the weights, of the
inputs and of the outputs, are one matrix product a block, made while it is in cache. So
neither all z nor all delta ever exist, and h alone is kept for the backward pass; with
checkpoints h before each block, from which the backward pass computes the block again. A
pass may be compiled by XLA, and run for parts of the batch at the same time; the products
are left to the graph, which multiplies faster on a CPU, and prunes dx where nobody asks for
it (but for a loop over blocks, which computes all that it returns).

Weights come in the dtype in which they are stored, and their gradients leave in it. All
else is of the dtype of x.
"""

import dataclasses

import tensorflow as tf

from keras_bptt.engine.blocks import (
    blocks_like,
    blocks_of,
    checkpoint_blocks,
    cut,
    in_one_piece,
    padded,
    walk,
)
from keras_bptt.runtime.execution import call, within_xla
from keras_bptt.engine.masks import masked_steps, processing_order, read_out, visible
from keras_bptt.engine.passes import (
    backward_pass,
    dropped,
    forward_pass,
    project,
    to_batch_major,
    to_time_major,
)
from keras_bptt.engine.residuals import (
    computed_again,
    from_outputs,
    from_pieces,
    outputs_are_states,
)
from keras_bptt.engine.scans import previous_states
from keras_bptt.engine.shards import joined, shards_of, split, summed
from keras_bptt.engine.sliding import rows_of, sliding_pass
from keras_bptt.runtime.tensors import size_of, sum_of_products, total, where, wide
from keras_bptt.engine.windows import windows_pass


def forward(options, constants, x, W, U, h_0, b, V, c):
    """Return the outputs, and what is kept of h, if anything is to be.

    It is kept as it comes: for each shard of the batch consecutive pieces or, with
    `checkpoint_every`, the states before the blocks (blocks, batch, units).
    """
    W, U, b, V, c = _computed_in(x.dtype, W, U, b, V, c)
    count = shards_of(x, U, options.jit_compile)
    parts = [
        forward_of_shard(options, *shard, W, U, b, V, c)
        for shard in split(count, (constants, x, h_0))
    ]
    y, h_T, kept = zip(*parts, strict=True)
    outputs = joined(y), joined(h_T)
    return outputs, () if kept[0] is None else kept


def forward_of_shard(options, constants, x, h_0, W, U, b, V, c):
    """Return y, h_T and what is kept of h, or None."""
    mask, d, r, _ = constants
    x, mask = processing_order(options, x, mask)
    units, every = U.shape[0], options.checkpoint_every
    checkpoints = options.keep_states and every is not None
    shown = options.return_sequences and V is None
    kept = (
        options.keep_states
        and every is None
        and not outputs_are_states(options, mask, V)
    )
    # Whether all h leave their blocks, and whether they are stacked there.
    whole = kept or shown
    stacked = whole or options.return_sequences
    if every is None:
        blocks = blocks_of(x, units, options.unroll, whole)
    else:
        blocks = checkpoint_blocks(x, every, options.unroll)
    # One loop that writes one step an iteration is what converters to ONNX know. With an
    # output layer it has z and h of all steps at a time.
    plain = stacked and options.unroll == 1 and not options.jit_compile
    if every is None and (plain or (shown and not blocks.in_loop)):
        # One piece, which need not be copied; without an output layer z takes what y does.
        blocks = blocks.in_one()
    inputs, real = padded(x, blocks), padded(mask, blocks)

    def block(start, size, valid, carry):
        z = project(dropped(d, cut(inputs, start, size)), W, b)
        arguments = valid, U, *carry, z, cut(real, start, size), r
        static = options, stacked
        h_T, *h = call(forward_pass, static, options.jit_compile, *arguments)
        outputs = h if whole else []
        return (h_T,), outputs if V is None else [*outputs, project(h[0], V, c)]

    widths = [units] * whole + ([] if V is None else [V.shape[1]])
    (h_T,), outputs, starts = walk(block, (h_0,), blocks, widths, starts=checkpoints)
    y = None
    if options.return_sequences:
        y = to_batch_major(in_one_piece(outputs[-1]))
    y, h_T = read_out(options, mask, y, h_T, c)
    return y, h_T, starts if checkpoints else outputs[0] if kept else None


def backward(options, constants, outputs, kept, cotangents, *arguments):
    """Return the gradients of x, W, U, h_0 and, where there are such, b, V and c."""
    y = None
    *_, V, _ = arguments
    if outputs_are_states(options, constants.mask, V):
        y = outputs[0]
    elif not kept:
        again = dataclasses.replace(options, keep_states=True)
        _, kept = forward(again, constants, *arguments)
    return gradients(options, constants, kept, y, cotangents, *arguments)


def gradients(options, constants, kept, y, cotangents, x, W, U, h_0, b, V, c):
    """`backward`, given what was kept for each shard or, without any, h as one `y`."""
    count = len(kept) or shards_of(x, U, options.jit_compile)
    shards = split(count, (constants, x, h_0, y, *cotangents))
    stored, weights = (W, U, b, V, c), _computed_in(x.dtype, W, U, b, V, c)
    parts = [
        backward_of_shard(options, *shard, h, *weights)
        for shard, h in zip(shards, kept or [None] * count, strict=True)
    ]
    d_x, d_h_0, *sums = zip(*parts, strict=True)
    d_W, d_U, *others = (
        None if w is None else summed(parts, w.dtype)
        for w, parts in zip(stored, sums, strict=True)
    )
    return joined(d_x), d_W, d_U, joined(d_h_0), *others


def _computed_in(dtype, *weights):
    return [None if w is None else tf.cast(w, dtype) for w in weights]


def backward_of_shard(options, constants, x, h_0, y, dy, ds, kept, W, U, b, V, c):
    """Return the gradients of x, h_0, W, U, b, V and c.

    With a truncation the pass is that over all windows.
    """
    mask, d, r, factors = constants
    x, mask = processing_order(options, x, mask)
    seen = visible(options, mask)
    if not options.return_sequences:
        ds, dy = ds + where(None if seen is None else seen[:, -1], dy), None
    blocks, run_back = blocks_of_backward(options, x, U, kept), backward_pass
    if options.truncation is not None and options.checkpoint_every is None:
        blocks, run_back = blocks.in_one(), windows_pass
        kept = kept if kept is None else in_one_piece(kept)
    elif options.truncation is not None:
        run_back, ds = sliding_pass, rows_of(options.truncation, ds)
    real = None if mask is None else size_of(x, 1) - masked_steps(mask)
    given = (x, mask, seen, dy, factors)
    x, mask, seen, cotangents, factors = (padded(t, blocks) for t in given)
    if options.checkpoint_every is not None:
        states_of = computed_again(options, kept, blocks, x, d, r, W, U, b)
    elif kept is not None:
        states_of = from_pieces(kept, h_0, blocks)
    else:
        states_of = from_outputs(y, h_0, blocks)

    def block(start, size, valid, carry):
        a, sums = carry
        given = (mask, seen, cotangents, factors)
        m, c_t, e, xi = (cut(t, start, size) for t in given)
        h, first = states_of(start, size, valid, m)
        e, q = where(c_t, e), None
        if V is not None:
            e, q = tf.tensordot(e, V, [[2], [1]]), to_time_major(e)

        def inputs():
            # What a masked step holds (NaN, perhaps) must not meet its delta, which is 0.
            unmasked = None if m is None else m[:, :, None]
            return to_time_major(where(unmasked, dropped(d, cut(x, start, size))))

        z = None
        if options.activation.slope_of_output is None:
            z = project(inputs(), W, b)
            z += tf.tensordot(previous_states(h, first, r), U, 1)
            z = z if m is None else where(tf.transpose(m)[:, :, None], z)
        h_z = (h, None) if z is None else (None, z)
        arguments = valid, U, a, *h_z, e, m, r
        if run_back is sliding_pass:
            arguments += tf.convert_to_tensor(blocks.steps - 1 - start), real
        else:
            arguments += (xi,)
        a, delta = call(run_back, options, options.jit_compile, *arguments)
        sums = with_products(sums, delta, first, h, r, inputs, q)
        d_x = tf.tensordot(delta, W, [[2], [1]])
        return (a, sums), [d_x if d is None else d * d_x]

    weights = {"W": W, "U": U, "b": b, "V": V}
    sums = {
        name: tf.zeros_like(w, wide(w.dtype))
        for name, w in weights.items()
        if w is not None
    }
    walked = walk(block, (ds, sums), blocks, [W.shape[0]], reverse=True)
    (d_h_0, sums), (d_x,), _ = walked
    if run_back is sliding_pass:
        d_h_0 = tf.cast(total(d_h_0, 0), h_0.dtype)
    d_x = to_batch_major(in_one_piece(d_x))
    d_x = tf.reverse(d_x, [1]) if options.go_backwards else d_x
    d_c = None if c is None else total(dy, [0, 1])
    return d_x, d_h_0, *map(sums.get, weights), d_c


def with_products(sums, delta, first, h, r, inputs, q):
    """`sums`, the gradients of the weights, with what a block of steps adds to them.

    First the recurrence, which others wait for; then the products, one after the other, for
    each has work for all cores.
    """
    sums = dict(sums)
    with tf.control_dependencies([delta]):
        # The first state apart from the others, which stay where they are.
        before = [s if r is None else r * s for s in (first[None], h[:-1])]
        sums["U"] += sum_of_products(before[0], delta[:1])
        sums["U"] += sum_of_products(before[1], delta[1:])
    with tf.control_dependencies([sums["U"]]):
        sums["W"] += sum_of_products(inputs(), delta)
    with tf.control_dependencies([sums["W"]]):
        if "b" in sums:
            sums["b"] += total(delta, [0, 1])
        if "V" in sums:
            sums["V"] += sum_of_products(h, q)
    return sums


def blocks_of_backward(options, x, U, kept):
    if options.checkpoint_every is not None:
        return checkpoint_blocks(x, options.checkpoint_every, options.unroll)
    if kept is not None and len(kept) > 1 and not within_xla():
        return blocks_like(kept)
    return blocks_of(x, U.shape[0], options.unroll)
