"""verify: a right pair passes, and what is made wrong on purpose doesn't. Everything in torch; the real llama.cpp and
servers have files of their own."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import deltaw
from deltaw.errors import InputError
from deltaw.shipping.verify.compare import verify
from deltaw.shipping.verify.verdict import Verification
from tests.shipping.sides import base_and_adapter, chats, merged, scaled, texts
from tests.test_cli import call


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    base, adapter = base_and_adapter(folder)
    texts(folder / "rows.jsonl")
    chats(folder / "chats.jsonl")
    merged(base, adapter, folder / "merged")
    merged(base, adapter, folder / "merged32", dtype=torch.float32)
    merged(base, adapter, folder / "merged16", dtype=torch.float16)
    return folder


def held(place: Path, a: str, b: str, data: str = "rows.jsonl") -> Verification:
    return verify(a, b, data=str(place / data), base=None, prompts=8, tokens=10)


@pytest.fixture(autouse=True)
def names(place: Path, monkeypatch) -> None:
    """The adapter names its base by its folder's name: found from beside it."""
    monkeypatch.chdir(place)


PAIRS = [
    ("adapter", "merged", "rows.jsonl"),
    ("adapter", "merged", "chats.jsonl"),
    ("merged", "adapter", "chats.jsonl"),
    ("adapter", "merged32", "rows.jsonl"),
    ("adapter", "merged16", "rows.jsonl"),
    ("adapter", "peft:adapter", "chats.jsonl"),
    ("peft:adapter", "merged", "rows.jsonl"),
    ("adapter", "adapter", "rows.jsonl"),
]


@pytest.mark.parametrize(("a", "b", "data"), PAIRS)
def test_right_pairs_agree(place: Path, a: str, b: str, data: str) -> None:
    result = held(place, a, b, data)
    assert result.agree, result.text()
    assert result.tolerance.measured and result.kl <= result.tolerance.kl
    assert result.effect.kl > 100 * result.kl  # the adapter does something, or nothing was shown
    assert result.count("prompt") == 0 and len(result.rows) == 8
    json.dumps(result.to_json(), allow_nan=False)


def test_the_tolerance_follows_from_the_types(place: Path) -> None:
    """PEFT runs in float32 beside deltaw, a merged folder was rounded to bfloat16."""
    exact, rounded = held(place, "adapter", "peft:adapter"), held(place, "adapter", "merged")
    assert exact.tolerance.kl < rounded.tolerance.kl / 100
    assert exact.kl < rounded.kl / 100
    # Neither far too wide nor too narrow: what is measured is what is expected, within what is allowed.
    assert rounded.kl > max(rounded.tolerance.draws) / 16


def permuted(path: str, delta: Tensor) -> Tensor:
    """The rows of q and k as GGUF has them."""
    if not path.endswith(("q_proj", "k_proj")):
        return delta
    heads = 4 if path.endswith("q_proj") else 2
    return delta.reshape(heads, 2, -1, delta.shape[1]).swapaxes(1, 2).reshape(delta.shape)


