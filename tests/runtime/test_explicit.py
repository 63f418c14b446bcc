"""The joint between forward and backward: cotangents, constants, cached graphs, memory."""

import gc
import itertools
import types

import numpy as np
import pytest
import tensorflow as tf
from helpers import MODES, few, rng
from plain_rnn import Constants, Recurrence, recurrence

from keras_bptt.cells.activations import resolve
from keras_bptt.runtime import explicit as module
from keras_bptt.runtime.explicit import (
    Derivation,
    explicit,
    explicit_first_order,
    run,
    vjp,
)


def product(a, b):
    """(a b, a^2) with a written-out gradient."""

    def forward(a, b):
        return (a * b, a * a), ()

    def backward(args, outputs, residuals, cotangents):
        (a, b), (d_product, d_square) = args, cotangents
        return d_product * b + 2 * a * d_square, d_product * a

    return explicit(forward, backward)(a, b)


# The same as a `Derivation`, whose backward pass may be called with residuals.
def forward(options, constants, arguments):
    a, b = arguments
    return (a * b, a * a), {"a": a}


def backward(options, constants, outputs, residuals, cotangents, arguments):
    a, b = arguments
    d_product, d_square = cotangents
    return d_product * b + 2 * residuals["a"] * d_square, d_product * a


def composed(options, constants, arguments):
    a, b = arguments
    return a * b, a * a


def fused(a, b):
    return explicit_first_order(
        Derivation(forward, backward, composed), None, None, (a, b)
    )


FORMS = pytest.mark.parametrize("form", [product, fused])


@FORMS
def test_derivatives_of_a_product(form, mode):
    """L = sum(u a b + v a^2): dL/da = u b + 2 v a, and what follows from it, exactly."""
    a, b, u, v = (tf.constant(rng(i).normal(size=(2, 3))) for i in range(4))

    def derivatives(a, b, u, v):
        with tf.GradientTape(persistent=True) as third:
            third.watch([a, b, u, v])
            with tf.GradientTape(persistent=True) as second:
                second.watch([a, b, u, v])
                with tf.GradientTape() as first:
                    first.watch([a, b])
                    outputs = form(a, b)
                d_a, d_b = first.gradient(outputs, [a, b], [u, v])
            cubic = second.gradient(d_a, [a, b, u, v], a * a)
        return d_a, d_b, *cubic, *third.gradient(cubic[0], [a, v])

    results = MODES[mode](derivatives)(a, b, u, v)
    d_aa, d_aab = 2 * v * a * a, u * a * a
    expected = [u * b + 2 * v * a, u * a, d_aa, d_aab, b * a * a, 2 * a**3]
    # d(2 v a^2)/da and /dv: the cotangent a^2 of the second derivative counts as well.
    expected += [4 * v * a, 2 * a * a]
    for got, value in zip(results, expected, strict=True):
        np.testing.assert_allclose(got, value, rtol=1e-14)


def halves(a, explicit=explicit):
    """The left and the right half of the columns."""

    def forward(a):
        return tuple(tf.split(a, 2, axis=1)), ()

    def backward(args, outputs, residuals, cotangents):
        return (tf.concat(cotangents, 1),)  # which asks for as many rows in each

    return explicit(forward, backward)(a)


def test_cotangents_of_size_one_are_broadcast():
    """A reloaded SavedModel hands in zeros whose unknown sizes are 1."""

    @tf.function(input_signature=[tf.TensorSpec((None, 4))])
    def gradient(a):
        with tf.GradientTape() as tape:
            tape.watch(a)
            left, right = halves(a)
        return tape.gradient([left, right], a, [left, tf.zeros((1, 2))])

    a = tf.constant(rng().normal(size=(3, 4)), "float32")
    d_a = gradient(a)
    np.testing.assert_array_equal(d_a[:, :2], a[:, :2])
    np.testing.assert_array_equal(d_a[:, 2:], tf.zeros((3, 2)))


def test_saved_model_with_an_unused_output(tmp_path, mode):
    """The same for real: saved, loaded, one output used, of unknown size."""
    saved = tf.Module()
    spec = tf.TensorSpec((None, 4))
    saved.halves = tf.function(lambda a: halves(a), input_signature=[spec])
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=True)
    tf.saved_model.save(saved, tmp_path, options=options)
    loaded = tf.saved_model.load(tmp_path).halves

    def gradient(a):
        with tf.GradientTape() as tape:
            tape.watch(a)
            left = loaded(a)[0]
        return tape.gradient(left, a)

    d_a = MODES[mode](gradient)(tf.ones((3, 4)))
    np.testing.assert_array_equal(d_a, [[1, 1, 0, 0]] * 3)


