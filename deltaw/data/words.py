"""A text as words whose ids are known: most words of a text stood in one before.

A byte-level tokenizer spends most of its time on finding the words of a text, and their ids, again and again. Here a
text is cut around the names of control tokens, and in front of a blank that stands between a visible ASCII character
and an ASCII letter. Each part is looked up; those that aren't known are encoded by the tokenizer, in one call.

    "<|im_start|>user\\nOh! Are you?"    ->    "<|im_start|>"  "user\\nOh!"  " Are"  " you?"

That the ids of the parts are those of the text is proven from the tokenizer's own description, or this isn't done:

- No normalizer, and BPE without dropout: a word's ids don't depend on what stands around it.
- The words are found by patterns that are known here (`PATTERNS`). In each of them a match that has anything visible
  goes on with nothing but line ends where it meets white space, and one that has a blank and then a letter begins at
  the blank; so there is a border. None of them looks back. They look ahead for white space alone, behind which
  something visible stands within its part. Nothing is put in front.
- No added token has such a place in its name, and none takes blanks or looks for borders beside it. So none is found
  across a place where the text is cut, and those elsewhere are found as before. The tokenizer looks for them before it
  looks for words; where one is a control token, and no two can overlap, the text falls apart there anyway.
"""

import json
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

MOST, LONGEST = 100_000, 64  # parts that are kept, their characters
CONTROLS = 64  # names of control tokens that are looked for
CUT = re.compile(" (?=[A-Za-z])(?<=[!-~] )")
BEGINS = "\0"  # in front of a part that no blank stands in front of; the others begin with a letter
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
PATTERNS = {GPT2, LLAMA3, QWEN2}
APART = {r"\p{N}", r"\p{N}{1,3}"}  # these only part digits from the rest


class Words:
    """The ids of texts by one tokenizer, as `tokenizer.backend_tokenizer` gives them. `controls`: the names of tokens
    at which a text falls apart."""

    def __init__(self, backend: Any, controls: Iterable[str] = ()) -> None:
        self._backend = backend
        self._apart = re.compile("|".join(map(re.escape, controls)).join("()")) if controls else None
        self._known: dict[str, list[int]] = {}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        known = self._known
        parts = list(map(self._parts, texts))
        new = dict.fromkeys(part for own in parts for part in own if part not in known)
        as_written = [part[1:] if part.startswith(BEGINS) else f" {part}" for part in new]
        encoded = self._backend.encode_batch_fast(as_written, add_special_tokens=False)
        known.update((part, encoding.ids) for part, encoding in zip(new, encoded, strict=True))
        ids = [list(chain.from_iterable(map(known.__getitem__, own))) for own in parts]
        room = MOST - (len(known) - len(new))
        for number, part in enumerate(new):
            if number >= room or len(part) > LONGEST:
                del known[part]
        return ids

    def _parts(self, text: str) -> list[str]:
        parts = []
        for section in self._apart.split(text) if self._apart else (text,):
            words = CUT.split(section)
            words[0] = BEGINS + words[0]
            parts += words
        return parts


def words_of(tokenizer: Any) -> Words | None:
    """None where it isn't proven that a text can be cut."""
    backend = tokenizer.backend_tokenizer
    try:
        description = json.loads(backend.to_str())
    except Exception:  # a tokenizer with parts in Python has no description
        return None
    return Words(backend, controls_in(description["added_tokens"])) if is_proven(description) else None


def controls_in(added: Sequence[dict[str, Any]]) -> list[str]:
    """The names of control tokens that overlap no other; none where there are too many to look for."""
    names = [token["content"] for token in added]
    special = [token["content"] for token in added if token["special"]]
    return (
        [name for name in special if not any(_meet(name, other) for other in names)] if len(special) <= CONTROLS else []
    )


def _meet(one: str, other: str) -> bool:
    """Whether one begins inside of the other, or the other way round; any name meets itself if it is like `aba`."""
    at = range(1, len(one)) if one == other else range(len(one))
    back = range(1, len(other))
    return any(other.startswith(one[i:]) or one[i:].startswith(other) for i in at) or any(
        one.startswith(other[i:]) or other[i:].startswith(one) for i in back
    )


def is_proven(description: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is of those above."""
    model = description["model"]
    if description["normalizer"] is not None or model.get("type") != "BPE" or model.get("dropout"):
        return False
    for token in description["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"] or CUT.search(token["content"]):
            return False
    step = description["pre_tokenizer"] or {}
    steps = step.get("pretokenizers", ()) if step.get("type") == "Sequence" else [step]
    return all(map(_is_known, steps)) and any(map(_parts_words, steps))


def _is_known(step: dict[str, Any]) -> bool:
    if step.get("type") == "ByteLevel":
        return step.get("add_prefix_space") is False
    if step.get("type") == "Digits":
        return True
    if step.get("type") != "Split" or step.get("behavior") != "Isolated" or step.get("invert"):
        return False
    return step["pattern"].get("Regex") in PATTERNS | APART


def _parts_words(step: dict[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        return step.get("use_regex", True) is True  # its own pattern is GPT2
    return step["type"] == "Split" and step["pattern"]["Regex"] in PATTERNS
