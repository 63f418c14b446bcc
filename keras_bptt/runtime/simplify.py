"""Makes a traced graph of rows lean, before it is divided.

TensorFlow writes a gradient for sizes that only run time tells: of each operation that
broadcasts it computes which axes to add over, though here nothing but the number of rows is
unknown. And it makes the gradient of parts of a tensor a sum of tensors filled with zeros.

    sum(d, axes that are none)          d
    reshape(d, its own shape)           d
    identity(t)                         t
    the sum of d_1, d_2, ..., each filled with zeros beside it    concat(d_1, d_2, ...)
"""

import tensorflow as tf

from keras_bptt.runtime.subgraphs import has_rows


def simplified(graph):
    """A graph that computes the same, and a function from its tensors' names to the new."""
    renamed = {}

    def new_name(name):
        while name in renamed:
            name = renamed[name]
        return name

    for _ in range(3):
        rewriting = _Rewriting(graph)
        rewriting.run()
        if not rewriting.changed:
            break
        renamed.update(rewriting.renamed)
        graph = tf.Graph()
        with graph.as_default():
            tf.graph_util.import_graph_def(rewriting.definition(), name="")
    return graph, new_name


class _Rewriting:
    """One pass over a graph."""

    def __init__(self, graph):
        self.graph = graph
        self.nodes = graph.as_graph_def()
        self.by_name = {node.name: node for node in self.nodes.node}
        self.renamed, self.added, self.changed = {}, [], False

    def run(self):
        for operation in self.graph.get_operations():
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

    def _constant(self, name, values):
        with tf.Graph().as_default() as graph:
            tf.constant(values, tf.int32, name=name)
        self.added += graph.as_graph_def().node
        return f"{name}:0"

    # --- One for each type of operation

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

    def _addn(self, operation):
        """Parts of one tensor, side by side, and all else."""
        parts, others = [], []
        for tensor in operation.inputs:
            found = _part_of(tensor)
            (others if found is None else parts).append(found or tensor)
        parts.sort(key=lambda part: part[0])
        edges = [0, *[end for _, end, _, _ in parts]]
        begins = [begin for begin, _, _, _ in parts]
        if not parts or begins != edges[:-1] or edges[-1] != parts[0][2]:
            return
        node = self.by_name[operation.name]
        joined = node
        if others:
            joined = tf.compat.v1.NodeDef(name=f"{operation.name}/parts")
            self.added.append(joined)
            node.input[:] = [joined.name, *[t.name.removesuffix(":0") for t in others]]
            node.attr["N"].i = len(others) + 1
        axis = self._constant(f"{operation.name}/axis", -1)
        joined.op = "ConcatV2"
        joined.input[:] = [*[t.name for *_, t in parts], axis.removesuffix(":0")]
        joined.attr["N"].i = len(parts)
        joined.attr["T"].type = operation.outputs[0].dtype.as_datatype_enum
        joined.attr["Tidx"].type = tf.int32.as_datatype_enum
        self.changed = True


def _shape_in(tensor):
    """The shape that a tensor of integers holds, None for the number of rows; or None."""
    if tensor.op.type == "Shape" and has_rows(tensor.op.inputs[0]):
        return tensor.op.inputs[0].shape.as_list()
    value = tf.get_static_value(tensor)
    return None if value is None else [int(size) for size in value]


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


def _part_of(tensor):
    """(begin, end, size, d) where the tensor is d in a last axis of zeros; else None."""
    operation = tensor.op
    if operation.type != "StridedSliceGrad" or not has_rows(operation.inputs[4]):
        return None
    whole = _shape_in(operation.inputs[0])
    begin, end, strides = map(tf.get_static_value, operation.inputs[1:4])
    if whole is None or any(t is None for t in (begin, end, strides)):
        return None
    masks = {
        name: operation.get_attr(f"{name}_mask")
        for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
    }
    last = len(begin) - 1
    simple = not masks["new_axis"] and not masks["shrink_axis"] and (strides == 1).all()
    for i in range(last):
        all_of_it = masks["begin"] >> i & 1 and masks["end"] >> i & 1
        simple = simple and (all_of_it or masks["ellipsis"] >> i & 1)
    if not simple or masks["ellipsis"] >> last & 1:
        return None
    if not masks["ellipsis"] and len(begin) != len(whole):
        return None
    taken = slice(
        None if masks["begin"] >> last & 1 else int(begin[last]),
        None if masks["end"] >> last & 1 else int(end[last]),
    )
    first, after, _ = taken.indices(whole[-1])
    return first, after, whole[-1], operation.inputs[4]
