"""The output layer: p_t = h_t V + c, made and differentiated block by block.

With q_t = dL/dp_t:  e_t = q_t V^T     dV = sum_t h_t^T q_t     dc = sum_t q_t
"""

import tensorflow as tf

from keras_bptt.runtime.explicit import explicit, refuse_forward_mode
from keras_bptt.runtime.tensors import cast_to, product, sum_of_products, total


def shown(h, output_layer):
    """p for states h, of a step or many; h itself where there is no output layer."""
    if not output_layer:
        return h
    V, *c = output_layer
    p = product(h, V)
    return p + c[0] if c else p


def sent_back(q, output_layer):
    """The cotangent of h."""
    V, *_ = output_layer
    return product(q, tf.transpose(V))


def bias_gradient(q):
    """dc, the sum of all q, in wide numbers."""
    return total(q, list(range(len(q.shape) - 1)))


def last_output(h, output_layer):
    """p (batch, outputs) of the last state; its gradients are sums over examples."""

    def forward(h, output_layer):
        return (shown(h, cast_to(h.dtype, output_layer)),), ()

    def backward(args, outputs, residuals, cotangents):
        (h, output_layer), (q,) = args, cotangents
        sums = sum_of_products(h, q), bias_gradient(q)
        d_output_layer = tuple(
            tf.cast(d, w.dtype) for d, w in zip(sums, output_layer, strict=False)
        )
        return sent_back(q, cast_to(q.dtype, output_layer)), d_output_layer

    refuse_forward_mode([h, *output_layer])
    return explicit(forward, backward)(h, output_layer)[0]
