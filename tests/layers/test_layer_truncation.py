"""The layer with a truncation or a clipped adjoint.

Outputs and gradients are compared with loops over paths, those of `truncated_reference`,
which know nothing of windows, packed examples or blocks. Then the structure: what is full
backpropagation bit for bit, what is exactly zero, and what padding may not change.
`test_randomized_truncation.py` has the policy that draws.
"""

import itertools
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    FLOAT32,
    FLOAT64,
    MODES,
    WAYS,
    B,
    D,
    H,
    assert_near,
    assert_same,
    draw_call,
    evaluate,
    examples,
    few,
    random_inputs,
    random_weights,
    relative_error,
    rng,
    without_graphs,
)
from hypothesis import given
from hypothesis import strategies as st

from keras_bptt import BPTTRNN, RandomizedTruncation, Truncation
from keras_bptt.reference import truncation as truncated_reference
from keras_bptt.truncation import policy as policy_of

# Longer than any window but one, and a multiple of no block.
T = 7
STATE = random_inputs(B, H, seed=5)
# Row by row: holes after a masked start, a masked end (N <= steps < T of most windows),
# and nothing but masked steps.
MASK = np.array([[0, 1, 1, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0], [0] * 7], bool)
WINDOWS = {
    "chunks": 3,
    "overlapping": Truncation(5, stride=2),
    "sliding": Truncation(3, stride=1),
}
CLIP = 0.7


def layer_of(truncation=None, units=H, features=D, seed=0, **options):
    """A layer with random weights; float64, and not compiled, if unsaid."""
    options = {"dtype": "float64", "jit_compile": False} | options
    layer = BPTTRNN(units, truncation=truncation, **options)
    layer.build((None, None, features))
    use_bias = options.get("use_bias", True)
    layer.cell.set_weights(random_weights(features, units, use_bias, seed))
    return layer


def brute_force(layer, x, cotangents=None, *, state=None, mask=None, d=None, r=None):
    """What `evaluate` returns, of loops over steps and paths.

    Args:
        layer: whose weights and options count.
        cotangents: of the outputs, a list. None: those of `evaluate`.
        d, r: factors of dropout and of recurrent dropout, (batch, ...).
    """
    W, U, *b = (np.asarray(w, "float64") for w in layer.cell.get_weights())
    b_or_0 = b[0] if b else np.zeros(layer.units)
    h_0 = np.zeros((len(x), layer.units)) if state is None else state
    real = np.ones(x.shape[:2], bool) if mask is None else mask
    turn = -1 if layer.go_backwards else 1
    inputs, real = np.where(real[..., None], x, 0)[:, ::turn], real[:, ::turn]
    inputs = inputs if d is None else d[:, None] * inputs

    h, states = h_0, []
    for x_t, m in zip(np.swapaxes(inputs, 0, 1), real.T, strict=True):
        new = np.tanh(x_t @ W + (h if r is None else r * h) @ U + b_or_0)
        h = np.where(m[:, None], new, h)
        states.append(h)
    seen = real if layer.zero_output_for_mask else np.logical_or.accumulate(real, 1)
    y = np.where(seen[..., None], np.stack(states, 1), 0)
    outputs = [y if layer.return_sequences else y[:, -1]] + [h] * layer.return_state

    random = rng(2)
    dy, *ds = cotangents or [random.normal(size=o.shape) for o in outputs]
    e = np.zeros_like(y)
    e[:, slice(None) if layer.return_sequences else -1] = dy
    e = np.where(seen[..., None], e, 0)
    e[:, -1] += ds[0] if ds else 0

    policy, clip = layer.truncation, layer.adjoint_clipnorm
    options = {"steps": policy and policy.steps, "stride": policy and policy.stride}
    options |= {"mask": real, "recurrent_dropout": r}
    gradients = truncated_reference.truncated_gradients
    if clip is not None:
        options["adjoint_clipnorm"] = clip
        gradients = truncated_reference.clipped_gradients
    got = gradients(inputs, W, U, b_or_0, h_0, "tanh", e, **options)

    results = {f"y{i}": output for i, output in enumerate(outputs)}
    d_x = got.d_inputs[:, ::turn]
    results["d_x"] = d_x if d is None else d[:, None] * d_x
    if state is not None:
        results["d_state0"] = got.d_initial_state
    results |= {"d_0_kernel": got.d_kernel}
    results |= {"d_1_recurrent_kernel": got.d_recurrent_kernel}
    return results | ({"d_2_bias": got.d_bias} if b else {})


