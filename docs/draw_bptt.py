"""The figures of docs/bptt.md: the unrolled network, counted paths, gradients by distance.

    python docs/draw_bptt.py                          # seconds; needs matplotlib
    python docs/draw_bptt.py --output-dir elsewhere

What is counted and what is measured comes out of `keras_bptt.reference`. With the same
packages the same files are written, byte by byte.
"""

import argparse
import pathlib

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

from keras_bptt import reference

# Of Okabe and Ito, whom colour-blind readers can follow.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#4D4D4D"
GAINS = {0.5: BLUE, 0.75: "#56B4E9", 1.0: "black", 1.25: "#E69F00", 1.5: VERMILION}
WIDTH = 7.27  # inches, 800 pixels

DISTANCE = 2.9  # between two steps of the drawing
RADIUS = 0.36
ROWS = {"x": 0.0, "z": 1.7, "h": 3.4, "o": 5.1}
LOSS = 6.5
TRANSPOSED = r"^{\!\top}"
ADJOINT = rf"$a_t = e_t + \delta_{{t+1}} U{TRANSPOSED}$"
DELTA = r"$\delta_t = a_t \odot f'(z_t)$"


def draw_network():
    """Three steps unrolled: forward arrows, and beside each what flows back along it."""
    figure = Figure(figsize=(WIDTH, 6.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.6, 3 * DISTANCE + 1.1), ylim=(-1.85, 7.3))
    axes.set_aspect("equal")
    axes.set_axis_off()
    _node(axes, (0, ROWS["h"]), "$h_0$")
    for t in (1, 2, 3):
        _draw_step(axes, t, t * DISTANCE)
    _draw_loss(axes)
    for y, color, text in (
        (-0.95, GREY, "forward: $z_t = x_t W + h_{t-1} U + b$,   $h_t = f(z_t)$"),
        (-1.5, VERMILION, rf"backward: {ADJOINT},   {DELTA}"),
    ):
        _arrow(axes, (0.6, y), (1.3, y), color)
        axes.text(1.5, y, text, color=color, fontsize=12, va="center")
    return figure


def _draw_step(axes, t, x):
    places = [(x, y) for y in ROWS.values()]
    loss = x, LOSS + RADIUS  # the arrows end at the edge of the box
    for below, above in zip(places, [*places[1:], loss], strict=True):
        _both_ways(axes, below, above)
    before, z, h = (x - DISTANCE, ROWS["h"]), (x, ROWS["z"]), (x, ROWS["h"])
    _both_ways(axes, before, z)
    for name, y in ROWS.items():
        _node(axes, (x, y), f"${name}_{t}$")
    back = {
        (x + 0.2, (ROWS["o"] + LOSS) / 2): rf"$\partial L/\partial o_{t}$",
        (x + 0.2, (ROWS["h"] + ROWS["o"]) / 2): f"$e_{t}$",
        (x + 0.2, (ROWS["z"] + ROWS["h"]) / 2): r"$\odot\,f'$",
        (x + 0.2, (ROWS["x"] + ROWS["z"]) / 2): rf"$\delta_{t} W{TRANSPOSED}$",
        (x + 0.42, h[1] + 0.12): f"$a_{t}$",
        (x + 0.42, z[1]): rf"$\delta_{t}$",
    }
    for (left, y), text in back.items():
        axes.text(left, y, text, color=VERMILION, fontsize=12, va="center")
    middle = (before[0] + x) / 2 + 0.1, (before[1] + z[1]) / 2 + 0.28
    axes.text(*middle, rf"$\delta_{t} U{TRANSPOSED}$", color=VERMILION, fontsize=12)


def _draw_loss(axes):
    low, high = DISTANCE - 0.5, 3 * DISTANCE + 0.5
    axes.add_patch(
        FancyBboxPatch(
            (low, LOSS),
            high - low,
            0.6,
            boxstyle="round,pad=0",
            facecolor="white",
            edgecolor=GREY,
            linewidth=1.4,
        )
    )
    text = r"$L = \frac{1}{3}\,\left(l(y_1, o_1) + l(y_2, o_2) + l(y_3, o_3)\right)$"
    middle = (low + high) / 2, LOSS + 0.28
    axes.text(*middle, text, ha="center", va="center", fontsize=12)


def _node(axes, place, text):
    axes.add_patch(
        Circle(place, RADIUS, facecolor="white", edgecolor=GREY, linewidth=1.4)
    )
    axes.text(*place, text, ha="center", va="center", fontsize=13)


def _both_ways(axes, start, end):
    """An arrow from node to node, and one back to the right of it."""
    start, end = np.array(start, float), np.array(end, float)
    along = (end - start) / np.linalg.norm(end - start)
    right = 0.09 * np.array([along[1], -along[0]])
    if along[1] < 0:
        right = -right  # above, where the label is
    start, end = start + (RADIUS + 0.05) * along, end - (RADIUS + 0.05) * along
    _arrow(axes, start - right, end - right, GREY)
    _arrow(axes, end + right, start + right, VERMILION)


def _arrow(axes, start, end, color):
    axes.add_patch(
        FancyArrowPatch(
            tuple(start),
            tuple(end),
            arrowstyle="-|>",
            mutation_scale=12,
            shrinkA=0,
            shrinkB=0,
            color=color,
            linewidth=1.5,
        )
    )


