"""One race where it is run: gradients first, then times or memory. Needs JAX, no TensorFlow.

PyTorch takes part where it is installed.
"""

import concurrent.futures
import gc
import importlib.metadata
import pathlib
import subprocess
import sys
import time

import comparison
import jax
import numpy as np
import peers_jax
import problem
from program import load

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import timing  # noqa: E402

try:
    import peers_torch
except ImportError:
    peers_torch = None

NAMES = "loss", "d_kernel", "d_recurrent_kernel", "d_bias"
# Of the largest number of a gradient, from that of the judge. Float32 rounds to 6e-8, TF32
# to 5e-4, bfloat16 to 4e-3, and thousands of steps carry such errors on. A wrong path of the
# gradient is of another size: chunks differ from full BPTT by more than a tenth.
BOUNDS = {"float32": 2e-4, "tf32": 1e-2, "bfloat16": 5e-2}
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
            self._attempt("torch.nn.RNN", self._with_torch, x, y, weights)

    def _functions(self, programs):
        """Of x, y and the weights, by name."""
        functions = {}
        for name, text in programs.items():
            self._attempt(name, lambda: functions.update({name: load(text)[0]}))  # noqa: B023
        return functions | peers_jax.functions(self.race)

    def _compile(self, functions, x, y, weights):
        """All at the same time, each for the arrays on the device."""
        x = jax.numpy.asarray(x, "bfloat16" if self.race.low else "float32")
        given = jax.block_until_ready([jax.device_put(a) for a in (x, y, *weights)])
        lowered = {}
        with jax.default_matmul_precision(JAX_PRECISIONS[self.race.precision]):
            for name, function in functions.items():
                # A function that is not used any more, under the name of this one.
                self._attempt(
                    name,
                    lambda: lowered.update({name: jax.jit(function).lower(*given)}),  # noqa: B023
                )
        with concurrent.futures.ThreadPoolExecutor() as pool:
            made = {name: pool.submit(low.compile) for name, low in lowered.items()}
        for name, future in made.items():
            self._attempt(name, self._keep, name, future, given)

    def _keep(self, name, future, given):
        compiled = future.result()
        self.temporaries[name] = compiled.memory_analysis().temp_size_in_bytes
        self.steps[name] = lambda: jax.block_until_ready(compiled(*given))

    def _with_torch(self, x, y, weights):
        self.steps |= peers_torch.functions(self.race, x, y, weights)

    def _attempt(self, name, function, *arguments):
        """What it returns; None where it fails, which ends this contestant's part alone."""
        try:
            return function(*arguments)
        except Exception as error:  # of whatever kind: the others go on
            self.failures[name] = said(error)
            self.steps.pop(name, None)

    def agree(self):
        """Call each once; those that disagree with the judge take no further part.

        Returns what is known of each by name: the seconds of the first call and how far its
        gradients are from the judge's.
        """
        known, gradients = {}, {}
        for name in list(self.steps):
            start = time.perf_counter()
            outputs = self._attempt(name, self.steps[name])
            if outputs is not None:
                known[name] = {"first_call_s": time.perf_counter() - start}
                gradients[name] = [as_numpy(output) for output in outputs]
        for name, difference, failure in judged(gradients, BOUNDS[self.race.precision]):
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


def judged(gradients, bound):
    """Of each name: how far its outputs are from the judge's, and what is wrong, or None."""
    judge = gradients.get(peers_jax.JUDGE)
    for name, outputs in gradients.items():
        difference = failure = None
        if judge is None:
            failure = f"nothing to compare with: no gradient of {peers_jax.JUDGE}"
        else:
            try:
                wanted = dict(zip(NAMES, judge, strict=True))
                found = comparison.differences(outputs, wanted)
                # NaN, of which the largest is not to be had, first.
                worst = max(found, key=lambda key: (found[key] != found[key], found[key]))
                difference = found[worst]
                if not difference <= bound:
                    failure = f"disagrees: {worst} by {difference:.1e}"
            except (SystemExit, ValueError) as error:
                failure = f"disagrees: {error}"
        yield name, difference, failure


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

    JAX tells the peak of the process so far, and nothing resets it. So its programs go up in
    size, as the compiler says, and one that does not raise the peak is not known.
    """
    known = {name: {"mb": None} for name in contestants.steps}
    sizes = contestants.temporaries
    for name in sorted(contestants.steps, key=lambda name: sizes.get(name, np.inf)):
        before, peak = told(name in sizes)
        contestants._attempt(name, contestants.steps[name])
        _, after = told(name in sizes)
        known[name]["mb"] = beside(before, peak, after)
    for name, size in sizes.items():
        known.setdefault(name, {})["compiler_mb"] = size / 1e6
    return known


def beside(before, peak, after):
    """Megabytes of a peak above what was in use before; None where it is not known."""
    return None if before is None or after <= peak else (after - before) / 1e6


def told(by_jax):
    """Bytes in use and their peak, as the allocator counts them; None where it does not."""
    gc.collect()
    if by_jax:
        stats = jax.devices()[0].memory_stats() or {}
        return stats.get("bytes_in_use"), stats.get("peak_bytes_in_use")
    cuda = peers_torch.torch.cuda
    if not cuda.is_available():
        return None, None
    return cuda.memory_allocated(), cuda.max_memory_allocated()


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
