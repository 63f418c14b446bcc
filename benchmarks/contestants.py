"""Our layers and their peers, made to do the same training step on the same numbers.

A step is the forward pass, the mean squared loss, and the gradient of every weight. Peers
that are not installed raise ImportError when they are made.
"""

import dataclasses
import os

import keras
import numpy as np
import tensorflow as tf

from keras_bptt import BPTTGRU, BPTTLSTM, BPTTRNN

OURS = {"RNN": BPTTRNN, "LSTM": BPTTLSTM, "GRU": BPTTGRU}
HOSTS = {
    "RNN": keras.layers.SimpleRNN,
    "LSTM": keras.layers.LSTM,
    "GRU": keras.layers.GRU,
}
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}
# PyTorch's places of Keras' gates: i, f, g, o is the order of both, z, r, h is r, z, n.
PLACES = {"RNN": [0], "LSTM": [0, 1, 2, 3], "GRU": [1, 0, 2]}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is computed. `masked`: padded examples; `dropout`: the recurrent one.

    `layer`: "RNN", the plain one, "LSTM" or "GRU".
    """

    batch: int
    timesteps: int
    features: int
    units: int
    sequences: bool = True
    masked: bool = False
    dropout: float = 0.0
    layer: str = "RNN"

    @property
    def shape(self):
        return self.batch, self.timesteps, self.features, self.units

    @property
    def multiply_adds(self):
        """Of the products x W and h U, delta U^T, x^T delta and h^T delta."""
        steps = self.batch * self.timesteps * GATES[self.layer]
        return steps * (2 * self.features * self.units + 3 * self.units**2)

    def __str__(self):
        output = "sequence" if self.sequences else "last output"
        extra = ", mask" if self.masked else ""
        return f"{self.shape} {output}{extra}" + (", dropout" if self.dropout else "")


def problem(case, seed=0):
    """Inputs, targets, mask and weights; the U of a gate has a spectral radius near 1."""
    rng = np.random.default_rng(seed)
    batch, timesteps, features, units = case.shape
    wide = GATES[case.layer] * units
    lengths = rng.integers(timesteps // 2, timesteps + 1, size=(batch, 1))
    return {
        "x": rng.normal(size=(batch, timesteps, features)).astype("float32"),
        "y": rng.normal(
            size=(batch, timesteps, units) if case.sequences else (batch, units)
        ).astype("float32"),
        "mask": np.arange(timesteps) < lengths if case.masked else None,
        "weights": [
            rng.normal(0, features**-0.5, (features, wide)).astype("float32"),
            rng.normal(0, units**-0.5, (units, wide)).astype("float32"),
            # Keras' GRU has a bias on either side of its reset gate.
            rng.normal(0, 0.1, (2, wide) if case.layer == "GRU" else wide).astype(
                "float32"
            ),
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
    """The same step with torch.nn's layer, batch first, with all cores."""
    import torch

    _refuse(case, masked=True)
    torch.set_num_threads(os.cpu_count())
    W, U, b = map(torch.from_numpy, data["weights"])
    b_x, b_h = b if b.ndim == 2 else (b, torch.zeros_like(b))
    places = torch.tensor(PLACES[case.layer])  # which are their own inverse
    layer = getattr(torch.nn, case.layer)(case.features, case.units, batch_first=True)

    def ordered(weight):
        """With the gates, along its first axis, in the other order."""
        gates = weight.reshape(len(places), case.units, *weight.shape[1:])
        return gates[places].reshape(weight.shape)

    with torch.no_grad():
        pairs = zip(layer.parameters(), (W.T, U.T, b_x, b_h), strict=True)
        for parameter, weight in pairs:
            parameter.copy_(ordered(weight))
    x, y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"])

    def step():
        layer.zero_grad()
        h = layer(x)[0]
        loss = (((h if case.sequences else h[:, -1]) - y) ** 2).mean()
        loss.backward()
        W, U, b_x, b_h = (ordered(p.grad).numpy() for p in layer.parameters())
        return [W.T, U.T, b_x if b.ndim == 1 else np.stack([b_x, b_h])]

    return step


