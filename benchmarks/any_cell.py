"""BPTT(cell) beside keras.layers.RNN(cell): time and memory of a training step.

    python benchmarks/any_cell.py
    python benchmarks/any_cell.py --cells LSTMCell "layer norm" --seconds 10

Both layers have the same weights and must agree on the gradients before they are timed, in
one process, round by round. (They draw other random numbers: a cell that draws some must
agree without them.) What counts is the ratio of the lower quartiles. Memory is the peak of
a process of its own (Linux), as in `memory.py`.
"""

import argparse
import json
import pathlib
import time

import keras
import numpy as np
import tensorflow as tf
from memory import numbers_of_a_process, peak_of_steps
from timing import interleaved, summary

from keras_bptt import BPTT

SHAPES = [(32, 128, 64, 128), (64, 128, 128, 256), (1, 1000, 32, 64)]
OURS, THEIRS = "BPTT", "RNN"
TOLERANCE = 1e-4
# Batch, features and units of the cases of memory.
MEMORY = (32, 32, 128)
SHORT = 8


class LayerNormCell(keras.layers.Layer):
    """A plain recurrent cell whose pre-activation is normalised; in Keras' operations."""

    def __init__(self, units, **options):
        super().__init__(**options)
        self.units = self.state_size = units

    def build(self, shape):
        units = self.units
        self.kernel = self.add_weight(shape=(shape[-1], units), name="kernel")
        self.recurrent_kernel = self.add_weight(
            shape=(units, units), initializer="orthogonal", name="recurrent_kernel"
        )
        self.gain = self.add_weight(shape=(units,), initializer="ones", name="gain")
        self.bias = self.add_weight(shape=(units,), initializer="zeros", name="bias")

    def call(self, x, states):
        z = x @ self.kernel + states[0] @ self.recurrent_kernel
        centred = z - keras.ops.mean(z, -1, keepdims=True)
        deviation = keras.ops.sqrt(keras.ops.var(z, -1, keepdims=True) + 1e-3)
        h = keras.ops.tanh(self.gain * centred / deviation + self.bias)
        return h, [h]


class LeakyCell(keras.layers.Layer):
    """A rate network of leaky units, each step with noise of its own."""

    noise = 0.1

    def __init__(self, units, **options):
        super().__init__(**options)
        self.units = self.state_size = units
        self.seed_generator = keras.random.SeedGenerator(1)

    def build(self, shape):
        units = self.units
        self.kernel = self.add_weight(shape=(shape[-1], units), name="kernel")
        self.recurrent_kernel = self.add_weight(
            shape=(units, units), initializer="orthogonal", name="recurrent_kernel"
        )
        self.bias = self.add_weight(shape=(units,), initializer="zeros", name="bias")

    def call(self, x, states, training=False):
        h = states[0]
        z = x @ self.kernel + h @ self.recurrent_kernel + self.bias
        if self.noise:
            drawn = keras.random.normal(keras.ops.shape(h), seed=self.seed_generator)
            z += self.noise * drawn
        h = 0.8 * h + 0.2 * keras.ops.tanh(z)
        return h, [h]


class ZoneoutCell(keras.layers.LSTMCell):
    """An LSTM of which each number of the states stays as it is with probability 0.1."""

    noise = 0.1

    def call(self, inputs, states, training=False):
        _, new = super().call(inputs, states, training=training)
        if self.noise and training:
            new = [self._zoneout(*pair) for pair in zip(states, new, strict=True)]
        return new[0], new

    def _zoneout(self, before, after):
        shape = keras.ops.shape(before)
        drawn = keras.random.uniform(shape, seed=self.seed_generator)
        return keras.ops.where(drawn < self.noise, before, after)


CELLS = {
    "leaky, noise": LeakyCell,
    "zoneout LSTM": ZoneoutCell,
    "layer norm": LayerNormCell,
    "LSTMCell": keras.layers.LSTMCell,
    "GRUCell, reset after": keras.layers.GRUCell,
    "GRUCell, reset before": lambda units: keras.layers.GRUCell(
        units, reset_after=False
    ),
    "SimpleRNNCell": keras.layers.SimpleRNNCell,
}


def layers(cell, features, units, **options):
    """Both layers, by name, with the same weights."""
    found = {}
    for name, layer_class in ((THEIRS, keras.layers.RNN), (OURS, BPTT)):
        own = options if layer_class is BPTT else {}
        sequences = own.pop("return_sequences", True) if own else True
        layer = layer_class(CELLS[cell](units), return_sequences=sequences, **own)
        layer.build((None, None, features))
        found[name] = layer
    found[OURS].set_weights(found[THEIRS].get_weights())
    return found


