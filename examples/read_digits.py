"""Many to one: recognise a handwritten digit, read row by row or pixel by pixel.

The digits of 8 x 8 pixels come with scikit-learn. Read by rows, a digit is a sequence of 8
steps of 8 features; read by pixels, one of 64 steps of one feature. Only the last state is
asked which digit it was, so that what the first pixel tells has to go through 63 links, and
its gradient back through as many. An orthogonal recurrent kernel, Keras' default, keeps it
from vanishing there (`vanishing_and_exploding.py` shows what happens without). With
`--layer lstm` or `--layer gru` the layer has gates: docs/gated.md says what these do to the
gradient.

The score is the share of 450 test digits that is named right. The baselines are the most
frequent digit, and the digit whose mean image is nearest.

    python examples/read_digits.py            # two minutes
    python examples/read_digits.py --layer lstm --learning-rate 3e-3    # twice as long
    python examples/read_digits.py --smoke    # seconds
"""

import time

import common
import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from keras_bptt import BPTTGRU, BPTTLSTM, BPTTRNN, convert

FEATURES = {"rows": 8, "pixels": 1}
LAYERS = {"rnn": BPTTRNN, "lstm": BPTTLSTM, "gru": BPTTGRU}


def build_model(layer, features, units, return_sequences=False):
    """Digits (batch, timesteps, features) -> logits (batch, 10), or of each step."""
    model = keras.Sequential([keras.Input((64 // features, features))])
    model.add(layer(units, return_sequences=return_sequences))
    model.add(keras.layers.Dense(10))
    return model


def batches(digits, features, size, seed=None):
    """The digits as sequences, shuffled anew for each epoch where there is a seed."""
    x, y = digits
    data = tf.data.Dataset.from_tensor_slices((x.reshape(len(x), -1, features), y))
    if seed is not None:
        data = data.shuffle(len(x), seed=seed)
    return data.batch(size).prefetch(tf.data.AUTOTUNE)


def train(model, name, digits, args):
    """Fits the model.

    Returns the validation accuracy of each epoch, the test's, and the median seconds of an
    epoch; the first, which also traces, counts only if alone.
    """
    features, times = FEATURES[name], [time.perf_counter()]
    model.compile(
        # Gradients of a recurrent network explode now and then: clip their norm.
        keras.optimizers.Adam(args.learning_rate, clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    fit = model.fit(
        batches(digits[0], features, 32, args.seed),
        validation_data=batches(digits[1], features, 150),
        epochs=args.epochs,
        shuffle=False,  # the batches are
        callbacks=[
            keras.callbacks.EarlyStopping(patience=15, restore_best_weights=True),
            keras.callbacks.ModelCheckpoint(
                args.output_dir / f"{name_of(args)}.keras", save_best_only=True
            ),
            keras.callbacks.LambdaCallback(
                on_epoch_end=lambda *_: times.append(time.perf_counter())
            ),
        ],
    )
    seconds = np.diff(times)
    seconds = np.median(seconds[1:] if len(seconds) > 1 else seconds)
    _, accuracy = model.evaluate(batches(digits[2], features, 450), verbose=0)
    return fit.history["val_accuracy"], accuracy, seconds


def name_of(args):
    """Of the files that are written."""
    return "read_digits" if args.layer == "rnn" else f"read_digits_{args.layer}"


def baselines(train_digits, test_digits):
    """Accuracies of two guesses that learn no more than counts and means."""
    (x, y), (x_test, y_test) = train_digits, test_digits
    means = np.stack([x[y == digit].mean(axis=0) for digit in range(10)])
    distances = np.sum((x_test[:, np.newaxis] - means) ** 2, axis=(2, 3))
    return {
        "most frequent": np.mean(y_test == np.argmax(np.bincount(y))),
        "nearest mean": np.mean(y_test == np.argmin(distances, axis=1)),
    }


def beliefs(model, images, args):
    """softmax(logits) after each pixel: the same weights, asked at every step."""
    asked = build_model(LAYERS[args.layer], 1, args.units, return_sequences=True)
    asked.set_weights(model.get_weights())
    return tf.nn.softmax(asked(images.reshape(-1, 64, 1))).numpy()


def draw(results, path):
    """Validation accuracies; what the network believes while it reads three digits."""
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    grid = figure.add_gridspec(3, 3, width_ratios=[4, 1.1, 4])
    curves = figure.add_subplot(grid[:, 0])
    found = results["validation"]
    for name, colour in ("rows", "tab:orange"), ("pixels", "tab:blue"):
        # In the order of the alphabet, the layer of this package is the first.
        ours, theirs = sorted(key for key in found if key.endswith(name))
        curves.plot(found[ours], color=colour, label=ours)
        curves.plot(found[theirs], "k:", linewidth=1, label=theirs)
    baseline = results["scores"]["nearest mean"]
    curves.axhline(baseline, color="grey", linestyle="--", label="nearest mean (test)")
    curves.set(xlabel="epoch", ylabel="validation accuracy", ylim=(0, 1))
    curves.set_title("Learning", loc="left")
    curves.legend(loc="lower right")
    for row, (image, belief) in enumerate(
        zip(results["images"], results["beliefs"], strict=True)
    ):
        picture = figure.add_subplot(grid[row, 1])
        picture.imshow(image, cmap="Greys")
        picture.set_axis_off()
        heat = figure.add_subplot(grid[row, 2])
        shown = heat.imshow(
            np.transpose(belief), cmap="viridis", vmin=0, vmax=1, aspect="auto"
        )
        heat.set(yticks=range(0, 10, 3), ylabel="digit", xticks=range(0, 65, 8))
        if row == 0:
            heat.set_title("What it is, after so many pixels", loc="left")
    heat.set(xlabel="pixels read")
    figure.colorbar(shown, ax=figure.axes[2::2], label="probability")
    common.save(figure, path)


def main():
    args = common.arguments(
        __doc__,
        epochs=(100, "at most"),
        units=(64, "size of the hidden state"),
        learning_rate=(1e-3, "of Adam"),
        layer=("rnn", "plain, or with gates: lstm, gru"),
        smoke={"epochs": 1, "units": 16},
    )
    if args.layer not in LAYERS:
        raise SystemExit(f"--layer must be rnn, lstm or gru. Received: {args.layer}")
    digits = [(x.astype("float32") / 16, y) for x, y in common.digits(args.seed)]
    scores, validation, times = {}, {}, {}
    for name, features in FEATURES.items():
        keras.utils.set_random_seed(args.seed)
        model = build_model(LAYERS[args.layer], features, args.units)
        twin = convert(model, to="keras")  # Keras' own layer, with the same weights
        for network in twin, model:
            key = f"{type(network.layers[0]).__name__}, {name}"
            print(f"\n{key}")
            found = train(network, name, digits, args)
            validation[key], scores[key], times[key] = found
    print("\nseconds per epoch")
    for key, seconds in times.items():
        print(f"  {key:<36}{seconds:>9.3f}")
    x_test, _ = digits[2]
    scores |= baselines(digits[0], digits[2])
    results = {
        "kind": "many to one",
        "score": "test accuracy",
        "scores": scores,
        "seconds per epoch": times,
        "validation": validation,
        "images": x_test[:3].tolist(),
        "beliefs": beliefs(model, x_test[:3], args).tolist(),
    }
    inputs = x_test[:8].reshape(-1, 64, 1)
    common.finish(results, draw, model, inputs, args, name_of(args))


if __name__ == "__main__":
    main()
