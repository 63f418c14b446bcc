"""A loop over time: one step after the other, whose inputs are read where they are."""

import tensorflow as tf

from keras_bptt.runtime.execution import within_xla

# Steps an iteration of a loop that TensorFlow executes operation by operation: what an
# iteration costs beside its steps is shared by so many. XLA gains nothing by it.
STEPS_PER_ITERATION = 8


def scan(
    step,
    carry,
    inputs,
    size,
    *,
    valid=None,
    reverse=False,
    unroll=False,
    stacked=True,
    like=None,
):
    """Run `carry, output = step(carry, *inputs(t))` over time; stack the outputs.

    Args:
        step: the function of one step.
        carry: tensor (batch, units), the state that goes from step to step.
        inputs: a function of t = 0 ... size - 1 that returns the tensors of step t; None
            is passed on as None. Step by step it reads slices of whatever is there, which
            is quicker than to lay out anew what the loop reads.
        size: the number of steps, an integer or, where only run time tells, a tensor.
        valid: how many of them to run, the first so many; the other outputs are 0.
            None: all.
        reverse: from the last step to the first. Outputs stand at their step's place.
        unroll: True: write every step into the graph. An integer: so many steps an
            iteration of the loop. False: as many as pay.
        stacked: whether the outputs are wanted.
        like: a tensor of the shape of an output. None: they have that of the carry.

    Returns:
        The last carry and the stacked outputs (size, batch, units), or None.
    """
    if unroll is True:
        outputs = [None] * size
        for t in reversed(range(size)) if reverse else range(size):
            carry, outputs[t] = step(carry, *inputs(t))
        return carry, tf.stack(outputs) if stacked else None

    like = carry if like is None else like
    steps = size if valid is None else valid
    known = steps if isinstance(steps, int) else None

    def loop(number, i, last, carry, outputs):
        """As many iterations of `number` steps as there are steps for."""

        def body(i, last, carry, outputs):
            shape = carry.shape
            for k in range(number):
                back = steps - 1 - i - k if valid is None else last - k
                t = back if reverse else i + k
                carry, output = step(carry, *inputs(t))
                outputs = outputs.write(t, output) if stacked else outputs
            last = () if valid is None else last - number
            return i + number, last, tf.ensure_shape(carry, shape), outputs

        # A comparison with a constant: XLA then knows the number of iterations.
        end = steps - steps % number
        return tf.while_loop(lambda i, *_: i < end, body, (i, last, carry, outputs))

    number = int(unroll) or (1 if within_xla() else STEPS_PER_ITERATION)
    for most in (known, size):
        number = max(1, min(number, most)) if isinstance(most, int) else number
    outputs = 0
    if stacked:
        outputs = array(carry.dtype, size, like.shape, tf.shape(like))
    # Not t computed from `valid`: XLA would compile for each of its values.
    last = () if valid is None else steps - 1
    state = loop(number, 0, last, carry, outputs)
    if number > 1 and (known is None or known % number):
        state = loop(1, *state)
    _, _, carry, outputs = state
    if not stacked:
        return carry, None
    outputs = stack(outputs, size, tf.shape(like))
    known = size if isinstance(size, int) else None
    return carry, tf.ensure_shape(outputs, [known, *like.shape])


def at(t, *tensors):
    """Step t of each tensor (timesteps, batch, ...); None stays None."""
    return [x if x is None else x[t] for x in tensors]


def batch_major_at(t, *tensors):
    """Step t of each tensor (batch, timesteps, ...); None stays None."""
    return [x if x is None else x[:, t] for x in tensors]


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
