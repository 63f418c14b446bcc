"""The engine knows of a cell no more than its contract: cells of all kinds go through it.

First each cell for itself: its derivative, written out, against automatic differentiation
of its step. Then the engine with each of its options, against a loop of `cell.step` in so
many words that TensorFlow differentiates, example by example and window by window.
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import FLOAT64, WAYS, examples, few, rng
from hypothesis import given
from hypothesis import strategies as st
from projected_lstm import (
    CountsLSTM,
    DrivenLSTM,
    MatrixIntegrator,
    MixedLSTM,
    PooledIntegrator,
    ProjectedLSTM,
    RecomputedLSTM,
)

import keras_bptt.engine.backward
import keras_bptt.engine.parts
from keras_bptt.cells.activations import resolve
from keras_bptt.cells.simple_rnn import SimpleRNN
from keras_bptt.engine.options import Arguments, Constants, Options
from keras_bptt.engine.recurrence import recurrence
from keras_bptt.runtime.tensors import mapped
from keras_bptt.truncation import Truncation

# All different, so that no transpose hides behind a shape that fits by accident: examples,
# steps, features, units, and what a projection or an output layer shows.
B, T, D, H, P, O = 3, 7, 4, 2, 5, 6  # noqa: E741
# Of the matrices.
ROWS, COLUMNS = 2, 5

# Both sides add up the same products of numbers near 1 in float64, in another order: some
# 10^2 a step, each rounded to 1e-16, through links whose gains are near 1. So errors are
# 1e-13; a wrong term is an error near 1.
EXACT = FLOAT64
# A derivative of order n has some 10^n times the terms of the value.
HIGHER = 10 * FLOAT64

# Row by row: holes between a masked start and a masked end; nothing but masked steps; none.
MASK = np.array(
    [[0, 1, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]], bool
)
ZERO = tf.UnconnectedGradients.ZERO

SEQUENCE = {"return_sequences": True}
MASKED = {"mask": True, **SEQUENCE}
BACKWARDS = {"go_backwards": True, "zero_output_for_mask": True, **MASKED}
# Problems of which every limit below clips.
EXPLODING = {"gain": 4.0, "seed": 5, **MASKED}
GROWTH = {"adjoint_max_growth": 1.0, **EXPLODING}


# --------------------------------------------------------------------------- the problems


class Kind(NamedTuple):
    """A cell, and the shapes of a row of inputs, of a row of h, and of the weights.

    The radius is about the gain of a matrix.
    """

    cell: object
    inputs: tuple
    state: tuple
    weights: tuple
    radius: float = 1.2


def simple_rnn(activation, radius=1.2):
    function = getattr(keras.activations, activation)
    cell = SimpleRNN(resolve(function, H, "float64"))
    return Kind(cell, (D,), (H,), ((D, H), (H, H), (H,)), radius)


def lstm(cell):
    return Kind(cell, (D,), (H,), ((D, 4 * H), (H, 4 * H), (4 * H,), (H, P)))


def integrator(cell):
    shapes = (ROWS, D), (ROWS, COLUMNS)
    return Kind(cell, *shapes, ((D, COLUMNS), (ROWS, ROWS), (D,)))


KINDS = {
    "projected": lstm(ProjectedLSTM()),
    "recomputed": lstm(RecomputedLSTM()),
    "driven": lstm(DrivenLSTM()),
    "mixed": lstm(MixedLSTM()),
    "matrix": integrator(MatrixIntegrator()),
    "pooled": integrator(PooledIntegrator()),
    "tanh": simple_rnn("tanh"),
    "gelu": simple_rnn("gelu"),
    "softmax": simple_rnn("softmax", 4.0),
    "log_softmax": simple_rnn("log_softmax"),
}
COUNTS = lstm(CountsLSTM())


class Problem(NamedTuple):
    """What `recurrence` takes, and cotangents of its outputs; arrays in float64."""

    options: Options
    constants: Constants
    arguments: Arguments
    cotangents: tuple


def random_weights(kind, random, gain=1.0):
    """Matrices that neither shrink nor grow what they multiply, and short vectors."""
    return tuple(
        random.normal(size=shape) * (gain * kind.radius / np.sqrt(shape[0]))
        if len(shape) == 2
        else 0.4 * random.normal(size=shape)
        for shape in kind.weights
    )


def problem(
    kind,
    *,
    steps=T,
    batch=B,
    mask=None,
    noise="",
    factors=False,
    layer="",
    observed=False,
    gain=1.0,
    seed=0,
    **options,
):
    """A random problem.

    Args:
        kind: the name of one of `KINDS`, or a `Kind`.
        steps, batch: how many.
        mask: bool (batch, steps), or True for `MASK`; masked inputs are NaN.
        noise: which of the factors d and r of dropout there are.
        factors: whether there are factors of the links.
        layer: which of V and c an output layer has. Empty: there is none.
        observed: whether there are zeros.
        gain: what the weights are multiplied by.
        **options: of the recurrence; `truncation` as (steps, stride).
    """
    kind, random, shape = KINDS.get(kind, kind), rng(seed), (batch, steps)
    cell, weights = kind.cell, random_weights(kind, random, gain)
    states, _, deltas = cell.shapes(weights)
    mask = MASK[:, :steps] if mask is True else mask
    x = random.normal(size=(*shape, *kind.inputs))
    if cell == COUNTS.cell:
        x = random.integers(-3, 4, size=x.shape)
    elif mask is not None:
        x[~mask] = np.nan
    noise = tuple(
        random.choice([0.0, 1.25], p=[0.2, 0.8], size=(batch, *row))
        if name in noise
        else None
        for name, row in (("d", kind.inputs), ("r", kind.state))
    )
    links = random.choice([0.0, 0.5, 1.25], p=[0.1, 0.2, 0.7], size=shape)
    *rows, width = states[cell.output]
    V, c = random.normal(size=(width, O)) / np.sqrt(width), random.normal(size=O)
    shown = (*rows, O if layer else width)
    if options.get("truncation"):
        options["truncation"] = Truncation(*options["truncation"])
    options = Options(cell, **options)
    dy = random.normal(size=(*shape[: 1 + options.return_sequences], *shown))
    return Problem(
        options,
        Constants(mask, noise, links if factors else None),
        Arguments(
            x,
            weights,
            tuple(0.5 * random.normal(size=(batch, *row)) for row in states),
            {"": (), "V": (V,), "Vc": (V, c)}[layer],
            tuple(np.zeros((*shape, *row)) for row in (*states, *deltas) if observed),
        ),
        (dy, tuple(random.normal(size=(batch, *row)) for row in states)),
    )


def tensors(structure, dtype="float64"):
    """The arrays of a structure as tensors; real numbers in this dtype."""
    return mapped(
        lambda a: tf.constant(a, dtype if a.dtype.kind == "f" else None), structure
    )


def real(structure):
    """Its tensors that have gradients."""
    return [t for t in tf.nest.flatten(structure) if t.dtype.is_floating]


def gradients(tape, target, arguments, cotangents=None):
    """`Arguments` of gradients; None for integers, 0 where nothing depends on it."""
    found = iter(tape.gradient(target, real(arguments), cotangents, ZERO))
    each = tf.nest.flatten(arguments)
    each = [next(found) if t.dtype.is_floating else None for t in each]
    return tf.nest.pack_sequence_as(arguments, each)


def first_order(function):
    """Of a recurrence: the function that also takes cotangents, and adds the gradients."""

    def both(options, constants, arguments, cotangents):
        with tf.GradientTape() as tape:
            tape.watch(real(arguments))
            outputs = function(options, constants, arguments)
        target, cotangents = map(tf.nest.flatten, (outputs, cotangents))
        return outputs, gradients(tape, target, arguments, cotangents)

    return both


def evaluate(function, problem, mode="plain", dtypes=("float64", "float64")):
    """What `function(options, constants, arguments, cotangents)` returns, as arrays.

    Args:
        mode: one of `WAYS`, or "unknown": a graph, or "unknown xla": compiled, each for any
            number of examples and steps.
        dtypes: of the weights and of all else.
    """
    options, *arrays = problem
    constants, arguments, cotangents = tensors(arrays, dtypes[1])
    arguments = arguments._replace(
        weights=tensors(problem.arguments.weights, dtypes[0]),
        output_layer=tensors(problem.arguments.output_layer, dtypes[0]),
    )
    given = constants, arguments, cotangents

    @tf.autograph.experimental.do_not_convert
    def run(*given):
        return function(options, *given)

    def unknown(t):
        sizes = problem.arguments.x.shape[:2]
        return tf.TensorSpec([None if n in sizes else n for n in t.shape], t.dtype)

    if mode.startswith("unknown"):
        run = tf.function(run, autograph=False, jit_compile="xla" in mode or None)
        run = run.get_concrete_function(*mapped(unknown, given))
    else:
        run = WAYS[mode](run)
    return mapped(lambda t: t.numpy(), run(*given))


def leaves(structure, name=""):
    """(name, array) for each array of nested tuples."""
    if not isinstance(structure, tuple):
        return [(name, structure)]
    fields = getattr(structure, "_fields", range(len(structure)))
    pairs = zip(fields, structure, strict=True)
    return [leaf for f, part in pairs for leaf in leaves(part, f"{name} {f}".strip())]


def assert_close(got, want, tolerance=EXACT):
    """Compare tuples of arrays; relative to the largest number, or 1."""
    for (name, a), (_, b) in zip(leaves(got), leaves(want), strict=True):
        if b is None:
            assert a is None, name
            continue
        a, b = map(np.asarray, (a, b))
        assert a.shape == b.shape, name
        assert np.all(np.isfinite(b)), f"{name} of the reference is not finite"
        error = np.max(np.abs(a.astype("float64") - b), initial=0.0)
        error /= max(1.0, np.max(np.abs(b), initial=0.0))
        assert error <= tolerance, f"{name}: error {error:.1e}"


def assert_alive(cell, d):
    """Every gradient but that of a state that no step reads is larger than any error."""
    recurs = cell.recurs or [True] * len(d.states)
    unread = [f"states {i}" for i, flag in enumerate(recurs) if not flag]
    for name, array in leaves(d):
        if array is not None and name not in unread:
            assert np.max(np.abs(array)) > 1e4 * EXACT, f"{name} vanished"


# --------------------------------------------------------------------- the brute force


def unrolled(options, constants, arguments):
    """The recurrence: a loop of the cell's steps that TensorFlow differentiates."""
    layer, of_cell = arguments.output_layer, arguments._replace(output_layer=())
    loop = clipped_loop if options.clips else each_example
    y, last = loop(options, constants, of_cell)
    for V in layer[:1]:
        y = tf.tensordot(y, V, 1)
    return sum(layer[1:], y), last


