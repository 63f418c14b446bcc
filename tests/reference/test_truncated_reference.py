"""The brute force of truncation, proved by means that share nothing with it.

Central differences of runs that begin at a frozen state; `reference.hidden_gradients` of
pieces of the sequence; recursions written by hand. Windows are cut here from the end of a
list of steps, not by the formula of E(s). Each check is also shown able to fail.
"""

import inspect
import itertools
import re
import types

import numpy as np
import pytest

from keras_bptt import reference
from keras_bptt.reference import truncation as truncated_reference
from keras_bptt.reference.simple_rnn import central_differences

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


def random_problem(seed=0, masked=False, dropout=False):
    """Inputs, weights, cotangents; U asymmetric, its spectral radius 1."""
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
    if masked:
        problem["mask"] = MASK
        problem["x"][~MASK] = np.nan
    if dropout:
        keep = rng.random((B, H)) < 0.7
        problem["recurrent_dropout"] = np.where(keep, 1 / 0.7, 0.0)
    return problem


def exploding(problem):
    """Adjoints of it exceed all that the losses send; the states do not saturate."""
    return problem | {"U": 2 * problem["U"], "f": "linear"}


def clippable(problem, clip):
    """A problem in which the limits do act: `test_the_limits_of_these_tests_act`."""
    return problem if clip in (None, NORM) else exploding(problem)


def full(problem):
    names = (*ARGUMENTS, "f", "e")
    return reference.hidden_gradients(**{name: problem[name] for name in names})


def truncated(problem, modules=truncated_reference, **options):
    return modules.truncated_gradients(**problem, **options)


def assert_close(actual, expected, tolerance=ROUNDING, names=None):
    """Every gradient, relative to what is expected but absolute where that is small."""
    for name in names or vars(expected):
        a, b = getattr(actual, name), getattr(expected, name)
        assert a.shape == b.shape
        error = np.linalg.norm(a - b) / max(1.0, np.linalg.norm(b))
        assert error < tolerance, f"{name}: error {error:.1e}"


# --- The windows, cut from the end, and a run of one of them


def windows(real, steps, stride):
    """(the block's steps, the window's steps, whether it reaches h_0), from the end."""
    while real:
        yield real[-stride:], real[-steps:], len(real) <= steps
        real = real[:-stride]


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


def check_by_differences(problem, steps, stride, modules=truncated_reference):
    d = truncated(problem, modules, steps=steps, stride=stride)
    mask = problem.get("mask", np.ones((B, T), bool))
    for argument, name in ARGUMENTS.items():
        # A masked x is NaN, and no step of a difference could move it.
        value = np.nan_to_num(problem[argument])
        numeric = central_differences(
            lambda v, argument=argument: frozen_loss(
                {**problem, argument: v}, problem, steps, stride
            ),
            value,
        )
        actual = getattr(d, name)
        if argument == "x":
            assert not np.any(actual[~mask])
        error = np.linalg.norm(actual - numeric) / max(1.0, np.linalg.norm(numeric))
        assert error < NUMERIC, f"{name}: error {error:.1e}"


# --- Full backpropagation


@pytest.mark.parametrize(
    "window", [(T, T), (T, 1), (T + 5, 3), (T + 1, None), (None,) * 2]
)
def test_a_window_of_all_steps_is_full_backpropagation(window):
    problem, (steps, stride) = random_problem(), window
    d = truncated(problem, steps=steps, stride=stride)
    assert_close(d, full(problem))
    # It is not by vanishing that they agree: the last loss is felt in h_0.
    problem["e"][:, :-1] = 0.0
    assert np.linalg.norm(full(problem).d_initial_state) > 1e-3
    d = truncated(problem, steps=T - 1)
    assert not np.any(d.d_initial_state)


def test_other_activations():
    for f in ("linear", "softplus", (np.sin, np.cos)):
        problem = random_problem(seed=1) | {"f": f}
        assert_close(truncated(problem, steps=None), full(problem))


def test_recurrent_dropout_of_all_paths():
    # r scales the rows of U that an example reads.
    problem = random_problem(dropout=True)
    r = problem.pop("recurrent_dropout")
    for n in range(B):
        one = {
            k: v[n : n + 1] if k in ("x", "h_0", "e") else v for k, v in problem.items()
        }
        d = truncated(one, steps=None, recurrent_dropout=r[n : n + 1])
        expected = full(one | {"U": r[n][:, None] * one["U"]})
        same = set(vars(expected)) - {"d_recurrent_kernel"}
        assert_close(d, expected, names=same)
        scaled = r[n][:, None] * expected.d_recurrent_kernel
        assert np.linalg.norm(d.d_recurrent_kernel - scaled) < ROUNDING


# --- Central differences, the state before a window frozen


@pytest.mark.parametrize("window", WINDOWS)
def test_central_differences(window):
    check_by_differences(random_problem(), *window)


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("window", FEW_WINDOWS)
def test_central_differences_with_a_mask(window, dropout):
    check_by_differences(random_problem(2, masked=True, dropout=dropout), *window)


