"""Clipping inside the recursion by growth: `adjoint_max_growth`.

The engine against the brute force of `truncated_reference`; the laws that a limit of growth
obeys and a limit of the norm does not; second derivatives against a recursion written out,
whose scales are constants; half precision; and what it is for: a network whose gradient
explodes, trained.
"""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    FLOAT64,
    WAYS,
    few,
    in_modes,
    relative_error,
    rng,
    without_graphs,
)

import keras_bptt.engine.backward
import keras_bptt.engine.parts
from keras_bptt import BPTTRNN, RandomizedTruncation, Truncation
from keras_bptt.cells.activations import resolve
from keras_bptt.cells.simple_rnn import SimpleRNN
from keras_bptt.engine.options import Arguments, Constants, Options
from keras_bptt.engine.recurrence import recurrence
from keras_bptt.reference import truncation as truncated_reference

# All different, also from the number of blocks. T is no multiple of a block below.
B, T, D, H, OUTPUTS = 5, 11, 3, 4, 2
GROWTH = 1.1

# One example of each kind; in the last nothing is real.
MASK = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ],
    bool,
)


def exploding_weights(features=D, units=H, radius=1.3, seed=11):
    """W, U, b: each step multiplies what comes back by the radius, until tanh is flat."""
    random = rng(seed)
    W = 0.02 * random.normal(size=(features, units))
    U = random.normal(size=(units, units))
    U *= radius / np.max(np.abs(np.linalg.eigvals(U)))
    return W, U, 0.01 * random.normal(size=units)


def late(arrays):
    """Cotangents, or targets, of which the early ones are smaller.

    Else what early losses send hides that what late ones send has grown.
    """
    return arrays * 0.7 ** np.arange(arrays.shape[1])[::-1, None]


