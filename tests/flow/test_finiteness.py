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
SLOW = pytest.mark.slow


def data():
    random = rng(1)
    x, y = random.normal(size=(B, T, D)), random.normal(size=(B, F))
    return x.astype("float32"), y.astype("float32")


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


@pytest.mark.parametrize(
    "value, activation",
    few(
        [(v, a) for v in (np.nan, np.inf, -np.inf) for a in ("tanh", "relu")],
        lambda v, a: (v, a) in [(np.inf, "tanh"), (-np.inf, "relu")],
    ),
)
@without_graphs()
def test_inputs(value, activation):
    """Infinite ones saturate tanh: all states are finite, and no gradient of a weight."""
    x, y = data()
    flow = flow_of(model_of(activation=activation), broken(x, value, 1, 3, 2), y)
    assert_not_finite(flow, "x[1, 3, 2]")
    x[:, 5:] = value
    flow = flow_of(model_of(activation=activation), x, y)
    assert_not_finite(flow, f"48 of {B * T * D} numbers of x (first x[0, 5, 0])")


@pytest.mark.parametrize("loss", ["mse", "mae"])
@without_graphs()
def test_targets_and_sample_weights(loss):
    x, y = data()
    model = model_of()
    flow = flow_of(model, x, broken(y, np.nan, 2, 1), loss=loss)
    assert_not_finite(flow, "y[2, 1]", "the loss")
    weight = broken(np.ones(B), np.inf, 1)
    flow = flow_of(model, x, y, loss=loss, sample_weight=weight)
    assert_not_finite(flow, "sample_weight[1]", "the loss")
    flow = flow_of(model, x, y, loss=loss, sample_weight=np.ones(B))
    assert flow.not_finite == () and flow.verdict != "not finite"


@without_graphs()
def test_one_of_several_inputs_and_targets():
    x, y = data()
    first, second = keras.Input((T, D), name="a"), keras.Input((F,), name="b")
    h = BPTTRNN(H, name="rnn")(first)
    outputs = {"o": keras.layers.Dense(F)(h), "p": keras.layers.Dense(F)(second)}
    model = keras.Model({"a": first, "b": second}, outputs)
    model.compile("sgd", {"o": "mse", "p": "mse"})
    batch = {"a": x, "b": broken(y, np.nan, 0, 1)}, {"o": y, "p": y}
    # The loss of the other branch does not reach the layer, but is the loss.
    assert_not_finite(flow_of(model, *batch), "x['b'][0, 1]", "the loss")
    batch = {"a": x, "b": y}, {"o": y, "p": broken(y, np.inf, 1, 0)}
    assert_not_finite(flow_of(model, *batch), "y['p'][1, 0]", "the loss")


NAMES = "kernel recurrent_kernel bias head.kernel head.bias norm.gamma".split()


@pytest.mark.parametrize(
    "name, value",
    few(
        [(name, value) for name in NAMES for value in (np.nan, np.inf)],
        lambda name, value: np.isnan(value) == (name in NAMES[2:]),
    ),
)
@without_graphs()
def test_weights_of_the_layer_and_of_others(name, value):
    """By the path that Keras gives them, which has the layer's name."""
    norm = keras.layers.LayerNormalization(name="norm")
    model = model_of(norm)
    (weight,) = (
        w
        for w in model.weights
        if w.path.endswith(("/" + name).replace(".", "/"))
        and ("." in name or "/rnn/" in w.path)
    )
    weight.assign(broken(weight.numpy(), value, *[-1] * len(weight.shape)))
    last = ", ".join(str(n - 1) for n in weight.shape)
    flow = flow_of(model, *data())
    assert_not_finite(flow, f"{weight.path}[{last}]")


