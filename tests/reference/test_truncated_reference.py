"""The brute force of truncation, proved by means that share nothing with it.

Central differences of runs that begin at a frozen state; `reference.hidden_gradients`; a
recursion written by hand; closed forms. Windows are cut here from the end of a list of
steps, not by the formula of E(s). Each check is also shown able to fail.
"""

import inspect
import itertools
import re
import types

import numpy as np
import pytest

from keras_bptt import reference
from keras_bptt.reference import truncation as truncated_reference

# All different, so that no transpose hides behind a shape that fits by accident.
B, T, D, H = 4, 7, 2, 3

NUMERIC = 1e-8  # as in test_reference.py
ROUNDING = 1e-12

ARGUMENTS = {
    "x": "d_inputs",
    "W": "d_kernel",
    "U": "d_recurrent_kernel",
    "b": "d_bias",
    "h_0": "d_initial_state",
}
# Holes, padding before, padding after, and nothing but padding.
MASK = np.array(
    [[1, 0, 1, 1, 0, 0, 1], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [0] * T], bool
)
# (steps, stride): one step, chunks that fit and do not, sliding, overlapping, all paths.
WINDOWS = [(1, 1), (3, 3), (4, 4), (3, 1), (3, 2), (4, 3), (6, 2), (7, 7), (9, 2)]
FEW_WINDOWS = [(2, 2), (3, 1), (4, 3)]
# What limits an adjoint.
NORM, GROWTH = {"adjoint_clipnorm": 0.5}, {"adjoint_max_growth": 1.1}
BOTH = {"adjoint_clipnorm": 5.0, "adjoint_max_growth": 1.1}
CLIPS = {"": None, "norm": NORM, "growth": GROWTH, "both": BOTH}

all_and_few_windows = pytest.mark.parametrize("window", [(None, None), *FEW_WINDOWS])


def random_problem(seed=0, masked=False, dropout=False, factors=False, explodes=False):
    """Inputs, weights, cotangents; U asymmetric, its spectral radius 1.

    Where it explodes, adjoints exceed all that the losses send, and no state saturates.
    """
    rng = np.random.default_rng(seed)
    U = rng.normal(size=(H, H))
    problem = {
        "x": rng.normal(size=(B, T, D)),
        "W": rng.normal(size=(D, H)) / np.sqrt(D),
        "U": U / np.max(np.abs(np.linalg.eigvals(U))),
        "b": 0.3 * rng.normal(size=H),
        "h_0": rng.normal(size=(B, H)),
        "e": rng.normal(size=(B, T, H)),
        "f": "tanh",
    }
    if explodes:
        problem |= {"U": 2 * problem["U"], "f": "linear"}
    if dropout:
        dropped = np.arange(H) == rng.integers(H, size=(B, 1))  # a unit of each example
        problem["recurrent_dropout"] = np.where(dropped, 0.0, 1.5)
    if factors:
        problem["factors"] = rng.uniform(0.5, 1.5, (B, T))
    if masked:
        problem["mask"] = MASK
        for name in {"x", "factors"} & set(problem):
            problem[name][~MASK] = np.nan  # which nobody may read
    return problem


def gradients(problem, window, clip=None, modules=truncated_reference):
    options = dict(zip(("steps", "stride"), window, strict=True))
    if clip is None:
        return modules.truncated_gradients(**problem, **options)
    return modules.clipped_gradients(**problem, **options, **clip)


def full(problem):
    names = (*ARGUMENTS, "f", "e")
    return reference.hidden_gradients(**{name: problem[name] for name in names})


def assert_close(actual, expected, tolerance=ROUNDING):
    """Every gradient, relative to what is expected but absolute where that is small."""
    expected = expected if isinstance(expected, dict) else vars(expected)
    for name, b in expected.items():
        a = getattr(actual, name)
        assert a.shape == b.shape
        error = np.linalg.norm(a - b) / max(1.0, np.linalg.norm(b))
        assert error < tolerance, f"{name}: error {error:.1e}"


