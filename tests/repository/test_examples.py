"""Every example runs in its short form, and the parts of each are right."""

import argparse
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import zipfile
from unittest import mock

import numpy as np
import pytest
from helpers import FLOAT32

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
SHARED = {"basics.py", "common.py"}
NAMES = sorted({path.name for path in EXAMPLES.glob("*.py")} - SHARED)

# What the output of each example must hold. An example that is not listed fails.
KEY_LINES = {
    "character_language_model.py": [
        "Training with keras.layers.SimpleRNN",
        "bigram counts",
        "A sample at temperature 0.7",
        "character_language_model, without keras_bptt: largest difference",
    ],
    "distributed.py": [
        "update           one      mirrored   multiworker",
        "Largest relative difference to one device: ",
    ],
    "draw_digits.py": ["The nearest neighbour recognises", "bits per test digit"],
    "flowers.py": ["The norm of dL/dU is 0.0", "accuracy, five-fold", "nearest mean"],
    "follow_the_advice.py": [
        "small gain: lag 20, 21 steps",
        "- recurrent_initializer='orthogonal': sigma_max(U)",
        "advised  healthy",
    ],
    "long_sequences.py": [
        "relative difference of the gradients",
        "2. Two sweeps over 4 pieces of 100 steps",
        "the best read-out of the untrained state",
    ],
    "memory_span.py": [
        "sliding         5",
        "randomised      5",
        "sliding windows, k <= lag / 2: at least",
    ],
    "own_cell.py": [
        "An observer who adds up all evidence is right in 0.8",
        "layer norm ",
        "x as long",
    ],
    "read_digits.py": ["SimpleRNN, pixels", "test accuracy", "nearest mean"],
    "rewrite_numbers.py": [
        "share rewritten without an error, beam of 5",
        "BPTTRNN, greedy",
        "logistic regression",
    ],
    "saved_model.py": [
        "In a process without keras_bptt and Keras, largest relative differences",
        "truncated and full gradient differ by",
        "3 updates took the loss from",
    ],
    "streaming.py": [
        "The best with memory of 8 steps",
        "fit, 24 steps",
        "TBPTT(4, 12)",
    ],
    "sunspots.py": ["root mean squared error of the test", "autoregression of roots"],
    "vanishing_and_exploding.py": [
        "logistic regression on all pixels at once",
        "  vanishing: dL/dh_t halves every",
        "32 examples, adjoint_max_growth=1",
        "network         verdict",
    ],
}
KINDS = ["character_language_model", "draw_digits", "flowers", "read_digits"]
KINDS += ["rewrite_numbers", "sunspots"]
# What stands in whose place; the examples that have `--layer`, and what it may say.
HOSTS = {"BPTTRNN": "SimpleRNN", "BPTTLSTM": "LSTM", "BPTTGRU": "GRU"}
GATED = [("character_language_model", "lstm"), ("character_language_model", "gru")]
GATED += [("read_digits", "lstm"), ("read_digits", "gru")]


