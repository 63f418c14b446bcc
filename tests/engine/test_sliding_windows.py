"""Checkpoints with a truncation: windows that go back through time side by side.

Against the brute force of `truncated_reference`, as `test_windows.py` compares the pass
that takes all windows back at once. `test_breaks.py` shows that the checks can fail.
"""

import functools
import itertools
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import rng, without_graphs
from plain_rnn import each
from test_windows import (
    FLOAT32,
    MASKS,
    MODULES,
    WINDOWS,
    B,
    D,
    H,
    T,
    arrays,
    assert_equal,
    check,
    expected,
    few,
    function_of,
    gradients,
    second_order,
    unrolled,
)

import keras_bptt.engine.backward
import keras_bptt.engine.parts
import keras_bptt.engine.windows
from keras_bptt.engine.clipping import Arriving
from keras_bptt.truncation import Truncation


def some(chosen, *axes):
    """The chosen cases; and all others of the axes, which take long, together."""
    others = (case for case in itertools.product(*axes) if case not in chosen)
    return [*chosen, *(pytest.param(*case, marks=pytest.mark.slow) for case in others)]


# Blocks shorter and longer than windows, whole and broken ones, one, and more than steps.
EVERY = [1, 2, 3, 4, 5, T - 1, T, T + 5, "sqrt"]
CLIP = {"adjoint_clipnorm": 0.7}


@pytest.mark.parametrize(
    ("every", "mask"),
    few(
        itertools.product(EVERY, MASKS),
        lambda every, mask: (EVERY.index(every) + list(MASKS).index(mask)) % 2 == 0,
    ),
    ids=str,
)
def test_equals_brute_force(every, mask):
    """For each block and mask one of the windows, all of them in turn."""
    turn = 3 * EVERY.index(every) + list(MASKS).index(mask)
    check(WINDOWS[turn % len(WINDOWS)], mask, checkpoint_every=every)


