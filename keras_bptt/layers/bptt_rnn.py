"""BPTTRNN: the plain recurrent network, in the place of keras.layers.SimpleRNN."""

import keras

from keras_bptt.cells.activations import resolve, xla_compiles
from keras_bptt.cells.insides import Inside
from keras_bptt.cells.simple_rnn import SimpleRNN
from keras_bptt.layers.explicit_loop import ExplicitLoop, Step, signature_of
from keras_bptt.layers.host_cell import weights_of
from keras_bptt.layers.own_step import OwnStep
from keras_bptt.layers.weights import stored


@keras.saving.register_keras_serializable(package="keras_bptt")
class BPTTRNN(OwnStep, ExplicitLoop, keras.layers.SimpleRNN):
    """Fully-connected RNN whose gradient is explicit backpropagation through time.

    Use it wherever `keras.layers.SimpleRNN` stands: it takes the same arguments, has the
    same weights and gives the same outputs and gradients. The gradient is written out
    instead of being left to automatic differentiation of a `while` loop. Time: one matrix
    product of size (batch, units) x (units, units) per step and direction; the input
    projection and every weight gradient are large products over blocks of steps. In
    training the recurrence is compiled by XLA, also where the caller compiles nothing, and
    on a CPU it may run for parts of the batch at the same time. Memory
    between the passes: the states, (timesteps, batch, units), and nothing else. With
    `training=False` states are not stored unless they are the outputs; a gradient then
    costs one more forward pass. So pass `training=True` in a training loop of your own.
    With `checkpoint_every` = c, the states of every c-th step, and while a block of c steps
    is walked back those of the block, computed again: about timesteps / c + c states, least
    with c = "sqrt", for one more forward pass (Chen et al. 2016). The gradients of weights
    are added up in float32, also in half precision; a_t stays in the compute dtype.

    Forward, for t = 1 ... T, in row vectors, with `x_t`, `h_t`, `W`, `U`, `b`, `h_0` =
    a step of `inputs`, the hidden state, `kernel`, `recurrent_kernel`, `bias`,
    `initial_state`, and f = `activation`:

        z_t = x_t W + h_{t-1} U + b
        h_t = f(z_t)

    Backward, for t = T ... 1, with e_t = dL/dh_t through the outputs of step t alone (the
    cotangent) and delta_{T+1} = 0:

        a_t     = e_t + delta_{t+1} U^T          the adjoint, dL/dh_t in full
        delta_t = a_t * f'(z_t)                  dL/dz_t
        dL/dW = sum_t x_t^T delta_t     dL/dU = sum_t h_{t-1}^T delta_t
        dL/db = sum_t delta_t           dL/dx_t = delta_t W^T    dL/dh_0 = delta_1 U^T

    At a masked step the state stays, h_t = h_{t-1}, and the adjoint passes through;
    `dropout` scales x_t and `recurrent_dropout` scales h_{t-1} in all of the above.

    With `output_units` the layer has an output layer of its own, with `V`, `c` the kernel
    and bias of `layer.output_layer` and g = `output_activation`, and returns o_t, not h_t:

        p_t = h_t V + c     o_t = g(p_t)          q_t = dL/dp_t = J_g(p_t)^T dL/do_t
        e_t = q_t V^T       dL/dV = sum_t h_t^T q_t     dL/dc = sum_t q_t

    It gives what `keras.layers.Dense` would behind the layer (a hidden output is g(c), not
    0), but is computed block by block: neither the sequence of all h_t nor that of all e_t
    is laid out, and with `checkpoint_every` all h_t never exist. J_g is that of Keras' own
    function (for an elementwise g a product with g'; softmax mixes outputs), and losses
    find the logits behind a softmax or sigmoid as they do behind a `Dense`.

    With `truncation` a loss reaches back through a bounded number of steps, in all of the
    gradients alike; `Truncation` and `RandomizedTruncation` define which paths are kept. It
    is computed as it is defined: the backward pass is as many steps long as a window, not
    as the sequence, and where the last output alone is asked for, the states of the last
    window are all that is kept. The outputs never change.

    Where gradients explode, a_t can be clipped at the step where it does (Graves 2013): it
    is scaled by s_t = min(1, r_t / |a_t|) for each example, before it makes delta_t and
    with it all that recurs. Two options set the limit r_t, and the smaller one holds:

        adjoint_clipnorm = r        r_t = r
        adjoint_max_growth = g      r_t = g sum over s >= t of |e_s|

    The second is a pure number: nothing is clipped where no product of Jacobians is larger
    than g, and the size of the batch, the scale of the loss, the dtype and padding make no
    difference. Masked steps are not clipped; windows that overlap clip each for itself; s_t
    is a constant in derivatives of higher order.

    Without these three, gradients are exact with respect to the inputs, the initial state
    and the weights, and have exact derivatives of every order. For most activations f' is
    computed from h_t; for any other function of one unit z_t is computed again. An
    activation that mixes units, such as softmax, is found out when the layer is built, and
    costs one vector-Jacobian product a step. Forward mode
    (`tf.autodiff.ForwardAccumulator`) works around eager code and around a `tf.function`,
    and raises inside one.

    Args:
        units: Positive integer, the size of the hidden state.
        activation: f. A name, a function of a (batch, units) tensor, or None for linear.
            It must give one result for one input, treat each example alone and read no
            trainable variable. Default: `"tanh"`.
        **kwargs: Every other argument of `keras.layers.SimpleRNN`, with the same place,
            meaning and default: `use_bias`, `kernel_initializer`,
            `recurrent_initializer`, `bias_initializer`, the regularizers and
            constraints of the three weights, `activity_regularizer`, `dropout`,
            `recurrent_dropout`, `return_sequences`, `return_state`, `go_backwards`,
            `stateful`, `zero_output_for_mask`, `seed`, `name`, `dtype`. And `unroll`,
            which may also be a positive integer n: n steps an iteration of the loop. Unlike
            True, it allows an unknown number of timesteps. (The attribute `unroll` says
            whether all steps are written into the graph.) With `go_backwards` and
            `return_sequences` the last step comes first, but the mask that goes on to the
            next layer is not reversed, as with SimpleRNN: see `docs/migrating.md`.
        truncation: Which paths of the gradient are kept. None, the default: all, full
            backpropagation through time. A positive integer k: `Truncation(k)`, chunks of
            k steps. A `Truncation(steps, stride)` or a `RandomizedTruncation(mean_steps,
            seed)`; the latter draws where `training` is true.
        checkpoint_every: How many steps there are from one state that the forward pass
            keeps to the next. None, the default: 1. `"sqrt"`: the square root of the number
            of timesteps, rounded up; where a graph is for any number of them, to the next
            power of two. The gradient is the same. For sequences whose states do not fit
            into memory; with `return_sequences` it pays where the output is small, as with
            `output_units`, or is not kept by what follows.
        adjoint_clipnorm: The largest norm of dL/dh_t of one example, or None: no clipping.
            In the units of the cotangents that the layer receives: a mean loss divides
            them by the size of the batch, a `LossScaleOptimizer` multiplies them by its
            scale.
        adjoint_max_growth: A number of at least 1, or None: no clipping. The largest norm
            of dL/dh_t of one example as a multiple of what its losses at step t and later
            send back. 1: a gradient never grows on its way back.
        output_units: Positive integer, the size of the outputs o_t, or None: no output
            layer. Its kernel and bias are made, regularized and constrained as the layer's
            own: `kernel_*`, `bias_*` and `use_bias` hold for both, as the arguments of
            `keras.layers.MultiHeadAttention` do for all of its projections. What is to
            differ is a `Dense` behind the layer, or set after `build`:
            `layer.output_layer.bias.assign(...)`.
        output_activation: g, as `keras.layers.Dense` takes it. Default: linear.
        jit_compile: Whether XLA compiles the recurrence, inside whatever graph the caller
            builds. `"auto"`, the default: where `training` is true, so that no export
            depends on XLA; where XLA can, which an `activation` of Python code may forbid;
            and not with `unroll=True`. True: always. False: never. Compiling takes some
            tenths of a second for a new batch size; inputs of unknown length are walked in
            blocks of one size, so that new lengths compile nothing. Where the caller
            compiles the whole, it changes nothing.

    Call arguments:
        sequences: The inputs, (batch, timesteps, features). Integers are promoted.
        initial_state: A tensor (batch, units), or a list of one. Default: zeros, or the
            last state where the layer is `stateful`.
        mask: Boolean (batch, timesteps), False at steps to skip.
        training: Whether dropout is applied, the states are kept for a gradient and, by
            default, the recurrence is compiled.

    Input shape:
        (batch, timesteps, features). `timesteps` and `batch` may vary from call to call.

    Output shape:
        - With `return_sequences`: (batch, timesteps, units), else (batch, units); of an
          output layer `output_units` in place of units.
        - With `return_state`: that, and the last state (batch, units).

    Raises:
        ImportError: on import, where Keras runs on another backend than TensorFlow.
        ValueError: for `units`, `unroll`, `truncation`, `checkpoint_every`,
            `adjoint_clipnorm`, `adjoint_max_growth`, `output_units` or `jit_compile` out of
            their range, `output_activation` without `output_units`, `adjoint_clipnorm` with
            the compute dtype float16, an activation that breaks its promises, and inputs,
            state or mask of a wrong shape.

    Example:

    >>> import numpy as np
    >>> layer = BPTTRNN(4, return_sequences=True, return_state=True)
    >>> sequence, state = layer(np.ones((2, 7, 3), "float32"))
    >>> sequence.shape, state.shape
    (TensorShape([2, 7, 4]), TensorShape([2, 4]))
    >>> BPTTRNN(4, truncation=20, adjoint_clipnorm=1.0).truncation
    Truncation(steps=20)

    Long sequences of small outputs, in little memory:

    >>> layer = BPTTRNN(
    ...     16,
    ...     return_sequences=True,
    ...     checkpoint_every="sqrt",
    ...     output_units=3,
    ...     output_activation="softmax",
    ... )
    >>> layer(np.ones((2, 1000, 3), "float32")).shape
    TensorShape([2, 1000, 3])

    References:
        - Werbos, Backpropagation through time: what it does and how to do it, 1990.
        - Pascanu, Mikolov & Bengio, On the difficulty of training recurrent neural
          networks, 2013 (arXiv 1211.5063).
        - Williams & Peng, An efficient gradient-based algorithm for on-line training of
          recurrent network trajectories, 1990: truncation.
        - Graves, Generating sequences with recurrent neural networks, 2013 (arXiv
          1308.0850): clipping inside the recursion.
        - Gal & Ghahramani, A theoretically grounded application of dropout in recurrent
          neural networks, 2016 (arXiv 1512.05287): one mask for all steps.
        - Chen, Xu, Zhang & Guestrin, Training deep nets with sublinear memory cost, 2016
          (arXiv 1604.06174): checkpoints.
    """

    cell_class = keras.layers.SimpleRNNCell

    def __init__(self, units, *args, **kwargs):
        super().__init__(units, *args, **kwargs)
        self._resolved_of = None

    __init__.__signature__ = signature_of(keras.layers.SimpleRNN)

    def build(self, sequences_shape, initial_state_shape=None):
        self._resolved()  # first, so that a refused activation leaves no weights behind
        super().build(sequences_shape, initial_state_shape)

    def _step(self, sequences, states, training):
        cell, (h_0,) = self.cell, states
        f, dtype = self._resolved(), cell.compute_dtype
        d = cell.get_dropout_mask(sequences[:, 0, :]) if training else None
        r = cell.get_recurrent_dropout_mask(h_0) if training else None
        return Step(
            SimpleRNN(f),
            stored(cell.dtype_policy, weights_of(cell)),
            (d, r),
            lambda: xla_compiles(f, self.units, dtype),
            insides=self._insides,
            states=("h",),
        )

    def _insides(self, x, before, after, noise):
        del x, before, noise
        return {"units": Inside(self.cell.activation, *after)}

    def _resolved(self):
        """f as the cell has it now, with what a gradient needs of it."""
        key = self.cell.activation, self.units, self.cell.compute_dtype
        if self._resolved_of != key:
            self._activation, self._resolved_of = resolve(*key), key
        return self._activation
