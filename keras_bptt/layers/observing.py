"""Who else wants to see what a layer asks of the engine: the gradient flow does."""

import contextlib
import contextvars
import functools

_observer = contextvars.ContextVar("observer", default=None)


@contextlib.contextmanager
def observed(observer):
    """Within it every layer's recurrence is `observer(layer, step, ...)`.

    The other arguments, and what it returns, are those of the recurrence. Only what is
    called (or traced) within it is observed, and only in this thread.
    """
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def observed_or(recurrence, layer, step):
    """The recurrence, or what an observer makes of it."""
    observer = _observer.get()
    return recurrence if observer is None else functools.partial(observer, layer, step)