def clipped_loop(options, constants, arguments):
    """`each_example`, with an operation of its own for the gradient that is clipped.

    Differentiated, its outputs clip anew; of its gradient the scales are constants.
    """

    @tf.custom_gradient
    def operation(*tensors):
        given = tf.nest.pack_sequence_as(arguments, tensors)

        def back(*cotangents):
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                outputs = each_example(options, constants, given)
            return tape.gradient(tf.nest.flatten(outputs), tensors, cotangents, ZERO)

        return tf.nest.flatten(each_example(options, constants, given)), back

    y, *states = operation(*tf.nest.flatten(arguments))
    return y, tuple(states)


def each_example(options, constants, arguments):
    """The outputs and the last states, example by example."""
    x, weights, states, _, zeros = arguments
    rows = []
    for n in range(x.shape[0]):
        of_row = constants, x, states, zeros
        of_row = mapped(lambda t, n=n: t[n : n + 1], of_row)
        rows.append(one_example(options, weights, *of_row))
    y, last = zip(*rows, strict=True)
    return tf.concat(y, 0), tuple(tf.concat(s, 0) for s in zip(*last, strict=True))


def one_example(options, weights, constants, x, initial, zeros):
    """`unrolled` of one; its real steps are numbered s = 1 ... N as they are processed."""
    mask, noise, factors, _ = constants
    cell, order = options.cell, list(range(x.shape[1]))
    order = order[::-1] if options.go_backwards else order
    real = [mask is None or bool(mask[0, t]) for t in order]
    # Where the inputs of a step stand. Its factor stands in the order of processing.
    places = [(t, i) for i, t in enumerate(order) if real[i]]

    def step(s, before):
        t, place = places[s - 1]
        if factors is not None and s > 1:
            before = passed(factors[0, place], before)
        drive = cell.project(weights, x[:, t], noise)
        # The deltas of these cells: of the drive, and of what is projected.
        of_states, of_drive = zeros[: len(before)], zeros[len(before) :]
        drive = plus(drive, of_drive, t)
        after, _ = cell.step(weights, drive, before, noise)
        after = plus(after, of_states, t)
        return (*after[:2], *plus(after[2:], of_drive[len(drive) :], t))

    shown = windows(options, step, initial, len(places))
    last = shown.get(len(places), initial)
    nothing = tf.zeros_like(initial[cell.output])
    owners = itertools.accumulate(map(int, real))  # of an output: the last real step
    outputs = [
        shown[s][cell.output]
        if s and (flag or not options.zero_output_for_mask)
        else nothing
        for s, flag in zip(owners, real, strict=True)
    ]
    return tf.stack(outputs, 1) if options.return_sequences else outputs[-1], last


