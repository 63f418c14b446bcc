"""Curves for a figure: few points, a point where there is no line, and what is not finite.

They draw into the `Axes` of matplotlib that they are given, and need no import of it.
"""

import numpy as np

from keras_bptt.flow.verdict import over_examples

MOST_POINTS = 1000


def curve(axes, x, y, label, style="-", **options):
    """A line; where a value stands alone, which no line would show, a point.

    What a logarithmic axis cannot show is left out.
    """
    if len(x):
        # The axis shows all steps, also where there is nothing to draw.
        axes.update_datalim([(x[0] - 0.5, 1), (x[-1] + 0.5, 1)], updatey=False)
    x, y = thinned(x), positive(thinned(y))
    known = np.isfinite(y)
    beside = np.pad(known, 1)
    alone = np.flatnonzero(known & ~beside[:-2] & ~beside[2:])
    if len(alone):
        options |= {"marker": "o", "markersize": 4, "markevery": alone.tolist()}
    (line,) = axes.plot(x, y, style, label=label, **options)
    return line


def band(axes, x, low, high, color, label):
    """The area between two curves; where it stands alone, a bar."""
    x, low, high = thinned(x), positive(thinned(low)), positive(thinned(high))
    if len(x) == 1:
        options = {"linewidth": 8, "capstyle": "butt"}
        return axes.vlines(x, low, high, color, alpha=0.2, label=label, **options)
    options = {"alpha": 0.2, "linewidth": 0, "label": label}
    return axes.fill_between(x, low, high, color=color, **options)


def mark(axes, x, bad, label):
    """Shade where numbers are not finite."""
    x, bad = thinned(x), thinned(bad, np.any)
    edges = np.flatnonzero(np.diff(np.pad(bad.astype(int), 1)))
    half = (x[1] - x[0]) / 2 if len(x) > 1 else 0.5
    for first, end in edges.reshape(-1, 2):
        span = x[first] - half, x[end - 1] + half
        axes.axvspan(*span, color="tab:red", alpha=0.15, linewidth=0, label=label)
        label = None  # it stands in the legend once


def finish(axes, xlabel, ylabel, nothing):
    """Labels, a logarithmic axis of a decade or more, a legend, or why it is empty."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    whole_numbers(axes)
    if shown(axes):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high < 10 * low:
            middle = np.sqrt(low) * np.sqrt(high)
            axes.set_ylim(middle / np.sqrt(10), middle * np.sqrt(10))
    else:
        say(axes, nothing)
    axes.legend(fontsize=8)


def whole_numbers(axes):
    """Steps, lags and numbers of units have no fractions."""
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def shown(axes):
    """Whether there is a curve to see."""
    drawn = [np.asarray(line.get_ydata(), float) for line in axes.get_lines()]
    return any(np.isfinite(y).any() for y in drawn)


def say(axes, words):
    """Words in the place of curves."""
    place = {"transform": axes.transAxes, "ha": "center", "va": "center"}
    axes.text(0.5, 0.5, words, fontsize=9, color="grey", **place)
    axes.set_yticks([])


def thinned(values, function=np.nanmedian):
    """At most `MOST_POINTS`: of neighbours the median, or another function."""
    values = np.asarray(values)
    if len(values) <= MOST_POINTS:
        return values
    parts = np.array_split(values, MOST_POINTS)
    return np.array([over_examples(function, part) for part in parts])


def positive(values):
    """What a logarithmic axis can show; NaN for the rest."""
    values = np.asarray(values, float)
    return np.where((values > 0) & np.isfinite(values), values, np.nan)
