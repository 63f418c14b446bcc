"""Cells for tests of BPTT(cell), each with something that a compiler might trip over.

`CELLS` are functions of no arguments; every cell takes inputs (batch, D), floats but for
`INTEGERS`, and every weight is a number near 1.
"""

import keras
import numpy as np
import tensorflow as tf
from helpers import D, H
from keras import ops


class Cell(keras.layers.Layer):
    """A cell whose step is a function of itself, x and the states."""

    def __init__(self, step=None, sizes=(H,), weights=(), **options):
        super().__init__(**options)
        self.step, self.sizes, self.shapes = step, sizes, dict(weights)
        self.state_size = list(sizes) if len(sizes) > 1 else sizes[0]

    def build(self, shape):
        for name, size in self.shapes.items():
            setattr(self, name, self.add_weight(shape=size, name=name))

    def call(self, x, states):
        found = self.step(self, x, *states)
        output, *after = found if isinstance(found, tuple) else (found,)
        return output, after or [output]


PLAIN = {"W": (D, H), "U": (H, H), "b": (H,)}


def cell(*sizes, **weights):
    """Makes of a step a function that makes a cell."""

    def of(step):
        def make(**options):
            return Cell(step, sizes or (H,), weights or PLAIN, **options)

        CELLS[step.__name__] = make
        return make

    return of


CELLS = {
    "SimpleRNNCell": lambda **k: keras.layers.SimpleRNNCell(H, **k),
    "LSTMCell": lambda **k: keras.layers.LSTMCell(H, **k),
    "GRUCell": lambda **k: keras.layers.GRUCell(H, **k),
    "GRUCell before": lambda **k: keras.layers.GRUCell(H, reset_after=False, **k),
    "one product a gate": lambda **k: keras.layers.LSTMCell(H, implementation=1, **k),
    "a stack": lambda **k: keras.layers.StackedRNNCells(
        [keras.layers.LSTMCell(H, **k), keras.layers.GRUCell(2, **k)], **k
    ),
    "softmax, silu": lambda **k: keras.layers.LSTMCell(
        H, activation="silu", recurrent_activation="softmax", **k
    ),
}


# --- Normalised, leaky, with outputs and states of other kinds


@cell(W=(D, H), U=(H, H), g=(H,), b=(H,))
def layer_norm(self, x, h):
    z = x @ self.W + h @ self.U
    centred = z - ops.mean(z, -1, keepdims=True)
    norm = ops.sqrt(ops.var(z, -1, keepdims=True) + 1e-3)
    return ops.tanh(self.g * centred / norm + self.b)


@cell(W=(D, H), U=(H, H), tau=(H,))
def leaky(self, x, h):
    """A rate network whose time constants are learned."""
    leak = ops.sigmoid(self.tau)
    return (1 - leak) * h + leak * ops.tanh(x @ self.W + h @ self.U)


@cell(H, H, W=(D, H), U=(H, H), V=(H, H), b=(H,))
def oscillators(self, x, y, z):
    """coRNN: a second-order equation, two states."""
    z = z + 0.3 * (
        ops.tanh(x @ self.W + y @ self.U + z @ self.V + self.b) - y - 0.5 * z
    )
    y = y + 0.3 * z
    return y, y, z


@cell(2, 5, W=(D, 5), U=(2, 5), V=(5, 2), M=(5, 3))
def output_is_no_state(self, x, s, m):
    m = ops.tanh(x @ self.W + s @ self.U + m)
    s = ops.tanh(m @ self.V)
    return ops.sin(m @ self.M), s, m


@cell(W=(D, H), U=(H, H))
def residual(self, x, h):
    after = ops.tanh(x @ self.W + h @ self.U)
    return h + after * 0.5, after


@cell(W=(D, H), U=(H, H))
def shows_inputs(self, x, h):
    return x * 2, ops.tanh(x @ self.W + h @ self.U)


@cell(H, 3, W=(D, H), U=(H, H))
def state_that_stays(self, x, h, memory):
    h = ops.tanh(x @ self.W + h @ self.U) + ops.sum(memory, -1, keepdims=True)
    return h, h, memory


@cell(H, 2, W=(D, H), U=(H, H), V=(D, 2))
def state_that_nobody_reads(self, x, h, note):
    h = ops.tanh(x @ self.W + h @ self.U)
    return h, h, x @ self.V


