"""benchmarks/conversion.py: models that leave for LiteRT, ONNX and OpenVINO."""

import conversion
import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    FLOAT32,
    B,
    D,
    H,
    few,
    random_inputs,
    random_weights,
    relative_error,
    rng,
)
from packaging.version import Version

from keras_bptt import BPTTRNN

PLAIN, UNROLLED = "BPTTRNN, `unroll=1`", "BPTTRNN, `unroll=True`, 7 steps"
pytestmark = [
    # What the converters themselves do: a deprecated name in Keras, a protocol of NumPy 2.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(
        Version(tf.__version__) < Version("2.21"),
        reason="an older converter to LiteRT may abort the process, as that of 2.16 does",
    ),
]


LITERT = {
    "LiteRT, saved model": ["sequence, Masking"],
    "LiteRT, Keras model of batch 1": [],
    "LiteRT, export": [],
    "LiteRT, export of batch 1": [],
}
CASES = [
    "last output",
    "sequence",
    "sequence, Masking",
    "Bidirectional",
    "output layer",
    "state in and out",
]


@pytest.mark.parametrize(
    ("path", "case"),
    few(
        [(path, case) for path in LITERT for case in CASES],
        lambda path, case: case in LITERT[path],
    ),
)
def test_litert_gives_what_keras_gives(path, case):
    """At two batches and lengths, with operations of LiteRT alone."""
    assert list(conversion.CASES) == CASES
    difference = conversion.cell(path, "BPTTRNN", case)
    assert isinstance(difference, float), difference
    assert difference < FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "layer", "case", "package", "reason"),
    [
        (
            "LiteRT, saved model",
            "SimpleRNN",
            "last output",
            "keras",
            "of unknown batch",
        ),
        (
            "ONNX, export",
            "BPTTRNN",
            "sequence",
            "tf2onnx",
            "Invalid tensor data type 0",
        ),
    ],
)
def test_what_does_not_convert(path, layer, case, package, reason):
    """The day this fails the page on deploying has a line too many."""
    pytest.importorskip(package)
    reason = conversion.REASONS.get(reason, f"a list {reason}")
    assert conversion.cell(path, layer, case) == reason


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("path", "layer", "package"),
    [
        # Of one number of steps, and of any batch.
        ("LiteRT, saved model", UNROLLED, "keras"),
        ("ONNX, export", PLAIN, "tf2onnx"),
        ("ONNX, tf2onnx", PLAIN, "tf2onnx"),
        ("OpenVINO, export", "BPTTRNN", "openvino"),
        ("OpenVINO, saved model", "BPTTRNN", "openvino"),
    ],
)
def test_other_formats(path, layer, package, case, monkeypatch):
    pytest.importorskip(package)
    monkeypatch.setenv("CI", "true")  # else OpenVINO reports its use
    difference = conversion.cell(path, layer, case)
    assert isinstance(difference, float), difference
    assert difference < FLOAT32


@pytest.mark.parametrize("options", few([({},), ({"output_units": 3},)], bool))
def test_one_loop_has_the_same_gradient(options):
    """That of `unroll=1`, of any number of steps, where no state is kept for it."""
    signature = [tf.TensorSpec((None, None, D)), tf.TensorSpec((None, None), tf.bool)]
    mask = rng(3).random((B, 11)) < 0.7
    results = []
    for unroll in (False, 1):
        keras.utils.set_random_seed(0)
        layer = BPTTRNN(H, return_sequences=True, unroll=unroll, **options)
        layer.build((None, None, D))
        layer.cell.set_weights(random_weights())

        @tf.function(input_signature=signature)
        def gradients(x, mask, layer=layer):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, mask=mask)
                loss = tf.reduce_sum(y**2)
            return y, *tape.gradient(loss, [x, layer.cell.recurrent_kernel.value])

        x = random_inputs(B, 11, D).astype("float32")
        results.append(gradients(x, mask))
    for got, expected in zip(*results[::-1], strict=True):
        assert relative_error(got, expected) < FLOAT32


# --- The table itself


def test_a_wrong_number_is_seen():
    """In any example, in any output, or as another shape."""
    arguments = "BPTTRNN", "state in and out", None
    model = conversion.model_of(*arguments)

    def right(arrays):
        return [y.numpy() for y in model([*arrays.values()])]

    def wrong(change):
        return lambda arrays: change(arrays, *right(arrays))

    def error(run):
        return conversion.largest_difference(run, model, *arguments)

    assert error(right) < FLOAT32
    assert error(wrong(lambda arrays, y, h: [y, h * 1.01])) > 0.005
    late = wrong(lambda arrays, y, h: [y + (len(y) == 2) * (np.arange(6) == 5), h])
    assert error(late) > 0.1
    assert error(wrong(lambda arrays, y, h: [y[:, :1], h])) == float("inf")


def test_a_table():
    cells = dict.fromkeys(conversion.CASES, 2e-7)
    other = cells | {"sequence": "lists are not known", "last output": 1e-3}
    lines = conversion.table({"ONNX, export": {"SimpleRNN": other, "BPTTRNN": cells}})
    rows = lines.splitlines()
    assert rows[2] == "| ONNX, export | SimpleRNN | – (a) | – (b) |" + 4 * " 2e-07 |"
    assert rows[3] == "| ONNX, export | BPTTRNN |" + 6 * " 2e-07 |"
    assert rows[-1] == "(a) wrong: 1e-03; (b) lists are not known."


def test_a_process_that_dies_is_a_cell(monkeypatch):
    """And the cells after it are measured all the same."""
    calls = []

    def run(arguments, **options):
        path, left = conversion.json.loads(arguments[-1])
        calls.append(len(left))
        done = (
            ["Saved it", "cell 1e-7"] if len(calls) == 1 else ["cell 2e-7"] * len(left)
        )
        return conversion.subprocess.CompletedProcess(arguments, -11, "\n".join(done))

    monkeypatch.setattr(conversion.subprocess, "run", run)
    results = conversion.measure("LiteRT, export", ["BPTTRNN"])["BPTTRNN"]
    assert calls == [6, 4]
    expected = [1e-7, "the process dies, status -11"] + [2e-7] * 4
    assert list(results.values()) == expected
