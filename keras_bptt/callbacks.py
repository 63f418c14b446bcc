"""Callbacks of `fit`: the gradient flow in its logs, and windows that follow it."""

import math
import warnings

import keras
import numpy as np
import tensorflow as tf

from keras_bptt.flow import tensorboard
from keras_bptt.flow.batch import check_batch, check_size, first_of
from keras_bptt.flow.gradient_flow import gradient_flow
from keras_bptt.flow.layer_flow import check_tolerance, is_number
from keras_bptt.flow.quantities import chosen, numbers_of
from keras_bptt.truncation import RandomizedTruncation, Truncation, positive_integer


class MeasuringCallback(keras.callbacks.Callback):
    """Measures the gradient flow every so many epochs, and logs what is made of it."""

    def __init__(self, validation_batch, every, layer, examples, loss_steps):
        super().__init__()
        check_positive("every", every, "it is measured every so many epochs")
        check_positive("examples", examples, "so many of the batch are measured")
        check_positive("loss_steps", loss_steps, "so many losses are followed back")
        check_batch(validation_batch)
        # Not the whole batch, which need not stay in memory.
        x, y, *weight = first_of(validation_batch, examples)
        self._batch = {"x": x, "y": y, "sample_weight": weight[0] if weight else None}
        self.layer, self.every, self.loss_steps = layer, every, loss_steps
        self.flow = None
        self._logged = None

    def on_train_begin(self, logs=None):
        self._logged = None
        # What is wrong is said before an epoch has passed, where it can be known.
        if self.model.built:
            self.flow = self._first_flow()

    def on_epoch_end(self, epoch, logs=None):
        # Also at the end of the first epoch, whatever its number: keys must not come late.
        if self._logged is None or epoch % self.every == 0:
            self.flow = self._flow()
            self._logged = self._measured(epoch)
        if logs is not None:
            logs |= self._logged

    def _flow(self):
        """What is measured at the end of an epoch."""
        return self._flow_as_it_is()

    def _first_flow(self):
        """What is measured at the beginning."""
        return self._flow_as_it_is()

    def _flow_as_it_is(self):
        check_size(self.model, tuple(self._batch.values()))
        return gradient_flow(
            self.model, **self._batch, layer=self.layer, loss_steps=self.loss_steps
        )

    def _measured(self, epoch):
        """What is logged of `self.flow`."""
        raise NotImplementedError


