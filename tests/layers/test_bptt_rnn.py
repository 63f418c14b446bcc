"""The layer against `keras.layers.SimpleRNN` with the same weights, option by option.

SimpleRNN, run eagerly and differentiated automatically, is what every test compares
with: outputs, the returned state, and the gradients of the inputs, the initial state
and every weight, under random cotangents.
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
    WAYS,
    B,
    D,
    H,
    T,
    assert_same,
    compare,
    draw_call,
    evaluate,
    examples,
    few,
    in_modes,
    needs_keras,
    pair,
    plain,
    random_inputs,
    random_weights,
    relative_error,
    rng,
    without_graphs,
)
from hypothesis import given
from hypothesis import strategies as st

from keras_bptt import BPTTRNN

STATE = random_inputs(B, H, seed=5)

NO_MASK, MASK = "no mask", "mask"
LAST, SEQUENCE = "last output", "sequence"


def cases(*axes, chosen):
    """All combinations of the axes with the ways of running; those not chosen are slow."""
    return few(itertools.product(*axes, WAYS), chosen)


# --- Activations


def sine(z):
    return tf.sin(z) + 0.1 * z


def centred(z):
    """A user's function that mixes units, and not symmetrically."""
    return tf.tanh(z) + 0.5 * tf.sin(tf.cumsum(z, axis=-1))


ACTIVATIONS = {
    name: name
    for name in (
        "tanh relu sigmoid linear softplus elu selu exponential leaky_relu gelu silu mish "
        "hard_sigmoid hard_silu relu6 celu softsign log_sigmoid softmax "
        "log_softmax sparsemax tanh_shrink squareplus"
    ).split()
} | {
    "none": None,
    "tf.nn.tanh": tf.nn.tanh,
    "function": sine,
    "lambda": lambda z: tf.sin(z) + 0.1 * z,
    "mixing function": centred,
    "ReLU layer": keras.layers.ReLU(max_value=1.5, negative_slope=0.1, dtype="float64"),
    "LeakyReLU layer": keras.layers.LeakyReLU(negative_slope=0.4, dtype="float64"),
    "Softmax layer": keras.layers.Softmax(dtype="float64"),
}


def tame(name):
    """Weights that let no state explode: of exp(exp(...)) nothing finite would remain."""
    return {"radius": 0.2} if name == "exponential" else {}


# A slope that h tells, one that z tells, and a Jacobian; graphs are slow to build.
IN_GRAPHS = ["tanh", "gelu", "softmax"]
# And of each some more, those that have a slope of their own here among them.
IN_FLOAT32 = [*IN_GRAPHS, "relu", "selu", "leaky_relu", "mixing function"]
PLAIN = [*IN_FLOAT32, "sigmoid", "linear", "softplus", "elu", "exponential"]
PLAIN += ["hard_sigmoid", "log_softmax", "function", "none", "ReLU layer"]


def some_activations(name, mode):
    """In graphs those that z tells, each where it is not met below."""
    in_graphs = [("softmax", "eager"), ("gelu", "graph"), ("softmax", "xla")]
    return name in PLAIN if mode == "plain" else (name, mode) in in_graphs


@pytest.mark.parametrize(("name", "mode"), cases(ACTIVATIONS, chosen=some_activations))
def test_activation(name, mode):
    options = {"activation": ACTIVATIONS[name], "return_sequences": True} | tame(name)
    compare(0.5 * random_inputs(), mode, options=options, state=STATE)


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_activation_in_float32(name):
    options = {"activation": ACTIVATIONS[name], "return_sequences": True} | tame(name)
    compare(
        0.5 * random_inputs(),
        "plain",
        FLOAT32,
        options=options | {"dtype": "float32"},
    )


@pytest.mark.parametrize(
    ("activation", "mode"),
    cases(
        IN_GRAPHS,
        chosen=lambda *case: case == ("softmax", "graph"),
    ),
)
def test_activation_with_mask_and_dropout(activation, mode):
    """f' of the output, f' of z, and a Jacobian, each next to all that multiplies it."""
    options = {
        "activation": activation,
        "return_sequences": True,
        "return_state": True,
        "dropout": 0.3,
        "recurrent_dropout": 0.3,
        "seed": 3,
    }
    compare(
        random_inputs(),
        mode,
        options=options,
        state=STATE,
        mask=MIXED_MASK,
        training=True,
    )


