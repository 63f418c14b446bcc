"""Divides the graph of a step and its derivative in four: what is computed where.

What a tensor depends on says which part it may belong to; which tensors go from part to
part is a smallest cut. What costs much (a product, a transcendental function) is kept, what
costs little is computed again.
"""

from typing import NamedTuple

import tensorflow as tf

from keras_bptt.cells.cuts import NEVER, Impossible, cut
from keras_bptt.cells.dependence import ADJOINT, STATE, X, between, names_of
from keras_bptt.cells.tracing import Trace
from keras_bptt.runtime.subgraphs import has_rows, numbers_of

PRODUCTS = {"MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum"}
PRODUCTS |= {"Conv1D", "Conv2D", "Conv3D", "While", "StatelessWhile"}
PRODUCTS |= {"Conv2DBackpropInput", "Conv2DBackpropFilter", "DepthwiseConv2dNative"}
VIEWS = {"Identity", "Reshape", "EnsureShape", "ExpandDims", "Squeeze", "Cast"}
CHEAP = {
    "Add",
    "AddN",
    "AddV2",
    "BiasAdd",
    "ConcatV2",
    "Fill",
    "Greater",
    "GreaterEqual",
}
CHEAP |= {"Less", "LessEqual", "LogicalAnd", "LogicalNot", "Maximum", "Mean", "Minimum"}
CHEAP |= {"Mul", "Neg", "Pack", "Relu", "ReluGrad", "Select", "SelectV2", "SigmoidGrad"}
CHEAP |= {
    "Slice",
    "Split",
    "SplitV",
    "Square",
    "StridedSlice",
    "Sub",
    "Sum",
    "TanhGrad",
}
CHEAP |= {"Transpose", "Unpack"}
QUOTIENTS = {"Div", "DivNoNan", "Inv", "RealDiv", "Reciprocal", "Rsqrt", "RsqrtGrad"}
QUOTIENTS |= {"Sqrt", "SqrtGrad", "SquaredDifference"}
FUNCTIONS = {"Erf", "Exp", "Log", "Log1p", "Sigmoid", "Softmax", "Softplus", "Tanh"}

# What it costs, for each number of a row: to keep it, that is to write it and to read it
# again; to compute it by a cheap operation, which XLA fuses with others, by a quotient, or
# by any other, such as tanh; by a product; and by a cheap one of all steps at once, where
# nothing is fused.
KEEP, FUSED, QUOTIENT, FUNCTION, PRODUCT, AT_ONCE = 100, 5, 20, 60, 10**7, 80


class Division(NamedTuple):
    """How the graph of a step and its derivative is divided.

    Attributes:
        trace: the graph.
        drive, saved, deltas: tensors that go from one part to another.
        drive_back: which tensors of the drive a step back reads. They are computed again.
        recurs: for each state after the step whether the next step reads it.
    """

    trace: Trace
    drive: tuple
    saved: tuple
    deltas: tuple
    drive_back: tuple
    recurs: tuple


def divide(trace: Trace) -> Division:
    """Divide the graph."""
    drive = _drive(trace)
    try:
        # What of the drive costs little is computed again for the way back,
        again = tuple(t for t in drive if not _needs_product(trace, t))
        saved, deltas = _kept(trace, again)
    except Impossible:
        # and what cannot be saved, such as truth values.
        again = drive
        saved, deltas = _kept(trace, again)
    recurs = [d is not None for d in trace.d_before]
    recurs += [False] * (len(trace.after) - len(recurs))
    again = _read_back(trace, again, saved)
    return Division(trace, drive, saved, deltas, again, tuple(recurs))


def _read_back(trace, drive, saved):
    """Those of the drive that the way back is computed from."""
    states = [t for state in trace.after for t in names_of(state)]
    given = {
        t.name for t in (*states, *trace.before, *saved)
    } | trace.graph.sized.keys()
    read = between([*_back(trace), *_gradients(trace)], given)
    return tuple(t for t in drive if t.name in read)


def _needs_product(trace, tensor):
    leaves = {t.name for t in (trace.x, *trace.noise, *trace.draws, *trace.read)}
    made = between([tensor], leaves | trace.graph.sized.keys())
    return any(t.op.type in PRODUCTS for t in made.values())


