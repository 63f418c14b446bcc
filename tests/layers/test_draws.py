"""Cells that draw random numbers in every step, in BPTT(cell).

`Noisy` draws, `Fed` is the same cell that finds the numbers among its inputs. A `Noisy`
that shows what it draws says what these are.
"""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import B, D, H, assert_same, evaluate, few, random_inputs
from keras import ops
from some_cells import PLAIN, Cell
from test_bptt import fill
from unrolled import Unrolled

from keras_bptt import BPTT, Truncation
from keras_bptt.truncation import policy

T = 11
MASK = np.array(
    [[0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0], [0] * T],
    bool,
)


def step(self, x, h, normal, kept):
    """A rate network with noise that is scaled by a weight, and zoneout."""
    noise = (1 + self.b) * normal
    after = 0.7 * h + 0.3 * ops.tanh(x @ self.W + h @ self.U + self.b + noise)
    return ops.where(kept, h, after * (1 + 0.1 * normal))


class Noisy(keras.layers.Layer):
    """Draws a normal number and a truth value for each unit of each step.

    Args:
        shows: "state", or "normal" or "kept": what it draws.
    """

    state_size = H

    def __init__(self, seed=5, shows="state", **options):
        super().__init__(**options)
        self.seed_generator = None
        if seed is not None:
            self.seed_generator = keras.random.SeedGenerator(seed)
        self.shows = shows

    def build(self, shape):
        for name, size in PLAIN.items():
            setattr(self, name, self.add_weight(shape=size, name=name))

    def call(self, x, states, training=False):
        h, seed = states[0], self.seed_generator
        normal = keras.random.normal(ops.shape(h), dtype=h.dtype, seed=seed)
        kept = keras.random.uniform(ops.shape(h), dtype=h.dtype, seed=seed) < 0.3
        after = step(self, x, h, normal, kept)
        shown = {"state": after, "normal": normal, "kept": ops.cast(kept, h.dtype)}
        return shown[self.shows], [after]


class Fed(Noisy):
    """The same; its inputs end with what the other draws."""

    def build(self, shape):
        super().build((*shape[:-1], D))

    def call(self, x, states):
        x, normal, kept = ops.split(x, [D, D + H], -1)
        after = step(self, x, states[0], normal, kept > 0.5)
        return after, [after]


class WithMore(BPTT):
    """Finds more features of its inputs in itself."""

    more = None

    def call(self, x, **options):
        return super().call(tf.concat([x, tf.cast(self.more, x.dtype)], -1), **options)


def layer_of(cell, layer_class=BPTT, features=D, radius=0.6, **options):
    usual = {"return_sequences": True, "dtype": "float64"}
    if issubclass(layer_class, BPTT):
        usual["jit_compile"] = False  # which takes long, and has a case of its own
    options = usual | options
    layer = layer_class(cell(dtype=options["dtype"]), **options)
    layer.build((B, None, features))
    fill(layer, radius)
    restart(layer)
    return layer


def restart(layer, seed=5):
    """Let the seed be what it was when the cell was made."""
    if layer.cell.seed_generator is not None:
        layer.cell.seed_generator.state.assign([seed, 0])


def draws_of(x, shows, **options):
    """What a layer of these options draws, (batch, timesteps, units) as processed."""
    wanted = {"go_backwards", "dtype", "jit_compile"}
    options = {k: v for k, v in options.items() if k in wanted}
    layer = layer_of(lambda **k: Noisy(shows=shows, **k), **options)
    return layer(x, training=True).numpy()


def both(x, mode="plain", mask=None, order=1, **options):
    """The results of a noisy layer, and of one that is fed the very same draws."""
    noisy = layer_of(Noisy, **options)
    got = evaluate(noisy, x, mode, mask=mask, order=order, training=True)
    drawn = [draws_of(x, shows, **options) for shows in ("normal", "kept")]
    if options.get("go_backwards"):
        drawn = [t[:, ::-1] for t in drawn]
    fed = layer_of(Fed, WithMore, features=D + 2 * H, **options)
    fed.more = np.concatenate(drawn, -1)
    return got, evaluate(fed, x, mask=mask, order=order, training=True)


OPTIONS = {
    "plain": {},
    "last output": {"return_sequences": False},
    "states": {"return_state": True},
    "backwards": {"go_backwards": True},
    "checkpoints": {"checkpoint_every": 4},
    "sqrt": {"checkpoint_every": "sqrt"},
    "unrolled": {"unroll": True},
    "chunks": {"truncation": 4},
    "windows": {"truncation": Truncation(5, 2)},
    "windows, checkpoints": {"truncation": Truncation(5, 2), "checkpoint_every": 3},
    "last window": {"truncation": 4, "return_sequences": False},
    "clipped": {"adjoint_clipnorm": 0.5},
    "zero output": {"zero_output_for_mask": True},
    "not compiled": {"jit_compile": False},
    "compiled": {"jit_compile": True},
}