class GradientFlowLogger(MeasuringCallback):
    """Logs how the gradient flows back through recurrent layers, epoch by epoch.

    Use it to see when training begins to lose the gradient, or to blow up. At the end of
    the epochs 0, `every`, 2 `every`, ... (and of the first one) it measures `gradient_flow`
    on one batch, and puts a number f"{layer}_{quantity}" of each layer into the logs. These
    are the quantities; one that a layer does not have is left out:

        adjoint_norm     |dL/dh_t|, of several states |dL/ds_t|: the mean over steps and
                         examples
        delta_norm       |dL/dz_t|, the same; not of a GRU
        factor           by how much one step multiplies the gradient
        half_life        after so many steps half of it is left
        lag_share        the share of a loss that reaches the longest lag
        sigma_max        the largest singular value of the plain RNN's recurrent kernel
        spectral_radius  the largest absolute value of its eigenvalues
        saturated        the share of its saturated units; of tanh and sigmoid
        inactive         the share of its units that are 0; of relu
        input_gate, forget_gate, output_gate
                         of an LSTM: the mean over steps, units and examples
        update_gate, reset_gate
                         of a GRU: the same
        memory           for how many steps the forget or update gate holds a unit: the
                         median over the units

    The norms are those of training, with the layer's truncation and clipping; factor,
    half-life and share are without. In the epochs between, the numbers are the last ones.
    So `History`, the progress bar and every callback that stands behind this one have them:
    `EarlyStopping` (say its `mode`) and the like. Training goes on as it would without: no
    weight, no state and no seed changes.

    A mean loss divides by the number of its examples, and so do the two norms: by the
    number of examples that are measured, not by the batch size of training. With 8 examples
    they are about 4 times those of a batch of 32. They can be compared from epoch to epoch;
    for the numbers of training, such as one for `adjoint_clipnorm`, measure as many
    `examples` as a batch of training has. No other quantity depends on it.

    With `log_dir` TensorBoard (`tensorboard --logdir ...`) shows all quantities under
    gradient_flow/{layer}/{quantity}, the verdict in words, and |dL/dh_t| as a heat map:
    from left to right the steps, from top to bottom the epochs measured, colours from 1e-8
    (dark) to 1e2 (bright), means over the examples and, of more than 256 steps or epochs,
    over neighbours. Masked steps are grey. Where matplotlib is installed it has axes with
    numbers and a bar of the colours; without it is the plain pixels.

    Cost: `gradient_flow` of at most `examples` examples, with `loss_steps` single losses
    followed back, whatever the length of the epoch; the heat map at most 256 x 256 cells.
    It is measured once more when training begins, so that what is wrong is said then.

    Args:
        validation_batch: a tuple (x, y) or (x, y, sample_weight) of arrays, tensors or
            nests of them, as `fit` takes one batch.
        every: measure every so many epochs.
        layer: the name of a layer, or the layer, to measure that alone. None: all.
        quantities: the names of those that go into the logs, or "all". TensorBoard gets
            all in any case.
        log_dir: a folder for TensorBoard's events, or None.
        examples: at most so many are measured, the first of the batch. A model of a fixed
            batch size (stateful layers) needs that many.
        loss_steps: so many single losses are followed back, as in `gradient_flow`.

    Attributes:
        flow: the last `GradientFlow`; None before the first.

    Raises:
        ValueError: for arguments out of their range; when training begins for what
            `gradient_flow` raises, such as a layer that is not there, and for a number of
            examples that is not the batch size of stateful layers. If the model is not
            built by then, at the end of the first epoch.

    Example:

    >>> import keras, numpy as np
    >>> from keras_bptt import BPTTRNN, GradientFlowLogger
    >>> x, y = np.ones((4, 20, 2)), np.ones((4, 3))
    >>> model = keras.Sequential([keras.Input((20, 2)), BPTTRNN(3, name="rnn")])
    >>> model.compile("sgd", "mse")
    >>> logger = GradientFlowLogger((x, y), every=2, quantities="all")
    >>> stop = keras.callbacks.EarlyStopping("rnn_adjoint_norm", mode="max")
    >>> fitted = model.fit(x, y, epochs=2, verbose=0, callbacks=[logger, stop])
    >>> len(fitted.history["rnn_half_life"]), logger.flow["rnn"].timesteps
    (2, 20)
    """

    def __init__(
        self,
        validation_batch,
        *,
        every=1,
        layer=None,
        quantities=("adjoint_norm", "factor"),
        log_dir=None,
        examples=8,
        loss_steps=4,
    ):
        super().__init__(validation_batch, every, layer, examples, loss_steps)
        self.quantities = chosen(quantities)
        self.log_dir = log_dir
        self._writer = None

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self._rows = {}
        if self.log_dir is not None:
            self._writer = tf.summary.create_file_writer(str(self.log_dir))

    def on_train_end(self, logs=None):
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _measured(self, epoch):
        numbers = {name: numbers_of(flow) for name, flow in self.flow.items()}
        if self._writer is not None:
            # Keras' own TensorBoard callback may have told others to be silent.
            with self._writer.as_default(), tf.summary.record_if(True):
                self._write(epoch, numbers)
            self._writer.flush()
        return {
            f"{name}_{quantity}": value
            for name, values in numbers.items()
            for quantity, value in values.items()
            if quantity in self.quantities
        }

    def _write(self, epoch, numbers):
        for name, flow in self.flow.items():
            tag = f"gradient_flow/{name}"
            for quantity, value in numbers[name].items():
                tensorboard.scalar(f"{tag}/{quantity}", value, epoch)
            words = [flow.explanation, *(f"- {item}" for item in flow.advice)]
            tensorboard.text(f"{tag}/verdict", "\n\n".join(words), epoch)
            with np.errstate(divide="ignore"):
                row = np.log10(tensorboard.fewer(flow.mean_adjoint))
            epochs, rows = self._rows.setdefault(name, ([], []))
            epochs.append(epoch)
            rows.append(row)
            norm = f"|{flow.adjoint}|"
            tensorboard.image(
                f"{tag}/adjoint_norms",
                tensorboard.flow_map(np.stack(rows), epochs, flow.timesteps, norm),
                epoch,
                tensorboard.map_description(norm),
            )


