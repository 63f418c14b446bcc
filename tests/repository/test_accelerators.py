"""Exported training steps: what they compute, and what is refused on either side."""

import inspect
import json
import re

import comparison
import configurations
import export
import hlo
import keras
import numpy as np
import pytest
import table
import tensorflow as tf
import translation
from export import CONFIGURATIONS, QUICK
from helpers import FLOAT32, B, D, H, T, few, relative_error, without_graphs
from packaging.version import Version

from keras_bptt import BPTTRNN, RandomizedTruncation

pytestmark = pytest.mark.skipif(
    Version(tf.__version__) < Version("2.21"),
    reason="an older TensorFlow may write no StableHLO, as 2.16 does not",
)


def configuration(masked=False, kind="BPTTRNN", **options):
    return type(CONFIGURATIONS[0])("step", (B, T, D, H), options, masked, kind=kind)


def exported(folder, **options):
    """The list's entry, the program and its data."""
    entry = export.export(configuration(**options), folder)
    with np.load(folder / "step.npz") as data:
        return entry, (folder / "step.mlir").read_text(), dict(data)


def products(program):
    return set(re.findall(r"precision = \[(\w+), (\w+)\]", program))


@pytest.mark.parametrize(
    "kind",
    few([(kind,) for kind in configurations.LAYERS], lambda kind: kind != "BPTTGRU"),
)
def test_the_program_is_the_training_step(kind, tmp_path):
    """As many arguments as it is told to have; numbers of the layer without all this."""
    options = {"output_units": 2, "return_sequences": True, "checkpoint_every": "sqrt"}
    options["kind"] = kind
    entry, program, data = exported(tmp_path, masked=True, **options)
    main = next(line for line in program.splitlines() if "@main(" in line)
    assert main.partition("->")[0].count("%arg") == len(entry["arguments"])
    assert main.partition("->")[2].count("tensor<") == len(entry["outputs"])
    assert products(program) == {("DEFAULT", "DEFAULT")}
    x, y, mask = (data[f"in {name}"] for name in ("x", "y", "mask"))
    assert not np.all(mask)

    layer = configuration(**options).layer()
    count = len(layer.trainable_variables)
    weights = [data[f"in {name}"] for name in entry["arguments"][2 : 2 + count]]
    for variable, value in zip(layer.trainable_variables, weights, strict=True):
        variable.assign(value)
    with without_graphs(), tf.GradientTape() as tape:
        outputs = layer(x, mask=mask, training=True)
        loss = tf.reduce_mean((outputs - y) ** 2)
    gradients = tape.gradient(loss, [v.value for v in layer.trainable_variables])
    names = entry["outputs"]
    assert relative_error(data["out loss"], loss) < FLOAT32
    for i, gradient in enumerate(gradients):
        assert np.max(np.abs(gradient)) > 1e-3
        assert relative_error(data[f"out {names[1 + i]}"], gradient) < FLOAT32
        updated = weights[i] - 0.1 * gradient
        assert relative_error(data[f"out {names[1 + count + i]}"], updated) < FLOAT32


def test_random_numbers_come_from_states_that_are_arguments(tmp_path):
    """Another state is another draw: nothing of it is frozen in the program."""
    options = {"truncation": RandomizedTruncation(2, seed=1), "recurrent_dropout": 0.5}
    layer = configuration(**options).layer()
    step, given, results = export.training_step(layer)
    specs = export.specs_of(configuration(**options), layer)
    assert "rng_bit_generator" in export.stablehlo(step, specs)
    arrays = export.arguments_of(configuration(**options), layer)
    function = tf.function(step, jit_compile=True)
    first, again = function(*arrays), function(*arrays)
    place = results.index("d_kernel_0")
    np.testing.assert_array_equal(first[place], again[place])
    states = [i for i, name in enumerate(given) if "seed" in name]
    assert len(states) == 2
    for i in states:
        new = first[results.index(f"new_{given[i]}")]
        assert np.any(new != arrays[i])  # the generator goes on
        other = function(*arrays[:i], new, *arrays[i + 1 :])[place]
        assert relative_error(other, first[place]) > 1e-3


