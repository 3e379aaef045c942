"""`deltaw eval`: the base beside the adapter, on the rows of the training or on others, by metrics of all kinds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from deltaw.commands.eval import change, in_words
from deltaw.config import load_config
from deltaw.errors import InputError
from deltaw.evaluation.side_by_side import evaluate
from deltaw.show.progress import Display
from deltaw.training.run import resume, train
from tests.test_cli import call
from tests.tiny import Said, run_file

JUDGE = """
calls = 0
def length(answer, truth):
    global calls
    calls += 1
    if calls > LIMIT:
        raise ValueError("no more")
    return len(answer)
length.higher_is_better = False
"""
METRICS = ["exact_match", "judge.py:length"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAW_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def judged(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a metric, and a run file that names it, and its run, which no test changes."""
    return trained(folder, tmp_path_factory.mktemp("judged"), limit=10**9)


def trained(folder: Path, here: Path, limit: int, display: Display | None = None) -> Path:
    (here / "judge.py").write_text(JUDGE.replace("LIMIT", str(limit)))
    evaluate = {"metrics": METRICS, "max_new_tokens": 4, "general": None, "report": False}
    raw = run_file(folder, output=str(here / "run"), evaluate=evaluate)
    raw["train"] |= {"steps": 2, "eval_every": None}
    (here / "run.yaml").write_text(yaml.safe_dump(raw))
    train(load_config(here / "run.yaml"), display=display or Display(quiet=True))
    return here


def copied(run: Path, to: Path, change: Callable[[dict[str, Any]], object] = lambda raw: None) -> Path:
    """The run elsewhere, with its config changed."""
    shutil.copytree(run, to)
    raw = yaml.safe_load((to / "config.yaml").read_text())
    change(raw)
    (to / "config.yaml").write_text(yaml.safe_dump(raw))
    return to


def result_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def test_a_run_records_the_metric_by_name_direction_and_content(judged: Path) -> None:
    measured = result_of(judged / "run")["eval"]
    assert measured["higher_is_better"] == {"exact_match": True, "judge.py:length": False}
    assert measured["before"].keys() == measured["after"].keys() >= {"loss", *METRICS}
    assert list(measured["code"]) == ["judge.py:length"] and str(judged) not in json.dumps(measured)
    listed = json.loads(call("runs", judged, "--json")[1])["runs"]
    assert listed[0]["metrics"] == {name: measured["after"][name] for name in METRICS}


def test_the_base_stands_beside_the_adapter_and_is_not_measured_again(judged: Path) -> None:
    display, figures = Said(), result_of(judged / "run")["eval"]
    measured = evaluate(judged / "run", display=display)
    data = measured.to_json()
    assert data["base"] == figures["before"] and data["rows"] == 8 and data["rows_as_trained"] is True
    assert {name: data[name] for name in figures["after"]} == pytest.approx(figures["after"], rel=1e-5)
    assert {name.partition(":")[0] for name in display.tasks} == {"adapter"}
    table = in_words(measured).split("\n\n")[0].splitlines()
    assert table[0].split() == ["base", "adapter", "change"]
    assert [line.split("  ")[0] for line in table[2:]] == ["loss", "perplexity", "exact match", "length"]


def test_another_metric_takes_the_answers_that_the_base_gave_then(judged: Path, tmp_path: Path) -> None:
    display = Said()
    metrics = ["character_error_rate"]
    known = evaluate(judged / "run", metrics=metrics, display=display).to_json()
    assert not any(name.startswith("base") for name in display.tasks)
    run = copied(judged / "run", tmp_path / "run")
    (run / "before.json").write_text("{rotten")
    measured = evaluate(run, metrics=metrics).to_json()
    assert measured["base"] == pytest.approx(known["base"], rel=1e-6) and measured["rows_as_trained"] is None
    for more in ({"max_tokens": 2}, {"rows": 3}):  # other answers, other rows
        display = Said()
        evaluate(judged / "run", metrics=metrics, display=display, **more)  # type: ignore[arg-type]
        assert any(name.startswith("base") and name.endswith("answers") for name in display.tasks), more


def test_rows_that_the_training_did_not_measure_are_named(judged: Path, folder: Path, tmp_path: Path) -> None:
    rows = (folder / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(row.replace("say", "tell") for row in rows))
    train_on = str(tmp_path / "train.jsonl")
    run = copied(judged / "run", tmp_path / "run", lambda raw: raw["data"].update(train=train_on))
    display = Said()
    measured = evaluate(run, metrics=["none"], display=display)
    assert measured.as_trained is False and "base: loss" in display.tasks
    assert sum(line.startswith("warning") for line in display.lines) == 1
    assert measured.to_json()["base"]["loss"] != result_of(run)["eval"]["before"]["loss"]
    assert evaluate(run, str(folder / "train.jsonl"), metrics=["none"], rows=3).as_trained is None


