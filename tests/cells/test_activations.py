"""Slopes, Jacobians, and the probe that finds out what kind of function f is."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import relative_error, rng

from keras_bptt.cells import activations
from keras_bptt.cells.activations import resolve

DTYPES = pytest.mark.parametrize("dtype", ["float64", "float32"])
# Every function whose slope is taken from its output, under the name of its module.
KNOWN = {f"{f.__module__}.{f.__name__}": f for f in activations._KNOWN}
each_known = pytest.mark.parametrize("f", KNOWN.values(), ids=KNOWN)

MIXING = {"softmax", "log_softmax", "sparsemax"}
# Those that take more than a tensor, or change its shape: not the activation of a layer.
NOT_OF_ONE_TENSOR = {"glu", "threshold", "get", "serialize", "deserialize"}
ELEMENTWISE = {
    name: f
    for name, f in vars(keras.activations).items()
    if inspect.isfunction(f) and name not in MIXING | NOT_OF_ONE_TENSOR
}
each_elementwise = pytest.mark.parametrize("f", ELEMENTWISE.values(), ids=ELEMENTWISE)


def autodiff(f, z):
    with tf.GradientTape() as tape:
        tape.watch(z)
        h = f(z)
    return h, tape.gradient(h, z)


def slope_of_output(f, h):
    activation = resolve(f, int(h.shape[-1]), h.dtype.name)
    assert activation.slope_of_output is not None
    return activation.slope_of_output(h)


# ---------------------------------------------------------------------- slopes


@each_known
def test_slope_equals_central_differences(f):
    """On a grid that has 0, where the kinks are, half-way between two of its points."""
    z = tf.constant(np.linspace(-4, 4, 400)[None])
    epsilon = 1e-6
    numeric = (f(z + epsilon) - f(z - epsilon)) / (2 * epsilon)
    slope = slope_of_output(f, f(z))
    # Rounding of f, up to e^4 = 55, divided by 1e-6; curvature adds less.
    assert np.max(np.abs(slope - numeric)) < 55 * 2.2e-16 / epsilon


@each_known
@DTYPES
def test_slope_is_as_accurate_as_that_of_tensorflow(f, dtype):
    """From h alone, relative to f', also where |z| is large or next to a kink."""
    exponents = np.linspace(-12, 1.9, 200)  # up to e^79, which is a number in float32
    z = np.concatenate([-(10.0 ** exponents[::-1]), 10.0**exponents])[None]
    if dtype == "float32":
        # Numbers below 1e-38 are flushed to 0, each time in another place.
        z = z[:, z[0] > -80]
    h, expected = autodiff(f, tf.constant(z, dtype))
    slope = slope_of_output(f, h)
    assert slope.dtype == dtype
    # Where h is rounded to its limit (tanh to 1) both have cancelled, and are 0 or an eps
    # or two: that much absolutely, and relatively a few roundings of each formula.
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(slope, expected, rtol=4 * eps, atol=2 * eps)


@pytest.mark.parametrize(
    "f", [keras.activations.softplus, keras.activations.exponential]
)
@DTYPES
def test_small_slopes_are_relatively_accurate(f, dtype):
    """Far to the left f' = e^z, and no digit of it is lost, unlike in 1 - e^-h."""
    z = tf.constant(np.linspace(-60, -1, 100)[None], dtype)
    h, expected = autodiff(f, z)
    eps = np.finfo(dtype).eps
    # e^z as such is known to |z| eps where z is rounded on its way.
    np.testing.assert_allclose(slope_of_output(f, h), expected, rtol=60 * eps)


@each_known
@DTYPES
def test_slope_at_kinks_is_that_of_tensorflow(f, dtype):
    """At 0 and at the numbers next to it: the same bits."""
    near = np.finfo(dtype).tiny
    z = tf.constant([[0.0, -0.0, near, -near, 1e-3, -1e-3]], dtype)
    h, expected = autodiff(f, z)
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(slope_of_output(f, h), expected, rtol=2 * eps)


