"""Tests of this folder import scripts, as these import each other."""

import importlib
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = "benchmarks", "benchmarks/accelerators", "examples"

sys.path += [str(ROOT / folder) for folder in SCRIPTS]


def import_beside_its_own(name, other):
    """A script that imports another, which has the name of a module of the tests."""
    of_tests = sys.modules.pop(other, None)
    sys.path.insert(0, str(ROOT / "benchmarks/accelerators"))
    try:
        importlib.import_module(name)
    finally:
        sys.path.pop(0)
        del sys.modules[other]
        if of_tests:
            sys.modules[other] = of_tests


import_beside_its_own("export", "configurations")
