"""The gradient flow of a layer in words: what is the case, and what is likely to help.

The thresholds are a factor of a hundred either way over the lags that were measured. They
are conventions: a gradient that loses 99 % of its norm on the way from the last step to the
first still learns the near, and one that grows by 100 makes steps of wild sizes.
"""

import math
import textwrap

import numpy as np

from keras_bptt.truncation import Truncation

VANISHED = 0.01
EXPLODED = 100.0
# What share of saturated or dead units is worth a word.
MANY = 0.3
_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 78


def kind(flow):
    """One word for the verdict on a `LayerFlow`."""
    free = _free_kind(flow)
    return "truncated" if free != "none" and _window(flow) else free


def explanation(flow):
    free = _free_kind(flow)
    if free == "none":
        return (
            "no gradient: dL/dh_t is 0 at every step. The loss does not depend on this "
            "layer, or what lies between lets nothing through"
        )
    words = f"{free}: {_course(flow)}"
    if free == "exploding" and flow.adjoint_clipnorm is not None:
        most = np.nanmax(flow.lag_norms)
        words = (
            f"exploding, but clipped: no step gets more than {most:.2g} times what the "
            f"loss sent. Unclipped: {_course(flow)}"
        )
    if kind(flow) != "truncated":
        return words
    k = flow.truncation.steps
    bias = flow.truncation_bias(k, flow.truncation.stride)
    return (
        f"truncated at {k} of {flow.timesteps} steps, beyond which lies an estimated "
        f"{_percent(bias)} of the gradient. Untruncated: {words}"
    )


def advice(flow):
    free, found = _free_kind(flow), []
    if kind(flow) == "truncated":
        found += _of_window(flow)
    if free == "exploding":
        found += _of_explosion(flow)
    elif free == "vanishing":
        found += _of_vanishing(flow)
    return found


def summary(flow):
    """A block of lines for a terminal, none longer than 78 characters."""
    examples, steps = flow.adjoint_norms.shape
    what = [
        f"{flow.units} units",
        flow.activation,
        f"{steps} steps",
        f"{examples} examples",
    ]
    if flow.truncation is not None:
        what.append(str(flow.truncation))
    if flow.adjoint_clipnorm is not None:
        what.append(f"adjoint_clipnorm={flow.adjoint_clipnorm:g}")
    rows = [
        ("|dL/dh_t|", *_line(flow.mean_adjoint), f"t = 1 ... {steps}"),
        (
            "by lag",
            *_line(flow.lag_norms),
            f"lag 0 ... {max(len(flow.lag_norms) - 1, 0)}",
        ),
    ]
    lines = [f"{label:<11} {bars}  {ends}, {axis}" for label, bars, ends, axis in rows]
    lines += textwrap.wrap(_numbers(flow), _WIDTH - 2)
    lines += textwrap.wrap(_windows(flow), _WIDTH - 2)
    text = [f"{flow.name}: {', '.join(what)}"]
    text += textwrap.wrap(explanation(flow), _WIDTH - 2)
    for item in advice(flow):
        text += textwrap.wrap(
            item, _WIDTH - 2, initial_indent="- ", subsequent_indent="  "
        )
    head, *rest = textwrap.wrap(text[0], _WIDTH, subsequent_indent="  ")
    return "\n".join([head, *rest, *("  " + line for line in [*text[1:], *lines])])


def _free_kind(flow):
    shares = flow.free_lag_norms
    if not len(shares):
        return "none" if np.all(np.nan_to_num(flow.adjoint_norms) == 0) else "exploding"
    if not np.all(np.isfinite(shares)) or np.max(shares) >= EXPLODED * shares[0]:
        return "exploding"
    return "vanishing" if shares[-1] <= VANISHED * shares[0] else "healthy"


def _window(flow):
    """Whether there is a window, and shorter than the sequence."""
    own = flow.truncation
    return isinstance(own, Truncation) and own.steps < flow.timesteps


def _course(flow):
    shares = flow.free_lag_norms
    longest = len(shares) - 1
    if longest == 0:
        return "one step, which no gradient passes through"
    if not np.all(np.isfinite(shares)):
        lag = int(np.flatnonzero(~np.isfinite(shares))[0])
        return f"dL/dh_t is not finite {lag} of {longest} steps back"
    if np.max(shares) >= EXPLODED * shares[0]:
        lag = int(np.flatnonzero(shares >= EXPLODED * shares[0])[0])
        return (
            f"{_pace(flow)}; {EXPLODED:g} times as large {lag} of {longest} steps back"
        )
    if shares[-1] <= VANISHED * shares[0]:
        lag = int(np.flatnonzero(shares <= VANISHED * shares[0])[0])
        left = f"{_percent(VANISHED)} of it is left"
        return f"{_pace(flow)}; {left} after {lag} of {longest} steps"
    left = shares[-1] / shares[0]
    if left > 1:
        return (
            f"dL/dh_t is {left:.3g} times as large after {longest} steps; {_pace(flow)}"
        )
    return f"{_percent(left)} of dL/dh_t is left after {longest} steps; {_pace(flow)}"


def _pace(flow):
    factor = flow.factor
    if factor == 0:
        return "dL/dh_t does not pass one step"
    if abs(factor - 1) * len(flow.free_lag_norms) < 0.01:
        return "dL/dh_t keeps its norm"
    word, steps = ("halves", flow.half_life)
    if factor > 1:
        word, steps = "doubles", math.log(2) / math.log(factor)
    return f"dL/dh_t {word} every {steps:.3g} steps (x {factor:.3g} a step)"


