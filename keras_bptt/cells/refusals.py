"""What a step must not do, and what to say of one that does it."""

_RANDOM = "Random", "TruncatedNormal", "Multinomial", "Shuffle", "RngReadAndSkip"
# They make of a seed what those that draw take.
_OF_SEEDS = "StatelessRandomGetAlg", "StatelessRandomGetKeyCounter"


def is_random(kind):
    """Whether an operation of this type draws random numbers."""
    return kind not in _OF_SEEDS and any(name in kind for name in _RANDOM)


def mixes(name, where):
    """What to say of a step that mixes examples."""
    return (
        f"The step of {name} must treat each example of a batch alone, for the backward "
        "pass computes all steps of all examples at once. Received: one that mixes them, "
        f"in {where}. Reduce over axis=-1 only; use layer in place of batch normalisation."
    )


def refuse_effects(name, graph):
    """Raise where the step does anything but compute."""
    library = graph.as_graph_def().library.function
    nodes = [node for function in library for node in function.node_def]
    within = [(node.op, node.name) for node in nodes]
    for kind, where in within:
        if is_random(kind):
            raise ValueError(draws_by(name, f"{where} ({kind}), in one of these"))
    named = [(op.type, op.name) for op in graph.get_operations()]
    for kind, where in [*named, *within]:
        if kind in ("PyFunc", "EagerPyFunc", "PyFuncStateless"):
            raise ValueError(
                f"The step of {name} must be made of TensorFlow's operations. Received: "
                f"one with a py_function ({where}), which no compiled graph can run."
            )
        if (
            kind.startswith("Assign")
            or "Scatter" in kind
            and kind.startswith("Resource")
        ):
            raise ValueError(updates(name, where))


def draws_by(name, where):
    """What to say of a step that draws by what cannot be drawn outside of it."""
    return (
        f"The step of {name} must draw random numbers by functions of `keras.random`, of "
        "shapes and ranges that are no state, input or weight, and outside of conditionals "
        f"and loops: so they can be drawn once, for the way back too. Received: {where}. "
        "Draw `keras.random.normal(keras.ops.shape(state), seed=self.seed_generator)`, or "
        "`uniform`, and compute what is wanted from it."
    )


class FixedSeed(ValueError):
    """A step draws from a seed that never changes."""


def draws_alike(name, where):
    """What to say of it."""
    return FixedSeed(
        f"The step of {name} must draw from a seed of its own, for the numbers of every "
        f"step would be the same. Received: a fixed seed, in {where}. Make "
        "`self.seed_generator = keras.random.SeedGenerator(seed)` in `__init__` and pass "
        "seed=self.seed_generator."
    )


def draws_for_no_row(name, where):
    """What to say of a step whose random numbers belong to no example."""
    return (
        f"The step of {name} must draw random numbers for each example, (batch, ...): all "
        f"steps of all examples are computed at once. Received: {where}. Draw the shape "
        "of a state, `keras.ops.shape(state)`, or as many rows."
    )


def draws_elsewhere(name, where):
    """What to say of a step that draws from the seed of something else."""
    return (
        f"The step of {name} must draw from a seed that belongs to its cell. Received: one "
        f"that it reads from outside ({where}). Make `self.seed_generator = "
        "keras.random.SeedGenerator(seed)` in the cell's `__init__`, or pass no seed."
    )


def updates(name, where):
    """What to say of a step that changes a variable."""
    return (
        f"The step of {name} must not change variables: it is computed again for the way "
        f"back. Received: one that does ({where}). Keep what changes from step to step in "
        "a state."
    )
