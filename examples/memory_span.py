"""How far back a truncated gradient learns: a task with a known memory span.

Every step brings a few random numbers. To be reported at every step: the first of
them as it was `lag` steps ago. So the network must let the first number in, keep the
others out, and hold what it let in for `lag` steps. It starts with an orthogonal
recurrent kernel, which holds everything for long, but all of it mixed up. Only a gradient
that reaches the step in question can tell which number was worth holding, and it has to
walk `lag` links to get there: `lag` + 1 steps, that of the loss included.

The same network is trained with full backpropagation through time, with sliding windows
`Truncation(k, stride=1)`, with chunks `Truncation(k)`, and with
`RandomizedTruncation(k)`, for several k, from the same weights, on the same batches, for
the same number of updates. A score is the mean squared error on sequences never trained
on, in units of what the best constant gets: 1 is nothing learned, 0 is perfect.

Beside it stands what `gradient_flow` says: how much of a loss reaches so many steps back,
before the training and after it, and the window that it would choose.

    python examples/memory_span.py            # a few minutes
    python examples/memory_span.py --smoke    # seconds

Writes memory_span.json and, where matplotlib is installed, memory_span.png.
"""

import argparse
import json
import time

import basics
import keras
import numpy as np

from keras_bptt import BPTTRNN, RandomizedTruncation, Truncation, gradient_flow

POLICIES = {
    "sliding": lambda k: Truncation(k, stride=1),
    "chunks": Truncation,
    "randomised": RandomizedTruncation,
}


def sequences(random, count, args):
    """Inputs (count, timesteps, features), targets (count, timesteps - lag, 1)."""
    x = random.standard_normal((count, args.timesteps, args.features), "float32")
    return x, x[:, : -args.lag, :1]


def build_model(truncation, args):
    """Reports at the steps lag + 1 ... timesteps; before, there is nothing to report."""
    return keras.Sequential(
        [
            keras.Input((args.timesteps, args.features)),
            # Linear: what such a network can hold is not a matter of its activation.
            BPTTRNN(
                args.units,
                activation="linear",
                use_bias=False,
                return_sequences=True,
                truncation=truncation,
            ),
            keras.layers.Cropping1D((args.lag, 0)),
            keras.layers.Dense(1, use_bias=False),
        ]
    )


def flow_of(model, x, y):
    """Of the untruncated gradient, whatever the layer does: a few examples tell it."""
    (flow,) = gradient_flow(model, x[:32], y[:32], loss_steps=16).values()
    return flow


def train(truncation, seed, args):
    """Returns score, seconds, and the gradient flow before and after."""
    random = np.random.default_rng(seed)
    x, y = sequences(random, args.updates * args.batch_size, args)
    heldout_x, heldout_y = sequences(random, 512, args)
    keras.utils.set_random_seed(seed)
    model = build_model(truncation, args)
    decay = keras.optimizers.schedules.CosineDecay(args.learning_rate, args.updates)
    model.compile(keras.optimizers.Adam(decay, clipnorm=1.0), "mse")
    before = flow_of(model, heldout_x, heldout_y)
    start = time.perf_counter()
    model.fit(x, y, args.batch_size, shuffle=False, verbose=0)
    seconds = time.perf_counter() - start
    error = model.evaluate(heldout_x, heldout_y, 512, verbose=0)
    after = flow_of(model, heldout_x, heldout_y)
    return error / float(np.var(heldout_y)), seconds, before, after


def measure(name, k, args):
    """One row of the table, printed and returned."""
    truncation = None if k is None else POLICIES[name](k)
    runs = [train(truncation, seed, args) for seed in range(args.seeds)]
    scores, seconds, before, after = zip(*runs, strict=True)
    columns = "".join(f"{score:>9.3f}" for score in scores)
    print(
        f"{name:<12}{'-' if k is None else k:>5}{columns}{np.median(seconds):>9.1f}",
        flush=True,
    )
    return {
        "policy": name,
        "k": k,
        "scores": scores,
        "seconds": seconds,
        "suggested_before": [flow.suggest_truncation() for flow in before],
        "suggested_after": [flow.suggest_truncation() for flow in after],
        "lag_shares_before": rounded(before[0].untruncated_lag_shares),
        "lag_shares_after": rounded(after[0].untruncated_lag_shares),
    }


def rounded(numbers):
    return [float(f"{number:.4g}") for number in numbers]


def judge(rows, args):
    """What the sliding windows show, in words."""
    full = np.array(rows[0]["scores"])
    sliding = [row for row in rows if row["policy"] == "sliding"]
    short = [row["scores"] for row in sliding if 2 * row["k"] <= args.lag]
    long = [row["scores"] - full for row in sliding if row["k"] > args.lag]
    print("\nOver all seeds:")
    print(f"  full backpropagation: at most {full.max():.3f}")
    print(f"  sliding windows, k <= lag / 2: at least {np.min(short):.3f}")
    print(f"  sliding windows, k > lag: at most {np.max(long):.3f} more than full")


