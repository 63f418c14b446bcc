"""Every error says what was passed, what is allowed and what to do."""

import importlib.util
import inspect
import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import B, D, H, T, random_inputs

from keras_bptt import BPTTRNN, RandomizedTruncation, Truncation


def inputs(*shape):
    return random_inputs(*(shape or (B, T, D))).astype("float32")


# For each argument: what an error says is allowed; values that are not, and that are.
ARGUMENTS = {
    "units": ("positive integer", [0, -1, 2.5, 3.0, "3", True, None], [np.int64(3)]),
    "output_units": (
        "positive integer.*or None",
        [0, 2.5, "8", True, [3]],
        [np.int32(3)],
    ),
    "truncation": (
        "positive integer, a Truncation.*Pass k",
        [0, -1, 2.0, True, False, "10", [3], {"steps": 3}],
        [np.int32(3), Truncation(3), RandomizedTruncation(3), None],
    ),
    "checkpoint_every": (
        "positive integer.*'sqrt'.*or None",
        [0, -1, 2.5, True, "log", [3]],
        [3, np.int64(3), "sqrt", None],
    ),
    "adjoint_clipnorm": (
        "positive finite number.*None to clip nothing",
        [0, -1, 0.0, "1", np.inf, np.nan, True, [1]],
        [0.5, 2, np.float32(2), np.int64(2), None],
    ),
    "adjoint_max_growth": (
        "finite number of at least 1.*None to clip nothing",
        [0.9, 0, -1, "1", np.inf, np.nan, True, [1]],
        [1, 1.0, np.float32(2), np.int64(2), None],
    ),
    "jit_compile": ("True, False or 'auto'", [None, "foo", 1], [True, False, "auto"]),
    "unroll": (
        "True.*False, or a positive integer",
        [-5, 0, None, "a"],
        [True, 3, False],
    ),
}
# These two have no setter.
SET = [name for name in ARGUMENTS if "units" not in name]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_arguments(name):
    allowed, wrong, _ = ARGUMENTS[name]
    for value in wrong:
        received = re.escape(f"Received: {name}={value!r}")
        with pytest.raises(ValueError) as error:
            BPTTRNN(**{"units": H} | {name: value})
        said = str(error.value)
        assert re.search(received, said) and re.search(allowed, said, re.DOTALL), said


@pytest.mark.parametrize("name", ["units", "output_units", "checkpoint_every"])
def test_integers_of_numpy_become_integers(name):
    layer = BPTTRNN(**{"units": 3} | {name: np.int64(3)})
    assert type(layer.get_config()[name]) is int
    assert layer(inputs()).shape == (B, 3)


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("name", SET)
def test_options_are_checked_where_they_are_set(name, built):
    """As where the layer is made, in the same words; what was set before stays."""
    _, wrong, right = ARGUMENTS[name]
    layer = BPTTRNN(H)
    if built:
        layer.build((None, None, D))
        right = [
            value for value in right if not isinstance(value, RandomizedTruncation)
        ]
    for value in right:
        setattr(layer, name, value)
        made = BPTTRNN(H, **{name: value})
        assert getattr(layer, name) == getattr(made, name)
        assert layer.get_config().get(name) == made.get_config().get(name)
        for other in wrong:
            with pytest.raises(ValueError) as error:
                BPTTRNN(H, **{name: other})
            before = layer.get_config()
            with pytest.raises(ValueError) as same:
                setattr(layer, name, other)
            assert str(same.value) == str(error.value)
            assert layer.get_config() == before


def test_a_built_layer_gets_no_randomized_truncation():
    layer = BPTTRNN(H)
    layer.build((None, None, D))
    with pytest.raises(ValueError, match="no layer that is built.*Make the layer with"):
        layer.truncation = RandomizedTruncation(3)