def count_paths(timesteps):
    """(loss step, step) for each product of two factors: how often a path is counted.

    In a linear network of one unit whose weights are 1 every path is worth 1. Each example
    of the batch has a loss of its own step, so that the derivative of an input counts the
    paths from that loss to that step.
    """
    one, losses = np.ones((1, 1)), np.eye(timesteps)[:, :, np.newaxis]
    problem = dict(x=0 * losses, W=one, U=one, b=one[0], f="linear", e=losses)
    problem["h_0"] = np.zeros((timesteps, 1))
    products = {
        "adjoint × immediate": reference.hidden_gradients,
        "cotangent × total": reference.nested_product_gradients,
        "adjoint × total": reference.literal_reading_gradients,
    }
    return {
        name: product(**problem).d_inputs[:, :, 0] for name, product in products.items()
    }


def draw_counts(timesteps=5):
    """A heat map of counted paths for each of the products."""
    counts = count_paths(timesteps)
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    for panel, (name, count) in zip(
        figure.subplots(1, 3, sharey=True), counts.items(), strict=True
    ):
        _draw_count(panel, count)
        once = np.array_equal(count, np.tril(np.ones_like(count)))
        verdict = "right: each once" if once else "wrong: up to $T$ times"
        panel.set_title(f"{name}\n{verdict}", fontsize=11)
        panel.set_xlabel("step $i$", fontsize=11)
    figure.axes[0].set_ylabel("loss of step $t$", fontsize=11)
    return figure


def _draw_count(axes, count):
    steps = range(1, len(count) + 1)
    shown = np.ma.masked_equal(count, 0)  # no path leads from a loss to a later step
    axes.pcolormesh(
        shown, cmap="Oranges", vmin=0, vmax=1.6 * len(count), edgecolors="white"
    )
    for (t, i), times in np.ndenumerate(count):
        if times:
            text = f"{times:g}"
            axes.text(i + 0.5, t + 0.5, text, ha="center", va="center", fontsize=12)
    ticks = np.arange(len(count)) + 0.5
    axes.set_xticks(ticks, steps)
    axes.set_yticks(ticks, steps)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def norms_by_distance(gain, inputs, timesteps=50, features=4, units=16):
    """The spectral norm of dh_T/dh_{T-n} for n = 0 ... T; U is orthogonal times the gain.

    `inputs` is the standard deviation of x_t W. Each example of the batch is the same
    sequence and has another unit of h_T for its loss: its adjoints are rows of dh_T/dh_t.
    """
    rng = np.random.default_rng(0)
    U, _ = np.linalg.qr(rng.normal(size=(units, units)))
    x = rng.normal(size=(timesteps, features))
    e = np.zeros((units, timesteps, units))
    e[:, -1] = np.eye(units)
    d = reference.hidden_gradients(
        x=np.tile(x, (units, 1, 1)),
        W=rng.normal(size=(features, units)) * inputs / np.sqrt(features),
        U=gain * U,
        b=np.zeros(units),
        h_0=np.zeros((units, units)),
        f="tanh",
        e=e,
    )
    by_step = np.concatenate([d.d_initial_state[:, np.newaxis], d.adjoint], axis=1)
    return np.linalg.norm(by_step[:, ::-1], ord=2, axis=(0, 2))


def draw_norms():
    """The norms against the distance, and the bound of Pascanu et al. beside each."""
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for panel, inputs in zip(panels, (0.1, 0.5), strict=True):
        for gain, color in GAINS.items():
            norms = norms_by_distance(gain, inputs)
            distance = np.arange(len(norms))
            panel.plot(distance, norms, color=color, label=f"gain {gain:g}")
            bound = gain**distance  # max |f'| of tanh is 1
            panel.plot(distance, bound, "--", color=color, linewidth=1)
        panel.plot([], [], "--", color=GREY, linewidth=1, label="bound, gain$^n$")
        panel.set(yscale="log", xlim=(0, distance[-1]), ylim=(1e-19, 1e10))
        panel.set_title(f"inputs $x_t W$ of size {inputs:g}", fontsize=11)
        panel.set_xlabel("distance $n$, steps", fontsize=11)
        panel.grid(color="0.9")
    panels[0].set_yticks(10.0 ** np.arange(-18, 10, 6))
    panels[0].set_ylabel(r"norm of $\partial h_T / \partial h_{T-n}$", fontsize=11)
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, fontsize=10, loc="outside lower center", ncols=3)
    return figure


FIGURES = {
    "unrolled_network": draw_network,
    "counted_paths": draw_counts,
    "gradient_by_distance": draw_norms,
}


def draw_all(folder):
    """Writes each figure into the folder; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in FIGURES.items():
        paths.append(folder / f"{name}.png")
        # Matplotlib writes its version into a file unless told not to.
        draw().savefig(paths[-1], dpi=110, metadata={"Software": None})
    return paths


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output-dir",
        type=pathlib.Path,
        default=pathlib.Path(__file__).with_suffix("").with_name("bptt"),
        help="folder of the figures",
    )
    for path in draw_all(parser.parse_args().output_dir):
        print(path)


if __name__ == "__main__":
    main()
