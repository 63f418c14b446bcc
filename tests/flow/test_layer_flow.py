"""What follows from the numbers of a layer: windows, verdicts and reports."""

import dataclasses
import json
import math

import keras
import numpy as np
import pytest
from helpers import rng, without_graphs

from keras_bptt import (
    BPTTRNN,
    GradientFlow,
    LayerFlow,
    RandomizedTruncation,
    Truncation,
    gradient_flow,
)
from keras_bptt.flow.layer_flow import Gate

T, UNITS = 40, 6


def flow_of(shares, **given):
    """A LayerFlow whose gradient has these shares by lag, of losses at all steps."""
    shares = np.asarray(shares, float)
    norms = 1 + rng().random((5, T))
    fields = {
        "name": "rnn",
        "layer": "BPTTRNN",
        "units": UNITS,
        "activation": "tanh",
        "truncation": None,
        "adjoint_clipnorm": None,
        "adjoint_max_growth": None,
        "adjoint_norms": norms,
        "state_adjoint_norms": {"h": norms},
        "delta_norms": norms / 2,
        "lag_shares": shares,
        "state_lag_shares": {"h": shares},
        "untruncated_lag_shares": shares,
        "last_step_only": False,
        "singular_values": np.linspace(1.2, 0.1, UNITS),
        "spectral_radius": 1.0,
        "max_slope": 1.0,
    }
    return LayerFlow(**fields | given)


def decay(q, lags=T):
    return q ** np.arange(lags)


# --- windows


@pytest.mark.parametrize("q", [0.2, 0.6, 0.8])
def test_a_geometric_decay_has_windows_in_closed_form(q):
    """Of all that a loss sends back, and on beyond the sequence, q^k lies at lag k on."""
    flow = flow_of(decay(q))
    for k in (1, 4, 17):
        np.testing.assert_allclose(flow.truncation_bias(k, 1), q**k, atol=1e-15)
        chunk = np.mean(q ** np.arange(1, k + 1))
        np.testing.assert_allclose(flow.truncation_bias(k), chunk)
        np.testing.assert_allclose(flow.truncation_bias(k, k), chunk)
    overlapping = np.mean(q ** np.arange(3, 6))
    np.testing.assert_allclose(flow.truncation_bias(5, 3), overlapping)
    for tolerance in (0.3, 0.05, 0.001):
        k = math.ceil(math.log(tolerance) / math.log(q))
        assert flow.suggest_truncation(tolerance) == (k if k < T else None)
        k = flow.suggest_truncation(tolerance, stride=None)
        if k is None:
            assert flow.truncation_bias(T - 1) > tolerance
        else:
            assert flow.truncation_bias(k) <= tolerance
            assert k == 1 or flow.truncation_bias(k - 1) > tolerance
    # A window that holds the sequence has no bias.
    assert flow.truncation_bias(T) == flow.truncation_bias(T + 5, 2) == 0


def test_a_loss_at_the_last_step_ends_its_chunk():
    flow = flow_of(decay(0.6), last_step_only=True)
    np.testing.assert_allclose(flow.truncation_bias(7), 0.6**7)
    assert (
        flow.suggest_truncation(0.1, stride=None) == flow.suggest_truncation(0.1) == 5
    )


def test_a_gradient_that_does_not_decay_has_no_window():
    infinite = np.r_[1, np.full(T - 1, np.inf)]
    for shares in (np.ones(T), 1.1 ** np.arange(T), infinite):
        flow = flow_of(shares)
        assert flow.suggest_truncation(0.9) is None
        assert flow.truncation_bias(T - 1) == 1


