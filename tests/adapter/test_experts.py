"""LoRA on experts: the model's own routes and numbers, PEFT's file both ways, values by expert, and what is refused."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from deltaw.adapter.algebra import resize, resize_global, scaled
from deltaw.adapter.attach import Attached, attach, detach
from deltaw.adapter.combine import combine
from deltaw.adapter.experts import AdaptedExperts
from deltaw.adapter.file import CONFIG, Adapter, BaseId
from deltaw.adapter.peft_experts import joined, split
from deltaw.base.batch import Batch
from deltaw.base.experts import FrozenExperts, FrozenStack, expert_stacks
from deltaw.base.forward import plan_forward
from deltaw.config import AdapterSpec
from deltaw.config.adapter import expert_of, expert_path, parameter_of
from deltaw.errors import InputError
from tests.adapter.test_peft_reads import logits, model, same

NAMES = ("mixtral", "qwen3_moe", "gpt_oss")
BOTH = AdapterSpec(rank=4, alpha=6.0, targets=("all-linear", "experts"))


def moved(attached: Attached, seed: int = 0) -> Attached:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attached.parameters:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return attached


@cache
def trained(name: str) -> tuple[Tensor, Adapter]:
    """(logits, the adapter) of random factors on all linear layers and experts."""
    attached = moved(attach(model(name), BOTH, fuse=()))
    return logits(attached.model), attached.adapter(BaseId("tiny"))


def merged(name: str, adapter: Adapter) -> nn.Module:
    """The model with every ΔW added to its weights, by nothing of deltaw's."""
    made = model(name)
    parameters = dict(made.named_parameters())
    for path, update in adapter.factors.items():
        number, delta = expert_of(path), update.plain().dense()
        weight = parameters[f"{path}.weight" if number is None else parameter_of(path)]
        if number is None:
            weight.data += delta
        else:
            turned = made.get_submodule(parameter_of(path).rpartition(".")[0]).is_transposed
            weight.data[number] += delta.T if turned else delta
    return made


@pytest.mark.parametrize("name", NAMES)
def test_fresh_it_is_the_base_to_the_bit_trained_it_is_the_merged_model(name: str) -> None:
    base = model(name)
    before = logits(base)
    attached = attach(base, BOTH, fuse=())
    assert torch.equal(logits(base), before)
    moved(attached)
    assert same(logits(base), logits(merged(name, attached.adapter(BaseId("tiny")))))
    with attached.disabled():
        assert torch.equal(logits(base), before)
    with detach(attached).merge_into(base):
        assert same(logits(base), trained(name)[0])
    assert torch.equal(logits(base), before)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_merged_weights(name: str) -> None:
    """∂L/∂A = s Bᵀ (∂L/∂W) and ∂L/∂B = s (∂L/∂W) Aᵀ, with ∂L/∂W by autograd through the model's own code."""
    attached = moved(attach(model(name), AdapterSpec(rank=4, alpha=6.0, targets="experts"), fuse=()))
    adapter, ids = attached.adapter(BaseId("tiny")), (torch.arange(24).view(2, 12) * 7) % 97
    dense = merged(name, adapter)
    stacks = {path: FrozenStack(dense.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2])
              for path in expert_stacks(dense)}  # fmt: skip
    for stack in stacks.values():
        getattr(stack.module, stack.name).requires_grad_()
    for one in (dense, attached.model):
        one(input_ids=ids, use_cache=False).logits.square().mean().backward()
    for path, layer in attached.layers.items():
        stack = stacks[path]
        g_EMN = getattr(stack.module, stack.name).grad
        g_EMN = g_EMN.transpose(1, 2) if stack.turned else g_EMN
        a, b, s = layer.lora_a.detach(), layer.lora_b.detach(), layer.scale
        assert same(layer.lora_a.grad, s * b.transpose(1, 2) @ g_EMN) and same(
            layer.lora_b.grad, s * g_EMN @ a.transpose(1, 2)
        )


