"""Every promised architecture: documents stay apart, an adapter comes and goes, and PEFT reads it the same."""

import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from deltaw.adapter.attach import Attached, attach, detach
from deltaw.adapter.file import Adapter, BaseId
from deltaw.adapter.targets import linear_paths
from deltaw.base.batch import Batch
from deltaw.base.forward import plan_forward
from deltaw.config import AdapterSpec
from deltaw.errors import InputError
from deltaw.kernels.logprobs import IGNORE
from tests.architectures import PACKED, PADDED, tiny

ALL = [*PACKED, *PADDED]
SPEC = AdapterSpec(rank=2, alpha=5.0)
LENGTHS = (9, 1, 14, 6, 9)
STARTS = torch.tensor([0, *LENGTHS]).cumsum(0)


def batch() -> tuple[Tensor, Tensor]:
    """(tokens, labels already shifted): the last token of each document has no label, and some others."""
    tokens = torch.randint(3, 97, (sum(LENGTHS),))
    labels = tokens.roll(-1)
    labels[STARTS[1:] - 1] = IGNORE
    labels[torch.rand(len(labels)) < 0.3] = IGNORE
    return tokens, labels


def adapted(name: str) -> Attached:
    """A tiny model with a random update on every linear layer, large enough to change its answers."""
    attached = attach(tiny(name), SPEC)
    with torch.no_grad():
        for parameter in attached.parameters:
            parameter.normal_(std=0.3)
    return attached


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    tokens = (torch.arange(24).view(2, 12) * 7) % 97
    return model(input_ids=tokens, use_cache=False).logits


def close(got: Tensor, wanted: Tensor, share: float = 1e-4) -> bool:
    """Whether two float32 computations of one number differ by rounding only."""
    return bool((got - wanted).abs().max() <= share * wanted.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_the_plan_packs_what_keeps_documents_apart_and_nothing_else(name: str, dtype: torch.dtype) -> None:
    forward = plan_forward(tiny(name, dtype))
    assert forward.packed == (name in PACKED)
    assert ("packed" if forward.packed else "padded") in forward.describe().split()[0]


@pytest.mark.parametrize("name", ALL)
def test_documents_together_and_apart_give_one_loss_and_gradient(name: str) -> None:
    """Together: deltaw's attention and head. Apart: the untouched model's own, one document at a time."""
    tokens, labels = batch()
    alone = adapted(name)
    truth = torch.zeros(())
    for start, end in pairwise(STARTS.tolist()):
        own = alone.model(input_ids=tokens[None, start:end], use_cache=False).logits[0]
        truth = truth + F.cross_entropy(own, labels[start:end], ignore_index=IGNORE, reduction="sum")
    truth.backward()

    together = adapted(name)
    for parameter, other in zip(together.parameters, alone.parameters, strict=True):
        parameter.data.copy_(other.data)
    loss, count = plan_forward(together.model).loss(Batch.of(tokens, STARTS.tolist(), labels))
    loss.backward()

    assert count == int((labels != IGNORE).sum())
    assert close(loss.detach(), truth.detach(), 1e-5)
    for (path, layer), other in zip(together.layers.items(), alone.layers.values(), strict=True):
        assert other.lora_a.grad.any() and other.lora_b.grad.any(), path
        assert close(layer.lora_a.grad, other.lora_a.grad), path
        assert close(layer.lora_b.grad, other.lora_b.grad), path


@pytest.mark.parametrize("name", ALL)
def test_trained_saved_and_loaded_it_answers_the_same_here_and_in_peft(name: str, tmp_path: Path) -> None:
    tokens, labels = batch()
    model = tiny(name)
    plain = logits(model)
    attached = attach(model, SPEC, fuse=())
    assert torch.equal(logits(model), plain)  # to the bit with the model's own modules,
    detach(attached)
    attached = attach(model, SPEC)
    assert close(logits(model), plain)  # to rounding with the kernels' stand-ins
    forward = plan_forward(model)
    optimizer = torch.optim.AdamW(attached.parameters, lr=0.05)
    losses = []
    for _ in range(3):
        loss, count = forward.loss(Batch.of(tokens, STARTS.tolist(), labels))
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    attached.adapter(BaseId(name="tiny")).save(tmp_path)
    learnt = logits(model)

    again = attach(tiny(name), Adapter.load(tmp_path))
    assert again.paths == attached.paths and again.spec == attached.spec
    plan_forward(again.model)  # the same attention, so that the bits are comparable
    assert torch.equal(logits(again.model), learnt)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's way to say that keys are missing
        peft = PeftModel.from_pretrained(tiny(name), tmp_path).eval()
    assert close(logits(peft), learnt)
    assert not close(learnt, plain, 0.01)


@pytest.mark.parametrize("name", ALL)
def test_detach_gives_back_the_very_same_base(name: str) -> None:
    model = tiny(name)
    modules, bits = dict(model.named_modules()), {k: v.clone() for k, v in model.state_dict().items()}
    attached = attach(model, SPEC)
    tokens, labels = batch()
    plan_forward(model).loss(Batch.of(tokens, STARTS.tolist(), labels))[0].backward()
    with torch.no_grad():
        for parameter in attached.parameters:
            parameter.normal_()
    adapter = detach(attached, BaseId(name="tiny"))
    after = dict(model.named_modules())
    assert modules.keys() == after.keys() and all(after[path] is modules[path] for path in modules)
    assert all(torch.equal(value, bits[key]) for key, value in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert set(adapter.factors) == set(linear_paths(model)) and adapter.base.name == "tiny"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_disabled_is_the_base_for_the_length_of_the_block(name: str) -> None:
    attached = adapted(name)
    learnt = logits(attached.model)
    with attached.disabled():
        assert torch.equal(logits(attached.model), logits(tiny(name)))
    assert torch.equal(logits(attached.model), learnt)


def test_a_failed_attach_leaves_the_model_alone() -> None:
    adapter = adapted("llama").adapter(BaseId())
    model = tiny("llama")
    path, last = list(adapter.factors.items())[-1]
    with pytest.raises(InputError, match="update is"):
        attach(
            model, Adapter(adapter.spec, {**adapter.factors, path: type(last)(last.a_RN, last.b_MR[1:], last.scale)})
        )
    attach(model, SPEC)


def test_one_seed_makes_one_adapter() -> None:
    def drawn(seed: int) -> list[Tensor]:
        return attach(tiny("llama"), SPEC, generator=torch.Generator().manual_seed(seed)).parameters

    torch.manual_seed(1)
    first = drawn(7)
    assert all(torch.equal(a, b) for a, b in zip(first, drawn(7), strict=True))
    assert not torch.equal(first[0], drawn(8)[0])


@pytest.mark.parametrize(
    ("name", "experts", "router"),
    [
        ("qwen3_moe", ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"), "mlp.gate"),
        ("gpt_oss", ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"), "mlp.router"),
    ],
)
def test_experts_and_router_that_stay_as_they_are_are_named(name: str, experts: tuple, router: str) -> None:
    unmatched = attach(tiny(name), SPEC).unmatched
    assert {f"model.layers.{i}.{part}" for i in range(2) for part in (*experts, router)} <= set(unmatched)


@pytest.mark.parametrize("name", sorted(set(PACKED) - {"qwen3_moe"}))
def test_nothing_else_is_left_out_by_all_linear(name: str) -> None:
    assert attach(tiny(name), SPEC).unmatched == ()
