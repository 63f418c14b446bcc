"""Recurrent networks trained with explicit backpropagation through time, in Keras."""

from keras_bptt.layers import BPTTRNN
from keras_bptt.truncation import RandomizedTruncation, Truncation

__version__ = "0.1.0"

__all__ = ["BPTTRNN", "RandomizedTruncation", "Truncation"]
