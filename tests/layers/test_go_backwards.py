"""A mask behind `go_backwards` with `return_sequences`: Keras hands it on as it came in.

The outputs are in the order of processing, the last step first, and the mask is not. So a
layer on top skips other steps than those that were masked, SimpleRNN and BPTTRNN alike.
"""

import keras
import numpy as np
import pytest
from helpers import D, H, needs_keras, random_inputs, relative_error, without_graphs

from keras_bptt import BPTTRNN, convert

T, LENGTHS = 7, (7, 4, 2)
SAME = 1e-5


WAYS = {
    "as it comes": lambda h, mask: (h, None),
    "the mask reversed": lambda h, mask: (h, keras.ops.flip(mask, 1)),
    "the outputs reversed": lambda h, mask: (keras.ops.flip(h, 1), mask),
}


def stacked(layer_class, way):
    """Two layers, the lower one from the last step to the first."""
    keras.utils.set_random_seed(4)
    x = keras.Input((None, D))
    h = layer_class(H, return_sequences=True, go_backwards=True)(
        keras.layers.Masking()(x)
    )
    h, mask = WAYS[way](h, keras.ops.any(keras.ops.not_equal(x, 0), -1))
    top = layer_class(5)
    # None would be no mask at all.
    return keras.Model(x, top(h) if mask is None else top(h, mask=mask))


def bidirectional(layer_class):
    keras.utils.set_random_seed(4)
    both = keras.layers.Bidirectional(layer_class(H, return_sequences=True))
    body = [keras.Input((None, D)), keras.layers.Masking(), both, layer_class(5)]
    return keras.Sequential(body)


def padded():
    x = random_inputs(len(LENGTHS), T, D).astype("float32")
    for row, length in zip(x, LENGTHS, strict=True):
        row[length:] = 0
    return x


def error(model):
    """From what each sequence gives by itself, without padding."""
    x = padded()
    alone = [model(x[i : i + 1, :n]) for i, n in enumerate(LENGTHS)]
    return relative_error(model(x), np.concatenate(alone))


@needs_keras("3.11", "a mask that is passed in the call")
@pytest.mark.parametrize("way", WAYS)
@without_graphs()
def test_a_stack_on_reversed_outputs(way):
    theirs = stacked(keras.layers.SimpleRNN, way)
    ours = convert(theirs)
    assert [type(layer) for layer in ours.layers].count(BPTTRNN) == 2
    assert relative_error(ours(padded()), theirs(padded())) < SAME
    for model in (theirs, ours):
        if way == "as it comes":
            assert error(model) > 0.1, "Keras has changed: say so in migrating.md"
        else:
            assert error(model) < SAME


@pytest.mark.parametrize("layer_class", [keras.layers.SimpleRNN, BPTTRNN])
@without_graphs()
def test_bidirectional_reverses_what_it_hands_on(layer_class):
    assert error(bidirectional(layer_class)) < SAME
