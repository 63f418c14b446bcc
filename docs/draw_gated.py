"""The figures of docs/gated.md: how far a gradient gets through gates, and which way.

    python docs/draw_gated.py                          # two minutes
    python docs/draw_gated.py --output-dir elsewhere

It needs matplotlib and scikit-learn, which `pip install '.[examples]'` brings.

Four networks learn to name handwritten digits of 8 x 8 pixels, which scikit-learn carries,
read pixel by pixel. The layers of `keras_bptt` train. Before and after, every dL/dh_t and
dL/dc_t of 128 digits comes out of `keras_bptt.reference`, in float64, with the weights of
the layer. Writes gradient.json, whose numbers the page quotes, and the figures. `make docs`
draws them from that file, and trains nothing.
"""

import argparse
import json
import pathlib

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from keras_bptt import BPTTGRU, BPTTLSTM, BPTTRNN, LSTMMemoryBias, reference

# Of Okabe and Ito, whom colour-blind readers can follow.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#4D4D4D"
WIDTH = 7.27  # inches, 800 pixels
STEPS, UNITS, EPOCHS, RATE, MEASURED = 64, 64, 20, 3e-3, 128
WHEN = {"before": "Untrained", "after": f"After {EPOCHS} epochs"}


LAYERS = {
    "plain RNN": lambda: BPTTRNN(UNITS),
    "LSTM": lambda: BPTTLSTM(UNITS),
    "GRU": lambda: BPTTGRU(UNITS),
    "LSTM, biases for 64 steps": lambda: BPTTLSTM(
        UNITS, unit_forget_bias=False, bias_initializer=LSTMMemoryBias(STEPS)
    ),
}


