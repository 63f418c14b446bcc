"""The third rung of the gradient ladder: the recurrence, step by step and as a whole.

Without options it is compared with the NumPy reference; with masks, dropout and the other
options with automatic differentiation of the equations, written out step by step below. All
of it is for a recurrence with and without an output layer p_t = h_t V + c, whose cases are
in `test_output_layer.py`; `test_checkpoints.py` and `test_windows.py` go on from here.
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
from helpers import MODES, WAYS, examples, relative_error, rng
from hypothesis import given
from hypothesis import strategies as st
from plain_rnn import Constants, Recurrence, recurrence

import keras_bptt.engine.blocks
from keras_bptt import reference
from keras_bptt.cells.activations import resolve
from keras_bptt.truncation import Truncation

# Batch, timesteps, features, units and outputs: all different, so that no transpose hides;
# but for "square", where one of V would fit.
SHAPES = {
    "usual": (3, 7, 4, 5, 2),
    "square": (3, 7, 2, 5, 5),
    "one_step": (2, 1, 3, 4, 5),
    "two_steps": (4, 2, 5, 3, 6),
    "one_unit": (2, 3, 4, 1, 5),
    "one_output": (4, 6, 2, 3, 1),
    "one_example": (1, 4, 3, 6, 2),
    "long": (2, 20, 3, 5, 4),
    # Of more than one block, and of blocks and a shorter one.
    "blocks": (2, 34, 3, 5, 4),
    "blocks_and_a_rest": (2, 37, 3, 5, 4),
}

# The same sums in float64 in another order: at most 37 steps of 10 products of numbers
# near 1, each rounded to 1e-16, through links that neither shrink nor grow. That is 1e-13;
# a wrong term is an error near 1.
FLOAT64 = 1e-10

# Of the last state's cotangent at least this share is left at step 1.
LASTING = 0.1

ACTIVATIONS = sorted(reference.ACTIVATIONS)
# A slope from h, a slope from z, and a Jacobian that is not symmetric.
KINDS = ("tanh", "gelu", "log_softmax")


def float32_tolerance(shape):
    """The bound of the relative error in float32, as a function of the sizes.

    A pre-activation is a sum of D + H + 1 products, and an output one of H + 1: rounding
    moves it by at most as many eps times their size. Links with a gain near 1 hand such an
    error on neither shrunk nor grown, so that at most T of them add up, once in the forward
    pass (h, and with it f') and once in the backward pass. Hence 2 T (D + H + 1) eps.
    Errors of random sign stay far below; those of bfloat16 or TF32 do not.
    """
    _, T, D, H, _ = shape
    return 2 * T * (D + H + 1) * np.finfo(np.float32).eps


class Problem(NamedTuple):
    """Arguments of `recurrence`, and cotangents of its two outputs; None: there is none."""

    x: np.ndarray
    W: np.ndarray
    U: np.ndarray
    h_0: np.ndarray
    b: np.ndarray | None
    V: np.ndarray | None
    c: np.ndarray | None
    dy: np.ndarray
    ds: np.ndarray

    def arrays(self):
        """What there is, by name."""
        return {k: array for k, array in self._asdict().items() if array is not None}

    def without_padding(self, mask):
        """The same where a masked step holds NaN, which nobody may see."""
        if mask is None:
            return self
        return self._replace(x=np.where(mask[..., None], self.x, np.nan))


ARGUMENTS = Problem._fields[:7]


def random_problem(shape, radius=1.0, sequences=True, optional="b", seed=0):
    """Random numbers of these sizes; `optional` names those of b, V and c that it has."""
    B, T, D, H, O = shape  # noqa: E741
    random = rng(seed)
    # Not symmetric. A random matrix has singular values near 0: gradients would vanish in
    # most directions, whatever the largest eigenvalue. An orthogonal one has none.
    U = np.linalg.qr(random.normal(size=(H, H)))[0] * random.uniform(0.9, 1.1, H)
    if H > 1:
        # What all units have in common, 1/2 for sigmoid, does not add up to saturation.
        U -= np.mean(U, axis=0)
    outputs = O if "V" in optional else H
    problem = Problem(
        x=0.7 * random.normal(size=(B, T, D)),
        W=random.normal(size=(D, H)) / np.sqrt(D),
        U=radius * U,
        h_0=0.5 * random.normal(size=(B, H)),
        b=0.2 * random.normal(size=H),
        V=random.normal(size=(H, O)),
        c=random.normal(size=O),
        dy=random.normal(size=(B, T, outputs) if sequences else (B, outputs)),
        ds=random.normal(size=(B, H)),
    )
    return problem._replace(**{name: None for name in "bVc" if name not in optional})


def activation_of(name):
    """Keras' activation of this name; a function is itself."""
    return name if callable(name) else getattr(keras.activations, name)


def bound(activation="tanh", dtype="float64", window=None, **options):
    """`recurrence` as a function of the arguments and the constants, both by name."""
    f = activation_of(activation)
    truncation = None if window is None else Truncation(*window)

    def function(arguments, constants):
        resolved = resolve(f, arguments["U"].shape[0], dtype)
        static = Recurrence(resolved, truncation=truncation, **options)
        return recurrence(static, Constants(**constants), **arguments)

    return function


def first_order(function, unconnected="none"):
    """The outputs of a function and their gradients, of all tensors by name."""
    unconnected = tf.UnconnectedGradients(unconnected)

    def gradients(tensors, constants):
        arguments = {name: tensors[name] for name in ARGUMENTS if name in tensors}
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            outputs = function(arguments, constants)
        cotangents = [tensors["dy"], tensors["ds"]]
        return outputs, tape.gradient(outputs, arguments, cotangents, unconnected)

    return gradients


def tensors_of(problem, constants, dtype="float64"):
    tensors = {name: tf.constant(a, dtype) for name, a in problem.arrays().items()}
    return tensors, {
        name: tf.constant(array, tf.bool if name == "mask" else dtype)
        for name, array in (constants or {}).items()
    }


def of_unknown_sizes(run, tensors, constants, jit_compile):
    """`run` in a graph that knows neither the batch nor the number of steps."""
    late = {"x": 2, "mask": 2, "factors": 2, "h_0": 1, "ds": 1, "d": 1, "r": 1}
    late["dy"] = len(tensors["dy"].shape) - 1

    def spec(name, t):
        known = t.shape[late.get(name, 0) :]
        return tf.TensorSpec([None] * late.get(name, 0) + known, t.dtype)

    specs = [{k: spec(k, t) for k, t in d.items()} for d in (tensors, constants)]
    return tf.function(
        run, input_signature=specs, autograph=False, jit_compile=jit_compile
    )


def evaluate(function, problem, constants=None, mode="plain", dtype="float64"):
    """Outputs of `function` and the gradients of its arguments, by name.

    Args:
        mode: one of `WAYS`; or "unknown" or "unknown, xla", a graph of unknown sizes.
    """
    given = tensors_of(problem, constants, dtype)
    run = first_order(function)
    if mode.startswith("unknown"):
        run = of_unknown_sizes(run, *given, "xla" in mode or None)
    else:
        run = WAYS[mode](run)
    return named(run(*given))


def named(results):
    """The results of `first_order` as arrays, by name."""
    (y, state), d = results
    results = {"y": y, "state": state} | {f"d_{name}": d[name] for name in d}
    return {name: result.numpy() for name, result in results.items()}


def assert_close(got, expected, tolerance=FLOAT64):
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].shape == array.shape, name
        error = relative_error(got[name], array)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


