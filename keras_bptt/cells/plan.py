"""What was found of a compiled step, in words: which part computes what, and how often."""

import collections
import dataclasses

from keras_bptt.cells.dependence import ADJOINT
from keras_bptt.cells.derived import Derived, multiply_adds, not_for_xla, parts_of
from keras_bptt.cells.division import FUNCTIONS, PRODUCTS
from keras_bptt.runtime.subgraphs import numbers_of


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the step of a cell and its gradient are divided; print it.

    Numbers are those of one step of one example.

    Attributes:
        name: of the cell.
        products: of each part, by name, how many matrix products it has.
        multiply_adds: of the products that wait for the state before.
        drawn: how many random numbers it draws.
        states, drive, saved, deltas: how many numbers the states have, inputs make for the
            step, the step keeps for the way back beside the states, and the way back makes
            for the gradients of weights and inputs.
        computed_again: the operations of the step that the way back computes again, though
            they cost something, and how many there are of each.
        outside: operations that make weights of variables, outside of the loop.
        trained: how many of the weights that the step reads have a gradient, and how many
            there are.
        not_compiled: what XLA is not asked to compile in the loops: types of operations.
    """

    name: str
    products: dict
    multiply_adds: int
    drawn: int
    states: int
    drive: int
    saved: int
    deltas: int
    computed_again: dict
    outside: int
    trained: tuple
    not_compiled: tuple

    def __str__(self):
        again = ", ".join(f"{n} {kind}" for kind, n in self.computed_again.items())
        trained, weights = self.trained
        drawn = f"; {self.drawn} numbers drawn" if self.drawn else ""
        lines = {
            "project": f"for all steps at once: {_products(self, 'project')}, "
            f"{self.drive} numbers{drawn}",
            "step": f"step by step: {_products(self, 'step')} of the state "
            f"({self.multiply_adds} multiply-adds); {self.states} numbers of states, "
            f"{self.saved} more saved",
            "step_back": f"step by step: {_products(self, 'step_back')} of the adjoint, "
            f"{self.deltas} numbers of deltas",
            "gradients": f"for all steps at once: {_products(self, 'gradients')}",
            "computed again": again or "nothing that costs",
            "weights": f"{trained} of {weights} have a gradient; {self.outside} operations "
            "make them of variables, outside of the loop",
            "XLA": "not compiled, for " + ", ".join(self.not_compiled)
            if self.not_compiled
            else "can compile the loops",
        }
        width = max(map(len, lines))
        text = [f"{name:<{width}}  {line}" for name, line in lines.items()]
        return "\n".join([f"The step of {self.name}, divided:", *text])

    __repr__ = __str__


def _products(plan, part):
    number = plan.products[part]
    return f"{number or 'no'} product{'' if number == 1 else 's'}"


def plan_of(name: str, cell: Derived) -> Plan:
    """The plan of a compiled cell."""
    division, parts = cell.division, parts_of(cell)
    trace = division.trace
    names = "project", "step", "step_back", "gradients"

    def numbers(tensors):
        return sum(map(numbers_of, tensors))

    again = collections.Counter(
        operation.type
        for operation in (*parts.step_back.operations, *parts.gradients.operations)
        if operation.type in PRODUCTS | FUNCTIONS
        and not any(parts.trace.of(t, ADJOINT) for t in operation.outputs)
    )
    return Plan(
        name,
        {
            n: sum(op.type in PRODUCTS for op in getattr(parts, n).operations)
            for n in names
        },
        sum(map(multiply_adds, parts.step.operations)),
        numbers(trace.draws),
        numbers(trace.after[: len(trace.before)]),
        numbers(division.drive),
        numbers(division.saved),
        numbers(division.deltas),
        dict(again),
        len(parts.weights.operations),
        (sum(trace.trained), len(trace.weights)),
        tuple(sorted(not_for_xla(cell))),
    )