@without_graphs()
def test_the_output_layer_of_the_layer():
    x, _ = data()
    rnn = BPTTRNN(H, name="rnn", output_units=F, return_sequences=True)
    model = keras.Sequential([keras.Input((T, D)), rnn])
    rnn.output_layer.bias.assign([np.nan, 0.0])
    flow = flow_of(model, x, np.ones((B, T, F)), loss="mse")
    assert_not_finite(flow, f"{rnn.output_layer.bias.path}[0]", "the loss")
    assert not any("states" in item for item in flow.not_finite)


@without_graphs()
def test_initial_states():
    """Of a stateful layer, and one that is given."""
    x, y = data()
    rnn = BPTTRNN(H, name="rnn", stateful=True)
    model = keras.Sequential([keras.Input(batch_shape=(B, T, D)), rnn])
    rnn.states[0].assign(broken(np.zeros((B, H)), np.nan, 1, 4))
    flow = flow_of(model, x, np.ones((B, H)), loss="mse")
    assert_not_finite(flow, "initial state of rnn[1, 4]")
    state = keras.Input((H,))
    inputs = keras.Input((T, D))
    outputs = BPTTRNN(H, name="rnn")(inputs, initial_state=keras.ops.log(state))
    model = keras.Model([inputs, state], outputs)
    flow = flow_of(model, [x, np.full((B, H), -1.0)], np.ones((B, H)), loss="mse")
    named = "all numbers of initial state of rnn (first initial state of rnn[0, 0])"
    assert_not_finite(flow, named)


@without_graphs()
def test_what_a_layer_before_makes_of_finite_inputs():
    x, y = data()
    flow = flow_of(model_of(keras.layers.Lambda(tf.math.log)), np.abs(x) - 0.1, y)
    assert any("numbers of inputs of rnn" in item for item in flow.not_finite)
    assert_not_finite(flow, "the loss")


@without_graphs()
def test_a_loss_that_is_not_finite_by_itself():
    x, y = data()
    flow = flow_of(model_of(), x, y, loss=lambda y, o: tf.math.log(o - o - 1))
    assert_not_finite(flow, "the loss")
    assert flow.not_finite == ("the loss",)


@without_graphs()
def test_a_gradient_that_arrives_is_not_finite():
    """d sqrt(0) is infinite, and the loss is not."""
    x, y = data()
    root = keras.layers.Lambda(lambda h: keras.ops.sqrt(keras.ops.relu(h)))
    flow = flow_of(model_of(after=[root]), x, y)
    assert_not_finite(flow, "what the loss sends to rnn")
    assert len(flow.not_finite) == 1


# --- padding


@pytest.mark.parametrize("backwards", [False, True])
@without_graphs()
def test_padding_may_hold_anything(backwards):
    x, y = data()
    padded, zeros = np.array(x), np.array(x)
    steps = [np.arange(T) >= 6, np.arange(T) % 3 == 1, np.arange(T) < 2]
    padded[np.array(steps)] = np.nan
    zeros[np.array(steps)] = 0
    model = model_of(Padded(), go_backwards=backwards)
    flow = flow_of(model, padded, y)
    assert flow.not_finite == () and flow.finite
    masked = model_of(keras.layers.Masking(), go_backwards=backwards)
    expected = flow_of(masked, zeros, y)
    np.testing.assert_allclose(flow.adjoint_norms, expected.adjoint_norms, rtol=1e-5)
    np.testing.assert_allclose(flow.state_norms, expected.state_norms, rtol=1e-5)
    assert np.isnan(flow.state_norms[0]).sum() == 3
    # Something else is named, and padding is not.
    head = model.get_layer("head").bias
    head.assign([0.0, np.nan])
    flow = flow_of(model, padded, y)
    assert_not_finite(flow, f"{head.path}[1]", "the loss")
    assert len(flow.not_finite) == 2
    # And a real step is.
    model = model_of(Padded(), go_backwards=backwards)
    padded[2, 5, 1] = np.inf
    assert_not_finite(flow_of(model, padded, y), "x[2, 5, 1]")


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
    x, y = rng(2).normal(size=(B, 20, D)).astype("float32"), data()[1]
    flow = flow_of(model, x, y, loss_steps=1)
    assert flow.verdict == "exploding states"
    assert "forward pass" in flow.explanation and "clip" in flow.explanation
    assert not any("clipnorm" in item for item in flow.advice)
    assert "orthogonal" in flow.advice[0] and "3.6" in flow.advice[0]
    assert "tanh" in flow.advice[1]
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
    x, y = rng(2).normal(size=(B, 300, D)).astype("float32"), data()[1]
    flow = flow_of(model, x, y, loss_steps=1)
    assert flow.verdict == "exploding states" and not flow.finite
    assert np.all(np.isfinite(flow.state_norms)) and np.max(flow.state_norms) > 1e23
    assert flow.not_finite == ("the loss",)
    assert "Not finite: the loss" in flow.explanation


