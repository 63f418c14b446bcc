"""Truncated and clipped recurrences against the brute force of `reference.truncation`.

Two passes go back through windows: the one that takes all windows back at once, and, with
checkpoints, the one in which they go back through time side by side. Each is checked over
windows, masks and options, and for what a window is not allowed to change.
`test_windows_second_order.py` has their derivatives. `test_breaks.py` shows that the checks
can fail.
"""

import functools
import itertools
import re
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf
from helpers import WAYS, examples, few, relative_error, rng, without_graphs
from hypothesis import given
from hypothesis import strategies as st
from plain_rnn import Constants, Recurrence, arguments_of
from test_recurrence import (
    ARGUMENTS,
    WRITTEN,
    assert_close,
    bound,
    evaluate,
    first_order,
    float32_tolerance,
    named,
    of_arguments,
    of_unknown_sizes,
    random_problem,
    tensors_of,
    written_out,
)

import keras_bptt.cells.activations
import keras_bptt.engine.backward
import keras_bptt.engine.parts
import keras_bptt.engine.windows
from keras_bptt.engine.clipping import Arriving
from keras_bptt.reference import truncation as truncated_reference
from keras_bptt.truncation import Truncation

# All different. Blocks of 2, 3 and 4 steps: T is a multiple of none of them but one.
B, T, D, H, O = 5, 9, 2, 3, 4  # noqa: E741

# Chunks that fit and do not; sliding, overlapping in whole and broken blocks, all paths.
CHUNKS = [(1, 1), (3, 3), (4, 4)]
WINDOWS = [*CHUNKS, (3, 1), (4, 2), (5, 2), (7, 4), (8, 3), (9, 2), (12, 5)]
# Blocks shorter and longer than windows, whole and broken ones, one, and more than steps.
EVERY = [1, 2, 3, 4, 5, T - 1, T, T + 5, "sqrt"]
MASKS = {
    "no mask": None,
    "right": np.arange(T) < np.array([[T], [4], [1], [7], [2]]),
    "left": np.arange(T) >= np.array([[0], [4], [8], [2], [6]]),
    # The third example has no step at all.
    "holes": rng(3).random((B, T)) < np.array([[0.5], [0.7], [0.0], [0.9], [0.3]]),
}
CLIP = {"adjoint_clipnorm": 0.7}

# A window does not touch the outputs: they are as exact as without one.
OUTPUTS = 1e-12


def problem_of(sequences=True, optional="b", steps=T):
    return random_problem((B, steps, D, H, O), 1.2, sequences, optional)


def constants_of(mask="no mask", names=(), steps=T):
    """A mask; and of d, r and factors those that are named."""
    mask = MASKS[mask]
    known = {
        "d": rng(6).choice([0.0, 1.25], size=(B, D)),
        "r": rng(5).choice([0.0, 1.25], size=(B, H)),
        "factors": rng(7).choice([0.0, 1.25], size=(B, steps)),
    }
    if mask is not None:
        known["mask"] = np.resize(mask, (B, steps))
        names = "mask", *names
    return {name: known[name] for name in names}


# Once each: several checks are compared with the same numbers.
@functools.cache
def expected_of(window, mask, sequences, names, optional, steps, options):
    """What `evaluate` gives, of the brute force over paths; `window` None: of all paths."""
    problem = problem_of(sequences, optional, steps)
    x, W, U, h_0, b, V, c, dy, ds = problem
    constants, options = constants_of(mask, names, steps), dict(options)
    written = {name: value for name, value in options.items() if name in WRITTEN}
    # The outputs are those of the recurrence without a truncation.
    unread = problem._replace(dy=np.zeros((B, steps, H)), V=None, c=None)
    function = written_out(**written | {"return_sequences": True})
    shown = evaluate(function, unread, constants)
    y = shown["y"] if V is None else shown["y"] @ V
    y = y if c is None else y + c
    q = dy
    if not sequences:
        q = np.zeros_like(y)
        q[:, -1] = dy
    turn = slice(None, None, -1 if options.get("go_backwards") else 1)
    mask = constants.get("mask", np.ones((B, steps), bool))[:, turn]
    zero = options.get("zero_output_for_mask")
    seen = mask if zero else np.logical_or.accumulate(mask, 1)
    e = np.where(seen[..., None], q if V is None else q @ V.T, 0)
    e[:, -1] += ds
    d = constants.get("d", np.ones((B, D)))[:, None]
    clip = {k: v for k, v in options.items() if k in CLIP}
    kind = "clipped_gradients" if clip else "truncated_gradients"
    steps, stride = window or (None, None)
    found = getattr(truncated_reference, kind)(
        *(d * np.where(mask[..., None], x[:, turn], 0), W, U),
        *(np.zeros(H) if b is None else b, h_0, "tanh", e),
        steps=steps,
        stride=stride,
        mask=mask,
        recurrent_dropout=constants.get("r"),
        factors=constants.get("factors"),
        **clip,
    )
    gradients = (
        *(d * found.d_inputs[:, turn], found.d_kernel, found.d_recurrent_kernel),
        *(found.d_initial_state, found.d_bias),
        *(np.einsum("bth,bto->ho", shown["y"], q), np.sum(q, (0, 1))),
    )
    y = y if sequences else y[:, -1]
    return of_arguments(problem, y, shown["state"], gradients)


