"""The smallest adapter that does as well: what is returned was measured, and the model is left as it was."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deltaw.adapter.algebra import resize_global
from deltaw.adapter.attach import attach, detach
from deltaw.adapter.file import Adapter, BaseId
from deltaw.config import AdapterSpec, DataConfig
from deltaw.data.example import Example
from deltaw.data.prepare import prepare
from deltaw.errors import InputError
from deltaw.evaluation import budget
from deltaw.evaluation.budget import STEPS, carrying, resize_to_loss
from deltaw.evaluation.held_out import held_out_loss
from deltaw.factors import LowRank
from deltaw.model import Model, open_model
from deltaw.show.progress import Display
from tests.tiny import tiny_base, words

QUIET = Display(quiet=True)
RANK = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, rows, and an adapter in which two directions of eight matter."""
    folder = tmp_path_factory.mktemp("budget")
    torch.manual_seed(0)
    tiny_base(folder / "base")
    words(folder / "rows.jsonl", 12)
    model = open_model(folder / "base", dtype="float32")
    attached = attach(model.base.model, AdapterSpec(rank=RANK, alpha=RANK))
    for layer in attached.layers.values():
        m, n = layer.factors().shape
        strong, weak = (LowRank(torch.randn(r, n), s * torch.randn(m, r)) for r, s in ((2, 0.02), (RANK - 2, 2e-5)))
        layer.set_factors(strong + weak)
    detach(attached, model.id).save(folder / "adapter")
    return folder


@pytest.fixture
def bare(folder: Path) -> Model:
    return open_model(folder / "base", dtype="float32")


@pytest.fixture
def adapter(folder: Path) -> Adapter:
    return Adapter.load(folder / "adapter")


@pytest.fixture
def rows(folder: Path, bare: Model) -> list[Example]:
    return list(prepare(DataConfig(train=str(folder / "rows.jsonl")), bare.renderer).train)


@torch.no_grad()
def logits(model: Model) -> Tensor:
    return model.base.model(input_ids=torch.arange(10)[None] + 65, use_cache=False).logits


def loss_of(model: Model, adapter: Adapter, rows: list[Example]) -> float:
    """The loss of an adapter on a base without one, in layers of its own rank."""
    attached = attach(model.base.model, adapter)
    loss, _ = held_out_loss(model.forward, rows)
    detach(attached)
    return loss


@pytest.mark.parametrize("carried", [False, True])
def test_the_directions_that_matter_stay_and_every_trial_is_what_it_says(
    carried: bool, folder: Path, bare: Model, adapter: Adapter, rows: list[Example]
) -> None:
    model = open_model(folder / "adapter", base=str(folder / "base"), dtype="float32") if carried else bare
    before, modules = logits(model), dict(model.base.model.named_modules())
    smaller, trials = resize_to_loss(model, adapter, rows, 1e-3, display=QUIET)
    assert torch.equal(logits(model), before)
    after = dict(model.base.model.named_modules())
    assert after.keys() == modules.keys() and all(after[name] is module for name, module in modules.items())

    if carried:
        bare = open_model(folder / "base", dtype="float32")
    full, *others = trials
    assert len(trials) == STEPS + 1
    assert (full.energy, full.parameters, full.mean_rank) == (1.0, adapter.parameters, RANK)
    assert full.loss == pytest.approx(loss_of(bare, adapter, rows), rel=1e-6)
    for trial in others:
        again, _ = resize_global(adapter, trial.energy)
        assert trial.parameters == again.parameters
        assert trial.mean_rank == pytest.approx(sum(u.rank for u in again.factors.values()) / len(again.factors))
        assert trial.loss == pytest.approx(loss_of(bare, again, rows), rel=1e-6)
    limit = 1.001 * full.loss
    good_enough = [trial for trial in trials if trial.loss <= limit]
    assert smaller.parameters == min(trial.parameters for trial in good_enough)
    assert any(trial.loss > limit for trial in trials)
    assert loss_of(bare, smaller, rows) <= limit * (1 + 1e-6)
    assert 1.5 <= sum(update.rank for update in smaller.factors.values()) / len(smaller.factors) <= 2.1


def test_the_limits(bare: Model, adapter: Adapter, rows: list[Example]) -> None:
    """Anything goes: rank 1. Nothing goes: the adapter itself."""
    smallest, trials = resize_to_loss(bare, adapter, rows, 1e6, display=QUIET)
    assert {update.rank for update in smallest.factors.values()} == {1}
    assert [trial.parameters for trial in trials] == sorted((trial.parameters for trial in trials), reverse=True)
    with pytest.MonkeyPatch.context() as patch:
        losses = iter([1.0, *[1.0 + 1e-9] * STEPS])
        patch.setattr(budget, "held_out_loss", lambda *_: (next(losses), 1))
        same, trials = resize_to_loss(bare, adapter, rows, 0.0, display=QUIET)
    assert same is adapter and len(trials) == STEPS + 1


def test_the_model_is_left_as_it_was_when_measuring_fails(
    folder: Path, adapter: Adapter, rows: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(folder / "adapter", base=str(folder / "base"), dtype="float32")
    before = logits(model)
    calls = []

    def fails(*_: object) -> tuple[float, int]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 1.0, 1

    monkeypatch.setattr(budget, "held_out_loss", fails)
    with pytest.raises(KeyboardInterrupt):
        resize_to_loss(model, adapter, rows, 0.1, display=QUIET)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("wrong", [-0.1, math.nan, math.inf])
def test_impossible_increases_are_refused(wrong: float, bare: Model, adapter: Adapter, rows: list[Example]) -> None:
    with pytest.raises(InputError, match="share of 0 or more"):
        resize_to_loss(bare, adapter, rows, wrong, display=QUIET)


def test_no_rows_and_another_adapter_are_refused(folder: Path, bare: Model, adapter: Adapter, rows: list) -> None:
    untrained = Example(np.arange(4, dtype=np.int32), np.zeros(4, dtype=bool), "rows.jsonl:1")
    for nothing in ([], [untrained]):
        with pytest.raises(InputError, match="no rows"):
            resize_to_loss(bare, adapter, nothing, 0.1, display=QUIET)
    model = open_model(folder / "adapter", base=str(folder / "base"), dtype="float32")
    other, _ = resize_global(adapter, 0.5)
    with pytest.raises(InputError, match="another adapter"):
        resize_to_loss(model, other, rows, 0.1, display=QUIET)


def test_an_adapter_of_another_base_is_refused(bare: Model, adapter: Adapter, rows: list[Example]) -> None:
    stranger = replace(adapter, base=BaseId("other", fingerprint="sha256:" + "f" * 64))
    with pytest.raises(InputError, match=r"trained on other .* this base is base"):
        resize_to_loss(bare, stranger, rows, 0.1, display=QUIET)


def test_layers_that_can_not_take_other_factors_are_refused(folder: Path, bare: Model) -> None:
    attached = attach(bare.base.model, AdapterSpec(rank=2, init="pissa"))
    model = Model(bare.base, bare.renderer, bare.forward, attached)
    with pytest.raises(InputError, match="in place"), carrying(model, attached.adapter(bare.id)):
        pass