@pytest.mark.slow
@pytest.mark.parametrize("every", EVERY, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("options", [{}, CLIP], ids=["", "clipped"])
def test_equals_brute_force_everywhere(every, mask, window, options):
    check(window, mask, checkpoint_every=every, **options)


@pytest.mark.parametrize(
    ("window", "mask"),
    few(
        itertools.product(WINDOWS, ["no mask", "holes"]),
        lambda window, mask: mask == "holes" or window == (5, 2),
    ),
    ids=str,
)
def test_clipped_windows(window, mask):
    """Each window for itself; one window where it holds all steps of an example."""
    check(window, mask, checkpoint_every=4, **CLIP)


OPTIONS = {
    "backwards": {"go_backwards": True},
    "zero": {"zero_output_for_mask": True},
    "unrolled": {"unroll": True},
    "two steps an iteration": {"unroll": 2},
    "not kept": {"keep_states": False},
    "last output": {"sequence": False},
    "last output, clipped": {"sequence": False, **CLIP},
}


@pytest.mark.parametrize("option", [name for name in OPTIONS if name != "backwards"])
@pytest.mark.parametrize("window", [(4, 4), (5, 2)], ids=str)
def test_options(option, window):
    check(window, "holes", checkpoint_every=4, **OPTIONS[option])


@pytest.mark.parametrize("window", [(4, 4), (5, 2)], ids=str)
def test_backwards(window):
    """What the sequence turned around gives forwards."""
    problem, mask = arrays(), MASKS["holes"]
    turned = problem[0][:, ::-1], *problem[1:]
    options = {"return_sequences": True, "checkpoint_every": 4}
    results = []
    for x, m, back in ((problem, mask, True), (turned, mask[:, ::-1], False)):
        constants = {"mask": tf.constant(m)}
        function = function_of(
            window, constants=constants, go_backwards=back, **options
        )
        results.append(gradients(function, x)[0])
    results[1][0] = results[1][0][:, ::-1]
    assert_equal(*results)


def check_against_windows(window, every, names=(), activation="tanh", **more):
    """By automatic differentiation of each window. Without masks, which it cannot read."""
    modules = more.pop("modules", MODULES)
    problem = arrays()
    r = rng(5).choice([0.0, 1.25], size=(B, H)) if "r" in names else None
    d = rng(6).choice([0.0, 1.25], size=(B, D)) if "d" in names else None
    known = {"r": r, "d": d}
    constants = {n: tf.constant(t) for n, t in known.items() if t is not None}
    options = {"return_sequences": True, "checkpoint_every": every, **more}
    ours = function_of(window, modules, activation, constants, **options)
    f = getattr(keras.activations, activation)

    def theirs(x, *others):
        x = x if d is None else d[:, None] * x
        return unrolled(window, x, *others, r=r, f=f)

    got, outputs = gradients(ours, problem)
    want, wanted = gradients(theirs, problem)
    assert_equal(got, want)
    for a, b in zip(outputs, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("window", "activation"),
    few(
        itertools.product([(4, 4), (5, 2), (3, 1)], ["tanh", "gelu", "softmax"]),
        lambda *case: case in [((3, 1), "tanh"), ((4, 4), "gelu"), ((5, 2), "softmax")],
    ),
    ids=str,
)
def test_dropout_and_other_activations(window, activation):
    """A slope from h, a slope from z, and a Jacobian that is not symmetric."""
    check_against_windows(window, 4, ("d", "r"), activation)


@pytest.mark.parametrize(
    ("mode", "window", "mask", "every"),
    some(
        [
            ("xla", (4, 2), "holes", 5),
            pytest.param("eager", (5, 2), "holes", "sqrt", marks=pytest.mark.slow),
        ],
        ["graph", "xla"],
        [(4, 4), (5, 2), (3, 1)],
        ["no mask", "holes"],
        [2, "sqrt"],
    ),
)
def test_equals_brute_force_in_graphs(mode, window, mask, every):
    options = {"jit_compile": mode == "graph", "checkpoint_every": every}
    check(window, mask, mode=mode, **options)


@pytest.mark.parametrize(
    ("steps", "window", "mask", "every", "clipped"),
    some(
        [
            (1, (5, 2), "holes", 4, False),
            (17, (5, 2), "holes", 4, True),
            pytest.param(9, (20, 7), "right", 4, False, marks=pytest.mark.slow),
        ],
        [2, 9, 17],
        [(3, 1), (3, 3), (5, 2), (9, 4)],
        ["no mask", "left", "holes"],
        [4, 30, "sqrt"],
        [False, True],
    ),
)
def test_unknown_number_of_steps(steps, window, mask, every, clipped):
    mask, options = MASKS[mask], CLIP if clipped else {}
    mask = None if mask is None else np.resize(mask, (B, steps))
    problem = arrays(mask, True, steps)
    function = function_of(
        window,
        constants={"mask": None if mask is None else tf.constant(mask)},
        return_sequences=True,
        jit_compile=True,
        checkpoint_every=every,
        **options,
    )
    got, _ = gradients(function, problem, unknown=True)
    assert_equal(got, expected(problem, window, mask, **options))


@pytest.mark.parametrize(
    "window", [(5, 2), pytest.param((4, 4), marks=pytest.mark.slow)], ids=str
)
def test_a_window_of_all_steps_is_full_backpropagation(window):
    """Where only run time tells: the same bits, whatever the blocks."""
    problem = arrays(T=4)
    options = {"return_sequences": True, "checkpoint_every": 3}
    results = [
        gradients(function_of(w, **options), problem, unknown=True)[0]
        for w in (window, None)
    ]
    for got, want in zip(*results, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("window", "mask"),
    few(
        itertools.product([(4, 4), (5, 2)], ["no mask", "holes"]),
        lambda window, mask: (window, mask) == ((5, 2), "holes"),
    ),
)
def test_parts_of_the_batch(monkeypatch, window, mask):
    monkeypatch.setattr(keras_bptt.engine.parts, "cores", lambda: 2)
    monkeypatch.setattr(keras_bptt.engine.parts, "LEAST_WORK", 1)
    monkeypatch.setattr(keras_bptt.engine.parts, "FEWEST_EXAMPLES", 1)
    calls = []
    original = keras_bptt.engine.backward.gradients_of_part
    monkeypatch.setattr(
        keras_bptt.engine.backward,
        "gradients_of_part",
        lambda *args: calls.append(args) or original(*args),
    )
    mask = MASKS[mask]
    constants = {"mask": None if mask is None else tf.constant(mask)}
    options = {"return_sequences": True, "jit_compile": True, "checkpoint_every": 4}
    function = function_of(window, constants=constants, **options)
    problem = arrays(mask)
    got, _ = gradients(function, problem, "graph")
    assert len(calls) == 2
    assert_equal(got, expected(problem, window, mask))


@pytest.mark.parametrize("mask", ["no mask", "holes"])
def test_float32(mask):
    mask = MASKS[mask]
    problem = arrays(mask)
    function = function_of(
        (5, 2),
        constants={"mask": None if mask is None else tf.constant(mask)},
        return_sequences=True,
        checkpoint_every=4,
        dtype="float32",
    )
    got, _ = gradients(function, problem, dtype="float32")
    assert_equal(got, expected(problem, (5, 2), mask), FLOAT32)


@pytest.mark.parametrize("sequence", [True, False], ids=["sequence", "last"])
def test_second_order(sequence):
    problem = arrays(None, sequence)
    results = []
    with without_graphs():
        for every in (4, None):
            options = {"return_sequences": sequence, "checkpoint_every": every}
            function = function_of((5, 2), **options)
            results.append(second_order(function, problem))
    assert_equal(*results)


@pytest.mark.parametrize(
    ("window", "sequence"),
    few(
        itertools.product([(4, 4), (5, 2), (3, 1)], [True, False]),
        lambda window, sequence: window == (5, 2) or not sequence,
    ),
    ids=str,
)
def test_gradient_ends_with_the_window(window, sequence):
    """Outside of it exactly zero, inside not."""
    steps, stride = window
    x, W, U, h_0, b, *_ = map(tf.constant, arrays())
    options = {"return_sequences": sequence, "checkpoint_every": 4}
    function = function_of(window, **options)
    with without_graphs():
        for t in range(1, T + 1) if sequence else [T]:
            with tf.GradientTape() as tape:
                tape.watch([x, h_0])
                y, _ = function(x, W, U, h_0, b)
                loss = tf.reduce_sum(y[:, t - 1] ** 2 if sequence else y**2)
            d_x, d_h_0 = tape.gradient(loss, [x, h_0])
            end = T - stride * ((T - t) // stride)
            inside = [max(1, end - steps + 1) <= j <= t for j in range(1, T + 1)]
            size = np.max(np.abs(d_x), axis=2)
            assert np.all((size > 1e-6) == inside)
            assert np.all(size[:, ~np.array(inside)] == 0)
            assert np.any(d_h_0 != 0) == (end <= steps)


def test_rows_are_as_many_as_windows_hold_a_step():
    """Their number is what a step of the pass costs."""
    for (steps, stride), rows in zip(
        [(3, 3), (3, 1), (5, 2), (4, 2), (9, 2)], [1, 3, 3, 2, 5], strict=True
    ):
        ds = Arriving((tf.ones([B, H]),))
        truncation = Truncation(steps, stride)
        (of_windows,) = keras_bptt.engine.windows.rows_of(truncation, ds).adjoints
        assert of_windows.shape == (rows * B, H)


# --------------------------------------------------------- checks that test_breaks.py runs


def first(window, mask, every=4, **more):
    return functools.partial(check, window, mask, checkpoint_every=every, **more)


def in_a_loop(modules):
    with mock.patch.object(modules.blocks, "MOST", 1):
        check((5, 2), "no mask", modules=modules, checkpoint_every=4)
        check((5, 2), "holes", modules=modules, checkpoint_every=4, **CLIP)


CHECKS = {
    "chunks": each(first((4, 4), "no mask"), first((4, 4), "left")),
    "overlapping": each(first((5, 2), "no mask"), first((8, 3), "holes")),
    "whole levels": each(first((4, 2), "right", 2), first((4, 2), "no mask", 5)),
    "clipped": each(
        first((5, 2), "no mask", **CLIP),
        first((4, 2), "right", **CLIP),
        first((12, 5), "holes", **CLIP),
        first((4, 4), "holes", **CLIP),
        first((3, 1), "right", **CLIP),
    ),
    "dropout": each(
        lambda modules: check_against_windows((5, 2), 4, ("d", "r"), modules=modules),
        lambda modules: check_against_windows(
            (4, 4), 3, ("r",), "gelu", modules=modules
        ),
    ),
    "in a loop": in_a_loop,
}
