"""Runs whose rows begin alike: they come to what a run that shares nothing comes to, resume to the same bits, and say
what is shared."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaw.adapter.file import Adapter
from deltaw.config import RunConfig, parse_config
from deltaw.data.loader import Loader
from deltaw.training import opening, run
from deltaw.training.plan import plan
from deltaw.training.run import resume, train
from tests.tiny import Said, run_file

SYSTEM = "You are asked what a row says, and you say it in as few letters as there are. "


@pytest.fixture
def alike(folder: Path) -> Path:
    """The folder, its rows behind one long beginning."""
    rows = [{"prompt": f"{SYSTEM}say {i} ", "completion": "ab" * (1 + i % 7)} for i in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def config(folder: Path, **train: Any) -> RunConfig:
    fields = run_file(folder)
    sizes = {"tokens_per_step": 1000, "tokens_per_batch": 300}
    return parse_config({**fields, "train": {**fields["train"], **sizes, **train}})


def off(a: Adapter, b: Adapter) -> float:
    """How far two adapters are apart, of what the first one is."""
    pairs = [(a.factors[path].dense(), b.factors[path].dense()) for path in a.factors]
    apart = sum(float((x - y).norm() ** 2) for x, y in pairs) ** 0.5
    return apart / sum(float(x.norm() ** 2) for x, _ in pairs) ** 0.5


def test_a_run_that_shares_comes_to_the_same(alike: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, computed = Said(), list[int]()
    packed = Loader._packed

    def noted(self: Loader, *args: Any) -> Any:
        batches, at = packed(self, *args)
        computed.append(sum(len(batch.tokens_T) for batch in batches))
        return batches, at

    monkeypatch.setattr(Loader, "_packed", noted)
    shared = train(config(alike), display=said)
    result = json.loads((alike / "run/result.json").read_text())
    assert any("shared prefixes" in line for line in said.lines)
    monkeypatch.setattr(opening.Opened, "shares", False)
    plain = train(config(alike), replace=True, display=(quiet := Said()))
    same = json.loads((alike / "run/result.json").read_text())
    assert not any("shared prefixes" in line for line in quiet.lines)
    assert off(plain, shared) < 1e-3
    assert {name: result[name] for name in ("steps", "tokens", "supervised_tokens")} == {
        name: same[name] for name in ("steps", "tokens", "supervised_tokens")
    }
    assert 2 * sum(computed[:6]) < sum(computed[6:])


def test_it_resumes_to_the_same_bits(alike: Path) -> None:
    whole = train(config(alike), display=Said())

    def stop(figures: dict[str, Any]) -> None:
        if figures["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(alike), replace=True, on_step=stop, display=Said())
    again = resume(alike / "run", display=Said())
    assert all(torch.equal(whole.factors[path].a_RN, again.factors[path].a_RN) for path in whole.factors)


def test_frozen_layers_are_kept_by_example(alike: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows seen more than once, an adapter on the last layer alone: what was kept of whole examples goes into shared
    batches."""
    fields = run_file(alike)
    options = {**fields["train"], "tokens_per_step": 2000, "tokens_per_batch": 600, "steps": 6}
    settings = {**fields, "train": options, "adapter": {"rank": 4, "targets": ["model.layers.1.*"]}}
    said = Said()
    kept = train(parse_config(settings), display=said)
    assert any("frozen layers computed once" in line for line in said.lines)
    monkeypatch.setattr(run, "above_the_frozen", lambda runs, display: runs[0].model.forward)
    monkeypatch.setattr(opening.Opened, "shares", False)
    assert off(kept, train(parse_config(settings), replace=True, display=Said())) < 1e-3


def test_a_plan_counts_what_is_computed(alike: Path) -> None:
    found = plan(config(alike), Said())
    assert 0.5 < found.shared < 0.95 and "shared prefixes" in found.text()
    assert found.longest_batch <= 300
    dropping = parse_config({**run_file(alike), "adapter": {"rank": 4, "dropout": 0.1}})
    assert plan(dropping, Said()).shared == 0
