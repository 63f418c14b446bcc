"""GradientFlow: the gradient flow of the layers of a model, by name."""

import collections.abc
from typing import Any

import keras

from keras_bptt.flow import plot as drawing
from keras_bptt.flow.layer_flow import LayerFlow


class GradientFlow(collections.abc.Mapping):
    """What `gradient_flow` returns: a `LayerFlow` for each layer, by the layer's name.

    In the order in which the model calls them. `print` shows the report, `plot` draws it,
    `to_dict` is plain JSON.

    Attributes:
        layers: the layers themselves, by the same names.

    >>> import keras, numpy as np
    >>> from keras_bptt import BPTTRNN, gradient_flow
    >>> model = keras.Sequential([keras.Input((10, 2)), BPTTRNN(4, name="rnn")])
    >>> flow = gradient_flow(model, np.ones((3, 10, 2)), np.ones((3, 4)), loss="mse")
    >>> list(flow), flow["rnn"].adjoint_norms.shape
    (['rnn'], (3, 10))
    """

    def __init__(
        self, flows: dict[str, LayerFlow], layers: dict[str, keras.Layer] | None = None
    ):
        self._flows = flows
        self.layers = layers or {}

    def __getitem__(self, name: str) -> LayerFlow:
        if name not in self._flows:
            raise KeyError(
                f"{name!r} is none of the layers measured: {', '.join(self)}. Name one of "
                "them."
            )
        return self._flows[name]

    def __iter__(self):
        return iter(self._flows)

    def __len__(self):
        return len(self._flows)

    def suggest_truncation(self, tolerance: float = 0.05, stride: int | None = 1):
        """The window of the only layer: k, or None (`LayerFlow.suggest_truncation`).

        Raises:
            ValueError: where there are several layers.
        """
        if len(self) > 1:
            raise ValueError(
                "Every layer has a suggestion of its own. Received: a flow through "
                f"{', '.join(self)}. Ask one: flow[{next(iter(self))!r}]"
                ".suggest_truncation()."
            )
        (flow,) = self.values()
        return flow.suggest_truncation(tolerance, stride)

    def plot(self, tolerance: float = 0.05):
        """Draw the flow: a row for each layer, with

        * the mean of |dL/dh_t| and of |dL/dz_t| against t, and the band of the examples
          between the quantiles 10 % and 90 %;
        * how much of a loss reaches so many steps back, and the window suggested for that
          `tolerance`;
        * the singular values of the recurrent kernel, beside 1 / max f'.

        Returns:
            The `matplotlib.figure.Figure`. `figure.savefig(...)` writes it.

        Raises:
            ImportError: where matplotlib is not installed.
        """
        return drawing.plot(self._flows, tolerance)

    def summary(self) -> str:
        """The report for a terminal, a block of lines for each layer."""
        return "\n\n".join(flow.summary() for flow in self.values())

    __repr__ = summary

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON, by the names of the layers."""
        return {name: flow.to_dict() for name, flow in self.items()}
