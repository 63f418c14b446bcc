"""What the Makefile's commands overwrite, what they remove, and that they say so."""

import configparser
import os
import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# What writes files that git keeps, among the lines that the commands run.
OVERWRITES = re.compile(
    r"--output-dir (saved_models|docs)|docs/build\.py|benchmarks/report\.py"
    r"|compile\.py .*--write|ruff format \."
)

pytestmark = pytest.mark.skipif(
    not (shutil.which("make") and shutil.which("git") and (ROOT / ".git").exists()),
    reason="needs make, git and a clone",
)


def output_of(*command, folder=ROOT):
    # Whatever make runs these tests: its flags are not those of another.
    own = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    finished = subprocess.run(
        command, cwd=folder, env=own, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """The lines that a command would run, in an environment that is not there yet."""
    folder = tmp_path_factory.mktemp("environment") / ".venv"
    return lambda target: output_of("make", "-n", target, f"VENV={folder}")


def test_what_overwrites_files_of_git_says_so(dry_run):
    helps = dict(re.findall(r"^make ([-\w]+) +(.*)$", output_of("make"), re.M))
    says = {name for name, text in helps.items() if "overwrites" in text}
    does = {name for name in helps if OVERWRITES.search(dry_run(name))}
    assert says == does
    assert {"examples", "docs"} <= does and not {"demo", "flow"} & does


def test_models_of_git_come_from_make_examples(dry_run):
    kept = output_of("git", "ls-files", "saved_models/*.json").split()
    lines = dry_run("examples")
    for path in kept:
        assert pathlib.Path(path).stem in lines
    assert "--output-dir saved_models" in lines


def test_demo_brings_what_draws(dry_run):
    assert ".[plot]" in dry_run("demo")
    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg")
    assert "matplotlib" in options["options.extras_require"]["plot"]


def test_clean_removes_what_was_generated_alone(tmp_path):
    kept = output_of("git", "ls-files", "Makefile", ".gitignore", "saved_models")
    generated = [
        ".venv/bin/python",
        "build/examples/model.keras",
        "keras_bptt/__pycache__/layers.pyc",
        "saved_models/flowers.keras",
        "saved_models/rewrite_numbers.npz",
        "saved_models/rewrite_numbers/saved_model.pb",
    ]
    others = [
        "saved_models/own.keras",
        "saved_models/own/saved_model.pb",
        "saved_models/flowers_own.keras",
    ]
    for path in kept.split():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    for command in "init -q", "add .", "-c user.name=x -c user.email=x commit -qm x":
        output_of("git", *command.split(), folder=tmp_path)
    for path in generated + others:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    said = output_of("make", "clean", folder=tmp_path)
    assert not [path for path in generated if (tmp_path / path).exists()]
    assert all((tmp_path / path).exists() for path in others)
    assert output_of("git", "status", "--porcelain", folder=tmp_path) == ""
    for path in ".venv", "build", "__pycache__", "saved_models/rewrite_numbers/":
        assert f"Removing {path}\n" in said
