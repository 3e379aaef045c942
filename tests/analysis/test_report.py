"""`inspect` and `compare`: a run, a bare adapter, no base at hand, and what must be refused."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from deltaw.adapter.file import Adapter, BaseId
from deltaw.analysis.measure import measure
from deltaw.analysis.page import render
from deltaw.analysis.report import Report, inspect
from deltaw.analysis.summary import summarise
from deltaw.analysis.training import Training
from deltaw.commands.compare import compare_named
from deltaw.config import AdapterSpec, parse_config
from deltaw.errors import InputError, RunError
from deltaw.factors import LowRank
from deltaw.show.progress import Display
from deltaw.training.run import train
from tests.tiny import run_file, tiny_base, words

QUIET = Display(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny base and a finished run, whose report was written at its end."""
    folder = tmp_path_factory.mktemp("report")
    tiny_base(folder / "base")
    words(folder / "train.jsonl")
    train(parse_config(run_file(folder, evaluate={"max_new_tokens": 4})), display=QUIET)
    return folder


def test_a_run_writes_its_report_and_says_what_it_forgot(folder: Path) -> None:
    page = (folder / "run/report.html").read_text()
    for title in ("In short", "Checks", "Learning", "What it forgot", "Answers", "Where it changed", "Directions"):
        assert f">{title}</h2>" in page
    assert page.count("<svg") == page.count("<figure>") == page.count("<details>") > 5
    lost = json.loads((folder / "run/result.json").read_text())["forgetting"]
    assert lost["kl"] > 0 and lost["tokens"] > 1000


def test_a_run_without_a_report_has_none(folder: Path, tmp_path: Path) -> None:
    raw = run_file(folder, output=str(tmp_path / "run"), evaluate={"report": False, "general": None})
    train(parse_config(raw), display=QUIET)
    assert not (tmp_path / "run/report.html").exists()
    assert json.loads((tmp_path / "run/result.json").read_text())["forgetting"] is None


def test_the_json_has_every_module_and_is_json(folder: Path) -> None:
    report = inspect(folder / "run", display=QUIET)
    raw = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert raw["summary"]["modules"] == len(raw["modules"]) == 14
    one = raw["modules"]["model.layers.1.mlp.down_proj"]
    assert one["sentence"].startswith("layer 1 down_proj uses") and len(one["spectrum"]) == 4
    assert one["base"]["relative"] > 0 and raw["training"]["steps"] == 6
    assert {"level", "text"} == raw["findings"][0].keys()
    assert "14 modules" in report.gist()