# ---------------------------------------------------------------- against the reference


def reference_results(problem, activation, sequences):
    """What `evaluate` gives, of the reference: its o_t are the outputs, for g is linear."""
    x, W, U, h_0, b, V, c, dy, ds = problem
    T, H = x.shape[1], len(U)
    b = np.zeros(H) if b is None else b
    V = np.eye(H) if V is None else V
    c = np.zeros(V.shape[1]) if c is None else c
    q = np.zeros((*x.shape[:2], V.shape[1]))
    q[:, slice(None) if sequences else -1] = dy
    network = reference.Network(W, U, b, V, c, h_0, activation, loss="inner_product")
    run = reference.forward(x, T * q, network)
    if activation == "relu":
        # The slope jumps at 0: no z may lie so near that float32 sees the other side.
        assert np.min(np.abs(run.z)) > 1e-5
    above = reference.gradients(x, T * q, network)
    e = above.cotangents.copy()
    e[:, -1] += ds
    d = reference.hidden_gradients(x, W, U, b, h_0, activation, e)
    gradients = (
        *(d.d_inputs, d.d_kernel, d.d_recurrent_kernel, d.d_initial_state, d.d_bias),
        *(above.d_output_kernel, above.d_output_bias),
    )
    return of_arguments(
        problem, run.o if sequences else run.o[:, -1], run.h[:, -1], gradients
    )