@functools.cache
def load(name):
    """An example's script as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    """What an example writes by default goes below the folder where it is started."""
    monkeypatch.chdir(tmp_path)


def arguments_of(name, line="", parse="parse_arguments", **options):
    with mock.patch.object(sys, "argv", ["example.py", *line.split()]):
        return getattr(load(name), parse)(**options)


# --- Whole examples


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_example_runs(name, tmp_path):
    """As a newcomer runs it: quietly, and it writes to a folder that git ignores."""
    finished = run([EXAMPLES / name, "--smoke"], tmp_path)
    assert finished.returncode == 0, finished.stderr
    if name == "distributed.py" and finished.stderr:
        # Of two processes TensorFlow may say that the one which coordinates ended first.
        assert "coordination service" in finished.stderr
        assert "Traceback" not in finished.stderr
    else:
        # On some CPUs TensorFlow says of itself that oneDNN lacks a kernel there.
        lines = finished.stderr.splitlines()
        assert [line for line in lines if "oneDNN supports" not in line] == []
    for line in KEY_LINES[name]:
        assert line in finished.stdout
    folder = tmp_path / "build/examples/smoke"
    assert [*tmp_path.iterdir()] == [tmp_path / "build"]
    if name == "distributed.py":
        check_results_of_strategies(folder)
    if name == "vanishing_and_exploding.py":
        check_results_of_digits(folder / "vanishing_and_exploding.json")
    if name.removesuffix(".py") in KINDS:
        check_results_of_kind(folder / name.replace(".py", ".json"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layer"), GATED)
def test_example_runs_with_gates(name, layer, tmp_path):
    finished = run([EXAMPLES / f"{name}.py", "--smoke", "--layer", layer], tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    for line in KEY_LINES[f"{name}.py"]:
        line = line.replace("SimpleRNN", layer.upper())
        assert line.replace(f"{name},", f"{name}_{layer},") in finished.stdout
    path = tmp_path / f"build/examples/smoke/{name}_{layer}.json"
    check_results_of_kind(path, f"BPTT{layer.upper()}")


def run(arguments, folder, **environment):
    """A process of Python; TensorFlow is as talkative in it as it is by itself."""
    own = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    # The same keras_bptt as here, installed or not.
    own["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=folder,
        env={**own, "PYTHONIOENCODING": "utf-8", **environment},
        timeout=300,
    )


def test_files_go_where_git_ignores_them(tmp_path):
    """By default; no example has a folder of its own choice."""
    basics = load("basics")
    parser = argparse.ArgumentParser()
    basics.add_output(parser, smoke="short")
    for arguments, folder in {
        (): "build/examples",
        ("--smoke",): "build/examples/smoke",
        ("--smoke", "--output-dir", "here/now"): "here/now",
    }.items():
        args = parser.parse_args(arguments)
        basics.make_output(parser, args)
        assert args.output_dir == pathlib.Path(folder)
        assert (tmp_path / folder).is_dir()
    assert "build/" in (EXAMPLES.parent / ".gitignore").read_text().splitlines()
    sources = {name: (EXAMPLES / name).read_text() for name in NAMES}
    assert not [name for name in NAMES if '"--output-dir"' in sources[name]]
    assert all(re.search("^import (basics|common)$", s, re.M) for s in sources.values())


# What TensorFlow has been seen to write on its start where all is well.
START_UP = """\
WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
I0000 00:00:1795786501.233405    5394 cudart_stub.cc:31] Could not find cuda drivers
2025-09-17 14:44:05.157831: I external/cudart_stub.cc:32] Could not find cuda drivers
2025-09-17 14:44:05.176998: E external/cuda_fft.cc:467] Unable to register cuFFT factory
E0000 00:00:1795786524.029085    5394 cuda_platform.cc:52] failed call to cuInit: \
INTERNAL: CUDA error: Failed call to cuInit: UNKNOWN ERROR (303)
"""
TROUBLE = """\
E0000 00:00:1795786524.029085    5394 cuda_platform.cc:52] failed call to cuInit: 999
W0000 00:00:1795786524.029085    5394 memory.cc:7] The first warning
2025-09-17 14:44:05.157831: W memory.cc:32] The second warning
Python warns of something
F0000 00:00:1795786524.029085    5394 cpu.cc:9] AVX is not available
"""


@pytest.mark.parametrize("level, left_out", [("2", START_UP), ("0", "")])
def test_known_lines_of_the_start_alone_are_left_out(tmp_path, level, left_out):
    """Not those that say why a process aborts; and all are shown to who asks for them."""
    code = f"import os\nos.write(2, {(START_UP + TROUBLE).encode()})\nos.abort()\n"
    (tmp_path / "tensorflow.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), str(EXAMPLES)])
    environment = {"PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": level}
    finished = run(["-c", "import basics"], tmp_path, **environment)
    assert finished.returncode != 0
    assert finished.stderr == (START_UP + TROUBLE).removeprefix(left_out)


@pytest.mark.slow
def test_tensorflow_starts_quietly(tmp_path):
    """As it is installed here; what is written afterwards is shown."""
    code = "import basics, os, tensorflow as tf; tf.constant(1); os.write(2, b'error')"
    path = os.pathsep.join([str(EXAMPLES), *filter(None, sys.path)])
    finished = run(["-c", code], tmp_path, PYTHONPATH=path)
    assert (finished.returncode, finished.stderr) == (0, "error")


def check_results_of_kind(path, own="BPTTRNN"):
    """Two layers, one gradient: a short epoch leaves the same scores and losses."""
    found = json.loads(path.read_text())
    scores = found["scores"]
    ours = [key for key in scores if key.startswith(own)]
    assert ours and len(scores) > 2 * len(ours), "baselines"
    curves = [found[key] for key in ("losses", "validation", "curves") if key in found]
    assert len(curves) == 1
    for values in scores, *curves:
        pairs = [
            (numbers_in(value), numbers_in(values[key.replace(own, HOSTS[own])]))
            for key, value in values.items()
            if key.startswith(own)
        ]
        assert pairs and all(ours for ours, _ in pairs)
        for ours, theirs in pairs:
            # Of accuracies, one example of some hundred may be told otherwise.
            np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=7e-3)
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert (path.with_suffix("") / "saved_model.pb").exists()
    assert path.with_suffix(".npz").exists()
    model = path.with_suffix(".keras").read_bytes()
    config = zipfile.ZipFile(io.BytesIO(model)).read("config.json")
    assert own.encode() in config and f'"{HOSTS[own]}"'.encode() not in config
    # What is stored beside it are the outputs of the SavedModel, and its gradients; the
    # language model compares its outputs itself, and stores no gradient.
    if path.stem.startswith("character_language_model"):
        return
    check = EXAMPLES.parent / "saved_models" / "check.py"
    checked = run([check, "--directory", path.parent], path.parent)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def numbers_in(value):
    """All numbers in lists and dicts of them, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in numbers_in(part)]
    return [value]


