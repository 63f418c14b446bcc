"""What two devices computed with one program, compared."""

import numpy as np

# Both sides compute in float32 (rounding: 6e-8) the same sums in another order. A sum has
# up to B T = 6000 terms, whose errors are of random sign: sqrt(6000) * 6e-8 = 5e-6. In
# bfloat16 a number may be rounded to either side, 2^-8 apart, some times in a row.
FLOAT32, BFLOAT16 = 2e-5, 2e-2


def differences(outputs, expected):
    """For each name the largest difference, as a share of the largest number expected.

    Args:
        outputs: arrays, in the order of the names.
        expected: arrays by name. None may be all zeros: equal to it would prove nothing.
    """
    found = {}
    for (name, want), got in zip(expected.items(), outputs, strict=True):
        got, want = (np.asarray(array).astype("float64") for array in (got, want))
        if got.shape != want.shape:
            raise SystemExit(f"{name}: shape {got.shape}, not {want.shape}")
        scale = np.max(np.abs(want))
        if not 0 < scale < np.inf:
            raise SystemExit(f"{name}: nothing to compare with, its largest is {scale}")
        found[name] = float(np.max(np.abs(got - want)) / scale)
    return found


def checked(name, found, bound):
    """`found`, if no difference of this program exceeds the bound; NaN does."""
    for output, difference in found.items():
        if not difference <= bound:
            raise SystemExit(
                f"{name}: {output} differs by {difference:.1e}, more than {bound:.0e}"
            )
    return found