def test_central_differences_with_recurrent_dropout():
    check_by_differences(random_problem(3, dropout=True), 3, 2)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("steps", range(1, T + 2))
def test_central_differences_of_every_window(steps, masked):
    for stride in range(1, steps + 1):
        check_by_differences(random_problem(4, masked, dropout=True), steps, stride)


# --- What a window holds


@pytest.mark.parametrize("window", WINDOWS)
def test_extent_of_the_windows(window):
    """Outside exactly zero, inside not, one loss at a time."""
    problem = random_problem()
    cuts = list(windows(list(range(T)), *window))
    for t in range(T):
        _, kept, whole = next(cut for cut in cuts if t in cut[0])
        one = problem | {"e": np.where(np.arange(T)[:, None] == t, problem["e"], 0.0)}
        d = truncated(one, steps=window[0], stride=window[1])
        inside = np.isin(np.arange(T), [j for j in kept if j <= t])
        for array in (d.d_inputs, d.delta, d.adjoint):
            felt = np.linalg.norm(array, axis=-1)
            assert np.all(felt[:, inside] > 1e-6)
            assert not np.any(felt[:, ~inside])
        felt = np.linalg.norm(d.d_initial_state, axis=-1)
        assert np.all(felt > 1e-6) if whole else not np.any(felt)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_sliding_window_keeps_so_many_delta(steps):
    problem = random_problem()
    for t in range(T):
        one = problem | {"e": np.where(np.arange(T)[:, None] == t, problem["e"], 0.0)}
        d = truncated(one, steps=steps, stride=1)
        kept = np.any(d.delta != 0.0, axis=-1).sum(axis=1)
        assert kept.tolist() == [min(steps, t + 1)] * B


@pytest.mark.parametrize("window", [(2, 2), (3, 3), (5, 5), (3, 1), (5, 2)])
def test_windows_are_sequences_of_their_own(window):
    """Each from the state that the run has there; in the end only h_0 is an argument."""
    problem = random_problem()
    h = [problem["h_0"].T]
    for t in range(T):
        z = [step(problem, n, t, h[-1].T[n]) for n in range(B)]
        h.append(np.stack(z).T)
    sums = {name: np.zeros_like(problem[a]) for a, name in ARGUMENTS.items()}
    for block, kept, whole in windows(list(range(T)), *window):
        cut = slice(kept[0], kept[-1] + 1)
        e = np.where(np.isin(kept, block)[:, None], problem["e"][:, cut], 0.0)
        part = problem | {"x": problem["x"][:, cut], "h_0": h[kept[0]].T, "e": e}
        d = full(part)
        sums["d_inputs"][:, cut] += d.d_inputs
        for name in ("d_kernel", "d_recurrent_kernel", "d_bias"):
            sums[name] += getattr(d, name)
        sums["d_initial_state"] += whole * d.d_initial_state
    d = truncated(problem, steps=window[0], stride=window[1])
    assert_close(d, types.SimpleNamespace(**sums))


# --- Padding


def padded(problem, n_padding, seed=0):
    """The same real steps among masked ones: x NaN there, no cotangent."""
    rng = np.random.default_rng(seed)
    P = T + n_padding
    mask = np.zeros((B, P), bool)
    for row in mask:
        row[rng.choice(P, T, replace=False)] = True
    out = problem | {"mask": mask}
    for name, fill in {"x": np.nan, "e": 0.0, "factors": np.nan}.items():
        if name in problem:
            out[name] = np.full((B, P, *problem[name].shape[2:]), fill)
            out[name][mask] = problem[name].reshape(-1, *problem[name].shape[2:])
    return out


def check_padding(modules=truncated_reference):
    for window, clip in itertools.product([*FEW_WINDOWS, (T, 2)], CLIPS.values()):
        problem = clippable(random_problem(5, dropout=True), clip)
        problem["factors"] = np.random.default_rng(5).normal(size=(B, T))
        for padding in (1, 4):
            more = padded(problem, padding, seed=padding)
            d, e = (any_gradients(p, window, clip, modules) for p in (problem, more))
            weights = ("d_kernel", "d_recurrent_kernel", "d_bias", "d_initial_state")
            assert_close(e, d, 1e-13, weights)
            for name in ("d_inputs", "delta", "adjoint"):
                found = getattr(e, name)[more["mask"]]
                expected = getattr(d, name).reshape(found.shape)
                assert np.max(np.abs(found - expected)) < 1e-13, name
            assert not np.any(e.delta[~more["mask"]])
            assert not np.any(e.d_inputs[~more["mask"]])


def any_gradients(problem, window, clip, modules=truncated_reference):
    options = dict(zip(("steps", "stride"), window, strict=True))
    if clip is None:
        return modules.truncated_gradients(**problem, **options)
    return modules.clipped_gradients(**problem, **options, **clip)


