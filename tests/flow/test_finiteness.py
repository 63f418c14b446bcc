"""What is not finite is named, and nothing else is advised; states that explode are told
from a gradient that does."""

import json
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few, random_weights, rng, without_graphs

from keras_bptt import (
    BPTTRNN,
    AdaptiveTruncation,
    GradientFlowLogger,
    Truncation,
    callbacks,
    gradient_flow,
)

B, T, D, H, F = 3, 9, 4, 6, 2


def data():
    random = rng(1)
    x, y = random.normal(size=(B, T, D)), random.normal(size=(B, F))
    return x.astype("float32"), y.astype("float32")


X, Y = data()


@keras.saving.register_keras_serializable(package="test_finiteness")
class Padded(keras.layers.Layer):
    """Hands its inputs on, with a mask that skips the steps that hold NaN."""

    supports_masking = True

    def call(self, x):
        return x

    def compute_mask(self, x, mask=None):
        return keras.ops.logical_not(keras.ops.any(keras.ops.isnan(x), axis=-1))


def model_of(*before, activation="tanh", after=(), **options):
    keras.utils.set_random_seed(1)
    rnn = BPTTRNN(H, activation, name="rnn", **options)
    head = keras.layers.Dense(F, name="head")
    model = keras.Sequential([keras.Input((None, D)), *before, rnn, *after, head])
    model.compile("sgd", "mse")
    return model


def flow_of(model, *batch, **options):
    return gradient_flow(model, *batch, **options)["rnn"]


def broken(array, value, *index):
    array = np.array(array)
    array[index] = value
    return array


def assert_not_finite(flow, *names):
    """With these causes, and no advice; as a report, as JSON and as a figure."""
    assert flow.verdict == "not finite" and not flow.finite
    assert flow.advice == [] and flow.suggest_truncation() is None
    for name in names:
        assert name in flow.not_finite
        assert name in flow.summary().replace("\n  ", " ")
    assert "explod" not in flow.summary() and "window" not in flow.summary()
    read = json.loads(json.dumps(flow.to_dict(), allow_nan=False))
    assert read["not_finite"] == list(flow.not_finite) and read["advice"] == []


# --- what goes into the loss


def one_of_several(x, y):
    """The loss of the other branch does not reach the layer, but is the loss."""
    first, second = keras.Input((T, D), name="a"), keras.Input((F,), name="b")
    h = BPTTRNN(H, name="rnn")(first)
    outputs = {"o": keras.layers.Dense(F)(h), "p": keras.layers.Dense(F)(second)}
    model = keras.Model({"a": first, "b": second}, outputs)
    model.compile("sgd", {"o": "mse", "p": "mse"})
    return flow_of(model, {"a": X, "b": x}, {"o": Y, "p": y})


def with_weight(layer, name, value):
    """It is named by the path that Keras gives it, which has the layer's name."""
    model = model_of(keras.layers.LayerNormalization(name="norm"))
    found = {w.name: w for w in model.get_layer(layer).weights}[name]
    last = [n - 1 for n in found.shape]
    found.assign(broken(found.numpy(), value, *last))
    flow = flow_of(model, X, Y)
    assert f"{found.path}[{', '.join(map(str, last))}]" in flow.not_finite
    assert f"/{layer}/" in found.path
    return flow


def the_output_layer_of_the_layer():
    rnn = BPTTRNN(H, name="rnn", output_units=F, return_sequences=True)
    model = keras.Sequential([keras.Input((T, D)), rnn])
    rnn.output_layer.bias.assign([np.nan, 0.0])
    flow = flow_of(model, X, np.ones((B, T, F)), loss="mse", loss_steps=1)
    assert f"{rnn.output_layer.bias.path}[0]" in flow.not_finite
    assert not any("states" in item for item in flow.not_finite)
    return flow


def the_state_of_a_stateful_layer():
    rnn = BPTTRNN(H, name="rnn", stateful=True)
    model = keras.Sequential([keras.Input(batch_shape=(B, T, D)), rnn])
    rnn.states[0].assign(broken(np.zeros((B, H)), np.nan, 1, 4))
    return flow_of(model, X, np.ones((B, H)), loss="mse")


def a_given_state():
    state, x = keras.Input((H,)), keras.Input((T, D))
    outputs = BPTTRNN(H, name="rnn")(x, initial_state=keras.ops.log(state))
    model = keras.Model([x, state], outputs)
    return flow_of(model, [X, np.full((B, H), -1.0)], np.ones((B, H)), loss="mse")


