"""Starts: each is what its paper says and what PEFT makes, and none of them moves the base."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraGAConfig, preprocess_loraga
from torch import Tensor, nn

from deltaw.adapter import init_data
from deltaw.adapter.attach import Attached, attach, detach
from deltaw.adapter.dora import DoRAUpdate
from deltaw.adapter.file import Adapter, BaseId
from deltaw.adapter.init import eva_directions, leading, lora_ga_factors, olora_factors, pissa_factors
from deltaw.adapter.init_data import initialise_from_data
from deltaw.adapter.layer import LoRAUpdate
from deltaw.adapter.moving import MovingUpdate
from deltaw.base.batch import Batch
from deltaw.base.forward import plan_forward
from deltaw.base.frozen import FrozenLinear
from deltaw.base.parts import CHOSEN, REJECTED
from deltaw.base.preferences import Dpo
from deltaw.config import AdapterSpec
from deltaw.data.example import Example
from deltaw.data.pack import pack
from deltaw.errors import InputError, RunError
from deltaw.factors import LowRank
from deltaw.linalg.subspace import range_basis, similarity
from tests.adapter.test_layer import KINDS, SCALE, M, N, R, bits, plain, rows, same
from tests.adapter.test_stand_ins import adapted, loss_and_gradients
from tests.architectures import tiny
from tests.tiny import Said

MOVING = ("pissa", "olora", "lora-ga")
INITS = ("lora", "eva", *MOVING)
IDS = torch.arange(16).view(2, 8) * 7 % 97
SPEC = AdapterSpec(rank=R, alpha=5.0)


def batches(count: int = 2, length: int = 40) -> list[Batch]:
    """Of two documents each; half of the tokens are trained on."""
    generator = np.random.RandomState(5)

    def document() -> Example:
        mask = np.arange(length // 2) >= length // 4
        return Example(generator.randint(3, 97, length // 2).astype(np.int32), mask, "here")

    return [pack([document(), document()]) for _ in range(count)]


def begun(init: str, name: str = "llama", dtype: torch.dtype = torch.float32, **fields: Any) -> Attached:
    """A model whose adapter has had its start."""
    model, spec = tiny(name, dtype), SPEC.model_copy(update={"init": init, **fields})
    forward = plan_forward(model)
    attached = attach(model, spec, fuse=(), start_later=spec.from_data)
    if spec.from_data:
        initialise_from_data(attached, forward, batches())
    return attached


def trained(init: str, name: str = "llama", **fields: Any) -> Attached:
    attached = begun(init, name, **fields)
    with torch.no_grad():
        for parameter in attached.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    return attached


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def close(got: Tensor, wanted: Tensor, share: float = 1e-4) -> bool:
    return bool((got - wanted).abs().max() <= share * wanted.abs().max())


# The formulas


@settings(deadline=None, max_examples=40)
@given(m=st.integers(1, 12), n=st.integers(1, 12), data=st.data())
def test_leading_is_the_svds_first_terms(m: int, n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, min(m, n)))
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    u, s, vt = leading(x, k)
    torch.testing.assert_close(s, torch.linalg.svdvals(x.double())[:k], rtol=1e-6, atol=1e-6)
    best = torch.linalg.svd(x.double(), full_matrices=False)
    torch.testing.assert_close((u * s) @ vt, (best.U[:, :k] * best.S[:k]) @ best.Vh[:k], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(u.T @ u, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_leading_of_less_rank_than_asked_for_makes_no_nan(shape: tuple[int, int]) -> None:
    for rank in (0, 2):
        x = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
        u, s, vt = leading(x, 4)
        assert all(torch.isfinite(part).all() for part in (u, s, vt))
        torch.testing.assert_close((u * s) @ vt, x.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 11), (11, 7)])
def test_pissa_is_the_best_approximation_split_evenly(shape: tuple[int, int]) -> None:
    w = torch.randn(shape)
    a, b = pissa_factors(w, 3, SCALE)
    error = torch.linalg.matrix_norm(w - SCALE * b @ a, 2)
    torch.testing.assert_close(error, torch.linalg.svdvals(w)[3])  # Eckart-Young
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


@pytest.mark.parametrize("shape", [(7, 11), (11, 7)])
def test_olora_is_the_full_qr_cut(shape: tuple[int, int]) -> None:
    w = torch.randn(shape)
    a, b = olora_factors(w, 3)
    q, r = torch.linalg.qr(w)
    torch.testing.assert_close(b @ a, q[:, :3] @ r[:3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b.T @ b, torch.eye(3), rtol=0, atol=1e-6)


def test_lora_ga_has_the_first_directions_in_and_the_next_ones_out() -> None:
    g = torch.randn(16, 9)
    a, b = lora_ga_factors(g, 3)
    svd = torch.linalg.svd(g)
    torch.testing.assert_close((a @ svd.Vh.T).abs(), 0.5 * torch.eye(3, 9), rtol=1e-4, atol=1e-5)  # 16^¼ / √16
    torch.testing.assert_close((svd.U.T @ b).abs()[3:6], 0.5 * torch.eye(3), rtol=1e-4, atol=1e-5)
    other = lora_ga_factors(1000 * g, 3)
    torch.testing.assert_close(other[1].abs(), b.abs(), rtol=1e-4, atol=1e-5)


def test_eva_is_the_leading_directions_in_order() -> None:
    x = torch.randn(50, 6, dtype=torch.float64) * torch.tensor([1.0, 5, 2, 9, 0.1, 3], dtype=torch.float64)
    a = eva_directions(x.T @ x, 3)
    assert a.dtype == torch.float32
    torch.testing.assert_close((a @ torch.linalg.svd(x).Vh.T.float()).abs(), torch.eye(3, 6), rtol=0, atol=1e-5)


# A layer that keeps where it began: the suite of every layer, and the authors' formula


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0].__name__}-{kind[1]}-{kind[2]}")
def base(request: pytest.FixtureRequest) -> nn.Module:
    return plain(*request.param)


def moving(base: nn.Module, dropout: float = 0.0) -> MovingUpdate:
    layer = MovingUpdate(FrozenLinear(base), R, SCALE, dropout)
    layer.start(torch.randn(R, N), torch.randn(M, R))
    return layer


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_fresh_layer_is_the_base_to_the_bit(base: nn.Module, dropout: float) -> None:
    x = rows(base)
    assert torch.equal(moving(base, dropout).train()(x), base(x))
    assert torch.equal(moving(base).fuse().weight, base.weight)


def test_only_the_changes_learn_and_the_base_keeps_its_bits(base: nn.Module) -> None:
    before, layer, x = bits(base), moving(base), rows(base)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}
    kept = {name: value.clone() for name, value in layer.constants().items()}
    optimizer = torch.optim.AdamW(layer.trained().values(), lr=0.1)
    for _ in range(3):
        layer(x).float().square().sum().backward()
        optimizer.step()
    assert layer.lora_a.any() and layer.lora_b.any()
    assert all(torch.equal(kept[name], value) for name, value in layer.constants().items())
    assert same(before, base)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_it_trains_as_the_authors_way_does_on_a_base_that_was_moved(dropout: float) -> None:
    """Steps of AdamW on A and B over W − s B₀A₀, in float64: the same sums, the same weight at the end."""
    base = plain(nn.Linear, True, torch.float64)
    layer = moving(base, dropout).double().train()
    a, b = layer.constants()["initial_a"].clone(), layer.constants()["initial_b"].clone()
    w0, ba0 = base.weight.detach(), SCALE * b @ a
    a, b, x = a.requires_grad_(), b.requires_grad_(), torch.randn(20, N, dtype=torch.float64)
    optimizers = [torch.optim.AdamW(p, lr=0.05, weight_decay=0.0) for p in (layer.trained().values(), [a, b])]
    for step in range(4):
        outputs = []
        for optimizer in optimizers:
            torch.manual_seed(step)  # the same mask
            if optimizer is optimizers[0]:
                y = layer(x)
            else:  # dropout on what comes off as well as on what goes on: it is the update's
                y = base(x) + nn.functional.dropout(x, dropout) @ (SCALE * b @ a - ba0).T
            y.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            outputs.append(y.detach())
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-9)
    delta = layer.factors().dense()
    torch.testing.assert_close(w0 + delta, (w0 - ba0 + SCALE * b @ a).detach(), rtol=1e-9, atol=1e-9)
    assert delta.abs().max() > 0.01


def test_factors_are_of_twice_the_rank_and_go_back_in(base: nn.Module) -> None:
    layer, x = moving(base), rows(base)
    nn.init.normal_(layer.lora_a)
    nn.init.normal_(layer.lora_b)
    update = layer.factors()
    a0, b0 = layer.constants().values()
    exact = (b0 + layer.lora_b).double() @ (a0 + layer.lora_a).double() - b0.double() @ a0.double()
    assert update.rank == 2 * R
    torch.testing.assert_close(update.dense().double(), SCALE * exact, rtol=1e-5, atol=1e-5)
    other = MovingUpdate(FrozenLinear(base), R, SCALE)
    other.start(a0, b0)
    other.set_factors(update)
    assert torch.equal(other(x), layer(x)) and torch.equal(other.lora_a, layer.lora_a)
    loaded = LoRAUpdate(FrozenLinear(base), 2 * R, SCALE)  # what any other tool makes of it
    loaded.set_factors(update)
    assert torch.equal(loaded(x), layer(x))


def test_an_update_of_another_start_or_rank_is_refused() -> None:
    layer = moving(plain(nn.Linear, True, torch.float32))
    with pytest.raises(ValueError, match="other factors"):
        layer.set_factors(moving(layer.base.module).factors())
    with pytest.raises(ValueError, match="layer takes rank=6"):
        layer.set_factors(LowRank(torch.ones(R, N), torch.ones(M, R)))


# On a model


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("init", INITS)
def test_begun_it_is_the_base_to_the_bit_and_detached_nothing_has_changed(
    init: str, name: str, magnitude: bool
) -> None:
    if magnitude and init in MOVING:
        return
    model = tiny(name)
    plan_forward(model)
    attached = begun(init, name, magnitude=magnitude)
    assert torch.equal(logits(attached.model), logits(model))
    assert not any(module._forward_hooks for module in attached.model.modules())
    assert all(p.grad is None for p in attached.model.parameters())
    learns = {id(p) for p in attached.parameters}
    assert all(p.requires_grad == (id(p) in learns) for p in attached.model.parameters())
    detach(attached)
    assert same(bits(model), attached.model)


def test_half_precision_too() -> None:
    for init in INITS:
        model = tiny("llama", torch.bfloat16)
        plan_forward(model)
        assert torch.equal(logits(begun(init, dtype=torch.bfloat16).model), logits(model)), init


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("init", ["eva", *MOVING])
def test_saved_it_is_a_plain_lora_here_and_in_peft(init: str, scaling: Any, tmp_path: Path) -> None:
    attached = trained(
        init, scaling=scaling, rank_overrides={"q_proj": 2}, alpha_overrides={"up_proj": 7.0, "q_proj": 3.0}
    )
    adapter = attached.adapter(BaseId())
    times = 2 if init in MOVING else 1
    assert adapter.spec.init == "lora" and adapter.spec.rank == times * R
    for path, layer in attached.layers.items():
        assert adapter.factors[path].rank == adapter.spec.rank_of(path) == times * attached.spec.rank_of(path)
        assert math.isclose(adapter.spec.scale(path), layer.scale, rel_tol=4e-16)
    back = Adapter.load(adapter.save(tmp_path))
    assert back.spec == adapter.spec
    out = logits(attached.model)
    model = tiny("llama")
    plan_forward(model)
    assert torch.equal(logits(attach(model, back, fuse=()).model), out)
    assert close(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()), out)
    assert not close(out, logits(tiny("llama")), 0.01)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_kernels_take_it_like_any_other(name: str) -> None:
    """|fused − truth| ≤ 2 |own − truth| + rounding, as for plain factors; the truth in float64."""
    spec = AdapterSpec(rank=4, alpha=8, init="pissa")
    fused, own = (loss_and_gradients(adapted(name, fuse, spec=spec)) for fuse in (("norm", "attention", "mlp"), ()))
    truth = loss_and_gradients(adapted(name, (), torch.float64, spec))
    assert "2 attention blocks, 2 MLPs" in adapted(name, ("attention", "mlp"), spec=spec).describe()
    for o, m, t in zip(own, fused, truth, strict=True):
        bound = 2 * (o - t).abs().max() + 16 * torch.finfo(torch.float32).eps * t.abs().max()
        assert (m - t).abs().max() <= bound


def test_a_rank_whose_double_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"twice the rank:\n.*k_proj is 16 x .*: rank 18 > 16"):
        attach(tiny("llama"), AdapterSpec(rank=9, init="pissa"))
    attach(tiny("llama"), AdapterSpec(rank=9, init="pissa", rank_overrides={"k_proj": 8, "v_proj": 8}))


# Starts that need data


def watched(monkeypatch: Any, name: str) -> list[Tensor]:
    """What is given to one of init.py's functions, in the order of the layers."""
    seen: list[Tensor] = []
    original = getattr(init_data, name)

    def watching(total: Tensor, rank: int) -> Any:
        seen.append(total.clone())
        return original(total, rank)

    monkeypatch.setattr(init_data, name, watching)
    return seen


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_the_gradient_is_the_weights_own(name: str, monkeypatch: Any) -> None:
    """autograd's, on a model whose weights train; bloom runs on padded batches."""
    seen = watched(monkeypatch, "lora_ga_factors")
    attached = begun("lora-ga", name)
    model = tiny(name).requires_grad_()
    forward = plan_forward(model.requires_grad_(False))
    for path in attached.paths:
        model.get_submodule(path).weight.requires_grad_()
    for batch in batches():
        forward.loss(batch)[0].backward()
    assert len(seen) == len(attached.paths)
    for gradient, path in zip(seen, attached.paths, strict=True):
        wanted = model.get_submodule(path).weight.grad
        assert close(gradient, wanted.T if name == "gpt2" else wanted), path


