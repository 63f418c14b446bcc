"""Derivatives beyond the first, and every other way in which TensorFlow takes one.

The other side of each comparison is plain automatic differentiation of unrolled steps:
SimpleRNN(unroll=True), run eagerly, or the steps written down here.
"""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    FLOAT32,
    FLOAT64,
    MIXED_MASK,
    MODES,
    WAYS,
    B,
    D,
    H,
    T,
    few,
    in_modes,
    pair,
    plain,
    random_inputs,
    random_weights,
    relative_error,
    rng,
)

from keras_bptt import BPTTRNN

# A derivative of order n has some 10^n times the terms of the value.
HIGHER = 10 * FLOAT64
STATE = random_inputs(B, H, seed=5)
ZERO = tf.UnconnectedGradients.ZERO


def unrolled_pair(**options):
    """SimpleRNN, unrolled whatever the options say, and BPTTRNN."""
    weights = {"dtype": "float64"} | options
    theirs, _ = pair(**weights | {"unroll": True})
    _, ours = pair(**weights)
    # The unrolled SimpleRNN counts the steps when it is called.
    return theirs, ours


def weighted(tensors, squared=False, seed=2):
    """A scalar in which every number of `tensors` has a weight of its own."""
    random = rng(seed)
    return sum(
        tf.reduce_sum(random.normal(size=x.shape) * (x * x if squared else x))
        for x in tensors
    )


def derivatives(order, layer, x, state, mode, **call):
    """The gradients, of the given order, by inputs, state and weights.

    Of order n: the gradients of a weighted sum of squares of those of order n - 1.
    """
    variables = [v.value for v in layer.trainable_variables]

    def run(x, state):
        sources = [x, state, *variables]

        def gradients(order):
            with tf.GradientTape() as tape:
                tape.watch([x, state])
                if order == 1:
                    outputs = tf.nest.flatten(layer(x, initial_state=state, **call))
                    value = weighted(outputs)
                else:
                    value = weighted(gradients(order - 1), squared=True, seed=order)
            return tape.gradient(value, sources, unconnected_gradients=ZERO)

        return gradients(order)

    return WAYS[mode](run)(tf.constant(x), tf.constant(state))


def assert_derivatives(order, mode, options, **call):
    theirs, ours = unrolled_pair(**options)
    random = options.get("dropout") or options.get("recurrent_dropout")
    reference = plain(mode, random)
    expected = derivatives(order, theirs, random_inputs(), STATE, reference, **call)
    got = derivatives(order, ours, random_inputs(), STATE, mode, **call)
    for wanted, given in zip(expected, got, strict=True):
        assert np.max(np.abs(wanted)) > 1e-3
        assert relative_error(given, wanted) < HIGHER


CASES = {
    "last output": {},
    "sequence": {"return_sequences": True, "return_state": True},
    "mask": {"return_state": True, "mask": MIXED_MASK},
    "mask, sequence": {"return_sequences": True, "mask": MIXED_MASK},
    "mask, zero output": {
        "return_sequences": True,
        "zero_output_for_mask": True,
        "mask": MIXED_MASK,
    },
    "dropout": {"dropout": 0.3, "recurrent_dropout": 0.3, "seed": 3},
    "softmax": {"activation": "softmax", "return_sequences": True},
    "softmax, mask, dropout": {
        "activation": "softmax",
        "return_sequences": True,
        "recurrent_dropout": 0.3,
        "seed": 3,
        "mask": MIXED_MASK,
    },
    "gelu": {"activation": "gelu"},
    "gelu, mask": {"activation": "gelu", "return_sequences": True, "mask": MIXED_MASK},
    "unrolled": {"unroll": True},
    "unrolled softmax": {
        "activation": "softmax",
        "return_sequences": True,
        "unroll": True,
    },
    "backwards, no bias": {
        "go_backwards": True,
        "use_bias": False,
        "return_sequences": True,
    },
}


def split(case):
    """The options of the layer, and the arguments of the call."""
    options = CASES[case].copy()
    call = {"training": True}
    if "mask" in options:
        call["mask"] = options.pop("mask")
    return options, call


IN_GRAPHS = ["mask, sequence", "softmax, mask, dropout", "gelu"]
PLAIN = [*IN_GRAPHS, "last output", "sequence", "mask, zero output", "unrolled"]
PLAIN += ["dropout"]


