"""Races on a GPU: their order, time, rows and table; and the check of their gradients.

Every number here is made up, or of a CPU.
"""

import collections
import copy
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import time
import zipfile
from unittest import mock

import agreement
import bundle
import export
import export_gpu
import gpu
import gpu_table
import made_up_races
import numpy as np
import peaks
import problem
import pytest
import races
import tensorflow as tf
import workers
from helpers import FLOAT32, relative_error, without_graphs
from packaging.version import Version
from results import Results

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "accelerators"
# With JAX and without TensorFlow, as `make accelerators` makes it.
WITH_JAX = ROOT / ".venv-accelerators" / "bin" / "python"


def a_race(task="sequence", precision="tf32", timesteps=256):
    return races.Race(precision, 3, 7, timesteps, task)


# Order and time


def test_the_most_telling_of_the_grid_come_first():
    """The middle; then what differs from it in one thing, each thing once; and so on."""
    grid, everything = races.FULL, races.FULL.races()
    assert len(everything) == len(set(everything)) == 3 * 2 * 3 * 3 * 4
    assert {race.units for race in everything} == {128, 512, 1024}
    assert {race.timesteps for race in everything} == {256, 1024, 4096}
    assert {race.batch for race in everything} == {16, 128}
    assert {race.precision for race in everything} == {"tf32", "bfloat16", "float32"}
    items = grid.items()
    assert len(items) == len(set(items)) == 2 * len(everything)
    distances = [grid.distance(race) for _, race in items]
    one = sum(len(axis) - 1 for axis in grid.axes())
    first = items[: 2 * (1 + one)]
    assert set(distances[: len(first)]) == {0, 1} and distances[0] == 0
    assert [what for what, _ in first] == ["time"] * (1 + one) + ["memory"] * (1 + one)
    assert distances[len(first) :] == sorted(distances[len(first) :])
    for field, axis in zip(dataclasses.fields(races.Race), grid.axes(), strict=True):
        seen = {getattr(race, field.name) for what, race in first if what == "time"}
        assert seen == set(axis)


@pytest.fixture
def clock(monkeypatch):
    """Time that passes where somebody measures."""
    now = mock.Mock(now=0.0)
    monkeypatch.setattr(time, "monotonic", lambda: now.now)
    return now


def made_up_worker(clock, seconds):
    """A worker whose every answer takes so many seconds."""

    def measure(what, race, left):
        needed = seconds(race)
        clock.now += min(needed, left)
        if needed > left:
            raise workers.Silence("no answer")
        return {"BPTTRNN": {"ms": {"median": needed}}}

    return mock.Mock(measure=mock.Mock(side_effect=measure))


def asked(worker):
    return [call.args[:2] for call in worker.measure.call_args_list]


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "gpu.json", {"machine": "made up"})


def written(results):
    return json.loads(results.path.read_text())


def test_what_does_not_fit_is_left_out_by_name(results, clock):
    """A long race is left out, a shorter one behind it is not; all ends in time."""
    worker = made_up_worker(clock, lambda race: race.timesteps / 100)
    items = [("time", a_race(timesteps=t)) for t in (1000, 2000, 9000, 3000, 4000)]
    gpu.run(items, worker, results, gpu.FIRST_GUESS + 30)
    assert [race.timesteps for _, race in asked(worker)] == [1000, 2000, 3000]
    left = written(results)["left_out"]
    assert [item["race"]["timesteps"] for item in left] == [9000, 4000]
    assert left[0]["reason"] == "needs 90 s, 40 s are left"
    assert clock.now <= gpu.FIRST_GUESS + 30


def test_nothing_begins_without_time(results, clock):
    worker = made_up_worker(clock, lambda race: 1)
    gpu.run([("time", a_race())], worker, results, gpu.FIRST_GUESS - 1)
    assert not asked(worker) and written(results)["left_out"]


