"""The gradient's modules with one term broken, to show that a check can fail."""

import importlib
import inspect
import sys
import types
from unittest import mock

import pytest
from helpers import without_graphs

import keras_bptt

# Lower modules first: each is executed again, on top of the copies before it.
MODULES = tuple(
    "execution explicit tensors activations loops scans passes masks blocks shards windows "
    "sliding residuals fused recurrence truncated probe".split()
)


def copy_of_modules(broken=None, old=None, new=None):
    """Fresh copies of `MODULES` as attributes; in `broken`, `old` reads `new`.

    `old` must occur exactly once, so that a mutation cannot silently miss its target when
    the code changes: adapt the list of mutations then.
    """
    copies = types.SimpleNamespace()
    # A module finds another in `sys.modules` or, imported as a whole, in the package.
    with mock.patch.dict(sys.modules), mock.patch.dict(vars(keras_bptt)):
        for name in MODULES:
            full = f"keras_bptt.{name}"
            source = inspect.getsource(importlib.import_module(full))
            if name == broken:
                assert source.count(old) == 1, f"{name}.py has not one {old!r}"
                source = source.replace(old, new)
            sys.modules[full] = copy = types.ModuleType(full)
            exec(compile(source, f"<copy of {full}>", "exec"), copy.__dict__)
            setattr(copies, name, copy)
            setattr(keras_bptt, name, copy)
    return copies


def assert_caught(check, module, old, new):
    """Assert that `check(modules)` fails once `old` reads `new` in `module`."""
    modules = copy_of_modules(module, old, new)
    with without_graphs(), pytest.raises(AssertionError):
        check(modules)


def each(*checks):
    """The checks as one."""

    def check(modules):
        for one in checks:
            one(modules=modules)

    return check


def mutation_tests(checks, mutations):
    """Two tests: each of the checks passes on copies, and catches its mutations.

    Args:
        checks: functions of the modules, by name.
        mutations: of each the name of the check that catches it, what is broken, the
            module, text in it and what that then reads.
    """

    @pytest.mark.parametrize("name", checks)
    def test_checks_pass_on_copies(name):
        """The control of the mutations: a copy that nothing is changed in passes."""
        with without_graphs():
            checks[name](copy_of_modules())

    @pytest.mark.parametrize(
        ("name", "module", "old", "new"),
        [(name, *rest) for name, _, *rest in mutations],
        ids=[f"{what}, {name}" for name, what, *_ in mutations],
    )
    def test_mutation_is_caught(name, module, old, new):
        assert_caught(checks[name], module, old, new)

    return test_checks_pass_on_copies, test_mutation_is_caught
