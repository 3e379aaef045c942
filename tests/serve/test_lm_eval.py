"""lm-eval through the server, and by itself with PEFT: the same figures, log-likelihoods and answers.

pip install 'lm-eval[api]' into an environment that has the tests' packages, and run this file with it.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.serve.serving import KEY, Running

TASKS = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["7"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "prose": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{prompt}}{{choices[1]}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"prompt": f"say {i} ", "choices": ["ab" * (1 + i % 3), "ba", "a" * i], "answer": i % 3} for i in range(1, 13)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    for name, task in TASKS.items():  # JSON is YAML
        whole = {"task": name, **data, "test_split": "test", "target_delimiter": "", **task}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(whole))
    return tmp_path


def evaluated(tasks: Path, kind: str, **arguments: Any) -> dict[str, Any]:
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval isn't installed: pip install 'lm-eval[api]'")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    how = {"model": kind, "model_args": arguments, "tasks": list(TASKS), "task_manager": manager, "batch_size": 4}
    return dict(lm_eval.simple_evaluate(**how, bootstrap_iters=0, device="cpu"))


def numbers(value: Any) -> list[Any]:
    """What a model answered, in one row."""
    return [x for each in value for x in numbers(each)] if isinstance(value, list | tuple) else [value]


@pytest.mark.slow
def test_the_server_and_peft_have_the_same_figures(
    tasks: Path, running: Running, served_base: Path, served_adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    how = {"model": "one", "base_url": f"{running.address}/v1/completions", "tokenizer": str(served_base)}
    served = evaluated(tasks, "local-completions", **how, num_concurrent=2, max_length=256)
    direct = evaluated(tasks, "hf", pretrained=str(served_base), peft=str(served_adapters / "one"), dtype="float32")
    compared = 0
    for name in TASKS:
        for metric in (metric["metric"] for metric in TASKS[name]["metric_list"]):  # type: ignore[attr-defined]
            figures = [side["results"][name][f"{metric},none"] for side in (served, direct)]
            assert figures[0] == pytest.approx(figures[1], rel=1e-5)
        both = (sorted(side["samples"][name], key=lambda row: row["doc_id"]) for side in (served, direct))
        for one, other in zip(*both, strict=True):
            answers, wanted = numbers(one["resps"]), numbers(other["resps"])
            assert len(answers) == len(wanted) > 0
            for answer, truth in zip(answers, wanted, strict=True):
                same_kind = isinstance(truth, float)
                assert answer == (pytest.approx(truth, abs=1e-3, rel=1e-5) if same_kind else truth)
                compared += 1
    assert compared > 12 * 7
