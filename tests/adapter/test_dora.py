"""DoRA's layer: the suite of every layer, and PEFT's numbers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltaw.adapter.attach import Attached, attach, detach
from deltaw.adapter.dora import DoRAUpdate
from deltaw.adapter.file import Adapter, BaseId
from deltaw.base.forward import plan_forward
from deltaw.base.frozen import FrozenLinear
from deltaw.config import AdapterSpec
from deltaw.factors import LowRank
from deltaw.kernels.weight import DenseWeight
from deltaw.kinds import Dense, DoRA
from tests.adapter.test_layer import KINDS, SCALE, M, N, R, bits, plain, rows, same
from tests.architectures import tiny

SPEC = AdapterSpec(rank=R, alpha=5.0, magnitude=True)
IDS = torch.arange(16).view(2, 8) * 7 % 97


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0].__name__}-{kind[1]}-{kind[2]}")
def base(request: pytest.FixtureRequest) -> nn.Module:
    return plain(*request.param)


def fresh(base: nn.Module, dropout: float = 0.0) -> DoRAUpdate:
    """As `attach` makes it: A random, B zero, m = ‖W‖."""
    layer = DoRAUpdate(FrozenLinear(base), R, SCALE, dropout)
    layer.start(torch.randn(R, N), torch.zeros(M, R))
    return layer


def trained(base: nn.Module, dropout: float = 0.0) -> DoRAUpdate:
    layer = fresh(base, dropout)
    layer.set_factors(DoRA(LowRank(torch.randn(R, N), torch.randn(M, R), SCALE), 0.5 + torch.rand(M)))
    return layer


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_fresh_layer_is_the_base_to_the_bit(base: nn.Module, dropout: float) -> None:
    x = rows(base)
    assert torch.equal(fresh(base, dropout).train()(x), base(x))
    assert torch.equal(fresh(base).fuse().weight, base.weight)


def test_a_row_of_zeros_stays_as_it_is() -> None:
    base = plain(nn.Linear, True, torch.float32)
    base.weight[2] = 0
    layer, x = fresh(base), rows(base)
    assert torch.equal(layer(x), base(x))
    for lora_b in (torch.zeros(M, R), torch.randn(M, R)):
        layer.lora_b.data.copy_(lora_b)
        out = layer(x)
        out.square().sum().backward()
        torch.testing.assert_close(out[..., 2], base(x)[..., 2])
    assert all(torch.isfinite(p.grad).all() for p in layer.trained().values())


def test_only_factors_and_magnitudes_learn_and_the_base_keeps_its_bits(base: nn.Module) -> None:
    before, layer, x = bits(base), trained(base), rows(base)
    names = {"lora_a", "lora_b", "magnitude"}
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == names
    start = layer.factors()
    optimizer = torch.optim.AdamW(layer.trained().values(), lr=0.1)
    for _ in range(3):
        layer(x).float().square().sum().backward()
        optimizer.step()
    assert all(p.dtype == torch.float32 for p in layer.trained().values())
    assert not torch.equal(start.low.a_RN, layer.lora_a) and not torch.equal(start.magnitude_M, layer.magnitude)
    assert all(p.grad is None for p in base.parameters())
    assert layer.base.module is base and same(before, base)


def test_factors_are_copies_and_go_back_in(base: nn.Module) -> None:
    layer, other, x = trained(base), fresh(base), rows(base)
    update = layer.factors()
    other.set_factors(update)
    assert torch.equal(other(x), layer(x)) and other.scale == layer.scale
    kept = layer.magnitude.detach().clone()
    update.magnitude_M.zero_()
    assert torch.equal(layer.magnitude, kept)


def test_another_kind_or_shape_or_start_is_refused() -> None:
    layer = fresh(plain(nn.Linear, True, torch.float32))
    with pytest.raises(ValueError, match="does not fit a DoRA layer"):
        layer.set_factors(LowRank(torch.zeros(R, N), torch.zeros(M, R)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layer takes rank=3"):
        layer.set_factors(DoRA(LowRank(torch.zeros(2, N), torch.zeros(M, 2)), torch.ones(M)))
    with pytest.raises(ValueError, match="B = 0"):
        layer.start(torch.ones(R, N), torch.ones(M, R))


def test_a_fused_layer_computes_what_the_layer_computes() -> None:
    for kind in (nn.Linear, Conv1D):
        base = plain(kind, True, torch.float32)
        layer, x = trained(base), rows(base)
        fused = layer.fuse()
        torch.testing.assert_close(fused(x), layer(x), rtol=1e-5, atol=1e-5)
        lengths_M = FrozenLinear(fused).weight.dense().norm(dim=1)  # what m says
        torch.testing.assert_close(lengths_M, layer.magnitude.detach())
        assert type(fused) is kind and not torch.equal(fused.weight, base.weight)


def test_dropout_is_random_in_training_and_off_in_eval(base: nn.Module) -> None:
    layer, x = trained(base, dropout=0.5), rows(base)
    assert not torch.equal(layer.train()(x), layer(x))
    without = trained(base)
    without.set_factors(layer.factors())
    assert torch.equal(layer.eval()(x), without(x))


def test_disabled_it_is_the_base(base: nn.Module) -> None:
    layer, x = trained(base), rows(base)
    layer.enabled = False
    assert torch.equal(layer(x), base(x))
    layer.enabled = True
    assert not torch.equal(layer(x), base(x))


# Against PEFT


def peft_layer(base: nn.Module, layer: DoRAUpdate) -> Any:
    """PEFT's DoRA on the same base with the same numbers."""
    config = LoraConfig(
        r=R,
        lora_alpha=R * SCALE,
        target_modules=["proj"],
        use_dora=True,
        lora_dropout=layer.dropout,
        fan_in_fan_out=isinstance(base, Conv1D),
    )
    model: Any = inject_adapter_in_model(config, nn.ModuleDict({"proj": copy.deepcopy(base)}))
    for mine, theirs in zip(layer.trained().values(), learnt(model["proj"]), strict=True):
        theirs.data = mine.detach().to(theirs.dtype).clone()
    return model["proj"]


