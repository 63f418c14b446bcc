"""Keras' own tests of SimpleRNN and its wrappers, with BPTTRNN in its place.

They ship in the wheel of Keras, under `keras.src`, which is not a public interface; a
version of Keras without them skips this file. The package itself uses none of it.
"""

import importlib
import types

import pytest

from keras_bptt import BPTTRNN

NAMES = ("simple_rnn_test", "bidirectional_test", "rnn_test", "time_distributed_test")

try:
    host = importlib.import_module("keras.src.layers")
    modules = [
        importlib.import_module(f"keras.src.layers.rnn.{name}") for name in NAMES
    ]
except ImportError as error:
    pytest.skip(f"this Keras ships no tests: {error}", allow_module_level=True)

# Keras' run_layer_test trains on a generator, of which some versions warn.
pytestmark = pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")

# Each test module reads `layers.SimpleRNN` from its own `layers`.
layers = types.SimpleNamespace(**vars(host))
layers.SimpleRNN = BPTTRNN
for name, module in zip(NAMES, modules, strict=True):
    module.layers = layers
    for test_case in list(vars(module).values()):
        if isinstance(test_case, type) and test_case.__module__ == module.__name__:
            if test_case.__name__.endswith("Test"):
                # Two of the files name their class SimpleRNNTest.
                unique = f"{test_case.__name__}_{name}"
                globals()[unique] = type(unique, (test_case,), {"__module__": __name__})
del module, test_case

calls = []


@pytest.fixture(autouse=True)
def _counted(monkeypatch):
    inner_loop = BPTTRNN.inner_loop

    def counting(self, *args, **kwargs):
        calls.append(self)
        return inner_loop(self, *args, **kwargs)

    monkeypatch.setattr(BPTTRNN, "inner_loop", counting)


def test_substitution_took_place():
    """Runs last in this file: the tests above went through the layer."""
    assert len(calls) >= 20
