"""BPTTLSTM: the LSTM, in the place of keras.layers.LSTM."""

import functools

import keras

from keras_bptt.cells.lstm import LSTM
from keras_bptt.layers import arguments
from keras_bptt.layers.compiled_step import compiled_step
from keras_bptt.layers.explicit_loop import ExplicitLoop, signature_of
from keras_bptt.layers.memory_bias import check_memory_bias
from keras_bptt.layers.own_step import OwnStep


@keras.saving.register_keras_serializable(package="keras_bptt")
class BPTTLSTM(OwnStep, ExplicitLoop, keras.layers.LSTM):
    """LSTM whose gradient is explicit backpropagation through time.

    Use it wherever `keras.layers.LSTM` stands: it takes the same arguments, has the same
    weights and gives the same outputs and gradients. The gradient is laid out as BPTT
    instead of being left to automatic differentiation of a `while` loop: on a CPU a
    training step is faster and takes less memory. It also has what `BPTTRNN` has:
    truncation, checkpoints, clipping inside the recursion, an output layer, derivatives of
    every order. On an NVIDIA GPU `keras.layers.LSTM` runs cuDNN, where its arguments allow
    it, and this layer does not; which of the two is faster there has not been measured.

    Time: one matrix product of size (batch, units) x (units, 4 units) per step and
    direction; the projection of the inputs and every weight gradient are large products
    over blocks of steps. In training the recurrence is compiled by XLA, as in `BPTTRNN`.
    Memory between the passes: h_t, c_t and the four gates, 6 units numbers per step and
    example; with `checkpoint_every` = c the states of every c-th step, and the rest of one
    block of c steps at a time, for one more forward pass. The gradients of weights are
    added up in float32, also in half precision.

    Forward, for t = 1 ... T, in row vectors, with `x_t`, `W`, `U`, `b`, `h_0`, `c_0` = a
    step of `inputs`, `kernel`, `recurrent_kernel`, `bias`, `initial_state`, sigma =
    `recurrent_activation` and f = `activation`; z_i, z_f, z_g and z_o are the quarters of
    z_t, in this order, and products * are by element:

        z_t = x_t W + h_{t-1} U + b
        i_t = sigma(z_i)    f_t = sigma(z_f)    g_t = f(z_g)    o_t = sigma(z_o)
        c_t = f_t * c_{t-1} + i_t * g_t
        h_t = o_t * f(c_t)

    Backward, for t = T ... 1, with e_t = dL/dh_t through the outputs of step t alone (the
    cotangent), a_t = dL/dh_t and v_t = dL/dc_t in full (the adjoints), delta_t = dL/dz_t
    of the quarters delta_i, delta_f, delta_g and delta_o, and delta_{T+1} = 0:

        a_t     = e_t + delta_{t+1} U^T
        v_t     = v_{t+1} * f_{t+1} + a_t * o_t * f'(c_t)
        delta_i = v_t * g_t * sigma'(z_i)       delta_f = v_t * c_{t-1} * sigma'(z_f)
        delta_g = v_t * i_t * f'(z_g)           delta_o = a_t * f(c_t) * sigma'(z_o)
        dL/dW = sum_t x_t^T delta_t     dL/dU = sum_t h_{t-1}^T delta_t
        dL/db = sum_t delta_t           dL/dx_t = delta_t W^T
        dL/dh_0 = delta_1 U^T           dL/dc_0 = v_1 * f_1

    They are compiled from the forward step, and the tests compare them with
    `reference.lstm_gradients`. Along c alone v_t goes back with a factor f_t a step, and no
    matrix: that is what forget gates near 1 are for (`docs/gated.md`).

    Args:
        units: Positive integer, the size of h_t and of c_t.
        activation: f. A name, a function of a (batch, units) tensor, which may mix units,
            or None for linear. Default: `"tanh"`.
        recurrent_activation: sigma, likewise. Default: `"sigmoid"`.
        **kwargs: Every other argument of `keras.layers.LSTM`, with the same place, meaning
            and default: `use_bias`, `kernel_initializer`, `recurrent_initializer`,
            `bias_initializer`, `unit_forget_bias`, the regularizers and constraints of the
            three weights, `activity_regularizer`, `dropout`, `recurrent_dropout` (with it
            each gate has factors of its own, as in Keras), `seed`, `return_sequences`,
            `return_state`, `go_backwards`, `stateful`, `zero_output_for_mask`, `name`,
            `dtype`. `unroll`, which may also be a positive integer, as in `BPTTRNN`. And
            `use_cudnn`: `"auto"` and False mean the same here, True raises.
        truncation, checkpoint_every, jit_compile: As in `BPTTRNN`.
        adjoint_clipnorm, adjoint_max_growth: As in `BPTTRNN`; what is clipped is the
            adjoint of both states together, (a_t, v_{t+1} * f_{t+1}), of each example.
        output_units, output_activation: As in `BPTTRNN`.

    Call arguments:
        sequences: The inputs, (batch, timesteps, features). Integers are promoted.
        initial_state: A list [h_0, c_0] of tensors (batch, units). Default: zeros, or the
            last states where the layer is `stateful`.
        mask: Boolean (batch, timesteps), False at steps to skip: h and c stay.
        training: Whether dropout is applied, what the way back needs is kept and, by
            default, the recurrence is compiled.

    Input shape:
        (batch, timesteps, features). `timesteps` and `batch` may vary from call to call.

    Output shape:
        - With `return_sequences`: (batch, timesteps, units), else (batch, units); of an
          output layer `output_units` in place of units.
        - With `return_state`: that, and the last h_T and c_T, each (batch, units).

    Raises:
        ValueError: for `use_cudnn=True`; for an activation that changes the shape or dtype
            of its input, mixes the examples of a batch or draws random numbers; and as
            `BPTTRNN` does, for arguments, inputs, states and masks out of their range.

    Example:

    >>> import numpy as np
    >>> layer = BPTTLSTM(4, return_sequences=True, return_state=True, truncation=20)
    >>> sequence, h, c = layer(np.ones((2, 100, 3), "float32"))
    >>> sequence.shape, h.shape, c.shape
    (TensorShape([2, 100, 4]), TensorShape([2, 4]), TensorShape([2, 4]))

    References:
        - Hochreiter & Schmidhuber, Long short-term memory, 1997.
        - Gers, Schmidhuber & Cummins, Learning to forget: continual prediction with LSTM,
          2000: the forget gate.
        - Graves & Schmidhuber, Framewise phoneme classification with bidirectional LSTM and
          other neural network architectures, 2005: the gradient in full.
        - Gal & Ghahramani, A theoretically grounded application of dropout in recurrent
          neural networks, 2016 (arXiv 1512.05287): factors of each gate, for all steps.
    """

    cell_class = keras.layers.LSTMCell

    def __init__(self, units, *args, **kwargs):
        args, kwargs = arguments.without_cudnn(
            keras.layers.LSTM, units, *args, **kwargs
        )
        super().__init__(*args, **kwargs)
        check_memory_bias(self.cell)

    __init__.__signature__ = signature_of(keras.layers.LSTM)

    def _step(self, sequences, states, training):
        functions = self.cell.activation, self.cell.recurrent_activation
        equations = functools.partial(LSTM, *functions)
        return compiled_step(self.cell, equations, sequences, states, training)
