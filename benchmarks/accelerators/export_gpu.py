"""Export the training steps that gpu.py races, in one file.

    python benchmarks/accelerators/export_gpu.py build/gpu.zip
    python benchmarks/accelerators/export_gpu.py build/gpu-quick.zip --quick

Needs TensorFlow, and no GPU; `make gpu-bundle` does it, in some minutes. A program holds
no numbers: gpu.py makes inputs and weights from a seed, where it runs.
"""

import argparse
import dataclasses
import importlib.metadata
import pathlib
from collections.abc import Callable

import bundle
import export
import races
import tensorflow as tf

from keras_bptt import BPTTRNN, Truncation


@dataclasses.dataclass(frozen=True)
class Program:
    """A contestant that is exported.

    Attributes:
        layer: makes a layer of a task, units and a dtype policy.
        tasks: those in which it takes part.
    """

    layer: Callable
    tasks: tuple[str, ...] = tuple(races.TASKS)


def rnn(**options):
    def layer(task, units, policy):
        truncation = task.truncation and Truncation(*task.truncation)
        return BPTTRNN(
            units,
            return_sequences=task.sequences,
            truncation=truncation,
            dtype=policy,
            **options,
        )

    return layer


PROGRAMS = {
    "BPTTRNN": Program(rnn()),
    "BPTTRNN, checkpoints": Program(rnn(checkpoint_every="sqrt"), ("last",)),
}


def step_of(race, program):
    """A function of x, y and the weights to the loss and its gradients, and the specs."""
    policy = "mixed_bfloat16" if race.low else "float32"
    layer = program.layer(races.TASKS[race.task], race.units, policy)
    layer.build(race.shape[:-1])
    shapes = [tuple(weight.shape) for weight in layer.trainable_variables]
    if shapes != list(race.weight_shapes()):
        raise ValueError(
            f"The weights of {race} must have the shapes {race.weight_shapes()}. "
            f"Received: a layer with {shapes}."
        )
    whole, _, _ = export.training_step(layer)
    states = [(state.shape, state.dtype) for state in layer.non_trainable_variables]

    def step(x, y, *weights):
        unused = [tf.zeros(shape, dtype) for shape, dtype in states]
        return whole(x, y, *weights, *unused)[: 1 + len(weights)]

    specs = [tf.TensorSpec(race.shape[:-1], layer.compute_dtype)]
    specs += [tf.TensorSpec(shape) for shape in (race.target_shape(), *shapes)]
    return step, specs


def programs(grid):
    """An entry and a program, one after the other."""
    # tf32 and float32 are one program but for a word, which bundle.py puts in.
    grid = dataclasses.replace(grid, precisions=("tf32", "bfloat16"))
    for race in grid.races():
        for name, program in PROGRAMS.items():
            if race.task in program.tasks:
                text = export.stablehlo(*step_of(race, program))
                entry = {"contestant": name, "task": race.task, "shape": race.shape}
                print(name, race, flush=True)
                yield entry | {"low": race.low}, text


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=pathlib.Path, help="where the programs go")
    parser.add_argument("--quick", action="store_true", help="one small shape")
    args = parser.parse_args()
    args.file.parent.mkdir(parents=True, exist_ok=True)
    names = "tensorflow", "keras", "keras-bptt"
    header = {name: importlib.metadata.version(name) for name in names}
    grid = races.QUICK if args.quick else races.FULL
    bundle.write(args.file, header | {"quick": args.quick}, programs(grid))
    print(f"{args.file}: {args.file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
