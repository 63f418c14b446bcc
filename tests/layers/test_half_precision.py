"""Sums of thousands of half-precision numbers: as exact as SimpleRNN's, and as large.

SimpleRNN adds the gradient of a weight step by step, in the dtype in which the weight is
stored. So what it loses in float16 and bfloat16 is what single steps lose.
"""

import functools
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import MODES, few, rng

from keras_bptt import BPTTRNN, Truncation

pytestmark = pytest.mark.usefixtures("usual_sizes")

B, D, H, OUTPUTS = 16, 3, 8, 5
# Half the spacing of numbers next to 1.
ROUNDING = {"mixed_float16": 2**-11, "mixed_bfloat16": 2**-8}

CASES = {
    "sequence": {},
    "last output": {"return_sequences": False},
    "checkpoints, output layer": {"checkpoint_every": "sqrt", "output_units": OUTPUTS},
    "chunks": {"truncation": 7},
    "windows from checkpoints": {
        "truncation": Truncation(4, 1),
        "checkpoint_every": 10,
    },
    "mixing units": {"activation": "softmax"},
    "slope of z": {"activation": "gelu"},
    "recurrent dropout": {"recurrent_dropout": 0.3},
    "clipping": {"adjoint_clipnorm": 1e9},
    "growth": {"adjoint_max_growth": 1.0},
    "masked windows, output layer": {
        "masked": True,
        "output_units": OUTPUTS,
        "truncation": Truncation(9, 3),
    },
}
# What SimpleRNN has not; of an output layer it has a Dense.
OURS = ("truncation", "checkpoint_every", "adjoint_clipnorm", "adjoint_max_growth")
# Keras draws others for each dtype.
FACTORS = (rng(6).random((B, H)) < 0.7) / 0.7


def weights():
    random = rng(3)
    U = np.linalg.qr(random.normal(size=(H, H)))[0]
    shapes = (H, OUTPUTS), (OUTPUTS,)
    return [
        random.normal(size=(D, H)) / 2,
        0.9 * U,
        random.normal(size=H) / 10,
        *(random.normal(size=shape) for shape in shapes),
    ]


@functools.cache
def gradients(layer_class, policy, mode, timesteps, items):
    """Of a mean of the outputs, as a scaled loss has them; `items` of the options."""
    options, layers = dict(items), []
    outputs, masked = options.get("output_units"), options.pop("masked", False)
    if layer_class is keras.layers.SimpleRNN and options.pop("output_units", None):
        layers = [keras.layers.Dense(outputs, dtype=policy)]
    rnn = layer_class(H, dtype=policy, **options)
    layers.insert(0, rnn)
    model = keras.Sequential([keras.Input((None, D), dtype="float32"), *layers])
    model.set_weights(weights()[: 5 if outputs else 3])
    if "recurrent_dropout" in options:
        rnn.cell.get_recurrent_dropout_mask = lambda h: tf.cast(FACTORS, h.dtype)
    # Of different lengths. (Behind a masked end both layers add cotangents step by step.)
    mask = np.arange(timesteps) >= np.linspace(0, 0.9 * timesteps, B)[:, None]
    mask = tf.constant(mask) if masked else None
    x = rng().normal(size=(B, timesteps, D)).astype("float16").astype("float32")

    def run(x):
        with tf.GradientTape() as tape:
            y = rnn(x, training=True, mask=mask)
            for dense in layers[1:]:
                y = dense(y)
            y = tf.cast(y, tf.float32)
            loss = 1024 * tf.reduce_mean(y * rng(5).normal(1, 0.5, y.shape[-1]))
        return tape.gradient(loss, [v.value for v in model.trainable_variables])

    return [g.numpy() for g in MODES[mode](run)(tf.constant(x))]


def errors(got, expected):
    return [
        np.linalg.norm(g - e) / np.linalg.norm(e)
        for g, e in zip(got, expected, strict=True)
    ]


def check(case, policy, mode, timesteps):
    """No gradient is off by more than twice what SimpleRNN's is.

    Or than a rounding, where the errors of single steps happen to cancel there.
    """
    of_ours = {"return_sequences": True} | CASES[case]
    of_theirs = {key: v for key, v in of_ours.items() if key not in OURS}
    ours, theirs = (
        errors(
            gradients(layer_class, policy, way, timesteps, tuple(options.items())),
            gradients(
                layer_class, "float32", "graph", timesteps, tuple(options.items())
            ),
        )
        for layer_class, way, options in (
            (BPTTRNN, mode, of_ours),
            (keras.layers.SimpleRNN, "graph", of_theirs),
        )
    )
    assert max(theirs[:3]) < 0.1  # a Dense of bfloat16 behind it loses all of its bias
    for our, their in zip(ours, theirs, strict=True):
        assert our <= 2 * max(their, ROUNDING[policy]), (ours, theirs)


@pytest.mark.parametrize(
    ("case", "policy"),
    few(
        itertools.product(CASES, ROUNDING),
        lambda *case: (
            case
            in [
                ("sequence", "mixed_float16"),
                ("last output", "mixed_bfloat16"),
                ("checkpoints, output layer", "mixed_float16"),
                ("windows from checkpoints", "mixed_bfloat16"),
                ("slope of z", "mixed_float16"),
                ("growth", "mixed_float16"),
                ("masked windows, output layer", "mixed_bfloat16"),
            ]
        ),
    ),
)
def test_some_thousand_steps(case, policy):
    if (case, policy) == ("clipping", "mixed_float16"):
        pytest.skip("refused: the loss is scaled, and what is clipped with it")
    check(case, policy, "graph", 2000)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", ROUNDING)
