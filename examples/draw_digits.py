"""One to many: draw a handwritten digit, row by row, from its label.

One number goes in, the label; a learned vector for it is the state that the network begins
with. Eight rows of eight pixels come out, and each is the next input. A pixel of the digits
that come with scikit-learn has 17 shades, so the network puts out 17 logits for it.

In training it sees the rows of a real digit, one row late ("teacher forcing"); afterwards
its own, drawn from softmax(logits / temperature).

The score is the number of bits that it takes to tell a test digit to someone who has the
model and the label: the mean of -log2 of the probability that the model gives it. The
baseline is a histogram for each label and pixel. A second judge is the nearest neighbour
among the training digits: which digit does it see in what was drawn?

    python examples/draw_digits.py            # a minute
    python examples/draw_digits.py --smoke    # seconds
"""

import common
import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from sklearn.neighbors import KNeighborsClassifier

from keras_bptt import BPTTRNN, convert

SHADES = 17


def build_model(units):
    """Label (batch,), rows before (batch, 8, 8) -> logits (batch, 8, 8, 17)."""
    label, rows = keras.Input((), dtype="int32"), keras.Input((8, 8))
    state = keras.layers.Embedding(10, units, name="first_state")(label)
    rnn = BPTTRNN(units, return_sequences=True, return_state=True, name="rnn")
    states, _ = rnn(rows, initial_state=state)
    logits = keras.layers.Dense(8 * SHADES, name="logits")(states)
    return keras.Model([label, rows], keras.layers.Reshape((8, 8, SHADES))(logits))


def rows_before(images):
    """What the network sees at each step: the row above, from 0 to 1; nothing at first."""
    return np.pad(images[:, :-1], ((0, 0), (1, 0), (0, 0))).astype("float32") / 16


def batches(digits, size, seed=None):
    """((labels, rows before), images), shuffled anew for each epoch if there is a seed."""
    images, labels = digits
    data = tf.data.Dataset.from_tensor_slices(((labels, rows_before(images)), images))
    if seed is not None:
        data = data.shuffle(len(labels), seed=seed)
    return data.batch(size).prefetch(tf.data.AUTOTUNE)


def train(model, digits, args):
    """Fits the model; returns bits per validation digit of each epoch, and of the test."""
    model.compile(
        keras.optimizers.Adam(3e-3, clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    fit = model.fit(
        batches(digits[0], 32, args.seed),
        validation_data=batches(digits[1], 150),
        epochs=args.epochs,
        shuffle=False,  # the batches are
        callbacks=[
            keras.callbacks.EarlyStopping(patience=10, restore_best_weights=True),
            keras.callbacks.ModelCheckpoint(
                args.output_dir / "draw_digits.keras", save_best_only=True
            ),
        ],
    )
    nats = model.evaluate(batches(digits[2], 450), verbose=0)  # for a pixel
    bits = 64 / np.log(2)
    return [loss * bits for loss in fit.history["val_loss"]], nats * bits


def bits_of_histograms(train_digits, test_digits):
    """Each pixel for itself, with what was counted for the label and a tenth for each."""
    counts = np.full((10, 8, 8, SHADES), 0.1)
    line, column = np.indices((8, 8))
    for image, label in zip(*train_digits, strict=True):
        counts[label, line, column, image] += 1
    probabilities = counts / counts.sum(axis=-1, keepdims=True)
    images, labels = test_digits
    told = probabilities[labels[:, None, None], line, column, images]
    return -np.log2(told).sum(axis=(1, 2)).mean()


def drawn(model, labels, temperature, seed):
    """Digits (count, 8, 8), of which each row is what the network makes of the last."""
    random = np.random.default_rng(seed)
    state = model.get_layer("first_state")(labels)
    row, rows = np.zeros((len(labels), 1, 8), "float32"), []
    for _ in range(8):
        h, state = model.get_layer("rnn")(row, initial_state=state)
        logits = tf.reshape(model.get_layer("logits")(h), (-1, 8, SHADES))
        # The largest of the logits with Gumbel noise is a draw from the softmax.
        noisy = logits / temperature + random.gumbel(size=logits.shape)
        rows.append(np.argmax(noisy, axis=-1))
        row = rows[-1][:, np.newaxis].astype("float32") / 16
    return np.stack(rows, axis=1)


def draw(results, path):
    """Learning curves; what was drawn, five of each digit, below one that is real."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[5, 6])
    curves = left.subplots()
    curves.plot(results["validation"]["BPTTRNN"], color="tab:blue", label="BPTTRNN")
    curves.plot(results["validation"]["SimpleRNN"], "k:", label="SimpleRNN")
    histograms = results["scores"]["histograms"]
    curves.axhline(histograms, color="grey", linestyle="--", label="histograms (test)")
    curves.set(xlabel="epoch", ylabel="bits per validation digit")
    curves.set_title("Learning", loc="left")
    curves.legend()
    pictures = right.subplots(6, 10)
    for digit in range(10):
        real, *others = results["real"][digit], *results["drawn"][digit]
        for row, image in enumerate([real, *others]):
            colours = "Greys" if row else "Blues"
            pictures[row, digit].imshow(image, cmap=colours, vmin=0, vmax=16)
            pictures[row, digit].set_axis_off()
    right.suptitle("Blue: real digits. Below them: drawn from the label", fontsize=12)
    common.save(figure, path)


def main():
    args = common.arguments(
        __doc__,
        epochs=(200, "at most"),
        units=(64, "size of the hidden state"),
        temperature=(
            0.6,
            "of what is drawn; 0.1 draws hardly anything but the likeliest",
        ),
        smoke={"epochs": 1, "units": 16},
    )
    digits = common.digits(args.seed)
    keras.utils.set_random_seed(args.seed)
    model = build_model(args.units)
    twin = convert(model, to=keras.layers.SimpleRNN)  # with the same weights
    scores, validation = {}, {}
    for name, network in ("SimpleRNN", twin), ("BPTTRNN", model):
        print(f"\n{name}")
        validation[name], scores[name] = train(network, digits, args)
    (images, labels), _, test_digits = digits
    scores["histograms"] = bits_of_histograms(digits[0], test_digits)
    asked = np.repeat(np.arange(10), 20)
    pictures = drawn(model, asked, args.temperature, args.seed)
    judge = KNeighborsClassifier(1).fit(images.reshape(-1, 64), labels)
    recognised = judge.score(pictures.reshape(-1, 64), asked)
    print(f"\nThe nearest neighbour recognises {recognised:.1%} of 200 that were drawn")
    results = {
        "kind": "one to many",
        "score": "bits per test digit",
        "scores": scores,
        "validation": validation,
        "recognised": recognised,
        "real": [images[labels == digit][0].tolist() for digit in range(10)],
        "drawn": pictures.reshape(10, 20, 8, 8)[:, :5].tolist(),
    }
    images, labels = (part[:3] for part in test_digits)
    inputs = [labels, rows_before(images)]
    common.finish(results, draw, model, inputs, args, "draw_digits")


if __name__ == "__main__":
    main()
