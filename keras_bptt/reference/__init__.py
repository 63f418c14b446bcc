"""The mathematics in NumPy, float64 and plain loops: what everything else is compared with.

It shares no code with the rest of the package. `simple_rnn` is the plain RNN as the cheat
sheet has it, `truncation` its truncated and clipped gradients, path by path. `lstm` and
`gru` are the two cells with gates, `gated` the check of their arguments.
"""

from keras_bptt.reference.gru import (
    GRUForward,
    GRUGradients,
    gru_forward,
    gru_gradients,
)
from keras_bptt.reference.lstm import (
    LSTMForward,
    LSTMGradients,
    lstm_forward,
    lstm_gradients,
)
from keras_bptt.reference.simple_rnn import (
    ACTIVATIONS,
    LOSSES,
    OUTPUT_ACTIVATIONS,
    Forward,
    Gradients,
    HiddenGradients,
    Network,
    central_differences,
    forward,
    gradients,
    hidden_gradients,
    literal_reading_gradients,
    nested_product_gradients,
)
from keras_bptt.reference.truncation import clipped_gradients, truncated_gradients

__all__ = [
    "ACTIVATIONS",
    "LOSSES",
    "OUTPUT_ACTIVATIONS",
    "Forward",
    "GRUForward",
    "GRUGradients",
    "Gradients",
    "HiddenGradients",
    "LSTMForward",
    "LSTMGradients",
    "Network",
    "central_differences",
    "clipped_gradients",
    "forward",
    "gradients",
    "gru_forward",
    "gru_gradients",
    "hidden_gradients",
    "literal_reading_gradients",
    "lstm_forward",
    "lstm_gradients",
    "nested_product_gradients",
    "truncated_gradients",
]
