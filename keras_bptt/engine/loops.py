"""A loop over time: one step after the other, whose inputs are read where they are."""

import tensorflow as tf

from keras_bptt.runtime.execution import within_xla
from keras_bptt.runtime.tensors import size_of

# Steps an iteration of a loop that TensorFlow executes operation by operation: what an
# iteration costs beside its steps is shared by so many. XLA gains nothing by it.
STEPS_PER_ITERATION = 8


def scan(
    step,
    carry,
    inputs,
    size,
    shapes,
    *,
    valid=None,
    reverse=False,
    unroll=False,
    batch=None,
):
    """Run `carry, outputs = step(carry, inputs(t))` over time; stack the outputs.

    Args:
        step: the function of one step.
        carry: tensors (rows, ...), what goes from step to step; the first of them tells
            the dtype of the outputs.
        inputs: a function of t = 0 ... size - 1 that returns what step t reads. It reads
            slices of whatever is there, which is quicker than to lay out anew what the
            loop reads.
        size: the number of steps, an integer or, where only run time tells, a tensor.
        shapes: of each output the shape of a row.
        valid: how many of the steps to run, the first so many; the other outputs are 0.
            None: all.
        reverse: from the last step to the first. Outputs stand at their step's place.
        unroll: True: write every step into the graph. An integer: so many steps an
            iteration of the loop. False: as many as pay.
        batch: how many rows an output has. None: as many as the carry.

    Returns:
        The last carry, and a list of the stacked outputs (size, batch, ...).
    """
    if unroll is True:
        outputs = [None] * size
        for t in reversed(range(size)) if reverse else range(size):
            carry, outputs[t] = step(carry, inputs(t))
        return carry, [tf.stack(each) for each in zip(*outputs, strict=True)]

    steps = size if valid is None else valid
    known = steps if isinstance(steps, int) else None
    first = tf.nest.flatten(carry)[0]

    def loop(number, i, last, carry, arrays):
        """As many iterations of `number` steps as there are steps for."""

        def body(i, last, carry, arrays):
            before = carry
            for k in range(number):
                back = steps - 1 - i - k if valid is None else last - k
                t = back if reverse else i + k
                carry, outputs = step(carry, inputs(t))
                arrays = [a.write(t, o) for a, o in zip(arrays, outputs, strict=True)]
            last = () if valid is None else last - number
            return i + number, last, same_shapes(carry, before), arrays

        # A comparison with a constant: XLA then knows the number of iterations.
        end = steps - steps % number
        return tf.while_loop(lambda i, *_: i < end, body, (i, last, carry, arrays))

    number = int(unroll) or (1 if within_xla() else STEPS_PER_ITERATION)
    for most in (known, size):
        number = max(1, min(number, most)) if isinstance(most, int) else number
    batch = size_of(first, 0) if batch is None else batch
    rows = batch if isinstance(batch, int) else None
    arrays = [
        array(first.dtype, size, [rows, *shape], [batch, *shape]) for shape in shapes
    ]
    # Not t computed from `valid`: XLA would compile for each of its values.
    last = () if valid is None else steps - 1
    state = loop(number, 0, last, carry, arrays)
    if number > 1 and (known is None or known % number):
        state = loop(1, *state)
    _, _, carry, arrays = state
    known = size if isinstance(size, int) else None
    stacked = [
        tf.ensure_shape(stack(each, size, [batch, *shape]), [known, rows, *shape])
        for each, shape in zip(arrays, shapes, strict=True)
    ]
    return carry, stacked


def same_shapes(new, before):
    """`new` with the static shapes of `before`, as a loop wants it of what it carries."""
    return tf.nest.map_structure(lambda n, b: tf.ensure_shape(n, b.shape), new, before)


def array(dtype, size, shape, run_time_shape):
    """A TensorArray of `size` tensors of one shape, as it is known and at run time.

    LiteRT lays an exported one out as a tensor. It does so for a shape that the graph
    computes, but not for the constant with unknown sizes that `tf.TensorArray` makes of it.
    """
    known = tf.TensorShape(shape).is_fully_defined()
    if known or within_xla() or tf.executing_eagerly():
        return tf.TensorArray(dtype, size, element_shape=shape)
    flow = tf.raw_ops.TensorListReserve(
        element_shape=run_time_shape, num_elements=size, element_dtype=dtype
    )
    return tf.TensorArray(dtype, flow=flow)


def stack(written, size, shape):
    """The `size` elements of a TensorArray, of the given shape, as one tensor."""
    if written.element_shape.is_fully_defined():
        return written.stack()
    # `written.stack()` of no elements, or of none yet written, needs their static shape.
    return tf.raw_ops.TensorListStack(
        input_handle=written.flow,
        element_shape=shape,
        element_dtype=written.dtype,
        num_elements=size if isinstance(size, int) else -1,
    )
