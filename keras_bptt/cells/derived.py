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
from typing import NamedTuple

import tensorflow as tf

from keras_bptt.cells.cell import Cell, Cost, Shapes
from keras_bptt.cells.cuts import NEVER, cut
from keras_bptt.cells.probing import probed
from keras_bptt.cells.tracing import ADJOINT, STATE, Trace, X, names_of
from keras_bptt.runtime.execution import op_callbacks, switches
from keras_bptt.runtime.subgraphs import has_rows, numbers_of
from keras_bptt.runtime.tensors import size_of, wide, widened

PRODUCTS = {
    "MatMul",
    "BatchMatMul",
    "BatchMatMulV2",
    "BatchMatMulV3",
    "Einsum",
    "Conv2D",
}
PRODUCTS |= {"Conv2DBackpropInput", "Conv2DBackpropFilter", "While", "StatelessWhile"}
VIEWS = {"Identity", "Reshape", "EnsureShape", "ExpandDims", "Squeeze", "Cast"}
CHEAP = {"Add", "AddV2", "Sub", "Mul", "Neg", "Square", "Relu", "Maximum", "Minimum"}
CHEAP |= {"Select", "SelectV2", "Greater", "Less", "GreaterEqual", "LessEqual", "Split"}
CHEAP |= {"ConcatV2", "SplitV", "StridedSlice", "Slice", "BiasAdd", "AddN", "ZerosLike"}
CHEAP |= {
    "Mean",
    "Sum",
    "Fill",
    "TanhGrad",
    "SigmoidGrad",
    "ReluGrad",
    "Pack",
    "Unpack",
    "Const",
    "Transpose",
}

QUOTIENTS = {"RealDiv", "Div", "DivNoNan", "Sqrt", "Rsqrt", "SqrtGrad", "RsqrtGrad"}
QUOTIENTS |= {"Reciprocal", "Inv", "SquaredDifference"}
# What XLA is known to compile, without a trial that takes time.
KNOWN_TO_XLA = (
    VIEWS | CHEAP | {"MatMul", "Tanh", "Sigmoid", "Exp", "Sum", "Mean", "Sqrt"}
)
KNOWN_TO_XLA |= {"RealDiv", "Softmax", "Softplus", "Rsqrt", "RsqrtGrad", "SqrtGrad"}
KNOWN_TO_XLA |= {"Shape", "BroadcastGradientArgs", "SquaredDifference", "BiasAddGrad"}
# Of what XLA on a CPU (TensorFlow 2.21) makes a pad, which it may write past the end of: see
# `runtime.tensors`.
UNSAFE = {"Pad", "PadV2", "MirrorPad", "StridedSliceGrad"}

# What it costs, for each number of a row: to keep it, that is to write it and to read it
# again; to compute it by a cheap operation, which XLA fuses with others, or by one that is
# not, such as tanh; by a product; and by a cheap one of all steps at once, where nothing is
# fused.
KEEP, FUSED, QUOTIENT, FUNCTION, PRODUCT, AT_ONCE = 100, 5, 20, 60, 10**7, 80


class Division(NamedTuple):
    """How the graph of a step and its derivative is divided.

    Attributes:
        drive, saved, deltas: tensors that go from one part to another.
        drive_back: whether a step back reads the drive.
        recurs: for each state after the step whether the next step reads it.
    """

    trace: Trace
    drive: tuple
    saved: tuple
    deltas: tuple
    drive_back: bool
    recurs: tuple


def divide(trace: Trace) -> Division:
    """Divide the graph by what its tensors depend on."""
    after = {t.name for state in trace.after for t in names_of(state)}
    there = {t.name for t in (*trace.before, *trace.noise, *trace.read)}
    there |= after | set(trace.graph.sized)
    dtype = trace.before[0].dtype
    back = [d for d in trace.d_before if d is not None]
    adjoints = {a.name for a in trace.adjoints}
    sequential = set(_between(back, there)) | adjoints
    drive = _drive(trace, back)
    driven = {t.name for t in drive}
    drive_back = not any(
        op.type in PRODUCTS for op in _operations(drive, {trace.x.name} | there)
    )

    def kept_of_step(tensor):
        if tensor.name in there or (drive_back and tensor.name in driven):
            return 0
        if tensor.name in adjoints:
            return 0
        if trace.of(tensor, ADJOINT):
            return NEVER
        return _keeping(trace, tensor, dtype, STATE | X)

    def again_in_step(operation):
        if _of(trace, operation, ADJOINT):
            return 0
        return _computing(operation, FUSED)

    saved = cut(back, kept_of_step, again_in_step)
    found = {t.name for t in saved}

    def kept_of_all(tensor):
        if tensor.name in there | found or tensor.name == trace.x.name:
            return 0
        if drive_back and tensor.name in driven:
            return 0
        if trace.of(tensor, ADJOINT):
            if tensor.name not in sequential:
                return NEVER
            return _keeping(trace, tensor, dtype, ADJOINT)
        return _keeping(trace, tensor, dtype, STATE)

    def again_of_all(operation):
        if _of(trace, operation, ADJOINT):
            loop = any(t.name in sequential for t in operation.outputs)
            return _computing(operation, AT_ONCE) if loop else 0
        if _of(trace, operation, STATE):
            return _computing(operation, FUSED)
        return 0 if operation.type != "Placeholder" else NEVER

    gradients = [d for d in (trace.d_x, *trace.d_weights) if d is not None]
    kept = cut(gradients, kept_of_all, again_of_all)
    return Division(
        trace,
        drive,
        (*saved, *(t for t in kept if not trace.of(t, ADJOINT))),
        tuple(t for t in kept if trace.of(t, ADJOINT)),
        drive_back,
        (*(d is not None for d in trace.d_before), False)[: len(trace.after)],
    )


