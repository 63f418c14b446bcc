"""What converts to LiteRT, ONNX and OpenVINO, and gives there what Keras gives.

    python benchmarks/conversion.py
    python benchmarks/conversion.py --only "LiteRT, saved model"

Each path takes models of SimpleRNN and of BPTTRNN, of any number of steps where the layer
is not unrolled. What comes out runs at two batches and lengths, on a runtime without
TensorFlow's kernels, and its outputs are compared with those of Keras. The table has the
largest relative difference, or the reason why there is none. A path has processes of its
own: where one dies, the table says so.

And how long a sequence takes in LiteRT, in turns with SimpleRNN's.

Numbers go to `docs/deploying/conversion.json`, beside those of other paths and layers that
are there, and the table of all into `docs/deploying.md`, between the comments that name it;
with `--directory` to a place of their own.
"""

import argparse
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import warnings

import keras
import numpy as np
import tensorflow as tf
from pages import filled
from report import DOCS
from timing import interleaved, summary

from keras_bptt import BPTTRNN

FEATURES, UNITS, OUTPUTS, STEPS = 4, 6, 3, 7
PADDING = -9.0
# Of the sequences that are timed, one at a time.
LENGTHS, SPEED_FEATURES, SPEED_UNITS = [64, 250, 1000, 4000], 8, 64
TOLERANCE = 2e-5  # of float32, as in tests/helpers.py
MARK = "cell "  # of what a process has to say; converters print too

# The class, the number of steps (None: any) and other arguments.
LAYERS = {
    "SimpleRNN": (keras.layers.SimpleRNN, None, {}),
    "BPTTRNN": (BPTTRNN, None, {}),
    "BPTTRNN, `unroll=1`": (BPTTRNN, None, {"unroll": 1}),
    f"BPTTRNN, `unroll=True`, {STEPS} steps": (BPTTRNN, STEPS, {"unroll": True}),
}


def last_output(rnn, x):
    return x, rnn()(x)


def sequence(rnn, x):
    return x, rnn(return_sequences=True)(x)


def masked(rnn, x):
    return x, rnn(return_sequences=True)(keras.layers.Masking(PADDING)(x))


def both_directions(rnn, x):
    return x, keras.layers.Bidirectional(rnn(return_sequences=True))(x)


def with_output_layer(rnn, x):
    """Of SimpleRNN a Dense after it, which computes the same."""
    if rnn.func is not BPTTRNN:
        dense = keras.layers.Dense(OUTPUTS, activation="softmax")
        return x, dense(rnn(return_sequences=True)(x))
    options = {"output_units": OUTPUTS, "output_activation": "softmax"}
    return x, rnn(return_sequences=True, **options)(x)


def with_state(rnn, x):
    """A stream: the state goes in, and comes out for the next call."""
    h_0 = keras.Input((UNITS,), batch_size=x.shape[0])
    layer = rnn(return_sequences=True, return_state=True)
    return [x, h_0], layer(x, initial_state=h_0)


CASES = {
    "last output": last_output,
    "sequence": sequence,
    "sequence, Masking": masked,
    "Bidirectional": both_directions,
    "output layer": with_output_layer,
    "state in and out": with_state,
}


def model_of(layer, case, batch):
    layer_class, steps, options = LAYERS[layer]
    x = keras.Input((steps, FEATURES), batch_size=batch)
    rnn = functools.partial(layer_class, UNITS, **options)
    model = keras.Model(*CASES[case](rnn, x))
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(0, 0.5, w.shape) for w in model.get_weights()])
    return model


def examples(layer, case, batch):
    """Arrays by rank, the inputs and perhaps the state, of two batches and lengths."""
    rng = np.random.default_rng(1)
    steps = LAYERS[layer][1]
    for other, length in ((batch or 3, steps or 9), (batch or 2, steps or 200)):
        x = rng.normal(size=(other, length, FEATURES))
        x[rng.random(x.shape[:2]) < 0.3] = PADDING if case == "sequence, Masking" else 0
        arrays = [x, rng.normal(size=(other, UNITS))][
            : 1 + (case == "state in and out")
        ]
        yield by_rank(array.astype("float32") for array in arrays)


def by_rank(arrays):
    """Converters rename inputs and outputs; their ranks tell them apart."""
    return {array.ndim: array for array in arrays}


def one_or_all(inputs):
    """As a model takes them."""
    return inputs[0] if len(inputs) == 1 else inputs


