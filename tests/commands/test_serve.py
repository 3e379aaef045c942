"""`deltaw serve`: who may ask, what is refused before the weights are read, and how it begins and ends."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from deltaw.commands.serve import KEY, Place, access_of, serve_named
from deltaw.errors import InputError
from deltaw.serve.listen import GRACE, address_of, bind
from deltaw.show.progress import QUIET
from deltaw.show.result import Result
from tests.tiny import tiny_base


def place(host: str = "127.0.0.1", port: int = 0, **more: Any) -> Place:
    return Place(host, port, **more)


def test_other_machines_need_a_key_unless_nobody_does() -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        assert access_of(place(host), None, QUIET).key is None
        assert access_of(place(host), "k", QUIET).key == "k"
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(InputError):
            access_of(place(host), None, QUIET)
        assert not access_of(place(host, no_key=True), None, QUIET).local
        assert access_of(place(host), "k", QUIET).key == "k"


@pytest.mark.parametrize("text", ["", " ", "\n", "a b", "a\nb", "é", "a\x07"])
def test_what_is_no_key(tmp_path: Path, text: str) -> None:
    (tmp_path / "key").write_text(text)
    with pytest.raises(InputError):
        access_of(place(key_file=str(tmp_path / "key")), None, QUIET)
    with pytest.raises(InputError):
        access_of(place(), text, QUIET)


def test_a_key_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("abc\n")
    assert access_of(place(key_file=str(tmp_path / "key")), "other", QUIET).key == "abc"
    for wrong in (place(key_file=str(tmp_path / "none")), place(key_file=str(tmp_path / "key"), no_key=True)):
        with pytest.raises(InputError):
            access_of(wrong, None, QUIET)
    with pytest.raises(InputError):
        access_of(place(origins=("example.org",)), None, QUIET)


def test_what_is_wrong_is_said_before_the_base_is_looked_for(tmp_path: Path) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        for folder, where in (
            (None, place(port=port)),
            (None, place("0.0.0.0")),
            (str(tmp_path / "none"), place()),
            (None, place("no.such.host.invalid", no_key=True)),
        ):
            with pytest.raises(InputError) as error:
                serve_named("no/base", folder=folder, weights=None, place=where, show=print, display=QUIET)
            assert "no/base" not in str(error.value) and len(str(error.value).splitlines()) <= 5
        assert address_of(taken) == f"http://127.0.0.1:{port}"


def test_a_second_ctrl_c_does_not_wait_for_answers(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    began = [0.0]

    def begun(result: Result) -> None:
        fields = {"model": result.data["base"], "prompt": "a", "max_tokens": 200, "n": 16, "logit_bias": {"5": 100}}
        request = urllib.request.Request(f"{result.data['address']}/v1/completions", json.dumps(fields).encode())

        def twice() -> None:
            for _ in range(2):
                time.sleep(0.1)
                os.kill(os.getpid(), signal.SIGINT)
            began[0] = time.monotonic()

        def ask() -> None:
            threading.Thread(target=twice).start()
            with contextlib.suppress(OSError, HTTPException):
                urllib.request.urlopen(request, timeout=20).close()

        threading.Thread(target=ask).start()

    with pytest.raises(KeyboardInterrupt):
        serve_named(str(base), folder=None, weights=None, place=place(), show=begun, display=QUIET)
    assert time.monotonic() - began[0] < 5 < GRACE


@pytest.mark.slow
def test_signals_at_any_moment_end_it_in_one_line(tmp_path: Path) -> None:
    """Several of them: while it starts, while it serves, while it ends."""
    command, chance = [sys.executable, "-m", "deltaw", "serve", str(tiny_base(tmp_path / "base"))], random.Random(0)
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        time.sleep(0.5 + 8 * chance.random())
        while process.poll() is None:
            process.send_signal(number)
            time.sleep(chance.choice((0.001, 0.01, 0.1)))
        said = process.communicate()[1].splitlines()
        assert process.returncode == 128 + number and said[-1] == "stopped" and said.count("stopped") == 1
        assert all(line.startswith(("starting: ", "ending: ", "stopped")) for line in said)


def test_it_answers_until_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "k")
    base, answers = tiny_base(tmp_path / "base"), []

    def begun(result: Result) -> None:
        def ask() -> None:
            try:
                request = urllib.request.Request(
                    f"{result.data['address']}/v1/models", headers={"Authorization": "Bearer k"}
                )
                with urllib.request.urlopen(request, timeout=20) as answer:
                    answers.append((result, json.load(answer)))
            finally:
                os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=ask).start()

    with pytest.raises(KeyboardInterrupt):
        serve_named(str(base), folder=None, weights=None, place=place(), show=begun, display=QUIET)
    ((result, models),) = answers
    assert [model["id"] for model in models["data"]] == [result.data["base"]] and result.data["key"] is True
    assert result.data["adapters"] == [] and result.data["address"] in result.text
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(result.data["address"], timeout=5)