def test_padding_changes_nothing():
    check_padding()


def check_masked_cotangents(modules=truncated_reference):
    for window, clip in itertools.product([*FEW_WINDOWS, (T, 2)], CLIPS.values()):
        check_masked_cotangents_of(window, clip, modules)


def check_masked_cotangents_of(window, clip, modules=truncated_reference):
    problem = clippable(random_problem(6, masked=True), clip)
    d = any_gradients(problem, window, clip, modules)
    moved, early = np.zeros_like(problem["e"]), np.zeros((B, H))
    for n, t in np.ndindex(B, T):
        before = np.flatnonzero(MASK[n, : t + 1])
        target = moved[n, before[-1]] if len(before) else early[n]
        target += problem["e"][n, t]
    again = any_gradients(problem | {"e": moved}, window, clip, modules)
    again.d_initial_state[...] += early
    assert_close(d, again, ROUNDING, {*ARGUMENTS.values(), "delta"})


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("window", FEW_WINDOWS)
def test_a_cotangent_at_a_masked_step_belongs_to_the_real_step_before(window, clip):
    check_masked_cotangents_of(window, clip)


def test_nothing_but_padding():
    problem = random_problem(6, masked=True)
    for clip in CLIPS.values():
        d = any_gradients(problem, (2, 1), clip)
        lost = problem["e"][3].sum(axis=0)
        assert np.allclose(d.d_initial_state[3], lost, rtol=ROUNDING)
        assert not np.any(d.delta[3]) and not np.any(d.d_inputs[3])


# --- Factors


def recursion_with_factors(problem, factors):
    """a_t = e_t + factor_{t+1} (delta_{t+1} U^T), by hand."""
    h, z = [problem["h_0"]], []
    for t in range(T):
        z.append(
            problem["x"][:, t] @ problem["W"] + h[-1] @ problem["U"] + problem["b"]
        )
        h.append(np.tanh(z[-1]))
    a, delta = (np.zeros((B, T, H)) for _ in range(2))
    below = np.zeros((B, H))
    for t in reversed(range(T)):
        link = factors[:, t + 1, None] if t + 1 < T else 0.0
        a[:, t] = problem["e"][:, t] + link * below
        delta[:, t] = a[:, t] * (1 - np.tanh(z[t]) ** 2)
        below = delta[:, t] @ problem["U"].T
    return types.SimpleNamespace(
        d_inputs=delta @ problem["W"].T,
        d_kernel=np.einsum("btd,bth->dh", problem["x"], delta),
        d_recurrent_kernel=np.einsum("bth,btk->hk", np.stack(h[:-1], 1), delta),
        d_bias=delta.sum(axis=(0, 1)),
        d_initial_state=below,  # the link from h_0 has no factor
        adjoint=a,
        delta=delta,
    )


def check_factors(modules=truncated_reference):
    problem = random_problem(7)
    factors = np.random.default_rng(7).normal(size=(B, T))
    d = truncated(problem, modules, steps=None, factors=factors)
    assert_close(d, recursion_with_factors(problem, factors))


def test_factors_are_those_of_the_links():
    check_factors()


def test_factors_of_one_and_zero():
    problem = random_problem(7)
    for window in FEW_WINDOWS:
        options = dict(zip(("steps", "stride"), window, strict=True))
        d = truncated(problem, **options, factors=np.ones((B, T)))
        assert_close(d, truncated(problem, **options))
    d = truncated(problem, steps=None, factors=np.zeros((B, T)))
    expected = truncated(problem, steps=1)
    assert_close(d, expected, names=set(vars(expected)) - {"d_initial_state"})
    # But the link from h_0 has no factor.
    first = expected.delta[:, 0] @ problem["U"].T
    assert np.allclose(d.d_initial_state, first, rtol=ROUNDING, atol=0)


def test_the_mean_over_all_draws_is_the_full_gradient():
    p, T = 0.6, 4
    problem = random_problem(8)
    problem |= {name: problem[name][:, :T] for name in ("x", "e")}
    sums = {name: 0.0 for name in ARGUMENTS.values()}
    for kept in itertools.product([0, 1], repeat=T - 1):
        chance = np.prod(np.where(kept, p, 1 - p))
        factors = np.tile(np.r_[np.nan, np.array(kept) / p], (B, 1))
        d = truncated(problem, steps=None, factors=factors)
        for name in sums:
            sums[name] += chance * getattr(d, name)
    assert_close(types.SimpleNamespace(**sums), full(problem), names=sums)


# --- Clipping


def clipped(problem, modules=truncated_reference, **options):
    return modules.clipped_gradients(**problem, **options)