def test_ten_thousand_steps(case, policy, mode):
    if (case, policy) == ("clipping", "mixed_float16"):
        pytest.skip("refused: the loss is scaled, and what is clipped with it")
    check(case, policy, mode, 10_000)


# --- Sums that are known: the outputs are z_t, delta_t the same number at each step


def constant_gradients(policy, mode, timesteps=300, cotangent=64, **options):
    """Of a linear layer without a recurrence, whose cotangents are all the same."""
    layer = BPTTRNN(H, "linear", return_sequences=True, dtype=policy, **options)
    layer.build((None, None, D))
    layer.set_weights([np.zeros(w.shape) for w in layer.get_weights()])
    if layer.output_layer is not None:
        layer.output_layer.kernel.assign(np.eye(H, OUTPUTS))
    x = tf.ones((B, timesteps, D), layer.compute_dtype)

    def run(x):
        with tf.GradientTape() as tape:
            loss = cotangent * tf.reduce_sum(layer(x, training=True))
        return tape.gradient(loss, [v.value for v in layer.trainable_variables])

    names = [v.path.rpartition("/")[2] for v in layer.trainable_variables]
    return dict(zip(names, MODES[mode](run)(x), strict=True))


@pytest.mark.parametrize(
    ("options", "mode"),
    few(
        itertools.product(
            [{}, {"truncation": Truncation(3, 1)}, {"checkpoint_every": 7}], MODES
        ),
        lambda options, mode: mode == ("xla" if "truncation" in options else "graph"),
    ),
)
def test_sums_beyond_float16(options, mode):
    """64 B T = 307,200 is more than float16 holds, 65,504; the stored weight holds it."""
    got = constant_gradients("mixed_float16", mode, **options)
    for name in ("kernel", "bias"):
        assert got[name].dtype == tf.float32
        np.testing.assert_array_equal(got[name], np.full(got[name].shape, 64 * B * 300))


def test_sums_beyond_float16_in_the_output_layer():
    got = constant_gradients("mixed_float16", "graph", output_units=OUTPUTS)
    np.testing.assert_array_equal(got["bias"], np.full(OUTPUTS, 64 * B * 300))


def test_sums_over_examples_beyond_float16():
    """64 * 4096 examples, of a last output and of what a mask hides."""
    layer = BPTTRNN(H, output_units=OUTPUTS, dtype="mixed_float16")
    hidden = BPTTRNN(
        H,
        output_units=OUTPUTS,
        return_sequences=True,
        truncation=1,
        dtype="mixed_float16",
    )
    for each, mask in (layer, None), (hidden, tf.zeros((4096, 2), tf.bool)):
        with tf.GradientTape() as tape:
            y = each(tf.zeros((4096, 2, D)), mask=mask, training=True)
            loss = 64 * tf.reduce_sum(y if mask is None else y[:, 0])
        got = tape.gradient(loss, each.output_layer.bias.value)
        np.testing.assert_array_equal(got, np.full(OUTPUTS, 64 * 4096))


@pytest.mark.parametrize("options", [{}, {"truncation": Truncation(3, 1)}])
def test_sums_are_rounded_once(options):
    """Where weights are stored in half precision too."""
    third = np.float16(1 / 3)
    got = constant_gradients("float16", "graph", 3000, third, **options)
    assert got["bias"].dtype == tf.float16
    exact = np.float16(np.float64(third) * B * 3000)
    np.testing.assert_array_equal(got["bias"], np.full(H, exact))


@pytest.mark.parametrize(
    "mode", few([(mode,) for mode in MODES], lambda m: m == "graph")
)
def test_an_example_that_is_taken_many_times(mode):
    """4096 cotangents of 1 add up to 4096, where float16 stops at 2048."""
    layer = BPTTRNN(H, "linear", dtype="mixed_float16")
    state = tf.zeros((2, H), tf.float16)

    def run(x, state):
        with tf.GradientTape() as tape:
            tape.watch(state)
            y = layer(x, initial_state=state, training=True)
            y = tf.gather(y, tf.zeros(4096, tf.int32))
        return tape.gradient(y, state)

    layer.build((2, 1, D))
    layer.cell.recurrent_kernel.assign(np.eye(H))
    got = MODES[mode](run)(tf.zeros((2, 1, D), tf.float16), state)
    np.testing.assert_array_equal(got, [[4096] * H, [0] * H])


# --- Derivatives of higher order


@pytest.mark.parametrize(
    ("options", "mode"),
    few(
        itertools.product(
            [{}, {"activation": "softmax"}, {"activation": lambda z: tf.sin(z)}], MODES
        ),
        lambda options, mode: (options, mode) == ({}, "graph"),
    ),
)
def test_second_derivatives(options, mode):
    """A gradient penalty, whose derivatives are sums over steps as well."""

    def penalties(policy):
        layer = BPTTRNN(H, return_sequences=True, dtype=policy, **options)
        layer.build((None, None, D))
        layer.cell.set_weights(weights()[:3])

        def run(x):
            with tf.GradientTape() as outer:
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    y = layer(x, training=True)
                    loss = tf.reduce_sum(tf.cast(y, tf.float32) ** 2)
                d_x = tf.cast(tape.gradient(loss, x), tf.float32)
                penalty = tf.reduce_sum(d_x**2)
            return outer.gradient(penalty, [v.value for v in layer.trainable_variables])

        x = rng().normal(size=(B, 1000, D)).astype("float16").astype("float32")
        return [g.numpy() for g in MODES[mode](run)(tf.constant(x))]

    found = errors(penalties("mixed_float16"), penalties("float32"))
    # What enters, y and d_x, has been rounded: some roundings, of either sign.
    assert max(found) <= 10 * ROUNDING["mixed_float16"], found