def test_each_row_is_written_with_its_scores(judged: Path, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    code, out, err = call("eval", judged / "run", "-o", file, "--json", "--metrics", f"f1,{judged / 'judge.py'}:length")
    data, lines = json.loads(out), [json.loads(line) for line in file.read_text().splitlines()]
    assert code == 0 and len(lines) == 8 and data["output"] == str(file), err
    for name in ("f1", "judge.py:length"):
        for figures, scores in ((data, "scores"), (data["base"], "base_scores")):
            assert sum(line[scores][name] for line in lines) / 8 == pytest.approx(figures[name])
    assert all(line["origin"].startswith("train.jsonl:") and line["truth"].strip("ab") == "" for line in lines)
    options = ["-o", file, "--metrics", "none", "--no-adapter", "--rows", 2, "--max-tokens", 2, "--json"]
    code, out, _ = call("eval", judged / "run", folder / "train.jsonl", *options)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert code == 0 and json.loads(out)["base"] is None and [line["scores"] for line in lines] == [{}, {}]


def test_somebodys_run_runs_no_code_unless_its_user_says_so(judged: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    run = copied(judged / "run", tmp_path / "run", lambda raw: raw["evaluate"].update(metrics=["judge.py:length"]))
    (run / "judge.py").write_text(f"open({str(mark)!r}, 'w')\ndef length(answer, truth): return 1\n")
    interrupted = shutil.copytree(run, tmp_path / "interrupted")
    (interrupted / "result.json").unlink()
    shutil.rmtree(interrupted / "checkpoints")
    for verb in (["eval", run], ["train", interrupted]):
        code, out, err = call(*verb)
        assert code == 2 and not out and "--allow-code" in err and "judge.py" in err and not mark.exists()
    assert call("eval", run, "--metrics", "none")[0] == 0 and not mark.exists()
    code, out, _ = call("eval", run, "--allow-code", "--json", "--no-base")
    assert code == 0 and json.loads(out)["judge.py:length"] == 1 and mark.exists()
    assert call("eval", run, "--rows", 1)[0] == 0  # the user knows it now


def test_a_metric_that_is_added_to_an_interrupted_run_scores_the_bases_answers(judged: Path, tmp_path: Path) -> None:
    run = copied(judged / "run", tmp_path / "run")
    (run / "result.json").unlink()
    display = Said()
    resume(run, ["evaluate.metrics=[contains, exact_match]"], allow=True, display=display)
    measured = result_of(run)["eval"]
    assert measured["before"].keys() == measured["after"].keys() == {"loss", "perplexity", "contains", "exact_match"}
    assert "before: answers" not in display.tasks and "after: answers" in display.tasks


def test_a_metric_that_fails_when_the_training_is_over_costs_only_itself(folder: Path, tmp_path: Path) -> None:
    """It is tried on a row and on the base's 8 answers before; then it is mended and the run completed."""
    display = Said()
    run = trained(folder, tmp_path, limit=9 + 3, display=display) / "run"
    result = result_of(run)
    assert set(result["failed"]) == {"answers"} and result["eval"]["after"]["loss"] > 0
    assert any("judge.py:7" in line and "train.jsonl:" in line for line in display.lines)
    (tmp_path / "judge.py").write_text(JUDGE.replace("LIMIT", "10**9").replace("len(answer)", "1"))
    with pytest.raises(InputError, match="--allow-code"):  # other code than that which was asked for
        resume(run)
    resume(run, allow_code=True, display=Display(quiet=True))
    measured = result_of(run)["eval"]
    assert measured["after"]["judge.py:length"] == measured["before"]["judge.py:length"] == 1  # both by the same code
    assert result_of(run)["failed"] == {}


@pytest.mark.parametrize("metric", ["judge.py:lenght", "jugde.py:length"])
def test_a_typo_is_found_before_anything_is_made(judged: Path, metric: str) -> None:
    code, out, err = call("train", judged / "run.yaml", f"evaluate.metrics=[{metric}]", f"output={judged / 'new'}")
    assert code == 2 and not out and metric.split(":")["jugde" not in metric] in err
    assert not (judged / "new").exists()


def test_why_there_is_nothing_to_measure(judged: Path, folder: Path, tmp_path: Path) -> None:
    none = copied(judged / "run", tmp_path / "none", lambda raw: raw["data"].update(eval=None))
    cases = {
        (none,): "data.eval",
        (judged / "rum",): str(judged / "run"),
        (judged / "run/adapter",): "data file",
        (tmp_path / "no/such",): "no such file",
        (folder / "base",): "data file",
        (judged / "run", "--metrics", "judge.py:size"): "judge.py",
        (judged / "run", "--metrics", "cer"): "character_error_rate",
        (judged / "run", "--no-base", "--no-adapter"): "--no-base",
        (judged / "run", "--max-tokens", 3, "--metrics", "none"): "--max-tokens",
    }
    for words, part in cases.items():
        code, out, err = call("eval", *words)
        assert code == 2 and not out and part in err, (words, err)
        assert len(err[err.index("error:") :].strip().splitlines()) <= 5


def test_a_change_is_called_by_what_it_means() -> None:
    assert change(2.0, 1.0, higher_is_better=False) == ("-1.0000", "better")
    assert change(0.5, 1.0, higher_is_better=False) == ("+0.5000", "worse")
    assert change(0.5, 1.0, higher_is_better=True)[1] == "better"
    assert change(0.5, 0.50001, higher_is_better=True)[1] == ""
