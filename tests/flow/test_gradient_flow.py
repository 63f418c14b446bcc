"""gradient_flow of whole models: closed forms, the reference, and what it leaves alone."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import few, random_weights, rng, without_graphs

from keras_bptt import BPTTRNN, RandomizedTruncation, Truncation, gradient_flow
from keras_bptt.reference.simple_rnn import hidden_gradients
from keras_bptt.reference.truncation import clipped_gradients, truncated_gradients

# All different, and more steps than blocks and windows.
B, T, D, H = 3, 9, 4, 6
# Keras computes a loss in float32 unless told otherwise, whatever comes in.
MSE = keras.losses.MeanSquaredError(dtype="float64")


def data(*outputs, seed=1):
    random = rng(seed)
    return random.normal(size=(B, T, D)), random.normal(size=(B, *outputs))


def model_of(layer, *more, inputs=(T, D)):
    keras.utils.set_random_seed(1)
    layers = [keras.Input(inputs, dtype="float64"), layer, *more]
    return keras.Sequential(layers)


def linear(U, **options):
    layer = BPTTRNN(len(U), "linear", name="rnn", dtype="float64", **options)
    model = model_of(layer)
    W = rng(3).normal(size=(D, len(U)))
    layer.cell.set_weights([W, U, np.zeros(len(U))])
    return model


def orthogonal(seed=0):
    return np.linalg.qr(rng(seed).normal(size=(H, H)))[0]


def cotangents(model, x, y):
    """Of the mean squared error, by the outputs."""
    o = model(x).numpy()
    return 2 * (o - y) / o.size


# --- a linear network with a known U: closed forms


@pytest.mark.parametrize("q", [0.5, 1.3])
@without_graphs()
def test_a_scaled_rotation_has_its_closed_form(q):
    x, y = data(H)
    flow = gradient_flow(linear(q * orthogonal()), x, y, loss=MSE)["rnn"]
    np.testing.assert_allclose(flow.lag_shares, q ** np.arange(T), rtol=1e-12)
    np.testing.assert_allclose(flow.factor, q, rtol=1e-12)
    np.testing.assert_allclose(flow.singular_values, q, rtol=1e-12)
    np.testing.assert_allclose([flow.sigma_max, flow.spectral_radius, flow.bound], q)
    half_life = math.log(0.5) / math.log(q) if q < 1 else math.inf
    np.testing.assert_allclose(flow.half_life, half_life, rtol=1e-12)
    assert flow.last_step_only


def test_norms_of_any_linear_network_are_those_of_powers_of_U():
    """Of one loss at the last step, for each example by itself."""
    _, U, _ = random_weights(D, H, radius=1.1)
    x, y = data(H)
    model = linear(U)
    flow = gradient_flow(model, x, y, loss=MSE)["rnn"]
    e = cotangents(model, x, y)
    a = np.stack([e @ np.linalg.matrix_power(U.T, k) for k in range(T)], 1)
    norms = np.linalg.norm(a, axis=2)
    np.testing.assert_allclose(flow.adjoint_norms, norms[:, ::-1], rtol=1e-12)
    np.testing.assert_allclose(flow.delta_norms, norms[:, ::-1], rtol=1e-12)
    np.testing.assert_allclose(flow.lag_shares, norms.sum(0) / norms[:, 0].sum())
    np.testing.assert_allclose(flow.singular_values, np.linalg.svd(U)[1])
    assert flow.spectral_radius < flow.sigma_max
    np.testing.assert_allclose(flow.spectral_radius, 1.1)


def test_a_last_output_in_a_window_has_its_cotangent_once():
    """There the output and the state are one tensor."""
    x, y = data(H)
    model = linear(0.7 * orthogonal(), truncation=4)
    flow = gradient_flow(model, x, y, loss=MSE)["rnn"]
    e = np.linalg.norm(cotangents(model, x, y), axis=1)[:, None]
    expected = np.r_[np.zeros(T - 4), 0.7 ** np.arange(4)[::-1]]
    np.testing.assert_allclose(flow.adjoint_norms, e * expected, rtol=1e-12)


@without_graphs()
def test_losses_at_every_step_are_followed_back_one_by_one():
    _, U, _ = random_weights(D, H, radius=1.1)
    x, y = data(T, H)
    model = linear(U, return_sequences=True)
    flow = gradient_flow(model, x, y, loss=MSE, loss_steps=T)["rnn"]
    e = cotangents(model, x, y)
    for k in range(T):
        reached = np.linalg.norm(e[:, k:] @ np.linalg.matrix_power(U.T, k), axis=2)
        share = reached.sum() / np.linalg.norm(e[:, k:], axis=2).sum()
        np.testing.assert_allclose(flow.lag_shares[k], share, rtol=1e-12)
    assert not flow.last_step_only
    # A sample of them: any one loses the same in a scaled rotation.
    model = linear(0.7 * orthogonal(), return_sequences=True)
    flow = gradient_flow(model, x, y, loss=MSE, loss_steps=3)["rnn"]
    np.testing.assert_allclose(flow.lag_shares, 0.7 ** np.arange(T), rtol=1e-12)


# --- any network: the reference


def tanh_layer(**options):
    return BPTTRNN(H, return_sequences=True, name="rnn", dtype="float64", **options)


def set_random(layer):
    W, U, b = random_weights(D, H, radius=1.2)
    layer.cell.set_weights([W, U, b])
    return W, U, b, np.zeros((B, H))


def test_norms_equal_the_reference():
    layer = tanh_layer()
    model, weights = model_of(layer), set_random(layer)
    x, y = data(T, H)
    flow = gradient_flow(model, x, y, loss=MSE)["rnn"]
    d = hidden_gradients(x, *weights, "tanh", cotangents(model, x, y))
    for ours, theirs in [(flow.adjoint_norms, d.adjoint), (flow.delta_norms, d.delta)]:
        np.testing.assert_allclose(ours, np.linalg.norm(theirs, axis=2), rtol=1e-9)


CASES = [
    (Truncation(4), None),
    (Truncation(4, stride=1), None),
    (Truncation(5, 3), 0.02),
]
CASES = [(*case, mask) for case in CASES for mask in ("none", "mixed")]


# With a mask and clipping; the probe's tests cross them.
@pytest.mark.parametrize(
    "policy, clip, padding",
    few(CASES, lambda _, clip, mask: clip is not None and mask == "mixed"),
)
@without_graphs()
def test_truncation_and_clipping_are_those_of_the_layer(policy, clip, padding):
    layer = tanh_layer(truncation=policy, adjoint_clipnorm=clip)
    model = model_of(keras.layers.Masking(dtype="float64"), layer)
    weights = set_random(layer)
    x, y = data(T, H)
    mask = np.ones((B, T), bool)
    if padding == "mixed":
        mask[0, 6:], mask[1, ::3] = False, False
        x[~mask] = 0
    flow = gradient_flow(model, x, y, loss=MSE)["rnn"]

    seen = np.maximum.accumulate(mask, axis=1)
    # Keras' loss leaves out the masked steps of the outputs.
    o = model(x).numpy()
    e = np.where((seen & mask)[..., None], 2 * (o - y) / (mask.sum() * H), 0)
    kept = {"steps": policy.steps, "stride": policy.stride, "mask": mask}

    def reference(e, **kept):
        problem = (x, *weights, "tanh", e)
        if clip is None or "adjoint_clipnorm" not in kept:
            kept.pop("adjoint_clipnorm", None)
            return truncated_gradients(*problem, **kept)
        return clipped_gradients(*problem, **kept)

    d = reference(e, adjoint_clipnorm=clip, **kept)
    for ours, theirs in [(flow.adjoint_norms, d.adjoint), (flow.delta_norms, d.delta)]:
        norms = np.where(mask, np.linalg.norm(theirs, axis=2), np.nan)
        # Some versions of Keras add 1e-7 to the number of unmasked steps, here 21 or 27.
        np.testing.assert_allclose(ours, norms, rtol=1e-8)

    # By lag, in real steps: each loss by itself.
    def shares(**kept):
        reached, sent = np.zeros(T), np.zeros(T)
        for s in range(T):
            one = np.where(np.arange(T)[:, None] == s, e, 0)
            a = np.linalg.norm(reference(one, **kept).adjoint, axis=2)
            for n in np.flatnonzero(mask[:, s]):
                real = np.flatnonzero(mask[n, : s + 1])[::-1]
                reached[: len(real)] += a[n, real]
                sent[: len(real)] += np.linalg.norm(e[n, s])
        return reached / sent

    flow = gradient_flow(model, x, y, loss=MSE, loss_steps=T)
    flow = flow["rnn"]
    free = shares(steps=None, mask=mask)
    np.testing.assert_allclose(flow.untruncated_lag_shares, free, rtol=1e-9)
    own = shares(adjoint_clipnorm=clip, **kept)
    np.testing.assert_allclose(flow.lag_shares, own, rtol=1e-8, atol=1e-300)
    assert np.max(np.abs(own - free)) > 0.1
    assert flow.lag_shares[-1] == 0 < flow.untruncated_lag_shares[-1]


@pytest.mark.parametrize("name", ["sigmoid", "softplus"])
@without_graphs()
def test_no_step_exceeds_the_bound(name):
    layer = BPTTRNN(H, name, name="rnn", dtype="float64")
    model = model_of(layer)
    set_random(layer)
    flow = gradient_flow(model, *data(H), loss=MSE)["rnn"]
    slope = {"sigmoid": 0.25, "softplus": 1}[name]
    np.testing.assert_allclose(flow.max_slope, slope, rtol=1e-6)
    np.testing.assert_allclose(flow.bound, slope * flow.sigma_max, rtol=1e-6)
    a = flow.adjoint_norms
    assert np.all(a[:, :-1] <= flow.bound * a[:, 1:] * (1 + 1e-9))


# --- the models it works for


def test_a_tape_over_single_steps_agrees_through_a_whole_model():
    """Two layers, one of which reads the sequence backwards, in a Bidirectional."""
    keras.utils.set_random_seed(4)
    x, y = data(1)
    inputs = keras.Input((T, D), dtype="float64")
    first = BPTTRNN(H, return_sequences=True, name="first", dtype="float64")
    deep = BPTTRNN(5, name="deep", dtype="float64")
    both = keras.layers.Bidirectional(deep, dtype="float64")
    head = keras.layers.Dense(1, dtype="float64")
    model = keras.Model(inputs, head(both(first(inputs))))
    model.compile("sgd", MSE)
    flow = gradient_flow(model, x, y)
    assert list(flow) == ["first", "forward_deep", "backward_deep"]

    def steps(layer, x, backwards=False):
        W, U, b = map(tf.constant, layer.cell.get_weights())
        h, states = tf.zeros((B, layer.units), tf.float64), []
        for t in reversed(range(T)) if backwards else range(T):
            h = tf.tanh(tf.matmul(x[t], W) + tf.matmul(h, U) + b)
            tape.watch(h)
            states.append(h)
        return states

    with tf.GradientTape() as tape:
        low = steps(first, tf.unstack(tf.constant(x), axis=1))
        ahead = steps(both.forward_layer, low)
        back = steps(both.backward_layer, low, backwards=True)
        o = head(tf.concat([ahead[-1], back[-1]], 1))
        loss = tf.reduce_mean((o - y) ** 2)
    for name, a in zip(flow, tape.gradient(loss, [low, ahead, back]), strict=True):
        norms = np.linalg.norm(np.stack(a, 1), axis=2)
        np.testing.assert_allclose(flow[name].adjoint_norms, norms, rtol=1e-9)


@without_graphs()
def test_one_layer_by_name_or_by_itself():
    rnn = BPTTRNN(3, name="two")
    model = model_of(BPTTRNN(5, return_sequences=True, name="one"), rnn)
    x, y = data(3)
    for layer in ("two", rnn):
        assert list(gradient_flow(model, x, y, loss=MSE, layer=layer)) == ["two"]
    flow = gradient_flow(model, x, y, loss=MSE)
    assert (flow["one"].units, flow["two"].units) == (5, 3)
    with pytest.raises(ValueError, match=r"Every layer .* flow\['one'\]"):
        flow.suggest_truncation()
    with pytest.raises(KeyError, match="none of the layers measured: one, two"):
        flow["three"]


@without_graphs()
def test_calls_of_a_shared_layer_are_further_examples():
    keras.utils.set_random_seed(4)
    shared = BPTTRNN(H, name="rnn", dtype="float64")
    long, short = (keras.Input((t, D), dtype="float64") for t in (T, T - 4))
    model = keras.Model([long, short], [shared(long), shared(short)])
    model.compile("sgd", [MSE, MSE])
    (x, y), (_, y2) = data(H), data(H, seed=2)
    flow = gradient_flow(model, [x, x[:, 4:]], [y, y2])["rnn"]
    assert flow.adjoint_norms.shape == (2 * B, T)
    single = keras.Model(long, shared(long))
    expected = gradient_flow(single, x, y, loss=MSE)["rnn"]
    # Keras calls the shorter one first.
    np.testing.assert_allclose(flow.adjoint_norms[B:], expected.adjoint_norms)
    assert np.all(np.isnan(flow.adjoint_norms[:B, :4]))
    assert not np.any(np.isnan(flow.adjoint_norms[:B, 4:]))
    assert len(flow.lag_shares) == T


@without_graphs()
def test_layers_of_one_name_and_nested_models():
    inner = keras.Sequential(
        [keras.Input((T, D)), BPTTRNN(3, return_sequences=True, name="rnn")], name="a"
    )
    model = model_of(inner, BPTTRNN(3, name="rnn"))
    flow = gradient_flow(model, *data(3), loss=MSE)
    assert list(flow) == ["rnn", "rnn_2"]
    assert [each.last_step_only for each in flow.values()] == [False, True]


@without_graphs()
def test_time_distributed_layers_are_measured_too():
    layer = keras.layers.TimeDistributed(BPTTRNN(3, name="rnn"))
    model = model_of(layer, inputs=(2, T, D))
    x = rng().normal(size=(B, 2, T, D))
    flow = gradient_flow(model, x, np.ones((B, 2, 3)), loss=MSE)["rnn"]
    assert flow.adjoint_norms.shape == (2 * B, T)


@without_graphs()
def test_an_output_layer_of_the_layer_sends_its_cotangents():
    options = {"return_sequences": True, "name": "rnn", "dtype": "float64"}
    own = model_of(BPTTRNN(H, output_units=2, output_activation="tanh", **options))
    behind = model_of(
        BPTTRNN(H, **options), keras.layers.Dense(2, "tanh", dtype="float64")
    )
    behind.set_weights(own.get_weights())
    x, y = data(T, 2)
    flows = [gradient_flow(model, x, y, loss=MSE)["rnn"] for model in (own, behind)]
    for name in ("adjoint_norms", "delta_norms", "lag_shares"):
        ours, theirs = (getattr(flow, name) for flow in flows)
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_sample_weights_and_losses_are_those_of_training():
    x, y = data(H)
    weight = np.array([1.0, 0.0, 3.0])
    model = linear(orthogonal())
    model.compile("sgd", MSE)
    compiled = gradient_flow(model, x, y, sample_weight=weight)["rnn"].adjoint_norms
    for loss in ("mse", MSE, keras.losses.mean_squared_error):
        given = gradient_flow(model, x, y, loss=loss, sample_weight=weight)["rnn"]
        np.testing.assert_allclose(given.adjoint_norms, compiled, rtol=1e-6)
    assert np.all(compiled[1] == 0) and np.all(compiled[[0, 2]] > 0)
    unweighted = gradient_flow(model, x, y)["rnn"].adjoint_norms
    np.testing.assert_allclose(compiled[2], 3 * unweighted[2], rtol=1e-12)


@pytest.mark.parametrize(
    "policy",
    ["mixed_float16", pytest.param("mixed_bfloat16", marks=pytest.mark.slow)],
)
def test_mixed_precision_is_measured_in_the_units_of_the_loss(policy):
    """float16 would lose these numbers: the loss is scaled, as in training."""
    x, y = data(H)
    flows = []
    for dtype in (policy, "float32"):
        layer = BPTTRNN(H, name="rnn", dtype=dtype)
        model = model_of(layer)
        set_random(layer)
        optimizer = keras.optimizers.SGD()
        if policy == "mixed_float16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        model.compile(
            optimizer, lambda y, o: 1e-6 * keras.losses.mean_squared_error(y, o)
        )
        flows.append(gradient_flow(model, x, y)["rnn"])
    mixed, full = flows
    assert np.max(full.adjoint_norms[:, 0]) < 6e-8  # the smallest number of float16
    np.testing.assert_allclose(mixed.adjoint_norms, full.adjoint_norms, rtol=0.1)


def test_the_model_stays_as_it_is():
    """Weights, states, statistics, seeds and metrics; whatever training does."""
    keras.utils.set_random_seed(2)
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(B, T, D)),
            keras.layers.BatchNormalization(),
            BPTTRNN(
                H,
                stateful=True,
                dropout=0.5,
                recurrent_dropout=0.5,
                truncation=RandomizedTruncation(3, seed=1),
                name="rnn",
            ),
            keras.layers.Dense(1),
        ]
    )
    model.compile("adam", "mse", metrics=["mae"])
    x, y = data(1)
    model.fit(x, y, batch_size=B, verbose=0)

    def numbers():
        states = model.get_layer("rnn").states
        found = [*model.variables, *model.optimizer.variables, *states]
        return [np.array(v) for v in found]

    before, metrics = numbers(), model.get_metrics_result()
    flow = gradient_flow(model, x, y, training=True)["rnn"]
    for a, b in zip(before, numbers(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert model.get_metrics_result() == metrics
    # The same seeds again: the same draws.
    again = gradient_flow(model, x, y, training=True)["rnn"]
    np.testing.assert_array_equal(flow.adjoint_norms, again.adjoint_norms)
    # Dropout and random cuts are there.
    assert np.any(flow.lag_shares != flow.untruncated_lag_shares)
    assert gradient_flow(model, x, y)["rnn"].lag_shares[1] > 0


@without_graphs()
def test_without_a_path_to_the_loss_there_is_no_gradient():
    layer = BPTTRNN(H, name="rnn")
    model = model_of(layer, keras.layers.Rescaling(0.0))
    flow = gradient_flow(model, *data(H), loss=MSE)["rnn"]
    assert flow.verdict == "none" and "does not depend" in flow.explanation
    assert flow.suggest_truncation() is None and math.isnan(flow.factor)
    assert "no gradient" in flow.summary()


# --- errors


def test_errors_say_what_to_do():
    x, y = data(H)
    plain = model_of(keras.layers.SimpleRNN(H, name="plain"))
    with pytest.raises(
        ValueError, match=r"must call a BPTTRNN.*SimpleRNN 'plain'.*convert\(model\)"
    ):
        gradient_flow(plain, x, y, loss=MSE)
    dense = model_of(keras.layers.GlobalMaxPooling1D(), keras.layers.Dense(H))
    with pytest.raises(ValueError, match=r"GlobalMaxPooling1D, Dense.*in the place of"):
        gradient_flow(dense, x, y, loss=MSE)
    unbuilt = keras.Sequential([BPTTRNN(H)])
    with pytest.raises(ValueError, match=r"must be built.*Call it on a batch"):
        gradient_flow(unbuilt, x, y, loss=MSE)
    model = model_of(BPTTRNN(H, name="rnn"))
    with pytest.raises(ValueError, match=r"no loss.*not compiled.*loss='mse'"):
        gradient_flow(model, x, y)
    with pytest.raises(
        ValueError, match=r"one of .*: rnn. Received: layer='rn'. Did you mean 'rnn'\?"
    ):
        gradient_flow(model, x, y, loss=MSE, layer="rn")
    with pytest.raises(ValueError, match=r"one of .*: rnn. .*='lstm'. Pass one of"):
        gradient_flow(model, x, y, loss=MSE, layer="lstm")
    other = BPTTRNN(H, name="other")
    with pytest.raises(
        ValueError, match=r"layer=BPTTRNN 'other', which the model does"
    ):
        gradient_flow(model, x, y, loss=MSE, layer=other)
    with pytest.raises(ValueError, match=r"one batch.*next\(iter"):
        gradient_flow(model, tf.data.Dataset.from_tensors((x, y)), loss=MSE)
    with pytest.raises(ValueError, match=r"must be a keras.Model.*Sequential"):
        gradient_flow(BPTTRNN(3), x, y, loss=MSE)
    with pytest.raises(ValueError, match=r"loss_steps.*positive integer.*0"):
        gradient_flow(model, x, y, loss=MSE, loss_steps=0)


WRAPS = [
    lambda layer: layer,
    lambda layer: keras.layers.Bidirectional(layer, merge_mode="sum"),
]


@pytest.mark.parametrize("wrap", WRAPS, ids=["alone", "both"])
@pytest.mark.parametrize("cls", [keras.layers.LSTM, keras.layers.GRU])
def test_a_layer_with_gates_is_not_measured(cls, wrap):
    x, y = data(H)
    model = model_of(wrap(cls(H, name="gates")))
    name = "gates" if isinstance(model.layers[0], cls) else "forward_gates"
    words = rf"whose backward pass .*{cls.__name__} '{name}'.*cannot be.*without gates"
    with pytest.raises(ValueError, match=words):
        gradient_flow(model, x, y, loss=MSE)


def test_a_layer_that_the_model_does_not_call():
    class Idle(keras.Model):
        def __init__(self):
            super().__init__()
            self.rnn = BPTTRNN(H, name="rnn")
            self.rnn.build((None, None, D))

        def call(self, x):
            return x[:, 0]

    x, y = data(D)
    model = Idle()
    model(x)
    with pytest.raises(ValueError, match=r"must call.*BPTTRNN 'rnn'\. Call it in what"):
        gradient_flow(model, x, y, loss=MSE)


X, Y = data(H)
BATCHES = {
    "no targets": (
        (X,),
        r"`y` must be the targets.*x of shape \(3, 9, 4\).*y=None.*Pass",
    ),
    "a pair": (
        ((X, Y),),
        r"`y` must be.*x\[0\] of .*, x\[1\] of .*gradient_flow\(model, x",
    ),
    "no inputs": ((None, Y), r"`x` must be the inputs.*x=None"),
    "fewer targets": (
        (X, Y[:-1]),
        r"as many examples each.*x of shape \(3, 9, 4\), y of shape \(2, 6\).*same",
    ),
    "fewer weights": ((X, Y, np.ones(2)), r"as many .*sample_weight of shape \(2,\)"),
    "no example": ((X[:0], Y[:0]), r"at least one.*x of shape \(0, 9, 4\).*x\[:32\]"),
    "lists": (
        (X.tolist(), Y),
        r"`x` must be an array.*nested list of numbers, of shape \(3, 9, 4\).*asarray\(x\)",
    ),
    "lists of targets": ((X, Y.tolist()), r"`y` must be an array.*asarray\(y\)"),
    "ragged lists": (([[[1.0]], [[1.0], [2.0]]], Y), r"`x` must be.*a list of float\."),
    "a number": ((X, 3.0), r"`y` must be an array.*Received: y, float"),
    "a path": (("x.npy", Y), r"`x` must be an array.*Received: x, str"),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("loss", [MSE, None])
def test_batches_that_cannot_be_measured(name, loss):
    (x, *rest), words = BATCHES[name]
    y = rest[0] if rest else None
    weight = rest[1] if len(rest) > 1 else None
    model = model_of(BPTTRNN(H, name="rnn"))
    model.compile("sgd", MSE)
    with pytest.raises(ValueError, match=words):
        gradient_flow(model, x, y, loss=loss, sample_weight=weight)


@without_graphs()
def test_without_targets_where_no_loss_compares():
    """A loss that is added, or the model's own: `fit` asks for no targets either."""

    class Own(keras.Sequential):
        def compute_loss(self, x=None, y=None, y_pred=None, *args, **kwargs):
            return tf.reduce_sum(y_pred**2)

    class Added(keras.layers.Layer):
        def call(self, h):
            self.add_loss(tf.reduce_sum(h**2))
            return h

    x, _ = data()
    keras.utils.set_random_seed(1)
    rnn = BPTTRNN(H, name="rnn", dtype="float64")
    inputs = keras.Input((T, D), dtype="float64")
    flows = []
    for model in (
        keras.Sequential([inputs, rnn, Added(dtype="float64")]),
        Own([inputs, rnn]),
    ):
        model.compile("sgd", "mse" if isinstance(model, Own) else None)
        flows.append(gradient_flow(model, x)["rnn"].adjoint_norms)
    np.testing.assert_allclose(flows[0], flows[1], rtol=1e-9)
    assert np.all(flows[0][:, -1] > 0)