def _drive(trace, back):
    """What does not depend on a state and is read where something does."""
    wanted = {}
    for tensor in _between([*trace.after, *back], set()).values():
        if trace.of(tensor, STATE, ADJOINT):
            for needed in tensor.op.inputs:
                if trace.of(needed, X) and not trace.of(needed, STATE, ADJOINT):
                    wanted[needed.name] = needed
    wanted |= {
        t.name: t for t in trace.after if not trace.of(t, STATE) and trace.of(t, X)
    }
    there = {t.name for t in (*trace.noise, *trace.read)} | set(trace.graph.sized)

    def keeping(tensor):
        if tensor.name in there:
            return 0
        return 1 if trace.graph.has_rows(tensor) and trace.of(tensor, X) else NEVER

    def computing(operation):
        # One tensor is split in the loop, where XLA fuses it, and not for all steps.
        return 0 if operation.type == "Split" else _computing(operation, FUNCTION)

    found = cut(list(wanted.values()), keeping, computing)
    return tuple(found) or (trace.x,)


def _between(outputs, given):
    """The tensors that the outputs are computed from, by name, up to the given ones."""
    found, waiting = {}, [t for t in outputs if t.name not in given]
    while waiting:
        tensor = waiting.pop()
        if tensor.name not in found:
            found[tensor.name] = tensor
            waiting += [t for t in tensor.op.inputs if t.name not in given]
    return found


def _operations(outputs, given):
    return {t.op.name: t.op for t in _between(outputs, given).values()}.values()


def _of(trace, operation, kind):
    return any(trace.of(t, kind) for t in operation.outputs)


def _keeping(trace, tensor, dtype, kinds):
    """What it costs to keep a tensor of these kinds."""
    if (
        not trace.of(tensor, kinds)
        or tensor.dtype != dtype
        or not trace.graph.has_rows(tensor)
    ):
        return NEVER
    return KEEP * max(1, numbers_of(tensor))


def _computing(operation, cheap):
    """What it costs to compute the outputs of an operation again."""
    if operation.type == "Placeholder":
        return NEVER
    if operation.type in VIEWS or not operation.outputs or not operation.inputs:
        return 0
    numbers = sum(numbers_of(t) if has_rows(t) else 1 for t in operation.outputs)
    if operation.type in PRODUCTS:
        return PRODUCT * numbers
    of_type = FUNCTION
    if operation.type in QUOTIENTS:
        of_type = QUOTIENT
    elif operation.type in CHEAP:
        of_type = 0
    return max(cheap, of_type) * numbers


class _Parts:
    """The four parts of a division, as they can be run."""

    def __init__(self, division, is_wide):
        trace, drive, saved, deltas, drive_back, _ = division
        noise_and_weights = (*trace.noise, *trace.read)
        names = [names_of(state) for state in trace.after]
        # All names of a state, for the way back may read any of them.
        self.after = tuple(t for each in names for t in each)
        self.repeats = tuple(map(len, names))
        point = (*(drive if drive_back else ()), *self.after, *trace.before, *saved)
        self.back = [i for i, d in enumerate(trace.d_before) if d is not None]
        self.d_before = tuple(trace.d_before[i] for i in self.back)
        self.trained = [i for i, d in enumerate(trace.d_weights) if d is not None]
        self.d_weights = tuple(trace.d_weights[i] for i in self.trained)
        self.d_x = (trace.d_x,) if trace.d_x is not None else ()
        part = trace.graph.part
        self.weights = part(trace.weights, trace.inputs)
        half = trace.before[0].dtype.size == 2
        self.project = part(drive, (trace.x, *noise_and_weights), is_wide)
        self.step = part(
            (*trace.after, *saved), (*drive, *trace.before, *noise_and_weights), is_wide
        )
        self.step_back = part(
            (*self.d_before, *deltas),
            (*point, *trace.adjoints, *noise_and_weights),
            is_wide,
        )
        # What is added over rows is added in wide numbers.
        self.gradients = part(
            (*self.d_x, *self.d_weights),
            (trace.x, *point, *deltas, *noise_and_weights),
            is_wide or half,
        )


