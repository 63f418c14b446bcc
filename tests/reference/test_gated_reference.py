"""The references of the LSTM and the GRU, proved as that of the plain RNN is.

Closed forms, central differences, and Keras' own layers with the same weights: their
outputs, and their gradients by TensorFlow's tape.
"""

from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
from helpers import (
    FLOAT64,
    MIXED_MASK,
    assert_same,
    evaluate,
    random_inputs,
    random_weights,
    relative_error,
    rng,
)

from keras_bptt import reference

# All different, so that no transpose hides behind a shape that fits by accident.
B, T, D, H = *MIXED_MASK.shape, 2, 4
NUMERIC = 1e-8  # as in test_reference.py
ROUNDING = 1e-12

WEIGHTS = {"x": "d_inputs", "W": "d_kernel", "U": "d_recurrent_kernel", "b": "d_bias"}
LSTM_STATES = {"h_0": "d_initial_h", "c_0": "d_initial_c"}
GRU_STATES = {"h_0": "d_initial_state"}


class Kind(NamedTuple):
    """A cell: its reference, what it has, and its layer in Keras."""

    forward: Any
    gradients: Any
    states: dict
    bias: tuple
    layer: Any
    options: dict

    def run(self, p):
        known = [name for name in p if not name.startswith("e")]
        return self.forward(**self.options, **{name: p[name] for name in known})

    def back(self, p):
        return self.gradients(**self.options, **p)

    def last_states(self, run):
        return [array[:, -1] for array in run[: len(self.states)]]  # h, then c

    def loss(self, p):
        run = self.run(p)
        ends = zip(("e_h_T", "e_c_T"), self.last_states(run), strict=False)
        return np.sum(p["e"] * run.h) + sum(np.sum(p[name] * s) for name, s in ends)


LSTM = reference.lstm_forward, reference.lstm_gradients, LSTM_STATES, (4 * H,)
GRU = reference.gru_forward, reference.gru_gradients, GRU_STATES
KINDS = {
    "LSTM": Kind(*LSTM, keras.layers.LSTM, {}),
    "GRU": Kind(*GRU, (2, 3 * H), keras.layers.GRU, {}),
    "GRU, reset before": Kind(*GRU, (3 * H,), keras.layers.GRU, {"reset_after": False}),
}
# Of the candidate and of the gates. Gates without bounds would make states of 1e50.
ACTIVATIONS = [("tanh", "sigmoid"), ("sigmoid", "tanh"), ("relu", "sigmoid")]

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
masked_or_not = pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
some_activations = pytest.mark.parametrize("names", ACTIVATIONS, ids="-".join)