def test_an_adapter_alone_is_measured_against_the_base_it_names(folder: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(folder / "run/adapter", tmp_path / "adapter")
    without = inspect(adapter, display=QUIET)  # "base" is a local folder, and not here
    assert without.training is None and all(m.base is None for m in without.measures.values())
    assert any("without the base's weights" in words for _, words in without.findings)
    assert without.write() == adapter / "report.html"
    given = inspect(adapter, base=str(folder / "base"), display=QUIET)
    whole = inspect(folder / "run", display=QUIET)
    assert given.measures == whole.measures


def test_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    tiny_base(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="is another"):
        inspect(folder / "run/adapter", base=str(tmp_path / "other"), display=QUIET)


def test_an_adapter_of_another_shape_is_refused(folder: Path, tmp_path: Path) -> None:
    adapter = Adapter.load(folder / "run/adapter")
    path = next(iter(adapter.factors))
    wrong = {**adapter.factors, path: LowRank(torch.randn(4, 7), torch.randn(5, 4), adapter.spec.scale(path))}
    Adapter(adapter.spec, wrong, BaseId()).save(tmp_path / "wrong")
    with pytest.raises(InputError, match="shape"):
        inspect(tmp_path / "wrong", base=str(folder / "base"), display=QUIET)


def test_what_is_no_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such adapter"):
        inspect(tmp_path / "nowhere", display=QUIET)
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        inspect(folder / "base", display=QUIET)
    with pytest.raises(RunError, match="no folder"):
        inspect(folder / "run", display=QUIET).write(tmp_path / "none" / "page.html")


def test_full_fine_tuning_is_measured_like_a_lora(folder: Path, tmp_path: Path) -> None:
    raw = run_file(folder, adapter="full", output=str(tmp_path / "full"), evaluate={"general": None})
    train(parse_config(raw), display=QUIET)
    report = inspect(tmp_path / "full", display=QUIET)
    assert "full fine-tuning" in (tmp_path / "full/report.html").read_text()
    assert all(m.rank == min(m.shape) and m.base for m in report.measures.values())


def test_compare_writes_a_page_and_json(folder: Path, tmp_path: Path) -> None:
    adapter = Adapter.load(folder / "run/adapter")
    turned = {path: LowRank(u.a_RN, -u.b_MR, u.scale) for path, u in adapter.factors.items()}
    dataclasses.replace(adapter, factors=turned).save(tmp_path / "turned")
    result = compare_named(str(folder / "run"), str(tmp_path / "turned"), str(tmp_path / "c.html"), display=QUIET)
    assert result.data["cosine"] == pytest.approx(-1) and "cosine of -1.000" in result.text
    json.dumps(result.data, allow_nan=False)
    page = (tmp_path / "c.html").read_text()
    assert page.count("<svg") == page.count("<details>") == 8  # seven kinds and the cosines


def test_comparing_with_nothing_is_said(folder: Path, tmp_path: Path) -> None:
    adapter = Adapter.load(folder / "run/adapter")
    zero = {path: LowRank(u.a_RN, torch.zeros_like(u.b_MR), u.scale) for path, u in adapter.factors.items()}
    dataclasses.replace(adapter, factors=zero).save(tmp_path / "zero")
    text = compare_named(str(folder / "run"), str(tmp_path / "zero"), str(tmp_path / "c.html"), display=QUIET).text
    assert "nothing to compare" in text


KINDS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("paths", "steps"),
    [
        ([f"model.layers.{i}.{kind}" for i in range(2) for kind in KINDS], 250_000),
        ([f"model.layers.{i}.{kind}" for i in range(143) for kind in KINDS], 1_000),
        ([f"m{i}" for i in range(1_000)], 100),
        ([f"layers.{i}.k{i}" for i in range(1_000)], 100),
        ([f"layers.{i}.experts.{e}.{x}_proj" for i in range(12) for e in range(64) for x in ("up", "down")], 100),
    ],
    ids=["steps", "modules", "without layers", "a kind each", "experts"],
)
def test_a_page_does_not_grow_with_the_run(paths: list[str], steps: int) -> None:
    """Neither with its steps nor with its modules nor with the answers' length; the JSON has all of them."""
    few = [measure(LowRank(torch.randn(16, 80), torch.randn(64, 16)), torch.randn(64, 80)) for _ in range(5)]
    measures = {path: few[i % 5] for i, path in enumerate(paths)}
    metrics = [{"step": i, "loss": 3 + math.sin(i), "lr": 1e-3, "grad_norm": 1.0, "tokens": i} for i in range(steps)]
    metrics[steps // 2]["loss"] = 777.0
    answers = [{"prompt": "p" * 100_000, "before": "b" * 100_000, "after": "", "truth": None}] * 10
    config = parse_config({"base": "b", "data": {"train": "t"}, "output": "o"})
    training = Training(config, {"answers": answers}, metrics)
    adapter = Adapter(AdapterSpec(), {}, BaseId())
    report = Report(Path("x"), adapter, "b", measures, summarise(measures), [], training)
    page = render(report.page())
    assert len(page.encode()) < 1_500_000
    assert '<td class="number">777</td>' in page, "a spike is lost"
    raw = report.to_json()
    assert len(raw["training"]["metrics"]["loss"]) == steps and len(raw["modules"]) == len(paths)


def test_a_comparison_does_not_grow_with_the_adapters(tmp_path: Path) -> None:
    """Neither with its modules nor with their rank nor with the kinds of module."""
    paths = [f"layers.{i}.{kind}" for i in range(20) for kind in KINDS] + [f"layers.0.k{i}" for i in range(200)]
    for name in ("one", "two"):
        factors = {path: LowRank(torch.randn(64, 70), torch.randn(66, 64), 1.0) for path in paths}
        Adapter(AdapterSpec(rank=64, alpha=64.0, targets=tuple(paths)), factors, BaseId()).save(tmp_path / name)
    raw = compare_named(*(str(tmp_path / name) for name in ("one", "two", "c.html")), display=QUIET).data
    assert (tmp_path / "c.html").stat().st_size < 1_500_000 and len(raw["modules"]) == len(paths)