def windows(real, steps, stride):
    """(the block's steps, the window's steps, whether it reaches h_0), from the end."""
    while real:
        yield real[-stride:], real[-steps:], len(real) <= steps
        real = real[:-stride]


# --- Full backpropagation


@pytest.mark.parametrize(
    ("window", "f"),
    [((T, T), "tanh"), ((T, 1), "linear"), ((T + 5, 3), "softplus")]
    + [((T + 1, None), (np.sin, np.cos)), ((None, None), "tanh")],
)
def test_a_window_of_all_steps_is_full_backpropagation(window, f):
    problem = random_problem() | {"f": f}
    assert_close(gradients(problem, window), full(problem))
    # It is not by vanishing that they agree: the last loss is felt in h_0.
    problem["e"][:, :-1] = 0.0
    assert np.linalg.norm(full(problem).d_initial_state) > 1e-3
    assert not np.any(gradients(problem, (T - 1, None)).d_initial_state)


# --- Central differences, the state before a window frozen


def step(p, n, t, h):
    if "mask" in p and not p["mask"][n, t]:
        return h
    before = h * p["recurrent_dropout"][n] if "recurrent_dropout" in p else h
    return np.tanh(p["x"][n, t] @ p["W"] + before @ p["U"] + p["b"])


def frozen_loss(moved, original, steps, stride):
    """sum_t <e_t, h_t> of the moved problem, each window from a state that never moves."""
    total = 0.0
    for n in range(B):
        h, states = original["h_0"][n], []
        for t in range(T):
            states.append(h)  # the state before step t
            h = step(original, n, t, h)
        mask = original["mask"][n] if "mask" in original else np.ones(T, bool)
        real = [t for t in range(T) if mask[t]]
        # Losses before the first real step are losses of h_0 itself.
        for t in range(real[0] if real else T):
            total += original["e"][n, t] @ moved["h_0"][n]
        for block, window, whole in windows(real, steps, stride):
            h = moved["h_0"][n] if whole else states[window[0]]
            for t in range(window[0], T):
                h = step(moved, n, t, h)
                last = max(s for s in real if s <= t)
                if last > block[-1]:
                    break
                if last in block:
                    total += original["e"][n, t] @ h
    return total


def check_by_differences(problem, window, modules=truncated_reference):
    d = gradients(problem, window, modules=modules)
    if "mask" in problem:
        assert not np.any(d.d_inputs[~MASK])
    numeric = {}
    for argument, name in ARGUMENTS.items():

        def loss(value, argument=argument):
            return frozen_loss({**problem, argument: value}, problem, *window)

        # A masked x is NaN, and no step of a difference could move it.
        value = np.nan_to_num(problem[argument])
        numeric[name] = reference.central_differences(loss, value)
    assert_close(d, numeric, NUMERIC)


def check_differences(modules):
    for window in FEW_WINDOWS:
        check_by_differences(random_problem(2, True, True), window, modules)


@pytest.mark.parametrize("window", [(1, 1), (3, 3), (3, 2), (9, 2)])
def test_central_differences(window):
    check_by_differences(random_problem(), window)


@pytest.mark.parametrize(("masked", "dropout"), [(True, False), (False, True)])
def test_central_differences_of_options(masked, dropout):
    """Both at once are part of `check_differences`."""
    check_by_differences(random_problem(3, masked, dropout), (3, 2))


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("steps", range(1, T + 2))
def test_central_differences_of_every_window(steps, masked):
    for stride in range(1, steps + 1):
        check_by_differences(random_problem(4, masked, dropout=True), (steps, stride))


