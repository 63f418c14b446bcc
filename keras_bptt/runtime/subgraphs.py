"""Parts of a traced graph, each run by itself: from any tensors of it to any others.

A part is imported into the graph at hand as a function of its own, which a tape sees as one
operation with a gradient (what is imported by itself no tape sees), and which may be
imported where control dependencies are in force.

The traced graph is one of rows: the first axis of its inputs is of any size. What is asked
of such a tensor is often its shape alone, and then the tensor itself is neither computed
nor kept: `Traced.sized` are the operations that need no more than the number of rows.
"""

import contextlib
import functools
import hashlib

import numpy as np
import tensorflow as tf

from keras_bptt.runtime.tensors import wide, widened

# A conditional that has a state is one around an assertion.
_EFFECTS = {"Assert", "CheckNumerics", "If", "PrintV2"}
# What these operations return, their input's shape tells.
_OF_SHAPE = {"Shape", "ShapeN", "ZerosLike", "OnesLike"}
# Attributes that say where an operation was made, not what it does: colocation; the custom
# gradient, whose name another process does not know; and what has been inferred.
_OF_ITS_MAKING = ("_class", "_gradient_op_type", "_output_shapes")


class Traced:
    """A graph whose parts can be run.

    Attributes:
        graph: the graph that was traced.
        nodes: its operations by name, as they are stored.
        library: the functions that they call.
        has_own_gradients: whether a `tf.custom_gradient` is part of it. Parts leave it out:
            their derivatives are those of what they compute.
        sized: of the operations of `_OF_SHAPE` whose inputs have rows of a known shape,
            each output by name, with the operation's type, dtype and that shape.

    Args:
        not_rows: the names of tensors whose first axis, unknown as it is, is not that of
            rows. None: nothing is known yet.
    """

    def __init__(self, graph, not_rows=None):
        definition = graph.as_graph_def()
        self.graph, self.is_tried = graph, not_rows is not None
        self._not_rows = not_rows or set()
        self.operations = in_order(graph)
        self.has_own_gradients = bool(own_gradients(definition))
        self.nodes = {node.name: _stripped(node) for node in definition.node}
        self.library = definition.library
        for function in self.library.function:
            for node in function.node_def:
                _stripped(node)
        self.sized = {
            output.name: (operation.type, output.dtype, tuple(tensor.shape[1:]))
            for operation in self.operations
            if operation.type in _OF_SHAPE
            for tensor, output in zip(operation.inputs, operation.outputs, strict=False)
            if self.is_tried and self.has_rows(tensor)
        }

    def has_rows(self, tensor):
        """Whether a tensor has a row of known shape for each row of the inputs."""
        return has_rows(tensor) and tensor.name not in self._not_rows

    def fingerprint(self, *marked):
        """A digest of what the graph computes from its inputs, whatever it calls them.

        Args:
            marked: tensors of which it matters which ones they are.
        """
        digest = hashlib.sha256()
        place = {}
        functions = _digests(self.library)
        for number, operation in enumerate(self.operations):
            place[operation.name] = number
            inputs = [(place[t.op.name], t.value_index) for t in operation.inputs]
            controls = [place.get(op.name) for op in operation.control_inputs]
            digest.update(repr((operation.type, inputs, controls)).encode())
            digest.update(_attributes(self.nodes[operation.name], functions))
        marks = [[(place[t.op.name], t.value_index) for t in each] for each in marked]
        digest.update(repr(marks).encode())
        return digest.hexdigest()

    def part(self, outputs, inputs, is_wide=False, effects=()):
        """The part that computes `outputs` from `inputs`, which are tensors of the graph.

        Args:
            is_wide: compute what is of half precision in float32.
            effects: operations that are to run too, such as assertions.
        """
        return Part(self, tuple(outputs), tuple(inputs), is_wide, tuple(effects))

    def effects(self, inputs):
        """The assertions and prints that can run where these tensors are known."""
        given = {t.name for t in inputs}
        found = []
        for operation in self.operations:
            if operation.type in _EFFECTS:
                wanted = [t for t in operation.inputs if t.name not in given]
                with contextlib.suppress(LookupError):
                    _needed(self, wanted, given)
                    found.append(operation)
        return found


