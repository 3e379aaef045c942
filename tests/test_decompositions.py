"""A decomposition per module per command: however many sizes a command tries, each update's SVD is taken once."""

from pathlib import Path

import pytest
import torch

from deltaw.adapter.algebra import energy_shares, resize, resize_global
from deltaw.adapter.attach import attach, detach
from deltaw.adapter.combine import combine
from deltaw.adapter.extract import extract_adapter
from deltaw.adapter.file import Adapter
from deltaw.analysis.compare import compare
from deltaw.analysis.measure import measure_adapter
from deltaw.config import AdapterSpec, DataConfig
from deltaw.data.prepare import prepare
from deltaw.evaluation.budget import resize_to_loss
from deltaw.factors import LowRank
from deltaw.kernels.weight import DenseWeight
from deltaw.kinds import Dense
from deltaw.model import open_model
from deltaw.show.progress import Display
from tests.tiny import tiny_base, words


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all matrices whose singular vectors were asked of torch."""
    shapes: list[tuple[int, ...]] = []
    svd = torch.linalg.svd

    def counted(x: torch.Tensor, full_matrices: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shapes.append(tuple(x.shape))
        u, s, vt = svd(x, full_matrices=full_matrices)
        return u, s, vt

    monkeypatch.setattr(torch.linalg, "svd", counted)
    return shapes


def drawn(modules: int = 3, rank: int = 6, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        f"layers.{i}.q": LowRank(
            torch.randn(rank, 20 + i, generator=generator), torch.randn(30, rank, generator=generator), 2.0
        )
        for i in range(modules)
    }
    return Adapter(AdapterSpec(rank=rank, alpha=2.0 * rank, targets=("q",)), factors)


def test_sizes_of_one_adapter_share_its_decompositions(taken: list) -> None:
    adapter = drawn()
    energy_shares(adapter)
    for rank in (1, 3, 6):
        resize(adapter, rank=rank)
    for energy in (0.5, 0.9):
        resize(adapter, energy=energy)
        resize_global(adapter, energy)
    assert len(taken) == 3


def test_each_value_has_its_own(taken: list) -> None:
    update = drawn(1).factors["layers.0.q"].low_rank()
    doubled = update.times(2.0)
    torch.testing.assert_close(2 * update.wide_svd[1], doubled.wide_svd[1])
    assert len(taken) == 2


def test_a_sum_is_decomposed_once(taken: list) -> None:
    combine([drawn(), drawn(seed=1)], [0.5, 2.0], energy=0.9)
    assert len(taken) == 3


def test_full_fine_tuning_is_decomposed_once(taken: list) -> None:
    deltas = {f"layers.{i}.q": Dense(torch.randn(12, 10)) for i in range(3)}
    extract_adapter(Adapter(AdapterSpec(full=True), deltas), energy=0.9)
    assert len(taken) == 3


def test_looking_at_an_update_decomposes_it_once(taken: list) -> None:
    adapter = drawn()
    measure_adapter(adapter, None)
    assert len(taken) == 3
    weights = {path: DenseWeight(torch.randn(update.shape)) for path, update in adapter.factors.items()}
    taken.clear()
    measure_adapter(adapter, weights)
    assert [min(shape) for shape in taken].count(6) == 3  # beside what is asked of W and W'


def test_comparing_decomposes_each_side_once(taken: list) -> None:
    compare(drawn(), drawn(seed=1))
    assert len([shape for shape in taken if shape == (6, 6)]) == 6


def test_a_size_by_its_loss_costs_one_decomposition_per_module(taken: list, tmp_path: Path) -> None:
    tiny_base(tmp_path / "base")
    words(tmp_path / "rows.jsonl", 4)
    model = open_model(tmp_path / "base", dtype="float32")
    attached = attach(model.base.model, AdapterSpec(rank=4, alpha=4))
    for layer in attached.layers.values():
        m, n = layer.factors().shape
        layer.set_factors(LowRank(torch.randn(4, n), 0.01 * torch.randn(m, 4)))
    adapter = detach(attached, model.id)
    rows = list(prepare(DataConfig(train=str(tmp_path / "rows.jsonl")), model.renderer).train)
    taken.clear()
    _, trials = resize_to_loss(model, adapter, rows, 0.01, display=Display(quiet=True))
    assert len(trials) > 3 and len(taken) == len(adapter.factors)
