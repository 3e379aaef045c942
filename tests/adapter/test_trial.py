"""What attach tries first: only what computes a linear layer is wrapped, a fresh adapter is the base, a backward
reaches it; else all is as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.adapter import stand_ins as fused
from deltaw.adapter.attach import attach, detach
from deltaw.adapter.file import Adapter, BaseId
from deltaw.adapter.layer import AdaptedLinear
from deltaw.adapter.trial import observe
from deltaw.base.forward import plan_forward
from deltaw.base.frozen import FrozenLinear
from deltaw.config import AdapterSpec
from deltaw.errors import InputError
from tests.architectures import tiny

SPEC = AdapterSpec(rank=2, alpha=4.0)
Q = "model.layers.0.self_attn.q_proj"


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=(torch.arange(16).view(2, 8) * 7) % 97, use_cache=False).logits


def put(model: nn.Module, path: str, kind: type[nn.Linear]) -> nn.Linear:
    """A layer of another class in the place of one, with its weight."""
    old: Any = model.get_submodule(path)
    new = kind(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    model.set_submodule(path, new.eval())
    return new


# Subclasses of Linear


class Same(nn.Linear):
    """Linear's formula in other words, as Falcon's is."""

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Quantising(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().mean()
        return F.linear(x, (self.weight / scale).round().clamp(-1, 1) * scale, self.bias)


class Coarse(nn.Linear):
    """8 bits of the input: an error that half precision would hide."""

    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
        return F.linear((x / step).round() * step, self.weight, self.bias)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Router(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = super().forward(x)
        return y.softmax(-1), y


class Broken(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("not today")


def on_the_instance() -> nn.Linear:
    layer = nn.Linear(4, 6)
    own = layer.forward
    layer.forward = lambda x: 2 * own(x)  # type: ignore[method-assign]
    return layer


OTHERS: list[Callable[[], nn.Module]] = [
    *(lambda kind=kind: kind(4, 6) for kind in (Quantising, Coarse, Scaled, Router, Broken)),
    on_the_instance,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", OTHERS)
def test_what_computes_something_else_is_not_wrapped(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    assert not FrozenLinear.can_wrap(make().to(dtype))


@pytest.mark.parametrize("bias", [True, False])
def test_what_computes_the_same_is(bias: bool) -> None:
    layer = Same(4, 6, bias=bias)
    assert FrozenLinear.can_wrap(layer) and FrozenLinear.can_wrap(layer.to(torch.bfloat16))
    assert FrozenLinear.can_wrap(Same(4, 6, bias=bias, device="meta"))
    assert layer.weight.shape == (6, 4) and vars(layer)["in_features"] == 4  # untouched


@pytest.mark.parametrize("kind", [Quantising, Coarse, Scaled])
def test_a_fresh_adapter_is_the_base_whatever_else_stands_in_it(kind: type[nn.Linear]) -> None:
    model = tiny("llama")
    put(model, Q, kind)
    before = logits(model)
    attached = attach(model, SPEC, fuse=())
    assert torch.equal(logits(model), before)
    assert Q not in attached.paths and Q in attached.unmatched and len(attached.paths) == 13
    detach(attached)
    with pytest.raises(InputError) as caught:
        attach(model, SPEC.model_copy(update={"targets": (Q,)}))
    assert Q in caught.value.what


def test_bitnets_layers_are_all_there_is_and_none_is_wrapped() -> None:
    model = tiny("llama")
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            put(model, path, Quantising)
    before = logits(model)
    with pytest.raises(InputError) as caught:
        attach(model, SPEC)
    assert "Quantising" in caught.value.what
    assert torch.equal(logits(model), before)


# Weights that the model reads itself, and hooks


class Reading(nn.Module):
    """Calls a linear layer for one half of its answer, and multiplies with its weight for the other."""

    def __init__(self, inner: nn.Module, *, use: bool) -> None:
        super().__init__()
        self.inner, self.use = inner, use

    def forward(self, x: Tensor) -> Tensor:
        if not self.use:
            return self.inner(x.to(self.inner.weight.dtype))
        return 0.5 * self.inner(x) + 0.5 * F.linear(x, self.inner.weight)


class Bypassing(Reading):
    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.inner.weight.T)


class Splitting(Reading):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.linear(x, part) for part in self.inner.weight.chunk(2)], -1)


def holding(make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    model = tiny("llama")
    model.set_submodule(Q, make(model.get_submodule(Q)))
    return model.eval()


@pytest.mark.parametrize("kind", [Reading, Bypassing, Splitting])
def test_a_layer_whose_weight_the_model_reads_is_left_out_and_refused_by_name(kind: type[Reading]) -> None:
    model, path = holding(lambda m: kind(m, use=True)), f"{Q}.inner"
    before, state = logits(model), list(model.named_modules())
    attached = attach(model, SPEC, fuse=())
    assert list(attached.left_out) == [path] and "weight" in attached.left_out[path]
    assert len(attached.paths) == 13 and any(path in line for line in attached.notes())
    assert torch.equal(logits(model), before)
    factors = detach(attached)
    with pytest.raises(InputError) as caught:
        attach(model, SPEC.model_copy(update={"targets": ("inner", "k_proj")}))
    assert path in caught.value.what
    update = next(u for p, u in factors.factors.items() if p.endswith("1.self_attn.q_proj"))
    with pytest.raises(InputError) as caught:
        attach(model, Adapter(SPEC.model_copy(update={"targets": (path,)}), {path: update}))
    assert path in caught.value.what
    assert list(model.named_modules()) == state and torch.equal(logits(model), before)


def test_a_weights_dtype_may_be_read() -> None:
    model = holding(lambda m: Reading(m, use=False))
    before = logits(model)
    attached = attach(model, SPEC, fuse=())
    assert f"{Q}.inner" in attached.paths and torch.equal(logits(model), before)
    layer: Any = model.get_submodule(f"{Q}.inner")
    assert layer.weight.dtype == torch.float32 and layer.weight.shape == (32, 32)
    with pytest.raises(TypeError):  # never the base's weight past its update, in silence
        F.linear(torch.ones(1, 32), layer.weight)


@pytest.mark.parametrize("pre", [True, False])
def test_a_hook_that_changes_a_layer_takes_it_out(pre: bool) -> None:
    model = tiny("llama")
    layer = model.get_submodule(Q)
    if pre:
        layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    else:
        layer.register_forward_hook(lambda module, args, output: output + 1)
    before = logits(model)
    attached = attach(model, SPEC, fuse=())
    assert list(attached.left_out) == [Q] and torch.equal(logits(model), before)
    assert model.get_submodule(Q) is layer


def test_a_layer_without_a_gradient_is_left_out_where_a_group_asks() -> None:
    """The watchdog would stop the run for it."""

    class Choosing(nn.Module):
        def __init__(self, inner: nn.Module, chooser: nn.Module) -> None:
            super().__init__()
            self.inner, self.chooser = inner, chooser

        def forward(self, x: Tensor) -> Tensor:
            kept = self.chooser(x).topk(4, -1).indices
            return self.inner(x) * (1 + 0.1 * kept.float().mean(-1, keepdim=True))

    model = holding(lambda m: Choosing(m, nn.Linear(32, 8).requires_grad_(False)))
    attached = attach(model, SPEC, fuse=())
    assert list(attached.left_out) == [f"{Q}.chooser"] and "gradient" in attached.left_out[f"{Q}.chooser"]
    learnt = detach(attached)
    with pytest.raises(InputError):
        attach(model, SPEC.model_copy(update={"targets": ("chooser",)}))
    # A trained adapter may hold it: it does something, though it can't be trained.
    update = type(next(iter(learnt.factors.values())))(torch.ones(2, 32), torch.ones(8, 2), 2.0)
    adapter = Adapter(SPEC.model_copy(update={"targets": ("chooser",)}), {f"{Q}.chooser": update})
    assert attach(model, adapter).paths == (f"{Q}.chooser",)


class Layer(nn.Module):
    """A list of experts, of which the first alone is ever asked, and attention to an encoder that isn't there."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.cross = inner, nn.Linear(32, 32).requires_grad_(False)
        self.experts = nn.ModuleList(nn.Linear(32, 32).requires_grad_(False) for _ in range(3))

    def forward(self, x: Tensor, encoded: Tensor | None = None) -> Tensor:
        y = self.inner(x) + self.experts[0](x)
        return y if encoded is None else y + self.cross(encoded)


