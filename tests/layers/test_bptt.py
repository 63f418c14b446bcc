"""BPTT(cell): the gradient of any cell, against keras.layers.RNN(cell).

The contract of `test_contract.py` holds for it too, around one cell; here are many cells,
and what a cell may do to be refused.
"""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    FLOAT64,
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
from hypothesis import strategies as st
from keras import ops
from some_cells import CELLS, INTEGERS, OWN, PLAIN, Cell, Nested, doubled_back
from twins import masks, truncations
from unrolled import Unrolled

from keras_bptt import BPTT, BPTTRNN, RandomizedTruncation
from keras_bptt.cells import derived
from keras_bptt.truncation import policy

T = 7
MASK = np.array([[0, 1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [0] * 7], bool)
EVERY = CELLS | INTEGERS


def pair(name, dtype="float64", radius=0.6, **options):
    """keras.layers.RNN(cell) and BPTT(cell), of the same weights."""
    options = {"return_sequences": True, "return_state": True} | options
    own = {
        k: options.pop(k) for k in ("checkpoint_every", "truncation") if k in options
    }
    own |= {
        k: options.pop(k)
        for k in ("adjoint_clipnorm", "adjoint_max_growth", "jit_compile")
        if k in options
    }
    layers = []
    for layer_class in (keras.layers.RNN, BPTT):
        layer = layer_class(
            EVERY[name](dtype=dtype),
            dtype=dtype,
            **options,
            **(own if layer_class is BPTT else {}),
        )
        layer.build((B, None, D))
        fill(layer, radius)
        layers.append(layer)
    if own.keys() - {"checkpoint_every", "jit_compile"}:
        limits = own.get("adjoint_clipnorm"), own.get("adjoint_max_growth")
        layers[0] = Unrolled(layers[0], None, policy(own.get("truncation")), *limits)
    return layers


def fill(layer, radius=0.6):
    layer.set_weights(
        [
            rng(i).normal(size=w.shape) * radius if w.dtype != "int32" else np.array(2)
            for i, w in enumerate(layer.weights)
        ]
    )


def inputs_of(name, *shape, seed=1):
    if name in INTEGERS:
        return rng(seed).integers(0, 5, shape)
    return random_inputs(*shape, seed=seed)


def check(name, mode="plain", *, order=1, tolerance=FLOAT64, options=None, **call):
    theirs, ours = pair(name, **options or {})
    x = inputs_of(name, B, T, D)
    call = {"training": True} | call
    expected = evaluate(theirs, x, "graph", order=order, **call)
    got = evaluate(ours, x, mode, order=order, **call)
    assert_same(got, expected, tolerance, dead=expected)
    live = [k for k, v in expected.items() if np.max(np.abs(v), initial=0.0) > 1e-3]
    if name != "reads_no_input":  # which stays at 0
        assert len(live) > len(expected) // 2, "most of it vanished: nothing was tested"


# --- Any cell

# By default all of them are drawn, in the plainest mode; and some stand here in each other.
MODE = {
    "graph": "LSTMCell, a stack, output_is_no_state, a_loop, a_function, embeds, nested, "
    "spectral_norm, grid",
    "xla": "GRUCell, layer_norm, heads, weight_norm, slices, a_conditional",
    "eager": "reads, a_number_of_a_row",
}


@pytest.mark.parametrize(
    ("name", "mode", "masked"),
    few(
        [
            (name, mode, masked)
            for name in EVERY
            for mode in ("eager", "graph", "xla")
            for masked in (True, False)
        ],
        lambda name, mode, masked: masked and name in MODE[mode].split(", "),
    ),
)
def test_any_cell(name, mode, masked):
    check(name, mode, **({"mask": MASK} if masked else {}))


@pytest.mark.parametrize(
    ("name", "mode"),
    few(
        [(n, mode) for n in EVERY if n not in OWN for mode in ("plain", "graph")],
        lambda name, mode: (
            (name, mode)
            in [
                ("LSTMCell", "graph"),
                ("output_is_no_state", "plain"),
                ("weight_norm", "plain"),
                ("softmax, silu", "plain"),
                ("a_function", "graph"),
            ]
        ),
    ),
)
def test_second_order(name, mode):
    check(name, mode, order=2, tolerance=10 * FLOAT64, mask=MASK)


@pytest.mark.parametrize("name", OWN)
def test_an_own_gradient_is_judged_within_a_graph(name):
    """Where the first call of the process is one: what is known of a step stays known."""
    derived._known.cache_clear()
    check(name, "graph")


@pytest.mark.parametrize("name", OWN)
def test_second_order_of_another_first_is_refused(name):
    """Of a custom gradient nothing is known but itself."""
    check(name)
    with pytest.raises(NotImplementedError, match="first derivatives alone"):
        check(name, order=2)


flags = st.booleans()


@st.composite
def configurations(draw, modes, names=tuple(EVERY)):
    def one_of(*values):
        return draw(st.sampled_from(values))

    name, mode = one_of(*names), one_of(*modes)
    time = draw(st.integers(1, 9))
    # Where a state recurs and is shown, and no other is.
    plain = name not in (
        "output_is_no_state",
        "residual",
        "shows_inputs",
        "nested",
        "state_that_stays",
        "state_that_nobody_reads",
        "matrix",
        "grid",
        "a stack",
        "reads_no_input",
        "reads_no_state",
    )
    options = {
        "return_sequences": draw(flags),
        "return_state": draw(flags),
        "go_backwards": draw(flags),
        "zero_output_for_mask": draw(flags),
        "checkpoint_every": one_of(None, None, 1, 2, "sqrt"),
        "truncation": draw(truncations(time)),
        "adjoint_clipnorm": one_of(None, None, 0.3, 2.0) if plain else None,
        "adjoint_max_growth": one_of(None, None, 1.0, 1.5) if plain else None,
        "radius": one_of(0.6, 1.0),
    }
    options = {k: v for k, v in options.items() if v is not None}
    call = {"training": draw(flags)}
    if draw(flags):
        call["mask"] = draw(masks(B, time))
    return name, options, call, time, mode


def check_drawn(drawn):
    name, options, call, time, mode = drawn
    theirs, ours = pair(name, **options)
    x = inputs_of(name, B, time, D, seed=3)
    states = keras.tree.flatten(ours.get_initial_state(B))
    if name != "a stack":  # whose states Keras takes in their structure alone
        call["state"] = [
            rng(5 + i).normal(size=s.shape) * 0.7 for i, s in enumerate(states)
        ]
    if not call["training"] and isinstance(theirs, Unrolled):
        call["training"] = True
    random = isinstance(options.get("truncation"), RandomizedTruncation)
    # Some custom gradients read variables, which TensorFlow takes in a graph alone.
    side = plain(mode, random)
    side = "graph" if name in OWN and side == "plain" else side
    expected = evaluate(theirs, x, side, **call)
    assert_near(evaluate(ours, x, mode, **call), expected)


@examples(100, derandomize=True)
@given(configurations(["plain"]))
def test_drawn(drawn):
    """Any cell with any options at once."""
    check_drawn(drawn)


@pytest.mark.slow
@examples(1800)
@given(configurations(["plain", "plain", "graph"]))
def test_many_drawn(drawn):
    check_drawn(drawn)


@pytest.mark.slow
@examples(200)
@given(configurations(["xla"]))
def test_many_drawn_under_xla(drawn):
    """As many as a process takes: what XLA compiles for a case keeps 170 maps of memory.

    Linux has 65,530 maps for a process, which crashes then.
    """
    check_drawn(drawn)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_weights_of_weights_are_made_once_a_call(mode):
    """A matrix exponential, a loop of weights alone. XLA has no gradient of it."""

    def orthogonal(self, x, h):
        U = tf.linalg.expm(self.U - ops.transpose(self.U))
        return ops.tanh(x @ self.W + h @ U + self.b)

    found = []
    for layer_class in keras.layers.RNN, BPTT:
        cell = Cell(orthogonal, weights=PLAIN, dtype="float64")
        layer = layer_class(cell, return_sequences=True, dtype="float64")
        layer.build((B, None, D))
        fill(layer)
        found.append(evaluate(layer, random_inputs(B, T, D), mode, training=True))
    assert_same(found[1], found[0])
    plan = layer.plan()
    assert plan.outside > 100
    assert plan.multiply_adds == H * H
    assert not plan.not_compiled


# --- Precision

EPS = {"mixed_float16": 2**-10, "mixed_bfloat16": 2**-7}


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("name", ["LSTMCell", "layer_norm", "weight_norm", "nested"])
@without_graphs()
def test_mixed_precision(name, policy):
    """To the rounding of some 40 sums what it is in float64; weights' in float32."""
    theirs, _ = pair(name)
    _, ours = pair(name, dtype=policy)
    x = random_inputs(B, T, D)
    expected = evaluate(theirs, x, "plain", training=True)
    got = evaluate(ours, x, "plain", training=True)
    half = tf.as_dtype(ours.compute_dtype)
    for key, array in expected.items():
        of_weights = key.startswith("d_") and key[2].isdigit()
        assert got[key].dtype == (np.float32 if of_weights else half), key
        assert relative_error(got[key], array) < 40 * EPS[policy], key


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_gradients_of_weights_are_added_in_wide_numbers(policy, usual_sizes):
    """2,400 ones and 2,400 halves: bfloat16 counts to 256, float16 to 2,048."""
    cell = Cell(
        lambda s, x, h: x @ s.W + s.b + 0 * (h @ s.U), weights=PLAIN, dtype=policy
    )
    layer = BPTT(cell, return_sequences=True, dtype=policy)
    x = tf.fill([B, 800, D], tf.constant(0.5, layer.compute_dtype))
    layer.build(x.shape)
    fill(layer)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.cast(layer(x, training=True), tf.float32))
    d_W, d_b = tape.gradient(loss, [cell.W.value, cell.b.value])
    np.testing.assert_array_equal(d_b, np.full(H, 800.0 * B))
    np.testing.assert_array_equal(d_W, np.full((D, H), 400.0 * B))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell"])
