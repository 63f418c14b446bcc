"""What stands in the place of padding, so that a cell meets real inputs alone."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import random_inputs

from keras_bptt.engine.masks import filler, unpadded

MASK = np.array([[0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)


def filled(x, mask):
    return unpadded(x, mask, filler(x, mask)).numpy()


@pytest.mark.parametrize("shape", [(3,), (2, 3), ()])
def test_padding_becomes_a_real_input(shape):
    """The example's first one; of an example without any, that of another example."""
    x = random_inputs(*MASK.shape, *shape)
    x[~MASK] = np.nan
    got = filled(tf.constant(x), tf.constant(MASK))
    np.testing.assert_array_equal(got[MASK], x[MASK])
    first = {0: x[2, 0], 1: x[1, 1], 2: x[2, 0], 3: x[2, 0]}
    for row, wanted in first.items():
        for step in np.flatnonzero(~MASK[row]):
            np.testing.assert_array_equal(got[row, step], wanted)


def test_padding_alone_becomes_zeros():
    x = tf.fill((2, 3, 4), np.nan)
    np.testing.assert_array_equal(
        filled(x, tf.zeros((2, 3), tf.bool)), np.zeros((2, 3, 4))
    )


@pytest.mark.parametrize("size", [0, None], ids=["known", "unknown"])
def test_no_example(size):
    """As a replica may get at the end of an epoch."""
    specs = [tf.TensorSpec((size, 3, 4)), tf.TensorSpec((size, 3), tf.bool)]
    call = tf.function(
        lambda x, mask: unpadded(x, mask, filler(x, mask)), input_signature=specs
    )
    assert call(tf.zeros((0, 3, 4)), tf.zeros((0, 3), tf.bool)).shape == (0, 3, 4)
    assert filled(tf.zeros((0, 3, 4)), tf.zeros((0, 3), tf.bool)).shape == (0, 3, 4)
