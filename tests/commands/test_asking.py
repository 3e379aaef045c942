"""Asking: a text takes the form of the adapter's training, a file of prompts is answered once, whatever happens."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.adapter.file import Adapter
from deltaw.config import load_config
from deltaw.data.asking import Asking, behind, of_training, question_of
from deltaw.data.document import Chat, Completion, Text
from deltaw.data.prepare import prepare_held_out
from deltaw.data.prompts import prompts_of_text, read_prompts
from deltaw.errors import InputError
from deltaw.model import Model, open_model
from tests.test_cli import call
from tests.tiny import SYSTEM

SHORT = ("--max-tokens", 3)


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, Model]:
    return {name: open_model(folder / name) for name in ("one", "chats", "base")}


def as_messages(text: str, system: str = SYSTEM) -> list[dict[str, str]]:
    start = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": text}]


# ---- the form of a text


def test_a_prompt_is_what_stood_in_front_of_an_answer_in_training(folder: Path, models: dict[str, Model]) -> None:
    for name, asks in (("one", lambda row: row["prompt"]), ("chats", lambda row: row["messages"][1]["content"])):
        config, model = load_config(folder / name / "config.yaml"), models[name]
        rows = [json.loads(line) for line in Path(str(config.data.train)).read_text().splitlines()]
        examples = prepare_held_out(config.data, model.renderer)
        for example in examples:
            row = rows[int(example.origin.rpartition(":")[2]) - 1]
            given = example.tokens[: int(example.loss_mask.argmax())].tolist()
            assert model.prompt_ids(asks(row)) == given
        assert len(examples) == 8


def test_it_can_be_had_otherwise(folder: Path, models: dict[str, Model]) -> None:
    plain, chats, base = (models[name] for name in ("one", "chats", "base"))
    ids = chats.renderer.prompt_ids
    assert plain.prompt_ids("x") == chats.prompt_ids("x", chat=False) == base.prompt_ids("x", chat=False) == ids("x")
    assert plain.prompt_ids("x", chat=True) == base.prompt_ids("x") == ids(as_messages("x", ""))
    assert chats.prompt_ids("x") == ids(as_messages("x")) != ids(as_messages("x", ""))
    messages = as_messages("x", "other")
    assert {tuple(model.prompt_ids(messages)) for model in models.values()} == {tuple(ids(messages))}
    for options, form, system in (((), "chat", SYSTEM), (("--raw",), "raw", ""), (("--system", ""), "chat", "")):
        code, out, _ = call("generate", folder / "chats", "x", "--json", *SHORT, *options)
        result = json.loads(out)
        assert code == 0 and (result["form"], result["system"]) == (form, system)
        asked = "x" if form == "raw" else as_messages("x", system)
        assert result["text"] == chats.generate(asked, chat=False, max_new_tokens=3)


def test_one_line_says_how_it_is_asked(folder: Path) -> None:
    for name, word in (("one", "plain text"), ("chats", SYSTEM), ("base", "a chat")):
        code, _, err = call("generate", folder / name, "x", *SHORT)
        lines = [line for line in err.splitlines() if line.startswith("asked as")]
        assert code == 0 and len(lines) == 1 and word in lines[0]


def test_the_form_goes_with_the_adapter(folder: Path, tmp_path: Path, models: dict[str, Model]) -> None:
    moved = shutil.copytree(folder / "chats/adapter", tmp_path / "moved")
    assert call("resize", folder / "chats", "--rank", 2, "-o", tmp_path / "small")[0] == 0
    both = ("combine", folder / "chats", moved, "-o", tmp_path / "both")
    assert call(*both)[0] == 0
    assert call("export", folder / "chats", "--to", "peft", "-o", tmp_path / "peft")[0] == 0
    for name in ("moved", "small", "both", "peft"):
        assert Adapter.load(tmp_path / name).base.system == SYSTEM
    model = open_model(moved, base=folder / "base")
    assert model.asking == models["chats"].asking
    (moved / "deltaw.json").unlink()  # another tool's
    assert open_model(moved, base=folder / "base").asking.chat


def test_a_system_prompt_without_a_chat_is_refused_before_the_weights(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("deltaw.model.open_base", lambda *args, **options: pytest.fail("read the weights"))
    for verb in (
        ("chat", folder / "one"),
        ("generate", folder / "one", "x"),
        ("generate", folder / "chats", "x", "--raw"),
    ):
        code, out, err = call(*verb, "--system", "be kind")
        assert code == 2 and not out and "--system" in err
    with pytest.raises(InputError):
        Asking(False).changed(chat=True, template=False)


def chat(*texts: str, system: str = "") -> Chat:
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return Chat(tuple([{"role": "system", "content": system}] * bool(system) + turns))


@given(st.lists(st.sampled_from(["", "a", "b"]), min_size=1, max_size=6))
def test_a_system_prompt_is_known_where_all_rows_have_it(systems: list[str]) -> None:
    how = of_training(chat("q", "a", system=system) for system in systems)
    assert how.chat and how.system == (systems[0] if len(set(systems)) == 1 else "")
    assert not of_training([Completion("p", "c")]).chat and not of_training([Text("t")]).chat


def test_an_example_is_a_short_question_that_can_be_pasted() -> None:
    rows = [Completion("-", "x"), Completion("a\nb", "x"), Completion("x" * 99, "x"), Completion("\x1b[2J", "x")]
    assert question_of(rows) == question_of([]) == ""
    assert question_of([*rows, Completion("say 3 ", "x"), Completion("y", "x")]) == "say 3 "
    assert question_of([chat("hello", "a", "more", "b", system="s")]) == "hello"


def test_pairs_of_a_file_are_measured_as_chats_where_chats_were_trained(folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line)["messages"] for line in (folder / "chats.jsonl").read_text().splitlines()[:20]]
    pairs = [{"prompt": row[1]["content"], "completion": row[2]["content"]} for row in rows]
    assert behind(Chat(tuple(rows[0][1:])), SYSTEM) == behind(Chat(tuple(rows[0])), "other") == Chat(tuple(rows[0]))
    losses = []
    for name, values in (("chats", [{"messages": row} for row in rows]), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
        code, out, err = call("eval", folder / "chats", tmp_path / f"{name}.jsonl", "--json")
        assert code == 0, err
        losses.append(json.loads(out)["loss"])
    assert losses[0] == losses[1]


# ---- lists


def test_lists_in_lists_out(models: dict[str, Model]) -> None:
    model = models["chats"]
    texts = ["Add 1 and 2", "Add 30", "x"]
    one_by_one = [model.generate(text, max_new_tokens=4) for text in texts]
    assert model.generate(texts, max_new_tokens=4) == model.generate(tuple(texts), max_new_tokens=4) == one_by_one
    assert model.generate([as_messages(text) for text in texts], max_new_tokens=4) == one_by_one
    assert model.generate(as_messages(texts[0]), max_new_tokens=4) == one_by_one[0]
    assert model.generate([]) == [] and model.generate(texts[:1], max_new_tokens=4) == one_by_one[:1]
    assert model.generate(texts, adapter=False, max_new_tokens=4) == [
        model.generate(text, adapter=False, max_new_tokens=4) for text in texts
    ]


def test_an_answer_that_is_cut_short_is_said_to_be(folder: Path, monkeypatch) -> None:
    for tokens, cut in ((3, True), (2, False)):  # of 3 that it may have
        monkeypatch.setattr("deltaw.model.stream", lambda *args, n=tokens: iter([65] * n))
        code, out, _ = call("generate", folder / "one", "a", "--json", *SHORT)
        assert code == 0 and json.loads(out)["cut"] is cut
        assert ("--max-tokens" in call("generate", folder / "one", "a", *SHORT)[2]) is cut


def test_what_is_no_model_is_named_as_what_it_is(folder: Path, tmp_path: Path) -> None:
    run = folder / "one"
    for path, word in ((run / "config.yaml", run), (run / "adapter/README.md", run / "adapter"), (tmp_path, "adapter")):
        for verb in (("generate", path, "x"), ("chat", path)):
            code, out, err = call(*verb)
            assert code == 2 and not out and str(word) in err and len(err.strip().splitlines()) <= 3


def test_several_prompts_on_the_command_line(folder: Path, models: dict[str, Model]) -> None:
    code, out, _ = call("generate", folder / "one", "a", "say 3 ", "--json", *SHORT)
    answers = json.loads(out)["answers"]
    assert code == 0 and [row["text"] for row in answers] == models["one"].generate(["a", "say 3 "], max_new_tokens=3)


# ---- files


ROWS = [
    {"id": 1, "prompt": "Add 1 and 2", "answer": "3"},
    {"id": 2, "messages": as_messages("Add 3 and 4", "other")},
    {"id": 3, "nothing": "to ask"},
    {"id": 4, "question": "Add 5 and 6", "context": "é \u2028"},
    {"id": 5, "prompt": "x" * 999},
    {"id": 6, "messages": [*as_messages("Add 7 and 8"), {"role": "assistant", "content": "15"}]},
    {"id": 7, "prompt": "  "},
]
UNASKED = {3, 5, 7}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    (tmp_path / "prompts.jsonl").write_text("\n".join([*lines[:2], "no JSON", *lines[2:]]) + "\n", encoding="utf-8")
    return tmp_path / "prompts.jsonl"


def lines_of(text: str) -> list[dict[str, Any]]:
    assert text.endswith("\n")
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


def test_every_row_is_answered_in_its_place(folder: Path, prompts: Path, models: dict[str, Model]) -> None:
    out = prompts.with_name("out.jsonl")
    code, text, err = call("generate", folder / "chats", "--file", prompts, "-o", out, "--json", *SHORT)
    result, rows = json.loads(text), lines_of(out.read_text(encoding="utf-8"))
    assert code == 0, err
    assert (result["rows"], result["answered"], result["not_asked"]) == (8, 4, 4) and result["complete"]
    answer, error = result["answer"], result["error"]
    assert answer != "answer"  # which one row has already
    assert "origin" in rows[2] and rows[2][answer] is None and rows[2][error]
    for row, written in zip(ROWS, [*rows[:2], *rows[3:]], strict=True):
        assert {name: written[name] for name in row} == row  # nothing of it is lost
        assert (written[answer] is None) == (error in written) == (row["id"] in UNASKED)
    asked = ["Add 1 and 2", ROWS[1]["messages"], "é \u2028\n\nAdd 5 and 6", as_messages("Add 7 and 8")]
    answers = [row[answer] for row in rows if row[answer] is not None]
    assert answers == models["chats"].generate(asked, max_new_tokens=3)
    code, text, _ = call("generate", folder / "chats", "--file", prompts, *SHORT)
    assert code == 0 and lines_of(text) == rows  # the same on stdout, where nothing else stands


def test_other_kinds_of_files(tmp_path: Path, folder: Path) -> None:
    texts = ["Add 1", "say, 2"]
    (tmp_path / "p.txt").write_text("Add 1\r\n\nsay, 2")
    (tmp_path / "p.csv").write_text('id,prompt\n7,Add 1\n8,"say, 2"\n')
    (tmp_path / "p.json").write_text(json.dumps([{"Prompt": text} for text in texts]))
    sources = [read_prompts(str(tmp_path / f"p.{kind}")) for kind in ("txt", "csv", "json")]
    sources += [prompts_of_text("Add 1\nsay, 2\n"), prompts_of_text('{"prompt": "Add 1"}\n{"instruction": "say, 2"}')]
    assert [[row.prompt for row in rows] for rows in sources] == [texts] * 5
    assert sources[1][1].fields == {"id": "8", "prompt": "say, 2"} and sources[0][1].origin == "p.txt:3"
    piped = call("generate", folder / "one", "--file", "-", "--no-adapter", *SHORT, stdin="Add 1\nsay, 2\n")[1]
    base = call("generate", folder / "base", "--file", tmp_path / "p.txt", "--raw", *SHORT)[1]
    assert lines_of(piped) == lines_of(base) and [row["prompt"] for row in lines_of(base)] == texts


def test_prompts_that_are_not_utf8_get_advice_that_can_be_followed(tmp_path: Path, folder: Path) -> None:
    for name, data in {
        "p.csv": "question\nWie spät?\n".encode("cp1252"),
        "p.jsonl": '{"prompt": "Wie spät?"}\n'.encode("cp1252"),
        "h.csv": "Größe,prompt\n1,a\n".encode("cp1252"),
        "w.csv": "prompt\na\n".encode("utf-16"),
    }.items():
        (tmp_path / name).write_bytes(data)
        code, _, told = call("generate", folder / "base", "--file", tmp_path / name, *SHORT)
        assert code == 2 and "save it as UTF-8" in told and "data.encoding" not in told, name


def test_a_gap_is_not_named_among_the_columns_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": null, "id": 7}\n')
    (row,) = read_prompts(str(tmp_path / "p.jsonl"))
    assert "there are id," in row.problem


def stopping(monkeypatch: pytest.MonkeyPatch, after: int | None) -> list[int]:
    """The numbers of the prompts that are answered from now on; a Ctrl-C comes after so many."""
    asked, answers = [], Model.answers

    def counted(self: Model, *args: Any, **options: Any) -> Iterator[tuple[int, str, bool]]:
        for done, item in enumerate(answers(self, *args, **options)):
            if done == after:
                os.kill(os.getpid(), signal.SIGINT)
            asked.append(item[0])
            yield item

    monkeypatch.setattr(Model, "answers", counted)
    return asked


def test_a_stopped_file_goes_on_and_a_finished_one_stays(
    folder: Path, prompts: Path, models: dict[str, Model], monkeypatch
) -> None:
    def opened(*args: object, chat: bool | None, system: str | None, **options: object) -> Model:
        """Spares reading the weights."""
        return replace(models["chats"], asking=models["chats"].asking.changed(chat=chat, system=system))

    monkeypatch.setattr("deltaw.commands.generate.open_model", opened)
    whole, out = prompts.with_name("whole.jsonl"), prompts.with_name("out.jsonl")
    command = ("generate", folder / "chats", "--file", prompts, *SHORT, "-o")
    assert call(*command, whole)[0] == 0
    with monkeypatch.context() as patch:
        first = stopping(patch, after=2)
        code, _, err = call(*command, out)
        assert code == 130 and "same command" in err and len(first) == 2 and not out.exists()
    with monkeypatch.context() as patch:
        rest = stopping(patch, after=None)
        assert call(*command, out)[0] == 0
        assert len(rest) == 2 and not set(first) & set(rest)
        assert out.read_bytes() == whole.read_bytes()
        assert call(*command, out)[0] == 0 and len(rest) == 2  # finished: nothing is asked again
        assert call(*command, out, "--replace")[0] == 0 and len(rest) == 6
    before = out.read_bytes()
    for more in (("--max-tokens", 4), ("--raw",), ("--no-adapter",), ("--temperature", 1)):
        code, _, err = call(*command, out, *more)
        assert code == 2 and "--replace" in err and out.read_bytes() == before


def test_what_can_not_be_done_is_said_before_the_weights_are_read(folder: Path, prompts: Path, monkeypatch) -> None:
    monkeypatch.setattr("deltaw.model.open_base", lambda *args, **options: pytest.fail("read the weights"))
    mine = prompts.with_name("mine.jsonl")
    mine.write_text("mine\n")
    empty = prompts.with_name("empty.jsonl")
    empty.write_text("\n")
    cases = [
        ("--file", prompts, "-o", mine),
        ("--file", prompts, "-o", prompts, "--replace"),
        ("--file", prompts, "-o", prompts.parent),
        ("--file", prompts, "-o", prompts.parent / "no/out.jsonl"),
        ("--file", prompts.parent / "no.jsonl"),
        ("--file", prompts.parent),
        ("--file", empty),
        ("--file", prompts, "--temperature=-1"),
        ("--file", prompts, "--json"),
        ("--file", prompts, "a prompt"),
        ("a prompt", "-o", mine),
        (),
        ("",),
    ]
    for options in cases:
        code, out, err = call("generate", folder / "chats", *options)
        assert code == 2 and not out and 1 <= len(err.strip().splitlines()) <= 5, (options, err)
    assert mine.read_text() == "mine\n"


def test_a_file_of_which_nothing_can_be_asked_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"a": 1}\n[]\n')
    code, out, err = call("generate", folder / "one", "--file", tmp_path / "p.jsonl", "-o", tmp_path / "out.jsonl")
    assert code == 2 and not out and "p.jsonl:1" in err and "p.jsonl:2" in err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.jsonl"]
