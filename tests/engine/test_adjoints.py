"""delta_t and a_t as gradients of zeros, against the reference and step-by-step tapes."""

import itertools

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
    few,
    in_modes,
    random_weights,
    rng,
    without_graphs,
)
from plain_rnn import MODULES, Constants, arguments_of

from keras_bptt.engine.recurrence import recurrence
from keras_bptt.flow.measurement import linearised
from keras_bptt.layers.observing import observed, observed_or
from keras_bptt.reference import truncation as truncated_reference
from keras_bptt.truncation import Truncation

POLICIES = {
    "full": None,
    "chunks": Truncation(2),
    "overlapping": Truncation(3, stride=2),
    "sliding": Truncation(3, stride=1),
}


def problem(seed=0):
    """x, W, U, b, h_0, and cotangents of the sequence and the last state."""
    random = rng(seed)
    x, h_0 = random.normal(size=(B, T, D)), random.normal(size=(B, H))
    dy, ds = random.normal(size=(B, T, H)), random.normal(size=(B, H))
    return (x, *random_weights(radius=1.2), h_0), (dy, ds)


def by_probe(modules, options, constants=None, V=None):
    """delta and a of the probe, float64."""
    (x, W, U, b, h_0), cotangents = problem()
    V = None if V is None else tf.constant(V)
    arguments = arguments_of(*map(tf.constant, (x, W, U, h_0, b)), V)
    constants = constants or modules.recurrence.Constants()
    _, back = linearised(options, constants, arguments)
    dy, ds = map(tf.constant, cotangents)
    (delta,), (a,) = back((dy, (ds,)))
    return delta.numpy(), a.numpy()


def by_path(f, policy, mask=None, r=None, factors=None, clip=None, backwards=False):
    """The same of the brute-force reference."""
    (x, W, U, b, h_0), (dy, ds) = problem()
    if backwards:
        x, mask = x[:, ::-1], mask if mask is None else mask[:, ::-1]
    e = dy
    if mask is not None:
        e = np.where(np.maximum.accumulate(mask, axis=1)[..., None], e, 0)
    e = e + np.eye(T)[-1][:, None] * ds[:, None]
    function, clipped = truncated_reference.truncated_gradients, {}
    if clip is not None:
        function = truncated_reference.clipped_gradients
        clipped = {"adjoint_clipnorm": clip}
    steps, stride = (policy.steps, policy.stride) if policy else (None, None)
    d = function(
        *(x, W, U, b, h_0, f, e),
        steps=steps,
        stride=stride,
        mask=mask,
        recurrent_dropout=r,
        factors=factors,
        **clipped,
    )
    a = d.adjoint if mask is None else np.where(mask[..., None], d.adjoint, 0)
    return d.delta, a


def options_of(modules, f="tanh", policy=None, **given):
    f = keras.activations.get(f)
    return modules.recurrence.Recurrence(
        modules.activations.resolve(f, H, "float64"),
        return_sequences=True,
        truncation=policy,
        **given,
    )


CASES = list(
    itertools.product(
        ["tanh", "linear"],
        POLICIES,
        [None, 0.8],
        ["all", "mixed"],
        [False, True],
        [None, 2],
    )
)


def chosen(f, policy, clip, mask, backwards, checkpoints):
    """Every policy with clipping and a mask, every other option once."""
    plain = (f, backwards, checkpoints) == ("tanh", False, None)
    if plain:
        return (clip is None) == (mask == "all") or policy == "full"
    return (f, policy, clip, mask, backwards, checkpoints) in [
        ("linear", "overlapping", None, "mixed", True, None),
        ("tanh", "full", 0.8, "mixed", True, 2),
        ("tanh", "sliding", None, "mixed", False, 2),
    ]


@pytest.mark.parametrize(
    "f, policy, clip, mask, backwards, checkpoints", few(CASES, chosen)
)
@without_graphs()
def test_equals_the_reference_path_by_path(
    f, policy, clip, mask, backwards, checkpoints
):
    policy = POLICIES[policy]
    mask = None if mask == "all" else MIXED_MASK
    options = options_of(
        MODULES,
        f,
        policy,
        adjoint_clipnorm=clip,
        go_backwards=backwards,
        checkpoint_every=checkpoints,
    )
    constants = Constants(None if mask is None else tf.constant(mask))
    expected = by_path(f, policy, mask, clip=clip, backwards=backwards)
    for ours, theirs in zip(
        by_probe(MODULES, options, constants), expected, strict=True
    ):
        assert np.max(np.abs(theirs)) > 0.5
        np.testing.assert_allclose(ours, theirs, atol=FLOAT64)