@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("window", [*WINDOWS, (None, None)])
def test_a_large_norm_clips_nothing(window, masked):
    problem = random_problem(9, masked, dropout=True)
    problem["factors"] = np.random.default_rng(9).normal(size=(B, T))
    limits = [{"adjoint_clipnorm": norm} for norm in (1e9, np.inf)]
    limits += [{"adjoint_max_growth": 1e9}, limits[0] | {"adjoint_max_growth": 1e9}]
    for clip in limits:
        d = any_gradients(problem, window, clip)
        assert_close(d, any_gradients(problem, window, None))


def clipped_by_hand(problem, block, window, norm=np.inf, growth=None):
    """delta of one window: the losses of its block, walked back with clipping."""
    h, slope = [problem["h_0"]], []
    for t in range(T):
        h.append(np.stack([step(problem, n, t, h[-1][n]) for n in range(B)]))
        slope.append(1 - h[-1] ** 2)
    delta, a, limit = np.zeros((B, T, H)), np.zeros((B, H)), norm
    for t in reversed(window):
        a = a + (problem["e"][:, t] if t in block else 0.0)
        if growth is not None:
            later = problem["e"][:, [s for s in block if s >= t]]
            sizes = np.sqrt(np.sum(later**2, axis=2))
            limit = np.minimum(norm, growth * np.sum(sizes, axis=1, keepdims=True))
        length = np.sqrt(np.sum(a**2, axis=1, keepdims=True))
        a = a * np.minimum(1.0, limit / length)
        delta[:, t] = a * slope[t]
        a = delta[:, t] @ problem["U"].T
    return delta, a


def check_clipping(modules=truncated_reference):
    check_clipping_by(random_problem(10), modules, norm=0.8)


def check_growth(modules=truncated_reference):
    problem = random_problem(10)
    # Near 0 tanh is steep, and U explodes.
    problem |= {name: 0.1 * problem[name] for name in ("x", "h_0", "b")}
    problem["U"] = 2 * problem["U"]
    check_clipping_by(problem, modules, growth=1.1)
    check_clipping_by(problem, modules, growth=1.4, norm=6.0)


def check_clipping_by(problem, modules, **limits):
    everything = list(range(T))
    names = {"norm": "adjoint_clipnorm", "growth": "adjoint_max_growth"}
    clip = {names[name]: value for name, value in limits.items()}
    for steps, stride in [(None, None), (3, 3), (3, 1), (5, 2)]:
        delta, dh_0 = np.zeros((B, T, H)), np.zeros((B, H))
        for block, window, whole in windows(everything, steps or T, stride or T):
            part, rest = clipped_by_hand(problem, block, window, **limits)
            delta += part
            dh_0 += whole * rest
        d = clipped(problem, modules, steps=steps, stride=stride, **clip)
        expected = {"delta": delta, "d_initial_state": dh_0}
        expected["d_inputs"] = delta @ problem["W"].T
        expected["d_kernel"] = np.einsum("btd,bth->dh", problem["x"], delta)
        assert_close(d, types.SimpleNamespace(**expected))


def test_clipping_by_hand():
    check_clipping()


def test_clipping_of_growth_by_hand():
    check_growth()


@pytest.mark.parametrize("clip", [NORM, GROWTH, BOTH], ids=["norm", "growth", "both"])
@pytest.mark.parametrize("window", [(None, None), *FEW_WINDOWS])
def test_the_limits_of_these_tests_act(window, clip):
    for problem in (random_problem(5, dropout=True), random_problem(6, masked=True)):
        problem = clippable(problem, clip)
        free = any_gradients(problem, window, None)
        for limit in clip.items():
            alone = any_gradients(problem, window, dict([limit]))
            assert np.linalg.norm(alone.d_kernel - free.d_kernel) > 1e-2
            # Of two limits each is the smaller one somewhere. But where a window has one
            # loss, what that sends is a limit like a norm.
            if clip == BOTH and window != (3, 1):
                both = any_gradients(problem, window, clip)
                assert np.linalg.norm(both.d_kernel - alone.d_kernel) > 1e-2


@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("window", [(None, None), (3, 3)])
def test_no_adjoint_exceeds_the_norm(window, masked):
    problem, norm = random_problem(10, masked), 0.8
    clip = {"adjoint_clipnorm": norm}
    real = MASK if masked else np.ones((B, T), bool)
    before = np.linalg.norm(any_gradients(problem, window, None).adjoint, axis=-1)
    after = np.linalg.norm(any_gradients(problem, window, clip).adjoint, axis=-1)
    assert np.sum(before[real] > norm) > 5
    assert np.max(after[real]) < norm * (1 + ROUNDING)
    # The last real step of a short loss is not clipped where it is short already.
    small = any_gradients(problem | {"e": 1e-3 * problem["e"]}, window, clip)
    assert_close(
        small, any_gradients(problem | {"e": 1e-3 * problem["e"]}, window, None)
    )


