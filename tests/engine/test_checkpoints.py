"""The recurrence with checkpoints: a block of states is computed again on the way back.

Gradients are compared with those of the same call that keeps every state, once with the
NumPy reference, and bit for bit where both walk the same blocks. `test_breaks.py` shows
that the checks can fail, `test_checkpoint_memory.py` has what is kept,
`test_sliding_windows.py` checkpoints with a truncation.
"""

import functools
import itertools
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import FLOAT64, few, in_modes, relative_error, rng
from plain_rnn import MODULES
from test_recurrence import (
    MASKS,
    Problem,
    assert_close,
    float32_tolerance,
    lasting_problem,
    random_problem,
    reference_results,
    second_derivatives,
)
from test_recurrence import evaluate as evaluate_known

import keras_bptt.cells.activations
import keras_bptt.engine.backward
import keras_bptt.engine.blocks
import keras_bptt.engine.parts
import keras_bptt.engine.recurrence

# Batch, timesteps, features and units: all different. A row for each kind of mask.
ROWS = ("none", "left", "right", "holes", "all")
SHAPE = B, T, D, H = len(ROWS), 6, 4, 3
# More blocks than steps, whole and broken blocks, one block, and more than there are steps.
EVERY = [1, 2, 3, T - 1, T, T + 5, "sqrt"]


def some(chosen, *axes):
    """The chosen cases; and all others of the axes, which take long, together."""
    others = (case for case in itertools.product(*axes) if case not in chosen)
    return [*chosen, *(pytest.param(*case, marks=pytest.mark.slow) for case in others)]


def sine(z):
    """Elementwise, of a slope that h does not tell."""
    return tf.sin(z) + 0.1 * z


OPTIONS = {
    "sequences": {"return_sequences": True},
    "last": {},
    "backwards": {"return_sequences": True, "go_backwards": True},
    "zero": {"return_sequences": True, "zero_output_for_mask": True},
    "last, backwards, zero": {"go_backwards": True, "zero_output_for_mask": True},
    "clipped": {"return_sequences": True, "adjoint_clipnorm": 0.7},
    "last, clipped": {"adjoint_clipnorm": 0.7},
    "unrolled": {"return_sequences": True, "unroll": True},
    "two steps an iteration": {"unroll": 2},
    "not kept": {"return_sequences": True, "keep_states": False},
    "last, not kept": {"keep_states": False},
    "no bias": {"return_sequences": True, "use_bias": False},
}
# What has no gradient: a mask, dropout factors d and r, factors of a truncation.
CONSTANTS = {
    "": (),
    "mask": ("mask",),
    "dropout": ("d", "r"),
    "factors": ("factors",),
    "all": ("mask", "d", "r", "factors"),
}
ACTIVATIONS = {
    "tanh": keras.activations.tanh,
    "sine": sine,
    "gelu": keras.activations.gelu,
    "sigmoid": keras.activations.sigmoid,
    "softmax": keras.activations.softmax,
}


def bound(
    activation="tanh",
    constants=None,
    modules=MODULES,
    dtype="float64",
    units=H,
    **options,
):
    """`recurrence` as a function of the differentiable arguments alone."""
    f = modules.activations.resolve(ACTIVATIONS[activation], units, dtype)
    options = modules.recurrence.Recurrence(f, **options)
    constants = modules.recurrence.Constants(**(constants or {}))

    def function(*arguments):
        return modules.recurrence.recurrence(options, constants, *arguments)

    return function


def constants_of(names, steps=T, dtype="float64"):
    random = rng(5)
    mask = random.random((B, steps)) < 0.6
    if steps == T:
        mask = np.array([MASKS[row] for row in ROWS], bool)
    known = {
        "mask": mask,
        "d": random.choice([0.0, 1.25], size=(B, D)),
        "r": random.choice([0.0, 1.25], size=(B, H)),
        "factors": random.choice([0.9, 1.25], size=(B, steps)),  # none ends a path
    }
    return {
        name: tf.constant(array, tf.bool if name == "mask" else dtype)
        for name, array in known.items()
        if name in names
    }


