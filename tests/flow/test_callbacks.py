"""The callbacks: what they log, that they change nothing else, and where windows go.

Layers are linear, their recurrent kernels multiples of the identity, where a number is to
be known beforehand: then a share q^k of a loss reaches k steps back, and for the loss of
the last state the bias of k steps is q^k.
"""

import dataclasses
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import random_inputs, without_graphs

from keras_bptt import (
    BPTTGRU,
    BPTTLSTM,
    BPTTRNN,
    AdaptiveTruncation,
    GradientFlow,
    GradientFlowLogger,
    RandomizedTruncation,
    Truncation,
    callbacks,
    gradient_flow,
)
from keras_bptt.flow import tensorboard

B, T, D, H = 4, 12, 2, 3
X, Y = (random_inputs(*shape).astype("float32") for shape in [(B, T, D), (B, 2)])
KEYS = "adjoint_norm delta_norm factor half_life lag_share sigma_max spectral_radius"
BOTH = pytest.mark.parametrize("callback", [GradientFlowLogger, AdaptiveTruncation])


def model_of(*layers, lr=0.0, model_class=keras.Sequential, timesteps=T):
    inputs, head = keras.Input((timesteps, D)), keras.layers.Dense(2)
    model = model_class([inputs, *layers, head])
    model.compile(keras.optimizers.SGD(lr), "mse")
    return model


def decaying(q, truncation=None, name="rnn", **options):
    """A layer of which a share q^k of a loss reaches k steps back."""
    kernel = keras.initializers.Identity(q)
    options = {"recurrent_initializer": kernel, "jit_compile": False} | options
    return BPTTRNN(H, "linear", truncation=truncation, name=name, **options)


def fit(model, *callbacks, x=X, y=Y, **options):
    options = {"batch_size": B, "verbose": 0, "shuffle": False} | options
    return model.fit(x, y, callbacks=list(callbacks), **options).history


def epoch_of(callback, model, epoch=0, begin=True):
    """The logs after one epoch end, without an epoch."""
    logs = {}
    callback.set_model(model)
    if begin:
        callback.on_train_begin()
    callback.on_epoch_end(epoch, logs)
    return logs


@pytest.fixture(scope="module")
def a_flow():
    """What the flow of any layer is made of."""
    with without_graphs():
        return gradient_flow(model_of(decaying(0.5)), X, Y)["rnn"]


@pytest.fixture
def given(a_flow, monkeypatch):
    """A function: what callbacks measure becomes a decay q of each of these layers."""

    def give(q, *layers):
        shares = q ** np.arange(float(T))
        flow = dataclasses.replace(a_flow, untruncated_lag_shares=shares)
        named = {layer.name: layer for layer in layers}
        flow = GradientFlow(dict.fromkeys(named, flow), named)
        monkeypatch.setattr(callbacks, "gradient_flow", lambda *_, **__: flow)

    return give


# What is logged.


@without_graphs()
def test_the_logs_hold_what_gradient_flow_gives():
    """Here every other epoch is measured."""
    x, weight = X[:, :6], np.arange(1.0, B + 1)
    first = BPTTRNN(H, return_sequences=True, truncation=4, name="first")
    second = BPTTRNN(H, "relu", name="second")
    model = model_of(first, second, timesteps=6)
    options = {"every": 2, "examples": 3, "loss_steps": 2, "quantities": "all"}
    logger = GradientFlowLogger((x, Y, weight), **options)
    before = epoch_of(logger, model)
    model.layers[-1].bias.assign([1.0, 2.0])
    assert epoch_of(logger, model, epoch=1, begin=False) == before
    logs = epoch_of(logger, model, epoch=2, begin=False)
    flow = gradient_flow(model, x[:3], Y[:3], sample_weight=weight[:3], loss_steps=2)
    expected = {}
    for name, off in [("first", "saturated"), ("second", "inactive")]:
        each = flow[name]
        expected |= {
            f"{name}_adjoint_norm": np.mean(each.adjoint_norms),
            f"{name}_delta_norm": np.mean(each.delta_norms),
            f"{name}_factor": each.factor,
            f"{name}_half_life": each.half_life,
            f"{name}_lag_share": each.untruncated_lag_shares[-1],
            f"{name}_sigma_max": each.sigma_max,
            f"{name}_spectral_radius": each.spectral_radius,
            f"{name}_{off}": np.mean(getattr(each, off)),
        }
    assert all(type(value) is float for value in logs.values())
    assert logs == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert logs.keys() == before.keys()
    assert logs["first_adjoint_norm"] != before["first_adjoint_norm"], "measured anew"
    assert logger.flow["first"].adjoint_norms.shape == (3, 6)


