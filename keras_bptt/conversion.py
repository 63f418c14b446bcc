"""convert: a model of SimpleRNN as one of BPTTRNN, and back; or with other options."""

import functools
import warnings

import keras

from keras_bptt.layers.bptt_rnn import BPTTRNN
from keras_bptt.layers.copied_state import copy_optimizer_state, copy_own_state
from keras_bptt.layers.inside import layers_inside
from keras_bptt.layers.options import OPTIONS
from keras_bptt.runtime.wording import meant


def convert(model, to=BPTTRNN, **options):
    """Return a copy of a model with BPTTRNN in place of SimpleRNN, or the other way round.

    Use it where a trained model is there already: a `.weights.h5` file names the class
    that it was saved from and loads into no other. Use it too to give the BPTTRNN of a
    model other options, such as what `gradient_flow` advises, or `unroll=1` for an export
    to ONNX. Every layer of the one class (not of a subclass, nor `keras.layers.RNN`)
    becomes one of the other, and every layer that is one then has the options, wherever it
    is in the model: in a `Bidirectional` or another wrapper, in a model inside the model,
    shared between two calls, in a layer of your own that has it in its configuration.
    Outputs are the same.
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
        **options: For every `BPTTRNN` of the copy, also where it was one before:
            `truncation`, `checkpoint_every`, `adjoint_clipnorm`, `adjoint_max_growth`,
            `jit_compile`, `unroll`.
            None takes away one of the first three; what is not named stays. For every
            `SimpleRNN` of the copy: `unroll`, True or False.

    Returns:
        A new model, compiled if the other is.

    Raises:
        ValueError: for another `to`, an option that is none of these, a model without a
            layer to convert or to give an option to, a `BPTTRNN` with an output layer of
            its own, which SimpleRNN does not have, and an optimizer of other weights than
            are trainable now.

    Warns:
        UserWarning: where a class of your own makes layers that its configuration does not
            have. They are in the copy as the class makes them.

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
    >>> clipped = convert(fast, adjoint_clipnorm=0.07).layers[0].backward_layer
    >>> clipped.truncation, clipped.adjoint_clipnorm
    (Truncation(steps=20), 0.07)
    >>> back = convert(fast, to=keras.layers.SimpleRNN)
    >>> type(back.layers[0].forward_layer).__name__
    'SimpleRNN'
    """
    _check(model, to, options)
    config, number = _replaced(_configuration(model, to), to, options)
    if not number:
        raise ValueError(_nothing_to_do(model, to, options))
    # What is in memory is trusted, a lambda too.
    copy = keras.saving.deserialize_keras_object(config, safe_mode=False)
    copy.set_weights(model.get_weights())
    _warn_of_others(copy, to, options)
    copy_own_state(model, copy)
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and optimizer.built:
        copy_optimizer_state(optimizer, copy)
    return copy


def _other(layer_class):
    return keras.layers.SimpleRNN if layer_class is BPTTRNN else BPTTRNN


def _check(model, to, options):
    if not isinstance(model, keras.Layer):
        raise ValueError(
            "`model` must be a keras.Model or a keras.Layer. Received: "
            f"model={model!r} of type {type(model).__name__}.{_made_a_model(model)}"
        )
    if to not in (BPTTRNN, keras.layers.SimpleRNN):
        raise ValueError(
            "`to` must be the class keras_bptt.BPTTRNN or keras.layers.SimpleRNN. "
            f"Received: to={to!r}."
        )
    allowed = (*OPTIONS, "unroll") if to is BPTTRNN else ("unroll",)
    for name, value in options.items():
        if name not in allowed:
            raise ValueError(
                f"An option for the {to.__name__} of the copy may be "
                f"{', '.join(allowed)}: no other argument leaves weights and outputs as "
                f"they are. Received: {name}={value!r}.{meant(name, allowed)}"
            )
    if to is not BPTTRNN and not isinstance(options.get("unroll", False), bool):
        raise ValueError(
            "`unroll` of a SimpleRNN must be True, all steps in the graph, or False: it "
            "has no number of steps for an iteration of its loop. Received: "
            f"unroll={options['unroll']!r}. Pass False, or convert to BPTTRNN."
        )
    if options:
        # Raises where a value is not allowed. What float16 forbids the layers say.
        to(1, dtype="float32", **options)


