"""What is not finite, in words: of what goes into a loss, of a layer's call, of its states.

Padding may hold NaN: what a mask skips reaches nothing. So batch and weights are only named
where something that they lead to is not finite: what a layer is given at a real step, its
states, the loss, or what the loss sends back.
"""

import math

import numpy as np
import tensorflow as tf

from keras_bptt.runtime.wording import leaves

_OUTPUT_WEIGHTS = "output_layer.kernel output_layer.bias".split()


def not_finite(name, value, real=None):
    """What of an array is not finite, in words: a list of one item, or of none.

    Args:
        real: bool, of the shape of the first axes; False where nothing reads it.
    """
    if not isinstance(value, tf.Tensor) or not value.dtype.is_floating:
        return []
    value = tf.cast(value, tf.float64).numpy()
    bad = ~np.isfinite(value)
    if real is not None:
        bad &= real.reshape(real.shape + (1,) * (bad.ndim - real.ndim))
    number = int(bad.sum())
    if not number:
        return []
    if bad.ndim == 0:
        return [name]
    place = f"{name}[{', '.join(str(i) for i in np.argwhere(bad)[0])}]"
    if number == 1:
        return [place]
    many = "all" if number == bad.size else f"{number} of {bad.size}"
    return [f"{many} numbers of {name} (first {place})"]


def of_model(model, calls, **batch):
    """What of a batch, and of the weights of a model, is not finite."""
    masks = [c.constants.mask for c in calls if c.constants.mask is not None]
    found = []
    for argument, nest in batch.items():
        for name, value in leaves(argument, nest).items():
            found += not_finite(name, value, _read(value, masks))
    for weight in model.weights:
        found += not_finite(weight.path, tf.convert_to_tensor(weight))
    return found


def faults(name, calls, measured, loss, roots):
    """What is not finite that the numbers of a layer depend on: causes, then effects.

    Args:
        roots: a function that returns what `of_model` does.
    """
    steps = np.flatnonzero(np.any(np.isinf(measured.state_norms), axis=0))
    effects = (
        [f"the states of {name} from step {steps[0] + 1} on"] if len(steps) else []
    )
    effects += [] if math.isfinite(loss) else ["the loss"]
    if not effects and not measured.arrives:
        effects = [f"what the loss sends to {name}"]
    given, initial = [], []
    for call in calls:
        inputs, state = _of_call(call)
        given += inputs
        initial += state
    if not (effects or given or initial):
        return ()
    return tuple(dict.fromkeys([*(roots() or given), *initial, *effects]))


def _of_call(call):
    """What a layer is given: inputs, and weights in their dtype; and its initial state."""
    x, _, initial, output_layer, _ = call.arguments
    name, mask = call.layer.name, call.constants.mask
    given = not_finite(f"inputs of {name}", x, None if mask is None else mask.numpy())
    dtype = initial[0].dtype
    weights = [(w.name, tf.convert_to_tensor(w)) for w in call.layer.cell.weights]
    weights += zip(_OUTPUT_WEIGHTS, output_layer, strict=False)
    for weight, value in weights:
        if value.dtype.is_floating:
            value = tf.cast(value, dtype)
        given += not_finite(f"{name}.{weight} in {dtype.name}", value)
    of_states = [not_finite(f"initial state of {name}", s_0) for s_0 in initial]
    return given, sum(of_states, [])


def _read(value, masks):
    """Where one of these masks does not skip a value; None: everywhere."""
    shape = getattr(value, "shape", ())[:2]
    alike = [mask.numpy() for mask in masks if mask.shape == shape]
    return np.any(alike, axis=0) if alike else None
