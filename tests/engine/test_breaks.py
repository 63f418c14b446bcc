"""Each break of `breaks.py` is caught by a check of another test file.

A check runs without cached graphs, in which a break would stay, or from which it would be
missing; and it must fail by a comparison of numbers.
"""

import functools
import re
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf
import test_adjoints
import test_checkpoints
import test_clipping
import test_explicit
import test_general_cells
import test_half_precision
import test_higher_orders
import test_output_layer
import test_recurrence
import test_sliding_windows
import test_windows
from breaks import BREAKS
from helpers import (
    FLOAT64,
    MODES,
    few,
    random_inputs,
    relative_error,
    rng,
    without_graphs,
)
from plain_rnn import MODULES

from keras_bptt import BPTTRNN
from keras_bptt.runtime import explicit


def check_last_output():
    """An output layer of the last state: the state times V, plus c."""
    own = BPTTRNN(5, output_units=5, dtype="float64")
    bare = BPTTRNN(5, dtype="float64")
    x, scale = tf.constant(random_inputs(4, 3, 2)), rng(3).normal(size=(4, 5))
    own.build(x.shape)
    bare.build(x.shape)
    bare.set_weights(own.get_weights()[:3])
    V, c = (v.value for v in own.output_layer.trainable_variables)
    with tf.GradientTape(persistent=True) as tape:
        got = tf.reduce_sum(scale * own(x))
        expected = tf.reduce_sum(scale * (tf.matmul(bare(x), V) + c))
    variables = [v.value for v in own.trainable_variables]
    others = [*(v.value for v in bare.trainable_variables), V, c]
    got, expected = tape.gradient(got, variables), tape.gradient(expected, others)
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < FLOAT64


def check_size_one():
    """A cotangent of size 1 counts for all examples."""
    a = tf.constant(rng().normal(size=(3, 4)))
    with tf.GradientTape() as tape:
        tape.watch(a)
        halves = test_explicit.halves(a, explicit.explicit)
    d_a = tape.gradient(halves, a, [halves[0], tf.ones([1, 2], a.dtype)])
    np.testing.assert_array_equal(d_a[:, 2:], np.ones((3, 2)))


def check_half(numbers):
    """64 B T is more than float16 holds, in blocks of so many numbers."""
    steps = 80
    with mock.patch.object(MODULES.blocks, "NUMBERS", numbers):
        got = test_half_precision.constant_gradients("mixed_float16", "eager", steps)
    for name in ("kernel", "bias"):
        expected = np.full(got[name].shape, 64 * test_half_precision.B * steps)
        np.testing.assert_array_equal(got[name], expected)


def alone(check, *args, **named):
    """A check that takes no modules."""
    return lambda modules: check(*args, **named)


masked = functools.partial(
    functools.partial,
    test_recurrence.check_options,
    masks=test_recurrence.MASKS,
    dropout=True,
)

# By name, functions of the modules.
CHECKS = {
    "recurrence": test_recurrence.check_everything,
    "sigmoid": functools.partial(
        test_recurrence.check_reference, activation="sigmoid", return_sequences=True
    ),
    "masked": masked(activation="tanh"),
    "masked, gelu": masked(activation="gelu"),
    "masked, log_softmax": masked(activation="log_softmax"),
    "masked, last": masked(activation="tanh", return_sequences=False),
    "masked, zero": masked(activation="tanh", zero_output_for_mask=True),
    "masked, backwards": masked(activation="tanh", go_backwards=True),
    "masked, not kept": masked(
        activation="gelu", return_sequences=False, keep_states=False
    ),
    "recurrence, second order": test_recurrence.check_second_orders,
    "adjoints": functools.partial(
        test_adjoints.check, **test_adjoints.CASES["overlapping, clipped"]
    ),
    "adjoints, backwards": functools.partial(
        test_adjoints.check, **test_adjoints.CASES["full, clipped, backwards"]
    ),
    "growth": alone(test_clipping.check, masked=True),
    "several states": alone(
        test_general_cells.check, "projected", return_sequences=True
    ),
    "several states, clipped": alone(
        test_general_cells.check,
        "projected",
        return_sequences=True,
        adjoint_clipnorm=0.7,
    ),
    "long chunks": functools.partial(test_windows.check, (7, 7)),
    "layer, square": functools.partial(
        test_output_layer.check_reference, shape="square"
    ),
    "layer, last output": alone(check_last_output),
    "states": alone(test_higher_orders.check_states, "tanh", 2),
    "linear scan": alone(test_higher_orders.check_linear_scan, True, "tanh"),
    "outputs": test_explicit.check_second_derivative,
    "residuals": functools.partial(test_explicit.check_residuals, wrap=MODES["eager"]),
    "size one": alone(check_size_one),
    "gathered": alone(
        test_half_precision.test_an_example_that_is_taken_many_times, "eager"
    ),
    "half precision": alone(check_half, 2**20),
    "half precision, blocks": alone(check_half, 1),
    "half precision, examples": alone(
        test_half_precision.test_sums_over_examples_beyond_float16
    ),
}
for prefix, checks in {
    "truncated": test_windows.CHECKS,
    "sliding": test_sliding_windows.CHECKS,
    "layer": test_output_layer.CHECKS,
    "checkpoints": test_checkpoints.CHECKS,
}.items():
    CHECKS |= {f"{prefix}, {name}": check for name, check in checks.items()}

