"""One step of a cell and its derivative, traced as one graph of rows.

    output, after = step(x, before)
    d_x, d_before, d_weights = the gradients of <a, after and output>

The step is called once, with any number of rows; what it computes is read off the graph.
Weights are the tensors that depend on variables alone and meet rows: whatever makes them
of the variables (a slice, a normalisation) stays outside, under automatic differentiation.

What cannot be right is refused here, before anything runs: a step that mixes the rows of
its inputs, changes a variable, or leaves the graph. What it draws is cut out (`drawing`).
"""

import threading
from typing import NamedTuple

import tensorflow as tf

from keras_bptt.cells.dependence import (
    ADJOINT,
    NOISE,
    SEED,
    STATE,
    TRAINED,
    WEIGHT,
    X,
    at_edge,
    between,
    dependence,
    source,
)
from keras_bptt.cells.drawing import Drawing, draws_in
from keras_bptt.cells.refusals import draws_by, mixes, refuse_effects
from keras_bptt.runtime.simplify import simplified
from keras_bptt.runtime.subgraphs import Traced, has_rows, in_order, own_gradients

_NO_NUMBERS = (tf.variant, tf.resource, tf.string)
# What is raised where a step is not to be written into the graph.
_NOT_INLINED = (
    TypeError,
    NotImplementedError,
    tf.errors.OperatorNotAllowedInGraphError,
)
_SWITCHED = threading.RLock()


# Fields of a trace that are no tensors of its graph.
_NO_TENSORS = ("graph", "sources", "output", "trained", "depends", "own_gradient")
_NO_TENSORS += ("drawing",)


class Trace(NamedTuple):
    """A step and its derivative; all tensors are of the traced graph.

    Attributes:
        graph: as it can be run in parts.
        x, before, noise: the step's arguments, which have rows.
        draws: the random numbers of each row that it draws; leaves of the graph.
        inputs: all else that it reads: variables, and tensors from outside.
        sources: of each of `inputs` what it is outside; see `value_outside`.
        after: the states after the step and, where it is none of them, the output.
        output: which of `after` the output is.
        weights: what depends on `inputs` alone and meets rows.
        read: the same as rows meet it: perhaps cast to the dtype of the computation.
        trained: for each weight whether it has a gradient.
        adjoints: those of `after`.
        d_x, d_before, d_weights: the gradients of x, of `before` and of `read`; None where
            there is none.
        depends: for each tensor, by name, what it depends on.
        drawing: how the draws are drawn, in the graph as it was traced.
        own_gradient: whether the gradients are others than those of what is computed.
    """

    graph: Traced
    x: tf.Tensor
    before: tuple
    noise: tuple
    draws: tuple
    inputs: tuple
    sources: tuple
    after: tuple
    output: int
    weights: tuple
    read: tuple
    trained: tuple
    adjoints: tuple
    d_x: tf.Tensor | None
    d_before: tuple
    d_weights: tuple
    depends: dict
    drawing: Drawing
    own_gradient: bool = False

    def simplified(self):
        """The same of a graph that is lean."""
        graph, new_name = simplified(self.graph.graph, self.draws)

        def new(tensor):
            if tensor is None:
                return None
            return graph.get_tensor_by_name(new_name(tensor.name))

        tensors = {
            name: tf.nest.map_structure(new, value)
            for name, value in self._asdict().items()
            if name not in _NO_TENSORS
        }
        leaves = {t.name: self.depends[t.name] for t in _leaves(self.graph.operations)}
        leaves |= {t.name: X for t in tensors["draws"]}
        depends = dependence(in_order(graph), leaves)
        # All that is of rows there is an input, or made of the shape of one.
        given = (self.x, *self.drawing.reads)
        part = Traced(self.graph.graph, set()).part(self.draws, given)
        drawing = self.drawing._replace(part=part)
        changed = {"graph": Traced(graph), "depends": depends, "drawing": drawing}
        return self._replace(**changed, **tensors)

    def of(self, tensor, *kinds):
        """Whether the tensor depends on any of these."""
        return any(self.depends[tensor.name] & kind for kind in kinds)


