"""Initializers of biases by which the gates of an LSTM or a GRU hold a state."""

import math
import numbers

import keras
import numpy as np


class MemoryBias(keras.initializers.Initializer):
    """What the two have in common: for how many steps, and where the gates stand."""

    gates: tuple  # of the bias, in order: 1 holds the state, -1 lets inputs in
    layer: str

    def __init__(self, steps):
        real = isinstance(steps, numbers.Real) and not isinstance(steps, bool)
        if not real or not 1 < steps < math.inf:
            raise ValueError(
                "`steps` must be a number above 1, for so many steps a gate holds a state. "
                f"Received: steps={steps!r}. Pass the lag that the task asks for, such as "
                "the length of the sequences."
            )
        self.steps = steps

    def __call__(self, shape, dtype=None):
        *rows, size = shape
        if size % len(self.gates) or list(rows) not in self._rows():
            raise ValueError(
                f"{type(self).__name__} must be the `bias_initializer` of {self.layer}. "
                f"Received: a weight of shape {tuple(shape)}."
            )
        open_or_shut = np.repeat(self.gates, size // len(self.gates))
        bias = np.zeros(shape)
        bias[(0,) * len(rows)] = math.log(self.steps - 1) * open_or_shut
        return keras.ops.convert_to_tensor(bias, dtype or keras.config.floatx())

    def _rows(self):
        return [[]]

    def get_config(self):
        return {"steps": self.steps}


@keras.saving.register_keras_serializable(package="keras_bptt")
class LSTMMemoryBias(MemoryBias):
    """Biases by which an LSTM begins with a memory of so many steps.

    Use it where the task asks for what lies far back and `gradient_flow` says that the
    gradient of an LSTM vanishes: with Keras' bias of 1 a forget gate begins at 0.73, which
    holds a cell state for 4 steps. It is for `recurrent_activation="sigmoid"`, and needs
    `unit_forget_bias=False`, with which Keras' own layer takes it too.

    With n steps, the biases of the gates i, f, g, o and what the gates begin at:

        b_i = -log(n - 1)      i = 1 / n
        b_f =  log(n - 1)      f = 1 - 1 / n       c_t keeps (1 - 1 / n)^k after k steps
        b_g = b_o = 0          o = 1 / 2

    Args:
        steps: A number above 1, such as the length of the sequences.

    Raises:
        ValueError: for another number of steps, and for a weight that is no bias of an
            LSTM.

    Example:

    >>> from keras_bptt import BPTTLSTM, LSTMMemoryBias
    >>> layer = BPTTLSTM(2, unit_forget_bias=False, bias_initializer=LSTMMemoryBias(101))
    >>> layer.build((None, None, 3))
    >>> layer.cell.bias.numpy().astype(float).round(2).tolist()
    [-4.61, -4.61, 4.61, 4.61, 0.0, 0.0, 0.0, 0.0]

    References:
        - Gers, Schmidhuber & Cummins, Learning to forget, 2000.
        - Tallec & Ollivier, Can recurrent neural networks warp time?, 2018 (arXiv
          1804.11188): log(n - 1), there with an n of its own for each unit.
    """

    gates = (-1, 1, 0, 0)
    layer = "an LSTM with unit_forget_bias=False, of shape (4 units,)"


@keras.saving.register_keras_serializable(package="keras_bptt")
class GRUMemoryBias(MemoryBias):
    """Biases by which a GRU begins with a memory of so many steps.

    As `LSTMMemoryBias`, for the update gate, which in Keras' GRU is what multiplies the
    state of the step before. Without it the gate begins at 1/2, which holds a state for 2
    steps. It is for `recurrent_activation="sigmoid"`, and Keras' own layer takes it too.

    With n steps, the biases of the gates z, r and of the candidate g, and what z begins at:

        b_z = log(n - 1)       z = 1 - 1 / n       h_t keeps (1 - 1 / n)^k after k steps
        b_r = b_g = 0

    With `reset_after=True` there are two rows of biases, whose sum counts in the gates: the
    second is 0.

    Args:
        steps: A number above 1, such as the length of the sequences.

    Raises:
        ValueError: for another number of steps, and for a weight that is no bias of a GRU.

    Example:

    >>> from keras_bptt import BPTTGRU, GRUMemoryBias
    >>> layer = BPTTGRU(1, bias_initializer=GRUMemoryBias(101))
    >>> layer.build((None, None, 3))
    >>> layer.cell.bias.numpy().astype(float).round(2).tolist()
    [[4.61, 0.0, 0.0], [0.0, 0.0, 0.0]]

    References:
        - Tallec & Ollivier, Can recurrent neural networks warp time?, 2018 (arXiv
          1804.11188).
    """

    gates = (1, 0, 0)
    layer = "a GRU, of shape (2, 3 units) or (3 units,)"

    def _rows(self):
        return [[], [2]]


def check_memory_bias(cell):
    """Raise where Keras would make the bias of an LSTM of pieces, one for each call."""
    if cell.unit_forget_bias and isinstance(cell.bias_initializer, LSTMMemoryBias):
        raise ValueError(
            "LSTMMemoryBias needs unit_forget_bias=False: it is for the biases of all "
            "gates, and the other would put 1 in the place of some. Received: "
            f"bias_initializer=LSTMMemoryBias({cell.bias_initializer.steps!r}) and "
            "unit_forget_bias=True, the default. Pass unit_forget_bias=False."
        )
