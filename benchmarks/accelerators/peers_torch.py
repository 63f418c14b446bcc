"""The same gradients by PyTorch, whose recurrent layers are cuDNN's on an NVIDIA GPU.

A peer is a function of a module, x and y, batch first, which adds up the gradients of the
module's weights and returns the loss. A further peer is an entry of `PEERS`, a further cell
one of `CELLS`.
"""

import dataclasses
import math
from collections.abc import Callable

import races
import torch
from torch.utils.checkpoint import checkpoint

# The module, of features and units, batch first.
CELLS = {"rnn": lambda *sizes: torch.nn.RNN(*sizes, batch_first=True)}


def squared(h, y):
    """The sum over outputs of the squared error, in the precision of the targets."""
    return ((h.to(y.dtype) - y) ** 2).sum()


def whole(task, rnn, x, y):
    h = rnn(x)[0]
    loss = squared(h if task.sequences else h[:, -1], y) / y.numel()
    loss.backward()
    return loss


def checkpoints(task, rnn, x, y):
    """Blocks whose steps are computed again on the way back."""
    state = None
    for block in x.split(math.isqrt(x.shape[1]), dim=1):
        if state is None:
            state = x.new_zeros(1, len(x), rnn.hidden_size)
        state = checkpoint(last_state, rnn, block, state, use_reentrant=False)
    loss = squared(state[0], y) / y.numel()
    loss.backward()
    return loss


def last_state(rnn, x, state):
    return rnn(x, state)[1]


def chunks(task, rnn, x, y):
    """As it is mostly written: chunk by chunk, the state detached in between."""
    steps = task.truncation[0]
    state, total = None, 0.0
    for part, target in zip(x.split(steps, 1), y.split(steps, 1), strict=True):
        h, state = rnn(part, state)
        loss = squared(h, target) / y.numel()
        loss.backward()
        state = state.detach()
        total = total + loss.detach()
    return total


def windows(task, rnn, x, y):
    """Every window from the state before it, side by side as a batch; it counts its end.

    The first has all its losses: they reach back to the first step.
    """
    steps, stride = task.truncation
    batch = len(x)
    with torch.no_grad():
        h = rnn(x)[0]
    before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], dim=1)
    begins = range(0, x.shape[1] - steps + 1, stride)
    state = before[:, list(begins)].transpose(0, 1).reshape(1, -1, h.shape[-1])
    parts = x.unfold(1, steps, stride).permute(1, 0, 3, 2)
    h = rnn(parts.reshape(-1, *parts.shape[2:]), state)[0]
    h = h.reshape(len(begins), batch, steps, -1)
    ends = h[1:, :, steps - stride :].transpose(0, 1).reshape(batch, -1, h.shape[-1])
    loss = squared(torch.cat([h[0], ends], dim=1), y) / y.numel()
    loss.backward()
    return loss


@dataclasses.dataclass(frozen=True)
class Peer:
    """A contestant: what it does by task."""

    passes: dict[str, Callable]


PEERS = {
    "torch.nn.RNN": Peer({"sequence": whole, "last": whole, "chunks": chunks}),
    "torch.nn.RNN, checkpoints": Peer({"last": checkpoints}),
    "torch.nn.RNN, windows as a batch": Peer({"chunks": windows, "windows": windows}),
}


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_precision(race):
    """Whether products of float32 may be TF32, in cuDNN and elsewhere."""
    torch.backends.cuda.matmul.allow_tf32 = race.precision == "tf32"
    torch.backends.cudnn.allow_tf32 = race.precision == "tf32"


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def told():
    """Bytes in use and their peak since `reset_peak`, or None and None without a GPU."""
    if not torch.cuda.is_available():
        return None, None
    return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()


def reset_peak():
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def functions(race, x, y, weights):
    """By name: functions of nothing; they end when the loss and gradients are computed."""
    task = races.TASKS[race.task]
    dtype = torch.bfloat16 if race.low else torch.float32
    x, y = (torch.from_numpy(array).to(device()) for array in (x, y))
    rnn = module(task, weights).to(device(), dtype)
    return {
        name: _step(task, race, peer.passes[race.task], rnn, x.to(dtype), y)
        for name, peer in PEERS.items()
        if race.task in peer.passes
    }


def module(task, weights):
    """With the weights of a Keras layer; its second bias stays zero."""
    W, U, b = (torch.from_numpy(weight) for weight in weights)
    rnn = CELLS[task.cell](W.shape[0], U.shape[0])
    with torch.no_grad():
        rnn.weight_ih_l0.copy_(W.T)
        rnn.weight_hh_l0.copy_(U.T)
        rnn.bias_ih_l0.copy_(b)
        rnn.bias_hh_l0.zero_()
    return rnn


def _step(task, race, one_pass, rnn, x, y):
    def function():
        set_precision(race)
        rnn.zero_grad()
        loss = one_pass(task, rnn, x, y)
        synchronize()
        W, U, b = rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0
        return loss.detach(), W.grad.T, U.grad.T, b.grad

    return function
