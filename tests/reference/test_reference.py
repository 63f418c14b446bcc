"""The first two rungs of the gradient ladder.

Rung 1: closed forms, exact. Rung 2: the reference against central differences. Every
rung above compares with the reference, so here each check is also shown able to fail.
"""

import functools
import inspect
from fractions import Fraction

import numpy as np
import pytest

from keras_bptt import reference

# All different, so that no transpose hides behind a shape that fits by accident.
B, T, D, H, O = 3, 5, 4, 6, 2  # noqa: E741

# Central differences with a step of 1e-5 are right to 1e-10 or so, for rounding and for
# curvature; here to 1e-9. A wrong term is an error near 1.
NUMERIC = 1e-8
# The same sums in two orders: some 10^3 products of numbers near 1, in float64.
ROUNDING = 1e-12

HIDDEN = {
    "x": "d_inputs",
    "W": "d_kernel",
    "U": "d_recurrent_kernel",
    "b": "d_bias",
    "h_0": "d_initial_state",
}
WHOLE = HIDDEN | {"V": "d_output_kernel", "c": "d_output_bias"}
ACTIVATIONS = sorted(reference.ACTIVATIONS)
OUTPUT_ACTIVATIONS = sorted(reference.OUTPUT_ACTIVATIONS)
LOSSES = ("squared_error", "inner_product", "categorical_crossentropy")


def random_arrays(seed=0):
    """Inputs, targets, weights and cotangents; U asymmetric, its spectral radius 1."""
    rng = np.random.default_rng(seed)
    U = rng.normal(size=(H, H))
    return {
        "x": rng.normal(size=(B, T, D)),
        "W": rng.normal(size=(D, H)) / np.sqrt(D),
        "U": U / np.max(np.abs(np.linalg.eigvals(U))),
        "b": 0.3 * rng.normal(size=H),
        "h_0": rng.normal(size=(B, H)),
        "V": rng.normal(size=(H, O)),
        "c": rng.normal(size=O),
        "y": rng.normal(size=(B, T, O)),
        "e": rng.normal(size=(B, T, H)),
    }


def hidden_problem(seed=0):
    arrays = random_arrays(seed)
    return {name: arrays[name] for name in (*HIDDEN, "e")}


def states(problem, f):
    """h_1 ... h_T, and z: of `forward`, under an output layer that nobody asks."""
    p = problem
    network = reference.Network(
        p["W"], p["U"], p["b"], np.ones((H, 1)), np.ones(1), p["h_0"], f=f
    )
    run = reference.forward(p["x"], np.zeros((B, T, 1)), network)
    return run.h, run.z


def whole(function, problem, f="tanh", g="linear", loss="squared_error"):
    weights = [problem[name] for name in ("W", "U", "b", "V", "c", "h_0")]
    network = reference.Network(*weights, f=f, g=g, loss=loss)
    return function(problem["x"], problem["y"], network)


