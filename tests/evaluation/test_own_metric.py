"""A metric of the user's own: what is loaded, what is refused, and whose code may run."""

from pathlib import Path

import pytest

from deltaw.config import EvaluateConfig, load_config, metric_key
from deltaw.errors import InputError, RunError
from deltaw.evaluation.metrics import Answer, Metric
from deltaw.evaluation.own_metric import Consent, open_metrics, try_out

ROW = Answer("how many?", "two words", "two", "rows.jsonl:7")
GOOD = """
from dataclasses import dataclass

@dataclass
class Pair:
    a: str
    b: str

def longer(answer, truth):
    print("a word on stdout")
    return len(Pair(answer, truth).a) - len(truth)
longer.higher_is_better = False

def asked(answer, truth, prompt):
    return prompt == "how many?"

calls = 0
def counted(answer: str, truth: str, weight: int = 3) -> float:
    global calls
    calls += 1
    return calls
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def file(folder: Path, text: str = GOOD, name: str = "judge.py") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def opened(folder: Path, function: str, text: str = GOOD, consent: Consent | None = None) -> Metric:
    (metric,) = open_metrics([f"{file(folder, text)}:{function}"], consent or Consent())
    return metric


def test_it_is_called_with_answer_and_truth_and_the_prompt_if_it_wants_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metric = opened(tmp_path, "longer")
    assert (metric.name, metric.higher_is_better, metric.score(ROW)) == ("judge.py:longer", False, 6)
    assert metric.mean([ROW, Answer("", "", "two", "rows.jsonl:8")]) == 1.5 and len(metric.code) == 64
    assert opened(tmp_path, "asked").score(ROW) == 1 and opened(tmp_path, "asked").higher_is_better
    assert capsys.readouterr().out == "" and not (tmp_path / "__pycache__").exists()


def test_a_row_is_scored_once(tmp_path: Path) -> None:
    metric = opened(tmp_path, "counted")
    assert metric.score(ROW) == metric.score(ROW) == metric.mean([ROW]) == 1


WRONG = {
    "def score(answer, truth): return 'x'": "which isn't a number",
    "def score(answer, truth): return float('nan')": "which isn't a number",
    "def score(answer, truth): return None": "which isn't a number",
    "def score(answer, truth): return [1, 2]": "which isn't a number",
    "def score(answer, truth):\n    return {}['x']": "judge.py:2",
    "def score(answer, truth):\n    raise SystemExit(3)": "judge.py:2",
    "def score(answer, truth):\n    import torch\n    return torch.tensor([1, 2])": "rows.jsonl:7",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_fails_on_a_row_names_file_and_row(tmp_path: Path, text: str) -> None:
    metric = opened(tmp_path, "score", text)
    for call, error in ((lambda: metric.score(ROW), RunError), (lambda: try_out([metric], ROW), InputError)):
        with pytest.raises(error) as caught:
            call()
        message = str(caught.value)
        assert "rows.jsonl:7" in message and "judge.py" in message and WRONG[text] in message
        assert len(message.splitlines()) <= 5


UNLOADABLE = {
    "def score(answer, truth) return 1": "judge.py:1",
    "x = 1\nimport not_installed_anywhere": "judge.py:2",
    "import beside\ndef score(answer, truth): return 1": "beside",
    "1 / 0": "ZeroDivisionError",
    "raise SystemExit": "SystemExit",
    "def other(answer, truth): return 1": "other",
    "score = 3": "no function score",
    "def score(answer): return 1": "(answer)",
    "def score(answer, truth, more): return 1": "more",
    "def score(answer, truth): return 1\nscore.higher_is_better = 'yes'": "higher_is_better",
    "\0": "judge.py",
}


@pytest.mark.parametrize("text", UNLOADABLE)
def test_what_cant_be_loaded_is_the_users_mistake(tmp_path: Path, text: str) -> None:
    file(tmp_path, "", "beside.py")
    with pytest.raises(InputError) as caught:
        opened(tmp_path, "score", text)
    assert UNLOADABLE[text] in str(caught.value) and len(str(caught.value).splitlines()) <= 5


def test_a_file_that_is_gone_or_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder.py").mkdir()
    for name in ("gone.py", "folder.py"):
        with pytest.raises(InputError, match=name):
            open_metrics([f"{tmp_path / name}:score"])


def test_code_that_a_run_names_runs_only_when_it_ran_on_request_or_is_allowed(tmp_path: Path) -> None:
    """By its bytes: a copy of it is the same code, a changed file isn't, and nothing of what is refused has run."""
    mark = tmp_path / "it ran"
    text = f"from pathlib import Path\nPath({str(mark)!r}).touch()\ndef score(answer, truth): return 1\n"
    stranger = Consent(of_run="runs/stranger")
    with pytest.raises(InputError, match="--allow-code") as refused:
        opened(tmp_path, "score", text, stranger)
    assert not mark.exists() and str(tmp_path / "judge.py") in str(refused.value)
    opened(tmp_path, "score", text, Consent("runs/stranger", allow=True))
    assert mark.exists()
    opened(tmp_path, "score", text, stranger)  # the user has agreed to these bytes
    with pytest.raises(InputError, match="--allow-code"):
        opened(tmp_path, "score", text + "# more\n", stranger)
    opened(tmp_path, "score", text + "# more\n")  # asked for
    opened(tmp_path, "score", text + "# more\n", stranger)


def test_without_a_cache_it_asks_again_and_still_runs(tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file in the cache's place")
    assert opened(tmp_path, "longer").score(ROW) == 6
    with pytest.raises(InputError, match="--allow-code"):
        opened(tmp_path, "longer", consent=Consent("runs/mine"))


def test_the_file_is_looked_for_beside_the_run_file_then_where_deltaw_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    beside.mkdir(), elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    run = beside / "run.yaml"
    run.write_text("base: b\noutput: o\ndata: {train: t, eval: 3}\nevaluate: {metrics: [f1, judge.py:longer]}\n")
    file(elsewhere)
    assert load_config(run).evaluate.metrics == ("f1", f"{elsewhere / 'judge.py'}:longer")
    file(beside)
    config = load_config(run)
    assert config.evaluate.metrics == ("f1", f"{beside / 'judge.py'}:longer")
    (elsewhere / "config.yaml").write_text(config.to_yaml())  # as the run records it: found from anywhere
    assert load_config(elsewhere / "config.yaml").evaluate == config.evaluate


@pytest.mark.parametrize("metrics", ["f1", ["f1"], ("f1",)])
def test_one_metric_needs_no_list(metrics: object) -> None:
    assert EvaluateConfig.checked(metrics=metrics).metrics == ("f1",)


@pytest.mark.parametrize(
    ("metrics", "hint"),
    [
        (["WER"], "word_error_rate"), (["rougeL"], "rouge_l"), (["exact-match"], "exact_match"), (["em"], "exact"),
        (["f1", "f1"], "twice"), (["a/judge.py:f", "b/judge.py:f"], "judge.py:f twice"), (["judge.py"], "file.py"),
        (["judge.py:not a name"], "file.py"), (["judge.txt:f"], "file.py"), ([3], "3"),
    ],
)  # fmt: skip
def test_what_isnt_a_metric_is_refused_with_what_may_be_meant(metrics: list[str], hint: str) -> None:
    with pytest.raises(InputError) as refused:
        EvaluateConfig.checked(metrics=tuple(metrics))
    assert hint in str(refused.value)


def test_a_figures_name_has_no_folder_of_this_machine() -> None:
    assert metric_key("/home/me/x/judge.py:f") == "judge.py:f" and metric_key("f1") == "f1"
