"""Exported programs in one file, with a list of what they are. No TensorFlow, no JAX."""

import json
import os
import re
import zipfile

LIST = "programs.json"


def write(path, header, programs):
    """A file of programs, each compressed: they are text.

    Args:
        path: of the file.
        header: what is the same for all of them, for JSON.
        programs: pairs of an entry for the list and the program.
    """
    entries, part = [], path.with_suffix(".part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for entry, text in programs:
            name = f"{len(entries):03}.mlir"
            file.writestr(name, text)
            entries.append(entry | {"file": name})
        file.writestr(LIST, json.dumps(header | {"programs": entries}, indent=1))
    os.replace(part, path)


class Bundle:
    """What `write` wrote."""

    def __init__(self, path):
        self.path = path
        with zipfile.ZipFile(path) as file:
            self.header = json.loads(file.read(LIST))
        self.entries = self.header.pop("programs")

    def programs(self, race):
        """The texts of those who compute this race, by the names of the contestants."""
        wanted = {"task": race.task, "shape": list(race.shape), "low": race.low}
        found = [e for e in self.entries if all(e[k] == v for k, v in wanted.items())]
        with zipfile.ZipFile(self.path) as file:
            texts = {e["contestant"]: file.read(e["file"]).decode() for e in found}
        if race.precision == "float32":
            texts = {name: in_full_precision(text) for name, text in texts.items()}
        return texts


def in_full_precision(text):
    """The program that asks for all bits of float32 in every product.

    It is the one that is exported after
    `tf.config.experimental.enable_tensor_float_32_execution(False)`: the precision is part
    of the program, and neither a flag of JAX nor of XLA changes it.
    """
    products = len(re.findall(r"stablehlo\.dot(_general)?\b", text))
    text, changed = re.subn(
        r"precision = \[DEFAULT, DEFAULT\]", "precision = [HIGHEST, HIGHEST]", text
    )
    if changed != products:
        raise ValueError(
            "Every product of the program must name the precision DEFAULT. Received: "
            f"{products} products and {changed} such names. Read how this version of "
            "TensorFlow writes them."
        )
    return text
