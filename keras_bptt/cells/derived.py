"""A cell compiled from one step: from what a user writes to the contract of `cell`.

The step and its vector-Jacobian product are one graph (`tracing`). Its tensors are told
apart by what they depend on, and laid out in time:

    project     on inputs and weights alone       for all steps at once
    step        on the state too                  step by step
    step_back   on the adjoint, towards states    step by step, from the last one
    gradients   on the adjoint, towards x and w   for all steps at once

Between the four go the drive, what is saved, and the deltas: each a smallest cut (`cuts`)
of the graph. What costs much (a product, a transcendental function) is kept, what costs
little is computed again. So of an LSTM the four activated gates are saved, and one delta of
4 units leads to one product for each weight, as it is written by hand.

Sources: Bergstra et al., Theano: a CPU and GPU math compiler in Python, 2010, whose scan
moves products out of loops; Appleyard, Kocisky & Blunsom, Optimizing performance of
recurrent neural networks on GPUs, 2016 (arXiv 1604.01946).
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import tensorflow as tf

from keras_bptt.cells.cell import Cell, Cost, Shapes
from keras_bptt.cells.dependence import names_of
from keras_bptt.cells.division import (
    CHEAP,
    PRODUCTS,
    QUOTIENTS,
    VIEWS,
    Division,
    divide,
)
from keras_bptt.cells.probing import probed
from keras_bptt.cells.tracing import Trace
from keras_bptt.runtime.execution import op_callbacks, switches
from keras_bptt.runtime.subgraphs import has_rows, numbers_of
from keras_bptt.runtime.tensors import size_of, wide, widened

# What XLA is known to compile, without a trial that takes time.
KNOWN_TO_XLA = VIEWS | CHEAP | QUOTIENTS | {"BiasAddGrad", "BroadcastGradientArgs"}
KNOWN_TO_XLA |= {"Const", "Exp", "GatherV2", "MatMul", "OnesLike", "Shape", "Sigmoid"}
KNOWN_TO_XLA |= {"Softmax", "Softplus", "Tanh", "ZerosLike"}
# Of what XLA on a CPU (TensorFlow 2.21) makes a pad, which it may write past the end of:
# see `runtime.tensors`.
UNSAFE = {"MirrorPad", "Pad", "PadV2", "StridedSliceGrad"}


class _Parts:
    """The four parts of a division, as they can be run."""

    def __init__(self, division, is_wide):
        trace, drive, saved, deltas, drive_back, _ = division
        self.trace = trace  # an equal cell may have another, of other names
        noise_and_weights = (*trace.noise, *trace.read)
        of_all_steps = (*trace.noise, *trace.draws, *trace.read)
        names = [names_of(state) for state in trace.after]
        # All names of a state, for the way back may read any of them.
        self.after = tuple(t for each in names for t in each)
        self.repeats = tuple(map(len, names))
        point = (*drive_back, *self.after, *trace.before, *saved)
        again = {t.name for t in drive_back}
        self.drive_back = [i for i, t in enumerate(drive) if t.name in again]
        self.back = [i for i, d in enumerate(trace.d_before) if d is not None]
        self.d_before = tuple(trace.d_before[i] for i in self.back)
        self.trained = [i for i, d in enumerate(trace.d_weights) if d is not None]
        self.d_weights = tuple(trace.d_weights[i] for i in self.trained)
        self.d_x = (trace.d_x,) if trace.d_x is not None else ()
        part = trace.graph.part
        self.weights = part(trace.weights, trace.inputs)
        half = trace.before[0].dtype.size == 2
        # What asserts of inputs or states does so where they are known first.
        of_x = (trace.x, *of_all_steps)
        first = trace.graph.effects(of_x)
        self.project = part(drive, of_x, is_wide, first)
        of_states = (*drive, *trace.before, *noise_and_weights)
        then = [op for op in trace.graph.effects(of_states) if op not in first]
        self.step = part((*trace.after, *saved), of_states, is_wide, then)
        self.step_back = part(
            (*self.d_before, *deltas),
            (*point, *trace.adjoints, *noise_and_weights),
            is_wide,
        )
        # What is added over rows is added in wide numbers.
        self.gradients = part(
            (*self.d_x, *self.d_weights),
            (trace.x, *point, *deltas, *of_all_steps),
            is_wide or half,
        )


@functools.lru_cache(maxsize=64)
def parts_of(cell):
    """The parts of a `Derived`, as they can be run."""
    return _Parts(cell.division, cell.is_wide)


@dataclasses.dataclass(frozen=True)
class Derived(Cell):
    """A step's graph, divided.

    Attributes:
        key: tells apart what computes something else.
        division: the graph's.
        is_wide: whether what is of half precision is computed in float32.
    """

    key: str
    division: Division = dataclasses.field(compare=False, repr=False)
    is_wide: bool = False

    @property
    def output(self):
        return self.division.trace.output

    @property
    def recurs(self):
        return self.division.recurs

    @property
    def wants(self):
        drive = {"drive"} if self.division.drive_back else set()
        return frozenset({"before", "saved"} | drive)

    def point(self, drive, **given):
        if drive is not None:
            drive = tuple(drive[i] for i in parts_of(self).drive_back)
        return super().point(drive=drive, **given)

    def draw(self, seeds, rows):
        return self.division.trace.drawing.numbers(seeds, rows)

    def weights_from(self, sources):
        """The weights, as they are stored, of all that the step reads beside rows.

        Numbers that are no floating ones come as float64, so that all have a gradient.
        """
        trace = self.division.trace
        found = parts_of(self).weights(list(sources))
        found = [
            w if t else tf.stop_gradient(w)
            for w, t in zip(found, trace.trained, strict=True)
        ]
        return [w if w.dtype.is_floating else tf.cast(w, tf.float64) for w in found]

    def check_higher_orders(self):
        if self.division.trace.own_gradient:
            raise NotImplementedError(
                "A cell has first derivatives alone where a tf.custom_gradient in its step "
                "gives another gradient than that of what the step computes. Received: a "
                "derivative of its gradient. Use keras.layers.RNN(cell) for it."
            )

    def called_with(self, dtype):
        return dataclasses.replace(self, is_wide=dtype.size == 2)

    def cast_weights(self, weights, dtype):
        del dtype  # each as the step itself casts it
        return tuple(
            tf.cast(w, self._dtype(t))
            for w, t in zip(weights, self.division.trace.read, strict=True)
        )

    def _dtype(self, tensor):
        dtype = tensor.dtype if tensor.dtype.is_floating else tf.float64
        return wide(dtype) if self.is_wide else dtype

    def shapes(self, weights):
        def rows(tensors):
            return tuple(tuple(t.shape[1:]) for t in tensors)

        division = self.division
        states = rows(division.trace.after)
        return Shapes(states, rows(division.saved), rows(division.deltas))

    def cost(self, weights):
        products = sum(map(multiply_adds, parts_of(self).step.operations))
        made = [*self.division.trace.after, *self.division.saved]
        return Cost(products=products, numbers=sum(map(numbers_of, made)))

    def project(self, weights, x, noise):
        lead = _Lead(x, self.division.trace.x)
        given = [lead.flat(x), *self._of_all_steps(lead, noise), *weights]
        return tuple(lead.back(parts_of(self).project(given)))

    def step(self, weights, drive, before, noise):
        parts, number = parts_of(self), len(self.division.trace.after)
        lead = _Lead(before[0], self.division.trace.before[0])
        before = before[: len(self.division.trace.before)]
        flat = map(lead.flat, (*drive, *before))
        given = [*flat, *self._beside(lead, noise), *weights]
        found = lead.back(parts.step(given))
        return tuple(found[:number]), tuple(found[number:])

    def step_back(self, weights, point, adjoints, noise):
        parts, trace = parts_of(self), self.division.trace
        lead = _Lead(adjoints[0], trace.before[0])
        flat = map(lead.flat, (*self._point(point, point.before), *adjoints))
        given = [*flat, *self._beside(lead, noise), *weights]
        found = lead.back(parts.step_back(given))
        number = len(parts.back)
        back = [tf.zeros_like(a) for a in adjoints]
        for place, gradient in zip(parts.back, found[:number], strict=True):
            back[place] = gradient
        return tuple(back), tuple(found[number:])

    def gradients(self, weights, x, point, deltas, noise):
        parts, trace = parts_of(self), self.division.trace
        inputs = x()
        lead = _Lead(inputs, trace.x)
        before = [p[0] if len(p) == 1 else tf.concat(p, 0) for p in point.before]
        flat = map(lead.flat, (inputs, *self._point(point, before), *deltas))
        given = [*flat, *self._of_all_steps(lead, noise), *weights]
        found = parts.gradients(given)
        d_x = tf.zeros_like(inputs) if inputs.dtype.is_floating else None
        if parts.d_x:
            d_x = tf.cast(lead.back(found[:1])[0], inputs.dtype)
        d_weights = [tf.zeros_like(w, wide(w.dtype)) for w in weights]
        for place, gradient in zip(parts.trained, found[len(parts.d_x) :], strict=True):
            d_weights[place] = widened(gradient)
        return tuple(d_weights), d_x

    def _point(self, point, before):
        """The tensors of a point, in the order of `_Parts`."""
        pairs = zip(point.after, parts_of(self).repeats, strict=True)
        after = [t for t, number in pairs for _ in range(number)]
        before = before[: len(self.division.trace.before)]
        return (*(point.drive or ()), *after, *before, *(point.saved or ()))

    def _beside(self, lead, noise):
        pairs = zip(noise, self.division.trace.noise, strict=True)
        return [lead.spread(n, t) for n, t in pairs]

    def _of_all_steps(self, lead, noise):
        trace = self.division.trace
        pairs = zip(noise, (*trace.noise, *trace.draws), strict=True)
        return [lead.spread(n, t) for n, t in pairs]


class _Lead:
    """The axes in front of rows, as one axis."""

    def __init__(self, reference, row):
        number = len(reference.shape) - len(row.shape) + 1
        self.sizes = [size_of(reference, i) for i in range(number)]

    def flat(self, t):
        if len(self.sizes) == 1:
            return t
        return tf.reshape(t, [_product(self.sizes), *t.shape[len(self.sizes) :]])

    def back(self, tensors):
        if len(self.sizes) == 1:
            return tensors
        return [tf.reshape(t, [*self.sizes, *t.shape[1:]]) for t in tensors]

    def spread(self, t, row):
        """What is the same at all steps of an example, for each row."""
        if len(self.sizes) == 1:
            return t
        return self.flat(tf.broadcast_to(t, [*self.sizes, *row.shape[1:]]))


def _product(sizes):
    return functools.reduce(lambda a, b: a * b, sizes)


def multiply_adds(operation):
    """Of a product, for one row."""
    if operation.type not in PRODUCTS or not operation.outputs:
        return 0
    output, left = operation.outputs[0], operation.inputs[0]
    if not has_rows(output):
        return 0
    numbers = numbers_of(output)
    if operation.type == "MatMul":
        return numbers * numbers_of(left)
    if operation.type.startswith("BatchMatMul"):
        return numbers * (left.shape[-2 if operation.get_attr("adj_x") else -1] or 1)
    if operation.type in ("Conv2D", "Conv3D"):
        kernel = operation.inputs[1].shape
        return (
            numbers * math.prod(kernel[:-1]) if kernel.is_fully_defined() else numbers
        )
    return numbers


def derived(name, trace: Trace, probe: bool = True) -> Derived:
    """The cell of a traced step; the same for two that compute the same.

    Args:
        name: of the cell, for errors.
        probe: whether the step is tried with numbers, if it is not known to be right.

    Raises:
        ValueError: where the step mixes examples.
    """
    inner = [trace.x, *trace.before, *trace.noise, *trace.inputs, *trace.adjoints]
    inner += [*trace.draws, *trace.drawing.reads]
    outer = [*trace.after, trace.d_x, *trace.d_before, *trace.d_weights]
    marks = [inner, [t for t in outer if t is not None], trace.read]
    key = f"{trace.graph.fingerprint(*marks)} {trace.output} {trace.trained}"
    return _known(key, _Given(trace, name, probe))


class _Given(NamedTuple):
    """A trace, equal to any other: a cache is to know its key alone."""

    trace: Trace
    name: str
    probe: bool

    def __eq__(self, other):
        return isinstance(other, _Given)

    def __hash__(self):
        return 0


@functools.lru_cache(maxsize=64)
def _known(key, given):
    trace = given.trace.simplified()
    return Derived(key, divide(probed(given.name, trace) if given.probe else trace))


def xla_compiles(cell: Derived) -> bool:
    """Whether XLA can compile the step and its derivative, as things are now."""
    # Where tf.debugging looks at every operation, it adds some that XLA does not know.
    if not tf.test.is_built_with_xla() or op_callbacks():
        return False
    return tf.config.functions_run_eagerly() or not not_for_xla(cell)


def not_for_xla(cell: Derived) -> set:
    """The types of operations that XLA does not compile, in what runs step by step."""
    parts = parts_of(cell)
    types = {op.type for op in (*parts.step.operations, *parts.step_back.operations)}
    unsafe, unknown = types & UNSAFE, types - KNOWN_TO_XLA
    if unsafe or not unknown or _tried(cell, switches()):
        return unsafe
    return unknown


@functools.lru_cache(maxsize=64)
def _tried(cell, switches):
    """Whether XLA has compiled the parts that run step by step."""
    del switches  # what was judged under others is judged again
    parts = parts_of(cell)

    def zeros(tensor):
        shape = [1, *tensor.shape[1:]] if has_rows(tensor) else tensor.shape
        return tf.zeros(shape, tensor.dtype)

    with tf.init_scope():
        try:
            for part in parts.step, parts.step_back:
                compiled = tf.function(part, jit_compile=True, autograph=False)
                compiled(list(map(zeros, part.inputs)))
        except Exception:  # of any class, by kind of failure
            return False
    return True