def test_the_scatter_is_that_of_all_inputs_centred(monkeypatch: Any) -> None:
    seen = watched(monkeypatch, "eva_directions")
    attached = begun("eva")
    model, inputs = tiny("llama"), {}
    forward = plan_forward(model)
    for path in attached.paths:
        model.get_submodule(path).register_forward_hook(
            lambda m, i, o, p=path: inputs.setdefault(p, []).append(i[0][0])
        )
    for batch in batches():
        forward.loss(batch)
    for scatter, path in zip(seen, attached.paths, strict=True):
        x = torch.cat(inputs[path]).double()
        centred = x - x.mean(0)
        torch.testing.assert_close(scatter, centred.T @ centred, rtol=1e-5, atol=1e-5 * float(scatter.abs().max()))


@pytest.mark.parametrize("init", ["eva", "lora-ga"])
def test_groups_of_layers_give_the_same_bits(init: str, monkeypatch: Any) -> None:
    whole, display = begun(init), Said()
    monkeypatch.setattr(init_data, "BUDGET", 20_000)  # a few layers at a time
    attached = attach(tiny("llama"), SPEC.model_copy(update={"init": init}), fuse=(), start_later=True)
    initialise_from_data(attached, plan_forward(attached.model), batches(), display)
    ((total, done),) = display.tasks.values()
    assert done == list(range(1, total + 1)) and total > 2 * len(batches())
    for path, layer in whole.layers.items():
        other = attached.layers[path]
        assert torch.equal(layer.factors().a_RN, other.factors().a_RN)
        assert torch.equal(layer.factors().b_MR, other.factors().b_MR)


