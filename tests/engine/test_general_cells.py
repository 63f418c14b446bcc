"""The engine knows of a cell no more than its contract: cells of all kinds go through it.

First each cell for itself: its derivative, written out, against automatic differentiation
of its step. Then the engine with each of its options, against a loop of `cell.step` in so
many words that TensorFlow differentiates, or against the recursion of the adjoints, written
down here example by example and window by window.
"""

import functools
import itertools
from typing import NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import FLOAT64, MODES, WAYS, examples, few, rng
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
# Where sizes are unknown, one graph is for every number of examples and steps.
GRAPHS = [*MODES, "unknown", "unknown xla"]
MOST_MODES = ["plain", "graph", "xla", "unknown"]
WINDOWS = [(3, 3), (2, 1), (5, 2)]


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
    kind, random = KINDS.get(kind, kind), rng(seed)
    cell, weights = kind.cell, random_weights(kind, random, gain)
    states, _, deltas = cell.shapes(weights)
    shape = (batch, steps)
    mask = MASK if mask is True else mask
    x = random.normal(size=(*shape, *kind.inputs))
    if cell == COUNTS.cell:
        x = random.integers(-3, 4, size=x.shape)
    elif mask is not None:
        x[~mask] = np.nan
    drop = {
        name: random.choice([0.0, 1.25], p=[0.2, 0.8], size=(batch, *row))
        for name, row in (("d", kind.inputs), ("r", kind.state))
    }
    shown = states[cell.output]
    output_layer = {
        "V": random.normal(size=(shown[-1], O)) / np.sqrt(shown[-1]),
        "c": random.normal(size=O),
    }
    shown = (*shown[:-1], O) if layer else shown
    if "truncation" in options and options["truncation"] is not None:
        options["truncation"] = Truncation(*options["truncation"])
    options = Options(cell, **options)
    dy = random.normal(size=(*shape[: 1 + options.return_sequences], *shown))
    return Problem(
        options,
        Constants(
            mask,
            tuple(drop[name] if name in noise else None for name in "dr"),
            random.choice([0.0, 0.5, 1.25], p=[0.1, 0.2, 0.7], size=shape)
            if factors
            else None,
        ),
        Arguments(
            x,
            weights,
            tuple(0.5 * random.normal(size=(batch, *row)) for row in states),
            tuple(output_layer[name] for name in "Vc" if name in layer),
            tuple(np.zeros((*shape, *row)) for row in (*states, *deltas) if observed),
        ),
        (dy, tuple(random.normal(size=(batch, *row)) for row in states)),
    )


def tensors(structure, dtype="float64"):
    """The arrays of a structure as tensors; real numbers in this dtype."""

    def tensor(array):
        if array is None:
            return None
        return tf.constant(
            array, dtype if np.asarray(array).dtype.kind == "f" else None
        )

    return tf.nest.map_structure(tensor, structure)


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


def unknown_sizes(problem):
    """The problem's tensors, with the number of their axes whose size is unknown."""
    several = problem.options.return_sequences

    def each(structure, number):
        return tf.nest.map_structure(lambda _: number, structure)

    constants, arguments, (dy, ds) = problem[1:]
    return (
        Constants(*(each(c, n) for c, n in zip(constants, (2, 1, 2), strict=True))),
        Arguments(
            *(each(a, n) for a, n in zip(arguments, (2, 0, 1, 0, 2), strict=True))
        ),
        (each(dy, 1 + several), each(ds, 1)),
    )


def evaluate(function, problem, mode="plain", dtypes=("float64", "float64")):
    """What `function(options, constants, arguments, cotangents)` returns, as arrays.

    Args:
        mode: one of `WAYS`, or "unknown": a graph, or "unknown xla": compiled, each for any
            number of examples and steps.
        dtypes: of the weights and of all else.
    """
    options, *arrays = problem
    of_weights, dtype = dtypes
    constants, arguments, cotangents = tensors(arrays, dtype)
    arguments = arguments._replace(
        weights=tensors(problem.arguments.weights, of_weights),
        output_layer=tensors(problem.arguments.output_layer, of_weights),
    )
    structure = [constants, arguments, cotangents]
    flat = tf.nest.flatten(structure)
    present = [t for t in flat if t is not None]

    @tf.autograph.experimental.do_not_convert
    def run(*present):
        present = iter(present)
        each = [None if t is None else next(present) for t in flat]
        return function(options, *tf.nest.pack_sequence_as(structure, each))

    if mode.startswith("unknown"):
        sizes = tf.nest.flatten(unknown_sizes(problem))
        sizes = [n for n, t in zip(sizes, flat, strict=True) if t is not None]
        specs = [
            tf.TensorSpec([None] * n + t.shape[n:], t.dtype)
            for n, t in zip(sizes, present, strict=True)
        ]
        xla = mode.endswith("xla")
        run = tf.function(
            run, autograph=False, input_signature=specs, jit_compile=xla or None
        )
    else:
        run = WAYS[mode](run)
    results = run(*present)
    return tf.nest.map_structure(lambda t: None if t is None else t.numpy(), results)


