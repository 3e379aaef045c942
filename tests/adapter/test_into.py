"""An adapter merged into a loaded model: the attached model's output by the model's own code, and back to the bit."""

from pathlib import Path

import pytest
import torch
from torch import nn

from deltaw.adapter.attach import attach, detach
from deltaw.adapter.file import Adapter, BaseId
from deltaw.adapter.layer import AdaptedLinear
from deltaw.base.load import fingerprint
from deltaw.config import AdapterSpec
from deltaw.errors import InputError
from deltaw.factors import LowRank
from deltaw.kinds import Dense, DoRA
from deltaw.updates import Update
from tests.architectures import PACKED, tiny

IDS = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(0))


def adapter_of(model: nn.Module, kind: str = "lora") -> Adapter:
    """A random adapter of a model, recorded as its own."""
    spec = {"lora": {"rank": 2, "alpha": 4}, "dora": {"rank": 2, "alpha": 4, "magnitude": True}, "full": {"full": True}}
    base = BaseId("tiny", fingerprint=fingerprint(model))
    adapter = detach(attach(model, AdapterSpec(**spec[kind])), base)
    generator = torch.Generator().manual_seed(0)

    def random(update: Update) -> Update:
        m, n = update.shape
        if isinstance(update, Dense):
            return Dense(0.1 * torch.randn(m, n, generator=generator))
        low = update.low if isinstance(update, DoRA) else update
        new = LowRank(low.a_RN, 0.1 * torch.randn(m, low.rank, generator=generator), low.scale)
        return DoRA(new, update.magnitude_M * 1.1) if isinstance(update, DoRA) else new

    factors = {path: random(update) for path, update in adapter.factors.items()}
    return Adapter(adapter.spec, factors, adapter.base, adapter.fan_in_fan_out, adapter.rewritten)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("name", [name for name in PACKED if name != "gpt_neox"])
def test_it_answers_as_the_attached_model_and_goes_back_to_the_bit(name: str, kind: str) -> None:
    model = tiny(name)
    adapter, modules, before = adapter_of(model, kind), dict(model.named_modules()), logits(model)
    weights = {key: weight.clone() for key, weight in model.state_dict().items()}
    attached = attach(model, adapter, fuse=())
    wanted = logits(model)
    detach(attached)
    merged = adapter.merge_into(model)
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
    assert (logits(model) - wanted).norm() < 2e-5 * wanted.norm() and not torch.equal(wanted, before)
    assert model.state_dict().keys() == weights.keys()
    merged.undo()
    after = dict(model.named_modules())
    assert after.keys() == modules.keys() and all(after[path] is module for path, module in modules.items())
    assert all(torch.equal(weight, weights[key]) for key, weight in model.state_dict().items())
    assert torch.equal(logits(model), before)
    merged.undo()  # nothing is left to undo


def test_a_block_undoes_it_also_when_it_fails(tmp_path: Path) -> None:
    model = tiny("llama")
    adapter, before = adapter_of(model), logits(model)
    with adapter.merge_into(model) as merged:
        assert merged is model
        wanted = logits(model)
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), before)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again.eval()), wanted)
    with pytest.raises(ZeroDivisionError), adapter.merge_into(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model), before)


def test_two_are_undone_in_turn() -> None:
    model = tiny("llama")
    one = adapter_of(model)
    two = Adapter(one.spec, {path: -update for path, update in one.factors.items()}, BaseId())
    before = logits(model)
    first = one.merge_into(model)
    second = two.merge_into(model)
    assert (logits(model) - before).norm() < 1e-5 * before.norm()
    with pytest.raises(InputError, match="after the merge"):
        first.undo()
    second.undo()
    assert torch.equal(logits(first.undo()), before)


def test_what_attach_refuses_is_refused_with_the_model_as_it_was() -> None:
    model, other = tiny("llama"), tiny("qwen3")
    adapter, before = adapter_of(model), logits(model)
    with pytest.raises(InputError):
        adapter.merge_into(other)  # another base
    attached = attach(model, adapter)
    with pytest.raises(InputError, match="already carries"):
        Adapter(adapter.spec, adapter.factors).merge_into(model)
    detach(attached)
    some = dict(list(adapter.factors.items())[1:])
    with pytest.raises(InputError):
        Adapter(adapter.spec, some).merge_into(model)
    assert torch.equal(logits(model), before)


def test_numbers_too_large_for_the_weights_are_refused() -> None:
    model = tiny("llama", torch.float16)
    adapter = adapter_of(model)
    modules = dict(model.named_modules())
    path, update = next(iter(adapter.factors.items()))
    huge = {**adapter.factors, path: LowRank(update.a_RN, update.b_MR * 1e9, update.scale)}
    with pytest.raises(InputError, match=path):
        Adapter(adapter.spec, huge).merge_into(model)
    assert all(dict(model.named_modules())[p] is module for p, module in modules.items())


def test_a_model_that_is_not_bare_is_named_as_what_it_is() -> None:
    """It was "trained on another base", or its layers weren't to be found."""
    model = tiny("llama")
    adapter = adapter_of(model)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(InputError, match=r"torch\.compile"):
        adapter.merge_into(compiled)
    with adapter.merge_into(compiled._orig_mod):
        pass
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    for wrapped in (theirs, theirs.get_base_model()):
        for put in (adapter.merge_into, lambda m: attach(m, adapter.spec)):
            with pytest.raises(InputError, match="PEFT's"):
                put(wrapped)
    adapter.merge_into(theirs.unload()).undo()


def test_a_blocks_own_error_is_what_is_raised() -> None:
    model = tiny("llama")
    adapter = adapter_of(model)
    with pytest.raises(KeyError, match="mine") as caught, adapter.merge_into(model) as merged:
        attached = attach(merged, adapter.spec)
        raise KeyError("mine")
    assert "still in the model" in caught.value.__notes__[0]
    detach(attached)


def test_it_shows_itself_in_a_line() -> None:
    model = tiny("llama")
    merged = adapter_of(model).merge_into(model)
    assert "\n" not in repr(merged) and "undo()" in repr(merged)
    merged.undo()
    assert "undone" in repr(merged)