def test_a_start_that_needs_data_is_not_forgotten() -> None:
    with pytest.raises(ValueError, match="starts from data: attach with start_later"):
        attach(tiny("llama"), SPEC.model_copy(update={"init": "eva"}))
    attached = attach(tiny("llama"), SPEC)
    with pytest.raises(ValueError, match="needs no data"):
        initialise_from_data(attached, plan_forward(attached.model), batches())


def test_data_that_says_nothing_or_nan_is_named() -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.down_proj.weight.data.zero_()  # nothing comes back to gate and up
    forward = plan_forward(model)
    attached = attach(model, SPEC.model_copy(update={"init": "lora-ga"}), fuse=(), start_later=True)
    with pytest.raises(RunError, match=r"layers\.1\.mlp\.gate_proj: the first batches give nothing but zeros"):
        initialise_from_data(attached, forward, batches())
    model.get_input_embeddings().weight.data[5:] = torch.nan
    with pytest.raises(RunError, match=r"q_proj: the first batches give NaN"):
        initialise_from_data(attached, forward, batches())
    assert not any(module._forward_hooks for module in model.modules())


def test_dora_takes_evas_directions() -> None:
    plain_layers, dora = begun("eva").layers, begun("eva", magnitude=True).layers
    for path, layer in dora.items():
        assert isinstance(layer, DoRAUpdate) and layer.lora_a.any()
        assert torch.equal(layer.lora_a, plain_layers[path].lora_a)