@without_graphs()
def test_known_numbers_of_one_layer_are_logged():
    """Of the layer that is named, from its unmasked steps."""
    x = X.copy()
    x[:, :5] = 0
    other = decaying(1.0, name="a", return_sequences=True)
    model = model_of(keras.layers.Masking(), other, decaying(0.5))
    logger = GradientFlowLogger((x, Y), layer="rnn", quantities="all")
    logs = epoch_of(logger, model)
    assert list(logs) == [f"rnn_{key}" for key in KEYS.split()]
    for key in ("factor", "sigma_max", "spectral_radius"):
        assert logs[f"rnn_{key}"] == pytest.approx(0.5, rel=1e-5)
    assert logs["rnn_half_life"] == pytest.approx(1, rel=1e-5)
    assert logs["rnn_lag_share"] == pytest.approx(0.5 ** (T - 6), rel=1e-4)
    norms = gradient_flow(model, x, Y, layer="rnn")["rnn"].adjoint_norms
    assert np.all(np.isnan(norms[:, :5]))
    assert logs["rnn_adjoint_norm"] == pytest.approx(np.mean(norms[:, 5:]), rel=1e-6)


@pytest.mark.parametrize(
    "layer_class, gates",
    [(BPTTLSTM, "input forget output"), (BPTTGRU, "update reset")],
    ids=["LSTM", "GRU"],
)
@without_graphs()
def test_gates_are_logged(layer_class, gates):
    """The mean of each, and for how many steps the one that holds a state does so."""
    model = model_of(layer_class(H, name="layer"))
    logger = GradientFlowLogger((X, Y), quantities="all")
    logs = epoch_of(logger, model)
    flow = logger.flow["layer"]
    of_deltas = [] if flow.delta_norms is None else ["delta_norm"]
    names = [f"{gate}_gate" for gate in gates.split()]
    keys = ["adjoint_norm", *of_deltas, "factor", "half_life", "lag_share", *names]
    assert list(logs) == [f"layer_{key}" for key in [*keys, "memory"]]
    for gate, name in zip(flow.gates.values(), names, strict=True):
        assert logs[f"layer_{name}"] == pytest.approx(np.mean(gate.mean))
    (holding,) = [gate for gate in flow.gates.values() if gate.holds]
    assert logs["layer_memory"] == pytest.approx(np.median(holding.memory))


@pytest.mark.parametrize(
    "quantities, keys",
    [
        (None, ["adjoint_norm", "factor"]),
        (("sigma_max", "adjoint_norm"), ["adjoint_norm", "sigma_max"]),
        ("half_life", ["half_life"]),
        (["factor", "memory"], ["factor"]),  # it has no gate
        ((), []),
    ],
    ids=str,
)
def test_quantities_are_chosen(quantities, keys, given, tmp_path):
    """For the logs; TensorBoard has all, and so few or none are no more measurements."""
    rnn, options = decaying(0.5), {"every": 2, "log_dir": tmp_path}
    given(0.5, rnn)
    options |= {} if quantities is None else {"quantities": quantities}
    logger = GradientFlowLogger((X, Y), **options)
    for epoch in range(4):
        logs = epoch_of(logger, keras.Sequential(), epoch, begin=epoch == 0)
        assert list(logs) == [f"rnn_{key}" for key in keys]
    logger.on_train_end()
    found = events_of(tmp_path)
    assert {f"gradient_flow/rnn/{key}" for key in KEYS.split()} <= set(found)
    assert list(found["gradient_flow/rnn/factor"]) == [0, 2]


