"""A program of StableHLO that TensorFlow exported, as a function of JAX. No TensorFlow.

JAX loads what its own `jax.export` wrote. So a function with the same arguments and results
is exported, and its module replaced by the program.
"""

import dataclasses
import re

import jax
from jax import export
from jaxlib.mlir.dialects import stablehlo
from translation import translated

# Random generators have states of 64-bit integers.
jax.config.update("jax_enable_x64", True)

TYPES = {"i1": "bool", "i64": "int64", "bf16": "bfloat16", "f32": "float32"}
FORM = stablehlo.get_version_from_compatibility_requirement(
    stablehlo.StablehloCompatibilityRequirement.WEEK_4
)


def load(text):
    """The program as a function, and the shapes and types of its arguments."""
    text = translated(text)
    entry = next(line for line in text.splitlines() if "@main(" in line)
    arguments, results = (_types(part) for part in entry.split("->"))

    def same_types(*_):
        return tuple(jax.numpy.zeros(result.shape, result.dtype) for result in results)

    # The device is chosen where the function is compiled, not here.
    exported = export.export(
        jax.jit(same_types, keep_unused=True),
        platforms=["cpu"],
        disabled_checks=[export.DisabledSafetyCheck.platform()],
    )(*arguments)
    module = stablehlo.serialize_portable_artifact_str(text, FORM)
    return dataclasses.replace(exported, mlir_module_serialized=module).call, arguments


def _types(text):
    """Of `tensor<3x4xf32>` and the like, in order."""
    found = []
    for tensor in re.findall(r"tensor<([^>]*)>", text):
        *sizes, kind = tensor.split("x")
        found.append(jax.ShapeDtypeStruct(tuple(map(int, sizes)), TYPES[kind]))
    return found
