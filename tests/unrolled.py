"""A recurrent layer in plain sight: Keras' own cell, step by step, and autodiff.

This is what the layers of the package are compared with where they do more than their
hosts. It knows no window, no block and no equation of backpropagation. A truncation is
`tf.stop_gradient`: for each block of losses the steps run once more, from a state through
which nothing comes back. What scales an adjoint stands at the state whose adjoint it is.
"""

import functools
import inspect

import keras
import tensorflow as tf

from keras_bptt import RandomizedTruncation


def norm(tensors):
    """The norm of each example's numbers, (batch, 1)."""
    flat = [tf.reshape(t, [t.shape[0], -1]) for t in tensors]
    return tf.norm(tf.concat(flat, 1), axis=1, keepdims=True)


def beside(condition, t):
    """A condition for each row, with as many axes as `t`."""
    return tf.reshape(condition, [-1] + [1] * (len(t.shape) - 1))


def sent(states, total):
    """The states that outputs are made of. Back: |e_t| joins what `total` sums up."""

    @tf.custom_gradient
    def identity(total, *states):
        def back(*e):
            return norm(e), *e

        return [tf.identity(s) for s in states], back

    return identity(total, *states)


def clipped(states, total, limit):
    """The states and `total`. Back: an adjoint larger than `limit` of the sum is scaled."""

    @tf.custom_gradient
    def identity(total, *states):
        def back(total, *a):
            size, largest = norm(a), limit(total)
            too_large = size > largest
            scale = tf.where(too_large, largest / tf.where(too_large, size, 1), 1)
            scale = tf.stop_gradient(scale)
            return total, *(beside(scale, each) * each for each in a)

        return [tf.identity(each) for each in (total, *states)], back

    total, *states = identity(total, *states)
    return states, total


@tf.custom_gradient
def linked(state, factor):
    """The state. Back: what comes from the next step times a factor."""
    return tf.identity(state), lambda a: (beside(factor, a) * a, None)


def where(condition, yes, no):
    """Of each tensor the rows of `yes` where the condition holds, else those of `no`."""
    pairs = zip(yes, no, strict=True)
    return [tf.where(beside(condition, a), a, b) for a, b in pairs]


class Unrolled(keras.layers.Layer):
    """A built layer of Keras, computed step by step.

    Args:
        host: the layer, whose cell and options count.
        dense: a built Dense for the outputs, or None.
        truncation, adjoint_clipnorm, adjoint_max_growth: as the layers of the package
            define them.
    """

    def __init__(
        self,
        host,
        dense=None,
        truncation=None,
        adjoint_clipnorm=None,
        adjoint_max_growth=None,
    ):
        super().__init__(dtype=host.dtype_policy)
        self.host, self.dense, self.truncation = host, dense, truncation
        self.clipnorm, self.growth = adjoint_clipnorm, adjoint_max_growth
        if isinstance(truncation, RandomizedTruncation):
            self.draws = keras.random.SeedGenerator(truncation.seed)
        self.supports_masking = True
        self.built = True

    def compute_mask(self, x, mask=None):
        return self.host.compute_mask(x, mask)

    def compute_output_shape(self, x_shape, initial_state_shape=None):
        shapes = self.host.compute_output_shape(x_shape)
        y, *state = shapes if self.host.return_state else [shapes]
        y = y if self.dense is None else (*y[:-1], self.dense.units)
        return (y, *state) if state else y

    def call(self, x, initial_state=None, mask=None, training=False):
        host = self.host
        real = tf.ones(x.shape[:2], bool) if mask is None else tf.cast(mask, bool)
        if initial_state is None:
            initial_state = host.get_initial_state(x.shape[0])
        states = keras.tree.flatten(initial_state)
        states = [tf.cast(s, host.cell.compute_dtype) for s in states]
        factors = self._factors(x) if training else None
        if host.go_backwards:
            x, real = x[:, ::-1], real[:, ::-1]
        count = tf.cumsum(tf.cast(real, tf.int32), 1)  # of real steps, up to each
        walk = functools.partial(
            self._walk, x, real, count, states, factors, training=training
        )
        y, last = self._over_windows(walk, count)
        host._maybe_reset_dropout_masks(host.cell)
        seen = real if host.zero_output_for_mask else count > 0
        y = tf.where(seen[..., None], y, tf.zeros_like(y))
        y = y if host.return_sequences else y[:, -1]
        y = y if self.dense is None else self.dense(y)
        return [y, *last] if host.return_state else y

    def _factors(self, x):
        """Of the link from the last real step into each step, of a draw."""
        if not isinstance(self.truncation, RandomizedTruncation):
            return None
        p = self.truncation.keep_probability
        kept = keras.random.uniform(x.shape[:2], seed=self.draws, dtype="float32") < p
        return tf.cast(kept, self.compute_dtype) / p

    def _over_windows(self, walk, count):
        """The outputs of each block from a walk of its own; the last states."""
        policy, number = self.truncation, count[:, -1]
        if policy is None or isinstance(policy, RandomizedTruncation):
            return walk(None)
        whole = number <= policy.steps
        block = (number[:, None] - count) // policy.stride
        block = tf.where(whole[:, None], 0, block)
        for i in range(-(-count.shape[1] // policy.stride)):
            cut = number - policy.stride * i - policy.steps
            outputs, states = walk(tf.where(whole, 0, cut))
            if i == 0:
                y, last = outputs, states
            else:
                y = tf.where((block == i)[..., None], outputs, y)
        return y, last

    def _walk(self, x, real, count, states, factors, cut, training):
        """All outputs, the last states; through the state of step `cut` nothing returns."""
        dtype, structure = states[0].dtype, self.host.get_initial_state(x.shape[0])
        shown, total = states, tf.zeros((x.shape[0], 1), dtype)
        outputs, y, given = [], None, {}
        if "training" in inspect.signature(self.host.cell.call).parameters:
            given["training"] = training
        for t in range(x.shape[1]):
            before = states
            if factors is not None:
                at_link = tf.where(count[:, t] > 1, factors[:, t], 1)[:, None]
                before = [linked(s, at_link) for s in states]
            before = keras.tree.pack_sequence_as(structure, before)
            output, new = self.host.cell(x[:, t], before, **given)
            new, with_this = keras.tree.flatten(new), total
            is_state = output is new[0]
            if self.clipnorm is not None or self.growth is not None:
                new, with_this = clipped(new, total, self._limit)
            m = real[:, t]
            out = new if self.growth is None else sent(new, with_this)
            shown = where(m, out, shown)
            y = tf.zeros_like(output) if y is None else y
            (y,) = where(m, [output], [y])
            outputs.append(shown[0] if is_state else y)
            if cut is not None:
                at_cut = (cut > 0) & (count[:, t] == cut)
                new = where(at_cut, [tf.stop_gradient(s) for s in new], new)
            *states, total = where(m, [*new, with_this], [*states, total])
        return tf.stack(outputs, 1), shown

    def _limit(self, total):
        limit = tf.fill(tf.shape(total), tf.constant(float("inf"), total.dtype))
        if self.clipnorm is not None:
            limit = tf.minimum(limit, tf.constant(self.clipnorm, total.dtype))
        if self.growth is not None:
            limit = tf.minimum(limit, tf.constant(self.growth, total.dtype) * total)
        return limit