class UnknownLength:
    """A layer that does not learn from its inputs' shapes how many steps they have."""

    def __init__(self, layer):
        self.layer = layer

    def __getattr__(self, name):
        return getattr(self.layer, name)

    def __call__(self, x, mask=None, **call):
        hide = tf.compat.v1.placeholder_with_default
        if mask is not None:
            mask = hide(mask, [None, None])
        outputs = self.layer(hide(x, [None, None, x.shape[2]]), mask=mask, **call)
        y, *state = tf.nest.flatten(outputs)
        last = [x.shape[0], self.layer.units]
        if self.layer.return_sequences:
            assert y.shape[1] is None
            y = tf.ensure_shape(y, [*x.shape[:2], self.layer.units])
        else:
            y = tf.ensure_shape(y, last)
        return [y, *(tf.ensure_shape(h, last) for h in state)]


def check(layer, mode="plain", tolerance=FLOAT64, known=True, **call):
    """The layer against the brute force."""
    # No window is as long as the sequence.
    dead = () if layer.return_sequences or "mask" in call else ("d_state0",)
    x = random_inputs(B, T, D)
    inputs = x.copy()
    if "mask" in call:
        inputs[~call["mask"]] = np.nan
    expected = brute_force(layer, x, **call)
    layer = layer if known else UnknownLength(layer)
    got = evaluate(layer, inputs, mode, training=True, **call)
    assert_same(
        {k: v.astype("float64") for k, v in got.items()}, expected, tolerance, dead
    )


# Overlapping windows, and the others where time is no matter.
EACH_WINDOW = few([(w,) for w in WINDOWS], lambda w: w == "overlapping")

# --- Against the brute force

OPTIONS = {
    "last output": {},
    "last output and state": {"return_state": True},
    "sequence": {"return_sequences": True},
    "sequence and state": {"return_sequences": True, "return_state": True},
    "no bias": {"use_bias": False, "return_sequences": True},
    "backwards": {"go_backwards": True, "return_state": True},
    "backwards, sequence": {"go_backwards": True, "return_sequences": True},
    "unrolled": {"unroll": True, "return_sequences": True},
    "two steps an iteration": {"unroll": 2, "return_sequences": True},
    "zero output": {"zero_output_for_mask": True, "return_state": True},
    "zero output, sequence": {"zero_output_for_mask": True, "return_sequences": True},
    "clipped": {"adjoint_clipnorm": CLIP, "return_state": True},
    "clipped, sequence": {"adjoint_clipnorm": CLIP, "return_sequences": True},
    "clipped, backwards": {
        "adjoint_clipnorm": CLIP,
        "go_backwards": True,
        "return_sequences": True,
        "return_state": True,
    },
}


def some_options(option, window, masked):
    if window == "overlapping":
        return masked != (option in ("last output", "clipped"))
    return masked and option == "sequence and state"


@pytest.mark.parametrize(
    ("option", "window", "masked"),
    few(itertools.product(OPTIONS, WINDOWS, [False, True]), some_options),
)
def test_equals_brute_force(option, window, masked):
    call = {"mask": MASK} if masked else {}
    check(layer_of(WINDOWS[window], **OPTIONS[option]), state=STATE, **call)


def some_in_modes(option, window, masked, mode, known):
    # No example of the mask is longer than the overlapping window, which so cuts nothing.
    windows = {"eager": "overlapping", "graph": "sliding", "xla": "chunks"}
    return (
        (option == "sequence and state" and masked)
        and window == windows[mode]
        and known == (mode != "graph")
    )