class Case:
    """What is asked of a recurrence, and random numbers to ask it for.

    Args:
        masked: with `MASK`, and NaN as the masked inputs.
        window: (steps, stride) of a truncation.
        outputs: with an output layer.
        factors: with link factors, as a randomised truncation draws them.
        dropout: with factors of recurrent dropout.
        limits: the limits of adjoints; by default that of growth.
        options: others of the engine.
    """

    def __init__(
        self,
        masked=False,
        window=None,
        outputs=False,
        factors=False,
        dropout=False,
        limits=None,
        activation="tanh",
        **options,
    ):
        random = rng(1)
        self.mask = MASK if masked else None
        self.window, self.activation = window, activation
        self.options = {"return_sequences": True} | options
        self.limits = limits or {"adjoint_max_growth": GROWTH}
        W, U, b = exploding_weights()
        x, h_0 = random.normal(size=(B, T, D)), 0.02 * random.normal(size=(B, H))
        V, c = random.normal(size=(H, OUTPUTS)), random.normal(size=OUTPUTS)
        self.factors = random.choice([0.0, 1.25, 1.25, 1.25], size=(B, T))
        self.factors = self.factors if factors else None
        self.dropout = (
            random.choice([0.0, 1.25, 1.25], size=(B, H)) if dropout else None
        )
        if masked:
            in_place = MASK[:, ::-1] if self.backwards else MASK
            x[~in_place] = np.nan
            self.mask = in_place
        self.arrays = {"x": x, "W": W, "U": U, "b": b, "h_0": h_0}
        if outputs:
            self.arrays |= {"V": V, "c": c}
        width = OUTPUTS if outputs else H
        shape = (B, T, width) if self.options["return_sequences"] else (B, width)
        self.dy, self.ds = random.normal(size=shape), random.normal(size=(B, H))
        if self.options["return_sequences"]:
            self.dy = late(self.dy)

    @property
    def backwards(self):
        return self.options.get("go_backwards", False)

    # --- The reference

    def cotangents(self):
        """e_t by the order of processing, and what of dy is seen."""
        mask = np.ones((B, T), bool) if self.mask is None else MASK
        seen = np.logical_or.accumulate(mask, 1)
        if self.options.get("zero_output_for_mask"):
            seen = mask
        dy = self.dy
        if not self.options["return_sequences"]:
            dy = np.zeros((B, T, self.dy.shape[-1]))
            dy[:, -1] = self.dy
        q = np.where(seen[:, :, None], dy, 0)
        e = q @ self.arrays["V"].T if "V" in self.arrays else q.copy()
        e[:, -1] += self.ds
        return e, q, dy

    def expected(self, **limits):
        """The gradients by name; without limits those of the recurrence unclipped."""
        e, q, dy = self.cotangents()
        x, W, U, b, h_0 = (self.arrays[name] for name in ("x", "W", "U", "b", "h_0"))
        x = x[:, ::-1] if self.backwards else x
        steps, stride = self.window or (None, None)
        kind = "clipped" if limits else "truncated"
        f = (np.sin, np.cos) if self.activation == "sine" else self.activation
        d = getattr(truncated_reference, f"{kind}_gradients")(
            *(x, W, U, b, h_0, f, e),
            steps=steps,
            stride=stride,
            mask=None if self.mask is None else MASK,
            recurrent_dropout=self.dropout,
            factors=self.factors,
            **limits,
        )
        d_x = d.d_inputs[:, ::-1] if self.backwards else d.d_inputs
        found = {"x": d_x, "W": d.d_kernel, "U": d.d_recurrent_kernel}
        found |= {"b": d.d_bias, "h_0": d.d_initial_state}
        if "V" in self.arrays:
            found["V"] = np.einsum("bth,bto->ho", self.states(), q)
            found["c"] = dy.sum(axis=(0, 1))
        return found

    def states(self):
        """The states of all steps, in the order of processing."""
        h, found = self.arrays["h_0"], []
        for t in range(T):
            x_t = self.arrays["x"][:, T - 1 - t if self.backwards else t]
            r = 1 if self.dropout is None else self.dropout
            z = x_t @ self.arrays["W"] + (r * h) @ self.arrays["U"] + self.arrays["b"]
            new = np.tanh(z)
            h = new if self.mask is None else np.where(MASK[:, t, None], new, h)
            found.append(h)
        return np.stack(found, 1)

    # --- The engine

    def function(self, **limits):
        """The recurrence as a function of the tensors by name."""
        f = getattr(keras.activations, self.activation, tf.sin)
        truncation = None if self.window is None else Truncation(*self.window)
        options = Options(
            SimpleRNN(resolve(f, H, "float64")),
            truncation=truncation,
            **self.options,
            **limits,
        )

        def constant(array):
            return None if array is None else tf.constant(array)

        noise = None, constant(self.dropout)
        constants = Constants(constant(self.mask), noise, constant(self.factors))

        def run(x, W, U, b, h_0, *output_layer):
            arguments = Arguments(x, (W, U, b), (h_0,), output_layer)
            y, (state,) = recurrence(options, constants, arguments)
            return y, state

        return run

    def gradients(self, mode="plain", **limits):
        """What the engine says, by name. Mode "unknown": in a graph of any T."""
        function, names = self.function(**limits), list(self.arrays)
        tensors = [tf.constant(array) for array in self.arrays.values()]
        cotangents = tf.constant(self.dy), tf.constant(self.ds)

        @tf.autograph.experimental.do_not_convert  # takes longer than all else
        def run(cotangents, *tensors):
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                outputs = function(*tensors)
            return tape.gradient(outputs, tensors, list(cotangents))

        if mode == "unknown":
            specs = [tf.TensorSpec(t.shape, t.dtype) for t in tensors]
            specs[0] = tf.TensorSpec([B, None, D], "float64")
            both = [tf.TensorSpec(t.shape, t.dtype) for t in cotangents]
            if self.options["return_sequences"]:
                both[0] = tf.TensorSpec([B, None, self.dy.shape[-1]], "float64")
            run = tf.function(
                run, autograph=False, input_signature=[tuple(both), *specs]
            )
        else:
            run = WAYS[mode](run)
        found = run(cotangents, *tensors)
        return dict(zip(names, (t.numpy() for t in found), strict=True))


def check(mode="plain", **case):
    """The engine equals the reference where the limits act."""
    case = Case(**case)
    want = case.expected(**case.limits)
    assert_clipped(case, want)
    got = case.gradients(mode, **case.limits)
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].shape == array.shape, name
        assert relative_error(got[name], array) < FLOAT64, name


def assert_clipped(case, want):
    free, names = case.expected(), ["x", "W", "U", "b", "h_0"]
    if case.window and case.mask is None and not case.options["return_sequences"]:
        names.remove("h_0")  # the one window does not reach it
    for name in names:
        assert np.max(np.abs(want[name])) > 1e-3, f"{name} vanished: nothing was tested"
    for name in ("x", "U", "b"):
        assert relative_error(want[name], free[name]) > 0.05, "nothing was clipped"


