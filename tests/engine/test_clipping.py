"""Clipping inside the recursion by growth: `adjoint_max_growth`.

The engine against the brute force of `reference.truncation`; the laws that a limit of
growth obeys and a limit of the norm does not; half precision; and what it is for: a network
whose gradient explodes, trained. (Second derivatives: `test_general_cells.py`.)
"""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import WAYS, few, relative_error, rng, without_graphs
from test_general_cells import (
    Kind,
    assert_close,
    evaluate,
    first_order,
    problem,
    unrolled,
)

from keras_bptt import BPTTRNN, RandomizedTruncation, Truncation
from keras_bptt.cells.activations import resolve
from keras_bptt.cells.simple_rnn import SimpleRNN
from keras_bptt.engine.options import Arguments
from keras_bptt.engine.recurrence import recurrence
from keras_bptt.reference import truncation as truncated_reference

# All different, also from the number of blocks. T is no multiple of a block below.
B, T, D, H, OUTPUTS = 5, 11, 3, 4, 2
GROWTH = {"adjoint_max_growth": 1.1}
BOTH = GROWTH | {"adjoint_clipnorm": 4.0}

# One example of each kind; in the last nothing is real.
MASK = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ],
    bool,
)


def exploding_weights():
    """W, U, b: each step multiplies what comes back by 1.3, until tanh is flat."""
    random = rng(11)
    W, U = 0.02 * random.normal(size=(D, H)), random.normal(size=(H, H))
    U *= 1.3 / np.max(np.abs(np.linalg.eigvals(U)))
    return W, U, 0.01 * random.normal(size=H)


def late(arrays):
    """Cotangents, or targets, of which the early ones are smaller.

    Else what early losses send hides that what late ones send has grown.
    """
    return arrays * 0.7 ** np.arange(arrays.shape[1])[::-1, None]


def exploding(masked=False, activation="tanh", **options):
    """A problem of `test_general_cells.py` whose gradient explodes."""
    f = getattr(keras.activations, activation, tf.sin)
    cell = SimpleRNN(resolve(f, H, "float64"))
    one = problem(
        Kind(cell, (D,), (H,), ((D, H), (H, H), (H,))),
        batch=B,
        steps=T,
        mask=MASK if masked else None,
        **{"return_sequences": True} | options,
    )
    (h_0,), (dy, d_last) = one.arguments.states, one.cotangents
    return one._replace(
        arguments=one.arguments._replace(
            weights=exploding_weights(), states=(0.04 * h_0,)
        ),
        cotangents=(late(dy) if dy.ndim == 3 else dy, d_last),
    )


# ------------------------------------------------------------------------- the reference


def of_reference(one, activation="tanh", **limits):
    """Its gradients; without limits those of the recurrence unclipped."""
    options, (mask, (_, r), factors, _), arguments, (dy, (d_last,)) = one
    order = slice(None, None, -1 if options.go_backwards else 1)
    real = np.ones((B, T), bool) if mask is None else mask[:, order]
    if not options.return_sequences:
        dy = np.concatenate([np.zeros((B, T - 1, dy.shape[-1])), dy[:, None]], 1)
    seen = np.logical_or.accumulate(real, 1)
    seen = real if options.zero_output_for_mask else seen
    e = np.where(seen[:, :, None], dy, 0)
    e = e @ arguments.output_layer[0].T if arguments.output_layer else e
    e[:, -1] += d_last
    window, kind = options.truncation, "clipped" if limits else "truncated"
    f = (np.sin, np.cos) if activation == "sine" else activation
    x = arguments.x[:, order]
    return getattr(truncated_reference, f"{kind}_gradients")(
        *(x, *arguments.weights, *arguments.states, f, e),
        steps=window and window.steps,
        stride=window and window.stride,
        mask=None if mask is None else real,
        recurrent_dropout=r,
        factors=factors,
        **limits,
    )