def _drive(trace):
    """What does not depend on a state and is read where something does."""
    wanted = {}
    for tensor in between([*trace.after, *_back(trace)], set()).values():
        if trace.of(tensor, STATE, ADJOINT):
            for needed in tensor.op.inputs:
                if trace.of(needed, X) and not trace.of(needed, STATE, ADJOINT):
                    wanted[needed.name] = needed
    for tensor in trace.after:
        if trace.of(tensor, X) and not trace.of(tensor, STATE):
            wanted[tensor.name] = tensor
    there = {t.name for t in (*trace.noise, *trace.read)} | trace.graph.sized.keys()

    def keeping(tensor):
        if tensor.name in there:
            return 0
        return 1 if trace.graph.has_rows(tensor) and trace.of(tensor, X) else NEVER

    def computing(operation):
        # One tensor is split in the loop, where XLA fuses it, and not for all steps.
        return 0 if operation.type == "Split" else _computing(operation, FUNCTION)

    return tuple(cut(wanted.values(), keeping, computing)) or (trace.x,)


def _kept(trace, drive):
    """What the step saves and what a step back leaves for the gradients.

    Args:
        drive: the tensors that both find there.
    """
    states = [t for state in trace.after for t in names_of(state)]
    there = {
        t.name for t in (*states, *trace.before, *trace.noise, *trace.read, *drive)
    }
    there |= trace.graph.sized.keys()
    adjoints = {a.name for a in trace.adjoints}
    sequential = between(_back(trace), there).keys() | adjoints

    def keeping_in_step(tensor):
        if tensor.name in there | adjoints:
            return 0
        return (
            NEVER if trace.of(tensor, ADJOINT) else _keeping(trace, tensor, STATE | X)
        )

    def computing_in_step(operation):
        return 0 if _of(trace, operation, ADJOINT) else _computing(operation, FUSED)

    saved = cut(_back(trace), keeping_in_step, computing_in_step)
    there |= {t.name for t in (*saved, trace.x, *trace.draws)}

    def keeping_for_all(tensor):
        if tensor.name in there:
            return 0
        if trace.of(tensor, ADJOINT) and tensor.name not in sequential:
            return NEVER
        return _keeping(trace, tensor, STATE | ADJOINT)

    def computing_for_all(operation):
        if _of(trace, operation, ADJOINT):
            loop = any(t.name in sequential for t in operation.outputs)
            return _computing(operation, AT_ONCE) if loop else 0
        if _of(trace, operation, STATE):
            return _computing(operation, FUSED)
        return NEVER if operation.type == "Placeholder" else 0

    kept = cut(_gradients(trace), keeping_for_all, computing_for_all)
    deltas = tuple(t for t in kept if trace.of(t, ADJOINT))
    return (*saved, *(t for t in kept if not trace.of(t, ADJOINT))), deltas


def _back(trace):
    """The adjoints of the states before."""
    return [d for d in trace.d_before if d is not None]


def _gradients(trace):
    """Those of x and of the weights."""
    return [d for d in (trace.d_x, *trace.d_weights) if d is not None]


def _of(trace, operation, kind):
    return any(trace.of(t, kind) for t in operation.outputs)


def _keeping(trace, tensor, kinds):
    """What it costs to keep a tensor, if it is of these kinds and like a state."""
    dtype = trace.before[0].dtype
    fits = trace.of(tensor, kinds) and trace.graph.has_rows(tensor)
    return (
        KEEP * max(1, numbers_of(tensor)) if fits and tensor.dtype == dtype else NEVER
    )


def _computing(operation, cheap):
    """What it costs to compute the outputs of an operation again."""
    if operation.type == "Placeholder":
        return NEVER
    if operation.type in VIEWS or not operation.outputs or not operation.inputs:
        return 0
    numbers = sum(numbers_of(t) if has_rows(t) else 1 for t in operation.outputs)
    if operation.type in PRODUCTS:
        return PRODUCT * max(1, numbers)
    by_type = FUNCTION
    if operation.type in CHEAP or tf.bool in {t.dtype for t in operation.outputs}:
        by_type = 0
    elif operation.type in QUOTIENTS:
        by_type = QUOTIENT
    return max(cheap, by_type) * max(1, numbers)
