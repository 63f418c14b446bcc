"""The policies on the layer: what is drawn, when, and without bias; what clipping is for.

Which paths each policy keeps, beside autodiff of unrolled steps: `test_contract.py`.
"""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    FLOAT64,
    MODES,
    B,
    D,
    H,
    assert_same,
    evaluate,
    in_modes,
    random_inputs,
    random_weights,
    relative_error,
    rng,
)
from tensorflow.core.protobuf import saved_model_pb2

import keras_bptt.layers.explicit_loop
from keras_bptt import BPTTRNN, RandomizedTruncation, Truncation
from keras_bptt.layers.calls import drawn_factors

T = 5
STATE = random_inputs(B, H, seed=5)
MASK = np.array([[0, 1, 0, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
# A link is kept in three of five draws: in 400 steps no draw is like another.
POLICY = RandomizedTruncation(mean_steps=2.5, seed=7)


def layer_of(truncation=POLICY, **options):
    options = {"dtype": "float64", "jit_compile": False} | options
    layer = BPTTRNN(H, truncation=truncation, **options)
    layer.build((None, None, D))
    layer.cell.set_weights(random_weights())
    return layer


@pytest.fixture
def draws(monkeypatch):
    """The factors of every eager call, as they are drawn."""
    seen, draw = [], keras_bptt.layers.explicit_loop.drawn_factors

    def spy(*arguments):
        factors = draw(*arguments)
        seen.append(factors.numpy())
        return factors

    monkeypatch.setattr(keras_bptt.layers.explicit_loop, "drawn_factors", spy)
    return seen


def test_draws(draws):
    """Independent for every step and example: 0, or 1 / p so often as to make 1."""
    examples = 2000
    for dtype in ("float64", "float32"):
        layer = layer_of(dtype=dtype)
        layer(random_inputs(examples, T, D), training=True)
        factors = draws[-1]
        assert factors.shape == (examples, T) and factors.dtype == dtype
        p = POLICY.keep_probability
        np.testing.assert_allclose(np.unique(factors), [0, 1 / p], rtol=1e-7)
        kept = factors > 0
        spread = np.sqrt(p * (1 - p) / examples)
        assert np.all(np.abs(kept.mean(0) - p) < 4 * spread)
        correlation = np.corrcoef(kept.T) - np.eye(T)
        assert np.all(np.abs(correlation) < 4 / np.sqrt(examples))
        # Nor is one example like its neighbour.
        along = np.corrcoef(kept[1:].ravel(), kept[:-1].ravel())[0, 1]
        assert abs(along) < 4 / np.sqrt(kept.size)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_factor_in_the_precision_of_the_layer(draws, dtype):
    layer = layer_of(dtype=dtype)
    layer(random_inputs(B, T, D), training=True)
    factor = tf.constant(1 / POLICY.keep_probability, dtype).numpy()
    np.testing.assert_array_equal(np.unique(draws[0]), [0, factor])


# --- Without bias


def mean_gradients(layer, x, mask=None, calls=120, examples=100):
    """Of many draws, the mean of every gradient's numbers, and its standard error.

    One example, `examples` times in a batch: so many draws in each of the calls, whose
    means scatter as the error of a mean does.
    """
    X = tf.constant(np.repeat(x, examples, 0))
    state = tf.constant(np.repeat(STATE[:1], examples, 0))
    mask = None if mask is None else tf.constant(np.repeat(mask, examples, 0))
    random = rng(2)
    c, ds = random.normal(size=(1, x.shape[1], H)), random.normal(size=(1, H))
    weights = [v.value for v in layer.trainable_variables]

    @tf.function
    def gradients():
        with tf.GradientTape() as tape:
            tape.watch([X, state])
            y, last = layer(X, initial_state=state, mask=mask, training=True)
            loss = tf.reduce_sum(c * y**2) + tf.reduce_sum(ds * last)
        d_x, d_state, *d = tape.gradient(loss, [X, state, *weights])
        return [tf.reduce_sum(d_x, 0), tf.reduce_sum(d_state, 0), *d]

    each = [
        np.concatenate([d.numpy().ravel() for d in gradients()]) / examples
        for _ in range(calls)
    ]
    return np.mean(each, 0), np.std(each, 0, ddof=1) / np.sqrt(calls)


def check_unbiased(masked=False, **options):
    options = {"return_sequences": True, "return_state": True} | options
    x = random_inputs(1, T, D)
    # Two leading masked steps and a hole: their links have no factor.
    mask = np.array([[0, 1, 0, 1, 1]], bool) if masked else None
    full, _ = mean_gradients(layer_of(None, **options), x, mask, calls=2, examples=1)
    mean, error = mean_gradients(layer_of(**options), x, mask)
    # The weights' gradients scatter, and so would tell a bias.
    assert np.max(error[-H * H - H :]) > 1e-3
    difference = np.abs(mean - full)
    assert np.all(difference <= 4 * error + 1e-12), np.max(difference / (error + 1e-12))


@pytest.mark.parametrize(
    ("jit_compile", "masked"),
    [
        (False, True),
        pytest.param("auto", False, marks=pytest.mark.slow),
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param("auto", True, marks=pytest.mark.slow),
    ],
)
def test_unbiased(jit_compile, masked):
    check_unbiased(masked, jit_compile=jit_compile)


def not_divided(p, steps, seed):
    draws = keras.random.uniform(steps, seed=seed)
    return tf.cast(draws < p, "float64")


def too_seldom(p, steps, seed):
    draws = keras.random.uniform(steps, seed=seed)
    return tf.cast(draws < 0.9 * p, "float64") / p


def one_for_all_steps(p, steps, seed):
    """E[xi^2] is not E[xi]^2: each factor for itself is right, a path's is not."""
    draws = keras.random.uniform((steps[0], 1), seed=seed)
    return tf.repeat(tf.cast(draws < p, "float64") / p, steps[1], 1)


@pytest.mark.parametrize("draw", [not_divided, too_seldom, one_for_all_steps])
def test_bias_is_seen(draw, monkeypatch):
    def drawn(truncation, seed, sequences, dtype):
        return draw(truncation.keep_probability, tf.shape(sequences)[:2], seed)

    monkeypatch.setattr(keras_bptt.layers.explicit_loop, "drawn_factors", drawn)
    with pytest.raises(AssertionError):
        check_unbiased()


# --- One draw a call


@in_modes("eager")
def test_draws_follow_the_seed(mode):
    """The same first call of equal layers, then others."""
    x = random_inputs(B, T, D)

    def calls(seed):
        layer = layer_of(RandomizedTruncation(2.5, seed=seed), return_sequences=True)
        X, c = tf.constant(x), rng(2).normal(size=(B, T, H))
        weights = [v.value for v in layer.trainable_variables]

        def gradient():
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(c * layer(X, training=True))
            return tf.concat(
                [tf.reshape(g, [-1]) for g in tape.gradient(loss, weights)], 0
            )

        gradient = MODES[mode](gradient)
        return [gradient().numpy() for _ in range(3)]

    first, second, other = calls(7), calls(7), calls(8)
    np.testing.assert_array_equal(first, second)
    for a, b in ((first[0], first[1]), (first[1], first[2]), (first[0], other[0])):
        assert relative_error(a, b) > 1e-2


def test_draws_without_a_seed_follow_the_global_one(draws):
    x = random_inputs(B, T, D)
    for seed in (1, 1, 2):
        keras.utils.set_random_seed(seed)
        layer_of(RandomizedTruncation(2.5))(x, training=True)
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.any(draws[0] != draws[2])


def test_draws_are_not_those_of_dropout():
    """The masks of dropout are what they are without the policy."""
    outputs = []
    for truncation in (None, POLICY):
        keras.utils.set_random_seed(4)
        layer = layer_of(truncation, dropout=0.4, recurrent_dropout=0.4)
        x = random_inputs(B, T, D)
        outputs.append([layer(x, training=True).numpy() for _ in range(2)])
    np.testing.assert_array_equal(*outputs)


@in_modes("graph")
def test_one_draw_for_all_gradients_of_a_call(mode):
    layer, x = layer_of(return_sequences=True), tf.constant(random_inputs(B, T, D))

    def twice():
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(y**2)
            parts = [tf.reduce_sum(y[:, t] ** 2) for t in range(T)]
        # And the gradient is linear in the cotangent, for a draw.
        return [tape.gradient(of, x) for of in (loss, loss, parts)]

    first, second, sum_of_parts = MODES[mode](twice)()
    np.testing.assert_array_equal(first, second)
    assert relative_error(sum_of_parts, first) < FLOAT64
    exact = evaluate(layer, x.numpy())["d_x"]
    assert np.max(np.abs(exact)) > 1e-2


def test_derivatives_of_higher_order_draw_nothing(draws):
    layer, x = layer_of(return_sequences=True), tf.constant(random_inputs(B, T, D))
    W = layer.cell.kernel.value
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(y**2)
        d = tf.reduce_sum(inner.gradient(loss, x) ** 2)
    first, second = outer.gradient(d, W), outer.gradient(d, W)
    np.testing.assert_array_equal(first, second)
    assert np.max(np.abs(first)) > 1e-2
    assert len(draws) == 1


def test_what_is_computed_again_sees_the_same_draw():
    """Of checkpoints: a gradient that is asked for again draws nothing."""
    x = tf.constant(random_inputs(B, T, D))

    def gradients(layer, times=2):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x, training=True) ** 2)
        return [tape.gradient(loss, x).numpy() for _ in range(times)]

    options = {"checkpoint_every": 2, "return_sequences": True}
    layer = layer_of(**options)
    first, again = gradients(layer)
    np.testing.assert_array_equal(again, first)
    (second,) = gradients(layer, 1)
    assert relative_error(second, first) > 1e-2
    same = layer_of(**options)
    for want in (first, second):
        np.testing.assert_array_equal(gradients(same, 1)[0], want)


# --- Where nothing is drawn


@pytest.mark.parametrize(
    ("mode", "sequence"),
    [
        ("eager", True),
        ("graph", False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("eager", False),
                ("graph", True),
                ("xla", True),
                ("xla", False),
            ]
        ),
    ],
)
def test_full_gradient_without_training(sequence, mode):
    results = [
        evaluate(
            layer_of(policy, return_sequences=sequence),
            random_inputs(B, T, D),
            mode,
            state=STATE,
            mask=MASK,
        )
        for policy in (None, POLICY)
    ]
    assert_same(results[1], results[0], tolerance=0.0)


