"""Work in a thread that ends."""

import signal
import threading
import time
from contextvars import ContextVar

import pytest

from deltaw.linalg.threads import apart, one_thread


def test_it_gives_what_the_call_gives_and_ends() -> None:
    known: ContextVar[int] = ContextVar("known", default=0)
    known.set(3)
    name, seen = apart(lambda: (threading.current_thread().name, known.get()))
    assert seen == 3 and name not in {thread.name for thread in threading.enumerate()}


def test_it_raises_what_the_call_raises() -> None:
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 // 0)
    with pytest.raises(SystemExit), one_thread():
        apart(lambda: exit(2))


def test_a_signal_does_not_wait_for_it() -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before, began = signal.signal(signal.SIGALRM, stop), time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            apart(lambda: time.sleep(3))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 2
