"""The two scans against loops in Python that TensorFlow differentiates.

Each scan's gradient is made of the other scan, so derivatives of higher order test both.
"""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import WAYS, few, relative_error, rng, without_graphs

from keras_bptt.cells.activations import resolve
from keras_bptt.cells.simple_rnn import SimpleRNN
from keras_bptt.engine.higher_orders import Known, Link, linear_scan, states
from keras_bptt.engine.options import Options

# Timesteps, batch and units: all different, so that no transpose hides.
T, B, H = 6, 3, 5

# The same sums in float64 in another order. Each derivative squares the one before and
# adds some 10^2 terms, so that rounding grows to 1e-13 in the third; a wrong term is an
# error near 1.
FLOAT64 = 1e-10

# A slope from h, a slope from z, a symmetric Jacobian and one that is not.
KINDS = ("tanh", "gelu", "softmax", "log_softmax")


def tensors(*shapes, scale=1.0, seed=0):
    random = rng(seed)
    return [tf.constant(scale * random.normal(size=shape)) for shape in shapes]


def assert_same(got, expected):
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape, i
        error = relative_error(a, b)
        assert error <= FLOAT64, f"argument {i}: relative error {error:.1e}"


def derivatives(function, order, like):
    """Gradients of a scalar of `function`, of a scalar of these gradients, and so on.

    The scalars are sums of squares, so that no derivative is zero or constant; the first
    has random weights, and so a random cotangent.
    """
    (weights,) = tensors(like, seed=9)

    def scalar(*args):
        return tf.reduce_sum(weights * function(*args) ** 2)

    def gradients(scalar):
        def run(*args):
            with tf.GradientTape() as tape:
                tape.watch(args)
                value = scalar(*args)
            return tape.gradient(value, args)

        return run

    def next_scalar(gradients):
        return lambda *args: tf.add_n([tf.reduce_sum(g * g) for g in gradients(*args)])

    for _ in range(order - 1):
        scalar = next_scalar(gradients(scalar))
    return gradients(scalar)


def cell_of(activation):
    function = getattr(keras.activations, activation)
    return SimpleRNN(resolve(function, H, "float64"))


def states_of(options, mask=None, r=None):
    """`states` of a plain RNN, as a function of z, U and h_0."""

    def run(z, U, h_0):
        # With the identity for a kernel the inputs are their share of z.
        known, W = Known((None, r), mask), tf.eye(U.shape[0], dtype=U.dtype)
        return states(options, known, z, (h_0,), (W, U))[0]

    return run


# ---------------------------------------------------------------------- states


def loop_of_states(activation, z, U, h, mask=None, r=None):
    outputs = []
    for t in range(z.shape[0]):
        new = activation(z[t] + tf.matmul(h if r is None else r * h, U))
        h = new if mask is None else tf.where(mask[t], new, h)
        outputs.append(h)
    return tf.stack(outputs)


def check_states(activation, order, mode="plain", options=True, steps=T, unroll=False):
    """Derivatives of `states`; with `options` there is a mask and recurrent dropout."""
    # Third derivatives of log_softmax, whose slope is 1, explode with a larger scale.
    z, U, h_0 = tensors((steps, B, H), (H, H), (B, H), scale=0.3)
    constants = []
    if options:
        # Row by row: a masked start and a hole, a masked end, nothing but masked steps.
        rows = np.array([[0, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]])
        mask = tf.constant(rows.T[:steps, :, None] == 1)
        constants = [mask, tf.constant((rng(4).random((B, H)) < 0.6) / 0.6)]
    ours = states_of(Options(cell_of(activation), unroll=unroll), *constants)

    def expected(z, U, h_0):
        function = getattr(keras.activations, activation)
        return loop_of_states(function, z, U, h_0, *constants)

    with without_graphs():
        assert_same([ours(z, U, h_0)], [expected(z, U, h_0)])
    assert_same(
        WAYS[mode](derivatives(ours, order, (steps, B, H)))(z, U, h_0),
        derivatives(expected, order, (steps, B, H))(z, U, h_0),
    )


each_kind = pytest.mark.parametrize("activation", KINDS)


@each_kind
@pytest.mark.parametrize("order", [1, 2])
def test_states(activation, order):
    check_states(activation, order, options=False)


@each_kind
def test_masked_states(activation):
    check_states(activation, 1)


@pytest.mark.parametrize(
    ("activation", "mode"),
    few(
        itertools.product(KINDS, WAYS),
        lambda activation, mode: mode == "plain",
    ),
)
def test_masked_states_second_order(activation, mode):
    check_states(activation, 2, mode)


@pytest.mark.parametrize("activation", ["tanh", "gelu", "softmax"])
def test_states_third_order(activation):
    check_states(activation, 3)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_states_third_order_in_graphs(mode):
    check_states("tanh", 3, mode)


