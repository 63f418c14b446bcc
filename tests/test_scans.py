"""The two scans against loops in Python that TensorFlow differentiates.

Each scan's gradient is made of the other scan, so derivatives of higher order test both.
"""

import inspect
import itertools
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import WAYS, few, relative_error, rng, without_graphs
from mutation import assert_caught, copy_of_modules

import keras_bptt.cells.activations
import keras_bptt.engine.scans

# What a check takes: the modules, or copies of them of which one is broken.
MODULES = types.SimpleNamespace(
    activations=keras_bptt.activations, scans=keras_bptt.scans
)

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


def resolved(modules, activation):
    function = getattr(keras.activations, activation)
    return modules.activations.resolve(function, H, "float64")


# ---------------------------------------------------------------------- states


def loop_of_states(activation, z, U, h, mask=None, r=None):
    outputs = []
    for t in range(z.shape[0]):
        new = activation(z[t] + tf.matmul(h if r is None else r * h, U))
        h = new if mask is None else tf.where(mask[t], new, h)
        outputs.append(h)
    return tf.stack(outputs)


def check_states(
    modules, activation, order, mode="plain", options=True, steps=T, unroll=False
):
    """Derivatives of `states`; with `options` there is a mask and recurrent dropout."""
    # Third derivatives of log_softmax, whose slope is 1, explode with a larger scale.
    z, U, h_0 = tensors((steps, B, H), (H, H), (B, H), scale=0.3)
    constants = []
    if options:
        # Row by row: a masked start and a hole, a masked end, nothing but masked steps.
        rows = np.array([[0, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]])
        mask = tf.constant(rows.T[:steps, :, None] == 1)
        constants = [mask, tf.constant((rng(4).random((B, H)) < 0.6) / 0.6)]
    static = modules.scans.States(resolved(modules, activation), unroll)

    def ours(z, U, h_0):
        return modules.scans.states(static, z, U, h_0, *constants)

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
    check_states(MODULES, activation, order, options=False)


@each_kind
def test_masked_states(activation):
    check_states(MODULES, activation, 1)


@pytest.mark.parametrize(
    ("activation", "mode"),
    few(
        itertools.product(KINDS, WAYS),
        lambda activation, mode: (
            mode == "plain" or (activation, mode) == ("tanh", "xla")
        ),
    ),
)
def test_masked_states_second_order(activation, mode):
    check_states(MODULES, activation, 2, mode)


@pytest.mark.parametrize("activation", ["tanh", "gelu", "softmax"])
def test_states_third_order(activation):
    check_states(MODULES, activation, 3)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_states_third_order_in_graphs(mode):
    check_states(MODULES, "tanh", 3, mode)


