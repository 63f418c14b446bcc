"""The activation f of a recurrent step and what a gradient needs of it.

f acts on the pre-activation z_t. The backward pass needs delta = J_f(z)^T a. For an
elementwise f that is f'(z) * a, and for the common ones f' is a function of h = f(z), so
that nothing but h has to be kept. An f that mixes units (softmax) has a Jacobian, not a
slope; an elementwise formula would be silently wrong, so every unfamiliar f is probed.
"""

import dataclasses
import functools
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from keras_bptt.runtime.execution import op_callbacks, switches
from keras_bptt.runtime.explicit import vjp
from keras_bptt.runtime.tensors import widened

# f' as a function of h = f(z), with the conventions of TensorFlow's own gradients at kinks.
# Only functions whose f'(h) is as accurate as f'(z) stand here; softsign's is not.
_SELU_SCALE = 1.0507009873554804934193349852946
_SELU_SCALE_ALPHA = 1.7580993408473768599402175208123
_SLOPES = {
    "linear": tf.ones_like,
    "tanh": lambda h: 1 - h * h,
    "sigmoid": lambda h: h * (1 - h),
    "relu": lambda h: tf.cast(h > 0, h.dtype),
    "leaky_relu": lambda h: tf.where(h > 0, tf.ones_like(h), tf.cast(0.2, h.dtype)),
    "elu": lambda h: tf.where(h < 0, h + 1, tf.ones_like(h)),
    "selu": lambda h: tf.where(
        h < 0,
        h + tf.constant(_SELU_SCALE_ALPHA, h.dtype),
        tf.constant(_SELU_SCALE, h.dtype),
    ),
    "softplus": lambda h: -tf.math.expm1(-h),
    "exponential": lambda h: h,
}
_KNOWN = {getattr(keras.activations, name): slope for name, slope in _SLOPES.items()}
_KNOWN |= {
    getattr(tf.nn, name): _SLOPES[name] for name in ("tanh", "sigmoid", "relu", "elu")
}


@dataclasses.dataclass(frozen=True)
class Activation:
    """f with its derivatives; hashable, so that it can name a cached graph.

    Attributes:
        function: f, from (batch, units) to (batch, units).
        slope_of_output: f' as a function of h = f(z), or None.
        mixes: whether an output depends on more than the one input at its place.
    """

    function: Callable
    slope_of_output: Callable | None = None
    mixes: bool = False

    def __call__(self, z):
        """f(z), for z (..., units)."""
        if len(z.shape) == 2:
            # What Python code returns has no static shape.
            return tf.ensure_shape(self.function(z), z.shape)
        # The user's function is promised (batch, units), whatever it is called with here.
        rows = tf.reshape(z, [-1, z.shape[-1]])
        return tf.reshape(self.function(rows), tf.shape(z))

    def vjp_at_output(self, h, u):
        """f'(z) u, where h = f(z) tells the slope; rounded once, as TensorFlow does it."""
        return tf.cast(self.slope_of_output(widened(h)) * widened(u), u.dtype)

    def vjp(self, z, u):
        """J_f(z)^T u, the vector-Jacobian product, for z and u (..., units)."""
        rows = tf.reshape(z, [-1, z.shape[-1]])
        u = tf.reshape(u, tf.shape(rows))
        return tf.reshape(vjp(self.function, (rows,), (u,))[0], tf.shape(z))

    def called_with(self, dtype):
        """The same f, for z of another dtype than the one the function is called with."""
        if self.slope_of_output is not None:
            return self  # a known one, of any dtype
        return dataclasses.replace(self, function=_cast_around(self.function, dtype))


@functools.lru_cache(maxsize=256)  # one function for each, which names cached graphs
def _cast_around(function, dtype):
    return lambda z: tf.cast(function(tf.cast(z, dtype)), z.dtype)