@pytest.mark.parametrize("window", WINDOWS)
def test_extent_of_the_windows(window):
    """Outside exactly zero, inside not, one loss at a time."""
    problem = random_problem()
    cuts = list(windows(list(range(T)), *window))
    for t in range(T):
        _, kept, whole = next(cut for cut in cuts if t in cut[0])
        one = problem | {"e": np.where(np.arange(T)[:, None] == t, problem["e"], 0.0)}
        d = gradients(one, window)
        inside = np.isin(np.arange(T), [j for j in kept if j <= t])
        for array in (d.d_inputs, d.delta, d.adjoint):
            felt = np.linalg.norm(array, axis=-1)
            assert np.all(felt[:, inside] > 1e-6)
            assert not np.any(felt[:, ~inside])
        felt = np.linalg.norm(d.d_initial_state, axis=-1)
        assert np.all(felt > 1e-6) if whole else not np.any(felt)


# --- A recursion by hand: clipping, factors, recurrent dropout


def by_hand(problem, window, clip):
    """The gradients where there is no mask: each window walked back for itself."""
    p, steps, stride = problem, window[0] or T, window[1] or T
    r, factors = p["recurrent_dropout"], p["factors"]
    h, slope = [p["h_0"]], []
    for t in range(T):
        z = p["x"][:, t] @ p["W"] + (r * h[-1]) @ p["U"] + p["b"]
        h.append(z if p["f"] == "linear" else np.tanh(z))
        slope.append(1.0 if p["f"] == "linear" else 1 - h[-1] ** 2)
    adjoint, delta, d_h_0 = np.zeros((B, T, H)), np.zeros((B, T, H)), np.zeros((B, H))
    for block, kept, whole in windows(list(range(T)), steps, stride):
        a = np.zeros((B, H))
        for t in reversed(kept):
            a = a + (p["e"][:, t] if t in block else 0.0)
            limit = np.full(B, clip.get("adjoint_clipnorm", np.inf))
            if "adjoint_max_growth" in clip:
                later = p["e"][:, [s for s in block if s >= t]]
                sent = np.sqrt(np.sum(later**2, axis=2)).sum(axis=1)
                limit = np.minimum(limit, clip["adjoint_max_growth"] * sent)
            length = np.sqrt(np.sum(a**2, axis=1))
            a = a * np.minimum(1.0, limit / length)[:, None]
            adjoint[:, t] += a
            delta[:, t] += a * slope[t]
            link = factors[:, t, None] if t else 1.0  # that from h_0 has no factor
            a = link * r * ((a * slope[t]) @ p["U"].T)
        d_h_0 += whole * a
    before = np.stack([r * state for state in h[:-1]], axis=1)
    return reference.HiddenGradients(
        d_inputs=delta @ p["W"].T,
        d_kernel=np.einsum("btd,bth->dh", p["x"], delta),
        d_recurrent_kernel=np.einsum("bth,btk->hk", before, delta),
        d_bias=delta.sum(axis=(0, 1)),
        d_initial_state=d_h_0,
        adjoint=adjoint,
        delta=delta,
    )


def clippable(clip, seed=5, **options):
    """A problem in which the limits do act."""
    explodes = clip not in (None, NORM)
    return random_problem(
        seed, dropout=True, factors=True, explodes=explodes, **options
    )


def check_by_hand(modules):
    for window in [(None, None), (3, 3), (5, 2), *FEW_WINDOWS]:
        for clip in CLIPS.values():
            problem = clippable(clip)
            expected = by_hand(problem, window, clip or {})
            assert_close(gradients(problem, window, clip, modules), expected)


@pytest.mark.parametrize("clip", [NORM, GROWTH, BOTH], ids=["norm", "growth", "both"])
@all_and_few_windows
def test_the_limits_of_these_tests_act(window, clip):
    for masked in (False, True):
        problem = clippable(clip, masked=masked)
        free = gradients(problem, window)
        for limit in clip.items():
            alone = gradients(problem, window, dict([limit]))
            assert np.linalg.norm(alone.d_kernel - free.d_kernel) > 1e-2
            # Of two limits each is the smaller one somewhere. But where a window has one
            # loss, what that sends is a limit like a norm.
            if clip == BOTH and window != (3, 1):
                both = gradients(problem, window, clip)
                assert np.linalg.norm(both.d_kernel - alone.d_kernel) > 1e-2


