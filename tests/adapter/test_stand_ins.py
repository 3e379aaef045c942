"""Stand-ins: every one gives what the module it stands for gives, and only such a module gets one."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from deltaw.adapter.attach import Attached, attach, detach
from deltaw.adapter.stand_ins import KINDS, FusedAttention, FusedMLP, FusedNorm
from deltaw.base.batch import Batch
from deltaw.base.forward import plan_forward
from deltaw.base.stand_in import StandIn
from deltaw.config import AdapterSpec
from tests.architectures import COMMON, PADDED, tiny

STARTS = torch.tensor([0, 6, 7, 18])
TOKENS = (torch.arange(18) * 31 + 5) % 97
LABELS = TOKENS.roll(-1)
SPEC = AdapterSpec(rank=4, alpha=8)
# norms, attention blocks, MLPs of two layers (and the last norm)
EXPECTED = {
    "llama": (5, 2, 2),
    "mistral": (5, 2, 2),
    "qwen2": (5, 2, 2),
    "qwen3": (9, 2, 2),
    "gemma2": (9, 2, 2),
    "gemma3_text": (13, 2, 2),
    "phi3": (5, 0, 0),  # q, k, v are one layer, and so are gate and up
    "gpt2": (0, 0, 0),
    "gpt_neox": (0, 0, 0),
    "olmo2": (9, 2, 2),
    "qwen3_moe": (9, 2, 0),  # experts are no linear layers
}


def adapted(name: str, fuse: tuple[str, ...], dtype: torch.dtype = torch.float32, spec: AdapterSpec = SPEC) -> Attached:
    """A tiny model with an update that matters, on the path that `plan_forward` finds."""
    model = tiny(name, dtype)
    plan_forward(model)
    attached = attach(model, spec, fuse=fuse)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in attached.parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return attached


def loss_and_gradients(attached: Attached) -> list[Tensor]:
    loss, _ = plan_forward(attached.model).loss(Batch.of(TOKENS, STARTS.tolist(), LABELS))
    loss.backward()
    return [loss.detach(), *(p.grad for p in attached.parameters)]


@cache
def its_own(name: str, dtype: torch.dtype = torch.float32) -> Sequence[Tensor]:
    """What the model's own code gives, whatever is then fused: once."""
    return loss_and_gradients(adapted(name, (), dtype))


def counts(attached: Attached) -> tuple[int, ...]:
    kinds = (FusedNorm, FusedAttention, FusedMLP)
    return tuple(sum(isinstance(s, kind) for s in attached.stand_ins.values()) for kind in kinds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EXPECTED)
def test_what_stands_in(name: str, dtype: torch.dtype) -> None:
    attached = adapted(name, KINDS, dtype)
    assert counts(attached) == EXPECTED[name]
    words = attached.describe()
    assert words == "not fused" if not any(EXPECTED[name]) else str(EXPECTED[name][0]) in words


@pytest.mark.parametrize("fuse", [("norm",), ("attention",), ("mlp",), KINDS], ids=lambda f: "+".join(f))
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2"])
def test_loss_and_gradients_are_the_models_own(name: str, fuse: tuple[str, ...]) -> None:
    """|fused − truth| ≤ 2 |own − truth| + rounding, truth being the model's own code in float64."""
    own, truth = its_own(name), its_own(name, torch.float64)
    mine = loss_and_gradients(adapted(name, fuse))
    for o, m, t in zip(own, mine, truth, strict=True):
        error, bound = (m - t).abs().max(), (o - t).abs().max()
        # Rounding errors of two orders of summation are alike in size, not equal: hence the 2, and a few roundings.
        assert error <= 2 * bound + 16 * torch.finfo(torch.float32).eps * t.abs().max()


@pytest.mark.parametrize(
    ("name", "targets"), [("qwen2", ("q_proj", "v_proj", "down_proj")), ("qwen3_moe", ("q_proj", "o_proj"))]
)
def test_adapted_in_part(name: str, targets: tuple[str, ...]) -> None:
    """Projections with and without an update in one block. (Experts have no float64 to compare with.)"""
    spec = SPEC.model_copy(update={"targets": targets})
    own, mine = (loss_and_gradients(adapted(name, fuse, spec=spec)) for fuse in ((), KINDS))
    assert counts(adapted(name, KINDS, spec=spec)) == EXPECTED[name]
    assert all(
        torch.allclose(m, o, rtol=1e-3, atol=1e-5 * float(o.abs().max())) for m, o in zip(mine, own, strict=True)
    )


def test_dropout_keeps_the_layers_own_forward() -> None:
    assert counts(adapted("llama", KINDS, spec=SPEC.model_copy(update={"dropout": 0.1}))) == (5, 0, 0)