class Part:
    """A function of tensors: see `Traced.part`. It raises where it lacks an input."""

    def __init__(self, traced, outputs, inputs, is_wide, effects):
        self.outputs, self.inputs = outputs, inputs
        given = {t.name for t in inputs}
        found = {t.name for t in outputs} & given
        read = [t for operation in effects for t in operation.inputs]
        self.operations, self._sized = _needed(traced, [*outputs, *read], given)
        known = {operation.name for operation in self.operations}
        self.operations += [op for op in effects if op.name not in known]
        self._effects = [operation.name for operation in effects]
        self._wanted = [t.name for t in outputs if t.name not in found]
        self._definition = tf.compat.v1.GraphDef()
        self._definition.versions.CopyFrom(traced.graph.as_graph_def().versions)
        kept = {operation.name for operation in self.operations}
        for operation in self.operations:
            node = self._definition.node.add()
            node.CopyFrom(traced.nodes[operation.name])
            names = [n for n in node.input if n[0] != "^" or n[1:] in kept]
            del node.input[:]
            node.input.extend(names)
        calls = any(_functions_of(node) for node in self._definition.node)
        if calls:
            self._definition.library.CopyFrom(traced.library)
        # What calls functions cannot be widened: its results are.
        self.widened, self._results_widened = is_wide and not calls, is_wide
        if self.widened:
            for node in self._definition.node:
                _widen(node)
        self._sized = {name: traced.sized[name] for name in self._sized}
        self._have_rows = [traced.is_tried and traced.has_rows(t) for t in outputs]
        self._rows = next((i for i, t in enumerate(inputs) if has_rows(t)), None)
        self._function = tf.function(self._imported, autograph=False)
        # It is traced for each number of rows: see `execution`.
        self._function._omit_frequent_tracing_warning = True

    def __call__(self, values):
        """The outputs, from the values of the inputs."""
        if not self.operations and not self._sized:
            given = dict(zip((t.name for t in self.inputs), values, strict=True))
            return [given[t.name] for t in self.outputs]
        given = [
            tf.cast(v, self.dtype_of(t))
            for t, v in zip(self.inputs, values, strict=True)
        ]
        function = self._function
        if tf.config.functions_run_eagerly():
            # What is imported is a graph, whatever else is to run without one.
            function = function.get_concrete_function(given)
        results = list(function(given))
        if self._results_widened:
            results = [widened(t) if t.dtype.is_floating else t for t in results]
        return results

    def dtype_of(self, tensor):
        """Of an input or output of the graph, where this part computes it."""
        dtype = tensor.dtype
        return wide(dtype) if self.widened and dtype.is_floating else dtype

    def _imported(self, values):
        given = dict(zip((t.name for t in self.inputs), values, strict=True))
        rows = None
        if self._rows is not None:
            first = values[self._rows]
            rows = tf.shape(first)[0] if first.shape[0] is None else first.shape[0]
        used = {i for node in self._definition.node for i in node.input}
        used = {name if ":" in name else f"{name}:0" for name in used}
        sized = {}
        for name, (kind, dtype, row) in self._sized.items():
            dtype = wide(dtype) if self.widened and dtype.is_floating else dtype
            sized[name] = _of_shape(kind, dtype, [rows, *row])
        known = given | sized
        found = tf.graph_util.import_graph_def(
            self._definition,
            input_map={name: t for name, t in known.items() if name in used},
            return_elements=[
                *self._effects,
                *(n for n in self._wanted if n not in known),
            ],
            name="",
        )
        number = len(self._effects)
        found, effects = iter(found[number:]), found[:number]
        results = []
        for output, of_rows in zip(self.outputs, self._have_rows, strict=True):
            name = output.name
            result = known[name] if name in known else next(found)
            if of_rows and isinstance(rows, int):
                result = tf.ensure_shape(result, [rows, *output.shape[1:]])
            elif output.shape.rank is not None:
                result = tf.ensure_shape(result, output.shape)
            results.append(result)
        if not effects:
            return results
        with tf.control_dependencies(effects):
            return [tf.identity(result) for result in results]


