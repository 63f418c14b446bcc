"""What compilation costs, and when it is earned back.

    python benchmarks/compilation.py

Two tables: epochs over batches of many lengths, compilation included; and, for small cases,
the first step and a later one with and without it, and after how many steps it has paid.
"""

import argparse
import time

import keras
import numpy as np
import tensorflow as tf
from contestants import CONTESTANTS, DEFAULT, Case, problem
from fit_and_predict import model_of
from timing import interleaved, summary
from training_step import SHAPES

from keras_bptt import BPTTRNN

PLAIN = "BPTTRNN, jit_compile=False"
SMALL = [
    Case(batch, timesteps, 16, units)
    for timesteps in (1, 4, 16, 64)
    for batch, units in ((1, 16), (32, 16), (32, 64))
]


def break_even(seconds=1, cases=SMALL):
    """First steps in seconds, later ones in milliseconds, compiled and not."""
    results = []
    # What the first compilation of a process costs once is no case's own.
    CONTESTANTS[DEFAULT](SMALL[0], problem(SMALL[0]))()
    for case in cases:
        data, steps, first = problem(case), {}, {}
        for name in (DEFAULT, PLAIN):
            steps[name] = CONTESTANTS[name](case, data)
            start = time.perf_counter()
            steps[name]()
            first[name] = time.perf_counter() - start
        ms = summary(interleaved(steps, seconds))
        later = {name: values["median"] for name, values in ms.items()}
        gain = later[PLAIN] - later[DEFAULT]
        paid = 1e3 * (first[DEFAULT] - first[PLAIN]) / gain if gain > 0 else None
        results.append(
            {
                "case": case.shape,
                "first_s": first,
                "later_ms": later,
                "paid_after": paid,
            }
        )
        print(results[-1], flush=True)
    return results


def table_of_break_even(results):
    lines = [
        "| (B, T, D, H) | first step, s: compiled | not | later step, ms: compiled | not "
        "| paid after steps |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        cells = [f"{result['first_s'][name]:.2f}" for name in (DEFAULT, PLAIN)]
        cells += [f"{result['later_ms'][name]:.2f}" for name in (DEFAULT, PLAIN)]
        paid = result["paid_after"]
        cells.append("never" if paid is None else f"{max(paid, 0):.0f}")
        lines.append(f"| {tuple(result['case'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def many_lengths(batches=40):
    """Seconds of two epochs over batches of random lengths, for each way to run them."""
    case = Case(*SHAPES[0])
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, case.timesteps + 1, size=batches)
    x = [
        rng.normal(size=(case.batch, t, case.features)).astype("float32")
        for t in lengths
    ]
    ways = {
        "BPTTRNN": (BPTTRNN, {}, {}),
        "BPTTRNN, jit_compile=False": (BPTTRNN, {"jit_compile": False}, {}),
        "BPTTRNN, model compiled by XLA": (BPTTRNN, {}, {"jit_compile": True}),
        "SimpleRNN": (keras.layers.SimpleRNN, {}, {}),
        "SimpleRNN, model compiled by XLA": (
            keras.layers.SimpleRNN,
            {},
            {"jit_compile": True},
        ),
    }
    results = {}
    for name, (layer_class, options, compiled) in ways.items():
        model = model_of(layer_class, case, **options)
        model.compile("adam", "mse", **compiled)
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            for batch in x:
                model.train_on_batch(batch, tf.zeros((*batch.shape[:2], case.units)))
            seconds.append(time.perf_counter() - start)
        results[name] = seconds
        print(f"{name}: {seconds[0]:.1f} s, then {seconds[1]:.2f} s", flush=True)
    return {"lengths": len(set(lengths)), "batches": batches, "seconds": results}


def table_of_lengths(results):
    lines = ["| layer | first epoch, s | second epoch, s |", "|---|---|---|"]
    for name, (first, second) in results["seconds"].items():
        lines.append(f"| {name} | {first:.1f} | {second:.2f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.parse_args()
    print(table_of_lengths(many_lengths()))
    print(table_of_break_even(break_even()))


if __name__ == "__main__":
    main()