def _numbers(flow):
    parts = [
        f"sigma_max(U) {flow.sigma_max:.3g}, spectral radius {flow.spectral_radius:.3g}"
    ]
    bound = flow.bound
    if bound is None:
        parts.append("no bound: the activation mixes units")
    else:
        parts.append(f"a step multiplies by at most sigma_max(U) max f' = {bound:.3g}")
    if flow.saturated is not None:
        parts.append(f"saturated units {_percent(np.nanmean(flow.saturated))}")
    if flow.inactive is not None:
        parts.append(
            f"inactive units {_percent(np.nanmean(flow.inactive))}, dead "
            f"{_percent(flow.dead)}"
        )
    return "; ".join(parts)


def _of_window(flow):
    own = flow.truncation
    k = flow.suggest_truncation(stride=own.stride if own.stride < own.steps else None)
    if k is not None and k <= own.steps:
        return [f"the window is long enough: {k} steps keep the bias within 5 %"]
    if k is not None:
        longer = Truncation(k, own.stride if own.stride < own.steps else None)
        return [f"truncation={longer} keeps the bias within 5 %"]
    k = flow.suggest_truncation()
    if k is not None:
        return [
            f"truncation={_policy(flow, k)} keeps the bias within 5 %, which longer chunks "
            "do not: the first losses of a chunk reach no farther than its begin"
        ]
    return [
        f"no window shorter than {flow.timesteps} steps keeps the bias within 5 %: "
        "truncation=None, with checkpoint_every='sqrt' if memory is the reason, or a "
        "RandomizedTruncation, which has no bias"
    ]


def _policy(flow, k):
    """The windows in which every loss reaches k steps back."""
    return k if flow.last_step_only else Truncation(k, stride=1)


def _windows(flow):
    strides = (
        {"": 1} if flow.last_step_only else {" for every loss": 1, " in chunks": None}
    )
    found = []
    for how, stride in strides.items():
        k = flow.suggest_truncation(stride=stride)
        steps = "none shorter than the sequence" if k is None else f"{k} steps"
        found.append(steps + how)
    return f"window for an estimated bias of 5 % at these weights: {', '.join(found)}"


def _of_explosion(flow):
    found = []
    if flow.sigma_max > 1.1:
        found.append(
            f"recurrent_initializer='orthogonal', all of whose singular values are 1: here "
            f"the largest is {flow.sigma_max:.3g}"
        )
    ends = [row[np.isfinite(row) & (row > 0)][-1:] for row in flow.adjoint_norms]
    ends = np.concatenate(ends)
    if flow.adjoint_clipnorm is None and len(ends):
        found.append(
            f"adjoint_clipnorm={np.median(ends):.2g}, what |dL/dh_t| is at the last step "
            "of batches like this one (a mean loss divides by their size), clips where it "
            "explodes; or clipnorm in the optimizer, which scales the whole gradient"
        )
    if flow.max_slope is not None and flow.max_slope > 1:
        found.append(
            f"tanh or relu, whose f' is at most 1: here it reaches {flow.max_slope:.3g}"
        )
    return found


def _of_vanishing(flow):
    found, bound = [], flow.bound
    if flow.max_slope is not None and flow.max_slope < 1:
        found.append(
            f"tanh or relu, whose f' reaches 1: here at most {flow.max_slope:.3g}"
        )
    if bound is not None and bound < 1 and flow.max_slope >= 1:
        found.append(
            "recurrent_initializer='orthogonal' (or the identity, with relu: Le et al. "
            f"2015): sigma_max(U) max f' = {bound:.3g} is below 1, so the gradient "
            "vanishes whatever the inputs are"
        )
    elif flow.spectral_radius < 0.9:
        found.append(
            "recurrent_initializer='orthogonal': the spectral radius of U is "
            f"{flow.spectral_radius:.3g}"
        )
    if flow.saturated is not None and np.nanmean(flow.saturated) > MANY:
        found.append(
            f"smaller weights or inputs: {_percent(np.nanmean(flow.saturated))} of the "
            "units are saturated, where f' is next to 0"
        )
    if flow.dead is not None and flow.dead > MANY:
        found.append(
            f"a smaller learning rate or a larger bias: {_percent(flow.dead)} of the "
            "units are 0 at every step"
        )
    return found or [
        "if the far past matters: relu and the identity for U, shorter sequences, or a "
        "layer with gates (LSTM, GRU); U itself is not what makes the gradient small"
    ]


def _line(values, width=32):
    """A sparkline on a logarithmic axis, and the values at its ends."""
    values = np.asarray(values, float)
    if not len(values):
        return "", "nothing"
    groups = np.array_split(values, min(width, len(values)))
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.array([np.log10(g[len(g) // 2]) for g in groups])
    finite = logs[np.isfinite(logs)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0, 0)
    # A level of the bars is at least a factor of 1.1, lest noise look like a slope.
    span = max(high - low, 8 * math.log10(1.1))

    def bar(log):
        if not math.isfinite(log):
            return "█" if log > 0 else " "
        return _BARS[min(int((log - low) / span * 8), 7)]

    return "".join(map(bar, logs)), f"{values[0]:.2g} ... {values[-1]:.2g}"


def _percent(share):
    percent = 100 * share
    digits = 0 if percent >= 10 or percent == round(percent) else 1
    return f"{percent:.{digits}f} %"
