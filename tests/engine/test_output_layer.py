"""The third rung of the gradient ladder for the output layer: p_t = h_t V + c.

The checks are those of a recurrence without one: the NumPy reference, the equations written
out, the brute force over the paths of a window, and each window differentiated by itself.
`test_breaks.py` shows that they can fail. `test_layer_output.py` has the layer.
"""

import numpy as np
import pytest
from helpers import FLOAT64, relative_error
from test_recurrence import (
    MASKS,
    bound,
    check_options,
    check_reference,
    check_second_order,
    evaluate,
    random_constants,
    random_problem,
)
from test_windows import check as check_window
from test_windows_second_order import (
    check_second_order as check_second_order_of_windows,
)

BOTH, NO_BIAS, NO_C = "bVc", "Vc", "bV"
BROKEN = "blocks_and_a_rest"


@pytest.mark.parametrize("sequences", [True, False], ids=["sequences", "last"])
@pytest.mark.parametrize(
    ("shape", "optional"),
    [
        ("usual", BOTH),
        ("usual", NO_C),
        ("usual", NO_BIAS),
        ("square", BOTH),
        ("one_step", BOTH),
        ("one_unit", BOTH),
        ("one_output", BOTH),
        ("two_steps", BOTH),
        (BROKEN, BOTH),
    ],
)
def test_equals_reference(shape, optional, sequences):
    check_reference(shape, sequences=sequences, optional=optional)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (BROKEN, {"checkpoint_every": 3}),
        ("usual", {"checkpoint_every": 100}),
        ("usual", {"checkpoint_every": "sqrt"}),
        # They are computed again for a gradient that comes all the same.
        (BROKEN, {"keep_states": False}),
        ("long", {"dtype": "float32"}),
        ("one_step", {"mode": "unknown", "checkpoint_every": "sqrt"}),
        (BROKEN, {"mode": "unknown", "checkpoint_every": 3, "jit_compile": True}),
        (BROKEN, {"mode": "unknown, xla"}),
    ],
    ids=str,
)
def test_equals_reference_with_options(shape, options):
    check_reference(shape, optional=BOTH, **options)


@pytest.mark.parametrize(
    ("activation", "options"),
    [
        ("tanh", {}),
        ("tanh", {"optional": NO_C, "zero_output_for_mask": True}),
        ("tanh", {"optional": NO_C, "checkpoint_every": 3}),
        ("tanh", {"dropout": True, "go_backwards": True}),
        ("gelu", {"dropout": True, "go_backwards": True, "checkpoint_every": 3}),
        ("log_softmax", {"return_sequences": False, "zero_output_for_mask": True}),
        ("tanh", {"mode": "unknown", "dropout": True, "checkpoint_every": 3}),
    ],
    ids=str,
)
def test_masks_and_dropout(activation, options):
    check_options(activation, MASKS, **{"optional": BOTH} | options)


@pytest.mark.parametrize("zero", [False, True])
def test_no_example_has_a_real_step(zero):
    """Of outputs that are all hidden c alone has a gradient, and the state h_0."""
    shape = 2, 6, 4, 5, 3
    problem = random_problem(shape, optional=BOTH)
    constants = random_constants(shape, ["all"] * 2)
    function = bound(return_sequences=True, zero_output_for_mask=zero)
    got = evaluate(function, problem, constants)
    assert relative_error(got["d_c"], np.sum(problem.dy, (0, 1))) < FLOAT64
    np.testing.assert_array_equal(got["d_h_0"], problem.ds)
    np.testing.assert_array_equal(got["y"], np.broadcast_to(problem.c, got["y"].shape))
    assert not any(np.any(got[f"d_{name}"]) for name in "xWUbV")


@pytest.mark.parametrize(
    ("window", "options"),
    [
        # Chunks that fit and do not, sliding, overlapping in whole and broken blocks.
        ((3, 3), {}),
        ((3, 1), {"zero_output_for_mask": True}),
        ((5, 2), {"mask": "no mask"}),
        ((8, 3), {}),
        ((3, 1), {"zero_output_for_mask": True, "checkpoint_every": 3}),
        ((4, 2), {"checkpoint_every": 3}),
        ((3, 3), {"names": ("d", "r"), "optional": NO_C, "go_backwards": True}),
        ((5, 2), {"sequences": False}),
        ((5, 2), {"mode": "unknown", "names": ("d", "r")}),
    ],
    ids=str,
)
def test_windows(window, options):
    check_window(window, **{"mask": "holes", "optional": BOTH} | options)


@pytest.mark.parametrize(
    ("activation", "options"),
    [
        ("gelu", {}),
        ("tanh", {"go_backwards": True, "checkpoint_every": 3}),
        ("tanh", {"zero_output_for_mask": True, "optional": NO_C}),
    ],
    ids=str,
)
def test_second_order(activation, options):
    check_second_order(activation, **{"optional": BOTH} | options)


def test_second_order_of_windows():
    names = "d", "r"
    check_second_order_of_windows(
        (3, 3), "holes", names, optional=BOTH, checkpoint_every=3
    )
