"""What BPTTLSTM and BPTTGRU have in common: their step is compiled; and cuDNN."""

import functools
import inspect

import keras
import tensorflow as tf

from keras_bptt.cells.derived import derived, xla_compiles
from keras_bptt.cells.tracing import trace, value_outside
from keras_bptt.layers.explicit_loop import Step
from keras_bptt.layers.host_cell import weights_of
from keras_bptt.layers.own_step import OwnStep
from keras_bptt.layers.weights import stored
from keras_bptt.runtime.execution import switches


class Gated(OwnStep):
    """A layer whose step is one of `cells`, compiled."""

    def _equations(self, dropped):
        """The step, of so many dropout factors of the inputs."""
        raise NotImplementedError

    def _step(self, sequences, states, training):
        cell = self.cell
        of_x, of_h = self._factors(sequences, states) if training else ([], [])
        equations, variables = self._equations(len(of_x)), weights_of(cell)
        values, noise = stored(cell.dtype_policy, variables), (*of_x, *of_h)
        rows = tf.TensorSpec([None, sequences.shape[-1]], sequences.dtype)
        specs = (
            tuple(map(_row, states)),
            tuple(map(_row, noise)),
            tuple(
                (tf.TensorSpec(value.shape, value.dtype), variable.trainable)
                for value, variable in zip(values, variables, strict=True)
            ),
        )
        if _knows(cell):
            step, beside = _of_keras(switches(), equations, rows, *specs)
        else:
            step, beside = _compiled(equations, rows, *specs)
        weights = step.weights_from([*values, *map(value_outside, beside)])
        return Step(step, weights, noise, lambda: xla_compiles(step))

    def _factors(self, sequences, states):
        """Those of the inputs and of the state: none, one or one for each gate."""
        cell, x, h = self.cell, sequences[:, 0, :], states[0]
        drawn = (
            (cell.dropout, cell.get_dropout_mask(x)),
            (cell.recurrent_dropout, cell.get_recurrent_dropout_mask(h)),
        )
        # Its cell ignores a share of 1.
        return [keras.tree.flatten(d) if 0 < share < 1 else [] for share, d in drawn]


def _row(tensor):
    return tf.TensorSpec([None, *tensor.shape[1:]], tensor.dtype)


def _compiled(equations, x, states, factors, variables, probe=True):
    """The step as a cell, and what it reads beside the variables."""
    name = type(equations).__name__
    traced = trace(name, equations, x, list(states), list(factors), list(variables))
    return derived(name, traced, probe), traced.sources[len(variables) :]


@functools.lru_cache(maxsize=256)
def _of_keras(switches, *arguments):
    """The same of functions that are Keras' own: once, under the same switches."""
    del switches
    return _compiled(*arguments, probe=False)


def _knows(cell):
    """Whether its activations are functions of Keras: they change nothing, nor change."""
    return all(
        getattr(keras.activations, getattr(f, "__name__", ""), None) is f
        for f in (cell.activation, cell.recurrent_activation)
    )


def without_cudnn(host, *args, **kwargs):
    """The arguments (args, kwargs) as the host takes them, which is to run no cuDNN.

    Else it would, where there is a GPU, and forbid XLA.
    """
    given = inspect.signature(host.__init__).bind(None, *args, **kwargs)
    value = given.arguments.get("use_cudnn", "auto")
    if value is not False and value != "auto":
        raise ValueError(
            "`use_cudnn` must be 'auto' or False: the gradient of this layer is its own, "
            "and cuDNN computes one that can be neither truncated nor clipped nor "
            f"differentiated again. Received: use_cudnn={value!r}. Use "
            f"keras.layers.{host.__name__} for cuDNN."
        )
    given.arguments["use_cudnn"] = False
    return given.args[1:], given.kwargs