def trace(name, step, x, before, noise, variables, seed_of=None):
    """Trace a step.

    Args:
        name: of the cell, for errors.
        step: `step(x, before, noise, values) -> (output, after)`, of tensors with rows in
            front; `before`, `noise`, `values` and `after` are flat lists.
        x, before, noise: `tf.TensorSpec` of what has rows.
        variables: (tensor, whether it has a gradient) of each of the step's variables.
        seed_of: says of the handle of a variable how a seed is drawn from it, as a function
            of nothing; None: it is no seed.

    Raises:
        ValueError: for a step whose gradient would be wrong.
    """
    found = {}

    def whole(*arguments):
        graph = tf.compat.v1.get_default_graph()
        with tf.GradientTape() as tape:  # which notes the variables that are read
            output, after = _inlined(step, arguments)
        watched = tape.watched_variables()
        given = arguments, variables, watched, seed_of or (lambda handle: None)
        found.update(_derivative(name, graph, *given, output, after))

    values = [tf.TensorSpec(value.shape, value.dtype) for value, _ in variables]
    function = tf.function(whole, autograph=False)
    graph = function.get_concrete_function(x, before, noise, values).graph
    return Trace(Traced(graph), **found)


def _inlined(step, arguments):
    """What the step returns, with what it calls as functions written into the graph.

    So its tensors can be told apart, and differentiated as often as is asked for. What only
    AutoGraph makes a graph of stays a function.
    """
    with _SWITCHED:  # for the whole process: another thread would find it on
        before = tf.config.functions_run_eagerly()
        tf.config.run_functions_eagerly(True)
        try:
            return step(*arguments)
        except _NOT_INLINED:
            tf.config.run_functions_eagerly(before)
            return step(*arguments)
        finally:
            tf.config.run_functions_eagerly(before)


def _derivative(name, graph, arguments, variables, watched, seed_of, output, after):
    """The rest of the graph, and the fields of its `Trace`."""
    x, before, noise, values = arguments
    refuse_effects(name, graph)
    after, place = _with_output(name, before, output, after)
    inputs, seeds = _inputs(name, graph, values, variables, watched, seed_of)
    leaves = (
        {x.name: X} | {t.name: NOISE for t in noise} | {t.name: STATE for t in before}
    )
    for tensor, _, trained in inputs:
        leaves[tensor.name] = WEIGHT | (trained and TRAINED)
    leaves |= {t.name: SEED for _, tensors in seeds.values() for t in tensors}
    operations = in_order(graph)
    depends = dependence(operations, leaves)
    draws = draws_in(name, operations, depends, after)
    leaves |= {t.name: X for t in draws}
    depends, ways = dependence(operations, leaves), between(after, leaves.keys())
    _refuse_mixing(name, depends, ways)
    for tensor in ways.values():
        if depends[tensor.name] & SEED:
            raise ValueError(
                draws_by(name, f"{tensor.op.name}, which is made of a seed")
            )
    own = _with_own_gradient(graph)
    read = at_edge(ways, depends, WEIGHT, WEIGHT | TRAINED, but=own)
    trained = [bool(depends[t.name] & TRAINED) and t.dtype.is_floating for t in read]
    adjoints = [tf.compat.v1.placeholder(t.dtype, t.shape) for t in after]
    sources = [x] * x.dtype.is_floating + [*before]
    sources += [w for w, moves in zip(read, trained, strict=True) if moves]
    gradients = tf.gradients(
        after, sources, adjoints, stop_gradients=sources, unconnected_gradients="none"
    )
    gradients = iter([g if g is None else tf.convert_to_tensor(g) for g in gradients])
    d_x = next(gradients) if x.dtype.is_floating else None
    d_before = [next(gradients) for _ in before]
    d_weights = [next(gradients) if moves else None for moves in trained]
    leaves |= {a.name: ADJOINT for a in adjoints}
    return {
        "x": x,
        "before": tuple(before),
        "noise": tuple(noise),
        "draws": tuple(draws),
        "inputs": tuple(tensor for tensor, _, _ in inputs),
        "sources": tuple(source for _, source, _ in inputs),
        "after": tuple(after),
        "output": place,
        "weights": tuple(map(_before_cast, read)),
        "read": tuple(read),
        "trained": tuple(trained),
        "adjoints": tuple(adjoints),
        "d_x": d_x,
        "d_before": tuple(d_before),
        "d_weights": tuple(d_weights),
        "depends": dependence(in_order(graph), leaves),
        "drawing": Drawing(
            tuple(draws),
            tuple(tuple(tensors) for _, tensors in seeds.values()),
            tuple(drawn for drawn, _ in seeds.values()),
        ),
    }


def _leaves(operations):
    kinds = "Placeholder", "ReadVariableOp"
    return [op.outputs[0] for op in operations if op.type in kinds]