@cell(U=(H, H))
def reads_no_input(self, x, h):
    return ops.tanh(h @ self.U)


@cell(W=(D, H))
def reads_no_state(self, x, h):
    return ops.tanh(x @ self.W)


CELLS["has_no_weights"] = lambda **k: Cell(
    lambda self, x, h: ops.tanh(h + ops.sum(x, -1, keepdims=True)), **k
)


# --- Shapes


@cell(W=(D, H), U=(2, 3, 3))
def heads(self, x, h):
    """Two heads beside each other, as rows."""
    rows = ops.reshape(h, (-1, 3))
    rows = ops.tanh(rows * 1.5) + 0.1 * ops.roll(rows, 1, -1)
    each = ops.reshape(rows, (-1, 2, 3))
    mixed = ops.einsum("bhi,hij->bhj", each, self.U)
    return ops.tanh(x @ self.W + ops.reshape(mixed, (-1, H)))


@cell(W=(D, H), U=(H, H))
def transposed(self, x, h):
    z = ops.transpose(ops.transpose(self.U) @ ops.transpose(h))
    return ops.tanh(x @ self.W + z)


@cell(W=(D, H), U=(H, H))
def slices(self, x, h):
    z = x @ self.W + h @ self.U
    return ops.concatenate([ops.tanh(z[:, :4]), z[:, 2:4] * 0.3], -1)


@cell(W=(D, H), U=(H, H))
def a_number_of_a_row(self, x, h):
    z = x @ self.W + h @ self.U
    first = z[:, 0]
    return ops.tanh(z + first[:, None]) * ops.sigmoid(first)[:, None]


class Matrix(keras.layers.Layer):
    """A state with two axes, updated by an outer product."""

    state_size = (H,)

    def build(self, shape):
        self.W = self.add_weight(shape=(D, 3), name="W")
        self.V = self.add_weight(shape=(D, 2), name="V")
        self.U = self.add_weight(shape=(3, 3), name="U")

    def get_initial_state(self, batch_size=None):
        return [ops.zeros((batch_size, 3, 2), self.compute_dtype)]

    def call(self, x, states):
        outer = ops.tanh(x @ self.W)[:, :, None] * ops.tanh(x @ self.V)[:, None]
        after = ops.tanh(ops.einsum("ij,bjk->bik", self.U, states[0])) + outer
        return ops.reshape(after, (-1, H)), [after]


CELLS["matrix"] = Matrix


# --- What a graph may hold


@cell()
def a_conditional(self, x, h):
    z = x @ self.W + h @ self.U
    return tf.cond(tf.reduce_sum(self.b) > 0, lambda: tf.tanh(z), lambda: tf.sin(z))


@cell()
def a_loop(self, x, h):
    """Three iterations towards a fixed point, in a loop of the graph."""

    def body(i, h):
        return i + 1, tf.tanh(x @ self.W + h @ self.U + self.b)

    found = tf.while_loop(lambda i, _: i < 3, body, (0, h), maximum_iterations=3)
    return found[1]


@cell()
def a_function(self, x, h):
    @tf.function(autograph=False)
    def inner(z):
        return tf.tanh(z) + 0.1 * z

    return inner(x @ self.W + h @ self.U + self.b)


@tf.custom_gradient
def doubled_back(z):
    return tf.tanh(z), lambda d: 2 * d * (1 - tf.tanh(z) ** 2)


@cell()
def a_custom_gradient(self, x, h):
    return doubled_back(x @ self.W + h @ self.U + self.b)


@tf.custom_gradient
def rounded(w):
    """A straight-through estimator."""
    return tf.round(4 * w) / 4, lambda d: d


@cell()
def rounded_weights(self, x, h):
    z = x @ rounded(self.W) + h @ (0.5 * rounded(self.U))
    return ops.tanh(z + rounded(self.b * 2))


@cell()
def a_custom_gradient_in_a_loop(self, x, h):
    def body(i, h):
        return i + 1, doubled_back(x @ self.W + h @ self.U) + 0.1 * tf.nn.silu(h)

    found = tf.while_loop(lambda i, _: i < 3, body, (0, h), maximum_iterations=3)
    return found[1]


# Whose first derivative is another than that of what they compute.
OWN = ("a_custom_gradient", "a_custom_gradient_in_a_loop", "rounded_weights")