def test_what_is_beyond_the_sequence_counts():
    """It decays slowly at the end: much of it lies where the sequence has no steps."""
    shares = np.r_[decay(0.2, 10), 0.05 * decay(0.99, T - 10)]
    assert flow_of(shares).suggest_truncation(0.5) is None
    shares[T // 2 :] = 0  # nothing comes through to the first steps, nor to any before
    assert flow_of(shares).suggest_truncation(0.5) == 1


def test_a_tolerance_is_between_0_and_1_and_a_stride_a_positive_integer():
    flow = flow_of(decay(0.5))
    for tolerance in (0, 1, -1, math.nan, "5 %", None, True):
        words = r"`tolerance` must .* Received: tolerance=.*0.05"
        with pytest.raises(ValueError, match=words):
            flow.suggest_truncation(tolerance)
    for stride in (0, -1, 1.5, "all"):
        with pytest.raises(ValueError, match=r"`stride` must be a positive integer"):
            flow.suggest_truncation(0.1, stride)


def test_the_suggestion_grows_beyond_a_window_that_is_too_short():
    """It rests on the shares without the layer's own window, which hides the rest."""
    short = np.where(np.arange(T) < 2, decay(0.8), 0)
    flow = flow_of(decay(0.8), lag_shares=short, truncation=Truncation(2))
    assert flow.suggest_truncation(0.05) == 14  # 0.8^14 = 0.044


# --- verdicts


def test_the_verdict_is_of_a_hundredfold_either_way():
    assert flow_of(decay(0.9)).verdict == "healthy"  # 0.9^39 = 0.016
    assert flow_of(decay(0.88)).verdict == "vanishing"  # 0.88^39 = 0.007
    assert flow_of(decay(1.12)).verdict == "healthy"  # 1.12^39 = 83
    assert flow_of(decay(1.13)).verdict == "exploding"  # 1.13^39 = 118
    # In between, and not finite.
    peak = np.r_[decay(2.0, 10), 2.0**9 * decay(0.4, T - 10)]
    assert flow_of(peak).verdict == "exploding"
    assert flow_of(np.r_[1, 2, np.full(T - 2, np.nan)]).verdict == "exploding"


def test_the_numbers_are_in_the_words():
    flow = flow_of(decay(0.8))
    assert flow.explanation == (
        "vanishing: dL/dh_t halves every 3.11 steps (x 0.8 a step); 1 % of it is left "
        "after 21 of 39 steps"
    )
    flow = flow_of(decay(2.0))
    assert flow.explanation == (
        "exploding: dL/dh_t doubles every 1 steps (x 2 a step); 100 times as large 7 of "
        "39 steps back"
    )
    assert flow_of(decay(1.0)).explanation == (
        "healthy: 100 % of dL/dh_t is left after 39 steps; dL/dh_t keeps its norm"
    )


def test_a_window_is_judged_by_what_it_leaves_out():
    shares = decay(0.8)
    short = flow_of(shares, truncation=Truncation(4, stride=1))
    assert short.verdict == "truncated"
    assert short.explanation.startswith(
        "truncated at 4 of 40 steps, beyond which lies an estimated 41 % of the gradient."
    )
    assert "Truncation(steps=14, stride=1)" in short.advice[0]
    enough = flow_of(shares, truncation=Truncation(20, stride=1))
    assert "long enough: 14 steps" in enough.advice[0]
    chunks = flow_of(shares, truncation=Truncation(4))
    assert "Truncation(steps=14, stride=1)" in chunks.advice[0]
    endless = flow_of(np.ones(T), truncation=Truncation(4))
    assert "truncation=None" in endless.advice[0]
    # A window as long as the sequence is none, nor is a random cut.
    assert flow_of(shares, truncation=Truncation(T)).verdict == "vanishing"
    assert flow_of(shares, truncation=RandomizedTruncation(5)).verdict == "vanishing"


def test_advice_names_the_cause():
    vanishing = decay(0.5)
    sigmoid = flow_of(vanishing, activation="sigmoid", max_slope=0.25)
    assert "here at most 0.25" in sigmoid.advice[0]
    small = flow_of(vanishing, singular_values=np.linspace(0.5, 0.1, UNITS))
    assert "orthogonal" in small.advice[0] and "= 0.5 is below 1" in small.advice[0]
    saturated = flow_of(vanishing, saturated=np.full(T, 0.6))
    assert any("60 % of the units are saturated" in item for item in saturated.advice)
    dead = flow_of(vanishing, inactive=np.full(T, 0.8), dead=0.5)
    assert any("50 % of the units are 0" in item for item in dead.advice)
    exploding = flow_of(decay(1.5))
    most = exploding.untruncated_lag_shares.max()
    assert (
        f"adjoint_max_growth=1: |dL/dh_t| grows to {most:.2g} times"
        in (exploding.advice[0])
    )
    assert "orthogonal" in exploding.advice[1] and "1.2" in exploding.advice[1]
    clipped = flow_of(decay(1.5), adjoint_clipnorm=1.0)
    assert not any("adjoint_max_growth" in item for item in clipped.advice)
    short = flow_of(decay(1.5), truncation=Truncation(5))
    assert short.verdict == "truncated"
    assert "keep the window of 5 steps" in short.advice[0]
    assert "orthogonal" in short.advice[1] and "max_growth" in short.advice[2]
    assert not any("truncation=None" in item for item in short.advice)
    assert not flow_of(decay(0.95)).advice  # healthy
    relu = {"activation": "relu", "state_norms": np.full((5, T), 1e9)}
    states = flow_of(decay(1.5), **relu, state_growth=1e5)
    assert "recurrent_initializer='identity'" in states.advice[0]
    small = flow_of(vanishing, spectral_radius=0.5, **relu)
    assert "recurrent_initializer='identity'" in small.advice[0]


def test_advice_for_gates_is_a_memory():
    """Where they hold a state for less than half of the steps."""

    def of(memory, gate="forget gate", **given):
        gates = {
            "reset gate": Gate(np.full(T, 0.5), np.full(UNITS, 0.5)),
            gate: Gate(np.full(T, 0.7), np.full(UNITS, 1 - 1 / memory), holds=True),
        }
        fields = {"gates": gates, "layer": "BPTTLSTM"}
        fields |= dict.fromkeys(("singular_values", "spectral_radius", "max_slope"))
        return flow_of(decay(0.5), **fields | given)

    (item,) = of(4).advice
    assert "unit_forget_bias=False, bias_initializer=LSTMMemoryBias(40)" in item
    assert "forget gate holds a state for 4 of 40 steps" in item
    (item,) = of(2, "update gate").advice
    assert "bias_initializer=GRUMemoryBias(40)" in item and "unit_forget" not in item
    assert not of(30).advice
    # Of a plain RNN whose U is not the cause.
    lstm, relu = flow_of(decay(0.5)).advice
    assert "LSTMMemoryBias(40)" in lstm and "GRUMemoryBias(40)" in lstm
    assert "activation='relu' with recurrent_initializer='identity'" in relu


# --- units that let nothing through


@pytest.mark.parametrize(
    "name", ["tanh", pytest.param("sigmoid", marks=pytest.mark.slow), "relu"]
)
@without_graphs()
def test_saturated_and_dead_units_are_counted(name):
    """With biases so large that some units are out of reach, whatever comes in."""
    steps = 12
    layer = BPTTRNN(UNITS, name, return_sequences=True, name="rnn")
    masking = keras.layers.Masking()
    model = keras.Sequential([keras.Input((steps, 3)), masking, layer])
    x = rng().normal(size=(4, steps, 3)).astype("float32")
    x[0, -5:], x[:, 7] = 0, 0
    W, U, b = layer.cell.get_weights()
    b[:2] = -50
    layer.cell.set_weights([0.1 * W, 0 * U, b])
    y = np.ones((4, steps, UNITS))
    flow = gradient_flow(model, x, y, loss="mse", loss_steps=1)["rnn"]
    real = np.any(x != 0, axis=2)
    if name == "relu":
        off = np.where(real, np.mean(model(x).numpy() <= 0, axis=2), 0)
        with np.errstate(invalid="ignore"):
            expected = off.sum(0) / real.sum(0)
        np.testing.assert_allclose(flow.inactive, expected)
        assert flow.dead == pytest.approx(2 / UNITS)
        assert np.nanmin(flow.inactive) > 2 / UNITS
    else:
        expected = np.where(real.any(0), 2 / UNITS, np.nan)
        np.testing.assert_allclose(flow.saturated, expected)
        assert flow.dead is None
    text = "dead 33 %" if name == "relu" else "saturated units 33 %"
    assert text in flow.summary().replace("\n ", "")


@without_graphs()
def test_the_largest_slope_of_any_activation():
    def of(activation):
        layer = BPTTRNN(UNITS, activation, name="rnn")
        model = keras.Sequential([keras.Input((3, 2)), layer])
        return gradient_flow(model, np.ones((1, 3, 2)), np.ones((1, UNITS)), loss="mse")

    assert of("exponential")["rnn"].bound == math.inf
    mixing = of("softmax")["rnn"]
    assert mixing.saturated is mixing.inactive is mixing.dead is None
    assert mixing.max_slope is mixing.bound is None
    assert "mixes units" in mixing.summary()
    swish = of("swish")["rnn"].max_slope
    z = np.linspace(0, 5, 10**5)
    s = 1 / (1 + np.exp(-z))
    np.testing.assert_allclose(swish, np.max(s + z * s * (1 - s)), rtol=1e-4)


# --- reports


FLOWS = {
    "vanishing": flow_of(decay(0.5), saturated=np.full(T, 0.4)),
    "exploding": flow_of(decay(1.9), activation="relu", inactive=np.ones(T), dead=0.9),
    "not finite": flow_of(
        np.r_[1, np.full(T - 1, np.inf)], adjoint_norms=np.full((5, T), np.inf)
    ),
    "truncated": flow_of(decay(0.9), truncation=Truncation(5, 3), adjoint_clipnorm=0.5),
    "none": flow_of([], adjoint_norms=np.zeros((5, T)), delta_norms=np.zeros((5, T))),
    "one step": flow_of(
        [1.0], adjoint_norms=np.ones((5, 1)), delta_norms=np.ones((5, 1))
    ),
    "broken": flow_of(decay(0.5), not_finite=("the loss",)),
    "masked": flow_of(decay(0.9), adjoint_norms=np.full((5, T), np.nan)),
    "broken weights": flow_of(
        decay(0.9), singular_values=np.full(UNITS, np.nan), spectral_radius=math.nan
    ),
}


@pytest.mark.parametrize("name", FLOWS)
def test_a_report_fits_a_terminal_and_is_plain_json(name):
    flow = dataclasses.replace(FLOWS[name], name="a_layer_with_a_long_name_of_its_own")
    text = GradientFlow({"rnn": flow}).summary()
    assert max(map(len, text.splitlines())) <= 78
    assert text.splitlines()[0].startswith("a_layer_with")
    assert flow.verdict == "none" or f" {flow.verdict}" in text
    assert repr(flow) == flow.summary()
    read = json.loads(json.dumps(flow.to_dict(), allow_nan=False))
    assert read["verdict"] == flow.verdict and read["name"] == flow.name
    assert np.shape(read["adjoint_norms"]) == flow.adjoint_norms.shape
    if name == "truncated":
        assert read["truncation"] == {"steps": 5, "stride": 3}
        np.testing.assert_allclose(read["lag_shares"], flow.lag_shares)
        assert read["suggested_truncation"] == flow.suggest_truncation()


def test_the_sparkline_is_logarithmic_and_steady_where_nothing_happens():
    line = flow_of(decay(0.5)).summary().splitlines()
    bars = next(row for row in line if "by lag" in row)
    assert "█▇▆▅▄▃▂▁" in "".join(dict.fromkeys(bars))
    line = flow_of(np.ones(T)).summary().splitlines()
    bars = next(row for row in line if "by lag" in row)
    assert len({c for c in bars if c in "▁▂▃▄▅▆▇█"}) == 1


def masked_report(real):
    """The report of norms 1, 2, ... at the real steps, and its row over t."""
    norms = np.where(real, np.arange(1.0, T + 1), np.nan) + np.zeros((5, 1))
    text = flow_of(decay(0.9), adjoint_norms=norms, saturated=norms[0]).summary()
    assert "nan" not in text
    return next(row for row in text.splitlines() if "|dL/dh_t|" in row)


def test_the_ends_of_a_report_are_real_steps():
    steps = np.arange(T)
    assert "  1 ... 40, t = 1 ... 40" in masked_report(steps >= 0)
    assert "  1 ... 33, t = 1 ... 33" in masked_report(steps < 33)
    assert "  8 ... 40, t = 8 ... 40" in masked_report(steps >= 7)
    assert "  3 ... 3, t = 3 ... 3" in masked_report(steps == 2)
    assert masked_report(steps < 0).endswith("nothing")


def test_holes_of_a_mask_do_not_hide_the_steps_between():
    """Of 40 steps some are drawn in pairs: what is known of a pair is drawn."""
    row = masked_report(np.arange(T) % 2 == 0)
    bars = [c for c in row if c in "▁▂▃▄▅▆▇█"]
    assert len(bars) == 20, "each real step; the holes alone are blank"
    assert bars == sorted(bars)


def test_mean_and_quantiles_leave_masked_steps_out():
    norms = np.array([[1.0, np.nan, np.nan], [3.0, 4.0, np.nan]])
    flow = flow_of(decay(0.5, 3), adjoint_norms=norms, delta_norms=norms)
    np.testing.assert_array_equal(flow.mean_adjoint, [2, 4, np.nan])
    np.testing.assert_array_equal(flow.mean_delta, [2, 4, np.nan])
    np.testing.assert_array_equal(flow.adjoint_quantiles([0.5]), [[2, 4, np.nan]])