def random_problem(kind, masked=False, names=None):
    """Inputs, weights, states and cotangents; each gate's U asymmetric, its radius 1."""
    gates = [random_weights(D, H, seed=gate) for gate in range(kind.bias[-1] // H)]
    W, U, _ = (np.concatenate(arrays, axis=-1) for arrays in zip(*gates, strict=True))
    b = random_inputs(*kind.bias, seed=9)
    p = {"x": random_inputs(B, T, D), "W": W, "U": U, "b": 0.3 * b}
    p |= {s: random_inputs(B, H, seed=i) for i, s in enumerate(kind.states, 3)}
    random = rng(2)  # the numbers that `evaluate` draws
    p["e"] = random.normal(size=(B, T, H))
    p |= {f"e_{s[0]}_T": random.normal(size=(B, H)) for s in kind.states}
    p |= {"mask": MIXED_MASK} if masked else {}
    return p | dict(
        zip(("activation", "recurrent_activation"), names or (), strict=False)
    )


def check_numerically(loss, array, gradient, name):
    numeric = reference.central_differences(loss, array)
    assert gradient.shape == array.shape, name
    # A gradient that is nearly zero would agree with anything.
    assert np.linalg.norm(numeric) > 1e-3, name
    error = relative_error(gradient, numeric)
    assert error < NUMERIC, f"{name}: relative error {error:.1e}"


# Closed forms, exact: dyadic numbers, and gates that are 0, 1/2 or 1.


def column(*values):
    return np.array(values, "float64").reshape(1, -1, 1)


def test_lstm_with_open_gates_is_an_integrator():
    p = {"x": column(3, -5, 2), "W": column(0, 0, 0.5, 0)[0].T, "U": np.zeros((1, 4))}
    p |= {"b": np.array([999.0, 999, 0, 999]), "c_0": column(7)[0]}
    run = reference.lstm_forward(**p, activation="linear")
    assert run.c.ravel().tolist() == run.h.ravel().tolist() == [8.5, 6.0, 7.0]
    d = reference.lstm_gradients(**p, e_c_T=column(1)[0], activation="linear")
    assert d.d_initial_c == 1 and d.adjoint_c.ravel().tolist() == [1, 1, 1]
    assert d.d_inputs.ravel().tolist() == [0.5, 0.5, 0.5]
    assert d.d_kernel.tolist() == [[0, 0, 3 - 5 + 2, 0]]
    assert d.d_recurrent_kernel.tolist() == [[0, 0, 0 + 8.5 + 6, 0]]
    assert d.d_bias.tolist() == [0, 0, 3, 0]


@pytest.mark.parametrize("reset_after", [True, False])
def test_gru_with_half_open_gates_is_a_moving_average(reset_after):
    p = {"x": column(4, 2, 8), "W": column(0, 0, 1)[0].T, "U": np.zeros((1, 3))}
    p |= {"h_0": column(8)[0], "activation": "linear", "reset_after": reset_after}
    assert reference.gru_forward(**p).h.ravel().tolist() == [6, 4, 6]
    d = reference.gru_gradients(**p, e_h_T=column(1)[0])
    assert d.adjoint.ravel().tolist() == [1 / 4, 1 / 2, 1]
    assert (
        d.d_inputs.ravel().tolist() == [1 / 8, 1 / 4, 1 / 2]
        and d.d_initial_state == 1 / 8
    )
    # a_t (h_{t-1} - x_t) h_{t-1} / 4 at each step: 1/4 is the slope of z.
    by_z = 1 / 4 * (8 - 4) * 8 / 4 + 1 / 2 * (6 - 2) * 6 / 4 + (4 - 8) * 4 / 4
    # a_t (1 - z) r h_{t-1}
    by_h = 1 / 4 * 8 / 4 + 1 / 2 * 6 / 4 + 4 / 4
    assert d.d_recurrent_kernel.tolist() == [[by_z, 0, by_h]]


@pytest.mark.parametrize("kind", list(KINDS.values())[1:], ids=list(KINDS)[1:])
def test_gru_that_resets_and_keeps_nothing_is_the_plain_rnn(kind):
    p = random_problem(kind)
    p["b"][..., :H], p["b"][..., H : 2 * H] = -999, 999  # z = 0, r = 1
    d = kind.back(p)
    p["e"][:, -1] += p["e_h_T"]
    W, U, b = (p[name][..., 2 * H :] for name in ("W", "U", "b"))
    b = b.sum(axis=0) if b.ndim == 2 else b
    plain = reference.hidden_gradients(p["x"], W, U, b, p["h_0"], "tanh", p["e"])
    for name in ("d_inputs", "d_initial_state", "adjoint"):
        assert relative_error(getattr(d, name), getattr(plain, name)) < ROUNDING, name
    for name in ("d_kernel", "d_recurrent_kernel", "delta"):
        got, expected = getattr(d, name), getattr(plain, name)
        assert relative_error(got[..., 2 * H :], expected) < ROUNDING, name
        assert not np.any(got[..., : 2 * H]), name


# Central differences.


@every_kind
@masked_or_not
@some_activations
def test_gradients(kind, masked, names):
    p = random_problem(kind, masked, names)
    d = kind.back(p)
    for argument, name in (WEIGHTS | kind.states).items():
        check_numerically(
            lambda value, argument=argument: kind.loss(p | {argument: value}),
            p[argument],
            getattr(d, name),
            name,
        )


@every_kind
@masked_or_not
def test_delta_is_the_gradient_of_the_pre_activation(kind, masked):
    # Inputs with an identity for a kernel are added to the pre-activation.
    p = random_problem(kind, masked)
    size = kind.bias[-1]
    W = np.concatenate([p["W"], np.eye(size)])

    def loss(bump):
        return kind.loss(p | {"x": np.concatenate([p["x"], bump], axis=-1), "W": W})

    check_numerically(loss, np.zeros((B, T, size)), kind.back(p).delta, "delta")


@every_kind
@masked_or_not
def test_adjoint_is_the_gradient_of_the_state(kind, masked):
    """A state is the initial one of the steps that follow it."""
    p = random_problem(kind, masked)
    run, d = kind.run(p), kind.back(p)
    names = ["adjoint_h", "adjoint_c"] if "c_0" in kind.states else ["adjoint"]

    def loss_after(t, **states):
        rest = {name: p[name][:, t:] for name in ("x", "e", "mask") if name in p}
        before = zip(kind.states, (array[:, t - 1] for array in run), strict=False)
        return kind.loss(p | rest | dict(before) | states)

    for t in range(1, T):
        for state, name, array in zip(kind.states, names, run, strict=False):
            a = getattr(d, name)[:, t - 1]
            check_numerically(
                lambda value, t=t, state=state: loss_after(t, **{state: value}),
                array[:, t - 1],
                a - p["e"][:, t - 1] if state == "h_0" else a,
                f"{name} at {t}",
            )
    assert np.array_equal(getattr(d, names[0])[:, -1], p["e"][:, -1] + p["e_h_T"])


def test_recurrent_delta_is_that_of_the_second_bias():
    kind = KINDS["GRU"]
    p = random_problem(kind)
    d = kind.back(p)
    sums = [array.sum(axis=(0, 1)) for array in (d.delta, d.recurrent_delta)]
    assert relative_error(sums, d.d_bias) < ROUNDING
    assert relative_error(*d.d_bias[:, 2 * H :]) > 1e-2  # the factor r


# Masks, and what is left out.


@every_kind
def test_padding_counts_for_nothing(kind):
    p = random_problem(kind, masked=True)
    x = np.where(MIXED_MASK[..., np.newaxis], p["x"], np.nan)
    for name, value in vars(kind.back(p)).items():
        assert np.array_equal(getattr(kind.back(p | {"x": x}), name), value), name
    assert np.array_equal(kind.run(p | {"x": x}).h, kind.run(p).h)
    # An example is as long as its mask says.
    real = MIXED_MASK[:1]
    short = p | {"x": p["x"][:1, real[0]], "mask": None, "e": None}
    short |= {name: p[name][:1] for name in kind.states}
    ends = zip(
        kind.last_states(kind.run(short)), kind.last_states(kind.run(p)), strict=True
    )
    assert all(
        relative_error(one[0], all_of_them[0]) < ROUNDING for one, all_of_them in ends
    )


@every_kind
def test_none_stands_for_zeros(kind):
    p = random_problem(kind)
    left_out = ["b", *kind.states, "e"]
    zeros = p | {name: np.zeros_like(p[name]) for name in left_out}
    zeros["mask"] = np.ones((B, T), bool)
    short = {name: p[name] for name in p if name not in left_out}
    for name, value in vars(kind.back(zeros)).items():
        assert np.array_equal(getattr(kind.back(short), name), value), name
    for got, expected in zip(kind.run(short), kind.run(zeros), strict=True):
        assert np.array_equal(got, expected)


# Keras.


@every_kind
@masked_or_not
@some_activations
@pytest.mark.parametrize("use_bias", [True, False], ids=["", "no bias"])
def test_outputs_and_gradients_are_those_of_keras(kind, masked, names, use_bias):
    p = random_problem(kind, masked, names)
    options = {"activation": names[0], "recurrent_activation": names[1]} | kind.options
    options |= {"return_sequences": True, "return_state": True, "dtype": "float64"}
    layer = kind.layer(H, use_bias=use_bias, **options)
    layer.build((B, T, D))
    if not use_bias:
        del p["b"]
    layer.cell.set_weights([p[name] for name in ("W", "U", "b") if name in p])
    states, call = [p[name] for name in kind.states], {}
    # Before the first real step the layer shows zeros, the reference h_0.
    shown = np.ones((B, T, 1))
    if masked:
        shown = np.maximum.accumulate(MIXED_MASK, axis=1)[..., np.newaxis]
        call = {"mask": MIXED_MASK}
    theirs = evaluate(layer, p["x"], "plain", state=states, **call)
    p["e"] = p["e"] * shown
    run, d = kind.run(p), kind.back(p)

    outputs = [run.h * shown, *kind.last_states(run)]
    ours = {f"y{i}": y for i, y in enumerate(outputs)}
    for name, y in ours.items():
        assert relative_error(y, theirs[name]) < ROUNDING, name
    ours["d_x"] = d.d_inputs
    ours |= {f"d_state{i}": getattr(d, s) for i, s in enumerate(kind.states.values())}
    weights = ["kernel", "recurrent_kernel", "bias"][: 2 + use_bias]
    ours |= {f"d_{i}_{w}": getattr(d, f"d_{w}") for i, w in enumerate(weights)}
    assert_same(ours, theirs, FLOAT64)


# Errors.


@every_kind
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", np.zeros((B, D)), r"`x` must have shape \(batch=any, timesteps=any, fea"),
        ("x", np.zeros((B, 0, D)), "one time step or more"),
        ("W", np.zeros((D, H)), r"`W` must have shape \(features=2, (3|4) units=1"),
        ("U", np.zeros((H, H)), r"`U` must have shape \(units=4, (3|4) units=1"),
        ("b", np.zeros(H), r"`b` must have shape \((sides=2, )?(3|4) units=1.*\(4,\)"),
        ("h_0", np.zeros(H), r"`h_0` must have shape \(batch=3, units=4\).*\(4,\)"),
        ("mask", np.zeros(B, bool), r"`mask` must have shape \(batch=3, timesteps="),
        ("mask", np.zeros((B, T)), r"`mask` must be boolean.*float64"),
        ("activation", "softmax", "`activation` must be one of .*, or a pair"),
        ("recurrent_activation", None, "`recurrent_activation` must be one of"),
    ],
)
def test_wrong_arguments_raise(kind, name, value, message):
    p = random_problem(kind) | {name: value}
    if "one time" in message:
        p["e"] = np.zeros((B, 0, H))
    for function in (kind.run, kind.back):
        with pytest.raises(ValueError, match=message):
            function(p)
