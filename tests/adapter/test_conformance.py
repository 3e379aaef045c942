"""One suite for every weight and every kind of update: fresh it is the base, only the adapter learns, the base keeps
its bits, what is saved computes the same when it is loaded, and all of it is the ordinary layer's up to rounding."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, quantize
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaw.adapter.algebra import resize
from deltaw.adapter.attach import Attached, attach, detach
from deltaw.adapter.extract import extract, extract_adapter
from deltaw.adapter.file import Adapter, BaseId
from deltaw.adapter.init_data import initialise_from_data
from deltaw.adapter.targets import linear_paths
from deltaw.analysis.measure import measure_adapter
from deltaw.base.batch import Batch
from deltaw.base.forward import Forward, plan_forward
from deltaw.base.frozen import FrozenLinear, weight_of
from deltaw.base.packed import PackedLinear
from deltaw.base.packing import QUANTISED
from deltaw.config import AdapterSpec
from deltaw.kernels.blocks import FORMATS, BlockWeight, parts_of
from deltaw.kernels.packed import CastWeight
from tests.architectures import tiny
from tests.halves import HalvesLinear, halved, whole

N, M, R = 64, 8, 3  # nf4 takes rows of a multiple of 64
SPECS: dict[str, dict[str, Any]] = {
    "lora": {"rank": R, "alpha": 6},
    "dropout": {"rank": R, "alpha": 6, "dropout": 0.3},
    "dora": {"rank": R, "alpha": 6, "magnitude": True},
    "dora dropout": {"rank": R, "alpha": 6, "magnitude": True, "dropout": 0.3},
    "pissa": {"rank": R, "alpha": 6, "init": "pissa"},
    "olora": {"rank": R, "alpha": 6, "init": "olora"},
    "full": {"full": True},
}
WEIGHTS = ["linear", "conv1d", "halves", "cast", "blocks", "int8", "nf4"]
KINDS = pytest.mark.parametrize("kind", list(SPECS))


def layer(weight: str, dtype: torch.dtype, bias: bool = True) -> nn.Module:
    """A frozen layer with random numbers; a Conv1D always has a bias."""
    torch.manual_seed(0)
    module = Conv1D(M, N) if weight == "conv1d" else nn.Linear(N, M, bias=bias)
    nn.init.normal_(module.weight, std=0.5)
    if module.bias is not None:
        nn.init.normal_(module.bias)
    module = module.to(dtype).requires_grad_(False)
    if weight == "cast":
        return PackedLinear(CastWeight(module.weight.to(torch.bfloat16), dtype), module.bias)
    if weight == "blocks":
        raw = torch.from_numpy(quantize(module.weight.float().numpy(), GGMLQuantizationType.Q4_1))
        return PackedLinear(BlockWeight(FORMATS[3], parts_of(FORMATS[3], raw), dtype), module.bias)
    if weight in QUANTISED:
        if weight == "nf4":
            pytest.importorskip("bitsandbytes")
        return PackedLinear(QUANTISED[weight](module.weight, dtype), module.bias)
    return HalvesLinear(module) if weight == "halves" else module


def put(module: nn.Module, kind: str, seed: int | None = None) -> tuple[nn.ModuleDict, Attached]:
    """The layer as a model, with an update on it: a fresh one, or one that a seed's steps moved."""
    model = nn.ModuleDict({"proj": module})
    attached = attach(model, AdapterSpec(targets="proj", **SPECS[kind]))
    if seed is not None:
        move(attached, seed)
    return model, attached


def move(attached: Attached, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attached.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def rows(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 5, N, generator=torch.Generator().manual_seed(1)).to(dtype)


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(before: dict[str, Tensor], module: nn.Module) -> bool:
    after = module.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@KINDS
@pytest.mark.parametrize(
    ("weight", "dtype", "bias"),
    [*itertools.product(WEIGHTS, (torch.float32, torch.bfloat16), (True,)), ("halves", torch.float32, False)],
)
def test_a_layer(weight: str, dtype: torch.dtype, bias: bool, kind: str, tmp_path: Path) -> None:
    module, x = layer(weight, dtype, bias), rows(dtype)
    before, base_y = bits(module), module(x)
    model, attached = put(module, kind)
    model.train()
    assert torch.equal(model["proj"](x), base_y)
    with attached.disabled():
        assert torch.equal(model["proj"](x), base_y)
    move(attached, 2)
    optimizer = torch.optim.AdamW(attached.parameters, lr=1e-2)
    model["proj"](x).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.any() and p.dtype == torch.float32 for p in attached.parameters)
    assert all(p.grad is None for p in module.parameters())
    optimizer.step()
    model.eval()
    with torch.no_grad():
        y = model["proj"](x)
    assert not torch.equal(y, base_y)
    adapter = detach(attached)
    assert model["proj"] is module and same(before, module) and torch.equal(module(x), base_y)
    back = Adapter.load(adapter.save(tmp_path))
    attached = attach(model, back)
    with torch.no_grad():
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(model["proj"](x), y, rtol=4 * eps, atol=16 * eps)
        fused = attached.layers["proj"].fuse()
        torch.testing.assert_close(fused(x), y, rtol=16 * eps, atol=32 * eps)
    assert fused.weight.dtype == dtype and not fused.weight.requires_grad


