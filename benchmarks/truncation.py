"""What a truncated gradient takes: time and memory of its training step.

    python benchmarks/truncation.py
    python benchmarks/truncation.py --seconds 10

Speed: a training step with chunks and with windows that overlap, over the same step with
full backpropagation; and the backward pass alone, a step less its forward pass, of one long
example, compiled and not. Memory: the peak of a process of its own, of the last output
against the number of steps, and of a sequence against the overlap.
"""

import argparse
import functools
import json
import pathlib
import statistics

import memory
import tensorflow as tf
from contestants import Case, keras_step, problem
from timing import interleaved, summary

from keras_bptt import BPTTRNN, Truncation

# With a window for each, k2, that divides the number of steps.
CASES = [
    (Case(32, 128, 64, 128), 32),
    (Case(64, 256, 128, 256), 64),
    (Case(1, 1000, 32, 64), 100),
    (Case(128, 100, 128, 512), 25),
    (Case(32, 1024, 64, 128), 64),
    (Case(8, 2048, 64, 256), 64),
]
LONG = Case(1, 4096, 32, 64), 64
OVERLAPS = [1, 2, 4, 8]  # k2 / k1
LENGTHS = [1000, 10_000, 100_000]
LONG_BATCH, LONG_FEATURES, LONG_UNITS = 4, 4, 128


def policies(steps, overlaps=OVERLAPS):
    """By the name of their column."""
    chosen = {"full": None}
    for overlap in overlaps:
        name = "chunks" if overlap == 1 else f"k2/k1 = {overlap}"
        chosen[name] = Truncation(steps, max(1, steps // overlap))
    return chosen


def forward(case, data, **options):
    """The forward pass of a training step."""
    layer = BPTTRNN(case.units, return_sequences=case.sequences, **options)
    layer.build(data["x"].shape)
    layer.set_weights(data["weights"])
    x = tf.constant(data["x"])
    run = tf.function(lambda x: layer(x, training=True))
    return lambda: run(x).numpy()


def measure(case, steps, seconds, **options):
    """Milliseconds of a step by policy, and of the forward pass."""
    data = problem(case)
    functions = {
        name: keras_step(BPTTRNN, truncation=policy, **options)(case, data)
        for name, policy in policies(steps).items()
    }
    functions["forward"] = forward(case, data, **options)
    for function in functions.values():
        function()
    return summary(interleaved(functions, seconds))


def speed(seconds, cases=CASES):
    results = []
    for case, steps in cases:
        ms = measure(case, steps, seconds)
        results.append({"shape": case.shape, "steps": steps, "ms": ms})
        medians = {k: round(v["median"], 2) for k, v in ms.items()}
        print(f"{case.shape}, k2 = {steps}, ms: {medians}", flush=True)
    return results


def table_of_speed(results):
    """Markdown: the time of a step over that of full backpropagation."""
    names = list(policies(8))
    lines = [
        "| (B, T, D, H) | k2 | full, ms | " + " | ".join(names[1:]) + " |",
        "|---|---|---|" + "---|" * (len(names) - 1),
    ]
    for result in results:
        ms = {name: value["median"] for name, value in result["ms"].items()}
        ratios = [f"{ms[name] / ms['full']:.2f}" for name in names[1:]]
        cells = [tuple(result["shape"]), result["steps"], f"{ms['full']:.2f}", *ratios]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def backward(seconds, case=LONG):
    """The backward pass of one long example."""
    case, steps = case
    results = []
    for jit_compile in ("auto", False):
        ms = measure(case, steps, seconds, jit_compile=jit_compile)
        results.append({"jit_compile": jit_compile, "steps": steps, "ms": ms})
        print(f"{case.shape}, {jit_compile=}, k2 = {steps}: measured", flush=True)
    return results


def table_of_backward(results):
    """Markdown: how many times as fast as full backpropagation the backward pass is."""
    names = list(policies(8))
    lines = [
        "| jit_compile | dependent steps: full | truncated | "
        + " | ".join(names[1:])
        + " |",
        "|---|---|---|" + "---|" * (len(names) - 1),
    ]
    for result in results:
        ms = {name: value["median"] for name, value in result["ms"].items()}
        full = ms["full"] - ms["forward"]
        times = [f"{full / (ms[name] - ms['forward']):.1f}" for name in names[1:]]
        cells = [result["jit_compile"], LONG[0].timesteps, result["steps"], *times]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def peak_of_policy(sequences, timesteps, steps, stride):
    """Megabytes at the peak of this process, after some training steps."""
    policy = Truncation(steps, stride) if steps else None
    case = Case(LONG_BATCH, timesteps, LONG_FEATURES, LONG_UNITS, sequences=sequences)
    step = keras_step(BPTTRNN, truncation=policy)(case, problem(case))
    return memory.peak_of_steps(step)


def memories(lengths=LENGTHS, steps=64, runs=1):
    """Megabytes over the same program at T = 2 k2, of each output, policy and length."""
    rows = [(False, "full", (0, 0)), (False, "chunks", (steps, steps))]
    rows += [
        (True, name, (policy.steps, policy.stride) if policy else (0, 0))
        for name, policy in policies(steps, [1, 2, 8]).items()
    ]
    results = []
    for sequences, name, window in rows:
        peaks = {
            t: statistics.median(
                memory.peak_of_a_process(sequences, t, *window, script=__file__)
                for _ in range(runs)
            )
            for t in [2 * steps, *lengths]
        }
        growth = {t: peaks[t] - peaks[2 * steps] for t in lengths}
        results.append({"sequences": sequences, "name": name, "growth_mb": growth})
        shown = {t: round(mb) for t, mb in growth.items()}
        print(
            f"{'sequence' if sequences else 'last output'}, {name}: {shown}", flush=True
        )
    return results


def table_of_memory(results):
    lengths = [int(t) for t in results[0]["growth_mb"]]
    lines = [
        "| output | truncation | " + " | ".join(f"T = {t:,}" for t in lengths) + " |",
        "|---|---|" + "---|" * len(lengths),
    ]
    for result in results:
        output = "sequence" if result["sequences"] else "last"
        cells = [f"{mb:.0f}" for mb in result["growth_mb"].values()]
        lines.append(f"| {output} | {result['name']} | " + " | ".join(cells) + " |")
    mb = [LONG_BATCH * t * 4 / 2**20 for t in lengths]
    for output, numbers in (
        ("last", LONG_FEATURES),
        ("sequence", LONG_FEATURES + LONG_UNITS),
    ):
        cells = [f"{numbers * m:.0f}" for m in mb]
        data = "x" if output == "last" else "x and the targets"
        lines.append(f"| {output} | *{data} alone* | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=8, help="for each row")
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(peak_of_policy(*args.one))
        return
    results = {}
    for name, run, table in (
        ("speed", functools.partial(speed, args.seconds), table_of_speed),
        ("backward", functools.partial(backward, args.seconds), table_of_backward),
        ("memory", memories, table_of_memory),
    ):
        results[name] = run()
        print(f"\n{table(results[name])}\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
