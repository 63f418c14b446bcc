"""The policies of truncation: their values, their errors, and how they are saved."""

import dataclasses
import json
import pickle
import re

import keras
import numpy as np
import pytest

from keras_bptt import RandomizedTruncation, Truncation
from keras_bptt.truncation import policy

POLICIES = [
    Truncation(20),
    Truncation(steps=20, stride=5),
    RandomizedTruncation(20),
    RandomizedTruncation(mean_steps=2.5, seed=7),
]


def raises(message, received):
    """A ValueError that says what is allowed, what came, and what to do."""
    return pytest.raises(
        ValueError, match=f"(?s){message}.*Received: {re.escape(received)}.*\\. [A-Z]"
    )


def test_truncation():
    assert (Truncation(20).steps, Truncation(20).stride) == (20, 20)
    assert (Truncation(20, 5).steps, Truncation(20, 5).stride) == (20, 5)
    assert (Truncation(1).steps, Truncation(1, 1).stride) == (1, 1)


def test_randomized_truncation():
    assert RandomizedTruncation(4).keep_probability == 0.75
    assert RandomizedTruncation(1.25).keep_probability == pytest.approx(0.2, rel=1e-15)
    assert RandomizedTruncation(4).seed is None
    for close in (np.nextafter(1.0, 2.0), 10**400):
        assert 0 < RandomizedTruncation(close).keep_probability <= 1


@pytest.mark.parametrize(
    "steps", [0, -1, 2.0, 2.5, "3", True, np.True_, None, np.float64(3), [3]], ids=repr
)
def test_wrong_steps(steps):
    with raises("`steps` must be a positive integer", f"steps={steps!r}"):
        Truncation(steps)


@pytest.mark.parametrize(
    "stride", [0, -1, 6, 2.0, "3", True, False, np.True_, np.float64(3)], ids=repr
)
def test_wrong_stride(stride):
    received = f"stride={stride!r}, steps=5"
    with raises("`stride` must be a positive integer, at most `steps`", received):
        Truncation(5, stride)


@pytest.mark.parametrize(
    "mean_steps",
    [1, 1.0, 0, -3, 0.5, np.nan, np.inf, -np.inf, True, np.True_, "2", None, 2j, [2]],
    ids=repr,
)
def test_wrong_mean_steps(mean_steps):
    message = "`mean_steps` must be a finite number greater than 1"
    with raises(message, f"mean_steps={mean_steps!r}"):
        RandomizedTruncation(mean_steps)


@pytest.mark.parametrize(
    "seed", [1.0, "1", True, np.True_, [1], np.float64(1)], ids=repr
)
def test_wrong_seed(seed):
    with raises("`seed` must be an integer or None", f"seed={seed!r}"):
        RandomizedTruncation(2, seed=seed)


def test_policy():
    assert policy(None) is None
    assert policy(20) == policy(np.int32(20)) == Truncation(20)
    for given in POLICIES:
        assert policy(given) is given
        assert policy(keras.saving.serialize_keras_object(given)) == given


NO_POLICIES = [0, -1, 2.5, 2.0, "20", True, False, np.float32(2), np.True_, (20, 5)]
NO_POLICIES += [
    Truncation,
    {},
    {"steps": 20},
    {"registered_name": "keras_bptt>Truncation"},
]
NO_POLICIES += [keras.saving.serialize_keras_object(keras.optimizers.SGD())]


@pytest.mark.parametrize("truncation", NO_POLICIES, ids=str)
def test_no_policy(truncation):
    message = re.escape(
        "`truncation` must be a positive integer, a Truncation, a RandomizedTruncation or "
        "None (full BPTT)"
    )
    with raises(message, f"truncation={truncation!r}"):
        policy(truncation)


@pytest.mark.parametrize("config", [{"step": 3}, {"steps": 3, "lag": 1}, {}, None])
def test_no_configuration(config):
    serialized = keras.saving.serialize_keras_object(Truncation(3)) | {"config": config}
    with pytest.raises(ValueError, match="`truncation` must be"):
        policy(serialized)


def test_a_wrong_configuration_says_what_is_wrong():
    serialized = keras.saving.serialize_keras_object(Truncation(3))
    with raises("`steps` must be a positive integer", "steps=0"):
        policy(serialized | {"config": {"steps": 0}})


def test_repr_is_the_call():
    assert repr(Truncation(steps=20)) == "Truncation(steps=20)"
    assert repr(Truncation(20, stride=20)) == "Truncation(steps=20)"
    assert repr(Truncation(20, 5)) == "Truncation(steps=20, stride=5)"
    assert repr(RandomizedTruncation(20)) == "RandomizedTruncation(mean_steps=20)"
    for given in POLICIES:
        assert eval(repr(given)) == given


def test_equality():
    assert Truncation(20) == Truncation(20, stride=20) != Truncation(20, stride=5)
    assert RandomizedTruncation(2) == RandomizedTruncation(2.0)
    assert RandomizedTruncation(2) != RandomizedTruncation(2, seed=0)
    assert Truncation(2) != RandomizedTruncation(2)
    again = [Truncation(20, 20), *pickle.loads(pickle.dumps(POLICIES))]
    assert len({*POLICIES, *again}) == len(POLICIES)


@pytest.mark.parametrize("given", POLICIES, ids=repr)
def test_frozen(given):
    for field in dataclasses.fields(given):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(given, field.name, 3)


@pytest.mark.parametrize("given", POLICIES, ids=repr)
def test_round_trips(given):
    assert type(given).from_config(given.get_config()) == given
    serialized = keras.saving.serialize_keras_object(given)
    assert serialized["registered_name"] == f"keras_bptt>{type(given).__name__}"
    read = json.loads(json.dumps(serialized))
    assert keras.saving.deserialize_keras_object(read) == policy(read) == given


def test_scalars_of_numpy_become_numbers():
    given = Truncation(np.int64(20), np.uint8(5))
    assert type(given.steps) is type(given.stride) is int
    assert type(policy(np.int16(3)).steps) is int
    drawn = RandomizedTruncation(np.float32(2.5), seed=np.int64(7))
    assert type(drawn.mean_steps) is float and type(drawn.seed) is int
    assert type(RandomizedTruncation(np.int32(3)).mean_steps) is int
    assert json.loads(json.dumps(given.get_config())) == {"steps": 20, "stride": 5}
    assert json.loads(json.dumps(drawn.get_config())) == {"mean_steps": 2.5, "seed": 7}
    assert repr(drawn) == "RandomizedTruncation(mean_steps=2.5, seed=7)"
