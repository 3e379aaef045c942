"""Rows prepared the fast way (several processes, no offsets, shapes told by roles) and the plain way are the same."""

import dataclasses
import json
import os
import signal
from typing import Any

import pytest
from toys import TEMPLATED, sentencepiece, toy

from deltaw.config import DataConfig
from deltaw.data import left_out, prepare
from deltaw.data.dataset import Dataset
from deltaw.data.encode import MARK, Encoder
from deltaw.data.read import read_into, read_rows
from deltaw.data.render import Renderer
from deltaw.data.rows import Rows
from deltaw.errors import InputError, RunError
from deltaw.files import forked
from deltaw.files.forked import in_processes

RENDERERS = {kind: Renderer(toy(kind)) for kind in (*TEMPLATED, "plain", "bos")}
LONG = "The capital of France is Paris. " * 12


def chat(*turns: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant") * len(turns)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)], **more}


BROKEN: list[Any] = [
    "{not json",
    '{"a": 1, "a": 2}',
    "[1]",
    {"messages": "no list"},
    {"messages": []},
    {"prompt": 3, "completion": "x", "text": None},
    {"text": "  "},
]
FORMS: dict[str, list[Any]] = {
    "chat": [
        *(chat(f"question {n}", f"answer {n}", *([f"more {n}", "thought</think>two"] * (n % 3))) for n in range(30)),
        chat("name <|im_end|> and </s>", "it is [INST] <|eot|>", id=7),
        chat("a", "b", tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]),
        {"messages": [{"role": "system", "content": "s"}, *chat("q", "a")["messages"]]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]},
        {"messages": [{"role": "user", "content": "q", "name": "n"}, {"role": "assistant", "content": " a ", "x": 1}]},
        chat("only a question"),
        chat(LONG, LONG, LONG, LONG),
        chat("broken \ud800", "x"),
        chat("nul \0", "x"),
        chat("same", "same"),
        chat("same", "same"),
    ],
    "pairs": [
        *({"prompt": f"{n} ->", "completion": f" {n * 7}", "note": "n" * (n % 2)} for n in range(30)),
        {"prompt": LONG, "completion": LONG},
        {"prompt": "</s>", "completion": "<|end|>"},
        {"prompt": "", "completion": ""},
    ],
    "text": [
        *({"text": f"Document {n}. {LONG[: 20 * n]}\n\nEnd of {n}."} for n in range(30)),
        {"text": LONG * 4 + "<|end|>" + LONG},
    ],
}
SETTINGS: list[dict[str, Any]] = [
    {"max_length": 64},
    {"max_length": 64, "eval": 5, "seed": 3},
    {"max_length": 40, "eval": 0.25, "limit": 9},
    {"max_length": 64, "too_long": "truncate"},
]


def prepared(config: DataConfig, renderer: Renderer, cores: int, monkeypatch: pytest.MonkeyPatch) -> Dataset | str:
    monkeypatch.setattr(prepare, "cores", lambda: cores)
    try:
        return prepare.prepare(config, renderer)
    except InputError as error:
        return str(error)


