"""Do the verdicts of `gradient_flow` foretell which networks learn?

    python benchmarks/verdicts.py            # minutes
    python benchmarks/verdicts.py --smoke    # seconds

Networks are drawn at random: a plain RNN, an LSTM or a GRU; U by a gain between 0.5 and
2.5; the gates' biases 0, Keras' own, or for a memory of the sequence. So are their tasks: a
key, one of eight symbols, is to be named `lag` steps after it, behind distractors of eight
other symbols. Half of the sequences begin with the key, the others with distractors.

`gradient_flow` measures each network before training and after a tenth of it. A network
has learned the lag where it names half of the keys in sequences never trained on; an eighth
is chance. Two tables: how many networks of each verdict learn; and how well the share of
the gradient that is left separates those that learn from those that do not, by the
threshold of the verdict (1 %) and by the best one, at the lag of the task and at the
longest lag, which the verdict goes by. Exploding networks are left out there.
"""

import argparse
import json
import logging
import pathlib

import keras
import numpy as np

from keras_bptt import (
    BPTTGRU,
    BPTTLSTM,
    BPTTRNN,
    GRUMemoryBias,
    LSTMMemoryBias,
    gradient_flow,
)
from keras_bptt.flow.verdict import VANISHED

KEYS, LEARNED = 8, 0.5
WHEN = "before", "after a tenth"
CELLS = {"RNN": BPTTRNN, "LSTM": BPTTLSTM, "GRU": BPTTGRU}


def draw(random):
    """A network and its task, as plain numbers."""
    cell = str(random.choice(list(CELLS)))
    biases = "-" if cell == "RNN" else str(random.choice(["0", "1", "memory"]))
    if (cell, biases) == ("GRU", "1"):
        biases = "0"  # which is what Keras takes
    lag = int(random.integers(10, 81))
    more = int(random.integers(1, 41)) if random.random() < 0.5 else 0
    gain = round(float(random.uniform(0.5, 2.5)), 2)
    return {
        "cell": cell,
        "gain": gain,
        "biases": biases,
        "lag": lag,
        "steps": lag + 1 + more,
    }


def set_biases(layer, network):
    """Where they are not Keras' own: 0, or for a memory of the sequence."""
    memory, bias = {"LSTM": LSTMMemoryBias, "GRU": GRUMemoryBias}, layer.cell.bias
    if network["biases"] == "memory":
        bias.assign(memory[network["cell"]](network["steps"])(bias.shape))
    elif network["biases"] == "0":
        bias.assign(keras.ops.zeros(bias.shape))


def build_model(network, seed, args):
    keras.utils.set_random_seed(seed)
    layer = CELLS[network["cell"]](
        args.units,
        recurrent_initializer=keras.initializers.Orthogonal(network["gain"]),
        name="layer",
    )
    input_layer = keras.Input((network["steps"], 2 * KEYS))
    model = keras.Sequential([input_layer, layer, keras.layers.Dense(KEYS)])
    set_biases(layer, network)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    adam = keras.optimizers.Adam(args.learning_rate)
    # XLA would compile for longer than these few steps take.
    model.compile(adam, loss, metrics=["accuracy"], jit_compile=False)
    return model


def sequences(seed, count, network):
    """One-hot symbols (count, steps, 2 * KEYS), the keys (count,)."""
    random = np.random.default_rng(seed)
    symbols = random.integers(KEYS, size=(count, network["steps"]))
    when = network["steps"] - 1 - network["lag"]
    keys = symbols[:, when].copy()
    symbols += KEYS
    symbols[:, when] = keys
    return np.eye(2 * KEYS, dtype="float32")[symbols], keys


