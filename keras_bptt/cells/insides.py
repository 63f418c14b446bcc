"""What goes on inside a step and tells about its gradient: gates, and units that squash."""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf


class Inside(NamedTuple):
    """The values of an activation function within a step, for many rows.

    Attributes:
        function: the activation, as the user gave it.
        values: (rows, units), what it returned.
        holds: whether it is the gate that multiplies the state of the step before.
    """

    function: Callable
    values: tf.Tensor
    holds: bool = False
