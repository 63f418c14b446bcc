"""Derivatives of truncated gradients against automatic differentiation of each window.

So are first derivatives with activations that the brute force of `test_windows.py` does not
have. An example with a mask is what its real steps are alone.
"""

import functools

import numpy as np
import pytest
import tensorflow as tf
from helpers import relative_error, without_graphs
from test_recurrence import (
    activation_of,
    assert_close,
    bound,
    evaluate,
    first_order,
    second_derivatives,
    tensors_of,
)
from test_windows import ARGUMENTS, T, constants_of, problem_of

# ------------------------------------------------------------- the recurrence, for a tape


def gated(h, factor):
    """h, whose gradient is multiplied by a factor."""
    number = tf.stop_gradient(h)
    return number + factor * (h - number)


def states_of_windows(window, f, arguments, constants):
    """For each block the states h_t of its window, by t, and the one before them.

    A window that does not begin with the sequence begins at a constant.
    """
    steps, stride = window
    x, W, U, h_0, b = map(arguments.get, ARGUMENTS[:5])
    r, factors = constants.get("r"), constants.get("factors")

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


def by_windows(window, activation="tanh", sequences=True):
    """The recurrence, each block of which is computed by its own window."""
    f = activation_of(activation)

    def function(arguments, constants):
        if "d" in constants:
            x = constants["d"][:, None] * arguments["x"]
            arguments = arguments | {"x": x}
        shown = {}
        for block, h in states_of_windows(window, f, arguments, constants):
            shown |= {t: h[t] for t in block}
        last = shown[max(shown)]
        y = tf.stack([shown[t] for t in sorted(shown)], 1) if sequences else last
        if "V" in arguments:
            y = tf.tensordot(y, arguments["V"], 1)
        return (y + arguments["c"] if "c" in arguments else y), last

    return function


def clipped(window, most):
    """Outputs, which are none here, and gradients clipped by scales that are constants."""

    def gradients(tensors, constants):
        x, W, U, h_0, b = map(tensors.get, ARGUMENTS[:5])
        dy, ds, factors = tensors["dy"], tensors["ds"], constants.get("factors")
        last = x.shape[1] - 1
        d_x = [tf.zeros_like(x[:, 0])] * (last + 1)
        d_W, d_U, d_h_0, d_b = map(tf.zeros_like, (W, U, h_0, b))
        for block, h in states_of_windows(window, tf.tanh, tensors, constants):
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
        found = tf.stack(d_x, 1), d_W, d_U, d_h_0, d_b
        return None, dict(zip(ARGUMENTS, found, strict=False))

    return gradients


def row_by_row(of_window, window):
    """The gradients with a mask: those that the real steps of each example have alone.

    Args:
        of_window: a function of a window; it returns gradients without a mask.
    """

    def gradients(tensors, constants):
        constants = dict(constants)
        total = {n: tf.zeros_like(t) for n, t in tensors.items() if n in ARGUMENTS}
        for row, real in enumerate(constants.pop("mask").numpy()):
            one, places, N = slice(row, row + 1), np.flatnonzero(real), real.sum()
            if not N:
                total["h_0"] += only(row, tensors["ds"][row], total["h_0"])
                continue
            # An output at a masked step is that of the real one before; else it is hidden.
            owner = np.where(np.cumsum(real), np.cumsum(real) - 1, N)
            dy = tf.math.unsorted_segment_sum(tensors["dy"][row], owner, N + 1)[
                None, :N
            ]
            alone = tensors | {n: tensors[n][one] for n in ("h_0", "ds")}
            alone |= {"x": tf.gather(tensors["x"][one], places, axis=1), "dy": dy}
            known = {name: constant[one] for name, constant in constants.items()}
            if "factors" in known:
                known["factors"] = tf.gather(known["factors"], places, axis=1)
            # Where one window holds all there is no other.
            own = window if window[0] < N else (N, N)
            _, d = of_window(own)(alone, known)
            steps = tf.scatter_nd(places[:, None], d["x"][0], tensors["x"].shape[1:])
            d |= {"x": only(row, steps, total["x"])}
            d |= {"h_0": only(row, d["h_0"][0], total["h_0"])}
            total = {name: total[name] + d[name] for name in total}
        if "c" in total:  # which is in outputs that are hidden too
            total["c"] = tf.reduce_sum(tensors["dy"], (0, 1))
        return None, total

    return gradients


def only(row, t, like):
    """Zeros, but for a row."""
    return tf.scatter_nd([[row]], t[None], like.shape)


# ------------------------------------------------------------------------------- checks


def expected_gradients(window, names, most, activation="tanh", sequences=True):
    """The gradients as a function of all tensors, for a tape to differentiate."""

    def of_window(window):
        if most is not None:
            return clipped(window, most)
        # Of the last output h_0 has none, where the window does not begin there.
        return first_order(by_windows(window, activation, sequences), "zero")

    # A window that holds all steps is the only one.
    window = (T, T) if window is None or window[0] >= T else window
    return row_by_row(of_window, window) if "mask" in names else of_window(window)