def plus(some, zeros, t):
    """Each tensor and its zeros of step t, if any."""
    pairs = itertools.zip_longest(some, zeros[: len(some)])
    return tuple(a if z is None else a + z[:, t] for a, z in pairs)


def windows(options, step, initial, number):
    """The states by step, each from the window that has the loss of this step.

    A window that does not begin with the example begins at a constant: the state before
    its first step.
    """

    def run(states, start, end):
        found, sent = {start - 1: states}, {}
        for s in range(start, end + 1):
            states = found[s] = clipped(options, sent, s, step(s, states))
        return found, sent

    every, sent = run(initial, 1, number)
    truncation = options.truncation
    if truncation is None or number <= truncation.steps:
        return {s: counted(sent, s, every[s]) for s in range(1, number + 1)}
    shown = {}
    for end in range(number, 0, -truncation.stride):
        start = max(1, end - truncation.steps + 1)
        before = initial if start == 1 else mapped(tf.stop_gradient, every[start - 1])
        found, sent = run(before, start, end)
        for s in range(max(1, end - truncation.stride + 1), end + 1):
            shown[s] = counted(sent, s, found[s])
    return shown


def passed(factor, states):
    """The states, whose gradient is multiplied by the factor."""
    numbers = mapped(tf.stop_gradient, states)
    return tuple(n + factor * (s - n) for n, s in zip(numbers, states, strict=True))