def _with_output(name, before, output, after):
    """The states after the step and, if it is none of them, the output; and its place."""
    if len(after) != len(before):
        raise ValueError(
            f"The step of {name} must return as many states as it takes. Received: "
            f"{len(after)} states after the step, {len(before)} before it. Return "
            "(output, states), the states as in `state_size`."
        )
    after = [tf.convert_to_tensor(t) for t in after]
    for new, old in zip(after, before, strict=True):
        if new.dtype != old.dtype or not new.shape.is_compatible_with(old.shape):
            raise ValueError(
                f"The step of {name} must return its states as it takes them. Received: "
                f"{new.dtype.name} {new.shape} after the step, {old.dtype.name} "
                f"{old.shape} before it. Cast or reshape the state in `call`."
            )
    after = [tf.ensure_shape(t, s.shape) for t, s in zip(after, before, strict=True)]
    output = tf.convert_to_tensor(output)
    for place, state in enumerate(after):
        if source(output) is source(state):
            return after, place
    if not has_rows(output) or output.dtype != before[0].dtype:
        raise ValueError(
            f"The step of {name} must return an output (batch, ...) of the dtype of its "
            f"states, {before[0].dtype.name}. Received: {output.dtype.name} "
            f"{output.shape}."
        )
    return [*after, output], len(after)


def _inputs(name, graph, values, variables, watched, seed_of):
    """(tensor, what it is outside, whether it has a gradient) of all that has no rows.

    And of each seed how it is drawn, and the tensors that read it.
    """
    found = [(t, *given) for t, given in zip(values, variables, strict=True)]
    of_handles = {id(variable.handle): variable for variable in watched}
    handles, seeds = {}, {}
    for outer, inner in graph.captures:
        if inner.dtype == tf.resource:
            handles[inner.name] = outer
        elif inner.dtype in _NO_NUMBERS:
            raise ValueError(
                f"The step of {name} must read tensors of numbers and variables. Received: "
                f"one that reads a tensor of type {inner.dtype.name} from outside."
            )
        elif not inner.shape.is_fully_defined():
            raise ValueError(
                f"The step of {name} must read nothing from outside but weights and "
                "tensors of a known shape, the same for every example. Received: one that "
                f"reads a tensor of shape {inner.shape}. Concatenate to the inputs, or "
                "make a state of, what belongs to an example."
            )
        else:
            found.append((inner, outer, inner.dtype.is_floating))
    for operation in graph.get_operations():
        for tensor in operation.inputs:
            if tensor.name not in handles:
                continue
            if operation.type != "ReadVariableOp":
                raise ValueError(
                    f"The step of {name} must read variables itself. Received: one that "
                    f"reads a variable within {operation.name} ({operation.type}). Read it "
                    "before, or take @tf.function away from what the step calls."
                )
            read, handle = operation.outputs[0], handles[tensor.name]
            variable = of_handles.get(id(handle))
            if id(handle) not in seeds and read.dtype.is_integer:
                seeds[id(handle)] = seed_of(handle), []
            if seeds.get(id(handle), (None,))[0] is not None:
                seeds[id(handle)][1].append(read)
                continue
            outside = (handle, read.dtype) if variable is None else variable
            found.append((read, outside, variable is not None))
    return found, {key: seed for key, seed in seeds.items() if seed[1]}


def value_outside(source):
    """The tensor that one of the `sources` of a trace is, outside of the step."""
    if isinstance(source, tuple):
        return tf.raw_ops.ReadVariableOp(resource=source[0], dtype=source[1])
    return tf.convert_to_tensor(source)


def _refuse_mixing(name, depends, ways):
    """Raise where a tensor without rows is made of what has some."""
    for tensor in ways.values():
        of_rows = depends[tensor.name] & (X | NOISE | STATE)
        if (
            of_rows
            and tensor.shape.is_fully_defined()
            and tensor.dtype not in _NO_NUMBERS
        ):
            raise ValueError(mixes(name, f"{tensor.op.name} ({tensor.op.type})"))


def _with_own_gradient(graph):
    """The names of tensors that are made by a `tf.custom_gradient`, and made of those.

    Its gradient is known where it was traced alone, so it is part of the step.
    """
    own, found = own_gradients(graph.as_graph_def()), set()
    for operation in in_order(graph):
        if operation.name in own or any(t.name in found for t in operation.inputs):
            found |= {t.name for t in operation.outputs}
    return found


def _before_cast(tensor):
    """The wider numbers that a weight is cast from: its gradient is added in these."""
    if tensor.op.type == "Cast" and tensor.dtype.is_floating:
        wider = tensor.op.inputs[0]
        if wider.dtype.is_floating and wider.dtype.size > tensor.dtype.size:
            return wider
    return tensor