def test_each_window_is_clipped_for_itself():
    """Not their sum, which is longer than any of them."""
    problem, norm = random_problem(10), 0.8
    d = clipped(problem, steps=3, stride=1, adjoint_clipnorm=norm)
    sums = np.linalg.norm(d.adjoint, axis=-1)
    assert np.max(sums) > 1.2 * norm
    together = clipped(problem, steps=3, stride=3, adjoint_clipnorm=norm)
    assert np.linalg.norm(d.d_kernel - together.d_kernel) > 1e-2


@pytest.mark.parametrize("clip", [NORM, GROWTH, BOTH], ids=["norm", "growth", "both"])
def test_one_window_of_all_steps_whatever_the_stride(clip):
    problem = clippable(random_problem(10, masked=True), clip)
    expected = clipped(problem, steps=None, **clip)
    for stride in (1, 3, T):
        assert_close(clipped(problem, steps=T, stride=stride, **clip), expected)


def test_what_reaches_the_initial_state_is_not_clipped():
    problem = random_problem(10)
    problem |= {"U": 5 * problem["U"], "f": "linear"}
    d = clipped(problem, steps=None, adjoint_clipnorm=0.5)
    assert np.max(np.linalg.norm(d.d_initial_state, axis=-1)) > 0.5
    delta = d.delta[:, 0] @ problem["U"].T
    assert np.allclose(d.d_initial_state, delta, rtol=ROUNDING)


def test_no_adjoint_is_no_division_by_zero():
    problem = random_problem(10)
    nothing = problem | {"e": 0 * problem["e"]}
    for clip in ({"adjoint_clipnorm": 1e-300}, GROWTH, BOTH):
        d = clipped(nothing, steps=3, **clip)
        assert not any(np.any(value) for value in vars(d).values())


# --- Clipping of growth: closed forms


def scalar(u, cotangents, h_0=2.0):
    """h_t = u h_{t-1}: one unit, inputs of 0; the cotangents by step, 1 ... T."""
    e = np.zeros((1, T, 1))
    for t, value in cotangents.items():
        e[0, t - 1] = value
    one = np.ones((1, 1))
    return {
        "x": np.zeros((1, T, 1)),
        "W": one,
        "U": u * one,
        "b": np.zeros(1),
        "h_0": h_0 * one,
        "f": "linear",
        "e": e,
    }


def check_scalar(problem, adjoint, **limits):
    d = clipped(problem, steps=None, **limits)
    adjoint = np.array(adjoint, float)
    u, h_0 = problem["U"].item(), problem["h_0"].item()
    before = h_0 * u ** np.arange(T)
    np.testing.assert_allclose(d.adjoint.ravel(), adjoint, rtol=ROUNDING)
    np.testing.assert_allclose(d.delta.ravel(), adjoint, rtol=ROUNDING)
    np.testing.assert_allclose(
        d.d_recurrent_kernel, [[before @ adjoint]], rtol=ROUNDING
    )
    np.testing.assert_allclose(d.d_bias, [adjoint.sum()], rtol=ROUNDING)
    # What leaves the first step is not clipped.
    np.testing.assert_allclose(d.d_initial_state, [[u * adjoint[0]]], rtol=ROUNDING)


@pytest.mark.parametrize(("u", "g"), [(2.0, 3.0), (2.0, 1.0), (-1.5, 2.0), (1.25, 2.5)])
def test_growth_of_the_last_loss_alone(u, g):
    """|a_t| = min(|u|^(T - t), g) of what is sent."""
    problem = scalar(u, {T: 0.125})
    n = np.arange(T - 1, -1, -1)
    wanted = 0.125 * np.sign(u) ** n * np.minimum(abs(u) ** n, g)
    check_scalar(problem, wanted, adjoint_max_growth=g)
    assert np.sum(abs(u) ** n > g) >= 2, "nothing was clipped"


@pytest.mark.parametrize(("u", "g"), [(2.0, 3.0), (2.0, 1.0), (1.5, 1.5), (1.25, 1.0)])
def test_growth_of_a_loss_at_every_step(u, g):
    """a_t = min((u^n - 1) / (u - 1), g n) with n = T - t + 1 losses: 1, 3, 6, 9, ..."""
    problem = scalar(u, dict.fromkeys(range(1, T + 1), 1.0))
    n = np.arange(T, 0, -1)
    free = (u**n - 1) / (u - 1)
    check_scalar(problem, np.minimum(free, g * n), adjoint_max_growth=g)
    assert np.sum(free > g * n) >= 3, "nothing was clipped"


def test_growth_in_windows():
    """Each window by the losses of its own block: two of them where k1 = 2."""
    problem = scalar(2.0, dict.fromkeys(range(1, T + 1), 1.0))
    # Free: 1, 3, 6 in a window of three steps; the limits are 1.5, 3, 3. Blocks end at 7,
    # 5, 3 and 1. Of step 5 the window of 7 has 3 and that of 5 has 1; and so on.
    wanted = [1 + 3, 3, 1 + 3, 3, 1 + 3, 3, 1]
    d = clipped(problem, steps=3, stride=2, adjoint_max_growth=1.5)
    assert d.adjoint.ravel().tolist() == wanted
    # In chunks every step is in one window: 1, 3, 4.5 each of its own three losses.
    d = clipped(problem, steps=3, stride=3, adjoint_max_growth=1.5)
    assert d.adjoint.ravel().tolist() == [1.0, 4.5, 3.0, 1.0, 4.5, 3.0, 1.0]


