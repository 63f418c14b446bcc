"""The third rung of the gradient ladder for the output layer: p_t = y_t V + c.

Without options it is compared with the NumPy reference; with masks, dropout and the other
options with automatic differentiation of the equations, written out step by step below;
truncated with the brute force of `truncated_reference`. `test_breaks.py` shows that the
checks can fail. `test_layer_output.py` has the layer.
"""

import itertools
from typing import NamedTuple
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import FLOAT64, MODES, WAYS, few, relative_error, rng
from plain_rnn import MODULES

import keras_bptt.cells.activations
import keras_bptt.engine.blocks
import keras_bptt.engine.parts
import keras_bptt.engine.recurrence
from keras_bptt import reference
from keras_bptt.reference import truncation as truncated_reference
from keras_bptt.truncation import Truncation

# Batch, timesteps, features, units, outputs: all different, so that no transpose hides; but
# for "square", where one would fit.
SHAPES = {
    "usual": (3, 7, 4, 5, 2),
    "more_outputs": (2, 5, 3, 4, 6),
    "one_output": (4, 6, 2, 3, 1),
    "one_unit": (2, 3, 4, 1, 5),
    "one_step": (2, 1, 3, 4, 5),
    "square": (3, 7, 2, 5, 5),
    "long": (2, 20, 3, 5, 4),
    # Of more than one block, and of blocks and a shorter one.
    "blocks": (2, 34, 3, 5, 4),
    "blocks_and_a_rest": (2, 37, 3, 5, 4),
}
ARGUMENTS = ("x", "W", "U", "h_0", "b", "V", "c")


class Problem(NamedTuple):
    """Arguments of `recurrence`, and cotangents of its two outputs; None: there is none."""

    x: np.ndarray
    W: np.ndarray
    U: np.ndarray
    h_0: np.ndarray
    b: np.ndarray | None
    V: np.ndarray
    c: np.ndarray | None
    dp: np.ndarray
    ds: np.ndarray


def float32_tolerance(shape):
    """As in `test_recurrence`, with the products of H and of O that V adds to each step.

    What rounds is 2^-24 of a number, in sums of D + H + O + 1 products, in T steps there
    and T steps back.
    """
    _, T, D, H, O = shape  # noqa: E741
    return 2 * T * (D + H + O + 1) * np.finfo(np.float32).eps


def random_problem(shape, without=(), seed=0, radius=1.2):
    B, T, D, H, O = shape  # noqa: E741
    random = rng(seed)
    # Not symmetric, and without singular values near 0: no gradient vanishes.
    U = np.linalg.qr(random.normal(size=(H, H)))[0] * random.uniform(0.9, 1.1, H)
    if H > 1:
        # What all units have in common, 1/2 for sigmoid, does not add up to saturation.
        U -= np.mean(U, axis=0)
    problem = Problem(
        x=0.7 * random.normal(size=(B, T, D)),
        W=random.normal(size=(D, H)) / np.sqrt(D),
        U=radius * U,
        h_0=0.5 * random.normal(size=(B, H)),
        b=0.2 * random.normal(size=H),
        V=random.normal(size=(H, O)),
        c=random.normal(size=O),
        dp=random.normal(size=(B, T, O)),
        ds=random.normal(size=(B, H)),
    )
    return problem._replace(**dict.fromkeys(without))


def bound(modules, activation="tanh", window=None, dtype="float64", **options):
    """The recurrence as a function of arguments by name and constants by name."""
    f = getattr(keras.activations, activation)

    def function(arguments, constants):
        resolved = modules.activations.resolve(f, arguments["U"].shape[0], dtype)
        static = modules.recurrence.Recurrence(
            activation=resolved,
            return_sequences=True,
            truncation=None if window is None else Truncation(*window),
            **options,
        )
        known = modules.recurrence.Constants(**constants)
        if window is None:
            return modules.recurrence.recurrence(static, known, **arguments)
        return modules.recurrence.recurrence(static, known, **arguments)

    return function


