"""One training on many devices, by TensorFlow's own engine: tf.distribute.

A model has to hold the first number of a sequence to its end. It is trained in a loop
that is a template for a training of your own: every strategy runs the same lines,

    one          this process, one device: the default strategy
    mirrored     the GPUs of this machine; two logical CPUs where there is none
    multiworker  a process for each machine, which TF_CONFIG tells of the others; where
                 there is none, --workers processes on this machine, to try it out
    tpu          the cores of a Cloud TPU

and has the same losses on the same global batches, whatever the number of devices, up to
rounding. `--smoke` shows that of the first three. The lines of the last are those of
TensorFlow's guide; they have not been run on a TPU by those who wrote them.

    python examples/distributed.py --strategy mirrored
    python examples/distributed.py --strategy multiworker --workers 2
    python examples/distributed.py --resume         # goes on where a killed one stopped
    python examples/distributed.py --smoke          # some seconds

Writes distributed_{strategy}.json, the losses of this run, and checkpoints in
distributed_{strategy}/.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import basics
import keras
import numpy as np
import tensorflow as tf

from keras_bptt import BPTTRNN

STRATEGIES = ("one", "mirrored", "multiworker", "tpu")


def prepare(args):
    """Two devices of one CPU where no GPU is: all is as with two GPUs, but not faster.

    To be called before TensorFlow does anything.
    """
    if (args.smoke or args.strategy == "mirrored") and not gpus():
        cpu = tf.config.list_physical_devices("CPU")[0]
        device = tf.config.LogicalDeviceConfiguration()
        tf.config.set_logical_device_configuration(cpu, [device, device])


def gpus():
    return tf.config.list_physical_devices("GPU")


def strategy_of(name, args):
    if name == "mirrored":
        devices = tf.config.list_logical_devices("GPU" if gpus() else "CPU")
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    if name == "multiworker":
        return tf.distribute.MultiWorkerMirroredStrategy()
    if name == "tpu":
        return tpu_strategy(args.tpu)
    return tf.distribute.get_strategy()


def tpu_strategy(name):
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (ValueError, RuntimeError, OSError, tf.errors.OpError) as error:
        raise SystemExit(
            "--strategy tpu needs a Cloud TPU and the TensorFlow that is made for it. None "
            f"was found. Received: --tpu {name!r}. Run this on the TPU VM itself, with "
            f"--tpu local. TensorFlow says: {str(error)[:200]}"
        ) from error
    return tf.distribute.TPUStrategy(resolver)


def global_batch(step, args):
    """x (batch, timesteps, 4) and y (batch, 1) of one update, whoever computes it."""
    random = np.random.default_rng((args.seed, step))
    x = random.normal(size=(args.batch_size, args.timesteps, 4)).astype("float32")
    x[:, 1:] *= 0.3  # noise
    return x, x[:, 0, :1]


def shares(context, first, args):
    """What the replicas of one process see of the global batches, from `first` on.

    Each batch has the size that it says: a TPU compiles for one size alone. For the same
    reason leave out the last batch of an epoch where it is smaller (drop_remainder=True).
    """
    size = context.get_per_replica_batch_size(args.batch_size)
    replicas = context.num_replicas_in_sync // context.num_input_pipelines
    own = range(
        context.input_pipeline_id * replicas, (context.input_pipeline_id + 1) * replicas
    )

    def batches():
        for step in range(first, args.updates):
            x, y = global_batch(step, args)
            for replica in own:
                rows = slice(replica * size, (replica + 1) * size)
                yield x[rows], y[rows]

    return tf.data.Dataset.from_generator(
        batches,
        output_signature=(
            tf.TensorSpec((size, args.timesteps, 4)),
            tf.TensorSpec((size, 1)),
        ),
    ).prefetch(2 * replicas)


def build(args):
    """All variables of a training, to be made in the scope of its strategy."""
    keras.utils.set_random_seed(args.seed)
    model = keras.Sequential(
        [
            keras.Input((args.timesteps, 4)),
            BPTTRNN(args.units),
            keras.layers.Dense(1),
        ]
    )
    optimizer = keras.optimizers.Adam(args.learning_rate)
    optimizer.build(model.trainable_variables)
    return model, optimizer


def make_update(strategy, model, optimizer, args):
    def of_replica(x, y):
        with tf.GradientTape() as tape:
            losses = keras.losses.mean_squared_error(y, model(x, training=True))
            # Divided by the size of the global batch: the replicas' gradients are summed.
            loss = tf.nn.compute_average_loss(losses, global_batch_size=args.batch_size)
        weights = model.trainable_variables
        optimizer.apply(tape.gradient(loss, weights), weights)
        return loss

    @tf.function
    def update(x, y):
        of_replicas = strategy.run(of_replica, args=(x, y))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, of_replicas, axis=None)

    return update


def is_chief(strategy):
    return getattr(strategy.cluster_resolver, "task_id", None) in (None, 0)


def train(name, args):
    """Returns the loss of each update by its number."""
    strategy = strategy_of(name, args)
    with strategy.scope():
        model, optimizer = build(args)
    # `model.variables` has the positions of the seeds of dropout and truncation, too.
    checkpoint = tf.train.Checkpoint(variables=model.variables + optimizer.variables)
    folder = args.output_dir / f"distributed_{name}"
    if args.resume and (latest := tf.train.latest_checkpoint(str(folder))):
        checkpoint.restore(latest).assert_consumed()
    # Every process takes part in saving, and one of them writes what is kept.
    chief = is_chief(strategy)
    written = folder if chief else pathlib.Path(tempfile.mkdtemp())
    manager = tf.train.CheckpointManager(checkpoint, str(written), max_to_keep=2)
    update = make_update(strategy, model, optimizer, args)
    first = int(optimizer.iterations.numpy())
    batches = strategy.distribute_datasets_from_function(
        lambda context: shares(context, first, args)
    )
    losses = {}
    for step, (x, y) in enumerate(batches, first + 1):
        losses[step] = float(update(x, y))
        if step % args.save_every == 0 or step == args.updates:
            manager.save(checkpoint_number=step)
            if chief:
                print(f"{name}, update {step}: loss {losses[step]:.4f}", flush=True)
    if chief:
        results_of(name, args).write_text(json.dumps(losses) + "\n")
    else:
        shutil.rmtree(written)
    return losses


def results_of(name, args):
    return args.output_dir / f"distributed_{name}.json"


@contextlib.contextmanager
def workers(options, count):
    """Processes of this script on this machine, which find each other by TF_CONFIG."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))  # a port that is free
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    started = []
    try:
        for index in range(count):
            task = {"type": "worker", "index": index}
            config = {"cluster": {"worker": addresses}, "task": task}
            command = [sys.executable, __file__, *options, "--strategy", "multiworker"]
            env = os.environ | {"TF_CONFIG": json.dumps(config)}
            started.append(subprocess.Popen(command, env=env))
        yield
        wait_for(started)
    finally:
        for worker in started:
            worker.kill()  # nothing, where it has ended
            worker.wait()


