"""The gradient flow of one layer: its numbers, and what follows from them."""

import dataclasses
import math
import numbers
from typing import Any

import numpy as np

from keras_bptt.flow import plot as drawing
from keras_bptt.flow import verdict
from keras_bptt.flow.advice import advice
from keras_bptt.flow.verdict import over_examples
from keras_bptt.flow.windows import biases
from keras_bptt.truncation import RandomizedTruncation, Truncation, positive_integer


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Gate:
    """What a gate of a layer does, over the examples of a batch.

    Attributes:
        mean: its mean over units and examples, for each step.
        of_unit: its mean over steps and examples, for each unit.
        saturated: the share of units where the slope of its activation is less than a
            twentieth of the largest one, for each step; None where that is not known, as it
            is for sigmoid, tanh and hard_sigmoid.
        holds: whether it is the gate that multiplies the state of the step before: the
            forget gate of an LSTM, the update gate of a GRU.
    """

    mean: np.ndarray
    of_unit: np.ndarray
    saturated: np.ndarray | None = None
    holds: bool = False

    @property
    def memory(self) -> np.ndarray:
        """1 / (1 - the mean of each unit): for how many steps a unit holds its state.

        inf where the gate is 1 or more.
        """
        with np.errstate(divide="ignore"):
            return np.where(
                self.of_unit < 1, 1 / np.maximum(1 - self.of_unit, 0), np.inf
            )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LayerFlow:
    """How the gradient flows back through one layer: what `gradient_flow` returns of it.

    With s_t the states after step t, a_t = dL/ds_t their adjoints in full and delta_t =
    dL/dz_t, as they are in training, truncated and clipped as the layer says, in the units
    of the loss (a mean loss has divided by the batch). A plain RNN and a GRU have one
    state, h_t. An LSTM has two, s_t = (h_t, c_t); the adjoint of c_t is what comes back to
    it from step t + 1, and what comes through h_t of the same step is in that of h_t. A
    cell of your own may have any number.

    Norms are over the numbers of an example, of all states jointly where nothing else is
    said. Steps are in the order of processing; where a mask skips one there is NaN. A loss,
    in what is said by lag, is the cotangent e_s of one step, and lag k is k real steps
    before it:

        share of lag k = sum |a_{s-k}| / sum |e_s|      a of the loss at s alone

    over the examples and the losses that have so many steps before them (of many losses a
    sample, spread over the sequence). An output that is no state has another unit than the
    states; then |a_{s-1}| stands in the place of |e_s|, and lag 0 counts 1.

    Attributes:
        name: of the layer.
        layer: its class, and that of the cell of a `BPTT`.
        units: the size of its output.
        activation: its name; None of a cell of your own.
        truncation, adjoint_clipnorm, adjoint_max_growth: of the layer.
        adjoint_norms: |a_t| (examples, timesteps).
        state_adjoint_norms: the same of each state, by name.
        delta_norms: |delta_t| (examples, timesteps). z_t is what the cell's activations are
            of: of an LSTM that of all four, of a cell of your own whatever is found to lead
            to the gradients of all weights. None where no one tensor does, as in a GRU.
        lag_shares: how much of a loss reaches k = 0, 1, ... steps back, as a share of what
            it is at its own step; with the layer's truncation and clipping.
        state_lag_shares: the same of each state, by name.
        untruncated_lag_shares: that of all states without truncation and clipping of this
            layer. What layers above it send is as they send it, truncated where they are.
        last_step_only: whether the loss reads the last state alone.
        gates: of an LSTM and a GRU each gate, by name. A gate has its `mean` for each step
            and `of_unit` for each unit, the share of its units that is `saturated` for each
            step, whether it `holds` the state of the step before, and its `memory`: for how
            many steps it would hold each unit, 1 / (1 - its mean).
        singular_values: of the plain RNN's U, the recurrent kernel, the largest first. None
            of another cell; so are the next two.
        spectral_radius: the largest absolute value of U's eigenvalues.
        max_slope: the largest value of f'; infinite where there is none, None where the
            activation mixes units.
        saturated: of the plain RNN the share of units where f' is less than a twentieth of
            its largest value, for each step; None but for tanh, sigmoid and hard_sigmoid.
        inactive: of the plain RNN the share of units that are 0, for each step; None but
            for relu.
        dead: the share of units that are 0 at every step of every example; None but for
            relu.
        state_norms: |s_t| (examples, timesteps); infinite where a state is not finite.
        state_growth: the largest |s_t| as a multiple of what has come in until then, |s_0|
            and the norms of what each step would make of states that are 0. At most 1 where
            `bound` is.
        not_finite: what is not finite, in words, of that which the numbers rest on: causes
            (inputs, targets, weights, the initial state), then states and the loss.

    Example:

    >>> import keras, numpy as np
    >>> from keras_bptt import BPTTLSTM, gradient_flow
    >>> model = keras.Sequential([keras.Input((10, 2)), BPTTLSTM(4, name="lstm")])
    >>> flow = gradient_flow(model, np.ones((3, 10, 2)), np.ones((3, 4)), loss="mse")
    >>> flow = flow["lstm"]
    >>> flow.adjoint_norms.shape, list(flow.state_adjoint_norms), list(flow.gates)
    ((3, 10), ['h', 'c'], ['input gate', 'forget gate', 'output gate'])
    >>> flow.gates["forget gate"].memory.shape, flow.last_step_only
    ((4,), True)
    """

    name: str
    layer: str
    units: int
    activation: str | None
    truncation: Truncation | RandomizedTruncation | None
    adjoint_clipnorm: float | None
    adjoint_max_growth: float | None
    adjoint_norms: np.ndarray
    state_adjoint_norms: dict[str, np.ndarray]
    delta_norms: np.ndarray | None
    lag_shares: np.ndarray
    state_lag_shares: dict[str, np.ndarray]
    untruncated_lag_shares: np.ndarray
    last_step_only: bool
    gates: dict[str, Gate] = dataclasses.field(default_factory=dict)
    singular_values: np.ndarray | None = None
    spectral_radius: float | None = None
    max_slope: float | None = None
    saturated: np.ndarray | None = None
    inactive: np.ndarray | None = None
    dead: float | None = None
    state_norms: np.ndarray | None = None
    state_growth: float = 0.0
    not_finite: tuple[str, ...] = ()

    @property
    def adjoint(self) -> str:
        """How reports write a_t: "dL/dh_t", or "dL/ds_t" of several states jointly."""
        names = list(self.state_adjoint_norms)
        return f"dL/d{names[0]}_t" if len(names) == 1 else "dL/ds_t"

    @property
    def clipped(self) -> bool:
        """Whether the layer clips its adjoints."""
        return (self.adjoint_clipnorm, self.adjoint_max_growth) != (None, None)

    @property
    def timesteps(self) -> int:
        """How many steps a sequence has at most, masked ones included."""
        return self.adjoint_norms.shape[1]

    @property
    def mean_adjoint(self) -> np.ndarray:
        """The mean of |a_t| over the examples, for each step."""
        return over_examples(np.nanmean, self.adjoint_norms)

    @property
    def mean_delta(self) -> np.ndarray | None:
        """The mean of |delta_t| over the examples, for each step."""
        if self.delta_norms is None:
            return None
        return over_examples(np.nanmean, self.delta_norms)

    def adjoint_quantiles(self, q=(0.1, 0.5, 0.9)) -> np.ndarray:
        """Quantiles of |a_t| over the examples, (quantiles, timesteps)."""
        return over_examples(
            lambda a, axis: np.nanquantile(a, q, axis=axis), self.adjoint_norms
        )

    @property
    def sigma_max(self) -> float | None:
        """The largest singular value of U; None of another cell than the plain RNN."""
        return None if self.singular_values is None else float(self.singular_values[0])

    @property
    def bound(self) -> float | None:
        """sigma_max(U) max f': no step multiplies |a_t| by more (Pascanu et al. 2013).

        Below 1 the gradient vanishes, whatever the inputs are: at least as fast as its
        powers. Above 1 it may explode, and need not. None for an activation that mixes
        units, and of another cell. (Recurrent dropout, which scales the state, is left
        out.)
        """
        largest = self.sigma_max
        if largest is None or self.max_slope is None:
            return None
        return largest * self.max_slope

    @property
    def factor(self) -> float:
        """By how much one step multiplies the gradient: the geometric mean over all lags.

        Of the gradient without truncation and clipping. NaN where no step is reached from
        another one.
        """
        shares = self.untruncated_lag_shares
        known = np.flatnonzero((shares > 0) & np.isfinite(shares))
        if len(known) < 2:
            return 0.0 if len(shares) > 1 and len(known) == 1 else math.nan
        return float((shares[known[-1]] / shares[0]) ** (1 / known[-1]))

    @property
    def largest_step(self) -> float:
        """The most that one step multiplies the gradient by, of the steps of all lags.

        Of the gradient without truncation and clipping, over all examples and losses. NaN
        where no step is reached from another one.
        """
        shares = self.untruncated_lag_shares
        with np.errstate(divide="ignore", invalid="ignore"):
            steps = shares[1:] / shares[:-1]
        steps = steps[~np.isnan(steps)]
        return float(np.max(steps)) if len(steps) else math.nan

    @property
    def half_life(self) -> float:
        """The number of steps after which half of the gradient is left; inf: it grows."""
        factor = self.factor
        if not factor < 1:
            return math.nan if math.isnan(factor) else math.inf
        return 0.0 if factor == 0 else math.log(0.5) / math.log(factor)

    @property
    def finite(self) -> bool:
        """Whether what is said of the gradient rests on finite numbers."""
        return not self.not_finite and bool(
            np.all(np.isfinite(self.untruncated_lag_shares))
        )

    @property
    def verdict(self) -> str:
        """The case: "healthy", "vanishing", "exploding", "truncated", "exploding states"
        (the forward pass does), "not finite" or "none" (no gradient)."""
        return verdict.kind(self)

    @property
    def explanation(self) -> str:
        """The verdict in words, with its numbers."""
        return verdict.explanation(self)

    @property
    def advice(self) -> list[str]:
        """What is likely to help, the most likely first; nothing if it is not finite."""
        return advice(self)

    def truncation_bias(self, steps: int, stride: int | None = None) -> float:
        """An estimate of the relative bias of `Truncation(steps, stride)`.

        The share of the norms by lag, without truncation and clipping, that lies beyond the
        window, as a mean over the losses of a block:

            bias = mean over d = 0 ... stride - 1 of  rest(steps - d) / rest(0)
            rest(k) = sum of the shares of the lags k, k + 1, ...

        Beyond the lags that the sequences have the shares go on decaying by the factor of
        the second half of those they have (least squares of the logarithms): the sequence
        counts as part of a longer one. Where that factor is not below 1, the bias is 1.

        It is the bound of Aicher et al. 2019, relative to the sum of all contributions. It
        says how much of the gradient is missing if all lags pull in one direction; what a
        task needs may be in the small part, and the norms are those of these weights.

        Args:
            steps, stride: of the `Truncation`. Where the loss reads the last state alone,
                the stride makes no difference.
        """
        if steps >= self.timesteps:
            return 0.0
        found = self._biases(stride)
        return float(found[min(steps, len(found)) - 1])

    def suggest_truncation(
        self, tolerance: float = 0.05, stride: int | None = 1
    ) -> int | None:
        """The smallest k such that the bias of `Truncation(k, stride)` is within tolerance.

        Measured without truncation and clipping, so that the suggestion may exceed the
        window that the layer has.

        Args:
            tolerance: between 0 and 1, the relative bias (`truncation_bias`).
            stride: the length of a block. 1: every loss reaches k steps back. None: chunks,
                stride = k, as `truncation=k` means, whose first losses reach less far:
                they take a larger k, unless the loss reads the last state alone.

        Returns:
            k, or None: no window shorter than the sequence will do, or what it would rest
            on is not `finite`.
        """
        check_tolerance(tolerance)
        if stride is not None and not positive_integer(stride):
            raise ValueError(
                "`stride` must be a positive integer, the length of a block, or None. "
                f"Received: stride={stride!r}."
            )
        if not self.finite:
            return None
        enough = np.flatnonzero(self._biases(stride)[:-1] <= tolerance)
        return int(enough[0]) + 1 if len(enough) else None

    def _biases(self, stride):
        own = 1 if self.last_step_only else stride
        return biases(self.untruncated_lag_shares, own)

    def plot(self, path=None, *, ax=None, tolerance: float = 0.05):
        """Draw the three panels of `GradientFlow.plot`; in `ax` the first of them alone.

        Args:
            path: a file to save it in, or None.
            ax: `matplotlib.axes.Axes` for the gradient against t; no figure is made then.
            tolerance: of the window, as in `suggest_truncation`.

        Returns:
            The `matplotlib.figure.Figure`.
        """
        return drawing.of_layer(self, tolerance, path, ax)

    def summary(self) -> str:
        """The report for a terminal."""
        return verdict.summary(self)

    __repr__ = summary

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON; null where a number is missing or not finite."""
        kept = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.truncation is not None:
            kept["truncation"] = self.truncation.get_config()
        kept["gates"] = {
            name: dataclasses.asdict(gate) | {"memory": gate.memory}
            for name, gate in self.gates.items()
        }
        derived = (
            "mean_adjoint mean_delta sigma_max bound factor largest_step half_life verdict "
            "explanation advice"
        )
        kept |= {name: getattr(self, name) for name in derived.split()}
        kept["suggested_truncation"] = self.suggest_truncation()
        return {name: _plain(value) for name, value in kept.items()}


def check_tolerance(tolerance):
    if not is_number(tolerance) or not 0 < tolerance < 1:
        raise ValueError(
            "`tolerance` must be a number between 0 and 1, the relative bias of the "
            f"gradient. Received: tolerance={tolerance!r}. Pass 0.05 for 5 %."
        )


def is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _plain(value):
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, int)):
        return float(value) if math.isfinite(value) else None
    return value