def test_the_problem_explodes():
    """The first adjoint is some times as long as the last, and as all that was sent."""
    case = Case()
    e, _, _ = case.cotangents()
    problem = (case.arrays[name] for name in ("x", "W", "U", "b", "h_0"))
    d = truncated_reference.truncated_gradients(*problem, "tanh", e, steps=None)
    lengths, sent = (np.linalg.norm(array, axis=-1) for array in (d.adjoint, e))
    assert np.median(lengths[:, 0] / lengths[:, -1]) > 8
    assert np.median(lengths[:, 0] / sent.sum(axis=1)) > 3
    assert np.median(1 - case.states() ** 2) > 0.9  # tanh is steep nearly everywhere


CASES = {
    "sequence": {},
    "last output": {"return_sequences": False},
    "mask": {"masked": True},
    "mask, last output": {"masked": True, "return_sequences": False},
    "mask, zero output": {"masked": True, "zero_output_for_mask": True},
    "mask, zero last output": {
        "masked": True,
        "zero_output_for_mask": True,
        "return_sequences": False,
    },
    "mask, backwards": {"masked": True, "go_backwards": True},
    "dropout": {"dropout": True},
    "linear": {"activation": "linear"},
    "slope of z": {"activation": "sine", "masked": True},
    "unrolled": {"unroll": True, "masked": True},
    "states not kept": {"keep_states": False, "masked": True},
    "both limits": {
        "masked": True,
        "limits": {"adjoint_max_growth": GROWTH, "adjoint_clipnorm": 6.0},
    },
    # Windows: all at once, in `level_pass`.
    "chunks": {"window": (4, 4)},
    "chunks, mask": {"window": (4, 4), "masked": True},
    "overlapping": {"window": (5, 2)},
    "overlapping, mask": {"window": (5, 2), "masked": True},
    "overlapping, mask, zero output": {
        "window": (5, 2),
        "masked": True,
        "zero_output_for_mask": True,
    },
    "stride 1": {"window": (4, 1)},
    "stride 1, mask": {"window": (4, 1), "masked": True},
    # Some of the examples are held by one window.
    "long windows, mask": {"window": (8, 3), "masked": True},
    "window, last output": {"window": (5, 2), "return_sequences": False},
    "window, mask, last output": {
        "window": (7, 4),
        "masked": True,
        "return_sequences": False,
    },
    "one window": {"window": (T + 2, 2), "masked": True},
    "window, dropout": {"window": (5, 2), "dropout": True},
    "window, both limits": {
        "window": (5, 2),
        "masked": True,
        "limits": {"adjoint_max_growth": GROWTH, "adjoint_clipnorm": 4.0},
    },
    # States computed again: with windows they go side by side, in `sliding_pass`.
    "checkpoints": {"checkpoint_every": 4},
    "checkpoints, mask": {"checkpoint_every": 3, "masked": True},
    "root of checkpoints": {"checkpoint_every": "sqrt", "return_sequences": False},
    "checkpoints, chunks": {"checkpoint_every": 3, "window": (4, 4)},
    "checkpoints, chunks, mask": {
        "checkpoint_every": 3,
        "window": (4, 4),
        "masked": True,
    },
    "checkpoints, overlapping": {"checkpoint_every": 4, "window": (5, 2)},
    "checkpoints, overlapping, mask": {
        "checkpoint_every": 4,
        "window": (5, 2),
        "masked": True,
    },
    "checkpoints, stride 1": {"checkpoint_every": 4, "window": (4, 1)},
    "checkpoints, stride 1, mask": {
        "checkpoint_every": "sqrt",
        "window": (4, 1),
        "masked": True,
    },
    "checkpoints, long windows, mask": {
        "checkpoint_every": 4,
        "window": (8, 3),
        "masked": True,
    },
    # An output layer: what enters is q V^T.
    "output layer": {"outputs": True},
    "output layer, mask": {"outputs": True, "masked": True},
    "output layer, last output": {"outputs": True, "return_sequences": False},
    "output layer, windows, mask": {
        "outputs": True,
        "window": (5, 2),
        "masked": True,
    },
    "output layer, checkpoints, mask": {
        "outputs": True,
        "checkpoint_every": 4,
        "masked": True,
    },
    # Link factors: what they cut off was sent all the same.
    "factors": {"factors": True},
    "factors, mask": {"factors": True, "masked": True},
    "factors, mask, last output": {
        "factors": True,
        "masked": True,
        "return_sequences": False,
    },
    "factors, checkpoints, mask": {
        "factors": True,
        "masked": True,
        "checkpoint_every": 4,
    },
}


@pytest.mark.parametrize("case", CASES)
@without_graphs()
def test_equals_the_reference(case):
    check(**CASES[case])


