"""The linear scan against a loop in Python that TensorFlow differentiates.

Its gradient is made of the scan in the other direction, so derivatives of higher order test
both. The scan of the states goes through every order in `test_general_cells.py`.
"""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import FLOAT64, WAYS, few, relative_error, rng, without_graphs

from keras_bptt.cells.activations import resolve
from keras_bptt.cells.simple_rnn import SimpleRNN
from keras_bptt.engine.higher_orders import Known, Link, linear_scan

# Timesteps, batch and units: all different, so that no transpose hides.
T, B, H = 6, 3, 5


def tensors(*shapes, scale=1.0, seed=0):
    random = rng(seed)
    return [tf.constant(scale * random.normal(size=shape)) for shape in shapes]


def assert_same(got, expected):
    """Each derivative squares the one before: rounding grows to 1e-13 in the third."""
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

    def run(*args):
        with tf.GradientTape() as tape:
            tape.watch(args)
            if order == 1:
                value = tf.reduce_sum(weights * function(*args) ** 2)
            else:
                found = derivatives(function, order - 1, like)(*args)
                value = tf.add_n([tf.reduce_sum(g * g) for g in found])
        return tape.gradient(value, args)

    return run


def cell_of(activation):
    function = getattr(keras.activations, activation)
    return SimpleRNN(resolve(function, H, "float64"))


def loop_of_adjoints(reverse, activation, e, z, before, U, k):
    """The equation, with Jacobian matrices where an activation mixes units."""
    steps, pre = e.shape[0], z + tf.tensordot(before, U, 1)
    v = [None] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        v[t] = e[t]
        if 0 <= (source := t + 1 if reverse else t - 1) < steps:
            link = max(t, source)
            J = jacobian(activation, pre[link])
            if reverse:
                u = tf.einsum("bij,bi->bj", J, v[source])
                v[t] += k[link] * tf.matmul(u, U, transpose_b=True)
            else:
                u = tf.matmul(k[link] * v[source], U)
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


def scanned(reverse, activation, k, unroll=False):
    link = Link(cell_of(activation), reverse=reverse, unroll=unroll)

    def run(e, z, before, U):
        cell, noise = link.cell, (None, None)
        after, saved = cell.step((U, U), (z,), (before,), noise)
        point = cell.point(drive=None, before=None, after=after, saved=saved)
        known, weights_back = Known(noise, None, (k,)), cell.weights_back((U, U))
        return linear_scan(link, known, (e,), point, weights_back)[0]

    return run


def check_linear_scan(
    reverse, activation, order=1, mode="plain", steps=T, unroll=False
):
    """The values, and the derivatives of this order."""
    args, k = linear_problem(steps)
    ours, like = scanned(reverse, activation, k, unroll), (steps, B, H)

    def expected(*args):
        return loop_of_adjoints(reverse, activation, *args, k)

    with without_graphs():
        assert_same([ours(*args)], [expected(*args)])
    assert_same(
        WAYS[mode](derivatives(ours, order, like))(*args),
        derivatives(expected, order, like)(*args),
    )


DIRECTIONS, SLOPES = {"reverse": True, "forward": False}, ["tanh", "log_softmax"]
each_direction = pytest.mark.parametrize("direction", DIRECTIONS)
each_slope = pytest.mark.parametrize("activation", SLOPES)


@pytest.mark.parametrize(
    ("direction", "activation", "order", "steps", "unroll", "mode"),
    [
        *itertools.product(DIRECTIONS, SLOPES, [2], [T], [False], ["plain"]),
        *itertools.product(DIRECTIONS, ["tanh"], [3], [T], [False], ["plain"]),
        *itertools.product(DIRECTIONS, SLOPES, [1], [2], [True], ["plain"]),
        *itertools.product(DIRECTIONS, ["tanh"], [1], [2], [False], ["plain"]),
        ("forward", "tanh", 2, T, False, "graph"),
        ("reverse", "log_softmax", 2, T, False, "xla"),
        *few(
            itertools.product(
                DIRECTIONS, SLOPES, [3], [T], [False, True], ["eager", "graph", "xla"]
            ),
            lambda *_: False,
        ),
    ],
)
def test_linear_scan(direction, activation, order, steps, unroll, mode):
    check_linear_scan(DIRECTIONS[direction], activation, order, mode, steps, unroll)


@each_direction
@each_slope
@without_graphs()
def test_linear_scan_of_one_step(direction, activation):
    """Without a link v = e, and no other tensor has a gradient other than zero."""
    (e, *others), k = linear_problem(1)
    for unroll in (False, True):
        scan = scanned(DIRECTIONS[direction], activation, k, unroll)
        with tf.GradientTape() as tape:
            tape.watch([e, *others])
            v = scan(e, *others)
        (cotangent,) = tensors(e.shape, seed=3)
        d_e, *d_others = tape.gradient(v, [e, *others], cotangent)
        np.testing.assert_array_equal(v, e)
        np.testing.assert_array_equal(d_e, cotangent)
        for d, other in zip(d_others, others, strict=True):
            np.testing.assert_array_equal(d, tf.zeros_like(other))


@each_direction
@each_slope
@without_graphs()
def test_transposition(direction, activation):
    """<w, A e> = <A^T w, e>: what the whole gradient of the scan rests on."""
    (e, *others), k = linear_problem()
    (w,) = tensors(e.shape, seed=8)
    reverse = DIRECTIONS[direction]
    left = tf.reduce_sum(w * scanned(reverse, activation, k)(e, *others))
    right = tf.reduce_sum(scanned(not reverse, activation, k)(w, *others) * e)
    # Two sums of 10^2 products that do not cancel: the result is not small beside them.
    assert abs(left) > 1
    assert abs(left - right) <= 1e-12 * abs(left)
