"""Derivatives beyond the first, and every other way in which TensorFlow takes one.

The other side of each comparison is plain automatic differentiation of unrolled steps:
SimpleRNN(unroll=True), run eagerly, or the steps written down here. That second derivatives
are right with any options is drawn in `test_contract.py`.
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
    MIXED_MASK,
    MODES,
    B,
    D,
    H,
    T,
    evaluate,
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
SEQUENCE = {"return_sequences": True}


def unrolled_pair(**options):
    """SimpleRNN, unrolled whatever the options say, and BPTTRNN."""
    theirs, _ = pair(**options | {"unroll": True})
    _, ours = pair(**options)
    return theirs, ours


def weighted(tensors, squared=False, seed=2):
    """A scalar in which every number of `tensors` has a weight of its own."""
    random = rng(seed)
    return sum(
        tf.reduce_sum(random.normal(size=x.shape) * (x * x if squared else x))
        for x in tf.nest.flatten(tensors)
    )


def variables(layer):
    return [v.value for v in layer.trainable_variables]


def check(run, mode="eager", tolerance=FLOAT64, inputs=None, **options):
    """`run(layer, x)` gives the same tensors for both layers, none of which vanishes.

    Args:
        run: a function of a layer and of tensors, run eagerly for SimpleRNN.
        mode: the name of one of `MODES`, for BPTTRNN.
        inputs: the tensors. None: random inputs.
    """
    theirs, ours = unrolled_pair(**options)
    inputs = [tf.constant(random_inputs())] if inputs is None else inputs
    expected = tf.nest.flatten(run(theirs, *inputs))
    got = tf.nest.flatten(MODES[mode](functools.partial(run, ours))(*inputs))
    for wanted, given in zip(expected, got, strict=True):
        assert np.max(np.abs(wanted)) > 1e-3, "it vanished: nothing was tested"
        assert relative_error(given, wanted) < tolerance
    return got


# --- Orders


def assert_order(order, mode, x=None, **options):
    call = {"state": STATE, "training": True, "order": order}
    mask = options.pop("mask", None)
    call |= {} if mask is None else {"mask": mask}
    x = random_inputs() if x is None else x
    theirs, ours = unrolled_pair(**options)
    expected = evaluate(theirs, x, plain(mode, "seed" in options), **call)
    got = evaluate(ours, x, mode, **call)
    for key, wanted in expected.items():
        assert np.max(np.abs(wanted)) > 1e-3
        assert relative_error(got[key], wanted) < HIGHER, key


CASES = {
    "mask": {"mask": MIXED_MASK, "return_state": True} | SEQUENCE,
    "softmax": {"activation": "softmax", "mask": MIXED_MASK} | SEQUENCE,
    "gelu": {"activation": "gelu"},
    "unrolled": {"unroll": True},
    "dropout": {"dropout": 0.3, "recurrent_dropout": 0.3, "seed": 3},
}


@pytest.mark.parametrize(
    ("case", "order", "mode"),
    few(
        itertools.product(CASES, [2, 3], MODES),
        lambda *case: (
            case
            in [
                ("mask", 2, "xla"),
                ("softmax", 2, "graph"),
            ]
        ),
    ),
)
def test_order(case, order, mode):
    assert_order(order, mode, **CASES[case])


@pytest.mark.parametrize(
    ("steps", "masked"),
    few(itertools.product([17, 37], [False, True]), lambda *case: case == (17, True)),
)
def test_second_order_of_a_long_sequence(steps, masked):
    """More steps than one block: five, thirteen."""
    mask = {"mask": rng(1).random((B, steps)) < 0.7} if masked else {}
    x = random_inputs(B, steps, D)
    assert_order(2, "graph", x, return_state=True, **SEQUENCE, **mask)


def steps(x, W, U, b):
    """The layer in so many words; the outputs at all steps."""
    h, hs = tf.zeros((x.shape[0], U.shape[0]), x.dtype), []
    for t in range(x.shape[1]):
        h = tf.tanh(x[:, t] @ W + h @ U + b)
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


@in_modes("eager")
def test_hessian(mode):
    """All of it, of a small layer: a symmetric matrix, and the right one."""
    features, units = 1, 2
    weights = [tf.constant(w) for w in random_weights(features, units)]
    x, cotangent = random_inputs(B, T, features), random_inputs(B, T, units, seed=3)
    expected = hessian(
        lambda: tf.reduce_sum(steps(tf.constant(x), *weights) * cotangent), weights
    )
    _, ours = pair(units, features, **SEQUENCE)
    parameters = variables(ours)
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
            gradients = outer.gradient(loss, variables(self))
            self.optimizer.apply(gradients, self.trainable_variables)
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


def jacobian(layer, x, mask=None):
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = layer(x, mask=mask)
    return tape.jacobian(y, [x, *variables(layer)])


def batch_jacobian(layer, x, mask=None):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, mask=mask)
    return tape.batch_jacobian(y, x)


@pytest.mark.parametrize(
    ("run", "mode", "options"),
    [
        (jacobian, "eager", SEQUENCE),
        (batch_jacobian, "graph", {"activation": "softmax"}),
        # Else TensorFlow has no kernel there to vectorize the arrays of a loop, whoever's.
        (batch_jacobian, "xla", {"unroll": True}),
        pytest.param(jacobian, "graph", SEQUENCE, marks=pytest.mark.slow),
        pytest.param(jacobian, "xla", {"unroll": True}, marks=pytest.mark.slow),
    ],
)
def test_jacobian(run, mode, options):
    mask = None if mode == "xla" else MIXED_MASK
    check(functools.partial(run, mask=mask), mode, **options)


def test_gradient_by_an_inner_step_is_zero_after_it():
    """No path leads from a step to an output before it."""
    _, ours = pair(**SEQUENCE)
    found = batch_jacobian(ours, tf.constant(random_inputs())).numpy()
    for step in range(T):
        assert np.all(found[:, step, :, step + 1 :] == 0)
        assert np.all(np.abs(found[:, step, :, : step + 1]).max((1, 3)) > 1e-3)


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
            y = layer(x[None], mask=mask[None] if masked else None, training=training)
            value = weighted([y])
        return tape.gradient(value, variables(layer))

    def of_each(x, mask):
        return tf.vectorized_map(lambda pair: of_one(ours, *pair), (x, mask))

    got = MODES[mode](of_each)(x, mask)
    for b in range(B):
        for wanted, given in zip(of_one(theirs, x[b], mask[b]), got, strict=True):
            assert masked or np.max(np.abs(wanted)) > 1e-3
            difference = np.max(np.abs(given[b] - wanted))
            assert difference < FLOAT64 * max(1.0, np.max(np.abs(wanted)))


# --- Tapes


def gradients_under(wrap, activation):
    """A layer wrapped by one way of calling it, under an eager tape."""

    def run(layer, x):
        call = wrap(layer) if isinstance(layer, BPTTRNN) else layer
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = weighted([call(x)])
        return tape.gradient(value, [x, *variables(layer)])

    check(run, activation=activation, **SEQUENCE)


@pytest.mark.parametrize(
    ("mode", "activation"),
    few(
        itertools.product(["graph", "xla"], ["tanh", "gelu", "softmax"]),
        lambda mode, f: f == ("gelu" if mode == "xla" else "tanh"),
    ),
)
def test_compiled_forward_pass_under_an_eager_tape(mode, activation):
    gradients_under(MODES[mode], activation)


@pytest.mark.parametrize(
    ("activation", "order"),
    few(itertools.product(["tanh", "softmax"], [2, 3]), lambda *c: c == ("softmax", 2)),
)
def test_higher_order_of_a_graph_under_eager_tapes(activation, order):
    """TensorFlow then differentiates each graph in a graph of its own."""

    def run(layer, x):
        call = MODES["graph"](layer) if isinstance(layer, BPTTRNN) else layer

        def gradient(order):
            with tf.GradientTape() as tape:
                tape.watch(x)
                if order == 1:
                    value = weighted([call(x, mask=tf.constant(MIXED_MASK))])
                else:
                    inner = gradient(order - 1)
                    value = weighted([inner], squared=True, seed=order)
            return tape.gradient(value, x)

        return gradient(order)

    check(run, tolerance=HIGHER, activation=activation, **SEQUENCE)


@in_modes("eager", "graph")
def test_persistent_tape(mode):
    """Gradients of two outputs from one forward pass, asked for in turn."""

    def run(layer, x):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y, state = layer(x)
            values = weighted([y]), weighted([state], True), weighted([y[:, 1]])
        return [tape.gradient(value, x) for value in (*values, values[0])]

    got = check(run, mode, return_state=True, **SEQUENCE)
    np.testing.assert_array_equal(got[0], got[3])
    assert np.all(got[2][:, 2:] == 0)


# --- Control flow


@pytest.mark.parametrize(
    ("taken", "mode"),
    few(
        itertools.product([True, False], MODES),
        lambda taken, mode: mode != "eager" and taken == (mode != "xla"),
    ),
)
def test_inside_a_branch(taken, mode):
    def run(layer, x, taken):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.cond(taken, lambda: layer(x), lambda: layer(2 * x[:, :3]))
            value = weighted([y])
        return tape.gradient(value, [x, *variables(layer)])

    check(run, mode, inputs=[tf.constant(random_inputs()), tf.constant(taken)])


@in_modes("xla")
def test_inside_a_loop(mode):
    """Each turn feeds the last state in again."""

    def run(layer, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            _, state = tf.while_loop(
                lambda i, _: i < 3,
                lambda i, state: (i + 1, layer(x, initial_state=state)),
                (0, tf.constant(STATE)),
                maximum_iterations=3,
            )
            value = weighted([state])
        return tape.gradient(value, [x, *variables(layer)])

    check(run, mode)


# --- Forward mode

FORWARD = {
    "masked sequence": {"return_state": True} | SEQUENCE,
    "softmax": {"activation": "softmax"},
    "gelu": {"activation": "gelu"},
    "unrolled": {"unroll": True},
}


def jvp(function, layer, x):
    """The tangents of what `function` gives of the primals, in forward mode."""
    primals, random = [x, *variables(layer)], rng(4)
    tangents = [tf.constant(random.normal(size=p.shape)) for p in primals]
    with tf.autodiff.ForwardAccumulator(primals, tangents) as forward:
        results = tf.nest.flatten(function(primals))
    return [forward.jvp(each) for each in results]


@pytest.mark.parametrize(
    ("case",), few([(case,) for case in FORWARD], lambda case: case != "unrolled")
)
def test_jacobian_times_vector(case):
    mask = MIXED_MASK if "masked" in case else None

    def run(layer, x):
        return jvp(lambda _: layer(x, mask=mask), layer, x)

    check(run, **FORWARD[case])


@pytest.mark.parametrize(
    ("case",), few([(case,) for case in FORWARD], lambda case: "masked" in case)
)
def test_hessian_times_vector(case):
    """Forward over reverse: the tangent of a gradient."""
    mask = MIXED_MASK if "masked" in case else None

    def run(layer, x):
        def gradients(primals):
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = weighted(layer(x, mask=mask))
            return tape.gradient(value, primals)

        return jvp(gradients, layer, x)

    check(run, tolerance=HIGHER, **FORWARD[case])


@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_forward_mode_inside_a_graph_says_that_it_cannot(mode):
    layer = BPTTRNN(H)
    x = tf.constant(random_inputs(), "float32")
    layer(x)

    def run(x):
        with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as forward:
            y = layer(x)
        return forward.jvp(y)

    # TensorFlow's LookupError may come out as an error of another kind.
    with pytest.raises(Exception, match="forward-mode.*two tf.GradientTapes"):
        MODES[mode](run)(x)


@in_modes("graph")
def test_forward_mode_around_a_graph(mode):
    """TensorFlow then builds the graph again, with its tangents."""

    def run(layer, x):
        call = MODES[mode](layer) if isinstance(layer, BPTTRNN) else layer
        call(x)
        return jvp(lambda _: call(x), layer, x)

    check(run)


def test_two_tapes_do_in_a_graph_what_forward_mode_does():
    """The way out that the error names: J v as the gradient of <u, J v> by u."""
    theirs, ours = unrolled_pair()
    x, v = tf.constant(random_inputs()), tf.constant(random_inputs(seed=6))
    with tf.autodiff.ForwardAccumulator(x, v) as forward:
        y = theirs(x)
    expected = forward.jvp(y)

    @MODES["graph"]
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
    mask, other = tf.ones((B, T)), tf.Variable(tf.zeros((B, D)))
    with tf.GradientTape() as tape:
        tape.watch([x, mask])
        y = layer(tf.stop_gradient(x), mask=mask)
    assert tape.gradient(y, [x, mask, other]) == [None, None, None]
