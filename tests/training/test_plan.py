"""A plan says what the run will then do, and leaves nothing behind."""

import json
from pathlib import Path
from typing import Any

import pytest

from deltaw.config import RunConfig, parse_config
from deltaw.errors import RunError
from deltaw.show.progress import Display
from deltaw.training import plan as module
from deltaw.training.plan import plan
from deltaw.training.run import train
from tests.faults.common import child
from tests.tiny import run_file, tiny_base

QUIET = Display(quiet=True)
EVERYTHING = {"metrics": ["exact_match"], "max_new_tokens": 4, "report": False}


def config(folder: Path, *, train: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    fields = run_file(folder, **{"evaluate": EVERYTHING, **changes})
    options = {**fields["train"], **(train or {})}
    return parse_config({**fields, "train": options if "eval" in fields["data"] else {**options, "eval_every": None}})


@pytest.mark.parametrize("length", [{"steps": 6}, {"steps": None, "epochs": 1.5}])
def test_a_plan_counts_what_the_run_then_does(folder: Path, length: dict[str, Any]) -> None:
    settings = config(folder, train=length)
    found = plan(settings, QUIET)
    train(settings, display=QUIET)
    result = json.loads((folder / "run/result.json").read_text())
    assert found.steps == result["steps"] and found.tokens == result["tokens"]
    assert found.supervised_tokens == result["supervised_tokens"] and found.computed == "float32 on cpu"
    written = sum(path.stat().st_size for path in (folder / "run/checkpoints").rglob("*.safetensors"))
    assert written < found.disk_needed < 3 * written


def test_a_plan_leaves_nothing_behind(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    found = plan(config(folder), QUIET)
    assert sorted(folder.rglob("*")) == before
    (folder / "run").mkdir()
    assert plan(config(folder), QUIET).steps == found.steps
    assert sorted(folder.rglob("*")) == sorted([*before, folder / "run"])


def test_a_plan_has_every_kind_of_work_that_the_run_has(folder: Path) -> None:
    always = {"opening", "updates", "training", "saving"}
    cases: list[tuple[dict[str, Any], set[str]]] = [
        ({}, {"held-out loss", "answers", "forgetting"}),
        ({"data": {"train": str(folder / "train.jsonl")}, "evaluate": {"general": None}}, set()),
        ({"evaluate": {"general": None, "samples": 0}}, {"held-out loss"}),
        ({"adapter": {"init": "eva", "rank": 4}}, {"start", "held-out loss", "answers", "forgetting"}),
    ]
    for changes, more in cases:
        found = plan(config(folder, **changes), QUIET)
        assert {phase.name for phase in found.phases} == always | more
        assert all(phase.peak > 0 and phase.seconds > 0 for phase in found.phases)
        said = found.to_json()
        assert json.loads(json.dumps(said))["peak_memory_bytes"] == max(phase.peak for phase in found.phases)
        assert said["peak_in"] in found.text() and list(found.what_if.values()) == sorted(found.what_if.values())


def test_evaluations_count_as_often_as_they_come(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed(module.Window):
        seconds = property(lambda self: 1.0, lambda self, value: None)  # type: ignore[assignment]

    monkeypatch.setattr("deltaw.training.memory.Window", Fixed)
    seconds = {p.name: p.seconds for p in plan(config(folder), QUIET).phases}
    assert seconds["held-out loss"] == 2 + 2 and seconds["answers"] == 2  # every 3 of 6 steps; before and after
    assert seconds["updates"] == 6 and seconds["saving"] == 3
    evaluate = {**EVERYTHING, "max_new_tokens": 64}
    longer = plan(config(folder, evaluate=evaluate, train={"sample_every": 2}), QUIET)
    answers = next(p for p in longer.phases if p.name == "answers")
    assert answers.seconds == (2 * 8 + 3 * 3) / 8 * 64 / 32


def test_a_plan_names_rows_by_number(folder: Path) -> None:
    rows = [json.dumps({"prompt": f"say {n} ", "completion": "ab" * (60 if n in (5, 9) else 2)}) for n in range(60)]
    rows[20] = '{"prompt": 1}'
    rows[31] = rows[30]
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    data = {"train": str(folder / "train.jsonl"), "max_length": 30, "bad_rows": 0.5}
    said = plan(config(folder, data=data, evaluate={"general": None}), QUIET).text()
    assert "too long, 2 left out: train.jsonl:6, train.jsonl:10" in said
    assert "unusable, 1: train.jsonl:21" in said and "1 copy of another" in said
    said = plan(config(folder, data={**data, "too_long": "truncate"}, evaluate={"general": None}), QUIET).text()
    assert "too long, 2 cut: train.jsonl:6, train.jsonl:10" in said


def test_a_plan_that_runs_out_of_memory_says_what_would_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_pass = module.fit.one_pass

    def limited(forward: Any, learner: Any, batch: Any, *, accumulating: bool) -> None:
        if len(batch.tokens_T) > 40:
            raise MemoryError
        one_pass(forward, learner, batch, accumulating=accumulating)

    monkeypatch.setattr(module.fit, "one_pass", limited)
    with pytest.raises(RunError) as caught:
        plan(config(folder), QUIET)
    said = str(caught.value).splitlines()
    assert "a batch of 64 tokens takes about" in said[0] and said[1].strip().startswith("train.tokens_per_batch=32:")
    assert len(said) == 5 and said[4] == "plan again with one of these, then train with it"
    assert not [path for path in folder.iterdir() if path.name.startswith(".deltaw")]


def test_the_peak_is_the_runs_within_a_tenth(folder: Path) -> None:
    """Of what both take beyond a process that has loaded its libraries, each measured in a process of its own."""
    tiny_base(folder / "base", hidden_size=192, intermediate_size=768, num_hidden_layers=3, max_position_embeddings=512)
    rows = [json.dumps({"prompt": f"say {n} ", "completion": "ab" * (40 + n % 60)}) for n in range(200)]
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    train_options = {"steps": 8, "tokens_per_step": 4096, "tokens_per_batch": 4096, "save_every": 100}
    settings = config(folder, train=train_options, evaluate={"general": None, "report": False, "max_new_tokens": 4})
    floor = child(lambda: print(module.memory.held_memory(module.torch.device("cpu"))))
    planned = child(lambda: print(plan(settings, QUIET).largest.peak))
    ran = child(lambda: train(settings, display=QUIET))
    assert ran.code == planned.code == 0, ran.output + planned.output
    real = json.loads((folder / "run/result.json").read_text())["peak_memory_bytes"]
    assert real > int(floor.output) + 150 * (1 << 20), "the model is too small to tell"
    assert int(planned.output) == pytest.approx(real, rel=0.1)