def test_the_mean_over_all_draws_is_the_full_gradient():
    """Of factors that are 1/p with a chance of p, or else 0."""
    p, T, problem = 0.6, 4, random_problem(8)
    problem |= {name: problem[name][:, :T] for name in ("x", "e")}
    sums = dict.fromkeys(ARGUMENTS.values(), 0.0)
    for kept in itertools.product([0, 1], repeat=T - 1):
        chance = np.prod(np.where(kept, p, 1 - p))
        factors = np.tile(np.r_[np.nan, np.array(kept) / p], (B, 1))
        d = gradients(problem | {"factors": factors}, (None, None))
        sums = {name: sums[name] + chance * getattr(d, name) for name in sums}
    assert_close(full(problem), sums)


# --- Padding and batches


def check_alone(modules):
    """Gradients are those of each example alone, without its masked steps.

    A cotangent at a masked step belongs to the real step before it, or else to h_0.
    """
    for window, clip in itertools.product([*FEW_WINDOWS, (T, 2)], CLIPS.values()):
        problem = clippable(clip, masked=True)
        d = gradients(problem, window, clip, modules)
        assert not np.any(d.delta[~MASK]) and not np.any(d.d_inputs[~MASK])
        weights = dict.fromkeys(("d_kernel", "d_recurrent_kernel", "d_bias"), 0.0)
        for n, real in enumerate(map(np.flatnonzero, MASK)):
            e, row = problem["e"][n], slice(n, n + 1)
            d_h_0 = e[: real[0] if real.size else T].sum(axis=0)
            if real.size:
                one = problem | {"e": np.add.reduceat(e, real)[None]}
                one |= {name: problem[name][row, real] for name in ("x", "factors")}
                one |= {k: problem[k][row] for k in ("h_0", "recurrent_dropout")}
                one = gradients(one | {"mask": None}, window, clip, modules)
                d_h_0 = d_h_0 + one.d_initial_state[0]
                weights = {k: v + getattr(one, k) for k, v in weights.items()}
                for name in ("d_inputs", "delta", "adjoint"):
                    found = getattr(d, name)[n, real], getattr(one, name)[0]
                    scale = max(1.0, np.max(np.abs(found[1])))
                    assert np.max(np.abs(found[0] - found[1])) < 1e-13 * scale, name
            assert np.linalg.norm(d.d_initial_state[n] - d_h_0) < 1e-13 * max(
                1.0, np.linalg.norm(d_h_0)
            )
        assert_close(d, weights, 1e-13)


# --- What clipping does not do


@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@all_and_few_windows
def test_a_large_limit_clips_nothing(window, masked):
    problem = random_problem(9, masked, dropout=True, factors=True)
    large, growth = {"adjoint_clipnorm": 1e9}, {"adjoint_max_growth": 1e9}
    for clip in (large, {"adjoint_clipnorm": np.inf}, growth, large | growth):
        assert_close(gradients(problem, window, clip), gradients(problem, window))


@pytest.mark.parametrize("clip", [NORM, GROWTH, BOTH], ids=["norm", "growth", "both"])
def test_one_window_of_all_steps_whatever_the_stride(clip):
    problem = clippable(clip, masked=True)
    for stride in (1, 3, T):
        d = gradients(problem, (T, stride), clip)
        assert_close(d, gradients(problem, (None, None), clip))


def test_no_adjoint_is_no_division_by_zero():
    nothing = random_problem(10) | {"e": np.zeros((B, T, H))}
    for clip in ({"adjoint_clipnorm": 1e-300}, GROWTH, BOTH):
        d = gradients(nothing, (3, None), clip)
        assert not any(np.any(value) for value in vars(d).values())


@all_and_few_windows
def test_growth_of_a_loss_times_a_power_of_two(window):
    """Every gradient times it, bit for bit. A norm is in the units of the loss."""
    problem = random_problem(13, masked=True, dropout=True, explodes=True)
    d, of_norm = gradients(problem, window, GROWTH), gradients(problem, window, NORM)
    for k in (-40, -1, 30):
        scaled = problem | {"e": 2.0**k * problem["e"]}
        for name, value in vars(gradients(scaled, window, GROWTH)).items():
            assert np.array_equal(value, 2.0**k * getattr(d, name)), name
        other = gradients(scaled, window, NORM).d_kernel / 2.0**k
        assert np.linalg.norm(other - of_norm.d_kernel) > 0.1


