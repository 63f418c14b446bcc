"""Sequences too long for memory: checkpoints within a piece, two sweeps over many.

1. In memory. `checkpoint_every="sqrt"` keeps h at every 142nd of 20,000 steps and computes
   the others again: the same gradients, in a fraction of the memory.
2. In pieces. x itself is too long, and is made (or read) piece by piece, in any order. The
   gradient of the whole sequence all the same, exactly: a sweep forward keeps the state
   before each piece; a sweep backward runs each piece again, from the last to the first,
   and hands the gradient of the state before it to the piece before.
3. In pieces, the cheap way: `stateful=True` and an update after each piece. The state goes
   on from piece to piece, the gradient ends where the piece begins.

The task for 2 and 3: the first step brings many numbers, all later steps bring noise, and
the first of the numbers is to be reported at the end of each piece of the second half. The
state has fewer units than there are numbers, so it cannot hold them all. Which one is worth
holding shows in no gradient but one that walks back to the first step.

    python examples/long_sequences.py            # a minute or two
    python examples/long_sequences.py --smoke    # seconds

Writes long_sequences.json.
"""

import argparse
import json
import math
import multiprocessing
import pathlib

import basics
import keras
import numpy as np
import tensorflow as tf

from keras_bptt import BPTTRNN

NOISE = 0.1  # of the noise of all steps together, against 1 of the numbers to hold
TOLERANCE = 1e-4  # of gradients that must be equal up to rounding
PROCESS = pathlib.Path("/proc/self")  # Linux alone has it
SHORT = 8  # timesteps of the program that memory is compared with