@pytest.mark.parametrize(
    ("case", "mode"),
    few(
        itertools.product(CASES, WAYS),
        lambda case, mode: {
            "plain": case in PLAIN,
            "xla": case == IN_GRAPHS[0],
            "eager": False,
            "graph": False,
        }[mode],
    ),
)
def test_second_order(case, mode):
    options, call = split(case)
    assert_derivatives(2, mode, options, **call)


@pytest.mark.parametrize(
    ("steps", "masked", "training"),
    few(
        itertools.product([17, 37], [False, True], [False, True]),
        # Five blocks; thirteen.
        lambda steps, masked, training: steps == 17 and masked == training,
    ),
)
def test_second_order_of_a_long_sequence(steps, masked, training):
    """More steps than one block, with and without the states kept from before."""
    theirs, ours = unrolled_pair(return_state=True)
    x = random_inputs(B, steps, D)
    call = {"training": training}
    if masked:
        call["mask"] = rng(1).random((B, steps)) < 0.7
    expected = derivatives(2, theirs, x, STATE, "eager", **call)
    got = derivatives(2, ours, x, STATE, "graph", **call)
    for wanted, given in zip(expected, got, strict=True):
        assert relative_error(given, wanted) < HIGHER


@pytest.mark.parametrize("case", ["mask", "softmax", "gelu"])
def test_third_order(case):
    options, call = split(case)
    assert_derivatives(3, "plain", options, **call)


@in_modes()
def test_third_order_in_every_mode(mode):
    assert_derivatives(3, mode, {"return_sequences": True})


def steps(x, W, U, b, mask=None):
    """The layer in so many words; the outputs at all steps."""
    h, hs = tf.zeros((x.shape[0], U.shape[0]), x.dtype), []
    for t in range(x.shape[1]):
        new = tf.tanh(x[:, t] @ W + h @ U + b)
        h = new if mask is None else tf.where(mask[:, t, None], new, h)
        hs.append(h)
    return tf.stack(hs, 1)


def hessian(function, parameters):
    """Every second derivative of a scalar function, row by row."""
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(parameters)
        with tf.GradientTape() as inner:
            inner.watch(parameters)
            value = function()
        gradients = inner.gradient(value, parameters)
        entries = tf.unstack(tf.concat([tf.reshape(g, [-1]) for g in gradients], 0))
    rows = [outer.gradient(g, parameters, unconnected_gradients=ZERO) for g in entries]
    return tf.stack([tf.concat([tf.reshape(g, [-1]) for g in row], 0) for row in rows])


@pytest.mark.parametrize(
    ("mode",), few([(mode,) for mode in MODES], lambda mode: mode == "eager")
)
def test_hessian(mode):
    """All of it, of a small layer: a symmetric matrix, and the right one."""
    features, units = 1, 2
    weights = [tf.constant(w) for w in random_weights(features, units)]
    x, cotangent = random_inputs(B, T, features), random_inputs(B, T, units, seed=3)
    expected = hessian(
        lambda: tf.reduce_sum(steps(tf.constant(x), *weights) * cotangent), weights
    )
    _, ours = pair(units, features, return_sequences=True)
    parameters = [v.value for v in ours.trainable_variables]
    got = MODES[mode](
        lambda: hessian(lambda: tf.reduce_sum(ours(x) * cotangent), parameters)
    )()
    assert got.shape == (8, 8)
    assert relative_error(got, tf.transpose(got)) < HIGHER
    assert relative_error(got, expected) < HIGHER
    assert np.linalg.matrix_rank(expected) == 8


@pytest.mark.slow
def test_gradient_penalty_in_fit():
    """A penalty on the gradient of the inputs, as of a critic: trained by the second."""

    class Critic(keras.Model):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer
            self.loss_tracker = keras.metrics.Mean(name="loss")

        def call(self, x):
            return self.layer(x)

        def train_step(self, data):
            x, _ = data
            with tf.GradientTape() as outer:
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    y = weighted([self(x)])
                slope = inner.gradient(y, x)
                loss = tf.reduce_mean((tf.norm(slope, axis=[1, 2]) - 1) ** 2)
            variables = self.trainable_variables
            gradients = outer.gradient(loss, [v.value for v in variables])
            self.optimizer.apply(gradients, variables)
            self.loss_tracker.update_state(loss)
            return {"loss": self.loss_tracker.result()}

    losses = []
    for layer in unrolled_pair(use_bias=False):
        critic = Critic(layer)
        critic.compile(keras.optimizers.SGD(0.001))
        data = random_inputs(), np.zeros(B)
        history = critic.fit(*data, batch_size=B, epochs=4, verbose=0, shuffle=False)
        losses.append(history.history["loss"])
    # Keras hands the inputs in as float32.
    assert relative_error(losses[1], losses[0]) < FLOAT32
    assert np.all(np.diff(losses[1]) < 0)


