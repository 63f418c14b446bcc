"""Two scans over time, each with a written-out gradient, each the other's derivative.

    states        h_t = f(z_t + (r * h_{t-1}) U)
    adjoint_scan  v_t = e_t + S * v' + P * L(Q * v'),  v' = v_{t+1} (reverse) or v_{t-1}

The backward pass of `states` is one `adjoint_scan`; the backward pass of an `adjoint_scan`
is another one over the same links, in the other direction, with P and Q exchanged and L
transposed. So the pair is closed under differentiation: derivatives of every order are
scans, and TensorFlow never differentiates a loop. All tensors are time-major,
(timesteps, batch, units); link t joins step t and step t + 1, so there is one link less
than steps. `docs/bptt.md` derives the equations.
"""

import dataclasses

import tensorflow as tf

from keras_bptt.activations import Activation
from keras_bptt.execution import run, within_xla
from keras_bptt.explicit import explicit, vjp

# Steps an iteration of a loop that TensorFlow executes operation by operation: what an
# iteration costs beside its steps is shared by so many. XLA gains nothing by it.
STEPS_PER_ITERATION = 8


def scan(
    step, carry, inputs, size, *, valid=None, reverse=False, unroll=False, stacked=True
):
    """Run `carry, output = step(carry, *inputs(t))` over time; stack the outputs.

    Args:
        step: the function of one step.
        carry: tensor (batch, units), the state that goes from step to step.
        inputs: a function of t = 0 ... size - 1 that returns the tensors of step t; None
            is passed on as None. Step by step it reads slices of whatever is there, which
            is quicker than to lay out anew what the loop reads.
        size: the number of steps, an integer or, where only run time tells, a tensor.
        valid: how many of them to run, the first so many; the other outputs are 0.
            None: all.
        reverse: from the last step to the first. Outputs stand at their step's place.
        unroll: True: write every step into the graph. An integer: so many steps an
            iteration of the loop. False: as many as pay.
        stacked: whether the outputs are wanted.

    Returns:
        The last carry and the stacked outputs (size, batch, units), or None.
    """
    if unroll is True:
        outputs = [None] * size
        for t in reversed(range(size)) if reverse else range(size):
            carry, outputs[t] = step(carry, *inputs(t))
        if not stacked:
            return carry, None
        # Without a step (a single step has no link) there is nothing to stack.
        return carry, tf.stack(outputs) if outputs else carry[None][:0]

    steps = size if valid is None else valid
    known = steps if isinstance(steps, int) else None

    def loop(number, i, last, carry, outputs):
        """As many iterations of `number` steps as there are steps for."""

        def body(i, last, carry, outputs):
            shape = carry.shape
            for k in range(number):
                back = steps - 1 - i - k if valid is None else last - k
                t = back if reverse else i + k
                carry, output = step(carry, *inputs(t))
                outputs = outputs.write(t, output) if stacked else outputs
            last = () if valid is None else last - number
            return i + number, last, tf.ensure_shape(carry, shape), outputs

        # A comparison with a constant: XLA then knows the number of iterations.
        end = steps - steps % number
        return tf.while_loop(lambda i, *_: i < end, body, (i, last, carry, outputs))

    number = int(unroll) or (1 if within_xla() else STEPS_PER_ITERATION)
    for most in (known, size):
        number = max(1, min(number, most)) if isinstance(most, int) else number
    outputs = 0
    if stacked:
        outputs = tf.TensorArray(carry.dtype, size, element_shape=carry.shape)
    # Not t computed from `valid`: XLA would compile for each of its values.
    last = () if valid is None else steps - 1
    state = loop(number, 0, last, carry, outputs)
    if number > 1 and (known is None or known % number):
        state = loop(1, *state)
    _, _, carry, outputs = state
    if not stacked:
        return carry, None
    outputs = stack(outputs, tf.shape(carry))
    known = size if isinstance(size, int) else None
    return carry, tf.ensure_shape(outputs, [known, *carry.shape])


