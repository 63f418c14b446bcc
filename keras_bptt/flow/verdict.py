"""The gradient flow of a layer in words: what is the case. What may help is in advice.py.

The thresholds are a factor of a hundred either way over the lags that were measured. They
are conventions: a gradient that loses 99 % of its norm on the way from the last step to the
first still learns the near, and one that grows by 100 makes steps of wild sizes. The same
hundredfold, of the states over all that has come in, is a forward pass that explodes.
"""

import math
import textwrap
import warnings

import numpy as np

from keras_bptt.truncation import Truncation

VANISHED = 0.01
EXPLODED = 100.0
_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 78


def kind(flow):
    """A word or two for the verdict on a `LayerFlow`."""
    free = free_kind(flow)
    judged = free in ("healthy", "vanishing", "exploding")
    return "truncated" if judged and _window(flow) else free


def explanation(flow):
    free = free_kind(flow)
    if free == "not finite":
        return (
            f"not finite: {_listed(flow.not_finite)}. Nothing can be said of the gradient "
            "before these are finite"
        )
    if free == "exploding states":
        return f"exploding states: {_states(flow)}"
    if free == "none":
        return (
            f"no gradient: {flow.adjoint} is 0 at every step. The loss does not depend on "
            "this layer, or what lies between lets nothing through"
        )
    words = f"{free}: {_course(flow)}"
    if free == "exploding" and flow.clipped:
        most = np.nanmax(flow.lag_shares)
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
        f"{percent(bias)} of the gradient. Untruncated: {words}"
    )


def summary(flow):
    """A block of lines for a terminal, none longer than 78 characters."""
    examples, steps = flow.adjoint_norms.shape
    what = [flow.layer, f"{flow.units} units", flow.activation]
    what = [*filter(None, what), f"{steps} steps", f"{examples} examples"]
    if flow.truncation is not None:
        what.append(str(flow.truncation))
    if flow.adjoint_clipnorm is not None:
        what.append(f"adjoint_clipnorm={flow.adjoint_clipnorm:g}")
    if flow.adjoint_max_growth is not None:
        what.append(f"adjoint_max_growth={flow.adjoint_max_growth:g}")
    # Of numbers that rest on what is not finite there is nothing to show.
    lines = [] if free_kind(flow) == "not finite" else _lines(flow)
    text = [f"{flow.name}: {', '.join(what)}"]
    text += textwrap.wrap(flow.explanation, _WIDTH - 2)
    for item in flow.advice:
        text += textwrap.wrap(
            item, _WIDTH - 2, initial_indent="- ", subsequent_indent="  "
        )
    head, *rest = textwrap.wrap(text[0], _WIDTH, subsequent_indent="  ")
    return "\n".join([head, *rest, *("  " + line for line in [*text[1:], *lines])])


def _lines(flow):
    curves = {f"|{flow.adjoint}|": flow.mean_adjoint}
    several = flow.state_adjoint_norms if len(flow.state_adjoint_norms) > 1 else {}
    for name, norms in several.items():
        curves[f"|dL/d{name}_t|"] = over_examples(np.nanmean, norms)
    lines = [f"{name:<12}{_line(y, 't = ', 1)}" for name, y in curves.items()]
    lines.append(f"{'by lag':<12}{_line(flow.lag_shares, 'lag ', 0)}")
    words = [_numbers(flow)]
    if several:
        names = " and ".join(f"{name}_t" for name in several)
        words.insert(0, f"s_t stands for {names} together")
    words += [_gate(name, gate) for name, gate in flow.gates.items()]
    words += [_windows(flow)] if flow.finite else []
    return lines + [row for item in words for row in textwrap.wrap(item, _WIDTH - 2)]


def free_kind(flow):
    """The same, whatever window there is."""
    if flow.state_growth >= EXPLODED:
        return "exploding states"
    if flow.not_finite:
        return "not finite"
    shares = flow.untruncated_lag_shares
    if not len(shares):
        return "none" if np.all(np.nan_to_num(flow.adjoint_norms) == 0) else "exploding"
    if not np.all(np.isfinite(shares)) or np.max(shares) >= EXPLODED * shares[0]:
        return "exploding"
    return "vanishing" if shares[-1] <= VANISHED * shares[0] else "healthy"


def _window(flow):
    """Whether there is a window, and shorter than the sequence."""
    own = flow.truncation
    return isinstance(own, Truncation) and own.steps < flow.timesteps


def _states(flow):
    most = np.nanmax(flow.state_norms) if flow.state_norms is not None else math.inf
    state = flow.adjoint.removeprefix("dL/d")
    reached = f"|{state}| " + (
        f"reaches {most:.2g}" if math.isfinite(most) else "overflows"
    )
    times = ""
    if math.isfinite(flow.state_growth):
        times = f", {flow.state_growth:.2g} times all that has come in"
    words = (
        f"{reached}{times}. It is the forward pass that explodes, which no clipping of "
        "gradients helps"
    )
    if flow.not_finite:
        return f"{words}. Not finite: {_listed(flow.not_finite)}"
    return f"{words}; {_course(flow)}" if len(flow.untruncated_lag_shares) else words