def test_a_layer_inside_a_tf_function_is_refused():
    layer = BPTTRNN(H, name="rnn")

    class Wrapped(keras.Model):
        def build(self, shape):
            layer.build(shape)
            self.rnn = layer

        def call(self, x):
            return tf.function(layer)(x)

    model = Wrapped()
    x, y = data(H)
    model(x)
    with pytest.raises(ValueError, match=r"rnn, called inside a tf.function"):
        gradient_flow(model, x, y, loss=MSE)


def test_clipping_by_growth_shows_as_in_training():
    """The identity, scaled: every step back doubles what is sent, but for the clip."""
    double = keras.initializers.Identity(2.0)
    options = {"activation": "linear", "recurrent_initializer": double, "name": "rnn"}
    x, y = np.ones((3, 8, 2), "float32"), np.ones((3, 4), "float32")
    shares, words = {}, {}
    for g in (None, 1.0, 4.0):
        rnn = BPTTRNN(4, adjoint_max_growth=g, **options)
        model = keras.Sequential([keras.Input((8, 2)), rnn])
        flow = gradient_flow(model, x, y, loss="mse")["rnn"]
        shares[g], words[g] = flow.lag_shares, flow.summary()
        np.testing.assert_allclose(flow.untruncated_lag_shares, 2.0 ** np.arange(8))
    np.testing.assert_allclose(shares[None], 2.0 ** np.arange(8), rtol=1e-6)
    np.testing.assert_allclose(shares[1.0], np.ones(8), rtol=1e-6)
    np.testing.assert_allclose(shares[4.0], [1, 2, *[4] * 6], rtol=1e-6)
    assert (
        "adjoint_max_growth=4" in words[4.0] and "exploding, but clipped" in words[4.0]
    )
    assert "adjoint_clipnorm=" in words[None]
    assert "adjoint_clipnorm=" not in words[4.0], "what is clipped needs no other clip"