def evaluate(
    function, problem, constants=None, mode="plain", dtype="float64", unknown=False
):
    """Outputs of `function(arguments, constants)` and gradients under the cotangents.

    With `unknown` the graph knows neither the batch nor the number of steps.
    """
    arrays = {k: v for k, v in problem._asdict().items() if v is not None}
    tensors = {name: tf.constant(array, dtype) for name, array in arrays.items()}
    constants = {
        name: tf.constant(a, None if a.dtype == bool else dtype)
        for name, a in (constants or {}).items()
    }

    def run(tensors, constants):
        arguments = {name: tensors[name] for name in ARGUMENTS if name in tensors}
        cotangents = [tensors["dp"], tensors["ds"]]
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            outputs = function(arguments, constants)
        return outputs, tape.gradient(outputs, arguments, cotangents)

    if unknown:

        def spec(name, t):
            late = {"x": 2, "dp": 2, "mask": 2, "factors": 2, "h_0": 1, "ds": 1}
            late |= {"d": 1, "r": 1}
            known = t.shape[late.get(name, 0) :]
            return tf.TensorSpec([None] * late.get(name, 0) + known, t.dtype)

        signature = [
            {k: spec(k, t) for k, t in d.items()} for d in (tensors, constants)
        ]
        run = tf.function(
            run,
            input_signature=signature,
            autograph=False,
            jit_compile=mode == "xla" or None,
        )
    else:
        run = WAYS[mode](run)
    (p, state), d = run(tensors, constants)
    results = {"p": p, "state": state} | {f"d_{name}": d[name] for name in d}
    return {name: result.numpy() for name, result in results.items()}


def assert_close(got, expected, tolerance=FLOAT64):
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].shape == array.shape, name
        error = relative_error(got[name], array)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


# ---------------------------------------------------------------- against the reference


def reference_results(problem, activation):
    """What `evaluate` gives, of the reference: its o_t are p_t, for g is linear."""
    x, W, U, h_0, b, V, c, dp, ds = problem
    T, b_or_0 = x.shape[1], np.zeros(len(U)) if b is None else b
    c_or_0 = np.zeros(V.shape[1]) if c is None else c
    network = reference.Network(
        W, U, b_or_0, V, c_or_0, h_0, activation, loss="inner_product"
    )
    run = reference.forward(x, T * dp, network)
    above = reference.gradients(x, T * dp, network)
    e = above.cotangents.copy()
    e[:, -1] += ds
    d = reference.hidden_gradients(x, W, U, b_or_0, h_0, activation, e)
    results = {
        "p": run.o,
        "state": run.h[:, -1],
        "d_x": d.d_inputs,
        "d_W": d.d_kernel,
        "d_U": d.d_recurrent_kernel,
        "d_h_0": d.d_initial_state,
        "d_b": d.d_bias,
        "d_V": above.d_output_kernel,
        "d_c": above.d_output_bias,
    }
    absent = [f"d_{name}" for name in ARGUMENTS if getattr(problem, name) is None]
    return {name: array for name, array in results.items() if name not in absent}


def lasting_problem(shape, without, activation):
    """U no larger than it must be for a tenth of ds to reach h_0.

    Else an error far back would be too small to see, or rounding would grow.
    """
    for radius in np.geomspace(0.8, 6, 40):
        problem = random_problem(shape, without, radius=radius)
        alone = reference_results(problem._replace(dp=0 * problem.dp), activation)
        if np.linalg.norm(alone["d_h_0"]) > 0.1 * np.linalg.norm(problem.ds):
            return problem
    raise AssertionError("the gradient vanishes for every U")


def check_reference(
    modules,
    shape="usual",
    without=(),
    mode="plain",
    activation="tanh",
    dtype="float64",
    unknown=False,
    **options,
):
    sizes = SHAPES[shape]
    problem = lasting_problem(sizes, without, activation)
    function = bound(modules, activation, dtype=dtype, **options)
    expected = reference_results(problem, activation)
    assert_close(
        evaluate(function, problem, None, mode, dtype, unknown),
        expected,
        FLOAT64 if dtype == "float64" else float32_tolerance(sizes),
    )


WITHOUT = {"both": (), "no b": ("b",), "no c": ("c",), "neither": ("b", "c")}


