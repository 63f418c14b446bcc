"""Vanishing and exploding gradients: what a recurrent network is initialised with.

Handwritten digits of 8 x 8 pixels (scikit-learn carries them) are read pixel by pixel, 64
steps of one number, and named after the last. What the first row of pixels says must be
held for 60 steps, and to learn that the gradient has to walk back as many. Four plain
networks have the same weights, but for the gain of the recurrent kernel, U = gain * an
orthogonal matrix, all of whose singular values are the gain:

    small         0.5: a step back at least halves the gradient. It vanishes
    orthogonal    1: U keeps its norm, and only tanh's slope takes from it
    large         1.5: it grows on its way back. It explodes
    clipped       1.5 with `adjoint_max_growth`: it stays as large as the loss has sent it

Three have gates, with the weights that Keras begins with:

    LSTM, forget 0    its forget gates begin at 1/2
    LSTM, forget 1    the bias of its forget gates begins at 1, Keras' default
    GRU               its update gates begin at 1/2

All see the same batches. `gradient_flow` says what to expect before a step of training.
Then the networks are trained, and it is asked again. All for several seeds.

    python examples/vanishing_and_exploding.py            # six minutes
    python examples/vanishing_and_exploding.py --smoke    # seconds

Writes vanishing_and_exploding.json and vanishing_and_exploding.png.
"""

import argparse
import json
import math

import basics
import keras
import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from keras_bptt import BPTTGRU, BPTTLSTM, BPTTRNN, gradient_flow

COLOURS = {
    "small": "C0",
    "orthogonal": "C2",
    "large": "C3",
    "clipped": "C1",
    "LSTM, forget 0": "C9",
    "LSTM, forget 1": "C4",
    "GRU": "C5",
}
KEPT = "verdict", "factor", "half_life", "mean_adjoint"  # of a flow, in the results