def named(arguments, name="d_"):
    """The arrays of `Arguments`, by name."""
    results = {}
    for field, value in arguments._asdict().items():
        each = value if isinstance(value, tuple) else (value,)
        results |= {f"{name}{field}[{i}]": a for i, a in enumerate(each)}
    return results


def assert_close(got, want, tolerance=EXACT):
    """Compare `Arguments` or outputs; relative to the largest number, or 1."""
    if isinstance(want, Arguments):
        pairs = [(name, named(got)[name], a) for name, a in named(want).items()]
    else:
        flat = map(tf.nest.flatten, (got, want))
        pairs = [
            (f"output {i}", *pair) for i, pair in enumerate(zip(*flat, strict=True))
        ]
    for name, a, b in pairs:
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
    unread = [f"d_states[{i}]" for i, flag in enumerate(recurs) if not flag]
    for name, array in named(d).items():
        if array is not None and name not in unread:
            assert np.max(np.abs(array)) > 1e4 * EXACT, f"{name} vanished"


# --------------------------------------------------------------------- the brute force


class Example(NamedTuple):
    """One example, its real steps numbered s = 1 ... N as they are processed.

    Attributes:
        cell, noise: of its steps.
        x: the inputs of its real steps (1, ...); x[s - 1] are those of step s.
        places: where each of them stands in the inputs.
        factors: of the links from each of them to the one before; 1 of the first.
        owners: for each step, masked ones too, the last real one up to it; 0: none.
        shown: for each step whether its output is that of its owner; else it is 0.
    """

    cell: object
    noise: tuple
    x: list
    places: list
    factors: list
    owners: list
    shown: list

    def step(self, x, before, weights):
        """The states after a step, and its drive."""
        drive = self.cell.project(weights, x, self.noise)
        return self.cell.step(weights, drive, before, self.noise)[0], drive


def example(options, constants, arguments, row):
    mask, noise, factors = constants
    x = arguments.x[row : row + 1]
    order = list(range(x.shape[1]))[:: -1 if options.go_backwards else 1]
    real = [mask is None or bool(mask[row, t]) for t in order]
    owners = list(itertools.accumulate(map(int, real)))
    shown = real if options.zero_output_for_mask else [s > 0 for s in owners]
    places = [t for t, flag in zip(order, real, strict=True) if flag]
    # Factors stand in the order of processing.
    factors = [1.0] * len(order) if factors is None else tf.unstack(factors[row])
    factors = [k for k, flag in zip(factors, real, strict=True) if flag]
    return Example(
        options.cell,
        tuple(None if n is None else n[row : row + 1] for n in noise),
        [x[:, t] for t in places],
        places,
        [1.0, *factors[1:]],
        owners,
        shown,
    )


def windows(options, of, initial, weights):
    """Of each window the steps whose losses are its own, and its states by step.

    A window that does not begin with the example begins at a constant: the state before
    its first step.
    """

    def run(before, start, end):
        states = {start - 1: before}
        for s in range(start, end + 1):
            before = passed(of.factors[s - 1], states[s - 1])
            states[s], _ = of.step(of.x[s - 1], before, weights)
        return states

    number, truncation = len(of.x), options.truncation
    every = run(initial, 1, number)
    if truncation is None or number <= truncation.steps:
        return [(range(1, number + 1), every)]
    found = []
    for end in range(number, 0, -truncation.stride):
        start = max(1, end - truncation.steps + 1)
        own = range(max(1, end - truncation.stride + 1), end + 1)
        first = tuple(map(tf.stop_gradient, every[start - 1]))
        found.append((own, run(initial if start == 1 else first, start, end)))
    return found


def passed(factor, states):
    """The states, whose gradient is multiplied by the factor."""
    numbers = tuple(map(tf.stop_gradient, states))
    return tuple(n + factor * (s - n) for n, s in zip(numbers, states, strict=True))


def shown_by(options, of, states, initial):
    """The outputs of all steps, for the states (by step) that the cell shows."""
    shown = states | {0: tf.zeros_like(initial)}
    steps = [s if flag else 0 for s, flag in zip(of.owners, of.shown, strict=True)]
    outputs = [shown[s] for s in steps]
    return tf.stack(outputs, 1) if options.return_sequences else outputs[-1]


def with_layer(h, layer):
    V, *c = layer or [None]
    h = h if V is None else tf.tensordot(h, V, 1)
    return h + c[0] if c else h


