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


def rnn(units=H, activation="tanh", **options):
    return BPTTRNN(units, activation, **{"name": "rnn", "dtype": "float64"} | options)


def model_of(*layers, inputs=(T, D)):
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input(inputs, dtype="float64"), *layers])


def linear(U, **options):
    layer = rnn(len(U), "linear", **options)
    model = model_of(layer)
    W = rng(3).normal(size=(D, len(U)))
    layer.cell.set_weights([W, U, np.zeros(len(U))])
    return model


def orthogonal(seed=0):
    return np.linalg.qr(rng(seed).normal(size=(H, H)))[0]


def flow_of(model, x, y=None, **options):
    return gradient_flow(model, x, y, **{"loss": MSE} | options)["rnn"]


def cotangents(model, x, y):
    """Of the mean squared error, by the outputs."""
    o = model(x).numpy()
    return 2 * (o - y) / o.size


# --- a linear network with a known U: closed forms


@pytest.mark.parametrize("q", [0.5, 1.3])
@without_graphs()
def test_a_scaled_rotation_has_its_closed_form(q):
    flow = flow_of(linear(q * orthogonal()), *data(H))
    np.testing.assert_allclose(flow.lag_shares, q ** np.arange(T), rtol=1e-12)
    np.testing.assert_allclose(flow.factor, q, rtol=1e-12)
    np.testing.assert_allclose(flow.singular_values, q, rtol=1e-12)
    np.testing.assert_allclose([flow.sigma_max, flow.spectral_radius, flow.bound], q)
    half_life = math.log(0.5) / math.log(q) if q < 1 else math.inf
    np.testing.assert_allclose(flow.half_life, half_life, rtol=1e-12)
    assert flow.last_step_only


@without_graphs()
def test_norms_of_any_linear_network_are_those_of_powers_of_U():
    """Of one loss at the last step, for each example by itself."""
    _, U, _ = random_weights(D, H, radius=1.1)
    (x, y), model = data(H), linear(U)
    flow = flow_of(model, x, y)
    e = cotangents(model, x, y)
    a = np.stack([e @ np.linalg.matrix_power(U.T, k) for k in range(T)], 1)
    norms = np.linalg.norm(a, axis=2)
    np.testing.assert_allclose(flow.adjoint_norms, norms[:, ::-1], rtol=1e-12)
    np.testing.assert_allclose(flow.delta_norms, norms[:, ::-1], rtol=1e-12)
    np.testing.assert_allclose(flow.lag_shares, norms.sum(0) / norms[:, 0].sum())
    np.testing.assert_allclose(flow.singular_values, np.linalg.svd(U)[1])
    assert flow.spectral_radius < flow.sigma_max
    np.testing.assert_allclose(flow.spectral_radius, 1.1)


@without_graphs()
def test_a_last_output_in_a_window_has_its_cotangent_once():
    """There the output and the state are one tensor."""
    (x, y), model = data(H), linear(0.7 * orthogonal(), truncation=4)
    e = np.linalg.norm(cotangents(model, x, y), axis=1)[:, None]
    expected = np.r_[np.zeros(T - 4), 0.7 ** np.arange(4)[::-1]]
    flow = flow_of(model, x, y)
    np.testing.assert_allclose(flow.adjoint_norms, e * expected, rtol=1e-12)


@without_graphs()
def test_losses_at_every_step_are_followed_back_one_by_one():
    _, U, _ = random_weights(D, H, radius=1.1)
    (x, y), model = data(T, H), linear(U, return_sequences=True)
    flow = flow_of(model, x, y, loss_steps=T)
    e = cotangents(model, x, y)
    for k in range(T):
        reached = np.linalg.norm(e[:, k:] @ np.linalg.matrix_power(U.T, k), axis=2)
        share = reached.sum() / np.linalg.norm(e[:, k:], axis=2).sum()
        np.testing.assert_allclose(flow.lag_shares[k], share, rtol=1e-12)
    assert not flow.last_step_only
    # A sample of them: any one loses the same in a scaled rotation.
    model = linear(0.7 * orthogonal(), return_sequences=True)
    flow = flow_of(model, x, y, loss_steps=3)
    np.testing.assert_allclose(flow.lag_shares, 0.7 ** np.arange(T), rtol=1e-12)


