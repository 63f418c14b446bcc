"""The figures of a gradient flow: what each panel shows, and that none is empty."""

import dataclasses
import sys

import keras
import numpy as np
import pytest
from helpers import rng, without_graphs
from test_layer_flow import FLOWS, T, decay, flow_of

from keras_bptt import (
    BPTT,
    BPTTGRU,
    BPTTLSTM,
    BPTTRNN,
    GradientFlow,
    Truncation,
    gradient_flow,
)
from keras_bptt.flow.layer_flow import Gate

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def gates(steps):
    """Of an LSTM: a forget gate that holds its units for 2, 10 and 100 steps."""
    of_unit, flat = np.array([0.5, 0.9, 0.99]), np.full(steps, 0.25)
    return {
        "input gate": Gate(mean=flat, of_unit=of_unit),
        "forget gate": Gate(3 * flat, of_unit, saturated=flat, holds=True),
    }


def of_any_layer(shares=None, **given):
    """The same gradient through a plain RNN, an LSTM and a cell of one's own."""
    shares = decay(0.8) if shares is None else shares
    norms = given.setdefault("adjoint_norms", 1 + rng().random((5, T)))
    plain = flow_of(shares, **{"delta_norms": norms / 2} | given)
    spectrum = dict.fromkeys(["singular_values", "spectral_radius", "max_slope"])
    states = {"h": norms / 2, "c": norms / 4}
    own = dataclasses.replace(plain, delta_norms=None, **spectrum)
    lstm = dataclasses.replace(
        own, state_adjoint_norms=states, gates=gates(norms.shape[1])
    )
    return {"plain": plain, "lstm": lstm, "own": own}


def drawn(flows):
    figure = GradientFlow(flows).plot()
    figure.canvas.draw()
    assert len(figure.axes) == 3 * len(flows)
    return np.reshape(figure.axes, (len(flows), 3))


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def curves(axes):
    return {line.get_label(): np.array(line.get_ydata()) for line in axes.lines}


def words(axes):
    return [text.get_text() for text in axes.texts]


# --- the panels


def test_a_figure_has_its_curves():
    """Of layers whose reports differ, one below the other."""
    names = ("vanishing", "broken", "not finite", "none", "masked")
    axes = drawn({name: FLOWS[name] for name in names})
    for ax in axes.flat:
        assert ax.get_xlabel() and ax.get_ylabel() and ax.get_legend()
    for name, (over_time, *_) in zip(names, axes, strict=True):
        assert over_time.get_title("left").startswith(f"{name}: ")
    assert axes[1, 0].get_title("left") == "broken: not finite"
    assert "window" not in axes[1, 1].get_title("left")
    flow, (over_time, by_lag, values) = FLOWS["vanishing"], axes[0]
    assert over_time.get_yscale() == by_lag.get_yscale() == "log"
    median = np.median(flow.adjoint_norms, axis=0)
    np.testing.assert_allclose(over_time.lines[0].get_ydata(), median)
    np.testing.assert_allclose(by_lag.lines[0].get_ydata(), flow.untruncated_lag_shares)
    assert by_lag.lines[-1].get_xdata()[0] + 1 == flow.suggest_truncation()
    np.testing.assert_allclose(values.lines[0].get_ydata(), flow.singular_values)
    assert "number of the singular value" in values.get_xlabel()


def test_the_curve_lies_in_its_band():
    """A mean would not: here one example has nearly all of the gradient."""
    norms = np.full((20, T), 1.0)
    norms[0] = 1e9
    flow = flow_of(decay(0.9), adjoint_norms=norms)
    (over_time, *_) = drawn({"rnn": flow})[0]
    assert legend(over_time)[:2] == [
        "|dL/dh_t|, median",
        "10 % to 90 % of the examples",
    ]
    np.testing.assert_array_equal(over_time.lines[0].get_ydata(), 1)
    (band,) = over_time.collections
    y = band.get_paths()[0].vertices[:, 1]
    assert y.min() == y.max() == 1


