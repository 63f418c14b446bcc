"""What test_distribute.py runs in processes of their own.

TensorFlow makes its devices once, before it does anything else. The name of a function,
its folder and its other arguments are those of the command line.
"""

import itertools
import json
import os
import pathlib
import signal
import sys

import keras
import numpy as np
import tensorflow as tf

from keras_bptt import (
    BPTT,
    BPTTLSTM,
    BPTTRNN,
    AdaptiveTruncation,
    GradientFlowLogger,
    RandomizedTruncation,
    Truncation,
)
from keras_bptt.runtime import execution

B, T, D, H = 8, 5, 4, 6  # B: of all replicas together
BATCHES = 3
SIMPLE = keras.layers.SimpleRNN
WINDOWS = {"truncation": Truncation(3, stride=2), "checkpoint_every": 2}
STATEFUL = {"return_sequences": True, "stateful": True}

# What `fit` trains: a layer class, its options, what else the model is made of.


def any_cell(units, **options):
    return BPTT(keras.layers.LSTMCell(units), **options)


CASES = {
    "any cell": (any_cell, {"return_sequences": True, "truncation": 3}, {}),
    "gates": (BPTTLSTM, {"return_sequences": True}, {}),
    "full": (BPTTRNN, {"return_sequences": True}, {}),
    "all at once": (BPTTRNN, {**WINDOWS, "output_units": 3}, {"mask": True}),
    "clipping": (BPTTRNN, {"adjoint_clipnorm": 1e-3}, {}),
    "stateful": (BPTTRNN, {**STATEFUL, "jit_compile": False}, {}),
    "stateful SimpleRNN": (SIMPLE, STATEFUL, {}),
    "mask in the loss": (BPTTRNN, {"return_sequences": True}, {"mask": True}),
    "mask in the loss, SimpleRNN": (SIMPLE, {"return_sequences": True}, {"mask": True}),
}


def data(sequences, mask=False):
    random = np.random.default_rng(0)
    x = random.normal(size=(BATCHES * B, T, D)).astype("float32")
    if mask:
        lengths = random.integers(1, T + 1, BATCHES * B)
        x[np.arange(T) >= lengths[:, None]] = 0
    shape = (BATCHES * B, T, 3) if sequences else (BATCHES * B, 3)
    return x, random.normal(size=shape).astype("float32")


def build(layer_class, options, batch=None, mask=False, **compiled):
    keras.utils.set_random_seed(0)
    layers = [keras.Input(batch_shape=(batch, None if batch is None else T, D))]
    layers += [keras.layers.Masking()] * mask
    layers += [layer_class(H, name="rnn", **options)]
    if "output_units" not in options:
        layers += [keras.layers.Dense(3)]
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.Adam(0.01), "mse", **compiled)
    return model


def two_cpus():
    cpu = tf.config.list_physical_devices("CPU")[0]
    device = tf.config.LogicalDeviceConfiguration()
    tf.config.set_logical_device_configuration(cpu, [device, device])
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def one_and_two(strategy):
    """The name and the scope of a training on one device, and of one on both."""
    return ("one", tf.distribute.get_strategy().scope), ("two", strategy.scope)