@pytest.mark.parametrize("g, shares", [(1.0, np.ones(8)), (4.0, [1, 2, *[4] * 6])])
@without_graphs()
def test_clipping_by_growth_shows_as_in_training(g, shares):
    """The identity, scaled: every step back doubles what is sent, but for the clip."""
    model = linear(2 * np.eye(4), adjoint_max_growth=g)
    flow = flow_of(model, np.ones((3, 8, D)), np.ones((3, 4)))
    np.testing.assert_allclose(flow.untruncated_lag_shares, 2.0 ** np.arange(8))
    np.testing.assert_allclose(flow.lag_shares, shares, rtol=1e-6)
    words = flow.summary()
    assert f"adjoint_max_growth={g:g}" in words and "exploding, but clipped" in words
    assert "adjoint_clipnorm=" not in words, "what is clipped needs no other clip"


# --- any network: the reference


def set_random(layer):
    W, U, b = random_weights(D, H, radius=1.2)
    layer.cell.set_weights([W, U, b])
    return W, U, b, np.zeros((B, H))


def test_norms_equal_the_reference():
    """In graphs, as a user has them."""
    layer = rnn(return_sequences=True)
    model, weights = model_of(layer), set_random(layer)
    x, y = data(T, H)
    flow = flow_of(model, x, y)
    d = hidden_gradients(x, *weights, "tanh", cotangents(model, x, y))
    for ours, theirs in [(flow.adjoint_norms, d.adjoint), (flow.delta_norms, d.delta)]:
        np.testing.assert_allclose(ours, np.linalg.norm(theirs, axis=2), rtol=1e-9)


POLICIES = [(Truncation(4), None), (Truncation(4, 1), None), (Truncation(5, 3), 0.02)]


# With a mask and clipping; the probe's tests cross them.
@pytest.mark.parametrize(
    "policy, clip, masked",
    few(
        [(*case, masked) for case in POLICIES for masked in (False, True)],
        lambda _, clip, masked: clip is not None and masked,
    ),
)
@without_graphs()
def test_truncation_and_clipping_are_those_of_the_layer(policy, clip, masked):
    layer = rnn(return_sequences=True, truncation=policy, adjoint_clipnorm=clip)
    model = model_of(keras.layers.Masking(dtype="float64"), layer)
    weights = set_random(layer)
    x, y = data(T, H)
    mask = np.ones((B, T), bool)
    if masked:
        mask[0, 6:], mask[1, ::3] = False, False
        x[~mask] = 0
    flow = flow_of(model, x, y, loss_steps=T)

    seen = np.maximum.accumulate(mask, axis=1)
    # Keras' loss leaves out the masked steps of the outputs.
    o = model(x).numpy()
    e = np.where((seen & mask)[..., None], 2 * (o - y) / (mask.sum() * H), 0)

    def own(e):
        kept = {"steps": policy.steps, "stride": policy.stride, "mask": mask}
        if clip is None:
            return truncated_gradients(x, *weights, "tanh", e, **kept)
        kept["adjoint_clipnorm"] = clip
        return clipped_gradients(x, *weights, "tanh", e, **kept)

    def free(e):
        return truncated_gradients(x, *weights, "tanh", e, steps=None, mask=mask)

    d = own(e)
    for ours, theirs in [(flow.adjoint_norms, d.adjoint), (flow.delta_norms, d.delta)]:
        norms = np.where(mask, np.linalg.norm(theirs, axis=2), np.nan)
        # Some versions of Keras add 1e-7 to the number of unmasked steps, here 21 or 27.
        np.testing.assert_allclose(ours, norms, rtol=1e-8)

    # By lag, in real steps: each loss by itself.
    def shares(reference):
        reached, sent = np.zeros(T), np.zeros(T)
        for s in range(T):
            one = np.where(np.arange(T)[:, None] == s, e, 0)
            a = np.linalg.norm(reference(one).adjoint, axis=2)
            for n in np.flatnonzero(mask[:, s]):
                real = np.flatnonzero(mask[n, : s + 1])[::-1]
                reached[: len(real)] += a[n, real]
                sent[: len(real)] += np.linalg.norm(e[n, s])
        return reached / sent

    expected, untruncated = shares(own), shares(free)
    np.testing.assert_allclose(flow.untruncated_lag_shares, untruncated, rtol=1e-9)
    np.testing.assert_allclose(flow.lag_shares, expected, rtol=1e-8, atol=1e-300)
    assert np.max(np.abs(expected - untruncated)) > 0.1
    assert flow.lag_shares[-1] == 0 < flow.untruncated_lag_shares[-1]


