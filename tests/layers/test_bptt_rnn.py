"""BPTTRNN beside `keras.layers.SimpleRNN`: every activation, and what calls share.

What holds for every layer of the package is in `test_contract.py`.
"""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    FLOAT32,
    MIXED_MASK,
    WAYS,
    B,
    D,
    H,
    T,
    assert_same,
    compare,
    evaluate,
    few,
    pair,
    plain,
    random_inputs,
)
from twins import centred, sine

from keras_bptt import BPTTRNN

STATE = random_inputs(B, H, seed=5)
SEQUENCE = {"return_sequences": True}

ACTIVATIONS = {
    name: name
    for name in (
        "tanh relu sigmoid linear softplus elu selu exponential leaky_relu gelu silu mish "
        "hard_sigmoid hard_silu relu6 celu softsign log_sigmoid softmax "
        "log_softmax sparsemax tanh_shrink squareplus"
    ).split()
} | {
    "none": None,
    "tf.nn.tanh": tf.nn.tanh,
    "function": sine,
    "lambda": lambda z: tf.sin(z) + 0.1 * z,
    "mixing function": centred,
    "ReLU layer": keras.layers.ReLU(max_value=1.5, negative_slope=0.1, dtype="float64"),
    "LeakyReLU layer": keras.layers.LeakyReLU(negative_slope=0.4, dtype="float64"),
    "Softmax layer": keras.layers.Softmax(dtype="float64"),
}


def tame(name):
    """Weights that let no state explode: of exp(exp(...)) nothing finite would remain."""
    return {"radius": 0.2} if name == "exponential" else {}


# In graphs one of each kind: a slope that z tells, and a Jacobian.
IN_GRAPHS = [("softmax", "eager"), ("gelu", "graph"), ("softmax", "xla")]


@pytest.mark.parametrize(
    ("name", "mode"),
    few(
        itertools.product(ACTIVATIONS, WAYS),
        lambda name, mode: mode == "plain" or (name, mode) in IN_GRAPHS,
    ),
)
def test_activation(name, mode):
    options = {"activation": ACTIVATIONS[name]} | SEQUENCE | tame(name)
    compare(0.5 * random_inputs(), mode, options=options, state=STATE)


# A slope that h tells, one that z tells, Jacobians; and those with a slope of their own.
IN_FLOAT32 = "tanh gelu softmax relu selu leaky_relu".split()


@pytest.mark.parametrize("name", [*IN_FLOAT32, "mixing function"])
def test_activation_in_float32(name):
    options = {"activation": ACTIVATIONS[name], "dtype": "float32"} | SEQUENCE
    compare(0.5 * random_inputs(), "plain", FLOAT32, options=options)


@pytest.mark.parametrize("f", ["tanh", "gelu", "softmax"])
@pytest.mark.parametrize("mode", ["graph", "xla"])
@pytest.mark.slow
def test_activation_with_everything(f, mode):
    options = {"activation": f, "return_state": True, "seed": 3} | SEQUENCE
    options |= {"dropout": 0.3, "recurrent_dropout": 0.3}
    call = {"state": STATE, "mask": MIXED_MASK, "training": True}
    compare(random_inputs(), mode, options=options, **call)


@pytest.mark.parametrize(
    ("policy", "mode"),
    few(
        itertools.product(["mixed_float16", "float16"], WAYS),
        lambda policy, mode: mode == ("graph" if policy == "float16" else "plain"),
    ),
)
def test_half_precision_with_every_option(policy, mode):
    options = {"dtype": policy, "activation": "gelu", "seed": 3} | SEQUENCE
    options |= {"dropout": 0.3, "recurrent_dropout": 0.3}
    theirs, ours = pair(**options)
    call = {"mask": MIXED_MASK, "training": True}
    expected = evaluate(theirs, random_inputs(), plain(mode), **call)
    # Both sides round some 40 sums.
    assert_same(evaluate(ours, random_inputs(), mode, **call), expected, 40 * 2**-11)


def test_gradients_are_alive():
    """The comparisons would see an error in the farthest step."""
    theirs, _ = pair()
    results = evaluate(theirs, random_inputs(), state=STATE)
    assert np.all(np.abs(results["d_x"]).max(axis=(0, 2)) > 1e-2)
    assert np.abs(results["d_state0"]).max() > 1e-2


@pytest.mark.parametrize("form", ["tensor", "list"])
def test_initial_state(form):
    state = STATE if form == "tensor" else [STATE]
    compare(random_inputs(), state=state, options=SEQUENCE)


def test_eager_calls_of_any_length_share_their_graphs():
    """A new length costs no new graph, once the first two have shown that it varies."""
    calls = []

    def activation(z):
        calls.append(z)
        return tf.sin(z)

    layer = BPTTRNN(H, activation=activation)
    counts = []
    for time in (3, 5, 7, 9, 11):
        layer(random_inputs(B, time, D))
        counts.append(len(calls))
    assert counts[2] == counts[4]


@pytest.mark.parametrize(
    "activation", ["softmax", pytest.param(sine, marks=pytest.mark.slow)]
)
def test_layers_with_one_activation_and_several_sizes(activation):
    """Whatever eager calls share, it is not the number of units or features."""
    for units, features in ((4, 3), (2, 4), (5, 2), (4, 7)):
        options = {"units": units, "features": features, "activation": activation}
        state = random_inputs(B, units, seed=5)
        compare(random_inputs(B, T, features), state=state, options=options | SEQUENCE)