def test_thousands_of_steps_in_half_precision(cell, policy):
    """A gradient of 10,000 steps is added in float32: no worse than that of a step."""
    gradients = {}
    for dtype in ("float64", policy):
        _, layer = pair(cell, dtype=dtype, radius=0.3)
        x = tf.constant(0.5 * random_inputs(B, 10_000, D), layer.compute_dtype)

        @tf.function(autograph=False)
        def run(layer=layer, x=x):
            with tf.GradientTape() as tape:
                y, *_ = layer(x, training=True)
                loss = tf.reduce_mean(tf.cast(y, tf.float64) ** 2)
            return tape.gradient(loss, [v.value for v in layer.trainable_variables])

        gradients[dtype] = run()
    for got, want in zip(gradients[policy], gradients["float64"], strict=True):
        assert relative_error(got, want) < 40 * EPS[policy]


# --- What is found


def test_what_is_written_by_hand_is_found():
    """Of SimpleRNNCell and LSTMCell: products, what is saved, one delta."""
    plans = {}
    for name in ("SimpleRNNCell", "LSTMCell", "GRUCell"):
        _, layer = pair(name)
        plans[name] = layer.plan()
    for plan, gates in zip(plans.values(), (1, 4, 3), strict=True):
        assert plan.products["step"] == plan.products["step_back"] == 1
        assert plan.products["project"] == 1 and plan.products["gradients"] == 3
        assert plan.multiply_adds == gates * H * H and plan.drive == gates * H
    assert [plan.saved for plan in plans.values()] == [0, 4 * H, 4 * H]
    assert [plan.deltas for plan in plans.values()][:2] == [H, 4 * H]
    assert "project" in str(plans["LSTMCell"]) and "can compile" in str(
        plans["LSTMCell"]
    )