# --- Clipping: closed forms of h_t = u h_{t-1}, of one unit and inputs of 0

ALL = dict.fromkeys(range(1, T + 1), 1.0)


def check_scalar(u, cotangents, adjoint, window=(None, None), **clip):
    """Adjoints by hand, for cotangents by step, 1 ... T; and what follows from them."""
    one, h_0, e = np.ones((1, 1)), 2.0, np.zeros((1, T, 1))
    for t, value in cotangents.items():
        e[0, t - 1] = value
    x = np.zeros((1, T, 1))
    problem = {"x": x, "W": one, "U": u * one, "b": one[0] * 0, "h_0": h_0 * one}
    d = gradients(problem | {"f": "linear", "e": e}, window, clip)
    adjoint = np.array(adjoint, float)
    # What leaves the first step is not clipped; but only one that reaches it leaves.
    reaches = u * adjoint[0] if window[0] is None else d.d_initial_state.item()
    for found, expected in [
        (d.adjoint.ravel(), adjoint),
        (d.delta.ravel(), adjoint),
        (d.d_recurrent_kernel, [[h_0 * u ** np.arange(T) @ adjoint]]),
        (d.d_bias, [adjoint.sum()]),
        (d.d_initial_state, [[reaches]]),
    ]:
        np.testing.assert_allclose(found, expected, rtol=ROUNDING)


@pytest.mark.parametrize(("u", "g"), [(2.0, 3.0), (2.0, 1.0), (-1.5, 2.0), (1.25, 2.5)])
def test_growth_of_the_last_loss_alone(u, g):
    """|a_t| = min(|u|^(T - t), g) of what is sent."""
    n = np.arange(T - 1, -1, -1)
    wanted = 0.125 * np.sign(u) ** n * np.minimum(abs(u) ** n, g)
    check_scalar(u, {T: 0.125}, wanted, adjoint_max_growth=g)
    assert np.sum(abs(u) ** n > g) >= 2, "nothing was clipped"


def test_growth_of_several_losses():
    # At every step: 1, 3, 7, 15, 31, ... where nothing is clipped; the limits are 1.5 n.
    wanted = [10.5, 9.0, 7.5, 6.0, 4.5, 3.0, 1.0]
    check_scalar(2.0, ALL, wanted, adjoint_max_growth=1.5)
    # Signs cancel in the adjoint but not in the limit: a_7 = -1, a_6 = 1 - 2,
    # a_5 = 1 - 2, then -2 and -4, limited by 3.
    wanted = [-3, -3, -3, -2, -1, -1, -1]
    check_scalar(2.0, {5: 1.0, 6: 1.0, 7: -1.0}, wanted, adjoint_max_growth=1.0)
    # The smaller limit holds: by growth 1, 3, 6, 8, 10, ...; by the norm 7 at most.
    limits = {"adjoint_max_growth": 2.0, "adjoint_clipnorm": 7.0}
    check_scalar(2.0, ALL, [7, 7, 7, 7, 6, 3, 1], **limits)


def test_growth_in_windows():
    """Each window by the losses of its own block: two of them where k1 = 2."""
    # Free: 1, 3, 6 in a window of three steps; the limits are 1.5, 3, 3. Blocks end at 7,
    # 5, 3 and 1. Of step 5 the window of 7 has 3 and that of 5 has 1; and so on.
    wanted = [1 + 3, 3, 1 + 3, 3, 1 + 3, 3, 1]
    check_scalar(2.0, ALL, wanted, (3, 2), adjoint_max_growth=1.5)
    # In chunks every step is in one window: 1, 3, 4.5 each of its own three losses.
    wanted = [1.0, 4.5, 3.0, 1.0, 4.5, 3.0, 1.0]
    check_scalar(2.0, ALL, wanted, (3, 3), adjoint_max_growth=1.5)