def random_operations(graph_def):
    nodes = [*graph_def.node]
    for function in graph_def.library.function:
        nodes += function.node_def
    return {node.op for node in nodes if "Random" in node.op or "Rng" in node.op}


def test_a_training_step_draws():
    """What the test below looks for is found where it is."""
    layer, found = layer_of(), {}
    for training in (True, False):
        call = tf.function(functools.partial(layer, training=training))
        graph = call.get_concrete_function(tf.TensorSpec((B, T, D), "float64")).graph
        found[training] = random_operations(graph.as_graph_def())
    assert found[True] and not found[False]


def test_export_draws_nothing(tmp_path):
    """Nor does it ask for XLA; it predicts what the layer does, with the full gradient."""
    model = keras.Sequential(
        [keras.Input((None, D)), layer_of(dtype="float32", return_sequences=True)]
    )
    model.compile("sgd", "mse")
    model.train_on_batch(random_inputs(B, T, D), random_inputs(B, T, H, seed=3))
    model.export(tmp_path / "export", verbose=False)
    tf.saved_model.save(model, tmp_path / "saved")
    for folder in ("export", "saved"):
        saved = saved_model_pb2.SavedModel()
        path = tmp_path / folder / "saved_model.pb"
        saved.ParseFromString(path.read_bytes())
        (meta_graph,) = saved.meta_graphs
        found = random_operations(meta_graph.graph_def)
        # A model saved with its training step has the call with training=True too.
        assert not found or folder == "saved", found
    loaded = tf.saved_model.load(tmp_path / "export")
    x = random_inputs(2, T + 3, D).astype("float32")
    np.testing.assert_array_equal(loaded.serve(x), loaded.serve(x))
    assert relative_error(loaded.serve(x), model.predict(x, verbose=0)) < 2e-5


