"""Chat templates, stop tokens and tokens of one's own: what lint says when they aren't the base's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from deltaw.adapter.attach import attach
from deltaw.adapter.file import BaseId
from deltaw.base.load import open_base
from deltaw.config import AdapterSpec
from deltaw.data.render import Renderer, open_tokenizer
from deltaw.model import PLAIN
from deltaw.shipping.lint.chat import fingerprint
from deltaw.shipping.lint.finding import DESTINATIONS, LLAMA_CPP, LOADS, MLX, PEFT, UNSURE, VLLM, WRONG, Effect
from deltaw.shipping.lint.lint import lint
from deltaw.shipping.lint.verdict import Verdict
from tests.data.toys import CHATML, toy
from tests.test_cli import call
from tests.tiny import run_file, tiny_base, words

KNOWN = {"DW108", "DW508"}
OTHER = CHATML.replace("<|im_end|>", "<|endoftext|>")  # ends turns with another token


def based(folder: Path, template: str | None = CHATML) -> Path:
    """A tiny base with this chat template, or with none."""
    tiny_base(folder)
    tokenizer = open_tokenizer(folder)
    tokenizer.chat_template = template
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return based(tmp_path_factory.mktemp("lint") / "base")


def trained(folder: Path, base: Path, template: str) -> Path:
    """An adapter that records this fingerprint of a template."""
    attached = attach(open_base(str(base), dtype="float32", device="cpu").model, AdapterSpec(rank=2))
    with torch.no_grad():
        for parameter in attached.parameters:
            parameter.normal_()
    return attached.adapter(BaseId("org/base", None, "", template)).save(folder)


def codes(verdict: Verdict) -> set[str]:
    return {found.code for found in verdict.findings} - KNOWN


def effects(verdict: Verdict, code: str) -> dict[str, Effect]:
    (found,) = [found for found in verdict.findings if found.code == code]
    return dict(found.effects)


def test_the_fingerprint_is_the_renderers(base: Path) -> None:
    assert fingerprint(CHATML) == Renderer(open_tokenizer(base)).template_fingerprint


@pytest.mark.parametrize("template", [fingerprint(CHATML), PLAIN, "none", ""])
def test_the_bases_own_template_or_none_is_fine(template: str, base: Path, tmp_path: Path) -> None:
    assert codes(lint(trained(tmp_path / "a", base, template), base=str(base))) == set()


def test_a_template_that_is_nowhere(base: Path, tmp_path: Path) -> None:
    bare = based(tmp_path / "bare", None)
    verdict = lint(trained(tmp_path / "a", bare, fingerprint(CHATML)), base=str(bare))
    assert effects(verdict, "DW601") == dict.fromkeys(DESTINATIONS, WRONG) and verdict.exit_code == 1
    other = lint(trained(tmp_path / "b", base, fingerprint(OTHER)), base=str(base))
    assert codes(other) == {"DW602"} and other.exit_code == 1


def test_a_template_that_the_folder_brings(base: Path, tmp_path: Path) -> None:
    """PEFT and transformers take it from there; servers have the base's."""
    folder = trained(tmp_path / "a", base, fingerprint(CHATML.replace("user", "human")))
    own = CHATML + "{# mine #}"
    (folder / "chat_template.jinja").write_text(own)
    record = json.loads((folder / "deltaw.json").read_text())
    record["base"]["template"] = fingerprint(own)
    (folder / "deltaw.json").write_text(json.dumps(record))
    verdict = lint(folder, base=str(base))
    found = effects(verdict, "DW602")
    assert found[PEFT] is LOADS and found[VLLM] is found[LLAMA_CPP] is found[MLX] is WRONG
    assert all("--chat-template" in found.fix for found in verdict.findings if found.code == "DW602")


