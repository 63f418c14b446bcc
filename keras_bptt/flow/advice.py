"""What is likely to help the gradient flow of a layer, by its verdict.

Every item was tried: `examples/follow_the_advice.py` trains networks that have the fault,
as they are and as the item says, and `docs/gradient_flow.md` has the scores.
"""

import numpy as np

from keras_bptt.flow.verdict import free_kind, kind, percent, share_of
from keras_bptt.truncation import Truncation

# What share of saturated or dead units is worth a word.
MANY = 0.3
# What puts a memory of n steps into the gate that holds a state.
_MEMORY = {
    "forget gate": "unit_forget_bias=False, bias_initializer=LSTMMemoryBias({})",
    "update gate": "bias_initializer=GRUMemoryBias({})",
}


def advice(flow):
    """Items, the most likely to help first; none where numbers are not finite."""
    free = free_kind(flow)
    truncated = kind(flow) == "truncated"
    if free == "exploding" and truncated:
        return _of_explosion_in_window(flow)
    found = _of_window(flow) if truncated else []
    of_kind = {
        "exploding states": _of_states,
        "exploding": _of_explosion,
        "vanishing": _of_vanishing,
    }
    return found + of_kind[free](flow) if free in of_kind else found


def _of_explosion_in_window(flow):
    """Within the window U is what counts: the window keeps the rest of it away."""
    keep = (
        f"keep the window of {flow.truncation.steps} steps: the gradient from beyond it "
        "explodes, and a longer window takes in more of it"
    )
    return [keep, *_of_singular_values(flow), *_of_growth(flow)]


def _of_window(flow):
    own = flow.truncation
    k = flow.suggest_truncation(stride=own.stride if own.stride < own.steps else None)
    if k is not None and k <= own.steps:
        return [f"the window is long enough: {k} steps keep the bias within 5 %"]
    more = "; truncation=None where what a task needs lies farther back"
    if k is not None:
        longer = Truncation(k, own.stride if own.stride < own.steps else None)
        return [f"truncation={longer} keeps the bias within 5 %{more}"]
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
    """Of a plain RNN; nothing was found that helps another one."""
    if flow.activation == "relu":
        return [
            "recurrent_initializer='identity', the start of a relu network that neither "
            f"grows nor shrinks: {_largest(flow)}"
        ]
    return _of_singular_values(flow)


def _largest(flow):
    return f"the largest singular value of U is {flow.sigma_max:.3g}"


def _of_singular_values(flow):
    if flow.sigma_max is None or not flow.sigma_max > 1.1:
        return []
    return [
        "recurrent_initializer='orthogonal', all of whose singular values are 1: here "
        f"the largest is {flow.sigma_max:.3g}"
    ]


def _of_explosion(flow):
    return _of_growth(flow) + _of_singular_values(flow)


def _of_growth(flow):
    if flow.clipped:
        return []
    most = np.max(
        np.nan_to_num(flow.untruncated_lag_shares, nan=np.inf, posinf=np.inf),
        initial=0.0,
    )
    grows = "grows without end from"
    if np.isfinite(most):
        grows = f"grows to {most:.2g} times"
    return [
        f"adjoint_max_growth=1: |{flow.adjoint}| {grows} what a loss has sent; then it is "
        "no larger than what all losses have sent, whatever the size of the batch"
    ]


def _of_vanishing(flow):
    if flow.gates:
        return _of_memory(flow)
    if flow.singular_values is None:
        return []
    found, bound = [], flow.bound
    if flow.max_slope is not None and flow.max_slope < 1:
        found.append(
            f"activation='tanh', whose f' reaches 1: here at most {flow.max_slope:.3g}"
        )
    if bound is not None and bound < 1 and flow.max_slope >= 1:
        found.append(
            f"{_start(flow)}: sigma_max(U) max f' = {bound:.3g} is below 1, so the "
            "gradient vanishes whatever the inputs are"
        )
    elif flow.spectral_radius < 0.9:
        found.append(
            f"{_start(flow)}: the spectral radius of U is {flow.spectral_radius:.3g}"
        )
    saturated = share_of(flow.saturated)
    if saturated is not None and saturated > MANY:
        found.append(
            f"smaller weights or inputs: {percent(saturated)} of the units are saturated, "
            "where f' is next to 0"
        )
    if flow.dead is not None and flow.dead > MANY:
        found.append(
            "a larger bias or, where they died in training, to train anew at a smaller "
            f"learning rate: {percent(flow.dead)} of the units are 0 at every step"
        )
    return found or _of_another_layer(flow)


def _start(flow):
    """Of a kernel that is too small."""
    start = "identity" if flow.activation == "relu" else "orthogonal"
    return f"recurrent_initializer='{start}'"


def _of_another_layer(flow):
    """U is not what makes the gradient small. Default gates would make it smaller."""
    lstm, gru = (words.format(flow.timesteps) for words in _MEMORY.values())
    return [
        "if what lies far back matters: a layer with gates that hold a state for as long, "
        f"BPTTLSTM(..., {lstm}) or BPTTGRU(..., {gru}). With their default biases they "
        "hold it for 4 and 2 steps",
        "or activation='relu' with recurrent_initializer='identity' and a smaller learning "
        "rate",
    ]


def _of_memory(flow):
    """Of a gate that holds a state for fewer steps than there are."""
    name, gate = next((n, g) for n, g in flow.gates.items() if g.holds)
    memory = np.median(gate.memory)
    if not memory < flow.timesteps / 2:
        return []
    return [
        f"if what lies far back matters: {_MEMORY[name].format(flow.timesteps)}. The "
        f"{name} holds a state for {memory:.3g} of {flow.timesteps} steps"
    ]