def at(t, *tensors):
    """Step t of each tensor (timesteps, batch, ...); None stays None."""
    return [x if x is None else x[t] for x in tensors]


def batch_major_at(t, *tensors):
    """Step t of each tensor (batch, timesteps, ...); None stays None."""
    return [x if x is None else x[:, t] for x in tensors]


def size_of(x, axis):
    """A size of `x`, an integer where it is known."""
    return tf.shape(x)[axis] if x.shape[axis] is None else x.shape[axis]


def stack(array, shape):
    """The elements of a TensorArray, of the given shape, as one tensor."""
    if array.element_shape.is_fully_defined():
        return array.stack()
    # `array.stack()` of no elements, or of none yet written, needs their static shape.
    return tf.raw_ops.TensorListStack(
        input_handle=array.flow, element_shape=shape, element_dtype=array.dtype
    )


@dataclasses.dataclass(frozen=True)
class States:
    """Static options of `states`."""

    activation: Activation
    unroll: bool = False


def states_step(options, U, r):
    """One step of `states`, as `scan` takes it."""

    def step(h, z, m):
        new = options.activation.function(z + tf.matmul(h if r is None else r * h, U))
        h = new if m is None else tf.where(m, new, h)
        return h, h

    return step


def states_loop(options, z, U, h_0, mask, r):
    """The values of `states`."""
    step = states_step(options, U, r)
    steps = size_of(z, 0)
    return scan(step, h_0, lambda t: at(t, z, mask), steps, unroll=options.unroll)[1]


def states(options: States, z, U, h_0, mask=None, r=None):
    """h_t = f(z_t + (r * h_{t-1}) U) where m_t, else h_{t-1}: the nonlinear forward scan.

    Args:
        options: activation f, and whether to unroll.
        z: (timesteps, batch, units), the input's share of the pre-activation.
        U: (units, units), the recurrent kernel.
        h_0: (batch, units), the initial state.
        mask: bool (timesteps, batch, 1), False where the state is to stay, or None.
        r: (batch, units), the recurrent dropout factor, or None. It has no gradient.

    Returns:
        h (timesteps, batch, units). Its gradient, with cotangent e, is
        a = adjoint_scan(e, S=1-m, P=r, Q=m f', M=U^T), delta = m f'(z) a,
        dz = delta, dU = sum_t (r h_{t-1})^T delta_t, dh_0 = (1-m_1) a_1 + r (delta_1 U^T).
    """

    def forward(*args):
        return (run(states_loop, options, *args, mask, r),), ()

    def backward(args, outputs, residuals, cotangents):
        return _states_gradient(options, *args, mask, r, *outputs, *cotangents)

    return explicit(forward, backward)(z, U, h_0)[0]


def previous_states(h, h_0, r=None):
    """r h_0, r h_1, ... r h_{T-1}: what each step multiplies by U."""
    before = tf.concat([h_0[None], h[:-1]], 0)
    return before if r is None else r * before


def _states_gradient(options, z, U, h_0, mask, r, h, e):
    f = options.activation
    zero = tf.zeros_like(z)
    real = tf.ones_like(z, tf.bool)
    real = real if mask is None else mask & real
    before = previous_states(h, h_0, r)
    # The pre-activation at a masked step may be NaN (padding); it must not reach f'.
    pre = tf.where(real, z + tf.tensordot(before, U, 1), zero)

    S = tf.cast(~real[1:], z.dtype)
    P = tf.ones_like(S) if r is None else r + tf.zeros_like(S)
    U_T = tf.transpose(U)
    if f.mixes:
        Q = tf.cast(real[1:], z.dtype)
        link = AdjointScan(reverse=True, activation=f, unroll=options.unroll)
        a = adjoint_scan(link, e, S, P, Q, U_T, pre[1:])
        delta = f.vjp(pre, tf.where(real, a, zero))
    else:
        slope = tf.where(real, f.slope(pre, h), zero)
        link = AdjointScan(reverse=True, unroll=options.unroll)
        a = adjoint_scan(link, e, S, P, slope[1:], U_T)
        delta = slope * a
    back = tf.matmul(delta[0], U_T)
    d_h_0 = tf.where(real[0], zero[0], a[0]) + (back if r is None else r * back)
    return delta, sum_of_products(before, delta), d_h_0


