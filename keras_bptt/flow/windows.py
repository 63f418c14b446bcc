"""The bias of a window, from how much of a loss reaches so many steps back."""

import math

import numpy as np


def biases(shares, stride):
    """`LayerFlow.truncation_bias` of windows of 1, 2, ... steps, up to the longest lag + 1.

    Args:
        shares: by lag, without truncation and clipping.
        stride: the length of a block; None: that of the window.
    """
    rest = np.append(_rest(shares)[1:], 0.0)  # at the end a window that holds all
    sums = np.append(0.0, np.cumsum(rest))
    k = np.arange(1, len(rest) + 1)
    block = k if stride is None else np.minimum(k, stride)
    return (sums[k] - sums[k - block]) / block


def _rest(shares):
    """The share of all that lies at lag k or beyond, for k = 0 ... the longest lag."""
    shares = np.nan_to_num(shares, nan=math.inf, posinf=math.inf)
    if not len(shares) or not np.all(np.isfinite(shares)):
        return np.ones(max(len(shares), 1))
    half = np.arange(len(shares) // 2, len(shares))
    half = half[shares[half] > 0]
    beyond = 0.0
    if len(half) > 1:
        slope = np.polyfit(half, np.log(shares[half]), 1)[0]
        if slope >= 0:
            return np.ones(len(shares))
        if shares[-1] > 0:
            decay = math.exp(slope)
            beyond = shares[-1] * decay / (1 - decay)
    rest = np.cumsum(shares[::-1])[::-1] + beyond
    return rest / rest[0] if rest[0] > 0 else rest
