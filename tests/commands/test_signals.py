"""Ctrl-C and SIGTERM, in every verb: one line, exit 130 or 143, nothing half-written, no traceback."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltaw.adapter.file import Adapter
from deltaw.files import atomic
from deltaw.shipping.lint import rules_files
from deltaw.show.progress import Display
from tests.test_cli import call

NUMBERS = {signal.SIGINT: 130, signal.SIGTERM: 143}


VERBS: list[tuple[list[Any], bool]] = [  # the verb, and whether it writes a folder `out`
    (["preview", "run.yaml"], False),
    (["plan", "run.yaml"], False),
    (["eval", "one"], False),
    (["generate", "one", "say 3 "], False),
    (["inspect", "one", "-o", "out.html"], False),
    (["scale", "one", "--to", 0.5, "-o", "out"], True),
    (["resize", "one", "--rank", 2, "-o", "out"], True),
    (["combine", "one", "one", "-o", "out"], True),
    (["merge", "one", "-o", "out"], True),
    (["export", "one", "--to", "peft", "-o", "out"], True),
    (["lint", "one"], False),
    (["verify", "one", "one", "--prompts", 1], False),
]


def signalled(number: signal.Signals, real: Callable[..., Any]) -> Callable[..., Any]:
    def first_a_signal(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(number)
        return real(*arguments, **options)

    return first_a_signal


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
@pytest.mark.parametrize(("verb", "writes"), VERBS, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_a_signal_ends_it_in_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, verb: list[Any], writes: bool
) -> None:
    """While it reads, and for what writes while it writes."""
    writing = [(atomic, "fsync", atomic.fsync)] if writes else []
    by_verb = {"lint": (rules_files, "read", rules_files.read)} | dict.fromkeys(
        ("preview", "plan", "verify"), (Display, "task", Display.task)
    )
    reading = [by_verb.get(verb[0], (Adapter, "load", Adapter.load))]
    given = {word: folder / word for word in ("run.yaml", "one")}
    given |= {word: tmp_path / word for word in ("out", "out.html")}
    for owner, name, real in [*reading, *writing]:
        with monkeypatch.context() as patched:
            hit = signalled(number, real)
            patched.setattr(owner, name, staticmethod(hit) if owner is Adapter else hit)
            code, out, err = call(*(given.get(word, word) for word in verb))
        lines = err.strip().splitlines()
        assert code == NUMBERS[number] and not out, (verb, name, code, err)
        assert lines[-1].startswith("stopped") and "Traceback" not in err and "defect" not in err
        assert not list(tmp_path.iterdir())  # neither the target nor anything hidden
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
def test_while_libraries_are_imported(folder: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "deltaw", "preview", str(folder / "run.yaml")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if " torch." in line:  # the first of its parts: most are still to come
                break
        process.send_signal(number)
        rest = [line for line in process.stderr.read().splitlines() if not line.startswith("import time:")]
    assert process.returncode == NUMBERS[number] and rest == ["stopped"]


def test_what_a_library_makes_of_a_signal_is_still_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaw.commands import train as commands

    def wrapped(*args: object, **options: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("a part of it couldn't be loaded") from None

    monkeypatch.setattr(commands, "demo_named", wrapped)
    assert call("demo") == (130, "", "stopped\n")
