"""Shapes that a graph does not know: where they do not fit, running it is loud.

Where they fit, the contract's tests in the mode "unknown" compare the results.
"""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from helpers import FLOAT64, MIXED_MASK, B, D, H, T, few, pair, random_inputs, rng

# What raises where sizes do not fit, depending on who finds out.
WRONG = (tf.errors.InvalidArgumentError, ValueError)


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
MASKS += [(B, T + 1), (B, T - 1)]


@pytest.mark.parametrize(
    ("shape", "sequence", "mode"),
    few(
        itertools.product(MASKS, [False, True], ["graph", "xla"]),
        lambda shape, sequence, mode: (
            sequence
            and (mode, shape)
            in [
                ("graph", (T, B)),
                ("graph", (1, T)),
                ("xla", (B, T - 1)),
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
            [(H, B), (B * H, 1), (1, H), (1, B * H), (B, 1), (B + 1, H)],
            ["graph", "xla"],
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
