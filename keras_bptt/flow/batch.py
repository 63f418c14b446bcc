"""The one batch that callbacks measure: checked, cut to size, and held to the model."""

import tensorflow as tf

from keras_bptt.layers.inside import layers_inside
from keras_bptt.runtime.wording import described


def check_batch(batch):
    """Refuse what is no batch (x, y) or (x, y, sample_weight)."""
    given = described(batch)
    if isinstance(batch, tuple) and len(batch) in (2, 3):
        leaves = _leaves(batch)
        sizes = {t.shape[0] if getattr(t, "shape", ()) else None for t in leaves}
        if len(sizes) == 1 and sizes.pop():
            return
        given = f"a tuple of {', '.join(dict.fromkeys(map(described, leaves)))}"
    raise ValueError(
        "`validation_batch` must be one batch, a tuple (x, y) or (x, y, sample_weight) of "
        f"arrays or tensors with as many examples, at least one. Received: {given}. Pass "
        "(x, y), of a dataset next(iter(dataset))."
    )


def first_of(batch, examples):
    """At most so many examples, the first, as tensors."""
    return tf.nest.map_structure(
        lambda t: None if t is None else tf.convert_to_tensor(t[:examples]), batch
    )


def check_size(model, batch):
    """Refuse another number of examples than stateful layers keep states of."""
    measured = _leaves(batch)[0].shape[0]
    for _, layer in layers_inside(model):
        states = layer.states if getattr(layer, "stateful", False) else None
        for size in {s.shape[0] for s in tf.nest.flatten(states) if s is not None}:
            if size != measured:
                raise ValueError(
                    f"The stateful layer {layer.name} keeps the states of {size} examples, "
                    f"and so many must be measured. Received: {measured} examples. Pass "
                    f"examples={size}, and a `validation_batch` of {size} or more."
                )


def _leaves(batch):
    return [t for t in tf.nest.flatten(batch) if t is not None]