def test_each_kind_of_layer_has_a_panel_of_its_own():
    flows = of_any_layer()
    plain, lstm, own = drawn(flows)
    median = np.median(flows["lstm"].adjoint_norms, axis=0)
    joint, h, c = curves(lstm[0]).values()
    np.testing.assert_allclose([h, c], [joint / 2, joint / 4])
    np.testing.assert_allclose(joint, median)
    names = ["|dL/ds_t|, median", "|dL/dh_t|, median", "|dL/dc_t|, median"]
    assert list(curves(lstm[0])) == names
    assert list(curves(plain[0])) == ["|dL/dh_t|, median", "|dL/dz_t|, median"]
    assert list(curves(own[0])) == ["|dL/dh_t|, median"]
    entry, forget = curves(lstm[2]).items()
    assert entry[0] == "input gate" and forget[0] == "forget gate, saturated 25 %"
    np.testing.assert_array_equal(entry[1], 0.25)
    np.testing.assert_array_equal(forget[1], 0.75)
    title = lstm[2].get_title("left").replace("\n", " ")
    assert title == "forget gate: holds a unit for 10 steps (median; at most 100)"
    np.testing.assert_allclose(curves(own[2])["untruncated, unclipped"], 0.8)
    assert own[2].get_title("left") == "a step multiplied by 0.8 at most"


@pytest.mark.parametrize("layer", ["RNN", "LSTM", "GRU", "own"])
@without_graphs()
def test_the_figure_of_a_layer(layer, tmp_path):
    """Measured, with a window, which leaves no gradient at the first steps."""
    options = {"truncation": Truncation(3), "name": "layer", "jit_compile": False}
    layer = {
        "RNN": lambda: BPTTRNN(4, **options),
        "LSTM": lambda: BPTTLSTM(4, **options),
        "GRU": lambda: BPTTGRU(4, **options),
        "own": lambda: BPTT(keras.layers.GRUCell(4), **options),
    }[layer]()
    model = keras.Sequential([keras.Input((8, 2)), layer])
    x, y = rng().normal(size=(5, 8, 2)), rng(1).normal(size=(5, 4))
    flow = gradient_flow(model, x, y, loss="mse")
    figure = flow.plot(tmp_path / "flow.png")
    assert (tmp_path / "flow.png").stat().st_size > 1000
    for ax in figure.axes:
        assert any(np.isfinite(y).any() for y in curves(ax).values())
        assert not words(ax)
    low, high = figure.axes[0].get_xlim()
    assert low < 1 and high > 8, "all steps, not those of the window alone"
    for ours, theirs in zip(flow["layer"].plot().axes, figure.axes, strict=True):
        assert legend(ours) == legend(theirs)


# --- sizes


def test_titles_do_not_run_into_each_other():
    name = "a_layer_with_a_long_name_of_its_own_within_a_model_within_a_model_"
    flows = of_any_layer(1.2 ** np.arange(T), state_growth=200.0)
    figure = GradientFlow({name + key: flow for key, flow in flows.items()}).plot()
    figure.canvas.draw()
    texts = [text for ax in figure.axes for text in ax.findobj(matplotlib.text.Text)]
    titles = {ax.get_title("left") for ax in figure.axes} - {""}
    boxes = [t.get_window_extent() for t in texts if t.get_text() in titles]
    assert len(boxes) == len(figure.axes)
    width, height = figure.canvas.get_width_height()
    for i, box in enumerate(boxes):
        assert box.x1 < width and box.y1 < height
        assert not any(box.overlaps(other) for other in boxes[:i])
    assert name in figure.axes[0].get_title("left").replace("\n", "")


def test_long_sequences_have_few_points():
    """Medians of neighbours: a single step is not seen, the course is."""
    steps, q = 20_000, 0.9995
    norms = np.tile(q ** np.arange(steps)[::-1], (3, 1))
    norms[:, 777] = 1e9
    flows = of_any_layer(q ** np.arange(steps), adjoint_norms=norms)
    for row in drawn(flows):
        for ax in row:
            for y in curves(ax).values():
                assert len(y) <= 1000
    assert row[1].get_title("left") == "a step multiplies by 0.9995"
    joint = curves(drawn(flows)[0, 0])["|dL/dh_t|, median"]
    assert len(joint) == 1000 and np.all(np.diff(joint) > 0)
    np.testing.assert_allclose(joint[0], norms[0, 0], rtol=0.01)


def test_one_step_is_a_point():
    flows = of_any_layer([1.0], adjoint_norms=np.arange(1.0, 6)[:, None])
    rows = drawn(flows)
    for over_time, by_lag, _ in rows:
        for line in [over_time.lines[0], by_lag.lines[0]]:
            assert line.get_marker() == "o" and line.get_markevery() == [0]
        low, high = over_time.get_xlim()
        assert [tick for tick in over_time.get_xticks() if low < tick < high] == [1]
    assert all(line.get_marker() == "o" for line in rows[1, 2].lines)
    assert words(rows[2, 2]) == ["one step: none before it"]


# --- nothing, and what is not finite


def spans(axes):
    """The shaded ranges of x."""
    return [(span.get_x(), span.get_x() + span.get_width()) for span in axes.patches]