def test_equals_the_reference_with_dropout_and_random_cuts():
    random = rng(5)
    r = 1.25 * (random.random((B, H)) < 0.8)
    factors = 2.0 * (random.random((B, T)) < 0.5)
    mask = MIXED_MASK
    constants = Constants(tf.constant(mask), None, tf.constant(r), tf.constant(factors))
    ours = by_probe(MODULES, options_of(MODULES), constants)
    expected = by_path("tanh", None, mask, r, factors)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=FLOAT64)


def test_dropout_of_the_inputs_leaves_the_probe_alone():
    d = tf.constant(rng(6).random((B, D)))
    (x, *_), _ = problem()
    ours = by_probe(MODULES, options_of(MODULES), Constants(d=d))
    undropped = by_probe(MODULES, options_of(MODULES))
    assert np.max(np.abs(ours[0] - undropped[0])) > 1e-3
    # As if the inputs had been what dropout leaves of them.
    (x, W, U, b, h_0), cotangents = problem()
    tensors = map(tf.constant, (x * d.numpy()[:, None], W, U, h_0, b))
    _, back = linearised(options_of(MODULES), Constants(), arguments_of(*tensors))
    dy, ds = map(tf.constant, cotangents)
    (delta,), (a,) = back((dy, (ds,)))
    for got, want in zip(ours, (delta, a), strict=True):
        np.testing.assert_allclose(got, want, atol=FLOAT64)


@pytest.mark.parametrize("f", ["softmax", "swish", "relu"])
@pytest.mark.parametrize("output", [False, True], ids=["states", "output layer"])
def test_equals_a_tape_over_single_steps(f, output):
    """An activation that mixes units, one without f'(h), one with; and an output layer."""
    (x, W, U, b, h_0), (dy, ds) = problem()
    V = rng(7).normal(size=(H, H)) if output else None
    activation, h, z, states = keras.activations.get(f), h_0, [], []
    with tf.GradientTape() as tape:
        for t in range(T):
            z.append(tf.constant(x[:, t] @ W + b) + tf.matmul(h, tf.constant(U)))
            tape.watch(z[-1])
            states.append(activation(z[-1]))
            h = states[-1]
            tape.watch(h)
        shown = states if V is None else [tf.matmul(h, V) for h in states]
        loss = sum(tf.reduce_sum(shown[t] * dy[:, t]) for t in range(T))
        loss += tf.reduce_sum(h * ds)
    expected = [tf.stack(g, 1) for g in tape.gradient(loss, [z, states])]
    for ours, theirs in zip(
        by_probe(MODULES, options_of(MODULES, f), V=V), expected, strict=True
    ):
        assert np.max(np.abs(theirs)) > 0.5
        np.testing.assert_allclose(ours, theirs, atol=FLOAT64)


@in_modes("eager", "xla")
def test_the_outputs_are_those_of_the_unobserved_recurrence(mode):
    (x, W, U, b, h_0), _ = problem()
    options = options_of(MODULES, policy=Truncation(2))
    arguments = arguments_of(*map(tf.constant, (x, W, U, h_0, b)))
    constants = Constants(tf.constant(MIXED_MASK))
    expected = recurrence(options, constants, arguments)

    def observed_outputs(arguments):
        return linearised(options, constants, arguments)[0]

    got = MODES[mode](observed_outputs)(arguments)
    for ours, theirs in zip(*map(tf.nest.flatten, (got, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-13)


def test_only_what_is_called_within_is_observed():
    seen = []

    def observer(layer, *arguments):
        seen.append(layer)
        return recurrence(*arguments)

    (x, W, U, b, h_0), _ = problem()
    arguments = arguments_of(*map(tf.constant, (x, W, U, h_0, b)))
    call = options_of(MODULES), Constants(), arguments
    with observed(observer):
        observed_or(recurrence, "within")(*call)
        with pytest.raises(ZeroDivisionError), observed(None):
            observed_or(recurrence, "without")(*call)
            raise ZeroDivisionError
        observed_or(recurrence, "within again")(*call)
    observed_or(recurrence, "after")(*call)
    assert seen == ["within", "within again"]


def check(modules):
    r = 1.25 * (rng(5).random((B, H)) < 0.8)
    constants = modules.recurrence.Constants(tf.constant(MIXED_MASK), r=tf.constant(r))
    options = options_of(
        modules, policy=Truncation(3, stride=2), adjoint_clipnorm=0.8, go_backwards=True
    )
    ours = by_probe(modules, options, constants)
    expected = by_path(
        "tanh", Truncation(3, stride=2), MIXED_MASK, r, clip=0.8, backwards=True
    )
    V = np.eye(H)
    ours += by_probe(modules, options_of(modules, "sigmoid"), V=V)
    expected += by_path("sigmoid", None)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=FLOAT64)