def counted(sent, s, states):
    """The states that step s shows; `sent` gets the norm of their gradient."""

    @tf.custom_gradient
    def operation(*states):
        def back(*e):
            sent[s] = norm(e)
            return e

        return mapped(tf.identity, states), back

    return operation(*states)


def clipped(options, sent, s, states):
    """The states after step s, whose gradient is clipped; but not when differentiated."""
    if not options.clips:
        return states
    flags, done = options.cell.recurs or [True] * len(states), []

    @tf.custom_gradient
    def operation(*states):
        def back(*a):
            if done:
                return a
            done.append(True)
            size = norm(t for t, recurs in zip(a, flags, strict=True) if recurs)
            limit = tf.constant(np.inf, size.dtype)
            if options.adjoint_clipnorm is not None:
                limit = tf.minimum(limit, options.adjoint_clipnorm)
            if options.adjoint_max_growth is not None:
                later = sum(size for step, size in sent.items() if step >= s)
                limit = tf.minimum(limit, options.adjoint_max_growth * later)
            scale = tf.stop_gradient(limit / size) if size > limit else 1.0
            return [t * scale if f else t for t, f in zip(a, flags, strict=True)]

        return mapped(tf.identity, states), back

    return operation(*states)


def norm(tensors):
    return tf.sqrt(tf.add_n([tf.reduce_sum(t * t) for t in tensors]))


# ------------------------------------------------------------------------- cell by cell


def check_cell(kind, noise, rows):
    """A cell's `step_back` and `gradients` against automatic differentiation of `step`."""
    random, cell = rng(3), kind.cell
    weights = tensors(random_weights(kind, random))
    shapes = cell.shapes(weights)
    x = random.normal(size=(*rows, *kind.inputs))
    x = tf.constant(random.integers(-3, 4, size=x.shape) if kind == COUNTS else x)
    before, adjoints = (
        tuple(tf.constant(random.normal(size=(*rows, *row))) for row in shapes.states)
        for _ in range(2)
    )
    noise = tuple(
        tf.constant(random.normal(size=(rows[-1], *row))) if name in noise else None
        for name, row in zip("dr", (kind.inputs, kind.state), strict=True)
    )
    sources = [*weights, *before, *real([x])]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        drive = cell.project(weights, x, noise)
        after, saved = cell.step(weights, drive, before, noise)
    want = tape.gradient(after, sources, adjoints, ZERO)

    assert shapes_of(rows, shapes[:2]) == [t.shape for t in (*after, *saved)]
    # What a cell does not want is not there for it.
    point = cell.point(drive=drive, before=before, after=after, saved=saved)
    back, deltas = cell.step_back(cell.weights_back(weights), point, adjoints, noise)
    assert shapes_of(rows, [shapes.deltas]) == [t.shape for t in deltas]
    if len(rows) == 1:
        x, point, deltas, before = mapped(lambda t: t[None], (x, point, deltas, before))
    point = point._replace(before=[[b[:1], b[1:]] for b in before])
    d_weights, d_x = cell.gradients(weights, lambda: x, point, deltas, noise)
    assert (d_x is None) == x.dtype.is_integer
    d_x = [] if d_x is None else [tf.reshape(d_x, [*rows, *kind.inputs])]
    assert_close((*d_weights, *back, *d_x), tuple(want))


