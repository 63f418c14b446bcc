"""gradient_flow: how the gradient flows back through the recurrent layers of a model."""

import functools
import math

import keras
import numpy as np
import tensorflow as tf

from keras_bptt.flow.finiteness import faults, of_model
from keras_bptt.flow.inputs import check_batch, check_model, loss_of, nothing_found
from keras_bptt.flow.layer_flow import Gate, LayerFlow
from keras_bptt.flow.measurement import Measured, measured
from keras_bptt.flow.model_flow import GradientFlow
from keras_bptt.flow.recording import run
from keras_bptt.flow.spectrum import spectrum
from keras_bptt.flow.verdict import over_examples
from keras_bptt.layers.bptt import BPTT
from keras_bptt.truncation import positive_integer


def gradient_flow(
    model: keras.Model,
    x,
    y=None,
    *,
    layer: str | keras.Layer | None = None,
    loss=None,
    sample_weight=None,
    training: bool = False,
    loss_steps: int = 8,
) -> GradientFlow:
    """Measure how the gradient of a loss flows back through a model's recurrent layers.

    Use it when training stalls or blows up, to see whether the gradient vanishes or
    explodes, and where; and to choose the window of a `truncation`. It measures every
    `BPTTRNN`, `BPTTLSTM`, `BPTTGRU` and `BPTT` that the model calls. A model of Keras' own
    layers is measured by way of a copy: `gradient_flow(convert(model), x, y)`. For one
    batch it gives, for each layer and step t, with s_t its states (h_t; of an LSTM h_t and
    c_t), the norm of

        a_t = dL/ds_t          the adjoint, in full

    for each example, as the layer computes it in training, truncated and clipped as it
    says; how much of a single loss reaches k steps back; the norms of the states; a verdict
    in words with what is likely to help, or what is not finite; and the window that loses
    no more of the gradient than a tolerance. What it advises, `convert(model,
    adjoint_max_growth=1)` puts into a copy of the model. Besides,

    * of a plain RNN delta_t = dL/dz_t = a_t * f'(z_t), the share of saturated units, the
      singular values of the recurrent kernel U, and what they allow of one loss,
      |a_{t-1}| <= sigma_max(U) max f' |a_t| (Pascanu et al. 2013);
    * of an LSTM and a GRU each gate, and for how many steps it holds a state;
    * of any cell the most that one step multiplied the gradient by.

    The numbers are by-products of the layer's own backward pass, which has every adjoint in
    its hands. The weights and the state of the model (stateful layers, batch normalisation,
    seeds) stay as they are.

    Cost: of each layer the products of two forward passes and a backward pass for the
    batch, and of a backward pass for each of `loss_steps` single losses, twice where the
    layer has a truncation or clips. The model is run eagerly, once; the rest are graphs,
    traced for a second or two the first time. Memory: of one layer some (batch, timesteps,
    units) at a time. A few dozen examples are enough.

    Args:
        model: a built Keras model that calls one or more of these layers, anywhere in it:
            stacked, in `Bidirectional`, in models of models. Calls of one layer (a shared
            one) count as further examples.
        x, y: one batch, as `fit` takes it.
        layer: the name of a layer, or the layer, to measure that alone. None: all.
        loss: a Keras loss, a function or a name. None: what the model was compiled with.
        sample_weight: as `fit` takes it.
        training: what the model is called with. True includes dropout and the draws of a
            `RandomizedTruncation`, which are off otherwise.
        loss_steps: how many single losses are followed back, of layers whose outputs at
            many steps are used; spread over the sequence, the last included.

    Returns:
        A `GradientFlow`: a mapping from the names of the layers to `LayerFlow`s.

    Raises:
        ValueError: for a model that is not built, or calls no layer that is measured, or
            calls it inside a `tf.function`; for a layer that is not there; where no loss is
            given; for a batch without targets, without examples, or of arrays that do not
            belong together.

    Example:

    >>> import keras, numpy as np
    >>> from keras_bptt import BPTTRNN, gradient_flow
    >>> half = keras.initializers.Identity(0.5)
    >>> rnn = BPTTRNN(3, "linear", recurrent_initializer=half, name="rnn")
    >>> model = keras.Sequential([keras.Input((20, 2)), rnn])
    >>> model.compile(loss="mse")
    >>> flow = gradient_flow(model, np.ones((4, 20, 2)), np.ones((4, 3)))
    >>> flow["rnn"].lag_shares[:4].tolist(), flow["rnn"].half_life
    ([1.0, 0.5, 0.25, 0.125], 1.0)
    >>> flow["rnn"].verdict, flow.suggest_truncation(tolerance=0.05)
    ('vanishing', 5)

    A model of Keras' own layers:

    >>> from keras_bptt import convert
    >>> lstm = keras.layers.LSTM(3, name="lstm")
    >>> model = keras.Sequential([keras.Input((20, 2)), lstm])
    >>> model.compile(loss="mse")
    >>> flow = gradient_flow(convert(model), np.ones((4, 20, 2)), np.ones((4, 3)))
    >>> flow["lstm"].layer, list(flow["lstm"].gates)
    ('BPTTLSTM', ['input gate', 'forget gate', 'output gate'])

    References:
        - Pascanu, Mikolov & Bengio, On the difficulty of training recurrent neural
          networks, 2013 (arXiv 1211.5063): the bound.
        - Aicher, Foti & Fox, Adaptively truncating backpropagation through time to control
          gradient bias, 2019 (arXiv 1905.07473): the window.
    """
    if not positive_integer(loss_steps):
        raise ValueError(
            "`loss_steps` must be a positive integer, so many single losses are followed "
            f"back. Received: loss_steps={loss_steps!r}."
        )
    check_model(model)
    check_batch(model, loss, x, y, sample_weight)
    x, y, sample_weight = (
        tf.nest.map_structure(_tensor, t) for t in (x, y, sample_weight)
    )
    function, scale = loss_of(model, loss, x, y, sample_weight)

    def wanted(found):
        return layer is None or found is layer or found.name == layer

    done = run(model, x, function, wanted, training)
    if not done.calls:
        raise ValueError(nothing_found(model, layer, done.seen))
    numbers = _numbers(done, scale, loss_steps)
    roots = functools.cache(
        lambda: of_model(model, done.calls, x=x, y=y, sample_weight=sample_weight)
    )
    flows, layers = {}, {}
    for found in {id(call.layer): call.layer for call in done.calls}.values():
        name, number = found.name, 2
        while name in flows:
            name, number = f"{found.name}_{number}", number + 1
        own = [i for i, call in enumerate(done.calls) if call.layer is found]
        calls = [done.calls[i] for i in own]
        joined = Measured.joined([numbers[i] for i in own])
        causes = faults(name, calls, joined, done.loss, roots)
        flows[name] = _layer_flow(name, calls, joined, causes)
        layers[name] = found
    return GradientFlow(flows, layers)


