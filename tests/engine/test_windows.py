"""Truncated recurrences against the brute force of `truncated_reference`.

Float64 to 1e-10 over windows, masks and options; what a window is not allowed to change;
derivatives of second order. `test_breaks.py` shows that the checks can fail.
"""

import functools
import itertools
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    FLOAT64,
    MODES,
    WAYS,
    few,
    random_weights,
    relative_error,
    rng,
    without_graphs,
)
from plain_rnn import MODULES, arguments_of, each

import keras_bptt.cells.activations
import keras_bptt.engine.parts
import keras_bptt.engine.recurrence
from keras_bptt.reference import truncation as truncated_reference
from keras_bptt.truncation import Truncation

# All different. Blocks of 2, 3 and 4 steps: T is a multiple of none of them but one.
B, T, D, H = 5, 9, 2, 3

# Chunks that fit and do not, sliding, overlapping in whole and broken blocks, all paths.
WINDOWS = [
    (1, 1),
    (3, 3),
    (4, 4),
    (3, 1),
    (4, 2),
    (5, 2),
    (7, 4),
    (8, 3),
    (9, 2),
    (12, 5),
]
FEW_WINDOWS = [(4, 4), (3, 1), (5, 2), (7, 4)]
FLOAT32 = 2e-5

MASKS = {
    "no mask": None,
    "right": np.arange(T) < np.array([[T], [4], [1], [7], [2]]),
    "left": np.arange(T) >= np.array([[0], [4], [8], [2], [6]]),
    # The third example has no step at all.
    "holes": rng(3).random((B, T)) < np.array([[0.5], [0.7], [0.0], [0.9], [0.3]]),
}


def arrays(mask=None, sequence=True, T=T, seed=0):
    """x, W, U, h_0, b and the cotangents dy, ds."""
    random = rng(seed)
    W, U, b = random_weights(D, H, seed=seed)
    x = random.normal(size=(B, T, D))
    if mask is not None:
        x[~mask] = np.nan
    dy = random.normal(size=(B, T, H) if sequence else (B, H))
    return x, W, U, random.normal(size=(B, H)), b, dy, random.normal(size=(B, H))


def expected(problem, window, mask=None, sequence=True, zero_output=False, **options):
    """The gradients of the reference, from the cotangents of the outputs."""
    x, W, U, h_0, b, dy, ds = problem
    seen = np.ones(x.shape[:2], bool)
    if mask is not None:
        seen = mask if zero_output else np.logical_or.accumulate(mask, 1)
    e = np.zeros((*x.shape[:2], H))
    e[:, -1] = ds
    if sequence:
        e += np.where(seen[:, :, None], dy, 0)
    else:
        e[:, -1] += np.where(seen[:, -1:], dy, 0)
    clipped = "adjoint_clipnorm" in options
    kind = "clipped_gradients" if clipped else "truncated_gradients"
    steps, stride = window
    d = getattr(truncated_reference, kind)(
        x, W, U, b, h_0, "tanh", e, steps=steps, stride=stride, mask=mask, **options
    )
    d_x = d.d_inputs
    return [d_x, d.d_kernel, d.d_recurrent_kernel, d.d_initial_state, d.d_bias]


def function_of(window, modules=MODULES, activation="tanh", constants=None, **options):
    """The truncated recurrence as a function of x, W, U, h_0, b."""
    dtype = options.pop("dtype", "float64")
    f = getattr(keras.activations, activation, activation)
    options = modules.recurrence.Recurrence(
        activation=modules.activations.resolve(f, H, dtype),
        truncation=None if window is None else Truncation(*window),
        **options,
    )

    def function(*arguments):
        known = modules.recurrence.Constants(**(constants or {}))
        return modules.recurrence.recurrence(options, known, *arguments)

    return function


def gradients(function, problem, mode="plain", dtype="float64", unknown=False):
    """Of <outputs, cotangents>, by every argument."""
    tensors = [tf.constant(array, dtype) for array in problem]

    def run(x, *others):
        *arguments, dy, ds = x, *others
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            outputs = function(*arguments)
        return outputs, tape.gradient(outputs, arguments, [dy, ds])

    if unknown:
        specs = [tf.TensorSpec(t.shape, dtype) for t in tensors]
        specs[0] = tf.TensorSpec([None, None, D], dtype)
        if len(problem[5].shape) == 3:
            specs[5] = tf.TensorSpec([None, None, H], dtype)
        run = tf.function(run, autograph=False, input_signature=specs)
    else:
        run = WAYS[mode](run)
    outputs, d = run(*tensors)
    return [t.numpy() for t in d], [t.numpy() for t in outputs]


