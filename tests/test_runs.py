"""`deltaw runs`: every run in a folder is listed as far as it can be read, whatever has happened to it."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from deltaw.commands.runs import run_table, runs_named
from deltaw.config import METRICS, parse_config
from deltaw.errors import InputError
from deltaw.files.lock import locked
from deltaw.run import Run
from deltaw.runs import Entry, list_runs, ranked
from tests.test_cli import call

FIGURES = {"loss": 0.5, "perplexity": 1.6, "exact_match": 0.25, "judge.py:length": 3.0}


def make(folder: Path, *, lines: int = 3, result: Any = None, **changes: Any) -> Run:
    """A run as training leaves it, without weights."""
    raw = {"base": "org/name", "data": {"train": "data/words.jsonl", "eval": 8}, "output": str(folder), **changes}
    run = Run(folder)
    folder.mkdir(parents=True)
    run.write_config(parse_config(raw))
    for step in range(1, lines + 1):
        run.append_metrics({"step": step, "loss": 4.0 / step, "lr": 1e-3})
    if result is not None:
        evaluation = {"rows": 8, "before": FIGURES, "after": {**FIGURES, **result}}
        evaluation["higher_is_better"] = {"exact_match": True, "judge.py:length": False}
        run.write_json(run.result, {"steps": lines, "trained_parameters": 99, "eval": evaluation, "failed": {}})
    return run


def entry(folder: Path, name: str) -> Entry:
    return next(entry for entry in list_runs(folder) if entry.name == name)


def test_each_state_is_told(tmp_path: Path) -> None:
    make(tmp_path / "done", result={})
    stopped = make(tmp_path / "below/stopped")
    running = make(tmp_path / "running")
    (make(tmp_path / "broken").config).write_text("base: [")
    make(tmp_path / "rotten", result={}).result.write_text("{")
    (tmp_path / "not a run").mkdir()
    (tmp_path / "not a run/config.yaml").write_text("a: b\n")
    (stopped.folder / ".lock").write_text(f"{os.getpid()} elsewhere\n")  # left by a killed process
    with locked(running.folder / ".lock", "it"):
        states = {entry.name: entry.state for entry in list_runs(tmp_path)}
    wanted = {"done": "finished", "running": "running", "broken": "broken", "rotten": "broken"}
    assert states == {**wanted, "below/stopped": "interrupted"}
    assert entry(tmp_path, "running").state == "interrupted"


def test_what_a_run_says_is_in_its_entry(tmp_path: Path) -> None:
    run = make(tmp_path / "done", result={"loss": 0.4}, train={"lr": 2e-3}, adapter={"rank": 8})
    make(tmp_path / "open", adapter="full").append_metrics({"step": 4, "eval_loss": 1.25, "eval_perplexity": 3.5})
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").write_bytes(b"x" * 77)
    done, begun = entry(tmp_path, "done"), entry(tmp_path, "open")
    assert (done.base, done.data, done.lr, done.rank, done.steps) == ("org/name", "data/words.jsonl", 2e-3, 8, 3)
    assert (done.loss, done.metrics) == (0.4, {"exact_match": 0.25, "judge.py:length": 3.0})
    assert (done.adapter_bytes, done.parameters, begun.rank, begun.steps) == (77, 99, "full", 4)
    assert (begun.loss, begun.train_loss) == (1.25, 4.0 / 3)
    assert list_runs(run.folder)[0].loss == 0.4  # a run's own folder lists that run


def test_the_best_come_first(tmp_path: Path) -> None:
    for name, loss, exact, length in (("a", 0.3, 0.1, 9.0), ("b", 0.1, 0.9, 5.0), ("c", 0.2, 0.5, 7.0)):
        make(tmp_path / name, result={"loss": loss, "exact_match": exact, "judge.py:length": length})
    make(tmp_path / "d", lines=1)
    for path, moment in (("a", 400), ("b", 300), ("c", 200), ("d", 100)):
        for file in (tmp_path / path).iterdir():
            os.utime(file, (moment, moment))

    def order(by: str) -> str:
        return "".join(entry.name for entry in ranked(list_runs(tmp_path), by))

    assert [order(by) for by in ("when", "name", "loss", "exact_match", "judge.py:length")] == [
        "abcd", "abcd", "bcad", "bcad", "bcad",
    ]  # fmt: skip
    with pytest.raises(InputError, match="nonsense"):
        order("nonsense")


def test_an_older_runs_error_rate_is_better_when_lower(tmp_path: Path) -> None:
    for name, rate in (("a", 0.5), ("b", 0.2)):
        run = make(tmp_path / name, result={})
        after = {"loss": 1.0, "word_error_rate": rate}
        run.write_json(run.result, {"steps": 3, "eval": {"after": after}})
    assert [entry.name for entry in ranked(list_runs(tmp_path), "word_error_rate")] == ["b", "a"]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ("eval", "steps", "failed", "trained_parameters", "finished")
RESULT = st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, ANYTHING)) | ANYTHING
AFTER = st.dictionaries(st.sampled_from(sorted(METRICS)) | st.text(max_size=5), ANYTHING, max_size=3)


@settings(max_examples=30, deadline=None)
@given(
    result=RESULT | AFTER.map(lambda after: {"eval": {"after": after, "higher_is_better": after}}),
    config=st.fixed_dictionaries({}, optional=dict.fromkeys(("base", "adapter", "data", "train"), ANYTHING)) | ANYTHING,
    metrics=st.binary(max_size=40),
    width=st.integers(20, 200),
)
def test_nothing_in_a_run_folder_stops_the_list(
    tmp_path_factory: pytest.TempPathFactory, result: Any, config: Any, metrics: bytes, width: int
) -> None:
    run = Run(tmp_path_factory.getbasetemp() / "anything/run")
    run.folder.mkdir(parents=True, exist_ok=True)
    run.result.write_text(json.dumps(result))
    run.config.write_text(yaml.safe_dump(config))
    run.metrics.write_bytes(metrics)
    made = runs_named(str(run.folder.parent), by="loss", width=width)
    assert len(made.data["runs"]) == 1 and json.dumps(made.data)
    assert made.data["runs"][0]["state"] in ("finished", "broken")


@pytest.mark.parametrize("width", [40, 80, 100, 160])
def test_the_table_fits_and_says_what_has_no_room(width: int) -> None:
    figures = dict.fromkeys(METRICS, 0.25)
    base, data = "org/a-base-with-a-long-name", "d" * 40
    some = [
        Entry(f"{'很長的名字' * n}/run", "finished", base, data, 2e-3, 16, 100 * n, 0.5, 1.0, figures) for n in (1, 9)
    ]
    text = run_table(some, width)
    table, notes = text.split("\n\n")
    assert width < 50 or max(map(cell_len, table.splitlines())) <= width
    missing = {"size", "data", "base"} - set(table.splitlines()[0].split())
    assert all(name in notes for name in missing) and ("--json" in notes) == bool(missing)
    assert run_table(some, 10**6).splitlines()[0].split()[-3:] == ["data", "size", "when"]


def test_it_is_a_verb_that_answers_at_once(tmp_path: Path) -> None:
    for n in range(20):
        make(tmp_path / f"many/{n}", lines=20, result={})
    began = time.process_time()
    assert len(list_runs(tmp_path / "many")) == 20
    assert time.process_time() - began < 1.5  # of hundreds: seconds
    code, out, _ = call("runs", tmp_path / "many", "--json", "--sort", "loss")
    assert code == 0 and len(json.loads(out)["runs"]) == 20
    assert call("runs", tmp_path, "--sort", "name")[0] == 0
    (tmp_path / "none").mkdir()
    assert json.loads(call("runs", tmp_path / "none", "--json")[1])["runs"] == []
    for wrong in (["runs", tmp_path / "mny"], ["runs", tmp_path, "--sort", "bleu"]):
        code, out, _ = call(*wrong)
        assert code == 2 and not out
    assert str(tmp_path / "many") in call("runs", tmp_path / "mny")[2]
