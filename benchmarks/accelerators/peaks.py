"""What memory a step takes, by an allocator that counts."""


def peaks(steps, told, reset=lambda: None):
    """Megabytes at the peak of each step above what was in use before, by name.

    Where no `reset` makes the peak begin anew, a step that does not raise it is not known:
    None. So let the smaller steps come first.

    Args:
        steps: by name, functions of nothing; None is what one returns that failed.
        told: returns the bytes in use and their peak so far, or None and None.
        reset: called before each step.
    """
    found = {}
    for name, step in steps.items():
        reset()
        before, peak = told()
        done = step() is not None
        _, after = told()
        known = done and before is not None and after > peak
        found[name] = {"mb": (after - before) / 1e6 if known else None}
    return found
