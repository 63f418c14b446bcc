"""What is switched on for the whole process must not outlive its being switched off."""

import logging

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import D, H, T, few, pair, random_inputs, without_graphs
from tensorflow.python.framework import config as tf_config

from keras_bptt import BPTTRNN
from keras_bptt.cells.activations import resolve, xla_compiles
from keras_bptt.runtime.execution import run


def check_numerics():
    tf.debugging.enable_check_numerics()
    return tf.debugging.disable_check_numerics


def dump(folder):
    debugging = tf.debugging.experimental
    debugging.enable_dump_debug_info(str(folder), tensor_debug_mode="CURT_HEALTH")
    return debugging.disable_dump_debug_info


@pytest.fixture(params=["check_numerics", pytest.param("dump", marks=pytest.mark.slow)])
def debugged(request, tmp_path):
    """Switches a debugger on, and gives what switches it off."""
    return (
        check_numerics if request.param == "check_numerics" else lambda: dump(tmp_path)
    )


def fitted(units, *, eagerly=False, **options):
    """The loss before each of two epochs, of a model that is the same every time."""
    model = keras.Sequential([keras.Input((T, D)), BPTTRNN(units, **options)])
    random = np.random.default_rng(units)
    model.set_weights([random.normal(size=w.shape) for w in model.get_weights()])
    x = random_inputs(16, T, D).astype("float32")
    y = x[:, 0].sum(1, keepdims=True) * np.ones(units, "float32")
    optimizer = keras.optimizers.SGD(0.1)
    model.compile(optimizer, "mse", jit_compile=False, run_eagerly=eagerly)
    return model.fit(x, y, epochs=2, shuffle=False, verbose=0).history["loss"]


# Units that no other test has: a graph that is cached already would hide what happens.
@pytest.mark.parametrize(
    ("units", "options"),
    few(
        [
            (23, {}),
            (24, {"activation": "gelu"}),
            (25, {"truncation": 2}),
            (26, {"checkpoint_every": 2}),
        ],
        lambda units, options: not options,
    ),
)
def test_models_train_while_tensorflow_is_debugged(debugged, units, options):
    """And a fresh model of the same shape after it."""
    units += 10 * (debugged is check_numerics)
    expected = fitted(units, eagerly=True, **options)
    switch_off = debugged()
    try:
        during = fitted(units, **options)
    finally:
        switch_off()
    np.testing.assert_allclose(during, expected, rtol=1e-4)
    np.testing.assert_allclose(fitted(units, **options), expected, rtol=1e-4)


def test_told_to_compile_it_says_why_it_cannot(debugged):
    layer = BPTTRNN(H, jit_compile=True)
    x = tf.constant(random_inputs(), tf.float32)
    expected = layer(x)
    switch_off = debugged()
    try:
        with pytest.raises(ValueError, match=r"tf\.debugging.*jit_compile='auto'"):
            layer(x)
    finally:
        switch_off()
    np.testing.assert_array_equal(layer(x), expected)


def test_an_activation_is_not_judged_while_tensorflow_is_debugged(debugged):
    activation = resolve(lambda z: tf.sin(z), H, "float32")
    switch_off = debugged()
    try:
        assert not xla_compiles(activation, H, "float32")
    finally:
        switch_off()
    assert xla_compiles(activation, H, "float32")


def test_an_activation_is_not_judged_while_nothing_is_compiled():
    """Else one that XLA does not know is taken for one that it does, ever after."""

    def own(z):
        z = tf.convert_to_tensor(z)
        return tf.ensure_shape(tf.py_function(tf.tanh, [z], z.dtype), z.shape)

    with without_graphs():
        BPTTRNN(21, own)(tf.ones([2, T, D]), training=True)
    expected = fitted(21, eagerly=True)
    np.testing.assert_allclose(fitted(21, activation=own), expected, rtol=1e-4)


def without_tf32():
    tf.config.experimental.enable_tensor_float_32_execution(False)
    return lambda: tf.config.experimental.enable_tensor_float_32_execution(True)


def deterministic():
    tf.config.experimental.enable_op_determinism()
    return tf_config.disable_op_determinism


SWITCHES = {
    "check_numerics": check_numerics,
    "no TF32": without_tf32,
    "determinism": deterministic,
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_makes_another_graph(name):
    traced = []

    def function(options, x):
        traced.append(options)
        return x + 1

    def calls():
        run(function, 0, tf.ones([2, 3]))
        run(function, 0, tf.ones([2, 3]))
        return len(traced)

    assert calls() == 1
    switch_off = SWITCHES[name]()
    try:
        assert calls() == 2  # without a graph of their own it would be 1
    finally:
        switch_off()
    assert calls() == 2


def test_tracing_is_not_the_business_of_a_caller():
    """TensorFlow warns of functions that are traced often; a user knows none of ours."""
    said = []

    class Handler(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    def function(options, *tensors):
        return tensors[-1] + options

    handler = Handler(logging.WARNING)
    tf.get_logger().addHandler(handler)
    try:
        for number in range(8):
            run(function, 1.0, *[None] * number, tf.ones([2]))
        theirs = tf.function(lambda x: x + 1.0)
        for rank in range(1, 9):
            theirs(tf.ones([2] * rank))
    finally:
        tf.get_logger().removeHandler(handler)
    # That of the second loop: the test would notice.
    assert [("retracing" in s, "lambda" in s) for s in said] == [(True, True)] * 2


def test_the_two_layers_agree_while_numbers_are_checked():
    theirs, ours = pair(return_sequences=True)
    switch_off = check_numerics()
    try:
        results = [layer(random_inputs(), training=True) for layer in (theirs, ours)]
    finally:
        switch_off()
    np.testing.assert_allclose(results[1], results[0], rtol=1e-10)