@pytest.mark.parametrize(
    "kind", [{}, {"truncation": 3}, {"checkpoint_every": 2}], ids=str
)
def test_of_the_plain_cell_it_is_bptt_rnn(kind):
    results = []
    _, ours = pair("SimpleRNNCell", **kind)
    other = BPTTRNN(
        H, return_sequences=True, return_state=True, dtype="float64", **kind
    )
    other.build((B, None, D))
    other.set_weights(ours.get_weights())
    for layer in (ours, other):
        results.append(
            evaluate(layer, random_inputs(B, T, D), "graph", training=True, mask=MASK)
        )
    assert_same(*results)


def test_frozen_weights_cost_nothing_and_are_seen_when_they_are_not():
    _, layer = pair("LSTMCell")
    before = layer.plan()
    layer.cell.trainable = False
    assert layer.plan().products["gradients"] == 1  # of the inputs
    assert layer.plan().trained == (0, 3)
    layer.cell.trainable = True
    assert layer.plan().products == before.products


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_an_attribute_that_changes_is_seen(mode):
    cell = Cell(
        lambda self, x, h: ops.tanh(x @ self.W + h @ self.U) / self.tau,
        weights=PLAIN,
        dtype="float64",
    )
    layers = keras.layers.RNN(cell, dtype="float64"), BPTT(cell, dtype="float64")
    layers[1].build((B, None, D))
    fill(layers[1])
    layers[0].built = True
    x, results = random_inputs(B, T, D), []
    for tau in (2.0, 0.5):
        cell.tau = tau
        expected, got = (evaluate(layer, x, mode, training=True) for layer in layers)
        assert_same(got, expected, dead=["d_2_b"])
        results.append(got["d_x"])
    assert relative_error(*results) > 0.1


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_what_the_step_reads_from_outside_has_a_gradient(mode):
    """A tensor that another network has made, and variables that Keras does not know."""
    raw = tf.Variable(rng(1).normal(size=H)), tf.Variable(rng(2).normal(size=H))
    made = tf.Variable(rng(3).normal(size=(H, 40)))

    def step(self, x, h):
        z = x @ self.W + h @ self.U * raw[0]
        return ops.tanh(z + tf.reduce_sum(self.context, 1))

    results = []
    for layer_class in (keras.layers.RNN, BPTT):
        cell = Cell(step, weights=PLAIN, dtype="float64")
        layer = layer_class(cell, dtype="float64")
        layer.build((B, None, D))
        fill(layer)

        def run(cell=cell, layer=layer):
            with tf.GradientTape() as tape:
                # Not by setattr, which Keras tracks.
                vars(cell)["context"] = tf.tanh(made)
                y = layer(tf.constant(random_inputs(B, T, D)), training=True)
                loss = tf.reduce_sum(y * y)
            return tape.gradient(loss, [raw[0], made])

        results.append(
            (tf.function(run, autograph=False) if mode == "graph" else run)()
        )
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < FLOAT64 and np.max(np.abs(want)) > 1e-2


