"""Runs of preferences: what they report, that they resume to the bit, that their reference is what training began with,
and that what doesn't fit is refused before the base is read."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deltaw
from deltaw.adapter.file import Adapter
from deltaw.base.parts import CHOSEN, REJECTED
from deltaw.data.loader import LoaderState
from deltaw.errors import InputError, RunError
from deltaw.evaluation.weighing import summed_logprobs
from deltaw.files.safetensors import load_safetensors
from deltaw.model import open_model
from deltaw.run import Run
from deltaw.show.progress import QUIET
from deltaw.training.length import make_loader
from deltaw.training.opening import Opened, open_run
from deltaw.training.watch import Falling
from tests.tiny import run_file, tiny_base
from tests.training.processes import together

TRAIN = {
    "steps": 6,
    "lr": 1e-2,
    "tokens_per_step": 160,
    "tokens_per_batch": 80,
    "dtype": "float32",
    "device": "cpu",
    "save_every": 2,
    "eval_every": 3,
}
EVALUATE = {"general": None, "report": False}


def pairs(path: Path, count: int = 60) -> Path:
    rows = [{"prompt": f"say {i} ", "chosen": "ab" * (1 + i % 5), "rejected": "ba" * (1 + i % 3)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def judged(path: Path, count: int = 60) -> Path:
    rows = [{"prompt": f"say {i} ", "completion": "ab" if i % 3 else "ba", "label": bool(i % 3)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, pairs and judged answers, and a finished run of DPO."""
    place = tmp_path_factory.mktemp("preferences")
    tiny_base(place / "base")
    pairs(place / "pairs.jsonl")
    judged(place / "judged.jsonl")
    deltaw.train(fields(place, "dpo", "run"), display=QUIET)
    return place


def fields(place: Path, kind: str, output: str, **changes: Any) -> dict[str, Any]:
    data = {"train": str(place / ("judged.jsonl" if kind == "kto" else "pairs.jsonl")), "eval": 8}
    sections = {"objective": {"kind": kind}, "data": data, "train": TRAIN, "evaluate": EVALUATE}
    return run_file(place, **{**sections, "output": str(place / output), **changes})


def metrics(folder: Path) -> list[dict[str, Any]]:
    return Run(folder).read_metrics()


def test_a_run_learns_and_reports(place: Path) -> None:
    steps = [line for line in metrics(place / "run") if "loss" in line]
    held_out = [line for line in metrics(place / "run") if "eval_loss" in line]
    assert [line["step"] for line in held_out] == [3, 6]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the adapter begins as the reference
    assert abs(steps[0]["margin"]) < 1e-5 and steps[0]["kl"] < 1e-9
    assert held_out[-1]["eval_loss"] < math.log(2) and held_out[-1]["eval_margin"] > 0
    assert all(
        {"margin", "accuracy", "likelier", "logp_chosen", "logp_rejected", "kl"} <= line.keys() for line in steps
    )
    assert "eval_perplexity" not in held_out[0]
    result = Run(place / "run").read_json(Run(place / "run").result)
    assert result["eval"]["rows"] == 8 and result["eval"]["after"]["accuracy"] == held_out[-1]["eval_accuracy"]
    assert "accuracy" not in result["eval"]["before"] and "likelier" in result["eval"]["before"]
    assert result["train_rows"] == 52