@pytest.mark.parametrize("dtype", ["float16", "mixed_float16", "global"])
def test_adjoint_clipnorm_in_float16(dtype):
    """Where the layer is made, where its dtype is the global one, and where it is set."""
    options = {"dtype": dtype} if dtype != "global" else {}
    if dtype == "global":
        keras.config.set_dtype_policy("mixed_float16")
    try:
        refused = pytest.raises(
            ValueError, match="wider range.*float16.*mixed_bfloat16"
        )
        with refused:
            BPTTRNN(H, adjoint_clipnorm=1.0, **options)
        layer = BPTTRNN(H, **options)
        with refused:
            layer.adjoint_clipnorm = 1.0
        assert layer.adjoint_clipnorm is None
    finally:
        keras.config.set_dtype_policy("float32")
    BPTTRNN(H, adjoint_clipnorm=1.0, dtype="mixed_bfloat16")


def test_unknown_argument():
    with pytest.raises(ValueError, match="no_such_argument"):
        BPTTRNN(H, no_such_argument=1)
    with pytest.raises(ValueError, match="no_such_function"):
        BPTTRNN(H, activation="no_such_function")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("truncate", "truncation"),
        ("clipnorm", "adjoint_clipnorm"),
        ("return_sequence", "return_sequences"),
        ("checkpoint", "checkpoint_every"),
        ("output_size", "output_units"),
        ("Dtype", "dtype"),
        ("drop_out", "dropout"),
    ],
)
def test_misspelled_argument(wrong, right):
    with pytest.raises(
        ValueError, match=f"{wrong}.*Did you mean `{right}` by `{wrong}`.*help"
    ):
        BPTTRNN(H, **{wrong: 3})


def test_several_misspelled_arguments():
    with pytest.raises(ValueError, match="`truncation` by.*`jit_compile` by"):
        BPTTRNN(H, truncate=3, jitcompile=True, name="right")


def test_other_errors_of_keras_stay_as_they_are():
    """What is spelled well is not to blame."""
    with pytest.raises(ValueError) as error:
        BPTTRNN(H, kernel_initializer="no_such_function", dtype="float32")
    assert "Did you mean" not in str(error.value)
    assert "help(" not in str(error.value)


# --- Inputs


@pytest.mark.parametrize("built", [False, True])
def test_ragged_inputs(built):
    x = tf.RaggedTensor.from_row_lengths(inputs(7, D), [3, 4])
    layer = BPTTRNN(H)
    if built:
        layer.build((None, None, D))
    with pytest.raises(
        ValueError, match=r"RaggedTensor of shape.*to_tensor\(\).*mask=tf.sequence_mask"
    ):
        layer(x)
    # And what the message says works.
    last = layer(x.to_tensor(), mask=tf.sequence_mask(x.row_lengths()))
    np.testing.assert_allclose(last[:1], layer(x[:1].to_tensor()), atol=1e-6)


def test_sparse_inputs():
    with pytest.raises(ValueError, match=r"SparseTensor of shape.*tf.sparse.to_dense"):
        BPTTRNN(H)(tf.sparse.from_dense(inputs()))


RANKS = {
    "two": ((B, T), r"\[\.\.\., None\].*\[None\]"),
    "one": ((T,), r"\[\.\.\., None\]"),
    "four": ((B, T, D, 2), "keras.layers.Reshape"),
}


@pytest.mark.parametrize("symbolic", [False, True], ids=["eager", "symbolic"])
@pytest.mark.parametrize("rank", RANKS)
def test_rank(rank, symbolic):
    shape, remedy = RANKS[rank]
    layer = BPTTRNN(H)
    x = keras.Input(batch_shape=shape) if symbolic else inputs(*shape)
    for _ in ("unbuilt", "built"):
        with pytest.raises(
            ValueError, match=rf"(?s)Received: shape \({shape[0]},.*{remedy}"
        ):
            layer(x)
        layer(inputs())


def test_no_timesteps():
    with pytest.raises(ValueError, match=r"at least one timestep.*Received: shape"):
        BPTTRNN(H)(inputs(B, 0, D))


