"""Write what gpu.py measured into docs/performance.md.

    python benchmarks/accelerators/gpu_table.py             # of gpu.json beside this file
    python benchmarks/accelerators/gpu_table.py some.json   # of another, printed alone

Without the file the page says that no GPU has run the layer. The numbers of a CPU, by which
gpu.py is tested, are refused.
"""

import argparse
import json
import pathlib
import sys

import races

BENCHMARKS = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(BENCHMARKS))

from pages import filled  # noqa: E402

PAGE = BENCHMARKS.parent / "docs" / "performance.md"
RESULTS = pathlib.Path(__file__).with_name("gpu.json")
PLACE = "gpu"
LEADER = "BPTTRNN"
NONE_YET = (
    "No GPU has run this layer yet. There are no numbers of one, and nothing is claimed of "
    "its speed there."
)


def text(results):
    """The section: the card and the versions, then for each task its tables."""
    if results is None:
        return NONE_YET
    if results["machine"]["platform"] == "cpu":
        raise SystemExit(
            "The page has room for a GPU's numbers alone. Received: those of a CPU."
        )
    return measured(results)


def measured(results):
    parts = [machine(results)]
    for name, task in races.TASKS.items():
        rows = [row for row in results["rows"] if row["race"]["task"] == name]
        for what, write in WHAT.items():
            chosen = [row for row in rows if row["what"] == what]
            if chosen:
                parts.append(f"{TITLES[what]}, {task.title}:\n\n{write(chosen)}")
    if results["left_out"]:
        count = len(results["left_out"])
        parts.append(f"Left out, for want of time: {count} of these measurements.")
    return "\n\n".join(parts)


def machine(results):
    known = results["machine"]
    versions = [
        f"{name} {known[name]}"
        for name in ("driver", "cuda", "cudnn", "jax", "torch", "python")
        if known.get(name)
    ]
    exported = f"programs exported by TensorFlow {results['bundle']['tensorflow']}"
    return f"{known['card']}; {', '.join(versions)}; {exported}."


def times(rows):
    """The leader's milliseconds, the others as multiples of them."""
    names = names_of(rows)
    lines = header(names, " ms (quartiles)")
    for row in rows:
        contestants = row["contestants"]
        leader = contestants.get(LEADER, {}).get("ms")
        cells = []
        for name in names:
            known = contestants.get(name, {})
            if "ms" not in known:
                cells.append(missing(known))
            elif name == LEADER:
                low, high = known["ms"]["quartiles"]
                cells.append(f"{known['ms']['median']:.2f} ({low:.2f}–{high:.2f})")
            elif leader is None:
                cells.append(f"{known['ms']['median']:.2f} ms")
            else:
                cells.append(f"{known['ms']['median'] / leader['median']:.2f}")
        lines.append(line(row, cells))
    return "\n".join(lines)


def memory(rows):
    """Megabytes; where the device told none, what the compiler says of a program."""
    names = names_of(rows)
    lines = header(names, " MB")
    for row in rows:
        cells = []
        for name in names:
            known = row["contestants"].get(name, {})
            if known.get("mb") is not None:
                cells.append(f"{known['mb']:,.0f}")
            elif "failure" not in known and "compiler_mb" in known:
                cells.append(f"{known['compiler_mb']:,.0f} *")
            else:
                cells.append(missing(known))
        lines.append(line(row, cells))
    return "\n".join(lines)


WHAT = {"time": times, "memory": memory}
TITLES = {"time": "Time of a step", "memory": "Memory of a step"}


def names_of(rows):
    """Every contestant of these rows, the leader first."""
    found = dict.fromkeys(name for row in rows for name in row["contestants"])
    found.pop("race", None)
    return [LEADER, *(name for name in found if name != LEADER)]


def header(names, unit):
    titles = ["(B, T, D, H)", "precision", names[0] + "," + unit, *names[1:]]
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]


def line(row, cells):
    race = races.Race(**row["race"])
    whole = row["contestants"].get("race")
    if whole is not None:
        cells = [missing(whole)] * len(cells)
    shape = f"({', '.join(f'{size:,}' for size in race.shape)})"
    return f"| {' | '.join([shape, race.precision, *cells])} |"


def missing(known):
    """Why there is no number, in a few words; gpu.json has all of them."""
    failure = known.get("failure")
    if failure is None:
        return "–"
    lower = failure.lower()
    if "out of memory" in lower or "resource_exhausted" in lower:
        return "out of memory"
    if lower.startswith("disagrees"):
        return failure
    return "failed"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "results", nargs="?", type=pathlib.Path, help="print these alone"
    )
    args = parser.parse_args()
    if args.results:
        print(measured(json.loads(args.results.read_text())))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else None
    page = filled(PAGE.read_text(encoding="utf-8"), PLACE, text(results))
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
