"""The training steps that are exported: every option whose program differs."""

import dataclasses
from typing import Any

from keras_bptt import BPTTRNN, RandomizedTruncation, Truncation

# (batch, timesteps, features, units). All different; the windows do not divide the steps.
SHORT = 24, 250, 20, 136
# The states alone, 4 B T H bytes, are more than a TPU holds on the chip (531 MB) ...
LONG = 64, 8100, 16, 256
# ... and more than any of them holds in all (131 GB).
TOO_LONG = 64, 1_000_000, 16, 512
OUTPUT_UNITS = 8


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A training step of one layer.

    Attributes:
        name: of its files.
        shape: (batch, timesteps, features, units).
        options: of BPTTRNN.
        masked: whether a mask is passed, of padded ends.
        run: whether it is to be run and compared, too; it is compiled in any case.
        fits: whether a TPU has the memory for it. One that has not shows that this check,
            too, can fail.
    """

    name: str
    shape: tuple[int, int, int, int]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    masked: bool = False
    run: bool = True
    fits: bool = True

    def layer(self):
        """The layer, built."""
        *shape, units = self.shape
        layer = BPTTRNN(units, seed=3, **self.options)
        layer.build(tuple(shape))
        return layer

    def __str__(self):
        shown = [f"{name}={value!r}" for name, value in self.options.items()]
        return ", ".join(shown + ["mask"] * self.masked) or "full BPTT"

    def entry(self):
        """What the other side is told."""
        return {
            "name": self.name,
            "options": str(self),
            "shape": self.shape,
            "run": self.run,
            "fits": self.fits,
            "low_precision": "dtype" in self.options,
        }


def short(name, masked=False, **options):
    return Configuration(name, SHORT, options, masked)


def long(name, **options):
    return Configuration(name, LONG, options, run=False)


def too_long(name, fits, **options):
    return Configuration(name, TOO_LONG, options, run=False, fits=fits)


WHOLE = {"return_sequences": True}
WITH_OUTPUT = WHOLE | {"output_units": OUTPUT_UNITS}
CONFIGURATIONS = [
    short("last"),
    short("whole", **WHOLE),
    short("chunks", truncation=Truncation(32), **WHOLE),
    short("overlapping", truncation=Truncation(48, stride=20), **WHOLE),
    short("sliding", truncation=Truncation(12, stride=1), **WHOLE),
    short("last_window", truncation=Truncation(32)),
    short("randomized", truncation=RandomizedTruncation(20, seed=1), **WHOLE),
    short("checkpoints", checkpoint_every=40),
    short("checkpoints_root", checkpoint_every="sqrt", **WHOLE),
    short("output", output_activation="softmax", **WITH_OUTPUT),
    short("output_checkpoints", checkpoint_every="sqrt", **WITH_OUTPUT),
    short("clipped", adjoint_clipnorm=4.4e-5, **WHOLE),  # about every second one
    short("clipped_growth", adjoint_max_growth=1.0, **WHOLE),
    short("masked", masked=True, **WHOLE),
    short("masked_chunks", masked=True, truncation=Truncation(32), **WHOLE),
    short("dropout", dropout=0.2, recurrent_dropout=0.3, **WHOLE),
    short("bfloat16", dtype="mixed_bfloat16", **WHOLE),
    long("long_last"),
    long("long_last_window", truncation=Truncation(64)),
    long("long_checkpoints", checkpoint_every="sqrt"),
    long("long_output", **WITH_OUTPUT),
    long("long_output_checkpoints", checkpoint_every="sqrt", **WITH_OUTPUT),
    too_long("too_long_last", False),
    too_long("too_long_checkpoints", True, checkpoint_every="sqrt"),
]
# Two that are run, and one that must not fit.
QUICK = ["chunks", "output_checkpoints", "too_long_last"]
