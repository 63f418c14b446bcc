"""What editors and type checkers see of BPTTLSTM: every argument, LSTM's written out.

At run time the signature is put together from the host's, whatever its version.
"""

from typing import Any, Literal

import keras

from keras_bptt.layers.explicit_loop import ExplicitLoop, Named, Policy

class BPTTLSTM(ExplicitLoop, keras.layers.LSTM):
    def __init__(
        self,
        units: int,
        activation: Named = "tanh",
        recurrent_activation: Named = "sigmoid",
        use_bias: bool = True,
        kernel_initializer: Named = "glorot_uniform",
        recurrent_initializer: Named = "orthogonal",
        bias_initializer: Named = "zeros",
        unit_forget_bias: bool = True,
        kernel_regularizer: Named = None,
        recurrent_regularizer: Named = None,
        bias_regularizer: Named = None,
        activity_regularizer: Named = None,
        kernel_constraint: Named = None,
        recurrent_constraint: Named = None,
        bias_constraint: Named = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        seed: int | None = None,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        unroll: bool | int = False,
        use_cudnn: Literal["auto", False] = "auto",
        *,
        truncation: Policy = None,
        checkpoint_every: int | Literal["sqrt"] | None = None,
        adjoint_clipnorm: float | None = None,
        adjoint_max_growth: float | None = None,
        output_units: int | None = None,
        output_activation: Named = None,
        jit_compile: bool | Literal["auto"] = "auto",
        zero_output_for_mask: bool = False,
        name: str | None = None,
        dtype: Any = None,
        trainable: bool = True,
        **kwargs: Any,
    ) -> None: ...
