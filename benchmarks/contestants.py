"""BPTTRNN and its peers, made to do the same training step on the same numbers.

A step is the forward pass, the mean squared loss, and the gradient of every weight. Peers
that are not installed raise ImportError when they are made.
"""

import dataclasses
import os

import keras
import numpy as np
import tensorflow as tf

from keras_bptt import BPTTRNN


@dataclasses.dataclass(frozen=True)
class Case:
    """What is computed. `masked`: padded examples; `dropout`: the recurrent one."""

    batch: int
    timesteps: int
    features: int
    units: int
    sequences: bool = True
    masked: bool = False
    dropout: float = 0.0

    @property
    def shape(self):
        return self.batch, self.timesteps, self.features, self.units

    @property
    def multiply_adds(self):
        """Of the products x W and h U, delta U^T, x^T delta and h^T delta."""
        steps = self.batch * self.timesteps
        return steps * (2 * self.features * self.units + 3 * self.units**2)

    def __str__(self):
        output = "sequence" if self.sequences else "last output"
        extra = ", mask" if self.masked else ""
        return f"{self.shape} {output}{extra}" + (", dropout" if self.dropout else "")


def problem(case, seed=0):
    """Inputs, targets, mask and weights; U has a spectral radius near 1."""
    rng = np.random.default_rng(seed)
    batch, timesteps, features, units = case.shape
    lengths = rng.integers(timesteps // 2, timesteps + 1, size=(batch, 1))
    return {
        "x": rng.normal(size=(batch, timesteps, features)).astype("float32"),
        "y": rng.normal(
            size=(batch, timesteps, units) if case.sequences else (batch, units)
        ).astype("float32"),
        "mask": np.arange(timesteps) < lengths if case.masked else None,
        "weights": [
            rng.normal(0, features**-0.5, (features, units)).astype("float32"),
            rng.normal(0, units**-0.5, (units, units)).astype("float32"),
            rng.normal(0, 0.1, units).astype("float32"),
        ],
    }


def keras_step(layer_class, xla=False, **options):
    """A step of a Keras layer in a tf.function; returns d_kernel, d_recurrent, d_bias."""

    def make(case, data):
        layer = layer_class(
            case.units,
            return_sequences=case.sequences,
            recurrent_dropout=case.dropout,
            seed=1,
            **options,
        )
        layer.build(data["x"].shape)
        layer.set_weights(data["weights"])
        x, y = tf.constant(data["x"]), tf.constant(data["y"])
        mask = None if data["mask"] is None else tf.constant(data["mask"])

        # None, not False: what TensorFlow does where nobody says anything.
        @tf.function(jit_compile=xla or None)
        def step(x, y, mask):
            with tf.GradientTape() as tape:
                h = layer(x, mask=mask, training=True)
                loss = tf.reduce_mean(tf.square(h - y))
            return tape.gradient(loss, layer.trainable_variables)

        return lambda: [gradient.numpy() for gradient in step(x, y, mask)]

    return make


def torch_step(case, data):
    """The same step with torch.nn.RNN, batch first; its second bias stays zero."""
    import torch

    _refuse(case, masked=True)
    torch.set_num_threads(os.cpu_count())
    W, U, b = (torch.from_numpy(weight) for weight in data["weights"])
    rnn = torch.nn.RNN(case.features, case.units, batch_first=True)
    with torch.no_grad():
        rnn.weight_ih_l0.copy_(W.T)
        rnn.weight_hh_l0.copy_(U.T)
        rnn.bias_ih_l0.copy_(b)
        rnn.bias_hh_l0.zero_()
    x, y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"])

    def step():
        rnn.zero_grad()
        h = rnn(x)[0]
        loss = (((h if case.sequences else h[:, -1]) - y) ** 2).mean()
        loss.backward()
        W, U, b = rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0
        return [W.grad.numpy().T, U.grad.numpy().T, b.grad.numpy()]

    return step


def jax_step(case, data):
    """The same step as a jax.lax.scan over time under jit, the projection hoisted."""
    import jax
    import jax.numpy as jnp

    _refuse(case, masked=False)

    def loss(weights, x, y, mask):
        W, U, b = weights

        def cell(h, inputs):
            z, m = inputs
            new = jnp.tanh(z + h @ U)
            h = new if m is None else jnp.where(m[:, None], new, h)
            return h, h

        z = jnp.swapaxes(x, 0, 1) @ W + b
        m = None if mask is None else mask.T
        last, h = jax.lax.scan(cell, jnp.zeros((x.shape[0], U.shape[0])), (z, m))
        h = jnp.swapaxes(h, 0, 1) if case.sequences else last
        return jnp.mean((h - y) ** 2)

    gradient = jax.jit(jax.grad(loss))
    x, y = jnp.asarray(data["x"]), jnp.asarray(data["y"])
    mask = None if data["mask"] is None else jnp.asarray(data["mask"])
    weights = [jnp.asarray(weight) for weight in data["weights"]]
    return lambda: [np.asarray(g) for g in gradient(weights, x, y, mask)]


def _refuse(case, masked):
    """torch.nn.RNN has no mask, and neither peer this kind of dropout."""
    if case.dropout or (masked and case.masked):
        raise ImportError("it has no such option")


# The default first: what a user gets who swaps the name and compiles nothing.
DEFAULT = "BPTTRNN"
CONTESTANTS = {
    DEFAULT: keras_step(BPTTRNN),
    "BPTTRNN, XLA": keras_step(BPTTRNN, xla=True),
    "BPTTRNN, jit_compile=False": keras_step(BPTTRNN, jit_compile=False),
    "SimpleRNN, graph": keras_step(keras.layers.SimpleRNN),
    "SimpleRNN, XLA": keras_step(keras.layers.SimpleRNN, xla=True),
    "torch.nn.RNN": torch_step,
    "JAX scan": jax_step,
}
TOLERANCE = 1e-5


def largest_difference(given, wanted):
    """The largest relative difference of two lists of gradients."""
    return max(
        float(np.linalg.norm(got - want) / np.linalg.norm(want))
        for got, want in zip(given, wanted, strict=True)
    )


def contestants(case, names=None):
    """The steps of those who are installed, by name; and a line for each other one.

    All must agree with SimpleRNN on the gradients. (XLA draws other dropout masks from the
    same seed, and is not compared there.) The third result is the largest difference.
    """
    data = problem(case)
    steps, missing = {}, []
    for name in names or CONTESTANTS:
        try:
            steps[name] = CONTESTANTS[name](case, data)
        except ImportError as error:
            missing.append(f"{name}: not measured, {error}")
    # Once each, before any other call: the seed makes the first dropout masks the same.
    gradients = {name: step() for name, step in steps.items()}
    judge = "SimpleRNN, graph"
    worst = 0.0
    for name, given in gradients.items():
        if case.dropout and "XLA" in name:
            continue
        error = largest_difference(given, gradients[judge])
        worst = max(worst, error)
        if not error < TOLERANCE:
            raise SystemExit(f"{case}: {name} differs from {judge}, {error:.1e}")
    return steps, missing, worst