@pytest.mark.slow
@each_kind
@pytest.mark.parametrize("options", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unroll"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_states_everywhere(activation, options, unroll, order, mode):
    check_states(MODULES, activation, order, mode, options, unroll=unroll)


@each_kind
@pytest.mark.parametrize("steps", [1, 2])
def test_states_of_few_steps(activation, steps):
    """A single step has no link but that to h_0."""
    check_states(MODULES, activation, 2, steps=steps)


@pytest.mark.parametrize(
    ("steps", "mode"),
    few(
        itertools.product([1, T], WAYS),
        lambda steps, mode: mode == "plain" or (steps, mode) == (T, "graph"),
    ),
)
def test_states_unrolled(steps, mode):
    check_states(MODULES, "tanh", 2, mode, steps=steps, unroll=True)


@without_graphs()
def test_states_at_masked_steps_with_nan():
    """Padding may hold NaN: it must reach neither the states nor any gradient."""
    mask = tf.constant([True, False, True, False])[:, None, None]
    z, U, h_0 = tensors((4, B, H), (H, H), (B, H))
    for activation in KINDS:
        static = keras_bptt.engine.scans.States(resolved(MODULES, activation))

        def run(z, U, h_0, static=static):
            return keras_bptt.engine.scans.states(static, z, U, h_0, mask)

        results = [
            derivatives(run, 2, (4, B, H))(filled, U, h_0)
            for filled in (z, tf.where(mask, z, np.nan))
        ]
        assert_same(*results)


# ---------------------------------------------------------------- the scan of adjoints


def loop_of_adjoints(options, e, S, P, Q, M, z=None):
    """The equation, with Jacobian matrices where an activation mixes units."""
    steps = e.shape[0]
    v = [None] * steps
    for t in reversed(range(steps)) if options.reverse else range(steps):
        v[t] = e[t]
        if 0 <= (before := t + 1 if options.reverse else t - 1) < steps:
            link = max(t, before)
            u = Q[link] * v[before]
            if options.activation is None:
                u = tf.matmul(u, M)
            else:
                J = jacobian_of_log_softmax(z[link])
                if options.transposed:
                    u = tf.einsum("bij,bj->bi", J, tf.matmul(u, M))
                else:
                    u = tf.matmul(tf.einsum("bij,bi->bj", J, u), M)
            v[t] += S[link] * v[before] + P[link] * u
    return tf.stack(v)


def jacobian_of_log_softmax(z):
    """dh_i/dz_j = [i = j] - softmax(z)_j: rows differ from columns."""
    return tf.eye(H, dtype=z.dtype) - tf.nn.softmax(z)[:, None, :]


def adjoint_problem(modules, reverse, transposed, mixing, steps=T, unroll=False):
    options = modules.scans.AdjointScan(
        reverse=reverse,
        activation=resolved(modules, "log_softmax") if mixing else None,
        transposed=transposed,
        unroll=unroll,
    )
    links = [(steps, B, H)] * (4 if mixing else 3)
    e, S, P, Q, *z, M = tensors((steps, B, H), *links, (H, H), scale=0.6)
    return options, [e, S, P, Q, M, *z]


def check_adjoint_scan(modules, *problem, order=1, mode="plain", steps=T, unroll=False):
    options, args = adjoint_problem(modules, *problem, steps=steps, unroll=unroll)

    def ours(*args):
        return modules.scans.adjoint_scan(options, *args)

    def expected(*args):
        return loop_of_adjoints(options, *args)

    with without_graphs():
        assert_same([ours(*args)], [expected(*args)])
    assert_same(
        WAYS[mode](derivatives(ours, order, (steps, B, H)))(*args),
        derivatives(expected, order, (steps, B, H))(*args),
    )


each_direction = pytest.mark.parametrize(
    "reverse", [True, False], ids=["reverse", "forward"]
)
LS = [(False, False), (False, True), (True, True)]
each_L = pytest.mark.parametrize(
    "transposed, mixing", LS, ids=["matrix", "Jacobian", "Jacobian_transposed"]
)


@each_direction
@each_L
def test_adjoint_scan(reverse, transposed, mixing):
    check_adjoint_scan(MODULES, reverse, transposed, mixing)


@pytest.mark.parametrize(
    ("transposed", "mixing", "reverse", "mode"),
    few(
        [(*L, *rest) for L in LS for rest in itertools.product([True, False], WAYS)],
        lambda transposed, mixing, reverse, mode: {
            "plain": True,
            "eager": False,
            "graph": not mixing and not reverse,
            "xla": transposed and reverse,
        }[mode],
    ),
)
def test_adjoint_scan_second_order(transposed, mixing, reverse, mode):
    check_adjoint_scan(MODULES, reverse, transposed, mixing, order=2, mode=mode)


@each_direction
def test_adjoint_scan_third_order(reverse):
    check_adjoint_scan(MODULES, reverse, False, False, order=3)


@pytest.mark.slow
@each_direction
@each_L
@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unroll"])
def test_adjoint_scan_third_order_everywhere(reverse, transposed, mixing, unroll, mode):
    check_adjoint_scan(
        MODULES, reverse, transposed, mixing, order=3, mode=mode, unroll=unroll
    )


@each_direction
@each_L
@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unroll"])
def test_adjoint_scan_of_few_steps(reverse, transposed, mixing, unroll):
    check_adjoint_scan(MODULES, reverse, transposed, mixing, steps=2, unroll=unroll)


@each_direction
@each_L
@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unroll"])
@without_graphs()
def test_adjoint_scan_of_one_step(reverse, transposed, mixing, unroll):
    """Without a link v = e, and no coefficient has a gradient other than zero."""
    options, (e, *others) = adjoint_problem(
        MODULES, reverse, transposed, mixing, steps=1, unroll=unroll
    )
    with tf.GradientTape() as tape:
        tape.watch([e, *others])
        v = keras_bptt.engine.scans.adjoint_scan(options, e, *others)
    (cotangent,) = tensors(e.shape, seed=3)
    d_e, *d_others = tape.gradient(v, [e, *others], cotangent)
    np.testing.assert_array_equal(v, e)
    np.testing.assert_array_equal(d_e, cotangent)
    for d, other in zip(d_others, others, strict=True):
        assert d.shape == other.shape
        assert not np.any(d)


def check_transposition(modules, reverse, transposed, mixing):
    """<w, A e> = <A^T w, e>: what the whole gradient of the scan rests on."""
    options, (e, S, P, Q, M, *z) = adjoint_problem(modules, reverse, transposed, mixing)
    (w,) = tensors(e.shape, seed=8)
    scan = modules.scans.adjoint_scan
    left = tf.reduce_sum(w * scan(options, e, S, P, Q, M, *z))
    back = scan(options.transpose(), w, S, Q, P, tf.transpose(M), *z)
    right = tf.reduce_sum(back * e)
    # Two sums of 10^2 products that do not cancel: the result is not small beside them.
    assert abs(left) > 1
    assert abs(left - right) <= 1e-12 * abs(left)


@each_direction
@each_L
@without_graphs()
def test_transposition(reverse, transposed, mixing):
    check_transposition(MODULES, reverse, transposed, mixing)


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
    static = keras_bptt.engine.scans.States(resolved(MODULES, activation))

    def run(z, U, h_0):
        return keras_bptt.engine.scans.states(static, z, U, h_0)

    d_z, d_U, d_h_0 = WAYS[mode](derivatives(run, 2, (T, 0, H)))(z, U, h_0)
    assert d_z.shape == z.shape
    assert d_h_0.shape == h_0.shape
    np.testing.assert_array_equal(d_U, tf.zeros_like(U))


# ---------------------------------------------------------------------- mutations


def check_everything(modules):
    for activation in ("tanh", "gelu", "log_softmax"):
        check_states(modules, activation, 1)
    for reverse, (transposed, mixing) in itertools.product(
        (True, False), [(False, False), (False, True), (True, True)]
    ):
        check_adjoint_scan(modules, reverse, transposed, mixing)
    check_states(modules, "tanh", 2)
    check_states(modules, "log_softmax", 2)


# Name, module, text and what it reads when broken.
MUTATIONS = [
    (
        "U not transposed",
        "scans",
        "U_T = tf.transpose(U)",
        "U_T = U",
    ),
    (
        "no way past masked steps",
        "scans",
        "S = tf.cast(~real, z.dtype)",
        "S = tf.zeros_like(z)",
    ),
    (
        "no r in the links",
        "scans",
        "r + tf.zeros_like(S)",
        "tf.ones_like(r) + tf.zeros_like(S)",
    ),
    (
        "slope of the step before",
        "scans",
        "Q = slope = tf.where(real, f.slope(pre, h), zero)",
        "slope = tf.where(real, f.slope(pre, h), zero); Q = tf.roll(slope, 1, 0)",
    ),
    (
        "slope at masked steps",
        "scans",
        "slope = tf.where(real, f.slope(pre, h), zero)",
        "slope = f.slope(pre, h)",
    ),
    (
        "Jacobian of the step before",
        "scans",
        "[pre]",
        "[tf.roll(pre, 1, 0)]",
    ),
    (
        "Jacobian at the input's share",
        "scans",
        "z + tf.tensordot(before, U, 1), zero",
        "z, zero",
    ),
    (
        "delta of mixing units at masked steps",
        "scans",
        "f.vjp(pre, tf.where(real, a, zero))",
        "f.vjp(pre, a)",
    ),
    ("delta without slope", "scans", "else slope * a", "else a"),
    (
        "dh_0 without r",
        "scans",
        "(back if r is None else r * back)",
        "back",
    ),
    (
        "dh_0 past a masked first step",
        "scans",
        "where(~real[0], a_1)",
        "tf.zeros_like(a_1)",
    ),
    (
        "dU of the states after",
        "scans",
        "sum_of_products(before, delta)",
        "sum_of_products(h, delta)",
    ),
    (
        "P and Q not exchanged",
        "scans",
        "w = adjoint_scan(transposed, c, S, Q, P, M_T, *z)",
        "w = adjoint_scan(transposed, c, S, P, Q, M_T, *z)",
    ),
    (
        "M not transposed",
        "scans",
        "transposed, M_T = options.transpose(), tf.transpose(M)",
        "transposed, M_T = options.transpose(), M",
    ),
    (
        "the same direction",
        "scans",
        "self, reverse=not self.reverse, transposed",
        "self, reverse=self.reverse, transposed",
    ),
    (
        "Jacobian not transposed",
        "scans",
        "reverse=not self.reverse, transposed=not self.transposed",
        "reverse=not self.reverse",
    ),
    (
        "S forgotten",
        "scans",
        "w = adjoint_scan(transposed, c, S, Q, P, M_T, *z)",
        "w = adjoint_scan(transposed, c, 0 * S, Q, P, M_T, *z)",
    ),
    (
        "source and end exchanged",
        "scans",
        "(shifted(w, 1), v) if options.reverse",
        "(w, shifted(v, 1)) if options.reverse",
    ),
    ("dP without L", "scans", "end * through", "end * u"),
    ("dQ without L", "scans", "source * back", "source * d_through"),
    ("dS of the ends", "scans", "end * source, end", "end * end, end"),
    ("dM without Q", "scans", "u, d_through = Q * source", "u, d_through = source"),
    ("dM without P", "scans", "Q * source, P * end", "Q * source, end"),
    (
        "dM transposed",
        "scans",
        "sum_of_products(u, d_through)",
        "sum_of_products(d_through, u)",
    ),
    (
        "the inner outputs",
        "explicit",
        "current = outer[0] if outer else outputs",
        "current = outputs",
    ),
    (
        "jvp as a vjp",
        "activations",
        "return vjp(lambda u: self.vjp(z, u), (tf.zeros_like(u),), (u,))[0]",
        "return self.vjp(z, u)",
    ),
]


def test_checks_pass_on_copies():
    """The control of the mutations: a copy that nothing is changed in passes."""
    with without_graphs():
        check_everything(copy_of_modules())


@pytest.mark.parametrize(
    "module, old, new", [m[1:] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS]
)
def test_mutation_is_caught(module, old, new):
    assert_caught(check_everything, module, old, new)


@pytest.mark.parametrize(
    "old, new",
    [
        ("w, S, Q, P,", "w, S, P, Q,"),
        ("options.transpose()", "options"),
        ("tf.transpose(M)", "M"),
    ],
)
@without_graphs()
def test_transposition_can_fail(old, new):
    """The identity with the wrong transpose: the check itself, broken."""
    source = inspect.getsource(check_transposition)
    assert source.count(old) == 1
    namespace = dict(globals())
    exec(source.replace(old, new), namespace)
    with pytest.raises(AssertionError):
        namespace["check_transposition"](MODULES, True, False, True)