def check_results_of_strategies(folder):
    """The same losses, each of its own batch, and checkpoints of each strategy."""
    names = ["one", "mirrored", "multiworker"]
    files = [folder / f"distributed_{name}.json" for name in names]
    one, *others = (list(json.loads(file.read_text()).values()) for file in files)
    assert len(set(one)) == 10
    for losses in others:
        np.testing.assert_allclose(losses, one, rtol=FLOAT32)
    for name in names:
        assert (folder / f"distributed_{name}" / "ckpt-10.index").exists()


def check_results_of_digits(path):
    """At first the gradient shrinks or grows as the gain says, unless it is clipped."""
    (found,) = json.loads(path.read_text())["seeds"]
    assert len(found) == 7
    ratios = {}
    for name, network in found.items():
        assert len(network["after"]["mean_adjoint"]) == 64
        assert len(network["accuracy"]) == 1 and 0 < network["accuracy"][0] < 1
        first, *_, last = network["before"]["mean_adjoint"]
        ratios[name] = first / last
    assert ratios["small"] <= 0.5**63
    assert ratios["small"] < ratios["orthogonal"] < 1 < ratios["large"]
    assert ratios["LSTM, forget 0"] < ratios["LSTM, forget 1"] < 1
    first, *_, last = found["clipped"]["before"]["mean_adjoint"]
    assert first <= last * 1.001
    assert path.with_suffix(".png").stat().st_size > 10_000


KIND = {"units": (3, "units"), "rate": (0.1, "rate")}
KIND = {"parse": "arguments", "doc": "Flowers.", "smoke": {}} | KIND


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("common", "--units 0", "--units must be a positive number. Received: 0"),
        ("common", "--units many", "invalid int value: 'many'"),
        ("common", "--rate nan", "--rate must be a positive number. Received: nan"),
        ("common", "--seed=-1", "--seed must be in 0 ... 2**32 - 11. Received: -1"),
        ("common", f"--output-dir {__file__}", "--output-dir must be a folder"),
        ("character_language_model", "--units 0", "--units must be a positive number"),
        ("character_language_model", "--seed=-1", "--seed must be in 0 ... 2**32 - 1"),
        ("character_language_model", "--layer tanh", "invalid choice: 'tanh'"),
        ("distributed", "--workers 0", "--workers must be a positive number"),
        ("distributed", "--strategy all", "invalid choice: 'all'"),
        ("long_sequences", "--pieces 1", "--pieces must be at least 2"),
        ("long_sequences", "--steps 0", "--steps must be a positive number"),
        ("long_sequences", "--updates 15", "--updates must be in tens"),
        ("memory_span", "--lag 3", "--lag must be at least 4"),
        ("memory_span", "--timesteps 30", "--timesteps longer. Received"),
        ("memory_span", "--seeds 0", "--seeds must be a positive number"),
        ("streaming", "--k1 13", "--k1 must be at most --k2. Received: 13, 12"),
        ("streaming", "--updates 15", "--updates must be in tens"),
        ("streaming", "--seed=-1", "--seed must be in 0 ... 2**32 - 1"),
        ("vanishing_and_exploding", "--large 0.9", "Received: --small 0.5, --large 0"),
        ("vanishing_and_exploding", "--seeds 0", "--seeds must be a positive number"),
    ],
)
def test_bad_argument_is_named(name, arguments, message, capsys):
    with pytest.raises(SystemExit):
        arguments_of(name, arguments, **(KIND if name == "common" else {}))
    assert message in capsys.readouterr().err


# --- The character language model


def test_text_repeats_no_paragraph():
    text = load("character_language_model").read_text()
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))
    assert len(text) > 200_000


