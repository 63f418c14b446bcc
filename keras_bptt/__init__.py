"""Recurrent networks trained with explicit backpropagation through time, in Keras."""

from keras_bptt.callbacks import AdaptiveTruncation, GradientFlowLogger
from keras_bptt.conversion import convert
from keras_bptt.flow.gradient_flow import gradient_flow
from keras_bptt.flow.layer_flow import LayerFlow
from keras_bptt.flow.model_flow import GradientFlow
from keras_bptt.layers.bptt import BPTT
from keras_bptt.layers.bptt_gru import BPTTGRU
from keras_bptt.layers.bptt_lstm import BPTTLSTM
from keras_bptt.layers.bptt_rnn import BPTTRNN
from keras_bptt.layers.memory_bias import GRUMemoryBias, LSTMMemoryBias
from keras_bptt.truncation import RandomizedTruncation, Truncation

__version__ = "0.1.0"

__all__ = [
    "AdaptiveTruncation",
    "BPTT",
    "BPTTGRU",
    "BPTTLSTM",
    "BPTTRNN",
    "GRUMemoryBias",
    "GradientFlow",
    "GradientFlowLogger",
    "LSTMMemoryBias",
    "LayerFlow",
    "RandomizedTruncation",
    "Truncation",
    "convert",
    "gradient_flow",
]
