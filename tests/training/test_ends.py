"""Runs that train tokens by name, embeddings and heads: they resume to the bit, are asked, started from and merged with
the tokens that they brought, and go nowhere that can't hold them."""

import copy
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaw.adapter.file import Adapter
from deltaw.commands.export import export
from deltaw.commands.merge import merge_named
from deltaw.config import parse_config
from deltaw.data.added import add_tokens
from deltaw.data.render import Renderer
from deltaw.errors import InputError
from deltaw.model import open_model
from deltaw.show.progress import Display
from deltaw.training.run import resume, train
from deltaw.training.stop import Stopped
from tests.base.gguf_models import model_of, write_model
from tests.data.toys import toy
from tests.test_cli import call
from tests.tiny import run_file, tiny_base
from tests.training.test_loop import stop_at

QUIET = Display(quiet=True)
TOKENS = ["<tool>", "</tool>"]
BARE = {"samples": 0, "general": None, "report": False, "metrics": []}
ADAPTERS: dict[str, dict[str, Any]] = {
    "tokens": {"tokens": TOKENS},
    "own": {"tokens": ["b"]},
    "also": {"also": {"embed_tokens": "lora", "lm_head": "whole"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ends")
    for tied in (True, False):
        tiny_base(folder / f"base-{tied}", tie_word_embeddings=tied)
    rows = [{"prompt": f"say {i} ", "completion": f"<tool>{'ab' * (1 + i % 5)}</tool>"} for i in range(60)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for tied in (True, False):
        train(fields(folder, tied, "tokens", f"tokens-{tied}"), display=QUIET)
    train(fields(folder, True, "also", "also-True"), display=QUIET)
    train(fields(folder, True, "own", "own-True"), display=QUIET)
    return folder


def fields(folder: Path, tied: bool, kind: str, output: str, **changes: Any) -> Any:
    adapter = {"rank": 4, "alpha": 8, **ADAPTERS[kind]}
    base = str(folder / f"base-{tied}")
    return parse_config(
        {**run_file(folder, adapter=adapter, base=base, output=str(folder / output), evaluate=BARE), **changes}
    )


@pytest.mark.parametrize("run", ["tokens-True", "also-True"])
def test_stopped_and_resumed_is_the_same_to_the_bit(folder: Path, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = run.partition("-")[0]
    stop_at(monkeypatch, 3, signal.SIGTERM)
    with pytest.raises(Stopped):
        train(fields(folder, True, kind, f"cut-{kind}"), display=QUIET)
    monkeypatch.undo()
    resumed = resume(folder / f"cut-{kind}", display=QUIET)
    assert resumed.fingerprint == Adapter.load(folder / run).fingerprint


@pytest.mark.parametrize("run", ["tokens-True", "tokens-False", "also-True"])
def test_a_merged_run_answers_as_the_run(folder: Path, run: str) -> None:
    model = open_model(folder / run, base=folder / f"base-{run.partition('-')[2]}")
    ids = model.prompt_ids("say 7 <tool>", chat=False)
    merge_named(str(folder / run), str(folder / f"merged-{run}"))
    merged = AutoModelForCausalLM.from_pretrained(folder / f"merged-{run}", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / f"merged-{run}")
    assert merged.config.tie_word_embeddings == (run == "tokens-True")
    own = model.base.model
    with torch.no_grad():
        mine, other = (one(input_ids=torch.tensor([ids])).logits for one in (own, merged))
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    if run != "also-True":
        assert tokenizer.convert_tokens_to_ids("<tool>") == ids[-1] == len(toy("chatml"))
        assert isinstance(model.generate("say 7 ", chat=False, max_new_tokens=3), str)
        beside = AutoTokenizer.from_pretrained(folder / run / "adapter")
        assert beside("<tool>", add_special_tokens=False)["input_ids"] == [ids[-1]]


def test_a_run_goes_on_from_one_with_tokens(folder: Path) -> None:
    start = {"from": str(folder / "tokens-True")}
    later = train(fields(folder, True, "tokens", "later", adapter=start), display=QUIET)
    assert later.spec.tokens == tuple(TOKENS) and len(later.replaced) == 1


@pytest.mark.parametrize("to", ["vllm", "mlx", "gguf"])
def test_what_a_destination_can_not_hold_is_refused_by_name(folder: Path, to: str) -> None:
    with pytest.raises(InputError, match=r"token|embed_tokens") as refused:
        export(folder / "tokens-True", to=to, output=folder / f"out-{to}")
    assert "merge" in (refused.value.fix or "")


def test_tokens_that_no_row_has_are_refused_before_the_base_is_read(folder: Path) -> None:
    with pytest.raises(InputError, match="<nowhere>"):
        train(
            fields(folder, True, "tokens", "never", adapter={"rank": 2, "tokens": ["<tool>", "<nowhere>"]}),
            display=QUIET,
        )


def test_a_special_token_that_is_named_may_stand_in_rows() -> None:
    """A reserved one; those of the template stay the template's."""
    tokenizer = copy.deepcopy(toy("chatml"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|spare|>"]})
    tokens = add_tokens(tokenizer, ["<|spare|>", "<|im_end|>", "<new>"])
    assert [bool(token.pieces) for token in tokens] == [False, False, True]
    renderer = Renderer(tokenizer, tokens=tokens)
    ids = renderer.prompt_ids("a<|spare|>b<|im_end|><new>")
    assert tokens[0].id in ids and tokens[2].id in ids and tokens[1].id not in ids
    assert "<|spare|>" in renderer.decode(ids) and renderer.rules["tokens"]["<new>"] == tokens[2].id


VERBS: dict[str, tuple[object, ...]] = {
    "eval": ("eval", "RUN", "--rows", 4),
    "generate": ("generate", "RUN", "say 3 ", "--max-tokens", 4),
    "inspect": ("inspect", "RUN", "-o", "OUT/page.html"),
    "compare": ("compare", "RUN", "RUN", "-o", "OUT/page.html"),
    "resize": ("resize", "RUN", "--rank", 2, "-o", "OUT/small"),
    "resize to a loss": ("resize", "RUN", "--max-loss-increase", "50%", "-o", "OUT/small"),
    "plan": ("plan", "RUN/config.yaml"),
    "merge and verify": ("verify", "RUN", "MERGED", "--prompts", 2),
    "merge to 16 bits and verify": ("verify", "RUN", "MERGED16", "--prompts", 2),
    "PEFT": ("verify", "RUN", "peft:RUN/adapter", "--prompts", 2),
    "GGUF": ("export", "RUN", "--to", "gguf", "--merged", "--type", "F32", "-o", "OUT/gguf"),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("run", ["tokens-True", "tokens-False", "also-True", "own-True", "own-int8", "tokens-keep"])
def test_every_verb_takes_such_a_run(folder: Path, tmp_path: Path, run: str, verb: str) -> None:
    kind, _, base = run.partition("-")
    if not (folder / run).exists():
        how = {"base": str(kept(folder)), "base_weights": "keep"} if base == "keep" else {}
        how |= {"base_weights": "int8"} if base == "int8" else {}
        train(fields(folder, True, kind, run, **how), display=QUIET)
    for name in ("MERGED", "MERGED16"):
        if name in VERBS[verb]:
            merge_named(str(folder / run), str(tmp_path / name), dtype="float16" if name == "MERGED16" else "float32")
    places = {"RUN": str(folder / run), "OUT": str(tmp_path), "MERGED": str(tmp_path / "MERGED")}
    words = [re.sub("RUN|OUT|MERGED", lambda found: places[found[0]], str(word)) for word in VERBS[verb]]
    code, out, err = call(*words)
    if base == "keep" and verb == "GGUF":  # the file's own tokenizer is taken as it is
        assert code == 2 and "deltaw merge" in err
    else:  # what is dense elsewhere has other numbers than what is packed here
        assert code == 0 or (
            words[0] == "verify" and base in ("int8", "keep") and code == 1 and "base_weights" in out
        ), err


def kept(folder: Path) -> Path:
    """A base that is a GGUF."""
    if not (path := folder / "kept.gguf").exists():
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 16}
        write_model(path, model_of("llama", **sizes, num_hidden_layers=1), types=("Q8_0", "Q4_1"))
    return path


def test_what_no_scale_or_server_can_have_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    for verb in (("scale", folder / "own-True"), ("serve", folder / "tokens-True", "--port", 0)):
        code, _, err = call(*verb)
        assert code == 2 and "deltaw " in err and "Traceback" not in err
