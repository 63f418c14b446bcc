"""GradientFlow: the gradient flow of the layers of a model, by name."""

import collections.abc
from typing import Any

import keras

from keras_bptt.flow import plot as drawing
from keras_bptt.flow.layer_flow import LayerFlow
from keras_bptt.runtime.wording import described


class GradientFlow(collections.abc.Mapping):
    """What `gradient_flow` returns: a `LayerFlow` for each layer, by the layer's name.

    In the order in which the model calls them. `print` shows the report, `plot` draws it,
    `compare` draws it beside another one, `to_dict` is plain JSON.

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

    def plot(self, path=None, *, tolerance: float = 0.05):
        """Draw the flow: a row of three panels for each layer, with

        * the median of |dL/dh_t| against t, and the band of the examples between the
          quantiles 10 % and 90 %; of several states |dL/ds_t| and each of them; and the
          median of |dL/dz_t|;
        * how much of a loss reaches so many steps back, and the window suggested for that
          `tolerance`;
        * of a plain RNN the singular values of U beside 1 / max f', of an LSTM and a GRU
          the gates against t, of any other cell what each step multiplied the gradient by.

        Where numbers are not finite the panel is shaded. Of more than 1000 steps or lags
        medians of neighbours are drawn.

        Args:
            path: a file to save it in, or None.
            tolerance: of the window, as in `suggest_truncation`.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            ImportError: where matplotlib is not installed.
        """
        return drawing.of_model(self._flows, tolerance, path)

    def compare(self, other, path=None, *, labels=("before", "after"), ax=None):
        """Draw this flow and another one together: before and after training, say.

        A row for each layer that both have, with the gradient against t, and how much of a
        loss reaches so many steps back.

        Args:
            other: a `GradientFlow`.
            path: a file to save it in, or None.
            labels: a name for this flow and one for the other.
            ax: `matplotlib.axes.Axes` for the gradient against t, of flows that have one
                layer in common; no figure is made then.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            ValueError: where no layer is in both, or with `ax` several are.
            ImportError: where matplotlib is not installed.
        """
        if not isinstance(other, GradientFlow):
            raise ValueError(
                "`other` must be a GradientFlow, what gradient_flow returns. Received: "
                f"{described(other)}. Pass gradient_flow(...)."
            )
        if len(labels) != 2:
            raise ValueError(
                "`labels` must be two names, one for each flow. Received: "
                f"labels={labels!r}. Pass ('before', 'after')."
            )
        pairs = {name: (self[name], other[name]) for name in self if name in other}
        if not pairs:
            raise ValueError(
                "Flows are compared layer by layer, by name, and no layer is in both. "
                f"Received: a flow through {', '.join(self)} and one through "
                f"{', '.join(other)}. Name the layers alike."
            )
        if ax is not None and len(pairs) > 1:
            raise ValueError(
                f"`ax` shows one layer. Received: flows that both have {', '.join(pairs)}. "
                "Measure one, gradient_flow(..., layer=...), or leave `ax` out."
            )
        return drawing.compared(pairs, labels, path, ax)

    def summary(self) -> str:
        """The report for a terminal, a block of lines for each layer."""
        return "\n\n".join(flow.summary() for flow in self.values())

    __repr__ = summary

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON, by the names of the layers."""
        return {name: flow.to_dict() for name, flow in self.items()}
