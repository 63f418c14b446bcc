"""Cells of one's own: ten lines of forward step each, and no derivative.

Evidence for left or right comes in for 40 steps, weak and noisy; after a delay of 24 more
the network says which side had more of it. So experiments on decisions are made. Four
published cells learn the task, each written as its authors write it and put into
`keras_bptt.BPTT`:

    leaky         a rate network with noise in every step (Song, Yang & Wang 2016)
    layer norm    an LSTM with layer normalisation (Ba, Kiros & Hinton 2016)
    zoneout       an LSTM whose numbers now and then stay as they are (Krueger et al. 2017)
    coRNN         coupled oscillators (Rusch & Mishra 2021)

and the same in `keras.layers.RNN`, with the same first weights and batches. What an
observer who adds up all evidence gets is the best there can be.

    python examples/own_cell.py            # some minutes
    python examples/own_cell.py --smoke    # seconds

Writes own_cell.json and own_cell.png.
"""

import argparse
import json
import math
import time

import basics
import keras
import numpy as np
import tensorflow as tf
from keras import ops
from matplotlib.figure import Figure

from keras_bptt import BPTT

QUIET, STIMULUS, DELAY = 4, 40, 24  # steps
COHERENCES = (0.02, 0.05, 0.1, 0.2, 0.4)
SIGMA = 0.4  # of a step's evidence
# Of Okabe and Ito, whom colour-blind readers can follow.
COLOURS = {
    "leaky": "#D55E00",
    "layer norm": "#0072B2",
    "zoneout": "#009E73",
    "coRNN": "#CC79A7",
}


# --- The cells


class OwnCell(keras.layers.Layer):
    """A cell with as many gates as its class says; it names its weights W, U and b."""

    gates = 1

    def __init__(self, units, seed=None, **options):
        super().__init__(**options)
        self.units = self.state_size = units
        # Random numbers of every step come from a generator that belongs to the cell.
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, shape):
        wide = self.gates * self.units
        self.W = self.add_weight(shape=(shape[-1], wide), name="W")
        start = [keras.initializers.Orthogonal() for _ in range(self.gates)]
        self.U = self.add_weight(
            shape=(self.units, wide),
            initializer=lambda shape, dtype: ops.concatenate(
                [init((self.units, self.units), dtype) for init in start], -1
            ),
            name="U",
        )
        self.b = self.add_weight(shape=(wide,), initializer="zeros", name="b")

    def get_config(self):
        return super().get_config() | {"units": self.units}


class Leaky(OwnCell):
    """x_t = (1 - a) x_{t-1} + a (r_{t-1} U + u_t W + b) + sqrt(2 a) s n_t, r = relu(x)."""

    a, s = 0.2, 0.05

    def call(self, u, states):
        (x,) = states
        n = keras.random.normal(ops.shape(x), dtype=x.dtype, seed=self.seed_generator)
        x = (1 - self.a) * x + self.a * (ops.relu(x) @ self.U + u @ self.W + self.b)
        x = x + math.sqrt(2 * self.a) * self.s * n
        return ops.relu(x), [x]


class LayerNormLSTM(OwnCell):
    """LN(x_t W) + LN(h_{t-1} U) + b in the place of an LSTM's z_t, and LN(c_t) in h_t."""

    gates = 4

    def __init__(self, units, **options):
        super().__init__(units, **options)
        self.state_size = [units, units]

    def build(self, shape):
        super().build(shape)
        sizes = {"x": 4 * self.units, "h": 4 * self.units, "c": self.units}
        for name, size in sizes.items():
            gain = self.add_weight(
                shape=(size,), initializer="ones", name=f"gain_{name}"
            )
            setattr(self, f"gain_{name}", gain)

    def call(self, x, states):
        h, c = states
        z = norm(x @ self.W) * self.gain_x + norm(h @ self.U) * self.gain_h + self.b
        f, i, o, g = ops.split(z, 4, -1)
        c = ops.sigmoid(f + 1) * c + ops.sigmoid(i) * ops.tanh(g)
        h = ops.sigmoid(o) * ops.tanh(norm(c) * self.gain_c)
        return h, [h, c]


