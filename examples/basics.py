"""What all examples share: a quiet start of TensorFlow, and a folder for what they write.

Import it first: it imports TensorFlow.
"""

import contextlib
import importlib
import math
import os
import pathlib
import shutil
import subprocess
import sys

# Git ignores build/: a clean clone stays clean, whatever example runs in it.
OUTPUT = pathlib.Path("build/examples")

# What TensorFlow says on its start where nothing is wrong: information, that there is no
# driver of NVIDIA (error 303), and, up to 2.20, that it registers some things twice.
START_UP = (
    r"^WARNING: All log messages before absl::InitializeLog"
    r"|^I[0-9]{4} |^[-0-9]+ [:.0-9]+: I "
    r"|failed call to cuInit: .*UNKNOWN ERROR \(303\)"
    r"|Unable to register cu[A-Z]+ factory|computation placer already registered"
)


@contextlib.contextmanager
def without(pattern):
    """Leaves out lines of stderr that match, where there is grep; all others are shown.

    By a process that outlives this one, lest the reason be lost where this one aborts.
    """
    if not shutil.which("grep"):
        yield
        return
    sieve = ["grep", "--line-buffered", "-Ev", pattern]
    shown = os.dup(2)
    with subprocess.Popen(sieve, stdin=subprocess.PIPE, stdout=shown) as process:
        os.dup2(process.stdin.fileno(), 2)
        process.stdin.close()
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(shown, 2)
            os.close(shown)


def start():
    """Imports TensorFlow quietly, unless TF_CPP_MIN_LOG_LEVEL=0 (or 1) asks for more.

    The variable alone does not do: TensorFlow reads it after its libraries have spoken.
    """
    level = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    talkative = level in ("0", "1")
    with contextlib.nullcontext() if talkative else without(START_UP):
        tf = importlib.import_module("tensorflow")
        tf.config.list_physical_devices()  # asks the driver of the GPU


def add_output(parser, smoke):
    """The options that every example has; `smoke` says what a short run does."""
    add = parser.add_argument
    add("--output-dir", type=pathlib.Path, default=OUTPUT, help="for all files")
    add("--smoke", action="store_true", help=f"{smoke}; files in {OUTPUT / 'smoke'}")


def make_output(parser, args):
    """Makes the folder now, not after minutes of training."""
    if args.smoke and args.output_dir == OUTPUT:
        args.output_dir = OUTPUT / "smoke"  # the results of a whole run stay
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output-dir must be a folder that can be made: {error}")


def check_positive(parser, args):
    """Of all numbers but the seed."""
    for name, value in vars(args).items():
        if type(value) in (int, float) and name != "seed" and not 0 < value < math.inf:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} must be a positive number. Received: {value}")


start()