def test_a_race_that_takes_longer_than_expected_is_cut_off(results, clock):
    worker = made_up_worker(clock, lambda race: 10 if race.task == "sequence" else 1000)
    items = [("time", a_race()), ("time", a_race("last")), ("time", a_race("chunks"))]
    gpu.run(items, worker, results, 100)
    assert clock.now == 100
    assert len(written(results)["rows"]) == 1
    reasons = [item["reason"] for item in written(results)["left_out"]]
    assert reasons == ["cut off at the end of the time", "needs 10 s, 0 s are left"]


def test_every_row_is_in_the_file_before_the_next_begins(results, clock):
    seen = []

    def seconds(race):
        seen.append(len(written(results)["rows"]) if results.path.exists() else 0)
        if race.task == "windows":
            raise KeyboardInterrupt
        return 1

    items = [("time", a_race(task)) for task in ("sequence", "last", "windows")]
    with pytest.raises(KeyboardInterrupt):
        gpu.run(items, made_up_worker(clock, seconds), results, 1000)
    assert seen == [0, 1, 2]
    assert [row["race"]["task"] for row in written(results)["rows"]] == [
        "sequence",
        "last",
    ]


def test_another_call_goes_on(results, clock):
    items = [("time", a_race()), ("memory", a_race()), ("time", a_race("last"))]
    gpu.run(items[:1], made_up_worker(clock, lambda race: 1), results, 1000)
    again = Results(results.path, {"machine": "made up"})
    worker = made_up_worker(clock, lambda race: 1)
    gpu.run(items, worker, again, 1000)
    assert asked(worker) == items[1:]
    assert len(written(again)["rows"]) == 3
    with pytest.raises(SystemExit, match="of another machine.*Received: other"):
        Results(results.path, {"machine": "other"})


@pytest.mark.parametrize(
    ("failure", "stops"), [("JaxRuntimeError: INTERNAL", 1), ("disagrees: loss", 0)]
)
def test_an_error_alone_ends_the_process(results, clock, failure, stops):
    worker = mock.Mock()
    worker.measure.return_value = {"BPTTRNN": {"failure": failure}}
    gpu.run([("time", a_race())], worker, results, 1000)
    assert worker.stop.call_count == stops


def test_a_process_that_hangs_or_ends_is_given_up():
    worker = workers.Worker(made_up_races.serve, "somewhere")
    try:
        assert worker.start(60) == {"platform": "made up", "path": "somewhere"}
        assert worker.measure("time", a_race(), 60) == {"BPTTRNN": {"time": 1}}
        assert worker.measure("time", a_race(), 60) == {"BPTTRNN": {"time": 2}}
        # The peak of memory counts from the beginning of a process.
        assert worker.measure("memory", a_race(), 60) == {"BPTTRNN": {"memory": 1}}
        with pytest.raises(workers.Failure, match="the process ended, status 7"):
            worker.measure("time", a_race("windows"), 60)
        assert worker.measure("time", a_race(), 60) == {"BPTTRNN": {"time": 1}}
        with pytest.raises(workers.Silence, match="no answer"):
            worker.measure("time", a_race("chunks"), 0.5)
        assert worker.measure("time", a_race(), 60) == {"BPTTRNN": {"time": 1}}
    finally:
        worker.stop()


def test_both_frameworks_are_on_one_device():
    for platform, torch in (
        ("gpu", "cuda"),
        ("cpu", "cpu"),
        ("cpu", "cuda"),
        ("gpu", "cpu"),
    ):
        machine = {"platform": platform, "torch_device": torch}
        if (platform == "gpu") == (torch == "cuda"):
            gpu.check(machine)
        else:
            with pytest.raises(
                SystemExit, match="on the same device. Received: JAX on"
            ):
                gpu.check(machine)
    gpu.check({"platform": "gpu"})


# Gradients and memory


def gradients():
    random = np.random.default_rng(5)
    return [random.normal(size=size) for size in [(), (2, 3), (3, 3), (3,)]]


