"""One step of the GRU. Its way back is compiled from it.

With x_t (B, D), h_t (B, H); W (D, 3H), U (H, 3H), the gates in the order z, r, h; sigma the
recurrent activation, f the activation. Reset after the product, with biases b, b' (3H):

    p = x_t W + b       q = h_{t-1} U + b'
    z, r = sigma(p_z + q_z), sigma(p_r + q_r)         g = f(p_h + r * q_h)
    h_t  = z * h_{t-1} + (1 - z) * g

Reset before it, with one bias b, there are two products that wait for each other:

    g = f(p_h + (r * h_{t-1}) U_h)                    q_z, q_r = h_{t-1} U_z, h_{t-1} U_r

The way back, with a_t the adjoint of h_t:

    delta_z = a_t * (h_{t-1} - g) * sigma'            delta_h = a_t * (1 - z) * f'
    after:   delta_r = delta_h * q_h * sigma'         delta'_h = delta_h * r
             a_{t-1} = e_{t-1} + a_t * z + (delta_z, delta_r, delta'_h) U^T
    before:  v = delta_h U_h^T                        delta_r = v * h_{t-1} * sigma'
             a_{t-1} = e_{t-1} + a_t * z + v * r + delta_z U_z^T + delta_r U_r^T

Inputs and W see (delta_z, delta_r, delta_h); U and b' see delta'_h in place of delta_h.

Source: Cho et al., Learning phrase representations using RNN encoder-decoder, 2014 (arXiv
1406.1078).
"""

import dataclasses
from collections.abc import Callable

import tensorflow as tf

from keras_bptt.cells.gates import activated, of_gates
from keras_bptt.cells.insides import Inside


@dataclasses.dataclass(frozen=True)
class GRU:
    """The step, as `tracing.trace` calls it.

    Attributes:
        activation, recurrent_activation: f and sigma.
        reset_after: whether r meets the product h U, or h.
        dropped: how many of the dropout factors are those of the inputs.
    """

    activation: Callable
    recurrent_activation: Callable
    reset_after: bool
    dropped: int = 0

    def __call__(self, x, states, factors, weights):
        (h,) = states
        z, _, g = self._gates(x, h, factors, weights)
        h = z * h + (1 - z) * g
        return h, [h]

    def insides(self, x, states, factors, weights):
        """The gates, by name."""
        z, r, _ = self._gates(x, *states, factors, weights)
        sigma = self.recurrent_activation
        return {
            "update gate": Inside(sigma, z, holds=True),
            "reset gate": Inside(sigma, r),
        }

    def _gates(self, x, h, factors, weights):
        """z, r, g."""
        W, U, *b = (tf.cast(w, x.dtype) for w in weights)
        of_x, of_h = factors[: self.dropped], factors[self.dropped :]
        step = self._reset_after if self.reset_after else self._reset_before
        b = tf.unstack(b[0]) if b and self.reset_after else b
        p = tf.split(sum(b[:1], of_gates(x, W, of_x, 3)), 3, axis=1)
        return step(p, h, U, b[1:], of_h)

    def _reset_after(self, p, h, U, b, factors):
        p_z, p_r, p_h = p
        q_z, q_r, q_h = tf.split(sum(b, of_gates(h, U, factors, 3)), 3, axis=1)
        z, r = self._gate(p_z + q_z), self._gate(p_r + q_r)
        return z, r, activated(self.activation, p_h + r * q_h)

    def _reset_before(self, p, h, U, b, factors):
        """b is none."""
        p_z, p_r, p_h = p
        U, U_h = tf.split(U, [2 * h.shape[1], h.shape[1]], axis=1)
        q_z, q_r = tf.split(of_gates(h, U, factors[:2], 2), 2, axis=1)
        z, r = self._gate(p_z + q_z), self._gate(p_r + q_r)
        q_h = of_gates(r * h, U_h, factors[2:], 1)
        return z, r, activated(self.activation, p_h + q_h)

    def _gate(self, z):
        return activated(self.recurrent_activation, z)
