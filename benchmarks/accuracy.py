"""How exact are the gradients of BPTTRNN? Print the largest errors as a table.

    python benchmarks/accuracy.py                     # a Markdown table, a minute or two
    python benchmarks/accuracy.py --output table.md   # and into a file
    python benchmarks/accuracy.py --check             # status 1 if a bound is exceeded

The loss is a sum of all outputs and of the last state with random weights. Its gradients by
BPTTRNN are compared with those of keras.layers.SimpleRNN, which TensorFlow differentiates
automatically, and with central differences of BPTTRNN's own loss, which know nothing about
derivatives at all. The relative error of a gradient is max |a - b| / max |b|.
"""

import argparse
import itertools
import pathlib
import sys

import keras
import numpy as np
import tensorflow as tf

from keras_bptt import BPTTRNN

# Batch, timesteps, features, units. Central differences are taken in the first alone: they
# need two losses for each number.
SHAPES = [(2, 5, 3, 4), (3, 70, 5, 8)]
# With a spectral radius of U at which most gradients neither vanish nor explode, for
# slopes are mostly below 1. Relative to next to nothing every error would be large; and
# with more, a network of 70 steps would be chaotic: rounding grows from step to step.
ACTIVATIONS = {"tanh": 1.1, "relu": 1.1, "gelu": 1.1, "softmax": 4.0}
MODES = {
    "eager": lambda function: function,
    "tf.function": tf.function,
    "XLA": lambda function: tf.function(function, jit_compile=True),
}
GRADIENTS = [
    "d_inputs",
    "d_kernel",
    "d_recurrent_kernel",
    "d_bias",
    "d_initial_state",
]

# Column -> the largest error allowed. The same sums in another order: rounding moves each
# of T steps by at most (D + H + 1) eps, forward and backward, and links with a gain near 1
# hand it on: 2 T (D + H + 1) eps, if all had one sign. They have not; allow a tenth of it.
# Central differences with a step of 1e-5 are right to about 1e-10 of the loss, for
# curvature and for rounding.
BOUNDS = {
    "SimpleRNN, float64": 1e-12,
    "SimpleRNN, float32": 2e-5,
    "central differences, float64": 1e-7,
}
EPSILON = 1e-5


def make_layer(layer_class, activation, return_sequences, weights, dtype):
    layer = layer_class(
        weights[1].shape[0],
        activation=activation,
        return_sequences=return_sequences,
        return_state=True,
        dtype=dtype,
    )
    layer.build((None, None, weights[0].shape[0]))
    layer.set_weights(weights)
    return layer


def loss_of(layer, mask, cotangents):
    """The loss, as a function of inputs and initial state."""

    def loss(x, state):
        outputs = layer(x, initial_state=state, mask=mask, training=True)
        return tf.add_n(
            [tf.reduce_sum(c * y) for c, y in zip(cotangents, outputs, strict=True)]
        )

    return loss


def gradients_of(layer, mask, cotangents, x, state, mode="eager"):
    """The gradients of the loss, in the order of GRADIENTS."""
    loss = loss_of(layer, mask, cotangents)

    def gradients(x, state):
        sources = [x, *(weight.value for weight in layer.trainable_weights), state]
        with tf.GradientTape() as tape:
            tape.watch(sources)
            value = loss(x, state)
        return tape.gradient(value, sources)

    return [gradient.numpy() for gradient in MODES[mode](gradients)(x, state)]


def central_differences(layer, mask, cotangents, x, state):
    """The same gradients, each number from two losses."""
    loss = tf.function(loss_of(layer, mask, cotangents))
    # Variables, so that one number of each can be moved.
    x, state = tf.Variable(x), tf.Variable(state)
    results = []
    for variable in [x, *(weight.value for weight in layer.trainable_weights), state]:
        at = variable.numpy()
        gradient = np.zeros_like(at)
        for index in np.ndindex(at.shape):
            values = []
            for step in (EPSILON, -EPSILON):
                moved = at.copy()
                moved[index] += step
                variable.assign(moved)
                values.append(loss(x, state).numpy())
            gradient[index] = (values[0] - values[1]) / (2 * EPSILON)
        variable.assign(at)
        results.append(gradient)
    return results


def relative_error(a, b):
    return np.max(np.abs(a - b)) / np.max(np.abs(b))


def measure():
    """The largest error for each gradient and column, over all configurations."""
    errors = {column: np.zeros(len(GRADIENTS)) for column in BOUNDS}

    def record(column, got, expected):
        new = list(map(relative_error, got, expected))
        errors[column] = np.maximum(errors[column], new)

    short, long = SHAPES
    options = [(False, False), (False, True), (True, False), (True, True)]
    configurations = [
        *itertools.product([short], ACTIVATIONS, options),
        # Of the last of 70 outputs alone nothing may be left at h_0, and then no error.
        *itertools.product([long], ACTIVATIONS, options[1::2]),
    ]
    for seed, configuration in enumerate(configurations):
        (B, T, D, H), activation, (masked, return_sequences) = configuration
        random = np.random.default_rng(seed)
        x, state = random.normal(size=(B, T, D)), random.normal(size=(B, H))
        U = random.normal(size=(H, H))
        U *= ACTIVATIONS[activation] / np.max(np.abs(np.linalg.eigvals(U)))
        W = random.normal(size=(D, H)) / np.sqrt(D)
        weights = [W, U, 0.3 * random.normal(size=H)]
        mask = tf.constant(random.random((B, T)) < 0.7) if masked else None
        outputs = (B, T, H) if return_sequences else (B, H)
        cotangents = [random.normal(size=outputs), random.normal(size=(B, H))]

        for dtype in ("float64", "float32"):
            arguments = (
                mask,
                [tf.constant(c, dtype) for c in cotangents],
                tf.constant(x, dtype),
                tf.constant(state, dtype),
            )
            simple, ours = (
                make_layer(layer_class, activation, return_sequences, weights, dtype)
                for layer_class in (keras.layers.SimpleRNN, BPTTRNN)
            )
            automatic = gradients_of(simple, *arguments)
            numeric = None
            if dtype == "float64" and (B, T, D, H) == short:
                numeric = central_differences(ours, *arguments)
            for mode in MODES:
                explicit = gradients_of(ours, *arguments, mode)
                record(f"SimpleRNN, {dtype}", explicit, automatic)
                if numeric is not None:
                    record("central differences, float64", explicit, numeric)
    return errors


def as_table(errors):
    lines = [
        f"| gradient | {' | '.join(errors)} |",
        f"|---|{'---|' * len(errors)}",
    ]
    for row, name in enumerate(GRADIENTS):
        cells = [f"{column[row]:.1e}" for column in errors.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    bounds = [f"{BOUNDS[column]:.0e}" for column in errors]
    lines.append(f"| bound | {' | '.join(bounds)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description="Measure the errors of BPTTRNN's gradients."
    )
    parser.add_argument(
        "--output", type=pathlib.Path, help="file to write the table to"
    )
    parser.add_argument(
        "--check", action="store_true", help="exit with status 1 above a bound"
    )
    options = parser.parse_args()

    tf.get_logger().setLevel(
        "ERROR"
    )  # a graph for each configuration is no mistake here
    errors = measure()
    table = as_table(errors)
    print(table)
    if options.output:
        options.output.write_text(table + "\n", encoding="utf-8")
    exceeded = [
        column
        for column, values in errors.items()
        if not np.all(values <= BOUNDS[column])  # so that NaN exceeds every bound
    ]
    if options.check and exceeded:
        sys.exit(f"Above the bound: {'; '.join(exceeded)}")


if __name__ == "__main__":
    main()
