"""The gradient flow of a model as a figure, with matplotlib."""

import math

import numpy as np


def plot(flows, tolerance):
    """A row for each of the flows, by name; the panels are said in `GradientFlow.plot`."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "A figure of the gradient flow is drawn by matplotlib, which is not installed: "
            "pip install 'keras_bptt[plot]', or pip install matplotlib. The numbers are in "
            "`summary()` and `to_dict()` all the same."
        ) from error
    rows = len(flows)
    figure, axes = plt.subplots(
        rows, 3, figsize=(13, 0.4 + 3.4 * rows), layout="constrained", squeeze=False
    )
    for (name, flow), row in zip(flows.items(), axes, strict=True):
        _over_time(row[0], name, flow)
        _by_lag(row[1], flow, tolerance)
        _singular_values(row[2], flow)
    return figure


def _over_time(axes, name, flow):
    steps = np.arange(1, flow.timesteps + 1)
    low, high = flow.adjoint_quantiles((0.1, 0.9))
    (line,) = axes.plot(steps, _positive(flow.mean_adjoint), label="|dL/dh|, mean")
    axes.fill_between(
        steps,
        _positive(low),
        _positive(high),
        color=line.get_color(),
        alpha=0.2,
        linewidth=0,
        label="10 % to 90 % of the examples",
    )
    axes.plot(steps, _positive(flow.mean_delta), "--", label="|dL/dz|, mean")
    axes.set_title(f"{name}: {flow.verdict}", loc="left", fontsize=11)
    axes.set_xlabel("step t, in the order of processing")
    axes.set_ylabel("norm of the gradient")
    _logarithmic(axes)
    axes.legend(fontsize=8)


def _by_lag(axes, flow, tolerance):
    lags = np.arange(len(flow.untruncated_lag_shares))
    axes.plot(
        lags, _positive(flow.untruncated_lag_shares), label="untruncated, unclipped"
    )
    if not np.array_equal(flow.lag_shares, flow.untruncated_lag_shares):
        own = _positive(flow.lag_shares)
        axes.plot(lags[: len(own)], own, "--", label="as the layer has it")
    k = flow.suggest_truncation(tolerance)
    if k is not None:
        label = f"window of {k}: bias {100 * tolerance:.3g} %"
        axes.axvline(k - 1, color="grey", linestyle=":", label=label)
    title = _pace(flow)
    if k is None and flow.finite:
        title += f"; no window for a bias of {100 * tolerance:.3g} %"
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("lag: steps back from a loss")
    axes.set_ylabel("share of the gradient left")
    _logarithmic(axes)
    axes.legend(fontsize=8)


def _singular_values(axes, flow):
    axes.plot(
        np.arange(1, flow.units + 1),
        flow.singular_values,
        ".-",
        label=f"of U; spectral radius {flow.spectral_radius:.3g}",
    )
    if flow.max_slope:
        axes.axhline(
            1 / flow.max_slope,
            color="grey",
            linestyle=":",
            label="1 / max f': all below, and it must vanish",
        )
    axes.set_title(f"largest: {flow.sigma_max:.3g}", loc="left", fontsize=11)
    axes.set_xlabel("number")
    axes.set_ylabel("singular value of U")
    top = max(flow.sigma_max, 1 / (flow.max_slope or 1))
    if math.isfinite(top):
        axes.set_ylim(0, 1.25 * top or 1)
    axes.legend(fontsize=8)


def _pace(flow):
    factor = flow.factor
    return "no lag" if math.isnan(factor) else f"a step multiplies by {factor:.3g}"


def _positive(values):
    """What a logarithmic axis can show."""
    values = np.asarray(values, float)
    return np.where((values > 0) & np.isfinite(values), values, np.nan)


def _logarithmic(axes):
    """But not where there is nothing to show, for which it has no limits."""
    shown = [np.asarray(line.get_ydata(), float) for line in axes.get_lines()[:2]]
    if any(np.any(np.isfinite(values)) for values in shown):
        axes.set_yscale("log")
