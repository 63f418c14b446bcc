"""Keras' own tests of its recurrent layers and their wrappers, with ours in their place.

They ship in the wheel of Keras, under `keras.src`, which is not a public interface; a
version of Keras without them skips this file. The package itself uses none of it.
"""

import importlib
import types

import pytest

from keras_bptt import BPTTGRU, BPTTLSTM, BPTTRNN
from keras_bptt.layers.explicit_loop import ExplicitLoop

NAMES = ("simple_rnn_test", "lstm_test", "gru_test")
NAMES += ("bidirectional_test", "rnn_test", "time_distributed_test")

try:
    host = importlib.import_module("keras.src.layers")
    modules = [
        importlib.import_module(f"keras.src.layers.rnn.{name}") for name in NAMES
    ]
except ImportError as error:
    pytest.skip(f"this Keras ships no tests: {error}", allow_module_level=True)

# Keras' run_layer_test trains on a generator, of which some versions warn.
pytestmark = pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")

# They make layers with use_cudnn=True, which ours refuse, or expect Bidirectional to hand
# cuDNN what is computed here: see `test_gated`.
OF_CUDNN = "keeps_use_cudnn", "fused_lstm_eligibility", "fused_gru_eligibility"
LEFT_OUT = dict.fromkeys([f"test_{name}" for name in OF_CUDNN])

# Each test module reads `layers.SimpleRNN` and the others from its own `layers`.
layers = types.SimpleNamespace(**vars(host))
layers.SimpleRNN, layers.LSTM, layers.GRU = BPTTRNN, BPTTLSTM, BPTTGRU
for name, module in zip(NAMES, modules, strict=True):
    module.layers = layers
    for test_case in list(vars(module).values()):
        if isinstance(test_case, type) and test_case.__module__ == module.__name__:
            if test_case.__name__.endswith("Test"):
                # Two of the files name their class SimpleRNNTest.
                unique = f"{test_case.__name__}_{name}"
                globals()[unique] = type(
                    unique, (test_case,), {"__module__": __name__} | LEFT_OUT
                )
del module, test_case

calls = []


@pytest.fixture(autouse=True)
def _counted(monkeypatch):
    inner_loop = ExplicitLoop.inner_loop

    def counting(self, *args, **kwargs):
        calls.append(type(self))
        return inner_loop(self, *args, **kwargs)

    monkeypatch.setattr(ExplicitLoop, "inner_loop", counting)


def test_substitution_took_place():
    """Runs last in this file: the tests above went through the layers."""
    for layer in (BPTTRNN, BPTTLSTM, BPTTGRU):
        assert calls.count(layer) >= 20, layer