def read_digits():
    """Pixels (count, 64, 1) in 0 ... 1, labels: x, x to test with, y, y to test with."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels[..., np.newaxis] / 16).astype("float32")
    return train_test_split(
        pixels, labels, test_size=0.25, stratify=labels, random_state=0
    )


def build_model(layer):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((STEPS, 1)), layer(), keras.layers.Dense(10)])
    model.compile(
        keras.optimizers.Adam(RATE, clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def measure(model, x, y):
    """What comes back from the losses of x: norms by step, and what the gates were."""
    recurrent, dense = model.layers
    with tf.GradientTape() as tape:
        h_T = recurrent(x)
        loss = len(y) * model.loss(y, dense(h_T))
    e_T, d_kernel = tape.gradient(loss, [h_T, recurrent.cell.kernel])
    of_cell = {BPTTRNN: of_rnn, BPTTLSTM: of_lstm, BPTTGRU: of_gru}[type(recurrent)]
    found, expected = of_cell(x, recurrent.get_weights(), e_T.numpy())
    # The gradient that is followed is that of the layer.
    largest = np.abs(expected).max()
    np.testing.assert_allclose(d_kernel, expected, rtol=0, atol=1e-3 * largest)
    return found


def mean_norms(adjoints):
    """Of (examples, timesteps, units) the mean norm at each step, 1 at the last one."""
    norms = np.mean(np.linalg.norm(adjoints, axis=-1), axis=0)
    return norms / norms[-1]


def of_rnn(x, weights, e_T):
    """What is kept of it, and dL/dW; the same of the other cells.

    `link` is the spectral radius of what one step multiplies by, where the states are zero
    and the gates have their means.
    """
    W, U, b = weights
    e, h_0 = np.zeros((len(x), STEPS, UNITS)), np.zeros((len(x), UNITS))
    e[:, -1] = e_T
    d = reference.hidden_gradients(x=x, W=W, U=U, b=b, h_0=h_0, f="tanh", e=e)
    return {"h": mean_norms(d.adjoint), "link": radius(U)}, d.d_kernel


def of_lstm(x, weights, e_T):
    d = reference.lstm_gradients(x, *weights, e_h_T=e_T)
    _, c, z = reference.lstm_forward(x, *weights)
    i, f, _, o = np.split(1 / (1 + np.exp(-z)), 4, axis=-1)
    # The reference leaves out of dL/dc_t what goes through h_t of the same step.
    v = d.adjoint_c + d.adjoint_h * o * (1 - np.tanh(c) ** 2)
    # dL/dc_T times f_T f_{T-1} ... f_{t+1}: the way along c, and no other.
    later = np.cumprod(f[:, :0:-1], axis=1)[:, ::-1]
    alone = v[:, -1:] * np.concatenate([later, np.ones_like(f[:, :1])], axis=1)
    i, f, o = (by_unit(gate) for gate in (i, f, o))
    U_g = np.split(weights[1], 4, axis=-1)[2]
    return {
        "h": mean_norms(d.adjoint_h),
        "c": mean_norms(v),
        "c, forget gates alone": mean_norms(alone),
        "gate": np.quantile(f, [0, 0.5, 1]),
        "radius": radius(U_g),
        "link": radius(np.diag(f) + o[:, np.newaxis] * U_g * i),
    }, d.d_kernel


def of_gru(x, weights, e_T):
    d = reference.gru_gradients(x, *weights, e_h_T=e_T)
    _, p = reference.gru_forward(x, *weights)
    z, r, _ = np.split(1 / (1 + np.exp(-p)), 3, axis=-1)
    z, r = by_unit(z), by_unit(r)
    U_h = np.split(weights[1], 3, axis=-1)[2]
    return {
        "h": mean_norms(d.adjoint),
        "gate": np.quantile(z, [0, 0.5, 1]),
        "radius": radius(U_h),
        "link": radius(np.diag(z) + U_h * (1 - z) * r),
    }, d.d_kernel


def by_unit(gate):
    """The mean over examples and steps."""
    return gate.mean(axis=(0, 1))


def radius(matrix):
    """The spectral radius."""
    return np.abs(np.linalg.eigvals(matrix)).max()


def train_all():
    """For each network: what is measured before and after, and the test accuracy."""
    x, test_x, y, test_y = read_digits()
    results = {}
    for name, layer in LAYERS.items():
        model = build_model(layer)
        results[name] = {"before": measure(model, x[:MEASURED], y[:MEASURED])}
        model.fit(x, y, 32, EPOCHS, verbose=0)
        results[name]["after"] = measure(model, x[:MEASURED], y[:MEASURED])
        _, accuracy = model.evaluate(test_x, test_y, verbose=0)
        results[name]["accuracy"] = accuracy
        print(f"{name}: test accuracy {accuracy:.3f}", flush=True)
    return results


def print_table(results):
    """What is left of a gradient at the first step, and what it went through."""
    print(f"\n{'':<27}{'dL/dh_1':>9}{'dL/dc_1':>9}{'f alone':>9}   gates", end="")
    print(f"{'':<15}{'link':>6}{'a step':>9}")
    for when, title in WHEN.items():
        print(title)
        for name, found in results.items():
            one = found[when]
            norms = [one.get(key) for key in ("h", "c", "c, forget gates alone")]
            shown = ["-" if n is None else f"{n[0]:.2g}" for n in norms]
            gates = " ".join(f"{gate:.3f}" for gate in one.get("gate", [])) or "-"
            # Of the states that the loss reads last: dL/dh_64 of an LSTM is no link's.
            first, *_, last = one.get("c", one["h"])
            step = (first / last) ** (1 / (STEPS - 1))
            print(f"  {name:<25}" + "".join(f"{text:>9}" for text in shown), end="")
            print(f"   {gates:<20}{one['link']:>6.2f}{f'x {step:.3f}':>9}")


def two_panels(titles, ylim):
    """A figure for `before` and `after`, or for two networks, by step."""
    figure = Figure(figsize=(WIDTH, 4.1), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for panel, title in zip(panels, titles, strict=True):
        panel.set(
            yscale="log", xlim=(1, STEPS), ylim=ylim, xticks=[1, *range(8, 65, 8)]
        )
        panel.set_title(title, fontsize=11, loc="left")
        panel.set_xlabel("step $t$: pixel, of 64 before the loss", fontsize=11)
        panel.grid(color="0.9")
    panels[0].set_ylabel("norm, in multiples of that at the last step", fontsize=11)
    return figure, panels


def draw_by_step(results):
    """Of the plain RNN, the LSTM and the GRU, before and after."""
    titles = [
        "Untrained: half-open gates\nlet the gradient vanish",
        f"After {EPOCHS} epochs: it reaches\nthe first pixel in all three",
    ]
    lines = [
        ("plain RNN", "h", GREY, "-"),
        ("LSTM", "h", BLUE, "--"),
        ("LSTM", "c", BLUE, "-"),
        ("GRU", "h", VERMILION, "-"),
    ]
    figure, panels = two_panels(titles, (1e-10, 1e2))
    t = np.arange(1, STEPS + 1)
    for panel, when in zip(panels, WHEN, strict=True):
        for name, state, colour, style in lines:
            label = rf"{name}, $\partial L/\partial {state}_t$"
            norms = results[name][when][state]
            panel.plot(t, norms, style, color=colour, label=label)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=10, loc="outside lower center", ncols=4)
    return figure


def draw_along_c(results):
    """Of two LSTMs what comes back in all, and what would come through f alone."""
    titles = {
        "LSTM": "Keras' biases, $f = 0.73$: forget\ngates alone lose the gradient",
        "LSTM, biases for 64 steps": "Biases for 64 steps, $f = 0.98$:\n"
        "forget gates alone keep it",
    }
    figure, panels = two_panels(titles.values(), (1e-10, 1e2))
    t = np.arange(1, STEPS + 1)
    for panel, name in zip(panels, titles, strict=True):
        for (when, title), colour in zip(WHEN.items(), (GREY, BLUE), strict=True):
            one = results[name][when]
            label = rf"{title.lower()}: $\partial L/\partial c_t$"
            panel.plot(t, one["c"], color=colour, label=label)
            alone = one["c, forget gates alone"]
            label = f"{title.lower()}: product of forget gates"
            panel.plot(t, alone, "--", color=colour, label=label)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=10, loc="outside lower center", ncols=2)
    return figure


FIGURES = {"gradient_by_step": draw_by_step, "along_c": draw_along_c}


def draw_all(results, folder):
    """Writes each figure into the folder; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in FIGURES.items():
        paths.append(folder / f"{name}.png")
        # Matplotlib writes its version into a file unless told not to.
        draw(results).savefig(paths[-1], dpi=110, metadata={"Software": None})
    return paths


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output-dir",
        type=pathlib.Path,
        default=pathlib.Path(__file__).with_suffix("").with_name("gated"),
        help="folder of the numbers and the figures",
    )
    folder = parser.parse_args().output_dir
    results = train_all()
    # Four digits say it all, and keep the file short.
    text = json.dumps(results, default=lambda array: np.asarray(array).tolist())
    results = json.loads(text, parse_float=lambda x: float(f"{float(x):.4g}"))
    print_table(results)
    paths = draw_all(results, folder)
    numbers = folder / "gradient.json"
    numbers.write_text(json.dumps(results) + "\n")
    print("", numbers, *paths, sep="\n")


if __name__ == "__main__":
    main()