@KINDS
@pytest.mark.parametrize("weight", ["conv1d", "halves"])
def test_outputs_and_gradients_are_those_of_an_ordinary_layer(weight: str, kind: str) -> None:
    """In float64, where two orders of one sum are all that can differ."""
    module = layer(weight, torch.float64)
    linear = nn.Linear(N, M, dtype=torch.float64).requires_grad_(False)
    linear.weight.data.copy_(FrozenLinear(module).weight.dense())
    linear.bias.data.copy_(module.bias)
    results = []
    for one in (linear, module):
        model, attached = put(one, kind, seed=2)
        x = rows(torch.float64).requires_grad_()
        torch.manual_seed(3)  # the same dropout
        y = model.train()["proj"](x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in attached.parameters)])
    for wanted, got in zip(*results, strict=True):  # masters and norms are float32: B A is rounded there
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4 * float(wanted.detach().abs().max()))


# A whole model


STARTS = [0, 11, 12, 30]
TOKENS = torch.randint(97, (30,), generator=torch.Generator().manual_seed(3))
BATCH = Batch.of(TOKENS, STARTS, TOKENS.roll(-1))


def trained(model: nn.Module, kind: str, steps: int = 4) -> tuple[Forward, Attached, list[float]]:
    """A few steps of AdamW, and their losses."""
    forward = plan_forward(model)
    attached = attach(model, AdapterSpec(**SPECS[kind]))
    for update in attached.layers.values():
        update.train()
    optimizer, losses = torch.optim.AdamW(attached.parameters, lr=3e-3), []
    torch.manual_seed(4)
    for _ in range(steps):
        loss, count = forward.loss(BATCH)
        (loss / count).backward()
        losses.append(loss.item() / count)
        optimizer.step()
        optimizer.zero_grad()
    for update in attached.layers.values():
        update.eval()
    return forward, attached, losses


@pytest.mark.parametrize(("name", "kind"), [*(("llama", kind) for kind in SPECS), ("qwen2", "lora"), ("gpt2", "dora")])
def test_a_model_of_halves_trains_as_the_ordinary_one(name: str, kind: str, tmp_path: Path) -> None:
    model = halved(tiny(name))
    ordinary = whole(copy.deepcopy(model))
    before = bits(model)
    plan_forward(model)
    base = model(input_ids=TOKENS[None]).logits
    forward, attached, losses = trained(model, kind)
    _, other, wanted = trained(ordinary, kind)
    assert losses == pytest.approx(wanted, rel=2e-3) and losses[-1] < losses[0]
    assert attached.describe() == other.describe() and attached.paths == other.paths
    assert all(p.grad is None for n, p in model.named_parameters() if n in before)
    with torch.no_grad():
        logits = forward.logits(BATCH)
    adapter = detach(attached)
    assert same(before, model) and torch.equal(model(input_ids=TOKENS[None]).logits, base)
    back = Adapter.load(adapter.save(tmp_path))
    attach(model, back)
    with torch.no_grad():
        torch.testing.assert_close(forward.logits(BATCH), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["eva", "lora-ga"])
def test_starts_that_need_data(init: str) -> None:
    models = [halved(tiny("llama"))]
    models.append(whole(copy.deepcopy(models[0])))
    made = []
    for model in models:
        forward = plan_forward(model)
        attached = attach(model, AdapterSpec(rank=R, alpha=6, init=init), start_later=True)
        initialise_from_data(attached, forward, [BATCH])
        with torch.no_grad():
            assert torch.equal(forward.logits(BATCH), plain(attached, forward))
        made.append([layer.base.weight.shape for layer in attached.layers.values()])
    assert made[0] == made[1]


def plain(attached: Attached, forward: Forward) -> Tensor:
    """The base's logits, by the same kernels."""
    with torch.no_grad():
        for update in attached.layers.values():
            update.enabled = False
        logits = forward.logits(BATCH)
        for update in attached.layers.values():
            update.enabled = True
    return logits


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa", "full"])
def test_merged_into_a_model_of_halves_and_out_again(kind: str) -> None:
    model = halved(tiny("llama"))
    forward, attached, _ = trained(model, kind)
    with torch.no_grad():
        wanted = forward.logits(BATCH)
    adapter, before = detach(attached), bits(model)
    with adapter.merge_into(model) as merged, torch.no_grad():
        assert not any(isinstance(module, HalvesLinear) for module in merged.modules())
        torch.testing.assert_close(forward.logits(BATCH), wanted, rtol=1e-3, atol=1e-3)
    assert same(before, model) and all(isinstance(model.get_submodule(p), HalvesLinear) for p in adapter.factors)


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_inspected_resized_and_extracted(kind: str) -> None:
    model = halved(tiny("llama"))
    _, attached, _ = trained(model, kind)
    frozen = {path: layer.base for path, layer in attached.layers.items()}
    assert set(frozen) == set(linear_paths(whole(tiny("llama"))))
    adapter = attached.adapter(BaseId())
    weights = {path: layer.weight for path, layer in frozen.items()}
    tuned = {
        path: weight_of(layer.with_weight(weight.dense() + adapter.factors[path].relative_to(weight).dense()))
        for (path, layer), weight in zip(frozen.items(), weights.values(), strict=True)
    }
    assert all(measured.base is not None for measured in measure_adapter(adapter, weights).values())
    updates, losses = extract(tuned, weights, frozen, rank=8)
    assert set(updates) == set(frozen) and len(losses) == len(frozen)
    smaller = None
    if kind == "lora":
        smaller, _ = resize(adapter, rank=1)
    elif kind == "full":
        smaller, _ = extract_adapter(adapter, rank=2)
    if smaller is not None:
        detach(attached)
        attach(model, smaller)
        assert torch.isfinite(model(input_ids=TOKENS[None]).logits).all()