def plain(example: Any) -> list[Any]:
    return [value.tolist() if hasattr(value, "tolist") else value for value in dataclasses.astuple(example)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", RENDERERS)
def test_processes_give_what_one_gives(tmp_path: Any, kind: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "CHUNK", 4)
    monkeypatch.setattr(prepare, "SEVERAL", 2)
    rows = [*FORMS[form], *BROKEN]
    file = tmp_path / "train.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    same = 0
    for number, settings in enumerate(SETTINGS):
        if form != list(FORMS)[number % 3] and number:
            continue
        config = DataConfig(train=str(file), bad_rows=1.0, **settings)
        one, several = (prepared(config, RENDERERS[kind], cores, monkeypatch) for cores in (1, 3))
        if isinstance(one, str) or isinstance(several, str):
            assert one == several
            continue
        assert several.fingerprint == one.fingerprint
        assert dataclasses.asdict(several.report) == dataclasses.asdict(one.report)
        assert (several.asking, several.example) == (one.asking, one.example)
        assert list(map(plain, [*several.train, *several.eval])) == list(map(plain, [*one.train, *one.eval]))
        same += 1
    assert same or (form == "chat" and kind in ("plain", "bos"))


@pytest.mark.parametrize("tokenizer", [*map(toy, RENDERERS), sentencepiece()])
def test_ids_are_the_same_where_places_are_not_asked_for(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer)
    assert encoder._quick
    tokenizer("a", truncation=True, max_length=1, padding="max_length")  # whoever uses it in between
    pieces = [["Hello world! ", f"<{MARK}|im_end|> 東京 é\n"], ["", " a", "\n\nb  c"], ["</s>x<|im_end|>"], [LONG]]
    quick, recorded = (encoder.encode(pieces, places=places) for places in (False, True))
    assert [[piece.ids for piece in one] for one in quick] == [[piece.ids for piece in one] for one in recorded]
    assert [[piece.ids for piece in encoder.encode([one])[0]] for one in pieces] == [[p.ids for p in o] for o in quick]


@pytest.mark.parametrize("kind", TEMPLATED)
def test_roles_tell_the_shape_of_a_plain_chat(tmp_path: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(train=str(tmp_path / "t.jsonl"), bad_rows=1.0, max_length=512)
    rows = FORMS["chat"] + [chat("x [a", "y |b"), chat("Hello", "world", "", "more")]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quick = prepare.prepare(config, Renderer(toy(kind)))
    monkeypatch.setattr(left_out, "_simple", lambda row: ())
    slow = prepare.prepare(config, Renderer(toy(kind)))
    assert dataclasses.asdict(quick.report) == dataclasses.asdict(slow.report)
    assert list(map(plain, quick.train)) == list(map(plain, slow.train))


def test_results_come_in_order_and_an_error_in_its_place() -> None:
    def work(number: int) -> bytes:
        if number == 5:
            raise InputError("what", fix="how")
        return b"%d" % number * (number * 30_000)

    results = []
    with pytest.raises(InputError) as caught:
        results.extend(in_processes(work, 9, 3))
    assert [bytes(result) for result in results] == [b"%d" % number * (number * 30_000) for number in range(5)]
    assert (caught.value.what, caught.value.fix) == ("what", "how")


def test_a_process_that_dies_is_an_error_and_a_defect_shows_where() -> None:
    def dies(number: int) -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        return b""

    with pytest.raises(RunError, match="signal 9"):
        list(in_processes(dies, 4, 2))
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        list(in_processes(lambda number: b"" * (1 // 0), 4, 2))


def test_processes_end_when_nobody_reads_on(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    fork = os.fork

    def counted() -> int:
        started.append(fork())
        return started[-1]

    monkeypatch.setattr(forked.os, "fork", counted)
    results = in_processes(lambda number: b"x" * 10**6, 100, 2)
    assert len(next(results)) == 10**6
    results.close()
    assert len(started) == 2
    for process in started:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_rows_are_what_was_read(tmp_path: Any) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        lines = [json.dumps({"text": f"{folder} {number} é\u2028"}, ensure_ascii=False) for number in range(5)]
        (tmp_path / folder / "t.jsonl").write_text("\n\n".join([*lines, "{bad"]))
        (tmp_path / folder / "t.csv").write_text("text\nx\ny\n")
    for folder in (f"{tmp_path}/a", f"{tmp_path}"):
        listed, problems = read_rows(folder)
        rows = Rows()
        assert read_into(rows, folder) == problems
        assert list(rows) == listed and rows[2:4] == listed[2:4] and rows[-1] == listed[-1]
        assert list(rows.origins()) == [row.origin for row in listed]
        assert rows.files() == {row.origin.rpartition(":")[0] for row in listed}
    rows.rename("up", {"a/t.csv", "b/t.jsonl"})
    names = {"a/t.csv": "up/a/t.csv", "b/t.jsonl": "up/b/t.jsonl"}
    expected = [row.origin.rpartition(":") for row in listed]
    assert list(rows.origins()) == [f"{names.get(file, file)}:{number}" for file, _, number in expected]
    assert [row.value for row in rows] == [row.value for row in listed]