def assert_equal(got, want, tolerance=FLOAT64):
    for name, a, b in zip(("x", "W", "U", "h_0", "b"), got, want, strict=True):
        assert a.shape == b.shape, name
        scale = max(1.0, np.max(np.abs(b), initial=0.0))
        error = np.max(np.abs(a - b), initial=0.0) / scale
        assert error <= tolerance, f"d_{name}: error {error:.1e}"


def check(window, mask="no mask", sequence=True, mode="plain", modules=MODULES, **more):
    """One configuration against the brute force."""
    function = function_of(
        window,
        modules,
        constants=constants_of(mask),
        return_sequences=sequence,
        **more,
    )
    got, outputs = gradients(function, arrays(MASKS[mask], sequence), mode)
    zero, clip = map(more.get, ("zero_output_for_mask", "adjoint_clipnorm"))
    assert_equal(got, expected_of(window, mask, sequence, zero, clip))
    # The outputs are those of the recurrence without a truncation.
    whole = outputs_of_the_whole(mask, sequence, tuple(more.items()))
    for a, b in zip(outputs, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def constants_of(mask):
    mask = MASKS[mask]
    return {"mask": None if mask is None else tf.constant(mask)}


# Once each: several checks are compared with the same numbers.
@functools.cache
def expected_of(window, mask, sequence, zero, clip):
    mask = MASKS[mask]
    clip = {} if clip is None else {"adjoint_clipnorm": clip}
    return expected(arrays(mask, sequence), window, mask, sequence, zero, **clip)


@functools.cache
def outputs_of_the_whole(mask, sequence, options):
    options = {"return_sequences": sequence, **dict(options)}
    function = function_of(None, constants=constants_of(mask), **options)
    with without_graphs():
        return function(*map(tf.constant, arrays(MASKS[mask], sequence)[:5]))


@pytest.mark.parametrize(
    ("window", "mask", "sequence"),
    few(
        itertools.product(WINDOWS, MASKS, [True, False]),
        # Every window; and one of them with every mask, and for the last output.
        lambda window, mask, sequence: (
            window == (5, 2) or (mask == "holes" and sequence)
        ),
    ),
)
def test_equals_brute_force(window, mask, sequence):
    check(window, mask, sequence)


@pytest.mark.parametrize(
    ("mode", "window", "mask"),
    few(
        itertools.product(MODES, FEW_WINDOWS, ["no mask", "holes"]),
        lambda *case: (
            case
            in [
                ("eager", (5, 2), "holes"),
                ("xla", (7, 4), "holes"),
            ]
        ),
    ),
)
def test_equals_brute_force_in_graphs(mode, window, mask):
    check(window, mask, mode=mode, jit_compile=mode == "graph")


@pytest.mark.parametrize(
    ("steps", "window", "mask", "sequence"),
    few(
        itertools.product(
            [1, 2, 9, 17],
            [(3, 3), (5, 2), (3, 1), (9, 4), (20, 7)],
            ["no mask", "right", "holes"],
            [True, False],
        ),
        lambda *case: (
            case
            in [
                (1, (5, 2), "holes", True),
                (17, (5, 2), "holes", True),
                (17, (3, 1), "no mask", False),
            ]
        ),
    ),
)
def test_unknown_number_of_steps(steps, window, mask, sequence):
    mask = MASKS[mask]
    mask = None if mask is None else np.resize(mask, (B, steps))
    problem = arrays(mask, sequence, steps)
    function = function_of(
        window,
        constants={"mask": None if mask is None else tf.constant(mask)},
        return_sequences=sequence,
        jit_compile=True,
    )
    got, _ = gradients(function, problem, unknown=True)
    assert_equal(got, expected(problem, window, mask, sequence))


@pytest.mark.parametrize(
    ("window", "mask", "sequence"),
    few(
        itertools.product(
            [(4, 4), (3, 1), (5, 2), (8, 3), (12, 5)], MASKS, [True, False]
        ),
        lambda window, mask, sequence: (
            mask == "holes" if sequence else (window, mask) == ((8, 3), "right")
        ),
    ),
)
def test_clipped_windows(window, mask, sequence):
    """Each window for itself; one window where it holds all steps of an example."""
    check(window, mask, sequence, adjoint_clipnorm=0.7)


@pytest.mark.parametrize(
    ("mask", "mode"),
    few(
        itertools.product(["no mask", "holes"], MODES),
        lambda mask, mode: mask == "holes" and mode == "xla",
    ),
)
def test_clipped(mask, mode):
    """Without a truncation: every step's adjoint, in every mode."""
    mask = MASKS[mask]
    problem = arrays(mask)
    constants = {"mask": None if mask is None else tf.constant(mask)}
    options = {"adjoint_clipnorm": 0.7, "return_sequences": True}
    got, _ = gradients(function_of(None, constants=constants, **options), problem, mode)
    want = expected(problem, (None, None), mask, adjoint_clipnorm=0.7)
    assert_equal(got, want)
    free = expected(problem, (None, None), mask)
    assert relative_error(got[1], free[1]) > 0.01, "nothing was clipped"


@pytest.mark.parametrize(
    ("window", "mask"),
    few(
        itertools.product([None, (4, 4), (5, 2)], ["no mask", "holes"]),
        lambda window, mask: mask == "holes" and window != (4, 4),
    ),
)
def test_parts_of_the_batch(monkeypatch, window, mask):
    """As large batches are computed on two cores; the factors of a draw are cut too."""
    monkeypatch.setattr(keras_bptt.engine.parts, "cores", lambda: 2)
    monkeypatch.setattr(keras_bptt.engine.parts, "LEAST_WORK", 1)
    monkeypatch.setattr(keras_bptt.engine.parts, "FEWEST_EXAMPLES", 1)
    mask, factors = MASKS[mask], rng(7).choice([0.0, 1.25], size=(B, T))
    problem = arrays(mask)
    constants = {"mask": None if mask is None else tf.constant(mask)}
    options = {}
    if window is None:
        constants["factors"], options = tf.constant(factors), {"factors": factors}
    calls = []
    original = keras_bptt.engine.backward.gradients_of_part
    monkeypatch.setattr(
        keras_bptt.engine.backward,
        "gradients_of_part",
        lambda *args: calls.append(args) or original(*args),
    )
    function = function_of(
        window, constants=constants, return_sequences=True, jit_compile=True
    )
    got, _ = gradients(function, problem, "graph")
    assert len(calls) == 2
    assert_equal(got, expected(problem, window or (None, None), mask, **options))


@pytest.mark.parametrize(
    "mask", [pytest.param("no mask", marks=pytest.mark.slow), "holes"]
)
def test_factors_of_an_unknown_number_of_steps(mask):
    mask, factors = MASKS[mask], rng(7).choice([0.0, 1.25], size=(B, T))
    constants = {
        "mask": None if mask is None else tf.constant(mask),
        "factors": tf.constant(factors),
    }
    problem = arrays(mask)
    function = function_of(None, constants=constants, return_sequences=True)
    got, _ = gradients(function, problem, unknown=True)
    assert_equal(got, expected(problem, (None, None), mask, factors=factors))


# ------------------------------------------------------- against automatic differentiation


def gated(h, factor):
    """h, whose gradient is multiplied by a factor."""
    number = tf.stop_gradient(h)
    return number + factor * (h - number)


def windows(window, x, W, U, h_0, b, r=None, f=tf.tanh, factors=None):
    """For each block the states h_t of its window, by t, and the one before them.

    A window that does not begin with the sequence begins at a constant.
    """
    steps, stride = window

    def run(h, start, end):
        h = {start - 1: h}
        for t in range(start, end):
            before = h[t - 1] if r is None else r * h[t - 1]
            if factors is not None and t:
                before = gated(before, factors[:, t, None])
            h[t] = f(x[:, t] @ W + before @ U + b)
        return h

    T = x.shape[1]
    states = run(h_0, 0, T)
    for end in range(T, 0, -stride):
        start = max(0, end - steps)
        first = tf.stop_gradient(states[start - 1]) if start else h_0
        yield range(max(0, end - stride), end), run(first, start, end)


def unrolled(window, *arguments, **options):
    """y and the last state: of each block from its window."""
    y = {}
    for block, h in windows(window, *arguments, **options):
        y |= {t: h[t] for t in block}
    return tf.stack([y[t] for t in sorted(y)], 1), y[max(y)]


def clipped(window, most, x, W, U, h_0, b, dy, ds, factors=None):
    """The clipped gradients of sum dy y + sum ds state, their scales constants."""
    last = x.shape[1] - 1
    d_x = [tf.zeros_like(x[:, 0])] * (last + 1)
    d_W, d_U, d_h_0, d_b = map(tf.zeros_like, (W, U, h_0, b))
    for block, h in windows(window, x, W, U, h_0, b, factors=factors):
        a = tf.zeros_like(h_0)
        for t in sorted(h, reverse=True)[:-1]:
            if t in block:
                a += dy[:, t] + (ds if t == last else 0)
            norm = tf.norm(a, axis=1, keepdims=True)
            a *= tf.stop_gradient(tf.minimum(1.0, most / norm))
            delta = a * (1 - h[t] ** 2)
            xi = 1 if factors is None or t == 0 else factors[:, t, None]
            before = h[t - 1] if factors is None or t == 0 else gated(h[t - 1], xi)
            d_x[t] += delta @ tf.transpose(W)
            d_W += tf.transpose(x[:, t]) @ delta
            d_U += tf.transpose(before) @ delta
            d_b += tf.reduce_sum(delta, 0)
            a = xi * (delta @ tf.transpose(U))
        d_h_0 += a if min(h) == -1 else 0
    return tf.stack(d_x, 1), d_W, d_U, d_h_0, d_b


def random_directions(problem, seed=9):
    random = rng(seed)
    return [random.normal(size=array.shape) for array in problem[:5]]


def first_order(function, *problem, power=2):
    """The gradients of a loss. Not a linear one: then cotangents have derivatives too."""
    *arguments, dy, ds = problem
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        y, state = function(*arguments)
        loss = tf.reduce_sum(dy * y**power) + tf.reduce_sum(ds * state**power)
    return tape.gradient(loss, arguments)


def derivatives(first, problem, directions=None):
    """The gradients of the scalar <first(problem), directions>."""
    tensors = [tf.constant(array) for array in problem]
    directions = directions or random_directions(problem)
    with tf.GradientTape() as tape:
        tape.watch(tensors[:5])
        pairs = zip(first(*tensors), directions, strict=True)
        scalar = tf.add_n([tf.reduce_sum(d * direction) for d, direction in pairs])
    return [d.numpy() for d in tape.gradient(scalar, tensors[:5])]


def second_order(function, problem, directions=None, power=2):
    """The derivatives of the gradients of `function`, along random directions."""
    first = functools.partial(first_order, function, power=power)
    return derivatives(first, problem, directions)


SECOND_ORDER = [(4, 4), (3, 1), (5, 2)]


@pytest.mark.parametrize(
    ("window", "sequence", "mode"),
    few(
        itertools.product(SECOND_ORDER, [True, False], ["plain", "eager"]),
        lambda window, sequence, mode: (
            sequence == (window != (5, 2)) and (mode == "plain" or window == (5, 2))
        ),
    ),
)
def test_second_order(window, sequence, mode):
    """The same policy in every scan; for chunks a tf.stop_gradient between them."""
    problem = arrays(None, sequence)

    def theirs(*arguments, window=window):
        y, state = unrolled(window, *arguments)
        return y if sequence else y[:, -1], state

    want = second_order(theirs, problem)
    ours = function_of(window, return_sequences=sequence)
    assert_equal(WAYS[mode](second_order)(ours, problem), want)
    whole = second_order(lambda *a: theirs(*a, window=(T, T)), problem)
    assert relative_error(whole[1], want[1]) > 0.01, "the window changed nothing"


@pytest.mark.parametrize(
    ("window", "mode"),
    few(
        itertools.product([None, *SECOND_ORDER], ["plain", "eager"]),
        lambda window, mode: mode == "plain" and window in (None, (5, 2)),
    ),
)
def test_second_order_of_clipped_gradients(window, mode):
    """For fixed cotangents: one that depends on y meets the clipped gradient of y."""
    problem = arrays()
    first = functools.partial(clipped, window or (T, T), 0.7)
    ours = function_of(window, return_sequences=True, adjoint_clipnorm=0.7)
    got = WAYS[mode](second_order)(ours, problem, power=1)
    assert_equal(got, derivatives(first, problem))


@pytest.mark.parametrize(
    ("window", "mask"),
    few(
        itertools.product(SECOND_ORDER, ["left", "holes"]),
        lambda window, mask: mask == "holes" and window == (5, 2),
    ),
)
@without_graphs()
def test_second_order_with_a_mask(window, mask):
    second_order_row_by_row(MODULES, window, mask)


@pytest.mark.parametrize(
    ("window", "mask"),
    few(
        itertools.product([*SECOND_ORDER, (12, 5)], ["left", "right", "holes"]),
        lambda window, mask: (window, mask) == ((5, 2), "right"),
    ),
)
@without_graphs()
def test_second_order_of_clipped_gradients_with_a_mask(window, mask):
    second_order_row_by_row(MODULES, window, mask, most=0.7)


@pytest.mark.parametrize(
    ("window", "activation"),
    few(
        itertools.product([(4, 4), (5, 2)], ["softmax", "gelu"]),
        lambda window, activation: (window == (5, 2)) == (activation == "softmax"),
    ),
)
def test_other_activations_and_dropout(window, activation):
    """One that mixes units, and one whose slope is no function of the output."""
    check_dropout(MODULES, window, activation)


# ------------------------------------------------------------------- randomised truncation


def draw(seed=7):
    return rng(seed).choice([0.0, 1.25], size=(B, T))


@pytest.mark.parametrize(
    ("mask", "sequence", "mode"),
    few(
        itertools.product(MASKS, [True, False], WAYS),
        lambda mask, sequence, mode: (
            mask == "holes" and mode != "eager" and (sequence or mode == "plain")
        ),
    ),
)
def test_factors_equal_brute_force(mask, sequence, mode):
    mask, factors = MASKS[mask], draw()
    problem = arrays(mask, sequence)
    constants = {
        "mask": None if mask is None else tf.constant(mask),
        "factors": tf.constant(factors),
    }
    function = function_of(None, constants=constants, return_sequences=sequence)
    got, _ = gradients(function, problem, mode)
    want = expected(problem, (None, None), mask, sequence, factors=factors)
    assert_equal(got, want)


@without_graphs()
def test_second_order_of_factors():
    check_second_order_of_factors(MODULES)
    check_second_order_of_factors(MODULES, most=0.7)


@without_graphs()
def test_factors_of_chunks_are_chunks():
    """Two ways to the same paths."""
    problem = arrays()
    factors = np.ones((B, T))
    factors[:, [1, 5]] = 0  # T = 9 in chunks of 4: 0 | 1 2 3 4 | 5 6 7 8
    by_factors = function_of(
        None, constants={"factors": tf.constant(factors)}, return_sequences=True
    )
    by_window = function_of((4, 4), return_sequences=True)
    for order in (
        lambda f: gradients(f, problem)[0],
        lambda f: second_order(f, problem),
    ):
        assert_equal(order(by_window), order(by_factors))


# ------------------------------------------------------------------- how long the pass is


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
    options = MODULES.recurrence.Recurrence(
        activation=keras_bptt.cells.activations.resolve(tf.tanh, H, "float32"),
        return_sequences=True,
        truncation=None if window is None else Truncation(*window),
    )
    x, W, U, h_0, b, dy, ds = arrays(T=T)
    h = rng(1).normal(size=dy.shape)
    tensors = [tf.constant(a, "float32") for a in (h, h_0, dy, ds, x, W, U, h_0, b)]
    if masked:
        tensors.append(tf.constant(rng(2).random((B, T)) < 0.7))

    @tf.function(jit_compile=True, autograph=False)
    def backward(h, last, dy, ds, x, W, U, h_0, b, *mask):
        constants = MODULES.recurrence.Constants(*mask)
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
        lambda window, steps, masked: (
            (window, steps, masked) in [(DEPTH[2], 512, True), (DEPTH[3], 4096, False)]
        ),
    ),
)
def test_backward_pass_is_as_long_as_a_window(window, steps, masked):
    """Whatever the sequence: read off the compiled program, loops times their trips."""
    assert recurrent_products(backward_program(window, steps, masked)) == window[0]


