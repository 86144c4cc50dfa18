"""Signals that end a run in order: SIGTERM (a queue's), SIGINT (Ctrl+C), SIGUSR1 (Slurm's warning)."""

import logging
import signal
import threading
from types import FrameType

log = logging.getLogger(__name__)

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class Stopped(SystemExit):
    """Ends the process with the status that a shell gives it: 128 + the signal's number."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.signum = signum


class StopSignals:
    """While entered, the first signal is kept in `received` for the work to heed; a second ends it at once.

    A signal that nobody has heeded on leaving ends the process then.
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
        """Takes the signals; also from whoever took them since."""
        for signum in SIGNALS:
            _handle(signum, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise Stopped(signum)
        self.received = signum
        log.warning("%s: this step is finished and saved; once more stops at once", _name(signum))


def stop_at_once() -> None:
    """From now on a signal ends the process where it stands, through every `finally`."""

    def stop(signum: int, frame: FrameType | None) -> None:
        log.warning("%s: stopped; --resume takes the run up", _name(signum))
        raise Stopped(signum)

    for signum in SIGNALS:
        _handle(signum, stop)


def _handle(signum: int, handler: object) -> None:
    if threading.current_thread() is threading.main_thread():  # no other may
        signal.signal(signum, handler)


def _name(signum: int) -> str:
    return signal.Signals(signum).name