# Options that change the result.
TOLD = (*WRITTEN[1:], "adjoint_clipnorm")


def check(
    window,
    mask="no mask",
    sequences=True,
    names=(),
    mode="plain",
    *,
    optional="b",
    steps=T,
    dtype="float64",
    **options,
):
    """One configuration against the brute force; NaN at masked steps changes nothing."""
    constants = constants_of(mask, names, steps)
    problem = problem_of(sequences, optional, steps)
    problem = problem.without_padding(constants.get("mask"))
    options["return_sequences"] = sequences
    function = bound(dtype=dtype, window=window, **options)
    got = evaluate(function, problem, constants, mode, dtype)
    told = tuple((name, options[name]) for name in TOLD if options.get(name))
    given = window, mask, sequences, tuple(names), optional, steps
    expected = expected_of(*given, told)
    if dtype == "float32":
        return assert_close(got, expected, float32_tolerance((B, T, D, H, O)))
    assert_close(got, expected)
    for name in ("y", "state"):
        assert relative_error(got[name], expected[name]) <= OUTPUTS, name


CASES = [
    # Every window; and one of them with every mask, and for the last output.
    *((window, "holes", True) for window in WINDOWS),
    *(((5, 2), mask, True) for mask in MASKS if mask != "holes"),
    *(((5, 2), mask, False) for mask in MASKS),
]


@pytest.mark.parametrize(("window", "mask", "sequences"), CASES)
def test_equals_brute_force(window, mask, sequences):
    """With checkpoints too, after another number of steps in each case."""
    check(window, mask, sequences)
    place = CASES.index((window, mask, sequences))
    check(window, mask, sequences, checkpoint_every=EVERY[place % len(EVERY)])


@pytest.mark.parametrize(
    ("window", "mask", "sequences"),
    [
        *((window, "holes", True) for window in [(4, 4), (3, 1), (5, 2), (12, 5)]),
        ((5, 2), "no mask", True),
        ((8, 3), "right", False),
    ],
)
def test_clipped_windows(window, mask, sequences):
    """Each window for itself; one window where it holds all steps of an example."""
    for every in (None, 4):
        check(window, mask, sequences, checkpoint_every=every, **CLIP)


