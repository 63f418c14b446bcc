"""What the recurrent kernel of a plain RNN says of its gradient (Pascanu et al. 2013).

|a_{t-1}| <= sigma_max(U) max f' |a_t|
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_bptt.cells.simple_rnn import SimpleRNN


class Spectrum(NamedTuple):
    """Of the recurrent kernel U, and of the activation f.

    Attributes:
        singular_values: the largest first. NaN where U is not finite.
        spectral_radius: the largest absolute value of the eigenvalues.
        max_slope: the largest value of f'; infinite where there is none, None where the
            activation mixes units.
    """

    singular_values: np.ndarray
    spectral_radius: float
    max_slope: float | None


def spectrum(call):
    """The `Spectrum` of a call of a layer; None where the cell is not the plain RNN."""
    cell = call.options.cell
    if not isinstance(cell, SimpleRNN):
        return None
    _, U, *_ = call.arguments.weights
    U = tf.cast(U, tf.float64).numpy()
    values, radius = np.full(len(U), np.nan), math.nan
    if np.all(np.isfinite(U)):
        values = np.linalg.svd(U, compute_uv=False)
        radius = float(np.abs(np.linalg.eigvals(U)).max())
    dtype = call.arguments.states[0].dtype
    return Spectrum(values, radius, _largest_slope(cell.activation, len(U), dtype))


@functools.lru_cache(maxsize=256)
def _largest_slope(activation, units, dtype):
    """The largest f' for |z| <= 50; inf if it grows on, None if f mixes units."""
    if activation.mixes:
        return None

    def largest(most):
        z = np.linspace(-most, most, 20001)  # 0 is one of them
        z = tf.constant(np.pad(z, (0, -len(z) % units)).reshape(-1, units), dtype)
        return float(tf.reduce_max(activation.vjp(z, tf.ones_like(z))))

    here, farther = largest(50.0), largest(60.0)
    return here if farther <= 1.01 * here else math.inf
