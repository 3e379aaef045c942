"""A base whose matrices are packed computes what the dense one of the same numbers does."""

import copy

import pytest
import torch
from torch import nn

from deltaw.adapter.attach import attach, detach
from deltaw.base import packed
from deltaw.base.batch import Batch
from deltaw.base.forward import plan_forward
from deltaw.base.limits import Limits
from deltaw.base.packed import PackedEmbedding, PackedLinear, pack_modules
from deltaw.config import AdapterSpec
from deltaw.kernels import packed as kernels
from deltaw.kernels.packed import CastWeight
from tests.architectures import PACKED, PADDED, tiny


@pytest.fixture(params=[*PACKED, *PADDED])
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, nn.Module]:
    """A dense model, and the same one packed."""
    monkeypatch.setattr(packed, "LEAST", 1)
    dense = tiny(request.param, torch.bfloat16)
    model = copy.deepcopy(dense)
    assert pack_modules(model, lambda _, w_MN: CastWeight(w_MN, torch.float32))
    return dense.float(), model.float()


def test_a_packed_model_runs_and_learns_as_the_dense_one(pair: tuple[nn.Module, nn.Module]) -> None:
    tokens_T = torch.randint(3, 97, (24,), generator=torch.Generator().manual_seed(1))
    batch, ways, figures = Batch.of(tokens_T, [0, 9, 24], tokens_T.roll(-1)), [], []
    for model in pair:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        attached = attach(model, AdapterSpec(rank=4), generator=torch.Generator().manual_seed(0))
        forward = plan_forward(model)
        loss, _ = forward.loss(batch)
        loss.backward()
        ways.append((forward.describe(), attached.notes(), attached.paths))
        figures.append([loss.detach(), *(p.grad for p in attached.parameters if p.grad is not None)])
        detach(attached)
        after = model.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert ways[0] == ways[1] and len(figures[0]) == len(figures[1]) > 1
    for one, other in zip(*figures, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


def test_no_whole_matrix_is_unpacked_by_what_a_run_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TILE", 128)
    monkeypatch.setattr(packed, "LEAST", 1)
    sizes: list[int] = []

    class Watched(CastWeight):
        def unpack(self, index: torch.Tensor | slice) -> torch.Tensor:
            rows = super().unpack(index)
            if isinstance(index, slice):  # not the words that are looked up
                sizes.append(len(rows))
            return rows

    model = tiny("llama", torch.bfloat16)
    vocabulary = Limits.of(model).vocabulary
    assert pack_modules(model, lambda _, w_MN: Watched(w_MN, torch.float32))
    model.float()
    assert Limits.of(model).vocabulary == vocabulary is not None
    attached = attach(model, AdapterSpec(rank=4))
    tokens_T = torch.arange(24)
    loss, _ = plan_forward(model).loss(Batch.of(tokens_T, [0, 9, 24], tokens_T.roll(-1)))
    loss.backward()
    detach(attached)
    assert sizes and max(sizes) <= 128 // 4


def test_a_tied_head_is_packed_once_and_counted_once(pair: tuple[nn.Module, nn.Module]) -> None:
    dense, model = pair
    tied = dense.get_output_embeddings().weight is dense.get_input_embeddings().weight  # type: ignore[operator]
    words, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    assert isinstance(head, PackedLinear)
    if tied and isinstance(words, PackedEmbedding):
        assert words.numbers is head.numbers
