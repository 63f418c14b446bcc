"""The output layer that a BPTTRNN owns: a Dense that shares the options of its cell."""

import keras

from keras_bptt.layers.weights import stored

# What it takes of the cell, where the cell has it.
SHARED = ("use_bias", "kernel_initializer", "bias_initializer")
SHARED += ("kernel_regularizer", "bias_regularizer")
SHARED += ("kernel_constraint", "bias_constraint")


def output_layer(cell, units, activation, dtype):
    """A Dense with the initializers, regularizers, constraints and bias of the cell."""
    shared = {name: getattr(cell, name) for name in SHARED if hasattr(cell, name)}
    for name in ("kernel_initializer", "bias_initializer"):
        if name in shared:
            shared[name] = _another(shared[name])
    return keras.layers.Dense(
        units, activation=activation, dtype=dtype, name="output", **shared
    )


def is_product(layer, dtype):
    """Whether a layer is g(h V + c) in this dtype, so that the recurrence may compute it.

    A quantized Dense is not, nor is any other layer put in its place: these are called.
    """
    return (
        layer is not None
        and getattr(layer.call, "__func__", None) is keras.layers.Dense.call
        and layer.dtype_policy.quantization_mode is None
        and layer.compute_dtype == dtype
    )


def weights_of(cell, layer):
    """V and, if there is one, c, as they are stored."""
    return stored(
        cell.dtype_policy, [v for v in (layer.kernel, layer.bias) if v is not None]
    )


def config_of(layer, policy):
    """What makes the output layer again, in a layer of the dtype `policy`."""
    config = {
        "output_units": layer.units,
        "output_activation": keras.activations.serialize(layer.activation),
    }
    if layer.dtype_policy != policy:  # it has been quantized
        config["output_dtype"] = keras.saving.serialize_keras_object(layer.dtype_policy)
    return config


def _another(initializer):
    # A random one gives all weights of one shape the same numbers. Any other, a function
    # perhaps, need not know its configuration.
    config = getattr(initializer, "get_config", dict)()
    if "seed" not in config:
        return initializer
    return type(initializer).from_config(config)
