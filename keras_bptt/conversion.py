"""convert: a trained model of SimpleRNN as the same model of BPTTRNN, and back."""

import functools
import tempfile

import keras
import tensorflow as tf

from keras_bptt.layers import BPTTRNN

# What BPTTRNN can be told beyond SimpleRNN without another weight.
_OPTIONS = ("truncation", "checkpoint_every", "adjoint_clipnorm", "jit_compile")


def convert(model, to=BPTTRNN, **options):
    """Return a copy of a model with BPTTRNN in place of SimpleRNN, or the other way round.

    Use it where a trained model is there already: a `.weights.h5` file names the class
    that it was saved from and loads into no other. Every layer of the one class (not of a
    subclass, nor `keras.layers.RNN`) becomes one of the other, wherever it is in the model:
    in a `Bidirectional` or another wrapper, in a model inside the model, shared between two
    calls, in a layer of your own that has it in its configuration. Outputs are the same.
    Weights, names, what preprocessing layers have adapted to, the arguments of `compile`
    and the state of the optimizer are carried over, so that training goes on where it was.
    The model that is passed stays as it is.

    What is copied is what a `.keras` file would hold. So layers of your own must be
    registered (`keras.saving.register_keras_serializable`) or named by a
    `keras.saving.custom_object_scope`; and metrics, seeds of dropout and the states of
    stateful layers begin anew. Time and memory: those of a second copy of the model.

    Args:
        model: A `keras.Model` or `keras.Layer`.
        to: `BPTTRNN`, the default: what was a `SimpleRNN` becomes one. Or
            `keras.layers.SimpleRNN`: what was a `BPTTRNN` becomes one, without truncation,
            clipping and checkpoints, which SimpleRNN does not have: no output depends on
            them.
        **options: For every layer that becomes a `BPTTRNN`: `truncation`,
            `checkpoint_every`, `adjoint_clipnorm`, `jit_compile`.

    Returns:
        A new model, compiled if the other is.

    Raises:
        ValueError: for another `to`, an option that is none of these, a model without a
            layer to convert, a `BPTTRNN` with an output layer of its own, which SimpleRNN
            does not have, and an optimizer of other weights than are trainable now.

    Example:

    >>> import keras
    >>> model = keras.Sequential([
    ...     keras.Input((None, 3)),
    ...     keras.layers.Bidirectional(keras.layers.SimpleRNN(4)),
    ... ])
    >>> fast = convert(model, truncation=20)
    >>> type(fast.layers[0].forward_layer).__name__
    'BPTTRNN'
    >>> fast.layers[0].backward_layer.truncation
    Truncation(steps=20)
    >>> back = convert(fast, to=keras.layers.SimpleRNN)
    >>> type(back.layers[0].forward_layer).__name__
    'SimpleRNN'
    """
    _check(model, to, options)
    config = keras.saving.serialize_keras_object(model)
    config, number = _replaced(config, to, options)
    if not number:
        raise ValueError(
            f"`model` must hold a {_other(to).__name__}, to become a {to.__name__}. "
            f"Received: model={model.name!r}, which holds none."
        )
    # What is in memory is trusted, a lambda too.
    copy = keras.saving.deserialize_keras_object(config, safe_mode=False)
    copy.set_weights(model.get_weights())
    _copy_own_state(model, copy)
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and optimizer.built:
        _copy_state(optimizer, copy)
    return copy


def _copy_own_state(model, copy):
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


def _copy_state(optimizer, copy):
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


def _other(layer_class):
    return keras.layers.SimpleRNN if layer_class is BPTTRNN else BPTTRNN


def _check(model, to, options):
    if not isinstance(model, keras.Layer):
        raise ValueError(
            "`model` must be a keras.Model or a keras.Layer. Received: "
            f"model={model!r} of type {type(model).__name__}."
        )
    if to not in (BPTTRNN, keras.layers.SimpleRNN):
        raise ValueError(
            "`to` must be the class keras_bptt.BPTTRNN or keras.layers.SimpleRNN. "
            f"Received: to={to!r}."
        )
    allowed = _OPTIONS if to is BPTTRNN else ()
    for name, value in options.items():
        if name not in allowed:
            raise ValueError(
                f"An option for layers that become a {to.__name__} may be "
                f"{', '.join(allowed) or 'none at all'}: no other argument leaves weights "
                f"and outputs as they are. Received: {name}={value!r}."
            )
    if options:
        BPTTRNN(1, **options)  # raises where a value is not allowed


def _replaced(node, to, options):
    """A serialized object with its layers replaced, and how many of them there were."""
    if isinstance(node, list | tuple):
        found = [_replaced(value, to, options) for value in node]
        return type(node)(value for value, _ in found), sum(n for _, n in found)
    if not isinstance(node, dict):
        return node, 0
    found = {key: _replaced(value, to, options) for key, value in node.items()}
    node = {key: value for key, (value, _) in found.items()}
    number = sum(n for _, n in found.values())
    if not _identity(_other(to)).items() <= node.items():
        return node, number
    arguments = _arguments_for(to, node["config"], options)
    return node | _identity(to) | {"config": arguments}, number + 1


@functools.cache  # to make a layer draws a seed, and takes an automatic name
def _identity(layer_class):
    """What names the class in a serialized layer."""
    serialized = keras.saving.serialize_keras_object(layer_class(1))
    return {key: serialized[key] for key in ("module", "class_name", "registered_name")}


def _arguments_for(to, config, options):
    if to is BPTTRNN:
        return config | keras.saving.serialize_keras_object(options)
    if "output_units" in config:
        raise ValueError(
            "A BPTTRNN with an output layer cannot become a SimpleRNN, which has none. "
            f"Received: layer {config['name']!r} with "
            f"output_units={config['output_units']}."
        )
    kept = {key: value for key, value in config.items() if key not in _OPTIONS}
    # SimpleRNN takes a number of steps for all of them.
    return kept | {"unroll": config["unroll"] is True}
