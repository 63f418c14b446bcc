"""Reads weights in the dtype in which they are stored.

In mixed precision Keras hands a layer its weights cast to the dtype of its computation.
Then their gradient leaves the layer in that dtype too: a sum over thousands of steps, which
float16 may not hold. (Keras' own loops read a weight in every step, so that TensorFlow adds
float32.)
"""

import functools

import keras
import tensorflow as tf


def stored(dtype_policy, variables):
    """Tensors of the variables of a layer, uncast; None stays None."""

    if dtype_policy.compute_dtype == dtype_policy.variable_dtype:
        return _read(variables)
    return uncast(variables)


def uncast(variables):
    """Tensors of variables, whatever policies are in force."""
    return _uncast()(read=functools.partial(_read, variables))


def _read(variables):
    # Tensors, not variables: keras.ops.convert_to_tensor would return the variable
    # itself, which the gradient would read where another dtype may be in force.
    return [v if v is None else tf.convert_to_tensor(v) for v in variables]


class _Uncast(keras.Layer):
    """Calls a function where no weight is cast, as within a layer that asks for it."""

    def __init__(self):
        super().__init__(dtype="float32", autocast=False)
        self.built = True

    def call(self, *, read):
        return read()


@functools.cache
def _uncast():
    return _Uncast()
