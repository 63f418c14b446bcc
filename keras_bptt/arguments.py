"""What the layer takes: checks of arguments and shapes, each with an error that helps.

The functions that check an argument return it as it is to be kept.
"""

import math
import numbers

import tensorflow as tf

from keras_bptt.truncation import positive_integer


def units_of(value):
    if not positive_integer(value):
        raise ValueError(
            "`units` must be a positive integer, the size of the hidden state. "
            f"Received: units={value!r}."
        )
    return int(value)


def output_units_of(value, activation):
    if value is None:
        if activation is not None:
            raise ValueError(
                "`output_activation` is that of the output layer, which `output_units` "
                f"makes. Received: output_units=None, output_activation={activation!r}. "
                "Pass `output_units`, or the activation of the hidden state as "
                "`activation`."
            )
        return None
    if not positive_integer(value):
        raise ValueError(
            "`output_units` must be a positive integer, the size of the outputs, or None: "
            "the outputs are the hidden states. Received: "
            f"output_units={value!r}."
        )
    return int(value)


def checkpoint_every_of(value):
    if value is None or (isinstance(value, str) and value == "sqrt"):
        return value
    if not positive_integer(value):
        raise ValueError(
            "`checkpoint_every` must be a positive integer, the number of steps from one "
            "state that is kept to the next, 'sqrt' (the square root of the number of "
            "timesteps), or None (every state is kept). Received: "
            f"checkpoint_every={value!r}."
        )
    return int(value)


def clipnorm_of(value):
    if value is None:
        return None
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ValueError(
            "`adjoint_clipnorm` must be a positive finite number, the largest norm of "
            f"dL/dh_t for one example, or None. Received: adjoint_clipnorm={value!r}. Pass "
            "None to clip nothing."
        )
    return float(value)


def jit_compile_of(value):
    if not isinstance(value, bool) and value != "auto":
        raise ValueError(
            "`jit_compile` must be True, False or 'auto' (compile where the layer is "
            f"called with training=True). Received: jit_compile={value!r}."
        )
    return value


def unroll_of(value):
    if not isinstance(value, bool) and not positive_integer(value):
        raise ValueError(
            "`unroll` must be True (write every step into the graph), False, or a positive "
            f"integer, so many steps an iteration of the loop. Received: unroll={value!r}."
        )
    return value


def check_inputs(name, shape, features=None):
    """`features`: what the layer was built for, if it was."""
    if len(shape) != 3 or shape[-1] is None:
        raise ValueError(
            f"{name} takes inputs of shape (batch, timesteps, features) with a fixed "
            f"number of features. Received: shape {tuple(shape)}. Add the missing axis "
            "with x[..., None] (one feature) or x[None] (one example), or flatten what is "
            "too much with keras.layers.Reshape."
        )
    if shape[1] == 0:
        raise ValueError(
            f"{name} takes inputs of at least one timestep. Received: shape "
            f"{tuple(shape)}. Leave out empty sequences."
        )
    if features not in (None, shape[-1]):
        raise ValueError(
            f"{name} was built for inputs with {features} features. Received: shape "
            f"{tuple(shape)}. Pass inputs with as many features, or make another layer."
        )


def check_mask(name, shape, mask):
    if mask is None:
        return
    given = tuple(mask.shape)
    steps = given[:2] if len(given) == 3 and given[2] == 1 else given
    if not _compatible(steps, shape[:2]):
        raise ValueError(
            f"{name} takes a `mask` of shape (batch, timesteps), here "
            f"{tuple(shape[:2])}. Received: shape {given}. Pass one boolean for each step "
            "of each example, False at steps to skip."
        )


def check_state(name, shape, units, initial_state):
    if initial_state is None:
        return
    nested = isinstance(initial_state, (list, tuple))
    given = [tuple(s.shape) for s in (initial_state if nested else [initial_state])]
    expected = (shape[0], units)
    if len(given) != 1 or not _compatible(given[0], expected):
        raise ValueError(
            f"{name} takes one `initial_state` of shape (batch, units), here "
            f"{expected}. Received: {len(given)} of shape "
            f"{', '.join(map(str, given))}. Pass one state for each example."
        )


def _compatible(given, expected):
    return tf.TensorShape(given).is_compatible_with(expected)
