"""A model, run once and eagerly, whose layers are observed: what they were given.

Under a tape, which gives the cotangents that each call of a layer receives.
"""

from typing import NamedTuple

import keras
import tensorflow as tf

from keras_bptt.engine.recurrence import recurrence
from keras_bptt.layers.observing import observed
from keras_bptt.runtime.tensors import mapped

# From so many steps on XLA's loops save more than it takes to compile them.
LONG = 1000


class Call(NamedTuple):
    """One call of a layer: what it was given, and what its loss sends back to it."""

    layer: keras.Layer
    step: object
    options: object
    constants: object
    arguments: tuple
    outputs: tuple


class Recorder:
    """Keeps the recurrences of the layers that are wanted, and watches their outputs."""

    def __init__(self, tape, wanted):
        self.tape, self.wanted = tape, wanted
        self.calls, self.seen = [], []

    def __call__(self, layer, step, options, constants, arguments):
        self.seen.append(layer.name)
        if not self.wanted(layer):
            return recurrence(options, constants, arguments)
        if not tf.executing_eagerly():
            raise ValueError(
                f"The gradient flow of a layer is measured where the model calls it "
                f"eagerly. Received: {layer.name}, called inside a tf.function. Take the "
                "tf.function, or the tf.map_fn, off the model for the measurement."
            )
        # Compiled where the loops are long: for a single run of others it would not pay.
        xla = arguments.x.shape[1] >= LONG and layer.jit_compile is not False
        xla = xla and step.xla_compiles()
        options = options.but(keep_states=True, unroll=False, jit_compile=xla)
        outputs = recurrence(options, constants, arguments)
        # The output and the state may be one tensor, which would have both cotangents.
        outputs = tf.nest.map_structure(tf.identity, outputs)
        self.tape.watch(tf.nest.flatten(outputs))
        arguments = mapped(tf.stop_gradient, arguments)
        self.calls.append(Call(layer, step, options, constants, arguments, outputs))
        return outputs


class Run(NamedTuple):
    """A model, run: the calls of the layers that are wanted, and the names of all."""

    calls: list
    seen: list
    loss: float
    tape: tf.GradientTape
    value: tf.Tensor

    def cotangents(self, scale):
        """Of the outputs of each call, where the loss is multiplied by the scale."""
        return self.tape.gradient(
            self.value,
            [call.outputs for call in self.calls],
            tf.fill(tf.shape(self.value), tf.cast(scale, self.value.dtype)),
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )


def run(model, x, loss, wanted, training):
    """Run the model and `loss(y_pred)`; observe the layers that are wanted.

    The state of the model stays as it is: what stateful layers, batch normalisation, seeds
    and metrics would assign goes to the scope, and with it.
    """
    scope = keras.StatelessScope(collect_losses=True)
    # Of the outputs of these layers alone: what lies before them needs no gradient.
    tape = tf.GradientTape(persistent=True, watch_accessed_variables=False)
    with tape, scope:
        recorder = Recorder(tape, wanted)
        with observed(recorder):
            value = tf.convert_to_tensor(loss(model(x, training=training)))
    return Run(recorder.calls, recorder.seen, float(tf.reduce_sum(value)), tape, value)
