"""What the tensors of a traced step depend on."""

# TRAINED: on something that has a gradient; SEED: on what random numbers are drawn from;
# ROWS: on their number.
X, NOISE, STATE, WEIGHT, TRAINED, ADJOINT, SEED, ROWS = (1 << i for i in range(8))


def dependence(operations, leaves):
    """What each tensor, by name, depends on: as bits, given those of the leaves."""
    depends = {}
    for operation in operations:
        bits = 0
        for tensor in operation.inputs:
            bits |= depends[tensor.name]
        if operation.type in ("Shape", "ShapeN", "Size", "ZerosLike", "OnesLike"):
            bits = ROWS  # of the shape of its inputs alone
        for tensor in operation.outputs:
            depends[tensor.name] = leaves.get(tensor.name, bits)
    return depends


def between(outputs, given=frozenset()):
    """The tensors that the outputs are computed from, and they themselves, by name.

    Args:
        given: names of tensors to stop at.
    """
    found, waiting = {}, [t for t in outputs if t.name not in given]
    while waiting:
        tensor = waiting.pop()
        if tensor.name not in found:
            found[tensor.name] = tensor
            waiting += [t for t in tensor.op.inputs if t.name not in given]
    return found


def at_edge(ways, depends, *kinds, but=frozenset()):
    """The tensors that depend on these alone and are read by what depends on more.

    Args:
        ways: tensors by name, from `between`.
        kinds: the bits of such a tensor, each a choice.
        but: names of tensors that are to count as what depends on more.
    """
    found = {}

    def alone(tensor):
        return depends[tensor.name] in kinds and tensor.name not in but

    for tensor in reversed(ways.values()):
        if not alone(tensor):
            found |= {needed.name: needed for needed in filter(alone, tensor.op.inputs)}
    return list(found.values())


def source(tensor):
    """What the tensor is another name of."""
    return names_of(tensor)[-1]


def names_of(tensor):
    """The tensor, and what it is another name of."""
    found = [tensor]
    while found[-1].op.type in ("Identity", "EnsureShape"):
        found.append(found[-1].op.inputs[0])
    return found
