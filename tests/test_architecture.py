"""The order of the modules, their size, and what the public names say of themselves."""

import ast
import inspect
import pathlib

import keras
import pytest

import keras_bptt
from keras_bptt import BPTTRNN

PACKAGE = pathlib.Path(keras_bptt.__file__).parent
MODULES = {path.stem: path for path in PACKAGE.glob("*.py")}

# A module imports those of lower rank, and those before it in its own.
RANKS = [
    ["reference", "truncated_reference", "truncation"],
    ["execution", "explicit", "tensors", "activations", "loops", "scans"],
    ["passes", "masks", "blocks", "shards", "windows", "sliding"],
    ["residuals", "fused", "recurrence", "truncated", "probe"],
    ["wording", "arguments", "calls", "weights", "cells", "output_layer", "layers"],
    ["inside", "copied_state", "conversion"],
    [
        "finiteness",
        "recording",
        "measurement",
        "verdict",
        "advice",
        "layer_flow",
        "flow_plot",
        "model_flow",
        "flow_inputs",
        "gradient_flow",
    ],
    ["events", "measuring_callback", "callbacks"],
    ["__init__"],
]
ORDER = [name for rank in RANKS for name in rank]


def imports(path):
    """The full names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            names |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return names


def own_imports(path):
    """The modules of this package that a file imports."""
    parts = (name.split(".") for name in imports(path))
    return {part[1] for part in parts if part[0] == "keras_bptt" and len(part) > 1} & {
        *MODULES
    }


def test_every_module_has_a_rank():
    assert sorted(MODULES) == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_downward(name):
    allowed = ORDER[: ORDER.index(name)]
    assert own_imports(MODULES[name]) <= set(allowed)


def test_imports_are_seen():
    """The test above would notice: these modules do import each other."""
    assert own_imports(MODULES["recurrence"]) >= {"scans", "explicit"}
    assert own_imports(MODULES["layers"]) >= {"recurrence"}
    assert own_imports(MODULES["__init__"]) >= {"layers"}


@pytest.mark.parametrize("name", ORDER)
def test_only_the_public_interface_of_keras(name):
    private = [module for module in imports(MODULES[name]) if "keras.src" in module]
    assert not private
    assert "keras.src" not in MODULES[name].read_text(encoding="utf-8")


def test_the_reference_stands_alone():
    allowed = {"numpy", "collections", "dataclasses", "typing", "__future__"}
    roots = {name.split(".")[0] for name in imports(MODULES["reference"])}
    assert roots <= allowed
    roots = {name.split(".")[0] for name in imports(MODULES["truncated_reference"])}
    assert roots <= allowed | {"keras_bptt", "numbers"}
    assert own_imports(MODULES["truncated_reference"]) == {"reference"}


def test_policies_need_no_tensorflow():
    names = imports(MODULES["truncation"])
    assert not {name for name in names if name.split(".")[0] == "tensorflow"}
    assert not own_imports(MODULES["truncation"])


@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules_stay_small(name):
    limit = {"layers": 400, "reference": 400}.get(name, 300)
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= limit, "split it along what it does"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules_say_what_they_are(name):
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)


@pytest.mark.parametrize("name", keras_bptt.__all__)
def test_public_names_are_documented_with_an_example(name):
    assert ">>> " in inspect.getdoc(getattr(keras_bptt, name))


def test_nothing_else_is_public():
    public = {
        name
        for name, value in vars(keras_bptt).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(keras_bptt.__all__)


def test_signature_begins_with_that_of_simplernn():
    theirs = list(inspect.signature(keras.layers.SimpleRNN).parameters.values())
    ours = list(inspect.signature(BPTTRNN).parameters.values())
    theirs = [p for p in theirs if p.kind is not inspect.Parameter.VAR_KEYWORD]
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [
        (p.name, p.default, p.kind) for p in theirs
    ]
    assert [p.kind for p in ours[len(theirs) :]][-1] is inspect.Parameter.VAR_KEYWORD


def test_editors_see_the_same_arguments():
    """What the stub writes out for them is what the layer takes, in its order."""
    stub = ast.parse((PACKAGE / "layers.pyi").read_text(encoding="utf-8"))
    (init,) = (n for n in ast.walk(stub) if getattr(n, "name", None) == "__init__")
    theirs = init.args.args[1:]
    defaults = dict(zip(reversed(theirs), reversed(init.args.defaults), strict=False))
    keywords = dict(zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True))
    written = {
        argument.arg: ast.literal_eval(default)
        for argument, default in (defaults | keywords).items()
    }
    empty, rest = inspect.Parameter.empty, inspect.Parameter.VAR_KEYWORD
    taken = inspect.signature(BPTTRNN).parameters.values()
    known = {p.name: p.default for p in taken if p.kind is not rest}
    assert known.pop("units") is empty
    # Of a Keras that has got another argument, the stub says nothing.
    assert [p.arg for p in theirs] == ["units", *known][: len(theirs)]
    passed_on = {"zero_output_for_mask": False, "name": None, "dtype": None}
    for name, default in (passed_on | {"trainable": True}).items():
        assert written.pop(name) == default
        BPTTRNN(1, **{name: default})
    assert written == {name: known[name] for name in written}
    own = [p.name for p in taken if p.kind is p.KEYWORD_ONLY]
    assert own == [name for name in written if name not in {p.arg for p in theirs}]


def test_arguments_keep_their_places():
    """By position, as a caller of SimpleRNN may pass them."""
    values = [5, "relu", False, "ones", "zeros", "ones", "l1", "l2"]
    ours = BPTTRNN(*values, name="rnn").get_config()
    assert ours == keras.layers.SimpleRNN(*values, name="rnn").get_config()


def test_the_layer_is_a_simplernn_with_its_own_loop():
    """And with that alone: all else of SimpleRNN's computation stays the host's."""
    assert issubclass(BPTTRNN, keras.layers.SimpleRNN)
    assert "inner_loop" in vars(BPTTRNN)
    parents = inspect.getsource(BPTTRNN.inner_loop)
    assert "super()" not in parents, "a fall-back to the parent's loop is silent"