def test_what_is_not_finite_is_marked():
    norms = 1 + rng().random((5, T))
    norms[2, 10:13], norms[:, 30], norms[:, :4] = np.inf, np.inf, np.nan
    shares = np.where(np.arange(T) < 20, 2.0 ** np.arange(T), np.inf)
    flows = of_any_layer(shares, adjoint_norms=norms)
    for row, name in zip(drawn(flows), flows, strict=True):
        assert spans(row[0]) == [(10.5, 13.5), (30.5, 31.5)], "masked steps are not"
        assert legend(row[0]).count("not finite in an example") == 1
        assert spans(row[1]) == [(19.5, T - 0.5)]
        assert "not finite" in legend(row[1])
        title = "a step multiplies by 2; not finite at lag 20"
        assert row[1].get_title("left").replace("\n", " ") == title
        if name == "own":
            assert spans(row[2]) == [(19.5, T - 0.5)]
    assert "2 at most, where it" in row[2].get_title("left")


@pytest.mark.parametrize(
    "norms, shares, over_time, by_lag",
    [
        (0.0, [], "the gradient is 0 at every step", "no gradient arrives"),
        (np.nan, [], "every step is masked", "no gradient arrives"),
        (np.inf, [np.inf] * T, "not finite at any step", "no gradient arrives"),
    ],
)
def test_where_there_is_nothing_to_draw_it_is_said(norms, shares, over_time, by_lag):
    norms = np.full((5, T), norms)
    flows = of_any_layer(shares, adjoint_norms=norms, delta_norms=norms)
    for row in drawn(flows):
        assert words(row[0]) == [over_time]
        assert words(row[1]) == [by_lag]
    assert words(row[2]) == ["no step is reached"]
    broken = drawn({"rnn": FLOWS["broken weights"]})[0]
    assert words(broken[2]) == ["U is not finite"]


# --- Axes of one's own, and two flows


def test_a_layer_is_drawn_into_axes(tmp_path):
    flow = of_any_layer()["lstm"]
    figure, ax = plt.subplots()
    assert flow.plot(tmp_path / "flow.pdf", ax=ax) is figure
    assert (tmp_path / "flow.pdf").exists()
    assert plt.get_fignums() == [figure.number]
    assert curves(ax).keys() == curves(flow.plot().axes[0]).keys()
    assert ax.get_title("left") == "rnn: vanishing"


def test_two_flows_are_compared(tmp_path):
    """The layers that both have, each by its own steps."""
    before = GradientFlow({"a": flow_of(decay(0.8)), "b": flow_of(decay(0.9))})
    after = flow_of(decay(0.99, 10), adjoint_norms=np.ones((2, 10)))
    after = GradientFlow({"b": after, "c": after})
    figure = before.compare(after, tmp_path / "two.png", labels=("LSTM", "GRU"))
    figure.canvas.draw()
    assert (tmp_path / "two.png").exists()
    over_time, by_lag = figure.axes
    assert over_time.get_title("left") == "b\nLSTM: healthy, GRU: healthy"
    lines = curves(over_time)
    assert list(lines) == ["LSTM: |dL/dh_t|, median", "GRU: |dL/dh_t|, median"]
    first, second = lines.values()
    np.testing.assert_allclose(first, np.median(before["b"].adjoint_norms, axis=0))
    np.testing.assert_array_equal(second, np.ones(10))
    assert legend(by_lag) == ["LSTM", "GRU"]
    np.testing.assert_allclose(curves(by_lag)["GRU"], decay(0.99, 10))
    _, ax = plt.subplots()
    assert before.compare(after, ax=ax) is ax.figure
    assert legend(ax)[0] == "before: |dL/dh_t|, median"


def test_what_cannot_be_compared():
    flow = flow_of(decay(0.8))
    one, other = GradientFlow({"a": flow, "b": flow}), GradientFlow({"c": flow})
    with pytest.raises(ValueError, match="no layer is in both.*through a, b and .* c"):
        one.compare(other)
    with pytest.raises(ValueError, match="`other` must be.*Received: LayerFlow"):
        one.compare(flow)
    with pytest.raises(ValueError, match="`labels` must be two.*Received: labels=..a"):
        one.compare(one, labels=["a"])
    with pytest.raises(ValueError, match="`ax` shows one layer. Received: .*a, b"):
        one.compare(one, ax=plt.subplots()[1])


def test_without_matplotlib_a_figure_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    flow = FLOWS["vanishing"]
    for draw in (GradientFlow({"rnn": flow}).plot, flow.plot):
        words = r"pip install 'keras_bptt\[plot\]'.*summary"
        with pytest.raises(ImportError, match=words):
            draw()
