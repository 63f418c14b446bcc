"""Seeds of the random numbers that a cell draws in every step: one for each call."""

import functools

import keras
import tensorflow as tf


def is_seed(variable):
    """Whether it is the state of a `keras.random.SeedGenerator`."""
    return variable.name == "seed_generator_state"


def seed_of(variables):
    """A function of the handle of a variable: how a seed is drawn from it; else None.

    Args:
        variables: of the cell.
    """
    with keras.StatelessScope():  # the variables themselves, whatever is given for them
        own = {
            id(each.handle): v
            for v in variables
            if is_seed(v)
            # Under a strategy a variable is one for each replica.
            for each in getattr(v.value, "values", None) or [v.value]
        }

    def found(handle):
        if id(handle) in own:
            return functools.partial(_next, own[id(handle)])
        return _of_keras if handle is _global_handle() else None

    return found


def _next(state):
    """The seed of a generator, which moves on as Keras lets it."""
    seed = state.value * 1  # a copy
    state.assign(state + [0, 1])
    return seed


def _of_keras():
    """A seed drawn from that of Keras, for cells that name none."""
    return keras.random.randint([2], 0, tf.int32.max, "int64")


def _global_handle():
    """The variable from which Keras draws where no seed is given, or None."""
    with keras.StatelessScope():
        draws = tf.function(lambda: keras.random.uniform([]), autograph=False)
        captures = draws.get_concrete_function().graph.captures
    return captures[0][0] if captures else None