def test_a_quantity_that_is_not_there():
    words = "`quantities` must be.*adjoint_norm, .*Received: {}Pass"
    for value, received in [
        (("factor", "sigma"), r"'sigma'. Did you mean 'sigma_max'\? "),
        ("facto", r"'facto'. Did you mean 'factor'\? "),
        ([3], r"3. "),
        (None, "NoneType. "),
    ]:
        with pytest.raises(ValueError, match=words.format(received)):
            GradientFlowLogger((X, Y), quantities=value)


@without_graphs()
def test_norms_are_those_of_the_examples_measured():
    """The mean loss of half as many divides by half as many."""
    x, y = X[[0, 0, 0, 0]], Y[[0, 0, 0, 0]]
    model = model_of(decaying(0.5))
    two, four = (
        epoch_of(GradientFlowLogger((x, y), examples=n, quantities="all"), model)
        for n in (2, 4)
    )
    for key in two:
        ratio = 2 if key in ("rnn_adjoint_norm", "rnn_delta_norm") else 1
        assert two[key] == pytest.approx(ratio * four[key], rel=1e-5), key


def test_early_stopping_behind_it_stops(given):
    """It reads what the logger has put into the logs, and so does History."""
    rnn, key = decaying(0.5), "rnn_factor"
    given(0.5, rnn)
    logger = GradientFlowLogger((X, Y), every=3)
    stop = keras.callbacks.EarlyStopping(key, mode="max", patience=2)
    assert len(fit(model_of(rnn), logger, stop, epochs=6)[key]) == 3


@without_graphs()
def test_the_first_epoch_of_a_later_fit_is_measured():
    logger, rnn = GradientFlowLogger((X, Y), every=2), decaying(0.5)
    model = model_of(rnn)
    epoch_of(logger, model)
    rnn.cell.recurrent_kernel.assign(0.25 * np.eye(H))
    assert epoch_of(logger, model, 3)["rnn_factor"] == pytest.approx(0.25, rel=1e-5)


@pytest.mark.slow
def test_training_goes_on_as_without():
    def trained(*callbacks):
        keras.utils.set_random_seed(1)
        rnn = BPTTRNN(H, dropout=0.2, recurrent_dropout=0.2, jit_compile=False)
        normal = keras.layers.BatchNormalization()
        model = keras.Sequential([keras.Input((T, D)), normal, rnn])
        model.compile("adam", "mse", metrics=["mae"])
        x, y = random_inputs(2 * B, T, D), random_inputs(2 * B, H)
        history = fit(model, *callbacks, epochs=2, x=x, y=y, shuffle=True)
        variables = [*model.variables, *model.optimizer.variables]
        return history, [(v.path, np.array(v)) for v in variables]

    history, numbers = trained()
    logger = GradientFlowLogger((X, random_inputs(B, H)))
    seen, others = trained(logger)
    assert logger.flow
    assert {key: seen[key] for key in history} == history
    for (path, number), (_, other) in zip(numbers, others, strict=True):
        np.testing.assert_array_equal(other, number, err_msg=path)


# TensorBoard.


def events_of(folder):
    """{tag: {step: (array, metadata)}} of what was written."""
    (file,) = folder.iterdir()
    found = {}
    for record in tf.data.TFRecordDataset(str(file)):
        event = tf.compat.v1.Event.FromString(record.numpy())
        for value in event.summary.value:
            array = tf.make_ndarray(value.tensor)
            found.setdefault(value.tag, {})[event.step] = array, value.metadata
    return found


def pixels_of(array):
    width, height, *images = array
    pixels = [tf.io.decode_png(image).numpy() for image in images]
    assert all(p.shape == (int(height), int(width), 3) for p in pixels)
    return pixels[0]


