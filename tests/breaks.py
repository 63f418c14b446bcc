"""The package broken, one thing at a time, to show that the tests can fail.

A break puts something wrong in the place of an attribute of a module or a class. Such a
seam is found by its name alone, so that it may be written in another way and its break
stays. Each break gives wrong numbers and no error: a user would be told nothing.
`test_breaks.py` names the checks that catch it.
"""

import contextlib
import pkgutil
import sys
import types
from unittest import mock

import keras
import tensorflow as tf

from keras_bptt.engine.clipping import Arriving
from keras_bptt.runtime.explicit import vjp
from keras_bptt.runtime.tensors import beside, mapped
from keras_bptt.truncation import Truncation


def broken(seam, change, everywhere=False):
    """A break: a function that returns a context in which an attribute is changed.

    Args:
        seam: the name of the attribute, from the package on.
        change: a function of what the attribute is; it returns what it becomes.
        everywhere: whether the attribute changes in all modules that have imported it too.
    """

    @contextlib.contextmanager
    def context():
        owner, _, name = f"keras_bptt.{seam}".rpartition(".")
        owner = pkgutil.resolve_name(owner)
        original, owners = getattr(owner, name), [owner]
        if everywhere:
            modules = [m for n, m in sys.modules.items() if n.startswith("keras_bptt.")]
            owners = [m for m in modules if vars(m).get(name) is original]
        with contextlib.ExitStack() as stack:
            wrong = change(original)
            for owner in owners:
                stack.enter_context(mock.patch.object(owner, name, wrong))
            yield

    return context


def together(*breaks):
    """The breaks as one."""

    @contextlib.contextmanager
    def context():
        with contextlib.ExitStack() as stack:
            for each in breaks:
                stack.enter_context(each())
            yield

    return context


# --- What a function is changed to


def takes(change=None, **fixed):
    """A change: the function takes other arguments.

    Args:
        change: a function of the positional arguments; it returns others.
        **fixed: arguments by name.
    """

    def changed(original):
        def function(*args, **named):
            args = args if change is None else change(*args)
            return original(*args, **named | fixed)

        return function

    return changed


def gives(change):
    """A change: the function gives `change` of its result."""
    return lambda original: lambda *args, **named: change(original(*args, **named))


def instead(function):
    """A change: another function stands there."""
    return lambda original: function


first = instead(lambda x, *_: x)
second = instead(lambda _, x, *__: x)


def constants(**fields):
    """A change: the function of options and `Constants` takes other constants."""
    return takes(lambda options, c, *rest: (options, c._replace(**fields), *rest))


def zeros(structure):
    return mapped(tf.zeros_like, structure)


def reversed_rows(structure):
    """Of each example what belongs to another."""
    return mapped(lambda t: t[::-1], structure)


# --- The cell

CELL = "cells.simple_rnn.SimpleRNN."


def without_noise(place):
    """The cell's function without the factors d (place 0) or r (place 1)."""

    def change(*args):
        *others, noise = args
        return *others, tuple(None if i == place else n for i, n in enumerate(noise))

    return takes(change)


def at_zero(cell, weights, point, *rest):
    """At h = 0, where the slope of tanh is 1."""
    return cell, weights, point._replace(after=zeros(point.after)), *rest


def gradients_but(part, change):
    """The gradients of the cell, one part of which is that of other arguments.

    Args:
        part: "x", or the place of a weight.
        change: the other arguments.
    """

    def changed(original):
        def gradients(*args):
            d_weights, d_x = original(*args)
            others, other_x = original(*change(*args))
            if part == "x":
                return d_weights, other_x
            d_weights = (*d_weights[:part], others[part], *d_weights[part + 1 :])
            return d_weights, d_x

        return gradients

    return changed


def undropped(cell, weights, x, point, deltas, noise):
    return cell, weights, x, point, deltas, (None, None)


def of_states_after(cell, weights, x, point, deltas, noise):
    before = [[h] for h in point.after]
    return cell, weights, x, point._replace(before=before), deltas, noise


