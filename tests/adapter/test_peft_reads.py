"""Models with dense or shared MLPs beside experts: what deltaw writes, PEFT reads whole (decision 9)."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from deltaw.adapter.algebra import resize, scaled
from deltaw.adapter.attach import attach
from deltaw.adapter.combine import combine
from deltaw.adapter.file import CONFIG, Adapter, BaseId
from deltaw.adapter.peft_config import REWRITTEN, rewritten_names
from deltaw.config import AdapterSpec
from deltaw.errors import InputError

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 96,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LATENT = {"num_key_value_heads": 4, "qk_head_dim": 16}
BESIDE: dict[str, dict[str, Any]] = {
    "glm4_moe": {},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "dots1": {},
    "qwen2_moe": {},
    "qwen3_next": {},
    "hunyuan_v1_moe": {},
    "solar_open": {},
    "afmoe": {},
}
ALONE = ("qwen3_moe", "olmoe", "mixtral")  # models with experts and nothing beside them


def model(name: str) -> nn.Module:
    known = type(AutoConfig.for_model(name))().to_dict()
    sizes = {**SIZES, **BESIDE.get(name, {})}
    config = AutoConfig.for_model(name, **{key: value for key, value in sizes.items() if key in known})
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.2)
    return made.requires_grad_(False)


@torch.no_grad()
def logits(of: nn.Module) -> Tensor:
    return of(input_ids=(torch.arange(24).view(2, 12) * 7) % 97, use_cache=False).logits


def trained(name: str, spec: AdapterSpec) -> tuple[Tensor, Adapter]:
    """(its logits, the adapter) of random factors."""
    attached = attach(model(name), spec, fuse=())
    with torch.no_grad():
        for parameter in attached.parameters:
            parameter.normal_(std=0.3)
    return logits(attached.model), attached.adapter(BaseId("tiny"))


def read_by_peft(name: str, adapter: Adapter, folder: Path) -> tuple[Tensor, set[str]]:
    """(the logits, the modules) of what PEFT makes of a saved adapter, which it must do without complaints."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|not found).*")
        read = PeftModel.from_pretrained(model(name), adapter.save(folder)).eval()
    adapted = {
        key.removeprefix("base_model.model.").split(".lora_A")[0] for key in read.state_dict() if ".lora_A" in key
    }
    return logits(read), adapted


def same(got: Tensor, wanted: Tensor) -> bool:
    return bool((got - wanted).abs().max() <= 3e-4 * wanted.abs().max())


SPECS = {
    "all": AdapterSpec(rank=1, alpha=2.0),
    "mlp": AdapterSpec(rank=2, targets="mlp"),
    "ranks and alphas": AdapterSpec(
        rank=1, scaling="rslora", rank_overrides={"down_proj": 3, "q_proj": 2}, alpha_overrides={"gate_proj": 9.0}
    ),
    "names": AdapterSpec(rank=1, targets=("up_proj", "o_proj"), dropout=0.25),
}


@pytest.mark.parametrize(
    ("name", "which"), [(name, "all") for name in (*BESIDE, *ALONE)] + [("glm4_moe", which) for which in SPECS]
)
def test_peft_reads_every_update(name: str, which: str, tmp_path: Path) -> None:
    wanted, adapter = trained(name, SPECS[which])
    got, adapted = read_by_peft(name, adapter, tmp_path)
    assert same(got, wanted) and adapted == set(adapter.factors)
    assert not same(logits(model(name)), wanted)


@pytest.mark.parametrize("which", SPECS)
def test_deltaw_reads_back_what_it_wrote(which: str, tmp_path: Path) -> None:
    wanted, adapter = trained("ernie4_5_moe", SPECS[which])
    again = Adapter.load(adapter.save(tmp_path))
    assert set(again.factors) == set(adapter.factors)
    assert {p: (u.rank, u.scale) for p, u in again.factors.items()} == {
        p: (u.rank, u.scale) for p, u in adapter.factors.items()
    }
    assert same(logits(attach(model("ernie4_5_moe"), again, fuse=()).model), wanted)


def test_only_what_peft_would_rewrite_is_named_by_its_weight(tmp_path: Path) -> None:
    _, adapter = trained("glm4_moe", SPECS["all"])
    config = json.loads((adapter.save(tmp_path) / CONFIG).read_text())
    by_weight = {f"{path}.weight" for path in adapter.factors if ".mlp." in path}
    assert set(config["target_parameters"]) == by_weight != set()
    assert set(config["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    _, plain = trained("qwen3_moe", SPECS["all"])
    assert "target_parameters" not in json.loads((plain.save(tmp_path / "plain") / CONFIG).read_text())


def test_what_is_made_of_such_an_adapter_is_read_whole_too(tmp_path: Path) -> None:
    name = "glm4_moe"
    wanted, adapter = trained(name, SPECS["ranks and alphas"])
    loaded = Adapter.load(adapter.save(tmp_path / "first"))
    attention = Adapter.load(trained(name, AdapterSpec(rank=1, targets="attention"))[1].save(tmp_path / "second"))
    for number, made in enumerate(
        [scaled(loaded, -2.0), resize(loaded, rank=1)[0], combine([attention, loaded], [0.5, 2])[0]]
    ):
        here = logits(attach(model(name), made, fuse=()).model)
        got, adapted = read_by_peft(name, made, tmp_path / str(number))
        assert same(got, here) and adapted == set(made.factors) and not same(here, wanted)


def test_dora_leaves_out_what_peft_could_not_read(tmp_path: Path) -> None:
    attached = attach(model("glm4_moe"), AdapterSpec(rank=1, magnitude=True), fuse=())
    assert attached.paths and not any(".mlp." in path for path in attached.paths)
    assert {path for path in attached.left_out if ".mlp." in path} == set(attached.left_out) != set()
    with torch.no_grad():
        for parameter in attached.parameters:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    got, _ = read_by_peft("glm4_moe", attached.adapter(BaseId("tiny")), tmp_path)
    assert same(got, logits(attached.model))
    with pytest.raises(InputError) as caught:
        attach(model("glm4_moe"), AdapterSpec(rank=1, magnitude=True, targets=("q_proj", "down_proj")))
    assert "down_proj" in caught.value.what and "DoRA" in caught.value.what


def test_pefts_own_table_is_the_one_that_is_asked() -> None:
    from peft.utils import transformers_weight_conversion as theirs

    assert {kind: frozenset(names) for kind, names in theirs._MOE_TARGET_MODULE_MAPPING.items()} == REWRITTEN
    for kind, family in theirs._MODEL_TO_CONVERSION_PATTERN.items():
        holder = nn.Module()
        holder.config = type("Config", (), {"model_type": kind})()
        assert rewritten_names(holder) == REWRITTEN.get(family, frozenset())


def test_experts_that_peft_adapts_itself_are_refused_by_name(tmp_path: Path) -> None:
    _, adapter = trained("glm4_moe", SPECS["all"])
    folder = adapter.save(tmp_path)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "target_parameters": ["gate_up_proj", "down_proj"]}))
    with pytest.raises(InputError) as caught:
        Adapter.load(folder)
    assert "target_parameters" in caught.value.what and "gate_up_proj" in caught.value.what
