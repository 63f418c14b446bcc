"""What the layer takes: checks of arguments and shapes, each with an error that helps.

The functions that check an argument return it as it is to be kept.
"""

import inspect
import math
import numbers

import numpy as np
import tensorflow as tf

from keras_bptt.runtime.wording import nearest
from keras_bptt.truncation import positive_integer

# Taken by every layer and recurrent layer, as a signature does not tell.
_OF_ANY_LAYER = ("name", "dtype", "trainable", "zero_output_for_mask")


def joined_signature(own, hosts):
    """The parameters of the host, then the keyword-only ones of `own`."""
    hosts = inspect.signature(hosts)
    *parameters, rest = hosts.parameters.values()
    added = inspect.signature(own).parameters.values()
    parameters += [p for p in added if p.kind is p.KEYWORD_ONLY]
    return hosts.replace(parameters=[*parameters, rest])


def misspelled(error, given, layer_class):
    """The host's error, with what arguments that it does not know may mean."""
    known = [*inspect.signature(layer_class.__init__).parameters, *_OF_ANY_LAYER]
    unknown = [n for n in given if n not in known and repr(n) in str(error)]
    if not unknown:
        return error
    hints = [f"help(keras_bptt.{layer_class.__name__}) names the arguments."]
    for name in unknown:
        if (match := nearest(name, known)) is not None:
            hints.insert(-1, f"Did you mean `{match}` by `{name}`?")
    return ValueError(f"{error}. " + " ".join(hints))


def without_cudnn(host, *args, **kwargs):
    """The arguments (args, kwargs) as the host takes them, which is to run no cuDNN.

    Else it would, where there is a GPU, and forbid XLA.
    """
    given = inspect.signature(host.__init__).bind(None, *args, **kwargs)
    value = given.arguments.get("use_cudnn", "auto")
    if value is not False and value != "auto":
        raise ValueError(
            "`use_cudnn` must be 'auto' or False: the gradient of this layer is its own, "
            "and cuDNN computes one that can be neither truncated nor clipped nor "
            f"differentiated again. Received: use_cudnn={value!r}. Use "
            f"keras.layers.{host.__name__} for cuDNN."
        )
    given.arguments["use_cudnn"] = False
    return given.args[1:], given.kwargs


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


def clipnorm_of(value, dtype):
    """`dtype`: in which the layer computes."""
    if value is None:
        return None
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ValueError(
            "`adjoint_clipnorm` must be a positive finite number, the largest norm of "
            f"dL/dh_t for one example, or None. Received: adjoint_clipnorm={value!r}. Pass "
            "None to clip nothing."
        )
    if dtype == "float16":
        raise ValueError(
            "`adjoint_clipnorm` is for compute dtypes of a wider range: in float16 the "
            "loss is scaled, and the cotangents that are clipped with it. Received: "
            f"adjoint_clipnorm={value!r}, compute dtype float16. Use "
            "'mixed_bfloat16' or 'float32'."
        )
    return float(value)


def max_growth_of(value):
    if value is None:
        return None
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 1 <= value < math.inf:
        raise ValueError(
            "`adjoint_max_growth` must be a finite number of at least 1, the largest norm "
            "of dL/dh_t as a multiple of what the losses send to the steps from t on, or "
            f"None. Received: adjoint_max_growth={value!r}. Pass None to clip nothing."
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
    return value if isinstance(value, bool) else int(value)


def all_steps(unroll):
    """What `unroll` is to the host: true where all steps are written into the graph."""
    # For a number np.False_, not False: Keras ignores an assignment of the very object that
    # an attribute returns, and `unroll = False` would be lost.
    return unroll if isinstance(unroll, bool) else np.False_


def check_inputs(name, shape, features=None, building=False):
    """`features`: what the layer was built for, if it was; `building` asks for them."""
    if len(shape) != 3 or (building and shape[-1] is None):
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
    if None not in (features, shape[-1]) and features != shape[-1]:
        raise ValueError(
            f"{name} was built for inputs with {features} features. Received: shape "
            f"{tuple(shape)}. Pass inputs with as many features, or make another layer."
        )


def check_dense(name, sequences):
    remedies = {
        tf.RaggedTensor: "x.to_tensor() and mask=tf.sequence_mask(x.row_lengths()), which "
        "skips what it fills up",
        tf.SparseTensor: "tf.sparse.to_dense(x)",
    }
    for kind, remedy in remedies.items():
        if isinstance(sequences, kind):
            raise ValueError(
                f"{name} takes dense tensors (batch, timesteps, features). Received: a "
                f"{kind.__name__} of shape {tuple(sequences.shape)}. Pass {remedy}."
            )


def check_mask(name, shape, mask):
    if mask is None:
        return
    given = tf.TensorShape(mask.shape)
    steps = given[:2] if given.rank == 3 and given[2] in (1, None) else given
    if not steps.is_compatible_with(shape[:2]):
        raise ValueError(
            f"{name} takes a `mask` of shape (batch, timesteps), here "
            f"{tuple(shape[:2])}. Received: shape {given}. Pass one boolean for each step "
            "of each example, False at steps to skip."
        )


def check_states(name, shape, rows, states):
    """`rows`: the shapes of a row of each state."""
    given = [tf.TensorShape(state.shape) for state in states]
    expected = [(shape[0], *row) for row in rows]
    fits = [g.is_compatible_with(e) for g, e in zip(given, expected, strict=False)]
    if len(given) != len(expected) or not all(fits):
        number = "one" if len(rows) == 1 else f"{len(rows)} states as"
        sizes = "units" if all(len(row) == 1 for row in rows) else "..."
        raise ValueError(
            f"{name} takes {number} `initial_state` of shape (batch, {sizes}), here "
            f"{', '.join(map(str, expected))}. Received: {len(given)} of shape "
            f"{', '.join(map(str, given))}. Pass one state for each example."
        )


def check_features(name, shape):
    """The shape of the inputs, as the layer is built."""
    if len(shape) < 3 or None in shape[2:]:
        raise ValueError(
            f"{name} takes inputs of shape (batch, timesteps, ...), of which all but the "
            f"first two sizes are fixed. Received: shape {tuple(shape)}. Add the missing "
            "axis with x[..., None] (one feature) or x[None] (one example)."
        )


def with_shape(name, sequences, features):
    """The inputs of a layer that was built for inputs with these features."""
    shape = sequences.shape
    if not shape.is_compatible_with((None, None, *features)):
        raise ValueError(
            f"{name} was built for inputs of shape (batch, timesteps, "
            f"{', '.join(map(str, features))}). Received: shape {tuple(shape)}. Pass such "
            "inputs, or make another layer."
        )
    if shape.rank is not None and shape[1] == 0:
        raise ValueError(
            f"{name} takes inputs of at least one timestep. Received: shape "
            f"{tuple(shape)}. Leave out empty sequences."
        )
    return tf.ensure_shape(sequences, (None, None, *features))
