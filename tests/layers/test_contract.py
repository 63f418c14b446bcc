"""What every layer of the package promises, whatever its cell and its options.

The other side is the layer of Keras in whose place it stands, with the same weights; with
options that Keras has not, `Unrolled`, the cell of Keras step by step. Compared are
outputs, states and the gradients of inputs, initial state and weights, under random
cotangents. A layer is a row of `twins.LAYERS`, a kind of gradient one of `KINDS`.
"""

import functools
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    FLOAT32,
    FLOAT64,
    MODES,
    B,
    D,
    H,
    assert_near,
    assert_same,
    evaluate,
    examples,
    few,
    plain,
    random_inputs,
    relative_error,
    rng,
    without_graphs,
)
from hypothesis import given
from twins import (
    LAYERS,
    Unknown,
    configurations,
    draws,
    fill,
    host_of,
    layer_of,
    sine,
    states_of,
    twins,
)
from unrolled import Unrolled

from keras_bptt import RandomizedTruncation, Truncation

# Longer than any window but one, and a multiple of no block.
T = 7
# Row by row: holes after a masked start; a masked end, N < steps of most windows; nothing
# but masked steps.
MASK = np.array([[0, 1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [0] * 7], bool)

# What the hosts have.
HOSTS = {
    "last output": {},
    "sequence and state": {"return_sequences": True, "return_state": True},
    "no bias": {"use_bias": False, "return_state": True},
    "backwards": {"go_backwards": True, "return_sequences": True},
    "unrolled": {"unroll": True, "return_sequences": True},
    "zero output": {"zero_output_for_mask": True, "return_state": True},
    "zero outputs": {"zero_output_for_mask": True, "return_sequences": True},
    "dropout": {
        "dropout": 0.4,
        "recurrent_dropout": 0.4,
        "seed": 3,
        "return_sequences": True,
    },
    "regularized": {
        # Not L1, which some versions of Keras have in float32 alone.
        "kernel_regularizer": "l2",
        "recurrent_regularizer": keras.regularizers.L2(0.2),
        "bias_regularizer": keras.regularizers.L2(0.3),
    },
}
SEQUENCE = {"return_sequences": True}
OVERLAPPING = Truncation(5, stride=2)
# What they have not: each is exact in its own way, or leaves paths out.
KINDS = {
    "plain": SEQUENCE,
    "checkpoints": {"checkpoint_every": 3} | SEQUENCE,
    "checkpoints, last output": {"checkpoint_every": "sqrt"},
    "two steps an iteration": {"unroll": 2} | SEQUENCE,
    "chunks": {"truncation": 3, "return_state": True} | SEQUENCE,
    "overlapping windows": {"truncation": OVERLAPPING} | SEQUENCE,
    "sliding windows": {"truncation": Truncation(3, stride=1)} | SEQUENCE,
    "last window": {"truncation": 3, "return_state": True},
    "randomized": {"truncation": RandomizedTruncation(2.5, seed=7)} | SEQUENCE,
    "clipped": {"adjoint_clipnorm": 0.7} | SEQUENCE,
    # Where a gradient grows.
    "growth clipped": {"adjoint_max_growth": 1.0, "activation": "linear"},
    "output layer": {"output_units": 2, "output_activation": "softmax"} | SEQUENCE,
    "output layer, last output": {"output_units": 2, "return_state": True},
    "all at once": {
        "truncation": OVERLAPPING,
        "checkpoint_every": 2,
        "adjoint_clipnorm": 0.7,
        "adjoint_max_growth": 1.5,
        "output_units": 2,
        "output_activation": "tanh",
        "go_backwards": True,
        "use_bias": False,
    }
    | SEQUENCE,
}


@pytest.fixture(params=few([(name,) for name in LAYERS], "BPTTRNN".__eq__))
def name(request):
    """The name of a layer."""
    return request.param


def kinds(*chosen):
    """Each kind; those that are not chosen take long, together."""
    return pytest.mark.parametrize(
        "kind", few([(k,) for k in KINDS], chosen.__contains__)
    )


def dead(options):
    """The gradients that may vanish: no window is as long as the sequence."""
    cut = options.get("truncation") and not options.get("return_sequences")
    return ("d_state0",) if cut else ()


def compare(name, options, x, mode="plain", *, order=1, nan=False, **call):
    """What `evaluate` gives of the layer, and of what it is compared with.

    With `nan` the layer, whose other side cannot, reads NaN at masked steps.
    """
    theirs, ours = twins(name, **options)
    if mode.startswith("unknown"):
        ours, mode = Unknown(ours), "graph" if mode == "unknown" else "xla"
    side = plain(mode, draws(options, call))
    expected = evaluate(theirs, x, side, order=order, **call)
    if nan and "mask" in call:
        x = np.where(call["mask"][..., None], x, np.nan)
    got = evaluate(ours, x, mode, order=order, **call)
    return got, expected


def check(name, options, mode="plain", tolerance=FLOAT64, **call):
    """Random inputs of T steps and an initial state, in training."""
    call = {"training": True, "state": states_of(name)} | call
    got, expected = compare(name, options, random_inputs(B, T, D), mode, **call)
    assert_same(got, expected, tolerance, dead(options))


# --- What the layer is compared with


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("option", HOSTS)
def test_unrolled_is_the_host(name, option, masked):
    """Two descriptions of a layer, the host's own and the one that can do more."""
    host = host_of(name, dtype="float64", **HOSTS[option])
    call = {"mask": MASK} if masked else {}
    call |= {"state": states_of(name), "training": True}
    results = []
    for layer in (host, Unrolled(host)):
        keras.utils.set_random_seed(0)
        host.cell.seed_generator.state.assign([3, 0])
        results.append(evaluate(layer, random_inputs(B, T, D), "plain", **call))
    assert_same(results[1], results[0])


def test_truncation_and_clipping_change_the_gradient(name):
    """Else the comparisons would say nothing of them."""
    limits = ("truncation", "adjoint_clipnorm", "adjoint_max_growth")
    for kind in KINDS:
        options, x = KINDS[kind], random_inputs(B, T, D)
        exact = {key: value for key, value in options.items() if key not in limits}
        if exact == options:
            continue
        # Also where gates shrink a gradient some of it grows.
        large = {"radius": 3.0}
        whole = evaluate(layer_of(name, **exact, **large), x, "plain")
        other = evaluate(layer_of(name, **options, **large), x, "plain", training=True)
        assert relative_error(other["y0"], whole["y0"]) < FLOAT64
        for key in ("d_x", "d_0_kernel", "d_1_recurrent_kernel"):
            assert relative_error(other[key], whole[key]) > 1e-2, (kind, key)


# --- Options


# Some in each mode; all of them are drawn below.
IN_MODES = {
    "eager": ["all at once"],
    "graph": ["dropout", "regularized", "chunks", "randomized"],
    "xla": ["checkpoints", "sliding windows", "output layer"],
    "unknown": ["backwards", "overlapping windows", "growth clipped", "all at once"],
    "unknown xla": ["last window"],
}


@pytest.mark.parametrize(
    ("case", "mode"),
    few(
        [
            (case, mode)
            for case, mode in itertools.product(HOSTS | KINDS, IN_MODES)
            if case != "unrolled" or mode in MODES
        ],
        lambda case, mode: case in IN_MODES[mode],
    ),
)
def test_each_option_in_each_mode(name, case, mode):
    check(name, (HOSTS | KINDS)[case], mode, mask=MASK)


@kinds("overlapping windows", "clipped")
def test_compiled_in_a_plain_graph(name, kind):
    """As `fit` runs it: the passes compiled, the graph around them not."""
    if kind == "randomized":
        pytest.skip("drawn outside of what is compiled: as in a graph")
    check(name, KINDS[kind] | {"jit_compile": True}, "graph", mask=MASK)


def check_drawn(drawn, order=1, tolerance=FLOAT64):
    name, options, call, x, mode = drawn
    got, expected = compare(name, options, x, mode, order=order, nan=True, **call)
    assert_near(got, expected, tolerance)


@examples(275, derandomize=True)
@given(configurations(modes=["plain"]))
def test_drawn(drawn):
    """Any options at once."""
    check_drawn(drawn)


@examples(10, derandomize=True)
@given(configurations(modes=["graph", "graph", "xla", "unknown"]))
def test_drawn_in_graphs(drawn):
    check_drawn(drawn)


@examples(15, derandomize=True)
@given(configurations(modes=["plain"], order=2))
def test_drawn_second_order(drawn):
    check_drawn(drawn, order=2, tolerance=10 * FLOAT64)


@pytest.mark.slow
@examples(1900)
@given(configurations(modes=["plain", "graph", "unknown"]))
def test_many_drawn(drawn):
    check_drawn(drawn)


@pytest.mark.slow
@examples(100)
@given(configurations(modes=["xla"]))
def test_many_drawn_under_xla(drawn):
    """As many as a process takes: what XLA compiles for a case keeps hundreds of maps.

    Linux has 65,530 maps for a process, which crashes then.
    """
    check_drawn(drawn)


@pytest.mark.slow
@examples(300)
@given(configurations(order=2))
def test_many_drawn_second_order(drawn):
    check_drawn(drawn, order=2, tolerance=10 * FLOAT64)


# --- Structure


LONG = [T, Truncation(20, stride=1), Truncation(T, stride=3)]


@pytest.mark.parametrize(
    ("window", "jit_compile", "sequence", "known"),
    few(
        itertools.product(LONG, [False, "auto"], [True, False], [True, False]),
        lambda *case: (
            (case[0] == T and not case[1] and case[3])
            or case in [(LONG[1], "auto", True, False), (LONG[2], False, False, False)]
        ),
    ),
)
def test_one_window_is_full_backpropagation(name, window, jit_compile, sequence, known):
    """The same bits, under the same way of compiling."""
    results, mode = [], "plain" if known and not jit_compile else "graph"
    options = {"return_sequences": sequence, "jit_compile": jit_compile}
    for truncation in (None, window):
        layer = layer_of(name, truncation=truncation, **options)
        layer = layer if known else Unknown(layer)
        call = {"state": states_of(name), "training": True, "mask": MASK}
        results.append(evaluate(layer, random_inputs(B, T, D), mode, **call))
    for key, array in results[0].items():
        np.testing.assert_array_equal(results[1][key], array, err_msg=key)


@pytest.mark.parametrize(
    "window", [1, 3, OVERLAPPING, Truncation(3, stride=1)], ids=str
)
@without_graphs()
def test_gradient_ends_with_the_window(name, window):
    """What lies outside is exactly zero, what lies inside is not."""
    layer = layer_of(name, truncation=window, **SEQUENCE)
    steps, stride = layer.truncation.steps, layer.truncation.stride
    x = tf.constant(random_inputs(B, T, D))
    states = [tf.constant(state) for state in states_of(name)]
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([x, *states])
        y = layer(x, initial_state=states, training=True)
        losses = [tf.reduce_sum(y[:, t] ** 2) for t in range(T)]
    for t, loss in enumerate(losses, 1):
        d_x, *d_states = tape.gradient(loss, [x, *states])
        d_state = np.concatenate(d_states, axis=1)
        end = T - stride * ((T - t) // stride)
        reached = np.array([max(1, end - steps + 1) <= j <= t for j in range(1, T + 1)])
        size = np.max(np.abs(d_x), axis=2)
        assert np.all(size[:, reached] > 1e-3)
        assert np.all(size[:, ~reached] == 0)
        assert np.all(np.max(np.abs(d_state), axis=1) > 1e-3) == (end <= steps)
        assert np.any(d_state != 0) == (end <= steps)


def places(kind, lengths, length):
    """A mask in which rows have so many real steps, at the right, the left or anywhere."""
    steps, mask = np.arange(length), np.zeros((len(lengths), length), bool)
    for row, N in enumerate(lengths):
        anywhere = rng(row).choice(length, N, replace=False)
        real = {"right": steps[:N], "left": steps[length - N :], "anywhere": anywhere}
        mask[row, real[kind]] = True
    return mask


@kinds("plain", "overlapping windows", "last window", "clipped", "growth clipped")
@without_graphs()
def test_padding_changes_nothing(name, kind):
    """Every example is what it is alone, wherever masked steps come between its own."""
    # Backwards the outputs are in another order than the steps they belong to.
    options = KINDS[kind] | {"return_state": True, "go_backwards": False}
    if kind == "randomized":
        pytest.skip("draws for each step, masked ones too")
    layer, lengths = layer_of(name, **options), [7, 2, 4]  # N <= steps < T, and more
    random, sequence = rng(6), options.get("return_sequences")
    rows = [random.normal(size=(N, D)) for N in lengths]
    sizes = (2, LAYERS[name].states, len(lengths), H)
    state, ds = random.normal(size=sizes)
    units = layer.output_units or H
    dy = [random.normal(size=(N, units) if sequence else units) for N in lengths]

    def gradients(x, dy, ds, state, mask=None):
        x, state = tf.constant(x), [tf.constant(s) for s in state]
        mask = None if mask is None else tf.constant(mask)
        with tf.GradientTape() as tape:
            tape.watch([x, *state])
            outputs = layer(x, initial_state=state, mask=mask, training=True)
        sources = [x, *state, *(v.value for v in layer.trainable_variables)]
        cotangents = [tf.constant(dy), *map(tf.constant, ds)]
        return [d.numpy() for d in tape.gradient(outputs, sources, cotangents)]

    def padded(arrays, mask, padding):
        out = np.full((*mask.shape, *arrays[0].shape[1:]), padding)
        for row, real, values in zip(out, mask, arrays, strict=True):
            row[real] = values
        return out

    alone = [
        gradients(rows[i][None], dy[i][None], ds[:, i : i + 1], state[:, i : i + 1])
        for i in range(len(rows))
    ]
    d_x, *others = zip(*alone, strict=True)
    states = LAYERS[name].states
    want = [np.concatenate(d) for d in others[:states]]
    want += [sum(d) for d in others[states:]]
    for where, length in (("right", 8), ("left", 8), ("anywhere", 12)):
        mask = places(where, lengths, length)
        c = padded(dy, mask, 0.0) if sequence else np.stack(dy)
        got = gradients(padded(rows, mask, np.nan), c, ds, state, mask)
        each = [padded([d[0] for d in d_x], mask, 0.0), *want]
        for a, b in zip(got, each, strict=True):
            assert relative_error(a, b) < 1e-12, (where, length)
        assert np.all(got[0][~mask] == 0)


# --- Sizes and types


@pytest.mark.parametrize(
    ("size", "kind", "mode"),
    [
        *itertools.product(
            [(0, T), (1, T), (B, 1)],
            ["plain", "last window", "all at once"],
            ["plain"],
        ),
        ((0, T), "plain", "xla"),
        ((0, T), "plain", "eager"),
        ((B, 1), "all at once", "xla"),
    ],
    ids=str,
)
def test_sizes(name, size, kind, mode):
    batch, steps = size
    call = {"mask": rng(1).random(size) < 0.8, "state": states_of(name, batch)}
    x, call = random_inputs(batch, steps, D), call | {"training": True}
    options = KINDS[kind] | {"batch": batch}
    if batch:
        got, expected = compare(name, options, x, mode, **call)
        assert_same(got, expected, dead=expected)
        return
    # Keras' LSTM fails in eager mode, in adding its bias.
    layer = layer_of(name, **options)
    got = evaluate(layer, x, mode, **call)
    assert got["y0"].size == got["d_x"].size == 0
    for i, weight in enumerate(layer.weights):
        if weight.trainable:
            np.testing.assert_array_equal(got[f"d_{i}_{weight.name}"], 0 * weight)


@pytest.mark.parametrize("units", [1, H])
@pytest.mark.parametrize("features", [1, D])
def test_one_unit_and_one_feature(name, units, features):
    x, options = random_inputs(B, T, features), {"units": units, "features": features}
    call = {"state": states_of(name, units=units), "mask": MASK}
    assert_same(*compare(name, options | SEQUENCE, x, **call))


@kinds("plain", "overlapping windows", "growth clipped", "output layer")
def test_float32(name, kind):
    check(name, KINDS[kind] | {"dtype": "float32"}, tolerance=FLOAT32, mask=MASK)


# Half the spacing of numbers next to 1. Every step is rounded; some 40 roundings.
MIXED = {"mixed_float16": 40 * 2**-11, "mixed_bfloat16": 40 * 2**-8}


@pytest.mark.parametrize(
    ("kind", "policy", "mode"),
    few(
        itertools.product(KINDS, MIXED, ["plain", "graph", "xla"]),
        lambda *case: (
            case
            in [
                ("plain", "mixed_float16", "xla"),
                ("plain", "mixed_bfloat16", "graph"),
                ("output layer", "mixed_float16", "plain"),
                ("checkpoints", "mixed_bfloat16", "plain"),
                ("overlapping windows", "mixed_float16", "plain"),
                ("clipped", "mixed_bfloat16", "plain"),
                ("growth clipped", "mixed_float16", "plain"),
                ("all at once", "mixed_bfloat16", "plain"),
            ]
        ),
    ),
)
def test_mixed_precision(name, kind, policy, mode):
    """To the rounding of some 40 sums what it is in float64, and of the right dtypes."""
    options = KINDS[kind]
    if policy == "mixed_float16" and "adjoint_clipnorm" in options:
        pytest.skip("refused: the loss is scaled, and what is clipped with it")
    if kind == "randomized" and mode == "xla":
        pytest.skip("XLA draws other factors")
    theirs = host_of(name, dtype="float64", **options)
    ours = layer_of(name, dtype=policy, **options)
    call = {"state": states_of(name), "mask": MASK, "training": True}
    x = random_inputs(B, T, D)
    expected = evaluate(theirs, x, "plain", **call)
    got = evaluate(ours, x, mode, **call)
    assert got["y0"].dtype == got["d_x"].dtype == tf.as_dtype(ours.compute_dtype)
    assert got["d_0_kernel"].dtype == np.float32
    for key, array in expected.items():
        assert np.all(np.isfinite(got[key].astype("float32"))), key
        if key not in dead(options):
            assert relative_error(got[key], array) < MIXED[policy], key


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_integer_inputs(name, dtype):
    x = rng().integers(0, 3, (B, T, D)).astype(dtype)
    for kind in ("plain", "overlapping windows"):
        assert_same(*compare(name, KINDS[kind], x, training=True))


# --- Lengths: several blocks, in blocks as small as in all tests and as large as usual


@pytest.mark.parametrize(
    ("kind", "steps", "masked"),
    few(
        # A multiple of many sizes; primes, which leave a last block of its own.
        itertools.product(
            [
                k
                for k in KINDS
                if k not in ("sliding windows", "two steps an iteration")
            ],
            [48, 29, 53],
            [False, True],
        ),
        lambda *case: (
            case
            in [
                ("plain", 53, True),
                ("clipped", 29, False),
                ("all at once", 29, True),
            ]
        ),
    ),
)
def test_long_sequence(name, kind, steps, masked):
    mask = rng(1).random((B, steps)) < 0.7
    mask[1, :11] = mask[1, -11:] = mask[2] = False
    call = {"state": states_of(name), "training": True} | (
        {"mask": mask} if masked else {}
    )
    options, x = KINDS[kind], random_inputs(B, steps, D)
    if (
        options.get("truncation") == OVERLAPPING
    ):  # each block is a walk on the other side
        options = options | {"truncation": Truncation(20, stride=13)}
    got, expected = compare(name, options, x, "graph", **call)
    assert_near(got, expected)


@pytest.mark.parametrize(
    ("kind", "mode"),
    few(
        itertools.product(
            [
                k
                for k in KINDS
                if k not in ("sliding windows", "two steps an iteration")
            ],
            ["graph", "xla", "unknown"],
        ),
        lambda kind, mode: (
            mode
            == {
                "plain": "unknown",
                "checkpoints": "graph",
                "checkpoints, last output": "unknown",
                "chunks": "graph",
                "last window": "unknown",
                "clipped": "xla",
                "growth clipped": "graph",
                "output layer": "unknown",
            }.get(kind)
        ),
    ),
)
def test_blocks_as_users_have_them(name, kind, mode, usual_sizes):
    """150 steps are some of the blocks of a loop, and a rest."""
    options, steps = KINDS[kind], 150
    if "truncation" in options:
        longer = {3: 75, OVERLAPPING: Truncation(100, stride=75)}
        window = options["truncation"]
        options = options | {"truncation": longer.get(window, window)}
    mask = rng(1).random((B, steps)) < 0.9
    mask[1, -40:] = False
    call = {"state": states_of(name), "mask": mask, "training": True}
    got, expected = compare(name, options, random_inputs(B, steps, D), mode, **call)
    assert_near(got, expected)


@pytest.mark.parametrize(
    ("kind", "mode"),
    few(
        itertools.product(
            ["plain", "checkpoints", "checkpoints, last output", "dropout"],
            ["graph", "xla"],
        ),
        lambda *case: case in [("dropout", "graph"), ("checkpoints", "graph")],
    ),
)
def test_one_graph_for_every_length_and_batch(name, kind, mode):
    options = (HOSTS | KINDS)[kind]
    theirs, ours = twins(name, **options)
    traces, units = [], [None] * ("return_sequences" in options) + [None, H]

    def gradients(layer, x, mask, cotangent):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, mask=mask, training=True)
            loss = tf.reduce_sum(y * cotangent)
        weights = [v.value for v in layer.trainable_variables]
        return [y, *tape.gradient(loss, [x, *weights])]

    @tf.function(
        jit_compile=mode == "xla",
        autograph=False,
        input_signature=[
            tf.TensorSpec((None, None, D), tf.float64),
            tf.TensorSpec((None, None), tf.bool),
            tf.TensorSpec(units, tf.float64),
        ],
    )
    def compiled(*tensors):
        traces.append(tensors)
        return gradients(ours, *tensors)

    reference = functools.partial(gradients, theirs)
    if mode == "xla" and kind == "dropout":  # XLA draws other masks
        reference = tf.function(reference, jit_compile=True)
    for batch, steps in ((B, T), (2, 9), (1, 1), (2, 8), (2, 37)):
        shape = (batch, steps, H) if len(units) == 3 else (batch, H)
        tensors = [
            tf.constant(random_inputs(batch, steps, D)),
            tf.constant(rng(steps).random((batch, steps)) < 0.8),
            tf.constant(random_inputs(*shape, seed=3)),
        ]
        for got, want in zip(compiled(*tensors), reference(*tensors), strict=True):
            assert np.max(np.abs(got - want)) < FLOAT64 * max(1, np.max(np.abs(want)))
    assert len(traces) == 1


def test_layers_of_several_sizes_side_by_side(name):
    """Whatever eager calls share, it is not the number of units or features."""
    for units, features in ((4, 3), (2, 4), (5, 2), (4, 7), (2, 1)):
        options = {"units": units, "features": features} | SEQUENCE
        state = states_of(name, units=units)
        x = random_inputs(B, T, features)
        assert_same(*compare(name, options, x, "eager", state=state))


# --- State


@kinds("plain", "checkpoints", "overlapping windows", "output layer, last output")
@without_graphs()
def test_stateful(name, kind):
    """The states go on from batch to batch, and the gradient stops between them."""
    layer = layer_of(name, stateful=True, **KINDS[kind])
    theirs = host_of(name, dtype="float64", **KINDS[kind])
    first, second = (random_inputs(B, T, D, seed=seed) for seed in (1, 4))
    x = tf.constant(first)
    with tf.GradientTape() as tape:
        tape.watch(x)
        layer(x, training=True)
        states = [s.numpy() for s in layer.states]
        loss = tf.reduce_sum(tf.nest.flatten(layer(second, training=True))[0])
    assert tape.gradient(loss, x) is None
    for _ in range(2):
        layer.reset_state()
        assert not any(np.any(s) for s in layer.states)
        layer(x, training=True)
        for state, before in zip(layer.states, states, strict=True):
            np.testing.assert_array_equal(state, before)
    if kind == "randomized":  # which has drawn for some calls
        theirs.draws.state.assign(layer._truncation_draws.state)
    got = evaluate(layer, second, "plain", training=True)
    expected = evaluate(theirs, second, "plain", training=True, state=states)
    for i in range(len(states)):
        del expected[f"d_state{i}"]
    assert_same(got, expected)


@pytest.mark.parametrize("mode", MODES)
def test_stateful_is_as_the_host(name, mode):
    layers = twins(name, stateful=True, **SEQUENCE)
    calls = layers[0], MODES[mode](layers[1])
    for i in range(4):
        if i == 3:
            for layer in layers:
                layer.reset_state()
        expected, got = (call(random_inputs(B, T, D, seed=i)) for call in calls)
        assert relative_error(got, expected) < FLOAT64
        for pair in zip(*(layer.states for layer in layers), strict=True):
            assert relative_error(*pair) < FLOAT64


def test_stateful_in_mixed_precision(name):
    theirs, ours = twins(name, stateful=True, dtype="mixed_float16")
    for i in range(3):
        x = random_inputs(B, T, D, seed=i)
        assert relative_error(ours(x), theirs(x)) < MIXED["mixed_float16"]
    assert ours.states[0].dtype == theirs.states[0].dtype


def test_gradient_of_the_state_alone(name):
    """The cotangent of the returned state, without one of the outputs."""
    for kind in ("plain", "chunks"):
        gradients = []
        for layer in twins(name, **KINDS[kind] | {"return_state": True}):
            x = tf.constant(random_inputs(B, T, D))
            with tf.GradientTape() as tape:
                tape.watch(x)
                _, *states = layer(x, mask=tf.constant(MASK), training=True)
                loss = sum(tf.reduce_sum(s * rng().normal(size=(B, H))) for s in states)
            gradients.append(tape.gradient(loss, x))
        assert np.max(np.abs(gradients[0])) > 1e-2
        assert relative_error(gradients[1], gradients[0]) < FLOAT64


@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_encoder_and_decoder(name, mode):
    """The states go from layer to layer; their gradients come back."""
    results = []
    encoders = twins(name, return_state=True)
    decoders = twins(name, radius=0.9, **SEQUENCE)
    for encoder, decoder, way in zip(encoders, decoders, ("plain", mode), strict=True):
        inputs = keras.Input((T, D), dtype="float64")
        _, *states = encoder(inputs)
        model = keras.Model(inputs, decoder(inputs, initial_state=states))
        model.dtype_policy = "float64"
        results.append(evaluate(model, random_inputs(B, T, D), way))
    assert_same(results[1], results[0])


# --- Dropout


@pytest.mark.parametrize("kind", ["plain", "overlapping windows"])
def test_no_dropout_without_training(name, kind):
    options = KINDS[kind] | {"dropout": 0.4, "recurrent_dropout": 0.4, "seed": 3}
    x = random_inputs(B, T, D)
    still = compare(name, options, x)
    trained = compare(name, options, x, training=True)
    for results in (still, trained):
        assert_same(*results)
    assert relative_error(trained[0]["y0"], still[0]["y0"]) > 1e-2


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_dropout_draws_anew_at_every_call(name, mode):
    runs = []
    for layer in twins(name, dropout=0.4, recurrent_dropout=0.4, seed=3):
        call = MODES[mode](layer)
        x = random_inputs(B, T, D)
        runs.append([call(x, training=True).numpy() for _ in range(3)])
    assert relative_error(runs[1], runs[0]) < FLOAT64
    assert relative_error(runs[1][0], runs[1][1]) > 1e-2


def test_same_global_seed_gives_the_same_weights_and_dropout(name):
    """A function is probed when the layer is built; that must draw nothing."""
    outputs = []
    # XLA rounds otherwise than TensorFlow's own loop.
    for make in (
        LAYERS[name].host,
        functools.partial(LAYERS[name].layer, jit_compile=False),
    ):
        keras.utils.set_random_seed(4)
        layer = make(H, activation=sine, dropout=0.5, recurrent_dropout=0.5)
        outputs.append(layer(random_inputs(B, T, D), training=True).numpy())
    np.testing.assert_array_equal(*outputs)


# --- Around the layer


def as_float64(model):
    model.dtype_policy = keras.DTypePolicy("float64")
    return model


class Both(keras.layers.Layer):
    """What `Bidirectional` is: two layers, the second of which goes backwards."""

    def __init__(self, there, back):
        super().__init__(dtype="float64")
        self.there, self.back, self.supports_masking = there, back, True

    def call(self, x, mask=None, training=False):
        y = self.there(x, mask=mask, training=training)
        z = self.back(x, mask=mask, training=training)
        return tf.concat([y, tf.reverse(z, [1]) if len(z.shape) == 3 else z], -1)


@kinds(
    "checkpoints", "overlapping windows", "output layer", "output layer, last output"
)
@without_graphs()
def test_bidirectional(name, kind):
    options = KINDS[kind] | {"return_state": False, "go_backwards": False}
    if kind == "randomized":
        pytest.skip("each direction draws: see `test_layer_truncation`")
    sequence = options.get("return_sequences", False)
    # Keras' Bidirectional sets it for sequences: y_t is 0 at masked steps.
    told = options | {"zero_output_for_mask": sequence}
    there, back = twins(name, **told), twins(name, **told | {"go_backwards": True})
    fill(back[0], seed=7)
    layer = LAYERS[name].layer(H, dtype="float64", **options)
    ours = keras.layers.Bidirectional(layer, dtype="float64")
    ours.build((B, T, D))
    ours.set_weights([*there[0].get_weights(), *back[0].get_weights()])
    x, call = random_inputs(B, T, D), {"mask": MASK, "training": True}
    expected = evaluate(Both(there[0], back[0]), x, **call)
    assert_same(evaluate(ours, x, **call), expected)
    for key in ("truncation", "checkpoint_every", "output_units"):
        assert getattr(ours.backward_layer, key) == getattr(layer, key)


def bidirectional(make, merge_mode, **options):
    # Keras makes two layers of the given one, and gives each a seed of its own.
    keras.utils.set_random_seed(4)
    layer = keras.layers.Bidirectional(
        make(H, dtype="float64", **options), merge_mode=merge_mode, dtype="float64"
    )
    layer.build((B, T, D))
    fill(layer)
    return layer


@pytest.mark.parametrize(
    ("merge_mode", "sequence", "mode"),
    [
        ("sum", True, "plain"),
        ("mul", False, "plain"),
        (None, True, "plain"),
        ("concat", False, "graph"),
        pytest.param("concat", True, "xla", marks=pytest.mark.slow),
    ],
)
def test_bidirectional_is_as_of_the_host(name, merge_mode, sequence, mode):
    options = {"return_sequences": sequence, "return_state": True, "dropout": 0.3}
    theirs, ours = (
        bidirectional(make, merge_mode, **options)
        for make in (LAYERS[name].host, LAYERS[name].layer)
    )
    call = {
        "mask": MASK,
        "training": True,
        "state": states_of(name) + [2 * s for s in states_of(name)],
    }
    expected = evaluate(theirs, random_inputs(B, T, D), plain(mode), **call)
    assert_same(evaluate(ours, random_inputs(B, T, D), mode, **call), expected)


@kinds("plain", "overlapping windows", "output layer, last output")
def test_time_distributed(name, kind):
    options = KINDS[kind] | {"return_state": False}
    x, results = random_inputs(B, 2, T, D), []
    for layer in twins(name, **options):
        layer = keras.layers.TimeDistributed(layer, dtype="float64")
        layer.build(x.shape)
        results.append(evaluate(layer, x, "plain", training=True))
    assert_same(results[1], results[0])


@pytest.mark.parametrize(
    "mode", ["plain", pytest.param("graph", marks=pytest.mark.slow)]
)
def test_stacked(name, mode):
    """Behind a mask, one layer above another, each with options of its own."""
    below = KINDS["overlapping windows"]
    above = KINDS["all at once"] | {"features": H, "units": 3}
    below, above = twins(name, **below), twins(name, **above)
    x, results = random_inputs(B, T, D), []
    x[~MASK] = -1.0
    for first, second, way in zip(below, above, ("plain", mode), strict=True):
        masking = keras.layers.Masking(-1.0, dtype="float64")
        dropout = keras.layers.Dropout(0.3, seed=1, dtype="float64")
        model = as_float64(keras.Sequential([masking, first, dropout, second]))
        results.append(evaluate(model, x, way, training=True))
    assert_same(results[1], results[0])


def test_shared_by_two_inputs(name):
    """One layer, called twice: the gradients of its weights add up."""
    results = []
    for layer, way in zip(
        twins(name, **KINDS["plain"]), ("plain", "graph"), strict=True
    ):
        inputs = keras.Input((T, D), dtype="float64")
        outputs = layer(inputs)[:, 1:] * layer(inputs[:, 1:] ** 2)
        model = as_float64(keras.Model(inputs, outputs))
        results.append(evaluate(model, random_inputs(B, T, D), way))
    assert_same(results[1], results[0])


OWNERS = ["plain", "output layer"]


@pytest.mark.parametrize("kind", OWNERS)
def test_losses_of_regularizers(name, kind):
    options = KINDS[kind] | HOSTS["regularized"]
    theirs, ours = twins(name, **options)
    assert relative_error(sum(ours.losses), sum(theirs.losses)) < FLOAT64
    assert float(sum(ours.losses)) > 0


@pytest.mark.parametrize("mode", ["plain", "graph"])
@pytest.mark.parametrize("sequence", [False, True], ids=["last output", "sequence"])
def test_activity_regularizer(name, sequence, mode):
    """Of what the layer returns: outputs, and the state where it is one of them."""
    layers = twins(name, return_sequences=sequence, return_state=sequence)
    for layer in layers:
        # Not an argument here: SimpleRNN takes that, and in some versions drops it.
        layer.activity_regularizer = keras.regularizers.L2(0.3)
    expected, got = (
        evaluate(layer, random_inputs(B, T, D), way)
        for layer, way in zip(layers, ("plain", mode), strict=True)
    )
    assert_same(got, expected)
    assert float(sum(layers[0].losses)) > 0


CONSTRAINTS = {
    "kernel_constraint": "non_neg",
    "recurrent_constraint": keras.constraints.MaxNorm(0.7),
    "bias_constraint": "unit_norm",
}


@pytest.mark.parametrize("kind", OWNERS)
def test_constraints(name, kind):
    """One step of training leaves the weights where it leaves those of Keras."""
    weights = []
    for layer in twins(name, **KINDS[kind] | CONSTRAINTS):
        model = as_float64(keras.Sequential([layer]))
        model.compile("sgd", "mse")
        x = random_inputs(B, T, D)
        model.train_on_batch(x, np.tanh(random_inputs(*model(x).shape, seed=3)))
        weights.append(model.get_weights())
    for expected, got in zip(*weights, strict=True):
        assert relative_error(got, expected) < FLOAT64
    assert np.min(weights[1][0]) == 0


@pytest.mark.parametrize("kind", OWNERS)
@without_graphs()
def test_frozen(name, kind):
    """Weights that are not trained leave the gradient of the inputs as it is."""
    theirs, ours = twins(name, **KINDS[kind])
    theirs.trainable = ours.trainable = False
    results = [evaluate(layer, random_inputs(B, T, D)) for layer in (theirs, ours)]
    assert list(results[1]) == ["y0", "d_x"]
    assert_same(results[1], results[0])


# --- Masks


FULL = {"left": [3, 7, 1], "right": [3, 7, 1], "anywhere": [4, 5, 3]}


@pytest.mark.parametrize("kind", ["plain", "chunks", "last window"])
@pytest.mark.parametrize("where", [*FULL, "everything", "nothing"])
def test_masks(name, where, kind):
    edges = {"everything": np.zeros((B, T), bool), "nothing": np.ones((B, T), bool)}
    mask = edges[where] if where in edges else places(where, FULL[where], T)
    options = KINDS[kind] | {"return_state": True}
    call = {"state": states_of(name), "training": True, "mask": mask}
    assert_near(*compare(name, options, random_inputs(B, T, D), **call))


@pytest.mark.parametrize("dtype", ["bool", "float32", "int32"])
@pytest.mark.parametrize("rank", [2, 3])
def test_mask_of_any_type_and_either_rank(name, rank, dtype):
    mask = MASK.astype(dtype)
    theirs, ours = twins(name, **SEQUENCE)
    expected = evaluate(theirs, random_inputs(B, T, D), "plain", mask=MASK)
    mask = mask[..., None] if rank == 3 else mask
    assert_same(evaluate(ours, random_inputs(B, T, D), "plain", mask=mask), expected)


def test_mask_of_an_embedding(name):
    """It reaches the layer, and goes on to the next."""
    tokens = rng().integers(1, 9, (B, T)) * MASK
    results = []
    for layer, way in zip(twins(name, **SEQUENCE), ("plain", "graph"), strict=True):
        keras.utils.set_random_seed(1)
        embedding = keras.layers.Embedding(
            9, D, mask_zero=True, embeddings_initializer="normal", dtype="float64"
        )
        model = as_float64(keras.Sequential([embedding, layer]))
        model.build((B, T))
        results.append(evaluate(model, tokens, way))
        np.testing.assert_array_equal(layer(embedding(tokens))._keras_mask, MASK)
    assert_same(results[1], results[0])


@pytest.mark.parametrize(
    ("padding", "activation", "mode"),
    [
        *itertools.product([np.nan, np.inf], ["tanh", "gelu", "softmax"], ["plain"]),
        (np.nan, "gelu", "xla"),
    ],
)
def test_padding_of_nan_is_not_seen(name, padding, activation, mode):
    """Keras has no finite gradient here: it multiplies the padding by zero."""
    layer = layer_of(name, activation=activation, return_state=True, **SEQUENCE)
    x, results = random_inputs(B, T, D), []
    for value in (0.0, padding):
        x[~MASK] = value
        results.append(
            evaluate(layer, x, mode, state=states_of(name), mask=MASK, training=True)
        )
    assert_same(results[1], results[0], tolerance=0.0)
    assert np.all(results[1]["d_x"][~MASK] == 0)


@pytest.mark.parametrize("activation", ["tanh", "relu", "softmax", "gelu"])
def test_nan_and_infinity_come_out_as_of_the_host(name, activation):
    theirs, ours = twins(name, activation=activation, **SEQUENCE)
    for value in (np.nan, np.inf, -np.inf):
        x = random_inputs(B, T, D)
        x[0, 2, 1] = value
        with without_graphs():
            np.testing.assert_allclose(ours(x), theirs(x), rtol=FLOAT64, atol=FLOAT64)


# --- Shapes


@pytest.mark.parametrize("state", [False, True], ids=["alone", "state"])
@pytest.mark.parametrize("sequence", [False, True], ids=["last output", "sequence"])
@pytest.mark.parametrize("outputs", [None, 2])
def test_shapes(name, outputs, sequence, state):
    """Of symbolic inputs, of `compute_output_shape`, in a graph, and of the host."""
    options = {"return_sequences": sequence, "return_state": state}
    options |= {"output_units": outputs, "dtype": "float32"}
    layer, units = layer_of(name, **options), outputs or H
    states = len(tf.nest.flatten(layer.cell.state_size)) * state
    for batch, steps in ((None, None), (B, T)):
        inputs = keras.Input(batch_shape=(batch, steps, D))
        expected = [(batch, steps, units) if sequence else (batch, units)]
        expected += [(batch, H)] * states
        assert [tuple(y.shape) for y in tf.nest.flatten(layer(inputs))] == expected
        got = layer.compute_output_shape((batch, steps, D))
        assert [tuple(s) for s in (got if state else [got])] == expected
    traced = []

    @tf.function(input_signature=[tf.TensorSpec((None, T, D))], autograph=False)
    def call(x):
        outputs = tf.nest.flatten(layer(x, training=True))
        traced.append([tuple(y.shape) for y in outputs])
        return outputs

    assert [tuple(y.shape) for y in call(tf.zeros((B, T, D)))] == expected
    assert traced == [[(None, *shape[1:]) for shape in expected]]


def test_unrolled_layer_takes_any_length(name):
    theirs, ours = twins(name, unroll=True, **SEQUENCE)
    for steps in (3, 5, 7, 3):
        x = random_inputs(B, steps, D)
        assert_same(evaluate(ours, x), evaluate(theirs, x))


def two_batches(shape):
    """Batches that a generator makes, of which `shape` is all that is known."""
    x = random_inputs(2, B, T, D).astype("float32")
    y = x[:, :, -1, :1]
    batches = tf.data.Dataset.from_generator(
        lambda: iter([(x[0], y[0]), (x[1], y[1])]),
        output_signature=(tf.TensorSpec(shape), tf.TensorSpec((None, None))),
    )
    return batches.apply(tf.data.experimental.assert_cardinality(2))


def stack_of(make):
    """A mask, both directions, a Dense in between, and one that goes backwards."""
    inputs = keras.Input((None, D))
    x = keras.layers.Bidirectional(make(H, **SEQUENCE))(keras.layers.Masking()(inputs))
    x = keras.layers.Dense(3)(x)
    model = keras.Model(inputs, keras.layers.Dense(1)(make(4, go_backwards=True)(x)))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


@pytest.mark.parametrize(
    "shape", [(None, None, None), pytest.param((B, T, None), marks=pytest.mark.slow)]
)
def test_generator_without_static_shapes(name, shape):
    """fit, evaluate and predict, as of Keras."""
    models = [stack_of(make) for make in (LAYERS[name].host, LAYERS[name].layer)]
    models[1].set_weights(models[0].get_weights())
    results = []
    for model in models:
        loss = model.fit(two_batches(shape), shuffle=False, verbose=0).history["loss"]
        loss += [model.evaluate(two_batches(shape), verbose=0)]
        predicted = model.predict(two_batches(shape), verbose=0)
        results.append(np.append(predicted, loss))
    np.testing.assert_allclose(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_symbolic_inputs_of_a_built_layer(name):
    """The layer knows its features, and says so where others come."""
    layer = layer_of(name, dtype="float32", **SEQUENCE)
    inputs = keras.Input((None, None))
    model = keras.Model(inputs, layer(inputs))
    assert model.output.shape == (None, None, H)
    assert model(random_inputs(B, T, D)).shape == (B, T, H)
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
        model(random_inputs(B, T, D + 1))


# --- Training


@pytest.mark.parametrize(
    ("kind", "how"),
    few(
        itertools.product(KINDS, ["auto", "jit_compile", "run_eagerly"]),
        lambda kind, how: how == "auto" and kind == "plain",
    ),
)
def test_fit_lowers_the_loss(name, kind, how):
    """Whether the running sum of a feature is positive; exact kinds as Keras does."""
    x = rng(3).normal(size=(64, T, D)).astype("float32")
    y = (x[..., 0].sum(1, keepdims=True) > 0).astype("float32")
    own = KINDS[kind] | {"return_sequences": False, "return_state": False}
    exact = not {"truncation", "adjoint_clipnorm", "adjoint_max_growth"} & own.keys()
    losses = []
    for make in (LAYERS[name].layer, LAYERS[name].host)[: 1 + (kind == "plain")]:
        keras.utils.set_random_seed(1)
        top = keras.layers.Dense(1, activation="sigmoid")
        model = keras.Sequential([keras.Input((None, D)), make(16, **own), top])
        flags = {} if how == "auto" else {how: True}
        model.compile(keras.optimizers.Adam(0.02), "binary_crossentropy", **flags)
        fit = model.fit(x, y, epochs=8, batch_size=16, verbose=0, shuffle=False)
        losses.append(fit.history["loss"])
        own = {}
    assert losses[0][-1] < (0.8 if exact else 0.95) * losses[0][0]
    # Adam divides by the size of the gradient, and so lets the rounding of small ones
    # through.
    assert relative_error(losses[0], losses[-1]) < 80 * FLOAT32