@pytest.mark.parametrize("symbolic", [False, True], ids=["eager", "symbolic"])
def test_features_of_a_second_call(symbolic):
    layer = BPTTRNN(H)
    layer(inputs())
    other = keras.Input((T, D + 1)) if symbolic else inputs(B, T, D + 1)
    with pytest.raises(
        ValueError, match=f"built for inputs with {D} features.*{D + 1}"
    ):
        layer(other)


def test_features_unknown():
    with pytest.raises(ValueError, match="fixed number of features"):
        BPTTRNN(H)(keras.Input((T, None)))


def test_unroll_with_an_unknown_length():
    layer = BPTTRNN(H, unroll=True)
    call = tf.function(layer, input_signature=[tf.TensorSpec((None, None, D))])
    with pytest.raises(ValueError, match="time dimension is undefined"):
        call(inputs())


def test_stateful_with_another_batch():
    layer = BPTTRNN(H, stateful=True)
    layer(inputs())
    # Keras before 3.12 checks no batch; there our reshape of the state does.
    errors = (ValueError, tf.errors.InvalidArgumentError)
    with pytest.raises(errors, match="batch size|requested shape"):
        layer(inputs(B + 1, T, D))


# --- State

WRONG_STATES = [(1, H), (B + 1, H), (B, 1), (B, H + 1), (H,), (B, 1, H), ()]


@pytest.mark.parametrize("shape", WRONG_STATES, ids=str)
def test_state_shape(shape):
    state = tf.zeros(shape)
    with pytest.raises(
        ValueError, match="one `initial_state`.*one state for each example"
    ):
        BPTTRNN(H)(inputs(), initial_state=state)


@pytest.mark.parametrize("count", [0, 2])
def test_number_of_states(count):
    states = [tf.zeros((B, H))] * count
    with pytest.raises(ValueError, match=f"one `initial_state`.*Received: {count}"):
        BPTTRNN(H)(inputs(), initial_state=states)


# --- Mask

WRONG_MASKS = [(B, T + 1), (B + 1, T), (1, T), (B, 1), (T,), (B, T, 2), (B, T, 1, 1)]


@pytest.mark.parametrize("shape", WRONG_MASKS, ids=str)
def test_mask_shape(shape):
    with pytest.raises(ValueError, match="`mask` of shape.*one boolean for each step"):
        BPTTRNN(H)(inputs(), mask=tf.ones(shape, tf.bool))


# --- Activation


@pytest.mark.parametrize(
    "function",
    [
        lambda z: tf.reduce_sum(z, -1),
        lambda z: tf.concat([z, z], -1),
        lambda z: z[:, :1],
        lambda z: z[None],
    ],
    ids=["sum", "double", "first unit", "new axis"],
)
def test_activation_that_changes_the_shape(function):
    with pytest.raises(ValueError, match="keep shape and dtype.*returns one like it"):
        BPTTRNN(H, activation=function)(inputs())


@pytest.mark.parametrize("dtype", ["float16", "int32", "bool"])
def test_activation_that_changes_the_dtype(dtype):
    def function(z):
        return tf.cast(z, dtype)

    with pytest.raises(ValueError, match=f"keep shape and dtype.*float32.*{dtype}"):
        BPTTRNN(H, activation=function)(inputs())


def test_activation_that_reads_a_trainable_variable():
    slope = tf.Variable(0.1, name="slope_of_mine")
    with pytest.raises(ValueError, match="slope_of_mine.*apply it as a layer"):
        BPTTRNN(H, activation=lambda z: tf.nn.relu(z) - slope * tf.nn.relu(-z))(
            inputs()
        )
    with pytest.raises(ValueError, match="alpha.*apply it as a layer"):
        BPTTRNN(H, activation=keras.layers.PReLU())(inputs())


