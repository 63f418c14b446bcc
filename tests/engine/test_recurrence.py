"""The third rung of the gradient ladder: the recurrence.

Without options it is compared with the NumPy reference; with masks, dropout and the other
options with automatic differentiation of the equations, written out step by step below.
`test_breaks.py` shows that the checks can fail.
"""

import functools
import itertools
from typing import NamedTuple
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    MODES,
    WAYS,
    few,
    in_modes,
    relative_error,
    rng,
)
from plain_rnn import MODULES

from keras_bptt import reference

# Batch, timesteps, features and units: all different, so that no transpose hides.
SHAPES = {
    "usual": (3, 7, 4, 5),
    "one_step": (2, 1, 3, 4),
    "two_steps": (4, 2, 5, 3),
    "one_unit": (2, 3, 4, 1),
    "one_example": (1, 4, 3, 6),
    "long": (2, 20, 3, 5),
}
# Of more than one block, and of blocks and a shorter one.
BLOCKS = {"blocks": (2, 34, 3, 5), "blocks_and_a_rest": (2, 37, 3, 5)}

# The same sums in float64 in another order: at most 37 steps of 10 products of numbers
# near 1, each rounded to 1e-16, through links that neither shrink nor grow. That is 1e-13;
# a wrong term is an error near 1.
FLOAT64 = 1e-10

# Of the last state's cotangent at least this share is left at step 1.
LASTING = 0.1

ACTIVATIONS = sorted(reference.ACTIVATIONS)


def float32_tolerance(shape):
    """The bound of the relative error in float32, as a function of the sizes.

    A pre-activation is a sum of D + H + 1 products: rounding moves it by at most
    (D + H + 1) eps times their size. Links with a gain near 1 hand such an error on
    neither shrunk nor grown, so that at most T of them add up, once in the forward pass
    (h, and with it f') and once in the backward pass. Hence 2 T (D + H + 1) eps. Errors of
    random sign stay far below; those of a lower precision (bfloat16, TF32) do not.
    """
    _, T, D, H = shape
    return 2 * T * (D + H + 1) * np.finfo(np.float32).eps


class Problem(NamedTuple):
    """Arguments of `recurrence`, and cotangents of its two outputs, in float64."""

    x: np.ndarray
    W: np.ndarray
    U: np.ndarray
    h_0: np.ndarray
    b: np.ndarray
    dy: np.ndarray
    ds: np.ndarray


def random_problem(shape, radius=1.0, return_sequences=True, seed=0):
    B, T, D, H = shape
    random = rng(seed)
    # Not symmetric. A random matrix has singular values near 0: gradients would vanish in
    # most directions, whatever the largest eigenvalue. An orthogonal one has none.
    U = np.linalg.qr(random.normal(size=(H, H)))[0] * random.uniform(0.9, 1.1, H)
    if H > 1:
        # What all units have in common, 1/2 for sigmoid, does not add up to saturation.
        U -= np.mean(U, axis=0)
    return Problem(
        x=0.7 * random.normal(size=(B, T, D)),
        W=random.normal(size=(D, H)) / np.sqrt(D),
        U=radius * U,
        h_0=0.5 * random.normal(size=(B, H)),
        b=0.2 * random.normal(size=H),
        dy=random.normal(size=(B, T, H) if return_sequences else (B, H)),
        ds=random.normal(size=(B, H)),
    )


def evaluate(function, problem, mode="plain", use_bias=True, dtype="float64"):
    """Outputs of `function(x, W, U, h_0, *b)` and its gradients, by name."""
    tensors = [tf.constant(array, dtype) for array in problem]
    cotangents = tensors[5:]
    arguments = tensors[: 5 if use_bias else 4]

    def run(arguments, cotangents):
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            outputs = function(*arguments)
        return (*outputs, *tape.gradient(outputs, arguments, cotangents))

    results = WAYS[mode](run)(arguments, cotangents)
    names = ("y", "state", *(f"d_{name}" for name in Problem._fields))
    return {name: r.numpy() for name, r in zip(names, results, strict=False)}