def training_step(layer, shape, mode="graph", order=1):
    """A function that computes the gradients of all weights."""
    batch, timesteps, features, units = shape
    random = np.random.default_rng(0)
    x = tf.constant(random.normal(size=(batch, timesteps, features)), tf.float32)
    y = tf.constant(random.normal(size=(batch, timesteps, units)), tf.float32)
    weights = [v.value for v in layer.trainable_variables]

    def first():
        with tf.GradientTape() as tape:
            outputs = layer(x, training=True)
            target = y if layer.return_sequences else y[:, -1]
            loss = tf.reduce_mean((outputs - target) ** 2)
        return tape.gradient(loss, weights)

    def second():
        with tf.GradientTape() as tape:
            loss = sum(tf.reduce_sum(g * g) for g in first())
        return tape.gradient(loss, weights)

    step = first if order == 1 else second
    if mode != "eager":
        step = tf.function(step, autograph=False, jit_compile=mode == "xla")
    return lambda: [gradient.numpy() for gradient in step()]


def measure(cell, shape, seconds, mode="graph", order=1):
    """Quartiles of both layers in milliseconds, and the seconds of their first steps."""
    steps, first, gradients = {}, {}, {}
    found = layers(cell, shape[2], shape[3])
    for name, layer in found.items():
        steps[name] = training_step(layer, shape, mode, order)
        start = time.perf_counter()
        gradients[name] = steps[name]()
        first[name] = time.perf_counter() - start
    if hasattr(CELLS[cell], "noise"):
        for name, layer in found.items():
            layer.cell.noise = 0.0
            gradients[name] = training_step(layer, shape, mode, order)()
            layer.cell.noise = CELLS[cell].noise
    pairs = zip(gradients[OURS], gradients[THEIRS], strict=True)
    worst = max(np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in pairs)
    if worst > TOLERANCE:
        raise SystemExit(f"{cell}: the gradients differ by {worst:.1e} of the largest.")
    return {
        "cell": cell,
        "shape": shape,
        "mode": mode,
        "order": order,
        "largest_relative_difference": float(worst),
        "first_step_s": first,
        "ms": summary(interleaved(steps, seconds)),
    }


def ratio(result):
    """How many times as long as BPTT."""
    lower = {name: ms["quartiles"][0] for name, ms in result["ms"].items()}
    return lower[THEIRS] / lower[OURS]


def peak(name, cell, timesteps, sequences, every):
    """Megabytes at the peak of this process."""
    batch, features, units = MEMORY
    options = {"return_sequences": sequences}
    if name == OURS:
        options["checkpoint_every"] = every
        layer = BPTT(CELLS[cell](units), **options)
    else:
        layer = keras.layers.RNN(CELLS[cell](units), **options)
    layer.build((None, None, features))
    return peak_of_steps(training_step(layer, (batch, timesteps, features, units)))


def memory(cell, timesteps, sequences, every=None):
    """Megabytes of both layers over those at T = 8."""
    found = {}
    for name in (OURS, THEIRS):
        both = [
            numbers_of_a_process(name, cell, steps, sequences, every, script=__file__)[
                0
            ]
            for steps in (SHORT, timesteps)
        ]
        found[name] = both[1] - both[0]
    return found


def run(seconds, cells=tuple(CELLS), shapes=tuple(SHAPES)):
    """Every cell in every shape."""
    results = []
    for cell in cells:
        for shape in shapes:
            results.append(result := measure(cell, shape, seconds))
            print(f"{cell} {shape}: {ratio(result):.2f}", flush=True)
    return results


def table(results):
    """Markdown: how many times as long keras.layers.RNN takes."""
    shapes = list(dict.fromkeys(tuple(r["shape"]) for r in results))
    lines = [
        "| keras.layers.RNN(cell) / BPTT(cell) | "
        + " | ".join(map(str, shapes))
        + " | first step |",
        "|---|" + "---|" * (len(shapes) + 1),
    ]
    for cell in dict.fromkeys(r["cell"] for r in results):
        own = [r for r in results if r["cell"] == cell]
        first = [r["first_step_s"] for r in own]
        both = [f"{sum(f[n] for f in first) / len(first):.1f}" for n in (OURS, THEIRS)]
        cells = [f"{ratio(r):.2f}" for r in own]
        row = [cell, *cells, f"{both[0]} s, not {both[1]} s"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument(
        "--all", action="store_true", help="modes, orders and memory too"
    )
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(peak(*args.one))
        return
    results = run(args.seconds, args.cells)
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.all:
        small = (32, 64, 16, 64)
        for cell in args.cells:
            for mode, order in (("eager", 1), ("xla", 1), ("graph", 2)):
                result = measure(cell, small, args.seconds / 3, mode, order)
                first = result["first_step_s"]
                print(
                    f"{cell}, {small}, {mode}, order {order}: {ratio(result):.2f}; first "
                    f"step {first[OURS]:.2f} s, not {first[THEIRS]:.2f} s",
                    flush=True,
                )
            every = memory(cell, 2000, True)
            last = memory(cell, 10_000, False, "sqrt")
            print(
                f"{cell}, memory at T = 2000: {every[OURS]:.0f} MB, not "
                f"{every[THEIRS]:.0f}; last output of T = 10,000, checkpoints: "
                f"{last[OURS]:.0f} MB, not {last[THEIRS]:.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