def test_bidirectional_draws_for_each_direction(draws):
    layer = keras.layers.Bidirectional(
        BPTTRNN(H, truncation=RandomizedTruncation(2.5), dtype="float64"),
        dtype="float64",
    )
    layer(random_inputs(B, T, D), training=True)
    there, back = draws
    assert np.any(there != back)


def test_half_precision_is_unbiased():
    """E[xi] = 1 in bfloat16 too, whose 1 / p is off by up to 2^-8."""
    worst = 0
    for mean_steps in (2.5, 10, 20, 100):
        policy = RandomizedTruncation(mean_steps)
        seed = keras.random.SeedGenerator(1)
        factors = drawn_factors(policy, seed, tf.zeros([400, 1000, 1]), "bfloat16")
        share = np.mean(np.asarray(tf.cast(factors, tf.float32)) > 0)
        mean = np.mean(np.asarray(tf.cast(factors, tf.float64)))
        spread = np.max(tf.cast(factors, tf.float64)) * np.sqrt(
            share * (1 - share) / 4e5
        )
        worst = max(worst, abs(mean - 1) / spread)
    assert worst < 4


def test_fit_learns():
    """With noise and without bias: the running sum of the first feature."""
    x = rng(3).normal(size=(64, T, D)).astype("float32")
    y = (x[..., 0].sum(1, keepdims=True) > 0).astype("float32")
    layer = BPTTRNN(H, truncation=RandomizedTruncation(4, seed=1), jit_compile=False)
    model = keras.Sequential([layer, keras.layers.Dense(1, activation="sigmoid")])
    model.compile(keras.optimizers.Adam(0.02), "binary_crossentropy")
    loss = model.fit(x, y, epochs=8, batch_size=16, verbose=0).history["loss"]
    assert loss[-1] < 0.8 * loss[0]


# --- Policies


def test_an_integer_means_chunks():
    assert BPTTRNN(H, truncation=3).truncation == Truncation(3)
    assert BPTTRNN(H, truncation=np.int64(3)).truncation == Truncation(3)


# --- What clipping is for


@pytest.mark.slow
def test_clipping_trains_what_explodes():
    """To sum the last three steps of a feature, from weights that amplify every step."""
    x = rng(3).normal(size=(64, 30, D)).astype("float32")
    y = x[:, -3:, 0].sum(1, keepdims=True)
    losses = {}
    for clip in (None, 0.1):
        keras.utils.set_random_seed(1)
        layer = BPTTRNN(16, activation="relu", adjoint_clipnorm=clip)
        layer.build((None, None, D))
        W, U, b = random_weights(D, 16, radius=1.9)
        layer.cell.set_weights([0.1 * W, U, 0 * b])
        model = keras.Sequential([layer, keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.02), "mse")
        fit = model.fit(x, y, epochs=12, batch_size=16, verbose=0)
        losses[clip] = fit.history["loss"]
    assert not np.isfinite(losses[None][-1])
    # Better than the mean can do: about half as much.
    assert losses[0.1][-1] < 0.8 * np.var(y)