def test_full_backward_pass_is_as_long_as_the_sequence():
    """The control of the test above; and a window that is longer than the sequence."""
    assert recurrent_products(backward_program(None, 512, False)) == 512
    assert recurrent_products(backward_program((32, 8), 20, False)) <= 32


# --------------------------------------------------------- checks that test_breaks.py runs


@functools.cache
def second_order_of_rows(window, mask, most):
    """What every example has alone, added up: several checks are compared with it."""
    mask = MASKS[mask]
    problem = arrays(mask)
    x, W, U, h_0, b, dy, ds = problem
    directions = random_directions(problem)
    want = [np.zeros_like(array) for array in (x, W, U, h_0, b)]
    power = 2 if most is None else 1
    for row, real in enumerate(mask):
        one, N = slice(row, row + 1), real.sum()
        if not N:
            # The loss is ds h_0^power.
            want[3][row] = (power - 1) * 2 * ds[row] * directions[3][row]
            continue
        # An output at a masked step is that of the real one before.
        owner = np.cumsum(real) - 1
        weights = np.zeros((1, N, H))
        np.add.at(weights[0], owner[owner >= 0], dy[row, owner >= 0])
        alone = x[one, real], W, U, h_0[one], b, weights, ds[one]
        along = [d[one] if i in (0, 3) else d for i, d in enumerate(directions)]
        along[0] = along[0][:, real]
        own = window if window[0] < N else (N, N)
        first = functools.partial(first_order, lambda *a, own=own: unrolled(own, *a))
        if most is not None:
            first = functools.partial(clipped, own, most)
        d_x, d_W, d_U, d_h_0, d_b = derivatives(first, alone, along)
        want[0][row, real], want[3][row] = d_x[0], d_h_0[0]
        for total, part in zip(want[1:], (d_W, d_U, 0, d_b), strict=True):
            total += part
    return want


