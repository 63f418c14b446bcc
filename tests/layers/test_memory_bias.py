"""Biases by which gates begin with a memory of so many steps."""

import keras
import numpy as np
import pytest
from helpers import rng

from keras_bptt import BPTTGRU, BPTTLSTM, GRUMemoryBias, LSTMMemoryBias

UNITS, D, T = 5, 3, 40
LAYERS = {
    "BPTTLSTM": (BPTTLSTM, LSTMMemoryBias, {"unit_forget_bias": False}),
    "LSTM": (keras.layers.LSTM, LSTMMemoryBias, {"unit_forget_bias": False}),
    "BPTTGRU": (BPTTGRU, GRUMemoryBias, {}),
    "GRU": (keras.layers.GRU, GRUMemoryBias, {}),
    "BPTTGRU, reset before": (BPTTGRU, GRUMemoryBias, {"reset_after": False}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_state_is_held_for_so_many_steps(name):
    """Without inputs and without a recurrent kernel it decays by 1 - 1/n a step."""
    layer_class, initializer, options = LAYERS[name]
    layer = layer_class(
        UNITS,
        bias_initializer=initializer(20.0),
        recurrent_initializer="zeros",
        return_state=True,
        dtype="float64",
        **options,
    )
    start = [rng(1).normal(size=(2, UNITS))] * (2 if "LSTM" in name else 1)
    *_, last = layer(np.zeros((2, T, D)), initial_state=start)
    np.testing.assert_allclose(last, start[-1] * (1 - 1 / 20) ** T, rtol=1e-10)


def test_gates_that_let_in_begin_shut():
    layer = BPTTLSTM(UNITS, unit_forget_bias=False, bias_initializer=LSTMMemoryBias(20))
    layer.build((None, T, D))
    i, f, g, o = np.split(1 / (1 + np.exp(-layer.cell.bias.numpy())), 4)
    np.testing.assert_allclose([i, f], [[1 / 20] * UNITS, [19 / 20] * UNITS], 1e-6)
    np.testing.assert_array_equal([g, o], 0.5)


@pytest.mark.parametrize("name", ["BPTTLSTM", "BPTTGRU"])
def test_it_is_part_of_the_configuration(name):
    layer_class, initializer, options = LAYERS[name]
    layer = layer_class(3, bias_initializer=initializer(7), **options)
    again = layer_class.from_config(layer.get_config()).cell.bias_initializer
    assert type(again) is initializer and again.steps == 7


@pytest.mark.parametrize("steps", [1, 0.5, -3, np.inf, np.nan, True, "64", None])
def test_steps_out_of_range(steps):
    with pytest.raises(ValueError, match="`steps` must be a number above 1"):
        LSTMMemoryBias(steps)


@pytest.mark.parametrize(
    ("initializer", "shape"),
    [
        (LSTMMemoryBias, (6,)),
        (LSTMMemoryBias, (2, 8)),
        (GRUMemoryBias, (8,)),
        (GRUMemoryBias, (4, 9)),
    ],
)
def test_another_weight(initializer, shape):
    with pytest.raises(ValueError, match=r"must be the `bias_initializer` of .*shape"):
        initializer(4)(shape)


def test_keras_own_bias_of_1_does_not_go_with_it():
    with pytest.raises(ValueError, match="Pass unit_forget_bias=False"):
        BPTTLSTM(4, bias_initializer=LSTMMemoryBias(9))
