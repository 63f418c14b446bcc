"""Many to many, T_x != T_y: write down numbers that are read out as telephone numbers are.

    double four oh twenty-seven    -> 44027
    triple six nineteen oh eighty  -> 66619080

One network reads, another writes (Sutskever, Vinyals and Le 2014). The encoder leaves all
that it has read in its last state, and the decoder starts from there: 128 numbers between
them, no attention. The encoder reads backward, which puts the first words next to the first
digits and gives the gradient a short way between them. The decoder is told the digit before
and names the next. In training the digit before is the right one (teacher forcing), in use
it is the decoder's own: the likeliest (greedy), or each of several, of which the likeliest
few beginnings go on (beam search).

A word says which digits, but not where: that depends on all the words before. The score is
the share of 2,000 numbers without an error, none of which is in training. To copy the
answer of the nearest sentence is therefore always wrong; logistic regression gets the words
and all that stand in pairs and triples, and names the digit of each place.

    python examples/rewrite_numbers.py            # minutes
    python examples/rewrite_numbers.py --smoke    # seconds
"""

import textwrap

import common
import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import SGDClassifier
from sklearn.multioutput import MultiOutputClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline

from keras_bptt import BPTTRNN, convert

ONES = "oh one two three four five six seven eight nine".split()
TEENS = (
    "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
# The first is padding. Of twenty-seven the hyphen is a word, lest it be read as 20 7.
WORDS = ["", "double", "triple", "-", *ONES, *TEENS, *TENS]
SHORTEST, LONGEST = 3, 8
# Tokens that are written: padding, the digits 0 to 9 as 1 to 10, and these two.
PAD, END, START = 0, 11, 12


def read_aloud(number, random):
    """ "4427" -> "double four twenty-seven", "forty-four two seven" or other words."""
    words = []
    while number:
        first = int(number[0])
        size = min(len(number) - len(number.lstrip(number[0])), 3)
        if first and len(number) > 1 and random.integers(2):
            size, ones = 2, int(number[1])
            tens = TENS[first - 2] + (f"-{ONES[ones]}" if ones else "")
            words.append(TEENS[ones] if first == 1 else tens)
        elif size > 1:
            words += ["triple" if size == 3 else "double", ONES[first]]
        else:
            words.append(ONES[first])
        number = number[size:]
    return " ".join(words)


def draw_examples(sizes, seed):
    """Pairs (sentence, number) for training, validation, test; no number comes twice."""
    random = np.random.default_rng(seed)
    numbers = {}
    while len(numbers) < sum(sizes):
        length = random.integers(SHORTEST, LONGEST + 1)
        number = "".join(map(str, random.integers(10, size=length)))
        numbers[number] = read_aloud(number, random)
    pairs = [(sentence, number) for number, sentence in numbers.items()]
    # The short ones run out: later numbers are longer.
    random.shuffle(pairs)
    ends = np.cumsum(sizes)
    return [pairs[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def batches(pairs, size, seed=None):
    """Batches ((words, digit before), digit), each as long as the longest may be.

    With a seed they are shuffled, for training. All have one shape: a graph is compiled for
    each, which takes longer than to compute with some padding.
    """

    def tokens():
        for sentence, number in pairs:
            words = [WORDS.index(word) for word in sentence.replace("-", " - ").split()]
            digits = [int(digit) + 1 for digit in number]
            yield (words, [START, *digits]), [*digits, END]

    row = tf.TensorSpec([None], tf.int32)
    data = tf.data.Dataset.from_generator(tokens, output_signature=((row, row), row))
    data = data.apply(tf.data.experimental.assert_cardinality(len(pairs))).cache()
    if seed is not None:
        data = data.shuffle(len(pairs), seed=seed)
    # The tens, a hyphen and the ones are three words for two digits.
    shapes = ([3 * LONGEST // 2], [LONGEST + 1]), [LONGEST + 1]
    data = data.padded_batch(size, shapes, drop_remainder=seed is not None)
    return data.prefetch(tf.data.AUTOTUNE)


def build_model(units):
    """Words (batch, T_x), digits before (batch, T_y) -> logits (batch, T_y, 12).

    Padding, token 0, is masked: it moves no state, and the loss leaves it out.
    """
    words = keras.Input((None,), dtype="int32")
    before = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(len(WORDS), 32, mask_zero=True)(words)
    state = BPTTRNN(units, go_backwards=True, name="encoder")(x)
    y = keras.layers.Embedding(START + 1, 32, mask_zero=True, name="before")(before)
    y = BPTTRNN(units, return_sequences=True, name="decoder")(y, initial_state=state)
    return keras.Model([words, before], keras.layers.Dense(END + 1, name="logits")(y))


@keras.saving.register_keras_serializable("rewrite_numbers")
class Exact(keras.metrics.Mean):
    """The share of sequences without an error, padding aside.

    If the decoder is right at each step when it is told the digits before, it is right
    when it is told its own: this is the score of greedy decoding, at no cost.
    """

    def update_state(self, y_true, logits, sample_weight=None):
        right = tf.argmax(logits, axis=-1) == tf.cast(y_true, "int64")
        super().update_state(tf.reduce_all(right | (y_true == PAD), axis=-1))


def train(model, training, validation, args):
    """Fits the model; returns the validation loss and exact share of each epoch."""
    updates = args.epochs * (len(training) // args.batch_size)
    rate = keras.optimizers.schedules.CosineDecay(0.003, updates, alpha=0.02)
    model.compile(
        keras.optimizers.Adam(rate, clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[Exact(name="exact")],
    )
    fit = model.fit(
        batches(training, args.batch_size, args.seed),
        validation_data=batches(validation, 500),
        epochs=args.epochs,
        shuffle=False,  # not again
        callbacks=[
            keras.callbacks.EarlyStopping(patience=3, restore_best_weights=True),
            keras.callbacks.ModelCheckpoint(
                args.output_dir / "rewrite_numbers.keras", save_best_only=True
            ),
        ],
    )
    return {name: fit.history[name] for name in ("val_loss", "val_exact")}


def reader_and_step(model):
    """The encoder, words -> state, and a step of the decoder.

    The step takes tokens (n,) and states (n, units), and returns the log-probabilities
    (n, 12) of what comes next, and the next states. After the end comes padding, for
    certain, and nowhere else.
    """
    reader = keras.Model(model.inputs[0], model.get_layer("encoder").output)
    names = "before", "decoder", "logits"
    before, decoder, logits = (model.get_layer(name) for name in names)
    padding = tf.where(tf.range(END + 1) == PAD, 0.0, -np.inf)

    @tf.function
    def step(tokens, state):
        state = decoder(before(tokens[:, tf.newaxis]), initial_state=state)[:, 0]
        log_p = tf.nn.log_softmax(logits(state)[:, PAD + 1 :])
        log_p = tf.pad(log_p, [[0, 0], [PAD + 1, 0]], constant_values=-np.inf)
        ended = (tokens == PAD) | (tokens == END)
        return tf.where(ended[:, tf.newaxis], padding, log_p), state

    return reader, step


def greedy(step, state, longest):
    """Takes the likeliest token at each step.

    Returns tokens (n, longest) and log-probabilities (n,).
    """
    tokens, total, written = np.full(len(state), START, "int32"), 0, []
    for _ in range(longest):
        log_p, state = step(tokens, state)
        tokens = np.argmax(log_p, axis=1).astype("int32")
        total = total + np.max(log_p, axis=1)
        written.append(tokens)
    return np.stack(written, axis=1), total


def beam_search(step, state, longest, width):
    """Keeps the `width` likeliest beginnings at each step, the best first.

    Returns tokens (n, width, longest) and log-probabilities (n, width).
    """
    n = len(state)
    state = np.repeat(state, width, axis=0)
    written = np.full((n * width, 1), START, "int32")
    # All begin alike, so that at first only one of them counts.
    total = np.tile(np.where(np.arange(width) == 0, 0, -np.inf), (n, 1))
    for _ in range(longest):
        log_p, state = (np.array(t) for t in step(written[:, -1], state))
        tokens = log_p.shape[1]
        longer = (total.reshape(-1, 1) + log_p).reshape(n, width * tokens)
        best = np.argsort(-longer, axis=1, kind="stable")[:, :width]
        total = np.take_along_axis(longer, best, axis=1)
        parents = (best // tokens + width * np.arange(n)[:, np.newaxis]).ravel()
        token = (best % tokens).ravel().astype("int32")
        written, state = np.column_stack([written[parents], token]), state[parents]
    return written[:, 1:].reshape(n, width, longest), total


def read_out(tokens):
    """Tokens (n, longest) -> what they say, as strings."""
    return ["".join(str(t - 1) for t in row if t not in (PAD, END)) for row in tokens]


def rewrite(model, pairs, width):
    """What greedy decoding writes, and beam search; log-probabilities of the latter."""
    reader, step = reader_and_step(model)
    (words, _), _ = next(iter(batches(pairs, len(pairs))))
    state = reader(words)
    likeliest, _ = greedy(step, state, LONGEST + 1)
    best, log_p = beam_search(step, state, LONGEST + 1, width)
    return read_out(likeliest), read_out(best[:, 0]), log_p[:, 0]


def baselines(training, test):
    """What comes out where words, pairs and triples of words are counted.

    Each predicts the digit, or none, at each place from the end.
    """
    sentences, numbers = zip(*training, strict=True)
    unseen, truth = zip(*test, strict=True)
    linear = SGDClassifier("log_loss", alpha=1e-6, max_iter=5, tol=None, random_state=0)
    scores = {}
    for name, classifier in {
        "most frequent digits": DummyClassifier(),
        "nearest sentence": KNeighborsClassifier(1, metric="cosine"),
        "logistic regression": MultiOutputClassifier(linear),
    }.items():
        counts = CountVectorizer(token_pattern=r"[-\w]+", ngram_range=(1, 3))
        model = make_pipeline(counts, classifier)
        model.fit(sentences, [[*number.rjust(LONGEST)] for number in numbers])
        found = ["".join(row).strip() for row in model.predict(unseen)]
        scores[name] = np.mean(np.array(found) == np.array(truth))
    return scores


def look_at(model, pair):
    """The distribution that each digit, and the end, of a number is named from."""
    sentence, number = pair
    (words, before), _ = next(iter(batches([pair], 1)))
    logits = model([words, before])[0, : len(number) + 1, PAD + 1 :]
    p = tf.nn.softmax(logits).numpy().tolist()
    return {"sentence": sentence, "number": number, "p": p}


def draw(results, path):
    """How the share of right answers grew; what the decoder weighed at each step."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    shares, steps = figure.subplots(1, 2)
    for name, style in ("BPTTRNN", "-"), ("SimpleRNN", ":"):
        curve = results["curves"][name]["val_exact"]
        colour, width = ("tab:blue", 1.5) if style == "-" else ("black", 2.5)
        epochs = range(1, len(curve) + 1)
        shares.plot(epochs, curve, style, color=colour, linewidth=width, label=name)
    score = results["scores"]["logistic regression"]
    shares.axhline(score, color="tab:red", linestyle="--", label="logistic regression")
    shares.set(xlabel="epoch", ylabel="validation: share without an error", ylim=(0, 1))
    shares.set_title("Learning", loc="left")
    shares.legend()
    example = results["example"]
    p = np.array(example["p"])
    steps.imshow(np.log10(p + 1e-9).T, aspect="auto", vmin=-5, vmax=0, cmap="Blues")
    for (step, token), value in np.ndenumerate(p):
        if value > 0.01:
            colour = "white" if value > 0.05 else "black"
            steps.text(step, token, f"{value:.2f}", ha="center", va="center", c=colour)
    steps.set_xticks(range(len(p)), [*example["number"], "end"])
    steps.set_yticks(range(END), [*range(10), "end"])
    steps.set(xlabel="right answer", ylabel="probability of what is written next")
    steps.set_title(textwrap.fill(f'"{example["sentence"]}"', 55), loc="left")
    common.save(figure, path)


def main():
    args = common.arguments(
        __doc__,
        epochs=(12, "at most"),
        units=(128, "size of the hidden states"),
        examples=(40000, "numbers to train with"),
        batch_size=(64, "numbers in a batch"),
        width=(5, "of the beam"),
        smoke={"epochs": 1, "examples": 1000},
    )
    training, validation, test = draw_examples([args.examples, 2000, 2000], args.seed)
    truth = np.array([number for _, number in test])
    keras.utils.set_random_seed(args.seed)
    model = build_model(args.units)
    twin = convert(model, to=keras.layers.SimpleRNN)  # with the same weights
    curves, scores = {}, {}
    for name, network in ("SimpleRNN", twin), ("BPTTRNN", model):
        print(f"\nTraining {name}")
        curves[name] = train(network, training, validation, args)
        first, best, log_p = rewrite(network, test, args.width)
        scores[name] = np.mean(truth == best)
        scores[f"{name}, greedy"] = np.mean(truth == first)
    scores |= baselines(training, test)
    # Of BPTTRNN, which came last. What it was least sure of, and yet right.
    unsure = np.argmin(np.where(truth == best, log_p, 0))
    rows = [(*pair, *each) for pair, *each in zip(test, first, best, strict=True)]
    results = {
        "kind": "many to many, T_x != T_y",
        "score": f"share rewritten without an error, beam of {args.width}",
        "scores": scores,
        "curves": curves,
        "example": look_at(model, test[unsure]),
        # Sentence, number, greedy, beam search.
        "wrong": [row for row in rows if len({*row[1:]}) > 1][:50],
    }
    (words, before), _ = next(iter(batches(test[:10], 10)))
    inputs = [np.array(words), np.array(before)]
    common.finish(results, draw, model, inputs, args, "rewrite_numbers")


if __name__ == "__main__":
    main()
