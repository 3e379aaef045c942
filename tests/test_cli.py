"""The command line: verbs, exit codes, what goes to stdout and what to stderr."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deltaw import cli
from deltaw.cli.app import app
from deltaw.commands import chat, train
from deltaw.model import Model, open_model
from tests.tiny import run_file, tiny_base, words


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a tiny base, data, a run file and a finished run."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_base(folder / "base")
    words(folder / "train.jsonl")
    (folder / "run.yaml").write_text(yaml.safe_dump(run_file(folder)))
    assert call("train", folder / "run.yaml", "--json")[0] == 0
    return folder


def call(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `deltaw ARGUMENTS`, in this process."""
    before = sys.argv, sys.stdin, sys.stdout, sys.stderr
    sys.argv = ["deltaw", *map(str, arguments)]
    sys.stdin, sys.stdout, sys.stderr = io.StringIO(stdin), io.StringIO(), io.StringIO()
    try:
        cli.main()
    except SystemExit as done:
        return int(done.code or 0), sys.stdout.getvalue(), sys.stderr.getvalue()
    finally:
        sys.argv, sys.stdin, sys.stdout, sys.stderr = before
    raise AssertionError("main() must exit")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv=['deltaw','--help']\nfrom deltaw.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    )
    heavy = "print([m for m in ('torch','transformers','numpy','rich') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code + heavy], capture_output=True, text=True, check=True).stdout
    assert "train" in out and out.endswith("[]\n")


@pytest.mark.parametrize("verb", [c.name or c.callback.__name__ for c in app.registered_commands if c.callback])
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    code, out, _ = call(verb, "--help")
    assert code == 0 and f"deltaw {verb}" in out.split("Example")[-1]
    assert call(verb, "-h") == (code, out, "")


def test_train_prints_one_json_object(trained: Path) -> None:
    code, out, err = call("train", trained / "run.yaml", "--json", "--replace", "train.steps=2")
    assert code == 0 and json.loads(out)["steps"] == 2
    assert "training: 2 of 2 (100%)" in err


def test_train_ends_with_a_table_a_curve_and_what_next(trained: Path) -> None:
    code, out, _ = call("train", trained / "run.yaml", f"output={trained / 'second'}")
    assert code == 0
    for part in ("asked", "training loss", "exact match", "held-out rows", "deltaw chat", "adapter:"):
        assert part in out


def test_preview_marks_what_is_trained(trained: Path) -> None:
    code, out, _ = call("preview", trained / "run.yaml", "-n", "2")
    assert code == 0 and "⟦" in out and "of them trained" in out
    code, out, _ = call("preview", trained / "run.yaml", "--json")
    assert json.loads(out)["train_rows"] == 52


def test_eval_measures_a_run_or_a_file_with_and_without_the_adapter(trained: Path) -> None:
    result = json.loads((trained / "run/result.json").read_text())
    for options, wanted in (((), "after"), (("--no-adapter",), "before")):
        code, out, _ = call("eval", trained / "run", "--json", *options)
        assert code == 0 and json.loads(out)["loss"] == pytest.approx(result["eval"][wanted]["loss"], rel=1e-5)
    code, out, _ = call("eval", trained / "base", trained / "train.jsonl", "--json", "--rows", 5)
    assert code == 0 and json.loads(out)["rows"] == 5


def test_generate_streams_or_prints_json(trained: Path) -> None:
    code, streamed, _ = call("generate", trained / "run", "say 3 ", "--max-tokens", 6)
    assert code == 0
    code, out, _ = call("generate", trained / "run", "-", "--max-tokens", 6, "--json", stdin="say 3 ")
    assert json.loads(out)["text"] == streamed.removesuffix("\n")
    base = json.loads(call("generate", trained / "base", "say 3 ", "--raw", "--max-tokens", 6, "--json")[1])
    off = json.loads(call("generate", trained / "run", "say 3 ", "--max-tokens", 6, "--json", "--no-adapter")[1])
    assert base["text"] == off["text"] and not off["adapter"]


