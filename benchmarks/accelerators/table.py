"""The tables of the section on GPU and TPU in docs/deploying.md."""

import json
import pathlib
import re
import sys

BENCHMARKS = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(BENCHMARKS))

from pages import filled  # noqa: E402

PAGE = BENCHMARKS.parent / "docs" / "deploying.md"


def tables(results):
    """Markdown by the names of its places on the page."""
    entries = results["programs"]
    versions = ", ".join(f"{k} {results[k]}" for k in ("tensorflow", "jax", "libtpu"))
    return {
        "accelerators_versions": versions,
        "accelerators_programs": programs([e for e in entries if e["run"]]),
        "accelerators_memory": memory([e for e in entries if not e["run"]]),
    }


def programs(entries):
    """A row for each that was run: how far it is from TensorFlow, and how sequential."""
    lines = [
        "| layer | largest difference | steps one after the other |",
        "|---|---|---|",
    ]
    for entry in entries:
        difference = max(entry["differences"].values())
        cells = [f"`{entry['options']}`", f"{difference:.1e}", steps(entry)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def memory(entries):
    """A row for each that was compiled alone: what it takes beside what it is given."""
    devices = list(entries[0]["devices"])
    lines = [
        "| (B, T, D, H) | layer | steps one after the other | "
        + " | ".join(f"{device}, MB" for device in devices)
        + " |",
        "|---|---|---|" + "---|" * len(devices),
    ]
    for entry in entries:
        shape = f"({', '.join(f'{size:,}' for size in entry['shape'])})"
        cells = [shape, f"`{entry['options']}`", steps(entry)]
        cells += [size(entry["devices"][device]) for device in devices]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def steps(entry):
    """The same for every device, or all that are known; where only a run tells, none."""
    compiled = entry["devices"].values()
    counts = {d["sequential_steps"] for d in compiled if "refused" not in d}
    shown = sorted(f"{count:,}" for count in counts if count is not None)
    return ", ".join(shown) or "–"


def size(compiled):
    """Megabytes of temporaries in HBM; of a program that does not fit, what it needs."""
    if "refused" not in compiled:
        return f"{compiled['temporaries'] / 1e6:,.0f}"
    needed, there = re.search(
        r"\((\d+)\S*G\) exceeds available HBM \((\d+)\S*G\)", compiled["refused"]
    ).groups()
    return f"refused: {needed} GiB of {there}"


def write(results):
    """Numbers as JSON beside the page, tables into it."""
    folder = PAGE.parent / PAGE.stem
    folder.mkdir(exist_ok=True)
    text = json.dumps(results, indent=1)
    (folder / "accelerators.json").write_text(text + "\n")
    page = PAGE.read_text(encoding="utf-8")
    for name, text in tables(results).items():
        page = filled(page, name, text)
    PAGE.write_text(page, encoding="utf-8")