def test_assertions_of_a_step_are_kept():
    _, layer = pair("asserts")
    state = tf.fill([B, H], tf.constant(np.nan, "float64"))
    for mode in (lambda f: f, tf.function):
        with pytest.raises(tf.errors.InvalidArgumentError, match="not finite"):
            mode(layer)(random_inputs(B, T, D), initial_state=state)
        with pytest.raises(tf.errors.InvalidArgumentError, match="too large"):
            mode(layer)(10 + random_inputs(B, T, D))


# --- What cannot be right


class Noisy(keras.layers.Layer):
    state_size = H

    def build(self, shape):
        self.W = self.add_weight(shape=(D, H), name="W")
        self.noise = keras.layers.GaussianNoise(0.1, dtype=self.dtype_policy)

    def call(self, x, states, training=False):
        h = ops.tanh(self.noise(x @ self.W, training=training) + states[0])
        return h, [h]


class Counts(Noisy):
    def build(self, shape):
        super().build(shape)
        self.steps = self.add_weight(shape=(), trainable=False, name="steps")

    def call(self, x, states):
        self.steps.assign_add(1.0)
        return ops.tanh(x @ self.W + states[0]), [ops.tanh(x @ self.W + states[0])]


class Normalizes(Noisy):
    def build(self, shape):
        super().build(shape)
        self.noise = keras.layers.BatchNormalization(dtype=self.dtype_policy)
        self.noise.build((None, H))


def of(step):
    return lambda **options: Cell(step, weights=PLAIN, **options)


