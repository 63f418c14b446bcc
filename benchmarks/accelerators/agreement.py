"""Whether contestants computed the same gradient. NumPy alone."""

import comparison

# The one whose gradients the others are compared with.
JUDGE = "JAX scan"
NAMES = "loss", "d_kernel", "d_recurrent_kernel", "d_bias"
# Of the largest number of a gradient, from that of the judge. Float32 rounds to 6e-8, TF32
# to 5e-4, bfloat16 to 4e-3, and the recursion carries such errors on: in bfloat16 they were
# 1e-2 to 6e-2 from float32, in TF32 they should be an eighth of that. A wrong path of the
# gradient is of another size: at H = 128 chunks and windows differ from full BPTT by 3e-1
# to 5e-1.
BOUNDS = {"float32": 2e-4, "tf32": 2e-2, "bfloat16": 1.5e-1}


def judged(gradients, bound):
    """For each name: how far it is from the judge, and what is wrong, or None.

    Args:
        gradients: by name, the loss and the gradients in the order of `NAMES`.
        bound: of a difference.
    """
    judge = gradients.get(JUDGE)
    if judge is None:
        failure = f"nothing to compare with: no gradient of {JUDGE}"
        return {name: (None, failure) for name in gradients}
    wanted = dict(zip(NAMES, judge, strict=True))
    return {name: _judged(got, wanted, bound) for name, got in gradients.items()}


def _judged(outputs, wanted, bound):
    try:
        found = comparison.differences(outputs, wanted)
    except (SystemExit, ValueError) as error:
        return None, f"disagrees: {error}"
    # NaN first, which is neither larger nor smaller.
    worst = max(found, key=lambda name: (found[name] != found[name], found[name]))
    if found[worst] <= bound:
        return found[worst], None
    return found[worst], f"disagrees: {worst} by {found[worst]:.1e}"
