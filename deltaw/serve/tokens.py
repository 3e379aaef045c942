"""The text and the bytes of one token, as `logprobs` show it.

A token may be a part of a character; then it has bytes and no text of its own, and stands as `bytes:\\xe2\\x96` as in
OpenAI's API. Its text is what it adds behind another token: decoded alone, tokenizers like Llama's would lose the blank
in front of a word.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from deltaw.data.render import Renderer

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how vocabularies of pieces write a byte
ANCHOR = "a"  # some token to stand behind


class TokenText(NamedTuple):
    """`text` as it is shown; `width`: how many characters of an answer it is, none for a control token or a part of a
    character."""

    text: str
    bytes: list[int]
    width: int


class Tokens:
    """Of one tokenizer; each token is worked out once."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._anchor = renderer.prompt_ids(ANCHOR)[-1:]
        self._before = renderer.decode(self._anchor, skip_special=False)
        self._letters = {letter: byte for byte, letter in enumerate(_alphabet())}
        self.of = lru_cache(maxsize=2**16)(self._of)

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens, control tokens too."""
        return self._renderer.decode(ids, skip_special=False)

    def _of(self, id: int) -> TokenText:
        text = self._renderer.decode([*self._anchor, id], skip_special=False)[len(self._before) :]
        if "\ufffd" in text and (data := self._raw(id)) is not None:
            try:
                text = data.decode()
            except UnicodeDecodeError:
                return TokenText("bytes:" + "".join(f"\\x{byte:02x}" for byte in data), list(data), 0)
        plain = self._renderer.decode([*self._anchor, id])[len(self._before) :]
        return TokenText(text, list(text.encode("utf-8", "replace")), len(plain))

    def _raw(self, id: int) -> bytes | None:
        """The bytes that a token's own name stands for, in the two ways that there are."""
        name = str(self._renderer.tokenizer.convert_ids_to_tokens(id))
        if match := BYTE.fullmatch(name):
            return bytes.fromhex(match[1])
        if all(letter in self._letters for letter in name):
            return bytes(self._letters[letter] for letter in name)
        return None


def _alphabet() -> list[str]:
    """GPT-2's letter for every byte: itself where that can be printed, else the next free one from U+0100 on."""
    letters, free = [], 0x100
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte <= 0xFF:
            letters.append(chr(byte))
        else:
            letters.append(chr(free))
            free += 1
    return letters