def learnt(module: Any) -> list[nn.Parameter]:
    """A, B and m of one of PEFT's layers."""
    parts = (module.lora_A, module.lora_B, module.lora_magnitude_vector)
    return [part["default"].weight for part in parts]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_output_and_gradients_are_pefts_in_float64(kind: type[nn.Module], bias: bool, dropout: float) -> None:
    base = plain(kind, bias, torch.float64)
    layer = trained(base, dropout).double().train()
    theirs, x = peft_layer(base, layer).train(), torch.randn(5, N, dtype=torch.float64)
    outputs, gradients = [], []
    for module, parameters in ((layer, layer.trained().values()), (theirs, learnt(theirs))):
        torch.manual_seed(0)  # the same mask
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        (out * torch.linspace(-1, 1, M)).square().sum().backward()
        outputs.append(out)
        gradients.append([leaf.grad, *(p.grad for p in parameters)])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)
    assert gradients[0][3].abs().min() > 1e-6  # m's is none of rounding


def test_in_bfloat16_it_is_no_farther_from_the_truth_than_peft() -> None:
    base = plain(nn.Linear, True, torch.bfloat16)
    layer = trained(base)
    layer.lora_b.data.mul_(0.1)
    truth = copy.deepcopy(layer).double()
    truth.base.double()
    x = torch.randn(200, N).bfloat16()
    exact = truth(x.double())
    mine, theirs = (module(x).double() for module in (layer, peft_layer(base, layer)))
    # PEFT makes the norms in bfloat16, too; two of the output's own roundings on top of its error.
    assert (mine - exact).norm() <= (theirs - exact).norm() + 2 * 2**-9 * exact.norm()


def made(name: str, fuse: tuple[str, ...] = ()) -> Attached:
    attached = attach(tiny(name), SPEC, fuse=fuse)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in attached.layers.values():
            assert isinstance(layer, DoRAUpdate)
            layer.lora_b.copy_(torch.randn(layer.lora_b.shape, generator=generator) * 0.3)
            layer.magnitude.mul_(torch.rand(layer.magnitude.shape, generator=generator) + 0.5)
    return attached


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_peft_reads_the_file_with_the_same_logits_and_gradients(name: str, tmp_path: Path) -> None:
    attached = made(name)
    attached.adapter(BaseId()).save(tmp_path)
    peft: Any = PeftModel.from_pretrained(tiny(name), tmp_path, is_trainable=True).eval()
    grads = []
    for model in (attached.model, peft):
        logits = model(input_ids=IDS, use_cache=False).logits
        logits.square().mean().backward()
        grads.append(logits.detach())
    assert (grads[0] - grads[1]).abs().max() <= 1e-4 * grads[1].abs().max()
    assert (grads[0] - tiny(name)(input_ids=IDS).logits).abs().max() > 0.01 * grads[1].abs().max()
    for path, layer in attached.layers.items():
        module = peft.get_submodule(f"base_model.model.{path}")
        for mine, other in zip(layer.trained().values(), learnt(module), strict=True):
            assert (mine.grad - other.grad).abs().max() <= 1e-3 * other.grad.abs().max(), path
            assert other.grad.any()