IN_MODES = [
    ("eager", "checkpoints, overlapping, mask"),
    ("graph", "factors, mask"),
    ("xla", "overlapping, mask"),
    ("unknown", "overlapping, mask"),
]
# An unrolled graph is for one number of steps.
MODES_OF_CASES = [
    (mode, case)
    for mode in ("eager", "graph", "compiled", "xla", "unknown")
    for case in CASES
    if (mode, case) != ("unknown", "unrolled")
]


@pytest.mark.parametrize(
    ("mode", "case"),
    few(MODES_OF_CASES, lambda mode, case: (mode, case) in IN_MODES),
)
def test_equals_the_reference_in_graphs(mode, case):
    """Compiled: XLA compiles the passes, in a graph, which is not."""
    if mode == "compiled":
        check("graph", **CASES[case], jit_compile=True)
    else:
        check(mode, **CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mask", "overlapping, mask"])
def test_parts_of_the_batch(monkeypatch, case):
    """As large batches are computed on two cores."""
    monkeypatch.setattr(keras_bptt.engine.parts, "cores", lambda: 2)
    monkeypatch.setattr(keras_bptt.engine.parts, "LEAST_WORK", 1)
    monkeypatch.setattr(keras_bptt.engine.parts, "FEWEST_EXAMPLES", 1)
    original, counts = keras_bptt.engine.backward.split, []
    monkeypatch.setattr(
        keras_bptt.engine.backward,
        "split",
        lambda count, given: counts.append(count) or original(count, given),
    )
    check("graph", **CASES[case], jit_compile=True)
    assert counts == [2]


def test_a_large_growth_is_none():
    """Bit for bit: the scales are 1."""
    for case in ("mask", "checkpoints, overlapping, mask"):
        case = Case(**CASES[case])
        free = case.gradients()
        got = case.gradients(adjoint_max_growth=1e9)
        for name, array in free.items():
            assert np.array_equal(got[name], array), name


# ------------------------------------------------------- against automatic differentiation


def gated(h, factor):
    """h, whose gradient is multiplied by a factor."""
    number = tf.stop_gradient(h)
    return number + factor * (h - number)


class Unrolled:
    """The recurrence of a `Case` and its clipped gradient, each step of each example.

    In plain TensorFlow, which differentiates it; but the scales are constants.
    """

    def __init__(self, case):
        self.case = case
        mask = np.ones((B, T), bool) if case.mask is None else case.mask
        self.real = [np.flatnonzero(row) for row in mask]
        # The number of real steps up to each one.
        self.count = np.cumsum(mask, axis=1)

    def __call__(self, *tensors):
        """(y, state), whose gradient is the clipped one."""

        @tf.custom_gradient
        def operation(*tensors):
            x, W, U, b, h_0 = tensors
            y, last = [], []
            for n in range(B):
                h = self.states(n, *tensors)
                shown = [h[c] if c else tf.zeros_like(h[0]) for c in self.count[n]]
                y.append(tf.stack(shown, 1)[0])
                last.append(h[-1][0])
            y = tf.stack(y)
            y = y if self.case.options["return_sequences"] else y[:, -1]
            return (y, tf.stack(last)), lambda dy, ds: self.gradients(dy, ds, *tensors)

        return operation(*tensors)

    def states(self, n, x, W, U, b, h_0):
        """h_0 ... h_N of the real steps of an example, (1, units) each."""
        h = [h_0[n : n + 1]]
        for t in self.real[n]:
            h.append(self.step(n, t, h[-1], x, W, U, b))
        return h

    def step(self, n, t, before, x, W, U, b):
        return tf.tanh(x[n : n + 1, t] @ W + self.sent_on(n, t, before) @ U + b)

    def sent_on(self, n, t, before):
        if self.case.factors is None or self.count[n, t] == 1:
            return before
        return gated(before, self.case.factors[n, t])

    def gradients(self, dy, ds, x, W, U, b, h_0):
        d_x = {}
        d_W, d_U, d_b = map(tf.zeros_like, (W, U, b))
        d_h_0 = []
        for n in range(B):
            e = self.cotangents(n, dy, ds)
            h = self.states(n, x, W, U, b, h_0)
            N = len(self.real[n])
            steps, stride = self.case.window or (N, N)
            steps, stride = (N, N) if steps >= N else (steps, stride)
            home = e[0]
            for end in range(N, 0, -(stride or 1)):
                first = max(1, end - steps + 1)
                # A window that does not begin with the sequence begins at a constant.
                before = {first: h[0] if first == 1 else tf.stop_gradient(h[first - 1])}
                for s in range(first, end + 1):
                    t = self.real[n][s - 1]
                    before[s + 1] = self.step(n, t, before[s], x, W, U, b)
                a, sent = tf.zeros_like(h_0[:1]), 0.0
                for s in range(end, first - 1, -1):
                    if s > end - stride:
                        a += e[s]
                        sent += tf.norm(e[s])
                    a *= self.scale(a, sent)
                    t = self.real[n][s - 1]
                    delta = a * (1 - before[s + 1] ** 2)
                    d_x[n, t] = d_x.get((n, t), 0.0) + delta @ tf.transpose(W)
                    d_W += tf.transpose(x[n : n + 1, t]) @ delta
                    d_U += tf.transpose(self.sent_on(n, t, before[s])) @ delta
                    d_b += delta[0]
                    a = delta @ tf.transpose(U)
                    if self.case.factors is not None and s > 1:
                        a *= self.case.factors[n, t]
                home += a if first == 1 else 0.0
            d_h_0.append(home[0])
        zero = tf.zeros_like(x[:1, 0])
        rows = [[d_x.get((n, t), zero)[0] for t in range(T)] for n in range(B)]
        d_x = tf.stack([tf.stack(row) for row in rows])
        return d_x, d_W, d_U, d_b, tf.stack(d_h_0)

    def scale(self, a, sent):
        """A constant."""
        limits = self.case.limits
        limit = limits["adjoint_max_growth"] * sent
        limit = tf.minimum(limit, limits.get("adjoint_clipnorm", np.inf))
        norm = tf.norm(a)
        return tf.stop_gradient(tf.where(norm > limit, limit / norm, 1.0))

    def cotangents(self, n, dy, ds):
        """e_0 ... e_N: those of an example at a masked step are of the real one before."""
        if not self.case.options["return_sequences"]:
            dy = tf.stack([tf.zeros_like(dy)] * (T - 1) + [dy], 1)
        e = [tf.zeros_like(ds[:1])] * (len(self.real[n]) + 1)
        for t, count in enumerate(self.count[n]):
            if count:  # before the first real step the output is 0
                e[count] += dy[n : n + 1, t]
        e[-1] += ds[n : n + 1]
        return e


def second_order(function, case, power, mode="plain"):
    """The gradients of a penalty on all gradients of a loss; of a linear one, if power 1.

    The loss of another power sends cotangents that depend on the outputs, and so on.
    """
    tensors = [tf.constant(np.nan_to_num(a)) for a in case.arrays.values()]
    random = rng(9)
    weights = [random.normal(size=t.shape) for t in tensors]

    @tf.autograph.experimental.do_not_convert
    def run(*tensors):
        with tf.GradientTape() as outer:
            outer.watch(tensors)
            with tf.GradientTape() as inner:
                inner.watch(tensors)
                y, state = function(*tensors)
                loss = tf.reduce_sum(case.dy * y**power)
                loss += tf.reduce_sum(case.ds * state**power)
            found = inner.gradient(loss, tensors)
            pairs = zip(weights, found, strict=True)
            penalty = tf.add_n([tf.reduce_sum(w * d**2) for w, d in pairs])
        return outer.gradient(penalty, tensors)

    return [d.numpy() for d in WAYS[mode](run)(*tensors)]


# Once each: it takes longest.
@functools.cache
def second_order_unrolled(name, power):
    case = Case(**CASES[name])
    return second_order(Unrolled(case), case, power)


def check_second_order(name, power, mode="plain"):
    case, want = Case(**CASES[name]), second_order_unrolled(name, power)
    assert_clipped(case, case.expected(**case.limits))
    got = second_order(case.function(**case.limits), case, power, mode)
    for name, a, b in zip(case.arrays, got, want, strict=True):
        assert np.max(np.abs(b)) > 1e-3, f"{name} vanished: nothing was tested"
        assert relative_error(a, b) < FLOAT64, name


HIGHER = ["mask", "overlapping", "overlapping, mask", "factors, mask"]
HIGHER += ["both limits", "chunks, mask", "stride 1, mask", "long windows, mask"]
HIGHER += ["sequence", "mask, last output", "window, mask, last output"]


@pytest.mark.parametrize(
    ("case", "power"),
    few(
        [(case, power) for case in HIGHER for power in (1, 2)],
        lambda *case: case in [("mask", 2), ("overlapping", 1), ("factors, mask", 1)],
    ),
)
def test_scales_are_constants_in_second_derivatives(case, power):
    check_second_order(case, power)


@pytest.mark.slow
@pytest.mark.parametrize("case", HIGHER[:4])
def test_second_derivatives_in_every_mode(mode, case):
    check_second_order(case, 1, mode)


@without_graphs()
def test_the_unrolled_recursion_is_that_of_the_reference():
    """What second derivatives are compared with has the first ones right."""
    for name in ("both limits", "overlapping, mask", "factors, mask"):
        case = Case(**CASES[name])
        tensors = [tf.constant(np.nan_to_num(a)) for a in case.arrays.values()]
        function = Unrolled(case)
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            outputs = function(*tensors)
        cotangents = [tf.constant(case.dy), tf.constant(case.ds)]
        found = tape.gradient(outputs, tensors, cotangents)
        for got, want in zip(found, case.expected(**case.limits).values(), strict=True):
            assert relative_error(got, want) < FLOAT64


# -------------------------------------------------------------------- the laws of a layer

# By law the limit has no unit: batch size, scale and padding do not enter it.
PLAIN = {"adjoint_max_growth": 1.0, "jit_compile": False}
NORM = {"adjoint_clipnorm": 0.01, "jit_compile": False}  # the negative control
LAYERS = {
    "full": {},
    "chunks": {"truncation": 4},
    "windows": {"truncation": Truncation(5, 2)},
    "windows from checkpoints": {
        "truncation": Truncation(5, 2),
        "checkpoint_every": 4,
    },
    "output layer": {"output_units": OUTPUTS},
    "last output": {"return_sequences": False},
}


def some_layers(*chosen):
    """Each of `LAYERS`; those that are not chosen take long, together."""
    cases = few([(name,) for name in LAYERS], lambda name: name in chosen)
    return pytest.mark.parametrize("name", cases)


def layer_of(dtype="float64", **options):
    """A layer whose gradient explodes, with weights of its own output layer, if any."""
    layer = BPTTRNN(H, dtype=dtype, **{"return_sequences": True} | options)
    layer.build((None, None, D))
    W, U, b = exploding_weights()
    random = rng(4)
    rest = [random.normal(size=w.shape) for w in layer.get_weights()[3:]]
    layer.set_weights([W, U, b, *rest])
    return layer


def data(seed=3):
    """Inputs, and targets of an output layer or of the states."""
    random = rng(seed)
    return random.normal(size=(B, T, D)), random.normal(size=(B, T, H))


def of_mean_loss(layer, x, targets, mask=None, real=None, scale=1.0, mode="plain"):
    """The gradients of a mean over the batch, of the weights and the inputs.

    `real` is what outputs the loss is of, where not of all.
    """
    weights = [v.value for v in layer.trainable_variables]

    def run(x, targets, mask, real):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.cast(layer(x, mask=mask, training=True), layer.variable_dtype)
            if len(y.shape) == 2:
                y, targets = y[:, None], targets[:, -1:]
            losses = tf.reduce_sum((y - targets[:, :, : y.shape[2]]) ** 2, 2)
            losses = losses if real is None else tf.where(real, losses, 0)
            loss = scale * tf.reduce_mean(tf.reduce_sum(losses, 1))
        return tape.gradient(loss, [*weights, x])

    def tensor(array, dtype):
        return None if array is None else tf.constant(array, dtype)

    dtype = layer.variable_dtype
    given = tensor(x, dtype), tensor(targets, dtype), tensor(mask, bool)
    found = WAYS[mode](run)(*given, tensor(real, bool))
    return [tf.convert_to_tensor(d).numpy() for d in found]


def error(got, wanted):
    """The largest of the relative errors."""
    pairs = zip(got, wanted, strict=True)
    return max(relative_error(a, b) for a, b in pairs)


def assert_layer_clips(options, wanted, *given, **more):
    free = of_mean_loss(
        layer_of(**options | {"adjoint_max_growth": None}), *given, **more
    )
    assert error(wanted, free) > 0.05, "nothing was clipped"


def mean_of_parts(layer, x, targets):
    """The mean over the examples of the gradients of the weights."""
    cuts = [slice(n, n + 1) for n in range(B)]
    parts = [of_mean_loss(layer, x[cut], targets[cut])[:-1] for cut in cuts]
    return [np.mean(each, axis=0) for each in zip(*parts, strict=True)]


@some_layers("full", "windows")
def test_the_gradient_of_a_batch_is_the_mean_of_its_parts(name):
    x, targets = data()[0], late(data()[1])
    options = PLAIN | LAYERS[name]
    layer = layer_of(**options)
    whole = of_mean_loss(layer, x, targets)
    assert_layer_clips(options, whole, x, targets)
    assert error(mean_of_parts(layer, x, targets), whole[:-1]) < 1e-10
    # The negative control: a norm is in the units of a mean over the batch.
    layer = layer_of(**NORM | LAYERS[name])
    whole = of_mean_loss(layer, x, targets)[:-1]
    assert error(mean_of_parts(layer, x, targets), whole) > 0.5


def test_the_gradient_of_a_batch_in_float32():
    x, targets = data()[0], late(data()[1])
    layer = layer_of("float32", **PLAIN)
    whole = of_mean_loss(layer, x, targets)[:-1]
    assert error(mean_of_parts(layer, x, targets), whole) < 1e-6


@some_layers("full", "windows")
def test_a_loss_times_a_power_of_two(name):
    """Its gradients times it, bit for bit in float32."""
    x, targets = data()[0], late(data()[1])
    options = PLAIN | LAYERS[name] | {"dtype": "float32"}
    layer = layer_of(**options)
    wanted = of_mean_loss(layer, x, targets)
    assert_layer_clips(options, wanted, x, targets)
    for k in (-30, 7, 40):
        scaled = of_mean_loss(layer, x, targets, scale=2.0**k)
        assert_times(2.0**k, wanted, scaled)
    # The negative control: a norm is in the units of the loss.
    layer = layer_of("float32", **NORM | LAYERS[name])
    wanted = of_mean_loss(layer, x, targets)
    scaled = of_mean_loss(layer, x, targets, scale=2.0**7)
    assert error([d / 2.0**7 for d in scaled], wanted) > 0.5


def assert_times(scale, gradients, scaled):
    """Bit for bit: a power of two rounds nothing."""
    for a, b in zip(scaled, gradients, strict=True):
        assert np.array_equal(a, np.float32(scale) * b)


@in_modes("xla")
def test_a_loss_times_a_power_of_two_in_every_mode(mode):
    """As the layer is trained: the recurrence compiled, whatever is around it."""
    x, targets = data()[0], late(data()[1])
    layer = layer_of("float32", adjoint_max_growth=1.0)
    wanted = of_mean_loss(layer, x, targets, mode=mode)
    scaled = of_mean_loss(layer, x, targets, scale=2.0**9, mode=mode)
    assert_times(2**9, wanted, scaled)


PADDING = {
    "start": np.arange(T + 4) >= 4,
    "end": np.arange(T + 4) < T,
    "middle": ~np.isin(np.arange(T + 4), [3, 4, 8, 12]),
    "everywhere": ~np.isin(np.arange(T + 4), [0, 6, 7, T + 3]),
}


@pytest.mark.parametrize(
    ("name", "place"),
    few(
        [(name, place) for name in LAYERS for place in PADDING],
        lambda name, place: (
            name == "full"
            or (name in ("windows", "last output") and place == "everywhere")
        ),
    ),
)
def test_padding_changes_nothing(name, place):
    x, targets = data()[0], late(data()[1])
    options, real = PLAIN | LAYERS[name], PADDING[place]
    padded_x, padded = (np.full((B, T + 4, a.shape[2]), np.nan) for a in (x, targets))
    padded_x[:, real], padded[:, real] = x, targets
    padded[:, -1] = targets[:, -1]  # where the last output is all, and it is masked
    mask = np.broadcast_to(real, (B, T + 4))
    layer = layer_of(**options)
    seen = mask if layer.return_sequences else np.ones((B, 1), bool)
    wanted = of_mean_loss(layer, x, targets)
    padded = np.nan_to_num(
        padded
    )  # of what is not seen the loss is 0, its gradient not NaN
    *got, d_x = of_mean_loss(layer, padded_x, padded, mask, seen)
    assert_layer_clips(options, wanted, x, targets)
    assert error([*got, d_x[:, real]], wanted) < FLOAT64
    assert not np.any(d_x[:, ~real])


def linear_layer(recurrent, growth, options):
    """h_t = x_t W + h_{t-1} U, exactly."""
    layer = BPTTRNN(
        H,
        activation="linear",
        use_bias=False,
        recurrent_initializer=keras.initializers.Identity(recurrent),
        adjoint_max_growth=growth,
        jit_compile=False,
        dtype="float64",
        seed=0,
        **{"return_sequences": True} | options,
    )
    layer.build((None, None, D))
    weights = [rng(i).normal(size=w.shape) for i, w in enumerate(layer.get_weights())]
    weights[1] = layer.get_weights()[1]
    layer.set_weights(weights)
    return layer


@some_layers("full", "windows")
def test_an_identity_network_is_not_clipped(name):
    """With a loss at every step, at the smallest limit there is."""
    x, targets = data()

    def found(recurrent, growth):
        layer = linear_layer(recurrent, growth, LAYERS[name])
        return of_mean_loss(layer, x, late(targets))

    assert error(found(1.0, 1.0), found(1.0, None)) < 1e-12
    # One that grows by a fifth a step is.
    assert error(found(1.2, 1.0), found(1.2, None)) > 0.05


def test_randomized_truncation_of_a_layer():
    """With the factors that it draws: what it clips is not what it would be without."""
    x, targets = data()[0], late(data()[1])
    found = {}
    for growth in (1.0, 1e9, None):
        layer = layer_of(
            truncation=RandomizedTruncation(4.0, seed=3),
            adjoint_max_growth=growth,
            jit_compile=False,
        )
        found[growth] = of_mean_loss(layer, x, targets)
    assert error(found[1e9], found[None]) == 0
    assert error(found[1.0], found[None]) > 0.05


# ------------------------------------------------------------------------- half precision


@pytest.mark.parametrize(
    ("policy", "name"),
    few(
        [(policy, name) for policy in ("float16", "bfloat16") for name in LAYERS],
        lambda policy, name: name == ("windows" if policy == "float16" else "full"),
    ),
)
def test_half_precision(policy, name):
    """A norm is refused in float16, whose losses are scaled; growth has no scale."""
    x, targets = data()[0], late(data()[1])
    options = PLAIN | LAYERS[name] | {"dtype": f"mixed_{policy}"}
    layer = layer_of(**options)
    wanted = of_mean_loss(layer, x, targets)
    scaled = of_mean_loss(layer, x, targets, scale=2.0**4)
    if policy == "bfloat16":  # its range is that of float32
        assert_times(2**4, wanted, scaled)
    # The smallest numbers of float16 have fewer digits.
    assert error(scaled, [2**4 * d for d in wanted]) < 2**-10
    exact = of_mean_loss(layer_of(**options | {"dtype": "float32"}), x, targets)
    assert error(wanted, exact) < (0.02 if policy == "float16" else 0.15)
    assert_layer_clips(options, wanted, x, targets)


@pytest.mark.slow
def test_a_fit_in_float16():
    """The optimizer scales the loss, and finds the scale while it trains."""
    x, targets = data()[0].astype("float32"), late(data()[1]).astype("float32")
    layer = layer_of("mixed_float16", adjoint_max_growth=1.0)
    model = keras.Sequential([keras.Input((T, D)), layer])
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01))
    model.compile(optimizer, "mse")
    losses = model.fit(x, targets, B, epochs=4, verbose=0).history["loss"]
    assert np.all(np.isfinite(losses)) and losses[-1] < losses[0]


