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
    "This layer has no forward-mode derivative (tf.autodiff.ForwardAccumulator) inside a "
    "tf.function. Use the accumulator around the tf.function, or compute J v by two "
    "tf.GradientTapes: it is the gradient of <J^T u, v> with respect to u."
)


def explicit(forward: Callable, backward: Callable) -> Callable:
    """Return `forward` as a differentiable operation whose gradient is `backward`.

    Args:
        forward: `forward(*args) -> (outputs, residuals)`: tensors for the caller, and
            whatever the backward pass is to keep.
        backward: `backward(args, outputs, residuals, cotangents) -> gradients`, those of
            `args`. To be differentiable itself it must be made of differentiable operations
            of `args`, `outputs` and `cotangents`; `residuals` are numbers, cut off from the
            arguments.

    Arguments and outputs are structures of tensors, of which some may be None.

    Returns:
        A function of the arguments that returns the outputs.
    """

    def call(*args):
        places, shown, outer = _places(args), [], []

        @tf.custom_gradient
        def operation(*given):
            cut = map(tf.stop_gradient, given)
            outputs, residuals = forward(*_filled(places, cut))
            residuals = tf.nest.map_structure(cut_off, residuals)
            shown.append(_places(outputs))

            def grad(*cotangents):
                # Only eager forward mode asks for the gradient before the call returns;
                # it needs the first derivative alone, so the inner outputs will do.
                current = outer[0] if outer else outputs
                each = zip(cotangents, _given(current), strict=True)
                cotangents = _filled(shown[0], [_like(c, y) for c, y in each])
                args = _filled(places, given)
                found = backward(args, current, residuals, cotangents)
                found = tf.nest.flatten(found)
                is_given = tf.nest.flatten(places)
                return [g for g, given in zip(found, is_given, strict=True) if given]

            return tuple(_given(outputs)), grad

        outputs = operation(*map(local, _given(args)))
        outer.append(_filled(shown[0], outputs))
        return outer[0]

    return call


def _places(structure):
    """The structure, with True for a tensor and False for None."""
    return tf.nest.map_structure(lambda t: t is not None, structure)


def _given(structure):
    """The tensors of a structure."""
    return [t for t in tf.nest.flatten(structure) if t is not None]


def _filled(places, tensors):
    """The structure of `places`, with the tensors where it is True, None elsewhere."""
    tensors = iter(tensors)
    return tf.nest.map_structure(lambda given: next(tensors) if given else None, places)


class Derivation(NamedTuple):
    """A function and its first derivative, written twice: fast, and differentiable.

    Attributes:
        forward: `forward(options, constants, arguments) -> (outputs, residuals)`.
        backward: `backward(options, constants, outputs, residuals, cotangents, arguments)`
            returns the gradients of the arguments. It is never differentiated.
        composed: `composed(options, constants, arguments) -> outputs`, the same function
            made of differentiable operations. Its derivatives are those of second and
            higher order; it is evaluated only where they are asked for.
    """

    forward: Callable
    backward: Callable
    composed: Callable


def explicit_first_order(derivation: Derivation, options, constants, arguments):
    """Return the outputs of `derivation.forward`, differentiable in the arguments.

    `options` is static and hashable; `constants` are tensors without a gradient.
    """
    refuse_forward_mode(_given(arguments))
    # Else a tape that watches what they were made of would record the loop.
    constants = tf.nest.map_structure(cut_off, constants)

    def forward(arguments):
        return run(derivation.forward, options, constants, arguments)

    def gradients(args, outputs, residuals, cotangents):
        outputs = tf.nest.map_structure(tf.stop_gradient, outputs)
        known = tf.nest.map_structure(local, constants)

        def values(arguments, cotangents):
            results = outputs, residuals, cotangents, arguments
            return run(derivation.backward, options, known, *results), ()

        def second_order(tensors, outputs, residuals, cotangents):
            del outputs, residuals  # recomputed, and so connected to the arguments
            static = derivation.composed, options
            return run(_second_order, static, known, tensors, cotangents)

        return (explicit(values, second_order)(*args, cotangents),)

    return explicit(forward, gradients)(arguments)


def _second_order(static, constants, tensors, cotangents):
    """The gradients of <gradients of composed, cotangents>."""
    composed, options = static

    def function(arguments):
        return composed(options, constants, arguments)

    def gradients(arguments, cotangents):
        return vjp(function, (arguments,), cotangents)[0]

    return vjp(gradients, tensors, cotangents)


def vjp(function: Callable, args, cotangents):
    """The gradients of <function(*args), cotangents> by `args`; zeros where unconnected.

    Arguments and outputs are structures of tensors, of which some may be None; integers
    have no gradient, None.
    """
    if not tf.executing_eagerly():
        args = tf.nest.map_structure(local, args)
    flat, cotangents = tf.nest.flatten(args), _given(cotangents)
    places = [t is not None and t.dtype.is_floating for t in flat]
    sources = [t for t, place in zip(flat, places, strict=True) if place]
    zero = {"unconnected_gradients": tf.UnconnectedGradients.ZERO}
    if tf.executing_eagerly():
        with tf.GradientTape() as tape:
            tape.watch(sources)
            outputs = _given(function(*args))
        found = tape.gradient(outputs, sources, cotangents, **zero)
    else:
        # No tape here: while a forward-mode accumulator transposes a gradient, tapes record
        # nothing.
        outputs = _given(function(*args))
        found = tf.gradients(outputs, sources, cotangents, **zero)
    found = iter(found)
    gradients = [next(found) if place else None for place in places]
    return tf.nest.pack_sequence_as(args, gradients)


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