def test_signs_cancel_in_the_adjoint_but_not_in_the_limit():
    problem = scalar(2.0, {5: 1.0, 6: 1.0, 7: -1.0})
    # a_7 = -1, a_6 = 1 - 2, a_5 = 1 - 2, then -2 and -4, limited by 3.
    check_scalar(problem, [-3, -3, -3, -2, -1, -1, -1], adjoint_max_growth=1.0)


def test_growth_of_cotangents_at_masked_steps():
    """The norm of their sum, at the last real step before them."""
    problem = scalar(2.0, {1: 64.0, 4: 1.0, 5: -3.0, 6: 1.0, 7: -1.0})
    problem["mask"] = np.array([[0, 1, 1, 1, 0, 0, 0]], bool)
    # e_4 = 1 - 3 + 1 - 1 = -2; e_1 is before the first real step.
    d = clipped(problem, steps=None, adjoint_max_growth=1.5)
    assert d.delta.ravel().tolist() == [0, -3, -3, -2, 0, 0, 0]
    assert d.d_initial_state.item() == 64 - 6
    # They may cancel, and what enters later alone counts.
    problem = scalar(2.0, {3: 1.0, 4: 1.0, 5: -1.0})
    problem["mask"] = np.array([[1, 1, 1, 1, 0, 1, 1]], bool)
    d = clipped(problem, steps=None, adjoint_max_growth=1.5)
    assert d.delta.ravel().tolist() == [1.5, 1.5, 1, 0, 0, 0, 0]


def test_the_smaller_limit_holds():
    problem = scalar(2.0, dict.fromkeys(range(1, T + 1), 1.0))
    # By growth 1, 3, 6, 8, 10, ...; by the norm 7 at most.
    limits = {"adjoint_max_growth": 2.0, "adjoint_clipnorm": 7.0}
    check_scalar(problem, [7, 7, 7, 7, 6, 3, 1], **limits)


def orthogonal(seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(H, H)))[0]


@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("window", [*FEW_WINDOWS, (None, None)])
def test_where_nothing_grows_nothing_is_clipped(window, masked):
    """Products of Jacobians of norm 1 at most: U of norm 1, slopes of 1 at most."""
    problem = random_problem(11, masked)
    growth = {"adjoint_max_growth": 1.0}
    for U, f in [(np.eye(H), "linear"), (orthogonal(1), "linear"), (np.eye(H), "tanh")]:
        problem |= {"U": U, "f": f}
        free = any_gradients(problem, window, None)
        assert_close(any_gradients(problem, window, growth), free)
    # It would be seen.
    problem |= {"U": 3.0 * np.eye(H), "f": "linear"}
    free = any_gradients(problem, window, None)
    d = any_gradients(problem, window, growth)
    assert np.linalg.norm(d.d_kernel - free.d_kernel) > 1e-2


@pytest.mark.parametrize("window", [*FEW_WINDOWS, (None, None)])
def test_adjoints_grow_no_more_than_that(window):
    """And they do grow as much: the limit is reached at more than one step."""
    problem = exploding(random_problem(12, dropout=True))
    problem["e"][:, :-1] = 0.0
    d = any_gradients(problem, window, {"adjoint_max_growth": 1.25})
    sent = np.linalg.norm(problem["e"][:, -1], axis=-1)
    growth = np.linalg.norm(d.adjoint, axis=-1) / sent[:, None]
    assert np.max(growth) < 1.25 * (1 + ROUNDING)
    assert np.sum(growth > 1.25 * (1 - ROUNDING)) > 2


# --- Clipping of growth: what must not matter


@pytest.mark.parametrize("window", [(None, None), *FEW_WINDOWS])
def test_growth_of_a_loss_times_a_power_of_two(window):
    """Every gradient times it, bit for bit. A norm is in the units of the loss."""
    problem = exploding(random_problem(13, masked=True, dropout=True))
    d = any_gradients(problem, window, GROWTH)
    of_norm = any_gradients(problem, window, NORM)
    for k in (-40, -1, 30):
        scaled = problem | {"e": 2.0**k * problem["e"]}
        for name, value in vars(any_gradients(scaled, window, GROWTH)).items():
            assert np.array_equal(value, 2.0**k * getattr(d, name)), name
        other = any_gradients(scaled, window, NORM).d_kernel / 2.0**k
        assert np.linalg.norm(other - of_norm.d_kernel) > 0.1