def resolve(function: Callable | None, units: int, dtype: str) -> Activation:
    """Return the `Activation` of `function`, probing it where it is not a known one.

    None is linear, as it is to a cell of Keras.

    Raises:
        ValueError: where `function` changes the shape or dtype of its input, reads a
            trainable variable, mixes the examples of a batch, or gives two results for
            one input.
    """
    function = keras.activations.linear if function is None else function
    if function in _KNOWN:
        return Activation(function, _KNOWN[function])
    # Probe with numbers, also where a graph is being traced.
    with tf.init_scope():
        return Activation(function, mixes=_probe(function, units, dtype))


def xla_compiles(activation: Activation, units: int, dtype: str) -> bool:
    """Whether XLA can compile the activation and its derivative, as things are now."""
    # Where tf.debugging looks at every operation, it adds some that XLA does not know.
    if not tf.test.is_built_with_xla() or op_callbacks():
        return False
    # Where all runs eagerly, nothing would be compiled that could tell, or could fail.
    if activation.slope_of_output is not None or tf.config.functions_run_eagerly():
        return True
    return _xla_compiles(activation, units, dtype, switches())


@functools.lru_cache(maxsize=256)
def _xla_compiles(activation, units, dtype, switches):
    del switches  # what was judged under others is judged again

    @tf.function(jit_compile=True, autograph=False)
    def both(z):
        return activation.function(z), activation.vjp(z, z)

    with tf.init_scope():
        try:
            both(tf.zeros([1, units], dtype))
        except Exception:  # of any class: TensorFlow's, a user's, by kind of failure
            return False
    return True


def _probe(function, units, dtype):
    """Whether any unit moves when only other units of its row move."""
    rng = np.random.default_rng(0)
    shape = (4, units)
    row, unit = np.indices(shape)
    _evaluate(function, np.zeros(shape), dtype)  # a Keras layer is built by its call
    _refuse_trainable_variables(function, shape, dtype)
    mixes = False
    for scale in (0.3, 1.0, 4.0):
        base, other = rng.normal(0, scale, (2, *shape))
        h = _evaluate(function, base, dtype)

        def moved_beside(moved, base=base, other=other, h=h):
            new = _evaluate(function, np.where(moved, other, base), dtype)
            same = (new == h) | (np.isnan(new) & np.isnan(h))
            return np.any(~same & ~moved)

        if moved_beside(np.zeros(shape, bool)):
            raise ValueError(
                "`activation` must give one result for one input, for the backward pass "
                f"evaluates it again. Received: activation={function}, which is random. "
                "Use `dropout`, `recurrent_dropout` or a noise layer before this one."
            )
        if any(map(moved_beside, _halves(row))):
            raise ValueError(
                "`activation` must treat each example of a batch alone. Received: "
                f"activation={function}, which mixes them. Reduce over axis=-1 only."
            )
        mixes = mixes or any(map(moved_beside, _halves(unit)))
    return mixes


def _halves(index):
    """Sets of places such that any two indices are told apart by one of them.

    Two indices differ in some bit: the set that has it holds one of them, its complement
    the other. So 2 log2(n) sets do what n single ones would.
    """
    for bit in range(int(index.max()).bit_length()):
        yield index >> bit & 1 == 0
        yield index >> bit & 1 == 1


def _evaluate(function, z, dtype):
    z = tf.cast(z, dtype)
    h = tf.convert_to_tensor(function(z))
    if h.shape != z.shape or h.dtype != z.dtype:
        raise ValueError(
            f"`activation` must keep shape and dtype. Received: activation={function}, "
            f"which turns {tuple(z.shape)} {z.dtype.name} into {tuple(h.shape)} "
            f"{h.dtype.name}. Pass a function of one tensor that returns one like it."
        )
    return h.numpy().astype(float)


def _refuse_trainable_variables(function, shape, dtype):
    # A graph notes the variables that it reads; tapes are paused in an init_scope.
    graph = tf.function(function, autograph=False)
    graph = graph.get_concrete_function(tf.TensorSpec(shape, dtype)).graph
    if graph.trainable_variables:
        names = ", ".join(variable.name for variable in graph.trainable_variables)
        raise ValueError(
            "`activation` must not read trainable variables: their gradient would be "
            f"lost. Received: activation={function}, which reads {names}. Make the "
            "variable non-trainable, or pass activation=None and apply it as a layer."
        )