# --- Jacobians

JACOBIANS = {
    "last output": {},
    "mask, sequence": {"return_sequences": True, "mask": MIXED_MASK},
    "softmax": {"activation": "softmax"},
}


def jacobians(layer, x, mode, method, **call):
    def run(x):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = layer(x, **call)
        if method == "batch_jacobian":
            return [tape.batch_jacobian(y, x)]
        weights = [v.value for v in layer.trainable_variables]
        return tape.jacobian(y, [x, *weights])

    return MODES[mode](run)(tf.constant(x))


@pytest.mark.parametrize(
    ("mode", "case", "method"),
    few(
        itertools.product(
            ["eager", "graph"], JACOBIANS, ["jacobian", "batch_jacobian"]
        ),
        lambda *case: (
            case
            in [
                ("eager", "mask, sequence", "jacobian"),
                ("graph", "softmax", "batch_jacobian"),
            ]
        ),
    ),
)
def test_jacobian(mode, case, method):
    options = JACOBIANS[case].copy()
    call = {"mask": options.pop("mask")} if "mask" in options else {}
    theirs, ours = unrolled_pair(**options)
    expected = jacobians(theirs, random_inputs(), "eager", method, **call)
    got = jacobians(ours, random_inputs(), mode, method, **call)
    for wanted, given in zip(expected, got, strict=True):
        assert np.max(np.abs(wanted)) > 1e-3
        assert relative_error(given, wanted) < FLOAT64


@pytest.mark.parametrize(
    "method", [pytest.param("jacobian", marks=pytest.mark.slow), "batch_jacobian"]
)
def test_jacobian_in_xla_of_an_unrolled_layer(method):
    """There, TensorFlow has no kernel to vectorize the arrays of a loop, whoever's."""
    theirs, ours = unrolled_pair(unroll=True)
    expected = jacobians(theirs, random_inputs(), "eager", method)
    got = jacobians(ours, random_inputs(), "xla", method)
    for wanted, given in zip(expected, got, strict=True):
        assert relative_error(given, wanted) < FLOAT64


@pytest.mark.parametrize(
    ("mode", "masked", "training"),
    few(
        itertools.product(["eager", "graph"], *[[False, True]] * 2),
        lambda *case: case == ("graph", True, True),
    ),
)
def test_gradients_of_each_example(mode, masked, training):
    """tf.vectorized_map over the batch, as for differential privacy."""
    theirs, ours = unrolled_pair()
    x, mask = tf.constant(random_inputs()), tf.constant(MIXED_MASK)

    def of_one(layer, x, mask):
        with tf.GradientTape() as tape:
            mask = mask[None] if masked else None
            y = layer(x[None], mask=mask, training=training)
            value = weighted([y])
        return tape.gradient(value, [v.value for v in layer.trainable_variables])

    def of_each(x, mask):
        return tf.vectorized_map(lambda pair: of_one(ours, *pair), (x, mask))

    got = MODES[mode](of_each)(x, mask)
    for b in range(B):
        expected = of_one(theirs, x[b], mask[b])
        for wanted, given in zip(expected, got, strict=True):
            if not masked:
                assert np.max(np.abs(wanted)) > 1e-3
            difference = np.max(np.abs(given[b] - wanted))
            assert difference < FLOAT64 * max(1.0, np.max(np.abs(wanted)))


# --- Tapes


@pytest.mark.parametrize(
    ("compiled", "activation"),
    few(
        itertools.product([False, True], ["tanh", "gelu", "softmax"]),
        lambda compiled, activation: activation == ("gelu" if compiled else "tanh"),
    ),
)
def test_compiled_forward_pass_under_an_eager_tape(compiled, activation):
    theirs, ours = unrolled_pair(activation=activation, return_sequences=True)
    call = tf.function(ours, jit_compile=compiled)
    x = tf.constant(random_inputs())
    gradients = []
    for function, layer in ((theirs, theirs), (call, ours)):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = weighted([function(x)])
        weights = [v.value for v in layer.trainable_variables]
        gradients.append(tape.gradient(value, [x, *weights]))
    for wanted, given in zip(*gradients, strict=True):
        assert relative_error(given, wanted) < FLOAT64


