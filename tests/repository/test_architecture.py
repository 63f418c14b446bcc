"""The house: which folder imports which, how far it is from a layer to its equation, the
size of things, and what the public names say of themselves."""

import ast
import functools
import inspect
import pathlib

import keras
import pytest

import keras_bptt
from keras_bptt import BPTT, BPTTGRU, BPTTLSTM, BPTTRNN
from keras_bptt.layers.explicit_loop import ExplicitLoop

PACKAGE = pathlib.Path(keras_bptt.__file__).parent
HOSTS = {
    BPTTRNN: keras.layers.SimpleRNN,
    BPTTLSTM: keras.layers.LSTM,
    BPTTGRU: keras.layers.GRU,
}


def name_of(path):
    """Of a file below the package, such as `engine.blocks`; "" of the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}
TEXTS = {name: MODULES[name].read_text(encoding="utf-8") for name in sorted(MODULES)}
NAMES = list(TEXTS)

# What a folder, or a module at the top, imports beside itself. The engine and the cells
# stand side by side: the contract is all that one knows of the other.
BELOW = {
    "reference": [],
    "truncation": [],
    "runtime": [],
    "cells": ["runtime"],
    "engine": ["cells.cell", "runtime", "truncation"],
    "layers": ["cells", "engine", "runtime", "truncation"],
    "conversion": ["layers", "runtime"],
    "flow": ["cells", "engine", "layers", "runtime", "truncation"],
    "callbacks": ["flow", "runtime", "truncation"],
}


@functools.cache
def imports(name):
    """The full names of what a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(TEXTS[name])):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            names |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return frozenset(names)


def own_imports(name):
    """The modules of this package that a module of it imports."""
    found = {full.removeprefix("keras_bptt.") for full in imports(name)}
    folders = {each.partition(".")[0] for each in found if "." in each}
    return (found & set(NAMES)) - {"", *folders}


def test_every_folder_has_its_place():
    assert {name.partition(".")[0] for name in NAMES if name} == set(BELOW)


@pytest.mark.parametrize("name", NAMES)
def test_a_module_keeps_the_rules(name):
    """It imports downward, nothing private of Keras, is small and says what it is."""
    folder = name.partition(".")[0]
    allowed = (folder, *BELOW[folder]) if name else NAMES
    for each in own_imports(name):
        assert any(f"{each}.".startswith(f"{place}.") for place in allowed), each
    assert "keras.src" not in TEXTS[name]
    assert len(TEXTS[name].splitlines()) <= 400, "split it along what it does"
    assert ast.get_docstring(ast.parse(TEXTS[name]))
    roots = {full.split(".")[0] for full in imports(name)}
    if folder == "reference":
        standard = {"collections", "dataclasses", "math", "numbers", "typing"}
        assert roots <= {"numpy", "keras_bptt"} | standard
    if folder == "truncation":  # policies need no TensorFlow
        assert "tensorflow" not in roots
    if folder == "engine":  # time knows no cell, nor asks which one it has
        assert "SimpleRNN" not in TEXTS[name]
        assert "isinstance(cell" not in TEXTS[name]


@functools.cache
def chain(name):
    """The longest chain of imports that begins with a module; it ends if none is round."""
    return [name, *max(map(chain, own_imports(name)), key=len, default=[])]


def test_no_chain_of_imports_is_long():
    # A chain that is round would not end: Python raises RecursionError.
    longest = max((chain(name) for name in NAMES), key=len)
    assert len(longest) <= 10, " > ".join(longest)


def test_imports_are_seen():
    """The tests above would notice: these modules do import each other."""
    assert own_imports("engine.recurrence") >= {"engine.forward", "runtime.explicit"}
    assert own_imports("layers.bptt_rnn") >= {"layers.weights", "cells.simple_rnn"}
    assert len(chain("callbacks")) > 5


def test_it_is_not_far_from_a_layer_to_its_equation():
    """The modules whose functions call each other on the way, from the layer to a step."""
    way = "layers.explicit_loop engine.recurrence engine.forward engine.states".split()
    layer = BPTTRNN(2, return_sequences=True, jit_compile=False, unroll=True)
    seen = []

    class Cell(keras_bptt.layers.bptt_rnn.SimpleRNN):
        def step(self, *arguments):
            frames = inspect.getouterframes(inspect.currentframe())
            files = [
                pathlib.Path(f.filename) for f in frames if PACKAGE.name in f.filename
            ]
            seen.append([name_of(f) for f in files if PACKAGE in f.parents][::-1])
            return super().step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras_bptt.layers.bptt_rnn, "SimpleRNN", Cell)
        layer(keras.ops.ones((1, 2, 3)))
    met = list(dict.fromkeys(seen[0]))
    met = met[met.index(way[0]) :]
    # What wraps a function without changing what it computes is no stop to a reader.
    stops = [name for name in met if not name.startswith("runtime.")]
    assert stops[: len(way)] == [*way[:3], "engine.blocks"]
    assert set(way) <= set(stops)
    assert len([*stops[1:], "cells.simple_rnn"]) <= 6, stops


