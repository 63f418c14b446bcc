"""What `make package` runs where nothing but the wheel and what it needs is installed."""

import importlib.util
import pathlib
import sys
import zipfile

WHEEL = pathlib.Path(sys.argv[1])
ROOT = pathlib.Path(__file__).parents[1]

names = zipfile.ZipFile(WHEEL).namelist()
folders = {name.partition("/")[0] for name in names}
info = {folder for folder in folders if folder.endswith(".dist-info")}
assert len(info) == 1 and folders - info == {"keras_bptt"}, folders
kinds = ".py", ".pyi"
found = [path for path in (ROOT / "keras_bptt").rglob("*") if path.suffix in kinds]
found += (ROOT / "keras_bptt").rglob("py.typed")
files = {path.relative_to(ROOT).as_posix() for path in found}
assert {name for name in names if name.startswith("keras_bptt/")} == files
known = "py.typed", "layers/bptt_rnn.pyi", "layers/bptt_rnn.py", "engine/loops.py"
assert {f"keras_bptt/{name}" for name in known} <= files
for name in ("pytest", "matplotlib", "sklearn"):
    assert importlib.util.find_spec(name) is None, f"{name}: no empty environment"

import keras  # noqa: E402
import numpy as np  # noqa: E402

import keras_bptt  # noqa: E402

installed = pathlib.Path(keras_bptt.__file__)
assert ROOT / "keras_bptt" not in installed.parents, "not the wheel's"

keras.utils.set_random_seed(0)
x = np.random.default_rng(0).normal(size=(256, 20, 2)).astype("float32")
y = x[:, :, 0].sum(axis=1) > 0
model = keras.Sequential([keras.Input((None, 2)), keras_bptt.BPTTRNN(16)])
model.add(keras.layers.Dense(1, activation="sigmoid"))
model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy")
loss = model.fit(x, y, epochs=10, verbose=0).history["loss"]
assert loss[-1] < loss[0] / 2, loss
print(f"{installed} trains: loss {loss[0]:.3f} ... {loss[-1]:.3f}")