# --- The checks pass, and are shown able to fail: one term of the source broken at a time


def broken(old, new):
    """A copy of the module in which `old` reads `new`."""
    source = inspect.getsource(truncated_reference)
    assert source.count(old) == 1, f"{old!r} is not there once"
    copy = types.ModuleType("keras_bptt.broken")
    exec(source.replace(old, new), vars(copy))
    return copy


FIRST = "row.block_end(row.count[loss]) - row.steps + 1"
TO_H_0 = """:
                    break
            else:
                row.dh_0 += a
    return d


def clipped"""
ADDED = "e_s = e_s + row.e[t]"
SENT = "if row.mask[t]:\n                    sent"
MUTATIONS = {
    check_differences: {
        "window a step short": (FIRST, FIRST + " + 1"),
        "window a step long": (FIRST, FIRST + " - 1"),
        "window from the loss": (FIRST, "row.count[loss] - row.steps + 1"),
        "blocks from the start": (
            "self.N - self.stride * ((self.N - s) // self.stride)",
            "min(self.N, self.stride * -(-s // self.stride))",
        ),
        "padding counts": ("int(np.sum(mask[n, :t]))", "t"),
        "mask ignored": ("bool(mask[n, t - 1])", "True"),
        "masked step stops a path": ("return a\n", "return 0 * a\n"),
        "never to h_0 where E = steps": (" > 1" + TO_H_0, TO_H_0),
        "drop e at masked steps": ("= row.e[loss]", "= row.e[loss] * row.mask[loss]"),
        "drop r": ("self.factor[t] * self.r *", "self.factor[t] *"),
        "drop r in dU": ("self.before[t] = r * h", "self.before[t] = h"),
        "transpose U": ("delta @ self.U.T", "delta @ self.U"),
    },
    check_by_hand: {
        "factor of the link out": ("factors[n, t - 1]", "factors[n, t % max(x)]"),
        "factor of the link from h_0": ("if self.count[t] > 1 else 1.0", ""),
        "clip too much": ("if norm > limit", "if norm > 0"),
        "clip nothing": ("if norm > limit", "if False"),
        "clip a loss that flows elsewhere": ("end[t] == block", "True"),
        "clipped window a step long": ("block - row.steps + 1", "block - row.steps"),
        "growth of 1": ("adjoint_max_growth * sent", "sent"),
        "the larger limit": ("min(limits)", "max(limits)"),
        "sent at this step alone": ("sent = sent + np", "sent = np"),
        "sent at every step since": ("e_s = np.zeros_like(e_s)", "e_s = 1.0 * e_s"),
        "sent before this step": (
            "_max_growth, sent))",
            "_max_growth, sent - np.linalg.norm(row.e[t])))",
        ),
        "sent in all windows so far": (
            "sent = 0.0",
            "sent = 0.0 if block == min(end.values()) else sent",
        ),
        "sent to other windows": ("    " + ADDED, ADDED),
        "a sum of numbers, not of norms": ("np.linalg.norm(e_s)", "np.sum(e_s)"),
    },
    check_alone: {
        "first real step by position": ("self.count[t] > 1", "t > 1"),
        "one window by position": ("steps >= self.N", "steps >= max(x)"),
        "clip masked steps": (SENT, SENT.replace("row.mask[t]", "True")),
        "sent at real steps alone": (ADDED, "e_s = row.e[t]"),
        "norms of masked cotangents apart": (ADDED, "sent += np.linalg.norm(row.e[t])"),
    },
}


@pytest.mark.parametrize("check", MUTATIONS)
def test_the_reference_and_an_unbroken_copy_pass(check):
    check(truncated_reference)
    check(broken("self.N = ", "self.N = 0 + "))