def litert(content):
    """A function that runs it. `tf.lite` has no kernels of TensorFlow (Flex)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a newer name of the same
        interpreter = tf.lite.Interpreter(model_content=content)

    def run(arrays):
        prepare(interpreter, arrays)
        interpreter.invoke()
        outputs = interpreter.get_output_details()
        return [interpreter.get_tensor(o["index"]) for o in outputs]

    return run


def prepare(interpreter, arrays):
    inputs = interpreter.get_input_details()
    for given in inputs:
        shape = arrays[len(given["shape"])].shape
        interpreter.resize_tensor_input(given["index"], shape)
    interpreter.allocate_tensors()
    for given in inputs:
        interpreter.set_tensor(given["index"], arrays[len(given["shape"])])


def onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(arrays):
        return session.run(
            None, {i.name: arrays[len(i.shape)] for i in session.get_inputs()}
        )

    return run


def openvino(model, number):
    """`number`: of outputs; Keras' export has inner tensors behind them."""
    import openvino

    compiled = openvino.Core().compile_model(model, "CPU")

    def run(arrays):
        ranks = (i.get_partial_shape().rank.get_length() for i in compiled.inputs)
        return list(compiled([arrays[rank] for rank in ranks]).values())[:number]

    return run


def exported(model, folder, name, **options):
    """The path of what `model.export` writes, as Keras names the format."""
    path = f"{folder}/model{name}"
    model.export(path, verbose=False, **options)
    return path


def litert_saved_model(model, folder):
    path = exported(model, folder, "")
    return litert(tf.lite.TFLiteConverter.from_saved_model(path).convert())


def litert_keras_model(model, folder):
    return litert(tf.lite.TFLiteConverter.from_keras_model(model).convert())


def litert_export(model, folder, **options):
    path = exported(model, folder, ".tflite", format="litert", **options)
    return litert(pathlib.Path(path).read_bytes())


def litert_export_of_one(model, folder):
    signature = [tf.TensorSpec(x.shape, x.dtype) for x in model.inputs]
    return litert_export(model, folder, input_signature=[one_or_all(signature)])


def onnx_export(model, folder):
    # Keras does so only with what has been called.
    model.predict(
        [np.zeros([n or 1 for n in x.shape]) for x in model.inputs], verbose=0
    )
    return onnx(exported(model, folder, ".onnx", format="onnx"))