@dataclasses.dataclass(frozen=True)
class AdjointScan:
    """Static options of `adjoint_scan`; what L is.

    Attributes:
        reverse: v' = v_{t+1}, from the last step to the first.
        activation: None for L(u) = u M, or a mixing activation f. With it
            L(u) = (J_f(z)^T u) M, or its transpose L(u) = J_f(z) (u M).
        transposed: which of the two.
        unroll: write every step into the graph.
    """

    reverse: bool
    activation: Activation | None = None
    transposed: bool = False
    unroll: bool = False

    def transpose(self):
        return dataclasses.replace(
            self, reverse=not self.reverse, transposed=not self.transposed
        )

    def apply(self, u, M, z=None):
        """L(u), at one link or at all."""
        if self.activation is None:
            return tf.tensordot(u, M, 1)
        if self.transposed:
            return self.activation.jvp(z, tf.tensordot(u, M, 1))
        return tf.tensordot(self.activation.vjp(z, u), M, 1)


def adjoint_loop(options, e, S, P, Q, M, z=None):
    """The loop of `adjoint_scan`, without a gradient of its own."""

    def step(v, e, S, P, Q, z):
        v = e + S * v + P * options.apply(Q * v, M, z)
        return v, v

    # The step at the start has no link before it: v = e.
    first, rest = (e[-1], e[:-1]) if options.reverse else (e[0], e[1:])
    _, v = scan(
        step,
        first,
        lambda t: at(t, rest, S, P, Q, z),
        size_of(rest, 0),
        reverse=options.reverse,
        unroll=options.unroll,
    )
    return tf.concat([v, first[None]] if options.reverse else [first[None], v], 0)


def adjoint_scan(options: AdjointScan, e, S, P, Q, M, *z):
    """v_t = e_t + S v' + P L(Q v'): the linear scan of adjoints, of either direction.

    Args:
        options: the direction and L.
        e: (timesteps, batch, units), what enters at each step.
        S, P, Q: (timesteps - 1, batch, units), the coefficients of the links.
        M: (units, units), the matrix of L.
        *z: (timesteps - 1, batch, units), where a mixing activation is linearised.

    Returns:
        v (timesteps, batch, units). With cotangent c, w = adjoint_scan of c in the other
        direction with P and Q exchanged and L transposed is its gradient by e; those of S,
        P, Q, M, z are products of v at a link's source and w at its end.
    """

    def forward(*args):
        return (run(adjoint_loop, options, *args),), ()

    def backward(args, outputs, residuals, cotangents):
        return _adjoint_gradient(options, *outputs, *cotangents, *args)

    return explicit(forward, backward)(e, S, P, Q, M, *z)[0]


def _adjoint_gradient(options, v, c, e, S, P, Q, M, *z):
    transposed, M_T = options.transpose(), tf.transpose(M)
    w = adjoint_scan(transposed, c, S, Q, P, M_T, *z)
    end, source = (w[:-1], v[1:]) if options.reverse else (w[1:], v[:-1])
    u, d_through = Q * source, P * end
    through = options.apply(u, M, *z)
    back = transposed.apply(d_through, M_T, *z)
    if z:
        d_L = vjp(lambda *args: options.apply(u, *args), (M, *z), (d_through,))
    else:
        d_L = [sum_of_products(u, d_through)]
    return w, end * source, end * through, source * back, *d_L


def sum_of_products(left, right):
    """sum over steps and batch of left^T right, as one matrix product."""
    flat = [tf.reshape(x, [-1, x.shape[-1]]) for x in (left, right)]
    return tf.matmul(*flat, transpose_a=True)
