"""Cut into words or whole: the same ids."""

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
from toys import KINDS, lowercasing, sentencepiece, toy

from deltaw.base.source import find_base
from deltaw.data import words
from deltaw.data.render import open_tokenizer
from deltaw.data.words import GPT2, LLAMA3, QWEN2, controls_in, is_proven, words_of


def described(tokenizer: Any) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def toy_with(*steps: Any) -> Any:
    """A toy whose words are found otherwise."""
    backend = Tokenizer.from_str(toy("llama3").backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return type("Holder", (), {"backend_tokenizer": backend})()


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
TOKENIZERS = {
    **{kind: toy(kind) for kind in KINDS},
    **{name: toy_with(split(pattern), BYTES) for name, pattern in (("gpt2", GPT2), ("llama", LLAMA3), ("qwen", QWEN2))},
    "digits": toy_with(split(r"\p{N}"), split(GPT2), BYTES),
    "builtin": open_tokenizer(find_base("builtin:smollm2-135m").directory),
}
WORDS = {name: words_of(tokenizer) for name, tokenizer in TOKENIZERS.items()}
PIECES = [
    "a",
    "The",
    "s",
    "t",
    "'",
    "'s",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\xa0",
    "\u3000",
    "1",
    "42",
    ".",
    "?!",
    "(",
    "-",
]
PIECES += [
    "é",
    "e\u0301",
    "東",
    "👩‍🚀",
    "<|im_end|>",
    "<|im_start|>",
    "<s>",
    "[INST]",
    "<|",
    "|>",
    "ſ",
    "'S",
    "\u200b",
    "İ",
]
TEXTS = st.lists(st.lists(st.sampled_from(PIECES), max_size=14).map("".join), min_size=1, max_size=4)


@settings(max_examples=150)
@given(TEXTS)
@example(["a b", "The  cat's 42 a.\n b ? x", " a", "a ", "", "<|im_end|> a<|im_start|> b c"])
def test_ids_are_those_of_the_whole_text(texts: list[str]) -> None:
    for name, cut in WORDS.items():
        backend = TOKENIZERS[name].backend_tokenizer
        whole = [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]
        assert cut is not None
        assert cut.encode(texts) == whole, name
        assert cut.encode(texts) == whole, name  # known by now


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "MOST", 5)
    cut = words_of(toy("chatml"))
    assert cut is not None
    for begin in ("x", "y"):
        texts = [" ".join(begin * number for number in range(1, 90))]
        backend = toy("chatml").backend_tokenizer
        assert cut.encode(texts) == [backend.encode(texts[0], add_special_tokens=False).ids]
        assert 0 < len(cut._known) <= 5


def changed(**parts: Any) -> dict[str, Any]:
    return {**described(toy("chatml")), **parts}


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "special": True, **flags}


@pytest.mark.parametrize(
    "description",
    [
        described(sentencepiece()),
        described(lowercasing()),
        changed(normalizer={"type": "NFKC"}),
        changed(pre_tokenizer=None),
        changed(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}),
        changed(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}),
        described(toy_with(split(r"\p{N}"), BYTES)),
        described(toy_with(split(r"\w+ \w+"), split(GPT2), BYTES)),
        changed(model={**described(toy("chatml"))["model"], "dropout": 0.1}),
        *(changed(added_tokens=[token("<x>", **{flag: True})]) for flag in ("lstrip", "rstrip", "single_word")),
        changed(added_tokens=[token("a b")]),
    ],
)
def test_without_a_proof_nothing_is_cut(description: dict[str, Any]) -> None:
    assert is_proven(described(toy("chatml"))) and not is_proven(description)


@pytest.mark.parametrize("names", [["<a>", "a>"], ["<a>", ">b"], ["aba"], ["<a", "<ab"], ["b>", "<a>b"]])
def test_tokens_that_overlap_part_nothing(names: list[str]) -> None:
    assert not set(controls_in([token(name) for name in names])) & set(names)
    backend = Tokenizer.from_str(toy("plain").backend_tokenizer.to_str())
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    cut = words_of(type("Holder", (), {"backend_tokenizer": backend})())
    texts = ["<a>b x ab<ab", "ababa a>b", "<a<ab>b", "<a>b>"]
    assert cut is not None
    assert cut.encode(texts) == [backend.encode(text, add_special_tokens=False).ids for text in texts]