# ------------------------------------------------------------------------ what it is for


def losses_of_training(growth):
    """Of a network that begins at 0 and leaves it by a factor of 1.5 a step, for 60 steps.

    It is to show a pattern. There is a bias that makes it; but near 0 the gradient by the
    bias is 1.5^60.
    """
    steps, units, rate = 60, 16, 1.0
    random = rng()
    U = 1.5 * np.linalg.qr(random.normal(size=(units, units)))[0]
    assert np.isclose(np.max(np.abs(np.linalg.eigvals(U))), 1.5)
    x = 1e-4 * random.normal(size=(8, steps, 2))
    pattern = np.broadcast_to(random.uniform(-0.5, 0.5, units), (8, steps, units))
    layer = BPTTRNN(units, return_sequences=True, adjoint_max_growth=growth)
    model = keras.Sequential([keras.Input((steps, 2)), layer])
    layer.set_weights([layer.get_weights()[0], U, np.zeros(units)])
    model.compile(keras.optimizers.SGD(rate), "mse")
    x, pattern = x.astype("float32"), pattern.astype("float32")
    losses = model.fit(x, pattern, 8, epochs=15, verbose=0).history["loss"]
    return losses, layer.get_weights()


@pytest.mark.usefixtures("usual_sizes")
def test_an_exploding_network_trains():
    losses, weights = losses_of_training(1.0)
    assert all(np.all(np.isfinite(w)) for w in weights)
    assert losses[-1] < 0.5 * losses[0]
    # Without it, at the same rate, one step ends it: every unit is saturated for good.
    losses, _ = losses_of_training(None)
    assert not losses[-1] < 2 * losses[0]
    assert np.ptp(losses[1:]) < 1e-3 * losses[1]