def of_arguments(problem, y, state, gradients):
    """The results by name, without the gradients of what the problem does not have."""
    named = zip(ARGUMENTS, gradients, strict=True)
    d = {f"d_{name}": d for name, d in named if getattr(problem, name) is not None}
    return {"y": y, "state": state} | d


def share_at_step_1(problem, activation):
    """How much of the last state's cotangent is left at step 1: |a_1| / |a_T|."""
    x, W, U, h_0, b, *_, ds = problem
    e = np.zeros((*x.shape[:2], len(U)))
    e[:, -1] = ds
    b = np.zeros(len(U)) if b is None else b
    a = reference.hidden_gradients(x, W, U, b, h_0, activation, e).adjoint
    return np.linalg.norm(a[:, 0]) / np.linalg.norm(a[:, -1])


@functools.cache
def lasting_problem(shape, activation, sequences, optional):
    """U no larger than it must be for a gradient to reach step 1.

    Else an error far back would be too small to see. With a larger U, tanh is chaotic: a
    rounding error grows from step to step, and no implementation is right in float32.
    """
    for radius in np.geomspace(0.8, 6, 40):
        problem = random_problem(shape, radius, sequences, optional)
        if share_at_step_1(problem, activation) > LASTING:
            return problem
    raise AssertionError("the gradient vanishes for every U")


def check_reference(
    shape="usual",
    activation="tanh",
    sequences=True,
    optional="b",
    mode="plain",
    dtype="float64",
    **options,
):
    sizes = SHAPES[shape]
    problem = lasting_problem(sizes, activation, sequences, optional)
    function = bound(activation, dtype, return_sequences=sequences, **options)
    assert_close(
        evaluate(function, problem, None, mode, dtype),
        reference_results(problem, activation, sequences),
        FLOAT64 if dtype == "float64" else float32_tolerance(sizes),
    )


each_output = pytest.mark.parametrize(
    "sequences", [True, False], ids=["sequences", "last"]
)
# But for those that differ in V.
OF_NO_OUTPUT_LAYER = [s for s in SHAPES if s not in ("usual", "square", "one_output")]


@each_output
@pytest.mark.parametrize(
    ("shape", "activation"),
    [
        *(("usual", activation) for activation in ACTIVATIONS),
        *((shape, "tanh") for shape in OF_NO_OUTPUT_LAYER),
    ],
)
def test_equals_reference(shape, activation, sequences):
    check_reference(shape, activation, sequences)
    if shape == "usual":
        check_reference(shape, activation, sequences, "")
    if shape in ("usual", "long"):
        check_reference(shape, activation, sequences, dtype="float32")


@pytest.mark.parametrize(
    ("mode", "shape", "sequences", "activation", "unroll"),
    [
        # Slopes that h tells, and one that z tells.
        ("eager", "usual", True, "tanh", False),
        ("graph", "one_step", False, "relu", False),
        ("xla", "one_step", True, "tanh", False),
        ("graph", "blocks_and_a_rest", False, "tanh", False),
        ("xla", "blocks_and_a_rest", True, "softplus", False),
        ("plain", "usual", False, "tanh", True),
        ("graph", "usual", True, "tanh", True),
        ("xla", "usual", False, "tanh", True),
    ],
)
def test_equals_reference_in_every_mode(mode, shape, sequences, activation, unroll):
    check_reference(shape, activation, sequences, mode=mode, unroll=unroll)


# -------------------------------- against automatic differentiation of the equations

# A row for each kind of mask. What a masked step holds must not matter.
MASKS = {
    "none": [1, 1, 1, 1, 1, 1],
    "left": [0, 0, 1, 1, 1, 1],
    "right": [1, 1, 1, 1, 0, 0],
    "holes": [1, 0, 0, 1, 0, 1],
    "both_ends": [0, 1, 0, 1, 1, 0],
    "all": [0, 0, 0, 0, 0, 0],
}
NOT_ALL = tuple(name for name in MASKS if name != "all")