def relative_error(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def check_gradients(scalar, problem, result, names):
    """Compare each gradient in `result` with central differences of `scalar`."""
    for argument, name in names.items():
        numeric = reference.central_differences(
            lambda value, argument=argument: scalar({**problem, argument: value}),
            problem[argument],
        )
        assert getattr(result, name).shape == problem[argument].shape
        # A gradient that is nearly zero would agree with anything.
        assert np.linalg.norm(numeric) > 1e-3, name
        error = relative_error(getattr(result, name), numeric)
        assert error < NUMERIC, f"{name}: relative error {error:.1e}"


def check_hidden(hidden_gradients, f="tanh", seed=0):
    problem = hidden_problem(seed)
    check_gradients(
        lambda p: np.sum(p["e"] * states(p, f)[0]),
        problem,
        hidden_gradients(f=f, **problem),
        HIDDEN,
    )


def check_whole(gradients, f="tanh", g="linear", loss="squared_error", seed=0):
    problem = random_arrays(seed)
    check_gradients(
        lambda p: whole(reference.forward, p, f, g, loss).loss,
        problem,
        whole(gradients, problem, f, g, loss),
        WHOLE,
    )


# Rung 1: closed forms. Fractions are exact; so is float64 on these dyadic numbers.


def scalar_run(steps, U=Fraction(-3, 4), W=Fraction(1, 2), h_0=Fraction(3, 2)):
    """The scalar linear RNN in fractions: x, U, W and [h_0, h_1 ... h_T]."""
    x = [Fraction(n, 4) for n in (3, -5, 2, 7, -1, 6, -2)[:steps]]
    h = [h_0]
    for x_t in x:
        h.append(x_t * W + h[-1] * U + Fraction(1, 4))
    return x, U, W, h


def scalar_problem(x, U, W, h, e):
    def column(values):
        return np.array([float(v) for v in values]).reshape(1, -1, 1)

    U, W, h_0 = (np.array([[float(v)]]) for v in (U, W, h[0]))
    b = np.array([0.25])
    return {"x": column(x), "W": W, "U": U, "b": b, "h_0": h_0, "e": column(e)}


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_scalar_linear_last_state(steps):
    x, U, W, h = scalar_run(steps)
    problem = scalar_problem(x, U, W, h, [0] * (steps - 1) + [1])
    d = reference.hidden_gradients(f="linear", **problem)
    powers = [U ** (steps - t) for t in range(1, steps + 1)]  # dh_T/dh_t
    assert d.adjoint.ravel().tolist() == powers == d.delta.ravel().tolist()
    assert d.d_recurrent_kernel.item() == np.dot(powers, h[:-1])
    assert d.d_kernel.item() == np.dot(powers, x)
    assert d.d_bias.item() == sum(powers)
    assert d.d_inputs.ravel().tolist() == [p * W for p in powers]
    assert d.d_initial_state.item() == U**steps


@pytest.mark.parametrize("steps", [1, 2, 4])  # powers of two: 1/T is exact as well
def test_scalar_linear_network(steps):
    x, U, W, h = scalar_run(steps)
    V, c, y = Fraction(-5, 4), Fraction(1, 2), [Fraction(n, 2) for n in range(steps)]
    p = scalar_problem(x, U, W, h, y)
    p |= {"y": p.pop("e"), "V": np.array([[float(V)]]), "c": np.array([float(c)])}
    run = whole(reference.forward, p, "linear")
    d = whole(reference.gradients, p, "linear")

    o = [state * V + c for state in h[1:]]
    misses = [o_t - y_t for o_t, y_t in zip(o, y, strict=True)]
    d_o = [miss / steps for miss in misses]
    dh_dU = [Fraction(0)]
    for before in h[:-1]:
        dh_dU.append(before + U * dh_dU[-1])
    assert run.o.ravel().tolist() == o
    assert run.loss == sum(miss**2 / 2 for miss in misses) / steps
    assert d.d_losses == Fraction(1, steps)
    assert d.d_outputs.ravel().tolist() == d_o
    assert d.cotangents.ravel().tolist() == [d_o_t * V for d_o_t in d_o]
    assert d.adjoint[0, -1] == d.cotangents[0, -1]  # dL/dh_T: no step follows
    assert d.d_output_kernel.item() == np.dot(d_o, h[1:])
    assert d.d_output_bias.item() == sum(d_o)
    assert d.d_recurrent_kernel.item() == V * np.dot(d_o, dh_dU[1:])


def test_loss_is_averaged_over_time_and_summed_over_the_batch():
    problem = random_arrays()
    twice = {
        name: np.concatenate([array, array]) if name in ("x", "y", "h_0") else array
        for name, array in problem.items()
    }
    once = whole(reference.forward, problem)
    again = whole(reference.forward, twice)
    assert again.loss == pytest.approx(2 * once.loss, rel=ROUNDING)
    by_hand = 0.5 * np.sum((once.o - problem["y"]) ** 2) / T
    assert once.loss == pytest.approx(by_hand, rel=ROUNDING)


def test_softmax_of_numbers_whose_ratios_are_known():
    # V = 0: what comes out is softmax(c), and dL/dc all that is left.
    p = random_arrays() | {"V": np.zeros((H, 3)), "c": np.log([1.0, 2.0, 5.0])}
    p["y"] = np.random.default_rng(2).normal(size=(B, T, 3))
    run = whole(reference.forward, p, g="softmax", loss="inner_product")
    d = whole(reference.gradients, p, g="softmax", loss="inner_product")
    o = np.array([1, 2, 5]) / 8
    assert np.max(np.abs(run.o - o)) < ROUNDING
    assert run.loss == pytest.approx(np.sum(p["y"] * o) / T, rel=ROUNDING)
    by_hand = np.sum(p["y"] / T, axis=(0, 1)) @ (np.diag(o) - np.outer(o, o))
    assert relative_error(d.d_output_bias, by_hand) < ROUNDING


def test_softmax_of_large_numbers():
    value = reference.OUTPUT_ACTIVATIONS["softmax"].value
    s = np.random.default_rng(2).normal(size=(B, O))
    with np.errstate(all="raise", under="ignore"):
        assert np.array_equal(value(np.array([[1e4, -1e4]])), [[1.0, 0.0]])
        assert value(s[:, :1]).tolist() == [[1.0]] * B
        # Only differences count; 2^10 is exact, the sums are not.
        assert np.max(np.abs(value(s + 1024) - value(s))) < 1024 * ROUNDING
    assert np.max(np.abs(np.sum(value(s), axis=1) - 1)) < ROUNDING


# Rung 2: central differences.


@pytest.mark.parametrize("f", ACTIVATIONS)
def test_hidden_gradients(f):
    check_hidden(reference.hidden_gradients, f)


# Every f, and every g and every loss.
NETWORKS = [
    *((f, "linear", "squared_error") for f in ACTIVATIONS),
    *(("tanh", g, loss) for g in OUTPUT_ACTIVATIONS for loss in LOSSES[:2]),
    *(("tanh", g, "categorical_crossentropy") for g in ("softmax", "sigmoid")),
    *(("tanh", g, "binary_crossentropy") for g in ("linear", "softmax")),
]


@pytest.mark.parametrize(("f", "g", "loss"), dict.fromkeys(NETWORKS))
def test_gradients(f, g, loss):
    check_whole(reference.gradients, f, g, loss)


def test_gradients_of_functions_of_the_caller():
    def log_cosh(y, o):
        return np.log(np.cosh(o - y))

    pair = (log_cosh, lambda y, o: np.tanh(o - y))
    check_whole(reference.gradients, f=(np.sin, np.cos), loss=pair)
    check_hidden(reference.hidden_gradients, f=(np.sin, np.cos))


@pytest.mark.parametrize("f", ACTIVATIONS)
def test_problem_tests_what_it_should(f):
    problem = hidden_problem()
    h, z = states(problem, f)
    # No kink of relu or elu within reach of a step of 1e-5, in the hidden layer ...
    assert np.min(np.abs(z)) > 1e-3
    # ... nor in the output layer.
    arrays = random_arrays()
    assert np.min(np.abs(h @ arrays["V"] + arrays["c"])) > 1e-3
    assert np.max(np.abs(np.linalg.eigvals(problem["U"]))) == pytest.approx(1.0)
    # What the last cotangent sends back to the first step is far above the tolerance,
    # so an error on the longest path would show.
    problem["e"][:, :-1] = 0.0
    a = reference.hidden_gradients(f=f, **problem).adjoint
    assert np.linalg.norm(a[:, 0]) > 1e-3 * np.linalg.norm(a[:, -1])


def test_adjoint_and_delta_are_the_gradients_of_h_and_z():
    # The gradient of a bump added to z_t is delta_t, that of one added to h_t is a_t.
    p = hidden_problem()

    def loss(bump_z, bump_h):
        h, total = p["h_0"], 0.0
        for t in range(T):
            z = p["x"][:, t] @ p["W"] + h @ p["U"] + p["b"] + bump_z[:, t]
            h = np.tanh(z) + bump_h[:, t]
            total += np.sum(p["e"][:, t] * h)
        return total

    d, zero = reference.hidden_gradients(f="tanh", **p), np.zeros((B, T, H))
    by_z = reference.central_differences(lambda bump: loss(bump, zero), zero)
    by_h = reference.central_differences(lambda bump: loss(zero, bump), zero)
    assert relative_error(d.delta, by_z) < NUMERIC
    assert relative_error(d.adjoint, by_h) < NUMERIC


@pytest.mark.parametrize("f", ACTIVATIONS)
def test_slopes_off_and_at_the_kink(f):
    value, slope = reference.ACTIVATIONS[f]
    z = np.array([-30.0, -3.0, -0.1, 0.2, 2.0, 30.0])
    numeric = reference.central_differences(lambda z: np.sum(value(z)), z)
    # Absolute: in a tail both are near 0, and numeric is then all rounding.
    assert np.max(np.abs(slope(z) - numeric)) < NUMERIC
    if f in ("relu", "elu"):  # the choice of TensorFlow
        assert slope(np.zeros(1)).item() == {"relu": 0.0, "elu": 1.0}[f]
    with np.errstate(all="raise", under="ignore"):
        assert np.all(np.isfinite([value(1e3 * z), slope(1e3 * z)]))


def test_empty_batch():
    problem = hidden_problem()
    for name in ("x", "h_0", "e"):
        problem[name] = problem[name][:0]
    d = reference.hidden_gradients(f="tanh", **problem)
    assert d.d_inputs.shape == (0, T, D) and d.d_initial_state.shape == (0, H)
    assert not np.any(d.d_recurrent_kernel)


def test_arguments_are_left_alone_and_any_dtype_is_computed_in_float64():
    problem = {name: np.round(8 * v) for name, v in hidden_problem().items()}
    before = {name: value.copy() for name, value in problem.items()}
    d = reference.hidden_gradients(f="tanh", **problem)
    assert all(np.array_equal(problem[name], before[name]) for name in problem)
    integers = {name: value.astype(int) for name, value in problem.items()}
    again = reference.hidden_gradients(f="tanh", **integers)
    for name, value in vars(again).items():
        assert value.dtype == np.float64
        assert np.array_equal(value, getattr(d, name))


# Two readings of one formula, and a trap.


@pytest.mark.parametrize("f", ACTIVATIONS)
def test_nested_product_is_the_recursion(f):
    problem = hidden_problem(seed=4)
    recursive = reference.hidden_gradients(f=f, **problem)
    nested = reference.nested_product_gradients(f=f, **problem)
    for name, value in vars(recursive).items():
        assert relative_error(getattr(nested, name), value) < ROUNDING, name


def test_literal_reading_is_wrong():
    problem = hidden_problem(seed=4)
    right = reference.hidden_gradients(f="tanh", **problem)
    literal = reference.literal_reading_gradients(f="tanh", **problem)
    for name in HIDDEN.values():
        error = relative_error(getattr(literal, name), getattr(right, name))
        assert error > 1e-2, name
    with pytest.raises(AssertionError, match="relative error"):
        check_hidden(reference.literal_reading_gradients)


# Shown able to fail: one term of the reference's own code broken at a time.

MUTATIONS = {
    "hidden": {
        "drop delta U^T": ("e[t] + delta[t + 1] @ U.T", "e[t]"),
        "drop e_t": ("e[t] + delta[t + 1]", "e[t] * (t == T) + delta[t + 1]"),
        "transpose U": ("delta[t + 1] @ U.T", "delta[t + 1] @ U"),
        "adjoint for delta": ("e[t] + delta[t + 1]", "e[t] + a.get(t + 1, 0 * h_0)"),
        "shift h by one": ("h[t - 1].T @ delta[t]", "h[t].T @ delta[t]"),
        "shift delta by one": ("h[t - 1].T @ delta[t]", "h[t - 1].T @ delta[t + 1]"),
        "f' of h": ("f.derivative(z[t])", "f.derivative(h[t])"),
        "f' of the step before": ("derivative(z[t])", "derivative(z[max(t - 1, 1)])"),
        "no f'": ("a[t] * f.derivative(z[t])", "a[t]"),
        "last step only for W": ("dW += x[t].T", "dW = x[t].T"),
        "last step only for b": ("db += delta", "db = delta"),
        "a_1 in place of delta_1": ("dh_0 = delta[1]", "dh_0 = a[1]"),
        "transpose U in dh_0": ("delta[1] @ U.T", "delta[1] @ U"),
        "adjoint in dx": ("dx[t] = delta[t]", "dx[t] = a[t]"),
    },
    "tanh": {
        "drop 1/T": ("d_l = 1.0 / T", "d_l = 1.0"),
        "drop g'": ("q = d_o[t] * g.derivative(s)", "q = d_o[t]"),
        "g' of o": ("g.derivative(s)", "g.derivative(o)"),
        "shift h by one in dV": ("h[t].T @ q", "h[t - 1].T @ q"),
        "drop q in e": ("q @ V.T", "d_o[t] @ V.T"),
        "last step only for V": ("dV += h", "dV = h"),
        "last step only for c": ("dc += q", "dc = q"),
    },
    "softmax": {
        "drop the other units": (" - np.sum(d_o[t] * o, axis=-1, keepdims=True)", ""),
        "a slope": ("np.sum(d_o[t] * o, axis=-1, keepdims=True)", "d_o[t] * o"),
        "mean of d_o without o": ("np.sum(d_o[t] * o,", "np.mean(d_o[t],"),
        "sum over the batch": ("axis=-1, keepdims=True", "axis=0, keepdims=True"),
        "drop o": ("q = o * (d_o[t]", "q = (d_o[t]"),
        "s for o": ("q = o * (d_o[t]", "q = s * (d_o[t]"),
    },
}


def checks_of(what):
    """The function that is broken, and the checks each of which is to notice."""
    if what == "hidden":
        return reference.hidden_gradients, [check_hidden]
    losses = LOSSES if what == "softmax" else LOSSES[:1]
    checks = [functools.partial(check_whole, g=what, loss=loss) for loss in losses]
    return reference.gradients, checks


def mutant(function, old, new):
    """A copy of a function of the reference in which `old` reads `new`."""
    source = inspect.getsource(function)
    assert source.count(old) == 1, f"{old!r} is not in {function.__name__} once"
    namespace = dict(vars(inspect.getmodule(function)))
    exec(source.replace(old, new), namespace)
    return namespace[function.__name__]


@pytest.mark.parametrize("what", MUTATIONS)
def test_unbroken_copies_pass(what):
    function, checks = checks_of(what)
    for check in checks:
        check(mutant(function, "x.shape[1]", "1 * x.shape[1]"))


@pytest.mark.parametrize(
    ("what", "change"),
    [
        pytest.param(what, change, id=name)
        for what, changes in MUTATIONS.items()
        for name, change in changes.items()
    ],
)
def test_a_broken_copy_is_caught(what, change):
    function, checks = checks_of(what)
    broken = mutant(function, *change)
    for check in checks:
        with pytest.raises(AssertionError, match="relative error"):
            check(broken)


# Errors.


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (B, D), r"`x` must have shape \(batch=any, timesteps=any, features="),
        ("W", (D + 1, H), r"`W` must have shape \(features=4, units=any\)"),
        ("U", (H, H + 1), r"`U` must have shape \(units=6, units=6\).*\(6, 7\)"),
        ("b", (1, H), r"`b` must have shape \(units=6\).*\(1, 6\)"),
        ("h_0", (H,), r"`h_0` must have shape \(batch=3, units=6\).*\(6,\)"),
        ("e", (B, T, 1), r"`e` must have shape \(batch=3, timesteps=5, units=6\)"),
        ("y", (B, T), r"`y` must have shape \(batch=3, timesteps=5, outputs=2\)"),
        ("V", (O, H), r"`V` must have shape \(units=6, outputs=any\).*\(2, 6\)"),
        ("c", (1,), r"`c` must have shape \(outputs=2\).*\(1,\)"),
        ("x", (B, 0, D), "one time step or more"),
    ],
)
def test_wrong_shapes_raise(name, shape, message):
    problem = random_arrays() | {name: np.zeros(shape)}
    if shape == (B, 0, D):
        problem |= {"e": np.zeros((B, 0, H)), "y": np.zeros((B, 0, O))}
    functions = []
    if name in (*HIDDEN, "e"):
        hidden = {key: problem[key] for key in (*HIDDEN, "e")}
        for function in (
            reference.hidden_gradients,
            reference.nested_product_gradients,
        ):
            functions.append(functools.partial(function, f="tanh", **hidden))
    if name != "e":
        for function in (reference.forward, reference.gradients):
            functions.append(functools.partial(whole, function, problem))
    for function in functions:
        with pytest.raises(ValueError, match=message):
            function()