def test_tensorboard_has_the_numbers_the_words_and_the_map(tmp_path, monkeypatch):
    """Though another callback silences summaries, as Keras' own TensorBoard does."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # not installed
    rnn = decaying(0.5)
    options = {"every": 2, "log_dir": tmp_path / "logs", "quantities": "all"}
    logger = GradientFlowLogger((X, Y), **options)
    model, history = model_of(rnn), []
    for epoch, q in enumerate([0.5, 0.0, 1.0, 0.0]):
        rnn.cell.recurrent_kernel.assign(q * np.eye(H))
        with without_graphs(), tf.summary.record_if(False):
            history.append(epoch_of(logger, model, epoch, begin=epoch == 0))
    writer = logger._writer
    logger.on_train_end()
    with pytest.raises(RuntimeError, match="already closed"):
        writer.as_default().__enter__()
    found = events_of(tmp_path / "logs")
    shown = [*KEYS.split(), "verdict", "adjoint_norms"]
    assert set(found) == {f"gradient_flow/rnn/{what}" for what in shown}
    for key in KEYS.split():
        points = found[f"gradient_flow/rnn/{key}"]
        assert list(points) == [0, 2]
        for step, (value, metadata) in points.items():
            assert value == pytest.approx(history[step][f"rnn_{key}"], rel=1e-6)
            assert metadata.plugin_data.plugin_name == "scalars"
    words = found["gradient_flow/rnn/verdict"]
    assert words[0][0].item().startswith(b"vanishing: dL/dh_t halves every 1 steps")
    assert words[2][0].item().startswith(b"healthy")
    assert words[2][0].item().decode().startswith(logger.flow["rnn"].explanation)
    (first, metadata), (second, _) = found["gradient_flow/rnn/adjoint_norms"].values()
    assert metadata.plugin_data.plugin_name == "images"
    assert "1e-8" in metadata.summary_description
    first, second = pixels_of(first), pixels_of(second)
    cell = tensorboard.MOST_CELLS // T
    assert first.shape == (16, T * cell, 3) and second.shape == (32, T * cell, 3)
    # A row for each epoch measured: it gets brighter with t where the gradient vanishes.
    np.testing.assert_array_equal(second[:16], first)
    columns = second[:, ::cell].astype(int).sum(2)
    assert np.all(np.diff(columns[0]) > 0) and np.all(np.diff(columns[16]) == 0)


def test_the_map_has_axes_where_matplotlib_is():
    """A figure of the same cells, wider and higher than they are, and no open one."""
    pytest.importorskip("matplotlib")
    steps, epochs = 300, [0, 5, 10]
    ramp = np.linspace(-9, 3, steps) + np.zeros((3, 1))
    ramp[:, -20:], ramp[1, :20] = np.nan, -np.inf
    pixels = tensorboard.flow_map(ramp, epochs, steps, "|dL/dh_t|")
    height, width, channels = pixels.shape
    assert channels == 3 and pixels.dtype == np.uint8
    assert width == 800 and 200 < height < 400
    cells = tensorboard.heat_map(ramp, *tensorboard.DECADES)
    seen = set(map(tuple, pixels.reshape(-1, 3)))
    ends = {(68, 1, 84), (253, 231, 37), (128, 128, 128)}
    assert ends <= seen and ends <= set(map(tuple, cells.reshape(-1, 3)))
    assert (255, 255, 255) in seen and (0, 0, 0) in seen, "the margin, and the words"
    later = tensorboard.flow_map(ramp[:, :1], [7, 8, 9], 1, "|dL/ds_t|")
    assert later.shape == pixels.shape
    many = tensorboard.flow_map(np.zeros((1000, 4)), list(range(1000)), 4, "|dL/dh_t|")
    assert many.shape[0] == 640, "rows get lower"


def test_the_figure_of_the_map_is_what_is_written(tmp_path, given):
    pytest.importorskip("matplotlib")
    rnn = decaying(0.5)
    given(0.5, rnn)
    logger = GradientFlowLogger((X, Y), log_dir=tmp_path)
    epoch_of(logger, keras.Sequential(), 3)
    logger.on_train_end()
    ((array, metadata),) = events_of(tmp_path)[
        "gradient_flow/rnn/adjoint_norms"
    ].values()
    with np.errstate(divide="ignore"):
        logs = np.log10(logger.flow["rnn"].mean_adjoint)
    expected = tensorboard.flow_map(logs[None], [3], T, "|dL/dh_t|")
    np.testing.assert_array_equal(pixels_of(array), expected)
    assert "|dL/dh_t|" in metadata.summary_description


def test_colours_of_the_map():
    table = np.array([[-8, 2, -np.inf, np.inf, np.nan, -3]])
    pixels = tensorboard.heat_map(table, -8, 2)[0, :: 256 // 6].astype(int)
    dark, bright, zero, infinite, missing, middle = pixels.tolist()
    assert dark == zero == [68, 1, 84] and bright == infinite == [253, 231, 37]
    assert missing == [128] * 3 and middle == [33, 145, 140]
    grey = tensorboard.heat_map(np.arange(256.0)[None], 0, 255)[0] @ [0.3, 0.59, 0.11]
    assert np.all(np.diff(grey) > -0.7), "brighter, but for the rounding to bytes"


def test_large_maps_are_reduced():
    table = np.linspace(-8, 2, 300)[:, None] + np.zeros(1000)
    pixels = tensorboard.heat_map(table, -8, 2)
    assert pixels.shape == (256, 256, 3)
    assert np.all(pixels == pixels[:, :1])
    assert len(np.unique(pixels[:, 0], axis=0)) > 200


# Where windows go. 0.5^5 < 0.05 < 0.5^4; 0.75^11 < 0.05 < 0.75^10.


@pytest.mark.parametrize(
    "q, before, options, after",
    [
        (0.75, 2, {}, Truncation(11)),
        (0.5, 10, {}, Truncation(5)),
        (0.5, None, {}, Truncation(5)),
        (0.5, 2, {"tolerance": 0.2}, Truncation(3)),
        (1.0, 3, {}, None),
        (1.0, Truncation(3, stride=1), {}, None),
        (1.0, 3, {"max_steps": 7}, Truncation(7)),
        (0.75, 3, {"max_steps": 7}, Truncation(7)),
        (0.5, 3, {"max_steps": 7}, Truncation(5)),
        (0.5, Truncation(3, stride=1), {"max_steps": 4}, Truncation(4, stride=1)),
        (1.0, None, {"max_steps": T - 1}, Truncation(T - 1)),
        (1.0, None, {"max_steps": 99}, None),
        (0.5, 6, {"slack": 0.2}, Truncation(6)),
        (0.5, 6, {"slack": 0.16}, Truncation(5)),
        (0.5, 4, {"slack": 0.25}, Truncation(4)),
        (0.5, 4, {"slack": 0.24}, Truncation(5)),
        (0.5, 6, {"slack": 0.2, "max_steps": 5}, Truncation(5)),
        (0.75, None, {}, None),
        (0.75, None, {"slack": 0}, Truncation(11)),
        (0.5, Truncation(3, stride=1), {}, Truncation(5, stride=1)),
        (0.5, Truncation(4, stride=2), {}, Truncation(5, stride=2)),
        (0.5, Truncation(10, stride=8), {}, Truncation(5, stride=5)),
    ],
    ids=str,
)
def test_where_the_window_goes(q, before, options, after, given):
    rnn = BPTTRNN(H, truncation=before, name="rnn")
    given(q, rnn)
    logs = epoch_of(AdaptiveTruncation((X, Y), **options), keras.Sequential())
    assert rnn.truncation == after
    assert logs == {"rnn_window": min(after.steps, T) if after else T}


@without_graphs()
def test_the_suggestion_is_that_of_the_layers_own_blocks(monkeypatch):
    """Of a loss at every step, where the stride makes a difference."""
    rnn = decaying(0.5, return_sequences=True)
    model, y = model_of(rnn), random_inputs(B, T, 2)
    flow = gradient_flow(model, X, y)
    suggested = {s: flow.suggest_truncation(0.092, s) for s in (None, 1, 2)}
    assert suggested == {None: 11, 1: 4, 2: 5}
    monkeypatch.setattr(callbacks, "gradient_flow", lambda *_, **__: flow)
    for stride, steps in suggested.items():
        rnn.truncation = Truncation(3, stride)
        epoch_of(AdaptiveTruncation((X, y), 0.092), model)
        assert rnn.truncation == Truncation(steps, stride)


def test_the_kind_of_blocks_is_remembered(given):
    """Where the window says it no more: it is full, or shorter than the stride."""
    rnn = BPTTRNN(H, truncation=Truncation(3, stride=2))
    window, found = AdaptiveTruncation((X, Y), slack=0), []
    for q in (1.0, 0.2, 0.04, 0.5):
        given(q, rnn)
        epoch_of(window, keras.Sequential())
        found.append(rnn.truncation)
    assert found == [None, Truncation(2), Truncation(1), Truncation(5, stride=2)]
    # But what somebody else sets counts as it is.
    rnn.truncation = 3
    epoch_of(window, keras.Sequential())
    assert rnn.truncation == Truncation(5)


@without_graphs()
def test_layers_have_windows_of_their_own():
    """Those of the flow without any: layers below see the losses through those above."""
    both = keras.layers.Bidirectional(decaying(0.5, 1, return_sequences=True))
    last = decaying(0.5, 1, "last", kernel_initializer="ones")
    model, options = model_of(both, last), {"loss_steps": 1}
    both.backward_layer.cell.recurrent_kernel.assign(0.1 * np.eye(H))
    window = AdaptiveTruncation((X, Y), 0.2, **options)
    logs = epoch_of(window, model)
    layers = [both.forward_layer, both.backward_layer, last]
    own = [layer.truncation for layer in layers]
    for layer in layers:
        layer.truncation = None
    flow = gradient_flow(model, X, Y, **options)
    suggested = [each.suggest_truncation(0.2, None) for each in flow.values()]
    assert len(set(suggested)) == 3
    assert list(flow) == ["forward_rnn", "backward_rnn", "last"]
    assert list(window.flow.layers.values()) == layers
    assert own == [k and Truncation(k) for k in suggested]
    assert list(logs.values()) == [k or T for k in suggested]
    assert list(logs) == [f"{name}_window" for name in flow]


# The train function.


class Counting(keras.Sequential):
    """Counts how often its step is traced."""

    traces = 0

    def train_step(self, data):
        self.traces += 1
        return super().train_step(data)


@without_graphs()
def gradient_by_window(weights, truncation):
    """dL/dU at these weights, of another model with this truncation."""
    rnn = decaying(0.5, truncation)
    model = model_of(rnn)
    model.set_weights(weights)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((Y - model(X, training=True)) ** 2)
    return tape.gradient(loss, rnn.cell.recurrent_kernel.value).numpy()


@pytest.mark.parametrize(
    "rebuilt",
    [True, pytest.param(False, marks=pytest.mark.slow)],
    ids=["rebuilt", "negative control"],
)
def test_a_changed_window_changes_the_next_step(rebuilt, given, monkeypatch):
    rnn = decaying(0.5, 1)
    model = model_of(rnn, lr=0.1, model_class=Counting)
    if not rebuilt:
        make = model.make_train_function
        monkeypatch.setattr(model, "make_train_function", lambda force=False: make())
    given(0.5, rnn)
    weights = []
    keep = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: weights.append(model.get_weights())
    )
    # One step an epoch: the window moves between the two.
    fit(model, AdaptiveTruncation((X, Y), every=9), keep, epochs=2)
    assert rnn.truncation == Truncation(5)
    old = gradient_by_window(weights[0], 1)
    new = gradient_by_window(weights[0], 5)
    scale = np.max(np.abs(new))
    assert np.max(np.abs(new - old)) > 0.1 * scale
    (step,) = (
        (before - after) / 0.1
        for before, after, v in zip(*weights, model.weights, strict=True)
        if v.name == "recurrent_kernel"
    )
    np.testing.assert_allclose(step, new if rebuilt else old, atol=1e-4 * scale)
    assert model.traces == 1 + rebuilt


def test_changed_windows_rebuild_the_train_function_once(given):
    """For all layers, and not again where they stay."""
    layers = [decaying(0.5, k, f"from_{k}", return_sequences=True) for k in (1, 2)]
    model, functions = model_of(*layers, model_class=Counting), []
    given(0.5, *layers)
    keep = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: functions.append(model.train_function)
    )
    y = random_inputs(B, T, 2)
    history = fit(model, AdaptiveTruncation((X, y)), keep, epochs=3, y=y)
    assert model.traces == 2
    assert functions[0] is not functions[1] is functions[2]
    for layer in layers:
        assert layer.truncation == Truncation(5)
        assert history[f"{layer.name}_window"] == [5, 5, 5]


@pytest.mark.parametrize("before, most, after", [(3, None, 3), (3, 9, 3), (None, 5, 5)])
def test_a_window_stays_where_the_gradient_beyond_it_explodes(before, most, after):
    """A longer one would take in more of the explosion. It is said, once a layer."""
    layer = BPTTRNN(2, truncation=before, return_sequences=True, name="rnn")
    model, y = model_of(layer), random_inputs(B, T, 2)
    # States near 0, where tanh is linear: each step multiplies by 1.9.
    kernel, _, bias = layer.get_weights()
    layer.set_weights([1e-6 * kernel, 1.9 * np.eye(2), 0 * bias])
    callback = AdaptiveTruncation((X, y), max_steps=most)
    words = "does not widen truncation=.* of rnn.*exploding"
    with pytest.warns(UserWarning, match=words) as said:
        history = fit(model, callback, epochs=2, y=y)
    assert len([w for w in said if "AdaptiveTruncation" in str(w.message)]) == 1
    assert layer.truncation == Truncation(after)
    assert history["rnn_window"] == [after, after]
    assert callback.flow["rnn"].verdict.startswith("exploding")


# Errors.


PAIR = r"a tuple of ndarray of shape \(4, 12, 2\), ndarray of shape \(3,"
BATCHES = [
    (X, "ndarray of shape"),
    (None, "NoneType"),
    ([X, Y], "list"),
    ((X,), "tuple"),
    ((X, Y, Y, Y), "tuple"),
    ((X, Y[:-1]), PAIR),
    ((X[:0], Y[:0]), "a tuple of ndarray of shape"),
    ((X.tolist(), Y.tolist()), "a tuple of float"),
    (tf.data.Dataset.from_tensors((X, Y)), "Dataset"),
]
COUNTS = dict.fromkeys(
    ["every", "examples", "loss_steps"], (0, -1, 1.5, True, None, "2")
)
OF_WINDOWS = {
    "tolerance": (0, 1, -0.1, True, None, "0.1", np.nan),
    "max_steps": (0, 2.5, True),
    "slack": (-0.1, np.inf, np.nan, None, True),
}


@BOTH
def test_arguments_out_of_their_range(callback):
    for batch, received in BATCHES:
        words = f"`validation_batch` must.*Received: .*{received}"
        with pytest.raises(ValueError, match=words):
            callback(batch)
    for name, values in COUNTS.items():
        for value in values:
            words = f"`{name}` must be a positive.*Received: {name}="
            with pytest.raises(ValueError, match=words):
                callback((X, Y), **{name: value})


@pytest.mark.parametrize("name", OF_WINDOWS)
def test_windows_that_cannot_be(name):
    for value in OF_WINDOWS[name]:
        with pytest.raises(ValueError, match=f"`{name}` must be.*Received: {name}="):
            AdaptiveTruncation((X, Y), **{name: value})


def begins(callback, model):
    callback.set_model(model)
    callback.on_train_begin()


@BOTH
@without_graphs()
def test_what_can_be_known_is_said_when_training_begins(callback):
    """Not after an epoch, of a model that is built."""
    for model, options, words in [
        (model_of(decaying(0.5)), {"layer": "rn"}, "layer='rn'. Did you mean 'rnn'"),
        (model_of(keras.layers.LSTM(2)), {}, "must call a BPTTRNN.*Measure a copy"),
        (stateful(B - 1), {}, f"rnn keeps.* {B - 1} ex.*: {B} ex.*examples={B - 1}"),
        (stateful(B), {"examples": 1}, f"keeps.* {B} examples.*Received: 1 examples"),
    ]:
        with pytest.raises(ValueError, match=words):
            begins(callback((X, Y), **options), model)
    with pytest.raises(ValueError, match="built for inputs with 2 features"):
        begins(callback((X[..., :1], Y)), model_of(decaying(0.5)))


def stateful(batch):
    """A model whose layer keeps the states of so many examples."""
    inputs, rnn = keras.Input(batch_shape=(batch, T, D)), decaying(0.5, stateful=True)
    model = keras.Sequential([inputs, rnn, keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    return model


@BOTH
@without_graphs()
def test_a_model_that_is_not_built_is_checked_after_the_first_epoch(callback):
    model = keras.Sequential([decaying(0.5), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    measuring = callback((X, Y), layer="rn")
    begins(measuring, model)
    assert measuring.flow is None
    model.build(X.shape)
    with pytest.raises(ValueError, match="Did you mean 'rnn'"):
        measuring.on_epoch_end(0, {})


class Subclassed(keras.Model):
    """What Keras takes for built when it has been called."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = decaying(0.5, stateful=True), keras.layers.Dense(2)

    def call(self, x):
        return self.head(self.rnn(x))


