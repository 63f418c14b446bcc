"""gradient_flow of layers with gates and of any cell: closed forms and the reference."""

import json

import keras
import numpy as np
import pytest
from helpers import few, rng, without_graphs
from some_cells import CELLS, Cell, H, cell

from keras_bptt import (
    BPTT,
    BPTTGRU,
    BPTTLSTM,
    BPTTRNN,
    Truncation,
    convert,
    gradient_flow,
    reference,
)

B, T, D, UNITS = 3, 9, 4, 6
MSE = keras.losses.MeanSquaredError(dtype="float64")


def data(*outputs, features=D, seed=1):
    random = rng(seed)
    return random.normal(size=(B, T, features)), random.normal(size=(B, *outputs))


def model_of(*layers, features=D):
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((T, features), dtype="float64"), *layers])


def flow_of(model, x, y, **options):
    (flow,) = gradient_flow(model, x, y, **{"loss": MSE} | options).values()
    return flow


def cotangents(model, x, y):
    """Of the mean squared error, by the outputs."""
    o = model(x).numpy()
    return 2 * (o - y) / o.size


def norms(a):
    return np.linalg.norm(a, axis=-1)


# --- closed forms


@cell(H, 2, W=(D, H), A=(H, H), M=(2, H), N=(H, 2), Q=(2, 2))
def two_linear_states(self, x, h, m):
    """(h, m) times one matrix; the inputs reach h alone."""
    after = x @ self.W + h @ self.A + m @ self.M
    return after, after, h @ self.N + m @ self.Q


@pytest.mark.parametrize("sequence", [False, True])
@without_graphs()
def test_two_linear_states_have_the_closed_form_of_powers(sequence):
    layer = BPTT(
        two_linear_states(dtype="float64"), return_sequences=sequence, dtype="float64"
    )
    model = model_of(layer)
    W, A, M, N, Q = (
        rng(i).normal(size=w.shape) * 0.5 for i, w in enumerate(layer.cell.weights)
    )
    layer.cell.set_weights([W, A, M, N, Q])
    x, y = data(*([T] if sequence else []), H)
    e = cotangents(model, x, y)
    flow = flow_of(model, x, y, loss_steps=T)
    step = np.block([[A, N], [M, Q]])
    assert list(flow.state_adjoint_norms) == ["s1", "s2"]
    if not sequence:
        e = np.where(np.arange(T)[:, None] == T - 1, e[:, None], 0)
    e = np.concatenate([e, np.zeros((B, T, 2))], axis=2)
    a = [e[:, -1]]
    for t in range(T - 2, -1, -1):
        a.insert(0, e[:, t] + a[0] @ step.T)
    a = np.stack(a, axis=1)
    np.testing.assert_allclose(flow.adjoint_norms, norms(a), rtol=1e-12)
    for name, part in {"s1": a[..., :H], "s2": a[..., H:]}.items():
        np.testing.assert_allclose(
            flow.state_adjoint_norms[name], norms(part), rtol=1e-12, atol=1e-300
        )
    for k in range(T):
        later = e[:, k:] if sequence else e[:, -1:]
        back = later @ np.linalg.matrix_power(step.T, k)
        sent = norms(later).sum()
        np.testing.assert_allclose(flow.lag_shares[k], norms(back).sum() / sent)
        of_second = norms(back[..., H:]).sum() / sent
        np.testing.assert_allclose(flow.state_lag_shares["s2"][k], of_second)
    ratios = flow.lag_shares[1:] / flow.lag_shares[:-1]
    np.testing.assert_allclose(flow.largest_step, ratios.max())
    assert flow.last_step_only is not sequence


@cell(H, W=(D, H))
def shows_a_multiple(self, x, h):
    """The output is no state; the state halves."""
    after = 0.5 * h + x @ self.W
    return 1000 * after, after