def norm(z):
    """Each example's numbers, of mean 0 and variance 1."""
    z = z - ops.mean(z, -1, keepdims=True)
    return z / ops.sqrt(ops.mean(z * z, -1, keepdims=True) + 1e-5)


class ZoneoutLSTM(keras.layers.LSTMCell):
    """Each number of c and h stays as it is with probability p; untrained, their mean."""

    of_c, of_h = 0.5, 0.05

    def call(self, x, states, training=False):
        _, new = super().call(x, states, training=training)
        given = zip(states, new, (self.of_h, self.of_c), strict=True)
        h, c = (self.zoneout(*each, training) for each in given)
        return h, [h, c]

    def zoneout(self, before, after, p, training):
        if not training:
            return p * before + (1 - p) * after
        shape, seed = ops.shape(after), self.seed_generator
        stays = keras.random.uniform(shape, dtype=after.dtype, seed=seed) < p
        return ops.where(stays, before, after)


class CoRNN(OwnCell):
    """y'' = tanh(y U + y' Z + x W + b) - g y - e y', in steps of d."""

    d, g, e = 0.2, 1.0, 1.0

    def __init__(self, units, **options):
        super().__init__(units, **options)
        self.state_size = [units, units]

    def build(self, shape):
        super().build(shape)
        self.Z = self.add_weight(shape=self.U.shape, name="Z")

    def call(self, x, states):
        y, z = states
        force = ops.tanh(y @ self.U + z @ self.Z + x @ self.W + self.b)
        z = z + self.d * (force - self.g * y - self.e * z)
        y = y + self.d * z
        return y, [y, z]


CELLS = {
    "leaky": Leaky,
    "layer norm": LayerNormLSTM,
    "zoneout": ZoneoutLSTM,
    "coRNN": CoRNN,
}
LAYERS = {"BPTT": BPTT, "RNN": keras.layers.RNN}


# --- The task


def trials(number, random):
    """Inputs (number, steps, 3), the side (number,) and the signed coherence of each.

    The first two inputs are the evidence, the third says that the trial is under way.
    """
    steps = QUIET + STIMULUS + DELAY
    side = random.integers(0, 2, number)
    coherence = random.choice(COHERENCES, number) * (2 * side - 1)
    x = np.zeros((number, steps, 3), "float32")
    x[:, :-1, 2] = 1
    shown = slice(QUIET, QUIET + STIMULUS)
    noise = SIGMA * random.normal(size=(number, STIMULUS, 2))
    x[:, shown, :2] = (1 + coherence[:, None, None] * np.array([-1, 1])) / 2 + noise
    return x, side, coherence


def observer(x):
    """What one chooses who adds up all evidence."""
    return (np.sum(x[..., 1] - x[..., 0], 1) > 0).astype(int)


# --- Training


