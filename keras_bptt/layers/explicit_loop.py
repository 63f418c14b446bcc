"""What the layers have in common: their loop over time is the engine's.

Keras' recurrent layers call `inner_loop` with inputs, states and mask. Here it gathers what
the engine takes. Which cell it is, the layer says in `_step`.
"""

from collections.abc import Callable
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_bptt.cells.cell import Cell
from keras_bptt.engine.draws import draws_of
from keras_bptt.engine.options import Arguments, Constants, Options
from keras_bptt.engine.recurrence import recurrence
from keras_bptt.layers import arguments
from keras_bptt.layers.calls import compiles, drawn_factors, mask_of, state_of
from keras_bptt.layers.observing import observed_or
from keras_bptt.layers.options import GradientOptions
from keras_bptt.layers.output_layer import (
    config_of,
    is_product,
    output_layer,
    weights_of,
)
from keras_bptt.runtime.tensors import size_of
from keras_bptt.truncation import RandomizedTruncation

if keras.config.backend() != "tensorflow":
    raise ImportError(
        "keras_bptt needs the TensorFlow backend of Keras: its gradient is a "
        f"tf.custom_gradient. Received: backend {keras.config.backend()!r}. Set the "
        "environment variable KERAS_BACKEND=tensorflow before keras is imported."
    )


def signature_of(host):
    """For help() and completion: the arguments of the host, whatever its version, and ours.

    `host` is the layer of Keras in whose place a layer stands.
    """
    return arguments.joined_signature(ExplicitLoop.__init__, host.__init__)


def _nothing_known(x, before, after, noise):
    del x, before, after, noise
    return {}


class Step(NamedTuple):
    """What a layer repeats over time, in one call.

    Attributes:
        cell: the engine's.
        weights: its weights, as they are stored.
        noise: what it has of each example at all steps, such as dropout factors.
        xla_compiles: says whether XLA can compile it.
        seeds: from which it draws random numbers in every step of this call.
        insides: a function of many rows (x, the states before, the states after, noise)
            that returns what is known of the inside of their steps, by name.
        states: the letters of the states in its equations; none of any cell.
    """

    cell: Cell
    weights: list
    noise: tuple
    xla_compiles: Callable
    seeds: tuple = ()
    insides: Callable = _nothing_known
    states: tuple = ()


class ExplicitLoop(GradientOptions):
    """A recurrent layer of Keras whose loop over time is the engine's.

    A layer has `_rows`, the shapes of a row of each state.
    """

    _keeps_integers = False  # else inputs that are integers are promoted

    def __init__(
        self,
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
            super().__init__(*args, **kwargs)
        except ValueError as error:
            ours = [
                c for c in type(self).__mro__ if c.__module__.startswith(__package__)
            ]
            raise arguments.misspelled(error, kwargs, ours[0]) from None
        self.truncation, self.checkpoint_every = truncation, checkpoint_every
        self.adjoint_clipnorm = adjoint_clipnorm
        self.adjoint_max_growth = adjoint_max_growth
        self.jit_compile = jit_compile
        # `build` and `call` check shapes and say more than an InputSpec would.
        self.input_spec = None
        self.output_layer = None
        if output_units is not None:
            self.output_layer = output_layer(
                self.cell, output_units, output_activation, self.dtype_policy
            )

    @property
    def output_units(self):
        """The size of the outputs o_t, or None: there is no output layer."""
        return None if self.output_layer is None else self.output_layer.units

    @property
    def output_activation(self):
        """g, or None: there is no output layer. `layer.output_layer` may get another."""
        return None if self.output_layer is None else self.output_layer.activation

    def get_config(self):
        config = super().get_config()
        if self.output_layer is not None:
            config |= config_of(self.output_layer, self.dtype_policy)
        return config

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        dtype = config.pop("output_dtype", None)
        layer = super().from_config(config)
        if dtype is not None:
            layer.output_layer.dtype_policy = keras.dtype_policies.get(dtype)
        return layer

    def build(self, sequences_shape, initial_state_shape=None):
        super().build(sequences_shape, initial_state_shape)
        if self.output_layer is not None and not self.output_layer.built:
            shape = super().compute_output_shape(sequences_shape)
            shape = shape[0] if self.return_state else shape
            self.output_layer.build((None, shape[-1]))

    def compute_output_shape(self, sequences_shape, initial_state_shape=None):
        shapes = super().compute_output_shape(sequences_shape, initial_state_shape)
        if self.output_layer is None:
            return shapes
        if self.return_state:
            return (*shapes[0][:-1], self.output_units), *shapes[1:]
        return *shapes[:-1], self.output_units

    def call(self, sequences, initial_state=None, mask=None, training=False):
        arguments.check_mask(self.name, sequences.shape, mask)
        try:
            return super().call(
                sequences, initial_state=initial_state, mask=mask, training=training
            )
        finally:
            # Keras resets them only if nothing raises, else the next call would use them.
            self._maybe_reset_dropout_masks(self.cell)

    def _step(self, sequences, states, training) -> Step:
        """What is repeated, given the inputs of all steps and the initial states."""
        raise NotImplementedError

    def inner_loop(self, sequences, initial_state, mask, training=False):
        every, g = self.checkpoint_every, self.output_layer
        dtype = self.cell.compute_dtype
        # What `call` could not check, a size known at run time only, raises here.
        states = keras.tree.flatten(initial_state)
        states = keras.tree.pack_sequence_as(
            initial_state,
            [
                state_of(state, sequences, row)
                for state, row in zip(states, self._rows, strict=True)
            ],
        )
        if sequences.dtype.is_floating or not self._keeps_integers:
            sequences = tf.cast(sequences, dtype)
        step = self._step(sequences, states, training)
        randomized, factors = isinstance(self.truncation, RandomizedTruncation), None
        if randomized and training:
            drawn = self.truncation, self._truncation_draws
            factors = drawn_factors(*drawn, sequences, dtype)
        xla = compiles(self.jit_compile, training, self.unroll, step.xla_compiles)
        options = Options(
            step.cell,
            return_sequences=self.return_sequences,
            zero_output_for_mask=self.zero_output_for_mask,
            go_backwards=self.go_backwards,
            unroll=self._unroll,
            keep_states=bool(training),
            jit_compile=xla,
            truncation=None if randomized else self.truncation,
            # Every state: what is kept anyway.
            checkpoint_every=None if every == 1 else every,
            adjoint_clipnorm=arguments.clipnorm_of(self.adjoint_clipnorm, dtype),
            adjoint_max_growth=self.adjoint_max_growth,
        )
        batch = size_of(sequences, 0)
        draws = draws_of(step.seeds, batch)
        constants = Constants(
            mask_of(mask, sequences), tuple(step.noise), factors, draws
        )
        product = is_product(g, dtype)
        output_weights = weights_of(self.cell, g) if product else ()
        flat = keras.tree.flatten(states)
        # An output that is no state is one that nothing reads.
        shapes = step.cell.shapes(step.weights).states[len(flat) :]
        more = [tf.zeros([batch, *shape], flat[0].dtype) for shape in shapes]
        given = Arguments(
            sequences, tuple(step.weights), (*flat, *more), tuple(output_weights)
        )
        run = observed_or(recurrence, self, step)
        y, after = run(options, constants, given)
        if g is not None:
            # Keras' function, as it is: losses look for the logits behind a softmax.
            y = g.activation(y) if product else g(y)
        after = keras.tree.pack_sequence_as(states, after[: len(flat)])
        if not self.return_sequences:
            return y, y[:, None], after
        return y[:, -1], y, after
