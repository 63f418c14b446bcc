"""Draws every figure again and writes what is generated of the pages (`make docs`).

Measures and trains nothing: the numbers are those that lie beside the figures. New ones
come from `make examples` and `make bench`, and from

    python examples/memory_span.py --output-dir docs/truncation
    python examples/vanishing_and_exploding.py --output-dir docs/gradient_flow
    python examples/own_cell.py --output-dir docs/own_cells
    python examples/follow_the_advice.py --output-dir docs/gradient_flow
    python benchmarks/verdicts.py --json docs/gradient_flow/verdicts.json
    python docs/draw_gated.py
"""

import importlib
import json
import pathlib
import sys
import types

import draw_architecture
import draw_bptt
import draw_gated
import draw_readme
import numpy as np
import write_api

ROOT = pathlib.Path(__file__).parents[1]
sys.path += [str(ROOT / "examples"), str(ROOT / "benchmarks")]
# Scripts in examples/, in the order of the cheat sheet's kinds; results in saved_models/.
KINDS = [
    "flowers",
    "draw_digits",
    "read_digits",
    "character_language_model",
    "sunspots",
    "rewrite_numbers",
]


def results(name):
    return json.loads((ROOT / f"{name}.json").read_text())


def draw_kinds(folder):
    for name in KINDS:
        path = f"saved_models/{name}"
        importlib.import_module(name).draw(results(path), folder / f"{path}.png")


def draw_other_examples(folder):
    path = "docs/gradient_flow/vanishing_and_exploding"
    plot = importlib.import_module("vanishing_and_exploding").plot
    plot(results(path)["seeds"], folder / f"{path}.png")
    path = "docs/own_cells/own_cell"
    importlib.import_module("own_cell").plot(results(path), folder / f"{path}.png")
    path = "docs/truncation/memory_span"
    found = results(path)
    plot = importlib.import_module("memory_span").plot
    settings = types.SimpleNamespace(**found["settings"])
    plot(found["rows"], folder / f"{path}.png", settings)


def draw_benchmarks(folder):
    for name, (_, _, plot) in importlib.import_module("report").BENCHMARKS.items():
        path = f"docs/performance/{name}"
        if plot is not None:
            plot(results(path)["results"], folder / f"{path}.png")


def table_of_kinds():
    """A row for each kind: what its networks reach, and what the baselines do."""
    rows = ["| kind | script | score | BPTTRNN | SimpleRNN | baselines |"]
    rows.append("|---" * 6 + "|")
    for name in KINDS:
        found = results(f"saved_models/{name}")
        cells = {"BPTTRNN": [], "SimpleRNN": [], "baselines": []}
        for who, score in found["scores"].items():
            layer, _, what = who.partition(", ")
            column = layer if layer in cells else "baselines"
            what = what if column != "baselines" else who
            cells[column].append(f"{what} {score:.4g}".strip())
        cells = " | ".join("<br>".join(values) for values in cells.values())
        score = found["score"]
        rows.append(
            f"| {found['kind']} | [`{name}.py`]({name}.py) | {score} | {cells} |"
        )
    return "\n".join(rows)


def table_of_own_cells():
    """What each cell of `own_cell.py` reaches in both layers, and how long that takes."""
    found = results("docs/own_cells/own_cell")
    rows = [
        "| cell | right, `BPTT` | right, `keras.layers.RNN` | `RNN` takes |",
        "|---" * 4 + "|",
    ]
    for cell, of in found["cells"].items():
        ours, theirs = of["BPTT"], of["RNN"]
        times = theirs["epoch_s"] / ours["epoch_s"]
        rows.append(
            f"| {cell} | {ours['accuracy']:.3f} | {theirs['accuracy']:.3f} | "
            f"{times:.1f} x as long |"
        )
    best = found["observer"]["accuracy"]
    rows.append(f"| adds up all evidence | {best:.3f} | {best:.3f} | |")
    return "\n".join(rows)


def table_of_advice():
    """What networks with a fault learn as they are, and by each way to help them."""
    rows = ["| network | lag | changed | advised | right |", "|---" * 5 + "|"]
    for fault in results("docs/gradient_flow/follow_the_advice")["faults"]:
        name, lag = fault["name"], fault["lag"]
        for row in fault["rows"]:
            low, middle, high = np.quantile(row["scores"], [0, 0.5, 1])
            way = "" if row["way"] == "as it is" else row["way"]
            advised = "yes" if row["advised"] else ""
            rows.append(
                f"| {name} | {lag} | {way} | {advised} | "
                f"{middle:.2f} ({low:.2f} ... {high:.2f}) |"
            )
            name = lag = ""
    return "\n".join(rows)


def table_of_verdicts():
    """How many of the networks with a verdict learned."""
    found = results("docs/gradient_flow/verdicts")["by verdict"]
    rows = ["| verdict | before training | after a tenth of it |", "|---" * 3 + "|"]
    for verdict in "healthy", "vanishing", "exploding":
        cells = ["{} of {}".format(*of[verdict]) for of in found.values()]
        rows.append(f"| {verdict} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main(folder=ROOT):
    """Writes into `folder` as if it were the repository."""
    for path in sorted({path.parent for path in ROOT.glob("**/*.png")}):
        if not path.relative_to(ROOT).parts[0].startswith("."):
            (folder / path.relative_to(ROOT)).mkdir(parents=True, exist_ok=True)
    (folder / "examples").mkdir(exist_ok=True)
    draw_kinds(folder)
    draw_other_examples(folder)
    draw_benchmarks(folder)
    draw_bptt.draw_all(folder / "docs/bptt")
    draw_gated.draw_all(results("docs/gated/gradient"), folder / "docs/gated")
    draw_architecture.draw_all(folder / "docs/architecture")
    draw_readme.draw_all(folder / "docs/performance")
    write_api.write(folder / "docs")
    filled = importlib.import_module("pages").filled
    any_cell = (ROOT / "docs/performance/any_cell.md").read_text().rstrip()
    for name, places in {
        "examples/README.md": {"kinds": table_of_kinds()},
        "docs/gradient_flow.md": {
            "advice": table_of_advice(),
            "verdicts": table_of_verdicts(),
        },
        "docs/own_cells.md": {"own_cell": table_of_own_cells()},
        "README.md": {
            "at_a_glance": draw_readme.sentences(),
            "any_cell": any_cell,
        },
    }.items():
        page = (ROOT / name).read_text()
        for place, text in places.items():
            page = filled(page, place, text)
        (folder / name).write_text(page)


if __name__ == "__main__":
    main()
