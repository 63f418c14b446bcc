"""BPTT(cell): the gradient of any cell, against keras.layers.RNN(cell)."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import FLOAT64, B, D, H, assert_same, evaluate, few, random_inputs, rng
from some_cells import CELLS, INTEGERS

from keras_bptt.layers.bptt import BPTT

T = 7
MASK = np.array([[0, 1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [0] * 7], bool)
SHOWN = {"return_sequences": True, "return_state": True}


def pair(name, dtype="float64", **options):
    """keras.layers.RNN(cell) and BPTT(cell), of the same weights."""
    layers = []
    for layer_class in (keras.layers.RNN, BPTT):
        cell = (CELLS | INTEGERS)[name](dtype=dtype)
        own = options if layer_class is BPTT else {}
        layer = layer_class(cell, dtype=dtype, **SHOWN, **own)
        layer.build((B, None, D))
        layer.set_weights(
            [
                rng(i).normal(size=w.shape) * 0.6 if w.dtype != "int32" else np.array(2)
                for i, w in enumerate(layer.weights)
            ]
        )
        layers.append(layer)
    return layers


def inputs_of(name, *shape, seed=1):
    if name in INTEGERS:
        return rng(seed).integers(0, 5, shape)
    return random_inputs(*shape, seed=seed)


def states_of(layer, seed=5):
    states = keras.tree.flatten(layer.get_initial_state(B))
    return [rng(seed + i).normal(size=s.shape) for i, s in enumerate(states)]


@pytest.mark.parametrize(
    ("name", "mode"),
    list(itertools.product(CELLS | INTEGERS, ["eager", "graph", "xla"])),
)
def test_any_cell(name, mode):
    theirs, ours = pair(name)
    x = inputs_of(name, B, T, D)
    for mask in (None, MASK):
        call = {"training": True} | ({} if mask is None else {"mask": mask})
        expected = evaluate(theirs, x, "graph", **call)
        got = evaluate(ours, x, mode, **call)
        assert_same(got, expected, FLOAT64, dead=expected)