def build_model(layer_class, cell, args):
    keras.utils.set_random_seed(args.seed)
    layer = layer_class(CELLS[cell](args.units, seed=args.seed))
    steps = QUIET + STIMULUS + DELAY
    model = keras.Sequential([keras.Input((steps, 3)), layer, keras.layers.Dense(2)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    adam = keras.optimizers.Adam(args.learning_rate, clipnorm=1.0)
    model.compile(adam, loss, metrics=["accuracy"])
    return model


def train(cell, data, args):
    """Both layers: what they choose in the test, and the time of an update."""
    (x, side, _), (test_x, test_side, coherence) = data
    models = {name: build_model(layer, cell, args) for name, layer in LAYERS.items()}
    models["RNN"].set_weights(models["BPTT"].get_weights())
    seconds = {name: [] for name in LAYERS}
    for epoch in range(args.epochs):
        for name, model in models.items():
            keras.utils.set_random_seed(args.seed + epoch)  # the same batches for both
            start = time.perf_counter()
            model.fit(x, side, args.batch_size, epochs=1, verbose=0)
            seconds[name].append(time.perf_counter() - start)
    found = {}
    for name, model in models.items():
        chosen = model.predict(test_x, 500, verbose=0).argmax(-1)
        found[name] = {
            "accuracy": float(np.mean(chosen == test_side)),
            "right": psychometric(chosen, coherence),
            "epoch_s": float(np.median(seconds[name][1:] or seconds[name])),
        }
    found["BPTT"]["use"] = use_of_evidence(
        models["BPTT"], test_x[:500], test_side[:500]
    )
    return found


def psychometric(chosen, coherence):
    """How often right is chosen, for each signed coherence."""
    levels = sorted({-c for c in COHERENCES} | set(COHERENCES))
    return [float(np.mean(chosen[np.isclose(coherence, c)])) for c in levels]


def use_of_evidence(model, x, side):
    """|dL/dx_t| of each step's evidence, divided by the mean: how much it counts."""
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = model.compute_loss(x, side, model(x))
    shown = tape.gradient(loss, x)[:, QUIET : QUIET + STIMULUS, :2]
    of_steps = tf.reduce_mean(tf.norm(shown, axis=-1), 0).numpy()
    return (of_steps / of_steps.mean()).tolist()


def plot(results, path):
    """Psychometric curves, and the gradient at the evidence of each step."""
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    levels = sorted({-c for c in COHERENCES} | set(COHERENCES))
    left.plot(levels, results["observer"]["right"], "k--", label="adds up all evidence")
    for cell, color in COLOURS.items():
        found = results["cells"][cell]["BPTT"]
        left.plot(levels, found["right"], "o-", color=color, label=cell, markersize=3)
        steps = np.arange(1, STIMULUS + 1)
        right.plot(steps, found["use"], color=color, label=cell)
    left.set(
        xlabel="evidence for right (coherence)", ylabel="right chosen", ylim=(0, 1)
    )
    left.set_title("All four cells decide nearly as well as can be", loc="left")
    left.legend(frameon=False)
    right.axhline(1, color="k", linestyle="--", linewidth=1)
    right.set(
        xlabel="step of the evidence", ylabel="|dL/dx_t|, mean of 1", ylim=(0, None)
    )
    right.set_title("How much the evidence of a step counts", loc="left")
    for axes in left, right:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--units", type=int, default=64, help="size of the hidden state")
    add("--trials", type=int, default=6400, help="to train with")
    add("--epochs", type=int, default=12, help="passes over them")
    add("--batch-size", type=int, default=64, help="trials per update")
    add("--learning-rate", type=float, default=2e-3, help="of Adam")
    add("--seed", type=int, default=0, help="of weights, trials and batches")
    basics.add_output(parser, smoke="16 units, 1 epoch of 256 trials")
    args = parser.parse_args()
    if args.smoke:
        args.units, args.epochs, args.trials = 16, 1, 256
    basics.check_positive(parser, args)
    basics.make_output(parser, args)
    return args


def main():
    args = parse_arguments()
    random = np.random.default_rng(args.seed)
    data = trials(args.trials, random), trials(5000, random)
    x, side, coherence = data[1]
    chosen = observer(x)
    best = float(np.mean(chosen == side))
    results = {
        "settings": {k: v for k, v in vars(args).items() if k != "output_dir"},
        "observer": {"accuracy": best, "right": psychometric(chosen, coherence)},
        "cells": {},
    }
    print(
        f"An observer who adds up all evidence is right in {best:.3f} of 5000 trials.\n"
    )
    print(f"{'':<12}{'right, BPTT':>13}{'right, RNN':>13}{'RNN takes':>14}")
    for cell in CELLS:
        found = results["cells"][cell] = train(cell, data, args)
        ours, theirs = found["BPTT"], found["RNN"]
        times = f"{theirs['epoch_s'] / ours['epoch_s']:.1f} x as long"
        print(
            f"{cell:<12}{ours['accuracy']:>13.3f}{theirs['accuracy']:>13.3f}{times:>14}",
            flush=True,
        )
    path = args.output_dir / "own_cell.json"
    # Four digits say it all, and keep the file short.
    text = json.dumps(results)
    results = json.loads(text, parse_float=lambda x: float(f"{float(x):.4g}"))
    path.write_text(json.dumps(results) + "\n")
    plot(results, path.with_suffix(".png"))
    print(f"\n{path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
