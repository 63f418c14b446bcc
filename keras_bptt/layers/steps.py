"""A cell of Keras as a step for the engine: what it reads, and how rows call it."""

import contextlib
import inspect
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_bptt.cells.derived import derived
from keras_bptt.cells.refusals import FixedSeed, updates
from keras_bptt.cells.tracing import trace, value_outside
from keras_bptt.layers.inside import layers_inside
from keras_bptt.layers.seeds import is_seed, seed_of
from keras_bptt.layers.weights import uncast

_FACTORS = "get_dropout_mask", "get_recurrent_dropout_mask"


class Call(NamedTuple):
    """How the layer calls its cell.

    Attributes:
        cell: of Keras.
        training: as the layer is called.
        states: the structure in which the cell takes its states.
        factors: of each cell that drops out, the cell and its dropout factors, by the name
            of the method that returns them.
    """

    cell: object
    training: bool
    states: list
    factors: list


def step_of(cell, x, states, training):
    """The cell compiled from one step, its weights, noise and seeds, in this call.

    Args:
        cell: of Keras.
        x: inputs of all steps (batch, timesteps, ...).
        states: the structure of initial states, each (batch, ...).
    """
    factors = _dropout_factors(cell, x, states) if training else []
    call = Call(cell, training, states, factors)
    noise = tf.nest.flatten([f for _, f in factors])
    noise = [t for t in noise if t is not None]
    variables = getattr(cell, "variables", [])
    # Not the state of a seed, which is drawn from outside of the step.
    read = [v for v in variables if not is_seed(v)]
    values = uncast(read)
    given = (
        _name(cell),
        lambda *arguments: _called(call, variables, read, *arguments),
        tf.TensorSpec([None, *x.shape[2:]], x.dtype),
        [_row(cell, state) for state in keras.tree.flatten(states)],
        [_row(cell, t) for t in noise],
        [(t, v.trainable) for t, v in zip(values, read, strict=True)],
        seed_of(variables),
    )
    try:
        traced = trace(*given)
    except FixedSeed:
        # Or the seed of Keras itself, which has only now been made.
        traced = trace(*given)
    known = derived(_name(cell), traced)
    weights = known.weights_from(map(value_outside, traced.sources))
    return known, weights, noise, tuple(draw() for draw in traced.drawing.sources)


def _called(call, variables, read, x, before, noise, values):
    """(output, states after), of one step of rows.

    `values` are those of the variables that are `read`.
    """
    cell, given = call.cell, {}
    if "training" in inspect.signature(cell.call).parameters:
        given["training"] = call.training
    states = keras.tree.pack_sequence_as(call.states, before)
    mapping = list(zip(read, values, strict=True))
    with (
        _returning(call.factors, noise),
        keras.StatelessScope(state_mapping=mapping) as scope,
    ):
        known = [scope.get_current_value(v) for v in variables]
        output, after = (cell if callable(cell) else cell.call)(x, states, **given)
    for variable, value in zip(variables, known, strict=True):
        if scope.get_current_value(variable) is not value and not is_seed(variable):
            raise ValueError(updates(_name(cell), variable.path))
    return output, keras.tree.flatten(after)


def _dropout_factors(cell, x, states):
    """Those that Keras has drawn for this call, of each cell that has some."""
    found, own = [], _cells(cell)
    of_step = x[:, 0], keras.tree.flatten(states)[0]
    for path, each in layers_inside(cell):
        if not all(hasattr(each, name) for name in _FACTORS):
            continue
        if not any(each is other for other in own):
            _refuse_factors(cell, path, each)
            continue
        pairs = zip(_FACTORS, of_step, strict=True)
        drawn = {name: getattr(each, name)(t) for name, t in pairs}
        found.append((each, drawn))
    return found


def _refuse_factors(cell, path, inner):
    """Raise for a cell within a cell that drops out: who draws for it, and when?"""
    if getattr(inner, "dropout", 0) or getattr(inner, "recurrent_dropout", 0):
        raise ValueError(
            f"A cell within {_name(cell)} must have no `dropout` and no "
            "`recurrent_dropout`, whose factors Keras draws once a call, for the cell of "
            f"a layer alone. Received: {path} with dropout={inner.dropout!r} and "
            f"recurrent_dropout={inner.recurrent_dropout!r}. Derive the cell from "
            f"{type(inner).__name__}, or call a keras.layers.Dropout in it."
        )


@contextlib.contextmanager
def _returning(factors, noise):
    """Within it the cells' methods return the tensors of `noise` for their factors."""
    noise = iter(noise)
    for cell, drawn in factors:
        for name, value in drawn.items():
            value = tf.nest.map_structure(
                lambda t: None if t is None else next(noise), value
            )
            # Not by setattr, which Keras would track.
            vars(cell)[name] = lambda step_input, value=value: value
    try:
        yield
    finally:
        for cell, drawn in factors:
            for name in drawn:
                del vars(cell)[name]


def _cells(cell):
    """The cell or, of a stack, its cells."""
    if isinstance(cell, keras.layers.StackedRNNCells):
        return [each for part in cell.cells for each in _cells(part)]
    return [cell]


def _row(cell, tensor):
    shape = tensor.shape[1:]
    if not shape.is_fully_defined():
        raise ValueError(
            f"{_name(cell)} must have states of a known size. Received: a state of shape "
            f"{tensor.shape}. Return it with a static shape from `get_initial_state`."
        )
    return tf.TensorSpec([None, *shape], tensor.dtype)


def _name(cell):
    return getattr(cell, "name", type(cell).__name__)