@pytest.mark.parametrize(
    ("activation", "masked", "order"),
    few(
        [
            ("tanh", False, 2),
            ("tanh", True, 2),
            ("softmax", True, 2),
            ("tanh", True, 3),
        ],
        lambda activation, masked, order: activation == "softmax",
    ),
)
def test_higher_order_of_a_graph_under_eager_tapes(activation, masked, order):
    """TensorFlow then differentiates each graph in a graph of its own."""
    theirs, ours = unrolled_pair(activation=activation, return_sequences=True)
    mask = tf.constant(MIXED_MASK) if masked else None

    def gradient(function, order):
        with tf.GradientTape() as tape:
            tape.watch(x)
            if order == 1:
                value = weighted([function(x, mask=mask)])
            else:
                inner = gradient(function, order - 1)
                value = weighted([inner], squared=True, seed=order)
        return tape.gradient(value, x)

    x = tf.constant(random_inputs())
    expected, got = (
        gradient(function, order) for function in (theirs, tf.function(ours))
    )
    assert np.max(np.abs(expected)) > 1e-3
    assert relative_error(got, expected) < HIGHER


@in_modes("eager", "graph")
def test_persistent_tape(mode):
    """Gradients of two outputs from one forward pass, asked for in turn."""
    theirs, ours = unrolled_pair(return_sequences=True, return_state=True)

    def run(layer, x):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y, state = layer(x)
            values = weighted([y]), weighted([state], True), weighted([y[:, 1]])
        return [tape.gradient(value, x) for value in (*values, values[0])]

    x = tf.constant(random_inputs())
    expected = run(theirs, x)
    got = MODES[mode](lambda x: run(ours, x))(x)
    for wanted, given in zip(expected, got, strict=True):
        assert relative_error(given, wanted) < FLOAT64
    np.testing.assert_array_equal(got[0], got[3])
    assert np.all(got[2][:, 2:] == 0)


def test_gradient_by_an_inner_step_is_zero_after_it():
    """No path leads from a step to an output before it."""
    _, ours = pair(return_sequences=True)
    x = tf.constant(random_inputs())
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = ours(x)
    jacobian = tape.batch_jacobian(y, x).numpy()
    for step in range(T):
        assert np.all(jacobian[:, step, :, step + 1 :] == 0)
        assert np.all(np.abs(jacobian[:, step, :, : step + 1]).max((1, 3)) > 1e-3)


# --- Control flow