@each_elementwise
@DTYPES
def test_slope_of_every_elementwise_function(f, dtype):
    """From h or from z, whatever the shape."""
    z = tf.constant(rng().normal(size=(3, 4, 5)), dtype)
    h, expected = autodiff(f, z)
    activation = resolve(f, 5, dtype)
    ones = tf.ones_like(z)
    slope = activation.vjp(z, ones)
    if activation.slope_of_output is not None:
        np.testing.assert_array_equal(h, activation(z))
        slope = activation.vjp_at_output(h, ones)
    # The same formula, or one with two or three roundings in another place.
    np.testing.assert_allclose(slope, expected, atol=4 * np.finfo(dtype).eps)


def test_infinite_slopes_are_not_invented():
    """Where f saturates, f' is 0 and no NaN."""
    z = tf.constant([[-np.inf, np.inf]])
    for name, expected in {
        "tanh": [0, 0],
        "sigmoid": [0, 0],
        "relu": [0, 1],
        "softplus": [0, 1],
        "elu": [0, 1],
        "linear": [1, 1],
    }.items():
        f = getattr(keras.activations, name)
        np.testing.assert_array_equal(slope_of_output(f, f(z))[0], expected, name)


# ---------------------------------------------------------------------- Jacobians


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "gelu", "tanh"])
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-14), ("float32", 2e-6)])
def test_products_with_the_jacobian(name, dtype, tolerance):
    """Tolerance: sums of 5 products, some roundings each, relative to the largest."""
    f = getattr(keras.activations, name)
    random = rng(1)
    z, u = (tf.constant(random.normal(size=(6, 5)), dtype) for _ in range(2))
    with tf.GradientTape() as tape:
        tape.watch(z)
        h = f(z)
    J = tape.batch_jacobian(h, z)
    if name == "softmax":  # by hand: J = diag(h) - h h^T
        expected = np.eye(5) * h[:, None] - h[:, None] * h[:, :, None]
        np.testing.assert_allclose(J, expected, atol=4 * np.finfo(dtype).eps)
    vjp = resolve(f, 5, dtype).vjp
    for function in (vjp, tf.function(vjp)):
        got = function(z, u)
        assert relative_error(got, tf.einsum("bij,bi->bj", J, u)) < tolerance


def test_all_steps_at_once_are_each_step():
    """(timesteps, batch, units): the function itself only ever sees (batch, units)."""

    def f(z):
        assert len(z.shape) == 2
        return keras.activations.log_softmax(z)

    random = rng(3)
    z, u = (tf.constant(random.normal(size=(2, 3, 4))) for _ in range(2))
    activation = resolve(f, 4, "float64")
    h, whole = activation(z), activation.vjp(z, u)
    for t in range(2):
        np.testing.assert_allclose(h[t], activation(z[t]), rtol=1e-14)
        np.testing.assert_allclose(whole[t], activation.vjp(z[t], u[t]), rtol=1e-14)


# ---------------------------------------------------------------------- the probe


@each_elementwise
def test_elementwise_functions_are_found_elementwise(f):
    """In every dtype and size: vectorised kernels treat the end of an array otherwise."""
    assert not any(resolve(f, units, "float32").mixes for units in (1, 2, 5))
    if f.__name__ in ("gelu", "silu", "mish", "softsign", "hard_sigmoid"):
        sizes = zip(
            ("float16", "bfloat16", "float32", "float64") * 3,
            (3, 64, 513) * 4,
            strict=True,
        )
        for dtype, units in sizes:
            assert not resolve(f, units, dtype).mixes, (dtype, units)


def depends_on_one_other(first, second):
    """f(z) = tanh(z), but for unit `first`, into which unit `second` enters."""

    def f(z):
        moved = tf.one_hot(first, z.shape[-1], dtype=z.dtype) * z[:, second, None]
        return tf.tanh(z + 0.1 * moved)

    return f


def cumulative(z):
    return tf.cumsum(z, axis=-1)


def centred(z):
    return z - tf.reduce_mean(z, axis=-1, keepdims=True)


def maxout(z):
    """Zero wherever another unit is larger: flat almost everywhere."""
    return tf.where(z == tf.reduce_max(z, -1, keepdims=True), z, tf.zeros_like(z))