def test_targets_are_one_character_later():
    cut_windows = load("character_language_model").cut_windows
    inputs, targets = cut_windows(np.arange(11), 3)
    np.testing.assert_array_equal(inputs, [[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    np.testing.assert_array_equal(targets, inputs + 1)
    with pytest.raises(SystemExit, match="--window must be shorter.*Received: 11"):
        cut_windows(np.arange(11), 11)


def test_counts_of_an_alternating_text():
    demo = load("character_language_model")
    unigram, bigram = demo.count_bits(np.arange(1000) % 2, np.arange(10) % 2, 2)
    assert unigram == pytest.approx(1.0, abs=1e-12)  # both characters equally often
    # 500 of "01" and 499 of "10", each smoothed by one: 5 and 4 pairs are scored.
    expected = 5 * math.log2(501 / 502) + 4 * math.log2(500 / 501)
    assert bigram == pytest.approx(-expected / 9, abs=1e-12)


@pytest.mark.parametrize(
    "layer",
    ["lstm", *(pytest.param(n, marks=pytest.mark.slow) for n in ("rnn", "gru"))],
)
def test_text_is_continued_as_the_model_predicts(layer):
    """Character by character, from the states that the last one left."""
    demo = load("character_language_model")
    demo.keras.utils.set_random_seed(0)
    args = arguments_of(
        "character_language_model", f"--units 6 --temperature 1e-6 --layer {layer}"
    )
    recurrent = demo.LAYERS[layer][0](6, return_sequences=True)
    model = demo.build_model(recurrent, 5)
    random = np.random.default_rng(3)
    weights = [random.normal(size=w.shape) for w in model.get_weights()]
    model.set_weights(weights)
    text = demo.generate(model, list("abcde"), "dab", 9, args)
    assert len(text) == 12 and text.startswith("dab")
    ids = np.array([["abcde".index(c) for c in text]])
    # At so low a temperature the likeliest character is drawn.
    likeliest = np.argmax(model(ids[:, :-1]), axis=-1)
    np.testing.assert_array_equal(ids[:, 3:], likeliest[:, 2:])
    assert len(set(text)) > 2


@pytest.mark.slow
def test_saved_model_that_predicts_otherwise_is_an_error(monkeypatch, tmp_path):
    demo = load("character_language_model")
    model = demo.build_model(demo.BPTTRNN(4, return_sequences=True), 5)
    export = model.export

    def export_other_weights(*args, **kwargs):
        model.set_weights([w + 0.1 for w in model.get_weights()])
        export(*args, **kwargs)

    monkeypatch.setattr(model, "export", export_other_weights)
    characters = np.arange(12, dtype="int32").reshape(2, 6) % 5
    with pytest.raises(SystemExit, match="does not predict the same"):
        demo.save_and_reload(model, characters, tmp_path / "model")


# --- Memory span, vanishing and exploding


@pytest.mark.slow
def test_memory_span_of_a_short_lag():
    memory_span = load("memory_span")
    args = arguments_of("memory_span", "--lag 8 --features 8 --units 24")
    policies = None, *(memory_span.Truncation(k, stride=1) for k in (4, 9))
    full, short, enough = (memory_span.train(each, 0, args)[0] for each in policies)
    assert full < 0.05 and enough < full + 0.05 and short > 0.7


def test_targets_are_the_first_feature_a_lag_ago():
    memory_span, args = load("memory_span"), arguments_of("memory_span")
    x, y = memory_span.sequences(np.random.default_rng(0), 2, args)
    assert x.shape == (2, 60, 16) and y.shape == (2, 30, 1)
    np.testing.assert_array_equal(y[:, 7, 0], x[:, 7, 0])
    # The model drops as many outputs before the first that is reported, of step 31.
    model = memory_span.build_model(None, args)
    moved = x.copy()
    moved[:, 31:] += 1
    difference = np.abs(model(moved) - model(x)).max(axis=(0, 2))
    assert difference[0] == 0 and (difference[1:] > 0).all()


def test_networks_differ_in_the_gain_alone():
    build = load("vanishing_and_exploding").build_model
    args = arguments_of("vanishing_and_exploding")
    one, other = (build(n, 3, args).get_weights() for n in ("orthogonal", "large"))
    one[1] *= 1.5
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


# --- Long sequences


@pytest.fixture
def pieces():
    """Arguments of sequences of a few short pieces."""
    line = "--pieces 5 --steps 7 --features 6 --units 3 --batch-size 4"
    return arguments_of("long_sequences", line)


def test_pieces_are_the_same_whenever_asked_for(pieces):
    piece = load("long_sequences").piece
    x, y, weights = zip(*(piece(3, place, pieces) for place in range(5)), strict=True)
    np.testing.assert_array_equal(piece(3, 2, pieces)[0], x[2])
    for other in (x[1], piece(4, 2, pieces)[0]):
        assert not np.isclose(other, x[2]).any()
    for target in y:
        np.testing.assert_array_equal(target[:, 0], x[0][:, 0, 0])
    assert np.sum(weights) == pytest.approx(1)
    assert [bool(weight) for weight in weights] == [False, False, True, True, True]


@pytest.mark.slow
def test_pieces_have_the_gradient_of_the_whole(pieces):
    long_sequences = load("long_sequences")
    network = long_sequences.Network(pieces, 1)
    # The state matters, and all of it, where the recurrent kernel is no identity.
    U = np.random.default_rng(0).normal(0, 0.6, (3, 3))
    network.rnn.cell.recurrent_kernel.assign(U)
    loss, gradients = long_sequences.two_sweeps(network, 0, pieces)
    expected, whole = long_sequences.in_one_call(network, 0, pieces)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert long_sequences.difference(gradients, whole) < 1e-5
    with pytest.raises(SystemExit, match="The gradients differ by"):
        long_sequences.difference([g * 1.001 for g in gradients], whole)
    stored, again = (long_sequences.in_memory(c, 50)[1] for c in (None, "sqrt"))
    assert long_sequences.difference(again, stored) < 1e-5


def test_memory_is_left_out_where_it_is_unknown(monkeypatch, tmp_path):
    long_sequences = load("long_sequences")
    monkeypatch.setattr(long_sequences, "PROCESS", tmp_path / "nowhere")
    assert long_sequences.peak_mb(lambda: None) is None
    assert long_sequences.shown(long_sequences.over(None, None)).startswith("not")
    assert long_sequences.shown(long_sequences.over(12.0, 5.0)) == "7 MB"


@pytest.mark.slow
def test_first_number_is_learned_by_two_sweeps_alone(pieces):
    long_sequences = load("long_sequences")
    pieces.updates, pieces.batch_size, pieces.learning_rate = 150, 32, 0.03
    network = long_sequences.Network(pieces, pieces.updates)
    _, untrained, best = long_sequences.baselines(network).values()
    full = list(long_sequences.train_by_two_sweeps(network, pieces))
    short = list(long_sequences.train_piece_by_piece(pieces))
    assert best < untrained < 0.95
    assert np.mean(full[-15:]) < 0.1
    assert np.mean(short[-15:]) > untrained - 0.2


# --- Many devices


@pytest.mark.parametrize("pipelines", [1, 2])
def test_replicas_share_a_global_batch(pipelines):
    distributed = load("distributed")
    args = arguments_of("distributed", "--batch-size 12 --updates 3")
    contexts = [
        distributed.tf.distribute.InputContext(pipelines, index, 4)
        for index in range(pipelines)
    ]
    shares = [list(distributed.shares(context, 1, args)) for context in contexts]
    assert sum(map(len, shares)) == 2 * 4
    each = 4 // pipelines
    batches = [distributed.global_batch(step, args) for step in (1, 2)]
    for number, batch in enumerate(batches):
        of_step = [s for own in shares for s in own[number * each :][:each]]
        for share, whole in zip(zip(*of_step, strict=True), batch, strict=True):
            np.testing.assert_array_equal(np.concatenate(share), whole)
    assert not np.isclose(batches[0][0], batches[1][0]).any()


@pytest.mark.slow
def test_resumed_training_goes_on():
    def losses(folder, more):
        line = "--batch-size 4 --units 3 --save-every 2 --output-dir"
        args = arguments_of("distributed", f"{line} {folder} --updates {more}")
        return load("distributed").train("one", args)

    whole = losses("whole", "5")
    assert list(losses("parts", "3")) == [1, 2, 3]
    resumed = losses("parts", "5 --resume")
    assert resumed == {step: whole[step] for step in (4, 5)}


def test_what_cannot_be_waited_for_is_named():
    """A TPU that is not there; a worker that failed beside one that runs."""
    distributed = load("distributed")
    with pytest.raises(SystemExit, match="--strategy tpu needs a Cloud TPU.*--tpu ''"):
        distributed.tpu_strategy("")
    ended, runs, failed = (mock.Mock(poll=lambda c=c: c) for c in (0, None, 3))
    distributed.wait_for([ended, ended])
    with pytest.raises(SystemExit, match=r"A worker failed.*\[None, 3\]"):
        distributed.wait_for([runs, failed])


# --- Streams


def test_stream_goes_on_from_chunk_to_chunk():
    streaming = load("streaming")
    chunks = itertools.islice(streaming.stream(0, 3, 5), 400)
    x, y = (np.concatenate(t, axis=1)[..., 0] for t in zip(*chunks, strict=True))
    near, far = x[:, 5:-3], x[:, :-8]
    for a, b in itertools.product([0, 1], repeat=2):
        share = y[:, 8:][(near == a) & (far == b)].mean()
        assert share == pytest.approx(streaming.chances(a, b), abs=0.05)
    assert (y[:, 8:][(near == 1) & (far == 0)] == 1).all()


def test_baselines_of_the_stream():
    def entropy(p):
        return -sum(q * math.log(q) for q in (p, 1 - p) if q)

    expected = [
        entropy(0.625),
        (entropy(0.375) + entropy(0.875)) / 2,
        (entropy(0.5) + entropy(0.25) + entropy(0.75)) / 4,
    ]
    found = list(load("streaming").baselines().values())
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.slow
def test_streams_are_learned():
    streaming = load("streaming")
    args = arguments_of("streaming", "--updates 400 --learning-rate 0.01")
    _, near, both = streaming.baselines().values()
    streaming.keras.utils.set_random_seed(0)
    for losses in streaming.chunk_by_chunk(args), streaming.tbptt(4, 12, args):
        assert both < losses[-1] + 0.02 and losses[-1] < min(near, losses[0])


# --- Numbers that are rewritten

SPOKEN = "oh one two three four five six seven eight nine ten eleven twelve thirteen"
SPOKEN += " fourteen fifteen sixteen seventeen eighteen nineteen"
SPOKEN = dict(zip(SPOKEN.split(), range(20), strict=True))
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
SPOKEN |= dict(zip(TENS.split(), range(20, 100, 10), strict=True))


def hear(sentence):
    """The digits of a sentence, each word alone: numbers below 100, said once or more."""
    digits, times = "", 1
    for word in sentence.split():
        if word in ("double", "triple"):
            times = 2 + (word == "triple")
        else:
            digits += times * str(sum(SPOKEN[part] for part in word.split("-")))
            times = 1
    return digits


def test_numbers_are_read_out_right_and_once():
    rewrite_numbers = load("rewrite_numbers")
    drawn = rewrite_numbers.draw_examples([3000, 200, 100], 1)
    assert [len(pairs) for pairs in drawn] == [3000, 200, 100]
    pairs = list(itertools.chain(*drawn))
    assert len({number for _, number in pairs}) == 3300
    assert all(hear(sentence) == number for sentence, number in pairs)
    assert {len(number) for _, number in pairs} == set(range(3, 9))
    # Every word is said, and what can be said in two ways is said in both.
    said = {part for s, _ in pairs for part in s.replace("-", " - ").split()}
    assert said == set(rewrite_numbers.WORDS) - {""}
    text = "; ".join(sentence for sentence, _ in pairs)
    for way in "forty-two", "four two", "ten", "one oh", "eleven", "double one":
        assert text.count(way) > 5
    assert drawn == rewrite_numbers.draw_examples([3000, 200, 100], 1)
    assert drawn != rewrite_numbers.draw_examples([3000, 200, 100], 2)


def test_tokens_of_a_number():
    rewrite_numbers = load("rewrite_numbers")
    pairs = [("double oh twenty-seven", "0027"), ("one three nine", "139")]
    (((words, before), after),) = rewrite_numbers.batches(pairs, 2)
    said = [" ".join(rewrite_numbers.WORDS[i] for i in row if i) for row in words]
    assert said == ["double oh twenty - seven", "one three nine"]
    np.testing.assert_array_equal(before[0], [12, 1, 1, 3, 8, 0, 0, 0, 0])
    np.testing.assert_array_equal(after[0], [1, 1, 3, 8, 11, 0, 0, 0, 0])
    np.testing.assert_array_equal(after[1], [2, 4, 10, 11, 0, 0, 0, 0, 0])
    assert rewrite_numbers.read_out(np.array(after)) == ["0027", "139"]


@pytest.fixture
def writer():
    """A model that is sure of nothing, sentences, its states for these, and its step."""
    rewrite_numbers = load("rewrite_numbers")
    rewrite_numbers.keras.utils.set_random_seed(0)
    model, random = rewrite_numbers.build_model(6), np.random.default_rng(0)
    weights = model.get_weights()
    model.set_weights([w + random.normal(0, 0.5, w.shape) for w in weights])
    words = random.integers(1, len(rewrite_numbers.WORDS), (4, 5), "int32")
    words[1, 3:] = 0
    reader, step = rewrite_numbers.reader_and_step(model)
    return model, words, reader(words), step


def test_greedy_is_a_beam_of_one_and_what_is_counted(writer):
    rewrite_numbers, (model, words, state, step) = load("rewrite_numbers"), writer
    tokens, log_p = rewrite_numbers.greedy(step, state, 9)
    beam, total = rewrite_numbers.beam_search(step, state, 9, 1)
    assert beam.shape == (4, 1, 9) and len({*map(tuple, tokens)}) > 1
    np.testing.assert_array_equal(beam[:, 0], tokens)
    np.testing.assert_allclose(total[:, 0], log_p, rtol=FLOAT32)
    # The share that is rewritten without an error, where the digits before are told.
    other = tokens.copy()
    other[2, 0] = 1 + other[2, 0] % 10
    for target, share in (tokens, 1.0), (other, 0.75):
        before = np.insert(target[:, :-1], 0, rewrite_numbers.START, axis=1)
        # Logits for padding are in the way of the model, not of the decoder.
        logits = model([words, before]).numpy()
        logits[..., 0] = logits.min() - 1
        metric = rewrite_numbers.Exact()
        metric.update_state(target, logits)
        assert metric.result() == share


def test_widest_beam_finds_all_there_is(writer):
    rewrite_numbers, (model, words, state, step) = load("rewrite_numbers"), writer
    pad, end = rewrite_numbers.PAD, rewrite_numbers.END

    def can_be_written(s):
        """Padding after the end, and only there."""
        pairs = itertools.pairwise(s)
        return s[0] and all((b == pad) == (a in (pad, end)) for a, b in pairs)

    # All that can be written in three steps.
    written = filter(can_be_written, itertools.product(range(12), repeat=3))
    written = np.array(list(written), "int32")
    assert len(written) == 1000 + 100 + 10 + 1
    before = np.insert(written[:, :2], 0, rewrite_numbers.START, axis=1)
    beam, total = rewrite_numbers.beam_search(step, state, 3, 1111)
    narrow, _ = rewrite_numbers.beam_search(step, state, 3, 4)
    _, likeliest = rewrite_numbers.greedy(step, state, 3)
    for i, sentence in enumerate(words):
        # Told the digits before, all steps at once.
        logits = model([np.tile(sentence, (1111, 1)), before]).numpy()
        p = np.exp(logits[..., 1:])
        log_p = np.log(p / p.sum(axis=-1, keepdims=True))
        chosen = np.take_along_axis(log_p, np.maximum(written - 1, 0)[..., None], -1)
        expected = np.sum(chosen[..., 0], axis=1, where=written != pad)
        order = np.argsort(-expected)
        np.testing.assert_allclose(total[i], expected[order], rtol=FLOAT32)
        np.testing.assert_array_equal(beam[i, :3], written[order[:3]])
        places = [np.flatnonzero((written == s).all(axis=1)).item() for s in beam[i]]
        np.testing.assert_allclose(total[i], expected[places], rtol=FLOAT32)
        assert {*map(tuple, narrow[i])} <= {*map(tuple, written)}
    assert (total[:, 0] > likeliest - 1e-5).all()
    assert (total[:, 0] > likeliest + 0.01).any()


# --- Sunspots, digits


def test_autoregression_finds_the_rule_of_a_series():
    sunspots = load("sunspots")
    values = np.random.default_rng(0).normal(size=9).tolist()
    while len(values) < 260:
        values.append(1 + 0.9 * values[-1] - 0.5 * values[-9])
    found = sunspots.autoregression(np.array(values))
    np.testing.assert_allclose(found, values[sunspots.TEST :], atol=1e-6)


def test_forecasts_see_only_years_before():
    """Of the test, and of what decides when to stop; scaled errors weigh the same."""
    sunspots = load("sunspots")
    series = 1 + np.random.default_rng(0).random(309).astype("float32")
    for inputs, targets, weights in sunspots.training_batches(series, 3).take(2):
        assert inputs.shape[1:] == targets.shape[1:] == (50, 1)
        np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
        assert not np.any(weights[:, : sunspots.UNSEEN])
        # A window of training years, times a factor: the squares of errors are even.
        factor = 1 / np.sqrt(weights[:, -1:])
        window = np.array(inputs)[..., 0] / factor
        starts = np.lib.stride_tricks.sliding_window_view(series, 50)
        close = np.abs(window[:, np.newaxis] - starts).max(axis=-1) < 1e-4
        places = [np.flatnonzero(row).item() for row in close]
        assert max(places) + 50 < sunspots.VALIDATION
        assert 0.6 <= factor.min() < 0.8 and 1.25 < factor.max() <= 1.65
    inputs, targets, weights = sunspots.validation_batch(series)
    assert inputs.shape == (3, sunspots.TEST - 1, 1)
    first = np.argmax(np.array(weights[1]) > 0)
    assert first == sunspots.VALIDATION - 1
    np.testing.assert_allclose(targets[1, first:, 0], series[170:221], rtol=1e-6)
    np.testing.assert_allclose(weights[:, -1] * [0.36, 1, 2.56], 1, rtol=1e-5)


def test_bits_of_histograms_by_hand():
    """Two training images of a label that differ in one pixel, asked of one of them."""
    images, labels = np.zeros((2, 8, 8), int), np.array([4, 4])
    images[1, 2, 5] = 16
    bits_of = load("draw_digits").bits_of_histograms
    # 2 of 2 with a tenth for each of 17 shades, in 63 pixels; 1 of 2 in one.
    expected = -63 * np.log2(2.1 / 3.7) - np.log2(1.1 / 3.7)
    bits = bits_of((images, labels), (images[1:], labels[1:]))
    assert bits == pytest.approx(expected)


def test_each_row_drawn_is_the_next_input():
    draw_digits = load("draw_digits")
    draw_digits.keras.utils.set_random_seed(1)
    model = draw_digits.build_model(12)
    random = np.random.default_rng(1)
    weights = [w + random.normal(size=w.shape) for w in model.get_weights()]
    model.set_weights(weights)
    labels = np.array([7, 1, 7], "int32")
    # At so low a temperature the likeliest shade is drawn: what the whole model names,
    # where it is shown the rows before.
    drawn = draw_digits.drawn(model, labels, 1e-6, 0)
    assert drawn.shape == (3, 8, 8) and np.std(drawn) > 1
    named = np.argmax(model([labels, draw_digits.rows_before(drawn)]), axis=-1)
    np.testing.assert_array_equal(named, drawn)
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert (draw_digits.drawn(model, labels, 5.0, 0) != drawn).mean() > 0.1


def test_forecasts_of_a_year_do_not_see_it():
    sunspots = load("sunspots")
    sunspots.keras.utils.set_random_seed(0)
    model = sunspots.build_model(5)
    model.layers[-1].bias.assign([5.0])  # a number of spots is not below 0
    series = 1 + np.random.default_rng(1).random(309).astype("float32")
    expected = sunspots.forecast(model, series)
    assert len(expected) == 309 - sunspots.TEST
    moved = series.copy()
    moved[sunspots.TEST + 20] += 1
    found = sunspots.forecast(model, moved)
    np.testing.assert_array_equal(found[:21], expected[:21])
    assert found[21] != expected[21]


def test_nearest_mean_by_hand():
    """Of the digit 1 the mean is farther away than the nearest image."""
    read_digits = load("read_digits")
    shades = {0: [0, 0, 6], 1: [9, 9, 10], **{d: [20 * d] for d in range(2, 10)}}
    labels = np.array([digit for digit, each in shades.items() for _ in each])
    x = np.zeros((len(labels), 8, 8), "float32")
    x[:, 3, 5] = np.concatenate(list(shades.values()))
    test = np.zeros((4, 8, 8), "float32")
    test[:, 3, 5] = 5.9, 1, 9.2, 101  # nearest mean: 1 (9.33), 0 (2), 1, 5
    found = read_digits.baselines((x, labels), (test, np.array([0, 0, 1, 5])))
    assert found == {"most frequent": 0.5, "nearest mean": 0.75}


def test_digits_are_read_by_a_layer_that_is_known(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["read_digits.py", "--layer", "tanh"])
    with pytest.raises(SystemExit, match="--layer must be rnn, lstm or gru.*tanh"):
        load("read_digits").main()


def test_last_belief_is_what_the_model_says():
    read_digits = load("read_digits")
    args = argparse.Namespace(layer="lstm", units=3)
    model = read_digits.build_model(read_digits.LAYERS["lstm"], 1, 3)
    images = np.random.default_rng(0).random((2, 8, 8), "float32")
    beliefs = read_digits.beliefs(model, images, args)
    assert beliefs.shape == (2, 64, 10)
    expected = read_digits.tf.nn.softmax(model(images.reshape(2, 64, 1)))
    np.testing.assert_allclose(beliefs[:, -1], expected, rtol=1e-5)
    assert np.abs(beliefs[:, -1] - beliefs[:, 5]).max() > 1e-4
