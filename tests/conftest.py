"""Fixtures that every test shares."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import MODES

import keras_bptt.engine.blocks
import keras_bptt.engine.draws
import keras_bptt.engine.loops

# So that a few steps are some blocks, or some and a shorter one, and some iterations.
SMALL = {
    keras_bptt.engine.blocks: {
        "NUMBERS": 1,
        "FEWEST_STEPS": 3,
        "COMPILED_SIZE": 4,
        "LOOP_SIZE": 4,
    },
    keras_bptt.engine.draws: {"GROUP": 3, "MOST": 2},
    keras_bptt.engine.loops: {"STEPS_PER_ITERATION": 2},
}
USUAL = {
    module: {name: getattr(module, name) for name in SMALL[module]} for module in SMALL
}
for module, sizes in SMALL.items():
    vars(module).update(sizes)


@pytest.fixture
def usual_sizes(monkeypatch):
    """Blocks as users have them, for sequences as long as theirs."""
    for module, sizes in USUAL.items():
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)


def pytest_configure(config):
    # Keras' own tests, which run here on this layer too, are marked with it.
    config.addinivalue_line("markers", "requires_trainable_backend: a mark of Keras")


def pytest_report_header():
    return f"TensorFlow {tf.__version__}, Keras {keras.__version__}, NumPy {np.__version__}"


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)


@pytest.fixture(params=MODES)
def mode(request):
    """The name of a mode of execution: eager, graph or xla."""
    return request.param
