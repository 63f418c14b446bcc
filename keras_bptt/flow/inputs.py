"""What `gradient_flow` is given: checks, each with an error that helps, and the loss."""

import keras
import numpy as np
import tensorflow as tf

from keras_bptt.layers.explicit_loop import ExplicitLoop
from keras_bptt.layers.inside import layers_inside
from keras_bptt.runtime.wording import described, leaves, meant


def check_model(model):
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"`model` must be a keras.Model. Received: {model!r}. Put a layer into one: "
            "keras.Sequential([keras.Input((None, features)), layer])."
        )
    if not model.built:
        raise ValueError(
            f"`model` must be built, for its weights are what is measured. Received: "
            f"{model.name}, which has none yet. Call it on a batch, model(x), or begin it "
            "with keras.Input((timesteps, features))."
        )


def check_batch(model, loss, x, y, sample_weight):
    if isinstance(x, (tf.data.Dataset, keras.utils.PyDataset)):
        raise ValueError(
            f"`x` must be the inputs of one batch. Received: a {type(x).__name__}. Take a "
            "batch: x, y = next(iter(dataset))."
        )
    for name, nest in {"x": x, "y": y}.items():
        _check_arrays(name, nest)
    if x is None:
        raise ValueError(
            "`x` must be the inputs of one batch. Received: x=None. Pass x and y, as `fit` "
            "takes them."
        )
    if y is None and _compares(model, loss):
        raise ValueError(
            "`y` must be the targets of the batch: the loss, whose gradient is followed "
            f"back, compares the outputs with them. Received: x, {_shapes({'x': x})}, and "
            "y=None. Pass gradient_flow(model, x, y), as `fit` takes them."
        )
    batch = {"x": x, "y": y, "sample_weight": sample_weight}
    arrays = [t for t in _all_leaves(batch).values() if getattr(t, "shape", ())]
    sizes = {t.shape[0] for t in arrays}
    if len(sizes) != 1:
        raise ValueError(
            "`x`, `y` and `sample_weight` must have as many examples each. Received: "
            f"{_shapes(batch)}. Pass one batch: those of the same examples."
        )
    if sizes == {0}:
        raise ValueError(
            "A batch must have at least one example, and a few dozen are enough. Received: "
            f"{_shapes(batch)}. Pass x[:32], y[:32] of what the model is trained on."
        )


def _check_arrays(name, nest):
    """Of a nested list each number would be an input of its own."""
    leaves_ = [t for t in leaves(name, nest).values() if t is not None]
    if all(getattr(t, "shape", ()) for t in leaves_):
        return
    what = described(nest)
    if isinstance(nest, list | tuple):
        try:
            what = (
                f"a nested {type(nest).__name__} of numbers, of shape {np.shape(nest)}"
            )
        except ValueError:  # rows of different lengths
            what = f"a {type(nest).__name__} of " + ", ".join(
                dict.fromkeys(map(described, leaves_))
            )
    raise ValueError(
        f"`{name}` must be an array or a tensor whose first axis are the examples, or a "
        f"list or dict of such arrays. Received: {name}, {what}. Pass np.asarray({name})."
    )


def _compares(model, loss):
    """Whether there is a loss that takes targets, as far as can be known."""
    own = type(model).compute_loss is not keras.Model.compute_loss
    return loss is not None or (model.compiled and model.loss is not None and not own)


def _all_leaves(batch):
    found = {}
    for name, nest in batch.items():
        found |= leaves(name, nest)
    return {name: t for name, t in found.items() if t is not None}


def _shapes(batch):
    found = _all_leaves(batch).items()
    return ", ".join(f"{name} of shape {tuple(t.shape)}" for name, t in found)


def nothing_found(model, layer, seen):
    """What to say where the model has called none of the layers that are wanted."""
    if seen:
        return _other_layer(layer, list(dict.fromkeys(seen)))
    inside = [each for _, each in layers_inside(model)]
    named = [each for each in inside if isinstance(each, keras.layers.RNN)]
    # In the order of the call, top level alone: those of a model without a recurrence.
    shown = ", ".join(type(each).__name__ for each in model.layers)
    if named:
        shown = ", ".join(f"{type(each).__name__} {each.name!r}" for each in named)
    words = (
        "The model must call a BPTTRNN, BPTTLSTM, BPTTGRU or BPTT, whose backward pass is "
        f"what is measured. Received: {model.name}, with the layers {shown}. "
    )
    if any(isinstance(each, ExplicitLoop) for each in named):
        return words + "Call it in what the model does with `x`."
    hosts = keras.layers.SimpleRNN, keras.layers.LSTM, keras.layers.GRU
    if any(type(each) in hosts for each in named):
        return words + (
            "Measure a copy, gradient_flow(keras_bptt.convert(model), ...): in it BPTTRNN, "
            "BPTTLSTM and BPTTGRU stand in the place of SimpleRNN, LSTM and GRU, with "
            "their weights."
        )
    if any(type(each) is keras.layers.RNN for each in named):
        return (
            words + "Put keras_bptt.BPTT(cell) in the place of keras.layers.RNN(cell)."
        )
    return words + (
        "Put keras_bptt.BPTTRNN, BPTTLSTM or BPTTGRU in the place of keras.layers."
        "SimpleRNN, LSTM or GRU: they take the same arguments and weights."
    )


def _other_layer(layer, names):
    what = repr(layer)
    if isinstance(layer, keras.Layer):
        what = f"{type(layer).__name__} {layer.name!r}, which the model does not call"
    return (
        f"`layer` must be one of the layers of this package that the model calls: "
        f"{', '.join(names)}. Received: layer={what}."
        f"{meant(layer, names) if isinstance(layer, str) else ''} Pass one of these names, "
        "or None for all."
    )


class _Reduced(keras.losses.Loss):
    """A function of targets and outputs, as a loss: weighted, and the mean of it."""

    def __init__(self, function):
        super().__init__()
        self._function = function

    def call(self, y_true, y_pred):
        return self._function(y_true, y_pred)


def loss_of(model, loss, x, y, sample_weight):
    """The loss as a function of the model's outputs; and what training multiplies it by.

    float16 would lose small gradients without it.
    """
    if loss is not None:
        loss = keras.losses.get(loss)
        loss = loss if isinstance(loss, keras.losses.Loss) else _Reduced(loss)

        def given(y_pred):
            value = loss(y, y_pred, sample_weight=sample_weight)
            return sum((tf.cast(more, value.dtype) for more in model.losses), value)

        return given, 1.0
    if not model.compiled:
        raise ValueError(
            "There is no loss whose gradient could be followed. Received: loss=None, and a "
            f"model ({model.name}) that is not compiled. Pass `loss`, such as loss='mse', "
            "or compile the model."
        )

    def compiled(y_pred):
        return model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight)

    scaled = getattr(model.optimizer, "scale_loss", lambda value: value)
    return compiled, float(scaled(tf.ones([]))) or 1.0