def test_chat_answers_each_line_and_switches(trained: Path) -> None:
    asked = "say 3\n/base\nsay 3\n/adapter\nsay 3\n/new\n/what\n"
    code, out, err = call("chat", trained / "run", "--max-tokens", 5, stdin=asked)
    lines = out.split("\n")
    assert code == 0 and len(lines) >= 4 and "Ctrl-D" in err


def test_an_adapter_folder_opens_with_its_base_named(trained: Path, tmp_path: Path) -> None:
    assert call("generate", trained / "run/adapter", "x", "--max-tokens", 2)[0] == 0  # the run beside it knows its base
    alone = shutil.copytree(trained / "run/adapter", tmp_path / "adapter")
    code, _, err = call("generate", alone, "x", "--max-tokens", 2)
    assert code == 2 and "base" in err  # a local folder's name is not recorded as a path
    assert call("generate", alone, "x", "--max-tokens", 2, "--base", trained / "base")[0] == 0


def test_a_wrong_base_is_refused(trained: Path, tmp_path: Path) -> None:
    tiny_base(tmp_path / "other", seed=1)
    code, _, err = call("generate", trained / "run", "x", "--base", tmp_path / "other")
    assert code == 2 and "doesn't belong to this base" in err


def test_users_mistakes_exit_with_2_and_few_lines(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("base: x\ntrian: {}\noutput: y\n")
    cases = [
        ("train", tmp_path / "missing.yaml"),
        ("train", tmp_path / "bad.yaml"),
        ("train", trained / "run"),
        ("train", trained / "run", "train.lr=1"),
        ("verify-resume", tmp_path / "bad.yaml"),
        ("train", trained / "run.yaml", "train.lr"),
        ("train", tmp_path),
        ("trian",),
        ("train", "--nope", "x"),
        ("generate", trained / "run", ""),
        ("generate", trained / "run", "x", "--temperature=-1"),
        ("generate", tmp_path / "nothing", "x"),
        ("eval", trained / "base"),
        ("eval", trained / "run", "--metrics", "bleu"),
        ("eval", trained / "run", tmp_path / "no.jsonl"),
    ]
    for arguments in cases:
        code, out, err = call(*arguments)
        errors = err[err.index("error:") :].strip().splitlines()
        assert code == 2 and not out and len(errors) <= 5, (arguments, code, out, err)
        assert "Traceback" not in err


def test_a_defect_says_so_and_debug_shows_where(monkeypatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(train, "demo_named", broken)
    code, _, err = call("demo")
    assert code == 1 and "defect" in err and "Traceback" not in err
    code, _, err = call("--debug", "demo")
    assert code == 1 and "Traceback" in err


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_a_terminal_that_lacks_letters_gets_question_marks(trained: Path, encoding: str) -> None:
    """Every verb of a run, on streams that can hold nothing else, ends as it would on any other."""
    folder = trained
    (folder / "odd").mkdir(exist_ok=True)
    row = {"prompt": "größer als ΔW → \U0001f600 ", "completion": "ə ˈɹ \U0001f600"}
    (folder / "odd/rows.jsonl").write_text((json.dumps(row, ensure_ascii=False) + "\n") * 9, encoding="utf-8")
    file = folder / "odd/run.yaml"
    output = folder / f"odd/ΔW {encoding}"
    raw = run_file(folder, data={"train": str(folder / "odd/rows.jsonl"), "eval": 2}, output=str(output))
    file.write_text(yaml.safe_dump({**raw, "train": {**raw["train"], "steps": 2}}), encoding="utf-8")

    def encoded(*arguments: object) -> tuple[int, str, str]:
        before = sys.argv, sys.stdout, sys.stderr
        out, err = io.BytesIO(), io.BytesIO()
        sys.argv = ["deltaw", *map(str, arguments)]
        sys.stdout, sys.stderr = io.TextIOWrapper(out, encoding), io.TextIOWrapper(err, encoding)
        try:
            cli.main()
        except SystemExit as done:
            sys.stdout.flush(), sys.stderr.flush()
            return int(done.code or 0), out.getvalue().decode(encoding), err.getvalue().decode(encoding)
        finally:
            sys.argv, sys.stdout, sys.stderr = before
        raise AssertionError("main() must exit")

    code, out, err = encoded("train", file)
    assert code == 0 and (output / "result.json").is_file() and "deltaw eval" in out, err
    verbs = [["preview", file], ["eval", output], ["resize", output, "--rank", 2, "-o", f"{output}-small"]]
    if encoding == "ascii":  # what it can print the others can
        verbs += [["inspect", output], ["plan", file, f"output={output}2"], ["generate", output, "ΔW"]]
    for verb in verbs:
        code, out, err = encoded(*verb)
        assert code == 0, err
        assert "?" in out or verb[0] in ("plan", "eval", "generate")
    code, out, _ = encoded("resize", output, "--rank", 2, "-o", f"{output}-other", "--json")
    assert code == 0 and json.loads(out)["output"] == f"{output}-other"  # escaped, nothing lost
    code, _, err = encoded("train", output)
    assert code == 2 and "is finished" in err


SMALL = 128  # tokens of context


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("small"), max_position_embeddings=SMALL)


def talk(base: Path, lines: list[str], monkeypatch, answers: str = "yes", **more: Any) -> tuple[list[Any], str]:
    """(the prompts that the model was given, what was said on stderr) of a conversation whose answers are `answers`."""
    asked: list[Any] = []
    model = open_model(base, dtype="float32", device="cpu", **more)

    def stream(self: Model, prompt: Any, **options: Any) -> Iterator[str]:
        asked.append(prompt)
        assert len(self.renderer.prompt_ids(prompt)) < SMALL and options["chat"] is False
        yield answers

    monkeypatch.setattr(Model, "stream", stream)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        chat.talk(model, use_adapter=True, sampling={"max_new_tokens": 20})
    return asked, err.getvalue()


def test_a_long_conversation_loses_its_oldest_turns(small: Path, monkeypatch) -> None:
    lines = [f"turn {i} of some words" for i in range(9)]
    asked, said = talk(small, lines, monkeypatch, system="be kind")
    assert [prompt[-1]["content"] for prompt in asked] == lines  # every line was answered
    for prompt in asked:
        roles = [message["role"] for message in prompt]
        assert roles == ["system", *["user", "assistant"] * (len(roles) // 2 - 1), "user"]
    first = [prompt[1]["content"] for prompt in asked]
    assert first[0] == lines[0] and first == sorted(first) and first[-1] > lines[0] and len(asked[-1]) > 2
    assert said.count("left out") == 1


def test_a_message_that_is_too_long_does_not_end_the_session(small: Path, monkeypatch) -> None:
    asked, said = talk(small, ["first", "x" * 400, "last"], monkeypatch)
    assert [prompt[-1]["content"] for prompt in asked] == ["first", "last"]
    assert [message["content"] for message in asked[1]] == ["first", "yes", "last"]  # and loses nothing before it
    assert "400" in said or f"{SMALL}" in said


def test_an_answer_that_can_not_be_sent_back_is_left_out(small: Path, monkeypatch) -> None:
    asked, said = talk(small, ["first", "last"], monkeypatch, answers="a\0b")
    assert len(asked) == 2 and said.count("left out") == 1


@pytest.mark.parametrize("word", ["/quit", "/exit", "exit", "quit"])
def test_words_that_leave(small: Path, monkeypatch, word: str) -> None:
    asked, said = talk(small, ["first", word, "last"], monkeypatch)
    assert [prompt[-1]["content"] for prompt in asked] == ["first"] and "/quit" in said and "/help" in said


def test_commands_of_a_conversation(small: Path, monkeypatch) -> None:
    lines = ["first", "/clear", "second", "/system be brief", "third", '"""a', "  b", '"""', "/help", "/nothing"]
    asked, said = talk(small, lines, monkeypatch)
    contents = [[message["content"] for message in prompt] for prompt in asked]
    brief = ["be brief", "third"]
    assert contents == [["first"], ["second"], brief, [*brief, "yes", "a\n  b"]]
    assert all(f"\n  {command}" in said for command in ("/base", "/system", "/quit"))


def test_a_plain_conversation_is_lines_by_themselves(small: Path, monkeypatch) -> None:
    asked, said = talk(small, ["first", "/system x", "last"], monkeypatch, chat=False)
    assert asked == ["first", "last"] and "system prompt" in said
