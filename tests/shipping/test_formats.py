"""PEFT's and vLLM's folders: what real PEFT makes of them, and vLLM's own rules, read anew here."""

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from deltaw.adapter.algebra import resize_global
from deltaw.adapter.attach import attach
from deltaw.adapter.file import Adapter, BaseId
from deltaw.adapter.peft_tensors import A, B
from deltaw.base.fingerprint import fingerprint_of
from deltaw.commands.export import export_named
from deltaw.errors import InputError
from deltaw.files.template import CHATML
from deltaw.shipping.destination import Options
from deltaw.shipping.vllm import RANKS, max_lora_rank
from tests.shipping.models import base_folder, loaded, random_adapter
from tests.test_cli import call

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "qwen2_moe")
MIXED = {"rank_overrides": {"q_proj": 2, "down_proj": 4}, "alpha_overrides": {"q_proj": 5.0}, "scaling": "rslora"}
IDS = torch.tensor([[5, 17, 3, 88, 42, 9, 61, 2, 30, 77]])


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def shipped(folder: Path, to: str, base: Path, adapter: Adapter, **options: Any) -> Path:
    """The export of an adapter."""
    adapter.save(folder / "adapter")
    export_named(str(folder / "adapter"), to, str(folder / "out"), base=str(base), options=Options(**options))
    return folder / "out"


def same(got: Tensor, wanted: Tensor) -> bool:
    return bool((got - wanted).abs().max() <= 2e-5 * wanted.abs().max())


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: base_folder(folder / name, name) for name in FAMILIES}


