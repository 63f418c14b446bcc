"""The numbers that a race starts from, the same for every contestant and on any machine."""

import numpy as np

# So many random numbers are drawn and repeated: gigabytes of them would take longer than
# the race. A prime, so that no two steps or examples begin at the same one.
DRAWN = 1_000_003


def arrays(race, seed=0):
    """Inputs, targets and weights, float32.

    U has a spectral radius near 1 and the inputs are weak, so that units seldom saturate:
    the gradient reaches far back, and one that is cut differs from one that is not.
    """
    rng = np.random.default_rng(seed)
    numbers = rng.standard_normal(DRAWN, "float32")
    x = np.resize(numbers, race.shape[:-1])
    y = np.resize(numbers[::-1], race.target_shape())
    inputs, recurrent, bias = race.weight_shapes()
    weights = [
        rng.normal(0, 0.1 * inputs[0] ** -0.5, inputs),
        rng.normal(0, recurrent[0] ** -0.5, recurrent),
        rng.normal(0, 0.05, bias),
    ]
    return x, y, [weight.astype("float32") for weight in weights]