def test_gradients_are_alive():
    """The comparisons above would see an error in the farthest step."""
    theirs, _ = pair()
    results = evaluate(theirs, random_inputs(), state=STATE)
    assert np.all(np.abs(results["d_x"]).max(axis=(0, 2)) > 1e-2)
    assert np.abs(results["d_state0"]).max() > 1e-2


# --- Options

OPTIONS = {
    "last output": {},
    "sequence": {"return_sequences": True},
    "last output and state": {"return_state": True},
    "sequence and state": {"return_sequences": True, "return_state": True},
    "no bias": {"use_bias": False, "return_sequences": True},
    "backwards": {"go_backwards": True, "return_state": True},
    "backwards, sequence": {"go_backwards": True, "return_sequences": True},
    "unrolled": {"unroll": True, "return_state": True},
    "unrolled, sequence": {"unroll": True, "return_sequences": True},
    "unrolled, backwards": {"unroll": True, "go_backwards": True},
    "zero output": {"zero_output_for_mask": True, "return_state": True},
    "zero output, sequence": {"zero_output_for_mask": True, "return_sequences": True},
    "dropout": {"dropout": 0.4, "seed": 3, "return_sequences": True},
    "recurrent dropout": {"recurrent_dropout": 0.4, "seed": 3},
    "both dropouts": {"dropout": 0.4, "recurrent_dropout": 0.4, "seed": 3},
    "both dropouts, backwards, unrolled": {
        "dropout": 0.4,
        "recurrent_dropout": 0.4,
        "seed": 3,
        "go_backwards": True,
        "unroll": True,
        "return_sequences": True,
        "return_state": True,
    },
}


UNMASKED_OPTIONS = ["last output", "sequence and state", "backwards", "unrolled"]
UNMASKED_OPTIONS += ["both dropouts, backwards, unrolled"]
OPTIONS_IN_GRAPHS = {
    "graph": ["last output", "both dropouts, backwards, unrolled"],
    "xla": ["last output", "sequence and state", "unrolled"],
}


def some_options(name, masked, mode):
    """With a mask: all that is computed without one is computed with it too."""
    if masked == NO_MASK:
        return mode == "plain" and name in UNMASKED_OPTIONS
    return mode == "plain" or name in OPTIONS_IN_GRAPHS.get(mode, ())


@pytest.mark.parametrize(
    ("name", "masked", "mode"),
    cases(OPTIONS, [NO_MASK, MASK], chosen=some_options),
)
def test_option(name, masked, mode):
    mask = {"mask": MIXED_MASK} if masked == MASK else {}
    compare(
        random_inputs(),
        mode,
        options=OPTIONS[name],
        state=STATE,
        training=True,
        **mask,
    )


@pytest.mark.parametrize(
    ("name", "mode"),
    cases(
        ["last output", "sequence and state", "both dropouts"],
        chosen=lambda name, mode: mode == "plain",
    ),
)
def test_option_in_float32(name, mode):
    compare(
        random_inputs(),
        mode,
        FLOAT32,
        options=OPTIONS[name] | {"dtype": "float32"},
        state=STATE,
        mask=MIXED_MASK,
        training=True,
    )


@pytest.mark.parametrize("name", ["dropout", "recurrent dropout"])
def test_no_dropout_without_training(name):
    compare(random_inputs(), "plain", options=OPTIONS[name])
    theirs, ours = pair(**OPTIONS[name])
    trained = [
        evaluate(layer, random_inputs(), "plain", training=True)
        for layer in (theirs, ours)
    ]
    still = evaluate(ours, random_inputs(), "plain")
    assert relative_error(trained[1]["y0"], still["y0"]) > 1e-2
    assert_same(trained[1], trained[0])


def test_dropout_draws_anew_at_every_call(mode):
    theirs, ours = pair(dropout=0.4, recurrent_dropout=0.4, seed=3)
    runs = []
    for layer in (theirs, ours):
        call = tf.function(layer) if mode == "graph" else layer
        runs.append([call(random_inputs(), training=True).numpy() for _ in range(3)])
    assert relative_error(runs[1], runs[0]) < FLOAT64
    assert relative_error(runs[1][0], runs[1][1]) > 1e-2


def test_same_global_seed_gives_the_same_weights_and_dropout():
    outputs = []
    # XLA rounds otherwise than TensorFlow's own loop.
    plain = functools.partial(BPTTRNN, jit_compile=False)
    for layer_class in (keras.layers.SimpleRNN, plain):
        keras.utils.set_random_seed(4)
        # A function is probed when the layer is built; that must draw nothing here.
        layer = layer_class(H, activation=sine, dropout=0.5, recurrent_dropout=0.5)
        outputs.append(layer(random_inputs(), training=True).numpy())
    np.testing.assert_array_equal(*outputs)


