"""Draws every figure again and writes what is generated of the pages (`make docs`).

    python docs/build.py

Measures and trains nothing: numbers are those that lie beside the figures. `make bench`,
`make flow`, `make examples` and `python examples/memory_span.py` find new ones.
"""

import argparse
import importlib
import json
import pathlib
import sys
import types

import draw_bptt
import write_api

ROOT = pathlib.Path(__file__).parents[1]
sys.path += [str(ROOT / "examples"), str(ROOT / "benchmarks")]
# The kinds of RNN, by the sheet's table: a script in examples/, its results saved_models/.
KINDS = [
    "flowers",
    "draw_digits",
    "read_digits",
    "character_language_model",
    "sunspots",
    "rewrite_numbers",
]


def read(path):
    """A JSON file with the keys of its tables as numbers where they were."""
    return json.loads(path.read_text())


def draw_examples(to):
    for name in KINDS:
        draw = importlib.import_module(name).draw
        draw(read(ROOT / "saved_models" / f"{name}.json"), to(f"saved_models/{name}.png"))
    name = "docs/gradient_flow/vanishing_and_exploding"
    found = read(ROOT / f"{name}.json")
    importlib.import_module(pathlib.Path(name).name).plot(found["seeds"], to(f"{name}.png"))
    name = "docs/truncation/memory_span"
    found = read(ROOT / f"{name}.json")
    settings = types.SimpleNamespace(**found["settings"])
    importlib.import_module(pathlib.Path(name).name).plot(
        found["rows"], to(f"{name}.png"), settings
    )


def draw_benchmarks(to):
    for name, (_, _, plot) in importlib.import_module("report").BENCHMARKS.items():
        if plot is not None:
            found = read(ROOT / "docs/performance" / f"{name}.json")
            plot(found["results"], to(f"docs/performance/{name}.png"))