@without_graphs()
def test_an_output_that_is_no_state_has_a_unit_of_its_own():
    """Its loss is 1000 times as large for the states. That is no gradient that explodes."""
    layer = BPTT(
        shows_a_multiple(dtype="float64"), return_sequences=True, dtype="float64"
    )
    model = model_of(layer)
    flow = flow_of(model, *data(T, H), loss_steps=T)
    np.testing.assert_allclose(flow.lag_shares, [1, *0.5 ** np.arange(T - 1.0)])
    assert flow.verdict == "vanishing" and flow.largest_step == pytest.approx(1)


@without_graphs()
def test_forget_gates_alone_hold_what_they_say():
    """No way through h: c_t is multiplied by f, whose bias says for how long."""
    layer = BPTTLSTM(UNITS, dtype="float64", return_state=True)
    inputs = keras.Input((T, D), dtype="float64")
    _, _, c = layer(inputs)
    model = keras.Model(inputs, c)
    memory = np.array([1.5, 2, 4, 8, 20, 100])
    W, U, b = (0 * w for w in layer.get_weights())
    W[:, 2 * UNITS : 3 * UNITS] = rng().normal(size=(D, UNITS))
    b[UNITS : 2 * UNITS] = np.log(memory - 1)
    layer.set_weights([W, U, b])
    x, y = data(UNITS)
    flow = flow_of(model, x, y)
    gate = flow.gates["forget gate"]
    np.testing.assert_allclose(gate.memory, memory)
    assert gate.holds and not flow.gates["input gate"].holds
    e = cotangents(model, x, y)
    a = e[:, None] * (1 - 1 / memory) ** np.arange(T)[::-1, None]
    np.testing.assert_allclose(flow.state_adjoint_norms["c"], norms(a), rtol=1e-12)
    np.testing.assert_array_equal(flow.state_adjoint_norms["h"], 0)
    assert "holds a unit for 6 steps (median; at most 100)" in flow.summary().replace(
        "\n ", ""
    )


# --- the reference


MASK = np.ones((B, T), bool)
MASK[0, :3], MASK[1, 2::3] = False, False


def random_weights(layer):
    weights = [
        rng(7 + i).normal(size=w.shape) * 0.4 for i, w in enumerate(layer.weights)
    ]
    layer.set_weights(weights)
    return weights


@pytest.mark.parametrize("masked", [False, True])
@without_graphs()
def test_an_lstm_equals_the_reference(masked):
    check_lstm(masked)


def check_lstm(masked):
    layer = BPTTLSTM(UNITS, return_sequences=True, dtype="float64")
    model = model_of(keras.layers.Masking(dtype="float64"), layer)
    weights = random_weights(layer)
    x, y = data(T, UNITS)
    mask = MASK if masked else np.ones((B, T), bool)
    x[~mask] = 0
    flow = flow_of(model, x, y, loss_steps=T)
    seen = np.maximum.accumulate(mask, axis=1)
    e = 2 * (model(x).numpy() - y) / (mask.sum() * UNITS)
    e = np.where((seen & mask)[..., None], e, 0)

    def at(e):
        return reference.lstm_gradients(x, *weights, e=e, mask=mask)

    def real(array):
        return np.where(mask, array, np.nan)

    d = at(e)
    both = np.concatenate([d.adjoint_h, d.adjoint_c], axis=-1)
    of_states = flow.state_adjoint_norms
    for ours, theirs in (
        (of_states["h"], d.adjoint_h),
        (of_states["c"], d.adjoint_c),
        (flow.adjoint_norms, both),
        (flow.delta_norms, d.delta),
    ):
        # Some versions of Keras add 1e-7 to the number of unmasked steps.
        np.testing.assert_allclose(ours, real(norms(theirs)), rtol=1e-8)
    _, _, z = reference.lstm_forward(x, *weights, mask=mask)
    z_i, z_f, _, z_o = np.split(z, 4, axis=-1)
    for name, z in {"input": z_i, "forget": z_f, "output": z_o}.items():
        gate = flow.gates[f"{name} gate"]
        values = np.where(mask[..., None], 1 / (1 + np.exp(-z)), np.nan)
        np.testing.assert_allclose(gate.of_unit, np.nanmean(values, (0, 1)))
        np.testing.assert_allclose(gate.mean, np.nanmean(values, (0, 2)))
        off = np.where(mask[..., None], values * (1 - values) < 0.0125, np.nan)
        np.testing.assert_allclose(gate.saturated, np.nanmean(off, (0, 2)))
    # By lag, in real steps: each loss by itself.
    reached, sent = np.zeros((2, T)), np.zeros(T)
    for s in range(T):
        d = at(np.where(np.arange(T)[:, None] == s, e, 0))
        for n in np.flatnonzero(mask[:, s]):
            back = np.flatnonzero(mask[n, : s + 1])[::-1]
            both = np.concatenate([d.adjoint_h, d.adjoint_c], axis=-1)
            reached[:, : len(back)] += norms(both)[n, back], norms(d.adjoint_c)[n, back]
            sent[: len(back)] += norms(e[n, s])
    longest = mask.sum(1).max()
    shares = reached[:, :longest] / sent[:longest]
    np.testing.assert_allclose(flow.lag_shares, shares[0], rtol=1e-8)
    np.testing.assert_allclose(flow.state_lag_shares["c"], shares[1], rtol=1e-8)


