"""Training on many devices through tf.distribute, and a training that is killed."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import devices
import keras
import numpy as np
import pytest
from helpers import FLOAT32, relative_error
from packaging.version import Version

SCRIPT = pathlib.Path(__file__).parents[1] / "devices.py"


def start(job, folder, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, SCRIPT, job, folder, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            **environment,
        },
    )


def finish(process, code=0):
    try:
        output, _ = process.communicate(timeout=1200)
    finally:
        process.kill()
    assert process.returncode == code, output


# --- Two replicas in one process


@pytest.fixture(scope="module")
def trained(tmp_path_factory, request):
    """By case and by one or two devices, the results of one process that trains all."""
    tests = [i for i in request.session.items if "trained" in i.fixturenames]
    names = [getattr(test, "callspec", None) for test in tests]
    names = {spec.params["name"] for spec in names if spec}
    folder = tmp_path_factory.mktemp("mirrored")
    finish(start("mirrored", folder, *sorted(names)))
    found = {}
    with np.load(folder / "mirrored.npz") as results:
        for path, value in results.items():
            case, _, key = path.rpartition("/")
            found.setdefault(case, {})[key] = value
    return found


# Of two replicas Keras 3.8 reports another loss than it minimises, SimpleRNN's as well.
REPORTED = Version(keras.__version__) >= Version("3.15")
ALONE = [name for name in devices.CASES if "in the loss" not in name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_two_replicas_train_as_one(name, trained):
    one, two = (trained[f"{name}/{who}"] for who in ("one", "two"))
    assert one.keys() == two.keys() and len(one["loss"]) == 2
    assert one.pop("compiled") == two.pop("compiled") == ("stateful" not in name)
    for key, expected in one.items():
        if REPORTED or key not in ("loss", "evaluate"):
            assert relative_error(two[key], expected) < FLOAT32, key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mask in the loss", "mask in the loss, SimpleRNN"])
def test_a_mask_in_the_loss_is_averaged_by_replica(name, trained):
    """Keras divides by the unmasked steps of a replica. Once it does not, say so in
    docs/deploying.md, Many devices."""
    one, two = (trained[f"{name}/{who}"] for who in ("one", "two"))
    assert relative_error(two["weight 0"], one["weight 0"]) > 1e-3


@pytest.mark.slow
def test_what_raises_under_two_replicas(tmp_path):
    """The day one of them trains, change docs/deploying.md, Many devices."""
    finish(start("raising", tmp_path))
    raised = json.loads((tmp_path / "raised.json").read_text())
    for layer in ("SimpleRNN", "BPTTRNN"):
        assert "located in device" in raised[f"whole, {layer}"]
        message = raised[f"stateful, {layer}"]
        assert f"Expected batch size: {devices.B}" in message
        assert f"Received batch size: {devices.B // 2}" in message


def test_replicas_draw_the_same_unless_seeded(trained):
    """As Keras' own layers; and one call of `strategy.run` gives each its own."""
    for name in ("Dropout", "SimpleRNN", "BPTTRNN", "truncation"):
        first, second, own = (trained[name][k] for k in ("first", "second", "own"))
        np.testing.assert_array_equal(first[1], first[0])
        np.testing.assert_array_equal(second[1], second[0])
        assert relative_error(first[0][1], first[0][0]) > 0.1  # examples differ
        assert relative_error(second[0], first[0]) > 0.1
        assert relative_error(own[1], own[0]) > 0.1


@pytest.mark.slow
def test_callbacks_measure_as_on_one_device(tmp_path):
    finish(start("callbacks", tmp_path))
    with np.load(tmp_path / "callbacks.npz") as results:
        logs = dict(results)
    names = {key.partition("/")[0] for key in logs}
    assert {"loss", "rnn_half_life", "rnn_window"} <= names
    assert logs["rnn_window/one"][0] > 1  # it moved
    for name in names:
        one, two = logs[f"{name}/one"], logs[f"{name}/two"]
        assert relative_error(two, one) < FLOAT32, name


# --- Two processes


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """What each of two processes found, and the losses of one device."""
    folder = tmp_path_factory.mktemp("workers")
    with contextlib.ExitStack() as ports:
        sockets = [ports.enter_context(socket.socket()) for _ in range(2)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    processes = []
    for index in range(2):
        task = {"type": "worker", "index": index}
        config = json.dumps({"cluster": {"worker": addresses}, "task": task})
        processes.append(start("worker", folder, TF_CONFIG=config))
    try:
        one = devices.loop(devices.tf.distribute.get_strategy(), 0)
        for process in processes:
            finish(process)
    finally:
        for process in processes:
            process.kill()
    found = [(folder / f"worker{index}.json").read_text() for index in range(2)]
    return one, [json.loads(text) for text in found]


@pytest.mark.slow
def test_two_processes_train_as_one(workers):
    one, found = workers
    assert len(set(one)) == devices.BATCHES
    for results in found:
        assert relative_error(results["losses"], one) < FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["Dense", "SimpleRNN", "BPTTRNN"])
def test_fit_of_two_processes_is_broken_in_keras(layer, workers):
    """keras#20585. Not of ours alone: so there is nothing to mend here."""
    for results in workers[1]:
        assert results[layer].pop("predict") == "worked"
        for name, found in results[layer].items():
            assert found != "worked", (
                f"`{name}` works under MultiWorkerMirroredStrategy now. Test in place of "
                "this that it does what it does on one device, and say so in "
                "docs/deploying.md, Many devices."
            )
            assert "PerReplica" in found


# --- Killed and restarted


def killed_and_restarted(folder, save_freq, at):
    if not hasattr(signal, "SIGKILL"):
        pytest.skip("no SIGKILL on this system")
    finish(start("killed", folder, save_freq, at), -signal.SIGKILL)
    finish(start("restarted", folder, save_freq))
    found = json.loads((folder / "restarted.json").read_text())
    return found["backup"], found["whole"]


@pytest.mark.slow
def test_killed_training_ends_as_one_that_was_not(tmp_path):
    """With dropout and a randomised truncation, whose seeds no backup has."""
    at = 2 * devices.EPOCH + 2
    restarted, whole = killed_and_restarted(tmp_path, "epoch", at)
    assert whole["epochs"] == [0, 1, 2, 3] and restarted["epochs"] == [2, 3]
    assert restarted["updates"] == whole["updates"] == devices.UPDATES
    for got, expected in zip(restarted["weights"], whole["weights"], strict=True):
        np.testing.assert_array_equal(got, expected)
    # Were it not 0 here, Keras would store it, and docs/deploying.md need no callback.
    assert restarted["position"] == 0


@pytest.mark.slow
def test_backups_within_an_epoch_begin_it_again(tmp_path):
    """Keras notes the batch and does not read it: 2 updates of epoch 2 are too many."""
    restarted, whole = killed_and_restarted(tmp_path, 4, 2 * devices.EPOCH + 3)
    assert restarted["epochs"] == [2, 3]
    assert restarted["updates"] == whole["updates"] + 2