def report_windows(rows):
    """What `gradient_flow` would choose, seed by seed; before, it is the same for all."""

    def line(when, windows):
        columns = "".join(f"{'none' if k is None else k:>6}" for k in windows)
        print(f"  {when:<28}{columns}")

    print("\nWindow suggested for a bias of 5 %:")
    line("before training", rows[0]["suggested_before"])
    for row in rows:
        if row["policy"] in ("full", "sliding"):
            k = "" if row["k"] is None else f", k = {row['k']}"
            line(f"after {row['policy']}{k}", row["suggested_after"])


def plot(rows, path, args):
    try:
        import matplotlib
    except ImportError:
        print("No figure: matplotlib is not installed.")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (axes, lags) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    axes.axhline(1, color="grey", linestyle=":", label="best constant")
    axes.axhline(
        np.median(rows[0]["scores"]), color="black", label="full backpropagation"
    )
    axes.axvline(args.lag + 1, color="grey", linestyle="--", label="k = lag + 1")
    for name, marker in zip(POLICIES, "os^", strict=True):
        curve = [row for row in rows if row["policy"] == name]
        k = [row["k"] for row in curve]
        scores = np.array([row["scores"] for row in curve])
        (line,) = axes.plot(k, np.median(scores, axis=1), marker=marker, label=name)
        low, high = scores.min(axis=1), scores.max(axis=1)
        axes.fill_between(k, low, high, color=line.get_color(), alpha=0.2)
    axes.set_xlabel("k, the steps of a window, or its mean number of steps")
    axes.set_ylabel("error / error of the best constant")
    axes.set_title(
        f"A lag of {args.lag} steps: median and range of {args.seeds} seeds",
        fontsize=11,
    )
    axes.set_ylim(bottom=-0.04)  # whole markers at 0
    axes.legend(fontsize=9)
    sliding = [row for row in rows if row["policy"] == "sliding"]
    under = max(
        (row for row in sliding if 2 * row["k"] <= args.lag), key=lambda r: r["k"]
    )
    over = min(
        (row for row in sliding if row["k"] > args.lag), key=lambda row: row["k"]
    )
    lags.semilogy(rows[0]["lag_shares_before"], color="grey", label="before training")
    for row in (rows[0], over, under):
        name = "full" if row["k"] is None else f"sliding, k = {row['k']}"
        lags.semilogy(row["lag_shares_after"], label=f"after {name}")
    lags.axvline(args.lag, color="grey", linestyle="--", label="the lag of the task")
    lags.set_xlabel("lag: steps back from a loss")
    lags.set_ylabel("share of the untruncated gradient left")
    lags.set_title("How far a loss reaches, seed 0", fontsize=11)
    lags.legend(fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--lag", type=int, default=30, help="steps between a number and its report")
    add("--timesteps", type=int, help="of a sequence, twice the lag if not given")
    add("--features", type=int, default=16, help="numbers a step, one of which counts")
    add("--units", type=int, default=64, help="size of the hidden state")
    add("--updates", type=int, default=300, help="training steps")
    add("--batch-size", type=int, default=32, help="sequences per training step")
    add("--learning-rate", type=float, default=5e-3, help="at the first step")
    add("--seeds", type=int, default=3, help="runs of everything")
    basics.add_output(parser, smoke="lag 4, 12 units, 30 updates, 1 seed")
    args = parser.parse_args()
    if args.smoke:
        args.lag, args.features, args.units, args.updates, args.seeds = 4, 4, 12, 30, 1
        args.timesteps = None
    if args.timesteps is None:
        args.timesteps = 2 * args.lag
    basics.check_positive(parser, args)
    if args.lag < 4 or args.timesteps <= args.lag:
        parser.error(
            "--lag must be at least 4 and --timesteps longer. Received: "
            f"--lag {args.lag}, --timesteps {args.timesteps}"
        )
    basics.make_output(parser, args)
    return args


def main():
    args = parse_arguments()
    lag, T = args.lag, args.timesteps
    print(f"Lag {lag}, {T} timesteps, {args.features} features, {args.units} units")
    print("1 is the error of the best constant, 0 is perfect\n")
    seeds = "".join(f"{f'seed {seed}':>9}" for seed in range(args.seeds))
    print(f"{'gradient':<12}{'k':>5}{seeds}{'s':>9}")
    rows = [measure("full", None, args)]
    lengths = {2, lag // 4, lag // 2, 3 * lag // 4, lag, lag + 1, 3 * lag // 2, 2 * lag}
    if args.smoke:
        lengths = {lag // 2, lag + 1}
    for name in POLICIES:
        for k in sorted(lengths - {1}):
            # A window as long as the sequence is the full gradient, measured already.
            if name == "randomised" or k < T:
                rows.append(measure(name, k, args))
    judge(rows, args)
    report_windows(rows)
    settings = {k: v for k, v in vars(args).items() if k != "output_dir"}
    results = {"settings": settings, "rows": rows}
    path = args.output_dir / "memory_span.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    plot(rows, path.with_suffix(".png"), args)
    print(f"Results in {path}")


if __name__ == "__main__":
    main()