def test_activation_may_read_a_variable_that_is_not_trained():
    slope = tf.Variable(0.5, trainable=False)
    layer = BPTTRNN(H, activation=lambda z: slope * z)
    first = layer(inputs())
    slope.assign(0.0)
    assert np.max(np.abs(first)) > 1e-3
    assert np.all(layer(inputs()) == 0)


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z + tf.random.normal(tf.shape(z)),
        lambda z: keras.random.dropout(z, 0.5),
    ],
    ids=["noise", "dropout"],
)
def test_activation_that_is_random(function):
    with pytest.raises(ValueError, match="which is random.*`recurrent_dropout`"):
        BPTTRNN(H, activation=function)(inputs())


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z - tf.reduce_mean(z, 0),
        lambda z: tf.reverse(z, [0]),
        lambda z: z / tf.norm(z),
        lambda z: tf.nn.softmax(z, 0),
    ],
    ids=["mean", "reverse", "norm", "softmax"],
)
def test_activation_that_mixes_the_batch(function):
    with pytest.raises(ValueError, match="mixes them.*axis=-1 only"):
        BPTTRNN(H, activation=function)(inputs())


@pytest.mark.parametrize("symbolic", [False, True], ids=["graph", "symbolic"])
def test_activation_is_checked_where_a_graph_is_built(symbolic):
    layer = BPTTRNN(H, activation=lambda z: tf.reverse(z, [0]))
    with pytest.raises(ValueError, match="mixes them"):
        if symbolic:
            layer(keras.Input((T, D)))
        else:
            tf.function(layer)(inputs())


# --- The output layer


@pytest.mark.parametrize("g", ["softmax", np.tanh], ids=["name", "function"])
def test_output_activation_without_output_units(g):
    received = re.escape(f"output_units=None, output_activation={g!r}")
    with pytest.raises(
        ValueError, match=f"which `output_units` makes.*{received}.*as `activation`"
    ):
        BPTTRNN(H, output_activation=g)


def test_unknown_output_activation():
    with pytest.raises(ValueError, match="no_such_function"):
        BPTTRNN(H, output_units=3, output_activation="no_such_function")


@pytest.mark.parametrize("shape", [(B, 3), (B, H + 1)], ids=["outputs", "other"])
def test_state_of_a_layer_with_outputs(shape):
    """It is h, of `units`, not o."""
    with pytest.raises(ValueError, match="one `initial_state`.*batch, units"):
        BPTTRNN(H, output_units=3)(inputs(), initial_state=tf.zeros(shape))


def test_arguments_are_keywords():
    """Behind those of SimpleRNN, whose places they must not take."""
    places = [*inspect.signature(keras.layers.SimpleRNN.__init__).parameters]
    ours = inspect.signature(BPTTRNN.__init__).parameters
    added = {*ARGUMENTS, "output_activation"} - {"units", "unroll"}
    for name in added:
        assert ours[name].kind is inspect.Parameter.KEYWORD_ONLY, name
        assert name not in places


# --- Backend


# What each needs to be imported; that of NumPy takes its Fourier transform from JAX's.
REAL_BACKENDS = {"jax": ["jax"], "torch": ["torch"], "numpy": ["scipy", "jax"]}


def test_another_backend_is_refused(monkeypatch):
    """The module is executed as if Keras ran on another backend."""
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    spec = importlib.util.find_spec("keras_bptt.layers.explicit_loop")
    module = importlib.util.module_from_spec(spec)
    with pytest.raises(ImportError, match="'jax'.*KERAS_BACKEND=tensorflow"):
        spec.loader.exec_module(module)


@pytest.mark.parametrize("backend", REAL_BACKENDS)
def test_another_backend_is_refused_in_a_process_of_its_own(backend):
    for package in REAL_BACKENDS[backend]:
        pytest.importorskip(package)
    script = "import keras; print(keras.config.backend()); import keras_bptt"
    finished = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
        timeout=300,
    )
    # Keras itself imports with it, so that the error is this package's.
    assert finished.stdout.split() == [backend], finished.stderr
    assert finished.returncode != 0
    assert "ImportError" in finished.stderr
    assert "KERAS_BACKEND=tensorflow" in finished.stderr
