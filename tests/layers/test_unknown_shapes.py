"""Shapes that the layer knows and the tensor does not: right where they fit, else loud."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import FLOAT64, MIXED_MASK, B, D, H, T, few, pair, random_inputs, rng

from keras_bptt import BPTTRNN, Truncation

# What raises where sizes do not fit, depending on who finds out.
WRONG = (tf.errors.InvalidArgumentError, ValueError)
NOT_KNOWN = {
    "features": (None, None, None),
    "features alone": (B, T, None),
    "batch and timesteps": (None, None, D),
}


def gradients_of(layer, x, shape, mode, *, mask=None, mask_shape=None, state=None):
    """Outputs and gradients of a graph that knows no more of the inputs than `shape`."""
    weight = tf.constant(rng(3).normal(size=(B, T, H)))
    tensors = {"x": (x, shape), "mask": (mask, mask_shape)}
    tensors["initial_state"] = state, (None, None)
    tensors = {name: t for name, t in tensors.items() if t[0] is not None}

    @tf.function(jit_compile=mode == "xla", autograph=False)
    def run(given):
        given = dict(given)
        x = given.pop("x")
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, **given)
            y = y if len(y.shape) == 3 else y[:, None]
            loss = tf.reduce_sum(weight[:, : tf.shape(y)[1]] * y)
        weights = [v.value for v in layer.trainable_variables]
        return y, *tape.gradient(loss, [x, *weights])

    kinds = {name: tf.constant(t) for name, (t, _) in tensors.items()}
    specs = {n: tf.TensorSpec(tensors[n][1], t.dtype) for n, t in kinds.items()}
    return [t.numpy() for t in run.get_concrete_function(specs)(kinds)]


OPTIONS = {
    "sequence": {"return_sequences": True},
    "last output": {},
    "backwards": {"return_sequences": True, "go_backwards": True},
}
OURS = {
    "plain": {},
    "chunks": {"truncation": T},
    "windows": {"truncation": Truncation(T, 2)},
    "checkpoints": {"checkpoint_every": 2},
    "both": {"truncation": Truncation(T, 2), "checkpoint_every": "sqrt"},
}


@pytest.mark.parametrize(
    ("mode", "shape", "options", "ours"),
    few(
        itertools.product(["graph", "xla"], NOT_KNOWN, OPTIONS, OURS),
        lambda mode, shape, options, ours: (
            (mode, shape, options, ours) == ("graph", "features", "backwards", "both")
        ),
    ),
)
def test_results_do_not_depend_on_what_is_known(mode, shape, options, ours):
    theirs, layer = pair(**OPTIONS[options])
    for name, value in OURS[ours].items():
        setattr(layer, name, value)
    x, mask = random_inputs(), MIXED_MASK
    state = random_inputs(B, H, seed=5)
    known = {"mask_shape": (B, T), "mask": mask, "state": state}
    expected = gradients_of(theirs, x, (B, T, D), "graph", **known)
    for mask_shape in (None, (None, None)):
        unknown = known | {"mask_shape": mask_shape}
        got = gradients_of(layer, x, NOT_KNOWN[shape], mode, **unknown)
        for ours_, theirs_ in zip(got, expected, strict=True):
            np.testing.assert_allclose(ours_, theirs_, atol=FLOAT64)


@pytest.mark.parametrize(
    ("spec", "mode"),
    few(
        itertools.product([None, (None,) * 3, (None, None, 1)], ["graph", "xla"]),
        lambda spec, mode: mode == "graph" and spec == (None, None, 1),
    ),
    ids=str,
)
def test_mask_with_an_axis_of_one(spec, mode):
    theirs, ours = pair(return_sequences=True)
    x, mask = random_inputs(), MIXED_MASK
    shapes = {"mask": mask, "mask_shape": (None, None)}
    expected = gradients_of(theirs, x, (None, None, D), "graph", **shapes)
    shapes = {"mask": mask[..., None], "mask_shape": spec}
    got = gradients_of(ours, x, (None, None, D), mode, **shapes)
    for ours_, theirs_ in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours_, theirs_, atol=FLOAT64)


MASKS = [(T, B), (B * T, 1), (1, B * T), (B, T, 2), (T, B, 1), (1, T), (B, 1)]


@pytest.mark.parametrize(
    ("shape", "sequence", "mode"),
    few(
        itertools.product(MASKS, [False, True], ["graph", "xla"]),
        lambda shape, sequence, mode: (
            sequence
            and (mode, shape)
            in [
                ("graph", (T, B)),
                ("xla", (1, B * T)),
            ]
        ),
    ),
)
def test_wrong_mask(shape, sequence, mode):
    """As many booleans as steps are no mask of them: (timesteps, batch) above all."""
    _, layer = pair(return_sequences=sequence)
    mask = rng(4).random(shape) > 0.3
    for spec in (None, (None,) * len(shape)):
        if spec and len(shape) == 3:
            spec = (*spec[:2], None)
        with pytest.raises(WRONG):
            gradients_of(
                layer,
                random_inputs(),
                (None, None, D),
                mode,
                mask=mask,
                mask_shape=spec,
            )


@pytest.mark.parametrize(
    ("shape", "mode"),
    few(
        itertools.product(
            [(H, B), (B * H, 1), (1, H), (1, B * H), (B, 1)], ["graph", "xla"]
        ),
        lambda shape, mode: shape == (H, B) or (shape, mode) == ((1, H), "graph"),
    ),
)
def test_wrong_state(shape, mode):
    _, layer = pair()
    state = random_inputs(*shape)
    with pytest.raises(WRONG):
        gradients_of(layer, random_inputs(), (None, None, D), mode, state=state)


@pytest.mark.parametrize(
    ("features", "mode"),
    few(
        itertools.product([D - 1, D + 1, 1], ["graph", "xla"]),
        lambda features, mode: (features == 1) == (mode == "xla") and features != D - 1,
    ),
)
def test_wrong_features(features, mode):
    _, layer = pair(return_sequences=True)
    with pytest.raises(WRONG):
        gradients_of(layer, random_inputs(B, T, features), (None,) * 3, mode)


# --- Models


def two_batches(shape):
    """Batches that a generator makes, of which `shape` is all that is known."""
    x = random_inputs(2, B, T, D).astype("float32")
    y = x[:, :, -1, :1]
    batches = tf.data.Dataset.from_generator(
        lambda: iter([(x[0], y[0]), (x[1], y[1])]),
        output_signature=(tf.TensorSpec(shape), tf.TensorSpec((None, None))),
    )
    return batches.apply(tf.data.experimental.assert_cardinality(2))


def model_of(layer, kind):
    inputs = keras.Input((None, D))
    x = keras.layers.Masking()(inputs) if kind == "masked" else inputs
    if kind == "bidirectional":
        x = keras.layers.Bidirectional(layer(H))(x)
    elif kind == "stacked":
        x = layer(H, return_sequences=True)(x)
        x = keras.layers.TimeDistributed(keras.layers.Dense(3))(x)
        x = layer(4, go_backwards=True)(x)
    else:
        x = layer(H)(x)
    model = keras.Model(inputs, keras.layers.Dense(1)(x))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


@pytest.mark.parametrize(
    ("kind", "shape"),
    few(
        itertools.product(
            ["plain", "masked", "bidirectional", "stacked"],
            [(None, None, None), (B, T, None)],
        ),
        lambda kind, shape: (kind, shape[0]) == ("plain", B),
    ),
)
def test_generator_without_static_shapes(kind, shape):
    """fit, evaluate and predict, as of SimpleRNN."""
    models = [model_of(layer, kind) for layer in (keras.layers.SimpleRNN, BPTTRNN)]
    models[1].set_weights(models[0].get_weights())
    results = []
    for model in models:
        loss = model.fit(two_batches(shape), shuffle=False, verbose=0).history["loss"]
        loss += [model.evaluate(two_batches(shape), verbose=0)]
        predicted = model.predict(two_batches(shape), verbose=0)
        results.append(np.append(predicted, loss))
    np.testing.assert_allclose(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_generator_without_static_shapes_and_an_output_layer():
    known, unknown = (
        keras.Sequential(
            [
                keras.Input((None, D)),
                BPTTRNN(H, return_sequences=True, output_units=2, checkpoint_every=2),
                BPTTRNN(4, output_units=1),
            ]
        )
        for _ in range(2)
    )
    unknown.set_weights(known.get_weights())
    predicted = []
    for model, shape in ((known, (B, T, D)), (unknown, (None,) * 3)):
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(two_batches(shape), shuffle=False, verbose=0)
        predicted.append(model.predict(two_batches(shape), verbose=0))
    np.testing.assert_allclose(predicted[1], predicted[0], rtol=1e-4, atol=1e-5)


def test_symbolic_inputs_of_a_built_layer():
    """As SimpleRNN: the layer knows its features."""
    for layer in pair(return_sequences=True, dtype="float32"):
        inputs = keras.Input((None, None))
        model = keras.Model(inputs, layer(inputs))
        assert model.output.shape == (None, None, H)
        assert model(random_inputs()).shape == (B, T, H)
    with pytest.raises(WRONG):
        model(random_inputs(B, T, D + 1))


def test_output_shape_of_unknown_features():
    for layer in (keras.layers.SimpleRNN, BPTTRNN):
        assert layer(H).compute_output_shape((B, T, None)) == (B, H)