def test_full_precision_is_part_of_the_program(tmp_path):
    """As docs/deploying.md says it is asked for."""
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        _, program, _ = exported(tmp_path)
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(True)
    assert products(program) == {("HIGHEST", "HIGHEST")}


@pytest.mark.parametrize("what", ["variable", "tensor"])
def test_what_is_captured_is_refused(what):
    layer, weight = BPTTRNN(H), tf.random.normal((D, H))
    layer.build((B, T, D))
    call = {"variable": layer, "tensor": lambda x: x @ weight}[what]
    with pytest.raises(ValueError, match="reads what it was not passed: "):
        export.stablehlo(lambda x: tf.reduce_sum(call(x)), [tf.TensorSpec((B, T, D))])


@pytest.mark.parametrize(
    "spec", [tf.TensorSpec((B, None, D)), tf.TensorSpec(None), np.ones((B, T, D))]
)
def test_sizes_must_be_known(spec):
    with pytest.raises(ValueError, match="every size known.* for argument 1"):
        export.stablehlo(lambda w, x: w + x, [tf.TensorSpec(()), spec])


@pytest.mark.parametrize(
    ("body", "count", "message"),
    [
        ("", 3, "must have 3 arguments.*Received: 2"),
        ("%0 = stablehlo.custom_call @cudnn(%arg0)", 2, "calls of cudnn, which"),
        ("%0 = stablehlo.abs %arg0 : tensor<3x?x4xf32>", 2, "static shapes"),
        ("%0 = stablehlo.abs %arg0 : tensor<?xf32>", 2, "static shapes"),
    ],
)
def test_what_one_device_alone_knows_is_refused(body, count, message):
    entry = "func.func @main(%arg0: tensor<f32>, %arg1: tensor<f32>) -> (tensor<f32>) {"
    start, end = f"module {{\n{entry}\n", "\n}"
    assert export.checked(start + end, 2) == start + end
    with pytest.raises(ValueError, match=message):
        export.checked(start + body + end, count)


def test_an_operation_of_one_device_is_seen_in_a_program():
    """What TensorFlow writes for one, in its own words."""
    with pytest.raises(ValueError, match="calls of "):
        export.stablehlo(lambda x: tf.linalg.qr(x)[0], [tf.TensorSpec((4, 4))])


def test_differences_are_of_the_largest_number():
    want = {"a": np.array([1.0, -4.0]), "b": np.array([2, 0])}
    found = comparison.differences([[1.0, -3.0], [2, 0]], want)
    assert found == {"a": 0.25, "b": 0.0}
    assert comparison.checked("step", found, 0.25) == found
    for wrong in ({"a": 0.26}, {"a": np.nan}):
        with pytest.raises(SystemExit, match="step: a differs by"):
            comparison.checked("step", wrong, 0.25)


@pytest.mark.parametrize(
    ("output", "want", "message"),
    [
        (np.zeros(3), np.zeros(3), "nothing to compare with"),
        (np.ones(3), np.full(3, np.nan), "nothing to compare with"),
        (np.ones(3), np.full(3, np.inf), "nothing to compare with"),
        (np.ones((1, 3)), np.ones(3), "shape"),
    ],
)
def test_a_comparison_that_proves_nothing_is_refused(output, want, message):
    with pytest.raises(SystemExit, match=message):
        comparison.differences([output], {"a": want})


HLO = """\
%inner_end (p: (s32[], f32[3])) -> pred[] {
  %limit.3 = s32[]{:T(128)} constant(7), metadata={op_name="a"}
  %other.1 = s32[]{:T(128)} constant(999)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.2, %limit.3), direction=LT
}

%inner_body (p: (s32[], f32[3])) -> (s32[], f32[3]) {
  ROOT %p.1 = (s32[], f32[3]) tuple(%p)
}

%outer_end (q: (s32[], f32[3])) -> pred[] {
  %limit.4 = s32[] constant(5)
  ROOT %less.1 = pred[] compare(s32[] %i.5, s32[] %limit.4), direction=LT
}

%outer_body (q: (s32[], f32[3])) -> (s32[], f32[3]) {
  %while.1 = (s32[], f32[3]) while(%q), condition=%inner_end, body=%inner_body
}

ENTRY %main (x: f32[3]) -> f32[3] {
  %while.2 = (s32[], f32[3]) while(%t), condition=%outer_end, body=%outer_body
  %while.3 = (s32[], f32[3]) while(%u), condition=%inner_end, body=%inner_body
}
"""