def unrolled(options, constants, arguments):
    """The recurrence, a loop of the cell's steps that TensorFlow differentiates."""
    rows, last, place = [], [], options.cell.output
    dtype = arguments.states[0].dtype
    cast = functools.partial(tf.nest.map_structure, lambda w: tf.cast(w, dtype))
    weights, layer = map(cast, (arguments.weights, arguments.output_layer))
    for row in range(arguments.x.shape[0]):
        initial = tuple(s[row : row + 1] for s in arguments.states)
        of, found = example(options, constants, arguments, row), {}
        for own, states in windows(options, of, initial, weights):
            found |= {s: states[s][place] for s in own}
            if len(of.x) in states:
                last.append(states[len(of.x)])
        rows.append(with_layer(shown_by(options, of, found, initial[place]), layer))
    return tf.concat(rows, 0), joined(last)


def joined(rows):
    """Of tuples of tensors, one for each example, the tuple of the batch."""
    return tuple(tf.concat(each, 0) for each in zip(*rows, strict=True))


def recursion(options, constants, arguments, cotangents):
    """The gradients by the recursion of the adjoints, in so many words.

        a_s = e_s + factor_{s+1} J_{s+1}^T (scale_{s+1} a_{s+1})

    example by example, window by window, with J^T of a tape of its own. Of an observed
    recurrence the gradients of the zeros are the adjoints, scaled, and the deltas.
    """
    rows = []
    for row in range(arguments.x.shape[0]):
        rows.append(of_example(options, constants, arguments, cotangents, row))
    x, weights, states, layer, zeros = zip(*rows, strict=True)
    sums = [tuple(map(tf.add_n, zip(*each, strict=True))) for each in (weights, layer)]
    return Arguments(tf.concat(x, 0), sums[0], joined(states), sums[1], joined(zeros))


def of_example(options, constants, arguments, cotangents, row):
    """`recursion` of one example."""
    _, weights, initial, layer, zeros = arguments
    initial = tuple(s[row : row + 1] for s in initial)
    dy, d_last = mapped(lambda t: t[row : row + 1], cotangents)
    of = example(options, constants, arguments, row)
    found = windows(options, of, initial, weights)
    e, d_layer = cotangents_of_steps(options, of, found, initial, layer, dy, d_last)
    by_place = [[tf.zeros_like(t[:1, 0])] * t.shape[1] for t in (arguments.x, *zeros)]
    d_weights, d_initial = map(list, map(zeros_like, (weights, initial)))
    if not of.x:
        d_initial = e[0]
    for own, states in found if of.x else []:
        a, sent = zeros_like(initial), 0.0
        for s in sorted(states, reverse=True)[:-1]:
            if s in own:
                a = added(a, e[s])
                sent += norm(e[s])
            a = clipped(options, a, sent)
            x, before = of.x[s - 1], passed(of.factors[s - 1], states[s - 1])
            with tf.GradientTape() as tape:
                tape.watch([x, before, weights])
                after, drive = of.step(x, before, weights)
            # The deltas of these cells: of the drive, and of what is projected.
            sources = [x, before, weights, drive]
            d = tape.gradient(after, tf.nest.flatten(sources), a, ZERO)
            d_x, back, of_weights, deltas = tf.nest.pack_sequence_as(sources, d)
            observed = [*a, *deltas, *a[2:]] if zeros else []
            for t, more in zip(by_place, [d_x, *observed], strict=True):
                t[of.places[s - 1]] += more
            d_weights = added(d_weights, of_weights)
            a = [of.factors[s - 1] * b for b in back]
        if 0 in states:
            d_initial = added(d_initial, a)
    d_x, *d_zeros = (tf.stack(t, 1) for t in by_place)
    return Arguments(d_x, d_weights, d_initial, d_layer, tuple(d_zeros))


def cotangents_of_steps(options, of, found, initial, layer, dy, d_last):
    """e_s of all states by s = 0 ... N, and the gradients of the output layer."""
    number, place = len(of.x), options.cell.output
    shown = {s: states[s][place] for own, states in found for s in own}
    with tf.GradientTape() as tape:
        tape.watch([shown, layer])
        y = with_layer(shown_by(options, of, shown, initial[place]), layer)
    d_shown, d_layer = tape.gradient(y, [shown, layer], dy, ZERO)
    e = {s: list(zeros_like(initial)) for s in range(number + 1)}
    for s, d in d_shown.items():
        e[s][place] = d
    return e | {number: added(e[number], d_last)}, d_layer


def clipped(options, a, sent):
    """The adjoints of a step, clipped."""
    flags = options.cell.recurs or [True] * len(a)
    size = norm(t for t, recurs in zip(a, flags, strict=True) if recurs)
    limit = tf.constant(np.inf, size.dtype)
    if options.adjoint_clipnorm is not None:
        limit = tf.minimum(limit, options.adjoint_clipnorm)
    if options.adjoint_max_growth is not None:
        limit = tf.minimum(limit, options.adjoint_max_growth * sent)
    scale = tf.stop_gradient(limit / size) if size > limit else 1.0
    return [t * scale if recurs else t for t, recurs in zip(a, flags, strict=True)]


def norm(tensors):
    return tf.sqrt(tf.add_n([tf.reduce_sum(t * t) for t in tensors]))


def added(some, others):
    return [a + b for a, b in zip(some, others, strict=True)]


