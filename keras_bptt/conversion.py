"""convert: a copy of a model in which layers of this package replace those of Keras.

Or the other way round; or with other options.
"""

import functools
import warnings

import keras
import tensorflow as tf

from keras_bptt.layers.bptt import BPTT
from keras_bptt.layers.bptt_gru import BPTTGRU
from keras_bptt.layers.bptt_lstm import BPTTLSTM
from keras_bptt.layers.bptt_rnn import BPTTRNN
from keras_bptt.layers.copied_state import copy_optimizer_state, copy_own_state
from keras_bptt.layers.inside import layers_inside
from keras_bptt.layers.options import OPTIONS
from keras_bptt.runtime.wording import meant

# Each layer of this package, and the layer of Keras in whose place it stands.
_HOSTS = {
    BPTTRNN: keras.layers.SimpleRNN,
    BPTTLSTM: keras.layers.LSTM,
    BPTTGRU: keras.layers.GRU,
    BPTT: keras.layers.RNN,
}
# What `to` may name: which class is replaced by which.
_DIRECTIONS = {
    "keras_bptt": {host: layer for layer, host in _HOSTS.items()},
    "keras": _HOSTS,
}


def convert(model, to="keras_bptt", **options):
    """Return a copy of a model with layers of this package in place of Keras', or back.

    Use it for a model that is trained already: a `.weights.h5` file names the classes of
    the layers that it was saved from, and does not load into others. Use it too to give the
    layers of a model other options, such as those that `gradient_flow` advises, or
    `unroll=1` for an export to ONNX. For a new model, write `BPTTRNN`, `BPTTLSTM`,
    `BPTTGRU` or `BPTT(cell)` yourself.

    Every `keras.layers.SimpleRNN`, `LSTM`, `GRU` and `RNN(cell)` becomes a `BPTTRNN`,
    `BPTTLSTM`, `BPTTGRU` and `BPTT(cell)`, wherever the layer is in the model: in a
    `Bidirectional` or another wrapper, in a model inside the model, shared between two
    calls, in a layer of your own that has it in its configuration. Subclasses of these
    layers stay as they are. All outputs are the same. The copy takes over weights,
    names, what preprocessing layers have adapted to, the arguments of `compile` and the
    state of the optimizer, so that training goes on where it was. The model that is passed
    does not change.

    The copy has what a `.keras` file of the model would hold. So layers of your own must be
    registered (`keras.saving.register_keras_serializable`) or named by a
    `keras.saving.custom_object_scope`. Metrics, seeds of dropout and the states of stateful
    layers begin anew; `use_cudnn` and `implementation`, which no configuration of `LSTM`
    and `GRU` holds, get their defaults. Time and memory: those of a second copy of the
    model.

    Args:
        model: A `keras.Model` or `keras.Layer`.
        to: `"keras_bptt"`, the default: layers of Keras become layers of this package. Or
            `"keras"`: layers of this package become layers of Keras, and lose truncation,
            clipping, checkpoints and `jit_compile`, on which no output depends. Or one
            class, which leaves every other kind of layer alone: `BPTTLSTM` converts `LSTM`
            only, `keras.layers.LSTM` converts `BPTTLSTM` only.
        **options: For each layer of this package that the copy holds and `to` names, also
            where the model held it before: `truncation`, `checkpoint_every`,
            `adjoint_clipnorm`, `adjoint_max_growth`, `jit_compile`, `unroll`. None takes
            one of the first four away; an option that is not named stays. On the way to
            Keras: `unroll`, True or False.

    Returns:
        A new model, compiled if the other is.

    Raises:
        ValueError: for any other `to` or option; for a model without a layer to convert or
            to give an option to; on the way to Keras, for a layer with `output_units`,
            which Keras' layers do not have; and for an optimizer that belongs to other
            weights than are trainable now. A `BPTT` of the copy raises at its first call
            for a cell that it does not take; `to=BPTTLSTM`, say, leaves every `RNN(cell)`
            as it is.

    Warns:
        UserWarning: where a class of your own makes layers that its configuration does not
            have: the copy holds them as the class makes them. And where a GPU is visible,
            for an `LSTM` or `GRU` that runs cuDNN there: the layers of this package do not,
            and which of the two is faster on a GPU has not been measured.

    Example:

    >>> import keras
    >>> model = keras.Sequential([
    ...     keras.Input((None, 3)),
    ...     keras.layers.Bidirectional(keras.layers.LSTM(4, return_sequences=True)),
    ...     keras.layers.SimpleRNN(5),
    ... ])
    >>> fast = convert(model, truncation=20)
    >>> type(fast.layers[0].forward_layer).__name__, type(fast.layers[1]).__name__
    ('BPTTLSTM', 'BPTTRNN')
    >>> clipped = convert(fast, to=BPTTRNN, adjoint_clipnorm=0.07)
    >>> clipped.layers[1].truncation, clipped.layers[1].adjoint_clipnorm
    (Truncation(steps=20), 0.07)
    >>> clipped.layers[0].forward_layer.adjoint_clipnorm is None
    True
    >>> back = convert(fast, to="keras")
    >>> type(back.layers[0].forward_layer).__name__, type(back.layers[1]).__name__
    ('LSTM', 'SimpleRNN')
    """
    if not isinstance(model, keras.Layer):
        raise ValueError(
            "`model` must be a keras.Model or a keras.Layer. Received: "
            f"model={model!r} of type {type(model).__name__}.{_made_a_model(model)}"
        )
    classes = _classes(to)
    wanted = _checked(options, classes)
    config, number = _replaced(_configuration(model, classes), classes, options)
    if not number:
        raise ValueError(_nothing_to_do(model, classes, options))
    # What is in memory is trusted, a lambda too.
    copy = keras.saving.deserialize_keras_object(config, safe_mode=False)
    copy.set_weights(model.get_weights())
    _warn_of_others(copy, classes, wanted)
    copy_own_state(model, copy)
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and optimizer.built:
        copy_optimizer_state(optimizer, copy)
    _warn_of_cudnn(model, classes)
    return copy


