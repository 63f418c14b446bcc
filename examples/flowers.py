"""One to one: name the species of a flower.

With one time step a recurrent layer is a hidden layer: h_1 = tanh(x_1 W + h_0 U + b) with
h_0 = 0. Nothing recurs, U gets no gradient, and the network is the perceptron with one
hidden layer that it should be.

The 150 irises that R. A. Fisher made known in 1936 come with scikit-learn. Each is held out
once: five networks are trained, each on four fifths of the flowers, a fifth of these being
kept to decide when to stop. The score is the share of all 150 that is named right by the
network that had not seen it.

    python examples/flowers.py            # a minute
    python examples/flowers.py --smoke    # seconds
"""

import common
import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from sklearn.datasets import load_iris
from sklearn.dummy import DummyClassifier
from sklearn.model_selection import (
    StratifiedKFold,
    cross_val_predict,
    train_test_split,
)
from sklearn.neighbors import NearestCentroid

from keras_bptt import BPTTRNN, convert

SPECIES = ["setosa", "versicolor", "virginica"]
COLOURS = ["tab:blue", "tab:orange", "tab:green"]


def build_model(units):
    """Flowers (batch, timesteps=1, features=4) -> logits (batch, 3)."""
    model = keras.Sequential([keras.Input((1, 4))])
    model.add(keras.layers.Normalization())
    model.add(BPTTRNN(units))
    model.add(keras.layers.Dense(3))
    return model


def train(model, x, y, args):
    """Fits the model; returns the validation loss of each epoch."""
    parts = train_test_split(x, y, test_size=0.2, stratify=y, random_state=args.seed)
    x_train, x_validation, y_train, y_validation = parts
    batches = tf.data.Dataset.from_tensor_slices((x_train, y_train))
    batches = batches.shuffle(len(x_train), seed=args.seed).batch(16)
    model.compile(
        keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    fit = model.fit(
        batches.prefetch(tf.data.AUTOTUNE),
        validation_data=(x_validation, y_validation),
        epochs=args.epochs,
        shuffle=False,  # the batches are
        verbose=0,
        callbacks=[
            keras.callbacks.EarlyStopping(patience=15, restore_best_weights=True),
            keras.callbacks.ModelCheckpoint(
                args.output_dir / "flowers.keras", save_best_only=True
            ),
        ],
    )
    return fit.history["val_loss"]


def cross_validate(x, y, folds, args):
    """What the networks of all folds predict, how they learned, and the last of them."""
    logits = {name: np.empty((len(y), 3)) for name in ("BPTTRNN", "SimpleRNN")}
    losses = {name: [] for name in logits}
    progress = keras.utils.Progbar(2 * folds.n_splits, unit_name="network")
    for number, (rest, held_out) in enumerate(folds.split(x[:, 0], y)):
        keras.utils.set_random_seed(args.seed + number)
        model = build_model(args.units)
        model.layers[0].adapt(x[rest])
        twin = convert(model, to=keras.layers.SimpleRNN)  # with the same weights
        for name, network in ("SimpleRNN", twin), ("BPTTRNN", model):
            losses[name].append(train(network, x[rest], y[rest], args))
            logits[name][held_out] = network(x[held_out])
            progress.add(1)
    predictions = {name: np.argmax(z, axis=1).tolist() for name, z in logits.items()}
    return predictions, losses, model


def gradient_of_u(model, x):
    """The norm of dL/dU: h_0 is 0, and so is h_0^T delta_1."""
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(x, training=True))
    return float(tf.norm(tape.gradient(loss, model.layers[1].cell.recurrent_kernel)))


def draw(results, path):
    """The flowers, those ringed that were named wrong; validation losses."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    flowers, losses = figure.subplots(1, 2)
    x, y = np.array(results["petals"]), np.array(results["species"])
    for species, (name, colour) in enumerate(zip(SPECIES, COLOURS, strict=True)):
        flowers.scatter(*x[y == species].T, color=colour, s=18, label=name)
    wrong = np.array(results["predictions"]["BPTTRNN"]) != y
    flowers.scatter(
        *x[wrong].T, s=110, facecolors="none", edgecolors="k", label="named wrong"
    )
    flowers.set(xlabel="petal length / cm", ylabel="petal width / cm")
    flowers.set_title("Each flower named by a network that had not seen it", loc="left")
    flowers.legend()
    for name, style in ("BPTTRNN", "-"), ("SimpleRNN", ":"):
        for number, curve in enumerate(results["losses"][name]):
            label = name if number == 0 else None
            colour, width = ("tab:blue", 1.2) if style == "-" else ("black", 2)
            losses.plot(curve, style, color=colour, linewidth=width, label=label)
    losses.set(xlabel="epoch", ylabel="validation loss / nats", yscale="log")
    losses.set_title("The five networks: one gradient, one curve", loc="left")
    losses.legend()
    common.save(figure, path)


def main():
    args = common.arguments(
        __doc__,
        epochs=(200, "at most"),
        units=(16, "size of the hidden state"),
        smoke={"epochs": 2},
    )
    x, y = load_iris(return_X_y=True)
    x = x.astype("float32")[:, np.newaxis]  # one time step
    folds = StratifiedKFold(5, shuffle=True, random_state=args.seed)
    predictions, losses, model = cross_validate(x, y, folds, args)
    print(f"\nThe norm of dL/dU is {gradient_of_u(model, x)}")
    baselines = {"most frequent": DummyClassifier(), "nearest mean": NearestCentroid()}
    for name, baseline in baselines.items():
        predictions[name] = cross_val_predict(baseline, x[:, 0], y, cv=folds).tolist()
    results = {
        "kind": "one to one",
        "score": "accuracy, five-fold",
        "scores": {name: np.mean(p == y) for name, p in predictions.items()},
        "petals": x[:, 0, 2:].tolist(),
        "species": y.tolist(),
        "predictions": predictions,
        "losses": losses,
    }
    common.finish(results, draw, model, x[::10], args, "flowers")


if __name__ == "__main__":
    main()