def of_last_step(cell, weights, x, point, deltas, noise):
    deltas = tuple(tf.concat([0 * d[:-1], d[-1:]], 0) for d in deltas)
    return cell, weights, x, point, deltas, noise


def diagonal(original):
    """Of J_f(z)^T u what each unit sends to itself."""

    def function(activation, z, u):
        units = z.shape[-1]
        rows = [tf.one_hot(i, units, dtype=u.dtype) for i in range(units)]
        return tf.add_n([e * original(activation, z, e * u) for e in rows])

    return function


def untransposed(original):
    """J_f(z) u."""

    def function(activation, z, u):
        def transposed(v):
            return original(activation, z, v)

        return vjp(transposed, (tf.zeros_like(u),), u)[0]

    return function


def slope(name, function):
    """f' of a known activation as another function of f."""
    known = getattr(keras.activations, name)
    return broken(
        "cells.activations._KNOWN", lambda slopes: {**slopes, known: function}
    )


OF_THE_CELL = {
    "step_back without U^T": broken(
        CELL + "step_back", gives(lambda result: (zeros(result[0]), result[1]))
    ),
    "step_back with U": broken(CELL + "weights_back", gives(tf.transpose)),
    "step_back without r": broken(CELL + "step_back", without_noise(1)),
    "step_back without the slope": broken(CELL + "step_back", takes(at_zero)),
    "slope at the adjoint": broken(
        "cells.activations.Activation.vjp_at_output", takes(lambda f, h, u: (f, u, u))
    ),
    "Jacobian at the adjoint": broken(
        "cells.activations.Activation.vjp", takes(lambda f, z, u: (f, u, u))
    ),
    "diagonal of the Jacobian": broken("cells.activations.Activation.vjp", diagonal),
    "Jacobian not transposed": broken("cells.activations.Activation.vjp", untransposed),
    "slope of tanh": slope("tanh", lambda h: 1 - h),
    "slope of sigmoid": slope("sigmoid", lambda h: h),
    "dU of the states after": broken(CELL + "gradients", takes(of_states_after)),
    "dU without r": broken(CELL + "gradients", gradients_but(1, undropped)),
    "dW without d": broken(CELL + "gradients", gradients_but(0, undropped)),
    "dx without d": broken(CELL + "gradients", gradients_but("x", undropped)),
    "db of a block's last step": broken(
        CELL + "gradients", gradients_but(2, of_last_step)
    ),
    "project without b": broken(
        CELL + "project", takes(lambda cell, w, *rest: (cell, w[:2], *rest))
    ),
    "project without d": broken(CELL + "project", without_noise(0)),
    "step without r": broken(CELL + "step", without_noise(1)),
}


# --- The recursion back

ADJOINTS = "engine.adjoints."
BACKWARD = "engine.backward."
CLIPPING = "engine.clipping."


def clip(deltas, adjoints):
    """Whether what makes deltas is clipped, and whether what recurs is."""

    def changed(original):
        def adjoint_step(options, weights, noise):
            clipped = original(options, weights, noise)
            exact = original(options.but(adjoint_clipnorm=None), weights, noise)

            def step(*args):
                arrived, _ = (clipped if adjoints else exact)(*args)
                _, outputs = (clipped if deltas else exact)(*args)
                return arrived, outputs

            return step

        return adjoint_step

    return changed


def forgotten_sum(result):
    """The sum of |e_s| begins anew at each step."""
    scale, new = result
    return scale, new._replace(sent=zeros(new.sent))


def uncounted(original):
    """The cotangent of an output enters the adjoint, not the limit."""

    def entered(options, arrived, e):
        return original(options, arrived, e)._replace(waiting=arrived.waiting)

    return entered


def every_one_scaled(original):
    """Adjoints that no step reads are scaled as well."""

    def scaled(options, scale, adjoints):
        return tuple(tf.cast(beside(scale, a), a.dtype) * a for a in adjoints)

    return scaled


def kept_waiting(original):
    """Cotangents wait for one more real step after that which has counted them."""

    def clipped(options, arrived):
        scale, new = original(options, arrived)
        return scale, new._replace(waiting=arrived.waiting)

    return clipped


