"""What the references of the LSTM and the GRU share: the check of their arguments.

Their weights hold several gates side by side, so an axis may be "4 units" long.
"""

import numpy as np

from keras_bptt.reference.simple_rnn import Array, Steps, _by_step

AXES = {
    "x": "batch, timesteps, features",
    "h_0": "batch, units",
    "c_0": "batch, units",
    "e": "batch, timesteps, units",
    "e_h_T": "batch, units",
    "e_c_T": "batch, units",
    "mask": "batch, timesteps",
}


def checked(axes: dict[str, str], **arrays: Array | None) -> list[Array]:
    """The arrays in float64, but for the mask, which is boolean.

    The first array to name an axis decides its size. What is None is filled in: a mask
    that lets everything through, any other array of zeros.
    """
    sizes, results = {"sides": 2}, []
    for name, array in arrays.items():
        parts = [axis.rpartition(" ") for axis in axes[name].split(", ")]
        counts = [(int(count or 1), unit) for count, _, unit in parts]
        if array is None:
            shape = [count * sizes[unit] for count, unit in counts]
            array = np.ones(shape, bool) if name == "mask" else np.zeros(shape)
        array = np.asarray(array)
        if array.ndim != len(counts) or any(
            count * sizes.setdefault(unit, size // count) != size
            for (count, unit), size in zip(counts, array.shape, strict=True)
        ):
            raise ValueError(
                f"`{name}` must have shape ({_allowed(counts, sizes)}). "
                f"Received: shape {array.shape}."
            )
        if name == "mask" and array.dtype != bool:
            raise ValueError(f"`mask` must be boolean. Received: dtype {array.dtype}.")
        results.append(array if name == "mask" else np.asarray(array, np.float64))
    if sizes["timesteps"] == 0:
        raise ValueError("`x` must have one time step or more. Received: timesteps=0.")
    return results


def _allowed(counts: list[tuple[int, str]], sizes: dict[str, int]) -> str:
    """The shape in words, such as "units=6, 4 units=24"."""
    words = []
    for count, unit in counts:
        size = count * sizes[unit] if unit in sizes else "any"
        words.append(f"{unit}={size}" if count == 1 else f"{count} {unit}={size}")
    return ", ".join(words)


def by_step(x: Array, mask: Array) -> tuple[Steps, Steps]:
    """x and the mask (batch, 1) by step number; masked inputs are zeros, were they NaN."""
    m = mask[..., np.newaxis]
    return _by_step(np.where(m, x, 0.0)), _by_step(m)
