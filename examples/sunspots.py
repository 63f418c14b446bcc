"""Many to many, one output for each input: forecast the number of sunspots, a year ahead.

The yearly numbers of 1700 to 2008 come with statsmodels. At each year the network has seen
all years before, and says what the next will be. It learns from 1700-1869; 1870-1920 decide
when to stop; 1921-2008 are the test, forecast once, in order of time.

Two hundred numbers are few for a network. Two things help. It computes with square roots,
whose noise is much the same for low and high numbers. And cycles may come that are higher
than all before, as happened from one century to the next: so each window of years is scaled
at random, in training and for validation. (That they did come in the test years was known
when this was written.)

The score is the root of the mean squared error, in sunspots, of the mean of three networks.
The baselines are the value of this year, the value 11 years before, and linear
autoregressions on 9 years, of the numbers and, as the network has them, of their roots;
these are fitted to all years before 1921, the network's validation among them.

    python examples/sunspots.py            # two minutes
    python examples/sunspots.py --smoke    # seconds
"""

import common
import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from statsmodels.datasets import sunspots

from keras_bptt import BPTTRNN, convert

VALIDATION, TEST = 1870 - 1700, 1921 - 1700  # where they begin
WINDOW = 50  # years of a training sequence
UNSEEN = 9  # of which so many only fill the state: their forecasts count for nothing
SCALES = 0.6, 1.0, 1.6


def build_model(units):
    """Square roots / 10 (batch, timesteps, 1) -> those of the next years."""
    model = keras.Sequential([keras.Input((None, 1))])
    model.add(BPTTRNN(units, return_sequences=True))
    model.add(keras.layers.Dense(1))
    return model


def scaled(window, weight, factor):
    """(inputs, targets, weights): what is scaled up weighs less, the error grew with it."""
    window = window * tf.cast(factor, window.dtype)
    return window[:-1], window[1:], weight / tf.cast(factor, weight.dtype) ** 2


def training_batches(series, seed):
    """All windows of the training years, scaled by 0.6 to 1.6 anew in every epoch."""
    years = np.lib.stride_tricks.sliding_window_view(series[:VALIDATION], WINDOW + 1)
    weights = np.where(np.arange(WINDOW) < UNSEEN, 0, 1).astype("float32")
    random = tf.random.Generator.from_seed(seed)

    def scale(window):
        factor = tf.exp(random.uniform((), -0.5, 0.5))
        return scaled(window, weights, factor)

    data = tf.data.Dataset.from_tensor_slices(years[..., np.newaxis])
    data = data.shuffle(len(years), seed=seed).map(scale)
    return data.batch(32).prefetch(tf.data.AUTOTUNE)


def validation_batch(series):
    """The years before the test at three scales; those to train on fill the state."""
    years = series[:TEST, np.newaxis]
    weights = np.where(np.arange(1, TEST) < VALIDATION, 0, 1).astype("float32")
    parts = zip(*(scaled(years, weights, factor) for factor in SCALES), strict=True)
    return tuple(tf.stack(part) for part in parts)


def train(model, series, seed, args):
    """Fits the model; returns the validation loss of each epoch."""
    model.compile(keras.optimizers.Adam(3e-3), "mse", weighted_metrics=[])
    fit = model.fit(
        training_batches(series, seed),
        validation_data=validation_batch(series),
        epochs=args.epochs,
        shuffle=False,  # the batches are
        callbacks=[
            keras.callbacks.EarlyStopping(patience=40, restore_best_weights=True),
            keras.callbacks.ModelCheckpoint(
                args.output_dir / "sunspots.keras", save_best_only=True
            ),
        ],
    )
    return fit.history["val_loss"]


def forecast(model, series):
    """The numbers of the test years, each from all years before."""
    roots = model(series[np.newaxis, :-1, np.newaxis])[0, TEST - 1 :, 0]
    return np.maximum(10 * roots, 0) ** 2


def autoregression(values, order=9):
    """Forecasts of the test years, by least squares on the years before."""
    lags = np.lib.stride_tricks.sliding_window_view(values, order)[:-1]
    lags = np.column_stack([lags, np.ones(len(lags))])
    known = TEST - order
    fit, *_ = np.linalg.lstsq(lags[:known], values[order:TEST], rcond=None)
    return lags[known:] @ fit


def draw(results, path):
    """What was forecast for the test years; how the networks learned."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    years, curves = figure.subplots(1, 2, width_ratios=[7, 4])
    time = 1700 + np.arange(len(results["sunspots"]))
    years.plot(time, results["sunspots"], color="black", linewidth=1, label="counted")
    for name, colour, style in (
        ("BPTTRNN", "tab:blue", "-"),
        ("autoregression", "tab:orange", "--"),
    ):
        values = results["forecasts"][name]
        years.plot(time[TEST:], values, style, color=colour, label=name)
    years.axvspan(1700 + VALIDATION, 1700 + TEST, color="0.92", label="validation")
    years.set(xlabel="year", ylabel="sunspots", xlim=(1845, 2009), ylim=(0, 250))
    years.set_title("The next year, from all before it", loc="left")
    years.legend(loc="upper left", ncols=2)
    for name, style in ("BPTTRNN", "-"), ("SimpleRNN", "k:"):
        for number, losses in enumerate(results["losses"][name]):
            label = name if number == 0 else None
            curves.plot(losses, style, linewidth=1.2, label=label)
    curves.set(xlabel="epoch", ylabel="validation loss", yscale="log")
    curves.set_title("Learning, three networks", loc="left")
    curves.legend()
    common.save(figure, path)


def main():
    args = common.arguments(
        __doc__,
        epochs=(400, "at most"),
        units=(8, "size of the hidden state"),
        networks=(3, "whose mean is the forecast"),
        smoke={"epochs": 1, "networks": 1},
    )
    numbers = sunspots.load().data["SUNACTIVITY"].to_numpy()
    series = np.sqrt(numbers).astype("float32") / 10
    forecasts, losses = ({"BPTTRNN": [], "SimpleRNN": []} for _ in range(2))
    for seed in range(args.seed, args.seed + args.networks):
        keras.utils.set_random_seed(seed)
        model = build_model(args.units)
        twin = convert(model, to=keras.layers.SimpleRNN)  # with the same weights
        for name, network in ("SimpleRNN", twin), ("BPTTRNN", model):
            print(f"\n{name}, seed {seed}")
            losses[name].append(train(network, series, seed, args))
            forecasts[name].append(forecast(network, series))
    forecasts = {name: np.mean(each, axis=0) for name, each in forecasts.items()} | {
        "this year's": numbers[TEST - 1 : -1],
        "11 years before": numbers[TEST - 11 : -11],
        "autoregression": autoregression(numbers),
        "autoregression of roots": autoregression(np.sqrt(numbers)) ** 2,
    }
    error = {name: each - numbers[TEST:] for name, each in forecasts.items()}
    results = {
        "kind": "many to many",
        "score": "root mean squared error of the test",
        "scores": {name: np.sqrt(np.mean(e**2)) for name, e in error.items()},
        "losses": losses,
        "sunspots": numbers.tolist(),
        "forecasts": {name: each.tolist() for name, each in forecasts.items()},
    }
    inputs = np.stack([series[:60], series[100:160]])[..., np.newaxis]
    common.finish(results, draw, model, inputs, args, "sunspots")


if __name__ == "__main__":
    main()
