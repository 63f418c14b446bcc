"""Makes a traced graph of rows lean, before it is divided.

TensorFlow writes a gradient for sizes that only run time tells: of each operation that
broadcasts it computes which axes to add over, though here nothing but the number of rows is
unknown. And it makes the gradient of parts of a tensor a sum of tensors filled with zeros.

    sum(d, axes that are none)          d
    reshape(d, its own shape)           d
    identity(t)                         t
    the sum of d_1, d_2, ..., each filled with zeros beside it    concat(d_1, d_2, ...)
    the part of d where t stood in a concat, by the shape of t    that by numbers
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_bptt.runtime.subgraphs import has_rows


def simplified(graph, given=()):
    """A graph that computes the same, and a function from its tensors' names to the new.

    Args:
        given: tensors that are leaves of the new graph, whatever made them.
    """
    renamed, given = {}, {t.name for t in given}

    def new_name(name):
        while name in renamed:
            name = renamed[name]
        return name

    for alone in False, True, True:
        rewriting = _Rewriting(graph, alone, given)
        rewriting.run()
        if not rewriting.changed:
            continue
        renamed.update(rewriting.renamed)
        graph = tf.Graph()
        with graph.as_default():
            tf.graph_util.import_graph_def(rewriting.definition(), name="")
    return graph, new_name


class _Rewriting:
    """One pass over a graph.

    Args:
        alone: whether to rewrite parts of a tensor that are no whole together.
        given: names of tensors that are leaves.
    """

    def __init__(self, graph, alone, given):
        self.alone, self.given = alone, given
        self.graph = graph
        self.nodes = graph.as_graph_def()
        self.by_name = {node.name: node for node in self.nodes.node}
        self.renamed, self.added, self.changed = {}, [], False

    def run(self):
        for operation in self.graph.get_operations():
            if any(t.name in self.given for t in operation.outputs):
                if operation.type != "Placeholder":
                    self._leaf(operation)
                continue
            rewrite = getattr(self, f"_{operation.type.lower()}", None)
            # What has been rewritten before is read by nobody.
            if rewrite is not None and any(t.consumers() for t in operation.outputs):
                rewrite(operation)
        for node in self.nodes.node:
            for i, name in enumerate(node.input):
                node.input[i] = self._input(name)

    def definition(self):
        self.nodes.node.extend(self.added)
        return self.nodes

    def _input(self, name):
        """A node's input, renamed: of the first output a node's input leaves away :0."""
        if name.startswith("^"):
            return name
        full = name if ":" in name else f"{name}:0"
        while full in self.renamed:
            full = self.renamed[full]
        return full.removesuffix(":0")

    def _rename(self, old, new):
        self.renamed[old.name] = new
        self.changed = True

    def _constant(self, name, values, dtype=tf.int32):
        with tf.Graph().as_default() as graph:
            tf.constant(values, dtype, name=name)
        self.added += graph.as_graph_def().node
        return f"{name}:0"

    # --- One for each type of operation

    def _leaf(self, operation):
        """What is given from outside, whose static shape stays."""
        node, output = self.by_name[operation.name], operation.outputs[0]
        self._set(node, "Placeholder", [], dtype=output.dtype)
        node.attr["shape"].shape.CopyFrom(output.shape.as_proto())

    _readvariableop = _leaf

    def _identity(self, operation):
        self._rename(operation.outputs[0], operation.inputs[0].name)

    def _broadcastgradientargs(self, operation):
        shapes = [_shape_in(t) for t in operation.inputs]
        if operation.inputs[0].dtype != tf.int32 or None in shapes:
            return
        axes = _added_over(*shapes)
        if axes is None:
            return
        for i, each in enumerate(axes):
            self._rename(
                operation.outputs[i], self._constant(f"{operation.name}/of_{i}", each)
            )

    def _sum(self, operation):
        axes = tf.get_static_value(operation.inputs[1])
        if axes is not None and axes.size == 0:
            self._rename(operation.outputs[0], operation.inputs[0].name)

    def _reshape(self, operation):
        given, asked = operation.inputs[0].shape, _shape_in(operation.inputs[1])
        if has_rows(operation.inputs[0]) and asked == given.as_list():
            self._rename(operation.outputs[0], operation.inputs[0].name)

    def _slice(self, operation):
        """The gradient of a concat, which asks for shapes of what need not be there."""
        d, begin, size = operation.inputs
        place = _place_in_concat(begin, size)
        if place is None:
            return
        axis, at, number = place
        rank = len(d.shape)
        starts, sizes = [0] * rank, [-1] * rank
        starts[axis], sizes[axis] = at, number
        for i, values in (1, starts), (2, sizes):
            name = f"{operation.name}/numbers_{i}"
            self.by_name[operation.name].input[i] = _short(self._constant(name, values))
        self.changed = True

    def _addn(self, operation):
        """Parts of one tensor, side by side, and all else."""
        parts, others = [], []
        for tensor in operation.inputs:
            part = _part_of(tensor)
            (others if part is None or part.is_number else parts).append(part or tensor)
        parts.sort()
        edges = [0, *[part.end for part in parts]]
        if (
            not parts
            or len({part.axis for part in parts}) > 1
            or [part.begin for part in parts] != edges[:-1]
            or edges[-1] != parts[0].size
        ):
            return
        others = [t.whole if isinstance(t, _Part) else t for t in others]
        node = self.by_name[operation.name]
        joined = node
        if others:
            joined = self._node(f"{operation.name}/parts")
            node.input[:] = [joined.name, *map(_short, others)]
            node.attr["N"].i = len(others) + 1
        axis = self._constant(f"{operation.name}/axis", parts[0].axis)
        self._set(
            joined,
            "ConcatV2",
            [*[part.of for part in parts], axis],
            N=len(parts),
            T=operation.outputs[0].dtype,
            Tidx=tf.int32,
        )

    def _stridedslicegrad(self, operation):
        """A part beside zeros, chosen by place: XLA would make a pad of it."""
        if _is_view(operation):
            shape, *_, d = operation.inputs
            node, dtype = self.by_name[operation.name], d.dtype
            self._set(node, "Reshape", [d, shape], T=dtype, Tshape=shape.dtype)
            return
        part = _part_of(operation.outputs[0])
        if part is None or not self.alone:
            return
        name, dtype = operation.name, part.of.dtype
        places = np.arange(part.size)
        values = part.of
        if part.is_number:
            axis = self._constant(f"{name}/axis", part.axis)
            values = self._set(
                self._node(f"{name}/number"),
                "ExpandDims",
                [values, axis],
                T=dtype,
                Tdim=tf.int32,
            )
        else:
            source = np.clip(places - part.begin, 0, part.end - part.begin - 1)
            source = self._constant(f"{name}/source", source)
            axis = self._constant(f"{name}/axis", part.axis)
            values = self._set(
                self._node(f"{name}/spread"),
                "GatherV2",
                [values, source, axis],
                Tparams=dtype,
                Tindices=tf.int32,
                Taxis=tf.int32,
            )
        real = (places >= part.begin) & (places < part.end)
        real = real.reshape([-1] + [1] * (part.rank - part.axis - 1))
        real = self._constant(f"{name}/real", real, tf.bool)
        zero = self._constant(f"{name}/zero", 0, dtype)
        self._set(self.by_name[name], "SelectV2", [real, values, zero], T=dtype)

    def _node(self, name):
        node = tf.compat.v1.NodeDef(name=name)
        self.added.append(node)
        return node

    def _set(self, node, kind, inputs, **attributes):
        """Make another operation of a node; returns the name of its output."""
        node.op = kind
        node.input[:] = map(_short, inputs)
        for name in list(node.attr):
            del node.attr[name]
        for name, value in attributes.items():
            if isinstance(value, int):
                node.attr[name].i = value
            else:
                node.attr[name].type = value.as_datatype_enum
        self.changed = True
        return f"{node.name}:0"


class _Part(NamedTuple):
    """`whole` is `of` in these places of an axis, and zeros beside it.

    Attributes:
        is_number: whether `of` lacks the axis.
    """

    begin: int
    end: int
    size: int
    axis: int
    rank: int
    is_number: bool
    of: tf.Tensor
    whole: tf.Tensor


def _short(tensor):
    name = tensor if isinstance(tensor, str) else tensor.name
    return name.removesuffix(":0")


def _shape_in(tensor):
    """The shape that a tensor of integers holds, None for the number of rows; or None."""
    if tensor.op.type in ("Shape", "ShapeN"):
        of = tensor.op.inputs[tensor.value_index]
        if has_rows(of) or of.shape.is_fully_defined():
            return of.shape.as_list()
    value = tf.get_static_value(tensor)
    return None if value is None else [int(size) for size in value]


def _place_in_concat(begin, size):
    """(axis, place, number) of a part, where these tensors tell them of a concat; or None.

    `begin` is then made of the shapes of all parts, `size` the shape of this one.
    """
    if begin.op.type != "ConcatOffset":
        return None
    axis, *shapes = begin.op.inputs
    shapes, number = list(map(_shape_in, shapes)), _shape_in(size)
    # It comes modulo the rank, lest it be negative.
    axis = tf.get_static_value(axis.op.inputs[0] if axis.op.inputs else axis)
    if axis is None or number is None or None in shapes:
        return None
    axis = int(axis) % len(number)
    before = [shape[axis] for shape in shapes[: begin.value_index]]
    if None in (number[axis], *before):
        return None
    return axis, sum(before), number[axis]


def _added_over(left, right):
    """The axes over which the gradients of two broadcast tensors are added; or None."""
    rank = max(len(left), len(right))
    left = [1] * (rank - len(left)) + left
    right = [1] * (rank - len(right)) + right
    axes = [], []
    for axis, (a, b) in enumerate(zip(left, right, strict=True)):
        if a == b:
            # Rows of both; or 1 of both, where it makes no difference.
            continue
        if 1 not in (a, b):
            return None
        axes[0 if a == 1 else 1].append(axis)
    return axes


def _is_view(operation):
    """Whether the slice took all, and did but add axes."""
    count = operation.inputs[1].shape[0]
    masks = {
        name: operation.get_attr(f"{name}_mask")
        for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
    }
    all_of_it = masks["begin"] & masks["end"] | masks["ellipsis"] | masks["new_axis"]
    strides = tf.get_static_value(operation.inputs[3])
    return (
        count is not None
        and all_of_it == 2**count - 1
        and not masks["shrink_axis"]
        and strides is not None
        and (strides == 1).all()
    )


def _part_of(tensor):
    """The `_Part` that a gradient of a slice is, if it is one of one axis."""
    operation = tensor.op
    if operation.type != "StridedSliceGrad" or not operation.inputs[4].shape.rank:
        return None
    sizes = _shape_in(operation.inputs[0])
    spec = list(map(tf.get_static_value, operation.inputs[1:4]))
    if sizes is None or any(t is None for t in spec):
        return None
    masks = {
        name: operation.get_attr(f"{name}_mask")
        for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
    }
    if masks["new_axis"]:
        return None
    found, axis = [], 0
    for i, (begin, end, stride) in enumerate(zip(*map(list, spec), strict=True)):
        if masks["ellipsis"] >> i & 1:
            axis += len(sizes) - len(spec[0]) + 1
            continue
        if masks["shrink_axis"] >> i & 1:
            found.append((axis, int(begin), int(begin) + 1 or None, True))
        elif stride != 1:
            return None
        else:
            begin = None if masks["begin"] >> i & 1 else int(begin)
            end = None if masks["end"] >> i & 1 else int(end)
            if (begin, end) != (None, None):
                found.append((axis, begin, end, False))
        axis += 1
    if len(found) != 1 or sizes[found[0][0]] is None:
        return None
    axis, begin, end, is_number = found[0]
    begin, end, _ = slice(begin, end).indices(sizes[axis])
    rank, of = len(sizes), operation.inputs[4]
    return _Part(begin, end, sizes[axis], axis, rank, is_number, of, tensor)
