"""A `.keras` file of an earlier version loads, predicts what it did, and trains on.

`stored/model.keras` was written at commit e71e09e, before the modules moved into folders,
with its predictions in `stored/model.npz`: a mask, Bidirectional windows with clipping,
checkpoints with dropout and an output layer, randomised truncation; two epochs of Adam.
"""

import pathlib

import keras
import numpy as np

from keras_bptt import BPTTRNN, RandomizedTruncation, Truncation
from keras_bptt.layers.inside import layers_inside

FOLDER = pathlib.Path(__file__).parents[1] / "stored"


def test_a_file_of_an_earlier_version():
    model = keras.saving.load_model(FOLDER / "model.keras")
    with np.load(FOLDER / "model.npz") as stored:
        x, predictions = stored["x"], stored["predictions"]
    np.testing.assert_allclose(model.predict(x, verbose=0), predictions, rtol=1e-6)
    layers = {layer.name: layer for _, layer in layers_inside(model)}
    windows = layers["both"].forward_layer
    assert isinstance(windows, BPTTRNN)
    assert windows.truncation == Truncation(6, stride=2)
    assert windows.adjoint_clipnorm == 2.0 and windows.adjoint_max_growth is None
    checkpoints, random = layers["checkpoints"], layers["random"]
    assert (checkpoints.checkpoint_every, checkpoints.output_units) == ("sqrt", 3)
    assert random.truncation == RandomizedTruncation(5.0, seed=1)
    assert random.jit_compile is False and random.get_config()["unroll"] == 3
    before = [weight.numpy() for weight in model.trainable_variables]
    y = np.zeros_like(predictions)
    losses = model.fit(x, y, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    after = model.trainable_variables
    assert not any(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