def evaluate(function, problem, mode="plain", use_bias=True, dtype="float64"):
    """`test_recurrence.evaluate`; "unknown": in a graph of any batch and length."""
    if mode != "unknown":
        return evaluate_known(function, problem, mode, use_bias, dtype)

    arrays = [np.asarray(a, dtype) for a in problem]
    specs = [tf.TensorSpec(a.shape, dtype) for a in arrays]
    for i in (0, 5):
        if arrays[i].ndim == 3:
            specs[i] = tf.TensorSpec([None, None, arrays[i].shape[2]], dtype)

    @tf.function(input_signature=specs, autograph=False)
    def run(*tensors):
        arguments = tensors[: 5 if use_bias else 4]
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            outputs = function(*arguments)
        return (*outputs, *tape.gradient(outputs, arguments, tensors[5:]))

    names = ("y", "state", *(f"d_{name}" for name in Problem._fields))
    results = run(*map(tf.constant, arrays))
    return {name: r.numpy() for name, r in zip(names, results, strict=False)}


def results(
    every,
    activation="tanh",
    names=(),
    mode="plain",
    modules=MODULES,
    dtype="float64",
    shape=SHAPE,
    **options,
):
    """Outputs and gradients; what a masked step holds is NaN."""
    use_bias = options.pop("use_bias", True)
    problem = random_problem(shape, 1.2, options.get("return_sequences", False))
    constants = constants_of(names, shape[1], dtype)
    constants = {name: t[: shape[0]] for name, t in constants.items()}
    if "mask" in constants:
        real = constants["mask"].numpy()[..., None]
        problem = problem._replace(x=np.where(real, problem.x, np.nan))
    options |= {"units": shape[3], "checkpoint_every": every}
    function = bound(activation, constants, modules, dtype, **options)
    return evaluate(function, problem, mode, use_bias, dtype)


@functools.cache
def stored(activation, names, shape, options):
    """Of all states kept, in eager mode: what others are compared with."""
    return results(None, activation, names, shape=shape, **dict(options))


def check(
    every,
    activation="tanh",
    names=(),
    mode="plain",
    tolerance=FLOAT64,
    *,
    modules=MODULES,
    dtype="float64",
    shape=SHAPE,
    **options,
):
    """With checkpoints as without."""
    got = results(every, activation, names, mode, modules, dtype, shape, **options)
    plain = {k: v for k, v in options.items() if k not in ("jit_compile", "unroll")}
    want = stored(activation, tuple(names), shape, tuple(plain.items()))
    assert np.max(np.abs(want["d_h_0"])) > 1e-3, "vanished: nothing was tested"
    assert_close(got, want, tolerance)


# ------------------------------------------------------------- against all states kept


@pytest.mark.parametrize("every", EVERY, ids=str)
@pytest.mark.parametrize("option", ["sequences", "last"])
def test_every_so_many_steps(every, option):
    check(every, names=CONSTANTS["all"], **OPTIONS[option])


@pytest.mark.parametrize(
    ("option", "constants", "activation"),
    few(
        itertools.product(OPTIONS, CONSTANTS, ["tanh", "sine", "gelu", "softmax"]),
        lambda option, constants, activation: (
            activation == "tanh"
            if constants == "all"
            else (option, constants) == ("sequences", "mask")
        ),
    ),
)
def test_options(option, constants, activation):
    check(2, activation, CONSTANTS[constants], **OPTIONS[option])
    if activation == "tanh" and "clipped" in option:
        plain = {k: v for k, v in OPTIONS[option].items() if k != "adjoint_clipnorm"}
        free = stored(activation, CONSTANTS[constants], SHAPE, tuple(plain.items()))
        clipped = results(2, activation, CONSTANTS[constants], **OPTIONS[option])
        assert relative_error(clipped["d_U"], free["d_U"]) > 0.01, "nothing was clipped"


@pytest.mark.parametrize(
    ("every", "option", "activation", "constants", "mode"),
    some(
        [
            ("sqrt", "last", "tanh", "", "xla"),
            (2, "last, clipped", "softmax", "all", "unknown"),
            ("sqrt", "sequences", "sine", "all", "unknown"),
            pytest.param(
                *(T + 5, "last, not kept", "tanh", "", "unknown"),
                marks=pytest.mark.slow,
            ),
        ],
        [2, T - 1, "sqrt"],
        ["sequences", "backwards", "last, clipped"],
        ["tanh", "sine"],
        ["", "all"],
        ["graph", "xla", "unknown"],
    ),
)
def test_in_graphs(every, option, activation, constants, mode):
    options = {"jit_compile": mode == "unknown", **OPTIONS[option]}
    check(every, activation, CONSTANTS[constants], mode, **options)


