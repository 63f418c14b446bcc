"""delta_t and a_t as gradients of zeros, against the reference and step-by-step tapes."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    FLOAT64,
    MIXED_MASK,
    MODES,
    B,
    D,
    H,
    T,
    in_modes,
    random_weights,
    rng,
    without_graphs,
)
from plain_rnn import Constants, Recurrence, arguments_of

from keras_bptt.cells.activations import resolve
from keras_bptt.engine.recurrence import recurrence
from keras_bptt.flow.measurement import linearised
from keras_bptt.layers.observing import observed, observed_or
from keras_bptt.reference import truncation as truncated_reference
from keras_bptt.truncation import Truncation

# x, W, U, b, h_0, and cotangents of the sequence and the last state.
RANDOM, SHAPES = rng(), [(B, T, D), (B, H), (B, T, H), (B, H)]
X, H_0, DY, DS = (RANDOM.normal(size=shape) for shape in SHAPES)
W, U, BIAS = random_weights(radius=1.2)
# Of recurrent dropout, and of the links.
R = 1.25 * (rng(5).random((B, H)) < 0.8)
FACTORS = 2.0 * (rng(6).random((B, T)) < 0.5)


def arguments(x=X, V=None):
    V = None if V is None else tf.constant(V)
    return arguments_of(*map(tf.constant, (x, W, U, H_0, BIAS)), V)


def options_of(f="tanh", **given):
    f = resolve(keras.activations.get(f), H, "float64")
    return Recurrence(f, return_sequences=True, **given)


def by_probe(options, constants=None, **given):
    """delta and a of the probe."""
    _, back = linearised(options, constants or Constants(), arguments(**given))
    (delta,), (a,) = back((tf.constant(DY), (tf.constant(DS),)))
    return delta, a


def by_path(f, truncation, mask, r, factors, clip, backwards):
    """The same of the brute-force reference."""
    order = slice(None, None, -1 if backwards else 1)
    x, mask, e = X[:, order], mask[:, order], DY.copy()
    e[~np.maximum.accumulate(mask, axis=1)] = 0
    e[:, -1] += DS
    function, limits = truncated_reference.truncated_gradients, {}
    if clip is not None:
        function = truncated_reference.clipped_gradients
        limits = {"adjoint_clipnorm": clip}
    steps, stride = (truncation.steps, truncation.stride) if truncation else (None,) * 2
    d = function(
        *(x, W, U, BIAS, H_0, f, e),
        steps=steps,
        stride=stride,
        mask=mask,
        recurrent_dropout=r,
        factors=factors,
        **limits,
    )
    return d.delta, np.where(mask[..., None], d.adjoint, 0)


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert np.max(np.abs(theirs)) > 0.5
        np.testing.assert_allclose(ours, theirs, atol=FLOAT64)


def check(
    f="tanh",
    truncation=None,
    mask=MIXED_MASK,
    r=None,
    factors=None,
    clip=None,
    backwards=False,
    checkpoints=None,
):
    """The probe equals the reference."""
    options = options_of(
        f,
        truncation=truncation,
        adjoint_clipnorm=clip,
        go_backwards=backwards,
        checkpoint_every=checkpoints,
    )
    tensors = (None if t is None else tf.constant(t) for t in (r, factors))
    constants = Constants(tf.constant(mask), None, *tensors)
    expected = by_path(f, truncation, mask, r, factors, clip, backwards)
    assert_same(by_probe(options, constants), expected)


NO_MASK = np.ones((B, T), bool)
OVERLAPPING = Truncation(3, stride=2)
CASES = {
    "full": {"mask": NO_MASK, "f": "sigmoid"},
    "full, clipped, backwards": {"clip": 0.8, "backwards": True, "checkpoints": 2},
    "dropout and random cuts": {"r": R, "factors": FACTORS},
    "chunks, clipped": {"truncation": Truncation(2), "clip": 0.8},
    "overlapping": {"truncation": OVERLAPPING, "f": "linear", "backwards": True},
    "overlapping, clipped": {
        "truncation": OVERLAPPING,
        "clip": 0.8,
        "backwards": True,
        "r": R,
    },
    "sliding": {"truncation": Truncation(3, stride=1), "mask": NO_MASK},
    "sliding, checkpoints": {"truncation": Truncation(3, stride=1), "checkpoints": 2},
}


@pytest.mark.parametrize("case", CASES)
@without_graphs()
def test_equals_the_reference_path_by_path(case):
    check(**CASES[case])


@without_graphs()
def test_dropout_of_the_inputs_leaves_the_probe_alone():
    """As if the inputs had been what dropout leaves of them."""
    d = rng(6).random((B, D))
    found = by_probe(options_of(), Constants(d=tf.constant(d)))
    assert np.max(np.abs(found[0] - by_probe(options_of())[0])) > 1e-3
    assert_same(found, by_probe(options_of(), x=X * d[:, None]))


@pytest.mark.parametrize(
    ("f", "output"), [("softmax", True), ("swish", False), ("relu", True)]
)
@without_graphs()
def test_equals_a_tape_over_single_steps(f, output):
    """An activation that mixes units, one without f'(h), one with; and an output layer."""
    V = rng(7).normal(size=(H, H)) if output else None
    activation, h, z, states = keras.activations.get(f), H_0, [], []
    with tf.GradientTape() as tape:
        for t in range(T):
            z.append(tf.constant(X[:, t] @ W + BIAS) + tf.matmul(h, tf.constant(U)))
            tape.watch(z[-1])
            states.append(activation(z[-1]))
            h = states[-1]
            tape.watch(h)
        shown = states if V is None else [tf.matmul(h, V) for h in states]
        loss = sum(tf.reduce_sum(shown[t] * DY[:, t]) for t in range(T))
        loss += tf.reduce_sum(h * DS)
    expected = [tf.stack(g, 1) for g in tape.gradient(loss, [z, states])]
    assert_same(by_probe(options_of(f=f), V=V), expected)


@in_modes("eager", "xla")
def test_the_outputs_are_those_of_the_unobserved_recurrence(mode):
    options = options_of(truncation=Truncation(2))
    constants = Constants(tf.constant(MIXED_MASK))
    expected = recurrence(options, constants, arguments())

    def observed_outputs(arguments):
        return linearised(options, constants, arguments)[0]

    got = MODES[mode](observed_outputs)(arguments())
    for ours, theirs in zip(*map(tf.nest.flatten, (got, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-13)


@without_graphs()
def test_only_what_is_called_within_is_observed():
    seen = []

    def observer(layer, step, *arguments):
        seen.append((layer, step))
        return recurrence(*arguments)

    call = options_of(), Constants(), arguments()
    with observed(observer):
        observed_or(recurrence, "within", "step")(*call)
        with pytest.raises(ZeroDivisionError), observed(None):
            observed_or(recurrence, "without", "step")(*call)
            raise ZeroDivisionError
        observed_or(recurrence, "within again", "step")(*call)
    observed_or(recurrence, "after", "step")(*call)
    assert seen == [("within", "step"), ("within again", "step")]