def read_digits():
    """Pixels (count, 64, 1) in 0 ... 1, labels: x, x to test with, y, y to test with."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels[..., None] / 16).astype("float32")
    return train_test_split(
        pixels, labels, test_size=0.25, stratify=labels, random_state=0
    )


def baselines(x, test_x, y, test_y):
    """Test accuracies without a recurrence."""
    linear = LogisticRegression(solver="newton-cg").fit(x[..., 0], y)
    return {
        "the most frequent digit": np.mean(test_y == np.bincount(y).argmax()),
        "logistic regression on all pixels at once": linear.score(
            test_x[..., 0], test_y
        ),
    }


def recurrent_layer(name, args):
    """The layer of a network. `clipped` follows the advice of the report on `large`."""
    if name == "GRU":
        return BPTTGRU(args.units, name="rnn")
    if name.startswith("LSTM"):
        forget = name == "LSTM, forget 1"
        return BPTTLSTM(args.units, unit_forget_bias=forget, name="rnn")
    return BPTTRNN(
        args.units,
        recurrent_initializer=keras.initializers.Orthogonal(gain_of(name, args)),
        adjoint_max_growth=1.0 if name == "clipped" else None,
        name="rnn",
    )


def gain_of(name, args):
    """The singular values of U; None of a network with gates, which has several."""
    gains = {"small": args.small, "orthogonal": 1.0}
    gains |= {"large": args.large, "clipped": args.large}
    return gains.get(name)


def build_model(name, seed, args):
    """The weights of a seed are the same whatever the gain, which multiplies U."""
    keras.utils.set_random_seed(seed)
    rnn = recurrent_layer(name, args)
    model = keras.Sequential([keras.Input((64, 1)), rnn, keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    adam = keras.optimizers.Adam(args.learning_rate)
    model.compile(adam, loss, metrics=["accuracy"])
    return model


def train(model, seed, digits, args):
    """The test accuracy after each epoch."""
    x, test_x, y, test_y = digits
    keras.utils.set_random_seed(seed)  # the same batches for all networks
    history = model.fit(
        x, y, args.batch_size, args.epochs, 0, validation_data=(test_x, test_y)
    )
    return history.history["val_accuracy"]


def compare(seed, digits, args):
    """Measure, train and measure the networks. Returns what is kept, by name."""
    x, _, y, _ = digits
    # As many as in training: a mean loss divides by the batch, and so do its gradients.
    batch = x[: args.batch_size], y[: args.batch_size]
    results = {}
    for name in COLOURS:
        model = build_model(name, seed, args)
        before = gradient_flow(model, *batch)["rnn"]
        accuracy = train(model, seed, digits, args)
        after = gradient_flow(model, *batch)["rnn"]
        result = {"gain": gain_of(name, args), "accuracy": accuracy}
        for when, flow in {"before": before, "after": after}.items():
            result[when] = {key: flow.to_dict()[key] for key in KEPT}
        results[name] = result
        if seed == 0:
            print(f"\n{label_of(name, result)}, before training:\n\n{before}")
        print(f"\n{name}, seed {seed}: test accuracy {accuracy[-1]:.3f}", flush=True)
    return results


def label_of(name, result):
    return name if result["gain"] is None else f"{name}, gain {result['gain']:g}"


def print_table(results):
    """Medians over the seeds, and the range of the accuracies."""
    print(f"\n{'':<16}{'before training':<32}after training")
    head = f"{'verdict':<11}{'a step':>8}"
    print(f"{'network':<16}{head}{'half-life':>11}  {head}   test accuracy")
    for name in results[0]:

        def median(when, key, name=name):
            found = [each[name][when][key] for each in results]
            # No half-life: it does not shrink.
            return np.median([math.inf if x is None else x for x in found])

        verdicts, factors = {}, {}
        for when in "before", "after":
            found = sorted({each[name][when]["verdict"] for each in results})
            verdicts[when] = "/".join(found)
            factors[when] = f"x {median(when, 'factor'):.3f}"
        life = median("before", "half_life")
        scores = [each[name]["accuracy"][-1] for each in results]
        print(
            f"{name:<16}{verdicts['before']:<11}{factors['before']:>8}"
            f"{f'{life:.3g}' if life < math.inf else '-':>11}  "
            f"{verdicts['after']:<11}{factors['after']:>8}   {np.median(scores):.3f} "
            f"({min(scores):.3f} ... {max(scores):.3f})"
        )


def plot(results, path):
    """Learning curves above; below them |dL/ds_t| before and after training.

    s_t is h_t and, of an LSTM, c_t too.
    """
    figure = Figure(figsize=(9, 6.6), layout="constrained")
    axes = figure.subplot_mosaic([["learning"] * 2, ["before", "after"]])

    def curves(axes, of):
        for name, color in COLOURS.items():
            values = np.array([of(each[name]) for each in results], float)
            low, median, high = np.quantile(values, [0, 0.5, 1], axis=0)
            label = label_of(name, results[0][name])
            steps = np.arange(1, len(median) + 1)
            axes.plot(steps, median, color=color, label=label)
            axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)

    seeds = (
        "1 seed" if len(results) == 1 else f"median and range of {len(results)} seeds"
    )
    curves(axes["learning"], lambda result: result["accuracy"])
    axes["learning"].set(xlabel="epoch", ylabel="test accuracy", ylim=(0, 1))
    axes["learning"].set_title(f"Digits read pixel by pixel: {seeds}", loc="left")
    axes["learning"].legend(loc="lower right", ncols=2)
    for when in "before", "after":
        curves(axes[when], lambda result, when=when: result[when]["mean_adjoint"])
        axes[when].set(
            xlabel="pixel t; the loss reads the state after pixel 64",
            ylabel="|dL/ds_t|",
        )
        axes[when].set_title(f"The gradient {when} training", loc="left")
        # What vanishes leaves the panel, lest the others be one line at its top.
        axes[when].set(yscale="log", ylim=(1e-8, None))
    axes["after"].sharey(axes["before"])
    figure.savefig(path, dpi=110)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--small", type=float, default=0.5, help="gain of the small recurrent kernel")
    add("--large", type=float, default=1.5, help="gain of the large one")
    add("--units", type=int, default=64, help="size of the hidden state")
    add("--epochs", type=int, default=15, help="passes over the training digits")
    add("--batch-size", type=int, default=32, help="digits per training step")
    add("--learning-rate", type=float, default=1e-3, help="of Adam")
    add("--seeds", type=int, default=3, help="runs of everything")
    basics.add_output(parser, smoke="16 units, 1 epoch, 1 seed")
    args = parser.parse_args()
    if args.smoke:
        args.units, args.epochs, args.seeds = 16, 1, 1
    basics.check_positive(parser, args)
    if not args.small < 1 < args.large:
        parser.error(
            "--small must be below 1 and --large above it. Received: "
            f"--small {args.small:g}, --large {args.large:g}"
        )
    basics.make_output(parser, args)
    return args


def main():
    args = parse_arguments()
    digits = read_digits()
    references = baselines(*digits)
    print(
        f"{len(digits[0])} digits to train, {len(digits[1])} to test. Test accuracy of"
    )
    for name, accuracy in references.items():
        print(f"  {name:<45}{accuracy:.3f}")
    results = [compare(seed, digits, args) for seed in range(args.seeds)]
    print_table(results)
    settings = {k: v for k, v in vars(args).items() if k != "output_dir"}
    path = args.output_dir / "vanishing_and_exploding.json"
    found = {"settings": settings, "baselines": references, "seeds": results}
    # Four digits say it all, and keep the file short.
    found = json.loads(
        json.dumps(found), parse_float=lambda x: float(f"{float(x):.4g}")
    )
    path.write_text(json.dumps(found) + "\n")
    plot(results, path.with_suffix(".png"))
    print(f"\nResults in {path}, the figure beside it")


if __name__ == "__main__":
    main()