@without_graphs()
def test_states_that_overflow():
    """Nothing is amiss but the size of the recurrent kernel, which is finite."""
    gain = keras.initializers.Orthogonal(1e8)
    model = model_of(activation="linear", recurrent_initializer=gain)
    flow = flow_of(model, *data())
    assert flow.verdict == "exploding states" and not flow.finite
    assert "overflows" in flow.explanation and flow.suggest_truncation() is None
    first = np.flatnonzero(np.isinf(flow.state_norms).any(0))[0] + 1
    assert 5 <= first <= 7  # 1e8 to the power of 5 is beyond float32
    assert flow.not_finite == (f"the states of rnn from step {first} on", "the loss")
    assert json.loads(json.dumps(flow.to_dict(), allow_nan=False))["advice"]


@SLOW
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_what_only_adds_up_does_not_explode(activation):
    """With U = 1 a state may grow with the number of steps, and not beyond."""
    one = keras.initializers.Identity()
    model = model_of(activation=activation, recurrent_initializer=one)
    x, y = np.ones((B, 200, D), "float32"), data()[1]
    kernel = model.get_layer("rnn").cell.kernel
    kernel.assign(np.abs(kernel.numpy()))
    flow = flow_of(model, x, y, loss_steps=1)
    assert flow.state_growth <= 1.001 and flow.verdict != "exploding states"
    if activation == "relu":
        assert np.max(flow.state_norms) > 100 * np.max(flow.state_norms[:, 0])


@without_graphs()
def test_a_gradient_that_overflows_explodes():
    """Where states are small, and the backward pass alone overflows: clipping helps."""
    x, y = data()
    layer = BPTTRNN(H, "linear", name="rnn", dtype="float64")
    model = keras.Sequential([keras.Input((T, D), dtype="float64"), layer])
    W, U, b = random_weights(D, H)
    model.set_weights([0 * W, 1e60 * U, b * 0])
    flow = flow_of(model, x, rng(3).normal(size=(B, H)), loss="mse")
    assert flow.verdict == "exploding" and flow.not_finite == ()
    assert "not finite" in flow.explanation and not flow.finite
    assert np.all(np.isinf(flow.adjoint_norms[:, 0]))
    assert any("adjoint_clipnorm" in item for item in flow.advice)
    assert flow.suggest_truncation() is None and "window" not in flow.summary()


def test_the_scale_of_the_loss_is_lowered_where_float16_overflows():
    """As the optimizer lowers it in training: no explosion, and nothing is amiss."""
    x, y = data()
    flows = []
    for dtype in ("mixed_float16", "float32"):
        model = model_of(dtype=dtype)
        optimizer = keras.optimizers.SGD()
        if dtype == "mixed_float16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        model.compile(
            optimizer, lambda y, o: 500 * keras.losses.mean_squared_error(y, o)
        )
        flows.append(flow_of(model, x, y))
    mixed, full = flows
    assert np.max(full.adjoint_norms) * 2**15 > 65504  # the largest number of float16
    assert mixed.verdict == full.verdict and mixed.finite
    np.testing.assert_allclose(mixed.adjoint_norms, full.adjoint_norms, rtol=0.1)


