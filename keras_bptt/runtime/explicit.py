"""Join a forward and a backward computation: `tf.custom_gradient`, with its traps disarmed.

The functions joined here hold the mathematics; this module holds none. Six facts about
TensorFlow shape it:

* The tape must not record what happens inside the forward computation, else it keeps every
  intermediate of the loop and may try to differentiate the loop itself. So `forward` sees
  its arguments through `tf.stop_gradient`.
* A gradient is itself differentiated for derivatives of higher order. Inside the decorated
  function the outputs are cut off from the arguments (above), so `backward` must use the
  *outer* outputs, the tensors that the decorated call gave back to its caller. With the
  inner ones second derivatives would be silently wrong.
* A cotangent need not have its output's shape. A reloaded SavedModel hands in missing ones
  as zeros whose unknown dimensions are 1; behind a `tf.gather` of examples they are
  `tf.IndexedSlices`. So cotangents are made dense, of their outputs' shapes.
* The gradient of a graph is built in another graph, its gradient in a third. A tensor of
  the first that is kept for use in the third is out of scope, so arguments are first made
  tensors of the graph at hand.
* Several tapes around a `tf.function` make TensorFlow differentiate whatever the gradient
  takes from the forward computation, loops that XLA compiled among it, though nobody asked.
  So residuals leave it without a gradient.
* Inside a `tf.function` a forward-mode tangent follows the operations of the decorated
  function, not its gradient, and would die silently at the `stop_gradient`.

Whatever is differentiable must be an argument of the joined operation. Constants (masks,
dropout factors) may be captured: a captured tensor silently has no gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from keras_bptt.runtime.execution import run

_NO_FORWARD_MODE = (
    "BPTTRNN has no forward-mode derivative (tf.autodiff.ForwardAccumulator) inside a "
    "tf.function. Use the accumulator around the tf.function, or compute J v by two "
    "tf.GradientTapes: it is the gradient of <J^T u, v> with respect to u."
)


def explicit(forward: Callable, backward: Callable) -> Callable:
    """Return `forward` as a differentiable operation whose gradient is `backward`.

    Args:
        forward: `forward(*args) -> (outputs, residuals)`: a tuple of tensors for the
            caller, and whatever the backward pass is to keep.
        backward: `backward(args, outputs, residuals, cotangents) -> gradients`, one for
            each argument. To be differentiable itself it must be made of differentiable
            operations of `args`, `outputs` and `cotangents`; `residuals` are numbers, cut
            off from the arguments.

    Returns:
        A function of tensors that returns the tuple `outputs`.
    """

    def call(*args):
        outer = []

        @tf.custom_gradient
        def operation(*args):
            outputs, residuals = forward(*map(tf.stop_gradient, args))
            residuals = tf.nest.map_structure(cut_off, residuals)

            def grad(*cotangents):
                # Only eager forward mode asks for the gradient before the call returns;
                # it needs the first derivative alone, so the inner outputs will do.
                current = outer[0] if outer else outputs
                cotangents = tuple(map(_like, cotangents, current))
                return tuple(backward(args, current, residuals, cotangents))

            return tuple(outputs), grad

        outer.append(operation(*map(local, args)))
        return outer[0]

    return call


class Derivation(NamedTuple):
    """A function and its first derivative, written twice: fast, and differentiable.

    Attributes:
        forward: `forward(options, constants, *args) -> (outputs, residuals)`.
        backward: `backward(options, constants, outputs, residuals, cotangents, *args)`
            returns one gradient for each argument, None for one that is None. It is never
            differentiated.
        composed: `composed(options, constants, *args) -> outputs`, the same function made
            of differentiable operations. Its derivatives are those of second and higher
            order; it is evaluated only where they are asked for.
    """

    forward: Callable
    backward: Callable
    composed: Callable


def explicit_first_order(derivation: Derivation, options, constants, *args):
    """Return the outputs of `derivation.forward`, differentiable with respect to `args`.

    `options` is static and hashable; `constants` are tensors without a gradient. An
    argument may be None, and is then no argument of the operation.
    """
    given = tuple(arg is not None for arg in args)
    args = [arg for arg in args if arg is not None]
    refuse_forward_mode(args)
    # Else a tape that watches what they were made of would record the loop.
    constants = tf.nest.map_structure(cut_off, constants)

    def forward(*args):
        return run(derivation.forward, options, constants, *_placed(given, args))

    def gradients(args, outputs, residuals, cotangents):
        number = len(args)
        outputs = tuple(map(tf.stop_gradient, outputs))
        known = tf.nest.map_structure(local, constants)

        def values(*tensors):
            args, cotangents = tensors[:number], tensors[number:]
            results = known, outputs, residuals, cotangents
            found = run(derivation.backward, options, *results, *_placed(given, args))
            return [gradient for gradient in found if gradient is not None], ()

        def second_order(tensors, outputs, residuals, cotangents):
            del outputs, residuals  # recomputed, and so connected to the arguments
            static = (derivation.composed, options, given)
            return run(_second_order, static, known, tensors, cotangents)

        return explicit(values, second_order)(*args, *cotangents)

    return explicit(forward, gradients)(*args)


def _second_order(static, constants, tensors, cotangents):
    """The gradients of <gradients of composed, cotangents>."""
    composed, options, given = static
    number = sum(given)

    def function(*args):
        return composed(options, constants, *_placed(given, args))

    def gradients(*tensors):
        return vjp(function, tensors[:number], tensors[number:])

    return vjp(gradients, tensors, cotangents)


def vjp(function: Callable, args, cotangents):
    """The gradients of <function(*args), cotangents> by `args`; zeros where unconnected."""
    zero = tf.UnconnectedGradients.ZERO
    if tf.executing_eagerly():
        with tf.GradientTape() as tape:
            tape.watch(args)
            outputs = function(*args)
        return tape.gradient(outputs, args, cotangents, unconnected_gradients=zero)
    # No tape here: while a forward-mode accumulator transposes a gradient, tapes record
    # nothing.
    args = list(map(local, args))
    return tf.gradients(
        function(*args), args, list(cotangents), unconnected_gradients=zero
    )


def _placed(given, tensors):
    """The tensors in the places of those that are given, None in the others."""
    tensors = iter(tensors)
    return [next(tensors) if is_given else None for is_given in given]


def local(tensor):
    """`tensor` as one of the graph that is being built."""
    if tensor is None or tf.executing_eagerly():
        return tensor
    return tf.identity(tensor)


def cut_off(tensor):
    """`tensor`, if it is one, without a gradient."""
    return None if tensor is None else tf.stop_gradient(tensor)


def _like(cotangent, output):
    if isinstance(cotangent, tf.IndexedSlices):
        return _dense(cotangent, output)
    if cotangent.shape.is_fully_defined() and cotangent.shape == output.shape:
        return cotangent
    return tf.broadcast_to(cotangent, tf.shape(output))


def _dense(slices, output):
    """The rows of an axis that were gathered, each as often as it was, added up."""
    values = tf.cast(
        slices.values, tf.float32 if output.dtype.size == 2 else output.dtype
    )
    dense = tf.math.unsorted_segment_sum(values, slices.indices, tf.shape(output)[0])
    return tf.ensure_shape(tf.cast(dense, output.dtype), output.shape)


def refuse_forward_mode(tensors):
    """Raise where a forward-mode tangent arrives in a graph; cost nothing elsewhere.

    Nothing uses the result of PreventGradient, so no tape ever differentiates it and the
    runtime prunes it; only an accumulator differentiates an operation as it is made.
    """
    if not tf.executing_eagerly():
        for tensor in tensors:
            tf.raw_ops.PreventGradient(input=tensor, message=_NO_FORWARD_MODE)