def a_layer_before():
    """It makes something else of finite inputs."""
    flow = flow_of(model_of(keras.layers.Lambda(tf.math.log)), np.abs(X) - 0.1, Y)
    assert any("numbers of inputs of rnn" in item for item in flow.not_finite)
    return flow


def the_loss_by_itself():
    flow = flow_of(model_of(), X, Y, loss=lambda y, o: tf.math.log(o - o - 1))
    assert len(flow.not_finite) == 1
    return flow


def the_gradient_that_arrives():
    """d sqrt(0) is infinite, and the loss is not."""
    root = keras.layers.Lambda(lambda h: keras.ops.sqrt(keras.ops.relu(h)))
    flow = flow_of(model_of(after=[root]), X, Y)
    assert len(flow.not_finite) == 1
    return flow


def a_weight_too_large_for_float16():
    model = model_of(dtype="mixed_float16")
    kernel = model.get_layer("rnn").cell.kernel
    kernel.assign(broken(kernel.numpy(), 1e6, 2, 3))
    return flow_of(model, X, Y)


def the_scale_that_training_on_nan_has_left():
    """The optimizer halves it with every step, until it is 0."""
    model = model_of(dtype="mixed_float16")
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    optimizer.dynamic_scale.assign(0.0)
    model.get_layer("head").bias.assign([np.nan, 0.0])
    return flow_of(model, X, Y)


def with_inputs(x, activation="tanh"):
    return flow_of(model_of(activation=activation), x, Y)


def with_targets(y, loss, **options):
    return flow_of(model_of(), X, y, loss=loss, **options)


NAN, LOSS = np.nan, "the loss"
LATE = broken(X, NAN, slice(None), slice(5, None))
MANY = "48 of 108 numbers of x (first x[0, 5, 0])"
STATE = "initial state of rnn"
STATES = f"all numbers of {STATE} (first {STATE}[0, 0])"
INFINITE = {"sample_weight": broken(np.ones(B), np.inf, 1)}
FAULTS = [
    # Infinite inputs saturate tanh: all states are finite, and no gradient of a weight.
    (lambda: with_inputs(broken(X, NAN, 1, 3, 2)), "x[1, 3, 2]"),
    (lambda: with_inputs(broken(X, np.inf, 1, 3, 2)), "x[1, 3, 2]"),
    (lambda: with_inputs(broken(X, -np.inf, 1, 3, 2), "relu"), "x[1, 3, 2]"),
    (lambda: with_inputs(LATE), MANY),
    (lambda: with_targets(broken(Y, NAN, 2, 1), "mse"), "y[2, 1]", LOSS),
    (lambda: with_targets(Y, "mae", **INFINITE), "sample_weight[1]", LOSS),
    (lambda: one_of_several(broken(Y, NAN, 0, 1), Y), "x['b'][0, 1]", LOSS),
    (lambda: one_of_several(Y, broken(Y, np.inf, 1, 0)), "y['p'][1, 0]", LOSS),
    (lambda: with_weight("rnn", "kernel", np.inf),),
    (lambda: with_weight("rnn", "recurrent_kernel", np.inf),),
    (lambda: with_weight("rnn", "bias", NAN),),
    (lambda: with_weight("head", "kernel", NAN), LOSS),
    (lambda: with_weight("head", "bias", np.inf), LOSS),
    (lambda: with_weight("norm", "gamma", NAN), LOSS),
    (the_output_layer_of_the_layer, LOSS),
    (the_state_of_a_stateful_layer, f"{STATE}[1, 4]"),
    (a_given_state, STATES),
    (a_layer_before, LOSS),
    (the_loss_by_itself, LOSS),
    (the_gradient_that_arrives, "what the loss sends to rnn"),
    (a_weight_too_large_for_float16, "rnn.kernel in float16[2, 3]"),
    (the_scale_that_training_on_nan_has_left, LOSS),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda row: (*row, "a weight")[1])
@without_graphs()
def test_what_is_not_finite_is_named(fault):
    flow, *names = fault
    assert_not_finite(flow(), *names)


@without_graphs()
def test_what_is_finite_is_not_named():
    flow = flow_of(model_of(), X, Y, loss="mse", sample_weight=np.ones(B))
    assert flow.not_finite == () and flow.verdict != "not finite"