def check(mode="plain", limits=GROWTH, activation="tanh", function=recurrence, **case):
    """The engine equals the reference where the limits act."""
    one = exploding(activation=activation, **case, **limits)
    want, free = (of_reference(one, activation, **each) for each in (limits, {}))
    for name in ("d_inputs", "d_recurrent_kernel", "d_bias"):
        error = relative_error(getattr(want, name), getattr(free, name))
        assert error > 0.05, "nothing was clipped"
    assert np.max(np.abs(want.d_kernel)) > 1e-3, "vanished: nothing was tested"
    _, d = evaluate(first_order(function), one, mode)
    backwards = slice(None, None, -1 if one.options.go_backwards else 1)
    weights = want.d_kernel, want.d_recurrent_kernel, want.d_bias
    expected = Arguments(want.d_inputs[:, backwards], weights, (want.d_initial_state,))
    # What the adjoints do not enter has no limit.
    assert_close(d._replace(output_layer=()), expected)


def test_the_problem_explodes():
    """The first adjoint is some times as long as the last, and as all that was sent."""
    one = exploding()
    lengths, sent = (
        np.linalg.norm(array, axis=-1)
        for array in (of_reference(one).adjoint, one.cotangents[0])
    )
    assert np.median(lengths[:, 0] / lengths[:, -1]) > 8
    assert np.median(lengths[:, 0] / sent.sum(axis=1)) > 3
    (h, _), _ = evaluate(first_order(recurrence), one)
    assert np.median(1 - h**2) > 0.9  # tanh is steep nearly everywhere


LAST = {"return_sequences": False}
MASKED = {"masked": True}
ZERO_OUTPUT = {"zero_output_for_mask": True, **MASKED}
OVERLAPPING = {"truncation": (5, 2), **MASKED}
STRIDE_1 = {"truncation": (4, 1), **MASKED}
# Some of the examples are held by one window.
LONG = {"truncation": (8, 3), **MASKED}
CASES = {
    "sequence": {},
    "last output": LAST,
    "mask": MASKED,
    "mask, last output": MASKED | LAST,
    "mask, zero output": ZERO_OUTPUT,
    "mask, zero last output": ZERO_OUTPUT | LAST,
    "mask, backwards": {"go_backwards": True, **MASKED},
    "dropout, not kept": {"noise": "r", "keep_states": False},
    "slope of z": {"activation": "sine", **MASKED},
    "unrolled": {"unroll": True, "activation": "linear", **MASKED},
    "both limits": {"limits": BOTH, **MASKED},
    # Windows: all at once, in `level_pass`.
    "chunks": {"truncation": (4, 4)},
    "overlapping, dropout": {"truncation": (5, 2), "noise": "r"},
    "overlapping, mask": OVERLAPPING,
    "overlapping, mask, zero output": OVERLAPPING | ZERO_OUTPUT,
    "stride 1, mask": STRIDE_1,
    "long windows, mask": LONG,
    "window, mask, last output": LONG | LAST,
    "one window": {"truncation": (T + 2, 2), **MASKED},
    "window, both limits": {"limits": BOTH, **OVERLAPPING},
    # States computed again: with windows they go side by side, in `sliding_pass`.
    "checkpoints, mask": {"checkpoint_every": 3, **MASKED},
    "root of checkpoints": {"checkpoint_every": "sqrt", **LAST},
    "checkpoints, chunks, mask": {
        "checkpoint_every": 3,
        "truncation": (4, 4),
        **MASKED,
    },
    "checkpoints, overlapping": {"checkpoint_every": 4, "truncation": (5, 2)},
    "checkpoints, overlapping, mask": {"checkpoint_every": 4, **OVERLAPPING},
    "checkpoints, stride 1, mask": {"checkpoint_every": "sqrt", **STRIDE_1},
    "checkpoints, long windows, mask": {"checkpoint_every": 4, **LONG},
    # An output layer: what enters is q V^T.
    "output layer, last output": {"layer": "Vc", **LAST},
    "output layer, windows, mask": {"layer": "Vc", **OVERLAPPING},
    "output layer, checkpoints": {"layer": "Vc", "checkpoint_every": 4, **MASKED},
    # Link factors: what they cut off was sent all the same.
    "factors": {"factors": True},
    "factors, mask, last output": {"factors": True, **MASKED, **LAST},
    "factors, checkpoints, mask": {"factors": True, "checkpoint_every": 4, **MASKED},
}


