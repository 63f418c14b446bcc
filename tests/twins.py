"""The layers of the package, each with what it is compared with; and their configurations.

A new layer is a row of `LAYERS`. Every test of `layers/test_contract.py` then runs for it.
"""

from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from helpers import WAYS, B, D, H, random_inputs, rng
from hypothesis import strategies as st
from unrolled import Unrolled

from keras_bptt import (
    BPTT,
    BPTTGRU,
    BPTTLSTM,
    BPTTRNN,
    RandomizedTruncation,
    Truncation,
)
from keras_bptt.truncation import policy

# Options that the hosts have not.
OWN = ("checkpoint_every", "jit_compile", "truncation", "adjoint_clipnorm")
OWN += ("adjoint_max_growth", "output_units", "output_activation")
# With one of these the host is no twin.
INEXACT = {"truncation", "adjoint_clipnorm", "adjoint_max_growth", "output_units"}


@keras.saving.register_keras_serializable(package="tests")
def sine(z):
    """A user's function, whose slope only z tells."""
    return tf.sin(z) + 0.1 * z


@keras.saving.register_keras_serializable(package="tests")
def centred(z):
    """A user's function that mixes units, and not symmetrically."""
    return tf.tanh(z) + 0.5 * tf.sin(tf.cumsum(z, axis=-1))


# Options that are the cell's where a layer is made of one.
OF_CELL = ("activation", "use_bias", "dropout", "recurrent_dropout", "seed")
OF_CELL += ("kernel_regularizer", "recurrent_regularizer", "bias_regularizer")


def around(layer_class, cell_class):
    """The layer around a cell, as if it were a layer of the cell's options."""

    def make(units, **options):
        own = {key: options.pop(key) for key in OF_CELL if key in options}
        own |= {"dtype": options.get("dtype")}
        return layer_class(cell_class(units, **own), **options)

    return make


class Layer(NamedTuple):
    """A layer of the package, the layer of Keras in whose place it stands, and options."""

    layer: Callable
    host: Callable
    # A slope that h tells, one that z tells, and Jacobians.
    options: dict
    states: int = 1


SOME = ["tanh", "tanh", "linear", "gelu", "softmax", sine]
GATES = ["sigmoid", "sigmoid", "hard_sigmoid", "softmax", centred]
LAYERS = {
    "BPTTRNN": Layer(
        BPTTRNN,
        keras.layers.SimpleRNN,
        {"activation": "tanh linear relu selu gelu softmax".split() + [sine, centred]},
    ),
    "BPTT(GRUCell)": Layer(
        around(BPTT, keras.layers.GRUCell),
        around(keras.layers.RNN, keras.layers.GRUCell),
        {"activation": SOME},
    ),
    "BPTTLSTM": Layer(
        BPTTLSTM,
        keras.layers.LSTM,
        {"activation": SOME, "recurrent_activation": GATES},
        states=2,
    ),
    "BPTTGRU": Layer(
        BPTTGRU,
        keras.layers.GRU,
        {
            "activation": SOME,
            "recurrent_activation": GATES,
            "reset_after": [True, False],
        },
    ),
}


def states_of(name, batch=B, units=H):
    """Random initial states."""
    number = LAYERS[name].states
    return [random_inputs(batch, units, seed=5 + i) for i in range(number)]