@pytest.mark.parametrize("name", NAMES)
def test_peft_reads_what_is_written_and_is_read(name: str, tmp_path: Path) -> None:
    wanted, adapter = trained(name)
    assert same(logits(PeftModel.from_pretrained(model(name), adapter.save(tmp_path / "ours")).eval()), wanted)
    again = Adapter.load(tmp_path / "ours")
    assert again.fingerprint == adapter.fingerprint
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], rank_pattern={"experts.down_proj": 3},
                        target_parameters=["experts.gate_up_proj", "experts.down_proj"])  # fmt: skip
    theirs = get_peft_model(model(name), config).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                parameter.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    read = Adapter.load(tmp_path / "theirs")
    assert same(logits(attach(model(name), read, fuse=()).model), logits(theirs))
    assert {update.rank for path, update in read.factors.items() if "down_proj" in path} == {3}


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_one_parameter_alone(parameter: str, tmp_path: Path) -> None:
    attached = moved(attach(model("gpt_oss"), AdapterSpec(rank=3, targets=("q_proj", f"experts.{parameter}")), fuse=()))
    adapter, wanted = attached.adapter(BaseId("tiny")), logits(attached.model)
    assert {parameter_of(path).rpartition(".")[2] for path in adapter.factors} == {"q_proj", parameter}
    assert same(logits(PeftModel.from_pretrained(model("gpt_oss"), adapter.save(tmp_path)).eval()), wanted)
    assert same(logits(attach(model("gpt_oss"), Adapter.load(tmp_path), fuse=()).model), wanted)


def test_joined_and_split_are_each_others_inverse() -> None:
    parts = [{"a": torch.randn(3, 4), "b": torch.randn(5, 3)} for _ in range(6)]
    whole = joined(parts)
    assert all(torch.equal(one[key], two[key]) for one, two in zip(split(whole["a"], whole["b"], 3), parts, strict=True)
               for key in ("a", "b"))  # fmt: skip
    with pytest.raises(ValueError):
        split(whole["a"], whole["b"], 4)


def test_values_are_cut_added_and_scaled_by_expert(tmp_path: Path) -> None:
    wanted, adapter = trained("mixtral")
    changed = {
        "half": (scaled(adapter, 0.5), None),
        "rank 1": (resize(adapter, rank=1)[0], None),
        "by energy": (resize_global(adapter, 0.8)[0], None),
        "twice": (combine([adapter, adapter], [0.5, 0.5])[0], wanted),
    }
    for name, (made, its) in changed.items():
        here = logits(attach(model("mixtral"), Adapter.load(made.save(tmp_path / name)), fuse=()).model)
        assert same(here, logits(merged("mixtral", made))) and same(here, wanted) == (its is not None)
        assert same(logits(PeftModel.from_pretrained(model("mixtral"), tmp_path / name).eval()), here)


def test_rows_of_several_adapters_take_their_own() -> None:
    """Packed documents of two adapters and of none, in one pass, each as it is alone."""
    base = model("qwen3_moe")
    forward = plan_forward(base)
    first, second = (moved(attach(base, BOTH), seed) for seed in (1, 2))
    tokens = (torch.arange(36) * 7) % 97
    batch = Batch.of(tokens, [0, 12, 24, 36])
    with torch.no_grad():
        together = forward.logits(replace(batch, updates=(second.number, -1, first.number)))
        nobody = replace(batch, updates=(-1,) * 3)
        apart = [forward.logits(one) for one in (second.taken_by(batch), nobody, first.taken_by(batch))]
    for number, alone in enumerate(apart):
        rows = slice(12 * number, 12 * number + 12)
        assert same(together[rows], alone[rows])
    assert not same(apart[0], apart[2])


def test_dropout_draws_the_same_for_an_update_whoever_is_beside_it() -> None:
    base = model("qwen3_moe")
    forward = plan_forward(base)
    spec = BOTH.model_copy(update={"dropout": 0.3, "targets": ("experts",)})
    first, second = (moved(attach(base, spec), seed) for seed in (1, 2))
    tokens = (torch.arange(24) * 7) % 97

    def drawn(updates: tuple[int, ...]) -> Tensor:
        for layer in first.layers.values():
            layer.train()
        with torch.no_grad(), first.carried.drawing_apart(first.number, 5, torch.device("cpu")):
            return forward.logits(replace(Batch.of(tokens, [0, 12, 24]), updates=updates))[:12]

    assert same(drawn((first.number, second.number)), drawn((first.number, -1)))
    assert not same(drawn((first.number, -1)), logits_of(forward, first, tokens))


