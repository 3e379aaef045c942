"""A function of the user's own, in its process: what it is given, and what becomes of whatever it does wrong."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest

from deltaw.config.reward import parse_rewards
from deltaw.data.row import Row
from deltaw.errors import InputError, RunError
from deltaw.evaluation.own_metric import Consent
from deltaw.rewards.function import code_of
from deltaw.rewards.opening import Rewards, rewards_of
from deltaw.rewards.scored import Asked

SOURCE = """
import os, sys, time
print("a word on stdout, while it is loaded")
def judge(prompt, completion, row):
    print("a word on stdout")
    os.write(1, b"more of them")
    if completion == "raises":
        return row["nothing"]
    if completion == "hangs":
        time.sleep(60)
    if completion == "crashes":
        os.kill(os.getpid(), 11)
    if completion == "leaves":
        os._exit(0)
    if completion == "exits":
        sys.exit(3)
    if completion == "reads":
        return len(sys.stdin.read())
    if completion == "eats":
        return len(bytearray(2**30))
    return eval(completion or "0")
def takes_two(prompt, completion): return 1
async def later(prompt, completion, row): return 1
"""
ROWS = [Row({"prompt": "say", "completion": "1"}, "rows.jsonl:1"), Row({"prompt": "do"}, "rows.jsonl:2")]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward") / "judge.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture(scope="module")
def rewards(file: Path) -> Iterator[Rewards]:
    config = parse_rewards({"function": f"{file}:judge", "seconds": 1.0, "memory": 200})
    with rewards_of(config, ROWS) as opened:
        yield opened


def asked(completion: str) -> Asked:
    return Asked("say", completion, ROWS[0].value, origin=ROWS[0].origin)


def test_numbers_and_dicts_of_numbers_are_rewards(rewards: Rewards, capfd: pytest.CaptureFixture[str]) -> None:
    values = {
        "0.5": (0.5, {}),
        "True": (1, {}),
        "-3": (-3, {}),
        "{'a': 1, 'b': 0.5}": (1.5, {"judge.a": 1, "judge.b": 0.5}),
        "{'reward': 2, 'b': False}": (2, {"judge.b": 0}),
        "reads": (0, {}),
        "len(prompt + row['completion'])": (4, {}),
    }
    scored = rewards([asked(completion) for completion in values])
    for one, (total, parts) in zip(scored, values.values(), strict=True):
        assert (one.total, one.parts) == (total, {"judge": total, **parts})
    assert capfd.readouterr().out == "" and rewards([]) == []


def test_what_json_hasnt_got_comes_as_text(rewards: Rewards) -> None:
    row = {"when": date(2026, 1, 2), "raw": "\ud800", "n": float("inf")}
    text = "row['when'] == '2026-01-02' and row['raw'] == chr(0xd800) and row['n'] > 9"
    assert rewards([Asked([{"role": "user", "content": "?"}], text, row)])[0].total == 1


WRONG = [
    "None",
    "'1'",
    "float('nan')",
    "-float('inf')",
    "[1]",
    "{}",
    "{'a': None}",
    "{1: 2}",
    "10**400",
    "1e300",
    "{'a': -1e31}",
]


@pytest.mark.parametrize("completion", [*WRONG, "raises", "exits", "eats", "hangs", "crashes", "leaves"])
def test_whatever_goes_wrong_is_an_error_that_names_the_row(rewards: Rewards, completion: str) -> None:
    """Never a 0; and the one after it is scored."""
    with pytest.raises(RunError) as raised:
        rewards([asked("1"), asked(completion), asked("1")])
    assert "rows.jsonl:1" in str(raised.value) and "judge" in str(raised.value)
    assert len(str(raised.value).splitlines()) <= 5
    if completion == "raises":
        assert "judge.py:8" in str(raised.value) and "nothing" in str(raised.value)
    assert rewards([asked("1")])[0].total == 1


def test_a_file_that_ends_its_process_is_named(tmp_path: Path) -> None:
    (path := tmp_path / "leaving.py").write_text("import os\nos._exit(0)\n")
    with pytest.raises((InputError, RunError), match=r"leaving\.py"):
        rewards_of(parse_rewards(f"{path}:judge"), ROWS)


@pytest.mark.parametrize(
    ("function", "word"), [("takes_two", "takes_two"), ("later", "async"), ("nowhere", "judge"), ("os", "os")]
)
def test_what_cant_be_called_is_refused_before_work(file: Path, function: str, word: str) -> None:
    with pytest.raises(InputError, match=word):
        rewards_of(parse_rewards(f"{file}:{function}"), ROWS)


def test_one_row_is_scored_before_work(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def f(p, c, r):\n    return 1 / (len(c) - 1)")
    with pytest.raises(InputError, match=r"own.py:2, on row rows\.jsonl:1"):
        rewards_of(parse_rewards(f"{tmp_path / 'own.py'}:f"), ROWS)


def test_code_that_only_a_run_folder_names_asks_first(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    config = parse_rewards(f"{file}:judge")
    with pytest.raises(InputError, match="--allow-code"):
        rewards_of(config, ROWS, consent=Consent("runs/stranger"))
    with rewards_of(config, ROWS):
        assert len(code_of(config)["judge"]) == 64
    with rewards_of(config, ROWS, consent=Consent("runs/stranger")):
        pass  # these very bytes have run on request


def test_its_process_ends_with_ours_while_it_computes(tmp_path: Path) -> None:
    mark = tmp_path / "id"
    own = f"import os, time\ndef f(p, c, r):\n    open({str(mark)!r}, 'w').write(str(os.getpid()))\n    time.sleep(60)"
    spec = {"kind": "function", "file": "own.py", "source": own.encode().hex(), "function": "f", "memory": 100}
    code = f"from deltaw.rewards.process import Process; list(Process({spec}, 'it', 60).answers([['', '', {{}}]]))"
    ours = subprocess.Popen([sys.executable, "-c", code])
    until = time.monotonic() + 60
    while not (mark.exists() and mark.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    ours.send_signal(signal.SIGKILL)
    ours.wait()
    while time.monotonic() < until:
        try:
            os.kill(int(mark.read_text()), 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    pytest.fail("it runs on")
