"""An objective sees the log-probabilities that the model's own logits give, and its gradients are those of autograd.

In float64 where the model can, since a preference is the small difference of large sums.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.adapter.attach import Attached, attach
from deltaw.base.batch import Batch
from deltaw.base.forward import APART, PACKED, PADDED, Forward, plan_forward
from deltaw.base.head import find_head
from deltaw.base.objective import Objective, sft
from deltaw.config import AdapterSpec
from deltaw.kernels.logprobs import IGNORE, Logprobs
from tests.architectures import tiny
from tests.halves import HalvesLinear

LENGTHS = (9, 1, 14, 6, 9, 5)
STARTS = [sum(LENGTHS[:n]) for n in range(len(LENGTHS) + 1)]
SINGLE = ("qwen3_moe", "mamba")  # grouped products, and logits in float32 whatever the model's dtype
WEIGHTS = (0.5, 3.0, 0.0, 1.0, -2.0, 0.25)


def batch(**more: Any) -> Batch:
    """Six documents, the second without a label."""
    tokens = torch.randint(3, 97, (sum(LENGTHS),))
    labels = tokens.roll(-1)
    labels[torch.tensor(STARTS[1:]) - 1] = IGNORE
    labels[torch.rand(len(labels)) < 0.3] = IGNORE
    return Batch.of(tokens, STARTS, labels, **more)


def adapted(name: str) -> Attached:
    attached = attach(tiny(name, torch.float32 if name in SINGLE else torch.float64), AdapterSpec(rank=2, alpha=5.0))
    with torch.no_grad():
        for parameter in attached.parameters:
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return attached


def plain_by_document(model: nn.Module, given: Batch) -> Tensor:
    """Σ logp of each document, through the model's own logits, one document at a time."""
    sums = []
    for start, end in pairwise(given.starts):
        logp_TV = model(input_ids=given.tokens_T[None, start:end], use_cache=False).logits[0].log_softmax(-1)
        labels_T = given.labels_T[start:end]
        sums.append(logp_TV.gather(1, labels_T.clamp(min=0)[:, None])[labels_T != IGNORE].sum())
    return torch.stack(sums)


def preferred(ratio_D: Tensor) -> Tensor:
    """The loss of pairs of documents, the first of each preferred (DPO, Rafailov et al. 2023, eq. 7)."""
    return -F.logsigmoid(ratio_D[0::2] - ratio_D[1::2]).sum()


@dataclass(frozen=True)
class Preference(Objective):
    """That loss against a reference."""

    reference_K: Tensor

    def __call__(self, logprobs: Logprobs, batch: Batch) -> Tensor:
        return preferred(batch.by_document(logprobs.logp_K - self.reference_K))

    def count(self, batch: Batch) -> int:
        return (len(batch.starts) - 1) // 2


def gradients(loss: Tensor, attached: Attached) -> list[Tensor]:
    return list(torch.autograd.grad(loss, attached.parameters))


def assert_close(got: list[Tensor], wanted: list[Tensor], share: float = 1e-5) -> None:
    for g, w in zip(got, wanted, strict=True):
        assert w.any()
        assert (g - w).abs().max() <= share * w.abs().max()


def check_preference(attached: Attached, forward: Forward) -> None:
    given = batch()
    with torch.no_grad(), attached.disabled():
        plain_reference_D = plain_by_document(attached.model, given)
        reference_K = forward.logprobs(given)
    torch.testing.assert_close(given.by_document(reference_K), plain_reference_D, rtol=1e-5, atol=1e-5)
    truth = preferred(plain_by_document(attached.model, given) - plain_reference_D)
    loss, count = forward.loss(given, Preference(reference_K))
    assert count == 3 and len(reference_K) == given.supervised
    assert abs(float(loss.detach()) - 3 * 0.6931) > 0.02  # the adapter's answers aren't the base's
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-5)
    share = 1e-5 if loss.dtype == torch.float64 else 1e-3
    assert_close(gradients(loss, attached), gradients(truth, attached), share)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3_moe", "bloom", "mamba"])
def test_a_preference_has_the_gradients_of_plain_logits(name: str) -> None:
    attached = adapted(name)
    check_preference(attached, plan_forward(attached.model))


@pytest.mark.parametrize("way", [PACKED, PADDED, APART])
@pytest.mark.parametrize("own_head", [False, True])
def test_a_preference_has_them_however_the_model_is_run(way: str, own_head: bool) -> None:
    attached = adapted("llama")
    planned = plan_forward(attached.model)
    if way != PACKED:
        attached.model.set_attn_implementation("sdpa")
    check_preference(attached, Forward(attached.model, None if own_head else find_head(attached.model), way))
    assert planned.packed


def test_a_preference_has_them_under_a_head_that_brings_its_weight() -> None:
    attached = adapted("llama")
    attached.model.lm_head = HalvesLinear(attached.model.lm_head)
    forward = plan_forward(attached.model)
    assert forward.head is not None and forward.head.module is attached.model.lm_head
    check_preference(attached, forward)


@pytest.mark.parametrize("own_head", [False, True])
def test_sft_weighs_documents_as_the_batch_says(own_head: bool) -> None:
    attached = adapted("llama")
    forward = plan_forward(attached.model)
    if own_head:
        forward = Forward(attached.model, None, PACKED)
    given = batch(weights=WEIGHTS)
    truth = -(torch.tensor(WEIGHTS, dtype=torch.float64) * plain_by_document(attached.model, given)).sum()
    loss, count = forward.loss(given)
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-5)
    assert count == given.supervised
    assert_close(gradients(loss, attached), gradients(truth, attached))


def test_weights_of_one_are_no_weights() -> None:
    attached = adapted("llama")
    forward = plan_forward(attached.model)
    torch.manual_seed(1)
    plain, _ = forward.loss(batch())
    torch.manual_seed(1)
    weighted, _ = forward.loss(batch(weights=(1.0,) * len(LENGTHS)))
    torch.testing.assert_close(weighted, plain)
    assert all(map(torch.equal, gradients(weighted, attached), gradients(plain, attached)))


def test_values_of_labels_are_summed_by_document() -> None:
    given = batch()
    values = torch.arange(given.supervised, dtype=torch.float64, requires_grad=True)
    wanted, rest = [], list(range(given.supervised))
    for start, end in pairwise(STARTS):
        count = int((given.labels_T[start:end] != IGNORE).sum())
        wanted.append(float(sum(rest[:count])))
        rest = rest[count:]
    sums = given.by_document(values)
    assert sums.tolist() == wanted and wanted[1] == 0
    sums.sum().backward()
    assert values.grad is not None and (values.grad == 1).all()


@pytest.mark.parametrize("objective", [sft, Preference(torch.zeros(0))])
def test_no_label_runs_no_model(objective: Any) -> None:
    attached = adapted("llama")
    forward = plan_forward(attached.model)
    attached.model.get_input_embeddings().register_forward_hook(lambda *_: pytest.fail("the model ran"))
    given = Batch.of(torch.arange(3, 7), [0, 2, 4])
    loss, count = forward.loss(given, objective)
    assert count == objective.count(given) and len(forward.logprobs(given)) == 0
    assert float(loss) == pytest.approx(0.0 if objective is sft else 0.6931, abs=1e-4)