@pytest.mark.parametrize("sequence", [False, True])
@without_graphs()
def test_a_loss_that_reads_the_last_cell_state(sequence):
    """Of masked sequences, whose last real steps differ; beside one of the outputs."""
    layer = BPTTLSTM(
        UNITS, return_sequences=sequence, return_state=True, dtype="float64"
    )
    inputs = keras.Input((T, D), dtype="float64")
    h, _, c = layer(keras.layers.Masking(dtype="float64")(inputs))
    if sequence:
        h = keras.ops.sum(h, axis=1)
    together = keras.layers.Concatenate(dtype="float64")([h, 2 * c])
    model = keras.Model(inputs, together)
    weights = random_weights(layer)
    x, y = data(2 * UNITS)
    x[~MASK] = 0
    flow = flow_of(model, x, y, loss_steps=T)
    e_h, e_c = np.split(cotangents(model, x, y), 2, axis=1)
    given = {"e_h_T": e_h}
    if sequence:
        # From the first real step on a masked one shows the state of the one before.
        shown = np.maximum.accumulate(MASK, axis=1)[..., None]
        given = {"e": np.where(shown, e_h[:, None], 0.0)}
        for n, t in np.argwhere(~MASK):
            before = np.flatnonzero(MASK[n, :t])
            if len(before):
                given["e"][n, before[-1]] += given["e"][n, t]
            given["e"][n, t] = 0
    d = reference.lstm_gradients(x, *weights, e_c_T=2 * e_c, mask=MASK, **given)
    for name, theirs in {"h": d.adjoint_h, "c": d.adjoint_c}.items():
        expected = np.where(MASK, norms(theirs), np.nan)
        np.testing.assert_allclose(
            flow.state_adjoint_norms[name], expected, rtol=1e-9, atol=1e-15
        )


@pytest.mark.parametrize("reset_after", [False, True])
@without_graphs()
def test_a_gru_equals_the_reference(reset_after):
    layer = BPTTGRU(UNITS, reset_after=reset_after, dtype="float64", go_backwards=True)
    model = model_of(layer)
    weights = random_weights(layer)
    x, y = data(UNITS)
    flow = flow_of(model, x, y)
    options = {"reset_after": reset_after}
    e = cotangents(model, x, y)
    x = x[:, ::-1]
    d = reference.gru_gradients(x, *weights, e_h_T=e, **options)
    np.testing.assert_allclose(flow.adjoint_norms, norms(d.adjoint), rtol=1e-10)
    np.testing.assert_array_equal(flow.adjoint_norms, flow.state_adjoint_norms["h"])
    assert flow.delta_norms is flow.mean_delta is None, "it has two, of x W and of h U"
    _, z = reference.gru_forward(x, *weights, **options)
    values = 1 / (1 + np.exp(-z))
    for i, name in enumerate(("update", "reset")):
        expected = np.split(values, 3, axis=-1)[i].mean((0, 1))
        np.testing.assert_allclose(flow.gates[f"{name} gate"].of_unit, expected)
    assert flow.gates["update gate"].holds


