"""How a computation is run: as a cached graph, compiled by XLA, on how many cores."""

import functools
import os
from collections.abc import Callable

import tensorflow as tf


def run(function: Callable, options, *tensors):
    """Return `function(options, *tensors)`, as one cached graph where the caller is eager.

    An eager `tf.while_loop` is a Python loop over single operations. The function, its
    hashable `options` and the widths of the tensors are the key of the cache: a graph may
    be for any batch and any number of steps, but not for any number of units. A graph that
    is unrolled is for one number of steps. So is one whose blocks are as long as the root
    of it: the two passes must agree on that, and a graph for any number rounds it.
    """
    if not tf.executing_eagerly():
        return function(options, *tensors)
    one_length = any(
        getattr(option, "unroll", False) is True
        or getattr(option, "checkpoint_every", None) == "sqrt"
        for option in tf.nest.flatten(options)
    )
    shapes = _shapes(tensors)
    known = shapes if one_length else (shape[-1:] for shape in shapes)
    key = (*known, switches())
    return _graph(function, options, key, False)(*tensors)


def call(function: Callable, options, jit_compile, *tensors):
    """Return `function(options, *tensors)` as a call of one cached graph, from a graph.

    Calls of the same shapes share a graph, so that one which is called for many blocks of
    steps is traced once. With `jit_compile` XLA compiles it, once for each batch that
    comes; inside a graph that XLA compiles as a whole there is nothing to add.
    """
    if within_xla():
        return function(options, *tensors)
    key = (*_shapes(tensors), switches())
    return _graph(function, options, key, jit_compile)(*tensors)


def _shapes(tensors):
    given = (t for t in tf.nest.flatten(tensors) if tf.is_tensor(t))
    return [tuple(t.shape) for t in given if t.dtype.is_floating]


@functools.lru_cache(maxsize=256)
def _graph(function, options, key, jit_compile):
    graph = tf.function(
        functools.partial(function, options),
        reduce_retracing=True,
        autograph=False,
        jit_compile=jit_compile or None,
    )
    # TensorFlow warns where a function is traced often, and names it. A caller knows none
    # of these, and cannot trace them less. Where no version asks for it, it says nothing.
    graph._omit_frequent_tracing_warning = True
    return graph


def switches():
    """What is switched for the whole process and changes how a graph is traced or compiled.

    A graph of before must not serve after, nor one that was made while something was on.
    """
    return (
        op_callbacks(),
        tf.config.experimental.tensor_float_32_execution_enabled(),
        _deterministic(),
    )


def op_callbacks():
    """What looks at every operation that is made, and adds some of its own to a graph.

    So do `tf.debugging.enable_check_numerics` and `enable_dump_debug_info`. TensorFlow
    itself looks here; should a version have another place, the answer is: nothing.
    """
    try:
        from tensorflow.python.eager.context import context

        return tuple(context().op_callbacks)
    except (ImportError, AttributeError):
        return ()


def _deterministic():
    """Whether `tf.config.experimental.enable_op_determinism` was called; as above."""
    try:
        from tensorflow.python.framework.config import is_op_determinism_enabled

        return is_op_determinism_enabled()
    except ImportError:
        return False


def within_xla():
    """Whether the graph that is being built is compiled by XLA as a whole.

    TensorFlow's own loops ask the same of the same two attributes. Should a version have
    others, the answer is no: the result is right all the same, its compilation slower.
    """
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    while graph is not None:
        context = getattr(graph, "_get_control_flow_context", lambda: None)()
        while context is not None:
            if context.IsXLAContext():
                return True
            context = context.outer_context
        graph = getattr(graph, "outer_graph", None)
    return False


def cores():
    """The processor cores that independent parts of a graph may run on; 1 beside a GPU."""
    if tf.config.get_visible_devices("GPU"):
        return 1
    available = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    inter = tf.config.threading.get_inter_op_parallelism_threads()
    return min(len(available(0)), inter or os.cpu_count() or 1)