@pytest.mark.parametrize(
    "functions",
    [
        {name: choice}
        for name in ("f", "g", "loss")
        for choice in ("tanhh", np.tanh, (np.tanh, None), None)
    ]
    + [{"f": "softmax"}],
    ids=str,
)
def test_unknown_functions_raise(functions):
    (name,) = functions
    message = f"`{name}` must be one of .* or a pair .*Received: {name}="
    for function in (reference.forward, reference.gradients):
        with pytest.raises(ValueError, match=message):
            whole(function, random_arrays(), **functions)
    if name == "f":
        with pytest.raises(ValueError, match=message):
            reference.hidden_gradients(**functions, **hidden_problem())


@pytest.mark.parametrize("g", sorted(set(ACTIVATIONS) - {"sigmoid"}))
def test_crossentropy_of_what_are_no_probabilities_raises(g):
    message = f"'categorical_crossentropy' is of probab.*'softmax'.*Received: g='{g}'"
    for function in (reference.forward, reference.gradients):
        with pytest.raises(ValueError, match=message):
            whole(function, random_arrays(), g=g, loss="categorical_crossentropy")


def test_central_differences_raise():
    with pytest.raises(ValueError, match="must return a scalar.*shape \\(2,\\)"):
        reference.central_differences(lambda w: w, np.ones(2))
    with pytest.raises(ValueError, match="`epsilon` must be positive.*epsilon=0"):
        reference.central_differences(np.sum, np.ones(2), epsilon=0)
