"""A step of `cells`, compiled, with the weights of a cell of Keras."""

import functools

import keras
import tensorflow as tf

from keras_bptt.cells.derived import derived, xla_compiles
from keras_bptt.cells.tracing import trace, value_outside
from keras_bptt.layers.explicit_loop import Step
from keras_bptt.layers.host_cell import weights_of
from keras_bptt.layers.weights import stored
from keras_bptt.runtime.execution import switches


def compiled_step(cell, equations, sequences, states, training):
    """What a layer repeats in one call.

    Args:
        cell: of Keras, with gates; it is not called.
        equations: makes the step for a number of dropout factors of the inputs.
        sequences, states: inputs of all steps, initial states.
    """
    of_x, of_h = _factors(cell, sequences, states) if training else ([], [])
    variables, noise = weights_of(cell), (*of_x, *of_h)
    values = stored(cell.dtype_policy, variables)
    specs = (
        tf.TensorSpec([None, sequences.shape[-1]], sequences.dtype),
        tuple(map(_row, states)),
        tuple(map(_row, noise)),
        tuple(
            (tf.TensorSpec(value.shape, value.dtype), variable.trainable)
            for value, variable in zip(values, variables, strict=True)
        ),
    )
    equations = equations(len(of_x))
    if _knows(cell):
        step, beside = _of_keras(switches(), equations, *specs)
    else:
        step, beside = _compiled(equations, *specs)
    weights = step.weights_from([*values, *map(value_outside, beside)])

    def insides(x, before, after, noise):
        del after
        return equations.insides(x, before, noise, values)

    return Step(
        step,
        weights,
        noise,
        lambda: xla_compiles(step),
        insides=insides,
        states=("h", "c")[: len(states)],
    )


def _factors(cell, sequences, states):
    """Those of the inputs and of the state: none, one or one for each gate."""
    x, h = sequences[:, 0, :], states[0]
    drawn = (
        (cell.dropout, cell.get_dropout_mask(x), x),
        (cell.recurrent_dropout, cell.get_recurrent_dropout_mask(h), h),
    )
    # Keras' cells with gates ignore a share of 1. What was drawn like a given state may not
    # know its size.
    return [
        [
            tf.ensure_shape(d, (None, rows.shape[-1]))
            for d in keras.tree.flatten(factors)
        ]
        if 0 < share < 1
        else []
        for share, factors, rows in drawn
    ]


def _row(tensor):
    return tf.TensorSpec([None, *tensor.shape[1:]], tensor.dtype)


def _compiled(step, x, states, factors, variables, probe=True):
    """The step as a cell of the engine, and what it reads beside the variables."""
    name = type(step).__name__
    traced = trace(name, step, x, list(states), list(factors), list(variables))
    return derived(name, traced, probe), traced.sources[len(variables) :]


@functools.lru_cache(maxsize=256)
def _of_keras(switches, *arguments):
    """The same of a step whose functions are Keras' own: once, under the same switches."""
    del switches
    return _compiled(*arguments, probe=False)


def _knows(cell):
    """Whether its activations are functions of Keras: nothing in them can change."""
    return all(
        getattr(keras.activations, getattr(f, "__name__", ""), None) is f
        for f in (cell.activation, cell.recurrent_activation)
    )