def check(name, mode="plain", masked=True, order=1):
    x = random_inputs(B, T, D)
    got, expected = both(x, mode, MASK if masked else None, order, **OPTIONS[name])
    assert_same(got, expected, dead=expected)


def _one_of_each(name, mode, masked):
    place = list(OPTIONS).index(name)
    return (mode == "graph") == place % 2 and masked == place // 2 % 2


@pytest.mark.parametrize(
    ("name", "mode", "masked"),
    few(itertools.product(OPTIONS, ("eager", "graph"), (False, True)), _one_of_each),
)
def test_gradients_are_those_of_the_very_draws(name, mode, masked):
    check(name, mode, masked)


def test_gradients_are_those_of_plain_autodiff():
    """And not only of another layer of ours."""
    x = random_inputs(B, T, D)
    noisy = layer_of(Noisy)
    got = evaluate(noisy, x, "graph", training=True)
    drawn = [draws_of(x, shows) for shows in ("normal", "kept")]
    host = layer_of(Fed, keras.layers.RNN, features=D + 2 * H)
    plain = Unrolled(host, None, policy(None))
    expected = evaluate(plain, np.concatenate([x, *drawn], -1), training=True)
    expected["d_x"] = expected["d_x"][:, :, :D]
    assert_same(got, expected)
    assert np.mean(drawn[1]) not in (0, 1)


@pytest.mark.parametrize(
    "name",
    few(
        [(n,) for n in ("plain", "windows", "clipped", "checkpoints")], "windows".__eq__
    ),
)
def test_second_order(name):
    check(name, "graph", True, order=2)


@pytest.mark.parametrize("options", [{}, {"checkpoint_every": "sqrt"}])
def test_long_sequences_with_sizes_as_users_have_them(options, usual_sizes):
    x = random_inputs(B, 700, D)
    got, expected = both(x, "graph", jit_compile=True, **options)
    assert_same(got, expected, dead=expected)


def test_long_sequences_in_half_precision(usual_sizes):
    """The same draws, and gradients near those of float32 with them."""
    x = random_inputs(B, 300, D).astype("float32")
    got, expected = both(x, "graph", dtype="mixed_bfloat16", radius=0.3)
    for key, value in expected.items():
        error = np.max(np.abs(got[key].astype("float32") - value.astype("float32")))
        assert error <= 0.05 * np.max(np.abs(value.astype("float32"))), key


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_batch_in_parts(mode, monkeypatch):
    """Which the cores do side by side: each example has the draws of the whole batch."""
    x, results = random_inputs(9, T, D), []
    for least in 0, 2**60:
        monkeypatch.setattr("keras_bptt.engine.parts.LEAST_WORK", least)
        monkeypatch.setattr("keras_bptt.engine.parts.cores", lambda: 2)
        for options in {}, {"checkpoint_every": 4}:
            layer = layer_of(Noisy, jit_compile=True, **options)
            results.append(evaluate(layer, x, mode, training=True))
    for other in results[1:]:
        assert_same(other, results[0], 1e-12)


@pytest.mark.parametrize("known", [(B, None), (None, T), (None, None)])
@pytest.mark.parametrize(
    "options", [{}, {"checkpoint_every": "sqrt"}, {"truncation": 4}]
)
def test_sizes_that_only_run_time_tells(known, options):
    x = random_inputs(B, T, D)
    layer = layer_of(Noisy, **options)
    expected = layer(x, training=True).numpy()
    spec = tf.TensorSpec([*known, D], tf.float64)
    call = tf.function(lambda x: layer(x, training=True), input_signature=[spec])
    for _ in range(2):
        restart(layer)
        np.testing.assert_allclose(call(x).numpy(), expected, rtol=0, atol=1e-12)


def test_a_compiled_call_within_a_graph_that_differentiates_it():
    """XLA compiles the way back apart, and has to know the sizes that it draws."""
    # So many blocks that there is a loop over them.
    layer, x = layer_of(Noisy, checkpoint_every=2), random_inputs(B, 40, D)
    compiled = tf.function(lambda x: layer(x, training=True), jit_compile=True)

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(compiled(x) ** 2)
        return tape.gradient(loss, x)

    found = []
    for way in gradient, tf.function(gradient):
        restart(layer)
        found.append(way(tf.constant(x)))
    np.testing.assert_allclose(*found, rtol=1e-9, atol=1e-12)


