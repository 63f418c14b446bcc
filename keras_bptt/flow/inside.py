"""What goes on inside the steps of a layer: gates, and units that are saturated."""

from typing import NamedTuple

import keras
import numpy as np

# A unit is saturated where f' is less than a twentieth of its largest value: for tanh where
# |h| > 0.975. A relu is inactive where it is 0.
_SATURATED = 0.05
_OFF = {
    "tanh": lambda y: 1 - y * y < _SATURATED,
    "sigmoid": lambda y: y * (1 - y) < _SATURATED / 4,
    "hard_sigmoid": lambda y: (y <= 0) | (y >= 1),
    "relu": lambda y: y <= 0,
}


class Watched(NamedTuple):
    """What an activation within the steps does, over examples and steps.

    Attributes:
        mean: over the units (examples, timesteps), NaN at masked steps.
        of_unit: over real steps and examples: the sum for each unit, and their number.
        off: the share of units that are saturated or, of a relu, inactive (examples,
            timesteps). None: another activation.
        always_off: which units are so at every step of every example (units,), or None.
        holds: whether it is the gate that multiplies the state of the step before.
    """

    mean: np.ndarray
    of_unit: tuple
    off: np.ndarray | None
    always_off: np.ndarray | None
    holds: bool

    @classmethod
    def joined(cls, several, stacked):
        """Of several calls; `stacked` puts arrays (examples, timesteps) together."""
        mean, of_unit, off, always, holds = zip(*several, strict=True)
        sums, numbers = zip(*of_unit, strict=True)
        return cls(
            stacked(mean),
            (sum(sums), sum(numbers)),
            None if off[0] is None else stacked(off),
            None if off[0] is None else np.all(always, axis=0),
            holds[0],
        )


def watched(function, values, holds, real, in_place):
    """The `Watched` of an activation.

    Args:
        values: (batch, timesteps, units), in packed order.
        real: which of these steps are, or None: all.
        in_place: puts (batch, timesteps) into the order of processing.
    """
    values = values.astype(np.float64).reshape(*values.shape[:2], -1)
    keep = np.ones(values.shape[:2], bool) if real is None else real
    with np.errstate(invalid="ignore"):  # inf - inf
        of_unit = np.where(keep[..., None], values, 0).sum((0, 1)), keep.sum()
        mean = in_place(values.mean(2))
    name = getattr(function, "__name__", None)
    share = always = None
    if name in _OFF and function is getattr(keras.activations, name):
        with np.errstate(invalid="ignore", over="ignore"):
            off = _OFF[name](values)
        share = in_place(off.mean(2))
        always = (off | ~keep[..., None]).all((0, 1))
    return Watched(mean, of_unit, share, always, holds)
