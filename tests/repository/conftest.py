"""Tests of this folder import scripts, as these import each other."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = "benchmarks", "benchmarks/accelerators", "examples"

sys.path += [str(ROOT / folder) for folder in SCRIPTS]