def test_what_never_runs_on_text_is_left_out_and_an_expert_that_no_token_chose_is_not() -> None:
    model = holding(Layer)
    attached = attach(model, SPEC, fuse=())
    assert list(attached.left_out) == [f"{Q}.cross"] and "text" in attached.left_out[f"{Q}.cross"]
    assert {f"{Q}.experts.{i}" for i in range(3)} <= set(attached.paths)
    detach(attached)
    with pytest.raises(InputError) as caught:
        attach(model, SPEC.model_copy(update={"targets": ("q_proj.cross", "k_proj")}))
    assert f"{Q}.cross" in caught.value.what


# Models that write into what a layer returned, and stand-ins that keep what the model writes to


class Writing(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        y += 1
        y.mul_(0.5)
        return y


@pytest.mark.parametrize(
    "path", [Q, "model.layers.0.mlp", "model.layers.1.input_layernorm", "model.layers.0.mlp.up_proj"]
)
@pytest.mark.parametrize("packed", [True, False])
def test_a_model_may_write_into_what_it_was_given(path: str, packed: bool) -> None:
    model = tiny("llama")
    model.set_submodule(path, Writing(model.get_submodule(path)))
    model.eval()
    if packed:
        plan_forward(model)
    attached = attach(model, SPEC)
    tokens = torch.arange(12)[None]
    model(input_ids=tokens, use_cache=False).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attached.parameters)


