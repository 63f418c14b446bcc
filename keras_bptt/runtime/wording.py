"""Words that error messages have in common."""

import difflib


def meant(given, allowed):
    """ " Did you mean ...?", where one of the names allowed is near; else nothing."""
    near = nearest(given, allowed)
    return "" if near is None else f" Did you mean {near!r}?"


def nearest(given, allowed):
    """The name among those allowed that is near, or None."""
    return next(iter(difflib.get_close_matches(str(given), list(allowed), 1)), None)


def described(value):
    """The type of a value and, of an array, its shape."""
    shape = getattr(value, "shape", None)
    return type(value).__name__ + (f" of shape {tuple(shape)}" if shape else "")


def leaves(name, nest):
    """The leaves of a nest by their names: x, or x[0] and x[1], or x['tokens']."""
    if isinstance(nest, list | tuple):
        items = enumerate(nest)
    elif isinstance(nest, dict):
        items = nest.items()
    else:
        return {name: nest}
    found = {}
    for key, value in items:
        found |= leaves(f"{name}[{key!r}]", value)
    return found
