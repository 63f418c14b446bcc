"""The same gradients as JAX derives them, of a scan over time.

A peer is a loss of x, y and the weights, batch first, as a Keras layer takes them; JAX
differentiates it. The input projection is one product before the scan. A further peer is an
entry of `PEERS`, a further cell one of `CELLS`.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import races
from agreement import JUDGE
from jax import lax


def simple(z, state, U):
    """A step of SimpleRNN, of the projection z of its input: its state, and its output."""
    # Cast here, step by step: the gradient of U is then summed in its own precision.
    h = jnp.tanh(z + state @ U.astype(z.dtype))
    return h, h


# The step, and the state to begin with, of one example.
CELLS = {"rnn": (simple, lambda units, dtype: jnp.zeros(units, dtype))}


def scan(task, z, U, state=None):
    """The last state and all outputs, of a projection (timesteps, batch, gates)."""
    step, start = CELLS[task.cell]
    if state is None:
        state = _of_each(z.shape[1], start(U.shape[0], z.dtype))
    return lax.scan(lambda state, z: step(z, state, U), state, z)


def _of_each(batch, state):
    return jax.tree.map(lambda s: jnp.broadcast_to(s, (batch, *s.shape)), state)


def projection(x, W, b):
    """x W + b, time first."""
    return jnp.swapaxes(x, 0, 1) @ W.astype(x.dtype) + b.astype(x.dtype)


def squared(h, y):
    """The loss of outputs, time first, in the precision of the targets."""
    return jnp.mean((jnp.swapaxes(h, 0, 1).astype(y.dtype) - y) ** 2)


def whole(task, x, y, W, U, b):
    _, h = scan(task, projection(x, W, b), U)
    return squared(h if task.sequences else h[-1:], y if task.sequences else y[:, None])


def checkpoints(task, x, y, W, U, b):
    """Blocks whose steps are computed again on the way back, as `checkpoint_every` does."""
    length = math.isqrt(x.shape[1])
    blocks = jnp.swapaxes(_cut(jnp.swapaxes(x, 0, 1), length), 1, 2)

    @jax.checkpoint
    def block(state, x):
        return scan(task, projection(x, W, b), U, state)[0], None

    start = CELLS[task.cell][1](U.shape[0], x.dtype)
    last, _ = lax.scan(block, _of_each(x.shape[0], start), blocks)
    return squared(last[None], y[:, None])


def chunks(task, x, y, W, U, b):
    """The state is a constant where a chunk begins."""
    z = _cut(projection(x, W, b), task.truncation[0])

    def chunk(state, z):
        return scan(task, z, U, lax.stop_gradient(state))

    start = CELLS[task.cell][1](U.shape[0], x.dtype)
    _, h = lax.scan(chunk, _of_each(x.shape[0], start), z)
    return squared(h.reshape(-1, *h.shape[2:]), y)


def windows(task, x, y, W, U, b):
    """Every window from the state before it, a constant, side by side; it counts its end.

    The first has all its losses: they reach back to the first step.
    """
    steps, stride = task.truncation
    z = projection(x, W, b)
    timesteps, batch, _ = z.shape
    _, h = scan(task, lax.stop_gradient(z), lax.stop_gradient(U))
    before = jnp.concatenate([jnp.zeros_like(h[:1]), h[:-1]])
    begins = jnp.arange(0, timesteps - steps + 1, stride)
    within = jnp.arange(steps)[:, None] + begins
    side_by_side = z[within].reshape(steps, -1, z.shape[-1])
    _, h = scan(task, side_by_side, U, before[begins].reshape(-1, h.shape[-1]))
    h = h.reshape(steps, len(begins), batch, -1)
    ends = jnp.swapaxes(h[-stride:, 1:], 0, 1).reshape(-1, *h.shape[2:])
    return squared(jnp.concatenate([h[:, 0], ends]), y)


def _cut(sequence, length):
    if len(sequence) % length:
        raise ValueError(
            f"This peer cuts time into equal parts. Received: {len(sequence)} timesteps, "
            f"parts of {length}. Choose a multiple."
        )
    return sequence.reshape(-1, length, *sequence.shape[1:])


@dataclasses.dataclass(frozen=True)
class Peer:
    """A contestant: `loss` by task."""

    losses: dict[str, Callable]


PEERS = {
    JUDGE: Peer(
        {"sequence": whole, "last": whole, "chunks": chunks, "windows": windows}
    ),
    "JAX scan, checkpoints": Peer({"last": checkpoints}),
}


def functions(race):
    """By name: functions of x, y and the weights that return the loss and the gradients."""
    task = races.TASKS[race.task]
    return {
        name: _differentiated(task, peer.losses[race.task])
        for name, peer in PEERS.items()
        if race.task in peer.losses
    }


def _differentiated(task, loss):
    def function(x, y, *weights):
        def of_weights(*weights):
            return loss(task, x, y, *weights)

        value, gradients = jax.value_and_grad(of_weights, range(len(weights)))(*weights)
        return value, *gradients

    return function