def logits_of(forward: object, attached: Attached, tokens: Tensor) -> Tensor:
    for layer in attached.layers.values():
        layer.eval()
    with torch.no_grad():
        return forward.logits(attached.taken_by(Batch.of(tokens, [0, 12, 24])))[:12]  # type: ignore[attr-defined]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_that_move_the_base_are_saved_as_plain_updates_of_it(init: str, tmp_path: Path) -> None:
    base = model("mixtral")
    before = logits(base)
    spec = AdapterSpec(rank=4, targets="experts", init=init, expert_rank=3)
    attached = attach(base, spec, fuse=())
    assert same(logits(base), before)
    wanted = logits(moved(attached).model)
    adapter = Adapter.load(attached.adapter(BaseId("tiny")).save(tmp_path))
    assert {update.rank for update in adapter.factors.values()} == {6}
    assert same(logits(attach(model("mixtral"), adapter, fuse=()).model), wanted)


def test_each_gets_the_rank_divided_by_the_experts_of_a_token() -> None:
    def ranks(spec: AdapterSpec) -> Mapping[str, int]:
        attached = attach(model("mixtral"), spec, fuse=())
        return {path.rpartition(".")[2]: layer.factors().rank for path, layer in attached.layers.items()}

    assert ranks(BOTH) == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 4),
        "gate_up_proj": 2,
        "down_proj": 2,
    }
    assert set(ranks(AdapterSpec(rank=4, targets="experts", expert_rank=3)).values()) == {3}
    assert ranks(AdapterSpec(rank=1, targets="experts", rank_overrides={"experts.down_proj": 5})) == {
        "gate_up_proj": 1, "down_proj": 5,
    }  # fmt: skip


def test_which_experts_names_mean() -> None:
    def paths(*targets: str, of: str = "mixtral") -> list[str]:
        return list(attach(model(of), AdapterSpec(rank=1, targets=targets), fuse=()).paths)

    every = list(expert_stacks(model("mixtral")))
    assert paths("experts") == every and len(every) == 4
    assert paths("experts", "not layers.0") == every[2:] == paths("layers.1-.experts")
    assert paths("down_proj") == [path for path in every if path.endswith("down_proj")]
    assert all("shared_expert" in path for path in paths("down_proj", of="qwen2_moe"))
    assert not any("experts" in path for path in paths("all-linear"))


@pytest.mark.parametrize("what", [{"magnitude": True}, {"full": True}, {"init": "eva"}])
def test_what_experts_do_not_take_is_refused_by_name(what: dict[str, object]) -> None:
    spec = AdapterSpec.model_validate({"targets": ["all-linear", "experts"], **what})
    with pytest.raises(InputError, match=r"experts\.gate_up_proj"):
        attach(model("mixtral"), spec, start_later=True)


def test_files_whose_parameters_are_not_those_that_they_name_are_refused(tmp_path: Path) -> None:
    _, adapter = trained("mixtral")
    folder = adapter.save(tmp_path)
    config = json.loads((folder / CONFIG).read_text())
    for names in (["experts.down_proj"], ["experts.gate_up_proj", "experts.other"], []):
        (folder / CONFIG).write_text(json.dumps({**config, "target_parameters": names}))
        with pytest.raises(InputError, match="target"):
            Adapter.load(folder)
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(InputError, match="experts"):
        attach(model("qwen3_moe"), Adapter.load(folder))
    fewer = {path: update for path, update in adapter.factors.items() if expert_of(path) != 3}
    with pytest.raises(InputError, match="experts"):
        attach(model("mixtral"), Adapter(adapter.spec, fewer))


def test_a_stand_in_is_what_transformers_calls() -> None:
    base = model("gpt_oss")
    attach(base, AdapterSpec(rank=1, targets="experts"), fuse=())
    layer = base.get_submodule("model.layers.0.mlp.experts")
    assert isinstance(layer, AdaptedExperts) and FrozenExperts.can_wrap(layer.base.module)
    x, experts, weights = torch.randn(5, 32), torch.tensor([[0, 1]] * 5), torch.rand(5, 2)
    assert torch.equal(layer(x, experts, weights), layer(x, router_indices=experts, routing_weights=weights))
    assert expert_path("a.b", 3) == "a.b[3]" and parameter_of("a.b[3]") == "a.b" and expert_of("a.b") is None
