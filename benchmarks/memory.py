"""Peak resident memory of a training step against the number of steps.

    python benchmarks/memory.py
    python benchmarks/memory.py --timesteps 8 500 2000 --runs 3

Each number is the peak of a process of its own (`VmHWM`, Linux) that takes three training
steps, less that of the same program at T = 8: what is left is what grows with T, the inputs
and targets included. The median of some runs, since allocators differ from run to run.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

NAMES = ["BPTTRNN", "BPTTRNN, XLA", "SimpleRNN, graph", "SimpleRNN, XLA"]
BATCH, FEATURES, UNITS = 32, 32, 128
SHORT = 8
STEPS = 3
# SimpleRNN under XLA takes a time that is quadratic in T for whole sequences.
LONGEST_SIMPLERNN_XLA = 2000


def peak(name, sequences, timesteps):
    """Megabytes at the peak of this process, after some steps."""
    from contestants import CONTESTANTS, Case, problem

    case = Case(BATCH, timesteps, FEATURES, UNITS, sequences=sequences)
    return peak_of_steps(CONTESTANTS[name](case, problem(case)))


def peak_of_steps(step):
    """Megabytes at the peak of this process during some calls of `step`."""
    # Making the numbers took more than they need: the peak counts from here.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    for _ in range(STEPS):
        step()
    status = pathlib.Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def numbers_of_a_process(*arguments, script, limit=None):
    """What `script --one arguments` prints in its last line; it has `limit` seconds."""
    command = [sys.executable, script, "--one", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    if done.returncode:
        raise SystemExit(f"{arguments} failed:\n{done.stderr[-2000:]}")
    return list(map(float, done.stdout.splitlines()[-1].split()))


def peak_of_a_process(*arguments, script=__file__):
    """Megabytes that `script --one arguments` prints."""
    (mb,) = numbers_of_a_process(*arguments, script=script)
    return mb


def measure(timesteps, runs):
    """Megabytes over the same program at T = 8, for each output, contestant and T."""
    results = []
    for sequences in (True, False):
        for name in NAMES:
            steps = [
                t
                for t in timesteps
                if not (
                    sequences and "SimpleRNN, X" in name and t > LONGEST_SIMPLERNN_XLA
                )
            ]
            peaks = {t: [] for t in [SHORT, *steps]}
            for _ in range(runs):
                for t, values in peaks.items():
                    values.append(peak_of_a_process(name, sequences, t))
            base = statistics.median(peaks[SHORT])
            growth = {t: statistics.median(peaks[t]) - base for t in steps}
            results.append(
                {
                    "name": name,
                    "sequences": sequences,
                    "base_mb": base,
                    "growth_mb": growth,
                    "peaks_mb": peaks,
                }
            )
            shown = {t: round(mb) for t, mb in growth.items()}
            output = "sequence" if sequences else "last output"
            print(f"{name}, {output}, MB over T = {SHORT}: {shown}", flush=True)
    return results


def data_mb(sequences, timesteps):
    """Inputs and targets, and the states."""
    numbers = FEATURES + (UNITS if sequences else 0)
    mb = BATCH * timesteps * 4 / 2**20
    return mb * numbers, mb * UNITS


def table(results):
    """Markdown: a row for each output and contestant, a column for each T."""
    columns = sorted({int(t) for r in results for t in r["growth_mb"]})
    lines = [
        "| output | layer | " + " | ".join(f"T = {t}" for t in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for result in results:
        growth = {int(t): mb for t, mb in result["growth_mb"].items()}
        cells = [f"{growth[t]:.0f}" if t in growth else "–" for t in columns]
        output = "sequence" if result["sequences"] else "last"
        lines.append(f"| {output} | {result['name']} | " + " | ".join(cells) + " |")
    for sequences in (True, False):
        sizes = [data_mb(sequences, t) for t in columns]
        output = "sequence" if sequences else "last"
        name = "x, targets and h alone"
        cells = [f"{data + states:.0f}" for data, states in sizes]
        lines.append(f"| {output} | *{name}* | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results, path):
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, sequences in zip(both, (True, False), strict=True):
        shown = [r for r in results if r["sequences"] == sequences]
        for result in shown:
            growth = {int(t): mb for t, mb in result["growth_mb"].items()}
            axes.plot(growth.keys(), growth.values(), marker="o", label=result["name"])
        steps = sorted({int(t) for r in shown for t in r["growth_mb"]})
        least = [sum(data_mb(sequences, t)) for t in steps]
        axes.plot(steps, least, "k--", label="x, targets and h alone")
        axes.set_title("whole sequence" if sequences else "last output")
        axes.set_xlabel("timesteps")
        axes.set_ylabel(f"peak memory over T = {SHORT}, MB")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--timesteps", nargs="+", type=int, default=[500, 1000, 2000, 4000]
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here")
    parser.add_argument("--plot", type=pathlib.Path, help="draw the curves here")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(peak(*args.one))
        return
    results = measure(args.timesteps, args.runs)
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