def second_order_row_by_row(modules, window, mask, most=None):
    """Second order with a mask: every example is what it is alone, clipped or not."""
    want = second_order_of_rows(window, mask, most)
    mask = MASKS[mask]
    problem = arrays(mask)
    directions = random_directions(problem)
    power = 2 if most is None else 1
    function = function_of(
        window,
        modules,
        constants={"mask": tf.constant(mask)},
        return_sequences=True,
        adjoint_clipnorm=most,
    )
    assert_equal(second_order(function, problem, directions, power), want)


def check_factors(modules, mask, **options):
    mask, factors = MASKS[mask], draw()
    problem = arrays(mask)
    constants = {
        "mask": None if mask is None else tf.constant(mask),
        "factors": tf.constant(factors),
    }
    function = function_of(
        None, modules, constants=constants, return_sequences=True, **options
    )
    got, _ = gradients(function, problem)
    want = expected(problem, (None, None), mask, factors=factors, **options)
    assert_equal(got, want)


@functools.cache
def second_order_by_tapes(most):
    """What the checks of factors are compared with."""
    factors, problem = tf.constant(draw()), arrays()
    if most is None:
        return second_order(lambda *a: unrolled((T, T), *a, factors=factors), problem)
    first = functools.partial(clipped, (T, T), most, factors=factors)
    return derivatives(first, problem)