@pytest.mark.parametrize(
    ("shape", "without"),
    few(
        itertools.product(SHAPES, WITHOUT),
        lambda shape, without: (
            (shape == "usual" and without in ("both", "no c"))
            or (without == "both" and shape not in ("blocks", "long", "more_outputs"))
        ),
    ),
)
def test_equals_reference(shape, without):
    check_reference(MODULES, shape, WITHOUT[without])


@pytest.mark.parametrize(
    ("activation",),
    few([(f,) for f in sorted(reference.ACTIVATIONS)], lambda f: f == "elu"),
)
def test_equals_reference_for_each_activation(activation):
    check_reference(MODULES, activation=activation)


EVERY = [None, 3, "sqrt"]
BROKEN = "blocks_and_a_rest"


def few_in_graphs(shape, every, mode, unknown):
    return (shape, every, mode, unknown) in [
        ("one_step", "sqrt", "graph", True),
        ("blocks_and_a_rest", None, "xla", True),
        ("blocks_and_a_rest", 3, "graph", True),
    ]


@pytest.mark.parametrize(
    ("shape", "every", "mode", "unknown"),
    few(
        itertools.product(
            ["usual", "one_step", "blocks", "blocks_and_a_rest"],
            EVERY,
            MODES,
            [False, True],
        ),
        few_in_graphs,
    ),
)
def test_equals_reference_in_graphs(shape, every, mode, unknown):
    check_reference(MODULES, shape, (), mode, unknown=unknown, checkpoint_every=every)


@pytest.mark.parametrize(
    ("every", "shape"),
    few(
        itertools.product(
            [1, 3, 7, 100, "sqrt"], ["usual", "one_step", "blocks_and_a_rest"]
        ),
        lambda *case: case in [(3, BROKEN), (100, "usual"), ("sqrt", "usual")],
    ),
)
def test_checkpoints_equal_reference(every, shape):
    check_reference(MODULES, shape, checkpoint_every=every)


@pytest.mark.parametrize(
    ("every", "unknown"),
    few(
        itertools.product(EVERY, [False, True]),
        lambda every, unknown: unknown and every == 3,
    ),
)
def test_compiled_passes_in_a_plain_graph(every, unknown):
    """As `fit` runs it."""
    options = {"checkpoint_every": every, "jit_compile": True}
    check_reference(MODULES, BROKEN, (), "graph", unknown=unknown, **options)


@pytest.mark.parametrize(
    ("every", "unroll"),
    few(
        itertools.product(EVERY, [True, 2]),
        lambda *case: case == (3, 2),
    ),
)
def test_unrolled(every, unroll):
    check_reference(MODULES, checkpoint_every=every, unroll=unroll, mode="graph")


@pytest.mark.parametrize(
    ("every",), few([(every,) for every in EVERY], lambda every: every is None)
)
def test_states_that_were_not_kept(every):
    """They are computed again for a gradient that comes all the same."""
    check_reference(MODULES, BROKEN, checkpoint_every=every, keep_states=False)


@pytest.mark.parametrize(
    ("mode", "every", "shape"),
    few(
        itertools.product(WAYS, EVERY, ["usual", "long", "more_outputs"]),
        lambda *case: case == ("plain", None, "long"),
    ),
)
def test_float32(mode, every, shape):
    check_reference(MODULES, shape, (), mode, dtype="float32", checkpoint_every=every)


# -------------------------------- against automatic differentiation of the equations

