"""What editors and type checkers see of BPTT: every argument, RNN's written out.

At run time the signature is put together from the host's, whatever its version.
"""

from typing import Any, Literal

import keras

from keras_bptt.cells.plan import Plan
from keras_bptt.layers.explicit_loop import ExplicitLoop, Named, Policy

class BPTT(ExplicitLoop, keras.layers.RNN):
    def __init__(
        self,
        cell: Any,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        unroll: bool | int = False,
        zero_output_for_mask: bool = False,
        *,
        truncation: Policy = None,
        checkpoint_every: int | Literal["sqrt"] | None = None,
        adjoint_clipnorm: float | None = None,
        adjoint_max_growth: float | None = None,
        output_units: int | None = None,
        output_activation: Named = None,
        jit_compile: bool | Literal["auto"] = "auto",
        name: str | None = None,
        dtype: Any = None,
        trainable: bool = True,
        **kwargs: Any,
    ) -> None: ...
    def plan(self) -> Plan: ...
