"""Run every speed and memory benchmark; write JSON, tables and plots (`make bench`).

    python benchmarks/report.py
    python benchmarks/report.py --only memory scaling
    python benchmarks/report.py --quick --directory somewhere

Numbers go to `docs/performance/`, a JSON file and, of some, a plot, and the tables into
`docs/performance.md`, between the comments that name them. `--quick` measures little, to
see that all works; it needs a directory of its own.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import re

import any_cell
import checkpointing
import compilation
import fit_and_predict
import gated
import memory
import scaling
import training_step
import truncation
from contestants import Case
from pages import filled

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGE = DOCS / "performance.md"


def training_steps(quick):
    cases = training_step.CASES[:1] if quick else training_step.CASES
    return training_step.run(cases, 0 if quick else 6)


def memories(quick):
    return memory.measure([16] if quick else [500, 1000, 2000], 1 if quick else 3)


def fits(quick):
    return fit_and_predict.run(0 if quick else 5)


def scalings(quick):
    return scaling.run(0 if quick else 1)


def lengths(quick):
    return compilation.many_lengths(batches=4 if quick else 40)


def break_evens(quick):
    cases = compilation.SMALL[:1] if quick else compilation.SMALL
    return compilation.break_even(0 if quick else 1, cases)


def truncated_steps(quick):
    return truncation.speed(0 if quick else 8, truncation.CASES[: 1 if quick else None])


def truncated_backward(quick):
    return truncation.backward(0 if quick else 8)


def truncated_memory(quick):
    return truncation.memories([256], 16, 1) if quick else truncation.memories()


def checkpoints(quick):
    if not quick:
        return checkpointing.curve(10)
    names = [checkpointing.STORED, "c = 4", checkpointing.ROOT, "SimpleRNN, graph"]
    return checkpointing.curve(0, Case(4, 100, 2, 8, sequences=False), names)


def checkpoints_long(quick):
    if not quick:
        return checkpointing.long()
    names = [checkpointing.STORED, checkpointing.ROOT]
    return checkpointing.long(Case(4, 100, 2, 8, sequences=False), names, 1)


def output_layers(quick):
    if not quick:
        return checkpointing.output_layer()
    names = list(checkpointing.WITH_OUTPUT_LAYER)[:2]
    return checkpointing.output_layer(Case(4, 100, 2, 8), names, 1)


def any_cells(quick):
    if quick:
        return any_cell.run(0, ["layer norm"], [(4, 20, 3, 8)])
    return any_cell.run(6)


def gated_steps(quick):
    if quick:
        return gated.run(0, ["GRU"], [(4, 20, 3, 8)])
    return gated.run(12)


# What runs, how its table is written, how its plot is drawn.
BENCHMARKS = {
    "training_step": (training_steps, training_step.table, training_step.plot),
    "gated": (gated_steps, gated.table, None),
    "any_cell": (any_cells, any_cell.table, None),
    "fit_and_predict": (fits, fit_and_predict.table, None),
    "many_lengths": (lengths, compilation.table_of_lengths, None),
    "break_even": (break_evens, compilation.table_of_break_even, None),
    "memory": (memories, memory.table, memory.plot),
    "scaling": (scalings, None, scaling.plot),
    "truncation": (truncated_steps, truncation.table_of_speed, None),
    "truncated_backward": (truncated_backward, truncation.table_of_backward, None),
    "truncated_memory": (truncated_memory, truncation.table_of_memory, None),
    "checkpoints": (checkpoints, checkpointing.table_of_curve, checkpointing.plot),
    "checkpoints_long": (checkpoints_long, checkpointing.table, None),
    "output_layer": (output_layers, checkpointing.table, None),
}


def machine():
    """What the numbers depend on, in a line."""
    model = platform.machine()
    try:
        cpu = pathlib.Path("/proc/cpuinfo").read_text()
        model = re.search(r"model name\s*: (.*)", cpu)[1]
    except (OSError, TypeError):
        pass
    packages = []
    for name in ("tensorflow", "keras", "torch", "jax", "numpy"):
        try:
            packages.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            packages.append(f"no {name}")
    python = platform.python_version()
    return f"{os.cpu_count()} cores of {model}; Python {python}, {', '.join(packages)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS)
    )
    parser.add_argument("--quick", action="store_true", help="see that it works")
    parser.add_argument("--directory", type=pathlib.Path, help="instead of docs/")
    args = parser.parse_args()
    if args.quick and args.directory is None:
        parser.error("--quick writes no documentation: name a --directory")
    folder = args.directory or DOCS / PAGE.stem
    folder.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        measure, table, plot = BENCHMARKS[name]
        print(f"\n== {name}", flush=True)
        results = measure(args.quick)
        text = json.dumps({"machine": machine(), "results": results}, indent=1)
        (folder / f"{name}.json").write_text(text + "\n")
        if plot is not None:
            plot(results, folder / f"{name}.png")
        if table is not None:
            (folder / f"{name}.md").write_text(table(results) + "\n")
            print(table(results), flush=True)
        if args.directory is None:
            page = filled(PAGE.read_text(), "machine", machine())
            page = page if table is None else filled(page, name, table(results))
            PAGE.write_text(page)


if __name__ == "__main__":
    main()
