"""A character-level language model of English prose.

The model reads a text one character at a time and predicts the next one. It is
trained twice, from the same initial weights and on the same batches: once with
`keras_bptt.BPTTRNN`, once with `keras.layers.SimpleRNN`. With `--layer lstm` the
two are `BPTTLSTM` and `keras.layers.LSTM`, with `--layer gru` `BPTTGRU` and
`keras.layers.GRU`. Both scores are *bits per character* on text that neither has
seen. Then the model writes a few lines of its own, is saved, and is loaded again
where `keras_bptt` cannot be imported.

    python examples/character_language_model.py                  # a few minutes
    python examples/character_language_model.py --layer lstm     # some more
    python examples/character_language_model.py --smoke          # a few seconds

The text is the Python language reference, which every Python installation
carries as `pydoc_data.topics` (it is what `help("yield")` prints). It differs a
little from one Python version to the next, and so does the score.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pydoc_data.topics import topics

import basics
import keras
import numpy as np
import tensorflow as tf

from keras_bptt import BPTTGRU, BPTTLSTM, BPTTRNN

# By the name of `--layer`: the layer, and the one of Keras in whose place it stands.
LAYERS = {
    "rnn": (BPTTRNN, keras.layers.SimpleRNN),
    "lstm": (BPTTLSTM, keras.layers.LSTM),
    "gru": (BPTTGRU, keras.layers.GRU),
}

# Runs in a process of its own, in which `import keras_bptt` fails: the SavedModel
# carries all that it needs.
SERVE_WITHOUT_KERAS_BPTT = """
import sys
sys.modules["keras_bptt"] = None
import numpy as np
import tensorflow as tf
model = tf.saved_model.load(sys.argv[1])
stored = np.load(sys.argv[2])
logits = model.serve(tf.constant(stored["characters"])).numpy()
np.testing.assert_allclose(logits, stored["logits"], rtol=1e-4, atol=1e-4)
print(f"{np.abs(logits - stored['logits']).max():.1e}")
"""


def read_text():
    """All topics in alphabetical order, each paragraph once.

    A fifth of the raw text is paragraphs that several topics share. Left in, they
    would put training text into the held-out tenth and flatter the score.
    """
    paragraphs = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph)
    return "\n\n".join(paragraphs.values())


def cut_windows(ids, window):
    """Rows of `window` characters, and the same rows one character later."""
    count = (len(ids) - 1) // window
    if count == 0:
        raise SystemExit(
            f"--window must be shorter than the text, which has {len(ids):,} "
            f"characters here. Received: {window}"
        )
    inputs = ids[: count * window].reshape(count, window)
    targets = ids[1 : count * window + 1].reshape(count, window)
    return inputs, targets


def count_bits(train_ids, heldout_ids, vocabulary_size):
    """Bits per character of unigram and bigram counts, with add-one smoothing."""
    bigrams = np.ones((vocabulary_size, vocabulary_size))
    np.add.at(bigrams, (train_ids[:-1], train_ids[1:]), 1)
    unigrams = 1 + np.bincount(train_ids, minlength=vocabulary_size)
    previous, following = heldout_ids[:-1], heldout_ids[1:]
    bigram = bigrams[previous, following] / bigrams.sum(axis=1)[previous]
    unigram = unigrams[following] / unigrams.sum()
    return -np.log2(unigram).mean(), -np.log2(bigram).mean()


def build_model(recurrent_layer, vocabulary_size, batch_shape=(None, None)):
    """Characters (batch, timesteps) -> logits (batch, timesteps, vocabulary)."""
    model = keras.Sequential()
    model.add(keras.Input(batch_shape=batch_shape, dtype="int32"))
    model.add(keras.layers.Embedding(vocabulary_size, 64))
    model.add(recurrent_layer)  # such as BPTTRNN(256, return_sequences=True)
    model.add(keras.layers.Dense(vocabulary_size))
    return model


def path_of(args):
    """Of the SavedModel; the other files have the same name and a suffix."""
    suffix = "" if args.layer == "rnn" else f"_{args.layer}"
    return args.output_dir / f"character_language_model{suffix}"


class EpochClock(keras.callbacks.Callback):
    """Takes the time of every epoch, and prints a line of it."""

    def on_train_begin(self, logs=None):
        self.times = [time.perf_counter()]
        print(f"{'epoch':<8}{'bits per validation character':>30}{'seconds':>10}")

    def on_epoch_end(self, epoch, logs=None):
        self.times.append(time.perf_counter())
        bits, seconds = logs["val_loss"] / math.log(2), np.diff(self.times)[-1]
        print(f"{epoch + 1:<8}{bits:>30.3f}{seconds:>10.1f}", flush=True)

    def typical_epoch(self):
        """Median seconds; the first epoch, which also traces, counts only if alone."""
        seconds = np.diff(self.times)
        return float(np.median(seconds[1:] if len(seconds) > 1 else seconds))


def train(model, train_windows, validation_windows, args):
    """Returns (bits per validation character of each epoch, seconds per epoch)."""
    # The shuffling is seeded: every model that comes here sees the same batches.
    batches = (
        tf.data.Dataset.from_tensor_slices(train_windows)
        .shuffle(len(train_windows[0]), seed=args.seed)
        .batch(args.batch_size)
        .prefetch(tf.data.AUTOTUNE)
    )
    steps = len(batches) * args.epochs
    model.compile(
        # Gradients of a recurrent network explode now and then: clip their norm.
        optimizer=keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(args.learning_rate, steps),
            clipnorm=1.0,
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    clock = EpochClock()
    fit = model.fit(
        batches,
        validation_data=tf.data.Dataset.from_tensor_slices(validation_windows).batch(
            args.batch_size
        ),
        epochs=args.epochs,
        shuffle=False,  # the batches are
        verbose=0,
        callbacks=[
            clock,
            keras.callbacks.EarlyStopping(patience=3, restore_best_weights=True),
            keras.callbacks.ModelCheckpoint(
                path_of(args).with_suffix(".keras"), save_best_only=True
            ),
        ],
    )
    bits = [nats / math.log(2) for nats in fit.history["val_loss"]]
    return bits, clock.typical_epoch()


def bits_per_character(model, windows, args):
    return model.evaluate(*windows, args.batch_size, verbose=0) / math.log(2)


def generate(model, alphabet, prompt, length, args):
    """Continues `prompt`, each character drawn from softmax(logits / temperature)."""
    # The same weights in a stateful model: it keeps the states between calls, so that
    # each new character costs one step, not a walk through all the text before it.
    layer, _ = LAYERS[args.layer]
    writer = build_model(
        layer(args.units, return_sequences=True, stateful=True),
        len(alphabet),
        batch_shape=(1, 1),
    )
    writer.set_weights(model.get_weights())
    step = tf.function(writer)
    random = np.random.default_rng(args.seed)
    text = prompt
    for i in range(len(prompt) + length - 1):
        logits = step(tf.constant([[alphabet.index(text[i])]]))[0, 0].numpy()
        if i >= len(prompt) - 1:
            # The largest of the logits with Gumbel noise is a draw from the softmax.
            noisy = logits / args.temperature + random.gumbel(size=len(alphabet))
            text += alphabet[np.argmax(noisy)]
    return text


def save_and_reload(model, characters, saved_model):
    """Writes the model in both formats and checks that both predict the same."""
    keras_file = saved_model.with_suffix(".keras")
    expected = saved_model.with_suffix(".npz")
    logits = model.predict(characters, verbose=0)
    np.savez(expected, characters=characters, logits=logits)

    model.save(keras_file)
    again = keras.models.load_model(keras_file).predict(characters, verbose=0)
    np.testing.assert_allclose(again, logits, rtol=1e-4, atol=1e-4)
    print(f"{keras_file}: largest difference {np.abs(again - logits).max():.1e}")

    model.export(saved_model, verbose=False)
    command = [sys.executable, "-c", SERVE_WITHOUT_KERAS_BPTT, saved_model, expected]
    served = subprocess.run(command, capture_output=True, text=True)
    if served.returncode != 0:
        raise SystemExit(f"{served.stderr}\nThe SavedModel does not predict the same.")
    difference = served.stdout.strip()
    print(f"{saved_model}, without keras_bptt: largest difference {difference}")


def draw(results, path):
    """Learning curves of both layers, beside what counting pairs of characters gives.

    Returns where they are, in words.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "not drawn, for matplotlib is not installed: pip install matplotlib"
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, bits in results["validation"].items():
        style = "-" if name.startswith("BPTT") else "k:"
        axes.plot(range(1, len(bits) + 1), bits, style, label=name)
    bigrams = results["scores"]["bigram counts"]
    axes.axhline(
        bigrams, color="grey", linestyle="--", label="bigram counts (held out)"
    )
    axes.set(xlabel="epoch", ylabel="bits per validation character")
    axes.set_title("A language model of the Python reference", loc="left")
    axes.legend()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    return path


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--layer", choices=LAYERS, default="rnn", help="plain, or with gates")
    add("--units", type=int, default=256, help="size of the hidden state")
    add("--window", type=int, default=100, help="characters per example")
    add("--batch-size", type=int, default=32, help="examples per training step")
    add("--epochs", type=int, default=12, help="passes over the training text")
    add("--learning-rate", type=float, default=3e-3, help="at the first step")
    add("--temperature", type=float, default=0.7, help="of the generated text")
    add("--seed", type=int, default=0, help="of weights, batches and generated text")
    basics.add_output(parser, smoke="16 units, window 20, 1 epoch, 20 kB text")
    args = parser.parse_args()
    basics.check_positive(parser, args)
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be in 0 ... 2**32 - 1. Received: {args.seed}")
    basics.make_output(parser, args)
    if args.smoke:
        args.units, args.window, args.epochs = 16, 20, 1
    return args