# --- What is drawn


def draws(shape, **options):
    layer = layer_of(lambda **k: Noisy(shows="normal", **k), **options)
    return layer, lambda: layer(np.zeros((*shape, D)), training=True).numpy()


def test_draws_are_normal_and_independent(usual_sizes):
    """Over steps, across the edges of groups, examples, units, calls, a step's two."""
    layer, draw = draws((40, 200), jit_compile=False)
    first, second = draw(), draw()
    uniform = layer_of(lambda **k: Noisy(shows="kept", **k))(np.zeros((40, 200, D)))
    number = first.size
    assert len(np.unique(np.concatenate([first, second]))) == 2 * number
    for moment, expected, deviation in ((1, 0, 1), (2, 1, 2**0.5), (4, 3, 96**0.5)):
        mean = np.mean(first**moment)
        assert abs(mean - expected) < 5 * deviation / number**0.5, moment
    assert abs(np.mean(uniform) - 0.3) < 5 * (0.21 / number) ** 0.5
    pairs = {
        "steps": (first[:, 1:], first[:, :-1]),
        "64 steps": (first[:, 64:], first[:, :-64]),
        "examples": (first[1:], first[:-1]),
        "halves": (first[:20], first[20:]),
        "units": (first[:, :, 1:], first[:, :, :-1]),
        "calls": (first, second),
        "a step's": (first, np.array(uniform) - 0.3),
    }
    for name, (a, b) in pairs.items():
        correlation = np.mean(a * b) / np.std(a) / np.std(b)
        assert abs(correlation) < 5 / a.size**0.5, name


class Twice(keras.layers.Layer):
    """Shows both of two draws in a step."""

    state_size = H

    def __init__(self, **options):
        super().__init__(**options)
        self.seed_generator = keras.random.SeedGenerator(5)

    def call(self, x, states):
        both = [
            keras.random.normal(
                ops.shape(states[0]), dtype=self.compute_dtype, seed=self.seed_generator
            )
            for _ in range(2)
        ]
        return ops.concatenate(both, -1), [states[0] + both[0] - both[1]]


def test_two_draws_of_a_step_are_independent_at_any_distance(usual_sizes):
    """Of groups too: the second of a step is not the first of another one."""
    shows = {"return_sequences": True, "return_state": True}
    layer = BPTT(Twice(dtype="float64"), dtype="float64", **shows)
    calls = [layer(np.zeros((60, 640, 1))) for _ in range(3)]
    shown, state = (t.numpy() for t in calls[0])
    assert len(np.unique(np.stack([y for y, _ in calls]))) == 3 * shown.size
    first, second = np.split(shown, 2, -1)
    for lag in (1, 64, 128):
        for a, b in ((first, second), (second, first), (first, first)):
            a, b = a[:, lag:], b[:, :-lag]
            assert abs(np.mean(a * b)) < 5 / a.size**0.5, lag
    # A random walk of 640 steps of variance 2.
    deviation = (2 / state.size) ** 0.5
    assert abs(np.mean(state**2) / 1280 - 1) < 5 * deviation


def test_the_draws_do_not_ask_who_compiles():
    x = random_inputs(B, T, D)
    found = [draws_of(x, "normal", jit_compile=jit) for jit in (False, True)]
    assert np.array_equal(*found)


def test_a_seed_says_all():
    """A fixed seed gives the same run twice; every call draws anew."""
    runs = []
    for _ in range(2):
        _, draw = draws((B, T))
        runs.append([draw(), draw()])
    assert np.array_equal(*runs)
    assert not np.any(runs[0][0] == runs[0][1])
    layer, draw = draws((B, T))
    restart(layer, seed=6)
    assert not np.any(draw() == runs[0][0])


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_generator_moves_on_by_one_a_call(mode):
    layer, _ = draws((B, T))
    call = tf.function(layer) if mode == "graph" else layer
    for _ in range(3):
        call(np.zeros((B, T, D)))
    assert layer.cell.seed_generator.state.numpy().tolist() == [5, 3]
    assert layer.cell.seed_generator.state.trainable is False


def test_a_cell_without_a_seed_draws_from_that_of_keras():
    layer = layer_of(lambda **k: Noisy(seed=None, shows="normal", **k))
    found = []
    for _ in range(2):
        keras.utils.set_random_seed(3)
        found.append([layer(np.zeros((B, T, D))).numpy() for _ in range(2)])
    assert np.array_equal(*found)
    assert not np.any(found[0][0] == found[0][1])


