"""Time functions side by side, so that the drift of a machine hits all alike."""

import statistics
import time

SIDE = 1024  # of the square matrices whose product sets the limit
# Between contestants: threads of the one before may still spin, waiting for work.
PAUSE = 0.005


def interleaved(functions, seconds, rounds=5, warm=True):
    """Seconds of each call, by name: round by round, each function once a round.

    Each is called twice and timed once, the second time: the first call finds the caches
    full of what others left there. Not so where `warm` is false, after the first round. At
    least `rounds` rounds, then until `seconds` are over.
    """
    times = {name: [] for name in functions}
    deadline = time.perf_counter() + seconds
    done = 0
    while done < rounds or time.perf_counter() < deadline:
        for name, function in functions.items():
            time.sleep(PAUSE)
            if warm or not done:
                function()
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
        done += 1
    return times


def summary(times):
    """Median and quartiles in milliseconds."""
    result = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        result[name] = {"median": 1e3 * median, "quartiles": [1e3 * low, 1e3 * high]}
    return result


def large_product():
    """A function that multiplies two large matrices: the rate that sets the limit."""
    import tensorflow as tf  # the rest is of use where there is none

    matrix = tf.random.normal((SIDE, SIDE))
    product = tf.function(lambda: matrix @ matrix)
    return lambda: product().numpy()


def limit(product, multiply_adds):
    """The time of so many multiply-adds, given that of `large_product`."""
    return product * multiply_adds / SIDE**3