def _made_a_model(value):
    """What to do with what is no model."""
    if isinstance(value, str) or hasattr(value, "__fspath__"):
        return " Load it first: convert(keras.models.load_model(path))."
    if isinstance(value, list | tuple):
        return " Convert its models one by one, or keras.Sequential(layers)."
    return ""


def _configuration(model, to):
    try:
        return keras.saving.serialize_keras_object(model)
    except NotImplementedError as error:
        inside = layers_inside(model)
        made = [path for path, layer in inside if type(layer) in (to, _other(to))]
        raise ValueError(
            "A copy is made of the configuration of `model`. Received: "
            f"model={model.name!r}, of which a class has none, with layers to convert in "
            f"{', '.join(made) or 'none of its attributes'}. {_WAY_OUT}"
        ) from error


def _nothing_to_do(model, to, options):
    """What to say where the configuration holds no layer to convert."""
    other, received = _other(to), f"Received: model={model.name!r}"
    wanted = f"`model` must hold a {other.__name__}, to become a {to.__name__}"
    inside = layers_inside(model)
    made = [path for path, layer in inside if type(layer) is other]
    if options:
        wanted += f", or a {to.__name__}, to get the options"
        made += [path for path, layer in inside if type(layer) is to]
    if made:
        return (
            f"{wanted}, in its configuration. {received}, which makes them itself: "
            f"{', '.join(made)}. {_WAY_OUT}"
        )
    if any(type(layer) is to for _, layer in inside):
        return (
            f"{wanted}. {received}, which holds {to.__name__} alone, and no option. Pass "
            f"one, such as {'truncation=20' if to is BPTTRNN else 'unroll=True'}."
        )
    kinds = dict.fromkeys(
        type(layer).__name__ for layer in getattr(model, "layers", [])
    )
    return f"{wanted}. {received}, which holds none: {', '.join(kinds) or 'no layer'}."


_WAY_OUT = (
    "Change the class that makes them, and take the weights over: "
    "new.set_weights(model.get_weights()). Or let the class take its layers as arguments "
    "and have them in its get_config."
)


def _warn_of_others(copy, to, options):
    """Of layers that a class has made anew, as its configuration does not have them."""
    expected = to(1, dtype="float32", **options).get_config()

    def differs(layer):
        if type(layer) is not to:
            return type(layer) is _other(to)
        config = layer.get_config()
        return any(config.get(name) != expected.get(name) for name in options)

    others = [path for path, layer in layers_inside(copy) if differs(layer)]
    if others:
        warnings.warn(
            f"The copy of {copy.name!r} has layers that could not be converted: a class "
            "makes them itself and does not list them in its configuration: "
            f"{', '.join(others)}. {_WAY_OUT}",
            stacklevel=3,
        )


def _replaced(node, to, options):
    """A serialized object with its layers replaced, and how many of them there were.

    With options, layers of the class `to` are too, by others of the class.
    """
    if isinstance(node, list | tuple):
        found = [_replaced(value, to, options) for value in node]
        return type(node)(value for value, _ in found), sum(n for _, n in found)
    if not isinstance(node, dict):
        return node, 0
    found = {key: _replaced(value, to, options) for key, value in node.items()}
    node = {key: value for key, (value, _) in found.items()}
    number = sum(n for _, n in found.values())
    if options and _identity(to).items() <= node.items():
        arguments = node["config"]
    elif _identity(_other(to)).items() <= node.items():
        arguments = _arguments_for(to, node["config"])
    else:
        return node, number
    arguments = arguments | keras.saving.serialize_keras_object(options)
    return node | _identity(to) | {"config": arguments}, number + 1


@functools.cache  # to make a layer draws a seed, and takes an automatic name
def _identity(layer_class):
    """What names the class in a serialized layer."""
    serialized = keras.saving.serialize_keras_object(layer_class(1))
    return {key: serialized[key] for key in ("module", "class_name", "registered_name")}


def _arguments_for(to, config):
    if to is BPTTRNN:
        return config
    if "output_units" in config:
        raise ValueError(
            "A BPTTRNN with an output layer cannot become a SimpleRNN, which has none. "
            f"Received: layer {config['name']!r} with "
            f"output_units={config['output_units']}."
        )
    kept = {key: value for key, value in config.items() if key not in OPTIONS}
    # SimpleRNN takes a number of steps for all of them.
    return kept | {"unroll": config["unroll"] is True}