def test_sequential_steps_are_those_of_the_innermost_loops():
    assert hlo.sequential_steps(HLO) == 5 * 7 + 7
    known_by_a_run = HLO.replace("s32[] constant(5)", "s32[] parameter(0)")
    assert hlo.sequential_steps(known_by_a_run) is None
    assert hlo.sequential_steps("ENTRY %main (x: f32[3]) -> f32[3] {\n}\n") == 0
    with pytest.raises(ValueError, match="must compare a counter"):
        hlo.sequential_steps(HLO.replace("direction=LT", "direction=NE"))


def test_what_is_not_stablehlo_is_translated():
    text = "module @step attributes {mhlo.is_dynamic = false} {\n%1 = mhlo.copy %0\n}"
    wanted = "module @step {\n%1 = stablehlo.optimization_barrier %0\n}"
    assert translation.translated(text) == wanted
    # Ten truth values: two bytes there, ten here. Other constants stay as they are.
    kept = '\ndense<"0x0100000002000000"> : tensor<2xi32>'
    text = f'dense<"0x0503"> : tensor<2x5xi1>{kept}'
    wanted = f'dense<"0x01000100000000000101"> : tensor<2x5xi1>{kept}'
    assert translation.translated(text) == wanted
    with pytest.raises(ValueError, match="11 truth values.*Received: 1 bytes"):
        translation.translated('dense<"0x05"> : tensor<11xi1>')


def test_configurations_cover_every_option_of_the_gradient():
    names = [configuration.name for configuration in CONFIGURATIONS]
    assert len(set(names)) == len(names) and set(QUICK) < set(names)
    run = set().union(*(c.options for c in CONFIGURATIONS if c.run))
    layers = BPTTRNN, keras.layers.SimpleRNN
    own, theirs = (set(inspect.signature(layer).parameters) for layer in layers)
    assert own - theirs - {"jit_compile"} < run
    assert {c.kind for c in CONFIGURATIONS if c.run} == set(configurations.LAYERS)
    chosen = [c for c in CONFIGURATIONS if c.name in QUICK]
    assert any(c.run for c in chosen) and not all(c.fits for c in chosen)


ENTRY = {"shape": [2, 1000, 3, 4], "options": "full BPTT", "run": False}
KNOWN = {"v4": {"temporaries": 2_600_000, "sequential_steps": 1234}}
LONG = KNOWN | {"v5e": {"temporaries": 0, "sequential_steps": None}}
REFUSED = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (249.87G) exceeds available HBM (15.75G)."
)
RUN = {"run": True, "differences": {"a": 1e-7, "b": 3e-6}, "devices": KNOWN}
RESULTS = {"tensorflow": "1", "jax": "2", "libtpu": "3"}
RESULTS["programs"] = [
    ENTRY | RUN,
    ENTRY | {"devices": LONG},
    ENTRY | {"devices": dict.fromkeys(LONG, {"refused": REFUSED})},
]


def test_rows_of_the_tables():
    rows = table.tables(RESULTS)
    assert rows["accelerators_versions"] == "tensorflow 1, jax 2, libtpu 3"
    (row,) = rows["accelerators_programs"].splitlines()[2:]
    assert row == "| `full BPTT` | 3.0e-06 | 1,234 |"
    first, second = rows["accelerators_memory"].splitlines()[2:]
    assert first == "| (2, 1,000, 3, 4) | `full BPTT` | 1,234 | 3 | 0 |"
    assert second.endswith("| – | refused: 249 GiB of 15 | refused: 249 GiB of 15 |")


def test_the_page_has_a_place_for_every_table(tmp_path, monkeypatch):
    copy = tmp_path / table.PAGE.name
    copy.write_text(table.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(table, "PAGE", copy)
    table.write(RESULTS)
    assert "| (2, 1,000, 3, 4) | `full BPTT` |" in copy.read_text(encoding="utf-8")
    written = json.loads((tmp_path / "deploying" / "accelerators.json").read_text())
    assert written == RESULTS
