"""Stop signals and the watchdog in one process."""

import os
import signal
import time

import pytest

from extensions.distributed import signals, watchdog

pytestmark = pytest.mark.usefixtures("interruptible")


def test_a_second_ctrl_c_interrupts_and_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.caught():
            assert signals.requested() is None
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.requested() is None
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.requested() == "SIGTERM"
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_watchdog_ignores_a_rank_with_heartbeats():
    with watchdog.watching(0, 30.0):
        for _ in range(3):
            watchdog.heartbeat()
            with watchdog.waiting("a sum"):
                pass
    assert watchdog._seconds is None