def shapes_of(rows, shapes):
    return [(*rows, *shape) for shape in itertools.chain(*shapes)]


@pytest.mark.parametrize("name", [*KINDS, "counts"])
def test_cell_against_automatic_differentiation(name):
    """Of one step and of many at once, with and without each of the factors of dropout."""
    for rows, noise in itertools.product([(B,), (T, B)], ["", "d", "r", "dr"]):
        check_cell(KINDS.get(name, COUNTS), noise, rows)


# ----------------------------------------------------------- the engine and its options


def check(kind, mode="plain", **options):
    """Outputs and first derivatives against the brute force; these are returned."""
    one = problem(kind, **options)
    got, d = evaluate(first_order(recurrence), one, mode)
    want, want_d = evaluate(first_order(unrolled), one, "eager")
    assert_close(got, want)
    assert_close(d, want_d)
    return d


CASES = {
    "last": {"keep_states": False, "noise": "dr"},
    "mask": MASKED,
    "mask, last": {"mask": True, "noise": "dr"},
    "zero output": {"zero_output_for_mask": True, "noise": "d", **MASKED},
    "zero output, last": {"zero_output_for_mask": True, "unroll": 3, "mask": True},
    "backwards": {"go_backwards": True, "noise": "dr", **MASKED},
    "unrolled": {"unroll": True, **MASKED},
    "not kept": {"keep_states": False, "noise": "dr", **MASKED},
    "checkpoints": {"checkpoint_every": 3, "noise": "dr", **MASKED},
    "checkpoints, backwards": {"checkpoint_every": 2, **BACKWARDS},
    "root, last": {"checkpoint_every": "sqrt", "mask": True},
    "one checkpoint": {"checkpoint_every": T + 3, "keep_states": False, **MASKED},
    "layer, mask": {"layer": "Vc", "noise": "dr", **MASKED},
    "layer, zero output": {"layer": "V", "zero_output_for_mask": True, **MASKED},
    "layer, last": {"layer": "Vc", "mask": True, "go_backwards": True},
    "layer, checkpoints": {"layer": "Vc", "checkpoint_every": 3, **SEQUENCE},
    "factors": {"factors": True, "noise": "dr", "go_backwards": True, **MASKED},
    "factors, checkpoints": {"factors": True, "checkpoint_every": 3, **SEQUENCE},
    "chunks, last": {"truncation": (3, 3)},
    "sliding": {"truncation": (2, 1), "noise": "dr", **MASKED},
    "sliding, checkpoints": {"truncation": (2, 1), "checkpoint_every": 3, **MASKED},
    "windows": {"truncation": (5, 2), "noise": "dr", **MASKED},
    "windows, last": {"truncation": (5, 2), "keep_states": False, "mask": True},
    "windows, backwards": {"truncation": (5, 2), **BACKWARDS},
    "windows, layer": {"truncation": (5, 2), "layer": "Vc", "noise": "d", **MASKED},
    "windows, checkpoints": {"truncation": (5, 2), "checkpoint_every": 3, **SEQUENCE},
    # The norm is that of h and c together. A projection, which does not recur, counts in
    # what is sent, and is never scaled.
    "norm": {"adjoint_clipnorm": 0.7, "noise": "dr", **EXPLODING},
    "growth": {"noise": "dr", **GROWTH},
    "growth, last": {**GROWTH, "return_sequences": False},
    "both": {"adjoint_clipnorm": 2.0, **GROWTH},
    "growth, factors": {"factors": True, **GROWTH},
    "growth, layer": {"layer": "Vc", **GROWTH, **BACKWARDS},
    "growth, windows": {"truncation": (5, 2), **GROWTH},
    # Other sizes.
    "one step, unrolled": {"steps": 1, "unroll": True},
    "one masked step": {"steps": 1, **MASKED},
    "one example": {"batch": 1, "noise": "dr", **SEQUENCE},
    "many steps": {
        "steps": 17,
        "mask": np.arange(17) % 5 != np.arange(B)[:, None],
        "checkpoint_every": "sqrt",
    },
    # Adjoints and deltas are the gradients of zeros.
    "observed": {"observed": True, "noise": "dr", **MASKED},
    "observed, layer": {
        "observed": True,
        "layer": "Vc",
        "go_backwards": True,
        **MASKED,
    },
    "observed, factors": {"observed": True, "checkpoint_every": 3, "factors": True},
    "observed, norm": {"observed": True, "adjoint_clipnorm": 0.7, **BACKWARDS},
    "observed, windows": {"observed": True, "truncation": (3, 1), "mask": True},
    "observed, growth": {
        "observed": True,
        "truncation": (5, 2),
        "checkpoint_every": 3,
        **GROWTH,
    },
}
# What a case that is chosen does too, with an option more or in another mode.
PART_OF_OTHERS = ["mask", "both", "checkpoints", "factors", "windows", "sliding"]
PART_OF_OTHERS += [
    "growth",
    "norm",
    "unrolled",
    "not kept",
    "zero output",
    "layer, mask",
]
PART_OF_OTHERS += ["observed", "observed, factors"]
CHOSEN = [
    *[("projected", case, "plain") for case in CASES if case not in PART_OF_OTHERS],
    *[(name, "checkpoints", "plain") for name in ("driven", "matrix", "pooled")],
    ("recomputed", "windows, checkpoints", "plain"),
    ("driven", "sliding", "plain"),
    ("mixed", "sliding, checkpoints", "plain"),
    ("mixed", "growth", "plain"),
    # Where h is shown, a step reads what is shown, and has two axes.
    *[("matrix", case, "plain") for case in ("zero output", "chunks, last", "norm")],
    ("matrix", "windows, checkpoints", "plain"),
    ("matrix", "observed, factors", "plain"),
    ("matrix", "layer, mask", "unknown"),
    ("projected", "zero output", "eager"),
    ("projected", "checkpoints", "unknown"),
    ("projected", "both", "graph"),
    ("projected", "layer, mask", "xla"),
]
# What makes the gradient another than the derivative.
ADDED = ("truncation", "factors", "adjoint_clipnorm", "adjoint_max_growth")


