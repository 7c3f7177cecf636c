"""Signals that ask a run to stop, heard on all ranks: at the next step boundary it writes a checkpoint and ends.

    with StopSignals() as signals:
        while ...:
            ...one step...
            if signals.received_by_any_rank(device):
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

import torch

from aliblip.runtime.distributed import reduce_max

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # of Linux' prctl


class StopSignals:
    """Remembers, inside its `with` block in the main thread, the first signal that asked this process to stop."""

    def __init__(self):
        self.received: signal.Signals | None = None

    def __enter__(self) -> StopSignals:
        heard = [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._remember) for number in heard}
        if "ACCELERATE_MIXED_PRECISION" in os.environ:  # a launcher's child
            _hear_of_the_launchers_end()
        return self

    def __exit__(self, *error) -> None:
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

    def received_by_any_rank(self, device: torch.device) -> signal.Signals | None:
        """The signal that some rank has received, equal on all ranks. A collective."""
        number = reduce_max(0 if self.received is None else int(self.received), device)
        return signal.Signals(number) if number else None


def _hear_of_the_launchers_end() -> None:
    """Let the system send SIGUSR1 when the launcher dies (Linux).

    `accelerate launch` of one process does not pass SIGTERM on: it dies, and would leave this process training for
    nobody. torchrun passes it on, but not when it is killed itself.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGUSR1), 0, 0, 0)


def let_the_trainer_decide() -> None:
    """For processes that read data: launchers and cluster managers signal all processes of a job, some of them twice,
    but the trainer needs its readers until it has written its checkpoint. It ends them itself, with SIGKILL."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


__all__ = ["STOP_SIGNALS", "StopSignals", "let_the_trainer_decide"]