def check_second_order_of_factors(modules, most=None):
    ours = function_of(
        None,
        modules,
        constants={"factors": tf.constant(draw())},
        return_sequences=True,
        adjoint_clipnorm=most,
    )
    got = second_order(ours, arrays(), power=2 if most is None else 1)
    assert_equal(got, second_order_by_tapes(most))


def check_dropout(modules, window, activation):
    problem = arrays()
    r = tf.constant(rng(5).choice([0.0, 1.25], size=(B, H)))
    ours = function_of(window, modules, activation, {"r": r}, return_sequences=True)
    f = getattr(keras.activations, activation)
    got, _ = gradients(ours, problem)
    want, _ = gradients(lambda *a: unrolled(window, *a, r=r, f=f), problem)
    assert_equal(got, want)


def first(window, mask, sequence=True, **more):
    return functools.partial(check, window, mask, sequence, **more)


CHECKS = {
    "chunks": each(first((4, 4), "no mask"), first((4, 4), "left")),
    "overlapping": each(first((5, 2), "no mask"), first((8, 3), "holes")),
    "whole levels": each(first((4, 2), "right")),
    "sliding": each(first((3, 1), "holes")),
    "last output": each(first((4, 2), "no mask", False), first((4, 4), "holes", False)),
    "clipped": each(
        first((4, 2), "right", adjoint_clipnorm=0.7),
        first((4, 4), "holes", adjoint_clipnorm=0.7),
    ),
    "dropout": each(
        lambda modules: check_dropout(modules, (4, 4), "tanh"),
        lambda modules: check_dropout(modules, (5, 2), "gelu"),
    ),
    "factors": each(
        lambda modules: check_factors(modules, "no mask"),
        lambda modules: check_factors(modules, "holes", adjoint_clipnorm=0.7),
    ),
    "second order": each(
        lambda modules: second_order_row_by_row(modules, (5, 2), "holes"),
        lambda modules: second_order_row_by_row(modules, (4, 4), "left"),
    ),
    "clipped, second order": each(
        lambda modules: second_order_row_by_row(modules, (4, 2), "right", 0.7),
        lambda modules: second_order_row_by_row(modules, (12, 5), "holes", 0.7),
    ),
    "factors, second order": each(
        check_second_order_of_factors,
        functools.partial(check_second_order_of_factors, most=0.7),
    ),
}