# Once each: several checks are compared with the same numbers.
@functools.cache
def expected_second(window, mask, names, most, activation, sequences, optional):
    constants = constants_of(mask, names)
    gradients = expected_gradients(window, constants, most, activation, sequences)
    problem = problem_of(sequences, optional)
    return second_derivatives(gradients, problem, constants)


def check_second_order(
    window,
    mask="no mask",
    names=(),
    most=None,
    *,
    activation="tanh",
    sequences=True,
    optional="b",
    mode="plain",
    **options,
):
    """The derivatives of <gradients, random>.

    Of clipped gradients those for fixed cotangents: one that depends on y meets the clipped
    gradient of y.
    """
    given = window, mask, tuple(names), most, activation, sequences, optional
    expected = expected_second(*given)
    constants = constants_of(mask, names)
    problem = problem_of(sequences, optional).without_padding(constants.get("mask"))
    options |= {"return_sequences": sequences, "adjoint_clipnorm": most}
    ours = first_order(bound(activation, window=window, **options))
    got = second_derivatives(ours, problem, constants, mode)
    if most is not None:
        got, expected = ({n: d[n] for n in ARGUMENTS[:5]} for d in (got, expected))
    assert_close(got, expected)


def check_activation(window, activation, mask, **options):
    """First derivatives, with dropout."""
    constants, problem = constants_of(mask, ("d", "r")), problem_of()
    gradients = expected_gradients(window, constants, None, activation)
    with without_graphs():
        _, expected = gradients(*tensors_of(problem, constants))
    function = bound(activation, window=window, return_sequences=True, **options)
    got = evaluate(function, problem.without_padding(constants.get("mask")), constants)
    del got["y"], got["state"]  # of which `test_recurrence.py` has the activations
    assert_close(got, {f"d_{name}": d.numpy() for name, d in expected.items()})


@pytest.mark.parametrize(
    ("window", "activation", "every"),
    [
        ((4, 4), "gelu", None),
        ((5, 2), "softmax", None),
        ((3, 1), "tanh", 4),
        ((4, 4), "gelu", 4),
        ((5, 2), "softmax", 4),
    ],
    ids=str,
)
def test_other_activations_and_dropout(window, activation, every):
    """A slope from h, a slope from z, and a Jacobian that is not symmetric."""
    for mask in ("no mask", "holes"):
        check_activation(window, activation, mask, checkpoint_every=every)


SECOND_ORDER = [(4, 4), (3, 1), (5, 2)]


@pytest.mark.parametrize("window", SECOND_ORDER, ids=str)
def test_second_order(window):
    """The same policy in every scan; for chunks a tf.stop_gradient between them."""
    check_second_order(window)
    given = "no mask", (), None, "tanh", True, "b"
    truncated, whole = (expected_second(w, *given) for w in (window, None))
    assert relative_error(whole["W"], truncated["W"]) > 0.01, "it changed nothing"


@pytest.mark.parametrize(
    ("window", "mask", "options"),
    [
        ((5, 2), "no mask", {"sequences": False, "mode": "eager"}),
        ((5, 2), "no mask", {"sequences": False, "checkpoint_every": 4}),
        ((5, 2), "no mask", {"checkpoint_every": 4}),
        ((5, 2), "holes", {}),
        (None, "no mask", {"most": 0.7}),
        ((5, 2), "no mask", {"most": 0.7}),
        ((5, 2), "right", {"most": 0.7}),
        (None, "no mask", {"names": ("factors",)}),
        (None, "holes", {"names": ("factors",)}),
        (None, "no mask", {"names": ("factors",), "most": 0.7}),
    ],
    ids=str,
)
def test_second_order_with_options(window, mask, options):
    check_second_order(window, mask, **options)


@pytest.mark.slow
@pytest.mark.parametrize("most", [None, 0.7])
@pytest.mark.parametrize("mode", ["plain", "eager", "graph"])
@pytest.mark.parametrize("mask", ["no mask", "left", "right", "holes"])
@pytest.mark.parametrize("window", [*SECOND_ORDER, (12, 5)], ids=str)
def test_second_order_everywhere(window, mask, mode, most):
    check_second_order(window, mask, most=most, mode=mode)
    check_second_order(window, mask, most=most, mode=mode, checkpoint_every=4)


@without_graphs()
def test_factors_of_chunks_are_chunks():
    """Two ways to the same paths."""
    problem, factors = problem_of(), np.ones((len(problem_of().x), T))
    factors[:, [1, 5]] = 0  # T = 9 in chunks of 4: 0 | 1 2 3 4 | 5 6 7 8
    by_factors = bound(return_sequences=True), {"factors": factors}
    by_window = bound(window=(4, 4), return_sequences=True), {}

    for order in (
        lambda f, constants: evaluate(f, problem, constants),
        lambda f, constants: second_derivatives(first_order(f), problem, constants),
    ):
        assert_close(order(*by_window), order(*by_factors))
