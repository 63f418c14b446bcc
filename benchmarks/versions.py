"""Time one version of the package against another, case by case.

    git worktree add ../before HEAD~1
    python benchmarks/versions.py ../before
    python benchmarks/versions.py ../before --only gradient --rounds 60

Each version runs in a process of its own, and so does the one before a second time: what
those two differ by is the noise of the machine. They take turns, step by step, in rounds.
The ratio is that of lower quartiles, which what else the machine does disturbs least.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

SHAPES = [
    (32, 128, 64, 128),
    (64, 256, 128, 256),
    (1, 1000, 32, 64),
    (128, 100, 128, 512),
    (32, 1024, 64, 128),
    (8, 2048, 64, 256),
]
FIRST, LONG = SHAPES[0], SHAPES[4]


def cases():
    """The options of the layer and of the call, by name."""
    found = {}
    for shape in SHAPES:
        found[f"{shape} sequence"] = {"shape": shape, "return_sequences": True}
        found[f"{shape} last output"] = {"shape": shape}
    sequence = {"shape": FIRST, "return_sequences": True}
    for name, options in {
        "mask": {"masked": True},
        "recurrent dropout": {"recurrent_dropout": 0.2},
        "gelu": {"activation": "gelu"},
        "softmax": {"activation": "softmax"},
        "clipped": {"adjoint_clipnorm": 1.0},
        "output layer": {"output_units": 8},
        "gradient penalty": {"second_order": True},
        "gradient penalty, mask": {"second_order": True, "masked": True},
        "gradient penalty, softmax": {"second_order": True, "activation": "softmax"},
    }.items():
        found[f"{FIRST} {name}"] = sequence | options
    long = {"shape": LONG, "return_sequences": True}
    for name, options in {
        "chunks of 32": {"truncation": [32, 32]},
        "windows of 32 every 8": {"truncation": [32, 8]},
        "checkpoints": {"checkpoint_every": "sqrt"},
        "checkpoints, windows of 32 every 8": {
            "truncation": [32, 8],
            "checkpoint_every": 64,
        },
    }.items():
        found[f"{LONG} {name}"] = long | options
    found[f"{LONG} last window of 64"] = {"shape": LONG, "truncation": [64, 64]}
    return found


def step_of(shape, masked=False, second_order=False, truncation=None, **options):
    """A training step, or that of a gradient penalty, in a tf.function."""
    import keras
    import numpy as np
    import tensorflow as tf

    from keras_bptt import BPTTRNN, Truncation

    batch, timesteps, features, units = shape
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    if truncation is not None:
        options["truncation"] = Truncation(*truncation)
    layer = BPTTRNN(units, seed=1, **options)
    layer.build((batch, timesteps, features))
    x = tf.constant(rng.normal(size=(batch, timesteps, features)), "float32")
    lengths = rng.integers(timesteps // 2, timesteps + 1, size=(batch, 1))
    mask = tf.constant(np.arange(timesteps) < lengths) if masked else None
    weights = layer.trainable_variables

    def loss_of(x):
        return tf.reduce_mean(tf.square(layer(x, mask=mask, training=True)))

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            if second_order:
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    loss = loss_of(x)
                loss += tf.reduce_sum(tf.square(inner.gradient(loss, x)))
            else:
                loss = loss_of(x)
        return tape.gradient(loss, weights)

    return lambda: [gradient.numpy() for gradient in step(x)]


def serve():
    """Answer on standard output what is asked on standard input: make a step, time it."""
    step = None
    for line in sys.stdin:
        asked = json.loads(line)
        if asked is None:
            start = time.perf_counter()
            step()
            answer = time.perf_counter() - start
        else:
            step = step_of(**asked)
            step()
            answer = [float(abs(gradient).sum()) for gradient in step()]
        print(json.dumps(answer), flush=True)


class Version:
    """A process that has imported the package from a folder."""

    def __init__(self, folder):
        environment = os.environ | {
            "PYTHONPATH": str(pathlib.Path(folder).resolve()),
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, what=None):
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def compare(case, versions, rounds, seconds):
    """Seconds of each step of each version, in turns."""
    made = [version.ask(case) for version in versions]
    for numbers in made[1:]:
        for got, want in zip(numbers, made[0], strict=True):
            if abs(got - want) > 1e-3 * abs(want):
                raise SystemExit(f"{case}: gradients differ, {got} and {want}")
    times = [[] for _ in versions]
    end = time.perf_counter() + seconds
    while len(times[0]) < rounds and time.perf_counter() < end:
        for version, own in zip(versions, times, strict=True):
            version.ask()  # the caches are full of what others left there
            own.append(version.ask())
    return times


def quartile(values):
    return statistics.quantiles(values, n=4)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", nargs="?", help="a checkout of the other version")
    parser.add_argument("--only", default="", help="cases whose name has these words")
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--seconds", type=float, default=60, help="at most, of a case")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return
    here = pathlib.Path(__file__).parents[1]
    versions = [Version(folder) for folder in (args.before, args.before, here)]
    print(
        "| case | rounds | ms before | noise | after / before |\n|---|---|---|---|---|"
    )
    for name, case in cases().items():
        if args.only in name:
            times = compare(case, versions, args.rounds, args.seconds)
            before, again, after = map(quartile, times)
            print(
                f"| {name} | {len(times[0])} | {1e3 * before:.2f} "
                f"| {again / before - 1:+.1%} | {after / min(before, again):.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