@pytest.mark.parametrize("window", [(None, None), *FEW_WINDOWS])
def test_growth_of_a_batch_is_that_of_its_parts(window):
    """The gradients of a mean loss are the means of the examples' gradients."""
    problem = exploding(random_problem(14, masked=True, dropout=True))
    per_example = ("x", "h_0", "e", "mask", "recurrent_dropout")

    def mean_of_parts(clip):
        parts = []
        for n in range(B):
            one = {name: problem[name][n : n + 1] for name in per_example}
            parts.append(any_gradients(problem | one, window, clip))
        return np.mean([d.d_kernel for d in parts], axis=0)

    mean = problem | {"e": problem["e"] / B}
    d = any_gradients(mean, window, GROWTH).d_kernel
    assert np.linalg.norm(d - mean_of_parts(GROWTH)) < ROUNDING * np.linalg.norm(d)
    d = any_gradients(mean, window, NORM).d_kernel
    assert np.linalg.norm(d - mean_of_parts(NORM)) > 0.1 * np.linalg.norm(d)


# --- Shown able to fail: one term of the source broken at a time


def broken(old, new):
    """A copy of the module in which `old` reads `new`."""
    source = inspect.getsource(truncated_reference)
    assert source.count(old) == 1, f"{old!r} is not there once"
    copy = types.ModuleType("keras_bptt.broken")
    exec(source.replace(old, new), vars(copy))
    return copy


def check_differences(modules):
    for window in FEW_WINDOWS:
        check_by_differences(random_problem(2, True, True), *window, modules)


FIRST = "row.block_end(row.count[loss]) - row.steps + 1"
SENT = "if row.mask[t]:\n                    sent"
MUTATIONS = {
    "window a step short": (FIRST, FIRST + " + 1", check_differences),
    "window a step long": (FIRST, FIRST + " - 1", check_differences),
    "window from the loss": (
        FIRST,
        "row.count[loss] - row.steps + 1",
        check_differences,
    ),
    "blocks from the start": (
        "self.N - self.stride * ((self.N - s) // self.stride)",
        "min(self.N, self.stride * -(-s // self.stride))",
        check_differences,
    ),
    "padding counts": ("int(np.sum(mask[n, :t]))", "t", check_differences),
    "mask ignored": ("bool(mask[n, t - 1])", "True", check_differences),
    "masked step stops a path": ("return a\n", "return 0 * a\n", check_differences),
    "never to h_0 where E = steps": (
        "first > 1:\n                    break\n            else:\n"
        "                row.dh_0 += a\n    return d\n\n\ndef clipped",
        "first:\n                    break\n            else:\n"
        "                row.dh_0 += a\n    return d\n\n\ndef clipped",
        check_differences,
    ),
    "drop e at masked steps": (
        "a = row.e[loss]",
        "a = row.e[loss] * row.mask[loss]",
        check_differences,
    ),
    "drop r": ("self.factor[t] * self.r *", "self.factor[t] *", check_differences),
    "drop r in dU": ("self.before[t] = r * h", "self.before[t] = h", check_differences),
    "transpose U": ("delta @ self.U.T", "delta @ self.U", check_differences),
    "factor of the link out": (
        "factors[n, t - 1]",
        "factors[n, min(t, max(x) - 1)]",
        check_factors,
    ),
    "factor of the link from h_0": ("if self.count[t] > 1 else 1.0", "", check_factors),
    "first real step by position": ("self.count[t] > 1", "t > 1", check_padding),
    "one window by position": ("steps >= self.N", "steps >= max(x)", check_padding),
    "clip too much": ("if norm > limit", "if norm > 0", check_clipping),
    "clip nothing": ("if norm > limit", "if False", check_clipping),
    "clip a loss that flows elsewhere": ("end[t] == block", "True", check_clipping),
    "clipped window a step long": (
        "first = block - row.steps + 1",
        "first = block - row.steps",
        check_clipping,
    ),
    "clip masked steps": (SENT, SENT.replace("row.mask[t]", "True"), check_padding),
    "growth of 1": ("adjoint_max_growth * sent", "sent", check_growth),
    "the larger limit": ("min(limits)", "max(limits)", check_growth),
    "sent at this step alone": ("sent = sent + np", "sent = np", check_growth),
    "sent at every step since": (
        "e_s = np.zeros_like(e_s)",
        "e_s = 1.0 * e_s",
        check_growth,
    ),
    "sent before this step": (
        "adjoint_max_growth, sent))",
        "adjoint_max_growth, sent - np.linalg.norm(row.e[t])))",
        check_growth,
    ),
    "sent in all windows so far": (
        "sent = 0.0",
        "sent = 0.0 if block == min(end.values()) else sent",
        check_growth,
    ),
    "sent to other windows": (
        "    e_s = e_s + row.e[t]",
        "e_s = e_s + row.e[t]",
        check_growth,
    ),
    "a sum of numbers, not of norms": (
        "np.linalg.norm(e_s)",
        "np.sum(e_s)",
        check_growth,
    ),
    "sent at real steps alone": (
        "e_s = e_s + row.e[t]",
        "e_s = row.e[t]",
        check_masked_cotangents,
    ),
    "norms of masked cotangents apart": (
        "e_s = e_s + row.e[t]",
        "sent = sent + np.linalg.norm(row.e[t])",
        check_masked_cotangents,
    ),
}


