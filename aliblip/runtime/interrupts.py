"""Signals that ask a run to stop, heard on all ranks: at the next step boundary it writes a checkpoint and ends.

    with StopSignals() as signals:
        while ...:
            ...one step...
            if signals.known_to_all(the largest `signals.number` of all ranks):
                ...checkpoint, end...

SIGTERM (launchers, `kill`, cluster managers), SIGUSR1 (preemption notices, the end of the launcher), SIGINT (Ctrl-C)
and SIGHUP (a terminal that is closed; not under nohup). After a first Ctrl-C, a second one or SIGTERM ends the process
at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from aliblip.runtime.distributed import world_size

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # of Linux' prctl
_listening: StopSignals | None = None


def stop_asked() -> signal.Signals | None:
    """The signal that has asked this process to stop, if its run listens to them."""
    return None if _listening is None else _listening.received


class StopSignals:
    """Remembers, inside its `with` block in the main thread, the first signal that asked this process to stop."""

    def __init__(self):
        self.received: signal.Signals | None = None

    def __enter__(self) -> StopSignals:
        global _listening
        _listening = self
        heard = [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._remember) for number in heard}
        if "ACCELERATE_MIXED_PRECISION" in os.environ:  # a launcher's child
            _hear_of_the_launchers_end()
        return self

    def __exit__(self, *error) -> None:
        global _listening
        _listening = None
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
        if number == signal.SIGINT:
            # The system's own action, and not a handler: it also ends a process that waits for another rank. SIGTERM
            # too, since torchrun answers the second Ctrl-C with it.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    @property
    def number(self) -> int:
        """What this process has received, for the others; 0 is nothing."""
        return 0 if self.received is None else int(self.received)

    def known_to_all(self, largest: int) -> signal.Signals | None:
        """The signal that all ranks know of, equal on all of them.

        Args:
            largest: the largest `number` of all ranks. It takes a while to get around: what came meanwhile is heard the
                next time, and of a single process at once.
        """
        number = largest if world_size() > 1 else self.number
        return signal.Signals(number) if number else None


def hear_of_the_parents_end(number: signal.Signals) -> None:
    """Let the system send this process a signal when its parent dies (Linux)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def _hear_of_the_launchers_end() -> None:
    """Hear SIGUSR1 when the launcher dies.

    `accelerate launch` of one process does not pass SIGTERM on: it dies, and would leave this process training for
    nobody. torchrun passes it on, but not when it is killed itself.
    """
    hear_of_the_parents_end(signal.SIGUSR1)


def let_the_trainer_decide() -> None:
    """For processes that read data: launchers and cluster managers signal all processes of a job, some of them twice,
    but the trainer needs its readers until it has written its checkpoint. It ends them itself, with SIGKILL."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


__all__ = ["STOP_SIGNALS", "StopSignals", "hear_of_the_parents_end", "let_the_trainer_decide", "stop_asked"]