@pytest.mark.parametrize(
    "f",
    [getattr(keras.activations, name) for name in sorted(MIXING)]
    + [cumulative, centred, maxout],
)
def test_mixing_functions_are_found(f):
    for units in (2, 3, 100, 513):
        activation = resolve(f, units, "float32")
        assert activation.mixes
        assert activation.slope_of_output is None


@pytest.mark.parametrize("f", [tf.nn.softmax, cumulative, centred])
def test_nothing_mixes_one_unit(f):
    assert not resolve(f, 1, "float32").mixes


def test_one_unit_that_depends_on_one_other_is_found():
    """Whatever their places; in a few units every pair is told apart."""
    for units in (2, 3, 100, 513):
        last = units - 1
        for first, second in [(0, last), (last, 0), (units // 2, units // 2 - 1)]:
            f = depends_on_one_other(first, second)
            assert resolve(f, units, "float32").mixes, (first, second)
    for first, second in np.ndindex(3, 3):
        mixes = resolve(depends_on_one_other(first, second), 3, "float64").mixes
        assert mixes == (first != second), (first, second)


def test_nan_is_a_result_like_any_other():
    """The square root of what is negative is NaN, each time and for itself."""
    assert not resolve(tf.sqrt, 4, "float32").mixes


def test_probe_works_while_a_graph_is_traced():
    found = []

    @tf.function
    def trace(x):
        found.append(resolve(keras.activations.softmax, 3, "float32").mixes)
        return x

    trace(tf.zeros([]))
    assert found == [True]


def test_probe_leaves_random_state_alone():
    """No number of NumPy's or TensorFlow's global generators is used up."""

    def drawn(probe):
        keras.utils.set_random_seed(3)
        if probe:
            resolve(keras.activations.gelu, 4, "float32")
        return np.random.normal(), tf.random.normal([]).numpy()

    assert drawn(True) == drawn(False)


def parametric_relu():
    layer = keras.layers.PReLU()
    layer.build((None, 5))
    return layer


SLOPE = tf.Variable(0.1, name="learned_slope")
BATCH, RANDOM = (
    "treat each example of a batch alone",
    "one result for one input.*random",
)
WRONG = {
    "mean of the batch": (lambda z: z - tf.reduce_mean(z, 0, keepdims=True), BATCH),
    "norm of the batch": (lambda z: z / tf.norm(z), BATCH),
    "reversed batch": (lambda z: tf.reverse(z, [0]), BATCH),
    "noise": (lambda z: z + tf.random.normal(tf.shape(z)), RANDOM),
    "dropout": (lambda z: tf.nn.dropout(tf.tanh(z), 0.5), RANDOM),
    "random scale": (lambda z: tf.tanh(z) * tf.random.uniform([]), RANDOM),
    "variable": (lambda z: tf.maximum(z, SLOPE * z), "trainable variab.*learned_slope"),
    "layer": (parametric_relu(), "trainable variables.*alpha"),
    "fewer units": (lambda z: z[:, :2], r"keep shape and dtype.*into \(4, 2\) float32"),
    "no units": (lambda z: tf.reduce_sum(z, -1), r"keep.*into \(4,\) float32"),
    "more units": (lambda z: tf.concat([z, z], -1), r"keep.*into \(4, 10\) float32"),
    "float64": (lambda z: tf.cast(z, "float64"), r"keep.*into \(4, 5\) float64"),
    "int32": (lambda z: tf.cast(z > 0, "int32"), r"keep.*into \(4, 5\) int32"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_activation_raises(name):
    f, message = WRONG[name]
    for units in (1, 2, 100) if message == BATCH else (5,):
        with pytest.raises(ValueError, match=message):
            resolve(f, units, "float32")


def test_other_variable_is_allowed():
    slope = tf.Variable(0.1, trainable=False)
    assert not resolve(lambda z: tf.maximum(z, slope * z), 5, "float32").mixes


def test_activation_is_hashable():
    """Equal where the function is: a graph is cached under it."""
    for f in (keras.activations.tanh, keras.activations.gelu):
        one, other = (resolve(f, 4, "float32") for _ in range(2))
        assert one == other
        assert hash(one) == hash(other)