@pytest.mark.parametrize(
    ("taken", "mode"),
    few(
        itertools.product([True, False], MODES),
        lambda taken, mode: taken == (mode != "xla"),
    ),
)
def test_inside_a_branch(taken, mode):
    theirs, ours = unrolled_pair()

    def run(layer, x, taken):
        weights = [v.value for v in layer.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.cond(taken, lambda: layer(x), lambda: layer(2 * x[:, :3]))
            value = weighted([y])
        return tape.gradient(value, [x, *weights])

    x, taken = tf.constant(random_inputs()), tf.constant(taken)
    expected = run(theirs, x, taken)
    got = MODES[mode](lambda x, taken: run(ours, x, taken))(x, taken)
    for wanted, given in zip(expected, got, strict=True):
        assert np.max(np.abs(wanted)) > 1e-3
        assert relative_error(given, wanted) < FLOAT64


@in_modes("eager", "xla")
def test_inside_a_loop(mode):
    """Each turn feeds the last state in again."""
    theirs, ours = unrolled_pair()

    def run(layer, x):
        weights = [v.value for v in layer.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(x)
            _, state = tf.while_loop(
                lambda i, _: i < 3,
                lambda i, state: (i + 1, layer(x, initial_state=state)),
                (0, tf.constant(STATE)),
                maximum_iterations=3,
            )
            value = weighted([state])
        return tape.gradient(value, [x, *weights])

    x = tf.constant(random_inputs())
    expected = run(theirs, x)
    got = MODES[mode](lambda x: run(ours, x))(x)
    for wanted, given in zip(expected, got, strict=True):
        assert np.max(np.abs(wanted)) > 1e-3
        assert relative_error(given, wanted) < FLOAT64


# --- Forward mode

FORWARD = {
    "last output": {},
    "sequence and state": {"return_sequences": True, "return_state": True},
    "softmax": {"activation": "softmax"},
    "gelu": {"activation": "gelu"},
    "unrolled": {"unroll": True},
}


def primals_and_tangents(layer, x):
    primals = [x, *(v.value for v in layer.trainable_variables)]
    random = rng(4)
    return primals, [tf.constant(random.normal(size=p.shape)) for p in primals]


@pytest.mark.parametrize(
    ("case", "masked"),
    few(
        [(case, False) for case in FORWARD] + [("sequence and state", True)],
        lambda case, masked: masked or case == "softmax",
    ),
)
def test_jacobian_times_vector(case, masked):
    products = []
    for layer in unrolled_pair(**FORWARD[case]):
        x = tf.constant(random_inputs())
        with tf.autodiff.ForwardAccumulator(*primals_and_tangents(layer, x)) as forward:
            y = tf.nest.flatten(layer(x, mask=MIXED_MASK if masked else None))
        products.append([forward.jvp(each) for each in y])
    for wanted, given in zip(*products, strict=True):
        assert np.max(np.abs(wanted)) > 1e-3
        assert relative_error(given, wanted) < FLOAT64


@pytest.mark.parametrize(
    ("case", "masked"),
    few(
        [(case, False) for case in FORWARD] + [("sequence and state", True)],
        lambda case, masked: masked,
    ),
)
def test_hessian_times_vector(case, masked):
    """Forward over reverse: the tangent of a gradient."""
    products = []
    for layer in unrolled_pair(**FORWARD[case]):
        x = tf.constant(random_inputs())
        primals, tangents = primals_and_tangents(layer, x)
        with tf.autodiff.ForwardAccumulator(primals, tangents) as forward:
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = tf.nest.flatten(layer(x, mask=MIXED_MASK if masked else None))
                value = weighted(y)
            gradients = tape.gradient(value, primals)
        products.append([forward.jvp(g) for g in gradients])
    for wanted, given in zip(*products, strict=True):
        assert np.max(np.abs(wanted)) > 1e-3
        assert relative_error(given, wanted) < HIGHER


@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_forward_mode_inside_a_graph_says_that_it_cannot(mode):
    layer = BPTTRNN(H)
    x = tf.constant(random_inputs(), "float32")
    layer(x)

    def run(x):
        with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as forward:
            y = layer(x)
        return forward.jvp(y)

    # Autograph turns TensorFlow's LookupError into an error of its own.
    with pytest.raises(Exception, match="forward-mode.*two tf.GradientTapes"):
        MODES[mode](run)(x)


@in_modes("graph")
def test_forward_mode_around_a_graph(mode):
    """TensorFlow then builds the graph again, with its tangents."""
    theirs, ours = unrolled_pair()
    x, v = tf.constant(random_inputs()), tf.constant(random_inputs(seed=6))
    with tf.autodiff.ForwardAccumulator(x, v) as forward:
        y = theirs(x)
    expected = forward.jvp(y)
    call = MODES[mode](ours)
    call(x)
    with tf.autodiff.ForwardAccumulator(x, v) as forward:
        y = call(x)
    assert relative_error(forward.jvp(y), expected) < FLOAT64


def test_two_tapes_do_in_a_graph_what_forward_mode_does():
    """The way out that the error names: J v as the gradient of <u, J v> by u."""
    theirs, ours = unrolled_pair()
    x, v = tf.constant(random_inputs()), tf.constant(random_inputs(seed=6))
    with tf.autodiff.ForwardAccumulator(x, v) as forward:
        y = theirs(x)
    expected = forward.jvp(y)

    @tf.function
    def product(x, v):
        u = tf.zeros((B, H), x.dtype)
        with tf.GradientTape() as outer:
            outer.watch(u)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = ours(x)
            transposed = inner.gradient(y, x, u)
        return outer.gradient(transposed, u, v)

    assert relative_error(product(x, v), expected) < FLOAT64


def test_no_gradient_where_none_is():
    """An input that is not watched costs no error, and the mask has no gradient."""
    layer = BPTTRNN(H)
    x = tf.constant(random_inputs(), "float32")
    mask = tf.ones((B, T))
    other = tf.Variable(tf.zeros((B, D)))
    with tf.GradientTape() as tape:
        tape.watch([x, mask])
        y = layer(tf.stop_gradient(x), mask=mask)
    assert tape.gradient(y, [x, mask, other]) == [None, None, None]