def fill(layer, seed=0, radius=1.0):
    """Give a built layer random weights.

    The recurrent kernels are asymmetric and have this spectral radius, so that gradients
    neither vanish nor explode.
    """
    random, weights = rng(seed), []
    for weight in layer.weights:
        values = random.normal(size=weight.shape)
        if weight.name == "recurrent_kernel":
            gates = np.split(values, values.shape[1] // len(values), 1)
            sizes = [np.max(np.abs(np.linalg.eigvals(U))) for U in gates]
            values = np.concatenate(
                [radius * U / size for U, size in zip(gates, sizes, strict=True)], 1
            )
        elif values.ndim == 2:
            values /= np.sqrt(len(values))
        else:
            values *= 0.3
        weights.append(values)
    layer.set_weights(weights)


def host_of(name, units=H, batch=B, features=D, radius=1.0, **options):
    """The layer of Keras, built, with random weights; where options need it, `Unrolled`."""
    own = {key: options.pop(key) for key in OWN if key in options}
    own = {key: value for key, value in own.items() if value is not None}
    if type(options.get("unroll")) is int:  # of the loop, not of the sequence
        del options["unroll"]
    host = LAYERS[name].host(units, **options)
    host.build((batch, None, features))
    if not INEXACT & own.keys():
        fill(host, radius=radius)
        return host
    dense = None
    if own.get("output_units"):
        shared = ("use_bias", "kernel_regularizer", "bias_regularizer")
        shared += ("kernel_constraint", "bias_constraint", "dtype")
        dense = keras.layers.Dense(
            own["output_units"],
            own.get("output_activation"),
            **{key: options[key] for key in shared if key in options},
        )
        dense.build((None, units))
    layer = Unrolled(
        host,
        dense,
        policy(own.get("truncation")),
        own.get("adjoint_clipnorm"),
        own.get("adjoint_max_growth"),
    )
    fill(layer, radius=radius)
    return layer


def layer_of(name, units=H, batch=B, features=D, radius=1.0, **options):
    """A layer of the package, built, with random weights; float64 if unsaid."""
    layer = LAYERS[name].layer(units, **{"dtype": "float64"} | options)
    layer.build((batch, None, features))
    fill(layer, radius=radius)
    return layer


def twins(name, **options):
    """What is expected, and the layer, with the same options and weights."""
    options = {"dtype": "float64"} | options
    return host_of(name, **options), layer_of(name, **options)


def draws(options, call):
    """Whether a call draws random numbers, of which XLA draws others."""
    random = isinstance(options.get("truncation"), RandomizedTruncation)
    random |= bool(options.get("dropout") or options.get("recurrent_dropout"))
    return random and call.get("training", False)


class Unknown:
    """A layer that learns nothing of sizes from its inputs' static shapes."""

    def __init__(self, layer):
        self.layer = layer

    def __getattr__(self, name):
        return getattr(self.layer, name)

    def __call__(self, x, initial_state=None, mask=None, **call):
        hide = tf.compat.v1.placeholder_with_default
        shapes = self.layer.compute_output_shape(x.shape)
        shapes = shapes if isinstance(shapes[0], tuple) else [shapes]
        if initial_state is not None:
            states = tf.nest.flatten(initial_state)
            initial_state = [hide(s, [None, None]) for s in states]
        if mask is not None:
            mask = hide(mask, [None, None])
        x = hide(x, [None, None, None])
        outputs = self.layer(x, initial_state=initial_state, mask=mask, **call)
        pairs = zip(tf.nest.flatten(outputs), shapes, strict=True)
        return [tf.ensure_shape(y, shape) for y, shape in pairs]


# --- Drawn

flags = st.booleans()


@st.composite
def masks(draw, batch, timesteps):
    """Any steps masked."""
    row = st.lists(flags, min_size=timesteps, max_size=timesteps)
    return np.array(draw(st.lists(row, min_size=batch, max_size=batch)), bool)


@st.composite
def truncations(draw, timesteps):
    steps = draw(st.integers(1, timesteps + 2))
    window = Truncation(steps, draw(st.integers(1, steps)))
    mean = draw(st.floats(1.1, 4))
    randomized = RandomizedTruncation(mean, seed=draw(st.integers(0, 9)))
    return draw(st.sampled_from([None, None, window, window, randomized]))


@st.composite
def configurations(draw, modes=(*WAYS, "unknown"), order=1):
    """(name, options, call, inputs, mode): a layer with any options at once.

    Args:
        modes: names of `WAYS`, or "unknown": a graph that knows no sizes.
        order: of the derivatives. In those of the second nothing clips, for there are two
            views of it: `Unrolled` clips a derivative of the states as it does the first.
    """

    def one_of(*values):
        return draw(st.sampled_from(values))

    name, mode, size = one_of(*LAYERS), one_of(*modes), st.integers(1, 5)
    batch, features, units = draw(st.tuples(size, size, size))
    # Less than a block of steps (4 in the tests), one, some, and some with a rest.
    time = min(9 if order == 1 else 5, draw(st.one_of(size, st.sampled_from([7, 9]))))
    host = {key: one_of(*values) for key, values in LAYERS[name].options.items()}
    if units == 1:  # Keras warns of a softmax of one unit, which is 1
        host = {key: "tanh" if v == "softmax" else v for key, v in host.items()}
    options = host | {
        "units": units,
        "features": features,
        "batch": batch,
        "radius": one_of(1.0, 2.0),
        "use_bias": draw(flags),
        "return_sequences": draw(flags),
        "return_state": draw(flags),
        "go_backwards": draw(flags),
        "zero_output_for_mask": draw(flags),
        "unroll": one_of(False, False, 2, time <= 5 and mode != "unknown"),
        "dropout": one_of(0.0, 0.0, 0.3),
        "recurrent_dropout": one_of(0.0, 0.0, 0.3),
        "seed": draw(st.integers(0, 9)),
        "recurrent_regularizer": one_of(None, None, "l2"),
        "jit_compile": one_of(False, "auto"),
        "checkpoint_every": one_of(None, None, 1, 2, 3, 5, "sqrt"),
        "truncation": draw(truncations(time)),
        "adjoint_clipnorm": one_of(None, None, 0.3, 2.0) if order == 1 else None,
        "adjoint_max_growth": one_of(None, None, 1.0, 1.5) if order == 1 else None,
    }
    if outputs := one_of(None, None, 1, 3):
        options["output_units"] = outputs
        options["output_activation"] = one_of(None, "tanh", "sigmoid", centred)
    call = {"training": one_of(True, True, False)}
    if draw(flags):
        call["mask"] = draw(masks(batch, time))
    if draw(flags):
        call["state"] = states_of(name, batch, units)
    x = random_inputs(batch, time, features, seed=draw(st.integers(0, 99)))
    return name, options, call, x, mode