@pytest.mark.parametrize("name, slope", [("sigmoid", 0.25), ("softplus", 1)])
@without_graphs()
def test_no_step_exceeds_the_bound(name, slope):
    layer = rnn(H, name)
    model = model_of(layer)
    set_random(layer)
    flow = flow_of(model, *data(H))
    np.testing.assert_allclose(flow.max_slope, slope, rtol=1e-6)
    np.testing.assert_allclose(flow.bound, slope * flow.sigma_max, rtol=1e-6)
    a = flow.adjoint_norms
    assert np.all(a[:, :-1] <= flow.bound * a[:, 1:] * (1 + 1e-9))


# --- the models it works for


@without_graphs()
def test_a_tape_over_single_steps_agrees_through_a_whole_model():
    """Two layers, one of which reads the sequence backwards, in a Bidirectional."""
    keras.utils.set_random_seed(4)
    x, y = data(1)
    inputs = keras.Input((T, D), dtype="float64")
    first = rnn(return_sequences=True, name="first")
    both = keras.layers.Bidirectional(rnn(5, name="deep"), dtype="float64")
    head = keras.layers.Dense(1, dtype="float64")
    model = keras.Model(inputs, head(both(first(inputs))))
    model.compile("sgd", MSE)
    flow = gradient_flow(model, x, y, loss_steps=1)
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
def test_layers_by_name_in_nested_models():
    """One layer by its name or by itself; two of one name, one of them inside a model."""
    inner = keras.Sequential(
        [keras.Input((T, D)), rnn(5, return_sequences=True)], name="a"
    )
    last, (x, y) = rnn(3, name="two"), data(3)
    model = model_of(inner, rnn(4, return_sequences=True), last)
    flow = gradient_flow(model, x, y, loss=MSE, loss_steps=1)
    assert {name: each.units for name, each in flow.items()} == {
        **{"rnn": 5, "rnn_2": 4, "two": 3}
    }
    assert [each.last_step_only for each in flow.values()] == [False, False, True]
    for layer in ("two", last):
        assert list(gradient_flow(model, x, y, loss=MSE, layer=layer)) == ["two"]
    with pytest.raises(ValueError, match=r"Every layer .* flow\['rnn'\]"):
        flow.suggest_truncation()
    with pytest.raises(KeyError, match="none of the layers measured: rnn, rnn_2, two"):
        flow["three"]


@without_graphs()
def test_calls_of_a_shared_layer_are_further_examples():
    keras.utils.set_random_seed(4)
    shared = rnn()
    long, short = (keras.Input((t, D), dtype="float64") for t in (T, T - 4))
    model = keras.Model([long, short], [shared(long), shared(short)])
    model.compile("sgd", [MSE, MSE])
    (x, y), (_, y2) = data(H), data(H, seed=2)
    flow = flow_of(model, [x, x[:, 4:]], [y, y2], loss=None)
    assert flow.adjoint_norms.shape == (2 * B, T)
    expected = flow_of(keras.Model(long, shared(long)), x, y)
    # Keras calls the shorter one first.
    np.testing.assert_allclose(flow.adjoint_norms[B:], expected.adjoint_norms)
    assert np.all(np.isnan(flow.adjoint_norms[:B, :4]))
    assert not np.any(np.isnan(flow.adjoint_norms[:B, 4:]))
    assert len(flow.lag_shares) == T


@without_graphs()
def test_time_distributed_layers_are_measured_too():
    model = model_of(keras.layers.TimeDistributed(rnn(3)), inputs=(2, T, D))
    flow = flow_of(model, rng().normal(size=(B, 2, T, D)), np.ones((B, 2, 3)))
    assert flow.adjoint_norms.shape == (2 * B, T)


@without_graphs()
def test_an_output_layer_of_the_layer_sends_its_cotangents():
    options = {"return_sequences": True}
    own = model_of(rnn(output_units=2, output_activation="tanh", **options))
    behind = model_of(rnn(**options), keras.layers.Dense(2, "tanh", dtype="float64"))
    behind.set_weights(own.get_weights())
    flows = [flow_of(m, *data(T, 2), loss_steps=2) for m in (own, behind)]
    for name in ("adjoint_norms", "delta_norms", "lag_shares"):
        ours, theirs = (getattr(flow, name) for flow in flows)
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)


