"""What XLA compiles of the layer: the programs' operations, and the numbers they compute.

Run as a process of its own, for a fault of a compiler may write into any memory of it:

    XLA_FLAGS="--xla_dump_to=FOLDER --xla_dump_hlo_as_text" \
        python tests/compiled.py FOLDER '[{"units": 4, "truncation": [2, 1], ...}, ...]'

For each configuration it prints a line of JSON: the largest relative difference between the
gradients with `jit_compile` and without, and the padding instructions of all programs that
were compiled. Blocks are of their usual sizes.
"""

import json
import pathlib
import re
import sys

import numpy as np
import tensorflow as tf

from keras_bptt import BPTTRNN, Truncation

# Of numbers of a layer. (TensorFlow's own gather of an example's steps pads its indices.)
PAD = re.compile(r"= ((?:f|bf)\d+\S*) pad\(")


def derivatives(
    jit_compile,
    *,
    batch=1,
    timesteps=9,
    order=1,
    whole=False,
    unknown=False,
    masked=False,
    dtype="float64",
    units=4,
    **options,
):
    """Gradients of the first or second order by inputs, initial state and weights."""
    if isinstance(options.get("truncation"), list):
        options["truncation"] = Truncation(*options["truncation"])
    options = {"seed": 1, "dtype": dtype, "jit_compile": jit_compile} | options
    layer = BPTTRNN(units, **options)
    layer.build((None, None, 3))
    rng = np.random.default_rng(3)
    layer.set_weights([rng.normal(0, 0.5, w.shape) for w in layer.get_weights()])
    shape = (batch, timesteps, 3)
    x = tf.constant(rng.normal(size=shape), dtype)
    state = tf.constant(rng.normal(size=(batch, units)), dtype)
    mask = tf.constant(rng.random((batch, timesteps)) < 0.7) if masked else None
    like = layer.compute_output_shape(shape)
    cotangents = tf.constant(rng.normal(size=like), dtype)
    variables = [v.value for v in layer.trainable_variables]

    def gradients(x, state):
        sources = [x, state, *variables]
        with tf.GradientTape() as outer:
            outer.watch([x, state])
            with tf.GradientTape() as tape:
                tape.watch([x, state])
                y = layer(x, initial_state=state, mask=mask, training=True)
                loss = tf.reduce_sum(cotangents * y)
            found = tape.gradient(loss, sources)
            if order == 1:
                return found
            value = tf.add_n([tf.reduce_sum(g * g) for g in found])
        return outer.gradient(value, sources)

    sizes = (None, None) if unknown else (batch, timesteps)
    signature = [tf.TensorSpec(s, dtype) for s in ((*sizes, 3), (sizes[0], units))]
    whole = (whole and jit_compile) or None
    function = tf.function(
        gradients, autograph=False, input_signature=signature, jit_compile=whole
    )
    return [g.numpy() for g in function(x, state)]


def largest_difference(got, expected):
    """As a share of the largest number expected; NaN where any number is."""
    tiny = np.finfo(expected[0].dtype).tiny  # a gradient of zeros, beyond a window
    shares = [
        np.max(np.abs(g - e)) / max(np.max(np.abs(e)), tiny)
        for g, e in zip(got, expected, strict=True)
    ]
    return float(np.max(shares))


def programs(folder):
    """The texts of what was compiled since the last call."""
    paths = list(folder.iterdir())
    ends = "after_optimizations.txt"
    texts = [p.read_text(encoding="utf-8") for p in paths if p.name.endswith(ends)]
    for path in paths:
        path.unlink()
    return texts


def main():
    folder = pathlib.Path(sys.argv[1])
    for configuration in json.loads(sys.argv[2]):
        plain = derivatives(False, **configuration)
        programs(folder)  # some operations are compiled without the layer
        compiled = derivatives(True, **configuration)
        texts = programs(folder)
        pads = [
            line.strip() for t in texts for line in t.splitlines() if PAD.search(line)
        ]
        result = {
            "error": largest_difference(compiled, plain),
            "programs": len(texts),
            "pads": pads,
        }
        print(json.dumps(configuration | result), flush=True)


if __name__ == "__main__":
    main()