@pytest.mark.parametrize(
    ("option", "window", "masked", "mode", "known"),
    few(
        itertools.product(OPTIONS, WINDOWS, [False, True], MODES, [True, False]),
        some_in_modes,
    ),
)
def test_equals_brute_force_in_each_mode(option, window, masked, mode, known):
    """Also where the graph does not know the number of steps."""
    if OPTIONS[option].get("unroll") is True and not known:
        pytest.skip("SimpleRNN does not unroll what has no length")
    call = {"mask": MASK} if masked else {}
    layer = layer_of(WINDOWS[window], **OPTIONS[option])
    check(layer, mode, state=STATE, known=known, **call)


@pytest.mark.parametrize(
    ("window", "known"),
    few(
        itertools.product(WINDOWS, [True, False]),
        lambda window, known: window == "overlapping" and not known,
    ),
)
def test_compiled_in_a_plain_graph(window, known):
    """As `fit` runs it: the passes compiled, the graph around them not."""
    options = {"return_sequences": True, "jit_compile": "auto"}
    layer = layer_of(WINDOWS[window], **options)
    check(layer, "graph", state=STATE, mask=MASK, known=known)


@pytest.mark.parametrize(
    "window", [pytest.param(None, marks=pytest.mark.slow), *EACH_WINDOW]
)
@without_graphs()
def test_dropout(window):
    options = {"dropout": 0.3, "recurrent_dropout": 0.3, "return_sequences": True}

    def new():
        keras.utils.set_random_seed(3)
        return layer_of(WINDOWS.get(window), **options)

    x, equal = random_inputs(B, T, D), new()
    # What an equal layer draws at its first call.
    d = equal.cell.get_dropout_mask(tf.constant(x[:, 0])).numpy()
    r = equal.cell.get_recurrent_dropout_mask(tf.constant(STATE)).numpy()
    assert np.any(d == 0) and np.any(r == 0)
    for mask in ({}, {"mask": MASK}):
        got = evaluate(new(), x, state=STATE, training=True, **mask)
        assert_same(got, brute_force(equal, x, state=STATE, d=d, r=r, **mask))


@pytest.mark.parametrize("window", EACH_WINDOW)
def test_float32(window):
    options = {"return_sequences": True, "return_state": True, "dtype": "float32"}
    layer = layer_of(WINDOWS[window], **options)
    check(layer, tolerance=FLOAT32, state=STATE, mask=MASK)


@without_graphs()
def test_truncation_and_clipping_change_the_gradient():
    """Else the comparisons would say nothing."""
    x = random_inputs(B, T, D)
    whole = evaluate(layer_of(return_sequences=True), x)
    several = [*({"truncation": w} for w in WINDOWS.values())]
    for options in (*several, {"adjoint_clipnorm": CLIP}):
        other = evaluate(layer_of(return_sequences=True, **options), x)
        assert relative_error(other["y0"], whole["y0"]) < FLOAT64
        for name in list(whole)[1:]:
            assert relative_error(other[name], whole[name]) > 1e-2, (options, name)


# --- The whole is one window


LONG = [T, 20, Truncation(T, stride=3), Truncation(20, stride=1)]


def some_bits(window, jit_compile, mode, known, masked, sequence):
    if mode == "eager":
        return window == LONG[2] and masked and sequence and not jit_compile
    in_graph = mode == "graph" and jit_compile == "auto"
    return window == LONG[3] and in_graph and masked and sequence and not known


@pytest.mark.parametrize(
    ("window", "jit_compile", "mode", "known", "masked", "sequence"),
    few(
        [
            case
            for case in itertools.product(
                LONG, [False, "auto"], MODES, *[[True, False]] * 3
            )
            if case[3] or case[2] != "eager"  # which knows every length
        ],
        some_bits,
    ),
)
def test_one_window_is_full_backpropagation(
    window, jit_compile, mode, known, masked, sequence
):
    """The same bits, under the same way of compiling."""
    call = {"mask": MASK} if masked else {}
    results = []
    for truncation in (None, window):
        layer = layer_of(truncation, return_sequences=sequence, jit_compile=jit_compile)
        layer = layer if known else UnknownLength(layer)
        x = random_inputs(B, T, D)
        results.append(evaluate(layer, x, mode, state=STATE, training=True, **call))
    for name, array in results[0].items():
        np.testing.assert_array_equal(results[1][name], array, err_msg=name)


