"""What checkpoints cost and save: time and memory of a training step.

    python benchmarks/checkpointing.py
    python benchmarks/checkpointing.py --only output_layer

Three cases. `curve`: against `checkpoint_every`, c steps, the last output of a long
sequence, each timed in turns with the form that keeps every state. `long`: a longer one.
`output_layer`: a whole sequence, whose output layer is inside the layer or a Dense after
it. Memory is the peak of a process of its own, over that of the same program at T = 8; the
times of the last two are of that process too. Where one takes too long or dies, the table
says so.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import subprocess
import time

import keras
import memory
import numpy as np
from contestants import (
    CONTESTANTS,
    TOLERANCE,
    Case,
    keras_step,
    largest_difference,
    problem,
)
from timing import interleaved, summary

from keras_bptt import BPTTRNN

CURVE = Case(32, 10_000, 8, 256, sequences=False)
EVERY = [1, 2, 4, 10, 32, "sqrt", 316, 1000, 3162, 10_000]
LONG = Case(8, 100_000, 4, 128, sequences=False)
OUTPUT_LAYER = Case(8, 20_000, 8, 512)
OUTPUT_UNITS = 8
STORED, ROOT = "every state kept", "c = sqrt"
SIMPLE = ["SimpleRNN, graph", "SimpleRNN, XLA"]
LIMIT = 150  # seconds of a process: imports, compilation and three steps


def name_of(every):
    return STORED if every is None else f"c = {every}"


def with_dense(layer_class):
    """The layer and a Dense after it, as a layer."""

    def make(units, **options):
        return keras.Sequential(
            [layer_class(units, **options), keras.layers.Dense(OUTPUT_UNITS)]
        )

    return make


def inside(every):
    return keras_step(BPTTRNN, output_units=OUTPUT_UNITS, checkpoint_every=every)


LAST = {name_of(e): keras_step(BPTTRNN, checkpoint_every=e) for e in [None, *EVERY]}
LAST |= {name: CONTESTANTS[name] for name in SIMPLE}
WITH_OUTPUT_LAYER = {
    f"output_units, {ROOT}": inside("sqrt"),
    f"output_units, {STORED}": inside(None),
    "BPTTRNN and Dense": keras_step(with_dense(BPTTRNN)),
    "SimpleRNN and Dense": keras_step(with_dense(keras.layers.SimpleRNN)),
}


def step_of(name, case):
    """A training step, of the last output or of a sequence with an output layer."""
    data = problem(dataclasses.replace(case, sequences=False))
    if not case.sequences:
        return LAST[name](case, data)
    rng = np.random.default_rng(1)
    shape = case.units, OUTPUT_UNITS
    V = rng.normal(0, case.units**-0.5, shape).astype("float32")
    data["weights"] += [V, np.zeros(OUTPUT_UNITS, "float32")]
    shape = case.batch, case.timesteps, OUTPUT_UNITS
    data["y"] = rng.normal(size=shape).astype("float32")
    return WITH_OUTPUT_LAYER[name](case, data)


def agreeing(names, case):
    """The steps by name, once they agree on the gradients with the first of them."""
    steps = {name: step_of(name, case) for name in names}
    gradients = {name: step() for name, step in steps.items()}
    for name, given in gradients.items():
        error = largest_difference(given, gradients[names[0]])
        if not error < TOLERANCE:
            raise SystemExit(f"{case}: {name} differs from {names[0]}, {error:.1e}")
    return steps


def one(name, *case):
    """Seconds of a step, and megabytes at the peak of this process."""
    step, seconds = step_of(name, Case(*case)), []

    def timed():
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)

    mb = memory.peak_of_steps(timed)
    return statistics.median(seconds[1:]), mb  # the first one compiles


def in_processes(names, case, runs=1, limit=LIMIT):
    """A row for each name: seconds of a step, megabytes over T = 8, or why there are none.

    Medians of some runs, in turns.
    """
    short = dataclasses.replace(case, timesteps=memory.SHORT)
    agreeing(names, dataclasses.replace(short, timesteps=3 * memory.SHORT))
    measured, failures = {name: [] for name in names}, {}
    for _ in range(runs):
        for name in names:
            try:
                if name not in failures:
                    (_, base), (seconds, peak) = (
                        memory.numbers_of_a_process(
                            name, *dataclasses.astuple(c), script=__file__, limit=limit
                        )
                        for c in (short, case)
                    )
                    measured[name].append((seconds, peak - base))
                    print(f"{name}: {seconds:.2f} s, {peak - base:.0f} MB", flush=True)
            except subprocess.TimeoutExpired:
                failures[name] = f"more than {limit} s"
            except SystemExit as failure:
                print(failure, flush=True)
                failures[name] = "died"
    rows = []
    for name, pairs in measured.items():
        row = {"name": name, "failure": failures.get(name)}
        if name not in failures:
            seconds, mb = (statistics.median(v) for v in zip(*pairs, strict=True))
            row |= {"seconds": seconds, "growth_mb": mb}
        rows.append(row)
    return rows


def with_times(rows, case, seconds):
    """The rows with milliseconds of a step, and their ratio to those of the stored form.

    Each takes turns with the stored form alone: a dozen programs of this size in one round
    would have to wait for each other's memory.
    """
    for row in rows:
        name = row["name"]
        row["ms"] = row["ratio"] = None
        if not row["failure"]:
            steps = agreeing(list(dict.fromkeys([STORED, name])), case)
            ms = summary(interleaved(steps, seconds, warm=False))
            row["ms"] = ms[name]
            row["ratio"] = ms[name]["median"] / ms[STORED]["median"]
            print(f"{name}: {row['ratio']:.2f}", flush=True)
    return rows


def curve(seconds, case=CURVE, names=tuple(LAST)):
    """Time and memory against c."""
    rows = with_times(in_processes(names, case), case, seconds)
    return {"case": dataclasses.astuple(case), "rows": rows}


def by_process(case, names, runs=2):
    """Time and memory, both of processes of their own."""
    return {"case": dataclasses.astuple(case), "rows": in_processes(names, case, runs)}


def long(case=LONG, names=(STORED, ROOT, *SIMPLE), runs=2):
    return by_process(case, names, runs)


def output_layer(case=OUTPUT_LAYER, names=tuple(WITH_OUTPUT_LAYER), runs=2):
    return by_process(case, names, runs)


def alone(case):
    """Megabytes of x, with the targets where there are some at each step, and of h."""
    numbers = case.features + (OUTPUT_UNITS if case.sequences else 0)
    mb = case.batch * case.timesteps * 4 / 2**20
    return {
        "x and the targets" if case.sequences else "x": mb * numbers,
        "h": mb * case.units,
    }


def lines_of(results, heading, cells_of):
    """Markdown: a row for each name, and the sizes of the data."""
    lines = [f"| layer | {heading} | memory, MB |", "|---|---|---|"]
    for row in results["rows"]:
        cells = [row["failure"] or cells_of(row), "–"]
        if not row["failure"]:
            cells[1] = f"{row['growth_mb']:.0f}"
        lines.append("| " + " | ".join([row["name"], *cells]) + " |")
    for name, mb in alone(Case(*results["case"])).items():
        lines.append(f"| *{name} alone* |  | {mb:.0f} |")
    return "\n".join(lines)


def table_of_curve(results):
    heading = f"time / that of {STORED}"
    return lines_of(results, heading, lambda row: f"{row['ratio']:.2f}")


def table(results):
    return lines_of(results, "time of a step, s", lambda row: f"{row['seconds']:.2f}")


def plot(results, path):
    """Memory and time against c; what has no c is a line across."""
    import matplotlib.pyplot as plt

    case = Case(*results["case"])
    rows = {row["name"]: row for row in results["rows"] if not row["failure"]}
    panels = {
        # On a log scale: less than one is noise.
        f"peak memory over T = {memory.SHORT}, MB": lambda row: max(
            1, row["growth_mb"]
        ),
        f"time of a step / that of {STORED}": lambda row: row["ratio"],
    }
    root = round(case.timesteps**0.5)
    every = {name: root if name == ROOT else name[4:] for name in rows if "c =" in name}
    every = dict(sorted(((n, int(c)) for n, c in every.items()), key=lambda x: x[1]))
    figure, both = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, (label, value) in zip(both, panels.items(), strict=True):
        points = [value(rows[name]) for name in every]
        axes.plot(every.values(), points, marker="o", label="every c-th state kept")
        if ROOT in rows:
            axes.plot(root, value(rows[ROOT]), "k*", markersize=12, label='"sqrt"')
        others = [name for name in rows if name not in every]
        for i, name in enumerate(others, 1):
            axes.axhline(value(rows[name]), color=f"C{i}", linestyle="--", label=name)
        axes.set_xscale("log")
        axes.set_xlabel("c, steps from one state that is kept to the next")
        axes.set_ylabel(label)
    both[0].axhline(alone(case)["x"], color="grey", linestyle=":", label="x alone")
    both[0].set_yscale("log")
    both[1].set_ylim(bottom=0)
    labelled = both[0].get_legend_handles_labels()
    figure.legend(*labelled, fontsize=8, ncols=6, loc="outside lower center")
    figure.suptitle(f"(B, T, D, H) = {case.shape}, last output", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    runs = {"curve": lambda: curve(args.seconds), "long": long}
    runs["output_layer"] = output_layer
    parser.add_argument("--only", nargs="+", choices=runs, default=list(runs))
    parser.add_argument(
        "--seconds", type=float, default=10, help="of each pair of times"
    )
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here")
    parser.add_argument("--plot", type=pathlib.Path, help="draw the curve here")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(*one(*args.one))
        return
    results = {}
    for name in args.only:
        results[name] = runs[name]()
        write = table_of_curve if name == "curve" else table
        print(f"\n{write(results[name])}\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.plot and "curve" in results:
        plot(results["curve"], args.plot)


if __name__ == "__main__":
    main()
