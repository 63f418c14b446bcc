"""Run exported training steps under JAX, and compile them for TPUs that are not here.

    python benchmarks/accelerators/compile.py build/accelerators
    python benchmarks/accelerators/compile.py build/accelerators --devices v5e
    python benchmarks/accelerators/compile.py build/accelerators --write

In an environment of its own, without TensorFlow (`requirements.txt`); `make accelerators`
makes it. Each program that `export.py` wrote with its data is run, on the CPU if
JAX_PLATFORMS says nothing else, and must give what TensorFlow gave. Each is compiled by
the compiler of Cloud TPUs, which needs none of them, and tells what memory the program
takes. Nothing is executed on a TPU. `--write` puts the numbers into docs/deploying.md.

The checks are seen to fail, too: a program with another activation must differ, one with a
wrong shape must be refused, and so must one that is too large. Ends with a non-zero status
where anything is accepted that should not be, or refused.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import re
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The compiler is to ask nobody for a TPU, and to run beside another process of its kind.
os.environ.update(
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_LOG_DIR="disabled",
)

import comparison  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import table  # noqa: E402
from hlo import sequential_steps  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402
from program import load  # noqa: E402

# The smallest group of each that the compiler knows. The programs are for one of them.
DEVICES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
TOO_LARGE = "Ran out of memory on HBM"


def run(text, data):
    """How far what the program gives under JAX is from what TensorFlow gave, by name."""
    function, arguments = load(text)
    values = [data[name] for name in data if name.startswith("in ")]
    if [(v.shape, v.dtype) for v in values] != [(a.shape, a.dtype) for a in arguments]:
        raise SystemExit("a program and its data are not of one export: export again")
    expected = {name[4:]: data[name] for name in data if name.startswith("out ")}
    return comparison.differences(jax.jit(function)(*values), expected)


def compile_for(device, text):
    """Bytes and sequential steps of the program on a TPU; or why it is refused."""
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=DEVICES[device]
    ).devices[0]
    place = SingleDeviceSharding(described)
    try:
        function, arguments = load(text)
        jitted = jax.jit(function, in_shardings=place, out_shardings=place)
        lowered = jitted.trace(*arguments).lower(lowering_platforms=("tpu",))
        compiled = lowered.compile()
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        return {"refused": str(error)}
    memory = compiled.memory_analysis()
    return {
        "kind": described.device_kind,
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "sequential_steps": sequential_steps(compiled.as_text()),
    }


def check(entry, folder, devices):
    """Run and compile one program; returns its entry with the results."""
    text = (folder / f"{entry['name']}.mlir").read_text()
    result = dict(entry)
    if entry["run"]:
        low = entry["low_precision"]
        bound = comparison.BFLOAT16 if low else comparison.FLOAT32
        found = run(text, data_of(entry, folder))
        result["differences"] = comparison.checked(entry["name"], found, bound)
    result["devices"] = {device: compile_for(device, text) for device in devices}
    for device, compiled in result["devices"].items():
        refused = compiled.get("refused", "")
        if entry["fits"] and refused:
            raise SystemExit(f"{entry['name']}: refused for {device}: {refused}")
        if not entry["fits"] and TOO_LARGE not in refused:
            raise SystemExit(
                f"{entry['name']}: too large for {device}, but not refused for that: "
                f"{refused or 'accepted'}"
            )
    return result


def data_of(entry, folder):
    with np.load(folder / f"{entry['name']}.npz") as data:
        return dict(data)


def controls(entries, folder, device):
    """See the checks fail, for programs that are wrong in one place."""
    if all(entry["fits"] for entry in entries):
        raise SystemExit("no program is too large: export again, with one that is")
    entry = next(entry for entry in entries if entry["run"])
    text = (folder / f"{entry['name']}.mlir").read_text()
    # Everywhere, for the text also has functions that nothing calls.
    changed = text.replace("stablehlo.tanh", "stablehlo.logistic")
    difference = max(run(changed, data_of(entry, folder)).values())
    if not difference > 10 * comparison.BFLOAT16:
        raise SystemExit(f"another activation, and all differs by {difference:.1e}")
    pattern = r"(stablehlo\.tanh .* tensor<)\d+"
    wrong = re.sub(pattern, r"\g<1>7", text, count=1)
    refused = compile_for(device, wrong).get("refused")
    if not refused:
        raise SystemExit(f"a result of a wrong shape is not refused for {device}")
    return {"other_activation": difference, "wrong_shape": refused.splitlines()[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, help="what export.py wrote")
    parser.add_argument("--devices", nargs="+", choices=DEVICES, default=list(DEVICES))
    parser.add_argument("--write", action="store_true", help="into docs/deploying.md")
    args = parser.parse_args()
    results = json.loads((args.folder / "programs.json").read_text())
    entries = results["programs"]
    results |= {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    results["controls"] = controls(entries, args.folder, args.devices[0])
    print(f"seen to fail: {results['controls']}", flush=True)
    for i, entry in enumerate(entries):
        start = time.perf_counter()
        entries[i] = check(entry, args.folder, args.devices)
        print(f"{entry['name']}: {time.perf_counter() - start:.0f} s", flush=True)
    print(*table.tables(results).values(), sep="\n\n")
    if args.write:
        table.write(results)


if __name__ == "__main__":
    main()
