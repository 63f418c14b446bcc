"""The random numbers that a step draws: cut out of its graph.

A step is computed for many steps at once, again for the way back, compiled and not, and
finds the same numbers each time: so they come in from outside, as inputs do. They are drawn
by the very operations of the step, for as many rows as are asked for, from a seed that each
call has for itself.
"""

import collections
from typing import NamedTuple

import tensorflow as tf

from keras_bptt.cells.dependence import ROWS, SEED, WEIGHT, X, between
from keras_bptt.cells.refusals import (
    draws_alike,
    draws_by,
    draws_elsewhere,
    draws_for_no_row,
    is_random,
)
from keras_bptt.runtime.subgraphs import Part, has_rows

# What makes of each number another one. Of draws it is drawn too: a dropout factor is a
# truth value then, and not the uniform number that it was made of.
_OF_EACH = {
    "Add",
    "AddV2",
    "Cast",
    "Greater",
    "GreaterEqual",
    "Identity",
    "Less",
    "Mul",
}
_OF_EACH |= {"LessEqual", "LogicalNot", "Neg", "Sub"}
# Which input a tensor is filled with; what tells how many rows there are.
_FILLED = {"BroadcastTo": 0, "Fill": 1}
_SIZES = {"Shape", "ShapeN", "Size"}


class Drawing(NamedTuple):
    """What a step draws.

    Attributes:
        draws: tensors of the step's graph, each with rows.
        seeds: of each seed that they are drawn from all tensors of the graph that read it.
        sources: of each seed a function that draws one.
        part: computes the draws from rows of x, whose number alone counts, and all `reads`.
    """

    draws: tuple = ()
    seeds: tuple = ()
    sources: tuple = ()
    part: Part | None = None

    @property
    def reads(self):
        return [tensor for tensors in self.seeds for tensor in tensors]

    def numbers(self, seeds, rows):
        """The draws of so many rows."""
        if not self.draws:
            return ()
        pairs = zip(seeds, self.seeds, strict=True)
        read = [seed for seed, tensors in pairs for _ in tensors]
        return tuple(self.part([tf.zeros([rows, 0]), *read]))

    def check(self, name, rows):
        """Raise where so many rows would not have a draw each."""
        with tf.init_scope():
            seeds = [tf.zeros(t[0].shape, t[0].dtype) for t in self.seeds]
            try:
                numbers = self.numbers(seeds, rows)
            except (ValueError, tf.errors.InvalidArgumentError):
                numbers = [tf.zeros([0])]
        if any(t.shape[0] != rows for t in numbers):
            where = ", ".join(t.op.name for t in self.draws)
            raise ValueError(
                draws_for_no_row(name, f"{where}, not one for each example")
            )


def draws_in(name, operations, depends, results):
    """The draws that the step reads, or returns.

    Args:
        operations: of the step, in order.
        depends: what its tensors depend on.
        results: the states after the step, and its output.

    Raises:
        ValueError: for numbers that would not be a step's and an example's own.
    """
    ways = between(results)
    readers = collections.Counter(t.name for t in results)
    readers.update(t.name for way in ways.values() for t in way.op.inputs)
    drawn = {}
    for operation in operations:
        wanted = {t.name: t for t in operation.outputs if t.name in ways}
        if not wanted:
            continue
        if is_random(operation.type):
            _refuse(name, operation, depends)
            drawn |= wanted
        elif operation.type in _OF_EACH:
            draws = [t for t in operation.inputs if t.name in drawn]
            others = [t for t in operation.inputs if t.name not in drawn]
            # Not where the draw itself is read too: both would be drawn.
            alone = draws and all(readers[t.name] == 1 for t in draws)
            if alone and not any(depends[t.name] for t in others):
                for t in draws:
                    del drawn[t.name]
                drawn |= wanted
    found = list(drawn.values())
    for tensor in found:
        if not has_rows(tensor):
            where = f"{tensor.op.name}, of shape {tensor.shape}"
            raise ValueError(draws_for_no_row(name, where))
    return found


def _tells_rows(tensor, depends):
    """Whether its numbers depend on how many rows there are, and not its shape alone."""
    if not depends[tensor.name] & ROWS or tensor.op.type in ("ZerosLike", "OnesLike"):
        return False
    read = list(tensor.op.inputs)
    if tensor.op.type in _FILLED:
        read = [read[_FILLED[tensor.op.type]]]
    return (
        not read
        or tensor.op.type in _SIZES
        or any(_tells_rows(t, depends) for t in read)
    )


def _refuse(name, operation, depends):
    bits = 0
    for tensor, argument in zip(
        operation.inputs, operation.op_def.input_arg, strict=True
    ):
        bits |= depends[tensor.name]
        if argument.name != "shape" and _tells_rows(tensor, depends):
            bits |= X
    where = f"{operation.name} ({operation.type})"
    if bits & ~ROWS == WEIGHT:
        raise ValueError(draws_elsewhere(name, where))
    if not operation.type.startswith("Stateless") or bits & ~(SEED | ROWS):
        raise ValueError(draws_by(name, where))
    if not bits & SEED:
        raise draws_alike(name, where)
