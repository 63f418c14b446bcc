"""BPTT(cell): any cell in a layer whose gradient is explicit."""

import keras
import tensorflow as tf

from keras_bptt.cells.derived import xla_compiles
from keras_bptt.cells.plan import plan_of
from keras_bptt.layers import arguments
from keras_bptt.layers.explicit_loop import ExplicitLoop, Step
from keras_bptt.layers.steps import step_of


@keras.saving.register_keras_serializable(package="keras_bptt")
class BPTT(ExplicitLoop, keras.layers.RNN):
    """todo"""

    def __init__(
        self,
        cell,
        *args,
        truncation=None,
        checkpoint_every=None,
        adjoint_clipnorm=None,
        adjoint_max_growth=None,
        output_units=None,
        output_activation=None,
        jit_compile="auto",
        **kwargs,
    ):
        output_units = arguments.output_units_of(output_units, output_activation)
        try:
            super().__init__(cell, *args, **kwargs)
        except ValueError as error:
            raise arguments.misspelled(error, kwargs, BPTT.__init__) from None
        self._set_options(
            truncation=truncation,
            checkpoint_every=checkpoint_every,
            adjoint_clipnorm=adjoint_clipnorm,
            adjoint_max_growth=adjoint_max_growth,
            jit_compile=jit_compile,
        )
        self._set_output_layer(output_units, output_activation)

    # For help() and completion: the arguments of the host, whatever its version, and ours.
    __init__.__signature__ = arguments.joined_signature(
        __init__, keras.layers.RNN.__init__
    )

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
        """What was found of the cell's step: which part computes what, and how often.

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
            cell, _, _ = step_of(self.cell, x, states, training=False)
        return plan_of(self.cell.name, cell)

    def _step(self, sequences, states, training):
        self._dtype_of_inputs = sequences.dtype.name
        cell, weights, noise = step_of(self.cell, sequences, states, training)
        return Step(cell, weights, noise, lambda: xla_compiles(cell))