def test_those_who_disagree_are_named():
    wanted = gradients()
    near, wrong, cut, undefined = (copy.deepcopy(wanted) for _ in range(4))
    near[1][0, 1] += 1e-5
    wrong[2] = wrong[2].T
    cut[3] = cut[3][:2]
    undefined[1][1, 2] = np.nan
    given = {agreement.JUDGE: wanted, "near": near, "wrong": wrong, "cut": cut}
    found = agreement.judged(given | {"undefined": undefined, "few": wanted[:3]}, 1e-4)
    assert found[agreement.JUDGE] == (0.0, None)
    assert 0 < found["near"][0] < 1e-4 and found["near"][1] is None
    assert found["wrong"][1].startswith("disagrees: d_recurrent_kernel by ")
    assert "d_bias: shape (2,), not (3,)" in found["cut"][1]
    assert found["undefined"][1] == "disagrees: d_kernel by nan"
    assert found["few"][1].startswith("disagrees: ")
    found = agreement.judged({"BPTTRNN": wanted}, 1e-4)
    reason = "nothing to compare with: no gradient of JAX scan"
    assert found["BPTTRNN"] == (None, reason)


def test_a_peak_is_above_what_is_in_use():
    memory = {"in use": 5_000_000, "peak": 5_000_000}

    def step(size, result=0):
        def taken():
            memory["peak"] = max(memory["peak"], memory["in use"] + size)
            return result

        return taken

    def peaks_of(*arguments):
        sizes = {"small": 2_000_000, "large": 9_000_000, "middle": 3_000_000}
        steps = {name: step(size) for name, size in sizes.items()}
        found = peaks.peaks(steps | {"failed": step(20_000_000, None)}, *arguments)
        return [row["mb"] for row in found.values()]

    def told():
        return memory["in use"], memory["peak"]

    # What the large one took hides the middle one, where nothing begins anew.
    assert peaks_of(told) == [2.0, 9.0, None, None]
    begins_anew = functools.partial(memory.update, peak=memory["in use"])
    assert peaks_of(told, begins_anew) == [2.0, 9.0, 3.0, None]
    assert set(peaks_of(lambda: (None, None))) == {None}


def test_the_numbers_are_the_same_for_everyone():
    race = a_race("last", timesteps=5)
    first, again = problem.arrays(race), problem.arrays(race)
    np.testing.assert_array_equal(first[0], again[0])
    x, y, (W, U, b) = first
    assert x.shape == (3, 5, 64) and y.shape == (3, 7)
    assert (W.shape, U.shape, b.shape) == ((64, 7), (7, 7), (7,))
    arrays = [x, y, W, U, b]
    assert {array.dtype for array in arrays} == {np.dtype("float32")}
    assert all(np.all(array != 0) for array in arrays)
    # No example, and no step, is another one again.
    assert len(np.unique(x, axis=0)) == 3 and len(np.unique(x[0], axis=0)) == 5


# Programs

exports = pytest.mark.skipif(
    Version(tf.__version__) < Version("2.21"),
    reason="an older TensorFlow may write no StableHLO, as 2.16 does not",
)


@exports
def test_an_exported_step_is_the_gradient_of_its_task():
    """Truncated, of sequences: what tf.GradientTape gives of the layer itself."""
    race = dataclasses.replace(a_race("windows"), timesteps=160)
    program = export_gpu.PROGRAMS["BPTTRNN"]
    step, specs = export_gpu.step_of(race, program)
    x, y, weights = problem.arrays(race)
    assert [tuple(spec.shape) for spec in specs] == [a.shape for a in (x, y, *weights)]
    with without_graphs():
        loss, *found = step(*map(tf.constant, (x, y, *weights)))
        task = races.TASKS["windows"]
        layer = program.layer(task, race.units, "float32")
        layer.build(x.shape)
        layer.set_weights(weights)
        with tf.GradientTape() as tape:
            wanted = tf.reduce_mean((layer(x, training=True) - y) ** 2)
        gradients = tape.gradient(wanted, layer.trainable_variables)
    window = layer.truncation.steps, layer.truncation.stride
    assert window == task.truncation == (64, 32)
    assert relative_error(loss, wanted) < FLOAT32
    for got, want in zip(found, gradients, strict=True):
        assert relative_error(got, want) < FLOAT32