def zeros_like(tensors):
    return tuple(map(tf.zeros_like, tensors))


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
    assert_close([*d_weights, *back, *d_x], want)


def shapes_of(rows, shapes):
    return [(*rows, *shape) for shape in itertools.chain(*shapes)]


@pytest.mark.parametrize("noise", ["", "d", "r", "dr"])
@pytest.mark.parametrize("rows", [(B,), (T, B)], ids=["step", "steps"])
@pytest.mark.parametrize("name", [*KINDS, "counts"])
def test_cell_against_automatic_differentiation(name, rows, noise):
    check_cell(KINDS.get(name, COUNTS), noise, rows)


# ----------------------------------------------------------- the engine and its options


def check(kind, mode="plain", **options):
    """Outputs and first derivatives against the brute force; they are returned.

    Where the backward pass does more than to differentiate, or says more, that is the
    recursion.
    """
    one = problem(kind, **options)
    got, d = evaluate(first_order(recurrence), one, mode)
    want, want_d = evaluate(first_order(unrolled), one, "eager")
    if one.options.clips or one.arguments.zeros:
        want_d = evaluate(recursion, one, "eager")
    assert_close(got, want)
    assert_close(d, want_d)
    return d


def assert_matters(d, kind, **options):
    """The gradient would be another with these options."""
    _, other = evaluate(first_order(recurrence), problem(kind, **options))
    difference = max(np.max(np.abs(a - b)) for a, b in zip(d[1], other[1], strict=True))
    assert difference > 1e6 * EXACT


def test_the_two_brute_forces_agree():
    """What TensorFlow differentiates, and the recursion written down."""
    for options in (
        {"factors": True, "noise": "dr", "layer": "Vc", **MASKED},
        {"truncation": (5, 2), "go_backwards": True, **MASKED},
        {"truncation": (2, 2), "mask": True, "layer": "V"},
    ):
        one = problem("projected", **options)
        _, want = evaluate(first_order(unrolled), one, "eager")
        assert_close(evaluate(recursion, one, "eager"), want)


SEQUENCE = {"return_sequences": True}
MASKED = {"mask": True, **SEQUENCE}
CONFIGURATIONS = {
    "last": {"noise": "dr"},
    "sequence": {"noise": "r", **SEQUENCE},
    "mask": MASKED,
    "mask, last": {"mask": True, "noise": "dr"},
    "zero output": {"zero_output_for_mask": True, "noise": "d", **MASKED},
    "zero output, last": {"mask": True, "zero_output_for_mask": True},
    "backwards": {"go_backwards": True, "noise": "dr", **MASKED},
    "backwards, last": {"go_backwards": True, "mask": True},
    "unrolled": {"unroll": True, **MASKED},
    "unrolled by 3": {"unroll": 3, **MASKED},
    "not kept": {"keep_states": False, "noise": "dr", **MASKED},
    "not kept, last": {"keep_states": False},
    "checkpoints": {"checkpoint_every": 3, "noise": "dr", **MASKED},
    "checkpoints, backwards": {
        "checkpoint_every": 2,
        "go_backwards": True,
        "zero_output_for_mask": True,
        **MASKED,
    },
    "checkpoints, not kept": {"checkpoint_every": 3, "keep_states": False, **MASKED},
    "root": {"checkpoint_every": "sqrt", **SEQUENCE},
    "root, last": {"checkpoint_every": "sqrt", "mask": True},
    "one checkpoint": {"checkpoint_every": T + 3, **MASKED},
    "layer": {"layer": "Vc", **SEQUENCE},
    "layer, mask": {"layer": "Vc", "noise": "dr", **MASKED},
    "layer, zero output": {"layer": "V", "zero_output_for_mask": True, **MASKED},
    "layer, last": {"layer": "Vc", "mask": True, "go_backwards": True},
    "layer, checkpoints": {"layer": "Vc", "checkpoint_every": 3, **MASKED},
    "factors": {"factors": True, "noise": "dr", **MASKED},
    "factors, backwards": {"factors": True, "go_backwards": True, **MASKED},
    "factors, checkpoints": {"factors": True, "checkpoint_every": 3, **SEQUENCE},
}
OF_EVERY_CELL = ["checkpoints"]
# Where h is shown, a step reads what is shown, and has two axes.
OF_A_MATRIX = ["zero output", "layer, mask"]
SLOW = ["backwards, last", "checkpoints, not kept", "root, last", "layer, checkpoints"]


@pytest.mark.parametrize(
    ("name", "case"),
    few(
        itertools.product(KINDS, CONFIGURATIONS),
        lambda name, case: (
            (name == "projected" and case not in SLOW)
            or (name == "matrix" and case in OF_A_MATRIX)
            or case in OF_EVERY_CELL
        ),
    ),
)
def test_options(name, case):
    d = check(name, **CONFIGURATIONS[case])
    assert_alive(KINDS[name].cell, d)
    if "factors" in case:
        assert_matters(d, name, **CONFIGURATIONS[case] | {"factors": False})