FAULTS = {
    "a wrong permutation": permuted,
    "a lost scale": lambda path, delta: delta / 2,
    "rsLoRA's scale": lambda path, delta: delta * 2,  # √r
    "a dropped kind of module": lambda path, delta: delta * (not path.endswith("v_proj")),
    "a dropped module": lambda path, delta: delta * (path != "model.layers.1.mlp.down_proj"),
    "not applied": lambda path, delta: delta * 0,
    "subtracted": lambda path, delta: -delta,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_seen(place: Path, tmp_path: Path, fault: str) -> None:
    wrong = merged(place / "base", place / "adapter", tmp_path / "wrong", FAULTS[fault])
    result = held(place, "adapter", str(wrong))
    assert not result.agree and result.kl > result.tolerance.kl
    assert result.count("prompt") == 0
    if fault == "a lost scale":
        assert 0.2 < result.effect.strength < 0.8
    if fault == "not applied":
        assert result.effect.strength == pytest.approx(1, abs=0.05) and result.effect.share == pytest.approx(1, abs=0.1)


def test_a_lost_scale_in_float32_beside_peft(place: Path, tmp_path: Path) -> None:
    scaled(place / "adapter", tmp_path / "weaker", 0.99)  # a hundredth is seen where nothing is rounded
    assert not held(place, "adapter", f"peft:{tmp_path / 'weaker'}").agree


def test_another_base(place: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.05
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(place / "base").save_pretrained(tmp_path / "other")
    wrong = merged(tmp_path / "other", place / "adapter", tmp_path / "wrong")
    assert not held(place, "adapter", str(wrong)).agree


def test_a_changed_head(place: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "merged")
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight * 1.05)
    model.save_pretrained(tmp_path / "wrong")
    AutoTokenizer.from_pretrained(place / "base").save_pretrained(tmp_path / "wrong")
    assert not held(place, "adapter", str(tmp_path / "wrong")).agree


def test_a_changed_template_is_seen_in_the_prompts_and_not_taken_for_weights(place: Path, tmp_path: Path) -> None:
    wrong = merged(place / "base", place / "adapter", tmp_path / "wrong")
    tokenizer = AutoTokenizer.from_pretrained(wrong)
    tokenizer.chat_template = tokenizer.chat_template.replace("add_generation_prompt", "false")
    tokenizer.save_pretrained(wrong)
    result = held(place, "adapter", str(wrong), "chats.jsonl")
    assert result.count("prompt") == 8 and not result.agree
    assert result.kl < result.tolerance.kl and len(result.reasons) == 1  # the weights are right
    assert held(place, "adapter", str(wrong)).agree  # and so are prompts without the template


def test_a_type_too_coarse_for_the_adapter_is_no_excuse(place: Path, tmp_path: Path) -> None:
    """Weights of two bits: rounding explains anything, so the adapter's own effect is what is allowed."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(place / "merged")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                step = weight.abs().amax(1, keepdim=True) / 2
                weight.copy_((weight / step).round() * step)
    model.save_pretrained(tmp_path / "coarse")
    AutoTokenizer.from_pretrained(place / "base").save_pretrained(tmp_path / "coarse")
    assert not held(place, "adapter", str(tmp_path / "coarse")).agree


def test_an_adapter_that_does_nothing_is_said(place: Path, tmp_path: Path) -> None:
    scaled(place / "adapter", tmp_path / "idle", 0.0)
    result = held(place, str(tmp_path / "idle"), "base")
    assert result.agree and result.effect.kl < 1e-9
    assert any("nothing" in note for note in result.notes)


def test_without_a_run_and_data_built_in_text_is_asked(place: Path) -> None:
    result = verify("adapter", "merged", prompts=4, tokens=4)
    assert result.agree and all(row.origin.startswith("general") for row in result.rows)
    assert any(row.prompt.startswith("user:") for row in result.rows)  # the adapter has a template


def test_a_run_is_asked_its_own_held_out_rows(place: Path, tmp_path: Path, monkeypatch) -> None:
    from tests.tiny import run_file

    texts(tmp_path / "train.jsonl", 40)
    fields = run_file(tmp_path, base=str(place / "base"), data={"train": str(tmp_path / "train.jsonl"), "eval": 6})
    deltaw.train(deltaw.parse_config(fields))
    run = str(tmp_path / "run")
    result = deltaw.verify(run, f"peft:{run}", prompts=4, tokens=6)
    held_out = {row.origin for row in result.rows}
    assert result.agree and len(held_out) == 4
    config = deltaw.load_config(tmp_path / "run/config.yaml")
    from deltaw.data.prepare import prepare
    from deltaw.data.render import Renderer, open_tokenizer

    dataset = prepare(config.data, Renderer(open_tokenizer(place / "base")))
    assert held_out <= {row.origin for row in dataset.eval}


def test_the_command(place: Path, tmp_path: Path) -> None:
    rows = ["--data", "rows.jsonl", "--prompts", 4]
    code, out, err = call("verify", "adapter", "merged", *rows, "-o", tmp_path / "page.html", "--json")
    result = json.loads(out)
    assert (code, result["agree"], result["prompts"]) == (0, True, 4) and result["tolerance"]["measured"]
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    code, out, err = call("verify", "adapter", "base", *rows)
    assert code == 1 and out.startswith("DIFFERENT") and err
    for wrong in ("nowhere", "peft:nowhere", "nowhere.gguf", "base+nowhere.gguf", "http://127.0.0.1:9/v1"):
        code, out, err = call("verify", "adapter", wrong, *rows)
        assert code == 2 and len(err.splitlines()) <= 5, err


def test_bad_numbers_are_refused(place: Path) -> None:
    with pytest.raises(InputError):
        verify("adapter", "merged", prompts=0)


def test_stop_tokens_that_are_gone_or_others_are_seen(place: Path, tmp_path: Path) -> None:
    """Few answers of so few tokens end, so they don't show it. transformers asks no tokenizer where to stop."""
    for n, (stops, words) in enumerate({None: "not in", 5: "but not in"}.items()):
        wrong = merged(place / "base", place / "adapter", tmp_path / f"wrong{n}")
        config = json.loads((wrong / "generation_config.json").read_text())
        (wrong / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": stops}))
        for a, b in (("adapter", str(wrong)), (str(wrong), "merged")):
            result = held(place, a, b)
            assert len(result.reasons) == 1 and "answers end at" in result.reasons[0], result.text()
            assert words in result.reasons[0] and result.kl < result.tolerance.kl


def test_two_folders_are_asked_chats_where_one_has_a_template(place: Path, tmp_path: Path) -> None:
    wrong = merged(place / "base", place / "adapter", tmp_path / "wrong")
    tokenizer = AutoTokenizer.from_pretrained(wrong)
    tokenizer.chat_template = tokenizer.chat_template.replace("add_generation_prompt", "false")
    tokenizer.save_pretrained(wrong)
    assert verify("merged", "merged", prompts=4, tokens=4).agree
    result = verify("merged", wrong, prompts=4, tokens=4)
    assert result.count("prompt") == 2 and not result.agree


def test_what_is_too_long_to_ask_is_compared_all_the_same(place: Path, tmp_path: Path) -> None:
    """A small context must not hide a changed template: chats are longer than texts."""
    wrong = merged(place / "base", place / "adapter", tmp_path / "wrong")
    tokenizer = AutoTokenizer.from_pretrained(wrong)
    tokenizer.chat_template = tokenizer.chat_template.replace("user", "usr") + " " * 8
    tokenizer.save_pretrained(wrong)
    context = json.loads((place / "base/config.json").read_text())["max_position_embeddings"]
    asked = {"role": "user", "content": "word " * context}
    chat = {"messages": [asked, {"role": "assistant", "content": "x"}]}
    short = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat) + "\n" + json.dumps(short) + "\n")
    right = verify("adapter", "merged", data=str(tmp_path / "chats.jsonl"), tokens=4)
    assert right.agree and len(right.rows) == 1 and any("no room" in note for note in right.notes)
    result = verify("adapter", wrong, data=str(tmp_path / "chats.jsonl"), tokens=4)
    assert any("too long to ask" in reason for reason in result.reasons)


def test_a_row_that_names_a_control_token_is_not_asked(place: Path, tmp_path: Path) -> None:
    """deltaw takes the name as characters, transformers as the token: no fault of either side's."""
    rows = [{"text": "one <|im_end|> two three four"}, {"text": "one two three four"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = verify("adapter", "merged", data=str(tmp_path / "rows.jsonl"), prompts=1, tokens=4)
    assert result.agree and result.rows[0].origin.endswith(":2")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "<|im_start|> <|im_end|> a"}) + "\n")
    with pytest.raises(InputError, match="control token"):
        verify("adapter", "merged", data=str(tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl").write_text("hello\n")
    with pytest.raises(InputError, match=r"rows\.jsonl:1"):
        verify("adapter", "merged", data=str(tmp_path / "rows.jsonl"))


def test_a_page_that_is_a_folder_is_refused_before_the_work(place: Path, tmp_path: Path) -> None:
    code, _, err = call("verify", "adapter", "merged", "-o", tmp_path)
    assert code == 2 and "loading" not in err