ROWS = tf.constant(rng().normal(size=(B, H)))
REFUSED = {
    "mean": (of(lambda s, x, h: ops.tanh(x @ s.W + h - ops.mean(h, 0))), "alone.*Mean"),
    "order": (of(lambda s, x, h: ops.tanh(x @ s.W + tf.reverse(h, [0]))), "alone"),
    "sums": (of(lambda s, x, h: ops.tanh(x @ s.W + ops.cumsum(h, 0) @ s.U)), "alone"),
    "attention": (
        of(lambda s, x, h: ops.tanh(x @ s.W + ops.softmax(h @ ops.transpose(h)) @ h)),
        "alone",
    ),
    "predicate": (
        of(
            lambda s, x, h: tf.cond(
                tf.reduce_sum(h) > 0, lambda: x @ s.W, lambda: x @ s.W + ops.sin(h)
            )
        ),
        "alone",
    ),
    "batch size": (
        of(lambda s, x, h: ops.tanh(x @ s.W + h) / ops.cast(ops.shape(x)[0], h.dtype)),
        "number changes",
    ),
    "rows from outside": (of(lambda s, x, h: ops.tanh(x @ s.W + h + ROWS)), "alone"),
    "random": (
        of(
            lambda s, x, h: ops.tanh(
                x @ s.W + h + tf.random.normal((H,), dtype=h.dtype)
            )
        ),
        "random numbers",
    ),
    "update": (Counts, "change variables.*steps"),
    "batch normalisation": (Normalizes, "change variables.*moving_mean"),
    "py_function": (
        of(
            lambda s, x, h: tf.ensure_shape(
                tf.numpy_function(np.tanh, [x @ s.W + h], tf.float64), (None, H)
            )
        ),
        "py_function",
    ),
    "dtype": (of(lambda s, x, h: ops.cast(x @ s.W + h, "float32")), "as it takes them"),
    "shape": (of(lambda s, x, h: (x @ s.W + h)[:, :3]), "as it takes them"),
    "states": (of(lambda s, x, h: (h, h, h)), "as many states"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused(name):
    """At the first trace, in words, by the name of the cell."""
    make, words = REFUSED[name]
    layer = BPTT(make(dtype="float64", name="mine"), dtype="float64")
    with pytest.raises(ValueError, match=f"(?s)mine must.*{words}"):
        layer(random_inputs(B, T, D), training=True)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda layer: layer(np.ones((B, T, D + 1))), "was built for inputs"),
        (lambda layer: layer(np.ones((B, 0, D))), "at least one timestep"),
        (lambda layer: layer(tf.RaggedTensor.from_tensor(np.ones((B, T, D)))), "dense"),
        (
            lambda layer: layer(np.ones((B, T, D)), initial_state=np.ones((B, H))),
            "takes 2 states.*Received: 1",
        ),
        (
            lambda layer: layer(np.ones((B, T, D)), mask=np.ones((B, T + 1), bool)),
            "takes a `mask`",
        ),
        (
            lambda layer: BPTT(layer.cell, truncaton=3),
            r"Did you mean `truncation`.*help\(keras_bptt.BPTT\)",
        ),
        (lambda layer: BPTT(layer.cell).plan(), "must be built"),
        (lambda layer: BPTT(layer.cell, output_activation="tanh"), "`output_units`"),
    ],
)
def test_what_is_not_taken(call, words):
    _, layer = pair("LSTMCell")
    with pytest.raises(ValueError, match=f"(?s){words}"):
        call(layer)


# --- Wrapped, saved, distributed


@keras.saving.register_keras_serializable(package="tests")
class Registered(keras.layers.Layer):
    """A cell of a user's own: silu, softmax and a custom gradient."""

    def __init__(self, units, **options):
        super().__init__(**options)
        self.units = self.state_size = units

    def get_config(self):
        return super().get_config() | {"units": self.units}

    def build(self, shape):
        size = (shape[-1] + self.units, self.units)
        self.kernel = self.add_weight(shape=size, name="kernel")
        self.gate = self.add_weight(shape=size, name="gate")

    def call(self, x, states):
        both = ops.concatenate([x, states[0]], -1)
        h = doubled_back(both @ self.kernel) + ops.silu(both @ self.gate)
        h = h * ops.softmax(both @ self.gate)
        return h, [h]