IN_GRAPHS = [
    ("projected", "zero output", "eager"),
    ("projected", "layer, mask", "xla"),
    ("projected", "checkpoints", "unknown"),
    ("matrix", "layer, mask", "unknown"),
]


@pytest.mark.parametrize(
    ("name", "case", "mode"),
    few(
        itertools.product(
            ["projected", "driven", "matrix"],
            [
                "mask, last",
                "zero output",
                "checkpoints",
                "root",
                "layer, mask",
                "factors, backwards",
            ],
            GRAPHS,
        ),
        lambda *case: case in IN_GRAPHS,
    ),
)
def test_options_in_graphs(name, case, mode):
    check(name, mode, **CONFIGURATIONS[case])


PARTS = {
    "mask": {"noise": "dr", **MASKED},
    "layer": {"layer": "Vc", "noise": "r", **MASKED},
    "checkpoints": {"checkpoint_every": 3, "factors": True, **MASKED},
    "windows": {"truncation": (5, 2), "noise": "dr", **MASKED},
    "windows, checkpoints": {"truncation": (5, 2), "checkpoint_every": 3, **SEQUENCE},
    "observed": {"adjoint_max_growth": 1.0, "observed": True, **MASKED},
}


@pytest.mark.parametrize(
    ("name", "case", "mode"),
    few(
        itertools.product(["mixed", "matrix"], PARTS, ["graph", "unknown"]),
        lambda name, case, mode: (
            mode == "graph" and (name, case) == ("matrix", "checkpoints")
        ),
    ),
)
def test_parts_of_the_batch(name, case, mode, monkeypatch):
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
    check(name, mode, jit_compile=True, **PARTS[case])
    assert len(calls) == (4 if mode == "unknown" and "windows" in case else 2)


SIZES = {
    "one step": {"steps": 1},
    "one masked step": {"steps": 1, "mask": MASK[:, :1], **SEQUENCE},
    "one example": {"batch": 1, "noise": "dr", **SEQUENCE},
    "long": {"steps": 17, "noise": "r", "checkpoint_every": "sqrt", **SEQUENCE},
    "long, mask": {"steps": 17, "mask": np.arange(17) % 5 != np.arange(B)[:, None]},
}


@pytest.mark.parametrize(
    ("name", "case", "mode"),
    few(
        itertools.product(["projected", "matrix"], SIZES, MOST_MODES),
        lambda name, case, mode: (
            (name, mode) == ("projected", "plain") and case != "long"
        ),
    ),
)
def test_sizes(name, case, mode):
    check(name, mode, **SIZES[case])


NARROW = {
    "mask": {"noise": "dr", **MASKED},
    "layer": {"layer": "Vc"},
    "windows": {"truncation": (5, 2), **SEQUENCE},
}


@pytest.mark.parametrize(
    ("dtype", "name", "case"),
    few(
        itertools.product(
            ["float32", "float16", "bfloat16"],
            ["projected", "driven", "matrix", "gelu"],
            NARROW,
        ),
        lambda dtype, name, case: (
            name == "projected"
            and case == ("windows" if dtype == "float16" else "mask")
        ),
    ),
)
def test_narrow_numbers(dtype, name, case):
    """Weights in float32 and all else as mixed precision has it, against float64.

    What is rounded on a path is some ten numbers a step, by half an eps each at most and
    with random signs: after T steps sqrt(10 T) eps is far above what adds up. It is 0.07
    in bfloat16, where a wrong term is an error near 1.
    """
    one = problem(name, **NARROW[case])
    # The same numbers on both sides.
    rounded = evaluate(lambda _, *arrays: arrays, one, "eager", (dtype, dtype))
    arrays = mapped(lambda a: a if a.dtype.kind == "b" else a.astype(float), rounded)
    one = Problem(one.options, *arrays)
    got, d = evaluate(first_order(recurrence), one, "plain", ("float32", dtype))
    want, want_d = evaluate(first_order(unrolled), one, "eager")
    eps = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}[dtype]
    tolerance = np.sqrt(10 * T) * eps
    assert_close(got, want, tolerance)
    assert_close(d, want_d, tolerance)
    dtypes = Arguments(dtype, "float32", dtype, "float32", dtype)
    for arrays, wanted in zip(d, dtypes, strict=True):
        assert all(a.dtype == wanted for a in tf.nest.flatten(arrays))


@pytest.mark.parametrize(
    "options",
    [{"noise": "r", **MASKED}, {"truncation": (5, 2), "checkpoint_every": 3, **MASKED}],
    ids=["mask", "windows"],
)
def test_integer_inputs(options):
    """They have no gradient; everything else has."""
    assert check(COUNTS, **options).x is None


# ------------------------------------------------------------------------- truncation

