"""Each break of `breaks.py` is caught by a check of another test file.

A check runs without cached graphs, in which a break would stay, or from which it would be
missing; and it must fail by a comparison of numbers.
"""

import functools
import re
from unittest import mock

import numpy as np
import pytest
import test_bptt
import test_clipping
import test_contract
import test_draws
import test_explicit
import test_flow_of_cells
import test_general_cells
import test_half_precision
import test_higher_orders
from breaks import BREAKS
from helpers import MODES, without_graphs
from test_recurrence import (
    MASKS,
    check_blocks,
    check_options,
    check_reference,
    check_second_order,
)
from test_windows import CLIP, check, check_parts
from test_windows_second_order import (
    check_second_order as check_second_order_of_windows,
)

import keras_bptt.engine.blocks
from keras_bptt.layers import compiled_step


def check_half(numbers):
    """64 B T is more than float16 holds, in blocks of so many numbers."""
    steps = 80
    with mock.patch.object(keras_bptt.engine.blocks, "NUMBERS", numbers):
        got = test_half_precision.constant_gradients("mixed_float16", "eager", steps)
    for name in ("kernel", "bias"):
        expected = np.full(got[name].shape, 64 * test_half_precision.B * steps)
        np.testing.assert_array_equal(got[name], expected)


def check_gated(name, **options):
    """Steps of functions of Keras are traced once, broken or not."""
    compiled_step._of_keras.cache_clear()
    try:
        test_contract.check(name, options, mask=test_contract.MASK)
    finally:
        compiled_step._of_keras.cache_clear()


def call(check, *args, **named):
    return functools.partial(check, *args, **named)


masked = call(call, check_options, masks=MASKS, dropout=True)
square = {"shape": "square", "optional": "bVc"}
projected = call(call, test_general_cells.check, "projected", return_sequences=True)

# By name; each is for the breaks that name it.
CHECKS = {
    "steps": check_reference,
    "blocks": check_blocks,
    "masks": masked(),
    "masks, zero": masked(zero_output_for_mask=True),
    "backwards": masked(go_backwards=True),
    "log_softmax": masked("log_softmax"),
    "factors": call(check, None, names=("factors",)),
    "clipped": call(check, None, **CLIP),
    "growth": call(test_clipping.check, masked=True),
    "two states": projected(),
    "two states, clipped": projected(adjoint_clipnorm=0.7),
    "windows": call(check, (5, 2), "holes"),
    "chunks": call(check, (4, 4), "left"),
    "long chunks": call(check, (7, 7)),
    "windows, dropout": call(check, (4, 4), names=("d", "r")),
    "windows, clipped": call(check, (4, 2), "right", **CLIP),
    "last window": call(check, (4, 2), "holes", sequences=False),
    "sliding": call(check, (5, 2), checkpoint_every=4),
    "sliding, clipped": call(check, (4, 2), "right", checkpoint_every=4, **CLIP),
    "checkpoints": masked(return_sequences=False, checkpoint_every=4),
    "parts": call(check_parts, (5, 2), "no mask", ("d", "r")),
    "output layer": call(check_reference, **square),
    "last output": call(check_reference, **square, sequences=False),
    "output layer, masks": masked(optional="bVc"),
    "second order": call(check_second_order, optional="bVc"),
    "second order, windows": call(check_second_order_of_windows, (5, 2), "holes"),
    "second order, clipped": call(
        check_second_order_of_windows, (4, 2), "right", most=0.7
    ),
    "second order, factors": call(
        check_second_order_of_windows, None, names=("factors",)
    ),
    "states": call(
        test_general_cells.check_higher_order, 2, "tanh", return_sequences=True
    ),
    "linear scan": call(test_higher_orders.check_linear_scan, True, "tanh"),
    "outputs": call(test_explicit.check_second_derivative, None),
    "residuals": call(test_explicit.check_residuals, None, MODES["eager"]),
    "gathered": call(
        test_half_precision.test_an_example_that_is_taken_many_times, "eager"
    ),
    "any cell": call(test_bptt.check, "weight_norm", mask=test_bptt.MASK),
    "any cell, dropout": call(test_bptt.check_dropout, test_bptt.DROPPING["a stack"]),
    "LSTM": call(check_gated, "BPTTLSTM"),
    "GRU": call(
        check_gated, "BPTTGRU", reset_after=False, recurrent_dropout=0.4, seed=3
    ),
    "draws": call(test_draws.check, "plain"),
    "draws, checkpoints": call(test_draws.check, "checkpoints"),
    "draws, last window": call(test_draws.check, "last window"),
    "draws, second order": call(test_draws.check, "plain", order=2),
    "flow": call(test_flow_of_cells.check_lstm, True),
    "half precision": call(check_half, 2**20),
    "half precision, blocks": call(check_half, 1),
}

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
        CHECKS[check]()


def test_every_check_has_a_break():
    assert {each.check for each in BREAKS.values()} == CHECKS.keys()


@pytest.mark.parametrize("name", BREAKS)
def test_break_is_caught(name):
    check = BREAKS[name].check
    passes(check)
    comparison = pytest.raises(AssertionError, match=COMPARED)
    with BREAKS[name].made(), without_graphs(), comparison as caught:
        CHECKS[check]()
    # Numbers differ, not shapes.
    assert "mismatch)" not in str(caught.value)
