"""BPTT(cell): any cell in a layer whose gradient is explicit."""

import keras
import tensorflow as tf

from keras_bptt.cells.derived import xla_compiles
from keras_bptt.cells.plan import plan_of
from keras_bptt.layers import arguments
from keras_bptt.layers.explicit_loop import ExplicitLoop, Step, signature_of
from keras_bptt.layers.steps import step_of


@keras.saving.register_keras_serializable(package="keras_bptt")
class BPTT(ExplicitLoop, keras.layers.RNN):
    """A recurrent layer around any cell, whose gradient is explicit.

    Use it wherever `keras.layers.RNN` stands: it takes the same cells and arguments, has
    the same weights and gives the same outputs and gradients. From the one step that the
    cell's `call` computes, the layer compiles backpropagation through time: what has to be
    done step by step runs in two loops, all else as large products over many steps. It also
    has what `BPTTRNN` has: truncation, checkpoints, clipping inside the recursion, an
    output layer, derivatives of every order. For the plain RNN take `BPTTRNN`, whose
    gradient is written out.

    Forward, for t = 1 ... T, with s_t the states after step t, y_t its output and w the
    weights that the step reads:

        y_t, s_t = cell(x_t, s_{t-1}; w)

    Backward, for t = T ... 1, with e_t = dL/ds_t through y_t and the returned states alone
    (the cotangent), J_t = ds_t / ds_{t-1}, and a_{T+1} = 0:

        a_t   = e_t + J_{t+1}^T a_{t+1}              the adjoint, dL/ds_t in full
        dL/dw = sum_t (ds_t / dw)^T a_t
        dL/dx_t = (ds_t / dx_t)^T a_t                dL/ds_0 = J_1^T a_1

    The step and its vector-Jacobian product are traced once, as one graph, and divided by
    what its tensors depend on:

        project    on x alone             for all steps at once
        step       on the states too      step by step
        step_back  on a, towards s        step by step, from the last one
        gradients  on a, towards x and w  for all steps at once

    Between the two passes the states are kept, and what of a step costs much (a product, a
    tanh); the choice is a smallest cut of the graph. Of `keras.layers.LSTMCell` that is the
    activated gates, 4 numbers a unit; one delta leads to one product for each weight, as it
    is written by hand. `layer.plan()` says what was found of a cell. Gradients of weights
    are added in float32 at least.

    The first call of a cell traces it, tries it with random numbers, and compiles the
    loops: one to three seconds, once for all cells that compute the same. An eager call
    traces the step again (some hundredths of a second), so that a changed attribute of the
    cell is seen; a `tf.function` goes on with what it has traced.

    Args:
        cell: A cell as `keras.layers.RNN` takes it, a list of them, or a
            `keras.layers.StackedRNNCells`: a layer whose `call(inputs, states)` returns
            the output and the states after it, with `state_size`. States may have any
            number and shape, and the output need not be one of them. Its `call` may hold
            what a `tf.function` may hold. It must treat each example alone and change no
            variable. What it draws by functions of `keras.random`, of the shape of a state
            and from a `keras.random.SeedGenerator` of its own, is new in every step;
            dropout factors as `keras.layers.LSTMCell` has them, the same for all steps, are
            drawn as Keras draws them. In a step a loop of its own is computed again for
            the way back, and not compiled. A
            `tf.custom_gradient` in it counts; where it is another gradient than that of
            what is computed, derivatives of second order raise NotImplementedError.
            Several cells are one step and one loop. A layer for each cell is faster: it
            multiplies the inputs of all steps at once.
        **kwargs: Every other argument of `keras.layers.RNN`, with the same place, meaning
            and default: `return_sequences`, `return_state`, `go_backwards`, `stateful`,
            `zero_output_for_mask`, `name`, `dtype`. And `unroll`, which may also be a
            positive integer, as in `BPTTRNN`.
        truncation, checkpoint_every, adjoint_clipnorm, adjoint_max_growth, jit_compile: As
            in `BPTTRNN`. a_t of the two clips is the adjoint of all states that a step
            reads. With a stack of cells it is that of all their states.
        output_units, output_activation: As in `BPTTRNN`. The kernel and bias of the output
            layer have the initializers, regularizers and constraints of the cell where it
            has some, else those of `keras.layers.Dense`. The outputs of the cell must be
            (batch, units).

    Call arguments:
        sequences: The inputs, (batch, timesteps, ...), of whatever the cell takes. Integers
            stay integers.
        initial_state: The states, as the cell takes them. Default: what its
            `get_initial_state` returns, else zeros, or the last ones where the layer is
            `stateful`.
        mask: Boolean (batch, timesteps), False at steps to skip: states and output stay.
        training: Passed to the cell. Where true, the states are kept for a gradient and, by
            default, the loops are compiled.

    Input shape:
        (batch, timesteps, ...). `timesteps` and `batch` may vary from call to call.

    Output shape:
        - With `return_sequences`: (batch, timesteps, ...), else (batch, ...).
        - With `return_state`: that, and the last states.

    Raises:
        ValueError: at the first trace, for a cell that mixes the examples of a batch, whose
            numbers depend on how many there are, that changes a variable, draws random
            numbers which are not each step's and example's own, holds a py_function, or
            returns states of another shape or dtype than it takes; and as `BPTTRNN` does,
            for arguments out of their range.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> @keras.saving.register_keras_serializable("docs")
    ... class LeakyCell(keras.layers.Layer):
    ...     '''A rate network whose time constants are learned.'''
    ...
    ...     def __init__(self, units, **kwargs):
    ...         super().__init__(**kwargs)
    ...         self.units = self.state_size = units
    ...
    ...     def build(self, shape):
    ...         self.W = self.add_weight(shape=(shape[-1], self.units))
    ...         self.U = self.add_weight(shape=(self.units, self.units))
    ...         self.tau = self.add_weight(shape=(self.units,))
    ...
    ...     def call(self, x, states):
    ...         leak = keras.ops.sigmoid(self.tau)
    ...         z = keras.ops.tanh(x @ self.W + states[0] @ self.U)
    ...         h = (1 - leak) * states[0] + leak * z
    ...         return h, [h]
    ...
    ...     def get_config(self):
    ...         return super().get_config() | {"units": self.units}
    >>> layer = BPTT(LeakyCell(4, name="leaky"), return_sequences=True, truncation=20)
    >>> layer(np.ones((2, 100, 3), "float32")).shape
    TensorShape([2, 100, 4])
    >>> layer.plan().saved  # of a step, beside its state
    4

    References:
        - Werbos, Backpropagation through time: what it does and how to do it, 1990.
        - Bergstra et al., Theano: a CPU and GPU math compiler in Python, 2010, whose scan
          moves products out of loops.
        - Appleyard, Kocisky & Blunsom, Optimizing performance of recurrent neural networks
          on GPUs, 2016 (arXiv 1604.01946): one product over all steps.
    """

    _keeps_integers = True

    def __init__(self, cell, *args, **kwargs):
        super().__init__(cell, *args, **kwargs)

    __init__.__signature__ = signature_of(keras.layers.RNN)

    def build(self, sequences_shape, initial_state_shape=None):
        arguments.check_features(self.name, sequences_shape)
        super().build(sequences_shape, initial_state_shape)
        with keras.StatelessScope():  # draws, if any, are those of a call
            states = keras.tree.flatten(self.get_initial_state(batch_size=1))
        self._rows = tuple(tuple(state.shape[1:]) for state in states)
        self._features = tuple(sequences_shape[2:])
        self._dtype_of_inputs = self.cell.compute_dtype

    def call(self, sequences, initial_state=None, mask=None, training=False):
        arguments.check_dense(self.name, sequences)
        sequences = arguments.with_shape(self.name, sequences, self._features)
        if initial_state is not None:
            initial_state = self._checked_states(sequences, initial_state)
        return super().call(
            sequences, initial_state=initial_state, mask=mask, training=training
        )

    def _checked_states(self, sequences, initial_state):
        states = keras.tree.flatten(initial_state)
        arguments.check_states(self.name, sequences.shape, self._rows, states)
        states = [
            tf.ensure_shape(state, (None, *row))
            for state, row in zip(states, self._rows, strict=True)
        ]
        with keras.StatelessScope():
            structure = self.get_initial_state(batch_size=1)
        return keras.tree.pack_sequence_as(structure, states)

    def plan(self):
        """What was found of the cell's step in training: what is computed where.

        Returns:
            A `Plan`; print it. Its attributes are the numbers.

        Raises:
            ValueError: for a layer that is not built.
        """
        if not self.built:
            raise ValueError(
                f"{self.name} must be built before its plan is known. Received: a layer "
                "that is not. Call it once, or `build` it with the shape of its inputs."
            )
        with keras.StatelessScope():
            x = tf.zeros([1, 1, *self._features], self._dtype_of_inputs)
            states = self.get_initial_state(batch_size=1)
            try:
                cell, *_ = step_of(self.cell, x, states, training=True)
            finally:
                self._maybe_reset_dropout_masks(self.cell)
        return plan_of(self.cell.name, cell)

    def _step(self, sequences, states, training):
        self._dtype_of_inputs = sequences.dtype.name
        found = step_of(self.cell, sequences, states, training)
        cell, weights, noise, seeds = found
        return Step(cell, weights, noise, lambda: xla_compiles(cell), seeds)