@without_graphs()
def test_sample_weights_and_losses_are_those_of_training():
    (x, y), model = data(H), linear(orthogonal())
    weight = np.array([1.0, 0.0, 3.0])
    model.compile("sgd", MSE)
    norms = [
        flow_of(model, x, y, loss=loss, sample_weight=weight).adjoint_norms
        for loss in (None, "mse", MSE, keras.losses.mean_squared_error)
    ]
    for given in norms[1:]:
        np.testing.assert_allclose(given, norms[0], rtol=1e-6)
    assert np.all(norms[0][1] == 0) and np.all(norms[0][[0, 2]] > 0)
    unweighted = flow_of(model, x, y).adjoint_norms
    np.testing.assert_allclose(norms[0][2], 3 * unweighted[2], rtol=1e-12)


@pytest.mark.parametrize(
    "policy, factor",
    few(
        [(p, f) for p in ("mixed_float16", "mixed_bfloat16") for f in (1e-6, 5e3)],
        lambda policy, _: policy == "mixed_float16",
    ),
)
@without_graphs()
def test_mixed_precision_is_measured_in_the_units_of_the_loss(policy, factor):
    """float16 would lose small numbers: the loss is scaled, as in training.

    And the scale is lowered where it makes numbers overflow, as the optimizer lowers it:
    no explosion, and nothing is amiss.
    """
    flows = []
    for dtype in (policy, "float32"):
        layer = rnn(dtype=dtype)
        model = model_of(layer)
        set_random(layer)
        optimizer = keras.optimizers.SGD()
        if dtype == "mixed_float16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        model.compile(
            optimizer, lambda y, o: factor * keras.losses.mean_squared_error(y, o)
        )
        flows.append(flow_of(model, *data(H), loss=None))
    mixed, full = flows
    smallest, largest, scale = 6e-8, 65504, 2**15  # of float16, and of the loss
    if factor < 1:
        assert np.max(full.adjoint_norms[:, 0]) < smallest
    else:
        assert np.max(full.adjoint_norms) * scale > largest
    assert mixed.verdict == full.verdict and mixed.finite
    np.testing.assert_allclose(mixed.adjoint_norms, full.adjoint_norms, rtol=0.1)


