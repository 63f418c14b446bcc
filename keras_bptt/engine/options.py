"""What a recurrence is asked for: static options, constant tensors, differentiable ones."""

import dataclasses
from typing import NamedTuple

import tensorflow as tf

from keras_bptt.cells.cell import Cell
from keras_bptt.truncation import Truncation


@dataclasses.dataclass(frozen=True)
class Options:
    """Static options, named as in Keras where Keras has them.

    Attributes:
        cell: the step that is repeated.
        keep_states: store what the backward pass needs of the states, where the outputs do
            not tell it. If false, a backward pass computes the states again.
        unroll: True: write every step into the graph. An integer: so many steps in an
            iteration of the loop.
        jit_compile: whether XLA compiles the two passes.
        checkpoint_every: after how many steps a state is kept, an integer or "sqrt". None:
            all are.
        adjoint_clipnorm, adjoint_max_growth: the limits of an adjoint; see `clipping`.
        observed: whether the backward pass also returns every adjoint and delta.
    """

    cell: Cell
    return_sequences: bool = False
    zero_output_for_mask: bool = False
    go_backwards: bool = False
    unroll: bool | int = False
    keep_states: bool = True
    jit_compile: bool = False
    truncation: Truncation | None = None
    checkpoint_every: int | str | None = None
    adjoint_clipnorm: float | None = None
    adjoint_max_growth: float | None = None
    observed: bool = False

    def but(self, **changes):
        """The same options with some changed."""
        return dataclasses.replace(self, **changes)

    @property
    def whole(self):
        """The same options without a truncation: of all steps that they are for."""
        return self.but(truncation=None)

    @property
    def clips(self):
        """Whether adjoints have a limit."""
        return (self.adjoint_clipnorm, self.adjoint_max_growth) != (None, None)


class Draws(NamedTuple):
    """The random numbers of all steps, or what they are drawn from.

    All have the batch in front, so that a part of it may be taken. Steps are in the order
    of processing.

    Attributes:
        seeds: of the call, for each example again (batch, seeds, 2).
        example: which one of the whole batch it is (batch,).
        whole: (batch, size of the whole batch, 0), of whose shape XLA knows the numbers.
        start: how many steps there are before the first (batch,); None: none.
        numbers: what was drawn, (batch, timesteps, ...) each; None: nothing yet.
    """

    seeds: tf.Tensor
    example: tf.Tensor
    whole: tf.Tensor
    start: tf.Tensor | None = None
    numbers: tuple | None = None


class Constants(NamedTuple):
    """Tensors without a gradient; what is None is left out of the computation.

    Attributes:
        mask: bool (batch, timesteps), False at steps to skip.
        noise: what the cell has of each example at all of its steps (batch, ...), such as
            dropout factors.
        link_factors: (batch, timesteps), in the order of processing: what the gradient is
            multiplied by where it passes from a step to the one before. Not used where
            that is the initial state, and at masked steps.
        draws: the random numbers of every step, of a cell that draws some.
    """

    mask: tf.Tensor | None = None
    noise: tuple = ()
    link_factors: tf.Tensor | None = None
    draws: Draws | None = None


class Arguments(NamedTuple):
    """Tensors with a gradient.

    Attributes:
        x: inputs (batch, timesteps, ...).
        weights: of the cell. They may be of a wider dtype than the states, as they are
            stored; their gradients then are too.
        states: the initial states, (batch, ...) each.
        output_layer: V (units, outputs) and, if there is one, c (outputs,): the outputs are
            h_t V + c for the state h that the cell shows. Empty: they are h_t.
        zeros: of an observed recurrence one tensor of zeros (batch, timesteps, ...) for
            each state and then for each delta of the cell. Their gradients are the adjoints
            and the deltas, 0 at masked steps.
    """

    x: tf.Tensor
    weights: tuple
    states: tuple
    output_layer: tuple = ()
    zeros: tuple = ()