TRUNCATED = [
    # The window, whether masked, with checkpoints, and of all outputs.
    ("projected", (3, 3), True, None, True),
    ("projected", (2, 1), True, 3, True),
    ("projected", (5, 2), True, None, True),
    ("projected", (5, 2), None, 3, True),
    ("projected", (5, 2), True, None, False),
    ("recomputed", (3, 3), None, 3, True),
    ("driven", (2, 1), True, None, True),
    ("mixed", (5, 2), True, 3, True),
    ("matrix", (5, 2), True, 3, True),
    ("matrix", (3, 3), None, None, False),
]


@pytest.mark.parametrize(
    ("name", "window", "mask", "every", "sequence"),
    few(
        itertools.product(KINDS, WINDOWS, [True, None], [None, 3], [True, False]),
        lambda *case: case in TRUNCATED,
    ),
)
def test_truncation(name, window, mask, every, sequence):
    options = {"mask": mask, "checkpoint_every": every, "return_sequences": sequence}
    d = check(name, truncation=window, noise="dr", **options)
    if name != "softmax":  # which forgets faster
        assert_matters(d, name, noise="dr", **options)


BESIDE_WINDOWS = {
    "backwards": {"go_backwards": True, "zero_output_for_mask": True, **MASKED},
    "layer": {"layer": "Vc", "noise": "d", **MASKED},
    "unrolled": {"unroll": True, **SEQUENCE},
    "not kept": {"keep_states": False, **MASKED},
    "long": {"steps": 17, "checkpoint_every": "sqrt", **SEQUENCE},
    "short": {"steps": 4, "mask": MASK[:, :4], **SEQUENCE},
}


@pytest.mark.parametrize(
    ("name", "case", "mode"),
    few(
        [
            (name, case, mode)
            for name in ("projected", "matrix")
            for case in BESIDE_WINDOWS
            for mode in MOST_MODES
            # What is unrolled is so for a number of steps.
            if (case, mode) != ("unrolled", "unknown")
        ],
        lambda name, case, mode: (
            (name, mode) == ("projected", "plain") and case not in ("long", "unrolled")
        ),
    ),
)
def test_options_beside_windows(name, case, mode):
    check(name, mode, truncation=(5, 2), **BESIDE_WINDOWS[case])


# --------------------------------------------------------------------- clipped adjoints

CLIPPED = {
    "norm": {"adjoint_clipnorm": 0.7, "noise": "dr", **MASKED},
    "growth": {"adjoint_max_growth": 1.0, "noise": "dr", **MASKED},
    "growth, last": {"adjoint_max_growth": 1.0, "mask": True},
    "both": {"adjoint_clipnorm": 2.0, "adjoint_max_growth": 1.0, **MASKED},
    "factors": {"adjoint_max_growth": 1.0, "factors": True, **MASKED},
    "windows": {"adjoint_max_growth": 1.0, "truncation": (5, 2), **MASKED},
    "norm, windows": {"adjoint_clipnorm": 0.7, "truncation": (5, 2), **MASKED},
    "windows, checkpoints": {
        "adjoint_max_growth": 1.0,
        "truncation": (5, 2),
        "checkpoint_every": 3,
        **MASKED,
    },
    "chunks": {"adjoint_max_growth": 1.0, "truncation": (4, 4), **SEQUENCE},
    "layer, backwards": {
        "adjoint_max_growth": 1.0,
        "layer": "Vc",
        "go_backwards": True,
        "zero_output_for_mask": True,
        **MASKED,
    },
}
# Of which every case clips.
EXPLODING = {"gain": 4.0, "seed": 5}


@pytest.mark.parametrize(
    ("name", "case", "mode"),
    few(
        [
            *itertools.product(["projected"], CLIPPED, MOST_MODES),
            *itertools.product(["matrix"], ["norm", "norm, windows"], MOST_MODES),
            *itertools.product(["mixed"], CLIPPED, ["plain"]),
        ],
        lambda name, case, mode: (
            (name == "projected" and mode == "plain" and case != "norm, windows")
            or (name, case, mode)
            in [
                ("matrix", "norm", "plain"),
                ("projected", "both", "graph"),
            ]
        ),
    ),
)
def test_clipping(name, case, mode):
    """The norm is that of h and c together. A projection, which does not recur, counts
    in what is sent, and is never scaled."""
    d = check(name, mode, **EXPLODING, **CLIPPED[case])
    free = {"adjoint_clipnorm": None, "adjoint_max_growth": None}
    assert_matters(d, name, **EXPLODING, **CLIPPED[case] | free)


def test_the_adjoint_of_a_projection_is_never_clipped():
    options = {"adjoint_clipnorm": 1e-3, "adjoint_max_growth": 1.0, "observed": True}
    one = problem("projected", **options, **SEQUENCE)
    (dy, (*_, d_last)), p = one.cotangents, KINDS["projected"].cell.output
    _, d = evaluate(first_order(recurrence), one)
    dy[:, -1] += d_last
    np.testing.assert_array_equal(d.zeros[p], dy)
    assert np.max(np.abs(d.zeros[0])) <= 1e-3 < np.max(np.abs(dy))