def assert_close(got, expected, tolerance):
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].shape == array.shape, name
        error = relative_error(got[name], array)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def bound(modules, activation, constants=None, dtype="float64", units=5, **options):
    """`recurrence` as a function of the differentiable arguments alone."""
    activation = getattr(keras.activations, activation, activation)
    options = modules.recurrence.Recurrence(
        activation=modules.activations.resolve(activation, units, dtype), **options
    )
    constants = modules.recurrence.Constants(**(constants or {}))

    def function(*arguments):
        return modules.recurrence.recurrence(options, constants, *arguments)

    return function


# ---------------------------------------------------------------- against the reference


def reference_results(problem, activation, return_sequences, use_bias):
    """What `evaluate` gives, of the reference."""
    x, W, U, h_0, b, dy, ds = problem
    b = b if use_bias else np.zeros_like(b)
    H = len(U)
    network = reference.Network(W, U, b, np.eye(H), np.zeros(H), h_0, f=activation)
    forward = reference.forward(x, np.zeros((*x.shape[:2], H)), network)
    e = np.zeros_like(forward.h)
    if return_sequences:
        e += dy
    else:
        e[:, -1] += dy
    e[:, -1] += ds
    assert share_at_step_1(problem, activation) > LASTING
    if activation == "relu":
        # The slope jumps at 0: no z may lie so near that float32 sees the other side.
        assert np.min(np.abs(forward.z)) > 1e-5
    d = reference.hidden_gradients(x, W, U, b, h_0, activation, e)
    results = {
        "y": forward.h if return_sequences else forward.h[:, -1],
        "state": forward.h[:, -1],
        "d_x": d.d_inputs,
        "d_W": d.d_kernel,
        "d_U": d.d_recurrent_kernel,
        "d_h_0": d.d_initial_state,
    }
    return results | ({"d_b": d.d_bias} if use_bias else {})


def share_at_step_1(problem, activation):
    """How much of the last state's cotangent is left at step 1: |a_1| / |a_T|."""
    x, W, U, h_0, b, _, ds = problem
    e = np.zeros((*x.shape[:2], len(U)))
    e[:, -1] = ds
    a = reference.hidden_gradients(x, W, U, b, h_0, activation, e).adjoint
    return np.linalg.norm(a[:, 0]) / np.linalg.norm(a[:, -1])


@functools.cache
def lasting_problem(shape, activation, return_sequences):
    """U no larger than it must be for a gradient to reach step 1.

    Else an error far back would be too small to see. With a larger U, tanh is chaotic: a
    rounding error grows from step to step, and no implementation is right in float32.
    """
    radii = np.geomspace(0.8, 6, 40)
    problems = (random_problem(shape, radius, return_sequences) for radius in radii)
    return next(p for p in problems if share_at_step_1(p, activation) > LASTING)


def check_reference(
    modules,
    activation,
    return_sequences,
    use_bias=True,
    shape="usual",
    mode="plain",
    dtype="float64",
    unroll=False,
):
    shape = (SHAPES | BLOCKS)[shape]
    problem = lasting_problem(shape, activation, return_sequences)
    function = bound(
        modules,
        activation,
        dtype=dtype,
        units=shape[-1],
        return_sequences=return_sequences,
        unroll=unroll,
    )
    assert_close(
        evaluate(function, problem, mode, use_bias, dtype),
        reference_results(problem, activation, return_sequences, use_bias),
        FLOAT64 if dtype == "float64" else float32_tolerance(shape),
    )


each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
each_output = pytest.mark.parametrize(
    "return_sequences", [True, False], ids=["sequences", "last"]
)
in_graphs = pytest.mark.parametrize("mode", ["graph", "xla"])


@each_output
@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    ("activation", "shape"),
    few(
        itertools.product(ACTIVATIONS, SHAPES),
        lambda activation, shape: activation == "tanh" or shape in ("usual", "long"),
    ),
)
def test_equals_reference(activation, return_sequences, use_bias, shape):
    check_reference(MODULES, activation, return_sequences, use_bias, shape)


@pytest.mark.parametrize(
    ("shape", "return_sequences", "mode"),
    few(
        itertools.product(BLOCKS, [True, False], WAYS),
        lambda shape, return_sequences, mode: (
            mode == "plain"
            or (shape, return_sequences, mode)
            in [
                ("blocks_and_a_rest", False, "graph"),
                ("blocks_and_a_rest", True, "xla"),
            ]
        ),
    ),
)
def test_blocks_equal_reference(shape, return_sequences, mode):
    check_reference(MODULES, "tanh", return_sequences, shape=shape, mode=mode)