def test_longer_sequences_begin_alike():
    """The draws of a step do not depend on how many steps follow."""
    x = random_inputs(B, 2 * T, D)
    assert np.array_equal(draws_of(x[:, :T], "normal"), draws_of(x, "normal")[:, :T])


def test_a_dropout_layer_in_a_cell_drops_anew():
    class Drops(keras.layers.Layer):
        state_size = D

        def build(self, shape):
            self.dropout = keras.layers.Dropout(0.4, seed=1)

        def call(self, x, states, training=False):
            x = self.dropout(x, training=training)
            return x, [x + 0 * states[0]]

    layer = BPTT(Drops(), return_sequences=True)
    x = np.ones((30, 40, D), "float32")
    dropped = layer(x, training=True).numpy() == 0
    assert abs(np.mean(dropped) - 0.4) < 5 * (0.24 / dropped.size) ** 0.5
    assert np.all(np.any(dropped[:, 1:] != dropped[:, :-1], axis=(0, 2)))
    np.testing.assert_array_equal(layer(x), x)


@pytest.mark.parametrize("reads", ["where", "sum", "state"])
def test_a_draw_that_is_shown_and_read(reads):
    """By one other operation, which alone might stand for it."""

    def drawn(self, x, h):
        u = keras.random.uniform(ops.shape(h), dtype=h.dtype, seed=self.seed_generator)
        after = {
            "where": ops.where(u < 0.3, h, 1 + h),
            "sum": h + 2 * u,
            "state": 2 * u,
        }
        return u, after[reads]

    cell = Cell(drawn, dtype="float64")
    cell.seed_generator = keras.random.SeedGenerator(1)
    layer = BPTT(cell, return_sequences=True, return_state=True, dtype="float64")
    u, last = (t.numpy() for t in layer(np.zeros((B, T, D))))
    expected = {"where": (u >= 0.3).sum(1), "sum": 2 * u.sum(1), "state": 2 * u[:, -1]}
    np.testing.assert_allclose(last, expected[reads], rtol=1e-12)


def test_a_stateless_call_moves_the_generator_that_it_is_given():
    layer = layer_of(Noisy)
    weights = [v.value for v in layer.trainable_variables]
    model = keras.Sequential([keras.Input((T, D), dtype="float64"), layer])
    x = random_inputs(B, T, D)
    given = [tf.constant([5, 7], "int64")]
    y, (state, *_) = model.stateless_call(weights, given, x)
    assert state.numpy().tolist() == [5, 8]
    assert layer.cell.seed_generator.state.numpy().tolist() == [5, 0]
    layer.cell.seed_generator.state.assign([5, 7])
    np.testing.assert_allclose(layer(x), y, rtol=1e-12)


def test_a_cell_within_a_cell_that_drops_out_is_refused():
    class Outer(keras.layers.Layer):
        state_size = [H, H]

        def build(self, shape):
            self.inner = keras.layers.LSTMCell(H, dropout=0.4)
            self.inner.build(shape)

        def call(self, x, states, training=False):
            return self.inner(x, states, training=training)

    layer, x = BPTT(Outer()), random_inputs(B, T, D)
    assert layer(x).shape == (B, H)
    with pytest.raises(ValueError, match="no `dropout`.*inner with dropout=0.4"):
        layer(x, training=True)


def test_a_stack_of_cells_that_draw():
    """Each with its own seed, and of one seed the same twice."""
    found = []
    for _ in range(2):
        cells = [Noisy(seed=s, shows="normal", dtype="float64") for s in (1, 2, 1)]

        class Shows(keras.layers.Layer):
            state_size = (H, H, H)

            def build(self, shape, cells=cells):
                self.cells = cells
                for cell in cells:
                    cell.build(shape)

            def call(self, x, states):
                pairs = [c(x, [s]) for c, s in zip(self.cells, states, strict=True)]
                return ops.concatenate([p[0] for p in pairs], -1), [
                    p[1][0] for p in pairs
                ]

        layer = BPTT(Shows(dtype="float64"), return_sequences=True, dtype="float64")
        found.append(layer(np.zeros((B, T, D))).numpy())
    assert np.array_equal(*found)
    first, second, third = np.split(found[0], 3, -1)
    assert np.array_equal(first, third)
    assert not np.any(first == second)