def test_dropout_reaches_the_gates():
    options = {"dropout": 0.3, "recurrent_dropout": 0.4, "seed": 5}
    layer = BPTTLSTM(UNITS, **options, return_sequences=True, dtype="float64")
    model = model_of(layer)
    x, y = data(T, UNITS)
    dropped, plain = (flow_of(model, x, y, training=t) for t in (True, False))
    for name, gate in dropped.gates.items():
        assert not np.allclose(gate.of_unit, plain.gates[name].of_unit), name


def check_multiplied(layer, mask=None):
    """A layer that multiplies its state at each step, and does nothing else.

    The outputs of the same call tell by what; the adjoints are multiplied by the same.
    """
    layer.get_initial_state = lambda batch_size: [
        keras.ops.ones((batch_size, UNITS), "float64")
    ]
    model = model_of(keras.layers.Masking(dtype="float64"), layer)
    layer.cell.weights[0].assign(0 * layer.cell.weights[0])  # nothing comes in
    x, y = data(T, UNITS)
    mask = np.ones((B, T), bool) if mask is None else mask
    x[~mask] = 0
    flow = flow_of(model, x, y, loss_steps=T, training=True)
    o = model(x, training=True).numpy()  # of the same draws: no seed has moved
    seen = np.maximum.accumulate(mask, axis=1)
    e = np.where((seen & mask)[..., None], 2 * (o - y) / (mask.sum() * UNITS), 0)
    shown = np.where(seen[..., None], o, 1.0)
    before = np.concatenate([np.ones((B, 1, UNITS)), shown[:, :-1]], axis=1)
    # A factor of 0 leaves a state of 0.
    factor = np.divide(shown, before, out=np.zeros_like(shown), where=before != 0)
    expected = [e[:, -1]]
    for t in range(T - 2, -1, -1):
        expected.insert(0, e[:, t] + expected[0] * factor[:, t + 1])
    expected = np.where(mask, norms(np.stack(expected, 1)), np.nan)
    np.testing.assert_allclose(flow.adjoint_norms, expected, rtol=1e-8)


@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
@without_graphs()
def test_noise_of_every_step_is_that_of_the_call(mask):
    """Masked steps are moved, and their draws with them."""

    def multiplied(self, x, h):
        shape = keras.ops.shape(h)
        noise = keras.random.normal(shape, dtype="float64", seed=self.seed)
        return x @ self.W + h * noise

    weights = {"W": (D, UNITS)}
    own = Cell(multiplied, sizes=(UNITS,), weights=weights, dtype="float64")
    own.seed = keras.random.SeedGenerator(4)
    check_multiplied(BPTT(own, return_sequences=True, dtype="float64"), mask)


@without_graphs()
def test_dropout_factors_are_those_of_the_call():
    layer = BPTTRNN(
        UNITS,
        "linear",
        recurrent_initializer="identity",
        recurrent_dropout=0.1,
        seed=3,
        return_sequences=True,
        dtype="float64",
    )
    check_multiplied(layer)


# --- windows, clips and reports of each layer


LAYERS = {
    "LSTM": lambda **k: BPTTLSTM(UNITS, **k),
    "GRU": lambda **k: BPTTGRU(UNITS, **k),
    "own": lambda **k: BPTT(
        keras.layers.StackedRNNCells(
            [
                keras.layers.LSTMCell(5, dtype="float64"),
                keras.layers.GRUCell(UNITS, dtype="float64"),
            ],
            dtype="float64",
        ),
        **k,
    ),
}


