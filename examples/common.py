"""What the examples of five kinds share: options, digits, and what they leave behind."""

import argparse
import json
import time

import basics
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from keras_bptt import convert


def arguments(doc, smoke, **options):
    """The options of a script, from the command line.

    Args:
        doc: the script's docstring, whose first line describes it.
        smoke: what `--smoke` sets, a dict.
        **options: positive numbers, name=(default, help).
    """
    parser = argparse.ArgumentParser(
        description=doc.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    for name, (default, description) in options.items():
        flag = "--" + name.replace("_", "-")
        add(flag, type=type(default), default=default, help=description)
    add("--seed", type=int, default=0, help="of weights and batches")
    basics.add_output(parser, smoke="a run of seconds")
    args = parser.parse_args()
    basics.check_positive(parser, args)
    if not 0 <= args.seed < 2**32 - 10:
        parser.error(f"--seed must be in 0 ... 2**32 - 11. Received: {args.seed}")
    basics.make_output(parser, args)
    if args.smoke:
        vars(args).update(smoke)
    args.began = time.perf_counter()
    return args


def digits(seed):
    """Handwritten digits to train, validate and test, each (images, labels).

    1797 images of 8 x 8 pixels come with scikit-learn, their shades from 0 to 16: images
    (count, 8, 8), labels (count,).
    """
    found = load_digits()
    x, y = found.images.astype("int32"), found.target.astype("int32")
    split = dict(random_state=seed)
    x, x_test, y, y_test = train_test_split(x, y, test_size=450, stratify=y, **split)
    x, x_val, y, y_val = train_test_split(x, y, test_size=150, stratify=y, **split)
    return (x, y), (x_val, y_val), (x_test, y_test)


def save(figure, path):
    """Writes a figure: the same numbers, the same bytes."""
    figure.savefig(path, dpi=100, metadata={"Software": None})


def finish(results, draw, model, inputs, args, name):
    """Shows the scores; writes name.json, name.png, and the model (`export`)."""
    print(f"\n{results['score']}")
    for who, score in results["scores"].items():
        print(f"  {who:<36}{score:>9.3f}")
    own = "began", "output_dir"
    results = {
        "settings": {k: v for k, v in vars(args).items() if k not in own},
        "seconds": round(time.perf_counter() - args.began),
    } | results
    # Four digits say it all, and keep the file short.
    text = json.dumps(results, default=float)
    results = json.loads(text, parse_float=lambda x: float(f"{float(x):.4g}"))
    path = args.output_dir / name
    path.with_suffix(".json").write_text(json.dumps(results) + "\n")
    draw(results, path.with_suffix(".png"))
    export(model, inputs, path)
    print(f"\n{path}: a SavedModel. Beside it: .npz, .json, .png, .keras")


def export(model, inputs, path):
    """Writes a SavedModel, and beside it what is to be found where it is loaded.

    `path`.npz holds inputs_0, ... (of `inputs`, an array or a list of them), the model's
    outputs, random cotangents of these, and gradient_0, gradient_1, ... of
    sum(outputs * cotangents), one for each trainable variable. The gradients are not the
    model's own: they are those of Keras' own layers with the same weights, which TensorFlow
    differentiates.
    """
    twin = convert(model, to="keras")
    weights = [variable.value for variable in twin.trainable_variables]
    with tf.GradientTape() as tape:
        outputs = twin(inputs)
        random = np.random.default_rng(0)
        cotangents = random.normal(size=outputs.shape).astype("float32")
        target = tf.reduce_sum(outputs * cotangents)
    gradients = tape.gradient(target, weights, unconnected_gradients="zero")
    # A SavedModel takes its own dtypes alone.
    arrays = inputs if isinstance(inputs, list) else [inputs]
    pairs = enumerate(zip(arrays, model.inputs, strict=True))
    found = {f"inputs_{i}": np.asarray(array, of.dtype) for i, (array, of) in pairs}
    found |= {"outputs": model(inputs), "cotangents": cotangents}
    # The gradient of an embedding comes as rows and their places.
    found |= {
        f"gradient_{i}": tf.convert_to_tensor(gradient)
        for i, gradient in enumerate(gradients)
    }
    np.savez_compressed(path.with_suffix(".npz"), **found)
    model.export(path, verbose=False)
