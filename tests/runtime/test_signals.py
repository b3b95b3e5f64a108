"""Signals: the first is noted for the next safe point, the second acts at once, and handlers come back."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from rlhf_ppo.runtime.machine.signals import Interrupted, asked_to_stop, stop_if_asked, stop_on_signals


@pytest.fixture(autouse=True)
def handlers():
    """Own handlers for both signals, back to what pytest has afterwards."""
    seen: list[int] = []
    before = {number: signal.signal(number, lambda n, _: seen.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_fault_22_the_first_signal_waits_for_a_safe_point_and_the_second_does_not(handlers, capfd, number, code):
    with pytest.raises(Interrupted) as stopped, stop_on_signals():
        stop_if_asked()
        assert not asked_to_stop()
        send(number)
        assert handlers == [] and asked_to_stop()
        for second in (signal.SIGINT, signal.SIGTERM):
            send(second)
        assert handlers == [signal.SIGINT, signal.SIGTERM]  # what they did before
        stop_if_asked()
    assert stopped.value.exit_code == code
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert f"{signal.Signals(number).name}: the run stops at the next safe point" in capfd.readouterr().err


def test_the_old_handlers_are_back_whatever_happened(handlers):
    old = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), stop_on_signals():
        assert signal.getsignal(signal.SIGINT) is not old[0]
        raise ZeroDivisionError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == old
    with stop_on_signals():
        send(signal.SIGTERM)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == old
    stop_if_asked()  # the request ended with the run that it was for


def test_an_ignored_signal_stays_ignored():
    """nohup, and a shell's background jobs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_on_signals():
        send(signal.SIGINT)
        stop_if_asked()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_in_another_thread_nothing_changes():
    """Python refuses to set handlers there."""
    old, found = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        with stop_on_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [old]


def test_the_message_names_the_signal_and_the_place():
    assert str(Interrupted(signal.SIGTERM)) == "stopped by SIGTERM"
    assert str(Interrupted(signal.SIGINT, Path("run/checkpoint-3"))) == "stopped by SIGINT; saved in run/checkpoint-3"