def test_functions_have_one_idea():
    functions = [
        (name, node)
        for name in NAMES
        for node in ast.walk(ast.parse(TEXTS[name]))
        if isinstance(node, ast.FunctionDef)
    ]
    for name, node in functions:
        lines = node.end_lineno - node.lineno + 1
        lines -= len((ast.get_docstring(node) or "").splitlines())
        assert lines <= 70, f"{name}.{node.name} has {lines} lines"
        taken = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
        # In what users call of the reference the letters of the equations, one by one.
        public = name.startswith("reference") and not node.name.startswith("_")
        if not public:
            assert taken <= 9, f"{name}.{node.name}"


def test_public_names_are_documented_with_an_example():
    """And nothing else is public."""
    assert set(keras_bptt.__all__) == {
        name
        for name, value in vars(keras_bptt).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    for name in keras_bptt.__all__:
        assert ">>> " in inspect.getdoc(getattr(keras_bptt, name)), name


@pytest.mark.parametrize("ours", HOSTS, ids=lambda layer: layer.__name__)
def test_signature_begins_with_that_of_the_host(ours):
    theirs = list(inspect.signature(HOSTS[ours]).parameters.values())
    ours = list(inspect.signature(ours).parameters.values())
    theirs = [p for p in theirs if p.kind is not inspect.Parameter.VAR_KEYWORD]
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [
        (p.name, p.default, p.kind) for p in theirs
    ]
    assert [p.kind for p in ours[len(theirs) :]][-1] is inspect.Parameter.VAR_KEYWORD


@pytest.mark.parametrize(
    ("layer", "module", "first"),
    [
        (BPTTRNN, "bptt_rnn", 1),
        (BPTTLSTM, "bptt_lstm", 1),
        (BPTTGRU, "bptt_gru", 1),
        (BPTT, "bptt", keras.layers.GRUCell(1)),
    ],
)
def test_editors_see_the_same_arguments(layer, module, first):
    """What the stub writes out for them is what the layer takes, in its order."""
    stub = ast.parse((PACKAGE / "layers" / f"{module}.pyi").read_text(encoding="utf-8"))
    (init,) = (n for n in ast.walk(stub) if getattr(n, "name", None) == "__init__")
    theirs = init.args.args[1:]
    defaults = dict(zip(reversed(theirs), reversed(init.args.defaults), strict=False))
    keywords = dict(zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True))
    written = {
        argument.arg: ast.literal_eval(default)
        for argument, default in (defaults | keywords).items()
    }
    empty, rest = inspect.Parameter.empty, inspect.Parameter.VAR_KEYWORD
    taken = inspect.signature(layer).parameters.values()
    known = {p.name: p.default for p in taken if p.kind is not rest}
    required = theirs[0].arg
    assert known.pop(required) is empty
    # Of a Keras that has got another argument, the stub says nothing.
    assert [p.arg for p in theirs] == [required, *known][: len(theirs)]
    passed_on = {"zero_output_for_mask": False, "name": None, "dtype": None}
    for name, default in (passed_on | {"trainable": True}).items():
        assert written[name] == default
        layer(first, **{name: default})
        if name not in known:
            del written[name]
    assert written == {name: known[name] for name in written}
    own = [p.name for p in taken if p.kind is p.KEYWORD_ONLY]
    assert own == [name for name in written if name not in {p.arg for p in theirs}]


POSITIONS = {
    BPTTRNN: [5, "relu", False, "ones", "zeros", "ones", "l1", "l2"],
    BPTTLSTM: [5, "relu", "tanh", False, "ones", "zeros", "ones", False, "l1", "l2"],
    BPTTGRU: [5, "relu", "tanh", False, "ones", "zeros", "ones", "l1", "l2"],
}


@pytest.mark.parametrize("ours", POSITIONS, ids=lambda layer: layer.__name__)
def test_arguments_keep_their_places(ours):
    """By position, as a caller of the host may pass them."""
    values = POSITIONS[ours]
    config = HOSTS[ours](*values, name="rnn").get_config()
    assert ours(*values, name="rnn").get_config() == config


@pytest.mark.parametrize(
    ("layer", "host"),
    [(BPTTRNN, keras.layers.SimpleRNN), (BPTT, keras.layers.RNN)],
)
def test_a_layer_is_its_host_with_another_loop(layer, host):
    """And with that alone: all else of the host's computation stays the host's."""
    assert issubclass(layer, host) and layer.inner_loop is ExplicitLoop.inner_loop
    parents = inspect.getsource(layer.inner_loop)
    assert "super()" not in parents, "a fall-back to the parent's loop is silent"
