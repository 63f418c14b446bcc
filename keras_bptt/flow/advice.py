"""What is likely to help the gradient flow of a layer, by its verdict."""

import numpy as np

from keras_bptt.flow.verdict import free_kind, kind, percent, share_of
from keras_bptt.truncation import Truncation

# What share of saturated or dead units is worth a word.
MANY = 0.3


def advice(flow):
    """Items, the most likely to help first; none where numbers are not finite."""
    free, found = free_kind(flow), []
    if kind(flow) == "truncated":
        found += (
            _of_explosion_in_window(flow) if free == "exploding" else _of_window(flow)
        )
    if free == "exploding states":
        found += _of_states(flow)
    elif free == "exploding":
        found += _of_explosion(flow)
    elif free == "vanishing":
        found += _of_vanishing(flow)
    return found


def _of_explosion_in_window(flow):
    return [
        f"keep the window of {flow.truncation.steps} steps: the gradient from beyond it "
        "explodes, and a longer window takes in more of it"
    ]


def _of_window(flow):
    own = flow.truncation
    k = flow.suggest_truncation(stride=own.stride if own.stride < own.steps else None)
    if k is not None and k <= own.steps:
        return [f"the window is long enough: {k} steps keep the bias within 5 %"]
    if k is not None:
        longer = Truncation(k, own.stride if own.stride < own.steps else None)
        return [f"truncation={longer} keeps the bias within 5 %"]
    k = flow.suggest_truncation()
    if k is not None:
        return [
            f"truncation={_policy(flow, k)} keeps the bias within 5 %, which longer chunks "
            "do not: the first losses of a chunk reach no farther than its begin"
        ]
    return [
        f"no window shorter than {flow.timesteps} steps keeps the bias within 5 %: "
        "truncation=None, with checkpoint_every='sqrt' if memory is the reason, or a "
        "RandomizedTruncation, which has no bias"
    ]


def _policy(flow, k):
    """The windows in which every loss reaches k steps back."""
    return k if flow.last_step_only else Truncation(k, stride=1)


def _of_states(flow):
    found = _of_singular_values(flow)
    if flow.singular_values is not None and flow.activation != "tanh":
        found.append(
            f"activation='tanh', whose states stay within 1, in the place of "
            f"{flow.activation}"
        )
    found.append(
        "where training has let U grow: a smaller learning rate, or a "
        "recurrent_regularizer or recurrent_constraint"
    )
    return found


def _of_singular_values(flow):
    if flow.sigma_max is None or not flow.sigma_max > 1.1:
        return []
    return [
        "recurrent_initializer='orthogonal', all of whose singular values are 1: here "
        f"the largest is {flow.sigma_max:.3g}"
    ]


def _of_explosion(flow):
    found = _of_singular_values(flow)
    if not flow.clipped:
        most = np.max(
            np.nan_to_num(flow.untruncated_lag_shares, nan=np.inf, posinf=np.inf),
            initial=0.0,
        )
        grows = (
            f"grows to {most:.2g} times"
            if np.isfinite(most)
            else "grows without end from"
        )
        found.append(
            f"adjoint_max_growth=1: |{flow.adjoint}| {grows} what a loss has sent; then it "
            "is no larger than what all losses have sent, whatever the size of the batch"
        )
    if flow.max_slope is not None and flow.max_slope > 1:
        found.append(
            f"tanh or relu, whose f' is at most 1: here it reaches {flow.max_slope:.3g}"
        )
    return found


def _of_vanishing(flow):
    if flow.singular_values is None:
        return []
    found, bound = [], flow.bound
    if flow.max_slope is not None and flow.max_slope < 1:
        found.append(
            f"tanh or relu, whose f' reaches 1: here at most {flow.max_slope:.3g}"
        )
    if bound is not None and bound < 1 and flow.max_slope >= 1:
        found.append(
            "recurrent_initializer='orthogonal' (or the identity, with relu: Le et al. "
            f"2015): sigma_max(U) max f' = {bound:.3g} is below 1, so the gradient "
            "vanishes whatever the inputs are"
        )
    elif flow.spectral_radius < 0.9:
        found.append(
            "recurrent_initializer='orthogonal': the spectral radius of U is "
            f"{flow.spectral_radius:.3g}"
        )
    saturated = share_of(flow.saturated)
    if saturated is not None and saturated > MANY:
        found.append(
            f"smaller weights or inputs: {percent(saturated)} of the units are saturated, "
            "where f' is next to 0"
        )
    if flow.dead is not None and flow.dead > MANY:
        found.append(
            f"a smaller learning rate or a larger bias: {percent(flow.dead)} of the "
            "units are 0 at every step"
        )
    return found or [
        "if the far past matters: relu and the identity for U, shorter sequences, or a "
        "layer with gates (LSTM, GRU); U itself is not what makes the gradient small"
    ]
