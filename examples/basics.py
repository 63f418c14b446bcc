"""What all examples share: a folder for what they write."""

import math
import pathlib

# Git ignores build/: a clean clone stays clean, whatever example runs in it.
OUTPUT = pathlib.Path("build/examples")


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