@functools.lru_cache(maxsize=64)
def _parts(cell):
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

    def weights_from(self, sources):
        """The weights, as they are stored, of all that the step reads beside rows.

        Numbers that are no floating ones come as float64, so that all have a gradient.
        """
        trace = self.division.trace
        found = _parts(self).weights(list(sources))
        found = [w if t else tf.stop_gradient(w) for w, t in zip(found, trace.trained)]
        return [w if w.dtype.is_floating else tf.cast(w, tf.float64) for w in found]

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
        products = sum(map(multiply_adds, _parts(self).step.operations))
        made = [*self.division.trace.after, *self.division.saved]
        return Cost(products=products, numbers=sum(map(numbers_of, made)))

    def project(self, weights, x, noise):
        trace = self.division.trace
        lead = _Lead(x, trace.x)
        given = [lead.flat(x), *self._beside(lead, noise), *weights]
        return tuple(lead.back(_parts(self).project(given)))

    def step(self, weights, drive, before, noise):
        parts, number = _parts(self), len(self.division.trace.after)
        lead = _Lead(before[0], self.division.trace.before[0])
        before = before[: len(self.division.trace.before)]
        flat = map(lead.flat, (*drive, *before))
        given = [*flat, *self._beside(lead, noise), *weights]
        found = lead.back(parts.step(given))
        return tuple(found[:number]), tuple(found[number:])

    def step_back(self, weights, point, adjoints, noise):
        parts, trace = _parts(self), self.division.trace
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
        parts, trace = _parts(self), self.division.trace
        inputs = x()
        lead = _Lead(inputs, trace.x)
        before = [p[0] if len(p) == 1 else tf.concat(p, 0) for p in point.before]
        flat = map(lead.flat, (inputs, *self._point(point, before), *deltas))
        given = [*flat, *self._beside(lead, noise), *weights]
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
        drive = point.drive if self.division.drive_back else ()
        pairs = zip(point.after, _parts(self).repeats, strict=True)
        after = [t for t, number in pairs for _ in range(number)]
        before = before[: len(self.division.trace.before)]
        return (*drive, *after, *before, *(point.saved or ()))

    def _beside(self, lead, noise):
        return [
            lead.spread(n, t)
            for n, t in zip(noise, self.division.trace.noise, strict=True)
        ]


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
    if operation.type == "MatMul" and has_rows(output):
        return numbers_of(output) * numbers_of(left)
    return numbers_of(output) if has_rows(output) else 0


def derived(name, trace: Trace) -> Derived:
    """The cell of a traced step; the same for two that compute the same.

    Raises:
        ValueError: where the step mixes examples; `name` is that of the cell.
    """
    inner = [trace.x, *trace.before, *trace.noise, *trace.inputs, *trace.adjoints]
    outer = [*trace.after, trace.d_x, *trace.d_before, *trace.d_weights]
    marks = [inner, [t for t in outer if t is not None], trace.read]
    key = trace.graph.fingerprint(*marks)
    return _known(key, _Given(trace, name))


class _Given(NamedTuple):
    """A trace, equal to any other: a cache is to know its key alone."""

    trace: Trace
    name: str

    def __eq__(self, other):
        return isinstance(other, _Given)

    def __hash__(self):
        return 0


@functools.lru_cache(maxsize=64)
def _known(key, given):
    return Derived(key, divide(probed(given.name, given.trace.simplified())))


def xla_compiles(cell: Derived) -> bool:
    """Whether XLA can compile the step and its derivative, as things are now."""
    # Where tf.debugging looks at every operation, it adds some that XLA does not know.
    if not tf.test.is_built_with_xla() or op_callbacks():
        return False
    parts = _parts(cell)
    types = {op.type for op in (*parts.step.operations, *parts.step_back.operations)}
    if types & UNSAFE:
        return False
    if types <= KNOWN_TO_XLA or tf.config.functions_run_eagerly():
        return True
    return _xla_compiles(cell, switches())


@functools.lru_cache(maxsize=64)
def _xla_compiles(cell, switches):
    del switches  # what was judged under others is judged again
    trace, parts = cell.division.trace, _parts(cell)

    def zeros(tensors):
        return [tf.zeros([1, *t.shape[1:]], t.dtype) for t in tensors]

    def numbers(tensors):
        return [tf.zeros(t.shape, t.dtype) for t in tensors]

    with tf.init_scope():
        try:
            for part in parts.step, parts.step_back:
                given = [
                    zeros([t])[0] if has_rows(t) else numbers([t])[0]
                    for t in part.inputs
                ]
                tf.function(part, jit_compile=True, autograph=False)(given)
        except Exception:  # of any class, by kind of failure
            return False
    return True