# --- Long sequences, which are walked over in blocks of steps

# A multiple of many sizes; primes, which leave a last block of its own: of some blocks,
# and of as many as there may be.
LENGTHS = [48, 29, 53]


def long_mask(steps):
    """Holes; a masked start and end, longer than a block; nothing but masked steps."""
    mask = rng(1).random((B, steps)) < 0.7
    edge = min(20, steps // 2 - 3)
    mask[1, :edge] = mask[1, -edge:] = mask[2] = False
    return mask


@pytest.mark.parametrize(
    ("steps", "sequence", "masked", "training"),
    few(
        itertools.product(LENGTHS, *[[False, True]] * 3),
        # Of a prime length, masked: states that were not kept, and those that were.
        lambda steps, sequence, masked, training: (
            steps == LENGTHS[1] and masked and sequence != training
        ),
    ),
)
def test_long_sequence(steps, sequence, masked, training):
    """Whether the states are kept for the gradient or computed again is all the same."""
    mask = {"mask": long_mask(steps)} if masked else {}
    compare(
        random_inputs(B, steps, D),
        "graph",
        options={"return_sequences": sequence, "return_state": True},
        state=STATE,
        training=training,
        # It vanishes over so many steps, where no mask lets it pass.
        dead=() if sequence or masked else ("d_state0",),
        **mask,
    )


@pytest.mark.parametrize(
    ("activation", "steps", "mode"),
    cases(
        IN_GRAPHS,
        LENGTHS,
        # In XLA five steps are one block, these eight of which the last is padded.
        chosen=lambda activation, steps, mode: (
            steps == LENGTHS[1]
            and (activation, mode) in [("gelu", "graph"), ("tanh", "xla")]
        ),
    ),
)
def test_long_sequence_with_everything(activation, steps, mode):
    compare(
        random_inputs(B, steps, D),
        mode,
        options={
            "activation": activation,
            "return_sequences": True,
            "return_state": True,
            "go_backwards": True,
            "dropout": 0.2,
            "recurrent_dropout": 0.2,
            "seed": 3,
        },
        state=STATE,
        mask=long_mask(steps),
        training=True,
    )


# --- Masks

MASKS = {
    "left": [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "holes": [[1, 0, 1, 0, 1], [1, 1, 0, 0, 1], [0, 1, 0, 1, 0]],
    "empty row": [[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
    "everything": np.zeros((B, T)),
    "nothing": np.ones((B, T)),
}
MASKED_OPTIONS = ["last output and state", "sequence and state", "zero output"]


def some_masks(name, option, mode):
    """In XLA, which does not know what a mask holds, one without a step; see above."""
    case = name, option, mode
    return mode == "plain" or case == ("everything", "sequence and state", "xla")


@pytest.mark.parametrize(
    ("name", "option", "mode"),
    cases(MASKS, MASKED_OPTIONS, chosen=some_masks),
)
def test_mask(name, option, mode):
    # Where no row has a step, the state alone has a gradient.
    everything = ("d_x", "d_0_kernel", "d_1_recurrent_kernel", "d_2_bias")
    compare(
        random_inputs(),
        mode,
        options=OPTIONS[option],
        state=STATE,
        mask=np.array(MASKS[name], bool),
        dead=everything if name == "everything" else (),
    )


@pytest.mark.parametrize("dtype", ["bool", "float32", "int32"])
@pytest.mark.parametrize("rank", [2, 3])
def test_mask_of_any_type_and_either_rank(rank, dtype):
    mask = MIXED_MASK.astype(dtype)
    mask = mask[..., None] if rank == 3 else mask
    compare(random_inputs(), "plain", options={"return_sequences": True}, mask=mask)


def sequential(*layers):
    model = keras.Sequential(layers)
    model.dtype_policy = "float64"
    return model


@in_modes("graph")
def test_mask_of_a_masking_layer(mode):
    x = random_inputs()
    x[~MIXED_MASK] = -1.0
    theirs, ours = (
        sequential(keras.layers.Masking(-1.0, dtype="float64"), layer)
        for layer in pair(return_sequences=True)
    )
    assert_same(evaluate(ours, x, mode), evaluate(theirs, x))


@in_modes("graph")
def test_mask_of_an_embedding(mode):
    tokens = rng().integers(1, 9, (B, T)) * MIXED_MASK
    results = []
    for layer, wrap in zip(pair(), ("eager", mode), strict=True):
        keras.utils.set_random_seed(1)
        embedding = keras.layers.Embedding(
            9, D, mask_zero=True, embeddings_initializer="normal", dtype="float64"
        )
        model = sequential(embedding, layer)
        model.build((B, T))
        results.append(evaluate(model, tokens, wrap))
    assert_same(results[1], results[0])


def test_mask_is_handed_on():
    """That which the inputs carry."""
    x = random_inputs()
    x[~MIXED_MASK] = 0
    masked = keras.layers.Masking(dtype="float64")(x)
    for layer in pair(return_sequences=True):
        np.testing.assert_array_equal(layer(masked)._keras_mask, MIXED_MASK)


@needs_keras("3.11", "handing on a mask that is passed in the call")
def test_mask_of_the_call_is_handed_on():
    for layer in pair(return_sequences=True):
        y = layer(random_inputs(), mask=MIXED_MASK)
        np.testing.assert_array_equal(y._keras_mask, MIXED_MASK)


@pytest.mark.parametrize(
    ("padding", "activation", "mode"),
    cases(
        [np.nan, np.inf],
        IN_GRAPHS,
        chosen=lambda *case: case[2] == "plain" or case == (np.nan, "gelu", "xla"),
    ),
)
def test_padding_of_nan_is_not_seen(padding, activation, mode):
    """SimpleRNN has no finite gradient here: it multiplies the padding by zero."""
    _, ours = pair(return_sequences=True, return_state=True, activation=activation)
    x = random_inputs()
    results = []
    for value in (0.0, padding):
        x[~MIXED_MASK] = value
        results.append(evaluate(ours, x, mode, state=STATE, mask=MIXED_MASK))
    assert_same(results[1], results[0], tolerance=0.0)
    assert np.all(results[1]["d_x"][~MIXED_MASK] == 0)


@pytest.mark.parametrize("activation", ["tanh", "relu", "softmax", "gelu"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_come_out_as_of_simplernn(value, activation):
    x = random_inputs()
    x[0, 2, 1] = value
    theirs, ours = pair(return_sequences=True, activation=activation)
    with without_graphs():
        np.testing.assert_allclose(ours(x), theirs(x), rtol=FLOAT64, atol=FLOAT64)


# --- State


@pytest.mark.parametrize(
    ("form", "mode"),
    few(
        itertools.product(["tensor", "list"], MODES),
        lambda form, mode: form == "tensor" or mode == "eager",
    ),
)
def test_initial_state(form, mode):
    state = STATE if form == "tensor" else [STATE]
    compare(random_inputs(), mode, state=state, options={"return_sequences": True})


def test_gradient_of_the_state_alone():
    """The cotangent of the returned state, without one of the outputs."""
    gradients = []
    for layer in pair(return_sequences=True, return_state=True):
        x = tf.constant(random_inputs())
        with tf.GradientTape() as tape:
            tape.watch(x)
            _, state = layer(x, mask=MIXED_MASK)
            loss = tf.reduce_sum(state * rng().normal(size=(B, H)))
        gradients.append(tape.gradient(loss, x))
    assert relative_error(gradients[1], gradients[0]) < FLOAT64
    assert np.max(np.abs(gradients[0])) > 1e-2


@in_modes("graph", "xla")
def test_encoder_and_decoder(mode):
    """One state goes from layer to layer; its gradient comes back."""
    results = []
    for layer_class, wrap in (
        (keras.layers.SimpleRNN, "eager"),
        (BPTTRNN, mode),
    ):
        inputs = keras.Input((T, D), dtype="float64")
        encoder = layer_class(H, return_state=True, dtype="float64")
        decoder = layer_class(H, return_sequences=True, dtype="float64")
        _, state = encoder(inputs)
        model = keras.Model(inputs, decoder(inputs, initial_state=state))
        model.dtype_policy = "float64"
        model.set_weights([*random_weights(), *random_weights(seed=7)])
        results.append(evaluate(model, random_inputs(), wrap))
    assert_same(results[1], results[0])


def test_stateful(mode):
    theirs, ours = pair(stateful=True, return_sequences=True)
    compiled = MODES[mode](ours)
    for call in range(5):
        x = random_inputs(seed=call)
        if call == 3:
            theirs.reset_state()
            ours.reset_state()
        if call == 4:
            expected, got = (evaluate(layer, x) for layer in (theirs, ours))
            assert_same(got, expected)
        else:
            assert relative_error(compiled(x), theirs(x)) < FLOAT64
        np.testing.assert_allclose(ours.states[0], theirs.states[0], rtol=FLOAT64)
    assert np.max(np.abs(ours.states[0])) > 1e-2


def test_stateful_in_mixed_precision():
    theirs, ours = pair(stateful=True, dtype="mixed_float16")
    for call in range(3):
        x = random_inputs(seed=call)
        # Float16 rounds to 5e-4; see test_mixed_precision.
        assert relative_error(ours(x), theirs(x)) < 1e-2
    assert ours.states[0].dtype == theirs.states[0].dtype


# --- Around the layer


REGULARIZERS = {
    # Not L1, which some versions of Keras have in float32 alone.
    "kernels": {
        "kernel_regularizer": "l2",
        "recurrent_regularizer": keras.regularizers.L2(0.2),
    },
    "bias": {"bias_regularizer": keras.regularizers.L2(0.3)},
}


@pytest.mark.parametrize(
    ("name", "mode"),
    few(
        itertools.product(REGULARIZERS, MODES),
        lambda *case: case in [("kernels", "graph"), ("bias", "eager")],
    ),
)
def test_regularizer(name, mode):
    options = REGULARIZERS[name]
    compare(random_inputs(), mode, options=options)
    theirs, ours = pair(**options)
    assert sum(ours.losses) == sum(theirs.losses) > 0


@pytest.mark.parametrize(
    ("outputs", "mode"),
    few(
        itertools.product([LAST, SEQUENCE], MODES),
        lambda *case: case in [(LAST, "graph"), (SEQUENCE, "eager")],
    ),
)
def test_activity_regularizer(outputs, mode):
    sequence = outputs == SEQUENCE
    layers = pair(return_sequences=sequence, return_state=sequence)
    for layer in layers:
        # Not an argument here: SimpleRNN takes that, and in some versions drops it.
        layer.activity_regularizer = keras.regularizers.L2(0.3)
    expected, got = (
        evaluate(layer, random_inputs(), wrap)
        for layer, wrap in zip(layers, ("eager", mode), strict=True)
    )
    assert_same(got, expected)
    assert float(sum(layers[0].losses)) > 0


def test_constraint():
    """One step of training leaves the weights where it leaves those of SimpleRNN."""
    weights = []
    for layer in pair(
        kernel_constraint="non_neg",
        recurrent_constraint=keras.constraints.MaxNorm(0.7),
        bias_constraint="unit_norm",
    ):
        model = sequential(layer)
        model.compile("sgd", "mse")
        model.train_on_batch(random_inputs(), random_inputs(B, H))
        weights.append(model.get_weights())
    for expected, got in zip(*weights, strict=True):
        assert relative_error(got, expected) < FLOAT64
    assert np.min(weights[1][0]) == 0


def test_frozen():
    """Weights that are not trained leave the gradient of the inputs as it is."""
    theirs, ours = pair(return_sequences=True)
    theirs.trainable = ours.trainable = False
    results = [evaluate(layer, random_inputs()) for layer in (theirs, ours)]
    assert list(results[1]) == ["y0", "d_x"]
    assert_same(results[1], results[0])


def bidirectional(layer_class, merge_mode, **options):
    # Keras makes two layers of the given one, and gives each a seed of its own.
    keras.utils.set_random_seed(4)
    layer = keras.layers.Bidirectional(
        layer_class(H, dtype="float64", **options),
        merge_mode=merge_mode,
        dtype="float64",
    )
    layer.build((B, T, D))
    layer.set_weights([*random_weights(), *random_weights(seed=7)])
    return layer


@pytest.mark.parametrize(
    ("merge_mode", "outputs", "masked"),
    few(
        itertools.product(
            ["concat", "sum", "ave", "mul", None], [LAST, SEQUENCE], [NO_MASK, MASK]
        ),
        lambda merge_mode, outputs, masked: (
            masked == (NO_MASK if merge_mode == "concat" and outputs == LAST else MASK)
            and (outputs == SEQUENCE or merge_mode == "concat")
        ),
    ),
)
def test_bidirectional(merge_mode, outputs, masked):
    sequence = outputs == SEQUENCE
    theirs, ours = (
        bidirectional(
            layer_class, merge_mode, return_sequences=sequence, return_state=sequence
        )
        for layer_class in (keras.layers.SimpleRNN, BPTTRNN)
    )
    assert isinstance(ours.backward_layer, BPTTRNN)
    mask = {"mask": MIXED_MASK} if masked == MASK else {}
    results = [
        evaluate(layer, random_inputs(), "plain", **mask) for layer in (theirs, ours)
    ]
    assert_same(results[1], results[0])


@in_modes("graph")
def test_bidirectional_in_every_mode(mode):
    theirs, ours = (
        bidirectional(layer_class, "concat", dropout=0.3)
        for layer_class in (keras.layers.SimpleRNN, BPTTRNN)
    )
    call = {"mask": MIXED_MASK, "training": True, "state": [STATE, 2 * STATE]}
    expected = evaluate(theirs, random_inputs(), plain(mode), **call)
    assert_same(evaluate(ours, random_inputs(), mode, **call), expected)


@in_modes("eager", "graph")
def test_time_distributed(mode):
    theirs, ours = (
        keras.layers.TimeDistributed(layer, dtype="float64") for layer in pair()
    )
    x = random_inputs(B, 2, T, D)
    for layer in (theirs, ours):
        layer.build(x.shape)
    assert_same(evaluate(ours, x, mode), evaluate(theirs, x))


@in_modes("graph")
def test_stacked(mode):
    results = []
    for i, wrap in enumerate((plain(mode), mode)):
        first = pair(return_sequences=True)[i]
        dropout = keras.layers.Dropout(0.3, seed=1, dtype="float64")
        second = pair(units=3, features=H, go_backwards=True)[i]
        masking = keras.layers.Masking(-1.0, dtype="float64")
        x = random_inputs()
        x[~MIXED_MASK] = -1.0
        model = sequential(masking, first, dropout, second)
        results.append(evaluate(model, x, wrap, training=True))
    assert_same(results[1], results[0])


@in_modes("graph")
def test_shared_by_two_inputs(mode):
    """One layer, called twice: the gradients of its weights add up."""
    results = []
    for layer, wrap in zip(pair(), ("eager", mode), strict=True):
        inputs = keras.Input((T, D), dtype="float64")
        outputs = layer(inputs) * layer(inputs[:, 1:] ** 2)
        model = keras.Model(inputs, outputs)
        model.dtype_policy = "float64"
        results.append(evaluate(model, random_inputs(), wrap))
    assert_same(results[1], results[0])


# --- Types and shapes


# Half the spacing of numbers next to 1: 2^-11 and 2^-8. Both sides round every step,
# SimpleRNN also each sum over the steps; some 20 roundings, twice.
MIXED = {"mixed_float16": 40 * 2**-11, "mixed_bfloat16": 40 * 2**-8}


@pytest.mark.parametrize(
    ("policy", "mode"),
    few(
        itertools.product(MIXED, MODES),
        lambda *case: case in [("mixed_float16", "xla"), ("mixed_bfloat16", "graph")],
    ),
)
def test_mixed_precision(policy, mode):
    tolerance = MIXED[policy]
    options = {"dtype": policy, "return_sequences": True, "return_state": True}
    x, state = random_inputs(), STATE
    exact = evaluate(pair(**options | {"dtype": "float32"})[0], x, state=state)
    theirs, ours = pair(**options)
    expected = evaluate(theirs, x, state=state)
    got = evaluate(ours, x, mode, state=state)
    assert_same(got, expected, tolerance)
    for name in got:
        error = relative_error(got[name], exact[name])
        assert error < tolerance / 2, name
    assert got["d_0_kernel"].dtype == np.float32


@pytest.mark.parametrize(
    ("policy", "mode"),
    cases(
        ["mixed_float16", "float16"],
        chosen=lambda *case: (
            case[1] == "plain"
            or case in [("float16", "eager"), ("mixed_float16", "graph")]
        ),
    ),
)
def test_half_precision_with_every_option(policy, mode):
    options = {
        "dtype": policy,
        "activation": "gelu",
        "dropout": 0.3,
        "recurrent_dropout": 0.3,
        "seed": 3,
        "return_sequences": True,
    }
    theirs, ours = pair(**options)
    call = {"mask": MIXED_MASK, "training": True}
    expected = evaluate(theirs, random_inputs(), plain(mode), **call)
    # As in test_mixed_precision.
    assert_same(evaluate(ours, random_inputs(), mode, **call), expected, 40 * 2**-11)


@pytest.mark.parametrize(
    ("dtype", "mode"),
    cases(
        ["int32", "int64", "uint8", "bool"],
        chosen=lambda dtype, mode: (
            mode == "plain" or (dtype, mode) == ("int32", "graph")
        ),
    ),
)
def test_integer_inputs(dtype, mode):
    x = rng().integers(0, 3, (B, T, D)).astype(dtype)
    theirs, ours = pair(return_sequences=True)
    assert_same(evaluate(ours, x, mode), evaluate(theirs, x))


SIZES = {
    "batch 0": (0, T, D, H),
    "batch 1": (1, T, D, H),
    "time 1": (B, 1, D, H),
    "one feature": (B, T, 1, H),
    "one unit": (B, T, D, 1),
    "all 1": (1, 1, 1, 1),
}


def some_sizes(name, sequence, masked, mode):
    if mode == "plain":
        return (sequence == SEQUENCE) == (masked == MASK)
    in_graphs = {"eager": ["batch 0"], "xla": ["batch 0", "time 1"]}
    some = name in in_graphs.get(mode, ())
    return some and (sequence, masked) == (SEQUENCE, MASK)


@pytest.mark.parametrize(
    ("name", "sequence", "masked", "mode"),
    cases(SIZES, [LAST, SEQUENCE], [NO_MASK, MASK], chosen=some_sizes),
)
def test_sizes(name, sequence, masked, mode):
    batch, time, features, units = SIZES[name]
    mask = {"mask": rng(1).random((batch, time)) < 0.8} if masked == MASK else {}
    weights = ("d_0_kernel", "d_1_recurrent_kernel", "d_2_bias")
    compare(
        random_inputs(batch, time, features),
        mode,
        options={
            "units": units,
            "features": features,
            "return_sequences": sequence == SEQUENCE,
            "return_state": True,
        },
        state=random_inputs(batch, units, seed=5),
        dead=weights if batch == 0 else (),
        **mask,
    )


@pytest.mark.parametrize(
    ("activation", "mode"),
    [
        ("softmax", "graph"),
        pytest.param("tanh", "graph", marks=pytest.mark.slow),
        # XLA compiles both layers for every length.
        pytest.param("tanh", "xla", marks=pytest.mark.slow),
        pytest.param("gelu", "graph", marks=pytest.mark.slow),
    ],
)
def test_one_graph_for_every_length_and_batch(activation, mode):
    theirs, ours = pair(
        activation=activation, return_sequences=True, recurrent_dropout=0.3, seed=3
    )
    traces = []

    def gradients(layer, x, mask, cotangent):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x, mask=mask, training=True) * cotangent)
        return tape.gradient(loss, [x, *(v.value for v in layer.trainable_variables)])

    @tf.function(
        jit_compile=mode == "xla",
        input_signature=[
            tf.TensorSpec((None, None, D), tf.float64),
            tf.TensorSpec((None, None), tf.bool),
            tf.TensorSpec((None, None, H), tf.float64),
        ],
    )
    def compiled(x, mask, cotangent):
        traces.append(x)
        return gradients(ours, x, mask, cotangent)

    reference = tf.function(gradients, jit_compile=True) if mode == "xla" else gradients
    for batch, time in ((B, T), (2, 9), (1, 1), (2, 8), (3, 16), (2, 37)):
        arguments = (
            tf.constant(random_inputs(batch, time, D)),
            tf.constant(rng(time).random((batch, time)) < 0.8),
            tf.constant(random_inputs(batch, time, H, seed=3)),
        )
        expected = reference(theirs, *arguments)
        for got, wanted in zip(compiled(*arguments), expected, strict=True):
            assert relative_error(got, wanted) < FLOAT64
    assert len(traces) == 1


def test_eager_calls_of_any_length_share_their_graphs():
    """A new length costs no new graph, once the first two have shown that it varies."""
    calls = []

    def activation(z):
        calls.append(z)
        return tf.sin(z)

    layer = BPTTRNN(H, activation=activation)
    counts = []
    for time in (3, 5, 7, 9, 11):
        layer(random_inputs(B, time, D))
        counts.append(len(calls))
    assert counts[2] == counts[4]


def test_unrolled_layer_takes_any_length():
    theirs, ours = pair(unroll=True, return_sequences=True)
    for time in (3, 5, 7, 3):
        x = random_inputs(B, time, D)
        assert_same(evaluate(ours, x), evaluate(theirs, x))


@pytest.mark.parametrize(
    ("activation",),
    few([("tanh",), (sine,), ("softmax",)], lambda activation: activation == "softmax"),
)
def test_layers_of_several_sizes_side_by_side(activation):
    """Whatever eager calls share, it is not the number of units or features."""
    for units, features in ((4, 3), (2, 4), (5, 2), (4, 7), (2, 1)):
        compare(
            random_inputs(B, T, features),
            state=random_inputs(B, units, seed=5),
            options={
                "units": units,
                "features": features,
                "activation": activation,
                "return_sequences": True,
            },
        )


def test_symbolic_shapes():
    for sequence, state in itertools.product([False, True], repeat=2):
        layer = BPTTRNN(H, return_sequences=sequence, return_state=state)
        inputs = keras.Input((None, D))
        outputs = tf.nest.flatten(layer(inputs))
        shapes = [tuple(y.shape) for y in outputs]
        expected = [(None, None, H) if sequence else (None, H)] + [(None, H)] * state
        assert shapes == expected
        got = layer.compute_output_shape((B, T, D))
        got = got if state else [got]
        assert [tuple(s) for s in got] == [
            (B, T, H) if sequence else (B, H),
            *[(B, H)] * state,
        ]


def test_outputs_have_static_shapes():
    layer = BPTTRNN(H, return_sequences=True, return_state=True)
    layer.build((None, T, D))
    shapes = []

    @tf.function(input_signature=[tf.TensorSpec((None, T, D))])
    def call(x):
        y, state = layer(x)
        shapes.append((y.shape.as_list(), state.shape.as_list()))
        return y

    call(random_inputs().astype("float32"))
    assert shapes == [([None, T, H], [None, H])]


def test_weights_go_both_ways():
    theirs, ours = pair()
    x = random_inputs()
    for source, target in ((theirs, ours), (ours, theirs)):
        source.cell.set_weights(random_weights(seed=9 + (source is ours)))
        before = relative_error(target(x), source(x))
        target.set_weights(source.get_weights())
        assert before > 1e-2
        assert relative_error(target(x), source(x)) < FLOAT64
    names = [
        [(w.name, tuple(w.shape)) for w in layer.weights] for layer in (theirs, ours)
    ]
    assert names[0] == names[1]


# --- Combinations


@st.composite
def problems(draw):
    """Any options, sizes, mask, state and mode at once."""
    flag = st.booleans()
    size = st.integers(1, 5)
    batch, features, units = draw(st.tuples(size, size, size))
    # Less than a block of steps (4 in the tests), one, some, and some with a rest.
    time = draw(st.one_of(size, st.sampled_from([8, 11, 16, 37])))
    options = {
        "units": units,
        "features": features,
        "activation": draw(st.sampled_from(["tanh", "relu", "selu", sine, centred])),
        "use_bias": draw(flag),
        "return_sequences": draw(flag),
        "return_state": draw(flag),
        "go_backwards": draw(flag),
        "unroll": draw(flag) and time <= 5,
        "zero_output_for_mask": draw(flag),
        "dropout": draw(st.sampled_from([0.0, 0.3])),
        "recurrent_dropout": draw(st.sampled_from([0.0, 0.3])),
        "seed": draw(st.integers(0, 9)),
        "recurrent_regularizer": draw(st.sampled_from([None, "l2"])),
    }
    x, call = draw_call(draw, batch, time, features, units)
    call["training"] = draw(flag)
    return options, call, x, draw(st.sampled_from(list(MODES)))


def check_combination(problem):
    options, call, x, mode = problem
    theirs, ours = pair(**options)
    expected = evaluate(theirs, x, plain(mode), **call)
    # Some of these problems are too small or too masked to have every gradient.
    assert_same(evaluate(ours, x, mode, **call), expected, dead=expected)


@examples(3, derandomize=True)
@given(problems())
def test_combination(problem):
    check_combination(problem)


@pytest.mark.slow
@examples(600)
@given(problems())
def test_many_combinations(problem):
    check_combination(problem)


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *MASKS])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "softmax"])
def test_cross_product(activation, option, name, mode):
    options = OPTIONS[option] | {"activation": activation}
    mask = {} if name is None else {"mask": np.array(MASKS[name], bool)}
    theirs, ours = pair(**options)
    call = {"state": STATE, "training": True, **mask}
    expected = evaluate(theirs, random_inputs(), plain(mode), **call)
    got = evaluate(ours, random_inputs(), mode, **call)
    assert_same(got, expected, dead=expected)