@each_output
@pytest.mark.parametrize(
    ("activation", "shape"),
    few(
        itertools.product(ACTIVATIONS, SHAPES),
        lambda activation, shape: (
            shape == "usual" or (activation, shape) == ("tanh", "long")
        ),
    ),
)
def test_equals_reference_in_float32(activation, return_sequences, shape):
    check_reference(MODULES, activation, return_sequences, shape=shape, dtype="float32")


@pytest.mark.parametrize(
    ("activation", "return_sequences", "mode"),
    few(
        itertools.product(ACTIVATIONS, [True, False], MODES),
        # Slopes that h tells, and one that z tells.
        lambda *case: (
            case
            in [
                ("tanh", True, "eager"),
                ("relu", False, "graph"),
                ("softplus", True, "xla"),
            ]
        ),
    ),
)
def test_equals_reference_in_graphs(activation, return_sequences, mode):
    check_reference(MODULES, activation, return_sequences, mode=mode)


@in_graphs
@pytest.mark.parametrize(
    ("shape", "return_sequences"),
    few(
        itertools.product(["one_step", "two_steps", "long"], [True, False]),
        # Longer ones are walked in blocks, above.
        lambda shape, return_sequences: shape == "one_step",
    ),
)
def test_lengths_in_graphs(return_sequences, shape, mode):
    check_reference(MODULES, "tanh", return_sequences, shape=shape, mode=mode)


@pytest.mark.parametrize(
    ("shape", "return_sequences", "mode"),
    few(
        itertools.product(["usual", "one_step"], [True, False], WAYS),
        lambda shape, return_sequences, mode: (
            mode == "plain"
            or (shape == "usual" and return_sequences == (mode == "graph"))
        ),
    ),
)
def test_unrolled(return_sequences, shape, mode):
    check_reference(
        MODULES, "tanh", return_sequences, shape=shape, mode=mode, unroll=True
    )


@in_graphs
@pytest.mark.slow
def test_float32_in_graphs(mode):
    check_reference(MODULES, "tanh", True, shape="long", mode=mode, dtype="float32")


@pytest.mark.slow
@each_activation
@each_output
@in_graphs
@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unroll"])
@pytest.mark.parametrize("shape", ["usual", "one_step"])
def test_equals_reference_everywhere(
    activation, return_sequences, use_bias, shape, mode, unroll
):
    check_reference(
        MODULES, activation, return_sequences, use_bias, shape, mode, unroll=unroll
    )


# -------------------------------- against automatic differentiation of the equations

# One row for each kind of mask. What a masked step holds must not matter.
MASKS = {
    "none": [1, 1, 1, 1, 1, 1],
    "left": [0, 0, 1, 1, 1, 1],
    "right": [1, 1, 1, 1, 0, 0],
    "holes": [1, 0, 0, 1, 0, 1],
    "both_ends": [0, 1, 0, 1, 1, 0],
    "all": [0, 0, 0, 0, 0, 0],
}


def unrolled(activation, constants, arguments, return_sequences, **options):
    """The recurrence as its equations say it, for TensorFlow to differentiate."""
    mask, d, r = (constants.get(name) for name in ("mask", "d", "r"))
    x, W, U, h_0, *b = arguments
    steps = range(x.shape[1])
    h, shown, outputs = h_0, tf.zeros_like(h_0), []
    for t in reversed(steps) if options.get("go_backwards") else steps:
        x_t = x[:, t] if d is None else d * x[:, t]
        z = tf.matmul(x_t, W) + tf.matmul(h if r is None else r * h, U)
        new = activation(z + b[0] if b else z)
        if mask is None:
            h = shown = new
        else:
            real = mask[:, t, None]
            h = tf.where(real, new, h)
            skipped = options.get("zero_output_for_mask")
            shown = tf.where(real, new, tf.zeros_like(new) if skipped else shown)
        outputs.append(shown)
    return (tf.stack(outputs, 1) if return_sequences else shown), h