def test_the_reference_is_the_base(place: Path) -> None:
    model = open_model(place / "run", display=QUIET)
    opened = open_run(deltaw.load_config(place / "run" / "config.yaml"), QUIET)
    kept = load_safetensors(Run(place / "run").references)
    assert model.attached is not None
    with model.attached.disabled():
        for name, rows in (("train", opened.dataset.train), ("eval", opened.dataset.eval)):
            np.testing.assert_allclose(kept[name].numpy(), summed_logprobs(model.forward, rows), rtol=1e-5, atol=1e-4)
    assert [row.part for row in opened.dataset.train][:4] == [CHOSEN, REJECTED] * 2


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_resuming_is_exact(place: Path, tmp_path: Path, kind: str) -> None:
    class Enough(Exception):
        pass

    def stop(figures: dict[str, Any]) -> None:
        if figures["step"] == 3:
            raise Enough

    straight = tmp_path / "straight"
    deltaw.train(fields(place, kind, str(straight)), display=QUIET)
    stopped = tmp_path / "stopped"
    with pytest.raises(Enough):
        deltaw.train(fields(place, kind, str(stopped)), display=QUIET, on_step=stop)
    if kind == "kto":  # lost ones are found again
        Run(stopped).references.unlink()
    deltaw.resume(stopped, display=QUIET)
    timeless = [[{k: v for k, v in line.items() if k != "seconds"} for line in metrics(f)] for f in (straight, stopped)]
    assert timeless[0] == timeless[1]
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (straight, stopped)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("kind", ["orpo", "kto"])
def test_the_size_of_batches_changes_nothing(place: Path, tmp_path: Path, kind: str) -> None:
    lines = []
    for size in (60, 400):
        train = {**TRAIN, "tokens_per_batch": size, "steps": 2, "eval_every": None}
        folder = tmp_path / str(size)
        deltaw.train(fields(place, kind, str(folder), train=train), display=QUIET)
        lines.append([line for line in metrics(folder) if "loss" in line])
    for one, other in zip(*lines, strict=True):
        for name in one.keys() - {"seconds"}:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4), name
    assert (folder / "references.safetensors").exists() == (kind in ("dpo", "ipo", "kto"))


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_prompt_that_is_shared_changes_nothing(
    place: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "what is said here is said to all of them, and then "
    rows = [{"prompt": f"{long}{n % 3}", "chosen": f" ab{n}", "rejected": " ba"} for n in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = []
    for shares in (True, False):
        monkeypatch.setattr(Opened, "shares", shares)
        train = {**TRAIN, "tokens_per_step": 1024, "tokens_per_batch": 256, "steps": 2, "eval_every": None}
        folder = tmp_path / str(shares)
        data = {"train": str(tmp_path / "pairs.jsonl")}
        deltaw.train(fields(place, kind, str(folder), data=data, train=train), display=QUIET)
        lines.append([line for line in metrics(folder) if "loss" in line])
        opened = open_run(deltaw.load_config(folder / "config.yaml"), QUIET)
        batches, _ = next(iter(make_loader(opened.config, opened.dataset, LoaderState(), shares=shares)))
        assert shares == any(batch.documents.tree is not None for batch in batches)
        assert all(batch.parts == (CHOSEN, REJECTED) * (batch.examples // 2) for batch in batches)
    for one, other in zip(*lines, strict=True):
        for name in one.keys() - {"seconds"}:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_two_processes_train_what_one_trains(place: Path, tmp_path: Path, kind: str) -> None:
    by_one, by_two = place / "run" if kind == "dpo" else tmp_path / "one", tmp_path / "two"
    if kind == "kto":
        deltaw.train(fields(place, kind, str(by_one)), display=QUIET)
    ended = together(2, lambda rank: deltaw.train(fields(place, kind, str(by_two)), display=QUIET))
    assert [rank.code for rank in ended] == [0, 0], ended
    one, two = metrics(by_one), metrics(by_two)
    assert len(one) == len(two) == 8
    for mine, other in zip(one, two, strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() - {"seconds"}:
            assert other[name] == pytest.approx(mine[name], rel=2e-4, abs=1e-6), name
    ends = [Adapter.load(by_one), Adapter.load(by_two)]
    for path, update in ends[0].factors.items():
        torch.testing.assert_close(ends[1].factors[path].dense(), update.dense(), rtol=1e-3, atol=1e-5)


def test_a_run_that_starts_from_an_adapter_is_compared_with_that(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "second"
    config = fields(place, "dpo", str(folder), adapter={"from": str(place / "run")})
    deltaw.train(config, display=QUIET)
    first = next(line for line in metrics(folder) if "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)  # it begins as its reference
    model = open_model(place / "run", display=QUIET)
    opened = open_run(deltaw.load_config(folder / "config.yaml"), QUIET)
    kept = load_safetensors(Run(folder).references)["eval"].numpy()
    np.testing.assert_allclose(kept, summed_logprobs(model.forward, opened.dataset.eval), rtol=1e-5, atol=1e-4)
    Run(folder).references.unlink()
    Run(folder).result.unlink()
    with pytest.raises(RunError, match="references"):
        deltaw.resume(folder, display=QUIET)


def test_held_out_pairs_are_weighed_again(place: Path) -> None:
    measured = deltaw.evaluate(place / "run", display=QUIET)
    result = Run(place / "run").read_json(Run(place / "run").result)
    assert measured.rows == 8 and measured.adapter is not None and measured.base is not None
    for name, value in result["eval"]["after"].items():
        assert measured.adapter.summary()[name] == pytest.approx(value, abs=1e-4)
    low, high = measured.adapter.intervals["accuracy"]
    assert low is not None and high is not None and low <= measured.adapter.metrics["accuracy"] <= high
    assert "margin" not in measured.base.metrics
    other = deltaw.evaluate(place / "run", place / "pairs.jsonl", rows=5, display=QUIET)
    assert other.rows == 5 and other.main.counts == "pair"
    with pytest.raises(InputError, match="metric"):
        deltaw.evaluate(place / "run", metrics=["exact_match"], display=QUIET)


def test_a_likelihood_that_falls_is_said_once() -> None:
    for change, warned in ((-0.5, False), (-2.0, False), (-8.0, True)):  # of answers of −100 nats
        lines: list[str] = []
        falling = Falling(lines.append)
        for step in range(1, 40):
            falling.see({"chosen_change": change, "logp_chosen": -100.0}, step)
            assert len(lines) == (warned and step >= 10)
    falling.see({}, 41)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"evaluate": {**EVALUATE, "metrics": ["exact_match"]}}, "evaluate.metrics"),
        ({"evaluate": {**EVALUATE, "samples": 3}}, "evaluate.samples"),
        ({"train": {**TRAIN, "sample_every": 2}}, "train.sample_every"),
        ({"objective": {"kind": "dpo", "gamma": 1.0}}, "gamma"),
        ({"objective": {"kind": "dpo", "beta": 0}}, "beta"),
        ({"objective": {"kind": "dpo", "beta": math.nan}}, "beta"),
        ({"objective": {"kind": "sft", "beta": 0.1}}, "beta"),
        ({"objective": "dop"}, "objective"),
        ({"objective": "sft"}, "objective"),  # rows of pairs
    ],
)
def test_what_does_not_fit_is_refused(place: Path, tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=field) as error:
        deltaw.train(fields(place, "dpo", str(tmp_path / "run"), **changes), display=QUIET)
    assert len(str(error.value).splitlines()) <= 5


def test_rows_without_two_answers_are_refused(place: Path, tmp_path: Path) -> None:
    data = {"train": str(place / "judged.jsonl"), "eval": 8}
    with pytest.raises(InputError, match="chosen"):
        deltaw.train(fields(place, "dpo", str(tmp_path / "run"), data=data), display=QUIET)


def test_the_rate_and_the_numbers_are_written_down(place: Path) -> None:
    config = deltaw.parse_config(fields(place, "simpo", "x", train={"steps": 3}, data={"train": "x.jsonl"}))
    assert config.train.lr == config.objective.lr and config.objective.options == {
        "beta": 2.0,
        "gamma": 1.0,
        "sft_weight": 0.0,
    }
    again = deltaw.parse_config(json.loads(config.model_dump_json(by_alias=True)))
    assert again == config
    assert deltaw.parse_config(fields(place, "sft", "x", train={"steps": 3}, objective="sft")).train.lr == 5e-4


def test_the_answer_that_is_preferred_gets_likelier_with_sft_weight(place: Path, tmp_path: Path) -> None:
    ends = {}
    for weight in (0.0, 1.0):
        folder = tmp_path / str(weight)
        deltaw.train(fields(place, "dpo", str(folder), objective={"kind": "dpo", "sft_weight": weight}), display=QUIET)
        ends[weight] = [line for line in metrics(folder) if "eval_loss" in line][-1]["eval_logp_chosen"]
    assert ends[1.0] > ends[0.0]
