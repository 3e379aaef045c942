"""Signals: raised where they come, held where something would be lost, and a second one never waits."""

import os
import signal

import pytest

from deltaw.training.stop import Stopped, StopRequest


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_outside_a_held_block_it_stops_where_it_comes(number: int, code: int) -> None:
    with pytest.raises(Stopped, match="what next") as stopped, StopRequest("what next"):
        send(number)
        raise AssertionError("it went on")
    assert stopped.value.exit_code == code


def test_held_it_waits_for_the_end_of_the_block() -> None:
    done = []
    with StopRequest("what next") as stop:
        with pytest.raises(Stopped) as stopped:
            with stop.held():
                send(signal.SIGTERM)
                done.append("the block")
            done.append("after it")
        with stop.held():  # what the first one asks for may itself be held
            done.append("saved")
        with pytest.raises(Stopped, match="saved; what next"):
            stop.check("saved")
    assert done == ["the block", "saved"] and stopped.value.exit_code == 143 and not stopped.value.at_once


def test_an_error_in_a_held_block_is_the_error() -> None:
    with pytest.raises(ValueError, match="broken"), StopRequest() as stop, stop.held():
        send(signal.SIGTERM)
        raise ValueError("broken")


def test_a_second_one_stops_at_once() -> None:
    with pytest.raises(Stopped, match="at once") as stopped, StopRequest() as stop, stop.held():
        send(signal.SIGTERM)
        send(signal.SIGINT)
        raise AssertionError("it went on")
    assert stopped.value.exit_code == 130 and stopped.value.at_once


def test_no_library_swallows_it() -> None:
    with pytest.raises(Stopped), StopRequest():
        try:
            send(signal.SIGINT)
        except Exception as error:
            raise AssertionError("it was swallowed") from error


def test_afterwards_signals_are_what_they_were() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_library_that_wraps_it_doesnt_hide_it() -> None:
    """pydantic calls back into Python, and makes an error of its own of whatever is raised there."""
    with pytest.raises(Stopped) as stopped, StopRequest():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as error:
            raise ValueError("wrapped") from error
    assert stopped.value.exit_code == 143
