"""The output layer that a BPTTRNN owns: a Dense that shares the options of its cell."""

import keras


def output_layer(cell, units, activation, dtype):
    """A Dense with the initializers, regularizers, constraints and bias of the cell."""
    return keras.layers.Dense(
        units,
        activation=activation,
        use_bias=cell.use_bias,
        kernel_initializer=_another(cell.kernel_initializer),
        bias_initializer=_another(cell.bias_initializer),
        kernel_regularizer=cell.kernel_regularizer,
        bias_regularizer=cell.bias_regularizer,
        kernel_constraint=cell.kernel_constraint,
        bias_constraint=cell.bias_constraint,
        dtype=dtype,
        name="output",
    )


def _another(initializer):
    # A random one gives all weights of one shape the same numbers. Any other, a function
    # perhaps, need not know its configuration.
    config = getattr(initializer, "get_config", dict)()
    if "seed" not in config:
        return initializer
    return type(initializer).from_config(config)