def main():
    args, began = parse_arguments(), time.perf_counter()
    text = read_text()[: 20_000 if args.smoke else None]
    alphabet = sorted(set(text))
    ids = np.array([alphabet.index(c) for c in text], dtype="int32")
    # To train, to decide when to stop, to judge.
    validation, split = len(ids) * 17 // 20, len(ids) * 9 // 10
    train_windows = cut_windows(ids[:validation], args.window)
    validation_windows = cut_windows(ids[validation:split], args.window)
    heldout_windows = cut_windows(ids[split:], args.window)
    python = ".".join(map(str, sys.version_info[:2]))
    print(f"Text: the reference of Python {python}, {len(ids):,} characters,")
    print(f"{len(alphabet)} different. Two networks learn to predict the next one.\n")

    layer, host = LAYERS[args.layer]
    own, other = layer.__name__, host.__name__
    keras.utils.set_random_seed(args.seed)
    model = build_model(layer(args.units, return_sequences=True), len(alphabet))
    twin = build_model(host(args.units, return_sequences=True), len(alphabet))
    twin.set_weights(model.get_weights())
    model.summary()
    print(f"\nTraining with keras_bptt.{own}")
    curve, seconds = train(model, train_windows, validation_windows, args)
    bits = bits_per_character(model, heldout_windows, args)
    print(f"\nTraining with keras.layers.{other}")
    twin_curve, twin_seconds = train(twin, train_windows, validation_windows, args)
    twin_bits = bits_per_character(twin, heldout_windows, args)

    unigram, bigram = count_bits(ids[:split], ids[split:], len(alphabet))
    print(f"\n{'on held-out text':<24}{'bits per character':>18}{'s per epoch':>13}")
    print(f"{'unigram counts':<24}{unigram:>18.3f}{'-':>13}")
    print(f"{'bigram counts':<24}{bigram:>18.3f}{'-':>13}")
    print(f"{other:<24}{twin_bits:>18.3f}{twin_seconds:>13.2f}")
    print(f"{own:<24}{bits:>18.3f}{seconds:>13.2f}")
    ratio = seconds / twin_seconds
    traced = ", tracing included" if args.epochs == 1 else ""
    print(f"An epoch of {own} takes {ratio:.2f} times one of {other}{traced}.")

    print(f"\nA sample at temperature {args.temperature}:\n")
    print(generate(model, alphabet, "The ", 40 if args.smoke else 400, args))
    path = path_of(args).with_suffix(".json")
    results = {
        "kind": "many to many",
        "score": f"bits per held-out character, Python {python}",
        "scores": {
            own: round(bits, 4),
            other: round(twin_bits, 4),
            "unigram counts": round(unigram, 4),
            "bigram counts": round(bigram, 4),
        },
        "seconds": round(time.perf_counter() - began),
        "validation": {own: curve, other: twin_curve},
    }
    path.write_text(json.dumps(results) + "\n")
    print(f"\nLearning curves: {draw(results, path.with_suffix('.png'))}")
    print("\nSaved and loaded again:")
    save_and_reload(model, heldout_windows[0][:8], path_of(args))


if __name__ == "__main__":
    main()