@pytest.mark.parametrize(("name", "case", "mode"), CHOSEN)
def test_options(name, case, mode):
    options = CASES[case]
    d = check(name, mode, **options)
    if options.keys() & set(ADDED):
        free = {key: value for key, value in options.items() if key not in ADDED}
        _, other = evaluate(first_order(recurrence), problem(name, **free))
        pairs = zip(d.weights, other.weights, strict=True)
        assert max(np.max(np.abs(a - b)) for a, b in pairs) > 1e6 * EXACT
    else:
        assert_alive(KINDS[name].cell, d)
    for array in d.zeros:
        assert np.max(np.abs(array)) > 1e4 * EXACT
        assert "mask" not in options or np.all(array[~MASK] == 0)


def test_fewer_steps_than_a_window():
    check("projected", steps=4, truncation=(5, 2), **MASKED)


def test_the_adjoint_of_a_projection_is_never_clipped():
    options = {"adjoint_clipnorm": 1e-3, "adjoint_max_growth": 1.0, "observed": True}
    one = problem("projected", **options, **SEQUENCE)
    (dy, (*_, d_last)), p = one.cotangents, KINDS["projected"].cell.output
    _, d = evaluate(first_order(recurrence), one)
    dy[:, -1] += d_last
    np.testing.assert_array_equal(d.zeros[p], dy)
    assert np.max(np.abs(d.zeros[0])) <= 1e-3 < np.max(np.abs(dy))


PARTS = {
    "checkpoints": {"checkpoint_every": 3, "factors": True, "steps": 6},
    "layer": {"layer": "Vc", "noise": "dr"},
    "windows": {"truncation": (5, 2), "noise": "dr"},
    "windows, checkpoints": {"truncation": (5, 2), "checkpoint_every": 3},
    "observed": {"adjoint_max_growth": 1.0, "observed": True},
}


@pytest.mark.parametrize(
    ("case", "mode"),
    few(
        itertools.product(PARTS, ["graph", "unknown"]),
        lambda *case: case == ("checkpoints", "graph"),
    ),
)
def test_parts_of_the_batch(case, mode, monkeypatch):
    """The engine's own XLA, and parts that run side by side, as of large batches."""
    parts, backward = keras_bptt.engine.parts, keras_bptt.engine.backward
    monkeypatch.setattr(parts, "cores", lambda: 2)
    monkeypatch.setattr(parts, "LEAST_WORK", 0)
    monkeypatch.setattr(parts, "FEWEST_EXAMPLES", 1)
    calls, original = [], backward.gradients_of_part

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(backward, "gradients_of_part", counted)
    options = {"jit_compile": True, **SEQUENCE, **PARTS[case]}
    check("matrix", mode, mask=True, **options)
    assert len(calls) == (4 if mode == "unknown" and "windows" in case else 2)