@exports
def test_a_layer_of_other_weights_is_refused(monkeypatch):
    monkeypatch.setitem(races.CELLS, "rnn", 4)
    with pytest.raises(ValueError, match="must have the shapes.*28.*Received.*7"):
        export_gpu.step_of(a_race(), export_gpu.PROGRAMS["BPTTRNN"])


@exports
def test_another_contestant_is_an_entry(monkeypatch, tmp_path):
    """It, and no other program, of one task; in a file by the names of its race."""
    other = export_gpu.Program(export_gpu.rnn(adjoint_clipnorm=1e-3), ("last",))
    monkeypatch.setattr(export_gpu, "PROGRAMS", {"clipped": other})
    small = dataclasses.replace(races.QUICK, timesteps=(6,))
    bundle.write(tmp_path / "a.zip", {"of": "tests"}, export_gpu.programs(small))
    read = bundle.Bundle(tmp_path / "a.zip")
    assert read.header == {"of": "tests"} and len(read.entries) == 2
    assert read.programs(a_race("sequence", timesteps=6)) == {}
    texts = {p: read.programs(a_race("last", p, 6)) for p in races.PRECISIONS}
    assert all(list(found) == ["clipped"] for found in texts.values())
    (tf32,), (low,), (full,) = (texts[p].values() for p in races.PRECISIONS)
    assert "bf16" in low and "bf16" not in tf32
    assert "HIGHEST" in full and "HIGHEST" not in tf32
    assert "custom_call" not in low + full


@exports
def test_full_precision_is_what_tensorflow_would_export():
    """But for the names of places in the source, which are numbered as they come."""
    race = a_race("last", timesteps=6)

    def text():
        program = export_gpu.PROGRAMS["BPTTRNN"]
        lines = export.stablehlo(*export_gpu.step_of(race, program)).splitlines()
        return [line.partition(" loc(")[0] for line in lines if "stablehlo.dot" in line]

    default = text()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        wanted = text()
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(True)
    assert len(wanted) > 5 and wanted != default
    assert bundle.in_full_precision("\n".join(default)).splitlines() == wanted
    other = "stablehlo.dot %a, precision = [DEFAULT, DEFAULT]\nstablehlo.dot_general %b"
    with pytest.raises(ValueError, match="Received: 2 products and 1 such"):
        bundle.in_full_precision(other)


# The table


def row(what, of, *names, **others):
    """A row of the results: the numbers of JAX scan and BPTTRNN, and of others."""
    contestants = dict(zip(("JAX scan", "BPTTRNN"), names, strict=False)) | others
    race = dataclasses.asdict(of)
    return {"what": what, "race": race, "contestants": contestants, "seconds": 1.0}


@pytest.fixture
def made_up():
    """Results of a card that does not exist."""
    ms = {"ms": {"median": 2.0, "quartiles": [1.5, 3.0], "rounds": 5}}
    slower = {"ms": {"median": 5.0, "quartiles": [4.5, 6.0], "rounds": 5}}
    disagrees = {"failure": "disagrees: d_bias by 3.0e-01"}
    oom = {"failure": "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating"}
    ended = {"failure": "the process ended, status -11"}
    told, guessed = (
        {"mb": 1234.4, "compiler_mb": 1e3},
        {"mb": None, "compiler_mb": 2345.6},
    )
    race = a_race(timesteps=1000)
    rows = [
        row("time", race, slower, ms),
        row("time", a_race(precision="bfloat16"), ms, oom),
        row("time", a_race(precision="float32"), BPTTRNN=ms, other=disagrees),
        row("time", a_race("last"), race=ended),
        row("memory", race, guessed, told, other={"mb": None}),
    ]
    machine = {"platform": "gpu", "card": "Made-up 9000", "driver": "1", "jax": "2"}
    machine |= {"torch": None, "python": "3"}
    found = {"machine": machine, "bundle": {"tensorflow": "4"}, "rows": rows}
    return found | {"left_out": [{"what": "time"}] * 3}


