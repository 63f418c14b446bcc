"""Steps a second of `model.fit` and `model.predict`, end to end, beside those of Keras.

    python benchmarks/fit_and_predict.py
    python benchmarks/fit_and_predict.py --layer LSTM

The model is the layer alone, as a user gets it who swaps the name and sets nothing: Adam,
mean squared loss, no callbacks. On a CPU Keras then runs a plain graph.
"""

import argparse
import dataclasses
import functools
import json
import pathlib

import keras
import tensorflow as tf
from contestants import HOSTS, OURS, Case, problem
from timing import interleaved, summary
from training_step import SHAPES

LEAST_STEPS, MOST_STEPS, LEAST_WORK = 8, 100, 2**33  # multiply-adds, of one call


def model_of(layer_class, case, timesteps=None, **options):
    model = keras.Sequential(
        [
            keras.Input((timesteps, case.features)),
            layer_class(case.units, return_sequences=case.sequences, **options),
        ]
    )
    model.compile("adam", "mse")
    return model


def measure(case, seconds):
    data = problem(case)
    steps = max(LEAST_STEPS, min(MOST_STEPS, LEAST_WORK // case.multiply_adds))
    # Batches come from memory, of a size that the graph does not know, as is usual.
    batches = tf.data.Dataset.from_tensor_slices((data["x"], data["y"]))
    batches = batches.batch(case.batch).cache().repeat(steps)
    inputs = batches.map(lambda x, y: x)
    functions = {}
    layers = [each[case.layer] for each in (OURS, HOSTS)]
    ours, theirs = (layer_class.__name__ for layer_class in layers)
    for name, layer_class in zip((ours, theirs), layers, strict=True):
        model = model_of(layer_class, case, case.timesteps)
        functions |= {
            f"fit, {name}": functools.partial(model.fit, batches, verbose=0),
            f"predict, {name}": functools.partial(model.predict, inputs, verbose=0),
        }
    ms = summary(interleaved(functions, seconds, warm=False))
    per_step = {name: values["median"] / steps for name, values in ms.items()}
    ratios = {
        what: per_step[f"{what}, {theirs}"] / per_step[f"{what}, {ours}"]
        for what in ("fit", "predict")
    }
    return {"case": dataclasses.asdict(case), "ms_a_step": per_step, "ratios": ratios}


def table(results):
    lines = ["| (B, T, D, H) | output | fit | predict |", "|---|---|---|---|"]
    for result in results:
        cells = str(Case(**result["case"])).replace(") ", ")|").split("|")
        cells += [f"{result['ratios'][what]:.2f}" for what in ("fit", "predict")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(seconds, layer="RNN"):
    results = []
    for shape in SHAPES:
        for sequences in (True, False):
            case = Case(*shape, sequences=sequences, layer=layer)
            results.append(measure(case, seconds))
            print(Case(**results[-1]["case"]), results[-1]["ratios"], flush=True)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layer", choices=OURS, default="RNN")
    parser.add_argument("--seconds", type=float, default=10, help="for each row")
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here")
    args = parser.parse_args()
    results = run(args.seconds, args.layer)
    print("\nTime of Keras' layer over that of ours, medians:\n")
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