def test_padded_models_keep_their_attention() -> None:
    for name in PADDED:
        assert counts(adapted(name, KINDS))[1] == 0


class _Scaled(nn.Module):
    """A gated MLP that does one thing more: its parts are those of any other."""

    def __init__(self, mlp: Any, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("factor", [1.5, 1.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_that_does_something_else_is_left_alone(dtype: torch.dtype, factor: float) -> None:
    model = tiny("llama", dtype)
    layer = model.model.layers[0]
    layer.mlp = _Scaled(layer.mlp, factor)
    plan_forward(model)
    attached = attach(model, SPEC)
    assert counts(attached) == (5, 2, 1)
    assert isinstance(layer.mlp, _Scaled)


def test_a_module_of_ones_own_is_adapted_without() -> None:
    model = nn.Sequential(nn.Linear(8, 8), LlamaRMSNorm(8), nn.Linear(8, 8)).requires_grad_(False)
    attached = attach(model, SPEC)
    assert len(attached.layers) == 2 and not attached.stand_ins


def test_a_model_that_tokens_alone_do_not_run_is_adapted_without() -> None:
    model = tiny("llama")
    model.forward = None  # type: ignore[assignment]
    assert not attach(model, SPEC).stand_ins


def test_what_a_layer_asks_of_attention_is_taken_from_its_call() -> None:
    model = tiny("llama")
    model.model.layers[1].self_attn.scaling = 0.125
    plan_forward(model)
    attached = attach(model, SPEC)
    first, second = (s for s in attached.stand_ins.values() if isinstance(s, FusedAttention))
    assert (first.call.scale, second.call.scale) == (8**-0.5, 0.125)
    windows = [s.call.window for s in adapted("gemma2", KINDS).stand_ins.values() if isinstance(s, FusedAttention)]
    assert windows == [4, None]


def test_paths_and_state_are_as_before() -> None:
    model = tiny("llama")
    names, modules = list(model.state_dict()), dict(model.named_modules())
    attached = adapted("llama", KINDS)
    plain = adapted("llama", ())
    assert list(attached.model.state_dict()) == list(plain.model.state_dict())
    plan_forward(model)
    attached = attach(model, SPEC)
    stand_in = model.model.layers[0].mlp
    assert isinstance(stand_in, StandIn) and stand_in.original is modules["model.layers.0.mlp"]
    detach(attached)
    assert list(model.state_dict()) == names
    assert all(module is modules[path] for path, module in model.named_modules())


def test_training_mode_reaches_the_original() -> None:
    attached = adapted("llama", KINDS)
    stand_in = next(iter(attached.stand_ins.values()))
    attached.model.train()
    assert stand_in.training and stand_in.original.training
    attached.model.eval()
    assert not stand_in.training and not stand_in.original.training


def test_disabled_is_the_base_to_the_bit() -> None:
    attached, plain = adapted("qwen3", KINDS), tiny("qwen3")
    plan_forward(plain)
    with attached.disabled(), torch.no_grad():
        mine = attached.model(input_ids=TOKENS[None]).logits
    assert torch.equal(mine, plain(input_ids=TOKENS[None]).logits)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_generation_with_a_cache(name: str) -> None:
    given = {"input_ids": TOKENS[None, :6], "max_new_tokens": 8, "do_sample": False}
    fused, plain = (adapted(name, fuse).model.generate(**given) for fuse in (KINDS, ()))
    assert torch.equal(fused, plain)


def test_a_copy_of_the_model_stands_on_its_own() -> None:
    attached = adapted("llama", KINDS)
    twin = copy.deepcopy(attached.model)
    with torch.no_grad():
        before = twin(input_ids=TOKENS[None]).logits
        for parameter in attached.parameters:
            parameter.zero_()
        assert torch.equal(twin(input_ids=TOKENS[None]).logits, before)


@pytest.mark.parametrize("border", [8, 16384])
def test_a_temperature_by_place_is_seen_however_far_off_it_begins(border: int) -> None:
    """Ministral 3 multiplies its queries by 1 + β log(1 + ⌊place / border⌋) in the attention module's own code."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": border,
            "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5}  # fmt: skip
    options = {**COMMON, "rope_parameters": rope, "max_position_embeddings": 4 * border}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("ministral3", **options)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.mul_(8)
    forward, near = plan_forward(model), Batch.of(TOKENS, STARTS.tolist())
    far = replace(near, positions_T=near.positions_T + 3 * border)
    own = forward.logits(far).clone()
    attached = attach(model, SPEC)
    assert counts(attached) == (5, 0, 2)
    torch.testing.assert_close(forward.logits(far), own, rtol=1e-4, atol=1e-4)