def wait_for(started):
    """Until all have ended, or one has failed: the others would wait for it for ever."""
    codes = [None]
    while None in codes and not any(codes):
        time.sleep(0.1)
        codes = [worker.poll() for worker in started]
    if any(codes):
        raise SystemExit(f"A worker failed. Exit codes (None: stopped): {codes}")


def compare(args):
    """The same training by three strategies: the losses are the same."""
    with workers(sys.argv[1:], args.workers):
        losses = {name: train(name, args) for name in ("one", "mirrored")}
    losses["multiworker"] = json.loads(results_of("multiworker", args).read_text())
    print("\nupdate" + "".join(f"{name:>14}" for name in losses))
    rows = np.array([list(each.values()) for each in losses.values()]).T
    for step, row in enumerate(rows, 1):
        print(f"{step:<6}" + "".join(f"{loss:>14.6f}" for loss in row))
    worst = np.max(np.abs(rows[:, 1:] / rows[:, :1] - 1))
    print(f"Largest relative difference to one device: {worst:.1e}")
    if not worst < 1e-4:
        raise SystemExit("The losses differ by more than rounding.")


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--strategy", choices=STRATEGIES, default="one", help="which devices")
    add("--workers", type=int, default=2, help="processes, where TF_CONFIG is not set")
    add("--tpu", default="local", help="name of the TPU; local: that of this VM")
    add("--batch-size", type=int, default=64, help="of all replicas together")
    add("--timesteps", type=int, default=20, help="length of the sequences")
    add("--units", type=int, default=32, help="size of the hidden state")
    add("--updates", type=int, default=300, help="in all, with those before --resume")
    add(
        "--save-every",
        type=int,
        default=50,
        help="updates from checkpoint to checkpoint",
    )
    add("--learning-rate", type=float, default=3e-3, help="of Adam")
    add("--seed", type=int, default=0, help="of weights and sequences")
    add(
        "--resume",
        action="store_true",
        help="from the last checkpoint, if there is one",
    )
    basics.add_output(parser, smoke="10 updates by the first three strategies")
    args = parser.parse_args()
    if args.smoke:
        args.updates, args.save_every, args.batch_size = 10, 5, 8
    basics.check_positive(parser, args)
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be in 0 ... 2**32 - 1. Received: {args.seed}")
    basics.make_output(parser, args)
    return args


def main():
    args = parse_arguments()
    prepare(args)
    is_worker = "TF_CONFIG" in os.environ
    if args.smoke and not is_worker:
        compare(args)
    elif args.strategy == "multiworker" and not is_worker:
        with workers(sys.argv[1:], args.workers):
            pass  # they do it all
    else:
        train(args.strategy, args)
    if not is_worker:
        print(f"Losses and checkpoints in {args.output_dir}")


if __name__ == "__main__":
    main()