OF_THE_RECURSION = {
    "cotangents lost": broken(
        ADJOINTS + "entered",
        takes(lambda options, arrived, e: (options, arrived, None)),
    ),
    "cotangents a step late": broken(
        ADJOINTS + "Terms.at",
        takes(
            lambda terms, t: (
                terms._replace(cotangent=tf.roll(terms.cotangent, 1, axis=1)),
                t,
            )
        ),
    ),
    "cotangents of the last states lost": broken(
        BACKWARD + "arriving", takes(lambda options, e: (options, zeros(e)))
    ),
    "masked steps taken": broken("engine.states.passed_on", second),
    "masked steps taken back": broken(ADJOINTS + "passed_on", second),
    "deltas of masked steps": broken(ADJOINTS + "chosen", second),
    "from the first step on": broken(ADJOINTS + "scan", takes(reverse=False)),
    "no factor at a link": broken(
        ADJOINTS + "Terms.at", takes(lambda terms, t: (terms._replace(factor=None), t))
    ),
    "a factor at the initial state": broken(
        "engine.recurrence.link_factors",
        instead(lambda options, constants: constants.link_factors),
    ),
    "no factor at the second step": broken(
        "engine.masks.real_steps_up_to", gives(lambda number: number - 1)
    ),
    "deltas alone clipped": broken(ADJOINTS + "adjoint_step", clip(True, False)),
    "deltas not clipped": broken(ADJOINTS + "adjoint_step", clip(False, True)),
    "the batch clipped as one": broken(
        CLIPPING + "norm", gives(lambda sizes: tf.ones_like(sizes) * tf.norm(sizes))
    ),
    "each number clipped": broken(
        CLIPPING + "norm", instead(lambda tensors: tf.abs(tensors[0]))
    ),
    "cotangents of later steps forgotten": broken(
        ADJOINTS + "clipped", gives(forgotten_sum)
    ),
    "cotangents that wait forgotten": broken(
        ADJOINTS + "entered",
        takes(
            lambda options, arrived, e: (
                options,
                arrived._replace(waiting=zeros(arrived.waiting)),
                e,
            )
        ),
    ),
    "cotangents of outputs not counted": broken(ADJOINTS + "entered", uncounted),
    "what is no state clipped": broken(ADJOINTS + "scaled", every_one_scaled),
    "the norm of one state alone": broken(
        "cells.cell.Cell.recurring", gives(lambda states: states[:1])
    ),
    "cotangents that wait counted again": broken(ADJOINTS + "clipped", kept_waiting),
}


# --- Windows

WINDOWS = "engine.windows."


def other_window(longer, more_stride=0):
    """A change: the function of options takes those of another window."""

    def change(options, *rest):
        steps, stride = options.truncation.steps, options.truncation.stride
        other = Truncation(steps + longer, stride + more_stride)
        return options.but(truncation=other), *rest

    return takes(change)


def in_the_oldest(original):
    """What comes back to the last step, as the last of the windows."""

    def rows_of(truncation, arrived):
        rows = original(truncation, arrived)
        each = zip(tf.nest.flatten(rows), tf.nest.flatten(arrived), strict=True)
        moved = [tf.roll(t, -a.shape[0], 0) for t, a in each]
        return tf.nest.pack_sequence_as(rows, moved)

    return rows_of