OPTIONS = {
    "backwards": {"go_backwards": True},
    "backwards, last": {"go_backwards": True, "sequences": False},
    "zero": {"zero_output_for_mask": True},
    "unrolled": {"unroll": True},
    "two steps an iteration": {"unroll": 2},
    "not kept": {"keep_states": False},
    "last output, clipped": {"sequences": False, **CLIP},
    "dropout": {"names": ("d", "r")},
    "no bias": {"optional": ""},
    "float32": {"dtype": "float32"},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(option):
    for every, window in ((None, (4, 4)), (4, (5, 2))):
        check(window, "holes", checkpoint_every=every, **OPTIONS[option])


@pytest.mark.parametrize(
    ("mode", "window", "options"),
    [
        ("eager", (5, 2), {}),
        ("xla", (7, 4), CLIP),
        ("xla", (4, 2), {"checkpoint_every": 5}),
        # Factors of a random truncation; `test_checkpoints.py` has them in XLA.
        ("unknown", None, {"names": ("factors",), **CLIP}),
    ],
    ids=str,
)
def test_equals_brute_force_in_every_mode(mode, window, options):
    check(window, "holes", mode=mode, **options)


@pytest.mark.parametrize(
    ("window", "mask", "sequences", "options"),
    [
        ((5, 2), "holes", True, {"checkpoint_every": 3, **CLIP}),
        ((3, 1), "no mask", False, {}),
    ],
    ids=str,
)
def test_unknown_number_of_steps(window, mask, sequences, options):
    """Where run time tells that one window holds all: full backpropagation, bit for bit."""
    told = tuple(CLIP.items()) if "adjoint_clipnorm" in options else ()
    options = options | {"return_sequences": sequences}

    def graph(window):
        function = bound(window=window, **options)
        given = tensors_of(problem_of(sequences), constants_of(mask))
        return of_unknown_sizes(first_order(function), *given, jit_compile=None)

    run, whole = graph(window), graph(None)
    for steps in (1, window[0], 17):
        constants = constants_of(mask, (), steps)
        given = tensors_of(problem_of(sequences, "b", steps), constants)
        got = named(run(*given))
        assert_close(got, expected_of(window, mask, sequences, (), "b", steps, told))
        if steps <= window[0]:
            for name, want in named(whole(*given)).items():
                np.testing.assert_array_equal(got[name], want, name)


@pytest.mark.parametrize("sequences", [True, False], ids=["sequences", "last"])
def test_factors_equal_brute_force(sequences):
    check(None, "holes", sequences, ("factors",))


def test_clipping_changes_something():
    given = None, "holes", True, (), "b", T
    free, clipped = (expected_of(*given, told) for told in ((), tuple(CLIP.items())))
    assert relative_error(clipped["d_W"], free["d_W"]) > 0.01


def check_parts(window, mask, names=(), **options):
    """As large batches are computed on two cores."""
    parts = {"cores": lambda: 2, "LEAST_WORK": 1, "FEWEST_EXAMPLES": 1}
    with mock.patch.multiple(keras_bptt.engine.parts, **parts):
        check(window, mask, True, names, "graph", jit_compile=True, **options)


@pytest.mark.parametrize(
    ("every", "optional"),
    [(None, "bVc"), pytest.param(4, "b", marks=pytest.mark.slow)],
)
def test_parts_of_the_batch(every, optional):
    """Whatever belongs to examples is cut; `test_checkpoints.py` has a draw's factors."""
    with mock.patch.object(
        keras_bptt.engine.backward,
        "gradients_of_part",
        wraps=keras_bptt.engine.backward.gradients_of_part,
    ) as of_part:
        check_parts((5, 2), "holes", optional=optional, checkpoint_every=every)
    assert of_part.call_count == 2


@pytest.mark.parametrize(
    ("window", "sequences"),
    [((5, 2), True), ((4, 4), False), ((5, 2), False), ((3, 1), False)],
    ids=str,
)
@pytest.mark.parametrize("every", [None, 4])
@without_graphs()
def test_gradient_ends_with_the_window(window, sequences, every):
    """Outside of it exactly zero, inside not."""
    steps, stride = window
    tensors, _ = tensors_of(problem_of(), {})
    arguments = {name: t for name, t in tensors.items() if name in ARGUMENTS}
    ends = arguments["x"], arguments["h_0"]
    options = {"return_sequences": sequences, "checkpoint_every": every}
    function = bound(window=window, **options)
    for t in range(1, T + 1) if sequences else [T]:
        with tf.GradientTape() as tape:
            tape.watch(ends)
            y, _ = function(arguments, {})
            loss = tf.reduce_sum(y[:, t - 1] ** 2 if sequences else y**2)
        d_x, d_h_0 = tape.gradient(loss, ends)
        end = T - stride * ((T - t) // stride)
        inside = [max(1, end - steps + 1) <= j <= t for j in range(1, T + 1)]
        size = np.max(np.abs(d_x), axis=2)
        assert np.all((size > 1e-6) == inside)
        assert np.all(size[:, ~np.array(inside)] == 0)
        assert np.any(d_h_0 != 0) == (end <= steps)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [*WAYS, "unknown"])
@examples(100)
@given(
    window=st.sampled_from([None, *WINDOWS]),
    mask=st.sampled_from(sorted(MASKS)),
    sequences=st.booleans(),
    names=st.sets(st.sampled_from(["d", "r"])),
    steps=st.sampled_from([1, 2, T, 17]),
    optional=st.sampled_from(["b", "bVc", "bV", "Vc"]),
    flags=st.fixed_dictionaries(
        {
            "go_backwards": st.booleans(),
            "zero_output_for_mask": st.booleans(),
            "unroll": st.sampled_from([False, 2]),
            "keep_states": st.booleans(),
            "jit_compile": st.booleans(),
            "checkpoint_every": st.sampled_from([None, *EVERY]),
            "adjoint_clipnorm": st.sampled_from([None, 0.7]),
        }
    ),
)
def test_options_by_chance(
    mode, window, mask, sequences, names, steps, optional, flags
):
    flags["jit_compile"] &= mode != "xla"
    names = tuple(sorted(names)) + ("factors",) * (window is None)
    options = {"steps": steps, "optional": optional, **flags}
    check(window, mask, sequences, names, mode, **options)


# ------------------------------------------------------------------- how long the pass is


def test_rows_are_as_many_as_windows_hold_a_step():
    """Their number is what a step of the pass with checkpoints costs."""
    for window, rows in {(3, 3): 1, (3, 1): 3, (5, 2): 3, (4, 2): 2, (9, 2): 5}.items():
        ds = Arriving((tf.ones([B, H]),))
        (of_windows,) = keras_bptt.engine.windows.rows_of(
            Truncation(*window), ds
        ).adjoints
        assert of_windows.shape == (rows * B, H)


def recurrent_products(program):
    """How many products with U an optimised XLA program makes, one after the other."""
    computations, name = {}, None
    for line in program.splitlines():
        if start := re.match(r"(?:ENTRY )?(%\S+) \(.*\{$", line):
            name = "entry" if line.startswith("ENTRY") else start[1]
            computations[name] = []
        elif name:
            computations[name].append(line)

    def count(name):
        total = 0
        for line in computations[name]:
            # (rows, units) x (units, units); those of the weights sum over the rows.
            shape = re.search(r"= \(?f32\[\d+,(\d+)\]\S* (dot|custom-call)\(", line)
            if shape and int(shape[1]) == H and "lhs_contracting_dims={1}" in line:
                total += 1
            if loop := re.search(r" while\(.*body=(%[^, ]+)", line):
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
                assert trips, "a loop of unknown length"
                total += int(trips[1]) * count(loop[1])
            elif called := re.search(r"(?:calls|to_apply)=(%[^, ]+)", line):
                total += count(called[1])
            assert " conditional(" not in line
        return total

    return count("entry")


def backward_program(window, T, masked):
    """XLA's of the backward pass alone, from the states to the gradients."""
    options = Recurrence(
        activation=keras_bptt.cells.activations.resolve(tf.tanh, H, "float32"),
        return_sequences=True,
        truncation=None if window is None else Truncation(*window),
    )
    x, W, U, h_0, b, _, _, dy, ds = problem_of(steps=T)
    h = rng(1).normal(size=dy.shape)
    tensors = [tf.constant(a, "float32") for a in (h, h_0, dy, ds, x, W, U, h_0, b)]
    if masked:
        tensors.append(tf.constant(rng(2).random((B, T)) < 0.7))

    @tf.function(jit_compile=True, autograph=False)
    def backward(h, last, dy, ds, x, W, U, h_0, b, *mask):
        constants = Constants(*mask)
        arguments = arguments_of(x, W, U, h_0, b)
        known = (h, (last,)), ((),), (dy, (ds,))
        return keras_bptt.engine.backward.backward(
            options, constants, *known, arguments
        )

    return backward.experimental_get_compiler_ir(*tensors)(stage="optimized_hlo")


DEPTH = [(32, 32), (32, 16), (32, 8), (32, 5), (32, 1)]


@pytest.mark.parametrize(
    ("window", "steps", "masked"),
    few(
        itertools.product(DEPTH, [512, 4096], [False, True]),
        lambda *case: case == ((32, 5), 512, True),
    ),
)
def test_backward_pass_is_as_long_as_a_window(window, steps, masked):
    """Whatever the sequence: read off the compiled program, loops times their trips."""
    assert recurrent_products(backward_program(window, steps, masked)) == window[0]


def test_full_backward_pass_is_as_long_as_the_sequence():
    """The control of the test above; and a window that is longer than the sequence."""
    assert recurrent_products(backward_program(None, 512, False)) == 512
    assert recurrent_products(backward_program((32, 8), 20, False)) <= 32
