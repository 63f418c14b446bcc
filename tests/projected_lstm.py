"""Cells for tests alone: the engine is to know nothing of a cell but its contract.

* `ProjectedLSTM`: states that recur and one that does not, each state of its own width, a
  saved tensor and a delta of others. Its subclasses ask for other things on the way back.
* `MatrixIntegrator`: a state with two axes, drives, saved tensors and deltas with two axes
  and with one. `PooledIntegrator`: some of them with none.
"""

import dataclasses

import tensorflow as tf

from keras_bptt.cells.cell import Cell, Cost, Shapes
from keras_bptt.runtime.tensors import product, sum_of_products, times, total, widened


@dataclasses.dataclass(frozen=True)
class ProjectedLSTM(Cell):
    """An LSTM that shows a projection of h, which no step reads.

        z = (d x_t) W + b + (r h_{t-1}) U           gates i, f, o = sigmoid(z), g = tanh(z)
        c_t = f c_{t-1} + i g    h_t = o tanh(c_t)    p_t = h_t P

    States h, c (units,) and p (outputs,); weights W, U, b, P; noise d, r.

        a = a^h + a^p P^T    u = a^c + a o (1 - tanh(c_t)^2)
        delta of z: u g i (1 - i),  u c_{t-1} f (1 - f),  u i (1 - g^2),
                    a tanh(c_t) o (1 - o);       delta of p: a^p
        the adjoints of h_{t-1}, c_{t-1}, p_{t-1} are  r (delta_z U^T),  u f,  0
    """

    output = 2
    recurs = (True, True, False)

    def shapes(self, weights):
        _, U, _, P = weights
        units, outputs = P.shape
        return Shapes(
            states=((units,), (units,), (outputs,)),
            saved=self.saved_shapes(U.shape),
            deltas=((4 * units,), (outputs,)),
        )

    def saved_shapes(self, shape):
        return ((shape[1],),)

    def cost(self, weights):
        _, U, _, P = weights
        units, outputs = P.shape
        return Cost(products=units * (4 * units + outputs), numbers=6 * units + outputs)

    def project(self, weights, x, noise):
        W, _, b, _ = weights
        d, _ = noise
        return (product(times(d, x), W) + b,)

    def gates(self, weights, drive, before, noise):
        """The activated gates, side by side."""
        _, U, _, _ = weights
        (x_W_b,), (h, *_), (_, r) = drive, before, noise
        z_i, z_f, z_g, z_o = tf.split(x_W_b + product(times(r, h), U), 4, -1)
        return tf.concat(
            [*map(tf.sigmoid, (z_i, z_f)), tf.tanh(z_g), tf.sigmoid(z_o)], -1
        )

    def step(self, weights, drive, before, noise):
        *_, P = weights
        _, c, _ = before
        gates = self.gates(weights, drive, before, noise)
        i, f, g, o = tf.split(gates, 4, -1)
        c = f * c + i * g
        h = o * tf.tanh(c)
        return (h, c, product(h, P)), self.saved(gates)

    def saved(self, gates):
        return (gates,)

    def found_gates(self, weights, point, noise):
        """The gates, where a step is differentiated."""
        del weights, noise
        return point.saved[0]

    def weights_back(self, weights):
        _, U, _, P = weights
        return {"all": weights, "U^T": tf.transpose(U), "P^T": tf.transpose(P)}

    def step_back(self, weights_back, point, adjoints, noise):
        (a_h, a_c, a_p), (_, r) = adjoints, noise
        (_, c_before, _), (_, c, _) = point.before, point.after
        i, f, g, o = tf.split(
            self.found_gates(weights_back["all"], point, noise), 4, -1
        )
        tanh_c = tf.tanh(c)
        a_h += product(a_p, weights_back["P^T"])
        u = a_c + a_h * o * (1 - tanh_c * tanh_c)
        delta_i = u * g * i * (1 - i)
        delta_f = u * c_before * f * (1 - f)
        delta_g = u * i * (1 - g * g)
        delta_o = a_h * tanh_c * o * (1 - o)
        delta = tf.concat([delta_i, delta_f, delta_g, delta_o], -1)
        h_back = times(r, product(delta, weights_back["U^T"]))
        return (h_back, u * f, tf.zeros_like(a_p)), (delta, a_p)

    def gradients(self, weights, x, point, deltas, noise):
        W, _, _, _ = weights
        (delta, a_p), (d, r) = deltas, noise
        h_before, (h, *_) = point.before[0], point.after
        d_W = sum_of_products(times(d, x()), delta)
        d_U = sum_of_products([times(r, h) for h in h_before], delta)
        d_x = times(d, product(delta, tf.transpose(W)))
        return (d_W, d_U, total(delta, [0, 1]), sum_of_products(h, a_p)), d_x