@without_graphs()
def test_stateful_layers_of_any_model_say_how_many_examples_they_take():
    model = Subclassed()
    model.compile("sgd", "mse")
    logger = GradientFlowLogger((X, Y), examples=1)
    begins(logger, model)
    model(X)
    with pytest.raises(ValueError, match=f"rnn keeps.*Received: 1.*examples={B}"):
        logger.on_epoch_end(0, {})


@BOTH
@without_graphs()
def test_the_first_flow_is_there_when_training_begins(callback):
    """It is logged for no epoch, and leaves windows as they are."""
    rnn = decaying(0.5, 2)
    model, measuring = model_of(rnn), callback((X, Y))
    begins(measuring, model)
    first = measuring.flow
    assert first["rnn"].truncation == rnn.truncation == Truncation(2)
    rnn.cell.recurrent_kernel.assign(0.25 * np.eye(H))
    epoch_of(measuring, model, begin=False)
    assert first["rnn"].factor == pytest.approx(0.5, rel=1e-5)
    assert measuring.flow["rnn"].factor == pytest.approx(0.25, rel=1e-5)


@without_graphs()
def test_a_randomized_truncation_has_no_window():
    random = decaying(0.5, RandomizedTruncation(3), "random", return_sequences=True)
    rnn = decaying(0.5, 1)
    model = model_of(random, rnn)
    with pytest.raises(ValueError, match="no window.*Received: layer random, with Ra"):
        begins(AdaptiveTruncation((X, Y)), model)
    assert rnn.truncation == Truncation(1), "all or none"
    assert epoch_of(AdaptiveTruncation((X, Y), layer="rnn"), model) == {"rnn_window": 5}
    assert random.truncation == RandomizedTruncation(3)


@BOTH
@without_graphs()
def test_nests_and_whole_batches(callback):
    """Inputs and targets by name, and a layer that keeps its state, for all examples."""
    x = keras.Input(batch_shape=(B, T, D), name="x")
    h = decaying(0.5, stateful=True)(x)
    y = keras.layers.Dense(2, name="y")(h)
    model = keras.Model({"x": x}, {"y": y})
    model.compile("sgd", {"y": "mse"})
    batch = {"x": X}, {"y": tf.constant(Y)}
    logs = epoch_of(callback(batch, examples=B), model)
    assert all(key.startswith("rnn_") for key in logs)
