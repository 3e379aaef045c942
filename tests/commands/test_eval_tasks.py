"""`deltaw eval --tasks`: the figures of a task file, what is kept on the way, what is refused before the weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from deltaw.config.tasks import CHOICES as CHOICE_METRICS
from deltaw.config.tasks import GENERATE, TaskConfig, load_tasks
from deltaw.evaluation import tasks as measuring
from deltaw.files.journal import Journal
from tests.evaluation.test_judge import Endpoint
from tests.test_cli import call

DOCS = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")
CHOICES = [{"prompt": f"say {n} ", "choices": ["ab", "abab", "ba"], "answer": n % 3} for n in range(9)]
ENDINGS = [{"prompt": "a", "endings": ["b", "c"], "answer": 0}]
HELD_OUT = {"name": "own", "metrics": ["exact_match", "character_error_rate"], "max_new_tokens": 4}
WHICH: dict[str, Any] = {"name": "which", "form": "choices", "data": CHOICES}


def task_file(folder: Path, *tasks: dict[str, Any], **more: Any) -> Path:
    (folder / "tasks.yaml").write_text(yaml.safe_dump(json.loads(json.dumps({"tasks": tasks, **more}))))
    return folder / "tasks.yaml"


def measured(*words: object) -> dict[str, Any]:
    code, out, err = call("eval", *words, "--json")
    assert code == 0, err
    data: dict[str, Any] = json.loads(out)
    return data


def rows_in(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_figures_are_those_of_eval_and_the_rows_add_up_to_them(folder: Path, tmp_path: Path) -> None:
    again = {**HELD_OUT, "name": "file", "data": str(folder / "train.jsonl"), "limit": 12}
    file, output = task_file(tmp_path, HELD_OUT, again, WHICH), tmp_path / "rows.jsonl"
    data = measured(folder / "one", "--tasks", file, "-o", output)
    own, other, which = data["tasks"]
    metrics = ["--metrics", ",".join(HELD_OUT["metrics"]), "--max-tokens", 4]
    for task, plain in (
        (own, measured(folder / "one", *metrics)),
        (other, measured(folder / "one", folder / "train.jsonl", *metrics, "--rows", 12)),
    ):
        for name in HELD_OUT["metrics"]:
            figures = task["metrics"][name]
            assert figures["adapter"]["value"] == pytest.approx(plain[name])
            assert figures["base"]["value"] == pytest.approx(plain["base"][name])
            assert figures["difference"]["value"] == pytest.approx(plain[name] - plain["base"][name])
            assert figures["difference"]["more_than_noise"] == (figures["difference"]["p"] < 0.05)
    lines = rows_in(output)
    assert [line["task"] for line in lines] == ["own"] * 8 + ["file"] * 12 + ["which"] * 9
    for side, scores in (("adapter", "scores"), ("base", "base_scores")):
        for task, name in ((own, "exact_match"), (which, "accuracy"), (which, "accuracy_norm")):
            points = [line[scores][name] for line in lines if line["task"] == task["name"]]
            assert sum(points) / len(points) == pytest.approx(task["metrics"][name][side]["value"])
    for line in lines[-9:]:
        likeliest = max(range(3), key=line["logprobs"].__getitem__)
        assert line["scores"]["accuracy"] == (likeliest == line["gold"])

    names: dict[str, Any] = {}
    exec(DOCS.split("```python\n")[1].split("```")[0], names)
    difference = names["beside"](output, output, "which", "accuracy")
    assert difference.value == 0 and difference.is_noise

    before = output.stat().st_mtime_ns
    assert measured(folder / "one", "--tasks", file, "-o", output) == data and output.stat().st_mtime_ns == before
    code, _, err = call("eval", folder / "two", "--tasks", file, "-o", output)
    assert code == 2 and "adapter" in err and output.stat().st_mtime_ns == before
    alone = measured(folder / "one", "--tasks", file, "-o", output, "--replace", "--no-base", "--rows", 3)
    assert [task["rows"] for task in alone["tasks"]] == [3, 3, 3] and "base_answer" not in rows_in(output)[0]
    assert set(alone["tasks"][0]["metrics"]["exact_match"]) == {"higher_is_better", "adapter"}


def test_it_goes_on_where_it_was_stopped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = task_file(tmp_path, {**HELD_OUT, "metrics": "f1"}, WHICH)
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    data = measured(folder / "one", "--tasks", file, "-o", whole)
    add, added = Journal.add, []

    def adding(journal: Journal, name: int | str, value: Any) -> None:
        if len(added) == 11:
            raise KeyboardInterrupt
        add(journal, name, value)
        added.append(name)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", adding)
        code, _, _ = call("eval", folder / "one", "--tasks", file, "-o", stopped)
    assert code == 130 and not stopped.exists() and len(added) == 11
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", lambda journal, name, value: (asked.append(name), add(journal, name, value)))
        gone_on = measured(folder / "one", "--tasks", file, "-o", stopped)
    assert not {*asked} & {*added} and len(asked) + len(added) == 2 * (8 + 9)
    assert stopped.read_bytes() == whole.read_bytes() and gone_on["tasks"] == data["tasks"]


def test_a_judge_is_asked_once_and_programs_run_only_where_that_is_agreed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DELTAW_API_KEY", raising=False)
    endpoint = Endpoint()
    endpoint.script = ["no idea", "none"] + ["5"] * 99
    monkeypatch.setattr("deltaw.evaluation.judge.AT_ONCE", 1)
    code = {"name": "code", "metrics": ["pass_at_1"], "max_new_tokens": 2, "data": [
        {"prompt": "x = 1\n", "test": "assert True", "entry_point": ""}, {"prompt": "y = 1\n", "test": "assert False"}
    ]}  # fmt: skip
    judged = {**HELD_OUT, "metrics": ["judge"], "limit": 3}
    file, output = task_file(tmp_path, judged, judge={"url": endpoint.url, "model": "m"}), tmp_path / "rows.jsonl"
    data = measured(folder / "one", "--tasks", file, "-o", output)
    (task,) = data["tasks"]
    assert len(task["unjudged"]) == 1 and task["metrics"]["judge"]["adapter"]["value"] == 0.5
    assert [line["scores"]["judge"] for line in rows_in(output)].count(None) == 1
    asked = len(endpoint.asked)
    assert asked == 7 and endpoint.keys == [None] * 7
    assert measured(folder / "one", "--tasks", file, "-o", output) == data and len(endpoint.asked) == asked
    endpoint.server.shutdown()
    endpoint.server.server_close()

    file = task_file(tmp_path, code)
    ran: list[str] = []
    monkeypatch.setattr(measuring, "run_program", lambda program: ran.append(program))
    refused, _, err = call("eval", folder / "one", "--tasks", file)
    assert refused == 2 and "--allow-code" in err and not ran
    monkeypatch.undo()
    (task,) = measured(folder / "one", "--tasks", file, "--allow-code")["tasks"]
    assert task["metrics"]["pass_at_1"]["adapter"]["value"] <= 0.5


def test_the_docs_name_every_metric_and_every_setting_and_their_file_is_valid(tmp_path: Path) -> None:
    for name in (*CHOICE_METRICS, *GENERATE, *TaskConfig.model_fields):
        assert f"`{name}`" in DOCS, name
    (tmp_path / "tasks.yaml").write_text(DOCS.split("```yaml\n")[1].split("```")[0])
    assert [task.name for task in load_tasks(tmp_path / "tasks.yaml")] == ["pronounce", "capitals", "summaries"]
    assert [task.form for task in load_tasks(Path("recipes/tasks.yaml"))] == ["generate", "choices"]


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"data": "none.jsonl"}, "task t"),
        ({"data": [{"prompt": "a", "completion": "b"}], "form": "choices"}, "choices"),
        ({"data": ENDINGS, "form": "choices", "columns": {"choices": "endigns"}}, "endings"),
        ({"data": [{"path": "train.jsonl", "weight": 2}]}, "weight"),
        ({"data": [{"question": "a", "choices": ["b", "c"], "answer": 7}], "form": "choices"}, "7"),
        ({"metrics": ["exact_mach"]}, "exact_match"),
        ({"metrics": ["judge.py:none"]}, "judge.py"),
        ({"metrics": ["judge"]}, "judge"),
        ({"metrcs": ["f1"]}, "tasks.yaml:2"),
        ({"form": "choices"}, "data"),
        ({"prompt": "Q: {nothing}", "data": [{"a": "b", "answer": "c"}]}, "it has a, answer"),
        ({"metrics": ["none.py:f"]}, "task t"),
        ({"metrics": ["x" * 5000]}, "metrics"),
        ({"data": ENDINGS, "form": "choices", "columns": {"choices": "endings", "answer": "endings"}}, "one thing"),
        (
            {"data": [*ENDINGS, {**ENDINGS[0], "prompt": "b"}], "form": "choices", "shots": 2, "shots_from": ENDINGS},
            "1 more asks",
        ),
        ({"chat": False, "system": "Be brief."}, "system"),
    ],
)
def test_what_is_wrong_is_said_before_the_weights_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr("deltaw.commands.eval_tasks.open_model", lambda *_, **__: pytest.fail("the weights were read"))
    code, out, err = call("eval", folder / "one", "--tasks", task_file(tmp_path, {"name": "t", **task}))
    assert code == 2 and not out and words in err, err
    assert len(err[err.index("error:") :].strip().splitlines()) <= 5


def test_what_does_not_go_together(folder: Path, tmp_path: Path) -> None:
    one = {"name": "a", "data": str(folder / "chats.jsonl"), "chat": False}
    code, _, err = call("eval", folder / "one", "--tasks", task_file(tmp_path, one))
    assert code == 2 and "chat" in err  # messages can't be asked as they are
    pair = {"name": "a", "data": [{"prompt": "a", "chosen": "b", "rejected": "c"}]}
    advice = {"columns": {"completion": "chosen"}}
    code, _, err = call("eval", folder / "one", "--tasks", task_file(tmp_path, pair))
    assert code == 2 and "columns: {completion: chosen}" in err
    assert measured(folder / "one", "--tasks", task_file(tmp_path, {**pair, **advice}), "--no-base")
    one = {"name": "a", "data": [{"prompt": "a", "completion": "b"}], "chat": True, "max_new_tokens": 1}
    measured(folder / "one", "--tasks", task_file(tmp_path, one), "-o", tmp_path / "rows.jsonl", "--no-base")
    assert "assistant" in rows_in(tmp_path / "rows.jsonl")[0]["prompt"]
    file = task_file(tmp_path, HELD_OUT)
    for more in (["x.jsonl"], ["--metrics", "f1"], ["--max-tokens", 3]):
        assert call("eval", folder / "one", *more, "--tasks", file)[0] == 2
    assert call("eval", folder / "one", "--replace")[0] == 2
    code, _, err = call("eval", folder / "base", "--tasks", file)
    assert code == 2 and "own" in err  # a base has no held-out rows
    assert call("eval", folder / "one", "--tasks", file, "-o", file)[0] == 2 and file.exists()


def test_a_tasks_own_prompt_and_a_base_by_itself(folder: Path, tmp_path: Path) -> None:
    rows = [{"ctx": f"say {n}", "endings": ["ab", "ba"], "label": str(n % 2), "answer": "ab"} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = {"name": "shown", "form": "choices", "data": "rows.jsonl", "chat": False, "prompt": "{ctx}\n{endings}\n:",
             "columns": {"choices": "endings", "answer": "label"}, "limit": 3, "seed": 4}  # fmt: skip
    asked = {"name": "asked", "data": "rows.jsonl", "prompt": "Now {ctx}.", "chat": True, "system": "Be brief.",
             "max_new_tokens": 2}  # fmt: skip
    output = tmp_path / "out.jsonl"
    data = measured(folder / "base", "--tasks", task_file(tmp_path, shown, asked), "-o", output)
    assert [task["rows"] for task in data["tasks"]] == [3, 4] and not data["adapter"]
    lines = rows_in(output)
    assert lines[0]["prompt"].endswith("\nA. ab\nB. ba\n:") and {line["gold"] for line in lines[:3]} == {0, 1}
    assert "Be brief." in lines[3]["prompt"] and "Now say 0." in lines[3]["prompt"] and lines[3]["truth"] == "ab"


def test_a_judge_without_any_score_leaves_the_other_figures(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DELTAW_API_KEY", raising=False)
    endpoint = Endpoint()
    endpoint.script = ["splendid"] * 99
    judged = {**HELD_OUT, "metrics": ["exact_match", "judge"], "limit": 2}
    file, output = task_file(tmp_path, judged, judge={"url": endpoint.url, "model": "m"}), tmp_path / "rows.jsonl"
    data = measured(folder / "one", "--tasks", file, "-o", output)
    endpoint.server.shutdown()
    endpoint.server.server_close()
    (task,) = data["tasks"]
    assert len(task["unjudged"]) == 2 and task["metrics"]["judge"]["adapter"] is None
    assert 0 <= task["metrics"]["exact_match"]["adapter"]["value"] <= 1
    assert [line["scores"]["judge"] for line in rows_in(output)] == [None, None]
    code, out, _ = call("eval", folder / "one", "--tasks", file, "-o", output)  # complete: no judge is needed
    assert code == 0 and "splendid" in out


def test_a_judge_that_breaks_off_says_what_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DELTAW_API_KEY", raising=False)
    endpoint = Endpoint()
    endpoint.script = [(400, "no", {})] * 9
    judged = {**HELD_OUT, "metrics": ["judge"], "limit": 2}
    file = task_file(tmp_path, judged, judge={"url": endpoint.url, "model": "m"})
    for more, words in (([], "-o"), (["-o", tmp_path / "rows.jsonl"], "the same command goes on")):
        code, _, err = call("eval", folder / "one", "--tasks", file, *more)
        assert code == 1 and words in err
    endpoint.server.shutdown()
    endpoint.server.server_close()


def test_choices_that_blanks_alone_set_apart_are_no_choice(folder: Path, tmp_path: Path) -> None:
    """In plain text a line break in front keeps them apart; behind a word, and in a chat, nothing does."""
    rows = [{"prompt": prompt, "choices": ["ab", " ab"], "answer": 1} for prompt in ("say", "say\n")]
    task = {"name": "t", "form": "choices", "data": rows}
    for run, asked in (("one", ["say\n"]), ("chats", [])):
        for row in rows:
            file = task_file(tmp_path, {**task, "data": [row]})
            assert (call("eval", folder / run, "--tasks", file)[0] == 0) == (row["prompt"] in asked)


@pytest.mark.parametrize("form", [{}, {"prompt": "{prompt}"}])
def test_a_column_that_is_not_there_is_named(folder: Path, tmp_path: Path, form: dict[str, str]) -> None:
    task = {"name": "t", "data": [{"prompt": "a", "completion": "b"}], "columns": {"prompt": "nope"}, **form}
    code, _, err = call("eval", folder / "one", "--tasks", task_file(tmp_path, task))
    assert code == 2 and "nope" in err and "columns.prompt" in err


def test_bad_rows_are_named_in_their_order_without_settings_of_a_run_file(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "completion": f"{n}" if n % 2 else 1.5} for n in range(8)]
    code, _, err = call("eval", folder / "one", "--tasks", task_file(tmp_path, {"name": "t", "data": rows}))
    assert code == 2 and "data.bad_rows" not in err
    rows = [{"prompt": f"{n}", "choices": ["a", "b"]} for n in range(8)]
    code, _, err = call(
        "eval", folder / "one", "--tasks", task_file(tmp_path, {"name": "t", "form": "choices", "data": rows})
    )
    assert code == 2 and [line.split(":")[1] for line in err.splitlines()[1:4]] == ["1", "2", "3"]