@pytest.mark.parametrize("backwards", [False, True])
@without_graphs()
def test_padding_may_hold_anything(backwards):
    padded, zeros = np.array(X), np.array(X)
    steps = [np.arange(T) >= 6, np.arange(T) % 3 == 1, np.arange(T) < 2]
    padded[np.array(steps)] = np.nan
    zeros[np.array(steps)] = 0
    model = model_of(Padded(), go_backwards=backwards)
    flow = flow_of(model, padded, Y, loss_steps=1)
    assert flow.not_finite == () and flow.finite
    masked = model_of(keras.layers.Masking(), go_backwards=backwards)
    expected = flow_of(masked, zeros, Y, loss_steps=1)
    np.testing.assert_allclose(flow.adjoint_norms, expected.adjoint_norms, rtol=1e-5)
    np.testing.assert_allclose(flow.state_norms, expected.state_norms, rtol=1e-5)
    assert np.isnan(flow.state_norms[0]).sum() == 3
    # Something else is named, and padding is not.
    head = model.get_layer("head").bias
    head.assign([0.0, np.nan])
    flow = flow_of(model, padded, Y, loss_steps=1)
    assert_not_finite(flow, f"{head.path}[1]", "the loss")
    assert len(flow.not_finite) == 2
    # And a real step is.
    head.assign([0.0, 0.0])
    padded[2, 5, 1] = np.inf
    assert_not_finite(flow_of(model, padded, Y, loss_steps=1), "x[2, 5, 1]")


# --- states that explode


@pytest.mark.parametrize(
    "activation, dtype",
    few(
        [(a, d) for a in ("relu", "linear") for d in ("float32", "mixed_float16")],
        lambda a, d: (a == "relu") == (d == "float32"),
    ),
)
@without_graphs()
def test_states_that_explode_are_no_gradient_that_does(activation, dtype):
    gain = keras.initializers.Orthogonal(3.6)
    model = model_of(activation=activation, recurrent_initializer=gain, dtype=dtype)
    x = rng(2).normal(size=(B, 20, D)).astype("float32")
    flow = flow_of(model, x, Y, loss_steps=1)
    assert flow.verdict == "exploding states"
    assert "forward pass" in flow.explanation and "clip" in flow.explanation
    assert not any("clipnorm" in item for item in flow.advice)
    start = "identity" if activation == "relu" else "orthogonal"
    assert start in flow.advice[0] and "3.6" in flow.advice[0]
    if dtype == "float32":
        assert flow.finite
        W, U, b = (np.float64(w) for w in model.get_layer("rnn").get_weights())
        h, came_in, growth, norms = np.zeros((B, H)), 0, 0, []
        f = {"relu": lambda z: np.maximum(z, 0), "linear": lambda z: z}[activation]
        for t in range(20):
            h = f(x[:, t] @ W + h @ U + b)
            came_in = came_in + np.linalg.norm(f(x[:, t] @ W + b), axis=1)
            norms.append(np.linalg.norm(h, axis=1))
            growth = max(growth, np.max(norms[-1] / came_in))
        np.testing.assert_allclose(flow.state_norms.T, norms, rtol=1e-3)
        np.testing.assert_allclose(flow.state_growth, growth, rtol=1e-3)
        assert growth > 1e4
        assert f"|h_t| reaches {np.max(norms):.2g}" in flow.explanation


@pytest.mark.usefixtures("usual_sizes")
def test_states_of_1e23():
    """relu, a gain of 1.8, 300 steps. They are finite, their squares and the loss not."""
    gain = keras.initializers.Orthogonal(1.8)
    model = model_of(activation="relu", recurrent_initializer=gain)
    x = rng(2).normal(size=(B, 300, D)).astype("float32")
    flow = flow_of(model, x, Y, loss_steps=1)
    assert flow.verdict == "exploding states" and not flow.finite
    assert np.all(np.isfinite(flow.state_norms)) and np.max(flow.state_norms) > 1e23
    assert flow.not_finite == ("the loss",)
    assert "Not finite: the loss" in flow.explanation