@pytest.mark.parametrize("case", CASES)
@without_graphs()
def test_equals_the_reference(case):
    check(**CASES[case])


# Compiled: XLA compiles the passes, in a graph, which is not.
CHOSEN = [("graph", "factors, checkpoints, mask"), ("xla", "overlapping, mask")]
MANY_MODES = itertools.product(
    ["eager", "graph", "compiled", "xla", "unknown"],
    [
        *(case for _, case in CHOSEN),
        "checkpoints, overlapping, mask",
        "mask",
        "output layer, windows, mask",
    ],
)


@pytest.mark.parametrize(
    ("mode", "case"),
    few(MANY_MODES, lambda *case: case in CHOSEN),
)
def test_equals_the_reference_in_graphs(mode, case):
    if mode == "compiled":
        check("graph", **CASES[case], jit_compile=True)
    else:
        check(mode, **CASES[case])


@pytest.mark.parametrize("case", ["both limits", "overlapping, mask", "factors"])
def test_the_other_brute_force_agrees(case):
    """The loop of `test_general_cells.py`, with which second derivatives are compared."""
    check("eager", **CASES[case], function=unrolled)


def test_a_large_growth_is_none():
    """Bit for bit: the scales are 1."""
    for case in ("mask", "checkpoints, overlapping, mask"):
        got, free = (
            evaluate(first_order(recurrence), exploding(**CASES[case], **limit))
            for limit in ({"adjoint_max_growth": 1e9}, {})
        )
        assert_close(got, free, 0)


# -------------------------------------------------------------------- the laws of a layer

# By law the limit has no unit: batch size, scale and padding do not enter it.
PLAIN = {"adjoint_max_growth": 1.0, "jit_compile": False}
NORM = {"adjoint_clipnorm": 0.01, "jit_compile": False}  # the negative control
LAYERS = {
    "full": {},
    "chunks": {"truncation": 4},
    "windows": {"truncation": Truncation(5, 2)},
    "checkpoints": {"truncation": Truncation(5, 2), "checkpoint_every": 4},
    "output layer": {"output_units": OUTPUTS},
    "last output": {"return_sequences": False},
}
X, TARGETS = rng(3).normal(size=(B, T, D)), late(rng(4).normal(size=(B, T, H)))


def some_layers(*chosen):
    """Each of `LAYERS`; those that are not chosen take long, together."""
    cases = few([(name,) for name in LAYERS], lambda name: name in chosen)
    return pytest.mark.parametrize("name", cases)


def layer_of(dtype="float64", **options):
    """A layer whose gradient explodes, with weights of its own output layer, if any."""
    layer = BPTTRNN(H, dtype=dtype, **{"return_sequences": True} | options)
    layer.build((None, None, D))
    random = rng(4)
    rest = [random.normal(size=w.shape) for w in layer.get_weights()[3:]]
    layer.set_weights([*exploding_weights(), *rest])
    return layer


def of_mean_loss(
    layer, x=X, targets=TARGETS, mask=None, seen=None, scale=1.0, mode="plain"
):
    """The gradients of a mean over the batch, of the weights and the inputs.

    `seen` is what outputs the loss is of, where not of all.
    """
    weights = [v.value for v in layer.trainable_variables]

    def run(x, targets, mask, seen):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.cast(layer(x, mask=mask, training=True), layer.variable_dtype)
            if len(y.shape) == 2:
                y, targets = y[:, None], targets[:, -1:]
            losses = tf.reduce_sum((y - targets[:, :, : y.shape[2]]) ** 2, 2)
            losses = losses if seen is None else tf.where(seen, losses, 0)
            loss = scale * tf.reduce_mean(tf.reduce_sum(losses, 1))
        return tape.gradient(loss, [*weights, x])

    def tensor(array, dtype=bool):
        return None if array is None else tf.constant(array, dtype)

    dtype = layer.variable_dtype
    given = tensor(x, dtype), tensor(targets, dtype), tensor(mask), tensor(seen)
    return [tf.convert_to_tensor(d).numpy() for d in WAYS[mode](run)(*given)]