class AdaptiveTruncation(MeasuringCallback):
    """Moves the window of the truncation to where its bias is within a tolerance.

    Use it where full backpropagation is too slow or too noisy, and how far back the
    gradient matters is not known or changes in training. At the end of the epochs 0,
    `every`, 2 `every`, ... (and of the first one) it measures `gradient_flow` on one batch,
    all these layers without truncation, and sets for each

        k = flow.suggest_truncation(tolerance, stride)      truncation = Truncation(k, ...)

    in blocks as the layer has them: chunks where its truncation is None or chunks, else
    its own stride, or k where k is less. So the window grows beyond the present one in one
    step. Where no window shorter than the sequences of the batch will do, the layer gets
    full backpropagation, None, or `max_steps`. Where numbers are not finite
    (`LayerFlow.finite`) the window stays; and where the gradient without a window explodes,
    of which a longer one would take in more: that is said once, by a warning. The number
    of steps is logged as f"{layer}_window"; the number of timesteps where it is full. What
    the bias says and does not say: `LayerFlow.truncation_bias`.

    Cost: `gradient_flow` of at most `examples` examples, with `loss_steps` single losses
    followed back, and once more when training begins, so that what is wrong is said then.
    An epoch that changes a window costs more: `model.make_train_function(force=True)`, once
    for all layers, so that the next step is traced and compiled anew, some seconds. Changes
    by a share of at most `slack` are therefore not made.

    Args:
        validation_batch: a tuple (x, y) or (x, y, sample_weight) of arrays, tensors or
            nests of them, as `fit` takes one batch. Its sequences should be as long as
            those of training.
        tolerance: between 0 and 1, the relative bias of the gradient.
        every: measure every so many epochs.
        layer: the name of a layer, or the layer, to move its window alone. None: all.
        max_steps: the longest window, or None.
        slack: changes of at most this share of the present window are not made, unless
            that is longer than `max_steps`.
        examples: at most so many are measured, the first of the batch. A model of a fixed
            batch size (stateful layers) needs that many.
        loss_steps: so many single losses are followed back, as in `gradient_flow`.

    Attributes:
        flow: the last `GradientFlow`, without truncation, but for that of the beginning;
            None before the first.

    Raises:
        ValueError: for arguments out of their range; when training begins for a layer with
            a `RandomizedTruncation`, which has no window, for what `gradient_flow` raises,
            such as a layer that is not there, and for a number of examples that is not the
            batch size of stateful layers. If the model is not built by then, at the end of
            the first epoch.

    Example:

    >>> import keras, numpy as np
    >>> from keras_bptt import AdaptiveTruncation, BPTTRNN
    >>> half = keras.initializers.Identity(0.5)
    >>> rnn = BPTTRNN(3, "linear", recurrent_initializer=half, truncation=1, name="rnn")
    >>> model = keras.Sequential([keras.Input((20, 2)), rnn])
    >>> model.compile(keras.optimizers.SGD(0.0), "mse")
    >>> x, y = np.ones((4, 20, 2)), np.ones((4, 3))
    >>> window = AdaptiveTruncation((x, y), tolerance=0.05)
    >>> fitted = model.fit(x, y, epochs=2, verbose=0, callbacks=[window])
    >>> fitted.history["rnn_window"], rnn.truncation
    ([5, 5], Truncation(steps=5))

    References:
        - Aicher, Foti & Fox, Adaptively truncating backpropagation through time to control
          gradient bias, 2019 (arXiv 1905.07473).
    """

    def __init__(
        self,
        validation_batch,
        tolerance=0.05,
        *,
        every=1,
        layer=None,
        max_steps=None,
        slack=0.1,
        examples=16,
        loss_steps=8,
    ):
        check_tolerance(tolerance)
        if max_steps is not None:
            check_positive("max_steps", max_steps, "the longest window, or None")
        if not is_number(slack) or not 0 <= slack < math.inf:
            raise ValueError(
                "`slack` must be a number of at least 0, the share of the present window "
                f"that a change must exceed. Received: slack={slack!r}. Pass 0.1 for 10 %."
            )
        super().__init__(validation_batch, every, layer, examples, loss_steps)
        self.tolerance, self.max_steps, self.slack = tolerance, max_steps, slack
        # What each layer was given, and the stride that it began with: full
        # backpropagation, or a window shorter than the stride, would not tell.
        self._given = {}

    def on_train_begin(self, logs=None):
        self._layers, self._warned = {}, set()
        super().on_train_begin(logs)

    def _first_flow(self):
        """With the windows that there are; it shows which layers there are."""
        flow = self._flow_as_it_is()
        for name, layer in flow.layers.items():
            _check_window(name, layer)
        self._layers = flow.layers
        return flow

    def _flow(self):
        """Without windows: layers below see the losses through those of layers above."""
        if not self._layers:
            self._first_flow()
        windows = {layer: layer.truncation for layer in self._layers.values()}
        try:
            for layer in windows:
                layer.truncation = None
            return self._flow_as_it_is()
        finally:
            for layer, window in windows.items():
                layer.truncation = window

    def _measured(self, epoch):
        changed, logged = False, {}
        for name, layer in self._layers.items():
            flow, before = self.flow[name], layer.truncation
            layer.truncation = self._policy(name, layer, flow)
            changed |= layer.truncation != before
            logged[f"{name}_window"] = _steps(layer.truncation, flow.timesteps)
        if changed:
            # What is traced goes on with the former windows.
            self.model.make_train_function(force=True)
        return logged

    def _policy(self, name, layer, flow):
        """The truncation that the layer is to have."""
        own, most = layer.truncation, self.max_steps
        explodes = flow.verdict == "exploding"
        explodes |= flow.finite and flow.verdict == "exploding states"
        if not (flow.finite or explodes):
            return own
        given, stride = self._given.get(layer, (None, None))
        if own != given:
            stride = None if own is None or own.stride == own.steps else own.stride
        k = flow.suggest_truncation(self.tolerance, stride)
        if explodes:
            self._warn(name, flow, own)
            k = None if own is None else own.steps
        if most is not None:
            k = most if k is None else min(k, most)
        new = None
        if k is not None:
            new = Truncation(k, None if stride is None else min(stride, k))
        now, then = (_steps(policy, flow.timesteps) for policy in (own, new))
        if abs(then - now) <= self.slack * now and (most is None or now <= most):
            new = own
        self._given[layer] = new, stride
        return new

    def _warn(self, name, flow, window):
        """Say once of a layer that its window stays since the gradient explodes."""
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"AdaptiveTruncation does not widen truncation={window} of {name}: without "
                f"a window {flow.explanation}. What may help: {flow.advice[0]}.",
                stacklevel=2,
            )


def _steps(policy, timesteps):
    """How far back losses reach in a sequence."""
    return timesteps if policy is None else min(policy.steps, timesteps)


def _check_window(name, layer):
    if isinstance(layer.truncation, RandomizedTruncation):
        raise ValueError(
            "A RandomizedTruncation has no window that could be moved. Received: layer "
            f"{name}, with {layer.truncation}. Make it with a Truncation or None, or name "
            "another layer: layer='...'."
        )


def check_positive(name, value, meaning):
    if not positive_integer(value):
        raise ValueError(
            f"`{name}` must be a positive integer: {meaning}. Received: {name}={value!r}. "
            "Pass 1 or more."
        )
