"""Compile the programs that gpu.py races for an NVIDIA H100 that is not here.

    python benchmarks/accelerators/compile_gpu.py build/gpu.zip
    python benchmarks/accelerators/compile_gpu.py build/gpu.zip --all

In the environment of `requirements_gpu.txt`; `make gpu-compile` does it. XLA's compiler for
NVIDIA GPUs is told what an H100 is, and needs none. Nothing is executed: a program is
accepted or refused, and the compiler says what memory it takes. By default the races that
come first and the largest, with `--all` every one. Ends with a non-zero status where a
program is refused, or does not fit into the memory.
"""

import argparse
import os
import pathlib
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import bundle  # noqa: E402
import jax  # noqa: E402
import races  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402
from program import load  # noqa: E402

# What the compiler asks about a GPU, by the data sheet and CUDA's tables of its generation.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 patch: 0 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
}
"""
MEMORY = 84_942_979_072
# To choose between kernels the compiler would have to run them; NVIDIA's need no choice.
OPTIONS = {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": "False"}


def place():
    """On one H100."""
    described = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=H100, topology="1x1x1"
    )
    return SingleDeviceSharding(described.devices[0])


def taken(text, where):
    """Bytes that a program takes: arguments and results, and beside them."""
    function, arguments = load(text)
    jitted = jax.jit(function, in_shardings=where, out_shardings=where)
    lowered = jitted.trace(*arguments).lower(lowering_platforms=("cuda",))
    memory = lowered.compile(compiler_options=OPTIONS).memory_analysis()
    given = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return given, memory.temp_size_in_bytes


def chosen(grid, everything):
    """One of each program: float32 is tf32 but for a word."""
    found = [race for race in grid.races() if race.precision != "float32"]
    largest = max(race.batch * race.timesteps * race.units for race in found)
    return [
        race
        for race in found
        if everything
        or grid.distance(race) < 2
        or race.batch * race.timesteps * race.units == largest
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=pathlib.Path, help="what export_gpu.py wrote")
    parser.add_argument("--all", action="store_true", help="every program")
    args = parser.parse_args()
    programs, where, count = bundle.Bundle(args.bundle), place(), 0
    grid = races.QUICK if programs.header["quick"] else races.FULL
    for race in chosen(grid, args.all):
        for name, text in programs.programs(race).items():
            start = time.perf_counter()
            given, beside = taken(text, where)
            print(
                f"{name} {race.task} {race.shape} {race.precision}: {given / 1e6:,.0f} MB "
                f"and {beside / 1e6:,.0f} MB beside; {time.perf_counter() - start:.0f} s",
                flush=True,
            )
            if given + beside > MEMORY:
                raise SystemExit(f"more than the {MEMORY / 1e9:.0f} GB of an H100")
            count += 1
    print(f"{count} programs compiled by JAX {jax.__version__}, none refused")


if __name__ == "__main__":
    main()