# By the name of a check, the breaks that it catches.
CATCHES = {
    "recurrence": [
        "step_back without U^T",
        "step_back with U",
        "step_back without the slope",
        "slope at the adjoint",
        "slope of tanh",
        "dU of the states after",
        "db of a block's last step",
        "project without b",
        "cotangents lost",
        "cotangents a step late",
        "cotangents of the last states lost",
        "from the first step on",
        "a block cut a step early",
        "blocks in the wrong order",
        "the steps that fill the last block taken",
        "the steps that fill the last block taken back",
        "the sums of other blocks lost",
        "the states before a block lost",
    ],
    "sigmoid": ["slope of sigmoid"],
    "masked": [
        "step_back without r",
        "dU without r",
        "dW without d",
        "dx without d",
        "project without d",
        "step without r",
        "masked steps taken",
        "masked steps taken back",
        "deltas of masked steps",
        "hidden outputs shown",
        "outputs before the first real step shown",
        "cotangents of hidden outputs",
        "padding taken for inputs",
    ],
    "masked, gelu": ["Jacobian at the adjoint"],
    "masked, log_softmax": ["diagonal of the Jacobian", "Jacobian not transposed"],
    "masked, last": ["hidden outputs shown", "cotangents of hidden outputs"],
    "masked, zero": ["masked outputs repeated"],
    "masked, backwards": [
        "inputs not reversed",
        "mask not reversed",
        "gradients in the order of processing",
    ],
    "masked, not kept": ["computed again as a whole without noise"],
    "recurrence, second order": [
        "masked steps, higher order",
        "d_initial lost",
        "hidden outputs shown, higher order",
    ],
    "adjoints": ["deltas alone clipped", "a window a step too short"],
    "adjoints, backwards": ["gradients in the order of processing"],
    "growth": [
        "cotangents of later steps forgotten",
        "cotangents that wait forgotten",
        "cotangents that wait counted again",
        "cotangents of outputs not counted",
    ],
    "several states": [
        "saved tensors of the step before",
        "states after for states before",
    ],
    "several states, clipped": [
        "what is no state clipped",
        "the norm of one state alone",
    ],
    "truncated, chunks": [
        "hidden outputs for the state",
        "blocks a step too long",
        "a stride too short",
        "masked steps before a window not counted",
        "sums over windows averaged",
        "outputs of the step before",
    ],
    "long chunks": ["the first block filled at its beginning"],
    "truncated, overlapping": [
        "a window a step too long",
        "a window a step too short",
        "windows carried around the beginning",
        "what windows send to the initial states lost",
        "not packed",
        "not unpacked",
    ],
    "truncated, whole levels": ["losses in every level"],
    "truncated, sliding": ["windows carried into the block behind"],
    "truncated, last output": [
        "the state before the last window not cut off",
        "the last window a step too long",
        "the last window a step too short",
        "the last window never begins at the initial state",
        "a part placed at the beginning",
        "a part of the beginning",
    ],
    "truncated, clipped": [
        "several windows of one that holds all",
        "one window of the losses of several",
        "deltas alone clipped",
        "deltas not clipped",
        "the batch clipped as one",
        "each number clipped",
    ],
    "truncated, dropout": ["noise of another example"],
    "truncated, factors": [
        "no factor at a link",
        "a factor at the initial state",
        "no factor at the second step",
    ],
    "truncated, second order": [
        "windows that never begin at the initial state",
        "outputs from a window's beginning",
        "the state after the first window",
    ],
    "truncated, clipped, second order": [
        "scales of clipping lost",
        "masked steps clipped",
        "several windows of one that holds all",
    ],
    "truncated, factors, second order": [
        "links without factors",
        "factors lost, higher order",
    ],
    "sliding, chunks": ["sliding chunks a step too short"],
    "sliding, overlapping": [
        "sliding windows that go on",
        "sliding windows that stay in their blocks",
        "windows carried into the block behind",
        "losses in every window",
        "sums over windows averaged",
        "what comes back, in the oldest window",
        "one window reaches the initial states",
        "steps counted from the end of a checkpoint's block",
    ],
    "sliding, whole levels": [
        "sliding windows a step too short",
        "windows carried around the beginning",
    ],
    "sliding, clipped": [
        "masked steps counted as real",
        "several windows of one that holds all",
        "one window of the losses of several",
    ],
    "sliding, dropout": ["sliding noise of another example"],
    "sliding, in a loop": ["blocks in the wrong order"],
    "layer, plain": [
        "dV of the states before",
        "dc lost",
        "c not added",
        "the sums of other blocks lost",
    ],
    "layer, square": ["V not transposed", "outputs taken for states"],
    "layer, masks": ["hidden outputs without c", "hidden outputs shown"],
    "layer, checkpoints": ["the checkpoint of another block"],
    "layer, shards": [
        "parts that overlap",
        "the sums of one part",
        "noise of another part",
    ],
    "layer, windows": ["not unpacked", "hidden outputs without c"],
    "layer, windows from checkpoints": ["sliding windows that go on"],
    "layer, second order": ["an output layer without a gradient"],
    "layer, last output": ["dc of one example", "V not transposed, last output"],
    "checkpoints, again": [
        "one checkpoint for all blocks",
        "the checkpoint of another block",
        "computed again without the mask",
        "computed again without noise",
        "computed again of other inputs",
    ],
    "checkpoints, in a loop": [
        "one checkpoint for all blocks",
        "the steps that fill the last block taken",
    ],
    "states": ["states before from the wrong side"],
    "linear scan": [
        "a link that is not transposed",
        "links without factors",
        "links at fixed states",
        "links to the same step",
    ],
    "outputs": ["the inner outputs"],
    "residuals": ["residuals with a gradient"],
    "size one": ["cotangents not broadcast"],
    "gathered": ["an example that is taken twice counted once"],
    "half precision": ["total in half precision", "products in half precision"],
    "half precision, blocks": ["sums of blocks in half precision"],
    "half precision, examples": ["hidden outputs in half precision"],
}
PAIRS = [(check, name) for check, names in CATCHES.items() for name in names]
# The first check that catches a break; that others do too takes long, together.
FIRST = {name: check for check, name in reversed(PAIRS)}

# What a comparison of numbers says, of whatever kind it is.
COMPARED = re.compile(
    r"error (\d|nan|inf)|relative_error|Not equal to tolerance|Arrays are not equal"
    r"|<tf.Tensor"
)


@functools.cache
def passes(check):
    """The control: the check passes where nothing is broken.

    It also makes whatever a check keeps for its next call, which must not be broken.
    """
    with without_graphs():
        CHECKS[check](modules=MODULES)


def test_every_break_has_a_check():
    assert CATCHES.keys() == CHECKS.keys()
    assert {name for _, name in PAIRS} == BREAKS.keys()


@pytest.mark.parametrize("check", CHECKS)
def test_check_passes_where_nothing_is_broken(check):
    passes(check)


@pytest.mark.parametrize(
    ("check", "name"), few(PAIRS, lambda check, name: FIRST[name] == check)
)
def test_break_is_caught(check, name):
    passes(check)
    with BREAKS[name](), without_graphs():
        with pytest.raises(AssertionError, match=COMPARED) as caught:
            CHECKS[check](modules=MODULES)
    # Numbers differ, not shapes.
    assert "mismatch)" not in str(caught.value)