class RecomputedLSTM(ProjectedLSTM):
    """The gates are computed again for the way back, for many steps at once."""

    keeps_saved = False


class DrivenLSTM(ProjectedLSTM):
    """Each step back computes its gates, from the drive; nothing is saved."""

    wants = frozenset({"drive", "before"})

    def saved_shapes(self, shape):
        return ()

    def saved(self, gates):
        return ()

    def found_gates(self, weights, point, noise):
        return self.gates(weights, point.drive, point.before, noise)


class MixedLSTM(DrivenLSTM):
    """It wants everything, and what it saves, f alone, is computed again."""

    wants = frozenset({"drive", "before", "saved"})
    keeps_saved = False

    def saved_shapes(self, shape):
        return ((shape[0],),)

    def saved(self, gates):
        return (tf.split(gates, 4, -1)[1],)

    def found_gates(self, weights, point, noise):
        gates = self.gates(weights, point.drive, point.before, noise)
        i, _, g, o = tf.split(gates, 4, -1)
        return tf.concat([i, *point.saved, g, o], -1)


class CountsLSTM(ProjectedLSTM):
    """Its inputs are integers, which have no gradient."""

    def project(self, weights, x, noise):
        return super().project(weights, tf.cast(x, weights[0].dtype), noise)

    def gradients(self, weights, x, point, deltas, noise):
        def numbers():
            return tf.cast(x(), weights[0].dtype)

        d_weights, _ = super().gradients(weights, numbers, point, deltas, noise)
        return d_weights, None


@dataclasses.dataclass(frozen=True)
class MatrixIntegrator(Cell):
    """A leaky integrator whose state is a matrix S_t, and whose leak the inputs set.

        Z = (d X_t) W + U (r S_{t-1})         X_t (rows, features), S_t (rows, columns)
        l = sigmoid(X_t k)                    (rows,)
        S_t = l S_{t-1} + tanh(Z)

    Weights W, U, k; noise d, r. With a the adjoint of S_t:

        delta: of Z  (1 - tanh(Z)^2) a,   of X_t k  l (1 - l) sum over columns of a S_{t-1}
        the adjoint of S_{t-1} is  l a + r (U^T delta_Z)
    """

    def shapes(self, weights):
        W, U, _ = weights
        rows, columns, leak = U.shape[0], W.shape[1], self.leak_shape(U.shape[0])
        return Shapes(
            states=((rows, columns),), saved=(leak,), deltas=((rows, columns), leak)
        )

    def leak_shape(self, rows):
        return (rows,)

    def cost(self, weights):
        W, U, _ = weights
        rows, columns = U.shape[0], W.shape[1]
        return Cost(products=rows * rows * columns, numbers=rows * columns)

    def summed(self, t):
        """The sum over what has one leak in common: the last axis."""
        return tf.reduce_sum(t, -1)

    def beside(self, leak):
        """The leak so that it can be multiplied with a matrix."""
        return leak[..., None]

    def project(self, weights, x, noise):
        W, _, k = weights
        d, _ = noise
        return product(times(d, x), W), self.summed(x * k)

    def step(self, weights, drive, before, noise):
        _, U, _ = weights
        (x_W, x_k), (S,), (_, r) = drive, before, noise
        leak = tf.sigmoid(x_k)
        y = tf.tanh(x_W + tf.matmul(U, times(r, S)))
        return (self.beside(leak) * S + y,), (leak,)

    def step_back(self, weights, point, adjoints, noise):
        _, U, _ = weights
        (a,), (_, r) = adjoints, noise
        (S_before,), (S,), (leak,) = point.before, point.after, point.saved
        y = S - self.beside(leak) * S_before
        delta = a * (1 - y * y)
        delta_leak = self.summed(a * S_before) * leak * (1 - leak)
        back = times(r, tf.matmul(U, delta, transpose_a=True))
        return (self.beside(leak) * a + back,), (delta, delta_leak)

    def gradients(self, weights, x, point, deltas, noise):
        W, _, k = weights
        (delta, delta_leak), (d, r) = deltas, noise
        S_before = tf.concat(point.before[0], 0)
        delta_leak = self.beside(delta_leak)
        d_W = sum_of_products(times(d, x()), delta)
        d_U = tf.einsum("tbqc,tbrc->qr", widened(delta), widened(times(r, S_before)))
        d_k = total(x() * delta_leak, [0, 1, 2])
        d_x = times(d, product(delta, tf.transpose(W))) + delta_leak * k
        return (d_W, d_U, d_k), d_x


class PooledIntegrator(MatrixIntegrator):
    """One leak for an example: what is saved of a row, a drive and a delta are numbers."""

    def leak_shape(self, rows):
        return ()

    def summed(self, t):
        return tf.reduce_sum(t, [-2, -1])

    def beside(self, leak):
        return leak[..., None, None]