def random_constants(shape, masks, dropout):
    """Constants for `shape`; `masks` names a row of `MASKS` for each example."""
    B, T, D, H = shape
    random, constants = rng(5), {}
    if masks:
        constants["mask"] = tf.constant([MASKS[name] for name in masks]) == 1
        assert constants["mask"].shape == (B, T)
    if dropout:
        for name, size, rate in (("d", D, 0.3), ("r", H, 0.4)):
            kept = random.random((B, size)) >= rate
            assert 0 < np.sum(kept) < kept.size
            constants[name] = tf.constant(kept / (1 - rate))
    return constants


def problem_of_options(shape, activation, return_sequences):
    return random_problem(shape, 1.2, return_sequences, seed=len(activation))


@functools.cache
def unrolled_results(activation, masks, dropout, shape, options):
    """What `evaluate` gives, of the equations: several checks are compared with it."""
    options = dict(options)
    constants = random_constants(shape, masks, dropout)
    function = getattr(keras.activations, activation)
    return evaluate(
        lambda *arguments: unrolled(function, constants, arguments, **options),
        problem_of_options(shape, activation, options["return_sequences"]),
    )


def check_options(
    modules, activation, masks=(), dropout=False, mode="plain", unroll=False, **options
):
    """Compare with the unrolled equations; NaN at masked steps must change nothing."""
    options = {"return_sequences": True} | options
    shape = (len(masks) or 3, 6, 4, 5)
    constants = random_constants(shape, masks, dropout)
    problem = problem_of_options(shape, activation, options["return_sequences"])
    expected = unrolled_results(
        activation, tuple(masks), dropout, shape, tuple(options.items())
    )
    assert np.max(np.abs(expected["d_h_0"])) > 0.01

    given = problem
    if masks:
        mask = constants["mask"].numpy()
        assert not np.any(expected["d_x"][~mask])
        given = problem._replace(x=np.where(mask[..., None], problem.x, np.nan))
    ours = bound(modules, activation, constants, unroll=unroll, **options)
    assert_close(evaluate(ours, given, mode), expected, FLOAT64)


# A slope from h, a slope from z, and a Jacobian that is not symmetric.
KINDS = ("tanh", "gelu", "log_softmax")
each_kind = pytest.mark.parametrize("activation", KINDS)
each_dropout = pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
each_direction = pytest.mark.parametrize(
    "go_backwards", [False, True], ids=["forwards", "backwards"]
)
each_masked_output = pytest.mark.parametrize(
    "zero_output_for_mask", [False, True], ids=["repeat", "zero"]
)


@each_output
@each_masked_output
@pytest.mark.parametrize(
    ("activation", "go_backwards", "dropout"),
    few(
        itertools.product(KINDS, [False, True], [False, True]),
        lambda activation, go_backwards, dropout: go_backwards == dropout,
    ),
)
def test_masks(
    activation, return_sequences, zero_output_for_mask, go_backwards, dropout
):
    check_options(
        MODULES,
        activation,
        MASKS,
        dropout,
        return_sequences=return_sequences,
        zero_output_for_mask=zero_output_for_mask,
        go_backwards=go_backwards,
    )


@pytest.mark.parametrize("kind", MASKS)
@each_output
def test_each_mask_alone(kind, return_sequences):
    check_options(MODULES, "tanh", [kind] * 2, return_sequences=return_sequences)


@each_kind
@each_direction
@each_output
def test_dropout(activation, go_backwards, return_sequences):
    check_options(
        MODULES,
        activation,
        dropout=True,
        go_backwards=go_backwards,
        return_sequences=return_sequences,
    )


@pytest.mark.parametrize(
    ("activation", "mode", "return_sequences"),
    few(
        itertools.product(KINDS, MODES, [True, False]),
        lambda activation, mode, return_sequences: (
            return_sequences == (activation != "gelu")
            and mode
            in ("xla", {"tanh": "eager", "log_softmax": "graph"}.get(activation))
        ),
    ),
)
def test_all_options_in_graphs(activation, mode, return_sequences):
    check_options(
        MODULES,
        activation,
        MASKS,
        dropout=True,
        mode=mode,
        return_sequences=return_sequences,
        go_backwards=True,
    )