# Options that the written form of the recurrence has too.
WRITTEN = ("return_sequences", "go_backwards", "zero_output_for_mask")


def written_out(activation="tanh", **options):
    """The recurrence as its equations say it, for TensorFlow to differentiate."""
    f = activation_of(activation)

    def function(arguments, constants):
        x, W, U, h_0, b, V, c = map(arguments.get, ARGUMENTS)
        mask, d, r = map(constants.get, ("mask", "d", "r"))
        steps = range(x.shape[1])
        h, shown, outputs = h_0, tf.zeros_like(h_0), []
        for t in reversed(steps) if options.get("go_backwards") else steps:
            x_t = x[:, t] if d is None else d * x[:, t]
            z = tf.matmul(x_t, W) + tf.matmul(h if r is None else r * h, U)
            new = f(z if b is None else z + b)
            if mask is None:
                h = shown = new
            else:
                real = mask[:, t, None]
                h = tf.where(real, new, h)
                zero = options.get("zero_output_for_mask")
                shown = tf.where(real, new, tf.zeros_like(new) if zero else shown)
            y = shown if V is None else tf.matmul(shown, V)
            y = y if c is None else y + c
            outputs.append(y)
        return (tf.stack(outputs, 1) if options.get("return_sequences") else y), h

    return function


def random_constants(shape, masks=(), dropout=False):
    """Constants for `shape`; `masks` names a row of `MASKS` for each example."""
    B, T, D, H, _ = shape
    random, constants = rng(5), {}
    if masks:
        constants["mask"] = np.array([MASKS[name] for name in masks], bool)
        assert constants["mask"].shape == (B, T)
    if dropout:
        for name, size, rate in (("d", D, 0.3), ("r", H, 0.4)):
            kept = random.random((B, size)) >= rate
            assert 0 < np.sum(kept) < kept.size
            constants[name] = kept / (1 - rate)
    return constants


# Once each: several checks are compared with the same numbers.
@functools.cache
def case_of(activation, masks, dropout, optional, written):
    """A problem, its constants, and what `evaluate` gives, of the equations."""
    written = dict(written)
    shape = len(masks) or 3, 6, 4, 5, 3
    constants = random_constants(shape, masks, dropout)
    sequences = written["return_sequences"]
    problem = random_problem(shape, 1.2, sequences, optional, len(activation))
    expected = evaluate(written_out(activation, **written), problem, constants)
    return problem, constants, expected


def check_options(
    activation="tanh",
    masks=(),
    dropout=False,
    mode="plain",
    optional="b",
    **options,
):
    """Compare with the written equations; NaN at masked steps must change nothing."""
    options = {"return_sequences": True} | options
    written = tuple((name, options[name]) for name in WRITTEN if name in options)
    case = case_of(activation, tuple(masks), dropout, optional, written)
    problem, constants, expected = case
    assert np.max(np.abs(expected["d_h_0"])) > 0.01
    mask = constants.get("mask")
    if mask is not None:
        assert not np.any(expected["d_x"][~mask])
    function = bound(activation, **options)
    got = evaluate(function, problem.without_padding(mask), constants, mode)
    assert_close(got, expected)


@pytest.mark.parametrize(
    ("masks", "sequences", "backwards", "zero"),
    [
        *itertools.product([tuple(MASKS)], *[[True, False]] * 3),
        *itertools.product([()], *[[True, False]] * 2, [False]),
    ],
)
def test_options(masks, sequences, backwards, zero):
    """Every three of them; for each kind of activation, with dropout and without."""
    for activation, unroll in zip(KINDS, (False, False, True), strict=True):
        check_options(
            activation,
            masks,
            dropout=sequences ^ zero ^ backwards,
            return_sequences=sequences,
            zero_output_for_mask=zero,
            go_backwards=backwards,
            unroll=unroll,
        )


@each_output
def test_no_example_has_a_real_step(sequences):
    check_options(masks=["all"] * 2, return_sequences=sequences)


@pytest.mark.parametrize("activation", ["relu", "softplus", "softmax", "silu"])
def test_more_activations(activation):
    check_options(activation, MASKS, dropout=True)