def examine(network, seed, args):
    """Measures, trains a tenth, measures, trains the rest. Returns all that is kept."""
    model = build_model(network, seed, args)
    x, y = sequences(seed, args.updates * args.batch_size, network)
    tenth = max(args.updates // 10, 1) * args.batch_size
    result = dict(network)
    for when, part in zip(WHEN, (slice(tenth), slice(tenth, None)), strict=True):
        flow = gradient_flow(model, x[:32], y[:32])["layer"]
        shares = np.nan_to_num(flow.untruncated_lag_shares, nan=np.inf)
        result[when] = {
            "verdict": flow.verdict,
            "at the lag": float(shares[network["lag"]]),
            "at the longest": float(shares[-1]),
        }
        model.fit(x[part], y[part], args.batch_size, shuffle=False, verbose=0)
    test = sequences(1000 + seed, 1000, network)
    score = model.evaluate(*test, 1000, verbose=0, return_dict=True)["accuracy"]
    return result | {"score": score}


def line(result):
    what = f"{result['cell']:<6}{result['gain']:>5}{result['biases']:>8}"
    found = "".join(
        f"{result[when]['verdict']:>12}{result[when]['at the lag']:>9.1e}"
        for when in WHEN
    )
    return f"{what}{result['lag']:>5}{result['steps']:>6}{found}{result['score']:>7.2f}"


def by_verdict(results):
    """{when: {verdict: [how many learn, of how many]}}."""
    counts = {}
    for when in WHEN:
        counts[when] = {}
        for verdict in sorted({result[when]["verdict"] for result in results}):
            scores = [r["score"] for r in results if r[when]["verdict"] == verdict]
            learned = sum(score > LEARNED for score in scores)
            counts[when][verdict] = [learned, len(scores)]
    return counts


def calm(results):
    return [r for r in results if all(r[w]["verdict"] != "exploding" for w in WHEN)]


def separation(shares, learned):
    """How many networks a threshold puts on the right side: 1 %, and the best one.

    A network is foretold to learn where its share is above the threshold. `best` are the
    ends of the interval of the best thresholds; `order` is how often, of a network that
    learns and one that does not, the first has the larger share, ties counting half.
    """
    shares, learned = np.array(shares), np.array(learned)
    ordered = np.sort(shares)
    ends = np.concatenate([[0.0], ordered])

    def right(threshold):
        return int(np.sum((shares > threshold) == learned))

    rights = [right(end) for end in ends]
    best = int(np.argmax(rights))
    pairs = shares[learned][:, None] - shares[~learned]
    order = np.mean((pairs > 0) + 0.5 * (pairs == 0)) if pairs.size else None
    return {
        "right by 1 %": right(VANISHED),
        "right by the best": rights[best],
        "best": [float(ends[best]), float(ordered[min(best, len(ordered) - 1)])],
        "order": None if order is None else float(order),
    }


def separations(results):
    """Of the networks whose gradient explodes at neither time: of these it says nothing."""
    results = calm(results)
    learned = [result["score"] > LEARNED for result in results]
    return {
        when: {
            where: separation([r[when][where] for r in results], learned)
            for where in ("at the lag", "at the longest")
        }
        for when in WHEN
    }


def table(found):
    count = len(calm(found["networks"]))
    lines = ["| verdict | measured | learn | of |", "|---|---|---|---|"]
    for when in WHEN:
        for verdict, (learned, of) in found["by verdict"][when].items():
            lines.append(f"| {verdict} | {when} | {learned} | {of} |")
    lines += [
        "",
        f"| share of the gradient | measured | right by 1 %, of {count} | by the best "
        "threshold | which is | in order |",
        "|---|---|---|---|---|---|",
    ]
    for when in WHEN:
        for where, each in found["separation"][when].items():
            low, high = each["best"]
            order = "-" if each["order"] is None else f"{each['order']:.2f}"
            lines.append(
                f"| {where} | {when} | {each['right by 1 %']} | "
                f"{each['right by the best']} | {low:.2g} ... {high:.2g} | {order} |"
            )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--networks", type=int, default=40, help="how many are drawn")
    add("--units", type=int, default=32, help="size of the hidden state")
    add("--updates", type=int, default=300, help="training steps")
    add("--batch-size", type=int, default=32, help="sequences per training step")
    add("--learning-rate", type=float, default=3e-3, help="of Adam")
    add("--seed", type=int, default=0, help="of what is drawn")
    add("--json", type=pathlib.Path, help="write all numbers here")
    add("--smoke", action="store_true", help="3 networks of 8 units, 10 updates")
    args = parser.parse_args()
    if args.smoke:
        args.networks, args.units, args.updates = 3, 8, 10
    # Every network is traced, which TensorFlow warns of.
    logging.getLogger("tensorflow").setLevel("ERROR")
    random, results = np.random.default_rng(args.seed), []
    print(
        f"{'cell':<6}{'gain':>5}{'biases':>8}{'lag':>5}{'steps':>6}"
        f"{'before':>12}{'share':>9}{'after 1/10':>12}{'share':>9}{'score':>7}"
    )
    for seed in range(args.networks):
        results.append(examine(draw(random), seed, args))
        print(line(results[-1]), flush=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "smoke")}
    found = {
        "settings": settings,
        "by verdict": by_verdict(results),
        "separation": separations(results),
        "networks": results,
    }
    print("\n" + table(found))
    if args.json:
        # Four digits say it all, and keep the file short.
        text = json.dumps(found)
        found = json.loads(text, parse_float=lambda x: float(f"{float(x):.4g}"))
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
