"""Race exported training steps of BPTTRNN with PyTorch and JAX, on whatever device is here.

    make gpu-bundle                                      # with TensorFlow: build/gpu.zip
    python benchmarks/accelerators/gpu.py build/gpu.zip  # with the GPU: seven minutes
    python benchmarks/accelerators/gpu_table.py          # writes docs/performance.md

The machine with the GPU needs `benchmarks/`, the bundle, and Python with JAX, flatbuffers
and PyTorch; no TensorFlow and no network. git ignores the bundle: where a repository is
sent without what git ignores, name `build/gpu.zip`. Results go to `gpu.json` beside this
file, or to `--output FILE`: one small file to bring back here.

It is whole after every row, the most telling rows first: a run that is cut off at any
minute has a table. Another call with the same file goes on where that one ended.
`--seconds` is for the whole call; what does not fit is left out, by name. A race that hangs
or ends its process is given up, by name, and the next one begins in a new process.

`tf32`, `float32` and `bfloat16` are what all contestants alike compute products in;
`--precisions` chooses. Whoever's gradients differ from those that JAX derives is reported,
and not timed.
"""

import argparse
import dataclasses
import os
import pathlib
import tempfile
import time

import bundle
import races
from results import Results, entry, shown
from workers import Failure, Silence, Worker

OUTPUT = pathlib.Path(__file__).with_name("gpu.json")
SECONDS = 430  # with the start of a machine and the way back, below eight minutes
LONGEST = 120  # of one item; a process that is silent for longer hangs
FIRST_GUESS = 40  # of an item of which none was measured


def serve(connection, path):
    """In a process of its own: say what the machine is, then measure what is asked for."""
    import race  # JAX and PyTorch, which the command itself does without

    programs = bundle.Bundle(path)
    connection.send(race.machine())
    while True:
        what, asked = connection.recv()
        try:
            answer = race.measured(what, asked, programs.programs(asked))
        except Exception as error:  # a race that fails whole is a row that says so
            answer = {"race": {"failure": race.said(error)}}
        connection.send(answer)


def expected(what, race, rows):
    """Seconds that an item takes, judged by the most similar one that was measured."""

    def unlike(row):
        fields = dataclasses.asdict(race)
        return sum(row["race"][key] != value for key, value in fields.items())

    similar = [row for row in rows if row["what"] == what]
    if not similar:
        return FIRST_GUESS
    nearest = min(similar, key=unlike)
    return nearest["seconds"] * max(1, race.timesteps / nearest["race"]["timesteps"])


def run(items, worker, results, deadline):
    """Measure one item after the other, each only if it is expected to end in time."""
    for what, race in items:
        if results.done(what, race):
            continue
        left = max(0, deadline - time.monotonic())
        needed = expected(what, race, results.known["rows"])
        if needed > left:
            results.leave_out(
                what, race, f"needs {needed:.0f} s, {left:.0f} s are left"
            )
            continue
        start = time.monotonic()
        row = entry(what, race)
        try:
            row["contestants"] = worker.measure(what, race, min(left, LONGEST))
        except Failure as failure:
            if isinstance(failure, Silence) and left < LONGEST:
                results.leave_out(what, race, "cut off at the end of the time")
                continue
            row["contestants"] = {"race": {"failure": str(failure)}}
        if broken(row):
            worker.stop()
        results.add(row | {"seconds": time.monotonic() - start})
        print(f"{time.monotonic() - start:5.1f} s  {shown(row)}", flush=True)
    results.write()


def check(machine):
    """JAX falls back to the CPU where it cannot use the GPU; that would be no race."""
    here = machine.get("torch_device", machine["platform"])
    if (here == "cpu") != (machine["platform"] == "cpu"):
        raise SystemExit(
            "JAX and PyTorch must compute on the same device. Received: JAX on "
            f"{machine['platform']}, PyTorch on {here}. Look at JAX_PLATFORMS, "
            "CUDA_VISIBLE_DEVICES, and at what JAX says when it starts."
        )


def broken(row):
    """Whether the next row had better begin in a new process: an error of CUDA stays."""
    failures = [known.get("failure") or "" for known in row["contestants"].values()]
    return any("Error" in failure for failure in failures)


def prepare(environment, folder):
    """Settings that JAX reads when it is imported, in the processes that measure."""
    # JAX would take three quarters of the memory at once, and leave PyTorch the rest.
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # What one process compiled another need not.
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", folder)
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def chosen(args, programs):
    """The items of the grid that are asked for and exported, in their order."""
    grid = races.QUICK if programs.header["quick"] else races.FULL

    def wanted(race):
        asked = {"precision": args.precisions, "task": args.tasks}
        asked |= {"batch": args.batches, "units": args.units}
        asked |= {"timesteps": args.timesteps}
        return all(
            values is None or getattr(race, key) in values
            for key, values in asked.items()
        )

    items = grid.items([race for race in grid.races() if wanted(race)])
    return [item for item in items if item[0] in args.what]


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=pathlib.Path, help="what export_gpu.py wrote")
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT)
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="of the whole call"
    )
    what = ["time", "memory"]
    parser.add_argument("--what", nargs="+", choices=what, default=what)
    parser.add_argument("--precisions", nargs="+", choices=races.PRECISIONS)
    parser.add_argument("--tasks", nargs="+", choices=races.TASKS)
    for name in ("batches", "units", "timesteps"):
        parser.add_argument(f"--{name}", nargs="+", type=int)
    return parser.parse_args()


def main():
    deadline = time.monotonic()
    args = parsed()
    deadline += args.seconds
    programs = bundle.Bundle(args.bundle)
    items = chosen(args, programs)
    if not items:
        raise SystemExit("nothing of the grid is asked for: see --help, and races.py")
    with tempfile.TemporaryDirectory() as folder:
        prepare(os.environ, folder)
        worker = Worker(serve, args.bundle)
        try:
            machine = worker.start(min(args.seconds, LONGEST))
            print(machine, flush=True)
            check(machine)
            header = {"machine": machine, "bundle": programs.header}
            results = Results(args.output, header)
            results.write()
            run(items, worker, results, deadline)
        except Failure as failure:
            raise SystemExit(f"no process could begin: {failure}") from None
        finally:
            worker.stop()
    rows, left = results.known["rows"], results.known["left_out"]
    print(f"{args.output}: {len(rows)} rows; {len(left)} left out for time")


if __name__ == "__main__":
    main()