def test_an_unbroken_copy_passes():
    copy = broken("self.N = ", "self.N = 0 + ")
    for check in {check for *_, check in MUTATIONS.values()}:
        check(copy)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_copy_is_caught(name):
    old, new, check = MUTATIONS[name]
    copy = broken(old, new)  # outside: it asserts that the text is there
    with pytest.raises(AssertionError):
        check(copy)


# --- Errors


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (B, D), r"`x` must have shape \(batch=any, timesteps=any, features="),
        ("U", (H, H + 1), r"`U` must have shape \(units=3, units=3\).*\(3, 4\)"),
        ("e", (B, T, 1), r"`e` must have shape \(batch=4, timesteps=7, units=3\)"),
        ("mask", (B, T + 1), r"`mask` must have shape \(batch=4, timesteps=7\)"),
        ("mask", (B, T, 1), r"`mask` must have shape.*\(4, 7, 1\)"),
        ("recurrent_dropout", (1, H), r"`recurrent_dropout` .*\(batch=4, units=3\)"),
        ("factors", (T,), r"`factors` must have shape \(batch=4, timesteps=7\)"),
    ],
)
def test_wrong_shapes_raise(name, shape, message):
    problem = random_problem() | {
        name: np.zeros(shape, bool if name == "mask" else float)
    }
    for clip in CLIPS.values():
        with pytest.raises(ValueError, match=message):
            any_gradients(problem, (3, 2), clip)


@pytest.mark.parametrize(
    ("window", "name"),
    [((steps, None), "steps") for steps in (0, -1, 2.0, True, "3")]
    + [((3, stride), "stride") for stride in (0, -1, 4, 2.0, True)]
    + [((None, 2), "stride")],
    ids=str,
)
def test_wrong_windows_raise(window, name):
    received = re.escape(f"{name}={dict(steps=window[0], stride=window[1])[name]!r}")
    for clip in CLIPS.values():
        with pytest.raises(
            ValueError, match=f"`{name}` must be .*Received: {received}"
        ):
            any_gradients(random_problem(), window, clip)


@pytest.mark.parametrize("norm", [0, -1.0, np.nan, True, None, "1"], ids=repr)
def test_wrong_norms_raise(norm):
    with pytest.raises(
        ValueError, match="`adjoint_clipnorm` must be a positive number"
    ):
        clipped(random_problem(), steps=3, adjoint_clipnorm=norm)


@pytest.mark.parametrize("norm", [None, 0.5])
@pytest.mark.parametrize(
    "growth", [0.999, 0, -2.0, np.nan, np.inf, True, "2"], ids=repr
)
def test_wrong_growths_raise(growth, norm):
    received = re.escape(f"adjoint_max_growth={growth!r}")
    message = f"`adjoint_max_growth` must be a finite number of at least 1.*{received}"
    limits = {"adjoint_max_growth": growth, "adjoint_clipnorm": norm}
    with pytest.raises(ValueError, match=message):
        clipped(random_problem(), steps=3, **limits)


def test_no_limit_raises():
    with pytest.raises(
        ValueError, match="or `adjoint_max_growth`.*truncated_gradients"
    ):
        clipped(random_problem(), steps=3)
    for growth in (1, np.float32(2.5)):
        clipped(random_problem(), steps=3, adjoint_max_growth=growth)


def test_a_mask_of_numbers_raises():
    with pytest.raises(ValueError, match="`mask` must be boolean.*float64"):
        truncated(random_problem() | {"mask": np.ones((B, T))}, steps=3)
    with pytest.raises(ValueError, match="`f` must be one of"):
        truncated(random_problem() | {"f": "softmax"}, steps=3)


def test_empty_batch_and_numpy_integers():
    problem = random_problem(dropout=True, masked=True)
    for name in ("x", "h_0", "e", "mask", "recurrent_dropout"):
        problem[name] = problem[name][:0]
    d = truncated(problem, steps=np.int64(3), stride=np.int32(1))
    assert d.d_inputs.shape == (0, T, D) and not np.any(d.d_kernel)


def test_arguments_are_left_alone():
    problem = random_problem(masked=True, dropout=True)
    problem["factors"] = np.ones((B, T))
    before = {k: np.copy(v) for k, v in problem.items()}
    for clip in CLIPS.values():
        d = any_gradients(problem, (3, 2), clip)
        assert all(value.dtype == np.float64 for value in vars(d).values())
    for name, value in before.items():
        assert np.array_equal(problem[name], value, equal_nan=name == "x")
