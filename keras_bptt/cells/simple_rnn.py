"""The plain recurrent network: one step, and its gradient written out.

Forward, for one step, with x_t the inputs, h_t the hidden state, z_t the pre-activation, f
the activation, d and r the factors of input and recurrent dropout:

    z_t = (d x_t) W + b + (r h_{t-1}) U         W kernel, U recurrent_kernel, b bias
    h_t = f(z_t)

Backward, with a_t = dL/dh_t in full, the adjoint:

    delta_t = f'(z_t) a_t                       dL/dz_t
    the adjoint of h_{t-1} is  r (delta_t U^T)

    dW = sum_t (d x_t)^T delta_t     dU = sum_t (r h_{t-1})^T delta_t     db = sum_t delta_t
    dx_t = d (delta_t W^T)

Sources: Elman, Finding structure in time, 1990; Werbos, Backpropagation through time: what
it does and how to do it, 1990.
"""

import dataclasses

import tensorflow as tf

from keras_bptt.cells.activations import Activation
from keras_bptt.cells.cell import Cell, Cost, Shapes
from keras_bptt.runtime.tensors import in_turn, product, sum_of_products, times, total


@dataclasses.dataclass(frozen=True)
class SimpleRNN(Cell):
    """h_t = f(x_t W + h_{t-1} U + b), with weights W, U and, perhaps, b.

    Its one state is h, its one delta that of z. Where h tells f'(z), nothing else is kept
    for the way back; else z is computed again, in one product for many steps.
    """

    activation: Activation
    keeps_saved = False

    @property
    def wants(self):
        told = self.activation.slope_of_output is not None
        return frozenset() if told else frozenset({"saved"})

    def called_with(self, dtype):
        return SimpleRNN(self.activation.called_with(dtype))

    def shapes(self, weights):
        _, U, *_ = weights
        units = (U.shape[0],)
        return Shapes(states=(units,), saved=(units,), deltas=(units,))

    def cost(self, weights):
        _, U, *_ = weights
        return Cost(products=U.shape[0] ** 2, numbers=U.shape[0])

    def project(self, weights, x, noise):
        W, _, *b = weights
        d, _ = noise
        z = product(times(d, x), W)
        return (z + b[0] if b else z,)

    def step(self, weights, drive, before, noise):
        _, U, *_ = weights
        (x_W_b,), (h,), (_, r) = drive, before, noise
        z = x_W_b + product(times(r, h), U)
        return (self.activation(z),), (z,)

    def weights_back(self, weights):
        _, U, *_ = weights
        return tf.transpose(U)

    def step_back(self, U_T, point, adjoints, noise):
        (a,), (_, r) = adjoints, noise
        if self.activation.slope_of_output is None:
            delta = self.activation.vjp(*point.saved, a)
        else:
            delta = self.activation.vjp_at_output(*point.after, a)
        return (times(r, product(delta, U_T)),), (delta,)

    def gradients(self, weights, x, point, deltas, noise):
        W, _, *b = weights
        (delta,), (h_before,), (d, r) = deltas, point.before, noise
        d_U, d_W, *d_b = in_turn(
            lambda: sum_of_products([times(r, h) for h in h_before], delta),
            lambda: sum_of_products(times(d, x()), delta),
            *[lambda: total(delta, [0, 1])] * len(b),
        )
        return (d_W, d_U, *d_b), times(d, product(delta, tf.transpose(W)))