@without_graphs()
def test_the_model_stays_as_it_is():
    """Weights, states, statistics, seeds and metrics; whatever training does."""
    keras.utils.set_random_seed(2)
    layer = BPTTRNN(
        H,
        stateful=True,
        dropout=0.5,
        recurrent_dropout=0.5,
        truncation=RandomizedTruncation(3, seed=1),
        name="rnn",
    )
    norm, head = keras.layers.BatchNormalization(), keras.layers.Dense(1)
    model = keras.Sequential([keras.Input(batch_shape=(B, T, D)), norm, layer, head])
    model.compile("adam", "mse", metrics=["mae"])
    x, y = data(1)
    model.train_on_batch(x, y)

    def numbers():
        found = [*model.variables, *model.optimizer.variables, *layer.states]
        return [np.array(v) for v in found]

    before, metrics = numbers(), model.get_metrics_result()
    flow = flow_of(model, x, y, loss=None, training=True)
    for a, b in zip(before, numbers(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert model.get_metrics_result() == metrics
    # The same seeds again: the same draws.
    again = flow_of(model, x, y, loss=None, training=True)
    np.testing.assert_array_equal(flow.adjoint_norms, again.adjoint_norms)
    # Dropout and random cuts are there.
    assert np.any(flow.lag_shares != flow.untruncated_lag_shares)
    assert flow_of(model, x, y, loss=None).lag_shares[1] > 0


@without_graphs()
def test_without_a_path_to_the_loss_there_is_no_gradient():
    flow = flow_of(model_of(rnn(), keras.layers.Rescaling(0.0)), *data(H))
    assert flow.verdict == "none" and "does not depend" in flow.explanation
    assert flow.suggest_truncation() is None and math.isnan(flow.factor)
    assert "no gradient" in flow.summary()


class Own(keras.Sequential):
    def compute_loss(self, x=None, y=None, y_pred=None, *args, **kwargs):
        return tf.reduce_sum(y_pred**2)


class Added(keras.layers.Layer):
    def call(self, h):
        self.add_loss(tf.reduce_sum(h**2))
        return h


@without_graphs()
def test_without_targets_where_no_loss_compares():
    """A loss that is added, or the model's own: `fit` asks for no targets either."""
    added = model_of(layer := rnn(), Added(dtype="float64"))
    added.compile("sgd")
    own = Own([keras.Input((T, D), dtype="float64"), layer])
    own.compile("sgd", "mse")
    first, second = (flow_of(model, data()[0], loss=None) for model in (added, own))
    np.testing.assert_allclose(first.adjoint_norms, second.adjoint_norms, rtol=1e-9)
    assert np.all(first.adjoint_norms[:, -1] > 0)


# --- errors

X, Y = data(H)


class Idle(keras.Model):
    """Has a layer that it does not call, or calls inside a tf.function."""

    def __init__(self, inside=False):
        super().__init__()
        self.rnn = rnn()
        self.rnn.build((None, None, D))
        self.inside = inside

    def call(self, x):
        return tf.function(self.rnn)(x) if self.inside else x[:, 0]


def error_cases():
    """Models, options, and words of the error."""
    without_a_layer = [
        (
            keras.layers.SimpleRNN(H, name="plain"),
            r"must call a BPTTRNN.*SimpleRNN 'plain'.*convert\(model\)",
        ),
        (
            keras.layers.GlobalMaxPooling1D(),
            r"GlobalMaxPooling1D, Dense.*in the place of",
        ),
        (
            keras.layers.LSTM(H, name="gates"),
            r"whose backward pass .*LSTM 'gates'.*convert\(model\)",
        ),
        (
            keras.layers.Bidirectional(keras.layers.GRU(H, name="gates")),
            r"whose backward pass .*GRU 'forward_gates'.*convert\(model\)",
        ),
        (
            keras.layers.RNN(keras.layers.LSTMCell(H), name="own"),
            r"whose backward pass .*RNN 'own'.*BPTT\(cell\)",
        ),
    ]
    for layer, words in without_a_layer:
        yield model_of(layer, keras.layers.Dense(H)), {}, words
    yield keras.Sequential([rnn()]), {}, r"must be built.*Call it on a batch"
    yield rnn(), {}, r"must be a keras.Model.*Sequential"
    idle = r"must call.*BPTTRNN 'rnn'\. Call it in what"
    for inside, words in ((False, idle), (True, r"rnn, called inside a tf.function")):
        model = Idle(inside)
        yield model, {"y": model(X)}, words
    model, dataset = model_of(rnn()), tf.data.Dataset.from_tensors((X, Y))
    for options, words in (
        ({"loss": None}, r"no loss.*not compiled.*loss='mse'"),
        ({"layer": "rn"}, r"one of .*: rnn. .*: layer='rn'. Did you mean 'rnn'\?"),
        ({"layer": "lstm"}, r"one of .*: rnn. .*='lstm'. Pass one of"),
        ({"layer": rnn(name="other")}, r"layer=BPTTRNN 'other', which the model does"),
        ({"loss_steps": 0}, r"loss_steps.*positive integer.*0"),
        ({"x": dataset, "y": None}, r"one batch.*next\(iter"),
    ):
        yield model, options, words


def test_errors_say_what_to_do():
    for model, options, words in error_cases():
        with pytest.raises(ValueError, match=words):
            gradient_flow(model, **{"x": X, "y": Y, "loss": MSE} | options)


OF_X = r"x of shape \(3, 9, 4\)"
NESTED = r"nested list of numbers, of shape \(3, 9, 4\).*asarray\(x\)"
BATCHES = [
    ({"y": None}, rf"`y` must be the targets.*{OF_X}.*y=None.*Pass"),
    (
        {"x": (X, Y), "y": None},
        r"`y` must be.*x\[0\] of .*, x\[1\] of .*flow\(model, x",
    ),
    ({"x": None}, r"`x` must be the inputs.*x=None"),
    ({"y": Y[:-1]}, rf"as many examples each.*{OF_X}, y of shape \(2, 6\).*same"),
    ({"sample_weight": np.ones(2)}, r"as many .*sample_weight of shape \(2,\)"),
    ({"x": X[:0], "y": Y[:0]}, r"at least one.*x of shape \(0, 9, 4\).*x\[:32\]"),
    ({"x": X.tolist()}, rf"`x` must be an array.*{NESTED}"),
    ({"y": Y.tolist()}, r"`y` must be an array.*asarray\(y\)"),
    ({"x": [[[1.0]], [[1.0], [2.0]]]}, r"`x` must be.*a list of float\."),
    ({"y": 3.0}, r"`y` must be an array.*Received: y, float"),
    ({"x": "x.npy"}, r"`x` must be an array.*Received: x, str"),
]


def test_batches_that_cannot_be_measured():
    model = model_of(rnn())
    model.compile("sgd", MSE)
    for batch, words in BATCHES:
        for loss in (MSE, None):
            with pytest.raises(ValueError, match=words):
                gradient_flow(model, **{"x": X, "y": Y, "loss": loss} | batch)
