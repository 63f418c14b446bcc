"""What editors and type checkers see of what the layers have in common: their options."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import keras

from keras_bptt.cells.cell import Cell
from keras_bptt.truncation import RandomizedTruncation, Truncation

Named = str | dict[str, Any] | Callable[..., Any] | None
Policy = int | Truncation | RandomizedTruncation | None

def signature_of(host: type) -> Any: ...

class Step(NamedTuple):
    cell: Cell
    weights: list
    noise: tuple
    xla_compiles: Callable[[], bool]

class ExplicitLoop:
    output_layer: keras.layers.Dense | None

    @property
    def truncation(self) -> Truncation | RandomizedTruncation | None: ...
    @truncation.setter
    def truncation(self, value: Policy) -> None: ...
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