@pytest.mark.parametrize(
    ("dtype", "name", "case"),
    [
        ("float32", "projected", "mask, last"),
        ("float16", "projected", "windows"),
        ("bfloat16", "projected", "mask"),
        *few(
            itertools.product(
                ["float32", "float16", "bfloat16"],
                ["driven", "matrix", "gelu"],
                ["mask, last", "windows", "layer, mask"],
            ),
            lambda *_: False,
        ),
    ],
)
def test_narrow_numbers(dtype, name, case):
    """Weights in float32 and all else as mixed precision has it, against float64.

    What is rounded on a path is some ten numbers a step, by half an eps each at most and
    with random signs: after T steps sqrt(10 T) eps is far above what adds up. It is 0.07
    in bfloat16, where a wrong term is an error near 1.
    """
    one = problem(name, **CASES[case])
    # The same numbers on both sides.
    rounded = evaluate(lambda _, *arrays: arrays, one, "eager", (dtype, dtype))
    arrays = mapped(lambda a: a if a.dtype.kind == "b" else a.astype(float), rounded)
    one = Problem(one.options, *arrays)
    got = evaluate(first_order(recurrence), one, "plain", ("float32", dtype))
    want = evaluate(first_order(unrolled), one, "eager")
    eps = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}[dtype]
    assert_close(got, want, np.sqrt(10 * T) * eps)
    dtypes = Arguments(dtype, "float32", dtype, "float32", dtype)
    for arrays, wanted in zip(got[1], dtypes, strict=True):
        assert all(a.dtype == wanted for a in tf.nest.flatten(arrays))


@pytest.mark.parametrize("case", ["last", "sliding, checkpoints"])
def test_integer_inputs(case):
    """They have no gradient; everything else has."""
    assert check(COUNTS, **CASES[case]).x is None


# ------------------------------------------------------------------------ higher orders


def derivative(order, function):
    """The derivative of this order of a recurrence.

    First of the squares of the outputs, each with a weight, which sends cotangents that
    depend on the outputs; then of the scalar product of all gradients with a direction.
    """

    def of(options, constants, arguments, cotangents):
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            if order == 1:
                found = function(options, constants, arguments)
                factors = tf.nest.map_structure(tf.multiply, cotangents, found)
            else:
                lower = derivative(order - 1, function)
                found = lower(options, constants, arguments, cotangents)
                factors = mapped(functools.partial(direction, seed=order), found)
            pairs = zip(*map(tf.nest.flatten, (factors, found)), strict=True)
            value = tf.add_n([tf.reduce_sum(a * b) for a, b in pairs])
        return gradients(tape, value, arguments)

    return of


def direction(t, seed):
    """Numbers from -1 to 1 of no pattern, as many as `t` turns out to have."""
    place = tf.cast(tf.range(tf.size(t)), t.dtype)
    return tf.reshape(tf.sin((place + 1) ** 2 + seed), tf.shape(t))


def check_higher_order(order, name, mode="plain", **options):
    one = problem(name, **options)
    got = evaluate(derivative(order, recurrence), one, mode)
    want = evaluate(derivative(order, unrolled), one, "eager")
    assert_close(got, want, HIGHER)
    return want


@pytest.mark.parametrize(
    ("order", "name", "case", "mode"),
    [
        (2, "driven", "windows", "plain"),
        (2, "matrix", "chunks, last", "plain"),
        (2, "matrix", "last", "xla"),
        (3, "projected", "mask", "plain"),
        # A slope from h, a slope from z, a symmetric Jacobian and one that is not.
        *itertools.product([3], ["tanh", "gelu", "softmax"], ["mask, last"], ["plain"]),
        (2, "log_softmax", "mask, last", "plain"),
        (2, "tanh", "unrolled", "graph"),
        (2, "softmax", "one step, unrolled", "plain"),
        (2, "gelu", "one masked step", "plain"),
        # The scales of clipping are constants.
        (2, "tanh", "both", "plain"),
        (2, "gelu", "growth, windows", "plain"),
        (2, "projected", "growth, factors", "plain"),
    ],
)
def test_higher_orders(order, name, case, mode):
    steps = 3 if order == 3 or case == "unrolled" else T
    d = check_higher_order(order, name, mode, **{"steps": steps} | CASES[case])
    assert all(np.max(np.abs(a)) > 1e-3 for a in d.weights)


@pytest.mark.parametrize("mode", ["plain", "xla"])
def test_no_example(mode):
    """As a replica may get at the end of an epoch: nothing to add to a sum."""
    one = problem("tanh", batch=0, **SEQUENCE)
    d = evaluate(derivative(2, recurrence), one, mode)
    for (name, got), (_, t) in zip(leaves(d), leaves(one.arguments), strict=True):
        np.testing.assert_array_equal(got, np.zeros_like(t), name)


