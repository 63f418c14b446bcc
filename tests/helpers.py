"""Random problems, the outputs and gradients of a layer, and their comparison."""

import contextlib
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from packaging.version import Version

from keras_bptt import BPTTRNN

# All different, so that no transpose hides behind a shape that fits by accident.
B, T, D, H = 3, 5, 4, 6

# Both sides compute the same sums in float64, in another order: some 10^2 products of
# numbers near 1, each rounded to 1e-16, through no more than ten steps. A wrong term is
# an error near 1.
FLOAT64 = 1e-10
# Float32 rounds to 6e-8. The longest sum has T (D + H) = 50 terms and U, whose largest
# singular value is about 2, carries an error through T - 1 steps: 50 * 6e-8 at worst in
# one step, a few times that in all. Errors of random sign stay far below it.
FLOAT32 = 2e-5


@contextlib.contextmanager
def without_graphs():
    """Run loops operation by operation: for a single run, tracing costs more."""
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


# What a caller may wrap around a call of the layer. Keras keeps AutoGraph away from a
# layer, so tests do from the functions they call; it would take a fifth of their time.
MODES = {
    "eager": lambda function: function,
    "graph": functools.partial(tf.function, autograph=False),
    "xla": functools.partial(tf.function, autograph=False, jit_compile=True),
}
# And where no mode is the point: eager, without the graphs that loops are in there.
WAYS = {"plain": without_graphs()} | MODES

