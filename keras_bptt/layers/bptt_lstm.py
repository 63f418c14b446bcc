"""BPTTLSTM: the LSTM, in the place of keras.layers.LSTM."""

import keras

from keras_bptt.cells.lstm import LSTM
from keras_bptt.layers.explicit_loop import signature_of
from keras_bptt.layers.gated import Gated, without_cudnn


@keras.saving.register_keras_serializable(package="keras_bptt")
class BPTTLSTM(Gated, keras.layers.LSTM):
    """DOC"""

    cell_class = keras.layers.LSTMCell

    def __init__(self, units, *args, **kwargs):
        args, kwargs = without_cudnn(keras.layers.LSTM, units, *args, **kwargs)
        super().__init__(*args, **kwargs)

    __init__.__signature__ = signature_of(keras.layers.LSTM)

    def _equations(self, dropped):
        return LSTM(self.cell.activation, self.cell.recurrent_activation, dropped)