def test_observed_adjoints_have_no_derivatives():
    one = problem("projected", observed=True)
    with pytest.raises(NotImplementedError, match="first derivatives alone"):
        evaluate(derivative(2, recurrence), one)


# ---------------------------------------------------------------------------- any options


@st.composite
def drawn(draw, mode):
    """The name of a cell and options that may be together."""
    flag, some = st.booleans(), lambda *values: draw(st.sampled_from(values))
    sizes = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    shape = (B, T) if mode.startswith("unknown") else sizes
    rows = st.lists(flag, min_size=shape[1], max_size=shape[1])
    rows = st.lists(rows, min_size=shape[0], max_size=shape[0])
    window = draw(st.integers(1, 7))
    stride = draw(st.integers(1, window))
    # What is unrolled is so for a number of steps.
    unroll = (False, 3) if mode.startswith("unknown") else (False, True, 3)
    return some(*KINDS), {
        "batch": shape[0],
        "steps": shape[1],
        "mask": draw(st.none() | rows.map(lambda m: np.array(m, bool))),
        "noise": some("", "d", "r", "dr"),
        "layer": some("", "V", "Vc"),
        "seed": draw(st.integers(0, 99)),
        "gain": some(1.0, 2.5),
        "observed": draw(flag),
        "return_sequences": draw(flag),
        "zero_output_for_mask": draw(flag),
        "go_backwards": draw(flag),
        "unroll": some(*unroll),
        "keep_states": draw(flag),
        "checkpoint_every": some(None, 1, 3, 20, "sqrt"),
        "adjoint_clipnorm": some(None, 0.7),
        "adjoint_max_growth": some(None, 1.0),
        **some({"truncation": (window, stride)}, {"factors": True}, {}),
    }


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "graph", "xla", "unknown", "unknown xla"])
@examples(60)
@given(data=st.data())
def test_any_options(mode, data):
    name, options = data.draw(drawn(mode))
    check(name, mode, **options)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "graph", "xla", "unknown"])
@examples(10)
@given(data=st.data(), order=st.sampled_from([2, 2, 3]))
def test_any_options_in_higher_orders(mode, data, order):
    name, options = data.draw(drawn(mode))
    options["observed"] = False
    if options["adjoint_clipnorm"] or options["adjoint_max_growth"]:
        # d_V clips what comes to its states by itself; the loop clips all that comes.
        options["layer"] = ""
    check_higher_order(order, name, mode, **options)


# ------------------------------------------------------------------------ wrong cells


@dataclasses.dataclass(frozen=True)
class Wrong(ProjectedLSTM):
    """The cell with a wrong way back: what `wrong` says."""

    wrong: str

    @property
    def recurs(self):
        return (True, True, self.wrong == "p recurs")

    def step_back(self, weights_back, point, adjoints, noise):
        noise = (None, None) if self.wrong == "no noise" else noise
        back, deltas = super().step_back(weights_back, point, adjoints, noise)
        (h, c, p), (delta, a_p) = back, deltas
        return {
            "c is lost": ((h, tf.zeros_like(c), p), deltas),
            "p goes on": ((h, c, adjoints[2]), deltas),
            "no P": (back, (delta, tf.zeros_like(a_p))),
        }.get(self.wrong, (back, deltas))

    def gradients(self, weights, x, point, deltas, noise):
        if self.wrong == "h of the step itself":
            point = point._replace(before=[[t] for t in point.after])
        return super().gradients(weights, x, point, deltas, noise)


@pytest.mark.parametrize(
    "wrong", ["no noise", "c is lost", "p goes on", "no P", "h of the step itself"]
)
def test_a_wrong_cell_is_found(wrong):
    kind = KINDS["projected"]._replace(cell=Wrong(wrong))
    with pytest.raises(AssertionError, match="error"):
        check(kind, noise="dr", **MASKED)
    with pytest.raises(AssertionError, match="error"):
        check_cell(kind, "dr", (T, B))


def test_what_recurs_decides_what_is_clipped():
    """A projection that claimed to recur would be scaled, and raise the norm."""
    kind = KINDS["projected"]._replace(cell=Wrong("p recurs"))
    found, want = (
        evaluate(first_order(recurrence), problem(kind, **CASES["norm"]))[1]
        for kind in (kind, "projected")
    )
    with pytest.raises(AssertionError, match="error"):
        assert_close(found, want)
