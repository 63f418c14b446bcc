"""What `GradientFlowLogger` adds to an epoch of `fit`, and what one report costs.

    python benchmarks/gradient_flow_cost.py
    python benchmarks/gradient_flow_cost.py --report    # one report of long sequences alone

One training of each model, whose gradient flow is measured after every second epoch. Two
ratios, medians: of these epochs with and without their end, where it is measured, which a
busy machine disturbs little; and of these epochs and the others, which would show it if the
measurement slowed down what follows. The first two, which trace and compile, are left out.

And one report of sequences of 20,000 steps beside a training step of the same examples, in
turn: its time in training steps, for each loss that is followed back.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time

import keras
from contestants import Case, problem

from keras_bptt import BPTTGRU, BPTTLSTM, BPTTRNN, GradientFlowLogger, gradient_flow

SHAPE = (32, 100, 16, 64)
LONG, LOSSES = (8, 20_000, 16, 64), 4


class Clock(keras.callbacks.Callback):
    """The seconds of each epoch, with what the callbacks before this one do at its end."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self._begin = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self._begin)


def measure(case, steps=100, pairs=12, **options):
    """Seconds of epochs with a measurement and without, and their ratios."""
    layers = [
        keras.Input(case.shape[1:3]),
        BPTTRNN(case.units, return_sequences=case.sequences),
        keras.layers.Dense(1),
    ]
    model = keras.Sequential(layers)
    model.compile("adam", "mse")
    data = problem(Case(case.batch * steps, *case.shape[1:], case.sequences))
    x, y = data["x"], data["y"][..., :1]
    before, behind, batch = Clock(), Clock(), (x[: case.batch], y[: case.batch])
    logger = GradientFlowLogger(batch, every=2, **options)
    epochs, callbacks = 2 * pairs + 2, [before, logger, behind]
    model.fit(x, y, case.batch, epochs, verbose=0, callbacks=callbacks)
    measured, alone = behind.seconds[2::2], before.seconds[2::2]
    others = behind.seconds[3::2]
    same = [a / b for a, b in zip(measured, alone, strict=True)]
    return {
        "case": str(case),
        "of the same epochs": statistics.median(same),
        "of others": statistics.median(measured) / statistics.median(others),
        "seconds": {"with": measured, "before it": alone, "others": others},
    }


def report(layer_class, rounds=3):
    """The seconds of a report and of a training step, in turn; the first of each apart."""
    batch, steps, features, units = LONG
    layer = layer_class(units, return_sequences=True)
    model = keras.Sequential(
        [keras.Input((steps, features)), layer, keras.layers.Dense(1)]
    )
    model.compile("sgd", "mse")
    data = problem(Case(*LONG, True))
    x, y = data["x"], data["y"][..., :1]

    def seconds(function):
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin

    taken = {"report": [], "step": []}
    for _ in range(rounds + 1):
        measured = functools.partial(gradient_flow, model, x, y, loss_steps=LOSSES)
        taken["report"].append(seconds(measured))
        taken["step"].append(seconds(lambda: model.train_on_batch(x, y)))
    medians = {name: statistics.median(times[1:]) for name, times in taken.items()}
    ratio = medians["report"] / medians["step"] / LOSSES
    return {"layer": layer_class.__name__, "steps per loss": ratio, "seconds": taken}


def table(results):
    lines = ["| (B, T, D, H) | of the same epochs | of others |", "|---|---|---|"]
    for result in results:
        cells = [f"{result[key]:.3f}" for key in ("of the same epochs", "of others")]
        lines.append(f"| {result['case']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="of an epoch")
    parser.add_argument("--pairs", type=int, default=12, help="epochs of either kind")
    parser.add_argument(
        "--examples", type=int, help="of the logger, if not its default"
    )
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here")
    parser.add_argument("--report", action="store_true", help="the long report alone")
    args = parser.parse_args()
    if args.report:
        for layer_class in BPTTRNN, BPTTLSTM, BPTTGRU:
            found = report(layer_class)
            print(f"{found['layer']:<10}{found['steps per loss']:.2f} steps a loss")
        return
    options = {"examples": args.examples} if args.examples else {}
    results = [
        measure(Case(*SHAPE, sequences), args.steps, args.pairs, **options)
        for sequences in (True, False)
    ]
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