@cell()
def integers_inside(self, x, h):
    z = x @ self.W + h @ self.U
    largest = ops.one_hot(ops.argmax(z, -1), H, dtype=z.dtype)
    return ops.tanh(z + 0.5 * largest) + self.b * ops.cast(z > 0, z.dtype)


@cell()
def asserts(self, x, h):
    tf.debugging.assert_less(x, 9 * tf.ones_like(x), "an input is too large")
    h = tf.debugging.assert_all_finite(h, "a state is not finite")
    return ops.tanh(x @ self.W + h @ self.U + self.b)


# --- Weights


@cell(W=(D, H), U=(H, H), scale=(1,))
def weight_norm(self, x, h):
    U = self.U / ops.sqrt(ops.sum(self.U**2, 0)) * self.scale
    return ops.tanh(x @ self.W + h @ U + h @ ops.transpose(self.U) * 0.1)


@cell()
def spectral_norm(self, x, h):
    v = ops.ones((H, 1), dtype=self.U.dtype)
    for _ in range(3):
        u = self.U @ v
        u = u / ops.sqrt(ops.sum(u * u))
        v = ops.transpose(self.U) @ u
        v = v / ops.sqrt(ops.sum(v * v))
    norm = ops.transpose(u) @ self.U @ v
    return ops.tanh(x @ self.W + h @ (self.U / norm) + self.b)


class Nested(keras.layers.Layer):
    """Layers inside, of which one is called twice and one is frozen."""

    state_size = H

    def build(self, shape):
        dtype = {"dtype": self.dtype_policy}
        self.into = keras.layers.Dense(H, **dtype)
        self.through = keras.layers.Dense(H, **dtype)
        self.frozen = keras.layers.Dense(H, "sigmoid", trainable=False, **dtype)
        for layer, size in (self.into, D), (self.through, H), (self.frozen, H):
            layer.build((None, size))

    def call(self, x, states, training=False):
        h = self.through(ops.tanh(self.into(x) + self.through(states[0])))
        h = ops.tanh(h) * self.frozen(states[0])
        return (h * 0.5 if training else h), [h]


CELLS["nested"] = Nested


class Grid(keras.layers.Layer):
    """A state of rank 3, convolved: a ConvLSTM's, with one gate."""

    state_size = (3, 2, 2)

    def get_initial_state(self, batch_size=None):
        return [ops.zeros((batch_size, 3, 2, 2), dtype=self.compute_dtype)]

    def build(self, shape):
        self.W = self.add_weight(shape=(D, 12), name="W")
        self.U = self.add_weight(shape=(3, 3, 2, 4), name="U")
        self.b = self.add_weight(shape=(4,), name="b")

    def call(self, x, states):
        h = states[0]
        grid = ops.reshape(x @ self.W, (-1, 3, 2, 2))
        z = ops.conv(h, self.U, padding="same") + self.b
        gate, new = ops.split(z, 2, -1)
        h = ops.sigmoid(gate) * h + ops.tanh(new + grid)
        return ops.reshape(h, (-1, 12)), [h]


CELLS["grid"] = Grid


class Reads(keras.layers.Layer):
    """Variables that it only reads, a raw one, and numbers that are part of the graph."""

    state_size = H

    def build(self, shape):
        self.W = self.add_weight(shape=(D, H), name="W")
        self.U = self.add_weight(shape=(H, H), name="U")
        self.count = self.add_weight(
            shape=(), dtype="int32", trainable=False, name="count", initializer="ones"
        )
        self.gain = self.add_weight(shape=(H,), trainable=False, name="gain")
        self.table = np.linspace(-1, 1, H)
        self.large = tf.constant(np.linspace(-1, 1, 30 * H).reshape(30, H))

    def call(self, x, states):
        z = x @ self.W * self.gain + states[0] @ self.U
        z = z + ops.cast(self.table, z.dtype) * ops.cast(self.count, z.dtype)
        h = ops.tanh(z + tf.cast(self.large[7], z.dtype))
        return h, [h]


CELLS["reads"] = Reads


class Embeds(keras.layers.Layer):
    """Its inputs are integers."""

    state_size = H

    def build(self, shape):
        self.table = self.add_weight(shape=(5, H), name="table")
        self.U = self.add_weight(shape=(H, H), name="U")

    def call(self, x, states):
        z = ops.sum(ops.take(self.table, x, axis=0), 1)
        h = ops.tanh(z + states[0] @ self.U)
        return h, [h]


INTEGERS = {"embeds": Embeds}
