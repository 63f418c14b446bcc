"""What else TensorFlow asks of a gradient: sparse cotangents, several tapes, one step.

The other side of each comparison is SimpleRNN, eager and unrolled; or, where that lacks the
option, the same layer without graphs, whose derivatives other tests prove.
"""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    FLOAT64,
    MIXED_MASK,
    MODES,
    WAYS,
    B,
    D,
    H,
    T,
    few,
    pair,
    random_inputs,
    random_weights,
    relative_error,
    rng,
    without_graphs,
)

from keras_bptt import BPTTRNN, Truncation

ZERO = tf.UnconnectedGradients.ZERO
X, STATE = random_inputs(), random_inputs(B, H, seed=5)


def layer_of(**options):
    """A BPTTRNN of the weights of `pair`, with options of its own."""
    layer = BPTTRNN(H, dtype="float64", **options)
    layer.build((B, None, D))
    layer.cell.set_weights(random_weights())
    return layer


def assert_equal(got, expected, tolerance=FLOAT64):
    for g, e in zip(got, expected, strict=True):
        assert np.max(np.abs(e)) > 1e-3
        assert relative_error(g, e) < tolerance


# --- Cotangents that are tf.IndexedSlices

LOOKUPS = {
    "gather": lambda y, places: tf.gather(y, places),
    "take": lambda y, places: keras.ops.take(y, places, axis=0),
    "embedding_lookup": lambda y, places: tf.nn.embedding_lookup(y, places),
}


@pytest.mark.parametrize(
    ("lookup", "sequence", "mode"),
    few(
        itertools.product(LOOKUPS, [True, False], MODES),
        lambda lookup, sequence, mode: (
            (lookup == "gather") and (mode == "eager" or (sequence and mode == "graph"))
        ),
    ),
)
def test_examples_that_are_looked_up(lookup, sequence, mode):
    """One of them twice, one not at all."""
    theirs, ours = pair(return_sequences=sequence, return_state=True)
    places = tf.constant([0, 2, 0])

    def gradients(layer):
        def run(x, state):
            with tf.GradientTape() as tape:
                tape.watch([x, state])
                y, last = layer(x, initial_state=state, training=True)
                found = [LOOKUPS[lookup](t, places) for t in (y, last)]
                random = rng(2)
                value = sum(
                    tf.reduce_sum(random.normal(size=t.shape) * t) for t in found
                )
            return tape.gradient(value, [x, state, *layer.trainable_variables])

        return run

    given = tf.constant(X), tf.constant(STATE)
    assert_equal(MODES[mode](gradients(ours))(*given), gradients(theirs)(*given))


def test_second_derivatives_of_looked_up_examples():
    theirs, ours = pair(return_sequences=True, unroll=True)
    places = tf.constant([0, 2, 0])

    def run(layer):
        x = tf.constant(X)
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = tf.reduce_sum(tf.gather(layer(x), places) ** 3)
            d_x = tf.gather(tape.gradient(value, x), places)
            value = tf.reduce_sum(d_x**2)
        return outer.gradient(value, [x, *layer.trainable_variables])

    with without_graphs():
        assert_equal(run(ours), run(theirs), 10 * FLOAT64)


# --- Several tapes around a tf.function

CASES = {
    "last output": {},
    "slope of z, checkpoints": {"activation": "gelu", "checkpoint_every": 2},
    "mixing units, masked": {"activation": "softmax", "mask": MIXED_MASK},
    "output layer, one window of all": {"output_units": 2, "truncation": T},
    "windows": {"truncation": Truncation(3, 1)},
}


def persistent(function, x, sources):
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = function(x)
        values = tf.reduce_sum(y**2), tf.reduce_sum(tf.sin(y))
    return [g for value in values for g in tape.gradient(value, sources)]


def two_at_once(function, x, sources):
    with tf.GradientTape() as one, tf.GradientTape() as two:
        one.watch(x)
        two.watch(x)
        value = tf.reduce_sum(function(x) ** 2)
    return [g for tape in (one, two) for g in tape.gradient(value, sources)]


def nested(function, x, sources):
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = tf.reduce_sum(function(x) ** 2)
        value = tf.reduce_sum(tape.gradient(value, x) ** 2)
    return outer.gradient(value, sources, unconnected_gradients=ZERO)


def batch_jacobian(function, x, sources):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.reshape(function(x), [B, -1])
    return [tape.batch_jacobian(y, x)]


TAPES = [persistent, two_at_once, nested, batch_jacobian]


# By default each of these, and the Jacobian of the first.
CHOSEN = [nested, two_at_once, persistent, two_at_once, persistent]
CHOSEN = [*zip(CASES, CHOSEN, strict=True), ("last output", batch_jacobian)]


@pytest.mark.parametrize(
    ("case", "tapes"),
    few(itertools.product(CASES, TAPES), lambda *each: each in CHOSEN),
)
def test_tapes_around_a_function(case, tapes):
    """Which "auto" compiles: what it keeps for the backward pass has no gradient."""
    options = {"return_sequences": case != "last output"} | CASES[case]
    mask = options.pop("mask", None)
    ours = theirs = layer_of(**options)
    if options.keys() <= {"return_sequences", "activation"}:
        theirs, _ = pair(unroll=True, **options)
    function = tf.function(lambda x: ours(x, mask=mask, training=True))
    x = tf.constant(X)
    got = tapes(function, x, [x, *ours.trainable_variables])
    with without_graphs():
        expected = tapes(
            lambda x: theirs(x, mask=mask, training=True),
            x,
            [x, *theirs.trainable_variables],
        )
    for g, e in zip(got, expected, strict=True):
        assert relative_error(g, e) < 10 * FLOAT64


@pytest.mark.slow
def test_tapes_around_an_endpoint_for_training(tmp_path):
    model = keras.Sequential([keras.Input((None, D)), BPTTRNN(H)])
    archive = keras.export.ExportArchive()
    archive.track(model)
    spec = tf.TensorSpec((None, None, D), tf.float32)
    archive.add_endpoint("train", lambda x: model(x, training=True), [spec])
    archive.write_out(tmp_path, verbose=False)
    loaded = tf.saved_model.load(tmp_path)
    x = tf.constant(X, tf.float32)
    got = persistent(loaded.train, x, [x])
    expected = persistent(lambda x: model(x, training=True), x, [x])
    assert_equal(got, expected, 1e-5)


# --- Second derivatives, compiled

COMPILED = {
    "clipped": {"adjoint_clipnorm": 0.5},
    "clipped, mixing units": {"adjoint_clipnorm": 0.5, "activation": "softmax"},
    "clipped windows": {"adjoint_clipnorm": 0.5, "truncation": Truncation(3, 1)},
    "one step": {},
    "one step, windows of one": {"truncation": 1},
    "one step, mixing units": {"activation": "softmax"},
}


@pytest.mark.parametrize(
    "case",
    few([(case,) for case in COMPILED], lambda case: case == "one step"),
)
def test_second_derivatives_compiled(case):
    """Where only run time tells that there is one step; as without a graph."""
    layer = layer_of(return_sequences=True, **COMPILED[case])
    x = tf.constant(X[:, :1] if "one step" in case else X)
    spec = tf.TensorSpec((None, None, D), tf.float64)

    def run(x):
        sources = [x, layer.cell.kernel.value]
        return nested(lambda x: layer(x, training=True), x, sources)

    compiled = tf.function(run, jit_compile=True, input_signature=[spec])
    assert_equal(compiled(x), WAYS["plain"](run)(x), 10 * FLOAT64)
