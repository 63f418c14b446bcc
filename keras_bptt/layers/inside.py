"""Which layers a model holds: in its configuration or in attributes, at any depth."""

import keras

_OF_KERAS = ("_layers", "_functional", "_operations", "_self_")


def layers_inside(model):
    """Each layer once, with the way to it from the model, such as `blocks[0].rnn`."""
    return list(_found(model, "", set()))


def _found(value, path, seen):
    if isinstance(value, keras.Layer):
        if id(value) in seen:
            return
        seen.add(id(value))
        yield path, value
        # By the names that users give, where there are any, and not by Keras' own lists.
        below = {n: v for n, v in vars(value).items() if not n.startswith(_OF_KERAS)}
        if isinstance(value, keras.Model):
            below["layers"] = value.layers
        below = {f"{path}.{name}".lstrip("."): v for name, v in below.items()}
    elif isinstance(value, list | tuple):
        below = {f"{path}[{i}]": v for i, v in enumerate(value)}
    elif isinstance(value, dict):
        below = {f"{path}[{key!r}]": v for key, v in value.items()}
    else:
        return
    for name, each in below.items():
        yield from _found(each, name, seen)
