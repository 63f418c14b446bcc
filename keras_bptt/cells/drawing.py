"""The random numbers that a step draws: cut out of its graph.

A step is computed for many steps at once, again for the way back, compiled and not, and
finds the same numbers each time: so they come in from outside, as inputs do. They are drawn
by the very operations of the step, for as many rows as are asked for, from a seed that each
call has for itself.
"""

from typing import NamedTuple

import tensorflow as tf

from keras_bptt.cells.dependence import ROWS, SEED, WEIGHT
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


class Drawing(NamedTuple):
    """What a step draws.

    Attributes:
        draws: tensors of the step's graph, each with rows.
        seeds: the seeds that they are drawn from, tensors of that graph.
        sources: of each seed a function that draws one.
        part: computes draws from rows of x, whose number alone counts, and seeds.
    """

    draws: tuple = ()
    seeds: tuple = ()
    sources: tuple = ()
    part: Part | None = None

    def numbers(self, seeds, rows):
        """The draws of so many rows."""
        if not self.draws:
            return ()
        return tuple(self.part([tf.zeros([rows, 0]), *seeds]))


def draws_in(name, operations, depends, ways):
    """The draws that others of `ways` read, or that are results.

    Args:
        operations: of the step, in order.
        depends: what its tensors depend on.
        ways: the tensors that its results are made of, by name.

    Raises:
        ValueError: for numbers that would not be a step's and an example's own.
    """
    drawn = {}
    for operation in operations:
        wanted = [t for t in operation.outputs if t.name in ways]
        if is_random(operation.type) and wanted:
            _refuse(name, operation, depends)
        elif operation.type not in _OF_EACH or not any(
            t.name in drawn for t in operation.inputs
        ):
            continue
        elif any(t.name not in drawn and depends[t.name] for t in operation.inputs):
            continue
        drawn |= {t.name: t for t in wanted}
    inner = {t.name for t in drawn.values() for t in t.op.inputs}
    read = {
        t.name for way in ways.values() if way.name not in drawn for t in way.op.inputs
    }
    found = [t for t in drawn.values() if t.name in read or t.name not in inner]
    for tensor in found:
        if not has_rows(tensor):
            where = f"{tensor.op.name}, of shape {tensor.shape}"
            raise ValueError(draws_for_no_row(name, where))
    return found


def _refuse(name, operation, depends):
    bits = 0
    for tensor in operation.inputs:
        bits |= depends[tensor.name]
    where = f"{operation.name} ({operation.type})"
    if bits & ~ROWS == WEIGHT:
        raise ValueError(draws_elsewhere(name, where))
    if not operation.type.startswith("Stateless") or bits & ~(SEED | ROWS):
        raise ValueError(draws_by(name, where))
    if not bits & SEED:
        raise ValueError(draws_alike(name, where))