@pytest.mark.parametrize(
    "window",
    [pytest.param(T, marks=pytest.mark.slow), Truncation(20, stride=1)],
    ids=str,
)
def test_last_output_of_one_window_in_xla(window):
    """Where the graph does not know that no step lies before the window."""
    layer = layer_of(window)
    check(layer, "xla", state=STATE, known=False, mask=MASK)


# --- What lies outside is exactly zero


@pytest.mark.parametrize(
    ("window", "sequence"),
    few(
        itertools.product([1, *WINDOWS.values()], [True, False]),
        lambda window, sequence: sequence or window == 3,
    ),
)
@without_graphs()
def test_gradient_ends_with_the_window(window, sequence):
    layer = layer_of(window, return_sequences=sequence)
    steps, stride = layer.truncation.steps, layer.truncation.stride
    x, state = tf.constant(random_inputs(B, T, D)), tf.constant(STATE)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([x, state])
        y = layer(x, initial_state=state, training=True)
        losses = {T: y}
        if sequence:
            losses = {t: y[:, t - 1] for t in range(1, T + 1)}
        losses = {t: tf.reduce_sum(y_t**2) for t, y_t in losses.items()}
    for t, loss in losses.items():
        d_x, d_state = tape.gradient(loss, [x, state])
        end = T - stride * ((T - t) // stride)
        reached = [max(1, end - steps + 1) <= j <= t for j in range(1, T + 1)]
        size = np.max(np.abs(d_x), axis=2)
        assert np.all(size[:, np.array(reached)] > 1e-3)
        assert np.all(size[:, ~np.array(reached)] == 0)
        assert np.all(np.max(np.abs(d_state), axis=1) > 1e-3) == (end <= steps)
        assert np.any(d_state != 0) == (end <= steps)


# --- Padding


def padded(rows, place, length, fill):
    """Rows of different lengths, (steps, ...), at the True places of a mask."""
    out = np.full((len(rows), length, *rows[0].shape[1:]), fill)
    for row, (real, values) in enumerate(zip(place, rows, strict=True)):
        out[row, real] = values
    return out


def places(kind, lengths, length):
    steps = np.arange(length)
    mask = np.zeros((len(lengths), length), bool)
    for row, N in enumerate(lengths):
        real = {"right": steps[:N], "left": steps[length - N :]}.get(kind)
        if real is None:
            real = np.sort(rng(row).choice(length, N, replace=False))
        mask[row, real] = True
    return mask


def gradients(layer, x, dy, ds, state, mask=None):
    x, state = tf.constant(x), tf.constant(state)
    weights = [v.value for v in layer.trainable_variables]
    mask = None if mask is None else tf.constant(mask)
    with tf.GradientTape() as tape:
        tape.watch([x, state])
        y, last = layer(x, initial_state=state, mask=mask, training=True)
    outputs, cotangents = [y, last], [tf.constant(dy), tf.constant(ds)]
    return [d.numpy() for d in tape.gradient(outputs, [x, state, *weights], cotangents)]


PADDED = [None, 3, Truncation(5, stride=2), Truncation(3, stride=1), Truncation(4, 3)]


def some_padded(window, sequence, clip):
    return (sequence, clip) in {
        PADDED[0]: [(True, CLIP)],
        Truncation(3): [(True, CLIP)],
        PADDED[2]: [(True, CLIP), (False, None)],
    }.get(policy_of(window), [])


@pytest.mark.parametrize(
    ("window", "sequence", "clip"),
    few(itertools.product(PADDED, [True, False], [None, CLIP]), some_padded),
)
@without_graphs()
def test_padding_changes_nothing(window, sequence, clip):
    """Every example is what it is alone, wherever masked steps come between its own."""
    lengths = [7, 2, 4]  # N <= steps < T, and more, for each window
    random, count = rng(6), len(lengths)
    layer = layer_of(
        window, return_sequences=sequence, return_state=True, adjoint_clipnorm=clip
    )
    rows = [random.normal(size=(N, D)) for N in lengths]
    state, ds = random.normal(size=(2, count, H))
    dy = [random.normal(size=(N, H) if sequence else H) for N in lengths]
    alone = [
        gradients(layer, *(a[None] for a in arrays))
        for arrays in zip(rows, dy, ds, state, strict=True)
    ]
    d_x = [d[0][0] for d in alone]
    d_state = np.concatenate([d[1] for d in alone])
    d_weights = [sum(d) for d in zip(*(d[2:] for d in alone), strict=True)]
    for kind, length in (("right", 8), ("left", 8), ("holes", 12)):
        mask = places(kind, lengths, length)
        c = padded(dy, mask, length, 0.0) if sequence else np.stack(dy)
        x = padded(rows, mask, length, np.nan)
        got = gradients(layer, x, c, ds, state, mask)
        want = [padded(d_x, mask, length, 0.0), d_state, *d_weights]
        for name, a, b in zip("x state W U b".split(), got, want, strict=True):
            assert relative_error(a, b) < 1e-12, (kind, length, name)
        assert np.all(got[0][~mask] == 0)


# --- State, sizes, types


@pytest.mark.parametrize("window", EACH_WINDOW)
@without_graphs()
def test_stateful(window):
    """The state goes on from batch to batch, and the gradient stops between them."""
    options = {"stateful": True, "return_sequences": True}
    layer = BPTTRNN(H, truncation=WINDOWS[window], dtype="float64", **options)
    layer.build((B, T, D))
    layer.cell.set_weights(random_weights())
    first, second = (random_inputs(B, T, D, seed=s) for s in (1, 4))
    x = tf.constant(first)
    with tf.GradientTape() as tape:
        tape.watch(x)
        layer(x, training=True)
        loss = tf.reduce_sum(layer(tf.constant(second), training=True))
    assert tape.gradient(loss, x) is None
    layer.reset_state()
    layer(x, training=True)
    state = layer.states[0].numpy()
    assert np.max(np.abs(state)) > 1e-2
    got = evaluate(layer, second, training=True)
    expected = brute_force(layer, second, state=state)
    del expected["d_state0"]
    assert_same(got, expected)


def some_sizes(window, size, masked, sequence):
    return (masked and sequence and window == Truncation(5, stride=2)) or (
        (window, size, sequence) == (1, (B, 1), False)
    )


@pytest.mark.parametrize(
    ("window", "size", "masked", "sequence"),
    few(
        itertools.product(
            [1, *WINDOWS.values()],
            [(0, T), (B, 1), (0, 1), (1, 2)],
            *[[True, False]] * 2,
        ),
        some_sizes,
    ),
)
def test_sizes(window, size, masked, sequence):
    batch, steps = size
    options = {"return_sequences": sequence, "return_state": True}
    layer = layer_of(window, adjoint_clipnorm=CLIP, **options)
    x, state = random_inputs(batch, steps, D), random_inputs(batch, H, seed=5)
    mask = {"mask": rng(1).random((batch, steps)) < 0.8} if masked else {}
    expected = brute_force(layer, x, state=state, **mask)
    got = evaluate(layer, x, "plain", state=state, training=True, **mask)
    assert_same(got, expected, dead=expected)


@pytest.mark.parametrize(
    ("window", "mode"),
    few(
        itertools.product(WINDOWS, WAYS),
        lambda w, mode: w == "overlapping" and mode == "plain",
    ),
)
def test_mixed_precision(window, mode):
    options = {"return_sequences": True, "return_state": True}
    options |= {"truncation": WINDOWS[window], "adjoint_clipnorm": CLIP}
    layer = layer_of(**options, dtype="mixed_bfloat16")
    x = random_inputs(B, T, D)
    expected = brute_force(layer, x, state=STATE, mask=MASK)
    got = evaluate(layer, x, mode, state=STATE, mask=MASK, training=True)
    assert got["y0"].dtype == got["d_x"].dtype == tf.bfloat16.as_numpy_dtype
    assert got["d_0_kernel"].dtype == got["d_2_bias"].dtype == np.float32
    for name, array in expected.items():
        assert np.all(np.isfinite(got[name].astype("float32"))), name
        # As in test_layers.test_mixed_precision.
        assert relative_error(got[name], array) < 40 * 2**-8, name


# --- Around the layer


@pytest.mark.parametrize(
    ("window", "masked"),
    few(
        itertools.product(WINDOWS, [False, True]),
        lambda window, masked: window == "overlapping" and masked,
    ),
)
@without_graphs()
def test_bidirectional(window, masked):
    layer = keras.layers.Bidirectional(
        BPTTRNN(
            H,
            truncation=WINDOWS[window],
            adjoint_clipnorm=CLIP,
            return_sequences=True,
            dtype="float64",
        ),
        merge_mode="concat",
        dtype="float64",
    )
    layer.build((B, T, D))
    layer.set_weights([*random_weights(), *random_weights(seed=7)])
    x, mask = random_inputs(B, T, D), {"mask": MASK} if masked else {}
    got = evaluate(layer, x, training=True, **mask)
    c = rng(2).normal(size=(B, T, 2 * H))
    there = brute_force(layer.forward_layer, x, [c[..., :H]], **mask)
    back = brute_force(layer.backward_layer, x, [c[:, ::-1, H:]], **mask)
    y = np.concatenate([there.pop("y0"), back.pop("y0")[:, ::-1]], 2)
    assert relative_error(got.pop("y0"), y) < FLOAT64
    d_x = there.pop("d_x") + back.pop("d_x")
    assert relative_error(got.pop("d_x"), d_x) < FLOAT64
    wanted = [*there.values(), *back.values()]
    for array, want in zip(got.values(), wanted, strict=True):
        assert relative_error(array, want) < FLOAT64


@pytest.mark.parametrize("window", EACH_WINDOW)
@without_graphs()
def test_time_distributed(window):
    inner = layer_of(WINDOWS[window], return_sequences=True)
    layer = keras.layers.TimeDistributed(inner, dtype="float64")
    x = random_inputs(B, 2, T, D)
    layer.build(x.shape)
    got = evaluate(layer, x, training=True)
    c = rng(2).normal(size=(B, 2, T, H))
    expected = brute_force(inner, x.reshape(-1, T, D), [c.reshape(-1, T, H)])
    for name in ("y0", "d_x"):
        expected[name] = expected[name].reshape(got[name].shape)
    assert_same(got, expected)


@pytest.mark.parametrize("window", EACH_WINDOW)
@without_graphs()
def test_stacked(window):
    """Each layer for itself, with a policy of its own."""
    first = layer_of(WINDOWS[window], return_sequences=True)
    second = layer_of(
        Truncation(4, stride=3), units=3, features=H, seed=4, go_backwards=True
    )
    masking = keras.layers.Masking(-1.0, dtype="float64")
    model = keras.Sequential([masking, first, second])
    model.dtype_policy = keras.DTypePolicy("float64")
    x = random_inputs(B, T, D)
    x[~MASK] = -1.0
    got = evaluate(model, x, training=True)
    y = brute_force(first, x, mask=MASK)["y0"]
    above = brute_force(second, y, mask=MASK)
    below = brute_force(first, x, [above["d_x"]], mask=MASK)
    want = [above["y0"], below["d_x"], *list(below.values())[2:]]
    want += list(above.values())[2:]
    for array, wanted in zip(got.values(), want, strict=True):
        assert relative_error(array, wanted) < FLOAT64


# --- Combinations


@st.composite
def problems(draw):
    flag = st.booleans()
    size = st.integers(1, 4)
    batch, features, units = draw(st.tuples(size, size, size))
    time = draw(st.one_of(st.integers(1, 9), st.sampled_from([12, 17])))
    steps = draw(st.integers(1, time + 2))
    options = {
        "truncation": Truncation(steps, draw(st.integers(1, steps))),
        "units": units,
        "features": features,
        "use_bias": draw(flag),
        "return_sequences": draw(flag),
        "return_state": draw(flag),
        "go_backwards": draw(flag),
        "zero_output_for_mask": draw(flag),
        "adjoint_clipnorm": draw(st.sampled_from([None, None, 0.3, 2.0])),
        "jit_compile": draw(st.sampled_from([False, False, "auto"])),
    }
    x, call = draw_call(draw, batch, time, features, units)
    return options, call, x, draw(st.sampled_from([*MODES, "unknown", "unknown"]))


def check_combination(problem):
    options, call, x, mode = problem
    layer = layer_of(**options)
    expected = brute_force(layer, x, **call)
    if mode == "unknown":
        layer, mode = UnknownLength(layer), "graph"
    got = evaluate(layer, x, mode, training=True, **call)
    assert_near(got, expected)


@examples(3, derandomize=True)
@given(problems())
def test_combination(problem):
    check_combination(problem)


@pytest.mark.slow
@examples(300)
@given(problems())
def test_many_combinations(problem):
    check_combination(problem)


# --- Configuration and saving

POLICIES = [
    Truncation(3),
    Truncation(steps=5, stride=2),
    RandomizedTruncation(2.5),
    RandomizedTruncation(mean_steps=4, seed=7),
]


def test_an_integer_means_chunks():
    assert BPTTRNN(H, truncation=3).truncation == Truncation(3)
    assert BPTTRNN(H).truncation is BPTTRNN(H).adjoint_clipnorm is None
    assert BPTTRNN(H, adjoint_clipnorm=2).adjoint_clipnorm == 2.0


@pytest.mark.parametrize("clip", [None, 1.5], ids=["free", "clipped"])
@pytest.mark.parametrize("policy", [None, *POLICIES], ids=str)
def test_config_round_trip(policy, clip):
    layer = BPTTRNN(H, truncation=policy, adjoint_clipnorm=clip)
    config = json.loads(json.dumps(layer.get_config()))
    again = BPTTRNN.from_config(config)
    assert (again.truncation, again.adjoint_clipnorm) == (policy, clip)
    assert again.get_config() == layer.get_config()
    written = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    again = keras.saving.deserialize_keras_object(written)
    assert (again.truncation, again.adjoint_clipnorm) == (policy, clip)
    if policy is clip is None:
        twin = keras.layers.SimpleRNN.from_config(config)
        assert twin.get_config() == config
    else:
        # Not silently another gradient.
        with pytest.raises((TypeError, ValueError)):
            keras.layers.SimpleRNN.from_config(config)


def model_of(policy, **options):
    """A functional model of unknown length, with a mask."""
    layer = BPTTRNN(H, truncation=policy, return_sequences=True, **options)
    inputs = keras.Input((None, D))
    x = keras.layers.Masking(-9.0)(inputs)
    model = keras.Model(inputs, layer(x))
    layer.cell.set_weights(random_weights())
    model.compile("sgd", "mse")
    return model


def padded_inputs():
    x = random_inputs(B, T, D).astype("float32")
    x[~MASK] = -9.0
    return x


@pytest.mark.parametrize(
    "policy",
    [pytest.param(POLICIES[0], marks=pytest.mark.slow), *POLICIES[1:]],
    ids=str,
)
def test_keras_file(policy, tmp_path):
    """Policy and seed are kept, and training goes on as if nothing was.

    Keras keeps of a generator the seed, not how often it was asked.
    """
    model = model_of(policy, adjoint_clipnorm=1.5, jit_compile=False)
    x, y = padded_inputs(), random_inputs(B, T, H, seed=3)
    if isinstance(policy, Truncation):
        model.train_on_batch(x, y)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    layer = loaded.layers[-1]
    assert (layer.truncation, layer.adjoint_clipnorm) == (policy, 1.5)
    if getattr(policy, "seed", 0) is None:
        return
    for each in (model, loaded):
        each.train_on_batch(x, y)
    for got, want in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_clone_model(policy):
    model = model_of(policy, adjoint_clipnorm=1.5)
    clone = keras.models.clone_model(model)
    layer = clone.layers[-1]
    assert (layer.truncation, layer.adjoint_clipnorm) == (policy, 1.5)
    clone.set_weights(model.get_weights())
    x = padded_inputs()
    np.testing.assert_array_equal(clone(x), model(x))


def test_weights_are_those_of_simplernn():
    """A seed is no weight."""
    theirs = keras.layers.SimpleRNN(H)
    theirs.build((B, T, D))
    for policy in POLICIES:
        ours = BPTTRNN(H, truncation=policy)
        ours.build((B, T, D))
        assert [w.name for w in ours.weights] == [w.name for w in theirs.weights]
        ours.set_weights(theirs.get_weights())


@pytest.mark.parametrize(
    ("window", "clip"),
    few(
        itertools.product(WINDOWS, [None, CLIP]),
        lambda *case: False,
    ),
)
def test_export_keeps_the_truncation(window, clip, tmp_path):
    """Another batch and another length than any at which it was traced."""
    model = model_of(WINDOWS[window], adjoint_clipnorm=clip)
    model.export(tmp_path, verbose=False)
    loaded = tf.saved_model.load(tmp_path)
    x, mask = random_inputs(2, 9, D), rng(5).random((2, 9)) < 0.7
    expected = brute_force(model.layers[-1], x, mask=mask)
    x = tf.constant(np.where(mask[..., None], x, -9.0), tf.float32)
    for mode in ("graph", "eager"):

        def gradients(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = loaded.serve(x)
                loss = tf.reduce_sum(y * rng(2).normal(size=(2, 9, H)))
            weights = {tuple(v.shape): v for v in tape.watched_variables()}
            order = [weights[shape] for shape in ((D, H), (H, H), (H,))]
            return y, *tape.gradient(loss, [x, *order])

        got = MODES[mode](gradients)(x)
        for name, a in zip(expected, got, strict=True):
            assert relative_error(a, expected[name]) < FLOAT32, name


@pytest.mark.slow
def test_saved_training_step(tmp_path):
    """The gradient itself, saved as part of a graph."""
    layer = layer_of(WINDOWS["overlapping"], return_sequences=True)

    class Step(tf.Module):
        def __init__(self):
            self.weights = [v.value for v in layer.trainable_variables]

        @tf.function(
            input_signature=[
                tf.TensorSpec((None, None, D), tf.float64),
                tf.TensorSpec((None, None, H), tf.float64),
            ]
        )
        def gradients(self, x, c):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(c * layer(x, training=True))
            return tape.gradient(loss, self.weights)

    tf.saved_model.save(Step(), str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    for batch, steps in ((B, T), (2, 12), (4, 3)):
        x, c = random_inputs(batch, steps, D), rng(2).normal(size=(batch, steps, H))
        got = loaded.gradients(tf.constant(x), tf.constant(c))
        expected = list(brute_force(layer, x).values())[2:]
        for a, b in zip(got, expected, strict=True):
            assert relative_error(a, b) < FLOAT64


# --- What clipping is for


@pytest.mark.slow
def test_clipping_trains_what_explodes():
    """To sum the last three steps of a feature, from weights that amplify every step."""
    x = rng(3).normal(size=(64, 30, D)).astype("float32")
    y = x[:, -3:, 0].sum(1, keepdims=True)
    losses = {}
    for clip in (None, 0.1):
        keras.utils.set_random_seed(1)
        layer = layer_of(
            units=16,
            activation="relu",
            adjoint_clipnorm=clip,
            dtype="float32",
            jit_compile="auto",
        )
        W, U, b = random_weights(D, 16, radius=1.9)
        layer.cell.set_weights([0.1 * W, U, 0 * b])
        model = keras.Sequential([layer, keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.02), "mse")
        fit = model.fit(x, y, epochs=12, batch_size=16, verbose=0)
        losses[clip] = fit.history["loss"]
    assert not np.isfinite(losses[None][-1])
    # Better than the mean can do: about half as much.
    assert losses[0.1][-1] < 0.8 * np.var(y)