# One row for each kind of mask. What a masked step holds must not matter.
MASK = np.array(
    [
        [1, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1],
        [1, 1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0, 1],
        [0, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ],
    bool,
)
MASKED = (6, 6, 4, 5, 3)


def written_out(activation, options):
    """The recurrence and p_t = y_t V + c as they are written, for TensorFlow to derive."""
    f = getattr(keras.activations, activation)

    def function(arguments, constants):
        x, W, U, h_0, b, V, c = map(arguments.get, ARGUMENTS)
        mask, d, r = map(constants.get, ("mask", "d", "r"))
        steps = range(x.shape[1])
        h, y, outputs = h_0, tf.zeros_like(h_0), []
        for t in reversed(steps) if options.get("go_backwards") else steps:
            x_t = x[:, t] if d is None else d * x[:, t]
            z = x_t @ W + (h if r is None else r * h) @ U
            new = f(z if b is None else z + b)
            if mask is None:
                h = y = new
            else:
                real = mask[:, t, None]
                h = tf.where(real, new, h)
                zero = options.get("zero_output_for_mask")
                y = tf.where(real, new, tf.zeros_like(new) if zero else y)
            p = y @ V
            outputs.append(p if c is None else p + c)
        return tf.stack(outputs, 1), h

    return function


def random_constants(shape, mask=None, dropout=False):
    B, _, D, H, _ = shape
    random, constants = rng(5), {} if mask is None else {"mask": mask}
    if dropout:
        for name, size, rate in (("d", D, 0.3), ("r", H, 0.4)):
            kept = random.random((B, size)) >= rate
            assert 0 < np.sum(kept) < kept.size
            constants[name] = kept / (1 - rate)
    return constants


def with_nan(problem, mask):
    """Nothing of what masked steps hold may be seen."""
    if mask is None:
        return problem
    return problem._replace(x=np.where(mask[..., None], problem.x, np.nan))


# Options of the recurrence that its written form has too.
TOLD = ("zero_output_for_mask", "go_backwards")


def check_options(
    modules,
    activation="tanh",
    mask=MASK,
    dropout=False,
    without=(),
    mode="plain",
    unknown=False,
    shape=MASKED,
    **options,
):
    constants = random_constants(shape, mask, dropout)
    problem = random_problem(shape, without, seed=len(activation))
    told = {name: options[name] for name in TOLD if name in options}
    expected = evaluate(written_out(activation, told), problem, constants)
    assert np.max(np.abs(expected["d_h_0"])) > 0.01
    if mask is not None:
        assert not np.any(expected["d_x"][~mask])
    got = evaluate(
        bound(modules, activation, **options),
        with_nan(problem, mask),
        constants,
        mode,
        unknown=unknown,
    )
    assert_close(got, expected)


# A slope from h, a slope from z, and a Jacobian that is not symmetric.
KINDS = ("tanh", "gelu", "log_softmax")


@pytest.mark.parametrize(
    ("every", "go_backwards", "zero_output_for_mask", "without"),
    few(
        itertools.product(EVERY, [False, True], [False, True], [(), ("c",)]),
        lambda every, back, zero, without: (
            back == zero == bool(without) and every == (3 if without else None)
        ),
    ),
)
def test_masks(every, go_backwards, zero_output_for_mask, without):
    check_options(
        MODULES,
        without=without,
        checkpoint_every=every,
        go_backwards=go_backwards,
        zero_output_for_mask=zero_output_for_mask,
    )


@pytest.mark.parametrize(
    ("every", "masked", "activation"),
    few(
        itertools.product(EVERY, [False, True], KINDS),
        lambda every, masked, f: masked and f == {None: "tanh", 3: "gelu"}.get(every),
    ),
)
def test_dropout(every, masked, activation):
    mask = MASK if masked else None
    check_options(
        MODULES, activation, mask, True, checkpoint_every=every, go_backwards=True
    )


@pytest.mark.parametrize(
    ("kind", "zero_output_for_mask"),
    few(
        itertools.product(range(len(MASK)), [False, True]),
        lambda kind, zero: not zero or kind == 5,
    ),
)
def test_each_mask_alone(kind, zero_output_for_mask):
    mask = np.repeat(MASK[kind : kind + 1], 2, 0)
    if not np.any(mask):
        # Of outputs that are all hidden c alone has a gradient, and the state h_0.
        got = evaluate(
            bound(MODULES, zero_output_for_mask=zero_output_for_mask),
            random_problem((2, *MASKED[1:])),
            {"mask": mask},
        )
        problem = random_problem((2, *MASKED[1:]))
        assert relative_error(got["d_c"], np.sum(problem.dp, (0, 1))) < FLOAT64
        assert np.array_equal(got["d_h_0"], problem.ds)
        assert np.array_equal(got["p"], np.broadcast_to(problem.c, got["p"].shape))
        assert not any(np.any(got[f"d_{name}"]) for name in "xWUbV")
        return
    check_options(
        MODULES,
        mask=mask,
        shape=(2, *MASKED[1:]),
        zero_output_for_mask=zero_output_for_mask,
    )


def few_everywhere(activation, every, mode, unknown, zero):
    return (activation, every, mode, unknown, zero) in [
        ("tanh", 3, "graph", True, False),
    ]


@pytest.mark.parametrize(
    ("activation", "every", "mode", "unknown", "zero"),
    few(
        itertools.product(KINDS, EVERY, ["graph", "xla"], [False, True], [False, True]),
        few_everywhere,
    ),
)
def test_all_options_in_graphs(activation, every, mode, unknown, zero):
    check_options(
        MODULES,
        activation,
        dropout=True,
        mode=mode,
        unknown=unknown,
        checkpoint_every=every,
        go_backwards=True,
        zero_output_for_mask=zero,
    )


def check_shards(modules, mask=MASK, window=None, **options):
    """As large batches are computed on several cores."""
    parts = {"cores": lambda: 2, "LEAST_WORK": 1, "FEWEST_EXAMPLES": 1}
    with mock.patch.multiple(modules.parts, **parts):
        if window is None:
            check_options(modules, mask=mask, dropout=True, jit_compile=True, **options)
        else:
            check_window(modules, window, mask, jit_compile=True, **options)


@pytest.mark.parametrize(
    ("masked", "window", "every"),
    few(
        itertools.product([False, True], [None, (3, 3), (4, 2)], EVERY),
        lambda *case: case == (True, (4, 2), 3),
    ),
)
def test_shards(masked, window, every, monkeypatch):
    calls, original = [], keras_bptt.engine.backward.gradients_of_part
    monkeypatch.setattr(
        keras_bptt.engine.backward,
        "gradients_of_part",
        lambda *args: calls.append(args) or original(*args),
    )
    mask = MASK if masked else None
    check_shards(MODULES, mask, window, mode="graph", checkpoint_every=every)
    assert len(calls) == 2


# ---------------------------------------------------------------------- truncation


def window_results(problem, window, constants, options):
    """What `evaluate` gives, of the brute force over paths."""
    x, W, U, h_0, b, V, c, dp, ds = problem
    # The outputs are those of the whole; y is what they are for V = 1, c = 0.
    shown = problem._replace(
        V=np.eye(len(U)), c=None, dp=np.zeros((*x.shape[:2], len(U)))
    )
    function = written_out("tanh", options)
    y = evaluate(function, shown, constants)["p"]
    whole = evaluate(function, problem, constants)
    turn = -1 if options.get("go_backwards") else 1
    mask = constants.get("mask", np.ones(x.shape[:2], bool))[:, ::turn]
    zero = options.get("zero_output_for_mask")
    seen = mask if zero else np.logical_or.accumulate(mask, 1)
    e = np.where(seen[..., None], dp @ V.T, 0)
    e[:, -1] += ds
    r, d = constants.get("r"), constants.get("d")
    inputs = np.where(mask[..., None], x[:, ::turn], 0)
    inputs = inputs if d is None else d[:, None] * inputs
    got = truncated_reference.truncated_gradients(
        inputs,
        W,
        U,
        np.zeros(len(U)) if b is None else b,
        h_0,
        "tanh",
        e,
        steps=window[0],
        stride=window[1],
        mask=mask,
        recurrent_dropout=r,
    )
    d_x = got.d_inputs[:, ::turn]
    results = {
        "p": whole["p"],
        "state": whole["state"],
        "d_x": d_x if d is None else d[:, None] * d_x,
        "d_W": got.d_kernel,
        "d_U": got.d_recurrent_kernel,
        "d_h_0": got.d_initial_state,
        "d_b": got.d_bias,
        "d_V": np.einsum("bth,bto->ho", y, dp),
        "d_c": np.sum(dp, (0, 1)),
    }
    absent = [f"d_{name}" for name in ARGUMENTS if getattr(problem, name) is None]
    return {name: array for name, array in results.items() if name not in absent}


def check_window(
    modules,
    window,
    mask=MASK,
    dropout=False,
    without=(),
    mode="plain",
    unknown=False,
    shape=MASKED,
    **options,
):
    constants = random_constants(shape, mask, dropout)
    problem = random_problem(shape, without)
    told = {name: options[name] for name in TOLD if name in options}
    expected = window_results(problem, window, constants, told)
    got = evaluate(
        bound(modules, window=window, **options),
        with_nan(problem, mask),
        constants,
        mode,
        unknown=unknown,
    )
    assert_close(got, expected)


# Chunks that fit and do not, sliding, overlapping in whole and broken blocks; all paths.
WINDOWS = [(1, 1), (3, 3), (4, 4), (3, 1), (4, 2), (5, 2), (5, 4), (8, 3)]


@pytest.mark.parametrize(
    ("window", "every", "masked", "zero"),
    few(
        itertools.product(WINDOWS, EVERY, [False, True], [False, True]),
        lambda window, every, masked, zero: (
            (masked, zero) == (window != (5, 2), window == (3, 1))
            and (
                window in [(3, 3), (5, 2), (8, 3)]
                if every is None
                else every == 3 and window in [(3, 1), (4, 2)]
            )
        ),
    ),
)
def test_windows(window, every, masked, zero):
    check_window(
        MODULES,
        window,
        MASK if masked else None,
        checkpoint_every=every,
        zero_output_for_mask=zero,
    )


@pytest.mark.parametrize(
    ("without", "every", "window"),
    few(
        itertools.product([(), ("c",)], [None, 3], [(3, 3), (5, 2)]),
        lambda *case: case == (("c",), None, (3, 3)),
    ),
)
def test_windows_with_all_options(without, every, window):
    check_window(
        MODULES,
        window,
        dropout=True,
        without=without,
        checkpoint_every=every,
        go_backwards=True,
    )


@pytest.mark.parametrize(
    ("window", "every", "mode", "unknown"),
    few(
        itertools.product(
            [(3, 3), (3, 1), (5, 2), (8, 3)], EVERY, MODES, [False, True]
        ),
        lambda *case: (
            case
            in [
                ((3, 3), None, "eager", False),
                ((5, 2), None, "graph", True),
            ]
        ),
    ),
)
def test_windows_in_graphs(window, every, mode, unknown):
    check_window(
        MODULES,
        window,
        dropout=True,
        mode=mode,
        unknown=unknown,
        checkpoint_every=every,
    )


# ---------------------------------------------------------------------- second order


def second_derivatives(function, problem, constants, mode="plain"):
    """Gradients of <gradients, random> by arguments and cotangents, through two tapes."""
    arrays = {k: v for k, v in problem._asdict().items() if v is not None}
    tensors = {name: tf.constant(array) for name, array in arrays.items()}
    random = rng(7)
    directions = {
        name: tf.constant(random.normal(size=tensors[name].shape))
        for name in ARGUMENTS
        if name in tensors
    }
    constants = {name: tf.constant(a) for name, a in constants.items()}

    def run(tensors):
        arguments = {name: tensors[name] for name in directions}
        with tf.GradientTape() as outer:
            outer.watch(tensors)
            with tf.GradientTape() as inner:
                inner.watch(arguments)
                outputs = function(arguments, constants)
            cotangents = [tensors["dp"], tensors["ds"]]
            gradients = inner.gradient(outputs, arguments, cotangents)
            scalar = tf.add_n(
                [tf.reduce_sum(gradients[n] * directions[n]) for n in directions]
            )
        # The cotangent of c, whose gradient does not depend on it.
        zero = tf.UnconnectedGradients.ZERO
        return outer.gradient(scalar, tensors, unconnected_gradients=zero)

    return {n: t.numpy() for n, t in WAYS[mode](run)(tensors).items()}


def check_second_order(
    modules, activation="tanh", without=(), mode="plain", masked=True, **options
):
    shape = (5, *MASKED[1:]) if masked else (3, 5, 4, 6, 2)
    constants = random_constants(shape, MASK[:5] if masked else None, dropout=masked)
    problem = random_problem(shape, without)
    told = {name: options[name] for name in TOLD if name in options}
    expected = second_derivatives(written_out(activation, told), problem, constants)
    got = second_derivatives(
        bound(modules, activation, **options), problem, constants, mode
    )
    assert np.max(np.abs(expected["V"])) > 0.01
    assert not np.any(expected.get("c", 0)) and not np.any(got.get("c", 0))
    expected.pop("c", None), got.pop("c", None)
    assert_close(got, expected)


@pytest.mark.parametrize(
    ("masked", "activation"),
    few(
        itertools.product([False, True], KINDS),
        lambda masked, f: masked and f == "gelu",
    ),
)
def test_second_order(masked, activation):
    check_second_order(MODULES, activation, masked=masked)


@pytest.mark.parametrize(
    ("without", "every"),
    few(
        itertools.product([(), ("c",)], EVERY),
        lambda without, every: every == 3 and not without,
    ),
)
def test_second_order_with_checkpoints(without, every):
    options = {"checkpoint_every": every, "zero_output_for_mask": every == 3}
    check_second_order(MODULES, "tanh", without, go_backwards=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_second_order_in_graphs(mode):
    check_second_order(MODULES, "tanh", (), mode, checkpoint_every=3)


def check_second_order_of_windows(modules, window, every=None):
    """Against the windows without an output layer, and a plain product."""
    shape = (5, *MASKED[1:])
    constants = random_constants(shape, MASK[:5], dropout=True)
    problem = random_problem(shape)
    without = bound(MODULES, window=window)

    def function(arguments, constants):
        arguments = dict(arguments)
        V, c = arguments.pop("V"), arguments.pop("c")
        y, state = without(arguments, constants)
        return y @ V + c, state

    expected = second_derivatives(function, problem, constants)
    ours = bound(modules, window=window, checkpoint_every=every)
    got = second_derivatives(ours, problem, constants)
    assert not np.any(got.pop("c")) and not np.any(expected.pop("c"))
    assert_close(got, expected)


@pytest.mark.parametrize(
    ("every", "window"),
    few(
        itertools.product([None, 3], [(3, 3), (3, 1), (5, 2)]),
        lambda every, window: (every, window) == (3, (3, 3)),
    ),
)
def test_second_order_of_windows(every, window):
    check_second_order_of_windows(MODULES, window, every)


# ------------------------------------------------ checks that test_breaks.py runs


def check_plain(modules):
    """Steps in blocks of 3, walked in Python; in blocks of 2, and half a one, in a loop."""
    for shape in ("usual", "square"):
        with mock.patch.multiple(modules.blocks, NUMBERS=1, FEWEST_STEPS=2):
            check_reference(modules, shape)
    in_loop = {"within_xla": lambda: True, "COMPILED_SIZE": 2}
    with mock.patch.multiple(modules.blocks, **in_loop):
        check_reference(modules)


def check_masks(modules):
    check_options(modules, dropout=True, shape=(6, 6, 4, 5, 5))
    check_options(modules, dropout=True, zero_output_for_mask=True, go_backwards=True)


def check_checkpoints(modules):
    check_reference(modules, checkpoint_every=3)
    with mock.patch.multiple(modules.blocks, MOST=1):
        check_options(modules, dropout=True, checkpoint_every=4)


def check_windows(modules):
    check_window(modules, (3, 3), dropout=True, shape=(6, 6, 4, 5, 5))
    check_window(modules, (3, 3), zero_output_for_mask=True)
    check_window(modules, (3, 3), shape=(6, 6, 4, 5, 5), keep_states=False)


def check_windows_from_checkpoints(modules):
    check_window(modules, (5, 2), dropout=True, checkpoint_every=3)
    check_window(modules, (4, 2), None, checkpoint_every=3)


def check_second_orders(modules):
    check_second_order(modules)
    check_second_order_of_windows(modules, (5, 2))


CHECKS = {
    "plain": check_plain,
    "masks": check_masks,
    "checkpoints": check_checkpoints,
    "shards": check_shards,
    "windows": check_windows,
    "windows from checkpoints": check_windows_from_checkpoints,
    "second order": check_second_orders,
}
