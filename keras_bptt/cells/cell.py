"""The contract between a cell and time: one step, and nothing about the others.

A step takes what comes in and the states before it to the states after it,

    drive = project(x)                     what does not depend on a state
    after, saved = step(drive, before)     one step; what the way back wants beside states

and the way back, from the adjoints a of the states after it (dL/ds in full), is cut in two,

    before's adjoints, deltas = step_back(point, a)      what the step before waits for
    d_weights, d_x = gradients(x, point, deltas)         what nobody waits for

so that the engine computes step by step only what has to be, and all else for many steps
at once, in large products.

States, drive, saved tensors, deltas and weights are flat tuples of tensors. What has rows
has them in front: (batch, ...) for one step, (timesteps, batch, ...) for many, at times
(batch, timesteps, ...) in `project`. A cell acts on each row alone, wherever it stands, so
it may not ask how many axes are in front. Noise, such as dropout factors, is the same at
every step of an example; it comes shaped so that it can be multiplied with rows. Of a cell
that draws random numbers in every step, `project` and `gradients` find these behind it.
"""

import abc
from typing import NamedTuple

import tensorflow as tf

from keras_bptt.runtime.tensors import cast_to


class Shapes(NamedTuple):
    """The shapes of a row of each state, of each saved tensor and of each delta."""

    states: tuple
    saved: tuple
    deltas: tuple


class Cost(NamedTuple):
    """Of one row of a step: multiply-adds that wait for the state, and numbers made."""

    products: int
    numbers: int


class Point(NamedTuple):
    """Where a step is differentiated; what the cell does not want of it is None.

    In `gradients` a state `before` is a list of consecutive pieces of it, (pieces of the
    timesteps, batch, ...): `sum_of_products` takes them as they are, and to join them would
    be a copy.
    """

    drive: tuple | None
    before: tuple | list | None
    after: tuple | None
    saved: tuple | None


class Cell(abc.ABC):
    """One step. Hashable, and equal to another where it computes the same.

    Attributes:
        output: which of the states the layer shows. An output that is no state is one that
            no step reads.
        recurs: for each state whether a step reads it. None: all are read.
        wants: what `step_back` wants of its point beside the states after the step, which
            are there anyway: names of `Point`. A drive is computed again for it.
        keeps_saved: whether `saved` is kept from the forward pass. Else, where it is
            wanted, one call of `step` makes it again for many steps, from the states.
    """

    output = 0
    recurs = None
    wants = frozenset({"before", "saved"})
    keeps_saved = True

    @abc.abstractmethod
    def shapes(self, weights) -> Shapes:
        """The shapes of a row's tensors."""

    @abc.abstractmethod
    def cost(self, weights) -> Cost:
        """What a step costs: it decides how time and the batch are cut."""

    def cast_weights(self, weights, dtype):
        """The weights as the cell computes with them, for states of this dtype."""
        return cast_to(dtype, weights)

    def draw(self, seeds, rows):
        """The random numbers of so many rows, from the seeds of a call."""
        del seeds, rows
        return ()

    @abc.abstractmethod
    def project(self, weights, x, noise):
        """The drive of many steps: what their inputs make of it, in large products."""

    @abc.abstractmethod
    def step(self, weights, drive, before, noise):
        """(after, saved), made of differentiable operations."""

    def weights_back(self, weights):
        """What `step_back` reads of the weights, such as transposes, made once."""
        return weights

    @abc.abstractmethod
    def step_back(self, weights_back, point, adjoints, noise):
        """(the adjoints of the states before, deltas), linear in `adjoints`.

        Made of differentiable operations: derivatives of higher order are theirs.
        """

    @abc.abstractmethod
    def gradients(self, weights, x, point, deltas, noise):
        """(a gradient for each weight, that of x or None), for many steps at once.

        What is added over rows is added and returned in wide numbers (float32 at least).
        Made of differentiable operations, as `step_back` is.
        """

    def point(self, **given) -> Point:
        """What `step_back` wants of that which is given."""
        wanted = {"after", *self.wants}
        return Point(*(given[f] if f in wanted else None for f in Point._fields))

    def check_higher_orders(self):
        """Raise where derivatives of second or higher order would be wrong."""
        return

    def called_with(self, dtype):
        """The same cell, for numbers of another dtype than the one that it was made for."""
        del dtype
        return self

    def recurring(self, states) -> list[tf.Tensor]:
        """Those of the states, or of what belongs to them, that a step reads."""
        flags = self.recurs or [True] * len(states)
        return [s for s, recurs in zip(states, flags, strict=True) if recurs]
