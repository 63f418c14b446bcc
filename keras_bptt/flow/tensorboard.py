"""What TensorBoard shows, written by TensorFlow alone.

`tf.summary.scalar` and its like are TensorBoard's and need it installed; `tf.summary.write`
does not. What it writes goes to the default writer.
"""

import numpy as np
import tensorflow as tf

from keras_bptt.flow.verdict import over_examples

# The colours of viridis (CC0) at equal distances: as far apart as they look, also in grey.
_COLOURS = np.array(
    [
        (68, 1, 84),
        (71, 45, 123),
        (59, 82, 139),
        (44, 114, 142),
        (33, 145, 140),
        (40, 174, 128),
        (94, 201, 98),
        (173, 220, 48),
        (253, 231, 37),
    ],
    float,
)
_MISSING = (128, 128, 128)
MOST_CELLS = 256  # either way, and about as many pixels
_HIGHEST_ROW = 16


def scalar(tag, value, step):
    """A point of a curve."""
    _write(tag, tf.constant(value, tf.float32), step, "scalars", "SCALAR")


def text(tag, markdown, step):
    """A text."""
    _write(tag, tf.constant(markdown), step, "text", "TENSOR")


def image(tag, pixels, step, description):
    """An image (height, width, 3) of bytes."""
    height, width, _ = pixels.shape
    parts = [str(width), str(height), tf.io.encode_png(pixels)]
    _write(tag, tf.stack(parts), step, "images", "BLOB_SEQUENCE", description)


def heat_map(table, low, high):
    """The pixels of a table: dark for `low`, bright for `high`, grey for NaN.

    Its cells are as large as they fit into 256 pixels either way, rows no higher than 16.
    Where there are more than 256 a cell is a mean of neighbours.
    """
    table = fewer(fewer(table).T).T
    anchors = np.linspace(low, high, len(_COLOURS))
    pixels = np.stack([np.interp(table, anchors, colour) for colour in _COLOURS.T], -1)
    pixels = np.where(np.isnan(table)[..., None], _MISSING, pixels).astype(np.uint8)
    height, width = (MOST_CELLS // n for n in table.shape)
    return pixels.repeat(min(height, _HIGHEST_ROW), axis=0).repeat(width, axis=1)


def fewer(array):
    """At most `MOST_CELLS` along the first axis: means of neighbours, NaN left out."""
    if len(array) <= MOST_CELLS:
        return array
    parts = np.array_split(array, MOST_CELLS)
    return np.stack([over_examples(np.nanmean, part) for part in parts])


def _write(tag, tensor, step, plugin, data_class, description=""):
    metadata = tf.compat.v1.SummaryMetadata(summary_description=description)
    metadata.plugin_data.plugin_name = plugin
    metadata.data_class = getattr(metadata, f"DATA_CLASS_{data_class}", 0)
    tf.summary.write(tag, tensor, step=step, metadata=metadata)
