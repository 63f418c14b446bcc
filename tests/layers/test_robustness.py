"""What goes wrong elsewhere: threads, chance, long runs, damaged files."""

import concurrent.futures
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import D, H, needs_keras, rng

from keras_bptt import BPTTRNN, Truncation


def small_model(**options):
    return keras.Sequential([keras.Input((None, D)), BPTTRNN(H, **options)])


# --- Threads


@pytest.mark.slow
def test_threads_share_an_exported_model(tmp_path):
    """Each finds what one alone finds, of inputs of different sizes at the same time."""
    model = small_model(truncation=Truncation(4, 2), return_sequences=True)
    model.export(tmp_path / "model", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "model")

    @tf.function(reduce_retracing=True)
    def graph(x):
        with tf.GradientTape() as tape:
            y = loaded.serve(x)
            loss = tf.reduce_sum(y**3)
        return y, *tape.gradient(loss, loaded.trainable_variables)

    inputs = [
        tf.constant(rng(i).normal(size=(1 + i % 3, 5 + i, D)), tf.float32)
        for i in range(12)
    ]
    expected = [[t.numpy() for t in graph(x)] for x in inputs]
    order = list(range(len(inputs))) * 4
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        found = list(
            threads.map(lambda i: [t.numpy() for t in graph(inputs[i])], order)
        )
    for i, tensors in zip(order, found, strict=True):
        for got, alone in zip(tensors, expected[i], strict=True):
            np.testing.assert_array_equal(got, alone)


# --- Chance

TWICE = """
import sys
import keras
import numpy as np
import tensorflow as tf
from keras_bptt import BPTTRNN, RandomizedTruncation

tf.config.experimental.enable_op_determinism()
x = np.random.default_rng(0).normal(size=(40, 9, 4)).astype("float32")
runs = []
for seed in (1, 1, 2):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((9, 4))])
    model.add(BPTTRNN(8, dropout=0.2, recurrent_dropout=0.2, return_sequences=True))
    model.add(BPTTRNN(6, truncation=RandomizedTruncation(3)))
    model.compile("adam", "mse")
    model.fit(x, x[:, -1, :1], batch_size=8, epochs=2, verbose=0)
    runs.append(np.concatenate([w.ravel() for w in model.get_weights()]))
assert np.isfinite(runs[0]).all()
assert np.any(runs[0] != runs[2]), "another seed draws nothing else"
sys.exit(int(np.any(runs[0] != runs[1])))
"""


def run(script, *arguments):
    finished = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.slow
def test_deterministic_operations_give_the_same_bits_twice():
    """In a process of its own: it cannot be turned off again."""
    run(TWICE)


# --- Long runs

MEMORY = """
import sys
import keras
import numpy as np
import tensorflow as tf
from keras_bptt import BPTTRNN

def resident():
    '''In MB, of this process now.'''
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * 4096 / 1e6

steps, how = int(sys.argv[1]), sys.argv[2]
model = keras.Sequential([keras.Input((None, 4))])
model.add(BPTTRNN(16, truncation=5, checkpoint_every="sqrt", return_sequences=True))
model.add(BPTTRNN(8))
model.compile("sgd", "mse", run_eagerly=how == "eager")
random = np.random.default_rng(0)
marks = []
for step in range(steps):
    # Batches and lengths that change, as in training on sentences.
    x = random.normal(size=(2 + step % 3, 5 + step % 11, 4)).astype("float32")
    model.train_on_batch(x, x[:, 0, :1])
    if step in (steps // 4, steps - 1):
        marks.append(resident())
print(marks[1] - marks[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("steps", "how"), [(10_000, "graph"), (1000, "eager")])
def test_memory_stays_flat(steps, how):
    """After the first quarter. A leak of one graph of these would be some 100 kB a step."""
    assert float(run(MEMORY, str(steps), how)) < 30


# --- Files


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.keras"
    small_model(truncation=3).save(path)
    return path


def rewritten(path, name, change):
    """The `.keras` file with one of its parts changed."""
    with zipfile.ZipFile(path) as file:
        parts = {part: file.read(part) for part in file.namelist()}
    assert change(parts[name]) != parts[name]
    parts[name] = change(parts[name])
    with zipfile.ZipFile(path, "w") as file:
        for part, content in parts.items():
            file.writestr(part, content)


def test_file_cut_short(saved):
    saved.write_bytes(saved.read_bytes()[:-200])
    with pytest.raises(ValueError, match="accessible `.keras` zip file"):
        keras.models.load_model(saved)


def test_file_with_a_bit_changed(saved):
    content = bytearray(saved.read_bytes())
    content[content.find(b"model.weights.h5") + 3000] ^= 1
    saved.write_bytes(content)
    with pytest.raises(zipfile.BadZipFile, match="model.weights.h5"):
        keras.models.load_model(saved)


def test_weights_cut_short(saved):
    rewritten(saved, "model.weights.h5", lambda content: content[:-500])
    with pytest.raises(OSError, match="truncated file"):
        keras.models.load_model(saved)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b'"steps": 3', b'"steps": -3', "`steps` must be a positive integer"),
        (b"keras_bptt>Truncation", b"other>Policy", "`truncation` must be"),
        (b'"units": 6', b'"units": 0', "`units` must be a positive integer"),
    ],
)
def test_configuration_that_says_something_else(saved, old, new, words):
    rewritten(saved, "config.json", lambda content: content.replace(old, new))
    with pytest.raises((ValueError, TypeError), match=words):
        keras.models.load_model(saved)


def test_safe_mode_holds(tmp_path):
    """A file with code in it does not load unless it is asked for."""
    model = small_model(return_sequences=True)
    model.add(keras.layers.Lambda(lambda y: 2 * y))
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="safe_mode"):
        keras.models.load_model(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=False)
    x = rng().normal(size=(2, 5, D)).astype("float32")
    np.testing.assert_array_equal(loaded(x), model(x))


def test_saved_model_is_no_keras_file(tmp_path):
    small_model().export(tmp_path / "model", verbose=False)
    with pytest.raises(ValueError, match="TFSMLayer"):
        keras.models.load_model(tmp_path / "model")


FOREIGN = """
import sys
import keras

try:
    keras.models.load_model(sys.argv[1])
except TypeError as error:
    print(error)
"""


@pytest.mark.slow
# Keras 3.8 imports what the file names.
@needs_keras("3.15", "refusing to import what a file names")
def test_without_the_import_keras_says_what_is_missing(saved):
    """Keras and the file alone: the message names the layer."""
    assert "BPTTRNN" in run(FOREIGN, str(saved))
