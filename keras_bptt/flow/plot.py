"""The gradient flow of a model as a figure, with matplotlib: its panels and their order."""

import itertools
import math
import textwrap

import numpy as np

from keras_bptt.flow.curves import (
    band,
    curve,
    finish,
    mark,
    say,
    shown,
    thinned,
    whole_numbers,
)
from keras_bptt.flow.verdict import over_examples, percent, share_of

# As many characters as stand side by side in three panels of a row.
_TITLE = 40
_STEPS = "step t, in the order of processing"


def of_model(flows, tolerance, path=None):
    """A row for each of the flows, by name; the panels are said in `GradientFlow.plot`."""
    figure, axes = _figure(len(flows), 3)
    for (name, flow), row in zip(flows.items(), axes, strict=True):
        over_time(row[0], flow, f"{name}: {flow.verdict}")
        _by_lag(row[1], flow, tolerance)
        _inside(row[2], flow)
    return _saved(figure, path)


def of_layer(flow, tolerance, path=None, ax=None):
    """The row of one flow; in `ax` the first panel of it."""
    if ax is None:
        return of_model({flow.name: flow}, tolerance, path)
    over_time(ax, flow, f"{flow.name}: {flow.verdict}")
    return _saved(ax.figure, path)


def compared(pairs, labels, path=None, ax=None):
    """A row for each pair of flows, by name; in `ax` the first panel of the only one."""
    figure, axes = (None, [[ax]]) if ax is not None else _figure(len(pairs), 2)
    for (name, flows), row in zip(pairs.items(), axes, strict=True):
        both = list(zip(labels, flows, strict=True))
        verdicts = ", ".join(f"{label}: {flow.verdict}" for label, flow in both)
        _title(row[0], name, verdicts)
        for label, flow in both:
            _steps(row[0], flow, f"{label}: |{flow.adjoint}|")
        finish(row[0], _STEPS, "norm of the gradient", "no gradient at any step")
        if ax is None:
            for label, flow in both:
                _lags(row[1], flow.untruncated_lag_shares, label)
            _title(row[1], *(f"{label}: {_pace(flow)}" for label, flow in both))
            _finish_lags(row[1])
    return _saved(figure or ax.figure, path)


def over_time(axes, flow, title):
    """The gradient against t: of all states, of each, and by the z_t."""
    steps = np.arange(1, flow.timesteps + 1)
    _steps(axes, flow, f"|{flow.adjoint}|")
    several = flow.state_adjoint_norms if len(flow.state_adjoint_norms) > 1 else {}
    for name, norms in several.items():
        curve(axes, steps, _median(norms), f"|dL/d{name}_t|, median", linewidth=1)
    if flow.delta_norms is not None:
        curve(axes, steps, _median(flow.delta_norms), "|dL/dz_t|, median", "--")
    _title(axes, title)
    finish(axes, _STEPS, "norm of the gradient", _no_norms(flow))


def _steps(axes, flow, label):
    """The median over the examples and its band, and where an example is not finite."""
    steps = np.arange(1, flow.timesteps + 1)
    low, middle, high = flow.adjoint_quantiles((0.1, 0.5, 0.9))
    line = curve(axes, steps, middle, f"{label}, median")
    words = "10 % to 90 % of the examples"
    band(axes, steps, low, high, line.get_color(), words)
    bad = np.any(np.isinf(flow.adjoint_norms), axis=0)
    mark(axes, steps, bad, "not finite in an example")


def _by_lag(axes, flow, tolerance):
    """How much of a loss reaches so many steps back, and the window for a tolerance."""
    _lags(axes, flow.untruncated_lag_shares, "untruncated, unclipped")
    own = flow.lag_shares
    if not np.array_equal(own, flow.untruncated_lag_shares, equal_nan=True):
        curve(axes, np.arange(len(own)), own, "as the layer has it", "--")
    k = flow.suggest_truncation(tolerance)
    title = _pace(flow)
    if k is None and flow.finite:
        title += f"; no window for a bias of {100 * tolerance:.3g} %"
    _title(axes, title)
    _finish_lags(axes)
    if k is not None:
        label = f"window of {k}: bias {100 * tolerance:.3g} %"
        axes.axvline(k - 1, color="grey", linestyle=":", label=label)
        axes.legend(fontsize=8)


def _lags(axes, shares, label):
    lags = np.arange(len(shares))
    curve(axes, lags, shares, label)
    mark(axes, lags, ~np.isfinite(shares), "not finite")


def _finish_lags(axes):
    share = "share of the gradient left"
    finish(axes, "lag: steps back from a loss", share, "no gradient arrives")


def _inside(axes, flow):
    """What is known of the inside of a step: U, the gates, or what a step multiplied by."""
    if flow.singular_values is not None:
        _singular_values(axes, flow)
    elif flow.gates:
        _gates(axes, flow)
    else:
        _growth(axes, flow)


