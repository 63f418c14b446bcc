"""Export three models; predict, differentiate and train where keras_bptt is not.

A small model learns to tell the sign of a running sum. With its weights three models leave
as SavedModels: with full backpropagation through time, truncated to windows of 8 steps, and
with checkpoints. Another Python process, which can import neither keras_bptt nor Keras,
loads them and

1. predicts,
2. computes the gradient of a loss,
3. trains, in a loop of TensorFlow alone,

and is to find what this process finds: the largest relative difference is printed, and more
than 1e-6 is an error. So the gradient of the truncated model is still the truncated one.

    python examples/saved_model.py            # less than a minute
    python examples/saved_model.py --smoke    # seconds

Writes the three models, saved_model.npz, what is found here, and saved_model.json, by how
much the other process differs.
"""

import argparse
import json
import subprocess
import sys

import basics
import numpy as np
import tensorflow as tf

LAYERS = {
    "full": {},
    "truncated": {"truncation": 8},
    "checkpointed": {"checkpoint_every": "sqrt"},
}
BOUND = 1e-6  # float32 rounds to 6e-8


def examples(count, steps, seed):
    """Inputs (count, steps, 2), and whether the first feature is positive on average."""
    x = np.random.default_rng(seed).normal(size=(count, steps, 2)).astype("float32")
    return x, (x[:, :, 0].sum(axis=1, keepdims=True) > 0).astype("float32")


def exported(args):
    """The three models, after training one of them and exporting all."""
    # Here and not above: the process that loads the models runs this file too.
    import keras

    from keras_bptt import BPTTRNN

    def model_with(**options):
        model = keras.Sequential([keras.Input((None, 2))])
        model.add(BPTTRNN(args.units, **options))
        model.add(keras.layers.Dense(1))
        return model

    keras.utils.set_random_seed(args.seed)
    trained = model_with()
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    trained.compile(keras.optimizers.Adam(3e-3), loss)
    fit = trained.fit(*examples(512, 40, 0), epochs=args.epochs, verbose=0)
    print(f"trained: loss {fit.history['loss'][-1]:.3f}")
    models = {}
    for name, options in LAYERS.items():
        models[name] = model_with(**options)
        models[name].set_weights(trained.get_weights())
        models[name].export(args.output_dir / name, verbose=False)
        print(f"{name}: exported to {args.output_dir / name}")
    return models


def results(call, weights, updates):
    """What both processes are to find: predictions, gradients, the losses of training."""
    # Neither the number of examples nor that of steps was seen before.
    x, y = map(tf.constant, examples(24, 31, 1))

    def loss_and_gradients():
        with tf.GradientTape() as tape:
            losses = tf.nn.sigmoid_cross_entropy_with_logits(y, call(x))
            loss = tf.reduce_mean(losses)
        return loss, tape.gradient(loss, weights)

    @tf.function
    def update():
        loss, gradients = loss_and_gradients()
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.assign_sub(0.01 * gradient)
        return loss

    found = {"predictions": call(x).numpy()}
    for i, gradient in enumerate(loss_and_gradients()[1]):
        found[f"gradient {i}"] = gradient.numpy()
    found["losses"] = np.array([update() for _ in range(updates)])
    return found


def difference(got, expected):
    return float(np.max(np.abs(got - expected)) / np.max(np.abs(expected)))


def compare(args):
    """What the other process does; returns the largest relative differences."""
    # From here on an import of these raises.
    sys.modules["keras_bptt"] = sys.modules["keras"] = None
    stored, differences = np.load(args.output_dir / "saved_model.npz"), {}
    for name in LAYERS:
        # TensorFlow warns of second derivatives, which it does not save; the first it does.
        with basics.without("with ops with unsaved custom gradients"):
            model = tf.saved_model.load(args.output_dir / name)
        found = results(model.serve, model.trainable_variables, args.updates)
        each = {key: difference(a, stored[f"{name}/{key}"]) for key, a in found.items()}
        differences[name] = {
            "predictions": each.pop("predictions"),
            "losses": each.pop("losses"),
            "gradient": max(each.values()),
        }
    return differences


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--units", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10, help="before the export")
    parser.add_argument("--updates", type=int, default=20, help="in both processes")
    parser.add_argument("--seed", type=int, default=0)
    basics.add_output(parser, smoke="a run of seconds")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="only load the models that are there, and compare: the other process",
    )
    args = parser.parse_args()
    for name, least in (("units", 1), ("epochs", 1), ("updates", 2)):
        value = getattr(args, name)
        if value < least:
            parser.error(f"--{name} must be at least {least}. Received: {value}")
    if args.smoke:
        args.units, args.epochs, args.updates = 8, 1, 3
    basics.make_output(parser, args)
    report = args.output_dir / "saved_model.json"
    if args.compare:
        report.write_text(json.dumps(compare(args), indent=2) + "\n")
        return

    found = {}
    for name, model in exported(args).items():
        weights = [variable.value for variable in model.trainable_variables]
        found[name] = results(model, weights, args.updates)
    np.savez(
        args.output_dir / "saved_model.npz",
        **{
            f"{name}/{key}": a
            for name, part in found.items()
            for key, a in part.items()
        },
    )
    subprocess.run([sys.executable, *sys.argv, "--compare"], check=True)

    print(
        "\nIn a process without keras_bptt and Keras, largest relative differences:\n"
    )
    print(f"{'model':14}{'predictions':>13}{'gradient':>13}{'losses':>13}")
    largest = 0.0
    for name, row in json.loads(report.read_text()).items():
        columns = [row[key] for key in ("predictions", "gradient", "losses")]
        largest = max(largest, *columns)
        print(f"{name:14}" + "".join(f"{value:13.1e}" for value in columns))
    # Of the recurrent kernel, which truncation changes most.
    full, truncated = (found[name]["gradient 1"] for name in ("full", "truncated"))
    print(f"\ntruncated and full gradient differ by {difference(truncated, full):.1e}")
    first, *_, last = found["full"]["losses"]
    print(f"{args.updates} updates took the loss from {first:.3f} to {last:.3f}")
    if largest > BOUND:
        sys.exit(f"A difference of more than {BOUND}: {largest:.1e}.")


if __name__ == "__main__":
    main()