def mirrored(folder, *names):
    """What replicas draw; and of each case, trained on one device and on two, all."""
    strategy = two_cpus()
    with strategy.scope():
        results = draws(strategy)
    for name, (devices, scope) in itertools.product(names, one_and_two(strategy)):
        layer_class, options, others = CASES[name]
        if options.get("stateful"):
            others = others | {"batch": B if devices == "one" else B // 2}
        with scope():
            model = build(layer_class, options, **others)
        x, y = data(options.get("return_sequences"), others.get("mask"))
        compiled = spy()
        fitted = model.fit(x, y, batch_size=B, epochs=2, shuffle=False, verbose=0)
        found = {"loss": fitted.history["loss"], "compiled": any(compiled)}
        found |= {f"weight {i}": w for i, w in enumerate(model.get_weights())}
        if name == "full":
            found["evaluate"] = model.evaluate(x, y, batch_size=B, verbose=0)
            found["predict"] = model.predict(x, batch_size=B, verbose=0)
        if options.get("stateful"):
            state = model.get_layer("rnn").states[0].value
            parts = strategy.experimental_local_results(state)
            found["state"] = np.concatenate(parts)
        results |= {f"{name}/{devices}/{key}": value for key, value in found.items()}
    np.savez(folder / "mirrored.npz", **results)


def spy():
    """Whether XLA compiles, of each loop that is asked for from now on."""
    asked, graph = [], execution._graph

    def recorded(function, options, key, jit_compile):
        asked.append(jit_compile)
        return graph(function, options, key, jit_compile)

    execution._graph = recorded
    return asked


def raising(folder):
    """What is raised by `fit` compiled as a whole, and by a state of the global batch."""
    strategy, raised = two_cpus(), {}
    for layer_class in (SIMPLE, BPTTRNN):
        cases = {
            "whole": ({"return_sequences": True}, {"jit_compile": True}),
            "stateful": (STATEFUL, {"batch": B}),
        }
        for name, (options, others) in cases.items():
            with strategy.scope():
                model = build(layer_class, options, **others)
            key = f"{name}, {layer_class.__name__}"
            raised[key] = outcome(fit, model, *data(True))
    (folder / "raised.json").write_text(json.dumps(raised))


def outcome(function, *args):
    try:
        function(*args)
    except Exception as error:
        return str(error)
    return "worked"


def fit(model, x, y):
    model.fit(x, y, batch_size=B, shuffle=False, verbose=0)


def draws(strategy):
    """d_inputs in both replicas, for inputs that are the same everywhere."""
    cases = {
        "Dropout": keras.layers.Dropout(0.5, seed=1),
        "SimpleRNN": SIMPLE(H, dropout=0.5, seed=1),
        "BPTTRNN": BPTTRNN(H, dropout=0.5, seed=1, jit_compile=False),
        "truncation": BPTTRNN(
            H, truncation=RandomizedTruncation(3, seed=1), jit_compile=False
        ),
    }
    x = np.tile(np.random.default_rng(0).normal(size=(1, T, D)), (4, 1, 1))

    def of_replica(layer):
        inputs = tf.constant(x, "float32")
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            y = layer(inputs, training=True)
        return tape.gradient(y, inputs)

    results = {}
    for name, layer in cases.items():
        layer.build((4, T, D))
        drawn = tf.function(lambda layer=layer: strategy.run(of_replica, (layer,)))
        for key in ("first", "second", "own"):
            if key == "own":
                strategy.run(own_draws, (layer,))
            gradients = strategy.experimental_local_results(drawn())
            results[f"{name}/{key}"] = np.stack(gradients)
    return results


def own_draws(layer):
    """Gives each replica a seed of its own."""
    replica = tf.distribute.get_replica_context().replica_id_in_sync_group
    for variable in layer.variables:
        if variable.path.endswith("seed_generator_state"):
            state = variable.value
            state.assign(state + tf.cast([replica, 0], state.dtype))


def callbacks(folder):
    """The logs and windows of both callbacks, on one device and on two."""
    results, (x, y) = {}, data(True)
    training = {"batch_size": B, "epochs": 2, "shuffle": False, "verbose": 0}
    for devices, scope in one_and_two(two_cpus()):
        with scope():
            model = build(BPTTRNN, {"return_sequences": True, "truncation": 1})
        adaptive = AdaptiveTruncation((x, y), tolerance=0.3)
        measuring = [GradientFlowLogger((x, y), quantities="all"), adaptive]
        history = model.fit(x, y, callbacks=measuring, **training).history
        results |= {f"{name}/{devices}": values for name, values in history.items()}
    np.savez(folder / "callbacks.npz", **results)


def worker(folder):
    """One of the processes that TF_CONFIG names: a loop; and then, what Keras does."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    index = strategy.cluster_resolver.task_id
    results = {"losses": loop(strategy, index)}
    for name in ("Dense", "SimpleRNN", "BPTTRNN"):
        with strategy.scope():
            if name == "Dense":
                layers = [keras.layers.Flatten(), keras.layers.Dense(3)]
                model = keras.Sequential([keras.Input((T, D)), *layers])
                model.compile("sgd", "mse")
            else:
                model = build(SIMPLE if name == "SimpleRNN" else BPTTRNN, {})
        x, y = data(False)
        results[name] = {
            "fit": outcome(fit, model, x, y),
            "evaluate": outcome(model.evaluate, x, y, B, 0),
            "predict": outcome(model.predict, x, B, 0),
        }
    (folder / f"worker{index}.json").write_text(json.dumps(results))


def loop(strategy, index):
    """The losses of a training by `strategy.run`, of the rows of worker `index`."""
    with strategy.scope():
        options = {**WINDOWS, "output_units": 3, "jit_compile": False}
        model = build(BPTTRNN, options, mask=True)
        optimizer = model.optimizer
        optimizer.build(model.trainable_variables)
    x, y = data(False, mask=True)
    size = B // strategy.num_replicas_in_sync

    def of_replica(x, y):
        with tf.GradientTape() as tape:
            losses = keras.losses.mean_squared_error(y, model(x, training=True))
            loss = tf.nn.compute_average_loss(losses, global_batch_size=B)
        weights = model.trainable_variables
        optimizer.apply(tape.gradient(loss, weights), weights)
        return loss

    @tf.function
    def update(x, y):
        return strategy.reduce("SUM", strategy.run(of_replica, args=(x, y)), axis=None)

    losses = []
    for batch in range(BATCHES):
        rows = slice(batch * B + index * size, batch * B + (index + 1) * size)
        losses.append(float(update(x[rows], y[rows])))
    return losses


# --- Killed and restarted

UPDATES, EPOCH = 12, 3  # epochs of a few updates, of data that go on


class Kill(keras.callbacks.Callback):
    def __init__(self, at):
        super().__init__()
        self.at = at

    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations.numpy() == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


class SeedPositions(keras.callbacks.Callback):
    """Behind BackupAndRestore: what is drawn once an update goes on where it was."""

    found = None

    def on_train_begin(self, logs=None):
        for variable in self.model.variables:
            if variable.path.endswith("seed_generator_state"):
                seed, self.found = map(int, variable.numpy())
                updates = int(self.model.optimizer.iterations.numpy())
                variable.assign([seed, updates])


def train(folder, save_freq, kill_at=None):
    """Trains; where the folder has a backup, from there on."""
    options = {"dropout": 0.2, "truncation": RandomizedTruncation(3, seed=1), "seed": 2}
    model = build(BPTTRNN, options | {"jit_compile": False})
    x, y = data(False)

    def batches():
        for update in itertools.count(int(model.optimizer.iterations.numpy())):
            rows = slice(update % BATCHES * B, (update % BATCHES + 1) * B)
            yield x[rows] + update, y[rows]

    dataset = tf.data.Dataset.from_generator(
        batches, output_signature=(tf.TensorSpec((B, T, D)), tf.TensorSpec((B, 3)))
    )
    backup = keras.callbacks.BackupAndRestore(folder, save_freq=save_freq)
    callbacks = [backup, positions := SeedPositions(), Kill(kill_at)]
    epochs = {"steps_per_epoch": EPOCH, "epochs": UPDATES // EPOCH}
    fitted = model.fit(dataset, verbose=0, callbacks=callbacks, **epochs)
    return {
        "weights": [w.tolist() for w in model.get_weights()],
        "updates": int(model.optimizer.iterations.numpy()),
        "epochs": fitted.epoch,
        "position": positions.found,
    }


def killed(folder, save_freq, kill_at):
    train(folder / "backup", save_freq, kill_at)


def restarted(folder, save_freq):
    """What the killed one becomes, and one that was not interrupted."""
    found = {name: train(folder / name, save_freq) for name in ("backup", "whole")}
    (folder / "restarted.json").write_text(json.dumps(found))


if __name__ == "__main__":
    job, folder, *arguments = sys.argv[1:]
    globals()[job](
        pathlib.Path(folder), *(int(a) if a.isdigit() else a for a in arguments)
    )
