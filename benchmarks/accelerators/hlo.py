"""What a compiled program says about itself, in the text of its operations (HLO)."""

import re


def sequential_steps(text):
    """How often the innermost loops of a program run in all, one after the other.

    By the compiler's own text: a loop names its condition, which compares a counter with a
    constant, and its body, which may have loops of its own. None: one compares it with
    what only a run tells.
    """
    found = re.findall(r"^(?:ENTRY )?(%[\w.-]+) \((.*?)^\}", text, re.M | re.S)
    computations = dict(found)

    def steps(name):
        loops = re.findall(
            r" while\(.*condition=(%[\w.-]+), body=(%[\w.-]+)", computations[name]
        )
        counts = [
            (iterations(computations[condition]), steps(body))
            for condition, body in loops
        ]
        if any(None in pair for pair in counts):
            return None
        return sum(outer * max(inner, 1) for outer, inner in counts)

    return steps(re.search(r"^ENTRY (%[\w.-]+)", text, re.M)[1])


def iterations(condition):
    """Of a loop that goes on while a counter from 0 is less than a constant, or None."""
    operands = re.search(r"ROOT .* compare\(([^)]*)\), direction=LT", condition)
    if operands is None:
        raise ValueError(
            "A loop's condition must compare a counter with its end. Received: "
            f"{condition}. Read how this version of the compiler writes it."
        )
    end = operands[1].rpartition("%")[2]
    constant = re.search(rf"%{re.escape(end)} = \S+ constant\((\d+)\)", condition)
    return int(constant[1]) if constant else None
