"""The cell of the layer: Keras' own, which holds the weights and is never called."""

import functools

import keras

_Cell = keras.layers.SimpleRNNCell


def check_cell(name, cell):
    """Raise where a cell computes anything but what the layer computes in its place."""
    if getattr(cell.call, "__func__", None) is not _Cell.call:
        raise ValueError(
            f"{name} takes weights from its cell and never calls it: it computes the "
            "recurrence of keras.layers.SimpleRNNCell itself, and any other would be "
            f"ignored. Received: cell={cell!r} of type {type(cell).__name__}, whose `call` "
            "is its own. Use keras.layers.RNN(cell), or put what it adds into `activation`."
        )
    if cell.built and cell.units != cell.recurrent_kernel.shape[0]:
        raise ValueError(
            f"{name} was built with {cell.recurrent_kernel.shape[0]} units, whose number "
            f"cannot change. Received: cell.units={cell.units!r}. Make another layer."
        )


def weights_of(cell):
    """The variables W, U and, if there is one, b."""
    return [v for v in (cell.kernel, cell.recurrent_kernel, cell.bias) if v is not None]


def name_convert(cell):
    """Let `cell` say, where a file has no weights for it, how those of SimpleRNN get in.

    A `.weights.h5` file names a layer by its class, so that the weights of a SimpleRNN are
    not found, and Keras says no more than that there are none.
    """
    cell.load_own_variables = functools.partial(_load, cell)


def _load(cell, store):
    if cell.built and not store.keys():
        raise ValueError(
            "The file must hold the weights of this BPTTRNN. Received: a file that has "
            f"none for its {cell.name}. A `.weights.h5` file stores weights under the "
            "class of their layer, so those of a SimpleRNN are not found here. Load them "
            "into the same model made of SimpleRNN, then take keras_bptt.convert(model)."
        )
    type(cell).load_own_variables(cell, store)