@without_graphs()
def test_weights_that_are_too_large_for_float16():
    x, y = data()
    model = model_of(dtype="mixed_float16")
    kernel = model.get_layer("rnn").cell.kernel
    kernel.assign(broken(kernel.numpy(), 1e6, 2, 3))
    assert_not_finite(flow_of(model, x, y), "rnn.kernel in float16[2, 3]")


def test_the_scale_that_training_on_nan_has_left():
    """The optimizer halves it with every step, until it is 0."""
    x, y = data()
    model = model_of(dtype="mixed_float16")
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    optimizer.dynamic_scale.assign(0.0)
    model.get_layer("head").bias.assign([np.nan, 0.0])
    assert_not_finite(flow_of(model, x, y), "the loss")


# --- several layers, and callbacks


@without_graphs()
def test_each_layer_says_what_it_sees():
    """The lower one is where it begins, the upper one gets what is not finite."""
    keras.utils.set_random_seed(1)
    gain = keras.initializers.Orthogonal(1e8)
    low = BPTTRNN(
        H, "linear", recurrent_initializer=gain, return_sequences=True, name="low"
    )
    model = keras.Sequential([keras.Input((None, D)), low, BPTTRNN(F, name="rnn")])
    flow = gradient_flow(model, *data(), loss="mse")
    assert flow["low"].verdict == "exploding states"
    assert any("inputs of rnn" in item for item in flow["rnn"].not_finite)
    assert_not_finite(flow["rnn"])


def inputs(x, y, model):
    return broken(x, np.nan, 1, 3, 2), y


def targets(x, y, model):
    return x, broken(y, np.nan, 1, 1)


def weights(x, y, model):
    model.layers[-1].bias.assign([0, np.nan])
    return x, y


def states(x, y, model):
    model.layers[-2].cell.recurrent_kernel.assign(1e8 * np.eye(H))
    return x, y


@pytest.fixture(scope="module", params=[inputs, targets, weights, states])
def fault(request):
    """A model, a batch, and their flow, where something is not finite."""
    model = model_of(activation="linear", jit_compile=False)
    batch = request.param(*data(), model)
    with without_graphs():
        return model, batch, gradient_flow(model, *batch)


def epoch_of(callback, model):
    logs = {}
    callback.set_model(model)
    callback.on_train_begin()
    callback.on_epoch_end(0, logs)
    callback.on_train_end()
    return logs


@pytest.mark.parametrize("window", [3, None, Truncation(4, stride=1)], ids=str)
def test_a_window_stays_where_numbers_are_not_finite(window, fault, monkeypatch):
    model, batch, flow = fault
    monkeypatch.setattr(callbacks, "gradient_flow", lambda *_, **__: flow)
    rnn = model.get_layer("rnn")
    rnn.truncation = window
    before = rnn.truncation
    for options in ({}, {"max_steps": 7}, {"slack": 0}):
        logs = epoch_of(AdaptiveTruncation(batch, **options), model)
        assert rnn.truncation == before
        assert logs == {"rnn_window": before.steps if window else T}


@without_graphs()
def test_the_logger_goes_on(fault, tmp_path):
    model, batch, flow = fault
    callback = GradientFlowLogger(batch, log_dir=tmp_path)
    logs = epoch_of(callback, model)
    assert all(isinstance(value, float) for value in logs.values())
    assert not math.isfinite(logs["rnn_adjoint_norm"])
    (file,) = tmp_path.iterdir()
    assert callback.flow["rnn"].explanation == flow["rnn"].explanation
    assert flow["rnn"].explanation.encode() in file.read_bytes()


@without_graphs()
def test_a_figure_says_so():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    x, y = data()
    figure = gradient_flow(model_of(), x, broken(y, np.nan, 1, 1)).plot()
    figure.canvas.draw()
    over_time, by_lag, _ = figure.axes
    assert over_time.get_title("left") == "rnn: not finite"
    assert "window" not in by_lag.get_title("left")