# ------------------------------------------------------------------- observed adjoints

OBSERVED = {
    "sequence": {"noise": "dr", **SEQUENCE},
    "mask": MASKED,
    "last": {"mask": True, "layer": "Vc"},
    "backwards": {"go_backwards": True, "layer": "Vc", **MASKED},
    "checkpoints": {"checkpoint_every": 3, "factors": True, **MASKED},
    "clipped": {"adjoint_clipnorm": 0.7, "go_backwards": True, **MASKED},
    "windows": {"truncation": (5, 2), "go_backwards": True, **MASKED},
    "windows, last": {"truncation": (3, 1), "mask": True},
    "windows, checkpoints": {
        "truncation": (5, 2),
        "checkpoint_every": 3,
        "adjoint_max_growth": 1.0,
        **MASKED,
    },
}


@pytest.mark.parametrize(
    ("name", "case", "mode"),
    few(
        itertools.product(["projected", "matrix"], OBSERVED, MOST_MODES),
        lambda name, case, mode: (
            mode == "plain"
            and (name == "projected") == (case not in ("sequence", "checkpoints"))
        ),
    ),
)
def test_observed_adjoints(name, case, mode):
    d = check(name, mode, observed=True, **OBSERVED[case])
    mask = problem(name, **OBSERVED[case]).constants.mask
    for array in d.zeros:
        assert np.max(np.abs(array)) > 1e4 * EXACT
        assert mask is None or np.all(array[~mask] == 0)


# ------------------------------------------------------------------------ higher orders


def gradient_of_squares(options, constants, arguments, cotangents, *, function):
    """Of the sum of the squares of the outputs, each with a weight."""
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        outputs = tf.nest.flatten(function(options, constants, arguments))
        pairs = zip(outputs, tf.nest.flatten(cotangents), strict=True)
        value = tf.add_n([tf.reduce_sum(c * y * y) for y, c in pairs])
    return gradients(tape, value, arguments)


def gradient_along(options, constants, arguments, cotangents, *, function, seed):
    """Of the scalar product of what the function returns with a direction."""
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        found = tf.nest.flatten(function(options, constants, arguments, cotangents))
        value = tf.add_n([tf.reduce_sum(direction(t, seed) * t) for t in found])
    return gradients(tape, value, arguments)


def direction(t, seed):
    """Numbers from -1 to 1 of no pattern, as many as `t` turns out to have."""
    place = tf.cast(tf.range(tf.size(t)), t.dtype)
    return tf.reshape(tf.sin((place + 1) ** 2 + seed), tf.shape(t))


def derivative(order, function):
    """The derivative of this order of a recurrence."""
    first = functools.partial(gradient_of_squares, function=function)
    return further(order - 1, first)


def further(times, function):
    for seed in range(times):
        function = functools.partial(gradient_along, function=function, seed=seed)
    return function


def check_higher_order(order, name, mode="plain", **options):
    one = problem(name, **options)
    got = evaluate(derivative(order, recurrence), one, mode)
    want = evaluate(derivative(order, unrolled), one, "eager")
    assert_close(got, want, HIGHER)
    assert all(np.max(np.abs(w)) > 1e-3 for w in want.weights)


SECOND_ORDER = {
    "sequence": {"noise": "dr", **SEQUENCE},
    "mask": MASKED,
    "last": {"mask": True, "noise": "r", "layer": "Vc", "go_backwards": True},
    "zero output": {"zero_output_for_mask": True, "layer": "V", **MASKED},
    "checkpoints": {"checkpoint_every": 3, **MASKED},
    "factors": {"factors": True, **MASKED},
    "windows": {"truncation": (5, 2), "noise": "dr", **MASKED},
    "chunks": {"truncation": (3, 3), "layer": "Vc", **SEQUENCE},
    "sliding, last": {"truncation": (2, 1), "mask": True},
}


@pytest.mark.parametrize(
    ("name", "case", "mode"),
    few(
        [
            *itertools.product(["projected", "matrix"], SECOND_ORDER, MOST_MODES),
            *itertools.product(["projected", "matrix"], ["mask", "windows"], ["eager"]),
            *itertools.product(["driven", "mixed", "softmax"], SECOND_ORDER, ["plain"]),
        ],
        lambda *case: (
            case
            in [
                ("projected", "mask", "plain"),
                ("projected", "factors", "plain"),
                ("driven", "windows", "plain"),
                ("matrix", "sliding, last", "plain"),
                ("matrix", "sequence", "xla"),
            ]
        ),
    ),
)
def test_second_order(name, case, mode):
    check_higher_order(2, name, mode, **SECOND_ORDER[case])


THIRD_ORDER = {
    "sequence": {"noise": "dr", **SEQUENCE},
    "mask": {"mask": MASK[:, :4], **SEQUENCE},
    "windows": {"truncation": (3, 2), **SEQUENCE},
}


