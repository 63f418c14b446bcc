"""What a call of the layer settles before the recurrence: sizes, draws, XLA or not."""

import keras
import tensorflow as tf

from keras_bptt.layers.arguments import check_dense, check_inputs


def checked_inputs(name, sequences, features):
    """The inputs, with the layer's number of features in their static shape."""
    check_dense(name, sequences)
    shape = sequences.shape
    if shape.rank is None or (shape.rank == 3 and shape[2] is None):
        sequences = tf.ensure_shape(sequences, (None, None, features))
    check_inputs(name, sequences.shape, features)
    return sequences


def mask_of(mask, sequences):
    """The mask as booleans (batch, timesteps), or None."""
    if mask is None:
        return None
    mask = tf.cast(mask, tf.bool)
    if mask.shape.rank != 2:
        mask = tf.reshape(mask, tf.shape(mask)[:2])
    sizes = tf.shape(sequences)[:2]
    return _fitted(mask, sizes, sequences.shape[:2], "mask_of_batch_and_timesteps")


def state_of(state, sequences, row):
    """An initial state (batch, *row)."""
    # That of a stateful layer is a variable, which is another one after the call.
    state = tf.convert_to_tensor(state)
    sizes = tf.stack([tf.shape(sequences)[0], *row])
    known = (sequences.shape[0], *row)
    return _fitted(state, sizes, known, "initial_state_of_batch_and_units")


def _fitted(tensor, sizes, known, name):
    """`tensor`, which raises when it runs if it has other sizes; `known` are some of them.

    A mask of one example would be that of all, one of (timesteps, batch) would be read row
    by row, silently. XLA drops assertions, and a reshape counts numbers alone. So the
    tensor is reshaped and, where a size differs, to a shape of more numbers than it has,
    which fails.
    """
    known = tf.TensorShape(known)
    if not (known.is_fully_defined() and tensor.shape == known):
        sizes += 2 * tf.abs(tf.shape(tensor) - sizes)
        tensor = tf.reshape(tensor, sizes, name=name)
        tensor.set_shape(known)
    return tensor


def drawn_factors(truncation, seed, sequences, dtype):
    """1 / p or 0 for each step and example, as a RandomizedTruncation says."""
    factor = tf.constant(1 / truncation.keep_probability, dtype)
    # Of the factor as it is rounded, so that the mean is 1 in any precision.
    p = 1 / tf.cast(factor, tf.float32)
    steps = tf.shape(sequences)[:2]
    draws = keras.random.uniform(steps, seed=seed, dtype="float32")
    return tf.where(draws < p, factor, tf.zeros_like(factor))


def compiles(jit_compile, training, unroll, possible):
    """Whether XLA compiles the recurrence; `possible` says whether it can."""
    # Exports are traced with training=False: they load where there is no XLA. All steps
    # written out would take XLA a time that grows with their number.
    if jit_compile is False or (jit_compile == "auto" and (unroll or not training)):
        return False
    possible = possible()
    if jit_compile is True and not possible:
        raise ValueError(
            "XLA cannot compile this layer: there is none in this TensorFlow, its step "
            "(an `activation`, say) holds operations that it does not know, or "
            "tf.debugging adds such operations (enable_check_numerics, "
            "enable_dump_debug_info). Received: jit_compile=True. Use jit_compile='auto' "
            "or False."
        )
    return possible
