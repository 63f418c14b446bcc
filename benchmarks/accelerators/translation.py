"""A program as TensorFlow writes it, in the words that JAX's reader of StableHLO knows."""

import math
import re

import numpy as np


def translated(text):
    """The same program, without what is TensorFlow's own."""
    # Notes on the module, and an identity.
    text = re.sub(r"^(module @\S+) attributes \{.*\} \{$", r"\1 {", text, flags=re.M)
    text = re.sub(r"\bmhlo\.copy\b", "stablehlo.optimization_barrier", text)
    return re.sub(r'"0x([0-9A-F]+)"(?=> : tensor<([\dx]+)xi1>)', _unpacked, text)


def _unpacked(constant):
    """An array of truth values, a byte each: one writes them in bits, one reads bytes."""
    size = math.prod(map(int, constant[2].split("x")))
    packed = np.frombuffer(bytes.fromhex(constant[1]), np.uint8)
    if len(packed) != -(-size // 8):
        raise ValueError(
            f"A constant of {size} truth values must be packed in bits. Received: "
            f"{len(packed)} bytes. Read how this version of TensorFlow writes them."
        )
    unpacked = np.unpackbits(packed, count=size, bitorder="little")
    return f'"0x{unpacked.tobytes().hex().upper()}"'
