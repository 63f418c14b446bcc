"""How much of a single loss reaches so many steps back."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf


class Lags(NamedTuple):
    """Sums of norms by lag, over single losses.

    Attributes:
        reached: |a_{s-k}|, of all states jointly.
        of_states: the same of each state (states, lags).
        sent: |e_s| of the same losses. Of an output that is no state it has another unit
            than the states have; then it is what the loss sends to the step before.
        last_step_only: whether the last step alone has a loss.
    """

    reached: np.ndarray
    of_states: np.ndarray
    sent: np.ndarray
    last_step_only: bool

    @property
    def share(self):
        """How much of a loss reaches k steps back; up to the longest lag there is."""
        return self._shares(self.reached)

    @property
    def share_of_states(self):
        """The same of each state."""
        return self._shares(self.of_states)

    def _shares(self, sums):
        size = int(np.sum(self.sent > 0))
        with np.errstate(invalid="ignore"):
            return sums[..., :size] / self.sent[:size]

    @classmethod
    def joined(cls, several):
        *sums, last = zip(*several, strict=True)
        size = max(each.shape[-1] for each in sums[0])

        def total(arrays):
            fill = [[(0, 0)] * (a.ndim - 1) + [(0, size - a.shape[-1])] for a in arrays]
            return sum(np.pad(a, f) for a, f in zip(arrays, fill, strict=True))

        return cls(*map(total, sums), all(last))


def followed(back, sent, real, loss_steps, shown):
    """The `Lags` of so many single losses; and the norms of all losses together.

    Args:
        back: from the places of losses, each alone, to norms of what they send back; a
            negative place means all of them together. Of the delta (places, batch,
            timesteps), of each state and of all (places, states + 1, batch, timesteps).
        sent: |e_t| (batch, timesteps).
        real: which steps are, or None: all.
        loss_steps: how many losses are followed.
        shown: whether what the layer shows is a state.
    """
    steps = sent.shape[1]
    real = np.ones(sent.shape, bool) if real is None else real
    losses = np.flatnonzero(np.any(sent > 0, axis=0))
    places = _spread(losses, loss_steps)
    delta, a = (t.numpy() for t in back(tf.constant([-1, *places], tf.int32)))
    sums = np.zeros((a.shape[1], steps))
    total = np.zeros(steps)
    for s, alone in zip(places, a[1:], strict=True):
        reached = np.where(real, alone, 0)[..., s::-1]
        base = np.where(real[:, s::-1], sent[:, s, None], 0)
        if not shown:
            # From the step before on; what the output itself is sent has another unit.
            reached[..., 0] = base[:, 0]
            base[:, 1:] = np.where(real[:, s::-1], alone[-1, :, s - 1, None], 0)[:, 1:]
        sums[:, : s + 1] += reached.sum(1)
        total[: s + 1] += base.sum(0)
    last_only = losses.tolist() == [steps - 1]
    return Lags(sums[-1], sums[:-1], total, last_only), delta[0], a[0]


def _spread(places, number):
    """So many of the places: the last, and one of each equal part of the others.

    At golden sections of the parts, so that they have no common period with blocks.
    """
    if len(places) <= number:
        return places
    part = len(places) / number
    back = [int((i + i * 0.6180339887498949 % 1) * part) for i in range(number)]
    return places[::-1][back]