@pytest.mark.parametrize(
    ("check", "change"),
    [
        pytest.param(check, change, id=name)
        for check, changes in MUTATIONS.items()
        for name, change in changes.items()
    ],
)
def test_a_broken_copy_is_caught(check, change):
    copy = broken(*change)  # outside: it asserts that the text is there
    with pytest.raises(AssertionError):
        check(copy)


# --- Errors


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", np.zeros((B, D)), r"`x` must have shape \(batch=any, timesteps=any, fea"),
        ("U", np.zeros((H, H + 1)), r"`U` must .*\(units=3, units=3\).*\(3, 4\)"),
        ("e", np.zeros((B, T, 1)), r"`e` must .*\(batch=4, timesteps=7, units=3\)"),
        ("mask", np.ones((B, T + 1), bool), r"`mask` must .*\(batch=4, timesteps=7\)"),
        ("mask", np.ones((B, T, 1), bool), r"`mask` must have shape.*\(4, 7, 1\)"),
        ("mask", np.ones((B, T)), "`mask` must be boolean.*float64"),
        (
            "recurrent_dropout",
            np.ones((1, H)),
            r"`rec.*_dropout` .*\(batch=4, units=3\)",
        ),
        ("factors", np.ones(T), r"`factors` must have shape \(batch=4, timesteps=7\)"),
        ("f", "softmax", "`f` must be one of"),
    ],
)
def test_wrong_arguments_raise(name, value, message):
    for clip in CLIPS.values():
        with pytest.raises(ValueError, match=message):
            gradients(random_problem() | {name: value}, (3, 2), clip)


@pytest.mark.parametrize(
    "window",
    [(0, None), (-1, None), (2.0, None), (True, None), ("3", None)]
    + [(3, 0), (3, -1), (3, 4), (3, 2.0), (3, True), (None, 2)],
    ids=str,
)
def test_wrong_windows_raise(window):
    name, value = ("steps", window[0]) if window[1] is None else ("stride", window[1])
    received = re.escape(f"{name}={value!r}")
    for clip in CLIPS.values():
        with pytest.raises(
            ValueError, match=f"`{name}` must be .*Received: {received}"
        ):
            gradients(random_problem(), window, clip)


@pytest.mark.parametrize(
    "clip",
    [{"adjoint_clipnorm": norm} for norm in (0, -1.0, np.nan, True, "1")]
    + [
        {"adjoint_max_growth": growth, "adjoint_clipnorm": norm}
        for growth in (0.999, 0, -2.0, np.nan, np.inf, True, "2")
        for norm in (None, 0.5)
    ],
    ids=str,
)
def test_wrong_limits_raise(clip):
    """The first of the two is the wrong one."""
    name, value = next(iter(clip.items()))
    kind = "finite number of at least 1" if "growth" in name else "positive number"
    message = f"`{name}` must be a {kind}.*{re.escape(f'{name}={value!r}')}"
    with pytest.raises(ValueError, match=message):
        gradients(random_problem(), (3, None), clip)


def test_no_limit_raises():
    with pytest.raises(
        ValueError, match="or `adjoint_max_growth`.*truncated_gradients"
    ):
        gradients(random_problem(), (3, None), {"adjoint_clipnorm": None})
    for growth in (1, np.float32(2.5)):
        gradients(random_problem(), (3, None), {"adjoint_max_growth": growth})


def test_empty_batch_and_numpy_integers():
    problem = random_problem(dropout=True, masked=True)
    for name in ("x", "h_0", "e", "mask", "recurrent_dropout"):
        problem[name] = problem[name][:0]
    d = gradients(problem, (np.int64(3), np.int32(1)))
    assert d.d_inputs.shape == (0, T, D) and not np.any(d.d_kernel)


def test_arguments_are_left_alone():
    problem = random_problem(masked=True, dropout=True, factors=True)
    before = {k: np.copy(v) for k, v in problem.items()}
    for clip in CLIPS.values():
        d = gradients(problem, (3, 2), clip)
        assert all(value.dtype == np.float64 for value in vars(d).values())
    for name, value in before.items():
        assert np.array_equal(problem[name], value, equal_nan=name in ("x", "factors"))