@pytest.mark.parametrize(
    ("every", "option", "constants"),
    some(
        [
            (4, "sequences", "all"),
            pytest.param("sqrt", "last", "", marks=pytest.mark.slow),
        ],
        [2, "sqrt"],
        ["sequences", "last", "clipped"],
        ["", "mask", "all"],
    ),
)
def test_compiled_in_a_plain_graph(every, option, constants):
    """As `fit` runs it: the passes compiled, the graph around them not."""
    options = {"jit_compile": True, **OPTIONS[option]}
    check(every, "tanh", CONSTANTS[constants], "graph", **options)


SHAPES = {
    "one_step": (2, 1, 4, 3),
    "two_steps": (4, 2, 5, 3),
    "one_example": (1, 5, 4, 3),
    "one_unit": (2, 5, 4, 1),
    "many blocks": (2, 37, 4, 3),
    "no_example": (0, 5, 4, 3),
}


@pytest.mark.parametrize(
    ("name", "every", "mode"),
    few(
        itertools.product(
            SHAPES, [1, 2, 7, "sqrt"], ["plain", "eager", "graph", "xla", "unknown"]
        ),
        lambda name, every, mode: (
            mode == "plain"
            or (name, every, mode)
            in [
                ("one_step", 2, "unknown"),
                ("many blocks", 2, "eager"),
            ]
        ),
    ),
)
def test_sizes(name, every, mode):
    shape = SHAPES[name]
    options = {"return_sequences": True}
    got = results(every, "tanh", (), mode, shape=shape, **options)
    want = stored("tanh", (), shape, tuple(options.items()))
    assert_close(got, want, FLOAT64)


@in_modes("eager")
def test_float32(mode):
    tolerance = float32_tolerance(SHAPE)
    options = {"return_sequences": True}
    check(2, "tanh", CONSTANTS["all"], mode, tolerance, dtype="float32", **options)


@pytest.mark.parametrize(
    ("every", "sequences", "mode"),
    few(
        itertools.product([2, "sqrt"], [True, False], ["plain", "eager", "graph"]),
        lambda every, sequences, mode: (
            mode == "plain" or (every, sequences, mode) == (2, True, "graph")
        ),
    ),
)
def test_equals_reference(every, sequences, mode):
    """The third rung of the ladder itself."""
    shape = 3, 7, 4, 5
    problem = lasting_problem(shape, "tanh", sequences)
    options = {"return_sequences": sequences, "checkpoint_every": every}
    got = evaluate(bound(units=5, **options), problem, mode)
    assert_close(got, reference_results(problem, "tanh", sequences, True), FLOAT64)


