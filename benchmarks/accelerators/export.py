"""Export training steps of each layer as StableHLO: programs that any XLA device compiles.

    python benchmarks/accelerators/export.py build/accelerators
    python benchmarks/accelerators/export.py build/accelerators --quick

Of each configuration in `configurations.py` a file `<name>.mlir`, and for those that are
to be run `<name>.npz`: arguments and what TensorFlow computes of them on this machine. And
`programs.json`, which lists them. `compile.py` reads all of it, without TensorFlow.
"""

import argparse
import json
import pathlib
import re

import keras
import numpy as np
import tensorflow as tf
from configurations import CONFIGURATIONS, QUICK

LEARNING_RATE = 0.1


def training_step(layer, masked=False):
    """The step of a built layer as a function of tensors alone.

    Weights are arguments: a program of an accelerator knows no variables. So are the states
    of random generators. Returns the function, its argument names and its output names.
    """
    weights, states = layer.trainable_variables, layer.non_trainable_variables
    given = ["x", "y", *_names(weights, ""), *_names(states, "")] + ["mask"] * masked
    results = ["loss", *_names(weights, "d_"), *_names(weights, "new_")]
    results += _names(states, "new_")

    def step(x, y, *rest):
        values, rest = list(rest[: len(weights)]), rest[len(weights) :]
        variables = zip(states, rest[: len(states)], strict=True)
        variables = [*zip(weights, values, strict=True), *variables]
        with tf.GradientTape() as tape, keras.StatelessScope(variables) as scope:
            tape.watch(values)
            h = layer(x, mask=rest[-1] if masked else None, training=True)
            loss = tf.reduce_mean(tf.square(tf.cast(h, y.dtype) - y))
        gradients = tape.gradient(loss, values)
        updated = [
            value - LEARNING_RATE * gradient
            for value, gradient in zip(values, gradients, strict=True)
        ]
        drawn = [scope.get_current_value(state) for state in states]
        return loss, *gradients, *updated, *drawn

    return step, given, results


def _names(variables, prefix):
    """Numbered, for a layer has two kernels with an output layer."""
    return [f"{prefix}{v.name}_{i}" for i, v in enumerate(variables)]


def stablehlo(step, specs):
    """The program of `step` on a TensorSpec for each argument, as text.

    Specs, never examples: TensorFlow folds an example that a shape depends on into the
    program. And no captured variable or tensor, of which it would make an argument that
    nobody passes.
    """
    for i, spec in enumerate(specs):
        is_spec = isinstance(spec, tf.TensorSpec)
        if not is_spec or not spec.shape.is_fully_defined():
            raise ValueError(
                "Each argument must be a tf.TensorSpec with every size known: a program is "
                f"for one shape. Received: {spec if is_spec else type(spec).__name__} for "
                f"argument {i}. Export a program for each number of timesteps."
            )
    function = tf.function(step, jit_compile=True, autograph=False)
    captured = function.get_concrete_function(*specs).captured_inputs
    if captured:
        shown = ", ".join(f"{t.dtype.name} {t.shape}" for t in captured)
        raise ValueError(
            f"The step reads what it was not passed: {shown}. Received: a function that "
            "captures variables or tensors. Make each of them an argument."
        )
    # The platform needs no GPU. A program for "CPU" may call what other devices lack.
    make = function.experimental_get_compiler_ir(*specs)
    return checked(make(stage="stablehlo", platform_name="GPU"), len(specs))


def checked(program, arguments):
    """`program`, if it has so many arguments and nothing that one device alone knows."""
    entry = next(line for line in program.splitlines() if "@main(" in line)
    found = entry.partition("->")[0].count("%arg")
    if found != arguments:
        raise ValueError(
            f"The program must have {arguments} arguments, as the step has. Received: "
            f"{found}. Look for one that nothing depends on, or a captured one."
        )
    calls = set(re.findall(r"custom_call\s*@(\w+)", program))
    if calls:
        raise ValueError(
            "The program must be of operations that every device has. Received: calls of "
            f"{', '.join(sorted(calls))}, which belong to one. Replace what needs them."
        )
    if re.search(r"tensor<(\d+x)*\?", program):
        raise ValueError(
            "The program must have static shapes throughout. Received: a tensor of unknown "
            "size. Look for an operation whose result is as large as its values say."
        )
    return program


def arguments_of(configuration, layer):
    """Arrays to pass, by the order of `training_step`; U has a spectral radius near 1."""
    rng = np.random.default_rng(0)
    batch, timesteps, features, _ = configuration.shape
    shape = layer.compute_output_shape((batch, timesteps, features))
    arrays = [rng.normal(size=(batch, timesteps, features)), rng.normal(size=shape)]
    for weight in layer.trainable_variables:
        scale = weight.shape[0] ** -0.5 if len(weight.shape) == 2 else 0.1
        arrays.append(rng.normal(0, scale, weight.shape))
    arrays = [array.astype("float32") for array in arrays]
    arrays += [state.numpy() for state in layer.non_trainable_variables]
    if configuration.masked:
        lengths = rng.integers(timesteps // 2, timesteps + 1, size=(batch, 1))
        arrays.append(np.arange(timesteps) < lengths)
    return arrays


def specs_of(configuration, layer):
    """The specs of these arrays, which a long sequence is not made for."""
    batch, timesteps, features, _ = configuration.shape
    shape = (batch, timesteps, features)
    specs = [tf.TensorSpec(shape), tf.TensorSpec(layer.compute_output_shape(shape))]
    variables = layer.trainable_variables + layer.non_trainable_variables
    specs += [tf.TensorSpec(v.shape, v.dtype) for v in variables]
    if configuration.masked:
        specs.append(tf.TensorSpec(shape[:2], tf.bool))
    return specs


def export(configuration, folder):
    """Write a program and, if it is to be run, its data; returns its entry in the list."""
    layer = configuration.layer()
    step, given, results = training_step(layer, configuration.masked)
    specs = specs_of(configuration, layer)
    program = stablehlo(step, specs)
    (folder / f"{configuration.name}.mlir").write_text(program)
    if configuration.run:
        arrays = arguments_of(configuration, layer)
        outputs = tf.function(step, jit_compile=True, autograph=False)(*arrays)
        data = dict(zip((f"in {name}" for name in given), arrays, strict=True))
        for name, output in zip(results, outputs, strict=True):
            data[f"out {name}"] = output.numpy()
        np.savez(folder / f"{configuration.name}.npz", **data)
    return configuration.entry() | {"arguments": given, "outputs": results}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, help="where the programs go")
    parser.add_argument("--quick", action="store_true", help="a few configurations")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for configuration in CONFIGURATIONS:
        if not args.quick or configuration.name in QUICK:
            entries.append(export(configuration, args.folder))
            print(configuration.name, flush=True)
    text = json.dumps({"tensorflow": tf.__version__, "programs": entries}, indent=1)
    (args.folder / "programs.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
