"""Which paths of the gradient are kept: the policies of truncated backpropagation.

A policy is a plain object that says what is computed, not how. `truncated_reference.py`
computes it path by path, as these docstrings define it.
"""

import contextlib
import dataclasses
import math
import numbers
import typing
from typing import Any

import keras


@keras.saving.register_keras_serializable(package="keras_bptt")
@dataclasses.dataclass(frozen=True, repr=False)
class Truncation:
    """Truncated backpropagation through time, TBPTT(k1, k2) of Williams & Peng.

    A loss reaches back through a bounded number of steps. Use it where sequences are long
    and what matters is near, or where a step of the backward pass costs latency: blocks of
    steps do not depend on each other, so that the pass is `steps` steps long and not T. The
    gradient is biased: a dependency longer than the window is not learned from. To learn
    one of n steps takes `steps` >= n + 1. Where bias is not allowed, use full
    backpropagation (None) or `RandomizedTruncation`.

    Time is cut into blocks of k1 = `stride` steps, from the end of the sequence. The losses
    of a block flow back until k2 = `steps` steps before the block's end, no further. With
    the real (unmasked) steps of an example counted s = 1 ... N in the order in which they
    are processed, step s lies in the block that ends at

        E(s) = N - k1 floor((N - s) / k1)

    and its loss contributes to

        delta_j = dL/dz_j   exactly for max(1, E(s) - k2 + 1) <= j <= s
        dL/dh_0             exactly if E(s) <= k2

    The cotangent of an output at a masked step belongs to the last real step before it, to
    h_0 if there is none. The gradients of all weights, the inputs and the initial state
    come from these delta alike:

        dL/dW = sum_j x_j^T delta_j      dL/dU = sum_j h_{j-1}^T delta_j
        dL/db = sum_j delta_j            dL/dx_j = delta_j W^T

    `stride` = `steps` = k cuts the sequence into chunks of k steps: a loss reaches back
    through 1 to k steps, k for the last of its chunk. `stride=1` is the sliding window:
    every loss reaches back through k steps, k - 1 links between them. Where `steps` >= N
    every path is kept: full backpropagation.

    Time: T k2 / k1 steps of the backward recursion, of which only k2 wait for each other;
    chunks cost the T steps of full backpropagation, the sliding window k2 times as many.
    Memory between the passes: the hidden states, as without; where the loss reads the last
    state alone, those of the last k2 steps. On the way back two deltas for each step,
    whatever k2 / k1 is. The forward pass is never truncated.

    Args:
        steps: Positive integer k2, so many delta from a block's end back.
        stride: Positive integer k1 <= `steps`, the length of a block. Default: `steps`.

    Raises:
        ValueError: for other values.

    Example:

    >>> Truncation(20)
    Truncation(steps=20)
    >>> sliding = Truncation(20, stride=1)
    >>> sliding.steps, sliding.stride
    (20, 1)
    >>> Truncation(20, stride=20) == Truncation(20)
    True

    References:
        - Williams & Peng, An efficient gradient-based algorithm for on-line training of
          recurrent network trajectories, 1990: BPTT(h; h').
        - Zhang et al., Dive into Deep Learning, section "Backpropagation Through Time".
    """

    steps: int
    stride: int | None = None

    def __post_init__(self):
        if not positive_integer(self.steps):
            raise ValueError(
                "`steps` must be a positive integer, the number of steps from the end of "
                f"a block back. Received: steps={self.steps!r}. For full backpropagation "
                "use truncation=None."
            )
        stride = self.steps if self.stride is None else self.stride
        if not positive_integer(stride) or stride > self.steps:
            raise ValueError(
                "`stride` must be a positive integer, at most `steps`, or None (as many "
                f"as `steps`). Received: stride={stride!r}, steps={self.steps!r}. A longer "
                "stride would leave losses that reach no step at all: raise `steps`."
            )
        object.__setattr__(self, "steps", int(self.steps))
        object.__setattr__(self, "stride", int(stride))

    def __repr__(self):
        stride = "" if self.stride == self.steps else f", stride={self.stride}"
        return f"Truncation(steps={self.steps}{stride})"

    def get_config(self) -> dict[str, Any]:
        """The arguments, of which `from_config` makes the same policy."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Truncation":
        """The policy of a configuration."""
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_bptt")
@dataclasses.dataclass(frozen=True)
class RandomizedTruncation:
    """Truncation at random places, without bias: the mean gradient is the full one.

    At every step and for every example the recurrent term is dropped with probability
    1 - p or kept and divided by p, with p = 1 - 1 / `mean_steps`, so that a loss reaches
    back through `mean_steps` steps in the mean (fewer where the sequence begins):

        a_t     = e_t + xi_{t+1} delta_{t+1} U^T      xi = 1 / p or 0, E[xi] = 1
        delta_t = a_t * f'(z_t)

    Use it where truncation's bias hurts and its noise does not. xi_t is drawn for the link
    between two neighbouring real (unmasked) steps. The link from h_0 to the first of them,
    and those into masked steps, have none, that is 1. With the real steps counted
    s = 1 ... N, the share of the loss of step s in delta_j is

        xi_{j+1} ... xi_s  times its share in full backpropagation, in the mean 1 of it

    so a path of lag n = s - j is kept with probability p^n and then weighs p^-n: the
    variance of its weight is p^-n - 1. At lag `mean_steps` that is about e - 1 = 1.7 (3
    for `mean_steps=2`), and it grows exponentially: choose `mean_steps` near the lags that
    matter. The gradients of the weights, the inputs and the initial state come from one
    and the same draw.

    Drawn where the layer is called with `training` true; otherwise the gradient is full.
    Time and memory: those of full backpropagation, and one factor for each step and
    example. It saves nothing: for a shorter backward pass use `Truncation`.

    Args:
        mean_steps: Number > 1 and finite.
        seed: Integer or None, the seed of the draws as in `keras.layers.Dropout`.

    Attributes:
        keep_probability: p = 1 - 1 / `mean_steps`.

    Raises:
        ValueError: for other values.

    Example:

    >>> policy = RandomizedTruncation(mean_steps=20, seed=1)
    >>> policy
    RandomizedTruncation(mean_steps=20, seed=1)
    >>> policy.keep_probability
    0.95

    References:
        - Tallec & Ollivier, Unbiasing truncated backpropagation through time, 2017
          (arXiv 1705.08209).
        - Zhang et al., Dive into Deep Learning, section "Backpropagation Through Time":
          the randomized strategy.
    """

    mean_steps: float
    seed: int | None = None

    def __post_init__(self):
        mean_steps, seed = _number(self.mean_steps), self.seed
        if mean_steps is None or not 1 < mean_steps < math.inf:
            raise ValueError(
                "`mean_steps` must be a finite number greater than 1, the mean number of "
                f"steps that a loss reaches back. Received: mean_steps="
                f"{self.mean_steps!r}. For full backpropagation use truncation=None, for "
                "one step truncation=1."
            )
        if seed is not None and not _integer(seed):
            raise ValueError(
                f"`seed` must be an integer or None. Received: seed={seed!r}. Pass the "
                "number itself; the layer makes the generator."
            )
        object.__setattr__(self, "mean_steps", mean_steps)
        object.__setattr__(self, "seed", None if seed is None else int(seed))

    def __repr__(self):
        seed = "" if self.seed is None else f", seed={self.seed}"
        return f"RandomizedTruncation(mean_steps={self.mean_steps}{seed})"

    @property
    def keep_probability(self) -> float:
        return 1 - 1 / self.mean_steps

    def get_config(self) -> dict[str, Any]:
        """The arguments, of which `from_config` makes the same policy."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RandomizedTruncation":
        """The policy of a configuration."""
        return cls(**config)


