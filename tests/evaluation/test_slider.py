"""The slider: its ends are the base and the adapter, its points are those of scaled adapters, and nothing moves."""

# ruff: noqa: F811  (fixtures come from test_budget)

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deltaw.adapter.algebra import scaled
from deltaw.adapter.attach import attach
from deltaw.adapter.file import Adapter
from deltaw.config import AdapterSpec
from deltaw.data.example import Example
from deltaw.errors import InputError
from deltaw.evaluation.held_out import held_out_loss
from deltaw.evaluation.slider import Point, slide
from deltaw.kinds import Dense
from deltaw.model import Model, open_model
from tests.evaluation.test_budget import QUIET, adapter, bare, folder, logits, loss_of, rows  # noqa: F401

FACTORS = (1.0, 0.0, 0.5, -1.0, 1.5)


@pytest.fixture
def worn(folder: Path) -> Model:
    return open_model(folder / "adapter", base=str(folder / "base"), dtype="float32")


@pytest.fixture
def general(rows: list[Example]) -> list[Example]:
    return [Example(row.tokens[::-1].copy(), row.loss_mask, row.origin) for row in rows]


def test_the_points_are_the_losses_of_scaled_adapters(
    worn: Model,
    bare: Model,
    adapter: Adapter,
    rows: list[Example],
    general: list[Example],
) -> None:
    before = logits(worn)
    points = slide(worn, FACTORS, rows, general, display=QUIET)
    assert torch.equal(logits(worn), before)
    assert [point.factor for point in points] == list(FACTORS)
    for point in points:
        same = scaled(adapter, point.factor)
        wanted = Point(point.factor, loss_of(bare, same, rows), loss_of(bare, same, general))
        assert point.task_loss == pytest.approx(wanted.task_loss, rel=1e-6)
        assert point.general_loss == pytest.approx(wanted.general_loss, rel=1e-6)
    assert worn.attached is not None
    with worn.attached.disabled():
        assert points[1].task_loss == pytest.approx(held_out_loss(worn.forward, rows)[0], rel=1e-6)
    assert len({round(point.task_loss, 6) for point in points}) == len(points)


def test_full_fine_tuning_slides_too(bare: Model, adapter: Adapter, rows: list[Example]) -> None:
    deltas = {path: Dense(update.dense()) for path, update in adapter.factors.items()}
    attached = attach(bare.base.model, Adapter(AdapterSpec(full=True, targets=adapter.spec.targets), deltas))
    full = Model(bare.base, bare.renderer, bare.forward, attached)
    before = logits(full)
    points = slide(full, [0.0, 0.5], rows, rows, display=QUIET)
    assert torch.equal(logits(full), before)
    with attached.disabled():
        assert points[0].task_loss == pytest.approx(held_out_loss(full.forward, rows)[0], rel=1e-6)
    assert points[1].task_loss != points[0].task_loss


@pytest.mark.parametrize("factors", [[], [math.nan], [0.5, math.inf]])
def test_impossible_factors_are_refused(factors: list, worn: Model, rows: list[Example]) -> None:
    with pytest.raises(InputError, match="finite number"):
        slide(worn, factors, rows, rows, display=QUIET)


def test_nothing_to_slide_and_nothing_to_measure_are_refused(
    worn: Model,
    bare: Model,
    rows: list[Example],
) -> None:
    with pytest.raises(InputError, match="carries no adapter"):
        slide(bare, [1.0], rows, rows, display=QUIET)
    for task, other in (([], rows), (rows, [])):
        with pytest.raises(InputError, match="no rows"):
            slide(worn, [1.0], task, other, display=QUIET)
    dora = attach(bare.base.model, AdapterSpec(rank=2, magnitude=True))
    with pytest.raises(InputError, match="in place"):
        slide(replace(bare, attached=dora), [1.0], rows, rows, display=QUIET)