@pytest.mark.parametrize("activation", ["relu", "softplus", "softmax", "silu"])
def test_more_activations(activation):
    check_options(MODULES, activation, MASKS, dropout=True)


@each_kind
def test_unrolled_with_all_options(activation):
    check_options(MODULES, activation, MASKS, dropout=True, unroll=True)


@pytest.mark.slow
@each_kind
@pytest.mark.parametrize("masks", [(), tuple(MASKS)], ids=["", "masks"])
@each_output
@each_masked_output
@each_direction
@each_dropout
@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unroll"])
@in_graphs
def test_all_options_everywhere(
    activation,
    masks,
    return_sequences,
    zero_output_for_mask,
    go_backwards,
    dropout,
    unroll,
    mode,
):
    check_options(
        MODULES,
        activation,
        masks,
        dropout,
        mode,
        unroll,
        return_sequences=return_sequences,
        zero_output_for_mask=zero_output_for_mask,
        go_backwards=go_backwards,
    )


# ---------------------------------------------------------------------- second order


def second_derivatives(function, problem, mode="plain"):
    """Gradients of <gradients, random> by arguments, through two tapes."""
    tensors = [tf.constant(array) for array in problem]
    arguments, cotangents = tensors[:5], tensors[5:]
    random = rng(7)
    directions = [tf.constant(random.normal(size=t.shape)) for t in arguments]

    def run(arguments, cotangents):
        with tf.GradientTape() as outer:
            outer.watch((arguments, cotangents))
            with tf.GradientTape() as inner:
                inner.watch(arguments)
                outputs = function(*arguments)
            gradients = inner.gradient(outputs, arguments, cotangents)
        return outer.gradient(gradients, (arguments, cotangents), directions)

    results = tf.nest.flatten(WAYS[mode](run)(arguments, cotangents))
    return {n: r.numpy() for n, r in zip(Problem._fields, results, strict=True)}


def check_second_order(modules, activation, mode="plain", nan=False, **options):
    masks = {name: row for name, row in MASKS.items() if name != "all"}
    shape = (len(masks), 6, 4, 5)
    constants = random_constants(shape, masks, dropout=True)
    problem = random_problem(shape, 1.2, options["return_sequences"])
    function = getattr(keras.activations, activation)
    expected = second_derivatives(
        lambda *arguments: unrolled(function, constants, arguments, **options),
        problem,
    )
    if nan:
        mask = constants["mask"].numpy()[..., None]
        problem = problem._replace(x=np.where(mask, problem.x, np.nan))
    ours = bound(modules, activation, constants, **options)
    assert_close(second_derivatives(ours, problem, mode), expected, FLOAT64)


@each_kind
@each_output
def test_second_order(activation, return_sequences):
    check_second_order(MODULES, activation, return_sequences=return_sequences)


@in_modes()
def test_second_order_in_graphs(mode):
    check_second_order(MODULES, "tanh", mode, return_sequences=True, go_backwards=True)


def test_second_order_with_nan_at_masked_steps():
    check_second_order(MODULES, "tanh", nan=True, return_sequences=True)


# ------------------------------------------------ checks that test_breaks.py runs


def check_everything(modules):
    """The checks above in little: each option on with each kind of activation."""
    # Steps in blocks of 3, walked in Python; in blocks of 2, and half a one, in a loop.
    with mock.patch.multiple(modules.blocks, NUMBERS=1, FEWEST_STEPS=2):
        check_reference(modules, "tanh", return_sequences=True)
    in_loop = {"within_xla": lambda: True, "COMPILED_SIZE": 2}
    with mock.patch.multiple(modules.blocks, **in_loop):
        check_reference(modules, "tanh", return_sequences=True)
    for return_sequences in (True, False):
        check_reference(modules, "tanh", return_sequences)
    for activation, (zero, sequences, backwards) in itertools.product(
        KINDS, [(False, True, True), (True, False, False), (False, False, True)]
    ):
        check_options(
            modules,
            activation,
            MASKS,
            dropout=True,
            zero_output_for_mask=zero,
            return_sequences=sequences,
            go_backwards=backwards,
        )


def check_second_orders(modules):
    for return_sequences in (True, False):
        check_second_order(modules, "tanh", return_sequences=return_sequences)
