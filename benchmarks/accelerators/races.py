"""What is raced on a GPU: training steps of several shapes, and their order.

A race is one gradient of one shape in one precision, which several contestants compute. No
TensorFlow, JAX or PyTorch here: those who export and those who run share this.
"""

import dataclasses
import itertools


@dataclasses.dataclass(frozen=True)
class Task:
    """A gradient: of a mean squared loss over the outputs, for every weight.

    Attributes:
        title: in the tables.
        sequences: whether every output has a loss, or the last alone.
        truncation: (steps, stride) of the windows through which losses flow back, or None.
        cell: the key of `CELLS`.
    """

    title: str
    sequences: bool
    truncation: tuple[int, int] | None = None
    cell: str = "rnn"


TASKS = {
    "sequence": Task("full BPTT, a loss at every output", True),
    "last": Task("full BPTT, a loss at the last output", False),
    "chunks": Task("chunks of 64, a loss at every output", True, (64, 64)),
    # Of stride 1 each of 64 windows would compute every step again: 64 times the work.
    "windows": Task("windows of 64, stride 32, a loss at every output", True, (64, 32)),
}
# How many gates there are beside each other in the weights of a cell.
CELLS = {"rnn": 1}
FEATURES = 64


@dataclasses.dataclass(frozen=True)
class Race:
    """One gradient of one shape. In JSON: its fields."""

    precision: str
    batch: int
    units: int
    timesteps: int
    task: str

    @property
    def shape(self):
        return self.batch, self.timesteps, FEATURES, self.units

    @property
    def low(self):
        """Whether it computes in bfloat16; weights and their gradients stay float32."""
        return self.precision == "bfloat16"

    def weight_shapes(self):
        """Of the input kernel, the recurrent kernel and the bias, as Keras has them."""
        gates = CELLS[TASKS[self.task].cell] * self.units
        return (FEATURES, gates), (self.units, gates), (gates,)

    def target_shape(self):
        steps = (self.timesteps,) if TASKS[self.task].sequences else ()
        return self.batch, *steps, self.units


@dataclasses.dataclass(frozen=True)
class Grid:
    """The values of each thing that a race is made of, the middle of the grid first."""

    precisions: tuple
    batches: tuple
    units: tuple
    timesteps: tuple
    tasks: tuple = tuple(TASKS)

    def axes(self):
        return self.precisions, self.batches, self.units, self.timesteps, self.tasks

    def races(self):
        return [Race(*values) for values in itertools.product(*self.axes())]

    def distance(self, race):
        """In how many things it differs from the middle."""
        values = dataclasses.astuple(race)
        return sum(v != axis[0] for v, axis in zip(values, self.axes(), strict=True))

    def items(self, races=None):
        """What is measured, the most telling first: (what, race).

        Of the middle, then of what differs from it in one thing, in two, and so on. Times
        before memory, and both of what differs in one thing before any other.
        """
        races = self.races() if races is None else races
        items = [(what, race) for race in races for what in ("time", "memory")]

        def place(item):
            what, race = item
            distance = self.distance(race)
            return max(distance, 1), what == "memory", distance

        return sorted(items, key=place)


# tf32: products of float32 as the device does them by default, which on a recent NVIDIA GPU
# is with 10 bits of mantissa. float32: with all 23.
PRECISIONS = "tf32", "bfloat16", "float32"
FULL = Grid(PRECISIONS, (128, 16), (512, 128, 1024), (1024, 4096, 256))
# To see that it works, on any machine.
QUICK = Grid(PRECISIONS, (3,), (7,), (256,))
