"""What Keras sees: arguments, states, masks, dtypes. No derivative is computed here.

* `bptt_rnn`, `bptt_lstm`, `bptt_gru`: the layers in the place of three of Keras.
* `own_step`: what these have in common, a step of the package with the weights of Keras'
  cell; `compiled_step`: that of LSTM and GRU.
* `bptt`: the layer `BPTT`, around any cell; `steps`: how it calls that cell.
* `explicit_loop`: what all have in common, a loop over time that is the engine's.
* `memory_bias`: initializers by which gates hold a state for so many steps.
* `observing`: who else wants to see what a layer asks of the engine.
"""

from keras_bptt.layers.bptt import BPTT
from keras_bptt.layers.bptt_gru import BPTTGRU
from keras_bptt.layers.bptt_lstm import BPTTLSTM
from keras_bptt.layers.bptt_rnn import BPTTRNN

__all__ = ["BPTT", "BPTTGRU", "BPTTLSTM", "BPTTRNN"]
