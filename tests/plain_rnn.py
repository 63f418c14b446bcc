"""The recurrence of a plain RNN with its tensors one by one, as the checks want it."""

import tensorflow as tf

from keras_bptt.cells.simple_rnn import SimpleRNN
from keras_bptt.engine import options as static
from keras_bptt.engine import recurrence as engine


def Recurrence(activation, **options):
    """The options of a recurrence of a plain RNN with this activation."""
    return static.Options(SimpleRNN(activation), **options)


def Constants(mask=None, d=None, r=None, factors=None):
    """The constants, of which d and r are factors of dropout."""
    return static.Constants(mask, (d, r), factors)


def arguments_of(x, W, U, h_0, b=None, V=None, c=None):
    """The tensors in their places."""
    weights = (W, U) if b is None else (W, U, b)
    output_layer = tuple(t for t in (V, c) if t is not None)
    return static.Arguments(x, weights, (h_0,), output_layer)


@tf.autograph.experimental.do_not_convert
def recurrence(options, constants, *tensors, **named):
    """(y, h_T) of `arguments_of` the tensors."""
    arguments = arguments_of(*tensors, **named)
    y, (state,) = engine.recurrence(options, constants, arguments)
    return y, state
