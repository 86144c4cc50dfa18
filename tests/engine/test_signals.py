"""Signals: the first is kept for the work to heed, the second ends it, none is lost."""

import os
import signal

import pytest

from ldm.engine.signals import SIGNALS, Stopped, StopSignals, stop_at_once


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


@pytest.fixture(autouse=True)
def restored():
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_the_first_is_kept_and_the_second_ends():
    stop = StopSignals()
    with pytest.raises(Stopped) as stopped, stop:
        send(signal.SIGUSR1)
        assert stop.received == signal.SIGUSR1
        send(signal.SIGINT)
        raise AssertionError("the second signal was not heeded")
    assert stopped.value.code == 130 and stopped.value.signum == signal.SIGINT


def test_one_that_nobody_heeded_ends_on_leaving():
    with pytest.raises(Stopped) as stopped, StopSignals():
        send(signal.SIGTERM)
    assert stopped.value.code == 143


def test_an_error_is_not_hidden_by_a_signal():
    with pytest.raises(ZeroDivisionError), StopSignals():
        send(signal.SIGTERM)
        raise ZeroDivisionError


def test_handlers_return_to_what_they_were_and_can_be_taken_again():
    before = [signal.getsignal(signum) for signum in SIGNALS]
    with StopSignals() as stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a library may
        stop.listen()
        send(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        stop.received = None
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


@pytest.mark.parametrize("signum", SIGNALS)
def test_at_once(signum: int):
    stop_at_once()
    with pytest.raises(Stopped) as stopped:
        send(signum)
    assert stopped.value.code == 128 + signum