def test_a_strangers_template(base: Path, tmp_path: Path) -> None:
    """Without a record the folder's own is what it was trained under, wherever it stands."""
    folder = trained(tmp_path / "a", base, "")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    assert codes(lint(folder, base=str(base))) == set()
    given: Any = [{"name": "tools", "template": CHATML}, {"name": "default", "template": OTHER}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": given}))
    assert "DW602" in codes(lint(folder, base=str(base)))


def test_a_stop_token_that_the_base_does_not_stop_at(base: Path, tmp_path: Path) -> None:
    """The base stops at <|im_end|>; under this template a turn ends with another token."""
    folder = trained(tmp_path / "a", base, fingerprint(OTHER))
    (folder / "chat_template.jinja").write_text(OTHER)
    verdict = lint(folder, base=str(base))
    assert codes(verdict) == {"DW602", "DW603"}
    found = effects(verdict, "DW603")
    assert found[PEFT] is found[VLLM] is WRONG and found[LLAMA_CPP] is UNSURE
    token = toy("chatml").convert_tokens_to_ids("<|endoftext|>")
    assert any(f"[{token}]" in f.fix for f in verdict.findings if f.code == "DW603")


def test_a_stop_token_that_was_never_trained(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    stop = toy("chatml").eos_token_id
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][stop] *= 1e-6
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    folder = trained(tmp_path / "a", base, fingerprint(CHATML))
    assert effects(lint(folder, base=str(base)), "DW604") == dict.fromkeys(DESTINATIONS, WRONG)
    # The same stop token where the adapter brings a head of its own
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {**weights, "base_model.model.lm_head.weight": tensors["lm_head.weight"]}, folder / "adapter_model.safetensors"
    )
    assert "DW604" not in codes(lint(folder, base=str(base)))


def test_tokens_that_the_base_has_not(base: Path, tmp_path: Path) -> None:
    folder = trained(tmp_path / "a", base, "")
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 1, "content": "<|im_end|>"}]}))
    known = toy("chatml").convert_tokens_to_ids("<|im_end|>")
    assert ("DW606" in codes(lint(folder, base=str(base)))) == (known != 1)
    (folder / "tokenizer.json").unlink()
    added = {str(known): {"content": "<|im_end|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    assert codes(lint(folder, base=str(base))) == set()
    added["400"] = {"content": "<|think|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    assert effects(lint(folder, base=str(base)), "DW606") == dict.fromkeys(DESTINATIONS, WRONG)


def test_a_run_and_its_template(tmp_path: Path) -> None:
    """It lies beside the adapter, so PEFT's users have it, and servers, which take the base's, haven't."""
    based(tmp_path / "base", None)
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "ab"}]}
        for i in range(40)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "train.jsonl"), "eval": 4, "template": "chatml"}
    train = {**run_file(tmp_path)["train"], "steps": 2}
    none = {"general": None, "report": False, "samples": 0}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_file(tmp_path, data=data, train=train, evaluate=none)))
    assert call("train", tmp_path / "run.yaml", "--quiet")[0] == 0
    own = lint(tmp_path / "run")
    assert codes(own) - {"DW502"} == {"DW602"} and own.exit_code == 1 and effects(own, "DW602")[PEFT] is LOADS
    (tmp_path / "run/adapter/chat_template.jinja").unlink()  # then the run's settings alone know it
    verdict = lint(tmp_path / "run")
    assert codes(verdict) - {"DW502"} == {"DW602"} and effects(verdict, "DW602")[PEFT] is WRONG
    (found,) = [found for found in verdict.findings if found.code == "DW602"]
    assert "--to peft" in found.fix


def test_rows_that_train_no_stop_token(tmp_path: Path) -> None:
    """Rendered texts whose answers go on: nothing in them says when to stop."""
    tiny_base(tmp_path / "base")
    words(tmp_path / "train.jsonl")
    train = {**run_file(tmp_path)["train"], "steps": 2}
    none = {"general": None, "report": False, "samples": 0}
    raw = run_file(tmp_path, train=train, evaluate=none)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    assert call("train", tmp_path / "run.yaml", "--quiet")[0] == 0
    assert codes(lint(tmp_path / "run")) == {"DW502"}
    base = tmp_path / "base"
    ends = json.loads((base / "generation_config.json").read_text())
    # The data's rows end with eos; one that the renderer would not take for a stop can't be made by settings, so the
    # rows are cut: no answer is whole.
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    config["data"] |= {"max_length": 6, "too_long": "truncate"}
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    verdict = lint(tmp_path / "run")
    assert "DW605" in codes(verdict) and verdict.exit_code == 1 and ends
