"""Follow the advice of `gradient_flow`, and see whether a network learns by it.

Each network here has a fault. It reads a key, one of eight symbols, and then distractors,
of eight others, and has to name the key `lag` steps after it. `gradient_flow` is asked
first: its verdict, and its advice. Then the network is trained as it is, and once more for
every way to help it: what the report advises, and some ways that it does not name. The
sequences and the number of updates are the same. A score is the share of keys named right
in sequences never trained on: 0.125 is chance. A row says whether the report advises the
way, and what its verdict is once that is followed.

    python examples/follow_the_advice.py            # minutes
    python examples/follow_the_advice.py --smoke    # seconds
    python examples/follow_the_advice.py --only "small gain" "LSTM, default biases"

Writes follow_the_advice.json.
"""

import argparse
import collections.abc
import dataclasses
import json
import logging
import textwrap

import basics
import keras
import numpy as np

from keras_bptt import (
    BPTTGRU,
    BPTTLSTM,
    BPTTRNN,
    GRUMemoryBias,
    LSTMMemoryBias,
    convert,
    gradient_flow,
)

KEYS = 8


@dataclasses.dataclass(frozen=True)
class At:
    """What a layer is made for."""

    units: int
    steps: int


def orthogonal(gain):
    """A new one for every layer: an initializer draws its seed when it is made."""
    if gain is None:
        return {}
    return {"recurrent_initializer": keras.initializers.Orthogonal(gain)}


def rnn(gain=None, inputs=None, **options):
    """`gain` of U, `inputs` the standard deviation of W; None: as Keras has it."""

    def make(at):
        own = orthogonal(gain)
        if inputs is not None:
            own["kernel_initializer"] = keras.initializers.RandomNormal(stddev=inputs)
        return BPTTRNN(at.units, name="layer", **own, **options)

    return make


def lstm(memory=None, gain=None, **options):
    """`memory`: of the gates, as a multiple of the sequence."""

    def make(at):
        biases = orthogonal(gain)
        if memory is not None:
            start = LSTMMemoryBias(memory * at.steps)
            biases |= {"unit_forget_bias": False, "bias_initializer": start}
        return BPTTLSTM(at.units, name="layer", **biases, **options)

    return make


def gru(memory=None, **options):
    def make(at):
        biases = {}
        if memory is not None:
            biases = {"bias_initializer": GRUMemoryBias(memory * at.steps)}
        return BPTTGRU(at.units, name="layer", **biases, **options)

    return make


