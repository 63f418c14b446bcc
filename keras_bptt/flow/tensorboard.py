"""What TensorBoard shows: curves, words and a map, written by TensorFlow.

`tf.summary.scalar` and its like are TensorBoard's and need it installed; `tf.summary.write`
does not. What it writes goes to the default writer. The map has axes where matplotlib is
installed.
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
DECADES = (-8, 2)  # between the ends of the colours
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


def flow_map(logs, epochs, steps, norm):
    """The pixels of norms by step and epoch, with axes and a bar of colours.

    Without matplotlib the cells alone, and no words.

    Args:
        logs: the decimal logarithms (epochs, steps); of steps perhaps `fewer`.
        epochs: their numbers.
        steps: how many there are.
        norm: what it is the norm of, in words.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return heat_map(logs, *DECADES)
    # No pyplot, which would keep every figure, and may ask for a screen.
    figure = Figure((8, 2.4 + 0.25 * min(len(epochs), 16)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    _draw_map(figure, logs, epochs, steps, norm)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def map_description(norm):
    """What a map shows, in words."""
    low, high = DECADES
    return (
        f"Mean of {norm}: steps from left to right, epochs from top to bottom, colours "
        f"from 1e{low} (dark) to 1e{high} (bright)."
    )


def _draw_map(figure, logs, epochs, steps, norm):
    from matplotlib import colormaps

    low, high = DECADES
    axes = figure.subplots()
    # Zero and infinity are at the ends; masked steps stay NaN.
    cells = np.clip(fewer(logs), low, high)
    image = axes.imshow(
        cells,
        colormaps["viridis"].with_extremes(bad=np.divide(_MISSING, 255)),
        aspect="auto",
        interpolation="nearest",
        vmin=low,
        vmax=high,
        extent=(0.5, steps + 0.5, len(epochs) - 0.5, -0.5),
    )
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    rows = np.unique(np.linspace(0, len(epochs) - 1, 8).round().astype(int))
    axes.set_yticks(rows, [str(epochs[row]) for row in rows])
    masked = ", grey where masked" if np.isnan(cells).any() else ""
    axes.set_xlabel(f"step t, in the order of processing{masked}")
    axes.set_ylabel("epoch")
    decades = np.arange(low, high + 1, 2)
    bar = figure.colorbar(image, ax=axes, ticks=decades, extend="both")
    bar.ax.set_yticklabels([f"1e{decade}" for decade in decades])
    bar.set_label(f"mean of {norm}")


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
