"""BPTTGRU: the gated recurrent unit, in the place of keras.layers.GRU."""

import keras

from keras_bptt.cells.gru import GRU
from keras_bptt.layers.explicit_loop import signature_of
from keras_bptt.layers.gated import Gated, without_cudnn


@keras.saving.register_keras_serializable(package="keras_bptt")
class BPTTGRU(Gated, keras.layers.GRU):
    """DOC"""

    cell_class = keras.layers.GRUCell

    def __init__(self, units, *args, **kwargs):
        args, kwargs = without_cudnn(keras.layers.GRU, units, *args, **kwargs)
        super().__init__(*args, **kwargs)

    __init__.__signature__ = signature_of(keras.layers.GRU)

    def _equations(self, dropped):
        cell = self.cell
        functions = cell.activation, cell.recurrent_activation
        return GRU(*functions, cell.reset_after, dropped)