@pytest.mark.parametrize(
    ("mode", "activation"),
    [("eager", "tanh"), ("graph", "log_softmax"), ("xla", "gelu")],
)
def test_options_in_every_mode(mode, activation):
    sequences = activation != "gelu"
    options = {"return_sequences": sequences, "go_backwards": True}
    check_options(activation, MASKS, True, mode, **options)


# ---------------------------------------------------------------------- second order


def second_derivatives(gradients, problem, constants=None, mode="plain"):
    """Gradients of <gradients, random> by arguments and cotangents, through two tapes."""
    tensors, constants = tensors_of(problem, constants)
    random = rng(7)
    directions = {
        name: tf.constant(random.normal(size=tensors[name].shape))
        for name in ARGUMENTS
        if name in tensors
    }

    def run(tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            _, d = gradients(tensors, constants)
        # The gradient of c does not depend on c.
        zero = tf.UnconnectedGradients.ZERO
        return tape.gradient(d, tensors, directions, unconnected_gradients=zero)

    return {name: d.numpy() for name, d in WAYS[mode](run)(tensors).items()}


def check_second_order(
    activation="tanh", masks=NOT_ALL, mode="plain", optional="b", **options
):
    options = {"return_sequences": True} | options
    written = {name: options[name] for name in WRITTEN if name in options}
    shape = len(masks) or 3, 6, 4, 5, 3
    constants = random_constants(shape, masks, dropout=True)
    problem = random_problem(shape, 1.2, options["return_sequences"], optional)
    theirs = first_order(written_out(activation, **written))
    expected = second_derivatives(theirs, problem, constants)
    ours = first_order(bound(activation, **options))
    given_problem = problem.without_padding(constants.get("mask"))
    got = second_derivatives(ours, given_problem, constants, mode)
    assert_close(got, expected)


@pytest.mark.parametrize(
    ("activation", "options"),
    [
        ("tanh", {"return_sequences": False}),
        ("tanh", {"go_backwards": True}),
        ("gelu", {"return_sequences": False, "zero_output_for_mask": True}),
        ("log_softmax", {}),
    ],
    ids=str,
)
def test_second_order(activation, options):
    check_second_order(activation, **options)


# ---------------------------------------------------------------- everything, by chance


SHARED = ("optional", "unroll", "jit_compile", "checkpoint_every")


@pytest.mark.slow
@pytest.mark.parametrize("mode", [*MODES, "unknown", "unknown, xla"])
@examples(60)
@given(
    # Through 37 steps of sigmoid no gradient lasts.
    of_reference=st.sampled_from(
        [(s, "tanh") for s in SHAPES] + [("usual", f) for f in ACTIVATIONS]
    ),
    options=st.fixed_dictionaries(
        {
            "activation": st.sampled_from(KINDS),
            "masks": st.sampled_from([(), NOT_ALL, tuple(MASKS)]),
            "dropout": st.booleans(),
            "optional": st.sampled_from(["b", "", "bVc", "bV", "Vc"]),
            "return_sequences": st.booleans(),
            "go_backwards": st.booleans(),
            "zero_output_for_mask": st.booleans(),
            "unroll": st.sampled_from([False, 2]),
            "keep_states": st.booleans(),
            "jit_compile": st.booleans(),
            "checkpoint_every": st.sampled_from([None, 1, 3, 7, "sqrt"]),
        }
    ),
)
def test_options_by_chance(mode, of_reference, options):
    """The checks above of one set of options."""
    shared = {name: options[name] for name in SHARED}
    sequences = options["return_sequences"]
    if "b" in options["optional"]:  # without b no gradient may last
        check_reference(*of_reference, sequences, mode=mode, **shared)
    check_options(mode=mode, **options)
    if mode in MODES:
        del options["dropout"]
        options |= {"jit_compile": False, "masks": NOT_ALL}
        check_second_order(mode=mode, **options)


def check_blocks(**options):
    """Steps in blocks of 3, walked in Python; in blocks of 2, and half a one, in a loop."""
    with mock.patch.multiple(keras_bptt.engine.blocks, NUMBERS=1, FEWEST_STEPS=2):
        check_reference(**options)
    in_loop = {"within_xla": lambda: True, "COMPILED_SIZE": 2}
    with mock.patch.multiple(keras_bptt.engine.blocks, **in_loop):
        check_reference(**options)
