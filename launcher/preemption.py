"""Being asked to stop: a signal becomes a flag, and the flag an exit code that says `start me again`."""

import os
import signal
from types import FrameType

EXIT_STOPPED = 85  # stopped on request after a complete save: start me again
EXIT_FAILED = 86  # an exception; the checkpoints on disk are good
EXIT_FENCED = 87  # a later life of the run has taken over
EXIT_HUNG = 88  # ended by the watchdog
# Slurm's warning; the end of a grace time or a container's stop; a terminal that was closed
STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Turn stop signals into a flag that the training loop asks for at a step boundary.

    A handler only sets the flag: a save is a collective and cannot run inside a signal handler.
    """

    def __init__(self) -> None:
        self._cause: str | None = None

    def __call__(self) -> bool:
        return self._cause is not None

    @property
    def cause(self) -> str | None:
        """What asked to stop, None if nothing did."""
        return self._cause

    def request(self, cause: str) -> None:
        """Ask to stop at the next step boundary."""
        self._cause = self._cause or cause

    def install(self, keyboard: bool = False) -> None:
        """Take over the stop signals of this process; with `keyboard`, Ctrl-C too (a second one quits at once).

        Forked children get USR2 ignored and SIGTERM as usual: they must neither save nor refuse to end. The data
        workers are no children of this process, and ignore both until it is gone (data_pipeline/workers.py).
        """
        for signum in STOP_SIGNALS:
            signal.signal(signum, self._on_signal)
        if keyboard:
            signal.signal(signal.SIGINT, self._on_keyboard)
        os.register_at_fork(after_in_child=_forget_in_child)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(signum).name)

    def _on_keyboard(self, signum: int, frame: FrameType | None) -> None:
        self.request("Ctrl-C")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # os.write, since print is not re-entrant and this may interrupt one
        os.write(2, b"\nstopping after this step, then saving; Ctrl-C again quits without a save\n")


def _forget_in_child() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
