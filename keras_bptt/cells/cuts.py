"""What to keep of a graph and what to compute again: a smallest cut.

Tensors that are wanted later are kept, at a cost, or computed again: then their operation
costs, and its inputs are wanted. The choice of least cost is a minimum cut. Each tensor is
two sides of an edge, "wanted" and "computed again", whose capacity is what it costs to keep
it; what is computed again drags its inputs in, by edges that cannot be cut. So it is done
in the partitioners of ahead-of-time automatic differentiation.

Source: Ford & Fulkerson, Maximal flow through a network, 1956.
"""

import collections
from collections.abc import Callable

NEVER = 10**15  # the cost of what must not be done


class Impossible(Exception):
    """What is wanted can neither be kept nor computed."""


def cut(wanted, keeping: Callable, computing: Callable):
    """The tensors to keep, in the order in which they are met, so that all costs least.

    Args:
        wanted: tensors.
        keeping: of a tensor what it costs to keep it, an integer; 0: it is there anyway.
        computing: of an operation what it costs to compute it again.

    Raises:
        Impossible: where one can neither be kept nor computed.
    """
    network, met = _Network(), {}
    waiting = list(wanted)
    for tensor in waiting:
        network.join("wanted", ("tensor", tensor.name), NEVER)
    while waiting:
        tensor = waiting.pop(0)
        if tensor.name in met:
            continue
        met[tensor.name] = tensor
        cost, operation = keeping(tensor), tensor.op
        if cost == 0:
            continue
        again = ("operation", operation.name)
        network.join(("tensor", tensor.name), again, cost)
        if again in network.finished:
            continue
        network.finished.add(again)
        network.join(again, "cost", computing(operation))
        for needed in operation.inputs:
            network.join(again, ("tensor", needed.name), NEVER)
        waiting += operation.inputs
    side = network.minimum_cut("wanted", "cost")
    return [
        tensor
        for name, tensor in met.items()
        if ("tensor", name) in side
        and ("operation", tensor.op.name) not in side
        and keeping(tensor)
    ]


class _Network:
    def __init__(self):
        self.capacity = collections.defaultdict(dict)
        self.finished = set()

    def join(self, start, end, capacity):
        known = self.capacity[start].get(end, 0)
        self.capacity[start][end] = min(NEVER, known + capacity)
        self.capacity[end].setdefault(start, 0)

    def minimum_cut(self, source, sink):
        """The nodes on the side of the source, after as much has flowed as can."""
        while True:
            came_from = self._reached(source, sink)
            if sink not in came_from:
                return came_from
            way, node = [], sink
            while node != source:
                way.append((came_from[node], node))
                node = came_from[node]
            flow = min(self.capacity[a][b] for a, b in way)
            if flow >= NEVER:
                raise Impossible
            for a, b in way:
                if self.capacity[a][b] < NEVER:
                    self.capacity[a][b] -= flow
                if self.capacity[b][a] < NEVER:
                    self.capacity[b][a] += flow

    def _reached(self, source, sink):
        """Each node that flow can reach, with the one before it on a shortest way."""
        came_from, waiting = {source: None}, collections.deque([source])
        while waiting:
            node = waiting.popleft()
            for other, capacity in self.capacity[node].items():
                if capacity > 0 and other not in came_from:
                    came_from[other] = node
                    if other == sink:
                        return came_from
                    waiting.append(other)
        return came_from
