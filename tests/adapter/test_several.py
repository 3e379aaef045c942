"""Several adapters on one model: each does on its rows what it does alone, and comes off alone."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltaw.adapter.attach import Attached, attach, detach
from deltaw.adapter.file import BaseId
from deltaw.adapter.init_data import initialise_from_data
from deltaw.adapter.layer import AdaptedLinear
from deltaw.base.batch import Batch
from deltaw.base.forward import Forward, plan_forward
from deltaw.base.passing import Pass, passing_of
from deltaw.config import AdapterSpec
from deltaw.errors import InputError, RunError
from deltaw.kernels.segments import NOBODY, Segment
from tests.architectures import tiny
from tests.halves import halved

STARTS = [0, 6, 7, 18, 24]
TOKENS = (torch.arange(24) * 31 + 5) % 97
LABELS = TOKENS.roll(-1)
LORA = AdapterSpec(rank=4, alpha=8)
SPECS = {
    "lora": AdapterSpec(rank=2, alpha=6, scaling="rslora"),
    "some layers": AdapterSpec(rank=3, alpha=6, targets=("q_proj", "down_proj", "dense", "c_fc")),
    "pissa": AdapterSpec(rank=3, alpha=6, init="pissa"),
    "dropout": AdapterSpec(rank=3, alpha=6, dropout=0.2),
    "dora": AdapterSpec(rank=3, alpha=6, magnitude=True),
    "full": AdapterSpec(full=True),
}


def batch(*updates: int) -> Batch:
    return Batch.of(TOKENS, STARTS, LABELS, origins=("a", "b", "c", "d"), updates=updates)


def part(document: int) -> Batch:
    start, end = STARTS[document], STARTS[document + 1]
    return Batch.of(TOKENS[start:end], [0, end - start], LABELS[start:end])


def moved(attached: Attached, seed: int) -> Attached:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attached.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return attached


def put(model: nn.Module, spec: AdapterSpec, seed: int) -> Attached:
    targets = spec.targets if isinstance(spec.targets, str) else tuple(t for t in spec.targets if has(model, t))
    return moved(attach(model, spec.model_copy(update={"targets": targets})), seed)


def has(model: nn.Module, name: str) -> bool:
    return any(path.endswith(name) for path, _ in model.named_modules())


def gradients(attached: Attached) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in attached.parameters]


def alone(name: str, spec: AdapterSpec | None, seed: int, documents: list[int], dtype: torch.dtype) -> tuple[Any, ...]:
    """(logits, loss, gradients) of the documents, by a model that carries this adapter alone, or none."""
    model = tiny(name, dtype)
    forward = plan_forward(model)
    attached = None if spec is None else put(model, spec, seed)
    logits, loss = {d: forward.logits(part(d)).detach() for d in documents}, torch.zeros(())
    for d in documents:
        loss = loss + forward.loss(part(d))[0]
    if attached is None:
        return logits, loss, []
    loss.backward()
    return logits, loss.detach(), gradients(attached)


def close(got: Tensor, wanted: Tensor) -> bool:
    return bool((got - wanted).abs().max() <= 1e-4 * wanted.abs().max() + 1e-7)


@pytest.mark.parametrize("name", ["llama", "bloom"])
@pytest.mark.parametrize("spec", ["lora", "dora", "dropout"])
def test_nobody_s_documents_are_the_base_s_and_change_no_gradient(name: str, spec: str) -> None:
    model = tiny(name)
    forward = plan_forward(model)
    of_base = {d: forward.logits(part(d)).detach() for d in range(4)}
    one = put(model, SPECS[spec], 1)
    logits = forward.logits(batch(NOBODY, one.number, NOBODY, one.number)).detach()
    assert all(close(logits[STARTS[d] : STARTS[d + 1]], of_base[d]) for d in (0, 2))
    assert not any(close(logits[STARTS[d] : STARTS[d + 1]], of_base[d]) for d in (1, 3))
    _, _, expected = alone(name, SPECS[spec], 1, [1, 3], torch.float32)
    forward.loss(batch(NOBODY, one.number, NOBODY, one.number).labelled_for(one.number))[0].backward()
    assert all(close(got, wanted) for got, wanted in zip(gradients(one), expected, strict=True))
    for nothing in (batch(*[NOBODY] * 4), batch(*[NOBODY] * 4).labelled_for(NOBODY)):
        assert all(close(forward.logits(nothing)[STARTS[d] : STARTS[d + 1]], of_base[d]) for d in range(4))


@pytest.mark.parametrize(
    ("name", "second"),
    [*(("llama", second) for second in SPECS), ("gpt2", "lora"), ("qwen3", "lora"), ("bloom", "dora")],
)
def test_each_has_the_outputs_and_gradients_that_it_has_alone(name: str, second: str) -> None:
    """Documents of two adapters and of none in one batch; packed models and padded ones."""
    model = tiny(name)
    forward = plan_forward(model)
    one = put(model, LORA, 1)
    two = put(model, SPECS[second], 2)
    assert (one.number, two.number) == (0, 1)
    third = attach(model, LORA)  # an update of B = 0: the base
    mixed = batch(1, 0, 1, third.number)
    logits = forward.logits(mixed).detach()
    loss, _ = forward.loss(mixed)
    loss.backward()
    losses = torch.zeros(())
    for attached, spec, seed, documents in (
        (one, LORA, 1, [1]),
        (two, SPECS[second], 2, [0, 2]),
        (third, None, 0, [3]),
    ):
        wanted, loss_alone, grads = alone(name, spec, seed, documents, torch.float32)
        losses = losses + loss_alone.detach()
        for d, rows in wanted.items():
            assert close(logits[STARTS[d] : STARTS[d + 1]], rows), (d, attached.number)
        assert all(close(got, g) for got, g in zip(gradients(attached) if grads else [], grads, strict=True))
    assert close(loss.detach(), losses)


@pytest.mark.parametrize("second", ["lora", "some layers", "dora"])
def test_they_come_off_one_by_one_in_any_order(second: str) -> None:
    for first_off in (0, 1):
        model = tiny("llama")
        forward = plan_forward(model)
        modules, before = dict(model.named_modules()), {n: v.clone() for n, v in model.state_dict().items()}
        both = [put(model, LORA, 1), put(model, SPECS[second], 2)]
        kept = both[1 - first_off]
        with torch.no_grad():
            wanted = forward.logits(kept.taken_by(batch()))
        assert detach(both[first_off]).factors.keys() == both[first_off].layers.keys()
        with torch.no_grad():  # which is the first one now
            assert close(forward.logits(batch()), wanted)
        with pytest.raises(ValueError, match="number"):
            forward.logits(batch(*[both[first_off].number] * 4))
        detach(both[first_off])  # once more takes off nothing
        assert len(kept.layers) == sum(isinstance(m, AdaptedLinear) for m in model.modules())
        detach(kept)
        now = dict(model.named_modules())
        assert now.keys() == modules.keys() and all(now[path] is module for path, module in modules.items())
        assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())


def test_a_free_number_is_given_again_and_whoever_had_it_takes_nothing_off() -> None:
    model = tiny("llama")
    first, second = attach(model, LORA), attach(model, LORA)
    detach(first)
    third = attach(model, LORA)
    assert third.number == first.number and third.carried is second.carried
    detach(first)
    assert all(model.get_submodule(path).update(third.number) is update for path, update in third.layers.items())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_second_one_leaves_all_as_it_was(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype)
    forward = plan_forward(model)
    base = forward.logits(batch())
    first = put(model, LORA, 1)
    wanted = forward.logits(batch())
    second = attach(model, SPECS["lora"])
    assert torch.equal(forward.logits(batch()), wanted) and first.describe() == second.describe() != "not fused"
    with first.disabled():
        assert torch.equal(forward.logits(batch()), base)
        mixed = forward.logits(batch(0, 1, 0, 1))
    assert (mixed - base).abs().max() <= 8 * torch.finfo(dtype).eps * base.abs().max()
    moved(second, 3)
    only = forward.logits(second.taken_by(batch()))
    with first.disabled():
        off = forward.logits(second.taken_by(batch()))  # it has nothing to do with the first, but stand-ins are off
    assert (off - only).abs().max() <= 16 * torch.finfo(dtype).eps * only.abs().max()
    with second.disabled():
        off = forward.logits(second.taken_by(batch()))
    assert torch.equal(off, base) and not torch.equal(only, base)


def test_rows_in_no_segment_are_the_bases() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).requires_grad_(False)
    x = torch.randn(7, 8)
    base = model(x)
    moved(attach(model, AdapterSpec(rank=2)), 1)
    moved(attach(model, AdapterSpec(rank=2, magnitude=True)), 2)
    for update in (0, 1):
        with torch.no_grad(), passing_of(model).running(Pass(segments=(Segment(update, 2, 4),))):
            y = model(x)
        untouched = torch.tensor([0, 1, 4, 5, 6])
        torch.testing.assert_close(y[untouched], base[untouched])
        assert (y[2:4] - base[2:4]).abs().max() > 1e-3


@pytest.mark.parametrize("attempt", range(3))
def test_a_second_one_that_is_refused_leaves_the_first_as_it_was(attempt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    forward = plan_forward(model)
    first = put(model, LORA, 1)
    modules = dict(model.named_modules())
    with torch.no_grad():
        wanted = forward.logits(batch())
    if attempt == 0:
        with pytest.raises(InputError):
            attach(model, AdapterSpec(rank=2, targets=("nothing",)))
    elif attempt == 1:
        with pytest.raises(InputError):
            attach(model, AdapterSpec(rank=1000))
    else:

        def fails(*_: Any) -> Any:
            raise MemoryError

        monkeypatch.setattr("deltaw.adapter.place.pissa_factors", fails)
        with pytest.raises(MemoryError):
            attach(model, SPECS["pissa"])
    now = dict(model.named_modules())
    assert now.keys() == modules.keys() and all(now[path] is module for path, module in modules.items())
    with torch.no_grad():
        assert torch.equal(forward.logits(batch()), wanted)
    assert attach(model, LORA).number == 1 and first.number == 0


def test_a_start_from_data_looks_at_the_base_and_not_at_the_others() -> None:
    spec, starts = AdapterSpec(rank=2, init="eva"), []
    for others in (False, True):
        model = tiny("llama")
        forward = plan_forward(model)
        if others:
            put(model, LORA, 1)
        attached = attach(model, spec, start_later=True)
        initialise_from_data(attached, forward, [batch()])
        starts.append([layer.trained()["a"] for layer in attached.layers.values()])
    assert all(torch.equal(one, other) for one, other in zip(*starts, strict=True))


def test_experts_take_one_adapter_at_a_time() -> None:
    class Experts(nn.Module):
        """Each token goes to one of two layers, which see the tokens that chose them alone."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.experts = nn.ModuleList([inner, copy.deepcopy(inner)])

        def forward(self, x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1])
            chosen, y = rows[:, 0] > 0, torch.zeros(len(rows), 32, dtype=x.dtype)
            for number, expert in enumerate(self.experts):
                y = y.index_copy(0, (chosen == bool(number)).nonzero()[:, 0], expert(rows[chosen == bool(number)]))
            return y.view(*x.shape[:-1], -1)

    path = "model.layers.0.self_attn.q_proj"

    def made() -> nn.Module:
        model = tiny("llama")
        model.set_submodule(path, Experts(model.get_submodule(path)))
        return model.eval()

    model = made()
    forward = plan_forward(model)
    attached = attach(model, LORA)
    assert f"{path}.experts.0" in attached.paths
    with pytest.raises(InputError) as caught:
        attach(model, LORA)
    assert f"{path}.experts.0" in caught.value.what
    with pytest.raises(RunError):
        forward.logits(batch(0, 0, 0, 0))
    model = made()
    attach(model, LORA.model_copy(update={"targets": "mlp"}))
    with pytest.raises(InputError):
        attach(model, LORA)
    assert attach(model, LORA.model_copy(update={"targets": ("k_proj",)})).number == 1