def _listed(items, most=6):
    """So many of the items."""
    more = len(items) - most
    return ", ".join(items[:most]) + (f" and {more} more" if more > 0 else "")


def _course(flow):
    shares = flow.untruncated_lag_shares
    longest = len(shares) - 1
    if longest == 0 and flow.timesteps > 1:
        return "no gradient passes from a step to the one before"
    if longest == 0:
        return "one step, which no gradient passes through"
    if not np.all(np.isfinite(shares)):
        lag = int(np.flatnonzero(~np.isfinite(shares))[0])
        return f"{flow.adjoint} is not finite {lag} of {longest} steps back"
    if np.max(shares) >= EXPLODED * shares[0]:
        lag = int(np.flatnonzero(shares >= EXPLODED * shares[0])[0])
        return (
            f"{_pace(flow)}; {EXPLODED:g} times as large {lag} of {longest} steps back"
        )
    if shares[-1] <= VANISHED * shares[0]:
        lag = int(np.flatnonzero(shares <= VANISHED * shares[0])[0])
        left = f"{percent(VANISHED)} of it is left"
        return f"{_pace(flow)}; {left} after {lag} of {longest} steps"
    left = shares[-1] / shares[0]
    if left > 1:
        times = f"{left:.3g} times as large after {longest} steps"
        return f"{flow.adjoint} is {times}; {_pace(flow)}"
    left = f"{percent(left)} of {flow.adjoint} is left"
    return f"{left} after {longest} steps; {_pace(flow)}"


def _pace(flow):
    factor = flow.factor
    if factor == 0:
        return f"{flow.adjoint} does not pass one step"
    if abs(factor - 1) * len(flow.untruncated_lag_shares) < 0.01:
        return f"{flow.adjoint} keeps its norm"
    word, steps = ("halves", flow.half_life)
    if factor > 1:
        word, steps = "doubles", math.log(2) / math.log(factor)
    return f"{flow.adjoint} {word} every {steps:.3g} steps (x {factor:.3g} a step)"


def _numbers(flow):
    if flow.sigma_max is None:
        most = flow.largest_step
        if math.isnan(most):
            return "no step is reached from another one"
        return f"a step multiplied by {most:.3g} at most, over all losses"
    parts = [
        f"sigma_max(U) {flow.sigma_max:.3g}, spectral radius {flow.spectral_radius:.3g}"
    ]
    bound = flow.bound
    if bound is None:
        parts.append("no bound: the activation mixes units")
    else:
        parts.append(f"a step multiplies by at most sigma_max(U) max f' = {bound:.3g}")
    if share_of(flow.saturated) is not None:
        parts.append(f"saturated units {percent(share_of(flow.saturated))}")
    if share_of(flow.inactive) is not None:
        parts.append(
            f"inactive units {percent(share_of(flow.inactive))}, dead {percent(flow.dead)}"
        )
    return "; ".join(parts)


def _gate(name, gate):
    words = f"{name} {np.mean(gate.of_unit):.3g}"
    if gate.holds:
        middle, most = np.median(gate.memory), np.max(gate.memory)
        words += (
            f", which holds a unit for {middle:.3g} steps (median; at most {most:.3g})"
        )
    if share_of(gate.saturated) is not None:
        words += f"; saturated {percent(share_of(gate.saturated))}"
    return words


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


def _line(values, axis, first, width=32):
    """A sparkline on a logarithmic axis; the values at its ends, and where these are.

    NaN, where all examples are masked, is left blank, and is no end.
    """
    values = np.asarray(values, float)
    known = np.flatnonzero(~np.isnan(values))
    if not len(known):
        return "nothing"
    with np.errstate(divide="ignore"):
        logs = np.log10(values)
    groups = np.array_split(logs, min(width, len(values)))
    groups = [group[~np.isnan(group)] for group in groups]
    logs = np.array([g[len(g) // 2] if len(g) else np.nan for g in groups])
    finite = logs[np.isfinite(logs)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0, 0)
    # A level of the bars is at least a factor of 1.1, lest noise look like a slope.
    span = max(high - low, 8 * math.log10(1.1))

    def bar(log):
        if not math.isfinite(log):
            return "█" if log > 0 else " "
        return _BARS[min(int((log - low) / span * 8), 7)]

    ends = [f"{values[i]:.2g}" for i in known[[0, -1]]]
    places = [str(first + i) for i in known[[0, -1]]]
    bars = "".join(map(bar, logs))
    return f"{bars}  {' ... '.join(ends)}, {axis}{' ... '.join(places)}"


def over_examples(function, norms):
    """The function of the examples that have a step; NaN where none has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a step that all examples mask
        return function(norms, axis=0)


def share_of(by_step):
    """The mean over the steps that not all examples mask; None where there is none."""
    known = [] if by_step is None else by_step[~np.isnan(by_step)]
    return float(np.mean(known)) if len(known) else None


def percent(share):
    percent = 100 * share
    digits = 0 if percent >= 10 or percent == round(percent) else 1
    return f"{percent:.{digits}f} %"