def test_what_peft_made_fresh_is_the_base_here(tmp_path: Path) -> None:
    """m = ‖W‖ comes from PEFT's own sums, so the output is the base's to their rounding."""
    config = LoraConfig(r=R, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM")
    get_peft_model(tiny("llama"), config).save_pretrained(tmp_path)
    adapter = Adapter.load(tmp_path)
    assert adapter.spec.magnitude
    logits, plain_logits = (
        model(input_ids=IDS).logits for model in (attach(tiny("llama"), adapter).model, tiny("llama"))
    )
    torch.testing.assert_close(logits, plain_logits, rtol=1e-4, atol=1e-4)


# In a model


def test_saved_and_loaded_it_computes_the_same_and_off_again_nothing_changed(tmp_path: Path) -> None:
    attached = made("llama")
    out = attached.model(input_ids=IDS).logits
    adapter = detach(attached)
    assert same(bits(tiny("llama")), attached.model)
    sizes = [(layer.out_features, layer.in_features) for _, layer in frozen(tiny("llama"))]
    assert adapter.parameters == sum(R * (m + n) + m for m, n in sizes)
    back = Adapter.load(adapter.save(tmp_path))
    assert back.spec == adapter.spec and back.spec.magnitude
    assert torch.equal(attach(tiny("llama"), back, fuse=()).model(input_ids=IDS).logits, out)
    assert "DoRA adapter" in (tmp_path / "README.md").read_text()


def frozen(model: nn.Module) -> list[tuple[str, FrozenLinear]]:
    named = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [(path, FrozenLinear(module)) for path, module in named if path != "lm_head"]


def test_attached_fresh_is_the_base_to_the_bit_and_attention_and_mlp_keep_their_own_code() -> None:
    model = tiny("llama")
    plan_forward(model)
    before = model(input_ids=IDS).logits
    attached = attach(model, SPEC)
    assert attached.describe() == "fused 5 norms"
    detach(attached)
    attach(model, SPEC, fuse=())
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_an_adapter_of_another_kind_than_its_spec_is_not_saved(tmp_path: Path) -> None:
    low = LowRank(torch.ones(R, N), torch.ones(M, R), SPEC.scale("p"))
    for spec, update in ((SPEC, low), (SPEC.model_copy(update={"magnitude": False}), DoRA(low, torch.ones(M)))):
        with pytest.raises(ValueError, match="spec"):
            Adapter(spec, {"p": update}).save(tmp_path)


def test_relative_to_is_what_the_layer_adds() -> None:
    base = plain(nn.Linear, False, torch.float32)
    layer, x = trained(base), torch.randn(7, N)
    delta = layer.factors().relative_to(DenseWeight(base.weight))
    assert isinstance(delta, Dense)
    torch.testing.assert_close(base(x) + delta.apply(x), layer(x).detach(), rtol=1e-5, atol=1e-5)


def test_gradients_by_hand() -> None:
    """∂L/∂mᵢ = Σ Gᵢ (V x)ᵢ / ‖vᵢ‖, by hand; the norm is a constant to A and B."""
    layer = trained(plain(nn.Linear, True, torch.float64)).double()
    x, g = torch.randn(5, N, dtype=torch.float64), torch.randn(5, M, dtype=torch.float64)
    layer(x).backward(g)
    with torch.no_grad():
        v = layer.base.weight.dense() + SCALE * layer.lora_b @ layer.lora_a
        unit = v / v.norm(dim=1, keepdim=True)
        torch.testing.assert_close(layer.magnitude.grad, (g * (x @ unit.T)).sum(0))
        gain = layer.magnitude / v.norm(dim=1)
        torch.testing.assert_close(layer.lora_b.grad, SCALE * (g * gain).T @ (x @ layer.lora_a.T))
        torch.testing.assert_close(layer.lora_a.grad, SCALE * ((g * gain) @ layer.lora_b).T @ x)


def test_tensors_of_the_file_are_pefts(tmp_path: Path) -> None:
    config = LoraConfig(r=R, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM")
    get_peft_model(tiny("llama"), config).save_pretrained(tmp_path / "theirs")
    made("llama").adapter(BaseId()).save(tmp_path / "mine")
    mine, theirs = (
        {k: v.shape for k, v in load_file(tmp_path / f / "adapter_model.safetensors").items()}
        for f in ("mine", "theirs")
    )
    assert mine == theirs