def jax_cell(layer, U, b_h):
    """(states, projection of x) -> states, h first."""
    import jax
    import jax.numpy as jnp

    sigmoid, tanh = jax.nn.sigmoid, jnp.tanh

    def rnn(states, p):
        return (tanh(p + states[0] @ U),)

    def lstm(states, p):
        h, c = states
        i, f, g, o = jnp.split(p + h @ U, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        return sigmoid(o) * tanh(c), c

    def gru(states, p):
        (h,) = states
        p, q = (jnp.split(t, 3, axis=-1) for t in (p, h @ U + b_h))
        z, r = sigmoid(p[0] + q[0]), sigmoid(p[1] + q[1])
        return (z * h + (1 - z) * tanh(p[2] + r * q[2]),)

    return {"RNN": rnn, "LSTM": lstm, "GRU": gru}[layer]


def jax_step(case, data):
    """The same step as a jax.lax.scan over time under jit, the projection hoisted."""
    import jax
    import jax.numpy as jnp

    _refuse(case, masked=False)

    def loss(weights, x, y, mask):
        W, U, b = weights
        b, b_h = b if b.ndim == 2 else (b, None)
        cell = jax_cell(case.layer, U, b_h)

        def step(states, inputs):
            p, m = inputs
            new = cell(states, p)
            if m is not None:
                pairs = zip(new, states, strict=True)
                new = tuple(jnp.where(m[:, None], a, b) for a, b in pairs)
            return new, new[0]

        p = jnp.swapaxes(x, 0, 1) @ W + b
        m = None if mask is None else mask.T
        zeros = jnp.zeros((x.shape[0], U.shape[0]))
        states = (zeros,) * (2 if case.layer == "LSTM" else 1)
        (last, *_), h = jax.lax.scan(step, states, (p, m))
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


def contestants_of(layer):
    """The default first: what a user gets who swaps the name and compiles nothing."""
    ours, host = OURS[layer], HOSTS[layer]
    return {
        ours.__name__: keras_step(ours),
        f"{ours.__name__}, XLA": keras_step(ours, xla=True),
        f"{ours.__name__}, jit_compile=False": keras_step(ours, jit_compile=False),
        f"{host.__name__}, graph": keras_step(host),
        f"{host.__name__}, XLA": keras_step(host, xla=True),
        f"torch.nn.{layer}": torch_step,
        "JAX scan": jax_step,
    }


DEFAULT = "BPTTRNN"
CONTESTANTS = contestants_of("RNN")
ALL = {"RNN": CONTESTANTS} | {layer: contestants_of(layer) for layer in ("LSTM", "GRU")}
TOLERANCE = 1e-5


def largest_difference(given, wanted):
    """The largest relative difference of two lists of gradients."""
    return max(
        float(np.linalg.norm(got - want) / np.linalg.norm(want))
        for got, want in zip(given, wanted, strict=True)
    )


def contestants(case, names=None):
    """The steps of those who are installed, by name; and a line for each other one.

    All must agree with the layer of Keras on the gradients. (XLA draws other masks from the
    same seed, and is not compared there.) The third result is the largest difference.
    """
    data = problem(case)
    steps, missing = {}, []
    known = ALL[case.layer]
    for name in names or known:
        try:
            steps[name] = known[name](case, data)
        except ImportError as error:
            missing.append(f"{name}: not measured, {error}")
    # Once each, before any other call: the seed makes the first dropout masks the same.
    gradients = {name: step() for name, step in steps.items()}
    judge = f"{HOSTS[case.layer].__name__}, graph"
    worst = 0.0
    for name, given in gradients.items():
        if case.dropout and "XLA" in name:
            continue
        error = largest_difference(given, gradients[judge])
        worst = max(worst, error)
        if not error < TOLERANCE:
            raise SystemExit(f"{case}: {name} differs from {judge}, {error:.1e}")
    return steps, missing, worst
