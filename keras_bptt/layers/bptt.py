"""BPTT(cell): any cell in a layer whose gradient is explicit."""

import keras

from keras_bptt.cells.derived import xla_compiles
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

    def _step(self, sequences, states, training):
        cell, weights, noise = step_of(self.cell, sequences, states, training)
        return Step(cell, weights, noise, lambda: xla_compiles(cell))