def _numbers(done, scale, loss_steps):
    """What is measured of each call.

    Where the gradient overflows, as it does in float16, the scale of the loss is lowered
    until it does not, as the optimizer lowers it in training.
    """
    while True:
        several = zip(done.calls, done.cotangents(scale), strict=True)
        numbers = [measured(call, e, scale, loss_steps) for call, e in several]
        finite = all(each.finite for each in numbers)
        if finite or scale <= 1 or not math.isfinite(done.loss):
            return numbers
        scale = max(scale / 16, 1.0)


def _layer_flow(name, calls, numbers, causes):
    """The flow of a layer, from what was measured in all of its calls."""
    layer, cell = calls[0].layer, calls[0].options.cell
    inside = dict(numbers.inside)
    of_plain_rnn = _of_units(layer, inside.pop("units", None))
    found = spectrum(calls[0])
    if found is not None:
        of_plain_rnn |= found._asdict()
    names = _states(calls[0].step, len(numbers.state_adjoint_norms))
    activation = getattr(layer, "activation", None)
    return LayerFlow(
        name=name,
        layer=_class_of(layer),
        units=cell.shapes(calls[0].arguments.weights).states[cell.output][-1],
        activation=activation and getattr(activation, "__name__", str(activation)),
        truncation=layer.truncation,
        adjoint_clipnorm=layer.adjoint_clipnorm,
        adjoint_max_growth=layer.adjoint_max_growth,
        adjoint_norms=numbers.adjoint_norms,
        state_adjoint_norms=dict(zip(names, numbers.state_adjoint_norms, strict=True)),
        delta_norms=numbers.delta_norms,
        lag_shares=numbers.lags.share,
        state_lag_shares=dict(zip(names, numbers.lags.share_of_states, strict=True)),
        untruncated_lag_shares=numbers.free_lags.share,
        last_step_only=numbers.free_lags.last_step_only,
        gates={gate: _gate(each) for gate, each in inside.items()},
        state_norms=numbers.state_norms,
        state_growth=numbers.state_growth,
        not_finite=causes,
        **of_plain_rnn,
    )


def _class_of(layer):
    name = type(layer).__name__
    if type(layer) is not BPTT:
        return name
    cells = [layer.cell]
    if isinstance(layer.cell, keras.layers.StackedRNNCells):
        cells = layer.cell.cells
    return f"{name}({', '.join(type(cell).__name__ for cell in cells)})"


def _states(step, number):
    """The names of the states that a step reads."""
    if step.states:
        return step.states
    return ["s"] if number == 1 else [f"s{i}" for i in range(1, number + 1)]


def _of_units(layer, units):
    """Of the units of a plain RNN which are saturated or inactive."""
    if units is None or units.off is None:
        return {}
    share = over_examples(np.nanmean, units.off)
    if layer.activation is not keras.activations.relu:
        return {"saturated": share}
    return {"inactive": share, "dead": float(units.always_off.mean())}


def _gate(seen):
    sums, steps = seen.of_unit
    return Gate(
        mean=over_examples(np.nanmean, seen.mean),
        of_unit=sums / max(steps, 1),
        saturated=None if seen.off is None else over_examples(np.nanmean, seen.off),
        holds=seen.holds,
    )


def _tensor(value):
    return (
        value if value is None or tf.is_tensor(value) else tf.convert_to_tensor(value)
    )