@pytest.mark.parametrize(
    ("name", "case", "mode"),
    few(
        itertools.product(["projected", "matrix"], THIRD_ORDER, MOST_MODES[:3]),
        lambda *case: case == ("projected", "mask", "plain"),
    ),
)
def test_third_order(name, case, mode):
    check_higher_order(3, name, mode, steps=4, **THIRD_ORDER[case])


@pytest.mark.parametrize(
    ("name", "case", "mode"),
    few(
        itertools.product(
            ["projected", "matrix"],
            ["norm", "growth", "both", "windows", "norm, windows", "chunks"],
            MOST_MODES[:3],
        ),
        lambda *case: case == ("projected", "windows", "plain"),
    ),
)
def test_second_order_of_clipped_gradients(name, case, mode):
    """For fixed cotangents; the scales are constants."""
    one = problem(name, **EXPLODING, **CLIPPED[case])

    def clipped_gradients(*args):
        return first_order(recurrence)(*args)[1]

    got = evaluate(further(1, clipped_gradients), one, mode)
    want = evaluate(further(1, recursion), one, "eager")
    assert_close(got, want, HIGHER)


def test_observed_adjoints_have_no_derivatives():
    one = problem("projected", observed=True)
    with pytest.raises(NotImplementedError, match="first derivatives alone"):
        evaluate(derivative(2, recurrence), one)


# ---------------------------------------------------------------------------- any options


@st.composite
def drawn(draw):
    """The name of a cell and options that may be together."""
    flag, some = st.booleans(), lambda *values: draw(st.sampled_from(values))
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    rows = st.lists(flag, min_size=shape[1], max_size=shape[1])
    rows = st.lists(rows, min_size=shape[0], max_size=shape[0])
    window = draw(st.integers(1, 7))
    stride = draw(st.integers(1, window))
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
        "unroll": some(False, True, 3),
        "keep_states": draw(flag),
        "checkpoint_every": some(None, 1, 3, 20, "sqrt"),
        "adjoint_clipnorm": some(None, 0.7),
        "adjoint_max_growth": some(None, 1.0),
        **some({"truncation": (window, stride)}, {"factors": True}, {}),
    }


@pytest.mark.slow
@examples(200)
@given(case=drawn())
def test_any_options(case):
    name, options = case
    check(name, **options)


# ------------------------------------------------------------------------ wrong cells


class Wrong(ProjectedLSTM):
    """The cell with a wrong way back: what the names in `wrong` say."""

    def __init__(self, wrong):
        object.__setattr__(self, "wrong", wrong)

    def __eq__(self, other):
        return vars(self) == vars(other)

    def __hash__(self):
        return hash(self.wrong)

    @property
    def recurs(self):
        return (True, True, self.wrong == "p recurs")

    def step_back(self, weights_back, point, adjoints, noise):
        if self.wrong == "gates of another step":
            saved = tuple(tf.roll(t, 1, 0) for t in point.saved)
            point = point._replace(saved=saved)
        if self.wrong == "U for its transpose":
            U = weights_back["all"][1]
            weights_back = weights_back | {"U^T": tf.reshape(U, U.shape[::-1])}
        (h, c, p), (delta, a_p) = super().step_back(
            weights_back, point, adjoints, noise
        )
        if self.wrong == "no noise on h" and noise[1] is not None:
            h = tf.matmul(delta, weights_back["U^T"])
        if self.wrong == "c is lost":
            c = tf.zeros_like(c)
        if self.wrong == "p goes on":
            p = adjoints[2]
        return (h, c, p), (delta, tf.zeros_like(a_p) if self.wrong == "no P" else a_p)

    def gradients(self, weights, x, point, deltas, noise):
        if self.wrong == "h of the step itself":
            point = point._replace(before=[[t] for t in point.after])
        d_weights, d_x = super().gradients(weights, x, point, deltas, noise)
        if self.wrong == "half of b":
            d_weights = (*d_weights[:2], d_weights[2] / 2, d_weights[3])
        return d_weights, d_x


WRONG = [
    "gates of another step",
    "U for its transpose",
    "no noise on h",
    "c is lost",
    "p goes on",
    "no P",
    "h of the step itself",
    "half of b",
]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_cell_is_found(wrong):
    kind = KINDS["projected"]._replace(cell=Wrong(wrong))
    if wrong != "gates of another step":  # of which one product has none
        with pytest.raises(AssertionError, match="error"):
            check_cell(kind, "dr", (T, B))
    with pytest.raises(AssertionError, match="error"):
        check(kind, noise="dr", **MASKED)


def test_what_recurs_decides_what_is_clipped():
    """A projection that claimed to recur would be scaled, and raise the norm."""
    options = {"adjoint_clipnorm": 0.7, **SEQUENCE}
    kind = KINDS["projected"]._replace(cell=Wrong("p recurs"))
    found, want = (
        evaluate(first_order(recurrence), problem(kind, **options))[1]
        for kind in (kind, "projected")
    )
    with pytest.raises(AssertionError, match="error"):
        assert_close(found, want)
