"""Every example runs in its short form, and the language model's parts are right."""

import importlib.util
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"

# What the output of each example must hold. An example that is not listed fails.
KEY_LINES = {
    "character_language_model.py": [
        "Training with keras_bptt.BPTTRNN",
        "Training with keras.layers.SimpleRNN",
        "bits per character",
        "bigram counts",
        "A sample at temperature 0.7",
        "character_language_model.keras: largest difference",
        "character_language_model, without keras_bptt: largest difference",
    ],
}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example_runs(name, tmp_path):
    finished = subprocess.run(
        [sys.executable, EXAMPLES / name, "--smoke", "--output-dir", tmp_path],
        capture_output=True,
        text=True,
        encoding="utf-8",
        # The same keras_bptt as here, installed or not.
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PYTHONIOENCODING": "utf-8",
        },
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    for line in KEY_LINES[name]:
        assert line in finished.stdout
    # Both layers have the same gradient: one short epoch leaves the same score.
    scores = {
        columns[0]: float(columns[1])
        for columns in map(str.split, finished.stdout.splitlines())
        if len(columns) == 3 and columns[0] in ("SimpleRNN", "BPTTRNN")
    }
    assert scores["BPTTRNN"] == pytest.approx(scores["SimpleRNN"], abs=0.01)


@pytest.fixture(scope="module")
def demo():
    """The language model's script as a module."""
    path = EXAMPLES / "character_language_model.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_text_repeats_no_paragraph(demo):
    text = demo.read_text()
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))
    assert len(text) > 200_000


def test_targets_are_one_character_later(demo):
    inputs, targets = demo.cut_windows(np.arange(11), 3)
    np.testing.assert_array_equal(inputs, [[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    np.testing.assert_array_equal(targets, inputs + 1)


def test_counts_of_an_alternating_text(demo):
    train, heldout = np.arange(1000) % 2, np.arange(10) % 2
    unigram, bigram = demo.count_bits(train, heldout, 2)
    assert unigram == pytest.approx(1.0, abs=1e-12)  # both characters equally often
    # 500 of "01" and 499 of "10", each smoothed by one: 5 and 4 pairs are scored.
    expected = 5 * math.log2(501 / 502) + 4 * math.log2(500 / 501)
    assert bigram == pytest.approx(-expected / 9, abs=1e-12)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--units", "0"], "--units must be a positive number. Received: 0"),
        (["--units", "many"], "invalid int value: 'many'"),
        (["--temperature", "nan"], "--temperature must be a positive number"),
        (["--learning-rate=-1"], "--learning-rate must be a positive number"),
        (["--seed=-1"], "--seed must be in 0 ... 2**32 - 1. Received: -1"),
        (["--output-dir", __file__], "--output-dir must be a folder"),
    ],
)
def test_bad_argument_is_named(demo, monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["character_language_model.py", *arguments])
    with pytest.raises(SystemExit):
        demo.parse_arguments()
    assert message in capsys.readouterr().err


def test_window_longer_than_the_text_is_named(demo):
    with pytest.raises(SystemExit, match="--window must be shorter.*Received: 11"):
        demo.cut_windows(np.arange(11), 11)


def test_saved_model_that_predicts_otherwise_is_an_error(demo, monkeypatch, tmp_path):
    model = demo.build_model(demo.BPTTRNN(4, return_sequences=True), 5)
    export = model.export

    def export_other_weights(*args, **kwargs):
        model.set_weights([w + 0.1 for w in model.get_weights()])
        export(*args, **kwargs)

    monkeypatch.setattr(model, "export", export_other_weights)
    characters = np.arange(12, dtype="int32").reshape(2, 6) % 5
    with pytest.raises(SystemExit, match="does not predict the same"):
        demo.save_and_reload(model, characters, tmp_path)