def error(got, wanted):
    """The largest of the relative errors."""
    pairs = zip(got, wanted, strict=True)
    return max(relative_error(a, b) for a, b in pairs)


def assert_layer_clips(options, wanted):
    free = of_mean_loss(layer_of(**options | {"adjoint_max_growth": None}))
    assert error(wanted, free) > 0.05, "nothing was clipped"


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [("windows", "float64", 1e-10), ("full", "float32", 1e-6)],
)
def test_the_gradient_of_a_batch_is_the_mean_of_its_parts(name, dtype, tolerance):
    def whole_and_mean(options):
        layer = layer_of(dtype, **options, **LAYERS[name])
        parts = [of_mean_loss(layer, X[[n]], TARGETS[[n]])[:-1] for n in range(B)]
        mean = [np.mean(each, axis=0) for each in zip(*parts, strict=True)]
        return of_mean_loss(layer)[:-1], mean

    whole, mean = whole_and_mean(PLAIN)
    assert error(mean, whole) < tolerance
    # The negative control: a norm is in the units of a mean over the batch.
    whole, mean = whole_and_mean(NORM)
    assert error(mean, whole) > 0.5


@pytest.mark.parametrize(
    ("name", "mode"),
    few(
        [*itertools.product(LAYERS, ["plain"]), *itertools.product(["full"], WAYS)],
        lambda *case: case in [("windows", "plain"), ("full", "graph")],
    ),
)
def test_a_loss_times_a_power_of_two(name, mode):
    """Its gradients times it, bit for bit in float32; a norm is in its units."""
    # Where there is a mode the recurrence is compiled, as it is in training.
    compiled = {"jit_compile": "auto"} if mode != "plain" else {}
    options = PLAIN | LAYERS[name] | compiled | {"dtype": "float32"}
    layer = layer_of(**options)
    wanted = of_mean_loss(layer, mode=mode)
    for k in (-30, 7, 40) if mode == "plain" else (9,):
        scaled = of_mean_loss(layer, scale=2.0**k, mode=mode)
        assert_times(2.0**k, wanted, scaled)
    if mode == "plain":
        assert_layer_clips(options, wanted)
        layer = layer_of("float32", **NORM | LAYERS[name])
        wanted, scaled = of_mean_loss(layer), of_mean_loss(layer, scale=2.0**7)
        assert error([d / 2.0**7 for d in scaled], wanted) > 0.5


def assert_times(scale, gradients, scaled):
    """Bit for bit: a power of two rounds nothing."""
    for a, b in zip(scaled, gradients, strict=True):
        assert np.array_equal(a, np.float32(scale) * b)


@some_layers("full", "windows", "last output")
def test_padding_changes_nothing(name):
    """At the start, at the end and in between; the targets are padded too."""
    options, real = (
        PLAIN | LAYERS[name],
        ~np.isin(np.arange(T + 5), [0, 1, 6, 7, T + 4]),
    )
    x, targets = (np.full((B, T + 5, a.shape[2]), np.nan) for a in (X, TARGETS))
    x[:, real], targets[:, real] = X, TARGETS
    targets[:, -1] = TARGETS[:, -1]  # where the last output is all, and it is masked
    mask, layer = np.broadcast_to(real, (B, T + 5)), layer_of(**options)
    seen = mask if layer.return_sequences else np.ones((B, 1), bool)
    # Of what is not seen the loss is 0, but its gradient would be NaN.
    *got, d_x = of_mean_loss(layer, x, np.nan_to_num(targets), mask, seen)
    wanted = of_mean_loss(layer)
    assert_layer_clips(options, wanted)
    assert error([*got, d_x[:, real]], wanted) < 1e-10
    assert not np.any(d_x[:, ~real])


@some_layers("full", "windows")
def test_an_identity_network_is_not_clipped(name):
    """h_t = x_t W + h_{t-1}, with a loss at every step, at the smallest limit there is."""

    def found(recurrent, growth):
        layer = layer_of(
            activation="linear",
            adjoint_max_growth=growth,
            jit_compile=False,
            **LAYERS[name],
        )
        _, _, b, *rest = layer.get_weights()
        layer.set_weights(
            [rng().normal(size=(D, H)), recurrent * np.eye(H), 0 * b, *rest]
        )
        return of_mean_loss(layer)

    assert error(found(1.0, 1.0), found(1.0, None)) < 1e-12
    # One that grows by a fifth a step is.
    assert error(found(1.2, 1.0), found(1.2, None)) > 0.05


