"""BPTTLSTM and BPTTGRU beside their peers: time and memory of a training step.

    python benchmarks/gated.py
    python benchmarks/gated.py --layers GRU --seconds 20
    python benchmarks/gated.py --all

The contestants are those of `contestants.py`; all must agree on the gradients. What counts
is the ratio of lower quartiles, in rounds of one process. `--all` measures first steps,
derivatives of second order and the peak of memory too, in processes of their own.
"""

import argparse
import json
import pathlib
import time

import tensorflow as tf
import training_step
from contestants import ALL, HOSTS, OURS, Case, problem
from memory import numbers_of_a_process, peak_of_steps
from timing import interleaved, summary

LAYERS = ("LSTM", "GRU")
SHAPES = training_step.SHAPES[:5]
SMALL = (32, 64, 16, 64)
SHORT = 8  # a case of memory is counted over the same one of so many steps
# Name, batch, timesteps, features, units, whether it returns sequences, checkpoints.
MEMORY = {
    "sequence": (32, 2000, 32, 128, True, None),
    "last output, checkpoints": (8, 10_000, 32, 256, False, "sqrt"),
}


def run(seconds, layers=LAYERS, shapes=SHAPES):
    """Every layer in every shape, with all who are installed."""
    cases = [Case(*shape, layer=layer) for layer in layers for shape in shapes]
    return training_step.run(cases, seconds)


def lower(result, name):
    return result["ms"][name]["quartiles"][0]


def ratios(result):
    """Each other's time over that of our layer, and its own over the limit; as text."""
    ours, *others = ALL[result["case"]["layer"]]
    own = lower(result, ours)
    found = {
        name: f"{lower(result, name) / own:.2f}" if name in result["ms"] else "–"
        for name in others
    }
    return found | {"limit": f"{own / result['limit_ms']:.2f}"}


def table(results):
    """Markdown: one table for each layer."""
    tables = []
    for layer in dict.fromkeys(r["case"]["layer"] for r in results):
        ours, *others = ALL[layer]
        head = f"| (B, T, D, H) | {ours}, ms | {' | '.join(others)} | {ours} / limit |"
        lines = [head, "|---" * (len(others) + 3) + "|"]
        for result in results:
            if result["case"]["layer"] == layer:
                cells = [str(Case(**result["case"]).shape)]
                cells += [f"{lower(result, ours):.2f}", *ratios(result).values()]
                lines.append("| " + " | ".join(cells) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


# --- First steps, second order, memory: each in a process of its own


def made(layer_class, case, **options):
    layer = layer_class(case.units, return_sequences=case.sequences, **options)
    data = problem(case)
    layer.build(data["x"].shape)
    layer.set_weights(data["weights"])
    return layer, tf.constant(data["x"]), tf.constant(data["y"])


def first_step(layer, ours, shape):
    """Seconds of the first step: to trace, to compile, to run."""
    step = list(ALL[layer].values())[0 if ours else 3]
    case = Case(*shape, layer=layer)
    step = step(case, problem(case))
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def second_order(layer, seconds):
    """Milliseconds of the gradient of a gradient's norm, of both layers."""
    case, functions = Case(*SMALL, layer=layer), {}
    for layer_class in (OURS[layer], HOSTS[layer]):
        made_layer, x, y = made(layer_class, case)
        weights = [v.value for v in made_layer.trainable_variables]

        @tf.function
        def step(layer=made_layer, x=x, y=y, weights=weights):
            with tf.GradientTape() as outer:
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean((layer(x, training=True) - y) ** 2)
                gradients = tape.gradient(loss, weights)
                norm = sum(tf.reduce_sum(g * g) for g in gradients)
            return outer.gradient(norm, weights)

        functions[layer_class.__name__] = lambda step=step: step()[0].numpy()
    return summary(interleaved(functions, seconds))


def peak(layer, ours, batch, timesteps, features, units, sequences, every):
    """Megabytes at the peak of this process."""
    case = Case(batch, timesteps, features, units, sequences, layer=layer)
    options = {"checkpoint_every": every} if ours else {}
    layer, x, y = made((OURS if ours else HOSTS)[layer], case, **options)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((layer(x, training=True) - y) ** 2)
        return tape.gradient(loss, layer.trainable_variables)

    return peak_of_steps(lambda: step()[0].numpy())


def beside(what, *arguments):
    """What a function of this file gives of our layer and of Keras', in new processes."""
    return [
        numbers_of_a_process(what, arguments[0], ours, *arguments[1:], script=__file__)[
            0
        ]
        for ours in (True, False)
    ]


def more(layer, seconds):
    """Lines of first steps, second order and memory."""
    first = [beside("first_step", layer, SHAPES[0]) for _ in range(3)]
    ours, theirs = map(sorted, zip(*first, strict=True))
    yield f"first step, {SHAPES[0]}: {ours[1]:.2f} s, Keras {theirs[1]:.2f} s"
    ms = second_order(layer, seconds)
    ours, theirs = (each["quartiles"][0] for each in ms.values())
    yield f"second order, {SMALL}: Keras takes {theirs / ours:.2f} times as long"
    for name, (batch, timesteps, *rest) in MEMORY.items():
        both = [beside("peak", layer, batch, t, *rest) for t in (SHORT, timesteps)]
        ours, theirs = (long - short for short, long in zip(*both, strict=True))
        shape = (batch, timesteps, *rest[:2])
        yield (
            f"memory, {name}, {shape}: {ours:.0f} MB over T = {SHORT}, "
            f"Keras {theirs:.0f} MB, {ours / theirs:.2f} of it"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--shapes", nargs="+", type=training_step.parse_shape)
    parser.add_argument("--seconds", type=float, default=10, help="for each row")
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here")
    parser.add_argument(
        "--all", action="store_true", help="first steps, memory ... too"
    )
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        what, *arguments = args.one
        print({"first_step": first_step, "peak": peak}[what](*arguments))
        return
    results = run(args.seconds, args.layers, args.shapes or SHAPES)
    print("\nTime of a step over that of our layer, lower quartiles:\n")
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.all:
        for layer in args.layers:
            for line in more(layer, args.seconds):
                print(f"{layer}, {line}", flush=True)


if __name__ == "__main__":
    main()