def model_of(**options):
    inputs = keras.Input((None, D))
    layer = BPTT(Registered(H), return_sequences=True, **options)
    y = keras.layers.Dense(2)(keras.layers.Bidirectional(layer)(inputs))
    return keras.Model(inputs, y)


def test_keras_file(tmp_path):
    model = model_of(truncation=3, checkpoint_every=2)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    forward = again.layers[1].forward_layer
    assert isinstance(forward, BPTT) and isinstance(forward.cell, Registered)
    assert forward.truncation == model.layers[1].forward_layer.truncation
    x = random_inputs(B, T, D).astype("float32")
    np.testing.assert_array_equal(again(x), model(x))


LOADED = """
import sys, numpy as np, tensorflow as tf
folder = sys.argv[1]
module = tf.saved_model.load(folder)
assert "keras_bptt" not in sys.modules
x = tf.constant(np.load(folder + "/x.npy"))
with tf.GradientTape() as tape:
    tape.watch(x)
    y = module.run(x)
    loss = tf.reduce_sum(y * y)
d_x, *d_w = tape.gradient(loss, [x, *module.kept])
np.savez(folder + "/got.npz", y, d_x, *d_w)
"""


def test_saved_model_without_the_package(tmp_path):
    """Its gradient works where nobody knows the cell, nor its custom gradients."""
    layer = BPTT(Registered(H), return_sequences=True)
    x = tf.constant(random_inputs(B, T, D), tf.float32)
    layer.build(x.shape)
    fill(layer)
    module = tf.Module()
    module.kept = [v.value for v in layer.trainable_variables]
    module.run = tf.function(
        lambda x: layer(x, training=True),
        input_signature=[tf.TensorSpec((None, None, D))],
        autograph=False,
    )
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = module.run(x)
        loss = tf.reduce_sum(y * y)
    expected = [y, *tape.gradient(loss, [x, *module.kept])]
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=True)
    tf.saved_model.save(module, str(tmp_path), options=options)
    np.save(tmp_path / "x.npy", x)
    command = [sys.executable, "-c", LOADED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(tmp_path / "got.npz") as got:
        for g, want in zip(got.values(), expected, strict=True):
            assert relative_error(g, want) < 1e-5


def test_export(tmp_path):
    model = model_of()
    model.export(str(tmp_path), verbose=False)
    x = random_inputs(B, T, D).astype("float32")
    loaded = tf.saved_model.load(str(tmp_path))
    assert relative_error(loaded.serve(x), model(x)) < 1e-6


def test_a_list_is_a_stack_and_fit_lowers_the_loss():
    cells = [Nested(), keras.layers.LSTMCell(8, dropout=0.1), keras.layers.GRUCell(4)]
    model = keras.Sequential(
        [keras.Input((None, D)), BPTT(cells), keras.layers.Dense(1)]
    )
    x = random_inputs(64, 12, D).astype("float32")
    model.compile(keras.optimizers.Adam(0.02), "mse")
    history = model.fit(x, x[:, -3:, 0].sum(1), epochs=8, verbose=0).history["loss"]
    assert history[-1] < 0.9 * history[0]


DROPPING = {
    "a factor for each gate": lambda: keras.layers.LSTMCell(
        H, dropout=0.4, recurrent_dropout=0.3, seed=3
    ),
    "one factor": lambda: keras.layers.GRUCell(H, dropout=0.4, seed=3),
    "a stack": lambda: keras.layers.StackedRNNCells(
        [
            keras.layers.SimpleRNNCell(5, dropout=0.4, recurrent_dropout=0.3, seed=3),
            keras.layers.LSTMCell(H, dropout=0.4, seed=4),
        ]
    ),
}


def check_dropout(make, mode="plain"):
    """The same seed, the same factors."""
    results = []
    for layer_class in (keras.layers.RNN, BPTT):
        layer = layer_class(make(), return_sequences=True)
        layer.build((B, None, D))
        fill(layer)
        call = {"training": True, "mask": MASK}
        results.append(evaluate(layer, random_inputs(B, T, D), mode, **call))
    assert_same(results[1], results[0], 2e-5)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("cell", DROPPING)
def test_dropout_is_as_the_cell_draws_it(cell, mode):
    check_dropout(DROPPING[cell], mode)