def onnx_tool(model, folder):
    path = f"{folder}/model.onnx"
    tool = [sys.executable, "-m", "tf2onnx.convert", "--output", path]
    tool += ["--saved-model", exported(model, folder, ""), "--opset", "18"]
    finished = subprocess.run(tool, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(finished.stderr.strip().splitlines()[-1])
    return onnx(path)


def openvino_export(model, folder):
    path = exported(model, folder, ".xml", format="openvino")
    return openvino(path, len(model.outputs))


def openvino_saved_model(model, folder):
    import openvino as ov

    path = exported(model, folder, "")
    return openvino(ov.convert_model(path), len(model.outputs))


# A function of a model and a folder, and the batch of the model (None: any).
PATHS = {
    "LiteRT, saved model": (litert_saved_model, None),
    "LiteRT, Keras model of batch 1": (litert_keras_model, 1),
    "LiteRT, export": (litert_export, None),
    "LiteRT, export of batch 1": (litert_export_of_one, 1),
    "ONNX, export": (onnx_export, None),
    "ONNX, tf2onnx": (onnx_tool, None),
    "OpenVINO, export": (openvino_export, None),
    "OpenVINO, saved model": (openvino_saved_model, None),
}
# What messages say, in fewer words.
REASONS = {
    "element_shape to be static": "a list of unknown batch",
    "Select TensorFlow op(s)": "needs kernels of TensorFlow (Flex)",
    "No conversion rule found": "lists are not known",
    "Invalid tensor data type 0": "lists that are written more than once an iteration",
    "couldn't find scan output": "lists that are written more than once an iteration",
    "Could not translate MLIR": "refused by the converter",
    "No module named": "not measured",
}


def largest_difference(run, model, layer, case, batch):
    """Relative to the largest number, over the examples and outputs."""
    largest = 0.0
    for arrays in examples(layer, case, batch):
        got = by_rank(run(arrays))
        outputs = tf.nest.flatten(model(one_or_all([*arrays.values()])))
        expected = by_rank(np.asarray(y) for y in outputs)
        for rank, array in expected.items():
            if got[rank].shape != array.shape:
                return float("inf")
            error = np.max(np.abs(got[rank] - array)) / np.max(np.abs(array))
            largest = max(largest, float(error))
    return largest


def cell(path, layer, case):
    """A number, or the reason why there is none."""
    convert, batch = PATHS[path]
    keras.backend.clear_session()
    model = model_of(layer, case, batch)
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = convert(model, folder)
            return largest_difference(run, model, layer, case, batch)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        known = (words for part, words in REASONS.items() if part in message)
        return next(known, " ".join(message.split())[:200])


def measure(path, layers):
    """The cells of a path by layer and case, in as many processes as it takes."""
    left = [(layer, case) for layer in layers for case in CASES]
    results = {layer: {} for layer in layers}
    while left:
        arguments = [sys.executable, __file__, "--cells", json.dumps([path, left])]
        # Else OpenVINO reports each use, from processes of its own.
        environment = os.environ | {"CI": "true"}
        finished = subprocess.run(
            arguments, capture_output=True, text=True, env=environment
        )
        lines = finished.stdout.splitlines()
        found = [json.loads(s.removeprefix(MARK)) for s in lines if s.startswith(MARK)]
        if len(found) < len(left):
            found.append(f"the process dies, status {finished.returncode}")
        for (layer, case), result in zip(left, found, strict=False):
            results[layer][case] = result
            print(f"{path}; {layer}; {case}: {result}", flush=True)
        left = left[len(found) :]
    return results


def speed(seconds):
    """Milliseconds of a whole sequence in LiteRT, by its length and layer."""
    results = {}
    for steps in LENGTHS:
        functions = {}
        for layer in ("SimpleRNN", "BPTTRNN"):
            x = keras.Input((None, SPEED_FEATURES), batch_size=1)
            rnn = functools.partial(LAYERS[layer][0], SPEED_UNITS)
            model = keras.Model(*sequence(rnn, x))
            content = tf.lite.TFLiteConverter.from_keras_model(model).convert()
            interpreter = tf.lite.Interpreter(model_content=content)
            zeros = np.zeros([1, steps, SPEED_FEATURES], "float32")
            prepare(interpreter, by_rank([zeros]))
            functions[layer] = interpreter.invoke
        results[steps] = summary(interleaved(functions, seconds))
        print(f"LiteRT, {steps} steps: {results[steps]}", flush=True)
    return results


def table_of_speed(results):
    head = "| timesteps | SimpleRNN | BPTTRNN |\n|---|---|---|\n"
    return head + "\n".join(
        f"| {steps} | {ms['SimpleRNN']['median']:.1f} | {ms['BPTTRNN']['median']:.1f} |"
        for steps, ms in results.items()
    )


def table(results):
    """Rows of a path and a layer; what does not work has a letter, explained below."""
    letters, lines = {}, []
    for path, layer in itertools.product(PATHS, LAYERS):
        if cells := results.get(path, {}).get(layer):
            words = [written(cells[case], letters) for case in CASES]
            lines.append(f"| {path} | {layer} | {' | '.join(words)} |")
    head = f"| path | layer | {' | '.join(CASES)} |\n|{'---|' * (len(CASES) + 2)}"
    reasons = "; ".join(f"({letter}) {reason}" for reason, letter in letters.items())
    return "\n".join([head, *lines, "", f"{reasons or 'Everything converts'}."])


def written(result, letters):
    if isinstance(result, float) and result <= TOLERANCE:
        return f"{result:.0e}"
    reason = f"wrong: {result:.0e}" if isinstance(result, float) else result
    reason = "outputs of another shape" if result == float("inf") else reason
    letter = letters.setdefault(reason, chr(ord("a") + len(letters)))
    return f"– ({letter})"


def versions():
    names = ["tensorflow", "keras", "tf2onnx", "onnx", "onnxruntime", "openvino"]
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def write_page(found):
    page = DOCS / "deploying.md"
    text = filled(page.read_text(), "conversion versions", found["versions"])
    text = filled(text, "conversion", table(found["cells"]))
    page.write_text(filled(text, "LiteRT speed", table_of_speed(found["speed"])))


def main():
    names = [*PATHS, "speed"]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--seconds", type=float, default=10, help="of each two times")
    parser.add_argument("--directory", type=pathlib.Path, help="instead of docs/")
    parser.add_argument("--cells", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cells:
        path, cells = args.cells
        for layer, case in cells:
            print(MARK + json.dumps(cell(path, layer, case)), flush=True)
        return
    folder = args.directory or DOCS / "deploying"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "conversion.json"
    found = (
        json.loads(file.read_text()) if file.exists() else {"cells": {}, "speed": {}}
    )
    if found.setdefault("versions", versions()) != versions():
        raise SystemExit(
            f"{file} is of other packages: {found['versions']}. Received: {versions()}. "
            "Remove it and measure all, or name another --directory."
        )
    for name in args.only:
        if name == "speed":
            found["speed"] = speed(args.seconds)
        else:
            found["cells"].setdefault(name, {}).update(measure(name, args.layers))
        file.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{table(found['cells'])}\n\n{table_of_speed(found['speed'])}")
    if args.directory is None:
        write_page(found)


if __name__ == "__main__":
    main()
