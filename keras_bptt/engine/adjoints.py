"""The one recursion back: from the adjoints of a step to those of the step before.

    a_t = e_t + what comes back from step t + 1
    a_{t-1} receives  J_t^T (s_t a_t) times the link's factor  where m_t,  else a_t

with J_t^T the cell's `step_back`, m the mask and s_t the scale of clipping. All else,
windows, blocks, parts of the batch, decides only which rows go through it, and when.
"""

from typing import NamedTuple

import tensorflow as tf

from keras_bptt.cells.cell import Point
from keras_bptt.engine.clipping import Arriving, clipped, entered, scaled
from keras_bptt.engine.loops import scan
from keras_bptt.engine.masks import passed_on
from keras_bptt.runtime.tensors import beside, chosen, mapped, size_of


class Terms(NamedTuple):
    """What steps back read, for many steps or one; what is None is left out.

    Attributes:
        point: where the cell's steps are differentiated, time-major.
        cotangent: e_t of the output, batch-major.
        mask: m_t, bool (batch, timesteps, 1).
        factor: of the link to the step before (batch, timesteps, 1).
    """

    point: Point
    cotangent: tf.Tensor | None = None
    mask: tf.Tensor | None = None
    factor: tf.Tensor | None = None

    @property
    def size(self):
        """The number of steps."""
        return size_of(self.point.after[0], 0)

    def at(self, t):
        """The terms of step t."""
        point = mapped(lambda x: x[t], self.point)
        return Terms(point, *mapped(lambda x: x[:, t], tuple(self[1:])))


def adjoint_step(options, weights, noise):
    """One step back: `step(arrived, terms) -> (arrived, outputs)`.

    The outputs are the deltas and, of an observed recurrence, the adjoints; 0 at a masked
    step.
    """
    cell = options.cell
    weights_back = cell.weights_back(weights)

    def step(arrived, terms):
        point, e, m, factor = terms
        arrived = entered(options, arrived, e)
        adjoints, new = arrived.adjoints, Arriving(())
        if options.clips:
            scale, new = clipped(options, arrived)
            adjoints = scaled(options, scale, adjoints)
        back, deltas = cell.step_back(weights_back, point, adjoints, noise)
        new = new._replace(
            adjoints=tuple(a if factor is None else beside(factor, a) * a for a in back)
        )
        outputs = (*deltas, *adjoints) if options.observed else deltas
        return passed_on(m, new, arrived), [
            chosen(m, t, tf.zeros_like(t)) for t in outputs
        ]

    return step


def steps_back(
    options, weights, noise, arrived, read, size, valid=None, around=None, batch=None
):
    """`size` steps of the recursion, from the last one back.

    Args:
        options, weights, noise: of the recurrence, the noise for the rows of `arrived`.
        arrived: what comes back to the last step.
        read: a function of t, the `Terms` of step t.
        size: how many steps.
        valid: how many of them count, the first so many. None: all.
        around: makes another step of a step, of the same arguments.
        batch: how many rows an output has. None: as many as `arrived`.

    Returns:
        What the first step sends to the one before it, and the stacked outputs.
    """
    step = adjoint_step(options, weights, noise)
    shapes = options.cell.shapes(weights)
    observed = shapes.states if options.observed else ()
    return scan(
        step if around is None else around(step),
        arrived,
        read,
        size,
        (*shapes.deltas, *observed),
        valid=valid,
        reverse=True,
        unroll=options.unroll,
        batch=batch,
    )


def plain_pass(options, valid, weights, noise, arrived, terms):
    """The recursion over consecutive steps of an example, each a row."""
    return steps_back(options, weights, noise, arrived, terms.at, terms.size, valid)
