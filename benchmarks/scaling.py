"""Time of a training step against T, H and B, with its peers.

python benchmarks/scaling.py --json scaling.json --plot scaling.png
"""

import argparse
import dataclasses
import json
import pathlib

from contestants import CONTESTANTS, Case
from training_step import measure

BASE = Case(32, 128, 32, 128)
AXES = {
    "timesteps": [32, 64, 128, 256, 512, 1024, 2048],
    "units": [32, 64, 128, 256, 512],
    "batch": [1, 2, 4, 8, 16, 32, 64, 128],
}
# SimpleRNN under XLA on a CPU: 0.1 s at T = 500, and four times that for twice the steps.
LONGEST_SIMPLERNN_XLA = 512


def run(seconds):
    results = []
    for axis, values in AXES.items():
        for value in values:
            case = dataclasses.replace(BASE, **{axis: value})
            names = [
                name
                for name in CONTESTANTS
                if name != "SimpleRNN, XLA" or case.timesteps <= LONGEST_SIMPLERNN_XLA
            ]
            result = measure(case, seconds, names)
            results.append({"axis": axis, "value": value, **result})
            median = {k: round(v["median"], 2) for k, v in result["ms"].items()}
            print(f"{axis} = {value}, ms: {median}", flush=True)
    return results


def plot(results, path):
    import matplotlib.pyplot as plt

    figure, axes_of = plt.subplots(1, 3, figsize=(12, 4.8), layout="constrained")
    for axes, axis in zip(axes_of, AXES, strict=True):
        shown = [r for r in results if r["axis"] == axis]
        for name in CONTESTANTS:
            points = [
                (r["value"], r["ms"][name]["median"]) for r in shown if name in r["ms"]
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=name)
        limits = [(r["value"], r["limit_ms"]) for r in shown]
        axes.plot(*zip(*limits, strict=True), "k--", label="limit")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(axis)
        axes.set_ylabel("ms a step")
    labelled = axes_of[0].get_legend_handles_labels()
    figure.legend(*labelled, fontsize=8, ncols=4, loc="outside lower center")
    rest = (
        f"B = {BASE.batch}, T = {BASE.timesteps}, D = {BASE.features}, H = {BASE.units}"
    )
    figure.suptitle(f"A training step, whole sequence; what is not varied: {rest}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=2, help="for each point")
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here")
    parser.add_argument("--plot", type=pathlib.Path, help="draw the curves here")
    args = parser.parse_args()
    results = run(args.seconds)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
