"""The cell of a layer: Keras' own, which holds the weights and is never called."""

import functools


def check_cell(layer):
    """Raise where a cell computes anything but what the layer computes in its place."""
    cell, expected = layer.cell, layer.cell_class
    if getattr(cell.call, "__func__", None) is not expected.call:
        raise ValueError(
            f"{layer.name} takes weights from its cell and never calls it: it computes the "
            f"recurrence of keras.layers.{expected.__name__} itself, and any other would "
            f"be ignored. Received: cell={cell!r} of type {type(cell).__name__}, whose "
            "`call` is its own. Use keras_bptt.BPTT(cell) or keras.layers.RNN(cell)."
        )
    if cell.built and cell.units != cell.recurrent_kernel.shape[0]:
        raise ValueError(
            f"{layer.name} was built with {cell.recurrent_kernel.shape[0]} units, whose "
            f"number cannot change. Received: cell.units={cell.units!r}. Make another "
            "layer."
        )


def weights_of(cell):
    """The variables W, U and, if there is one, b."""
    return [v for v in (cell.kernel, cell.recurrent_kernel, cell.bias) if v is not None]


def name_convert(layer):
    """Let the cell say, where a file has no weights for it, how those of the host get in.

    A `.weights.h5` file names a layer by its class, so that the weights of a SimpleRNN are
    not found, and Keras says no more than that there are none.
    """
    names = type(layer).__name__, type(layer.cell).__name__.removesuffix("Cell")
    layer.cell.load_own_variables = functools.partial(_load, layer.cell, *names)


def _load(cell, own, host, store):
    if cell.built and not store.keys():
        raise ValueError(
            f"The file must hold the weights of this {own}. Received: a file that has "
            f"none for its {cell.name}. A `.weights.h5` file stores weights under the "
            f"class of their layer, so those of a {host} are not found here. Load them "
            f"into the same model made of {host}, then take keras_bptt.convert(model)."
        )
    type(cell).load_own_variables(cell, store)