@pytest.mark.parametrize("kind", ["lora", "dora", "mixed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_gives_the_same_logits(bases: dict[str, Path], name: str, kind: str, tmp_path: Path) -> None:
    if kind == "mixed" and name in ("gpt2", "phi3"):
        pytest.skip("has no q_proj")
    more = MIXED if kind == "mixed" else {}
    adapter = random_adapter(bases[name], "dora" if kind == "dora" else "lora", **more)
    wanted = logits(attach(loaded(bases[name]), adapter, fuse=()).model)
    out = shipped(tmp_path, "peft", bases[name], adapter)
    assert same(logits(PeftModel.from_pretrained(loaded(bases[name]), out)), wanted)
    assert not same(logits(loaded(bases[name])), wanted)


# vLLM's reading of the same files, as its peft_helper.py and lora_model.py do it.
REFUSED = ("modules_to_save", "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_qalora")


def vllm_reads(
    folder: Path, expected: set[str], bound: int, *, old: bool = False
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """(A, B, scale) by module. `old`: a server that knows neither pattern. Raises ValueError as vLLM does."""
    config = json.loads((folder / "adapter_config.json").read_text())
    if any(config.get(field) for field in REFUSED) or config.get("bias", "none") != "none":
        raise ValueError("unsupported")
    if isinstance(config["init_lora_weights"], str) or not isinstance(config["target_modules"], list):
        raise ValueError("unsupported")
    ranks = {} if old else config["rank_pattern"]
    alphas = {} if old else config["alpha_pattern"]
    if max([config["r"], *ranks.values()]) > bound:
        raise ValueError("rank")
    tensors = load_file(folder / "adapter_model.safetensors")
    updates = {}
    for path in {key.removeprefix("base_model.model.").removesuffix(A).removesuffix(B) for key in tensors}:
        if path.rpartition(".")[2] not in expected:
            raise ValueError(f"{path} is not expected")

        def at(pattern: dict[str, Any], default: Any, path: str = path) -> Any:
            return next((v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), default)

        rank, alpha = at(ranks, config["r"]), at(alphas, config["lora_alpha"])
        scale = alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank
        a, b = tensors[f"base_model.model.{path}{A}"], tensors[f"base_model.model.{path}{B}"]
        assert a.shape[0] == b.shape[1] <= bound
        updates[path] = (a, b, scale)
    return updates


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_vllm_reads_the_same_update(bases: dict[str, Path], name: str, plain: bool, tmp_path: Path) -> None:
    adapter, _ = resize_global(random_adapter(bases[name], alpha=5.0, scaling="rslora"), 0.6)
    assert len({update.rank for update in adapter.factors.values()}) > 1
    out = shipped(tmp_path, "vllm", bases[name], adapter, plain=plain)
    names = {path.rpartition(".")[2] for path in adapter.factors}
    read = vllm_reads(out, names, bound=8, old=plain)
    assert read.keys() == adapter.factors.keys()
    for path, (a, b, scale) in read.items():
        torch.testing.assert_close(scale * b @ a, adapter.factors[path].dense(), rtol=1e-5, atol=1e-6)
    config = json.loads((out / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == names
    if plain:
        assert config["r"] == config["lora_alpha"] and not config["use_rslora"]
        assert not config["rank_pattern"] and len({len(a) for a, _, _ in read.values()}) == 1
    wanted = logits(attach(loaded(bases[name]), adapter, fuse=()).model)
    assert same(logits(PeftModel.from_pretrained(loaded(bases[name]), out)), wanted)


def test_an_old_vllm_would_get_an_adapter_that_is_not_plain_wrong(bases: dict[str, Path], tmp_path: Path) -> None:
    """Or `plain` would be for nothing."""
    adapter = random_adapter(bases["llama"], **MIXED)
    out = shipped(tmp_path, "vllm", bases["llama"], adapter)
    names = {path.rpartition(".")[2] for path in adapter.factors}
    read = vllm_reads(out, names, bound=8, old=True)
    wrong = [p for p, (a, b, s) in read.items() if not torch.allclose(s * b @ a, adapter.factors[p].dense(), atol=1e-4)]
    assert {path.rpartition(".")[2] for path in wrong} == {"q_proj", "down_proj"}
    with pytest.raises(ValueError, match="not expected"):
        vllm_reads(out, names - {"q_proj"}, bound=8)


def test_the_bound_is_the_least_that_will_do() -> None:
    for ranks in ([1], [2], [16], [17, 3], [300], [512]):
        bound = max_lora_rank(ranks)
        assert bound in RANKS and bound >= max(ranks)
        assert not any(max(ranks) <= other < bound for other in RANKS)


def test_the_usage_names_the_bound(bases: dict[str, Path], tmp_path: Path) -> None:
    out = shipped(tmp_path, "vllm", bases["llama"], random_adapter(bases["llama"], rank=9))
    assert "--max-lora-rank 16" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "kind", "to", "mend"),
    [
        ("llama", "dora", "vllm", "deltaw merge"),
        ("llama", "full", "vllm", "deltaw merge"),
        ("llama", "full", "peft", "deltaw extract"),
        ("gpt2", "lora", "vllm", "deltaw merge"),
        ("llama", "full", "mlx", "deltaw merge"),
        ("qwen2_moe", "lora", "mlx", "deltaw merge"),
    ],
)
def test_what_a_place_can_not_hold_is_refused_before_anything_is_written(
    bases: dict[str, Path], name: str, kind: str, to: str, mend: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        shipped(tmp_path, to, bases[name], random_adapter(bases[name], kind))
    assert mend in str(caught.value.fix)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_what_helps_can_be_pasted(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        shipped(tmp_path, "peft", bases["llama"], random_adapter(bases["llama"], "full"))
    line = str(caught.value.fix).rpartition("deltaw extract ")[2]
    assert call("extract", *shlex.split(line))[0] == 0
    export_named(str(tmp_path / "adapter-extract"), "peft", str(tmp_path / "out"), base=str(bases["llama"]))
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


def test_ranks_beyond_vllms_and_all_problems_at_once(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = random_adapter(bases["gpt2"], "dora")
    wide = {}
    for path, update in adapter.factors.items():
        m, n = update.shape
        low = type(update.low)(torch.randn(600, n), torch.randn(m, 600), 6 / 600)
        wide[path] = type(update)(low, update.magnitude_M)
    spec = adapter.spec.model_copy(update={"rank": 600})
    with pytest.raises(InputError) as caught:
        shipped(tmp_path, "vllm", bases["gpt2"], Adapter(spec, wide, adapter.base, adapter.fan_in_fan_out))
    for part in ("DoRA", "512", "gpt2"):
        assert part in caught.value.what
    assert "--rank 512" in str(caught.value.fix)


@pytest.mark.parametrize("to", ["peft", "vllm", "mlx"])
def test_an_adapter_of_another_model_is_refused(bases: dict[str, Path], to: str, tmp_path: Path) -> None:
    """Of another shape, or with layers that this base hasn't got; without a fingerprint nothing else would tell."""
    wider = base_folder(tmp_path / "wider", "llama", hidden_size=64)
    for number, other in enumerate((wider, bases["phi3"])):
        with pytest.raises(InputError):
            shipped(tmp_path / str(number), to, bases["llama"], random_adapter(other))
        assert not (tmp_path / str(number) / "out").exists()


def test_a_strangers_path_and_list_become_names(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT's config may name the base by a folder of its author's, and the modules by an expression."""
    adapter = random_adapter(bases["llama"], targets=("q_proj", "v_proj"))
    adapter.save(tmp_path / "theirs")
    (tmp_path / "theirs/deltaw.json").unlink()
    file = tmp_path / "theirs/adapter_config.json"
    config = json.loads(file.read_text())
    config |= {"base_model_name_or_path": "/home/somebody/secret/llama", "target_modules": r".*\.(q|v)_proj"}
    file.write_text(json.dumps(config))
    export_named(str(tmp_path / "theirs"), "vllm", str(tmp_path / "out"), base=str(bases["llama"]))
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"] and config["base_model_name_or_path"] == "llama"
    assert "secret" not in "".join(file.read_text() for file in (tmp_path / "out").glob("*.[jm]*"))


def test_the_template_that_was_trained_under_goes_along(bases: dict[str, Path], tmp_path: Path) -> None:
    """Written beside the adapter, and no longer said in the tokenizer's config; the end of a turn is a stop."""
    adapter = random_adapter(bases["llama"])
    template = CHATML.replace("<|im_end|>", "<|endoftext|>") + "{# mine #}"
    adapter.save(tmp_path / "adapter")
    (tmp_path / "adapter/chat_template.jinja").write_text(template)
    export_named(str(tmp_path / "adapter"), "peft", str(tmp_path / "out"), base=str(bases["llama"]))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == template
    own = AutoTokenizer.from_pretrained(bases["llama"])
    assert own.chat_template != template and tokenizer.get_vocab() == own.get_vocab()
    assert "chat_template" not in json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    stops = json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"]
    assert stops == [own.eos_token_id, own.convert_tokens_to_ids("<|endoftext|>")]
    export_named(str(tmp_path / "adapter"), "vllm", str(tmp_path / "vllm"), base=str(bases["llama"]))
    card = (tmp_path / "vllm/README.md").read_text()
    assert "--chat-template ./chat_template.jinja" in card and "--generation-config ." in card


def test_the_tokenizers_own_template_stays_where_it_is(bases: dict[str, Path], tmp_path: Path) -> None:
    out = shipped(tmp_path, "vllm", bases["llama"], random_adapter(bases["llama"]))
    files = [file for file in bases["llama"].iterdir() if "token" in file.name or "template" in file.name]
    assert files and all((out / file.name).read_bytes() == file.read_bytes() for file in files)
    assert "--chat-template" not in (out / "README.md").read_text()


def test_another_base_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = random_adapter(bases["llama"])
    model = loaded(bases["llama"])
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    other = fingerprint_of(model.parameters(), model.config)
    adapter = Adapter(adapter.spec, adapter.factors, BaseId("me/other", None, other))
    with pytest.raises(InputError):
        shipped(tmp_path, "peft", bases["llama"], adapter)
    assert not (tmp_path / "out").exists()


def test_a_lost_scale_would_be_seen(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = random_adapter(bases["llama"])
    out = shipped(tmp_path, "vllm", bases["llama"], adapter, plain=True)
    tensors = load_file(out / "adapter_model.safetensors")
    half = {key: tensor / 2 if key.endswith(B) else tensor for key, tensor in tensors.items()}
    save_file(half, out / "adapter_model.safetensors")
    wanted = logits(attach(loaded(bases["llama"]), adapter, fuse=()).model)
    assert not same(logits(PeftModel.from_pretrained(loaded(bases["llama"]), out)), wanted)