def test_randomized_truncation_of_a_layer():
    """With the factors that it draws: what it clips is not what it would be without."""
    found = {}
    for growth in (1.0, 1e9, None):
        layer = layer_of(
            truncation=RandomizedTruncation(4.0, seed=3),
            adjoint_max_growth=growth,
            jit_compile=False,
        )
        found[growth] = of_mean_loss(layer)
    assert error(found[1e9], found[None]) == 0
    assert error(found[1.0], found[None]) > 0.05


# ------------------------------------------------------------------------- half precision


@pytest.mark.parametrize(
    ("policy", "name"),
    few(
        itertools.product(["float16", "bfloat16"], LAYERS),
        lambda *case: case in [("float16", "windows"), ("bfloat16", "full")],
    ),
)
def test_half_precision(policy, name):
    """A norm is refused in float16, whose losses are scaled; growth has no scale."""
    options = PLAIN | LAYERS[name] | {"dtype": f"mixed_{policy}"}
    layer = layer_of(**options)
    wanted, scaled = of_mean_loss(layer), of_mean_loss(layer, scale=2.0**4)
    if policy == "bfloat16":  # its range is that of float32
        assert_times(2**4, wanted, scaled)
    # The smallest numbers of float16 have fewer digits.
    assert error(scaled, [2**4 * d for d in wanted]) < 2**-10
    exact = of_mean_loss(layer_of(**options | {"dtype": "float32"}))
    assert error(wanted, exact) < (0.02 if policy == "float16" else 0.15)
    assert_layer_clips(options, wanted)


def losses_of_fit(layer, x, targets, optimizer, epochs):
    model = keras.Sequential([keras.Input(x.shape[1:]), layer])
    model.compile(optimizer, "mse")
    x, targets = x.astype("float32"), targets.astype("float32")
    return model.fit(x, targets, len(x), epochs, verbose=0).history["loss"]


@pytest.mark.slow
def test_a_fit_in_float16():
    """The optimizer scales the loss, and finds the scale while it trains."""
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01))
    layer = layer_of("mixed_float16", adjoint_max_growth=1.0)
    losses = losses_of_fit(layer, X, TARGETS, optimizer, 4)
    assert np.all(np.isfinite(losses)) and losses[-1] < losses[0]


@pytest.mark.usefixtures("usual_sizes")
def test_an_exploding_network_trains():
    """It begins at 0 and leaves it by a factor of 1.5 a step, for 60 steps.

    It is to show a pattern. There is a bias that makes it; but near 0 the gradient by the
    bias is 1.5^60.
    """
    steps, units, random = 60, 16, rng()
    U = 1.5 * np.linalg.qr(random.normal(size=(units, units)))[0]
    assert np.isclose(np.max(np.abs(np.linalg.eigvals(U))), 1.5)
    x = 1e-4 * random.normal(size=(8, steps, 2))
    pattern = np.broadcast_to(random.uniform(-0.5, 0.5, units), (8, steps, units))

    def trained(growth, epochs):
        options = {"return_sequences": True, "jit_compile": False}
        layer = BPTTRNN(units, adjoint_max_growth=growth, **options)
        layer.build((None, None, 2))
        layer.set_weights([layer.get_weights()[0], U, np.zeros(units)])
        optimizer = keras.optimizers.SGD(1.0)
        return losses_of_fit(layer, x, pattern, optimizer, epochs), layer.get_weights()

    losses, weights = trained(1.0, 15)
    assert all(np.all(np.isfinite(w)) for w in weights)
    assert losses[-1] < 0.5 * losses[0]
    # Without it, at the same rate, one step ends it: every unit is saturated for good.
    losses, _ = trained(None, 5)
    assert not losses[-1] < 2 * losses[0]
    assert np.ptp(losses[1:]) < 1e-3 * losses[1]
