"""XLA on a CPU writes past the end of a padded product. Plain TensorFlow, no keras_bptt.

In a loop, a product of matrices is moved up by a row, a row of zeros filled in below, and
the result multiplied by an elementwise function. Compiled by XLA the numbers are wrong, or
glibc aborts the process ("corrupted size vs. prev_size"), where a row has 32 bytes: with
four float64 and 9, 13 or 17 rows, with eight float32 and 17 rows. Without the loop, without
the product, or with `tf.roll` and `tf.where` in place of `tf.concat` they are right. Seen
with TensorFlow 2.21.0 on x86-64.

    python tests/upstream/xla_pad_in_loop.py

prints a line for each case and ends with status 1 if any is wrong.
"""

import numpy as np
import tensorflow as tf


def with_concat(a):
    return tf.concat([a[1:], tf.zeros_like(a[:1])], 0)


def with_roll(a):
    last = tf.range(a.shape[0])[:, None] == a.shape[0] - 1
    return tf.where(last, tf.zeros_like(a), tf.roll(a, -1, 0))


def loop(shifted, a, z, U):
    slope = tf.sigmoid(z) * (1 + z * (1 - tf.sigmoid(z)))

    def body(i, a, total):
        a = slope * shifted(tf.matmul(a, U))
        return i + 1, a, total + a

    return tf.while_loop(lambda i, *_: i < 2, body, (0, a, a))[2]


def error(shifted, dtype, rows, units):
    """The largest difference between compiled and not, relative to the largest number."""
    rng = np.random.default_rng(0)
    shapes = (rows, units), (rows, units), (units, units)
    tensors = [tf.constant(rng.normal(size=shape), dtype) for shape in shapes]
    plain = loop(shifted, *tensors)
    compiled = tf.function(loop, jit_compile=True)(shifted, *tensors)
    return float(tf.reduce_max(abs(compiled - plain)) / tf.reduce_max(abs(plain)))


def main():
    wrong = False
    for shifted in (with_roll, with_concat):
        for case in (("float64", 9, 4), ("float64", 13, 4), ("float32", 17, 8)):
            found = error(shifted, *case)
            wrong = wrong or not found < 1e-5
            print(shifted.__name__, *case, f"relative error {found:.1e}", flush=True)
    raise SystemExit(int(wrong))


if __name__ == "__main__":
    main()