def test_a_model_that_writes_into_its_embeddings_is_observed() -> None:
    model = tiny("llama")
    model.model.layers[0] = Writing(model.model.layers[0])
    model.model.layers[0].forward = lambda x, **kwargs: model.model.layers[0].inner(x.mul_(2), **kwargs)
    assert observe(model) is not None and len(attach(model, SPEC).paths) == 14


def test_a_stand_in_that_keeps_what_the_model_writes_to_is_taken_out() -> None:
    """Half precision: the model's own norm keeps a float32 copy of the residual stream, the kernel keeps the stream."""

    class Residual(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            x = x.clone()
            x += self.layer.self_attn(self.layer.input_layernorm(x), **kwargs)[0]
            x += self.layer.mlp(self.layer.post_attention_layernorm(x))
            return x

    model = tiny("llama", torch.bfloat16)
    for number in (0, 1):
        model.set_submodule(f"model.layers.{number}", Residual(model.get_submodule(f"model.layers.{number}")))
    plan_forward(model.eval())
    attached = attach(model, SPEC)
    assert attached.stand_ins == {} and len(attached.paths) == 14
    model(input_ids=torch.arange(12)[None], use_cache=False).logits.float().square().sum().backward()
    assert all(p.grad is not None for p in attached.parameters)


# What is refused leaves nothing behind


def test_a_model_that_cannot_run_backward_is_refused_and_put_back() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise RuntimeError("this kernel has no backward")

    class ForwardOnly(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(self.inner(x))

    model = holding(ForwardOnly)
    before, modules = logits(model), dict(model.named_modules())
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        attach(model, SPEC)
    assert "this kernel has no backward" in caught.value.what
    now = dict(model.named_modules())
    assert now.keys() == modules.keys() and all(now[path] is module for path, module in modules.items())
    assert torch.equal(logits(model), before)
    assert all(torch.equal(value, bits[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "qwen3_moe", "bloom", "gpt_oss"])
@pytest.mark.parametrize("init", ["lora", "pissa", "eva"])
def test_nothing_but_the_layers_is_other_after_attach(name: str, init: str) -> None:
    model = tiny(name)
    model.train()
    modes = {path: module.training for path, module in model.named_modules()}
    bits = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    attached = attach(model, SPEC.model_copy(update={"init": init}), fuse=(), start_later=True)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    detach(attached)
    assert {path: module.training for path, module in model.named_modules()} == modes
    assert all(torch.equal(value, bits[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# Models that aren't run by token ids, or not at all


def test_somebodys_own_module_is_tried_layer_by_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    model[2].register_forward_hook(lambda module, args, output: 3 * output)
    assert observe(model) is None
    attached = attach(model, AdapterSpec(rank=1))
    assert attached.paths == ("0",) and list(attached.left_out) == ["2"]


def test_a_skeleton_can_be_attached_to() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    assert attach(model, AdapterSpec(rank=1)).paths == ("0", "1")


def test_what_the_model_asks_of_a_layer_is_asked_of_the_base_alone() -> None:
    """A pass of the base, one with the layers in place, the stand-ins' own, and one with those."""
    model = tiny("llama")
    plan_forward(model)
    passes: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda *_: passes.append(1))
    attached = attach(model, SPEC)
    assert sum(passes) == 4 and attached.describe() != "not fused"
    assert all(isinstance(attached.model.get_submodule(path), AdaptedLinear) for path in attached.paths)
    assert set(attached.stand_ins) <= {
        path for path, module in model.named_modules() if isinstance(module, fused.StandIn)
    }
    assert attached.adapter(BaseId()).factors.keys() == set(attached.paths)


def test_a_start_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, attention blocks and MLPs that are stood in for by then are put back, too."""
    model = tiny("llama")
    before = dict(model.named_modules())

    def fails(*_: Any) -> Any:
        assert any(isinstance(module, AdaptedLinear) for module in model.modules())
        raise MemoryError

    monkeypatch.setattr("deltaw.adapter.place.pissa_factors", fails)
    with pytest.raises(MemoryError):
        attach(model, SPEC.model_copy(update={"init": "pissa"}))
    after = dict(model.named_modules())
    assert after.keys() == before.keys() and all(after[path] is module for path, module in before.items())
