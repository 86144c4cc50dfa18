"""Graceful shutdown on SIGTERM (from schedulers), SIGINT (Ctrl+C) and SIGUSR1 (Slurm's warning)."""

import logging
import signal
import threading
from types import FrameType

log = logging.getLogger(__name__)

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class Stopped(SystemExit):
    """Exits with the status of a process that a signal ended: 128 + its number."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.signum = signum


class StopSignals:
    """Inside a `with` block the first signal is only noted, in `received`; a second one raises `Stopped`.

    If `received` is set on leaving the block, `Stopped` is raised there.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "StopSignals":
        self._before = {signum: signal.getsignal(signum) for signum in SIGNALS}
        self.listen()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        for signum, handler in self._before.items():
            _handle(signum, handler)
        if self.received is not None and error is None:
            raise Stopped(self.received)

    def listen(self) -> None:
        """Installs the signal handlers, also over those that were installed since."""
        for signum in SIGNALS:
            _handle(signum, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise Stopped(signum)
        self.received = signum
        log.warning("%s: stopping after this step, saved; a second signal stops at once", _name(signum))


def stop_at_once() -> None:
    """Makes every signal raise `Stopped` at once."""

    def stop(signum: int, frame: FrameType | None) -> None:
        log.warning("%s: stopped; continue the run with --resume", _name(signum))
        raise Stopped(signum)

    for signum in SIGNALS:
        _handle(signum, stop)


def _handle(signum: int, handler: object) -> None:
    if threading.current_thread() is threading.main_thread():  # Python allows it in no other thread
        signal.signal(signum, handler)


def _name(signum: int) -> str:
    return signal.Signals(signum).name
