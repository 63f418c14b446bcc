"""The numbers of a layer's gradient flow that callbacks log: one each, by name."""

import math

import numpy as np

from keras_bptt.flow.verdict import over_examples
from keras_bptt.runtime.wording import described, meant

# In the order in which they are logged; GradientFlowLogger says what each is.
NAMES = (
    "adjoint_norm",
    "delta_norm",
    "factor",
    "half_life",
    "lag_share",
    "sigma_max",
    "spectral_radius",
    "saturated",
    "inactive",
    "input_gate",
    "forget_gate",
    "output_gate",
    "update_gate",
    "reset_gate",
    "memory",
)


def numbers_of(flow):
    """The quantities that a `LayerFlow` has, in the order of their names."""
    shares = flow.untruncated_lag_shares
    held = [gate.memory for gate in flow.gates.values() if gate.holds]
    numbers = {
        "adjoint_norm": _mean(flow.adjoint_norms),
        "delta_norm": _mean(flow.delta_norms),
        "factor": flow.factor,
        "half_life": flow.half_life,
        "lag_share": float(shares[-1]) if len(shares) else math.nan,
        "sigma_max": flow.sigma_max,
        "spectral_radius": flow.spectral_radius,
        "saturated": _mean(flow.saturated),
        "inactive": _mean(flow.inactive),
        "memory": float(np.median(held[0])) if held else None,
    }
    for name, gate in flow.gates.items():
        numbers[name.replace(" ", "_")] = _mean(gate.mean)
    return {name: numbers[name] for name in NAMES if numbers.get(name) is not None}


def chosen(given):
    """The names that the argument `quantities` asks for."""
    if isinstance(given, str):
        given = NAMES if given == "all" else (given,)
    try:
        names = tuple(given)
    except TypeError:
        raise ValueError(_allowed(described(given))) from None
    for name in names:
        if name not in NAMES:
            raise ValueError(_allowed(repr(name), meant(name, (*NAMES, "all"))))
    return names


def _allowed(received, hint=""):
    return (
        f"`quantities` must be 'all' or names of what is logged: {', '.join(NAMES)}. "
        f"Received: {received}.{hint} Pass some of these names, such as "
        "('adjoint_norm', 'factor')."
    )


def _mean(norms):
    return None if norms is None else float(over_examples(np.nanmean, norms.ravel()))