# Against PEFT


def theirs(name: str, init: str, **more: Any) -> Any:
    config = LoraConfig(
        r=R, lora_alpha=5.0, target_modules="all-linear", init_lora_weights=init, fan_in_fan_out=name == "gpt2", **more
    )
    return get_peft_model(tiny(name), config)


def factors_of(peft: Any, path: str) -> tuple[Tensor, Tensor]:
    module = peft.get_submodule(f"base_model.model.{path}")
    return module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()


@pytest.mark.parametrize(("init", "name"), [("pissa", "llama"), ("pissa", "gpt2"), ("olora", "llama")])
def test_pissa_and_olora_are_pefts(init: str, name: str) -> None:
    """PEFT's OLoRA takes a Conv1D's weight the wrong way round, so GPT-2 is left out there."""
    peft, attached = theirs(name, init), begun(init, name)
    for path, layer in attached.layers.items():
        (a, b), (mine_a, mine_b) = factors_of(peft, path), layer.constants().values()
        torch.testing.assert_close(mine_b @ mine_a, b @ a, rtol=1e-3, atol=1e-4 * float((b @ a).abs().max()))
        torch.testing.assert_close(mine_a.norm(dim=1), a.norm(dim=1), rtol=1e-4, atol=1e-5)


def test_eva_is_pefts() -> None:
    """At a rank at which PEFT's randomised SVD is a whole one."""
    tokens = torch.randint(3, 97, (60,))
    targets = ("q_proj", "o_proj", "up_proj")
    peft = get_peft_model(
        tiny("llama"),
        LoraConfig(r=16, target_modules=list(targets), init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)),
    )
    initialize_lora_eva_weights(peft, [{"input_ids": tokens[None]}], show_progress_bar=False)
    model = tiny("llama")
    attached = attach(model, AdapterSpec(rank=16, init="eva", targets=targets), start_later=True)
    one = pack([Example(tokens.numpy().astype(np.int32), np.ones(60, bool), "here")])
    initialise_from_data(attached, plan_forward(model), [one])
    for path, layer in attached.layers.items():
        a, _ = factors_of(peft, path)
        mine = layer.factors()
        assert similarity(range_basis(a.T), range_basis(mine.a_RN.T))[-1, -1] > 1 - 1e-4
        assert not mine.b_MR.any()


