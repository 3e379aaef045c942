"""A packed model on examples that share prefixes gives the loss and the gradients of the same examples unshared."""

import random

import pytest
import torch
from torch import Tensor, nn

from deltaw.adapter.attach import attach
from deltaw.base.batch import Batch
from deltaw.base.forward import Forward, plan_forward
from deltaw.config import AdapterSpec
from deltaw.kernels.logprobs import IGNORE
from tests.architectures import PACKED, PADDED, tiny
from tests.every_causal_type import build
from tests.kernels.test_shared import random_tree


def batch_of(seed: int, weights: bool = False) -> Batch:
    """Random documents, some of which continue others, with labels anywhere but at an example's end."""
    starts, parents = random_tree(seed, documents=9, longest=9)
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    tokens_T = torch.randint(3, 97, (starts[-1],), generator=generator)
    labels_T = torch.where(torch.rand(starts[-1], generator=generator) < 0.6, tokens_T.flip(0), IGNORE)
    batch = Batch.of(tokens_T, starts, labels_T, parents=parents)
    given = [draw.choice([0.0, 0.5, 1.0, 3.0]) for _ in range(batch.examples)] if weights else ()
    return Batch.of(tokens_T, starts, labels_T, parents=parents, weights=given)


def run(forward: Forward, batch: Batch, trained: list[Tensor]) -> list[Tensor]:
    loss, count = forward.loss(batch)
    assert count == batch.supervised
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


def adapted(name: str, dtype: torch.dtype) -> tuple[nn.Module, list[Tensor]]:
    model = tiny(name, dtype)
    torch.manual_seed(1)
    attached = attach(model, AdapterSpec(rank=3, alpha=6))
    with torch.no_grad():
        for parameter in attached.parameters:
            parameter.normal_(std=0.3)
    return model, list(attached.parameters)


@pytest.mark.parametrize("name", list(PACKED))
def test_loss_and_gradients_are_those_of_the_unshared_batch(name: str) -> None:
    for dtype, close in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        if name == "qwen3_moe" and dtype == torch.float64:
            continue  # its grouped products know no float64
        model, trained = adapted(name, dtype)
        forward = plan_forward(model)
        assert forward.packed
        for seed in range(2):
            batch = batch_of(seed, weights=seed % 2 == 1)
            assert batch.documents.tree is not None
            shared, plain = run(forward, batch, trained), run(forward, batch.unshared(), trained)
            for mine, theirs in zip(shared, plain, strict=True):
                assert (mine - theirs).norm() <= close * theirs.norm() + 1e-12, (name, dtype, seed)


@pytest.mark.parametrize("name", ["gptj", *PADDED])
def test_a_model_that_cannot_share_is_found_out_and_refuses(name: str) -> None:
    """gptj is packed by code of its own, which takes a position that starts over for a new document."""
    forward = plan_forward(build(name) if name == "gptj" else tiny(name))
    assert forward.packed == (name == "gptj") and not forward.shares
    with pytest.raises(ValueError):
        forward.loss(batch_of(0))
    assert forward.loss(batch_of(0).unshared())[0].isfinite()
