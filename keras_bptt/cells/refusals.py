"""What a step must not do, and what to say of one that does it."""


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
    named = [(op.type, op.name) for op in graph.get_operations()]
    for kind, where in [*named, *((node.op, node.name) for node in nodes)]:
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
        if "Random" in kind or kind in ("Multinomial", "RngReadAndSkip"):
            raise ValueError(draws(name, where))


def draws(name, where):
    """What to say of a step that draws random numbers."""
    return (
        f"The step of {name} must not draw random numbers: each step would need its own, "
        f"drawn again on the way back. Received: one that does ({where}). Use "
        "keras.layers.RNN(cell), or dropout factors for all steps, as "
        "keras.layers.LSTMCell has them."
    )


def updates(name, where):
    """What to say of a step that changes a variable."""
    return (
        f"The step of {name} must not change variables: it is computed again for the way "
        f"back. Received: one that does ({where}). Keep what changes from step to step in "
        "a state."
    )
