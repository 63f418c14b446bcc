"""Time a training step of BPTTRNN and of its peers: see `contestants.py`.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --shapes 32,128,64,128 1,1000,32,64 --seconds 20

All contestants have the same weights and inputs, and must agree on the gradients before
any is timed. They are timed in one process, round by round. What counts is the ratio of
medians, not milliseconds, which depend on the machine and on what else it does. `limit` is
the time of the step's multiply-adds at the rate of one large matrix product, measured in
the same rounds.
"""

import argparse
import dataclasses
import json
import pathlib

from contestants import CONTESTANTS, DEFAULT, Case, contestants
from timing import interleaved, large_product, limit, summary

SHAPES = [
    (32, 128, 64, 128),
    (64, 256, 128, 256),
    (1, 1000, 32, 64),
    (128, 100, 128, 512),
    (32, 1024, 64, 128),
    (8, 2048, 64, 256),
]
CASES = [
    *(Case(*shape, sequences=s) for shape in SHAPES for s in (True, False)),
    Case(*SHAPES[0], masked=True),
    Case(*SHAPES[0], dropout=0.2),
]


def measure(case, seconds, names=None):
    """Time every contestant that is installed on one case."""
    steps, missing, worst = contestants(case, names)
    product = "a large matrix product"
    times = interleaved({**steps, product: large_product()}, seconds)
    rounds = len(times[product])
    ms = summary(times)
    bound = limit(ms.pop(product)["median"], case.multiply_adds)
    return {
        "case": dataclasses.asdict(case),
        "largest_relative_difference": worst,
        "rounds": rounds,
        "missing": missing,
        "ms": ms,
        "limit_ms": bound,
    }


def ratio(result, name):
    """How many times as long as BPTTRNN, or `limit`: BPTTRNN's over it; as text."""
    ms, own = result["ms"], result["ms"][DEFAULT]["median"]
    if name == "limit":
        return f"{own / result['limit_ms']:.2f}"
    return f"{ms[name]['median'] / own:.2f}" if name in ms else "–"


def table(results):
    """Markdown: the default's time, the others' as ratios to it."""
    others = [name for name in CONTESTANTS if name != DEFAULT]
    lines = [
        "| (B, T, D, H) | output | BPTTRNN, ms (quartiles) | "
        + " | ".join(others)
        + " | BPTTRNN / limit |",
        "|---|---|---|" + "---|" * (len(others) + 1),
    ]
    for result in results:
        case, own = Case(**result["case"]), result["ms"][DEFAULT]
        low, high = own["quartiles"]
        cells = [
            *str(case).replace(") ", ")|").split("|"),
            f"{own['median']:.2f} ({low:.2f}–{high:.2f})",
            *(ratio(result, name) for name in [*others, "limit"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results, path):
    """Bars of the ratios, a group for each case."""
    import matplotlib.pyplot as plt

    names = list(CONTESTANTS)
    figure, axes = plt.subplots(figsize=(11, 4.5), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        shown = [
            (j + (i - len(names) / 2 + 0.5) * width, float(ratio(result, name)))
            for j, result in enumerate(results)
            if name in result["ms"]
        ]
        axes.bar(*zip(*shown, strict=True), width, label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_ylabel("time of a step / BPTTRNN's")
    labels = [str(Case(**r["case"])).replace(") ", ")\n") for r in results]
    axes.set_xticks(range(len(results)), labels, fontsize=6, rotation=35)
    axes.legend(fontsize=8, ncols=4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse_shape(text):
    try:
        shape = tuple(map(int, text.split(",")))
    except ValueError:
        shape = ()
    if len(shape) != 4 or min(shape) < 1:
        raise argparse.ArgumentTypeError(
            f"B,T,D,H: four positive integers, not {text!r}"
        )
    return shape


def run(cases, seconds):
    results = []
    for case in cases:
        results.append(result := measure(case, seconds))
        median = {k: round(v["median"], 2) for k, v in result["ms"].items()}
        print(f"{case}, ms: {median}, limit {result['limit_ms']:.2f}", flush=True)
        worst = result["largest_relative_difference"]
        print(f"  largest relative difference of a gradient: {worst:.1e}")
        print("".join(f"  {line}\n" for line in result["missing"]), end="")
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="B,T,D,H")
    parser.add_argument("--seconds", type=float, default=10, help="for each row")
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here")
    parser.add_argument("--plot", type=pathlib.Path, help="draw the ratios here")
    args = parser.parse_args()
    cases = CASES
    if args.shapes:
        cases = [
            Case(*shape, sequences=s) for shape in args.shapes for s in (True, False)
        ]
    results = run(cases, args.seconds)
    print("\nTime of a step over BPTTRNN's, medians:\n")
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