def test_a_model_trains_and_is_stored(tmp_path):
    """By fit, and as an archive and an export that draw like the model."""
    x = random_inputs(16, T, D).astype("float32")
    y = np.sum(x[:, :, 0], 1, keepdims=True)
    layer = BPTT(Noisy(), return_sequences=False, truncation=None)
    model = keras.Sequential([keras.Input((None, D)), layer, keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.02), "mse")
    losses = model.fit(x, y, epochs=40, verbose=0).history["loss"]
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    path = tmp_path / "model.keras"
    model.save(path)
    again = keras.models.load_model(path, custom_objects={"Noisy": Noisy})
    for each in model, again:
        restart(each.layers[0])
    np.testing.assert_allclose(again(x), model(x), rtol=1e-5, atol=1e-6)
    model.export(tmp_path / "exported", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "exported")
    one, other = loaded.serve(x).numpy(), loaded.serve(x).numpy()
    assert np.all(np.isfinite(one)) and not np.allclose(one, other)


def test_a_model_trains_under_a_strategy():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    x = random_inputs(4, T, D).astype("float32")
    with strategy.scope():
        layer = BPTT(Noisy(), jit_compile=False)
        model = keras.Sequential([keras.Input((T, D)), layer, keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    model.fit(x, x[:, 0, :1], batch_size=2, epochs=3, verbose=0)
    assert layer.cell.seed_generator.state.numpy()[1] >= 6  # one for each update


def test_plan_names_what_is_drawn():
    layer = layer_of(Noisy)
    plan = layer.plan()
    assert plan.drawn == 2 * H
    assert f"{2 * H} numbers drawn" in str(plan)
    assert layer_of(Fed, features=D + 2 * H).plan().drawn == 0


# --- What is refused

OUTSIDE = keras.random.SeedGenerator(1)


def drawing(function, message):
    return pytest.param(function, message, id=function.__name__)


def stateful(s, x, h):
    return h + tf.random.normal(tf.shape(h), dtype=h.dtype)


def fixed(s, x, h):
    return h + keras.random.normal(ops.shape(h), dtype=h.dtype, seed=3)


def for_no_row(s, x, h):
    return h + keras.random.normal((H,), dtype=h.dtype, seed=s.seed_generator)


def for_one_row(s, x, h):
    return h + keras.random.normal((1, H), dtype=h.dtype, seed=s.seed_generator)


def for_other_rows(s, x, h):
    shape = (2 * ops.shape(h)[0], H)
    drawn = keras.random.normal(shape, dtype=h.dtype, seed=s.seed_generator)
    return h + ops.reshape(drawn, (-1, 2, H))[:, 0]


def by_the_state(s, x, h):
    place = keras.random.categorical(h, 1, seed=s.seed_generator)
    return h + ops.cast(place, h.dtype)


def by_the_batch(s, x, h):
    most = ops.shape(h)[0]
    drawn = keras.random.randint(ops.shape(h), 0, most, seed=s.seed_generator)
    return h + ops.cast(drawn, h.dtype)


def by_a_weight(s, x, h):
    return h + keras.random.gamma(
        ops.shape(h), ops.exp(s.b), dtype=h.dtype, seed=s.seed_generator
    )


def from_elsewhere(s, x, h):
    return h + keras.random.normal(ops.shape(h), dtype=h.dtype, seed=OUTSIDE)


def shuffled(s, x, h):
    return keras.random.shuffle(h, seed=s.seed_generator)


def centred(s, x, h):
    drawn = keras.random.normal(ops.shape(h), dtype=h.dtype, seed=s.seed_generator)
    return h + drawn - ops.mean(drawn, 0, keepdims=True)


def seed_as_number(s, x, h):
    return h + ops.cast(s.seed_generator.next()[0], h.dtype)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        drawing(stateful, "functions of `keras.random`.*RandomStandardNormal"),
        drawing(fixed, "a seed of its own.*fixed seed"),
        drawing(for_no_row, "for each example"),
        drawing(for_one_row, "for each example"),
        drawing(for_other_rows, "for each example"),
        drawing(by_the_state, "no state, input or weight"),
        drawing(by_a_weight, "no state, input or weight"),
        drawing(by_the_batch, "no state, input or weight"),
        drawing(from_elsewhere, "belongs to its cell"),
        drawing(shuffled, "alone"),
        drawing(centred, "alone"),
        drawing(seed_as_number, "made of a seed"),
    ],
)
def test_what_is_no_draw_of_a_row_raises(function, message):
    cell = Cell(function, (H,), PLAIN, dtype="float64")
    cell.seed_generator = keras.random.SeedGenerator(1)
    layer = BPTT(cell, dtype="float64")
    with pytest.raises(ValueError, match=message):
        layer(random_inputs(B, T, D))