def in_order(graph):
    """The operations of a graph, each after those whose outputs it reads.

    So they are made, but for a loop: its gradient adds to it what was made later.
    """
    found, begun = [], set()
    for first in graph.get_operations():
        waiting = [first]
        while waiting:
            operation = waiting[-1]
            missing = [t.op for t in operation.inputs if t.op.name not in begun]
            if operation.name not in begun and missing:
                waiting += missing
                continue
            waiting.pop()
            if operation.name not in begun:
                begun.add(operation.name)
                found.append(operation)
    return found


def own_gradients(definition):
    """The names of operations with a `tf.custom_gradient`, their own or in a function."""

    def is_own(node):
        name = (
            node.attr["_gradient_op_type"].s
            if "_gradient_op_type" in node.attr
            else b""
        )
        return name.startswith(b"CustomGradient")

    functions = definition.library.function
    within = any(is_own(node) for function in functions for node in function.node_def)
    return {
        node.name
        for node in definition.node
        if is_own(node) or (within and _functions_of(node))
    }


def has_rows(tensor):
    """Whether it is of any number of rows of one known shape, as far as its shape tells."""
    shape = tensor.shape
    return (
        shape.rank is not None
        and shape.rank > 0
        and shape[0] is None
        and shape[1:].is_fully_defined()
    )


def numbers_of(tensor):
    """How many numbers a row of it has."""
    return int(np.prod(tensor.shape[1:], dtype=int))


def _needed(traced, outputs, given):
    """The operations between, in order, and the names of the sized ones at their edge."""
    needed, sized = set(), set()
    waiting = [t for t in outputs if t.name not in given]
    while waiting:
        tensor = waiting.pop()
        if tensor.name in traced.sized:
            sized.add(tensor.name)
            continue
        operation = tensor.op
        if operation.name in needed:
            continue
        if operation.type in ("Placeholder", "ReadVariableOp"):
            raise LookupError(f"This part is to be computed without {tensor.name}.")
        needed.add(operation.name)
        waiting += [t for t in operation.inputs if t.name not in given]
    return [op for op in traced.operations if op.name in needed], sized


def _of_shape(kind, dtype, shape):
    if kind == "ZerosLike":
        return tf.zeros(shape, dtype)
    if kind == "OnesLike":
        return tf.ones(shape, dtype)
    return tf.cast(tf.stack(shape), dtype)


def _stripped(node):
    for name in _OF_ITS_MAKING:
        if name in node.attr:
            del node.attr[name]
    return node


def _functions_of(node):
    """The names of the functions that an operation calls."""
    names = []
    for attribute in node.attr.values():
        names += [attribute.func.name] * attribute.HasField("func")
        names += [function.name for function in attribute.list.func]
    return names


def _digests(library):
    """Of each function what tells it from others, without the names that are made up."""
    functions = {f.signature.name: f for f in library.function}

    @functools.cache
    def digest(name):
        if name not in functions:
            return name.encode()
        function, found = functions[name], hashlib.sha256()
        signature = function.signature
        for argument in (*signature.input_arg, *signature.output_arg):
            found.update(argument.SerializeToString(deterministic=True))
        for node in function.node_def:
            found.update(repr((node.name, node.op, list(node.input))).encode())
            found.update(_attributes(node, digest))
        found.update(repr(sorted(function.ret.items())).encode())
        return found.digest()

    return digest


def _attributes(node, digest):
    found = b""
    for name, attribute in sorted(node.attr.items()):
        if attribute.HasField("func") or attribute.list.func:
            called = [digest(function) for function in _functions_of(node)]
            found += name.encode() + b"".join(called)
        else:
            found += name.encode() + attribute.SerializeToString(deterministic=True)
    return found


def _widen(node):
    """Let an operation on half precision be one on float32."""
    half = {tf.float16.as_datatype_enum, tf.bfloat16.as_datatype_enum}
    for attribute in node.attr.values():
        kind = attribute.WhichOneof("value")
        if kind == "type" and attribute.type in half:
            attribute.type = tf.float32.as_datatype_enum
        elif kind == "list" and attribute.list.type:
            types, single = list(attribute.list.type), tf.float32.as_datatype_enum
            del attribute.list.type[:]
            attribute.list.type.extend(single if t in half else t for t in types)
        elif kind == "tensor" and attribute.tensor.dtype in half:
            numbers = tf.make_ndarray(attribute.tensor).astype("float32")
            attribute.tensor.CopyFrom(tf.make_tensor_proto(numbers))
