"""Recurrent networks trained with explicit backpropagation through time, in Keras."""

from keras_bptt.layers import BPTTRNN

__version__ = "0.1.0"

__all__ = ["BPTTRNN"]