@pytest.mark.slow
@each_kind
@pytest.mark.parametrize("options", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unroll"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_states_everywhere(activation, options, unroll, order, mode):
    check_states(activation, order, mode, options, unroll=unroll)


@each_kind
@pytest.mark.parametrize("steps", [1, 2])
def test_states_of_few_steps(activation, steps):
    """A single step has no link but that to h_0."""
    check_states(activation, 2, steps=steps)


@pytest.mark.parametrize(
    ("steps", "mode"),
    few(
        itertools.product([1, T], WAYS),
        lambda steps, mode: mode == "plain" or (steps, mode) == (T, "graph"),
    ),
)
def test_states_unrolled(steps, mode):
    check_states("tanh", 2, mode, steps=steps, unroll=True)


# ---------------------------------------------------------------- the linear scan


def loop_of_adjoints(reverse, activation, e, z, before, U, k=None):
    """The equation, with Jacobian matrices where an activation mixes units."""
    steps, pre = e.shape[0], z + tf.tensordot(before, U, 1)
    v = [None] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        v[t] = e[t]
        if 0 <= (source := t + 1 if reverse else t - 1) < steps:
            link = max(t, source)
            J = jacobian(activation, pre[link])
            factor = 1 if k is None else k[link]
            if reverse:
                u = tf.einsum("bij,bi->bj", J, v[source])
                v[t] += factor * tf.matmul(u, U, transpose_b=True)
            else:
                u = tf.matmul(factor * v[source], U)
                v[t] += tf.einsum("bij,bj->bi", J, u)
    return tf.stack(v)


def jacobian(activation, z):
    """dh_i/dz_j; of log_softmax [i = j] - softmax(z)_j: rows differ from columns."""
    if activation == "tanh":
        return tf.linalg.diag(1 - tf.tanh(z) ** 2)
    return tf.eye(H, dtype=z.dtype) - tf.nn.softmax(z)[:, None, :]


def linear_problem(steps=T):
    """e, z, the states before, U; the factors of the links, which have no gradient."""
    *given, k, U = tensors(*[(steps, B, H)] * 4, (H, H), scale=0.6)
    return [*given, U], k


def scanned(reverse, activation, k=None, unroll=False):
    link = Link(cell_of(activation), reverse=reverse, unroll=unroll)

    def run(e, z, before, U):
        cell, noise = link.cell, (None, None)
        after, saved = cell.step((U, U), (z,), (before,), noise)
        point = cell.point(drive=None, before=None, after=after, saved=saved)
        known = Known(noise, None, None if k is None else (k,))
        weights_back = cell.weights_back((U, U))
        return linear_scan(link, known, (e,), point, weights_back)[0]

    return run


def check_linear_scan(
    reverse, activation, order=1, mode="plain", steps=T, unroll=False
):
    args, k = linear_problem(steps)
    ours = scanned(reverse, activation, k, unroll)

    def expected(*args):
        return loop_of_adjoints(reverse, activation, *args, k)

    with without_graphs():
        assert_same([ours(*args)], [expected(*args)])
    assert_same(
        WAYS[mode](derivatives(ours, order, (steps, B, H)))(*args),
        derivatives(expected, order, (steps, B, H))(*args),
    )


each_direction = pytest.mark.parametrize(
    "reverse", [True, False], ids=["reverse", "forward"]
)
each_slope = pytest.mark.parametrize("activation", ["tanh", "log_softmax"])


@each_direction
@each_slope
def test_linear_scan(reverse, activation):
    check_linear_scan(reverse, activation)


@pytest.mark.parametrize(
    ("activation", "reverse", "mode"),
    few(
        itertools.product(["tanh", "log_softmax"], [True, False], WAYS),
        lambda activation, reverse, mode: {
            "plain": True,
            "eager": False,
            "graph": activation == "tanh" and not reverse,
            "xla": activation == "log_softmax" and reverse,
        }[mode],
    ),
)
def test_linear_scan_second_order(activation, reverse, mode):
    check_linear_scan(reverse, activation, order=2, mode=mode)


@each_direction
def test_linear_scan_third_order(reverse):
    check_linear_scan(reverse, "tanh", order=3)


@pytest.mark.slow
@each_direction
@each_slope
@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unroll"])
def test_linear_scan_third_order_everywhere(reverse, activation, unroll, mode):
    check_linear_scan(reverse, activation, order=3, mode=mode, unroll=unroll)


@each_direction
@each_slope
@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unroll"])
def test_linear_scan_of_few_steps(reverse, activation, unroll):
    check_linear_scan(reverse, activation, steps=2, unroll=unroll)


@each_direction
@each_slope
@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unroll"])
@without_graphs()
def test_linear_scan_of_one_step(reverse, activation, unroll):
    """Without a link v = e, and no other tensor has a gradient other than zero."""
    (e, *others), k = linear_problem(1)
    with tf.GradientTape() as tape:
        tape.watch([e, *others])
        v = scanned(reverse, activation, k, unroll)(e, *others)
    (cotangent,) = tensors(e.shape, seed=3)
    d_e, *d_others = tape.gradient(v, [e, *others], cotangent)
    np.testing.assert_array_equal(v, e)
    np.testing.assert_array_equal(d_e, cotangent)
    for d, other in zip(d_others, others, strict=True):
        assert d.shape == other.shape
        assert not np.any(d)


@each_direction
@each_slope
@without_graphs()
def test_transposition(reverse, activation):
    """<w, A e> = <A^T w, e>: what the whole gradient of the scan rests on."""
    (e, *others), k = linear_problem()
    (w,) = tensors(e.shape, seed=8)
    left = tf.reduce_sum(w * scanned(reverse, activation, k)(e, *others))
    right = tf.reduce_sum(scanned(not reverse, activation, k)(w, *others) * e)
    # Two sums of 10^2 products that do not cancel: the result is not small beside them.
    assert abs(left) > 1
    assert abs(left - right) <= 1e-12 * abs(left)


# ---------------------------------------------------------------- sizes of zero


@pytest.mark.parametrize(
    ("activation", "mode"),
    few(
        itertools.product(["tanh", "log_softmax"], WAYS),
        lambda activation, mode: (
            mode == "plain" or (activation, mode) == ("tanh", "xla")
        ),
    ),
)
def test_batch_of_none(activation, mode):
    z, U, h_0 = tensors((T, 0, H), (H, H), (0, H))
    run = states_of(Options(cell_of(activation)))
    d_z, d_U, d_h_0 = WAYS[mode](derivatives(run, 2, (T, 0, H)))(z, U, h_0)
    assert d_z.shape == z.shape
    assert d_h_0.shape == h_0.shape
    np.testing.assert_array_equal(d_U, tf.zeros_like(U))