@pytest.mark.parametrize(
    ("constants", "option"),
    few(
        itertools.product(["", "all"], ["sequences", "last"]),
        lambda constants, option: (constants, option) == ("all", "sequences"),
    ),
)
def test_parts_of_the_batch(monkeypatch, constants, option):
    """Each with checkpoints of its own."""
    monkeypatch.setattr(keras_bptt.engine.parts, "cores", lambda: 2)
    monkeypatch.setattr(keras_bptt.engine.parts, "LEAST_WORK", 1)
    monkeypatch.setattr(keras_bptt.engine.parts, "FEWEST_EXAMPLES", 1)
    parts = []
    original = keras_bptt.engine.backward.gradients_of_part
    monkeypatch.setattr(
        keras_bptt.engine.backward,
        "gradients_of_part",
        lambda options, *args: (
            parts.append(*args[2]) or original(options, *args)
            if options.checkpoint_every
            else original(options, *args)
        ),
    )
    options = {"jit_compile": True, **OPTIONS[option]}
    check(2, "tanh", CONSTANTS[constants], "graph", **options)
    assert [kept.shape for kept in parts] == [
        (T // 2, B // 2, H),
        (T // 2, B - B // 2, H),
    ]


def test_roots_of_several_lengths_in_eager_mode():
    """One graph for every length must not round a root that the other pass does not."""
    function = bound(checkpoint_every="sqrt")
    for steps in (9, 26):
        # The forward pass alone, of another length.
        function(*(tf.constant(a) for a in random_problem((B, 7, D, H))[:5]))
        problem = random_problem((B, steps, D, H), 1.0, False)
        got = evaluate(function, problem, "eager")
        assert_close(got, evaluate(bound(), problem), FLOAT64)


def test_steps_that_pad_a_block_in_xla():
    """Rows of four numbers, a step too few: XLA's own padding is not to be trusted."""
    shape = 3, 8, 4, 5
    problem = random_problem(shape, 1.0, False)
    want = evaluate(bound(units=5), problem)
    got = evaluate(bound(units=5, checkpoint_every=3), problem, "xla")
    assert_close(got, want, FLOAT64)
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


# ------------------------------------------------------------------------ bit for bit

LONG = (B, 12, D, H)
# Blocks of three steps where all states are kept, in XLA and in a loop of four.
SAME = [
    ("graph", 3, "last", False),
    ("graph", 3, "last", True),
    ("graph", 3, "last, clipped", False),
    ("graph", 12, "unrolled", False),
    ("xla", 4, "sequences", False),
    ("xla", 4, "last", False),
    ("unknown", 4, "last", False),
    ("unknown", 4, "last", True),
    ("unknown", 4, "sequences", False),
    ("unknown", 4, "sequences", True),
    ("unknown", 4, "backwards", True),
]


@pytest.mark.parametrize(
    ("case", "constants"),
    few(
        itertools.product(SAME, ["", "all"]),
        lambda *case: case == (SAME[9], ""),
    ),
)
def test_same_blocks_give_the_same_bits(case, constants):
    mode, every, option, jit_compile = case
    options = {"shape": LONG, "jit_compile": jit_compile, **OPTIONS[option]}
    got, want = (
        results(c, "tanh", CONSTANTS[constants], mode, **options) for c in (every, None)
    )
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


# ------------------------------------------------------------------------ second order


@pytest.mark.parametrize(
    ("option", "mode"),
    few(
        itertools.product(["sequences", "last"], ["plain", "eager", "graph"]),
        lambda option, mode: mode == "plain",
    ),
)
def test_second_derivatives(option, mode):
    problem = random_problem(SHAPE, 1.2, option == "sequences")
    constants = constants_of(CONSTANTS["all"])

    def derivatives(every, mode):
        function = bound(constants=constants, checkpoint_every=every, **OPTIONS[option])
        return second_derivatives(function, problem, mode)

    assert_close(derivatives(2, mode), derivatives(None, "plain"), FLOAT64)


@pytest.mark.parametrize(
    ("every", "option"),
    few(
        itertools.product([2, "sqrt"], ["sequences", "last"]),
        lambda every, option: (every, option) == ("sqrt", "sequences"),
    ),
)
def test_jacobian(every, option):
    """One vectorised backward pass for all outputs."""
    x, *others = (tf.constant(a) for a in random_problem((2, 4, 3, H))[:5])

    def jacobian(every):
        function = bound(checkpoint_every=every, **OPTIONS[option])
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, _ = function(x, *others)
        return tape.jacobian(y, x).numpy()

    want = jacobian(None)
    assert np.max(np.abs(want)) > 0.1
    assert relative_error(jacobian(every), want) < FLOAT64


# -------------------------------------------------- checks that test_breaks.py runs


def check_again(modules):
    """Blocks walked in Python."""
    for activation, option in (("tanh", "last"), ("gelu", "backwards")):
        check(4, activation, ("mask", "d", "r"), modules=modules, **OPTIONS[option])
    check(2, "tanh", modules=modules, **OPTIONS["no bias"])


def check_loop(modules):
    """Blocks walked in a loop, the last of them a shorter one."""
    with mock.patch.object(modules.blocks, "MOST", 1):
        check(4, "tanh", ("mask", "r"), modules=modules, **OPTIONS["last"])
        check(4, "tanh", modules=modules, **OPTIONS["sequences"])


CHECKS = {"again": check_again, "in a loop": check_loop}