def to_suggested(model, flow):
    model.get_layer("layer").truncation = flow.suggest_truncation()
    return model


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to help: what differs, and the words of the advice that it follows."""

    words: str | None = None  # None: no report names it
    layer: collections.abc.Callable | None = None
    change: collections.abc.Callable | None = None  # (model, flow) -> model
    rate: float = 1.0  # times the learning rate
    scale: float = 1.0  # times the inputs


@dataclasses.dataclass(frozen=True)
class Fault:
    """A network that has one, and the ways to help it."""

    name: str
    lag: int
    layer: collections.abc.Callable
    ways: dict[str, Way]
    steps: int | None = None  # of a sequence; lag + 1 if not given
    rate: float = 1.0
    scale: float = 1.0
    trained_first: bool = False  # ask for the report after the training


def converted(words, **options):
    return Way(words, change=lambda model, flow: convert(model, **options))


LSTM_MEMORY, GRU_MEMORY = "LSTMMemoryBias", "GRUMemoryBias"
UNCUT = {"truncation": None}
GROWTH = "adjoint_max_growth=1"
ORTHOGONAL = "recurrent_initializer='orthogonal'"
IDENTITY = rnn(activation="relu", recurrent_initializer="identity")
EXPLODING = rnn(gain=2.0)
WINDOW = rnn(gain=2.0, truncation=20)
FAULTS = [
    Fault(
        "small gain",
        20,
        rnn(gain=0.5),
        {
            "orthogonal": Way(ORTHOGONAL, rnn()),
            "relu and the identity": Way(None, IDENTITY),
        },
    ),
    Fault(
        "sigmoid",
        20,
        rnn(activation="sigmoid"),
        {
            "tanh": Way("activation='tanh'", rnn()),
            "relu": Way(None, rnn(activation="relu")),
        },
    ),
    Fault(
        "saturated by weights",
        20,
        rnn(inputs=5.0),
        {"smaller weights": Way("smaller weights", rnn())},
    ),
    Fault(
        "saturated by inputs",
        20,
        rnn(),
        {"smaller inputs": Way("smaller weights or inputs", rnn(), scale=1 / 20)},
        scale=20.0,
    ),
    Fault(
        "dead from the start",
        20,
        rnn(
            activation="relu",
            recurrent_initializer="identity",
            bias_initializer=keras.initializers.Constant(-1.0),
        ),
        {
            "a learning rate of a tenth": Way(None, rate=0.1),
            "biases of 0": Way("a larger bias", IDENTITY),
        },
    ),
    Fault(
        "died in training",
        20,
        IDENTITY,
        {
            "a learning rate of a 30th": Way("a smaller learning rate", rate=1 / 30),
            "biases of 0.5": Way(
                None,
                rnn(
                    activation="relu",
                    recurrent_initializer="identity",
                    bias_initializer=keras.initializers.Constant(0.5),
                ),
            ),
        },
        rate=30.0,
        trained_first=True,
    ),
    Fault(
        "tanh, orthogonal",
        40,
        rnn(),
        {
            "relu and the identity": Way(None, IDENTITY),
            "the same, a third of the rate": Way(
                "activation='relu'", IDENTITY, rate=1 / 3
            ),
            "BPTTLSTM, default biases": Way(None, lstm()),
            "BPTTGRU, default biases": Way(None, gru()),
            "BPTTLSTM, biases for the sequence": Way(LSTM_MEMORY, lstm(1)),
            "BPTTGRU, biases for the sequence": Way(GRU_MEMORY, gru(1)),
        },
    ),
    Fault(
        "LSTM, default biases",
        40,
        lstm(),
        {
            "biases for the sequence": Way(LSTM_MEMORY, lstm(1)),
            "biases for a quarter of it": Way(None, lstm(0.25)),
            "biases for four times as many": Way(None, lstm(4)),
        },
    ),
    Fault(
        "GRU, default biases",
        40,
        gru(),
        {
            "biases for the sequence": Way(GRU_MEMORY, gru(1)),
            "biases for a quarter of it": Way(None, gru(0.25)),
            "biases for four times as many": Way(None, gru(4)),
        },
    ),
    Fault(
        "LSTM, the key is near",
        3,
        lstm(),
        {"biases for the sequence": Way(LSTM_MEMORY, lstm(1))},
        steps=41,
    ),
    Fault(
        "exploding",
        40,
        EXPLODING,
        {
            "adjoint_max_growth=1": converted(GROWTH, adjoint_max_growth=1),
            "orthogonal": Way(ORTHOGONAL, rnn()),
        },
    ),
    Fault(
        "exploding beyond a window",
        10,
        WINDOW,
        {
            "truncation=None": converted(None, **UNCUT),
            "the window, adjoint_max_growth=1": converted(GROWTH, adjoint_max_growth=1),
            "the window, orthogonal": Way(ORTHOGONAL, rnn(truncation=20)),
        },
        steps=60,
    ),
    Fault(
        "the same, the key beyond it too",
        40,
        WINDOW,
        {
            "truncation=None": converted(None, **UNCUT),
            "truncation=None, adjoint_max_growth=1": converted(
                None, adjoint_max_growth=1, **UNCUT
            ),
            "the window, orthogonal": Way(ORTHOGONAL, rnn(truncation=20)),
            "truncation=None, orthogonal": Way(None, rnn()),
        },
        steps=60,
    ),
    Fault(
        "exploding LSTM",
        40,
        lstm(gain=10.0),
        {
            "adjoint_max_growth=1": converted(GROWTH, adjoint_max_growth=1),
            "Keras' recurrent kernel": Way(None, lstm()),
        },
    ),
    Fault(
        "exploding states",
        40,
        rnn(activation="relu", gain=2.2),
        {
            "the identity": Way("'identity'", IDENTITY),
            "orthogonal": Way(None, rnn(activation="relu")),
            "tanh": Way(None, rnn(gain=2.2)),
            "tanh, orthogonal": Way(None, rnn()),
            "a third of the rate": Way(None, rate=1 / 3),
        },
    ),
    Fault(
        "exploding states, linear",
        40,
        rnn(activation="linear", gain=2.2),
        {
            "orthogonal": Way(ORTHOGONAL, rnn(activation="linear")),
            "tanh, orthogonal": Way(None, rnn()),
        },
    ),
    Fault(
        "window too short",
        30,
        rnn(truncation=10),
        {
            "the suggested window": Way("truncation=", change=to_suggested),
            "truncation=None": converted(None, **UNCUT),
        },
    ),
    Fault(
        "window too short, GRU with biases",
        30,
        gru(1, truncation=10),
        {
            "the suggested window": Way("truncation=", change=to_suggested),
            "truncation=None": converted("truncation=None", **UNCUT),
        },
    ),
]


def sequences(seed, count, fault, scale):
    """One-hot symbols (count, steps, 2 * KEYS), the keys (count,)."""
    random = np.random.default_rng(seed)
    steps = fault.steps or fault.lag + 1
    symbols = random.integers(KEYS, size=(count, steps))
    when, keys = steps - 1 - fault.lag, symbols[:, -1 - fault.lag].copy()
    symbols += KEYS
    symbols[:, when] = keys
    return scale * np.eye(2 * KEYS, dtype="float32")[symbols], keys


def build_model(fault, way, seed, args):
    keras.utils.set_random_seed(seed)
    steps = fault.steps or fault.lag + 1
    layer = (way.layer or fault.layer)(At(args.units, steps))
    input_layer, output_layer = keras.Input((steps, 2 * KEYS)), keras.layers.Dense(KEYS)
    model = keras.Sequential([input_layer, layer, output_layer])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    adam = keras.optimizers.Adam(args.learning_rate * fault.rate * way.rate)
    # XLA would compile for longer than these few steps take.
    model.compile(adam, loss, metrics=["accuracy"], jit_compile=False)
    return model


def flow_of(model, fault, scale):
    return gradient_flow(model, *sequences(999, 32, fault, scale))["layer"]


def train(fault, way, seed, args, flow=None):
    """The score, and the flow: before training, or after it where the fault says so."""
    model, scale = build_model(fault, way, seed, args), fault.scale * way.scale
    if way.change is not None:
        model = way.change(model, flow)
    before = flow_of(model, fault, scale)
    x, y = sequences(seed, args.updates * args.batch_size, fault, scale)
    model.fit(x, y, args.batch_size, shuffle=False, verbose=0)
    test = sequences(1000 + seed, 1000, fault, scale)
    score = model.evaluate(*test, 1000, verbose=0, return_dict=True)["accuracy"]
    return score, flow_of(model, fault, scale) if fault.trained_first else before


def examine(fault, args):
    """The report, then a row for the network as it is and for each way to help it."""
    print(f"\n{fault.name}: lag {fault.lag}, {fault.steps or fault.lag + 1} steps")
    rows, own = [], None
    for name, way in {"as it is": Way(), **fault.ways}.items():
        runs = []
        for seed in range(args.seeds):
            runs.append(train(fault, way, seed, args, own and own[seed]))
        scores, flows = zip(*runs, strict=True)
        if own is None:
            own = flows
            report = [own[0].explanation, *(f"- {item}" for item in own[0].advice)]
            for item in report:
                print(textwrap.indent(textwrap.fill(item, 76), "  "))
        verdicts = sorted({flow.verdict for flow in flows})
        advised = way.words is not None and any(
            way.words in item for flow in own for item in flow.advice
        )
        shares = [f.untruncated_lag_shares[fault.lag] for f in flows if f.finite]
        rows.append(
            {
                "way": name,
                "advised": advised,
                "verdicts": verdicts,
                "share at the lag": float(np.median(shares)) if shares else None,
                "scores": scores,
            }
        )
        print(line(rows[-1]), flush=True)
    named = {"name": fault.name, "lag": fault.lag, "steps": fault.steps}
    reports = {"explanation": own[0].explanation, "advice": own[0].advice}
    return named | reports | {"rows": rows}


def line(row):
    scores, share = row["scores"], row["share at the lag"]
    advised = "advised" if row["advised"] else ""
    return (
        f"  {row['way']:<38}{advised:<9}{'/'.join(row['verdicts']):<24}"
        f"{'-' if share is None else f'{share:.1e}':>8}"
        f"   {np.median(scores):.2f} ({min(scores):.2f} ... {max(scores):.2f})"
    )


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--units", type=int, default=32, help="size of the hidden state")
    add("--updates", type=int, default=300, help="training steps")
    add("--batch-size", type=int, default=32, help="sequences per training step")
    add("--learning-rate", type=float, default=3e-3, help="of Adam")
    add("--seeds", type=int, default=3, help="runs of everything")
    names = [fault.name for fault in FAULTS]
    add("--only", nargs="+", choices=names, default=names, help="of the faults")
    basics.add_output(parser, smoke="8 units, 3 updates, 1 seed, two faults")
    args = parser.parse_args()
    if args.smoke:
        args.units, args.updates, args.seeds, args.only = 8, 3, 1, names[:2]
    basics.check_positive(parser, args)
    basics.make_output(parser, args)
    return args


def main():
    args = parse_arguments()
    # Every network is traced, which TensorFlow warns of.
    logging.getLogger("tensorflow").setLevel("ERROR")
    print("Way, verdict, share of the gradient left at the lag, score (range of seeds)")
    found = [examine(fault, args) for fault in FAULTS if fault.name in args.only]
    settings = {k: v for k, v in vars(args).items() if k not in ("output_dir", "smoke")}
    found = {"settings": settings, "faults": found}
    # Four digits say it all, and keep the file short.
    found = json.loads(
        json.dumps(found), parse_float=lambda x: float(f"{float(x):.4g}")
    )
    path = args.output_dir / "follow_the_advice.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nResults in {path}")


if __name__ == "__main__":
    main()
