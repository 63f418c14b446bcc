"""Time a training step: forward, mean squared loss, the gradient of every weight.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --shapes 32,128,64,128 1,1000,32,64 --seconds 20

All contestants have the same weights and inputs, and must agree on the gradients before
any is timed. They are timed in one process, round by round, each once a round: drift of
the machine hits all alike. What counts is the ratio of medians, not milliseconds, which
depend on the machine and on what else it does.

`limit` is the time that the step's multiply-adds would take at the rate of one large
matrix product, measured in the same rounds.
"""

import argparse
import json
import pathlib
import statistics
import time

import keras
import numpy as np
import tensorflow as tf

from keras_bptt import BPTTRNN

SHAPES = ["32,128,64,128", "64,256,128,256", "1,1000,32,64"]
SIDE = 1024  # of the square matrices whose product sets the limit


def problem(batch, timesteps, features, units, sequences, seed=0):
    """Inputs, targets and weights with a recurrent kernel of spectral radius near 1."""
    rng = np.random.default_rng(seed)
    shape = (batch, timesteps, units) if sequences else (batch, units)
    return {
        "x": rng.normal(size=(batch, timesteps, features)).astype("float32"),
        "y": rng.normal(size=shape).astype("float32"),
        "weights": [
            rng.normal(0, features**-0.5, (features, units)).astype("float32"),
            rng.normal(0, units**-0.5, (units, units)).astype("float32"),
            rng.normal(0, 0.1, units).astype("float32"),
        ],
    }


