"""The figure of docs/architecture.md: a batch forward and back, and where options act.

    python docs/draw_architecture.py                          # seconds; needs matplotlib
    python docs/draw_architecture.py --output-dir elsewhere

It measures nothing. A test holds the modules that it names against the package.
"""

import argparse
import pathlib

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

# Of Okabe and Ito, whom colour-blind readers can follow.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#4D4D4D"
WIDTH, HEIGHT = 9.4, 6.2

# Place, size, colour and text of a box: what is computed, in which module.
BOXES = {
    "x": (0.1, 4.4, 1.3, 0.7, GREY, "inputs\n$x_1 \\ldots x_T$", ""),
    "project": (1.9, 4.2, 1.7, 1.1, BLUE, "project", "one product\na block"),
    "step": (4.1, 4.2, 2.6, 1.1, BLUE, "step, step, step ...", "engine/states"),
    "y": (7.7, 4.4, 1.5, 0.7, GREY, "outputs, states", ""),
    "kept": (4.1, 2.75, 2.6, 0.75, GREY, "kept for the way back", "engine/kept"),
    "e": (7.7, 1.1, 1.5, 0.7, GREY, "cotangents\n$e_1 \\ldots e_T$", ""),
    "back": (
        4.1,
        0.9,
        2.6,
        1.1,
        VERMILION,
        "... step_back, step_back",
        "engine/adjoints",
    ),
    "gradients": (1.9, 0.9, 1.7, 1.1, VERMILION, "gradients", "one product\na block"),
    "d": (0.1, 1.1, 1.3, 0.7, GREY, "d_weights,\nd_inputs", ""),
}
ARROWS = [
    ("x", "project"),
    ("project", "step"),
    ("step", "y"),
    ("step", "kept"),
    ("kept", "back"),
    ("y", "e"),
    ("e", "back"),
    ("back", "gradients"),
    ("gradients", "d"),
]
# Where an option acts, and the module in which it does.
OPTIONS = [
    (2.75, 5.65, "dropout, recurrent_dropout", "cells/simple_rnn"),
    (5.4, 5.65, "mask, jit_compile, unroll", "engine/masks, runtime/execution"),
    (8.45, 5.65, "output_units", "engine/output_layer"),
    (7.55, 3.12, "checkpoint_every", "engine/blocks"),
    (2.75, 3.12, "truncation of a last output", "engine/recurrence"),
    (
        5.4,
        0.4,
        "mask, truncation, clipping",
        "engine/masks, engine/windows, engine/clipping",
    ),
]


def draw():
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(-0.1, HEIGHT - 0.1))
    axes.set_axis_off()
    for box in BOXES.values():
        _draw_box(axes, *box)
    for source, end in ARROWS:
        _draw_arrow(axes, BOXES[source], BOXES[end])
    for x, y, option, module in OPTIONS:
        centred = {"ha": "center", "va": "center"}
        axes.text(x, y + 0.13, option, fontsize=10, **centred)
        axes.text(x, y - 0.13, module, fontsize=8.5, color=GREY, **centred)
    for y, text, color in ((5.65, "forward", BLUE), (0.4, "back", VERMILION)):
        axes.text(0.1, y, text, fontsize=12, color=color, weight="bold", va="center")
    return figure


def _draw_box(axes, x, y, width, height, color, text, note):
    axes.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0.02,rounding_size=0.08",
            facecolor="white",
            edgecolor=color,
            linewidth=1.6,
        )
    )
    middle = x + width / 2
    upper = y + height * (0.66 if note else 0.5)
    axes.text(middle, upper, text, ha="center", va="center", fontsize=11, color=color)
    axes.text(
        middle,
        y + height * 0.28,
        note,
        ha="center",
        va="center",
        fontsize=8.5,
        color=GREY,
    )


def _draw_arrow(axes, source, end):
    (x, y, width, height, *_), (to_x, to_y, to_width, to_height, *_) = source, end
    middle, to_middle = y + height / 2, to_y + to_height / 2
    if abs(middle - to_middle) < 0.1:
        ahead = to_x > x
        start = x + width if ahead else x, middle
        stop = to_x if ahead else to_x + to_width, to_middle
    else:
        start, stop = (x + width / 2, y), (to_x + to_width / 2, to_y + to_height)
    arrow = FancyArrowPatch(
        start,
        stop,
        arrowstyle="-|>",
        mutation_scale=14,
        color=GREY,
        shrinkA=3,
        shrinkB=3,
    )
    axes.add_patch(arrow)


def draw_all(folder):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "batch.png"
    # No version of matplotlib in the file, so that the same is written again.
    draw().savefig(path, dpi=110, metadata={"Software": None})
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = pathlib.Path(__file__).parent
    parser.add_argument("--output-dir", default=here / "architecture")
    draw_all(parser.parse_args().output_dir)


if __name__ == "__main__":
    main()
