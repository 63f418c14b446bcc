"""What BPTTRNN, BPTTLSTM and BPTTGRU have in common: the step is the package's own.

The weights are those of the cell, which is Keras' own and is never called.
"""

import keras

from keras_bptt.layers import arguments
from keras_bptt.layers.calls import checked_inputs
from keras_bptt.layers.host_cell import check_cell, name_convert


class OwnStep:
    """An `ExplicitLoop` with the weights of a `cell_class`, and a step of its own."""

    cell_class: type

    def __init__(self, units, *args, **kwargs):
        super().__init__(arguments.units_of(units), *args, **kwargs)
        name_convert(self)

    @property
    def _rows(self):
        return tuple((size,) for size in keras.tree.flatten(self.cell.state_size))

    def build(self, sequences_shape, initial_state_shape=None):
        self._check_inputs(sequences_shape, building=True)
        check_cell(self)
        super().build(sequences_shape, initial_state_shape)

    def compute_output_shape(self, sequences_shape, initial_state_shape=None):
        self._check_inputs(sequences_shape)  # symbolic inputs come here, not to `call`
        return super().compute_output_shape(sequences_shape, initial_state_shape)

    def call(self, sequences, initial_state=None, mask=None, training=False):
        check_cell(self)
        sequences = checked_inputs(self.name, sequences, self.cell.kernel.shape[0])
        if initial_state is not None:
            arguments.check_states(
                self.name,
                sequences.shape,
                self._rows,
                keras.tree.flatten(initial_state),
            )
        return super().call(
            sequences, initial_state=initial_state, mask=mask, training=training
        )

    def _check_inputs(self, shape, building=False):
        features = self.cell.kernel.shape[0] if self.built else None
        arguments.check_inputs(self.name, shape, features, building)
