"""Training on streams that never end, with gradients that reach back a few steps.

A stream of coin flips x_t in {0, 1}, and targets that remember two of them:

    P(y_t = 1) = 0.5 + 0.5 x_{t-3} - 0.25 x_{t-8}

What a model that remembers neither, the nearer one, or both can get is known exactly:
0.66, 0.52 or 0.45 nats. The gradient has to reach back over eight links, and no further;
the state goes on for ever. Two ways to train:

1. Keras alone: chunk after chunk to `fit`, in a model with `stateful=True`.
2. TBPTT(k1, k2) of Williams & Peng in a short loop: an update every k1 steps, whose
   losses all reach back further than the steps that are new. And TBPTT(k1, k1) beside it,
   to see what that is good for.

    python examples/streaming.py            # less than a minute
    python examples/streaming.py --smoke    # seconds

Writes streaming.json.
"""

import argparse
import itertools
import json

import basics
import keras
import numpy as np
import tensorflow as tf

from keras_bptt import BPTTRNN

NEAR, FAR = 3, 8


def chances(near, far):
    """P(y_t = 1), given x_{t-3} and x_{t-8}."""
    return 0.5 + 0.5 * near - 0.25 * far


def baselines():
    """Mean cross-entropy, in nats, of the best that each kind of memory can do."""
    # near and far of the four cases, which are equally likely
    p = chances(*np.array(list(itertools.product([0, 1], repeat=2))).T).reshape(2, 2)
    best = {
        "no memory": p.mean(),
        f"memory of {NEAR} steps": p.mean(axis=1),
        f"memory of {FAR} steps": p,
    }
    p = {name: np.clip(p, 1e-9, 1 - 1e-9) for name, p in best.items()}
    return {
        name: float(-np.mean(p * np.log(p) + (1 - p) * np.log(1 - p)))
        for name, p in p.items()
    }


def stream(seed, count, steps):
    """Yields the next `steps` of `count` streams, x and y, (count, steps, 1), for ever."""
    random = np.random.default_rng(seed)
    past = random.integers(0, 2, (count, FAR))
    while True:
        x = np.concatenate([past, random.integers(0, 2, (count, steps))], axis=1)
        near, far = x[:, FAR - NEAR : -NEAR], x[:, :-FAR]
        y = random.random((count, steps)) < chances(near, far)
        past = x[:, -FAR:]
        yield x[:, FAR:, None].astype("float32"), y[:, :, None].astype("float32")


def chunk_by_chunk(args):
    """`fit` on an endless sequence; returns the mean loss of each tenth of the updates.

    The state goes from one batch to the next, the gradient does not: a batch of k steps is
    a chunk of `truncation=k`, of which the last loss reaches k steps back and the first
    one only one. So take chunks a few times longer than the memory they have to teach.
    """
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(args.streams, args.chunk, 1)),
            BPTTRNN(args.units, return_sequences=True, stateful=True),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )
    model.compile(keras.optimizers.Adam(args.learning_rate), "binary_crossentropy")
    chunks = stream(args.seed, args.streams, args.chunk)
    history = model.fit(
        chunks,
        steps_per_epoch=args.updates // 10,
        epochs=10,
        shuffle=False,  # the order is the stream's
        verbose=0,
    )
    return history.history["loss"]


def tbptt(k1, k2, args):
    """TBPTT(k1, k2), an update every k1 steps; returns the losses as above.

    Each update runs the last k2 steps, from the state kept k2 steps ago, and has the
    losses of the last k1. The first of these reaches k2 - k1 + 1 steps back: to learn a
    lag of n from all of them takes k2 >= n + k1.
    """
    rnn = BPTTRNN(args.units, return_sequences=True)
    head = keras.layers.Dense(1, activation="sigmoid")
    optimizer = keras.optimizers.Adam(args.learning_rate)
    rnn.build((args.streams, k2, 1))
    head.build((args.streams, k1, args.units))
    weights = rnn.trainable_variables + head.trainable_variables
    optimizer.build(weights)

    @tf.function
    def update(x, y, state):
        with tf.GradientTape() as tape:
            h = rnn(x, initial_state=state, training=True)
            losses = keras.losses.binary_crossentropy(y, head(h[:, -k1:]))
            loss = tf.reduce_mean(losses)
        optimizer.apply(tape.gradient(loss, weights), weights)
        # The next window begins k1 steps later, in the state after them.
        return loss, h[:, k1 - 1]

    steps = stream(args.seed, args.streams, k1)
    x = np.zeros((args.streams, k2, 1), "float32")
    state = tf.zeros((args.streams, args.units))
    losses = []
    for new_x, y in itertools.islice(steps, args.updates):
        x = np.concatenate([x[:, k1:], new_x], axis=1)
        loss, state = update(x, y, state)
        losses.append(loss)
    return np.reshape(losses, (10, -1)).mean(axis=1).tolist()


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--streams", type=int, default=32, help="streams side by side, the batch")
    add("--units", type=int, default=32, help="size of the hidden state")
    add("--updates", type=int, default=2000, help="of each training, in tens")
    add("--chunk", type=int, default=24, help="steps that one batch of fit sees")
    add("--k1", type=int, default=4, help="steps between two updates of the loop")
    add("--k2", type=int, default=12, help="steps that an update of the loop sees")
    add("--learning-rate", type=float, default=3e-3, help="of Adam")
    add("--seed", type=int, default=0, help="of weights and streams")
    basics.add_output(parser, smoke="50 updates: nothing is learned yet")
    args = parser.parse_args()
    if args.smoke:
        args.updates = 50
    basics.check_positive(parser, args)
    if args.updates % 10:
        parser.error(f"--updates must be in tens. Received: {args.updates}")
    if args.k1 > args.k2:
        parser.error(f"--k1 must be at most --k2. Received: {args.k1}, {args.k2}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be in 0 ... 2**32 - 1. Received: {args.seed}")
    basics.make_output(parser, args)
    return args


def main():
    args = parse_arguments()
    floors = baselines()
    for name, nats in floors.items():
        print(f"The best with {name:<18}{nats:>8.3f} nats")
    k1, k2 = args.k1, args.k2
    trainings = {
        f"fit, {args.chunk} steps": lambda: chunk_by_chunk(args),
        f"TBPTT({k1}, {k2})": lambda: tbptt(k1, k2, args),
        f"TBPTT({k1}, {k1})": lambda: tbptt(k1, k1, args),
    }
    losses = {}
    for name, train in trainings.items():
        keras.utils.set_random_seed(args.seed)
        losses[name] = train()
    print("\nupdates     " + "".join(f"{name:>16}" for name in losses))
    for i, row in enumerate(zip(*losses.values(), strict=True), 1):
        update = args.updates // 10 * i
        print(f"{update:<12}" + "".join(f"{loss:>16.3f}" for loss in row))
    results = {"baselines": floors, **losses}
    path = args.output_dir / "streaming.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"Results in {path}")


if __name__ == "__main__":
    main()
