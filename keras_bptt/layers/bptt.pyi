"""What editors and type checkers see of BPTT: every argument, RNN's written out.

At run time the signature is put together from the host's, whatever its version.
"""

from collections.abc import Callable
from typing import Any, Literal

import keras

from keras_bptt.cells.plan import Plan
from keras_bptt.truncation import RandomizedTruncation, Truncation

_Named = str | dict[str, Any] | Callable[..., Any] | None
_Policy = int | Truncation | RandomizedTruncation | None

class BPTT(keras.layers.RNN):
    output_layer: keras.layers.Dense | None

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
        truncation: _Policy = None,
        checkpoint_every: int | Literal["sqrt"] | None = None,
        adjoint_clipnorm: float | None = None,
        adjoint_max_growth: float | None = None,
        output_units: int | None = None,
        output_activation: _Named = None,
        jit_compile: bool | Literal["auto"] = "auto",
        name: str | None = None,
        dtype: Any = None,
        trainable: bool = True,
        **kwargs: Any,
    ) -> None: ...
    def plan(self) -> Plan: ...
    @property
    def truncation(self) -> Truncation | RandomizedTruncation | None: ...
    @truncation.setter
    def truncation(self, value: _Policy) -> None: ...
    @property
    def checkpoint_every(self) -> int | Literal["sqrt"] | None: ...
    @checkpoint_every.setter
    def checkpoint_every(self, value: int | Literal["sqrt"] | None) -> None: ...
    @property
    def adjoint_clipnorm(self) -> float | None: ...
    @adjoint_clipnorm.setter
    def adjoint_clipnorm(self, value: float | None) -> None: ...
    @property
    def adjoint_max_growth(self) -> float | None: ...
    @adjoint_max_growth.setter
    def adjoint_max_growth(self, value: float | None) -> None: ...
    @property
    def jit_compile(self) -> bool | Literal["auto"]: ...
    @jit_compile.setter
    def jit_compile(self, value: bool | Literal["auto"]) -> None: ...
    @property
    def unroll(self) -> bool: ...
    @unroll.setter
    def unroll(self, value: bool | int) -> None: ...
    @property
    def output_units(self) -> int | None: ...
    @property
    def output_activation(self) -> Callable[..., Any] | None: ...
