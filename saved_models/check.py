"""Loads every SavedModel here as a server would, and compares what it finds.

    python saved_models/check.py

Needs TensorFlow and NumPy: neither keras_bptt nor Keras can be imported here. Each model
NAME/ has its inputs, outputs and gradients in NAME.npz; the gradients are those that
TensorFlow's automatic differentiation finds for a SimpleRNN with the same weights.
"""

import argparse
import pathlib
import sys

# From here on an import of these raises.
sys.modules["keras_bptt"] = sys.modules["keras"] = None

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

# Of the largest number: float32 rounds to 6e-8, and sums come in another order.
BOUND = 1e-4


def difference(got, expected):
    """The largest difference, relative to the largest number that is expected."""
    got, scale = np.asarray(got), max(np.max(np.abs(expected)), 1e-30)
    if got.shape != expected.shape:
        return np.inf
    return float(np.max(np.abs(got - expected)) / scale)


def compare(path):
    """The differences of the outputs and of the gradient of every weight."""
    stored = np.load(path.with_suffix(".npz"))
    model = tf.saved_model.load(str(path))
    names = sorted(name for name in stored if name.startswith("inputs_"))
    inputs = [tf.constant(stored[name]) for name in names]
    with tf.GradientTape() as tape:
        outputs = model.serve(inputs if len(inputs) > 1 else inputs[0])
        target = tf.reduce_sum(outputs * stored["cotangents"])
    gradients = tape.gradient(
        target, model.trainable_variables, unconnected_gradients="zero"
    )
    number = sum(name.startswith("gradient_") for name in stored)
    if number != len(gradients):
        sys.exit(f"{path} has {len(gradients)} weights, and gradients of {number}.")
    return difference(outputs, stored["outputs"]), [
        difference(tf.convert_to_tensor(gradient), stored[f"gradient_{i}"])
        for i, gradient in enumerate(gradients)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    here = pathlib.Path(__file__).parent
    parser.add_argument("--directory", type=pathlib.Path, default=here)
    folder = parser.parse_args().directory
    paths = sorted(
        path
        for path in folder.iterdir()
        if (path / "saved_model.pb").exists()
        and path.with_suffix(".npz").exists()
        and "cotangents" in np.load(path.with_suffix(".npz"))
    )
    if not paths:
        sys.exit(f"{folder} holds no SavedModel with stored gradients beside it.")
    print(f"{'model':<24}{'outputs':>12}{'gradients':>12}  (relative differences)")
    largest = 0.0
    for path in paths:
        outputs, gradients = compare(path)
        print(f"{path.name:<24}{outputs:>12.1e}{max(gradients):>12.1e}")
        largest = max(largest, outputs, *gradients)
    # Not "larger than": NaN is an error too.
    if not largest <= BOUND:
        sys.exit(f"A difference of more than {BOUND}: {largest:.1e}.")


if __name__ == "__main__":
    main()
