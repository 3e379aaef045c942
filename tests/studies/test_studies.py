"""Every study from its beginning to its page, on trainings that are made up to hold or not; and the loops of those that
train by themselves."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any
from zlib import crc32

import pytest
import torch
from markupsafe import escape

from deltaw.studies import bf16, forget, fullrank, pretrain, rank
from deltaw.studies.bench import Arm
from deltaw.studies.lab import Lab
from deltaw.studies.page import write_outcome
from deltaw.studies.study import NAMES, Outcome, find_study, judge
from tests.studies.conftest import BEFORE, Loss, valley

Labs = Callable[[Loss], Lab]


def noise(arm: Arm, seed: int, size: float = 0.005) -> float:
    """A number of its own for each arm and seed, around 1."""
    draw = torch.randn((), generator=torch.Generator().manual_seed(crc32(f"{arm.key()} {seed}".encode())))
    return math.exp(size * float(draw))


def of_rank(least: Mapping[Any, float], at: float = 6e-3) -> Loss:
    """Losses by rank (or "full", whose best rate is a tenth); 1 where none is given."""

    def loss(arm: Arm, seed: int) -> float:
        kind = "full" if arm.spec.full else arm.spec.rank
        return valley(arm, least.get(kind, 1.0), at / 10 * 2.5 if kind == "full" else at) * noise(arm, seed)

    return loss


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Studies with loops of their own take a few steps."""
    monkeypatch.setattr(bf16, "STEPS", 2)
    monkeypatch.setattr(bf16, "RATES", bf16.RATES[:1])
    monkeypatch.setattr(forget, "STRENGTHS", (0.5, 1.0))
    monkeypatch.setattr(fullrank, "STEPS", (1, 2))
    monkeypatch.setattr(fullrank, "ARM", Arm("full", 1e-3, steps=2, train={"schedule": "constant"}))
    monkeypatch.setattr(forget, "DRAWS", 20)
    monkeypatch.setattr(
        pretrain.Trainings,
        "run",
        lambda self, stage, way, rate, seed: {"before": BEFORE, "loss": 1 + abs(math.log(rate / 3e-3)) + 0.01 * seed},
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_study_runs_and_its_page_says_what_it_found(name: str, lab_of: Labs, short: None) -> None:
    study, lab = find_study(name), lab_of(of_rank({}))
    outcome: Outcome = study.run(lab)
    assert study.RULE.name == name and outcome.blocks
    record = write_outcome(study.RULE, outcome, lab, 1.0)
    assert record["verdict"] in ("held", "did not hold", "not settled", "void")
    page = (lab.folder / f"{name}.html").read_text(encoding="utf-8")
    assert escape(study.RULE.title) in page and 'class="verdict' in page and study.RULE.hash in page
    assert "<svg" in page and "<table" in page
    stored = json.loads((lab.folder / f"{name}.json").read_text(encoding="utf-8"))
    assert stored == json.loads(json.dumps(record))
    assert stored["rule"]["hash"] == study.RULE.hash
    assert {finding["quantity"] for finding in stored["findings"]} == {c.quantity for c in study.RULE.criteria}


@pytest.mark.parametrize(
    ("least", "verdict"),
    [({4: 1.0, 64: 1.0}, "held"), ({4: 1.2, 64: 1.0}, "did not hold"), ({4: 1.048, 64: 1.0}, "not settled"),
     ({4: 3.0, 64: 3.0}, "void")],
)  # fmt: skip
def test_rank_wants_rank_4_within_its_margin(lab_of: Labs, least: Mapping[int, float], verdict: str) -> None:
    assert judge(rank.RULE, rank.run(lab_of(of_rank(least)))).verdict == verdict