@without_graphs()
def test_states_that_overflow():
    """Nothing is amiss but the size of the recurrent kernel, which is finite."""
    gain = keras.initializers.Orthogonal(1e8)
    model = model_of(activation="linear", recurrent_initializer=gain)
    flow = flow_of(model, X, Y)
    assert flow.verdict == "exploding states" and not flow.finite
    assert "overflows" in flow.explanation and flow.suggest_truncation() is None
    first = np.flatnonzero(np.isinf(flow.state_norms).any(0))[0] + 1
    assert 5 <= first <= 7  # 1e8 to the power of 5 is beyond float32
    assert flow.not_finite == (f"the states of rnn from step {first} on", "the loss")
    assert json.loads(json.dumps(flow.to_dict(), allow_nan=False))["advice"]


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_what_only_adds_up_does_not_explode(activation):
    """With U = 1 a state may grow with the number of steps, and not beyond."""
    one = keras.initializers.Identity()
    model = model_of(activation=activation, recurrent_initializer=one)
    kernel = model.get_layer("rnn").cell.kernel
    kernel.assign(np.abs(kernel.numpy()))
    flow = flow_of(model, np.ones((B, 200, D), "float32"), Y, loss_steps=1)
    assert flow.state_growth <= 1.001 and flow.verdict != "exploding states"
    if activation == "relu":
        assert np.max(flow.state_norms) > 100 * np.max(flow.state_norms[:, 0])


@without_graphs()
def test_a_gradient_that_overflows_explodes():
    """Where states are small, and the backward pass alone overflows: clipping helps."""
    layer = BPTTRNN(H, "linear", name="rnn", dtype="float64")
    model = keras.Sequential([keras.Input((T, D), dtype="float64"), layer])
    W, U, b = random_weights(D, H)
    model.set_weights([0 * W, 1e60 * U, b * 0])
    flow = flow_of(model, X, rng(3).normal(size=(B, H)), loss="mse")
    assert flow.verdict == "exploding" and flow.not_finite == ()
    assert "not finite" in flow.explanation and not flow.finite
    assert np.all(np.isinf(flow.adjoint_norms[:, 0]))
    assert any("adjoint_max_growth=1" in item for item in flow.advice)
    assert any("grows without end" in item for item in flow.advice)
    assert flow.suggest_truncation() is None and "window" not in flow.summary()


# --- several layers, figures and callbacks


@without_graphs()
def test_each_layer_says_what_it_sees():
    """The lower one is where it begins, the upper one gets what is not finite."""
    keras.utils.set_random_seed(1)
    gain = keras.initializers.Orthogonal(1e8)
    low = BPTTRNN(
        H, "linear", recurrent_initializer=gain, return_sequences=True, name="low"
    )
    model = keras.Sequential([keras.Input((None, D)), low, BPTTRNN(F, name="rnn")])
    flow = gradient_flow(model, X, Y, loss="mse", loss_steps=1)
    assert flow["low"].verdict == "exploding states"
    assert any("inputs of rnn" in item for item in flow["rnn"].not_finite)
    assert_not_finite(flow["rnn"])


def epoch_of(callback, model):
    logs = {}
    callback.set_model(model)
    callback.on_train_begin()
    callback.on_epoch_end(0, logs)
    callback.on_train_end()
    return logs


@pytest.mark.parametrize("fault", ["inputs", "targets", "weights", "states"])
@without_graphs()
def test_callbacks_go_on_and_leave_windows_as_they_are(fault, tmp_path, monkeypatch):
    model = model_of(activation="linear")
    x = broken(X, np.nan, 1, 3, 2) if fault == "inputs" else X
    y = broken(Y, np.nan, 1, 1) if fault == "targets" else Y
    rnn, head = model.layers
    if fault == "weights":
        head.bias.assign([0, np.nan])
    if fault == "states":
        rnn.cell.recurrent_kernel.assign(1e8 * np.eye(H))
    flow = gradient_flow(model, x, y, loss_steps=1)
    logger = GradientFlowLogger((x, y), log_dir=tmp_path, loss_steps=1)
    logs = epoch_of(logger, model)
    assert all(isinstance(value, float) for value in logs.values())
    assert not math.isfinite(logs["rnn_adjoint_norm"])
    (file,) = tmp_path.iterdir()
    assert logger.flow["rnn"].explanation == flow["rnn"].explanation
    assert flow["rnn"].explanation.encode() in file.read_bytes()
    monkeypatch.setattr(callbacks, "gradient_flow", lambda *_, **__: flow)
    for window in (3, None, Truncation(4, stride=1)):
        rnn.truncation = window
        before = rnn.truncation
        for options in ({}, {"max_steps": 7}, {"slack": 0}):
            logs = epoch_of(AdaptiveTruncation((x, y), **options), model)
            assert rnn.truncation == before
            assert logs == {"rnn_window": before.steps if window else T}