# --- Arguments


def _classes(to):
    """Which class is replaced by which: {old: new}."""
    if isinstance(to, str) and to in _DIRECTIONS:
        return _DIRECTIONS[to]
    for classes in _DIRECTIONS.values():
        for old, new in classes.items():
            if new is to:
                return {old: new}
    raise ValueError(
        "`to` must be 'keras_bptt' or 'keras', for every kind of layer, or, for one kind, "
        f"the class keras_bptt.{_either(_HOSTS)} or "
        f"keras.layers.{_either(_HOSTS.values())}. Received: to={to!r}. Pass one of them, "
        "a class itself and not its name; for two kinds of layers convert twice."
    )


def _are_ours(classes):
    return _HOSTS.keys() >= set(classes.values())


def _either(classes, article=False):
    """The names of classes: "A, B or C", or "an A, a B or a C"."""
    *names, last = [
        _with_article(each) if article else each.__name__ for each in classes
    ]
    return f"{', '.join(names)} or {last}" if names else last


def _with_article(layer_class):
    name = layer_class.__name__
    return f"an {name}" if name in ("LSTM", "RNN") else f"a {name}"


def _checked(options, classes):
    """What a configuration has to say of the options. Raises where one is not allowed."""
    ours = _are_ours(classes)
    allowed = (*OPTIONS, "unroll") if ours else ("unroll",)
    names = _either(classes.values())
    for name, value in options.items():
        if name not in allowed:
            raise ValueError(
                f"An option for the {names} of the copy may be "
                f"{', '.join(allowed)}: no other argument leaves weights and outputs as "
                f"they are. Received: {name}={value!r}.{meant(name, allowed)}"
            )
    if not ours and not isinstance(options.get("unroll", False), bool):
        raise ValueError(
            f"`unroll` of {_either(classes.values(), article=True)} must be True, all "
            "steps in the graph, or False: it has no number of steps for an iteration of "
            "its loop. Received: "
            f"unroll={options['unroll']!r}. Pass False, or convert to {_either(classes)}."
        )
    if not options:
        return {}
    # Any of the classes: the options are the same. What float16 forbids the layers say.
    layer = _smallest(next(iter(classes.values())), dtype="float32", **options)
    config = layer.get_config()
    return {name: config.get(name) for name in options}


def _made_a_model(value):
    """What to do with what is no model."""
    if isinstance(value, str) or hasattr(value, "__fspath__"):
        return " Load it first: convert(keras.models.load_model(path))."
    if isinstance(value, list | tuple):
        return " Convert its models one by one, or keras.Sequential(layers)."
    return ""


# --- The configuration


def _configuration(model, classes):
    try:
        return keras.saving.serialize_keras_object(model)
    except NotImplementedError as error:
        made = _paths(model, {*classes, *classes.values()})
        raise ValueError(
            "A copy is made of the configuration of `model`. Received: "
            f"model={model.name!r}, of which a class has none, with layers to convert in "
            f"{', '.join(made) or 'none of its attributes'}. {_WAY_OUT}"
        ) from error


def _replaced(node, classes, options):
    """A serialized object with its layers replaced, and how many of them there were.

    With options, layers that are of a new class already are replaced by others of it.
    """
    if isinstance(node, list | tuple):
        found = [_replaced(value, classes, options) for value in node]
        return type(node)(value for value, _ in found), sum(n for _, n in found)
    if not isinstance(node, dict):
        return node, 0
    found = {key: _replaced(value, classes, options) for key, value in node.items()}
    node = {key: value for key, (value, _) in found.items()}
    number = sum(n for _, n in found.values())
    for old, new in classes.items():
        if options and _identity(new).items() <= node.items():
            arguments = node["config"]
        elif _identity(old).items() <= node.items():
            arguments = _arguments_for(old, new, node["config"])
        else:
            continue
        arguments = arguments | keras.saving.serialize_keras_object(options)
        return node | _identity(new) | {"config": arguments}, number + 1
    return node, number


