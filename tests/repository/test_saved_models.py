"""The models in saved_models/ give what is stored beside them, without the package."""

import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "saved_models"
NAMES = ["draw_digits", "flowers", "read_digits", "sunspots"]


def check(folder):
    return subprocess.run(
        [sys.executable, FOLDER / "check.py", "--directory", folder],
        capture_output=True,
        text=True,
        timeout=300,
    )


def copy(name, folder):
    shutil.copytree(FOLDER / name, folder / name)
    shutil.copy(FOLDER / f"{name}.npz", folder)


@pytest.mark.parametrize("name", NAMES)
def test_model_is_small_and_complete(name):
    files = [path for path in (FOLDER / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 300_000
    stored = np.load(FOLDER / f"{name}.npz")
    assert stored["outputs"].shape == stored["cotangents"].shape
    assert np.std(stored["cotangents"]) > 0.5
    gradients = [stored[key] for key in stored if key.startswith("gradient_")]
    assert len(gradients) >= 5
    # Of the weights only the recurrent kernel, and only where one step begins at zeros.
    still = [array.shape for array in gradients if not array.any()]
    assert still == ([(16, 16)] if name == "flowers" else [])


@pytest.mark.slow
def test_models_give_what_is_stored(tmp_path):
    finished = check(tmp_path)
    assert finished.returncode != 0 and "holds no SavedModel" in finished.stderr
    for name in NAMES:
        copy(name, tmp_path)
    finished = check(tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert [line.split()[0] for line in finished.stdout.splitlines()[1:]] == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("key", ["outputs", "gradient_1"])
def test_another_number_is_found(tmp_path, key):
    copy("sunspots", tmp_path)
    path = tmp_path / "sunspots.npz"
    stored = dict(np.load(path))
    stored[key].flat[3] += 0.01 * np.abs(stored[key]).max()
    np.savez(path, **stored)
    finished = check(tmp_path)
    assert finished.returncode != 0
    assert "A difference of more than" in finished.stderr