@pytest.mark.parametrize("name", ["LSTM", pytest.param("own", marks=pytest.mark.slow)])
@without_graphs()
def test_a_window_cuts_and_a_clip_holds(name):
    options = {"return_sequences": True, "dtype": "float64"}
    layer = LAYERS[name](truncation=Truncation(3, stride=1), **options)
    model, (x, y) = model_of(layer), data(T, UNITS)
    flow = flow_of(model, x, y, loss_steps=T)
    np.testing.assert_array_equal(flow.lag_shares[3:], 0)
    assert np.all(flow.untruncated_lag_shares > 0)
    np.testing.assert_allclose(flow.lag_shares[:3], flow.untruncated_lag_shares[:3])
    assert flow.verdict == "truncated"

    layer.truncation, layer.adjoint_max_growth = None, 1.0
    # At rest a step multiplies by up to f + i o u, with u an eigenvalue of U.
    W, U, *b = layer.get_weights()[:3]
    layer.set_weights([0 * W, 8 * U, *b, *layer.get_weights()[3:]])
    flow = flow_of(model, x, y, loss_steps=T)
    assert np.max(flow.untruncated_lag_shares) > 2 > 1 + 1e-9 > np.max(flow.lag_shares)


def test_layers_of_keras_are_measured_by_way_of_a_copy():
    layers = [
        keras.layers.Bidirectional(
            keras.layers.GRU(4, return_sequences=True, name="gru"), name="both"
        ),
        keras.layers.LSTM(5, name="lstm"),
        keras.layers.Dense(2),
    ]
    model = keras.Sequential([keras.Input((T, D)), *layers])
    model.compile("sgd", "mse")
    before = model.get_weights()
    flow = gradient_flow(convert(model), *data(2))
    assert [f.layer for f in flow.values()] == ["BPTTGRU", "BPTTGRU", "BPTTLSTM"]
    assert all(map(np.array_equal, before, model.get_weights()))
    assert type(model.layers[-2]) is keras.layers.LSTM


@pytest.mark.parametrize("name", LAYERS)
def test_a_report_of_each_layer(name):
    model = model_of(LAYERS[name](name="layer", dtype="float64"))
    (flow,) = gradient_flow(model, *data(UNITS), loss=MSE).values()
    text = flow.summary()
    assert max(map(len, text.splitlines())) <= 78
    read = json.loads(json.dumps(flow.to_dict(), allow_nan=False))
    assert list(read["state_adjoint_norms"]) == list(flow.state_adjoint_norms)
    if name == "own":
        assert "BPTT(LSTMCell, GRUCell), 6 units, 9 steps" in text
        assert "s_t stands for s1_t and s2_t and s3_t together" in text
        assert not flow.gates
    else:
        assert flow.layer == f"BPTT{name}" and list(read["gates"]) == list(flow.gates)
        (held,) = [gate for gate in read["gates"].values() if gate["holds"]]
        assert len(held["memory"]) == UNITS
    assert flow.sigma_max is flow.bound is flow.saturated is None
    assert "sigma_max" not in text and "a step multiplied by" in text


UNLIKE = "output_is_no_state reads_no_state grid a_conditional state_that_stays"


EVERY = few([(name,) for name in sorted(CELLS)], lambda name: name in UNLIKE.split())


@pytest.mark.parametrize("name", EVERY)
def test_any_cell_is_measured(name):
    """Whatever its states and outputs are; a loss at the last step."""
    layer = BPTT(CELLS[name](dtype="float64"), dtype="float64")
    model = model_of(layer)
    x, _ = data(1)
    y = rng(3).normal(size=model(x).shape)
    flow = flow_of(model, x, y)
    assert flow.timesteps == T and flow.finite and flow.summary()
    assert np.all(np.isfinite(flow.adjoint_norms))


def test_the_plain_rnn_and_its_cell_agree():
    """Written out or compiled from one step, it is one gradient."""
    plain, own = (
        BPTTRNN(UNITS, dtype="float64"),
        BPTT(keras.layers.SimpleRNNCell(UNITS, dtype="float64"), dtype="float64"),
    )
    flows = []
    for layer in (plain, own):
        model = model_of(layer)
        layer.set_weights(
            [rng(i).normal(size=w.shape) for i, w in enumerate(layer.weights)]
        )
        flows.append(flow_of(model, *data(UNITS)))
    for name in "adjoint_norms delta_norms lag_shares state_norms state_growth".split():
        np.testing.assert_allclose(*(getattr(f, name) for f in flows), rtol=1e-10)