def _singular_values(axes, flow):
    numbers = np.arange(1, len(flow.singular_values) + 1)
    label = f"of U; spectral radius {flow.spectral_radius:.3g}"
    axes.plot(numbers, flow.singular_values, ".-", label=label)
    if not shown(axes):
        say(axes, "U is not finite")
    elif flow.max_slope:
        label = "1 / max f': all below, and it must vanish"
        axes.axhline(1 / flow.max_slope, color="grey", linestyle=":", label=label)
    _title(axes, f"largest singular value of U: {flow.sigma_max:.3g}")
    axes.set_xlabel("number of the singular value of U, the largest first")
    axes.set_ylabel("singular value of U")
    whole_numbers(axes)
    top = max(flow.sigma_max, 1 / (flow.max_slope or 1))
    if math.isfinite(top):
        axes.set_ylim(0, 1.25 * top or 1)
    axes.legend(fontsize=8)


def _gates(axes, flow):
    """The mean of each gate against t; of the one that holds a state also for how long."""
    steps, title = np.arange(1, flow.timesteps + 1), ""
    styles = itertools.cycle(["-", "--"])  # gates may lie on each other
    for name, gate in flow.gates.items():
        label, saturated = name, share_of(gate.saturated)
        if saturated is not None:
            label += f", saturated {percent(saturated)}"
        point = "o" if len(steps) == 1 else None
        style, width = ("-", 2.5) if gate.holds else (next(styles), 1.5)
        options = {"label": label, "linewidth": width, "marker": point}
        axes.plot(thinned(steps), thinned(gate.mean), style, **options)
        if gate.holds:
            middle, most = np.median(gate.memory), np.max(gate.memory)
            title = f"{name}: holds a unit for {middle:.3g} steps"
            title += f" (median; at most {most:.3g})"
    if not shown(axes):
        say(axes, "no gate is finite at any step")
    elif all(np.nanmin(g.mean) >= 0 and np.nanmax(g.mean) <= 1 for g in _seen(flow)):
        axes.set_ylim(-0.03, 1.03)
    _title(axes, title)
    axes.set_xlabel(_STEPS)
    axes.set_ylabel("gate, mean of units and examples")
    whole_numbers(axes)
    axes.legend(fontsize=8)


def _seen(flow):
    return [g for g in flow.gates.values() if np.isfinite(g.mean).any()]


def _growth(axes, flow):
    """What each step multiplied the gradient by, for each lag."""
    shares = flow.untruncated_lag_shares
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = shares[1:] / shares[:-1]
    lags = np.arange(1, len(steps) + 1)
    curve(axes, lags, steps, "untruncated, unclipped")
    mark(axes, lags, ~np.isfinite(steps), "not finite")
    finite = steps[np.isfinite(steps)]
    if len(finite):
        words = f"a step multiplied by {np.max(finite):.3g} at most"
        where = "" if len(finite) == len(steps) else ", where it is finite"
        _title(axes, words + where)
    words = "one step: none before it" if flow.timesteps == 1 else "no step is reached"
    finish(axes, "lag: steps back from a loss", "one step multiplies by", words)
    if shown(axes):
        axes.axhline(
            1, color="grey", linestyle=":", label="1: neither grows nor vanishes"
        )
        axes.legend(fontsize=8)


def _pace(flow):
    bad = np.flatnonzero(~np.isfinite(flow.untruncated_lag_shares))
    words = []
    if not math.isnan(flow.factor) and (not len(bad) or bad[0] > 1):
        digits = (
            3 if abs(flow.factor - 1) >= 0.005 else 6
        )  # of a long sequence it matters
        words.append(f"a step multiplies by {flow.factor:.{digits}g}")
    if len(bad):
        words.append(f"not finite at lag {bad[0]}")
    return "; ".join(words) or "no lag"


def _no_norms(flow):
    norms = flow.adjoint_norms
    if np.all(np.isnan(norms)):
        return "every step is masked"
    infinite = np.any(np.isinf(norms))
    return "not finite at any step" if infinite else "the gradient is 0 at every step"


def _median(norms):
    return over_examples(np.nanmedian, norms)


def _title(axes, *lines):
    wrapped = [row for line in lines for row in textwrap.wrap(line, _TITLE)]
    axes.set_title("\n".join(wrapped), loc="left", fontsize=10)


def _figure(rows, columns):
    """Open figures are pyplot's, so that a notebook and `plt.show()` show them."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "A figure of the gradient flow is drawn by matplotlib, which is not installed: "
            "pip install 'keras_bptt[plot]', or pip install matplotlib. The numbers are in "
            "`summary()` and `to_dict()` all the same."
        ) from error
    size = 0.3 + 4.3 * columns, 0.4 + 3.4 * rows
    options = {"figsize": size, "layout": "constrained", "squeeze": False}
    return plt.subplots(rows, columns, **options)


def _saved(figure, path):
    if path is not None:
        figure.savefig(path)
    return figure