def of_the_youngest(truncation, arrived):
    """What one window sends to the initial states."""
    number = -(-truncation.steps // truncation.stride)
    return mapped(lambda a: a[: a.shape[0] // number], arrived.adjoints)


def noise_of_others(options, valid, weights, noise, *rest):
    return options, valid, weights, reversed_rows(noise), *rest


OF_WINDOWS = {
    "a window a step too long": broken(BACKWARD + "level_pass", other_window(1)),
    "a window a step too short": broken(BACKWARD + "level_pass", other_window(-1)),
    "blocks a step too long": broken(BACKWARD + "level_pass", other_window(1, 1)),
    "a stride too short": broken(BACKWARD + "level_pass", other_window(0, -1)),
    "the first block filled at its beginning": broken(
        WINDOWS + "repeated", takes(lambda x, number, place=0: (x, number, 0))
    ),
    "windows carried into the block behind": broken(
        WINDOWS + "shifted", takes(lambda x, by: (x, -by))
    ),
    "windows carried around the beginning": broken(
        WINDOWS + "shifted", instead(lambda x, by: tf.roll(x, by, 0))
    ),
    "what windows send to the initial states lost": broken(
        BACKWARD + "level_pass",
        gives(lambda result: (Arriving(zeros(result[0].adjoints)), result[1])),
    ),
    "masked steps before a window not counted": broken(
        WINDOWS + "masked_steps", gives(zeros)
    ),
    "sums over windows averaged": broken(WINDOWS + "total", instead(tf.reduce_mean)),
    "several windows of one that holds all": broken(
        WINDOWS + "held_by_one", gives(tf.zeros_like), everywhere=True
    ),
    "one window of the losses of several": broken(
        WINDOWS + "held_by_one", other_window(3), everywhere=True
    ),
    "noise of another example": broken(BACKWARD + "level_pass", takes(noise_of_others)),
    # The same for windows that go back step by step.
    "sliding windows that go on": broken(BACKWARD + "sliding_pass", other_window(1)),
    "sliding windows a step too short": broken(
        BACKWARD + "sliding_pass", other_window(-1)
    ),
    "sliding chunks a step too short": broken(
        BACKWARD + "sliding_pass", other_window(-1, -1)
    ),
    "sliding windows that stay in their blocks": broken(WINDOWS + "shifted", first),
    "losses in every window": broken(WINDOWS + "where", second),
    "losses in every level": broken(
        WINDOWS + "_Blocks._entering", instead(lambda blocks, level, e: e)
    ),
    "what comes back, in the oldest window": broken(
        BACKWARD + "rows_of", in_the_oldest
    ),
    "one window reaches the initial states": broken(
        BACKWARD + "sent_to_start", instead(of_the_youngest)
    ),
    "steps counted from the end of a checkpoint's block": broken(
        BACKWARD + "sliding_pass",
        takes(
            lambda options, valid, w, n, arrived, terms, last, real: (
                *(options, valid, w, n, arrived, terms),
                terms.size - 1,
                real,
            )
        ),
    ),
    "masked steps counted as real": broken(BACKWARD + "masked_steps", gives(zeros)),
    "sliding noise of another example": broken(
        BACKWARD + "sliding_pass", takes(noise_of_others)
    ),
}


# --- The recurrence of a truncation; masks

RECURRENCE = "engine.recurrence."
MASKS = "engine.masks."


def with_gradient(module):
    """A module's `tf`, in which nothing is cut off."""
    return broken(
        f"{module}.tf",
        lambda tf: types.SimpleNamespace(**{**vars(tf), "stop_gradient": tf.identity}),
    )


def given_order(mask):
    """The places of steps as they are."""
    return tf.zeros_like(mask, tf.int32) + tf.range(mask.shape[1])


def shown_from_the_start(original):
    """Before the first real step of an example the initial state is shown."""

    def visible(options, mask):
        if mask is None or options.zero_output_for_mask:
            return original(options, mask)
        return tf.ones_like(mask[:, :, None]) & tf.reduce_any(mask, 1)[:, None, None]

    return visible


def x_alone_reversed(original):
    return lambda options, x, mask: (original(options, x, None)[0], mask)


def mask_alone_reversed(original):
    return lambda options, x, mask: (x, original(options, x, mask)[1])


def forwards(options, t):
    return options.but(go_backwards=False), t


OF_STEPS = {
    "the state before the last window not cut off": together(
        broken(RECURRENCE + "cut_off", first), with_gradient("engine.recurrence")
    ),
    "the last window a step too long": broken(
        RECURRENCE + "_last_window", other_window(1)
    ),
    "the last window a step too short": broken(
        RECURRENCE + "_last_window", other_window(-1)
    ),
    "the last window never begins at the initial state": broken(
        RECURRENCE + "chosen", instead(lambda mask, x, y: y + 0 * x)
    ),
    "not packed": broken(RECURRENCE + "packing", instead(given_order)),
    "not unpacked": broken(RECURRENCE + "unpacking", instead(given_order)),
    "outputs of the step before": broken(
        RECURRENCE + "unpacking", gives(lambda places: tf.maximum(places - 1, 0))
    ),
    "hidden outputs shown": broken(
        MASKS + "visible", instead(lambda *_: None), everywhere=True
    ),
    "outputs before the first real step shown": broken(
        MASKS + "visible", shown_from_the_start, everywhere=True
    ),
    "masked outputs repeated": broken(
        MASKS + "visible",
        takes(lambda options, mask: (options.but(zero_output_for_mask=False), mask)),
        everywhere=True,
    ),
    "cotangents of hidden outputs": broken(
        BACKWARD + "visible", instead(lambda *_: None)
    ),
    "hidden outputs for the state": broken(
        "engine.kept.visible", instead(lambda *_: None)
    ),
    "inputs not reversed": broken(
        MASKS + "processing_order", mask_alone_reversed, everywhere=True
    ),
    "mask not reversed": broken(
        MASKS + "processing_order", x_alone_reversed, everywhere=True
    ),
    "gradients in the order of processing": broken(
        BACKWARD + "_in_order", takes(forwards)
    ),
    "padding taken for inputs": broken(MASKS + "unpadded", first, everywhere=True),
    "hidden outputs without c": broken(
        MASKS + "read_out", takes(lambda *args: args[:4]), everywhere=True
    ),
}


# --- Blocks, and what is kept; the output layer; parts of the batch


def without_sums(block, *rest):
    """For a walk whose blocks all begin to add up anew."""

    def forgetful(start, size, valid, carry):
        return block(start, size, valid, (carry[0], *zeros(carry[1:])))

    return forgetful, *rest


def rounded_sums(block, *rest):
    """For a walk between whose blocks sums are in half precision."""

    def rounded(start, size, valid, carry):
        arrived, *sums = carry
        sums = mapped(lambda t: tf.cast(tf.cast(t, "float16"), t.dtype), sums)
        return block(start, size, valid, (arrived, *sums))

    return rounded, *rest


def first_states_zero(original):
    """The states before all blocks but the first are zeros."""

    def from_storage(*args):
        stored = original(*args)

        def wrong(start, *rest):
            before, *others = stored(start, *rest)
            return zeros(before) if start > 0 else before, *others

        return wrong

    return from_storage


def saved_late(original):
    """Each step of a block has the saved tensors of the one before."""

    def from_storage(*args):
        stored = original(*args)

        def wrong(*block):
            first, after, saved = stored(*block)
            return first, after, mapped(lambda t: tf.roll(t, 1, 0), saved)

        return wrong

    return from_storage


def checkpoints(change):
    """Blocks are computed again from other states."""

    def changed(options, weights, noise, starts, *rest):
        return options, weights, noise, mapped(change, tuple(starts)), *rest

    return broken(BACKWARD + "computed_again", takes(changed))


def of_first_inputs(options, weights, noise, starts, inputs, blocks):
    """Blocks are computed again from the inputs of the first of them."""

    def first_inputs(start, size, mask):
        return inputs(0, size, mask)

    return options, weights, noise, starts, first_inputs, blocks


def again(change):
    """Blocks are computed again with other noise or another mask."""

    def changed(static, valid, weights, noise, before, drive, mask):
        noise, mask = change(noise, mask)
        return static, valid, weights, noise, before, drive, mask

    return broken("engine.kept.states_pass", takes(changed))


def same_part(parts):
    return [parts[0]] * len(parts)


def same_noise(parts):
    noise = parts[0][0].noise
    return [(known._replace(noise=noise), *others) for known, *others in parts]


def unless_alone(change):
    """A change of parts, where there are several."""
    return gives(lambda parts: change(parts) if len(parts) > 1 else parts)


OF_BLOCKS = {
    "a block cut a step early": broken(
        BACKWARD + "cut", takes(lambda x, start, size: (x, max(start - 1, 0), size))
    ),
    "blocks in the wrong order": broken(BACKWARD + "walk", takes(reverse=False)),
    "the steps that fill the last block taken": broken(
        "engine.forward.states_pass", takes(lambda o, valid, *rest: (o, None, *rest))
    ),
    "the steps that fill the last block taken back": broken(
        BACKWARD + "plain_pass", takes(lambda o, valid, *rest: (o, None, *rest))
    ),
    "the sums of other blocks lost": broken(BACKWARD + "walk", takes(without_sums)),
    "the states before a block lost": broken(
        BACKWARD + "from_storage", first_states_zero
    ),
    "saved tensors of the step before": broken(BACKWARD + "from_storage", saved_late),
    "states after for states before": broken(
        BACKWARD + "point_of",
        gives(lambda result: (result[0]._replace(before=result[0].after), result[1])),
    ),
    "one checkpoint for all blocks": checkpoints(
        lambda t: tf.repeat(t[:1], t.shape[0], 0)
    ),
    "the checkpoint of another block": checkpoints(lambda t: t[::-1]),
    "computed again without the mask": again(lambda noise, mask: (noise, None)),
    "computed again without noise": again(lambda noise, mask: ((None, None), mask)),
    "computed again of other inputs": broken(
        BACKWARD + "computed_again", takes(of_first_inputs)
    ),
    "computed again as a whole without noise": broken(
        RECURRENCE + "forward", constants(noise=(None, None))
    ),
    "V not transposed": broken(
        BACKWARD + "sent_back", instead(lambda q, layer: tf.tensordot(q, layer[0], 1))
    ),
    "dV of the states before": broken(
        BACKWARD + "sum_of_products", takes(lambda h, q: (tf.roll(h, 1, 0), q))
    ),
    "dc lost": broken(BACKWARD + "bias_gradient", gives(zeros)),
    "c not added": broken(
        "engine.forward.shown", takes(lambda h, layer: (h, layer[:1]))
    ),
    "outputs taken for states": broken(
        "engine.kept.outputs_tell",
        takes(lambda options, mask, layer: (options, mask, ())),
        everywhere=True,
    ),
    "dc of one example": broken(
        "engine.output_layer.total", instead(lambda q, axis: q[0])
    ),
    "V not transposed, last output": broken(
        "engine.output_layer.sent_back",
        instead(lambda q, layer: tf.matmul(q, layer[0])),
    ),
    "parts that overlap": broken(
        "engine.parts.split", unless_alone(same_part), everywhere=True
    ),
    "the sums of one part": broken(
        BACKWARD + "summed", takes(lambda parts, dtype: (parts[:1], dtype))
    ),
    "noise of another part": broken(
        "engine.parts.split", unless_alone(same_noise), everywhere=True
    ),
}


# --- Derivatives of higher order

HIGHER = "engine.higher_orders."
COMPOSED = "engine.composed."


def behind(after, initial):
    """The states after the next step, in the place of those before each."""
    return tf.concat([after[1:], initial[None]], 0)


def unmultiplied(link, known, *rest):
    return link, known._replace(factors=None), *rest


def at_fixed_states(link, known, weights_back, point, v):
    return link, known, weights_back, mapped(tf.stop_gradient, point), v


def from_beginning(original):
    """What is cut out of an axis of windows is cut out of its beginning."""

    def function(x, start, *size, axis=0):
        return original(x, start if axis == 0 else 0, *size, axis=axis)

    return function


def constant_layer(h, layer):
    return h, mapped(tf.stop_gradient, tuple(layer))


OF_HIGHER_ORDERS = {
    "states before from the wrong side": broken(HIGHER + "_before", instead(behind)),
    "a link that is not transposed": broken(HIGHER + "Link.transpose", first),
    "links without factors": broken(HIGHER + "Link.apply", takes(unmultiplied)),
    "links at fixed states": broken(HIGHER + "Link.apply", takes(at_fixed_states)),
    "links to the same step": broken(HIGHER + "shifted", first),
    "masked steps, higher order": broken(HIGHER + "passed_on", second),
    "scales of clipping lost": broken(HIGHER + "_scales_loop", gives(tf.ones_like)),
    "masked steps clipped": broken(HIGHER + "chosen", second),
    "d_initial lost": broken(
        HIGHER + "_gradient_of_states", gives(lambda d: (d[0], zeros(d[1]), d[2]))
    ),
    "windows that never begin at the initial state": broken(
        COMPOSED + "_starts", gives(lambda starts: mapped(tf.stop_gradient, starts))
    ),
    "outputs from a window's beginning": broken(COMPOSED + "part", from_beginning),
    "the state after the first window": broken(COMPOSED + "one", from_beginning),
    "factors lost, higher order": broken(
        COMPOSED + "over_steps", constants(link_factors=None)
    ),
    "hidden outputs shown, higher order": broken(
        COMPOSED + "read_out",
        instead(lambda options, mask, y, last, *_: last if y is None else y),
    ),
    "an output layer without a gradient": broken(
        COMPOSED + "shown", takes(constant_layer)
    ),
}


# --- The joint of forward and backward; sums and places

TENSORS = "runtime.tensors."
EXPLICIT = "runtime.explicit."
SLICES = "runtime.slices."


def inner_outputs(original):
    """`explicit` whose backward pass sees the outputs that are cut off."""

    def explicit(forward, backward):
        inner = []

        def remembered(*args):
            outputs, residuals = forward(*args)
            inner.append(outputs)
            return outputs, residuals

        def of_inner(args, outputs, *rest):
            return backward(args, inner[-1], *rest)

        return original(remembered, of_inner)

    return explicit


def for_first_example(original):
    """A cotangent of size 1 goes to the first example."""

    def like(cotangent, output):
        whole = original(cotangent, output)
        if cotangent.shape == output.shape:
            return whole
        return tf.concat([whole[:1], 0 * whole[1:]], 0)

    return like


def last_of_each(slices, output):
    """The rows that were gathered, each once."""
    places = slices.indices[:, None]
    return tf.tensor_scatter_nd_update(tf.zeros_like(output), places, slices.values)


def in_half(left, right):
    left = tf.concat(left, 0) if isinstance(left, list) else left
    flat = [tf.reshape(t, [-1, t.shape[-1]]) for t in (left, right)]
    return tf.cast(tf.matmul(*flat, transpose_a=True), tf.float32)


OF_TENSORS = {
    "the inner outputs": broken(EXPLICIT + "explicit", inner_outputs),
    "cotangents not broadcast": broken(EXPLICIT + "_like", for_first_example),
    "an example that is taken twice counted once": broken(
        EXPLICIT + "_dense", instead(last_of_each)
    ),
    "residuals with a gradient": with_gradient("runtime.explicit"),
    "total in half precision": broken(
        TENSORS + "total",
        instead(lambda x, axis: tf.cast(tf.reduce_sum(x, axis), tf.float32)),
        everywhere=True,
    ),
    "products in half precision": broken(
        TENSORS + "sum_of_products", instead(in_half), everywhere=True
    ),
    "sums of blocks in half precision": broken(BACKWARD + "walk", takes(rounded_sums)),
    "hidden outputs in half precision": broken(
        MASKS + "widened", instead(lambda x: tf.cast(x, tf.float16))
    ),
    "a part placed at the beginning": broken(
        SLICES + "placed",
        takes(lambda x, start, *rest: (x, 0, *rest)),
        everywhere=True,
    ),
    "a part of the beginning": broken(
        SLICES + "part", takes(lambda x, start, *rest: (x, 0, *rest)), everywhere=True
    ),
}

# Of each what makes the context in which it is broken.
BREAKS = (
    OF_THE_CELL
    | OF_THE_RECURSION
    | OF_WINDOWS
    | OF_STEPS
    | OF_BLOCKS
    | OF_HIGHER_ORDERS
    | OF_TENSORS
)
