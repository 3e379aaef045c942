"""recipes/experts.yaml as its first lines say, on a tiny mixture: trained, resumed to the bit, measured and merged."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deltaw.adapter.file import Adapter
from deltaw.analysis.report import inspect
from deltaw.files.safetensors import load_safetensors
from tests.data.toys import toy
from tests.test_cli import call
from tests.tiny import words

ROOT = Path(__file__).parents[2]
SMALL = ("train.dtype=float32", "train.device=cpu", "train.tokens_per_step=128", "train.tokens_per_batch=64",
         "adapter.rank=4", "evaluate.metrics=[]", "evaluate.general=null", "evaluate.report=false",
         "train.eval_every=null", "train.save_every=2")  # fmt: skip


def mixture(folder: Path, kind: str = "qwen3_moe") -> Path:
    """A tiny random one with a tokenizer, as transformers saves it."""
    tokenizer = toy("chatml")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
             "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}  # fmt: skip
    known = type(AutoConfig.for_model(kind))().to_dict()
    fields = {name: value for name, value in sizes.items() if name in known}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **fields
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the recipe, six steps long."""
    folder = tmp_path_factory.mktemp("experts")
    mixture(folder / "base")
    words(folder / "train.jsonl")
    own = (f"base={folder / 'base'}", f"data.train={folder / 'train.jsonl'}", f"output={folder / 'run'}")
    code, out, err = call("train", str(ROOT / "recipes/experts.yaml"), *own, *SMALL, "train.steps=6")
    assert code == 0, err
    assert "expert" in out + err
    return folder / "run"


def test_the_recipe_trains_attention_and_experts(run: Path) -> None:
    adapter = Adapter.load(run)
    of_experts = [path for path in adapter.factors if path.endswith("]")]
    assert len(of_experts) == 2 * 2 * 4 and len(adapter.factors) == 8 + len(of_experts)
    assert {adapter.factors[path].rank for path in of_experts} == {2}
    assert any(float(adapter.factors[path].plain().dense().norm()) for path in of_experts)
    targets = json.loads((run / "adapter/adapter_config.json").read_text())["target_parameters"]
    assert len(targets) == 4 and all(".experts." in path for path in targets)


def test_it_goes_on_with_the_same_bits(run: Path) -> None:
    other = run.parent / "again"
    own = (f"base={run.parent / 'base'}", f"data.train={run.parent / 'train.jsonl'}", f"output={other}")
    assert (
        call("train", str(ROOT / "recipes/experts.yaml"), *own, *SMALL, "train.steps=4", "train.schedule=constant")[0]
        == 0
    )
    assert call("train", str(other), "train.steps=6", "--extend")[0] == 0
    whole = run.parent / "whole"
    own = (*own[:2], f"output={whole}")
    assert (
        call("train", str(ROOT / "recipes/experts.yaml"), *own, *SMALL, "train.steps=6", "train.schedule=constant")[0]
        == 0
    )
    one, two = (load_safetensors(folder / "adapter/adapter_model.safetensors") for folder in (other, whole))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_merged_it_is_base_and_adapter(run: Path, tmp_path: Path, kind: str) -> None:
    """Into files of one matrix for each expert, and of one for all."""
    base = run.parent / "base" if kind == "qwen3_moe" else mixture(tmp_path / "base", kind)
    adapter = Adapter.load(run)
    if kind != "qwen3_moe":
        from deltaw.adapter.attach import attach
        from deltaw.adapter.file import BaseId
        from deltaw.config import AdapterSpec

        attached = attach(AutoModelForCausalLM.from_pretrained(base), AdapterSpec(rank=2, targets="experts"))
        with torch.no_grad():
            for parameter in attached.parameters:
                parameter.normal_(0, 0.2)
        adapter = attached.adapter(BaseId(str(base)))
    folder = run if kind == "qwen3_moe" else adapter.save(tmp_path / "adapter")
    code, _, err = call("merge", str(folder), "--base", str(base), "-o", str(tmp_path / "merged"))
    assert code == 0, err
    ids = (torch.arange(24).view(2, 12) * 7) % 97
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    before = model(input_ids=ids).logits
    with adapter.merge_into(model), torch.no_grad():
        wanted = model(input_ids=ids).logits
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(input_ids=ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, wanted, atol=1e-3)


def test_what_is_not_a_form_of_it_is_refused_before_work(run: Path, tmp_path: Path) -> None:
    code, _, err = call("export", str(run), "--to", "gguf", "-o", str(tmp_path / "gguf"))
    assert code == 2 and "experts" in err and not (tmp_path / "gguf").exists()
    assert "--merged" not in err and "deltaw merge" in err  # which this type isn't written by
    assert call("export", str(run), "--to", "vllm", "-o", str(tmp_path / "vllm"))[0] == 0
    measures = inspect(run).measures
    assert all(measures[path].base is not None for path in Adapter.load(run).factors)


VERBS: dict[str, tuple[object, ...]] = {
    "eval": ("eval", "RUN", "--rows", 4),
    "generate": ("generate", "RUN", "say 3 ", "--max-tokens", 4),
    "compare": ("compare", "RUN", "RUN", "-o", "OUT/page.html"),
    "scale": ("scale", "RUN", "--factors", "0,1"),
    "scale to": ("scale", "RUN", "--to", 0.5, "-o", "OUT/half"),
    "resize": ("resize", "RUN", "--energy", 0.9, "-o", "OUT/small"),
    "resize to a loss": ("resize", "RUN", "--max-loss-increase", "50%", "-o", "OUT/small"),
    "ties": ("combine", "RUN", "RUN", "--method", "ties", "--density", 0.5, "--rank", 2, "-o", "OUT/ties"),
    "PEFT": ("verify", "RUN", "peft:RUN/adapter", "--prompts", 2),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_such_a_run(run: Path, tmp_path: Path, verb: str) -> None:
    words = [str(word).replace("RUN", str(run)).replace("OUT", str(tmp_path)) for word in VERBS[verb]]
    code, _, err = call(*words)
    assert code == 0, err
