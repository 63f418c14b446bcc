"""The gradient flow measured while a model trains: what the callbacks have in common."""

import math

import keras
import numpy as np
import tensorflow as tf

from keras_bptt.flow.gradient_flow import gradient_flow
from keras_bptt.flow.layer_flow import over_examples
from keras_bptt.truncation import positive_integer
from keras_bptt.runtime.wording import described


class MeasuringCallback(keras.callbacks.Callback):
    """Measures the gradient flow every so many epochs, and logs what is made of it."""

    def __init__(self, validation_batch, every, layer, examples, loss_steps):
        super().__init__()
        check_positive("every", every, "it is measured every so many epochs")
        check_positive("examples", examples, "so many of the batch are measured")
        check_positive("loss_steps", loss_steps, "so many losses are followed back")
        _check_batch(validation_batch)
        # Not the whole batch, which need not stay in memory.
        x, y, *weight = _first(validation_batch, examples)
        self._batch = {"x": x, "y": y, "sample_weight": weight[0] if weight else None}
        self.layer, self.every, self.loss_steps = layer, every, loss_steps
        self.flow = None
        self._logged = {}

    def on_train_begin(self, logs=None):
        self._logged = {}

    def on_epoch_end(self, epoch, logs=None):
        # Also at the end of the first epoch, whatever its number: keys must not come late.
        if not self._logged or epoch % self.every == 0:
            self.flow = self._flow()
            self._logged = self._measured(epoch)
        if logs is not None:
            logs |= self._logged

    def _flow(self):
        return gradient_flow(
            self.model, **self._batch, layer=self.layer, loss_steps=self.loss_steps
        )

    def _measured(self, epoch):
        """What is logged of `self.flow`."""
        raise NotImplementedError


def quantities(flow):
    """The numbers of a `LayerFlow` that are logged."""
    shares = flow.free_lag_norms
    numbers = {
        "adjoint_norm": _mean(flow.adjoint_norms),
        "delta_norm": _mean(flow.delta_norms),
        "factor": flow.factor,
        "half_life": flow.half_life,
        "lag_share": float(shares[-1]) if len(shares) else math.nan,
        "sigma_max": flow.sigma_max,
        "spectral_radius": flow.spectral_radius,
    }
    off = {"saturated": flow.saturated, "inactive": flow.inactive}
    return numbers | {name: _mean(v) for name, v in off.items() if v is not None}


def _mean(norms):
    return float(over_examples(np.nanmean, norms.ravel()))


def _first(batch, examples):
    return tf.nest.map_structure(
        lambda t: None if t is None else tf.convert_to_tensor(t[:examples]), batch
    )


def check_positive(name, value, meaning):
    if not positive_integer(value):
        raise ValueError(
            f"`{name}` must be a positive integer: {meaning}. Received: {name}={value!r}. "
            "Pass 1 or more."
        )


def _check_batch(batch):
    given = described(batch)
    if isinstance(batch, tuple) and len(batch) in (2, 3):
        leaves = [t for t in tf.nest.flatten(batch) if t is not None]
        sizes = {t.shape[0] if getattr(t, "shape", ()) else None for t in leaves}
        if len(sizes) == 1 and sizes.pop():
            return
        given = f"a tuple of {', '.join(dict.fromkeys(map(described, leaves)))}"
    raise ValueError(
        "`validation_batch` must be one batch, a tuple (x, y) or (x, y, sample_weight) of "
        f"arrays or tensors with as many examples, at least one. Received: {given}. Pass "
        "(x, y), of a dataset next(iter(dataset))."
    )