@functools.cache  # to make a layer draws a seed, and takes an automatic name
def _identity(layer_class):
    """What names the class in a serialized layer."""
    serialized = keras.saving.serialize_keras_object(_smallest(layer_class))
    return {key: serialized[key] for key in ("module", "class_name", "registered_name")}


def _smallest(layer_class, **options):
    """A layer of the class, of one unit."""
    cells = layer_class in (BPTT, keras.layers.RNN)
    return layer_class(keras.layers.SimpleRNNCell(1) if cells else 1, **options)


def _arguments_for(old, new, config):
    """The configuration of a layer of the old class as one of the new class."""
    if new in _HOSTS:
        return config
    if "output_units" in config:
        raise ValueError(
            f"A {old.__name__} with an output layer cannot become {_with_article(new)}, "
            f"which has none. Received: layer {config['name']!r} with "
            f"output_units={config['output_units']}. Make the model anew, with "
            f"keras.layers.{new.__name__} and keras.layers.Dense in its place, and take "
            "the weights over: new.set_weights(model.get_weights())."
        )
    kept = {key: value for key, value in config.items() if key not in OPTIONS}
    # Layers of Keras take a number of steps for all of them.
    return kept | {"unroll": config["unroll"] is True}


# --- What is not converted, and what is lost


_WAY_OUT = (
    "Change the class that makes them, and take the weights over: "
    "new.set_weights(model.get_weights()). Or let the class take its layers as arguments "
    "and have them in its get_config."
)


def _paths(model, classes):
    """The ways to layers of these classes, which the configuration may have or not."""
    return [path for path, layer in layers_inside(model) if type(layer) in classes]


def _nothing_to_do(model, classes, options):
    """What to say where the configuration holds no layer to convert."""
    old = _either(classes, article=True)
    new = _either(classes.values(), article=True)
    received = f"Received: model={model.name!r}"
    wanted = f"`model` must hold {old}, to become {new}"
    made = _paths(model, classes)
    if options:
        wanted += f", or {new}, to get the options"
        made += _paths(model, classes.values())
    if made:
        return (
            f"{wanted}, in its configuration. {received}, which makes them itself: "
            f"{', '.join(made)}. {_WAY_OUT}"
        )
    held = {type(layer) for _, layer in layers_inside(model)}
    there = [each.__name__ for each in classes.values() if each in held]
    if there:
        option = "truncation=20" if _are_ours(classes) else "unroll=True"
        return (
            f"{wanted}. {received}, which holds {' and '.join(there)} alone, and no "
            f"option. Pass one, such as {option}."
        )
    kinds = dict.fromkeys(
        type(layer).__name__ for layer in getattr(model, "layers", [])
    )
    rest = "".join(
        f" Pass to={name!r} to convert every kind of layer."
        for name, every in _DIRECTIONS.items()
        if classes.items() < every.items() and not held.isdisjoint(every)
    )
    kinds = ", ".join(kinds) or "no layer"
    return f"{wanted}. {received}, which holds none: {kinds}.{rest}"


def _warn_of_others(copy, classes, wanted):
    """Of layers that a class has made anew, as its configuration does not have them."""

    def differs(layer):
        if type(layer) not in classes.values():
            return type(layer) in classes
        config = layer.get_config()
        return any(config.get(name) != value for name, value in wanted.items())

    others = [path for path, layer in layers_inside(copy) if differs(layer)]
    if others:
        warnings.warn(
            f"The copy of {copy.name!r} has layers that could not be converted: a class "
            "makes them itself and does not list them in its configuration: "
            f"{', '.join(others)}. {_WAY_OUT}",
            stacklevel=3,
        )


def _warn_of_cudnn(model, classes):
    """Of layers that ran cuDNN, which no layer of this package does."""
    if not tf.config.get_visible_devices("GPU"):
        return
    names = [
        layer.name
        for _, layer in layers_inside(model)
        if type(layer) in classes and _takes_cudnn(layer)
    ]
    if names:
        warnings.warn(
            f"On the GPU that is visible here Keras runs {', '.join(names)} of "
            f"{model.name!r} with cuDNN, which BPTTLSTM and BPTTGRU do not use: which is "
            "faster there has not been measured.",
            stacklevel=3,
        )


def _takes_cudnn(layer):
    """Whether Keras would run the layer with cuDNN, by the conditions that it documents."""
    return (
        getattr(layer, "use_cudnn", False) is not False
        and layer.activation in (keras.activations.tanh, keras.ops.tanh, tf.tanh)
        and layer.recurrent_activation
        in (keras.activations.sigmoid, keras.ops.sigmoid, tf.sigmoid)
        and layer.recurrent_dropout == 0
        and not layer.unroll
        and layer.use_bias
        and getattr(layer, "reset_after", True)
    )
