"""State of a model that its weights do not say: of preprocessing, and of the optimizer."""

import tempfile

import keras
import tensorflow as tf


def copy_own_state(model, copy):
    """What layers of preprocessing have adapted to, and layers of a user's own load.

    A `Normalization` computes with numbers that it derives where it loads its weights; what
    a `StringLookup` has adapted to is a table, which only its files hold.
    """
    layers = [layer for layer in _with_state(model) if _is_filled(layer)]
    for layer, twin in _pairs(layers, _with_state(copy)):
        if hasattr(layer, "save_assets"):
            with tempfile.TemporaryDirectory() as folder:
                layer.save_assets(folder)
                twin.load_assets(folder)
        else:
            store = {}
            layer.save_own_variables(store)
            twin.load_own_variables(store)


def _with_state(model):
    """The layers, at any depth, that hold more than `set_weights` sets."""
    layers = tf.train.TrackableView(model).descendants()
    return [layer for layer in layers if _has_state(layer)]


def _has_state(layer):
    if not isinstance(layer, keras.Layer):
        return False
    # Of Keras' own layers others override it too, to merge what fine-tuning has added.
    theirs = type(layer).__module__.partition(".")[0] == "keras"
    overrides = type(layer).load_own_variables is not keras.Layer.load_own_variables
    normalizes = isinstance(layer, keras.layers.Normalization)
    return hasattr(layer, "save_assets") or normalizes or (overrides and not theirs)


def _is_filled(layer):
    """Whether there is something to copy: an empty table cannot be loaded."""
    if hasattr(layer, "get_vocabulary"):
        return bool(layer.get_vocabulary(include_special_tokens=False))
    return layer.built


def _pairs(layers, copies):
    """Each layer and its copy: of the same name or, made inside another, the same order.

    A layer that the configuration does not have, an attribute of the model, has none.
    """
    for named in True, False:
        for layer in list(layers):
            alike = [
                copy
                for copy in copies
                if type(copy) is type(layer) and (copy.name == layer.name or not named)
            ]
            if alike:
                layers.remove(layer)
                copies.remove(alike[0])
                yield layer, alike[0]


def copy_optimizer_state(optimizer, copy):
    variables = getattr(getattr(copy, "optimizer", None), "variables", [])
    if len(variables) != len(optimizer.variables):
        raise ValueError(
            "The optimizer of `model` must belong to the weights that are trainable now. "
            f"Received: {len(optimizer.variables)} variables of the optimizer, where a new "
            f"one has {len(variables)}. Compile the model again after `trainable` changed; "
            "give a class with its own `compile` a `compile_from_config`."
        )
    for variable, value in zip(variables, optimizer.variables, strict=True):
        variable.assign(value)