def test_lora_gas_directions_are_pefts() -> None:
    """Up to signs, and to B's length, which is the paper's and its authors' code's and not PEFT's (init.py).

    At a rank at which PEFT's randomised SVD is a whole one.
    """
    model, steps = tiny("llama"), batches(1)
    config = LoraConfig(
        r=8,
        lora_alpha=4,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction="ArB2r", scale="stable"),
    )
    forward = plan_forward(model)

    def step() -> None:
        forward.loss(steps[0])[0].backward()

    preprocess_loraga(model, config, step)
    peft = get_peft_model(model, config)
    mine = tiny("llama")
    spec = AdapterSpec(rank=8, alpha=4, init="lora-ga", targets=("q_proj", "down_proj"))
    attached = attach(mine, spec, start_later=True)
    initialise_from_data(attached, plan_forward(mine), steps)
    for path, layer in attached.layers.items():
        zeta = len(layer.lora_b) ** 0.25 / 4
        pairs = zip(layer.constants().values(), factors_of(peft, path), strict=True)
        for side, (ours, other) in enumerate(pairs):
            unit = nn.functional.normalize(other, dim=1 - side)
            torch.testing.assert_close(ours.abs(), zeta * unit.abs(), rtol=1e-3, atol=1e-4)


def test_lora_ga_on_pairs_follows_the_gradient_of_their_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the loss of both answers: β σ(0) times what raises the one and lowers the other."""
    random, heads = np.random.RandomState(2), np.random.RandomState(3).randint(3, 97, (3, 20))
    pairs = [
        Example(np.concatenate([head, random.randint(3, 97, 5)]).astype(np.int32), np.arange(25) >= 20, "x", part=part)
        for head in heads
        for part in (CHOSEN, REJECTED)
    ]
    plain, seen = tiny("llama", torch.float32), watched(monkeypatch, "lora_ga_factors")
    weight = plain.get_submodule("model.layers.1.mlp.up_proj").weight.requires_grad_()
    for number, example in enumerate(pairs):
        logp = plain(torch.tensor(example.tokens[None], dtype=torch.long)).logits[0].log_softmax(-1)
        answer = sum(logp[at - 1, int(example.tokens[at])] for at in range(20, 25))
        (0.05 * (2 * (number % 2) - 1) * answer).backward()
    mine = tiny("llama", torch.float32)
    attached = attach(
        mine, SPEC.model_copy(update={"init": "lora-ga", "targets": ("layers.1.mlp.up_proj",)}), start_later=True
    )
    initialise_from_data(attached, plan_forward(mine), [pack(pairs[:4]), pack(pairs[4:])], objective=Dpo(0.1))
    (got,) = seen
    torch.testing.assert_close(got, weight.grad, rtol=1e-3, atol=1e-5 * float(weight.grad.abs().max()))


def test_one_seed_makes_one_start() -> None:
    for init in INITS:
        first, second = (copy.deepcopy([layer.factors() for layer in begun(init).layers.values()]) for _ in range(2))
        assert all(
            torch.equal(a.a_RN, b.a_RN) and torch.equal(a.b_MR, b.b_MR) for a, b in zip(first, second, strict=True)
        )