def test_merging_into_a_model_that_carries_one_is_refused() -> None:
    model = tiny("llama")
    adapter = put(model, LORA, 1).adapter(BaseId())
    with pytest.raises(InputError):
        adapter.merge_into(model)


def test_a_copy_of_the_model_tells_its_own_rows_apart() -> None:
    model = tiny("llama")
    put(model, LORA, 1)
    put(model, SPECS["lora"], 2)
    forward = plan_forward(model)
    twin = copy.deepcopy(model)
    copied = plan_forward(twin)
    with torch.no_grad():
        wanted = forward.logits(batch(0, 1, 1, 0))
        assert torch.equal(copied.logits(batch(0, 1, 1, 0)), wanted)
        assert passing_of(twin) is not passing_of(model)


@pytest.mark.parametrize("second", ["lora", "dora"])
def test_two_on_a_model_of_halves(second: str) -> None:
    model: nn.Module = halved(tiny("llama"))
    forward: Forward = plan_forward(model)
    one, two = put(model, LORA, 1), put(model, SPECS[second], 2)
    with torch.no_grad():
        mixed = forward.logits(batch(1, 0, 1, 0))
        wanted = [forward.logits(attached.taken_by(batch())) for attached in (one, two)]
    for d, number in enumerate((1, 0, 1, 0)):
        rows = slice(STARTS[d], STARTS[d + 1])
        assert close(mixed[rows], wanted[number][rows])