def test_rows_of_the_table(made_up):
    text = gpu_table.text(made_up)
    first = (
        "Made-up 9000; driver 1, jax 2, python 3; programs exported by TensorFlow 4."
    )
    assert text.splitlines()[0] == first
    assert "Left out, for want of time: 3 of these" in text
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    times, memory, last = tables
    assert times == [
        "| (B, T, D, H) | precision | BPTTRNN, ms (quartiles) | JAX scan | other |",
        "|---|---|---|---|---|",
        "| (3, 1,000, 64, 7) | tf32 | 2.00 (1.50–3.00) | 2.50 | – |",
        "| (3, 256, 64, 7) | bfloat16 | out of memory | 2.00 ms | – |",
        "| (3, 256, 64, 7) | float32 | 2.00 (1.50–3.00) | – "
        "| disagrees: d_bias by 3.0e-01 |",
    ]
    assert memory[2:] == ["| (3, 1,000, 64, 7) | tf32 | 1,234 | 2,346 * | – |"]
    assert last[2:] == ["| (3, 256, 64, 7) | tf32 | failed |"]
    made_up["machine"]["platform"] = "cpu"
    with pytest.raises(
        SystemExit, match="a GPU's numbers alone. Received: those of a C"
    ):
        gpu_table.text(made_up)


def test_the_page_says_what_the_file_says(made_up):
    """With no file, that no GPU has run the layer; else its table, and nothing older."""
    exists = gpu_table.RESULTS.exists()
    known = json.loads(gpu_table.RESULTS.read_text()) if exists else None
    page = gpu_table.PAGE.read_text(encoding="utf-8")
    assert gpu_table.filled(page, gpu_table.PLACE, gpu_table.text(known)) == page
    assert exists or gpu_table.NONE_YET in page
    assert gpu_table.filled(page, gpu_table.PLACE, gpu_table.text(made_up)) != page


# All of it


@pytest.mark.slow
@pytest.mark.skipif(not WITH_JAX.exists(), reason="`make gpu-quick` makes it")
@exports
def test_all_of_it_on_a_cpu(tmp_path):
    """Every contestant of every task agrees; a wrong program is reported, and not timed."""
    grid = dataclasses.replace(races.QUICK, timesteps=(256,))
    path, wrong = tmp_path / "gpu.zip", tmp_path / "wrong.zip"
    bundle.write(path, {"tensorflow": "1", "quick": True}, export_gpu.programs(grid))
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(wrong, "w") as new:
        for name in old.namelist():
            text = old.read(name).decode()
            new.writestr(name, text.replace("stablehlo.tanh", "stablehlo.logistic"))

    few = ["float32", "--tasks", "last", "--what", "memory"]
    (memory,) = raced(path, tmp_path / "memory.json", *few)
    assert memory["contestants"]["BPTTRNN, checkpoints"]["compiler_mb"] > 0
    assert memory["contestants"]["BPTTRNN"]["mb"] is None  # a CPU tells none
    times = raced(path, tmp_path / "a.json", "float32", "bfloat16", "--what", "time")
    assert len(times) == 2 * len(races.TASKS)
    for known in times:
        assert {"BPTTRNN", "JAX scan"} <= set(known["contestants"])
        for name, found in known["contestants"].items():
            if "torch" in name and "failure" in found:
                assert found["failure"] == "PyTorch is not installed"
            else:
                assert found["ms"]["median"] > 0, (name, known)
    names = collections.Counter(n for known in times for n in known["contestants"])
    assert names["BPTTRNN, checkpoints"] == names["JAX scan, checkpoints"] == 2

    for known in raced(wrong, tmp_path / "b.json", "float32", "--what", "time"):
        found = known["contestants"]["BPTTRNN"]
        assert found["failure"].startswith("disagrees: ") and "ms" not in found
        assert known["contestants"]["JAX scan"]["ms"]


def raced(path, output, *arguments):
    command = [WITH_JAX, FOLDER / "gpu.py", path, "--output", output, "--precisions"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    command += [*arguments, "--seconds", "900"]
    subprocess.run(command, check=True, env=environment, timeout=900)
    found = json.loads(output.read_text())
    assert not found["left_out"] and found["machine"]["platform"] == "cpu"
    return found["rows"]
