"""The recurrence with checkpoints: a block of states is computed again on the way back.

The checks are those of a recurrence that keeps every state: the NumPy reference, the
equations written out, and the brute force over paths. Where both walk the same blocks, the
bits are the same. `test_breaks.py` shows that the checks can fail;
`test_checkpoint_memory.py` has what is kept, `test_windows.py` checkpoints with a
truncation.
"""

import itertools
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf
from helpers import few, relative_error
from test_recurrence import (
    FLOAT64,
    KINDS,
    MASKS,
    Problem,
    assert_close,
    bound,
    check_options,
    check_reference,
    check_second_order,
    evaluate,
    random_problem,
    tensors_of,
    written_out,
)
from test_windows import CLIP, B, D, H, O, T, check_parts, constants_of, problem_of
from test_windows import check as check_paths

import keras_bptt.engine.backward
import keras_bptt.engine.blocks

# More blocks than steps, whole and broken blocks, one block, and more than there are steps.
EVERY = [1, 2, 3, T - 1, T, T + 5, "sqrt"]
# What has no gradient: a mask, dropout factors d and r, factors of a truncation.
ALL = {"mask": "holes", "names": ("d", "r", "factors")}

LAST = {"sequences": False}
OPTIONS = {
    "last": LAST,
    "backwards": {"go_backwards": True},
    "zero": {"zero_output_for_mask": True},
    "last, backwards": {**LAST, "go_backwards": True},
    "last, zero": {**LAST, "zero_output_for_mask": True},
    "clipped": CLIP,
    "last, clipped": {**LAST, **CLIP},
    "unrolled": {"unroll": True},
    "two steps an iteration": {**LAST, "unroll": 2},
    "not kept": {"keep_states": False},
    "no bias": {"optional": ""},
    "no factors": {"names": ("d", "r")},
    "no dropout": {"names": ("factors",)},
    "no mask": {"mask": "no mask"},
    "nothing": {"mask": "no mask", "names": ()},
}


@pytest.mark.parametrize("every", EVERY)
def test_every_so_many_steps(every):
    check_paths(None, checkpoint_every=every, **ALL)


@pytest.mark.parametrize("option", OPTIONS)
def test_options(option):
    check_paths(None, checkpoint_every=2, **ALL | OPTIONS[option])


@pytest.mark.parametrize("activation", KINDS)
def test_activations(activation):
    check_options(activation, MASKS, True, checkpoint_every=2)


@pytest.mark.parametrize(
    ("mode", "every", "options"),
    [
        ("plain", 2, {"dtype": "float32"}),
        ("xla", "sqrt", LAST),
        ("unknown", "sqrt", {}),
        # As `fit` runs it: the passes compiled, the graph around them not.
        ("unknown", 2, {"jit_compile": True, **LAST, **CLIP}),
    ],
    ids=str,
)
def test_every_mode(mode, every, options):
    check_paths(None, mode=mode, checkpoint_every=every, **ALL | options)


@pytest.mark.parametrize(
    ("shape", "every"),
    [
        *itertools.product(["one_step", "one_example", "one_unit"], [2, "sqrt"]),
        *(("blocks_and_a_rest", every) for every in (1, 7, "sqrt")),
    ],
)
def test_sizes(shape, every):
    check_reference(shape, checkpoint_every=every)


def test_no_example():
    problem = random_problem((0, 5, 4, 3, 2))
    got, want = (
        evaluate(bound(return_sequences=True, checkpoint_every=every), problem)
        for every in (2, None)
    )
    assert_close(got, want)


def test_parts_of_the_batch():
    """Each with checkpoints of its own."""
    parts, original = [], keras_bptt.engine.backward.gradients_of_part

    def remembered(options, weights, output_layer, kept, part):
        parts.append(kept[0].shape)
        return original(options, weights, output_layer, kept, part)

    with mock.patch.object(keras_bptt.engine.backward, "gradients_of_part", remembered):
        check_parts(None, checkpoint_every=3, **ALL)
    assert parts == [(T // 3, B // 2, H), (T // 3, B - B // 2, H)]


def test_roots_of_several_lengths_in_eager_mode():
    """One graph for every length must not round a root that the other pass does not."""
    function = bound(checkpoint_every="sqrt")
    # The forward pass alone, of another length.
    tensors, _ = tensors_of(random_problem((B, 7, D, H, O)), {})
    function({name: tensors[name] for name in Problem._fields[:5]}, {})
    problem = random_problem((B, 9, D, H, O), sequences=False)
    assert_close(evaluate(function, problem, None, "eager"), evaluate(bound(), problem))


def test_steps_that_pad_a_block_in_xla():
    """Rows of four numbers, a step too few: XLA's own padding is not to be trusted."""
    problem = random_problem((3, 8, 4, 5, 2), sequences=False)
    got = evaluate(bound(checkpoint_every=3), problem, None, "xla")
    assert_close(got, evaluate(bound(), problem))
    # Memory that held something else shows what was not written.
    steps = keras_bptt.engine.blocks.Blocks(8, 3, True)

    @tf.function(jit_compile=True)
    def padded(x):
        return keras_bptt.engine.blocks.padded(x, steps)

    x = tf.constant(problem.x)
    for _ in range(200):
        used = [tf.fill([n], np.float64("nan")) for n in (96, 108, 120)]
        del used
        y = padded(x).numpy()
        np.testing.assert_array_equal(y[:, :8], problem.x)
        assert not np.any(y[:, 8:])


# Blocks of three steps where all states are kept, in XLA and in a loop of four.
SAME = [
    ("graph", 3, {}),
    ("graph", 3, {"jit_compile": True}),
    ("graph", 3, CLIP),
    ("graph", 12, {"return_sequences": True, "unroll": True}),
    ("xla", 4, {"return_sequences": True}),
    ("xla", 4, {}),
    ("unknown", 4, {}),
    ("unknown", 4, {"jit_compile": True}),
    ("unknown", 4, {"return_sequences": True}),
    ("unknown", 4, {"return_sequences": True, "jit_compile": True}),
    ("unknown", 4, {"return_sequences": True, "go_backwards": True}),
]


@pytest.mark.parametrize(
    ("mode", "every", "options", "constants"),
    few(
        [(*case, constants) for case in SAME for constants in (False, True)],
        lambda *case: case == (*SAME[9], False),
    ),
    ids=str,
)
def test_same_blocks_give_the_same_bits(mode, every, options, constants):
    problem = problem_of(options.get("return_sequences", False), steps=12)
    constants = constants_of(**ALL, steps=12) if constants else {}
    got, want = (
        evaluate(bound(checkpoint_every=e, **options), problem, constants, mode)
        for e in (every, None)
    )
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.mark.parametrize("sequences", [True, False], ids=["sequences", "last"])
def test_second_derivatives(sequences):
    check_second_order(return_sequences=sequences, checkpoint_every=2)


def test_jacobian():
    """One vectorised backward pass for all outputs."""
    tensors, _ = tensors_of(random_problem((2, 4, 3, H, O)), {})
    arguments = {name: tensors[name] for name in Problem._fields[:5]}

    def jacobian(function):
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            y, _ = function(arguments, {})
        return tape.jacobian(y, arguments["x"]).numpy()

    want = jacobian(written_out(return_sequences=True))
    assert np.max(np.abs(want)) > 0.1
    got = jacobian(bound(return_sequences=True, checkpoint_every="sqrt"))
    assert relative_error(got, want) < FLOAT64
