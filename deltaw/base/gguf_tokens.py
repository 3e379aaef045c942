"""How the tokenizer in a GGUF splits text before it merges: `tokenizer.ggml.pre` is a name, the rule is in llama.cpp.

transformers knows some of the names and gives every other byte-level vocabulary GPT-2's rule. The ids then differ
wherever the rules do ("12" in one piece or in two, a blank before a digit, a run of newlines), and the model is
trained on tokens that no server will ever send it. Here each name stands for a list of patterns, applied one after
the other to what the ones before left whole, and for two habits: words that are in the vocabulary are taken whole
without merging, and a text begins with the beginning-of-text token where the file doesn't say. An unknown name is
refused. Without a name it is llama.cpp's default, which fits no model in particular, and that is said.

A SentencePiece vocabulary has no such rule but one more blank before each text, unless the file says no
(`tokenizer.ggml.add_space_prefix`, which transformers doesn't look at).

The rule is written into the saved tokenizer.json, not set on a live tokenizer: what later readers load is what was
checked. The table was held to llama.cpp's own ids name by name (tests/base/test_gguf_tokens.py).
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from deltaw.errors import InputError
from deltaw.files.atomic import write_text_atomic
from deltaw.files.gguf_header import Header

_SUFFIXES = r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_SUFFIXES}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_BLANKS}"
QWEN2 = rf"{_SUFFIXES}|{_WORD}|\p{{N}}|{_SIGNS}|{_BLANKS}"
QWEN35 = rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}"
SEED = rf"{_SUFFIXES}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_BLANKS}"
BAILING = rf"{_SUFFIXES}|{_WORD}|\p{{N}}|{_SIGNS}|\s*[\r\n]|\s+(?!\S)|\s+"
TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SLASHED}|{_BLANKS}"
GPT4O = rf"{_CASED[0]}(?:{_SUFFIXES})?|{_CASED[1]}(?:{_SUFFIXES})?|\p{{N}}{{1,3}}|{_SLASHED}|{_BLANKS}"
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_BLANKS}"
)
DEEPSEEK = r"\s?[\p{Lu}\p{Ll}\p{Lt}]+"
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
SIGNS = r"[\p{P}\$\+<=>\^~\|`]+"


class Splitting(NamedTuple):
    """`patterns` one after the other; `whole`: a word of the vocabulary is one token; `bos`: before every text."""

    patterns: tuple[str, ...]
    whole: bool = False
    bos: bool = False


_RULES: dict[Splitting, str] = {
    Splitting((GPT2,)): "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat a.x-4.0 mellum exaone4",
    Splitting((r"\p{N}", GPT2)): "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    Splitting((LLAMA3,), whole=True, bos=True): "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    Splitting((LLAMA3,)): "dbrx smaug-bpe chatglm-bpe",
    Splitting((LLAMA3,), whole=True): "glm4",
    Splitting((QWEN2,)): "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
    Splitting((QWEN35,)): "qwen35",
    Splitting((TEKKEN,), whole=True, bos=True): "tekken",
    Splitting((GPT4O,)): "gpt-4o llama4 kanana2 talkie minimax-m2",
    Splitting((SEED,)): "seed-coder",
    Splitting((BAILING,)): "bailingmoe bailingmoe2 llada-moe",
    Splitting((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3)): "deepseek-v3 hunyuan-dense",
    Splitting(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")): "deepseek-coder",
    Splitting(
        ("[\r\n]", DEEPSEEK, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", "[一-龥ࠀ-一가-퟿]+", r"\p{N}+")
    ): "deepseek-llm",
    Splitting((SIGNS, GPT2, "[0-9][0-9][0-9]")): "falcon",
    Splitting((BLOOM,)): "bloom poro-chat gpt3-finnish",
    Splitting((BLOOM, r"\p{N}")): "viking",
    Splitting((SIGNS.replace("`", ""), GPT2, r"\p{N}+", "[0-9][0-9][0-9]")): "default",
}
SPLITTINGS = {name: rule for rule, names in _RULES.items() for name in names.split()}
BYTE_LEVEL = "gpt2"  # as `tokenizer.ggml.model`: byte-level BPE, the only kind with such rules
SENTENCES = "llama"  # and SentencePiece


def read_splitting(path: Path, header: Header) -> Splitting | None:
    """The rule that the file names, None for vocabularies that have none. Raises InputError for an unknown name."""
    if header.metadata.get("tokenizer.ggml.model") != BYTE_LEVEL:
        return None
    name = header.metadata.get("tokenizer.ggml.pre", "default")
    if name not in SPLITTINGS:
        raise InputError(
            f"{path}: its tokenizer splits text by a rule called {str(name)[:40]!r}, which deltaw doesn't know",
            fix="use the safetensors version of the model",
        )
    return SPLITTINGS[name]


def write_tokenizer(folder: Path, header: Header, splitting: Splitting | None) -> None:
    """Write the rule, and what else transformers doesn't take from the file, into the saved tokenizer."""
    file = folder / "tokenizer.json"
    tokenizer: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if splitting is not None:
        splits = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in splitting.patterns
        ]
        as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*splits, as_bytes]}
        tokenizer["model"]["ignore_merges"] = splitting.whole
    elif header.metadata.get("tokenizer.ggml.model") == SENTENCES:
        _write_blanks(tokenizer, header.metadata.get("tokenizer.ggml.add_space_prefix") is not False)
    write_text_atomic(file, json.dumps(tokenizer, ensure_ascii=False))


def _write_blanks(tokenizer: dict[str, Any], prefix: bool) -> None:
    """Blanks become ▁, one more goes before a text (with `prefix`), also before one that begins with a blank."""
    steps: list[dict[str, Any]] = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    tokenizer["normalizer"], tokenizer["pre_tokenizer"] = {"type": "Sequence", "normalizers": steps}, None
    decoder = tokenizer.get("decoder") or {}
    if not prefix and "decoders" in decoder:  # nor is one taken away
        decoder["decoders"] = [step for step in decoder["decoders"] if step.get("type") != "Strip"]
