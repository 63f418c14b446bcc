"""One step of the LSTM. Its way back is compiled from it.

With x_t (B, D), h_t and c_t (B, H); W (D, 4H), U (H, 4H), b (4H), the gates in the order
i, f, g, o; sigma the recurrent activation, f the activation:

    z = x_t W + h_{t-1} U + b
    i, f, o = sigma(z_i), sigma(z_f), sigma(z_o)      g = f(z_g)
    c_t = f * c_{t-1} + i * g                         h_t = o * f(c_t)

What `derived` finds is what is written by hand elsewhere: i, f, g and o are kept, f(c_t)
is computed again, and one delta of 4H numbers leads to one product each for dL/dW, dL/dU
and dL/dx. With a^h_t and a^c_t the adjoints of h_t and c_t:

    u       = a^c_t + a^h_t * o * f'(c_t)
    delta_i = u * g * sigma'(z_i)             delta_f = u * c_{t-1} * sigma'(z_f)
    delta_g = u * i * f'(z_g)                 delta_o = a^h_t * f(c_t) * sigma'(z_o)
    a^h_{t-1} = e_{t-1} + delta U^T           a^c_{t-1} = u * f

Sources: Hochreiter & Schmidhuber, Long short-term memory, 1997; Gers, Schmidhuber &
Cummins, Learning to forget, 2000.
"""

import dataclasses
from collections.abc import Callable

import tensorflow as tf

from keras_bptt.cells.gates import activated, of_gates
from keras_bptt.cells.insides import Inside


@dataclasses.dataclass(frozen=True)
class LSTM:
    """The step, as `tracing.trace` calls it.

    Attributes:
        activation, recurrent_activation: f and sigma.
        dropped: how many of the dropout factors are those of the inputs.
    """

    activation: Callable
    recurrent_activation: Callable
    dropped: int = 0

    def __call__(self, x, states, factors, weights):
        _, c = states
        i, f, g, o = self._gates(x, states, factors, weights)
        c = f * c + i * g
        h = o * activated(self.activation, c)
        return h, [h, c]

    def insides(self, x, states, factors, weights):
        """The gates, by name."""
        i, f, _, o = self._gates(x, states, factors, weights)
        sigma = self.recurrent_activation
        return {
            "input gate": Inside(sigma, i),
            "forget gate": Inside(sigma, f, holds=True),
            "output gate": Inside(sigma, o),
        }

    def _gates(self, x, states, factors, weights):
        """i, f, g, o."""
        h, _ = states
        W, U, *b = (tf.cast(w, x.dtype) for w in weights)
        drive = of_gates(x, W, factors[: self.dropped], 4)
        z = sum(b, drive) + of_gates(h, U, factors[self.dropped :], 4)
        z_i, z_f, z_g, z_o = tf.split(z, 4, axis=1)
        i, f, o = (activated(self.recurrent_activation, z) for z in (z_i, z_f, z_o))
        return i, f, activated(self.activation, z_g), o