def test_constants_have_no_gradient():
    """Neither what is captured nor a `Derivation`'s own: relied on for dropout."""
    factor, x = tf.constant([2.0]), tf.constant([3.0])

    def captured(x):
        return explicit(
            lambda x: ((x * factor,), ()), lambda args, y, residuals, d: d[0] * factor
        )(x)

    def own(x):
        derivation = Derivation(
            lambda options, constant, x: ((constant * x,), ()),
            lambda options, constant, y, residuals, d, x: (constant * d[0],),
            lambda options, constant, x: (constant * x,),
        )
        return explicit_first_order(derivation, None, factor, x)

    for form in (captured, own):
        with tf.GradientTape() as outer:
            outer.watch([factor, x])
            with tf.GradientTape() as tape:
                tape.watch([factor, x])
                (y,) = form(x)
            d_factor, d_x = tape.gradient(y, [factor, x])
        assert d_factor is None and d_x == 2.0
        assert form is captured or outer.gradient(d_x, factor) is None


def check_residuals(modules, wrap):
    """y = a^2 whose gradient 2 a reads a residual: to the next derivative a constant."""

    def forward(a):
        return (a * a,), a

    def backward(args, outputs, residuals, cotangents):
        return (2 * residuals * cotangents[0],)

    def second_derivative(a):
        with tf.GradientTape() as outer:
            outer.watch(a)
            with tf.GradientTape() as tape:
                tape.watch(a)
                (y,) = module.explicit(forward, backward)(a)
            first = tape.gradient(y, a)
        zero = tf.UnconnectedGradients.ZERO
        return first, outer.gradient(first, a, unconnected_gradients=zero)

    first, second = wrap(second_derivative)(tf.constant([3.0]))
    assert first == 6
    assert second == 0


def test_residuals_are_numbers(mode):
    check_residuals(types.SimpleNamespace(explicit=module), MODES[mode])


def test_vjp_of_an_unconnected_argument_is_zero(mode):
    def products(a, b):
        return vjp(lambda a, b: (2 * a,), (a, b), (tf.ones_like(a),))

    d_a, d_b = MODES[mode](products)(tf.constant([3.0]), tf.constant([4.0, 5.0]))
    np.testing.assert_array_equal(d_a, [2.0])
    np.testing.assert_array_equal(d_b, [0.0, 0.0])


# --- Cached graphs


def traced():
    """A function to be run, and the options of each time that Python runs it."""
    seen = []

    def function(options, x):
        seen.append(options)
        return x * options

    return function, seen


def test_equal_calls_share_a_graph():
    """Others have another: one for the first length, one for all that follow."""
    function, seen = traced()
    for options, value in itertools.product((2, 5), (1.0, 3.0)):
        assert run(function, options, tf.constant([value])) == options * value
    assert seen == [2, 5]
    function, seen = traced()
    for steps in range(1, 30):
        assert run(function, 2, tf.ones((steps, 3))).shape == (steps, 3)
    assert len(seen) <= 3


def test_no_graph_of_its_own_inside_a_graph():
    function, _ = traced()
    outer = tf.function(lambda x: run(function, 2, x))
    operations = outer.get_concrete_function(tf.constant(1.0)).graph.get_operations()
    assert not [op for op in operations if "PartitionedCall" in op.type]


# --- Memory


def recurrent(a, b):
    options = Recurrence(resolve(tf.nn.tanh, 3, "float32"), return_sequences=True)
    x = tf.stack([a] * 4, axis=1)
    return recurrence(options, Constants(), x, tf.eye(3), tf.eye(3), b)


def called(form, a, b):
    return form(a, b)


def differentiated(form, a, b, times=1):
    with tf.GradientTape() as tape:
        tape.watch(a)
        y = form(a, b) if times == 1 else differentiated(form, a, b, times - 1)
    return tape.gradient(y, a)


def differentiated_twice(form, a, b):
    return differentiated(form, a, b, 2)


def tensors_alive():
    return sum(isinstance(thing, tf.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize(
    ("form", "step"),
    few(
        itertools.product(
            (product, fused, recurrent), (called, differentiated, differentiated_twice)
        ),
        lambda form, step: (form, step) == (recurrent, differentiated_twice),
    ),
)
def test_memory_is_given_back(form, step):
    """Calls, and gradients of gradients, leave no tensor behind.

    Those of a call without a gradient go at once, not when the garbage collector comes,
    which counts objects and not their size.
    """
    a, b = tf.ones((2, 3)), tf.ones((2, 3))
    for _ in range(3):  # constants of graphs are made once
        step(form, a, b)
    gc.collect()
    before, some = tensors_alive(), 10 if step is called else 0
    if step is called:
        gc.disable()
    try:
        for _ in range(20 if step is called else 6):
            step(form, a, b)
        if step is not called:
            gc.collect()
        assert tensors_alive() <= before + some
    finally:
        gc.enable()


def check_second_derivative(modules):
    """exp, whose gradient is made of its output: that must be connected to `a`."""

    def forward(a):
        return (tf.exp(a),), ()

    def backward(args, outputs, residuals, cotangents):
        return (outputs[0] * cotangents[0],)

    a = tf.constant([0.5])
    with tf.GradientTape() as outer:
        outer.watch(a)
        with tf.GradientTape() as tape:
            tape.watch(a)
            (y,) = module.explicit(forward, backward)(a)
        first = tape.gradient(y, a)
    assert outer.gradient(first, a) == y
