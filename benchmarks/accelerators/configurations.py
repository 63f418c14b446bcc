"""The training steps that are exported: every option and layer whose program differs."""

import dataclasses
from typing import Any

import keras

from keras_bptt import (
    BPTT,
    BPTTGRU,
    BPTTLSTM,
    BPTTRNN,
    RandomizedTruncation,
    Truncation,
)

# (batch, timesteps, features, units). All different; the windows do not divide the steps.
SHORT = 24, 250, 20, 136
# The states alone, 4 B T H bytes, are more than a TPU holds on the chip (531 MB) ...
LONG = 64, 8100, 16, 256
# ... and more than any of them holds in all (131 GB).
TOO_LONG = 64, 1_000_000, 16, 512
OUTPUT_UNITS = 8


class LeakyCell(keras.layers.Layer):
    """A cell of one's own: a rate network whose time constants are learned."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = self.state_size = units

    def build(self, shape):
        self.W = self.add_weight(shape=(shape[-1], self.units), name="W")
        self.U = self.add_weight(shape=(self.units, self.units), name="U")
        self.tau = self.add_weight(shape=(self.units,), name="tau")

    def call(self, x, states):
        leak = keras.ops.sigmoid(self.tau)
        z = keras.ops.tanh(x @ self.W + states[0] @ self.U)
        h = (1 - leak) * states[0] + leak * z
        return h, [h]


LAYERS = {
    "BPTTRNN": lambda units, **options: BPTTRNN(units, seed=3, **options),
    "BPTTLSTM": lambda units, **options: BPTTLSTM(units, seed=3, **options),
    "BPTTGRU": lambda units, **options: BPTTGRU(units, seed=3, **options),
    "BPTT": lambda units, **options: BPTT(LeakyCell(units), **options),
}


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A training step of one layer.

    Attributes:
        name: of its files.
        shape: (batch, timesteps, features, units).
        options: of the layer.
        masked: whether a mask is passed, of padded ends.
        run: whether it is to be run and compared, too; it is compiled in any case.
        fits: whether a TPU has the memory for it. One that has not shows that this check,
            too, can fail.
        kind: of the layer, a name of `LAYERS`.
    """

    name: str
    shape: tuple[int, int, int, int]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    masked: bool = False
    run: bool = True
    fits: bool = True
    kind: str = "BPTTRNN"

    def layer(self):
        """The layer, built."""
        *shape, units = self.shape
        layer = LAYERS[self.kind](units, **self.options)
        layer.build(tuple(shape))
        return layer

    def __str__(self):
        shown = [f"{name}={value!r}" for name, value in self.options.items()]
        given = ["cell"] * (self.kind == "BPTT")
        return f"{self.kind}({', '.join(given + shown)})" + ", mask" * self.masked

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


def short(name, masked=False, kind="BPTTRNN", **options):
    return Configuration(name, SHORT, options, masked, kind=kind)


def long(name, kind="BPTTRNN", **options):
    return Configuration(name, LONG, options, run=False, kind=kind)


def too_long(name, fits, **options):
    return Configuration(name, TOO_LONG, options, run=False, fits=fits)


WHOLE = {"return_sequences": True}
WITH_OUTPUT = WHOLE | {"output_units": OUTPUT_UNITS}
DROPOUT = {"dropout": 0.2, "recurrent_dropout": 0.3}
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
    short("dropout", **DROPOUT, **WHOLE),
    short("bfloat16", dtype="mixed_bfloat16", **WHOLE),
    *[
        configuration
        for name, kind in {"lstm": "BPTTLSTM", "gru": "BPTTGRU"}.items()
        for configuration in (
            short(f"{name}_last", kind=kind),
            short(f"{name}_chunks", kind=kind, truncation=Truncation(32), **WHOLE),
            short(f"{name}_checkpoints", kind=kind, checkpoint_every="sqrt", **WHOLE),
            short(f"{name}_masked", masked=True, kind=kind, **WHOLE),
            short(f"{name}_dropout", kind=kind, **DROPOUT, **WHOLE),
        )
    ],
    short("gru_reset_before", kind="BPTTGRU", reset_after=False, **WHOLE),
    short("lstm_clipped", kind="BPTTLSTM", adjoint_max_growth=1.0, **WHOLE),
    short("own_last", kind="BPTT"),
    short("own_chunks", kind="BPTT", truncation=Truncation(32), **WHOLE),
    short("own_checkpoints", kind="BPTT", checkpoint_every="sqrt", **WHOLE),
    long("long_last"),
    long("long_last_window", truncation=Truncation(64)),
    long("long_checkpoints", checkpoint_every="sqrt"),
    long("long_output", **WITH_OUTPUT),
    long("long_output_checkpoints", checkpoint_every="sqrt", **WITH_OUTPUT),
    *[
        configuration
        for name, kind in {"lstm": "BPTTLSTM", "gru": "BPTTGRU"}.items()
        for configuration in (
            long(f"long_{name}_last", kind=kind),
            long(f"long_{name}_last_window", kind=kind, truncation=Truncation(64)),
            long(f"long_{name}_checkpoints", kind=kind, checkpoint_every="sqrt"),
        )
    ],
    too_long("too_long_last", False),
    too_long("too_long_checkpoints", True, checkpoint_every="sqrt"),
]
# Three that are run, and one that must not fit.
QUICK = ["chunks", "output_checkpoints", "lstm_last", "too_long_last"]
