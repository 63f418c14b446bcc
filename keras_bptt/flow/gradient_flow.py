"""gradient_flow: how the gradient flows back through the recurrent layers of a model."""

import functools
import math

import keras
import numpy as np
import tensorflow as tf

from keras_bptt.cells.activations import resolve
from keras_bptt.flow.finiteness import faults, of_model
from keras_bptt.flow.inputs import check_batch, check_model, loss_of, nothing_found
from keras_bptt.flow.layer_flow import LayerFlow, over_examples
from keras_bptt.flow.measurement import Measured, measured
from keras_bptt.flow.model_flow import GradientFlow
from keras_bptt.flow.recording import run
from keras_bptt.layers.bptt_rnn import BPTTRNN
from keras_bptt.truncation import positive_integer


def gradient_flow(
    model: keras.Model,
    x,
    y=None,
    *,
    layer: str | BPTTRNN | None = None,
    loss=None,
    sample_weight=None,
    training: bool = False,
    loss_steps: int = 8,
) -> GradientFlow:
    """Measure how the gradient of a loss flows back through the BPTTRNN layers of a model.

    Use it when training stalls or blows up, to see whether the gradient vanishes or
    explodes, and where; and to choose the window of a `truncation`. For one batch it gives,
    for each layer and step t, the norms of

        a_t     = dL/dh_t      the adjoint, in full
        delta_t = dL/dz_t = a_t * f'(z_t)

    for each example, as the layer computes them in training, truncated and clipped as it
    says; how much of a single loss reaches k steps back; the norms of the states; the
    singular values of the recurrent kernel U and what they allow,

        |a_{t-1}| <= sigma_max(U) max f' |a_t|      of one loss (Pascanu et al. 2013)

    the share of saturated units; a verdict in words with what is likely to help, or what is
    not finite; and the window that loses no more of the gradient than a tolerance. What it
    advises, `convert(model, adjoint_max_growth=1)` puts into a copy of the model.

    The numbers are by-products of the layer's own backward pass, which has every delta_t
    and a_t in its hands. The weights and the state of the model (stateful layers, batch
    normalisation, seeds) stay as they are.

    Cost: of each layer the products of a forward and a backward pass for the batch, and of
    a backward pass for each of `loss_steps` single losses, twice where the layer has a
    truncation or clips. The model is run eagerly, once; the rest are graphs, traced for a
    second or two the first time. Memory: of one layer some (batch, timesteps, units) at a
    time. A few dozen examples are enough.

    Args:
        model: a built Keras model that calls one or more `BPTTRNN`, anywhere in it:
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
        ValueError: for a model that is not built, or calls no BPTTRNN, or calls it inside a
            `tf.function`; for a layer that is not there; where no loss is given; for a
            batch without targets, without examples, or of arrays that do not belong
            together.

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

    done = run(model, x, function, wanted, BPTTRNN, training)
    if not done.calls:
        raise ValueError(nothing_found(model, layer, done.seen, BPTTRNN))
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
        joined = Measured.joined([numbers[i] for i in own])
        causes = faults(name, [done.calls[i] for i in own], joined, done.loss, roots)
        flows[name] = _layer_flow(name, found, joined, causes)
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


def _layer_flow(name, layer, numbers, causes):
    """The flow of a layer, from what was measured and from its weights."""
    off = {}
    if numbers.off is not None:
        share = over_examples(np.nanmean, numbers.off)
        off = {"saturated": share}
        if layer.activation is keras.activations.relu:
            off = {"inactive": share, "dead": float(numbers.always_off.mean())}
    activation = resolve(layer.activation, layer.units, layer.compute_dtype)
    U = keras.ops.convert_to_numpy(layer.cell.recurrent_kernel).astype(np.float64)
    finite = np.all(np.isfinite(U))
    singular_values = np.full(len(U), np.nan)
    if finite:
        singular_values = np.linalg.svd(U, compute_uv=False)
    return LayerFlow(
        name=name,
        activation=getattr(layer.activation, "__name__", str(layer.activation)),
        truncation=layer.truncation,
        adjoint_clipnorm=layer.adjoint_clipnorm,
        adjoint_norms=numbers.adjoint_norms,
        delta_norms=numbers.delta_norms,
        lag_shares=numbers.lags.share,
        untruncated_lag_shares=numbers.free_lags.share,
        last_step_only=numbers.free_lags.last_step_only,
        singular_values=singular_values,
        spectral_radius=float(np.abs(np.linalg.eigvals(U)).max()) if finite else np.nan,
        max_slope=_largest_slope(activation, layer.units, layer.compute_dtype),
        **off,
        state_norms=numbers.state_norms,
        state_growth=numbers.state_growth,
        not_finite=causes,
        adjoint_max_growth=layer.adjoint_max_growth,
    )


@functools.lru_cache(maxsize=256)
def _largest_slope(activation, units, dtype):
    """The largest f' for |z| <= 50; inf if it grows on, None if f mixes units."""
    if activation.mixes:
        return None

    def largest(most):
        z = np.linspace(-most, most, 20001)  # 0 is one of them
        z = tf.constant(np.pad(z, (0, -len(z) % units)).reshape(-1, units), dtype)
        return float(tf.reduce_max(activation.vjp(z, tf.ones_like(z))))

    here, farther = largest(50.0), largest(60.0)
    return here if farther <= 1.01 * here else math.inf


def _tensor(value):
    return (
        value if value is None or tf.is_tensor(value) else tf.convert_to_tensor(value)
    )
