"""A process of its own for what may hang, or die, or count from its beginning."""

import multiprocessing
import time


class Failure(Exception):
    """Why there is no answer."""


class Silence(Failure):
    """There is no answer yet, and time is over."""


class Worker:
    """A process that measures; another after it died or hung, and for each peak."""

    def __init__(self, serve, path):
        self.serve, self.path = serve, path
        self.process = self.connection = None
        self.fresh = False

    def start(self, seconds):
        """What the machine is, by its first words."""
        self.stop()
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(
            target=self.serve, args=(other, self.path), daemon=True
        )
        self.process.start()
        other.close()
        self.fresh = True
        return self._answer(seconds)

    def measure(self, what, race, seconds):
        """What is known of each contestant; raises Failure where the process gives none."""
        deadline = time.monotonic() + seconds
        if self.process is None or (what == "memory" and not self.fresh):
            self.start(seconds)
        self.fresh = False
        try:
            self.connection.send((what, race))
        except OSError:
            self.stop()
            raise Failure("the process had ended") from None
        return self._answer(deadline - time.monotonic())

    def _answer(self, seconds):
        try:
            if self.connection.poll(max(seconds, 0)):
                return self.connection.recv()
            failure = Silence(f"no answer in {seconds:.0f} s")
        except (EOFError, OSError):
            self.process.join(5)
            failure = Failure(f"the process ended, status {self.process.exitcode}")
        self.stop()
        raise failure

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
        self.process = None
