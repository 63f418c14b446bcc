"""One race where it is run: gradients first, then times; or memory.

Needs JAX and no TensorFlow. PyTorch takes part where it is installed.
"""

import concurrent.futures
import functools
import gc
import importlib.metadata
import pathlib
import subprocess
import sys

import agreement
import jax
import numpy as np
import peers_jax
import problem
from peaks import peaks
from program import load

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import timing  # noqa: E402

try:
    import peers_torch
except ImportError:
    peers_torch = None

SECONDS, ROUNDS = 2.0, 5
JAX_PRECISIONS = {"float32": "highest", "tf32": "default", "bfloat16": "default"}


def machine():
    """What the numbers depend on."""
    device = jax.devices()[0]
    names = "jax", "jaxlib", "torch", "numpy"
    found = {name: _version(name) for name in names}
    found |= {"python": sys.version.split()[0], "driver": _driver()}
    if peers_torch is not None:
        torch = peers_torch.torch
        found |= {"torch_device": str(peers_torch.device()), "cuda": torch.version.cuda}
        found["cudnn"] = torch.backends.cudnn.version()
    return {"platform": device.platform, "card": device.device_kind} | found


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver():
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class Contestants:
    """Those of one race, each a function of nothing that returns when all is computed.

    Attributes:
        steps: by name; those that could be made.
        failures: by name, why one takes no part or no further part.
        temporaries: bytes beside what it is given, by name, as XLA's compiler says.
    """

    def __init__(self, race, programs):
        self.race, self.steps, self.failures, self.temporaries = race, {}, {}, {}
        x, y, weights = problem.arrays(race)
        self._compile(self._functions(programs), x, y, weights)
        if peers_torch is None:
            self.failures["torch.nn.RNN"] = "PyTorch is not installed"
        else:
            self.attempt("torch.nn.RNN", self._with_torch, x, y, weights)

    def _functions(self, programs):
        """Of x, y and the weights, by name."""
        functions = {}
        for name, text in programs.items():
            loaded = self.attempt(name, load, text)
            if loaded is not None:
                functions[name] = loaded[0]
        return functions | peers_jax.functions(self.race)

    def _compile(self, functions, x, y, weights):
        """All at the same time, each for the arrays on the device."""
        x = jax.numpy.asarray(x, "bfloat16" if self.race.low else "float32")
        given = jax.block_until_ready([jax.device_put(a) for a in (x, y, *weights)])
        with jax.default_matmul_precision(JAX_PRECISIONS[self.race.precision]):
            lowered = {
                name: self.attempt(name, lambda f: jax.jit(f).lower(*given), function)
                for name, function in functions.items()
            }
        with concurrent.futures.ThreadPoolExecutor() as pool:
            made = {n: pool.submit(low.compile) for n, low in lowered.items() if low}
        for name, future in made.items():
            self.attempt(name, self._keep, name, future, given)

    def _keep(self, name, future, given):
        compiled = future.result()
        self.temporaries[name] = compiled.memory_analysis().temp_size_in_bytes
        self.steps[name] = lambda: jax.block_until_ready(compiled(*given))

    def _with_torch(self, x, y, weights):
        self.steps |= peers_torch.functions(self.race, x, y, weights)

    def attempt(self, name, function, *arguments):
        """What it returns; None where it fails, which ends this contestant's part alone."""
        try:
            return function(*arguments)
        except Exception as error:  # of whatever kind: the others go on
            self.failures[name] = said(error)
            self.steps.pop(name, None)

    def agree(self):
        """Call each once; those that disagree with the judge take no further part.

        Returns what is known of each by name: how far its gradients are from the judge's.
        """
        known, gradients = {}, {}
        for name in list(self.steps):
            outputs = self.attempt(name, self.steps[name])
            if outputs is not None:
                known[name] = {}
                gradients[name] = [as_numpy(output) for output in outputs]
        verdicts = agreement.judged(gradients, agreement.BOUNDS[self.race.precision])
        for name, (difference, failure) in verdicts.items():
            known[name]["difference"] = difference
            if failure:
                self.failures[name] = failure
                self.steps.pop(name)
        for name, size in self.temporaries.items():
            known.setdefault(name, {})["compiler_mb"] = size / 1e6
        return known


def said(error):
    """The first line of an error, and its kind."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:300]}"


def as_numpy(output):
    if peers_torch is not None and isinstance(output, peers_torch.torch.Tensor):
        output = output.float().cpu().numpy()
    return np.asarray(output).astype("float32")


def times(contestants):
    """Milliseconds of those who agree, in turns."""
    known = contestants.agree()
    if contestants.steps:
        # A first call of each was made. What is timed is whole: to the device's last word.
        found = timing.interleaved(contestants.steps, SECONDS, ROUNDS, warm=False)
        for name, ms in timing.summary(found).items():
            known[name]["ms"] = ms | {"rounds": len(found[name])}
    return known


def memory(contestants):
    """Megabytes at the peak of a step beside what it is given, as the device tells it.

    JAX tells the peak of the process so far, which nothing resets. So its programs go up
    in size, as the compiler says; of one that does not raise the peak it is not known.
    """
    sizes = contestants.temporaries
    steps = {
        name: functools.partial(contestants.attempt, name, step)
        for name, step in contestants.steps.items()
    }
    by_size = sorted(sizes.keys() & steps.keys(), key=sizes.get)
    known = peaks({name: steps.pop(name) for name in by_size}, jax_told)
    if peers_torch is not None:
        known |= peaks(steps, peers_torch.told, peers_torch.reset_peak)
    for name, size in sizes.items():
        known.setdefault(name, {})["compiler_mb"] = size / 1e6
    return known


def jax_told():
    """Bytes in use and their peak so far, or None and None of a device that counts none."""
    gc.collect()
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_in_use"), stats.get("peak_bytes_in_use")


WHAT = {"time": times, "memory": memory}


def measured(what, race, programs):
    """What is known of each contestant of a race, by name."""
    contestants = Contestants(race, programs)
    known = WHAT[what](contestants)
    for name, failure in contestants.failures.items():
        known.setdefault(name, {})["failure"] = failure
    contestants.steps.clear()
    gc.collect()
    if peers_torch is not None:
        peers_torch.torch.cuda.empty_cache()
    return known
