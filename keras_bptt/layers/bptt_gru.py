"""BPTTGRU: the gated recurrent unit, in the place of keras.layers.GRU."""

import functools

import keras

from keras_bptt.cells.gru import GRU
from keras_bptt.layers import arguments
from keras_bptt.layers.compiled_step import compiled_step
from keras_bptt.layers.explicit_loop import ExplicitLoop, signature_of
from keras_bptt.layers.own_step import OwnStep


@keras.saving.register_keras_serializable(package="keras_bptt")
class BPTTGRU(OwnStep, ExplicitLoop, keras.layers.GRU):
    """Gated recurrent unit whose gradient is explicit backpropagation through time.

    Use it wherever `keras.layers.GRU` stands: it takes the same arguments, has the same
    weights and gives the same outputs and gradients. The gradient is laid out as BPTT
    instead of being left to automatic differentiation of a `while` loop: on a CPU a
    training step is faster and takes less memory. It also has what `BPTTRNN` has:
    truncation, checkpoints, clipping inside the recursion, an output layer, derivatives of
    every order. On an NVIDIA GPU `keras.layers.GRU` runs cuDNN, where its arguments allow
    it, and this layer does not; which of the two is faster there has not been measured.

    Time: one matrix product of size (batch, units) x (units, 3 units) per step and
    direction (with `reset_after=False` two that wait for each other); the projection of the
    inputs and every weight gradient are large products over blocks of steps. In training
    the recurrence is compiled by XLA, as in `BPTTRNN`. Memory between the passes: h_t and
    four numbers a unit per step and example; with `checkpoint_every` = c the states of
    every c-th step, and the rest of one block of c steps at a time, for one more forward
    pass. The gradients of weights are added up in float32, also in half precision.

    Forward, for t = 1 ... T, in row vectors, with `x_t`, `h_t`, `W`, `U`, `h_0` = a step of
    `inputs`, the state, `kernel`, `recurrent_kernel`, `initial_state`, and b, b' the two
    rows of `bias`; sigma = `recurrent_activation`, f = `activation`; the thirds of p_t and
    q_t are p_z, p_r and p_h, and so on, and products * are by element:

        p_t = x_t W + b                         q_t = h_{t-1} U + b'
        z_t = sigma(p_z + q_z)                  r_t = sigma(p_r + q_r)
        g_t = f(p_h + r_t * q_h)                h_t = z_t * h_{t-1} + (1 - z_t) * g_t

    With `reset_after=False` there is one bias b, and g_t = f(p_h + (r_t * h_{t-1}) U_h).

    Backward, for t = T ... 1, with e_t = dL/dh_t through the outputs of step t alone (the
    cotangent), a_t = dL/dh_t in full (the adjoint), delta_t = (delta_z, delta_r, delta_h) =
    dL/dp_t, and dL/dq_t = delta'_t = (delta_z, delta_r, delta_h * r_t):

        delta_z = a_t * (h_{t-1} - g_t) * sigma'(p_z + q_z)
        delta_h = a_t * (1 - z_t) * f'(p_h + r_t * q_h)
        delta_r = delta_h * q_h * sigma'(p_r + q_r)
        a_{t-1} = e_{t-1} + a_t * z_t + delta'_t U^T
        dL/dW = sum_t x_t^T delta_t     dL/dU = sum_t h_{t-1}^T delta'_t
        dL/db = sum_t delta_t           dL/db' = sum_t delta'_t
        dL/dx_t = delta_t W^T           dL/dh_0 = a_0

    They are compiled from the forward step, and the tests compare them with
    `reference.gru_gradients`. Where the update gate z_t is near 1, a_t goes back nearly as
    it is (`docs/gated.md`).

    Args:
        units: Positive integer, the size of the state.
        activation: f. A name, a function of a (batch, units) tensor, which may mix units,
            or None for linear. Default: `"tanh"`.
        recurrent_activation: sigma, likewise. Default: `"sigmoid"`.
        **kwargs: Every other argument of `keras.layers.GRU`, with the same place, meaning
            and default: `use_bias`, `kernel_initializer`, `recurrent_initializer`,
            `bias_initializer`, the regularizers and constraints of the three weights,
            `activity_regularizer`, `dropout`, `recurrent_dropout` (with it each gate has
            factors of its own, as in Keras), `seed`, `return_sequences`, `return_state`,
            `go_backwards`, `stateful`, `reset_after`, `zero_output_for_mask`, `name`,
            `dtype`. `unroll`, which may also be a positive integer, as in `BPTTRNN`. And
            `use_cudnn`: `"auto"` and False mean the same here, True raises.
        truncation, checkpoint_every, adjoint_clipnorm, adjoint_max_growth, jit_compile: As
            in `BPTTRNN`.
        output_units, output_activation: As in `BPTTRNN`.

    Call arguments:
        sequences: The inputs, (batch, timesteps, features). Integers are promoted.
        initial_state: A tensor (batch, units), or a list of one. Default: zeros, or the
            last state where the layer is `stateful`.
        mask: Boolean (batch, timesteps), False at steps to skip: the state stays.
        training: Whether dropout is applied, what the way back needs is kept and, by
            default, the recurrence is compiled.

    Input shape:
        (batch, timesteps, features). `timesteps` and `batch` may vary from call to call.

    Output shape:
        - With `return_sequences`: (batch, timesteps, units), else (batch, units); of an
          output layer `output_units` in place of units.
        - With `return_state`: that, and the last state (batch, units).

    Raises:
        ValueError: for `use_cudnn=True`; for an activation that changes the shape or dtype
            of its input, mixes the examples of a batch or draws random numbers; and as
            `BPTTRNN` does, for arguments, inputs, states and masks out of their range.

    Example:

    >>> import numpy as np
    >>> layer = BPTTGRU(4, return_sequences=True, checkpoint_every="sqrt")
    >>> layer(np.ones((2, 100, 3), "float32")).shape
    TensorShape([2, 100, 4])

    References:
        - Cho et al., Learning phrase representations using RNN encoder-decoder for
          statistical machine translation, 2014 (arXiv 1406.1078).
        - Chung, Gulcehre, Cho & Bengio, Empirical evaluation of gated recurrent neural
          networks on sequence modeling, 2014 (arXiv 1412.3555).
    """

    cell_class = keras.layers.GRUCell

    def __init__(self, units, *args, **kwargs):
        args, kwargs = arguments.without_cudnn(keras.layers.GRU, units, *args, **kwargs)
        super().__init__(*args, **kwargs)

    __init__.__signature__ = signature_of(keras.layers.GRU)

    def _step(self, sequences, states, training):
        cell = self.cell
        functions = cell.activation, cell.recurrent_activation
        equations = functools.partial(GRU, *functions, cell.reset_after)
        return compiled_step(cell, equations, sequences, states, training)