# Row by row: holes after a masked start, a masked end, and nothing but masked steps.
MIXED_MASK = np.array([[0, 1, 0, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool)


def few(cases, chosen):
    """All cases; those that are not chosen take long, together."""
    slow = pytest.mark.slow
    return [pytest.param(*case, marks=[slow] * (not chosen(*case))) for case in cases]


def in_modes(*chosen):
    """Each mode of execution; those that are not chosen take long, together."""
    modes = few([(mode,) for mode in MODES], lambda mode: mode in chosen)
    return pytest.mark.parametrize("mode", modes)


def needs_keras(version, what):
    """For a test of what an older Keras itself, SimpleRNN included, does not do."""
    return pytest.mark.skipif(
        Version(keras.__version__) < Version(version),
        reason=f"{what} needs Keras {version}",
    )


def rng(seed=0):
    return np.random.default_rng(seed)


def random_weights(features=D, units=H, use_bias=True, seed=0, radius=1.0):
    """W, U, b; U is asymmetric with spectral radius 1: gradients do not vanish."""
    random = rng(seed)
    W = random.normal(size=(features, units)) / np.sqrt(features)
    U = random.normal(size=(units, units))
    U *= radius / np.max(np.abs(np.linalg.eigvals(U)))
    b = 0.3 * random.normal(size=units)
    return [W, U, b] if use_bias else [W, U]


def random_inputs(*shape, seed=1):
    return rng(seed).normal(size=shape or (B, T, D))


def pair(units=H, features=D, radius=1.0, batch=B, **options):
    """A SimpleRNN and a BPTTRNN with the same options and weights; float64 if unsaid."""
    options = {"dtype": "float64"} | options
    weights = random_weights(
        features, units, options.get("use_bias", True), radius=radius
    )
    layers = []
    for layer_class in (keras.layers.SimpleRNN, BPTTRNN):
        layer = layer_class(units, **options)
        layer.build((batch, None, features))
        layer.cell.set_weights(weights)
        layers.append(layer)
    return layers


def evaluate(layer, x, mode="eager", *, state=None, seed=2, order=1, **call):
    """Outputs of `layer`, and their gradients under random cotangents, as arrays.

    Args:
        layer: a layer or a model, whose `losses` are part of what is differentiated.
        x: the inputs; integers have no gradient.
        mode: the name of one of `WAYS`.
        state: the initial state, an array or a list of arrays, differentiated too.
        seed: of the cotangents, which are never ones: those hide exchanged steps.
        order: of the derivatives. 2: those of a weighted sum of squares of the first.
        **call: other arguments of the call, such as a mask.

    Returns:
        A dict: y0, y1, ... the outputs; d_x, d_state0, ..., d_0_kernel, ... the gradients.
    """
    x = tf.convert_to_tensor(x)
    x = tf.cast(x, layer.compute_dtype) if x.dtype.is_floating else x
    states = state if isinstance(state, list) else [] if state is None else [state]
    states = [tf.cast(s, layer.compute_dtype) for s in states]
    tensors = {name: v for name, v in call.items() if isinstance(v, np.ndarray)}
    static = {name: v for name, v in call.items() if name not in tensors}
    variables = [v.value for v in layer.trainable_variables]
    random = rng(seed)

    def weighted(tensors):
        wide = [tf.cast(t, "float64") for t in tensors]
        return sum(tf.reduce_sum(t * random.normal(size=t.shape)) for t in wide)

    def run(x, states, tensors, order=order):
        arguments = {**static, **tensors}
        if states:
            arguments["initial_state"] = (
                states if isinstance(state, list) else states[0]
            )
        sources = [x] if x.dtype.is_floating else []
        with tf.GradientTape() as tape:
            tape.watch(sources + states)
            if order == 1:
                outputs = tf.nest.flatten(layer(x, **arguments))
                loss = sum(layer.losses, tf.zeros([], "float64"))
                loss = tf.cast(loss, "float64") + weighted(outputs)
            else:
                outputs, gradients = run(x, states, tensors, order - 1)
                loss = weighted([g * g for g in gradients])
        gradients = tape.gradient(
            loss,
            sources + states + variables,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        return outputs, [tf.convert_to_tensor(g) for g in gradients]

    outputs, gradients = WAYS[mode](run)(
        x, states, {name: tf.constant(v) for name, v in tensors.items()}
    )
    names = ["d_x"] if x.dtype.is_floating else []
    names += [f"d_state{i}" for i in range(len(states))]
    names += [f"d_{i}_{v.name}" for i, v in enumerate(layer.trainable_variables)]
    results = {f"y{i}": y.numpy() for i, y in enumerate(outputs)}
    return results | {name: g.numpy() for name, g in zip(names, gradients, strict=True)}


def relative_error(got, expected):
    """The largest difference, as a share of the largest number that is expected."""
    got, expected = (np.asarray(a, "float64") for a in (got, expected))
    difference = np.max(np.abs(got - expected), initial=0.0)
    return difference and difference / np.max(np.abs(expected))


def assert_same(got, expected, tolerance=FLOAT64, dead=()):
    """Compare two results of `evaluate`; no gradient but those in `dead` may vanish."""
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].shape == array.shape, name
        assert got[name].dtype == array.dtype, name
        assert np.all(np.isfinite(array)), f"{name} of the reference is not finite"
        error = relative_error(got[name], array)
        assert error <= tolerance, f"{name}: relative error {error}"
        if name.startswith("d_") and name not in dead and array.size:
            assert np.max(np.abs(array)) > 1e-3, f"{name} vanished: nothing was tested"


def assert_near(got, expected, tolerance=FLOAT64):
    """Compare two results of `evaluate` of a random problem.

    Some are too small or too masked to have every gradient: relative to 1 at least.
    """
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        scale = max(1.0, np.max(np.abs(array), initial=0.0))
        error = np.max(np.abs(got[name] - array), initial=0.0) / scale
        assert error <= tolerance, f"{name}: error {error:.1e}"


def plain(mode, random=True):
    """The mode for the other side of a comparison: the plainest of them.

    But XLA draws other dropout masks from the same seed.
    """
    return "xla" if random and mode == "xla" else "plain"


def compare(x, mode="eager", tolerance=FLOAT64, *, dead=(), options=None, **call):
    """BPTTRNN against SimpleRNN."""
    options = options or {}
    theirs, ours = pair(**options)
    random = options.get("dropout") or options.get("recurrent_dropout")
    expected = evaluate(theirs, x, plain(mode, random), **call)
    assert_same(evaluate(ours, x, mode, **call), expected, tolerance, dead)


def examples(number, **options):
    """Settings of hypothesis: so many draws, however long they take."""
    return settings(
        max_examples=number,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        **options,
    )


def draw_call(draw, batch, time, features, units):
    """Random inputs; and the call's mask and initial state, each of which may lack."""
    flag, call = st.booleans(), {}
    if draw(flag):
        row = st.lists(flag, min_size=time, max_size=time)
        mask = draw(st.lists(row, min_size=batch, max_size=batch))
        call["mask"] = np.array(mask, bool)
    if draw(flag):
        call["state"] = random_inputs(batch, units, seed=5)
    return random_inputs(batch, time, features, seed=draw(st.integers(0, 99))), call