def peak_mb(function):
    """Megabytes at the peak of this process in a call of `function`; None: unknown."""
    try:
        (PROCESS / "clear_refs").write_text("5")  # the peak counts from here
    except OSError:
        return None
    function()
    status = (PROCESS / "status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def in_memory(checkpoint_every, timesteps):
    """What peak memory grows by in a long training step, over that of a short one; and the
    gradients. For a process of its own.
    """
    batch, features, units = 8, 8, 128
    keras.utils.set_random_seed(0)
    layer = BPTTRNN(units, checkpoint_every=checkpoint_every)
    layer.build((batch, timesteps, features))

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(layer(x, training=True) ** 2)
        return tape.gradient(loss, layer.trainable_variables)

    def of(steps):
        x = tf.random.stateless_normal((batch, steps, features), [0, 0])
        return peak_mb(lambda: step(x)), [gradient.numpy() for gradient in step(x)]

    base, _ = of(SHORT)
    mb, gradients = of(timesteps)
    return over(mb, base), gradients


def over(mb, base):
    return None if mb is None else mb - base


def shown(mb):
    return "not measured, there is no /proc" if mb is None else f"{mb:.0f} MB"


def difference(gradients, others):
    """The largest relative difference of two lists of gradients; an error if not small."""
    worst = max(
        float(np.linalg.norm(a - b) / np.linalg.norm(b))
        for a, b in zip(gradients, others, strict=True)
    )
    if not worst < TOLERANCE:
        raise SystemExit(f"The gradients differ by {worst:.1e}")
    return worst


def compare_in_memory(timesteps):
    """Prints the memory of the two forms, and how much their gradients differ."""
    forms = {"every state kept": None, "sqrt": "sqrt"}
    calls = [(form, timesteps) for form in forms.values()]
    # A process for each call.
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        results = pool.starmap(in_memory, calls, chunksize=1)
    print(f"1. In memory, {timesteps:,} steps: peak memory over that of {SHORT} steps")
    growth = {name: mb for name, (mb, _) in zip(forms, results, strict=True)}
    gradients = [own for _, own in results]
    for name, mb in growth.items():
        print(f"   {name:<20}{shown(mb)}")
    error = difference(*gradients)
    print(f"   relative difference of the gradients: {error:.1e}\n", flush=True)
    return {"growth_mb": growth, "difference": error}


def first_numbers(sequence, args):
    """What the first step of a batch of sequences brings, (batch, features)."""
    random = np.random.default_rng([args.seed, sequence, 0])
    return random.standard_normal((args.batch_size, args.features), "float32")


def piece(sequence, place, args):
    """x of one piece, (batch, steps, features), its target, and the weight of its loss.

    The same whenever it is asked for: no more than one piece has to be in memory.
    """
    random = np.random.default_rng([args.seed, sequence, place + 1])
    shape = args.batch_size, args.steps, args.features
    x = random.standard_normal(shape, "float32")
    x *= NOISE / math.sqrt(args.pieces * args.steps)
    first = first_numbers(sequence, args)
    if place == 0:
        x[:, 0] = first
    reports = args.pieces - args.pieces // 2
    weight = 0.0 if place < args.pieces // 2 else 1 / reports
    return x, first[:, :1], np.float32(weight)


class Network:
    """A linear recurrent network whose state holds what it gets, and its training.

    Args:
        updates: how many there will be.
        **options: of the layer.
    """

    def __init__(self, args, updates, **options):
        keras.utils.set_random_seed(args.seed)
        self.rnn = BPTTRNN(
            args.units,
            # h_t = h_{t-1} + x_t W to begin with: no gradient explodes or vanishes.
            activation="linear",
            recurrent_initializer="identity",
            use_bias=False,
            return_state=True,
            checkpoint_every="sqrt",
            jit_compile=True,  # the sweep forward too, which is not called for training
            **options,
        )
        self.head = keras.layers.Dense(1, use_bias=False)
        self.rnn.build((args.batch_size, args.steps, args.features))
        self.head.build((args.batch_size, args.units))
        self.weights = [
            self.rnn.cell.kernel,
            self.head.kernel,
            self.rnn.cell.recurrent_kernel,
        ]
        decay = keras.optimizers.schedules.CosineDecay(args.learning_rate, updates)
        self.optimizer = keras.optimizers.Adam(decay, clipnorm=1.0)
        self.optimizer.build(self.weights[:2])
        # A change of the recurrent kernel acts at every step, once more each time.
        rate = args.learning_rate / (args.pieces * args.steps)
        self.recurrent_optimizer = keras.optimizers.Adam(rate)
        self.recurrent_optimizer.build(self.weights[2:])
        self.no_state = np.zeros((args.batch_size, args.units), "float32")

    @tf.function
    def state_after(self, x, state):
        """The state after a piece that begins in `state`."""
        return self.rnn(x, initial_state=state)[1]

    @tf.function
    def pull_back(self, x, y, weight, state, cotangent):
        """Run a piece again, and pull the gradient back through it.

        Args:
            state: before the piece.
            cotangent: the gradient of the losses of all later pieces by the state after it.

        Returns:
            The loss of the piece; what the weights' gradients get from it; the gradient by
            `state`, of its loss and all later ones.
        """
        with tf.GradientTape() as tape:
            tape.watch(state)
            output, last = self.rnn(x, initial_state=state, training=True)
            loss = weight * tf.reduce_mean((self.head(output) - y) ** 2)
            # Its gradient is that of this loss and the later ones, whose part in it is the
            # cotangent times the derivative of the state.
            target = loss + tf.reduce_sum(cotangent * last)
        *gradients, before = tape.gradient(target, [*self.weights, state])
        return loss, gradients, before

    @tf.function
    def learn(self, x, y):
        """An update from one piece alone, in the state that the layer holds."""
        with tf.GradientTape() as tape:
            output, _ = self.rnn(x, training=True)
            loss = tf.reduce_mean((self.head(output) - y) ** 2)
        self.update(tape.gradient(loss, self.weights))
        return loss

    @tf.function
    def update(self, gradients):
        self.optimizer.apply(gradients[:2], self.weights[:2])
        self.recurrent_optimizer.apply(gradients[2:], self.weights[2:])


def two_sweeps(network, sequence, args):
    """The loss and the exact gradients of a whole sequence that is fed in pieces.

    Between the sweeps the states before the pieces are kept, (batch, units) each.
    """
    states = [network.no_state]
    for place in range(args.pieces - 1):
        x, _, _ = piece(sequence, place, args)
        states.append(network.state_after(x, states[-1]).numpy())
    total, gradients, cotangent = 0.0, None, network.no_state
    for place in reversed(range(args.pieces)):
        loss, own, cotangent = network.pull_back(
            *piece(sequence, place, args), states[place], cotangent
        )
        total += float(loss)
        gradients = own if gradients is None else list(map(tf.add, gradients, own))
    return total, gradients


def in_one_call(network, sequence, args):
    """The same from one call over the whole, every state kept, to compare with."""
    whole = BPTTRNN.from_config(
        {
            **network.rnn.get_config(),
            "checkpoint_every": None,
            "return_sequences": True,
            "return_state": False,
        }
    )
    x, y, weights = zip(
        *(piece(sequence, place, args) for place in range(args.pieces)), strict=True
    )
    x = np.concatenate(x, axis=1)
    whole.build(x.shape)
    whole.set_weights(network.rnn.get_weights())
    W, U = whole.trainable_variables
    with tf.GradientTape() as tape:
        ends = whole(x, training=True)[:, args.steps - 1 :: args.steps]
        errors = tf.reduce_mean((network.head(ends)[:, :, 0] - y[0]) ** 2, axis=0)
        loss = tf.reduce_sum(errors * np.array(weights))
    return float(loss), tape.gradient(loss, [W, network.head.kernel, U])


def compare_with_one_call(network, args):
    """Prints the relative difference on a sequence that is short enough for both."""
    few = with_pieces(min(args.pieces, 4), args)
    _, gradients = two_sweeps(network, 0, few)
    error = difference(gradients, in_one_call(network, 0, few)[1])
    print(f"2. Two sweeps over {few.pieces} pieces of {few.steps} steps, and one call:")
    print(f"   relative difference of the gradients: {error:.1e}", flush=True)
    return error


def compare_memory(network, args):
    """Prints how the peak memory grows with the number of pieces."""
    print("   peak memory over that of 2 pieces:")
    base, growth = None, {}
    for count in (2, args.pieces, 4 * args.pieces):
        longer = with_pieces(count, args)
        mb = peak_mb(lambda longer=longer: two_sweeps(network, 0, longer))
        base = mb if base is None else base
        growth[count] = over(mb, base)
        numbers = args.batch_size * count * args.steps * args.features
        whole = f"{4 * numbers / 2**20:.0f} MB"
        print(f"   {count:>4} pieces: {shown(growth[count])}, x as a whole: {whole}")
    print(flush=True)
    return growth


def with_pieces(count, args):
    return argparse.Namespace(**{**vars(args), "pieces": count})


def train_by_two_sweeps(network, args):
    """Yields the loss of each sequence, with an update after each."""
    for sequence in range(args.updates):
        loss, gradients = two_sweeps(network, sequence, args)
        network.update(gradients)
        yield loss


def train_piece_by_piece(args):
    """The same with an update after each piece that has a loss."""
    reports = args.pieces - args.pieces // 2
    network = Network(args, args.updates * reports, stateful=True)
    for sequence in range(args.updates):
        network.rnn.reset_state()
        total = 0.0
        for place in range(args.pieces):
            x, y, weight = piece(sequence, place, args)
            if weight:
                total += weight * float(network.learn(x, y))
            else:
                network.state_after(x, None)
        yield total


def baselines(network):
    """Mean squared errors, at the end of a sequence, of the best that is possible.

    Of a network that is not trained yet.
    """
    W = network.rnn.cell.kernel.numpy().astype("float64")
    # How much of the first number the numbers x W tell, of all numbers x.
    told = W[0] @ np.linalg.pinv(W)[:, 0]
    return {
        "the best constant": 1.0,
        "the best read-out of the untrained state": 1 - told / (1 + NOISE**2),
        "the best of all": 1 - 1 / (1 + NOISE**2),
    }


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--timesteps", type=int, default=20_000, help="of the sequence in memory")
    add("--pieces", type=int, default=16, help="of a sequence that is fed in pieces")
    add("--steps", type=int, default=500, help="of a piece")
    add("--features", type=int, default=32, help="numbers a step, one of which counts")
    add("--units", type=int, default=8, help="size of the hidden state")
    add("--updates", type=int, default=60, help="sequences of a training, in tens")
    add("--batch-size", type=int, default=32, help="sequences side by side")
    add("--learning-rate", type=float, default=2e-2, help="of Adam, at the first step")
    add("--seed", type=int, default=0, help="of weights and sequences")
    basics.add_output(parser, smoke="short, 10 updates: little is learned yet")
    args = parser.parse_args()
    if args.smoke:
        args.timesteps, args.pieces, args.steps, args.updates = 2000, 4, 100, 10
    basics.check_positive(parser, args)
    if args.pieces < 2:
        parser.error(f"--pieces must be at least 2. Received: {args.pieces}")
    if args.updates % 10:
        parser.error(f"--updates must be in tens. Received: {args.updates}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be in 0 ... 2**32 - 1. Received: {args.seed}")
    basics.make_output(parser, args)
    return args


def main():
    args = parse_arguments()
    results = {"in_memory": compare_in_memory(args.timesteps)}
    network = Network(args, args.updates)
    results["difference"] = compare_with_one_call(network, args)
    results["growth_mb"] = compare_memory(network, args)
    print(
        f"2 and 3. Training: {args.pieces} pieces of {args.steps} steps, mean squared"
    )
    print("error of each tenth of the updates\n")
    results["baselines"] = baselines(network)
    for name, error in results["baselines"].items():
        print(f"{name:<44}{error:>8.3f}")
    trainings = {
        "two sweeps": train_by_two_sweeps(network, args),
        "piece by piece": train_piece_by_piece(args),
    }
    print("\nsequences   " + "".join(f"{name:>20}" for name in trainings))
    losses = {name: [] for name in trainings}
    for tenth in range(1, 11):
        count = args.updates // 10
        for name, training in trainings.items():
            mean = np.mean([next(training) for _ in range(count)])
            losses[name].append(float(mean))
        row = "".join(f"{values[-1]:>20.3f}" for values in losses.values())
        print(f"{tenth * count:<12}{row}", flush=True)
    results["losses"] = losses
    path = args.output_dir / "long_sequences.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"Results in {path}")


if __name__ == "__main__":
    main()