Policy = Truncation | RandomizedTruncation
_NAMES = [keras.saving.get_registered_name(c) for c in typing.get_args(Policy)]


def policy(truncation: Any) -> Policy | None:
    """The policy that an argument `truncation` means; None, full BPTT, for None.

    Args:
        truncation: None, a positive integer k for `Truncation(k)`, a policy, or what
            `keras.saving.serialize_keras_object` makes of one.

    Raises:
        ValueError: for anything else.

    >>> policy(20), policy(Truncation(20, stride=5)), policy(None)
    (Truncation(steps=20), Truncation(steps=20, stride=5), None)
    """
    if truncation is None or isinstance(truncation, Policy):
        return truncation
    if positive_integer(truncation):
        return Truncation(truncation)
    if isinstance(truncation, dict) and truncation.get("registered_name") in _NAMES:
        with contextlib.suppress(TypeError):  # a configuration of something else
            read = keras.saving.deserialize_keras_object(truncation)
            if isinstance(read, Policy):
                return read
    raise ValueError(
        "`truncation` must be a positive integer, a Truncation, a RandomizedTruncation or "
        f"None (full BPTT). Received: truncation={truncation!r}. Pass k to let a loss "
        "reach back through k steps at most, in chunks."
    )


def _integer(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def positive_integer(value):
    return _integer(value) and value > 0


def _number(value):
    """An int or a float, as JSON knows them, or None."""
    if _integer(value):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    return None
