"""What the steps of LSTM and GRU have in common: the products of all gates, and f(z)."""

import tensorflow as tf


def of_gates(rows, kernel, factors, number):
    """What each gate sees of `rows`, side by side: (rows, gates x units).

    Args:
        factors: dropout factors like `rows`: none, one for all gates, or one for each.
        number: of the gates.
    """
    if len(factors) > 1:
        kernels = tf.split(kernel, number, axis=1)
        return tf.concat(
            [(rows * d) @ W for d, W in zip(factors, kernels, strict=True)], axis=1
        )
    for factor in factors:
        rows = rows * factor
    return rows @ kernel


def activated(function, z):
    """f(z), of the shape and dtype of z."""
    y = tf.convert_to_tensor(function(z))
    if not y.shape.is_compatible_with(z.shape) or y.dtype != z.dtype:
        raise ValueError(
            "`activation` and `recurrent_activation` must keep shape and dtype. Received: "
            f"{function}, which turns {z.shape} {z.dtype.name} into {y.shape} "
            f"{y.dtype.name}. Pass a function of one tensor that returns one like it."
        )
    return tf.ensure_shape(y, z.shape)