def keras_step(layer_class, jit_compile):
    """A step of a Keras layer in a tf.function; returns d_kernel, d_recurrent, d_bias."""

    def make(data, sequences):
        units = data["weights"][1].shape[0]
        layer = layer_class(units, return_sequences=sequences)
        layer.build(data["x"].shape)
        layer.set_weights(data["weights"])
        x, y = tf.constant(data["x"]), tf.constant(data["y"])

        @tf.function(jit_compile=jit_compile)
        def step(x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((layer(x, training=True) - y) ** 2)
            return tape.gradient(loss, layer.trainable_variables)

        return lambda: [gradient.numpy() for gradient in step(x, y)]

    return make


def torch_step(data, sequences):
    """The same step with torch.nn.RNN, batch first; its second bias stays zero."""
    import torch

    torch.set_num_threads(tf.config.threading.get_intra_op_parallelism_threads() or 2)
    W, U, b = (torch.from_numpy(weight) for weight in data["weights"])
    rnn = torch.nn.RNN(W.shape[0], W.shape[1], batch_first=True)
    with torch.no_grad():
        rnn.weight_ih_l0.copy_(W.T)
        rnn.weight_hh_l0.copy_(U.T)
        rnn.bias_ih_l0.copy_(b)
        rnn.bias_hh_l0.zero_()
    x, y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"])

    def step():
        rnn.zero_grad()
        h = rnn(x)[0]
        (((h if sequences else h[:, -1]) - y) ** 2).mean().backward()
        W, U, b = rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0
        return [W.grad.numpy().T, U.grad.numpy().T, b.grad.numpy()]

    return step


def jax_step(data, sequences):
    """The same step as a jax.lax.scan over time under jit, the projection hoisted."""
    import jax
    import jax.numpy as jnp

    def loss(weights, x, y):
        W, U, b = weights

        def cell(h, z):
            h = jnp.tanh(z + h @ U)
            return h, h

        z = jnp.swapaxes(x, 0, 1) @ W + b
        last, h = jax.lax.scan(cell, jnp.zeros((x.shape[0], U.shape[0])), z)
        return jnp.mean(((jnp.swapaxes(h, 0, 1) if sequences else last) - y) ** 2)

    gradient = jax.jit(jax.grad(loss))
    x, y = jnp.asarray(data["x"]), jnp.asarray(data["y"])
    weights = [jnp.asarray(weight) for weight in data["weights"]]
    return lambda: [np.asarray(g) for g in gradient(weights, x, y)]


CONTESTANTS = {
    "BPTTRNN, XLA": keras_step(BPTTRNN, True),
    "BPTTRNN, graph": keras_step(BPTTRNN, False),
    "SimpleRNN, XLA": keras_step(keras.layers.SimpleRNN, True),
    "SimpleRNN, graph": keras_step(keras.layers.SimpleRNN, False),
    "torch.nn.RNN": torch_step,
    "JAX scan": jax_step,
}


def large_product():
    matrix = tf.random.normal((SIDE, SIDE))
    product = tf.function(lambda: matrix @ matrix)
    return lambda: product().numpy()


def agree(steps, tolerance=1e-5):
    """The largest relative difference from SimpleRNN's gradients; too large raises."""
    expected = steps["SimpleRNN, graph"]()
    worst = 0.0
    for name, step in steps.items():
        for got, want in zip(step(), expected, strict=True):
            error = np.linalg.norm(got - want) / np.linalg.norm(want)
            worst = max(worst, float(error))
            if error > tolerance:
                raise SystemExit(f"{name} differs from SimpleRNN by {error:.1e}")
    return worst


def measure(shape, sequences, seconds):
    """Time every contestant that is installed on one shape."""
    batch, timesteps, features, units = shape
    data = problem(*shape, sequences)
    steps, missing = {}, []
    for name, make in CONTESTANTS.items():
        try:
            steps[name] = make(data, sequences)
        except ImportError as error:
            missing.append(f"{name}: not measured, {error}")
    worst = agree(steps)
    timed = {**steps, "limit": large_product()}
    times = {name: [] for name in timed}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times["limit"]) < 5:
        for name, step in timed.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    # Forward x W and h U, backward delta U^T, and dW and dU.
    products = batch * timesteps * (2 * features * units + 3 * units**2)
    scale = products / SIDE**3
    times["limit"] = [scale * t for t in times["limit"]]
    return {
        "shape": shape,
        "return_sequences": sequences,
        "largest_relative_difference": worst,
        "rounds": len(times["limit"]),
        "missing": missing,
        "median_ms": {k: 1e3 * statistics.median(v) for k, v in times.items()},
        "quartiles_ms": {
            k: [1e3 * q for q in statistics.quantiles(v)[::2]] for k, v in times.items()
        },
    }


def table(results):
    """Ratios of medians to `BPTTRNN, XLA`, as Markdown."""
    names = list(results[0]["median_ms"])
    lines = [
        "| (B, T, D, H) | output | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for result in results:
        median = result["median_ms"]
        ratios = [f"{median[n] / median['BPTTRNN, XLA']:.2f}" for n in names]
        output = "sequence" if result["return_sequences"] else "last"
        lines.append(
            f"| {tuple(result['shape'])} | {output} | " + " | ".join(ratios) + " |"
        )
    return "\n".join(lines)


def parse_shape(text):
    shape = tuple(map(int, text.split(",")))
    if len(shape) != 4 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"four positive integers, not {text!r}")
    return shape


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--shapes", nargs="+", type=parse_shape, metavar="B,T,D,H",
        default=[parse_shape(shape) for shape in SHAPES],
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=10, help="for each row")
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here")
    args = parser.parse_args()
    results = []
    for shape in args.shapes:
        for sequences in (True, False):
            results.append(result := measure(shape, sequences, args.seconds))
            median = {k: round(v, 2) for k, v in result["median_ms"].items()}
            print(f"{shape}, return_sequences={sequences}, ms:", median, flush=True)
            worst = result["largest_relative_difference"]
            print(f"  largest relative difference of a gradient: {worst:.1e}")
            print("".join(f"  {line}\n" for line in result["missing"]), end="")
    print("\nTime of a step over that of BPTTRNN under XLA, medians:\n")
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
