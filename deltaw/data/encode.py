"""Text -> token ids, so that what a user wrote never becomes a control token.

A control token (`<|im_end|>`, `</s>`, …: an added token flagged special) is an instruction to the model.
Its name may also stand in someone's text, and a tokenizer can't tell the two apart once a template has put
them into one string. So user text is *guarded* before the template sees it: a mark, the noncharacter
U+FDD0, goes behind the first character of every control token's name. Rendered text is then split at the
marks and its parts are encoded one by one; a name that was cut in two matches nothing, and the template's
own control tokens, which have no mark, still do. Text without such a name, nearly all text, is not touched
and is encoded exactly as every server does.

That it worked is checked and not assumed: the control ids in the result must be as many as the control
names in the text between marks (`controls`). A tokenizer that finds more, because it lower-cases first or
has a control token's name as an ordinary word, gets the row rejected.

Rejected: `split_special_tokens=True` (for a whole string only, so it can't serve a rendered chat); a
placeholder for each content (templates trim, split and compare contents). Added tokens that aren't flagged
special (`<think>`, `<tool_call>`) stay tokens wherever they stand: answers are made of them.

A part that continues a text must be encoded as such: tokenizers of the SentencePiece family put a space in
front of whatever they are given. There a newline goes in front and its tokens are taken off again.

A text of megabytes is encoded in portions: a tokenizer's record of a token takes most of a kilobyte, and says nothing
before it has finished. A portion ends between two words at a place where what stands around it has the same tokens
whether it is parted there or not; where there is no such place the text is encoded whole.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from deltaw.data.split import CHARACTER, INSIDE, WORD, places
from deltaw.data.words import words_of
from deltaw.errors import Rejected
from deltaw.files.encoding import setting
from deltaw.show.progress import Progress, unseen

MARK = "\ufdd0"
UNASSIGNED = "\u0378"  # no tokenizer has a token for it: shows whether the model of the tokenizer emits `unk`

PORTION = 500_000  # characters
SEAM = re.compile(r"\w \w")  # between two words of a sentence
CALL = "_encode_plus"  # what a tokenizer of the fast kind does when it is called
AROUND, SEAMS = 200, 20  # characters looked at on either side of a seam; seams that are tried


@dataclass(frozen=True, slots=True)
class Encoded:
    """The ids of a piece. `parts`: for each part of it what tells the kind of place in front of each of its tokens."""

    ids: list[int] = field(default_factory=list)
    parts: list[Callable[[], np.ndarray]] = field(default_factory=list)

    def places(self) -> np.ndarray:
        """What kind of place stands in front of each token (`split.py`)."""
        return np.concatenate([np.zeros(0, np.uint8), *(part() for part in self.parts)])


@dataclass(frozen=True, slots=True)
class _Part:
    """A text that is encoded by itself. `place`: what kind of place it begins at; `large`: a portion of a long text."""

    text: str
    place: int = INSIDE
    large: bool = False


class Encoder:
    """Encodes pieces of documents with one tokenizer. `control_ids` are the ids that only a template may write, in
    `ids` by their names; `plain`: special tokens that a user's text may have, too, since they are trained by name."""

    def __init__(self, tokenizer: Any, plain: Collection[str] = ()) -> None:
        self._tokenizer = tokenizer
        special = {str(token): id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
        for name in ("", *plain):
            special.pop(name, None)
        self._name_start = re.compile(f"(?={_any_of(special)})(.)", re.DOTALL)
        self._name = re.compile(_any_of(special))
        self._first_characters = {name[0] for name in special}
        self._single = {name for name in special if len(name) == 1}
        # Where unknown words become `unk`, that id comes out of plain text and says nothing.
        emitted = set(self._plain([UNASSIGNED])[0])
        control = {name: id for name, id in special.items() if id not in emitted}
        self._control = re.compile(_any_of(control))
        self.ids = control
        self.control_ids = frozenset(control.values())
        newline = self._plain(["\n"])[0]
        joined = self._plain(["\na", "a"])
        self._anchor = [] if joined[0] == newline + joined[1] else newline
        self._quick = _takes_no_offsets(tokenizer)
        self._words = words_of(tokenizer) if self._quick and not self._anchor else None
        self._is_control = np.zeros(1 + max(self.control_ids, default=0), bool)
        self._is_control[list(self.control_ids)] = True

    def checked(self, text: str) -> str:
        """`text` itself. Raises Rejected on text no tokenizer can take."""
        if not text.isascii():
            if MARK in text:
                raise Rejected("the text has the noncharacter U+FDD0")
            try:
                text.encode()
            except UnicodeEncodeError:
                if re.search("[\udc80-\udcff]", text):  # what a byte became that isn't UTF-8 (tables.py)
                    wrong = setting(text.encode(errors="surrogateescape"))
                    raise Rejected(f"not UTF-8; {wrong}") from None
                raise Rejected("the text has a lone surrogate (a broken character)") from None
        if "\0" in text:
            raise Rejected("the text has a NUL character")
        return text

    def guard(self, text: str) -> str:
        """`text` with every control token's name broken by a mark. Raises Rejected on text no tokenizer can take."""
        self.checked(text)
        for character in self._first_characters:
            if character in text:
                break
        else:
            return text
        if any(name in text for name in self._single):
            raise Rejected("the text has a control token of a single character")
        return self._name_start.sub(rf"\1{MARK}", text)

    def guard_all(self, value: Any) -> Any:
        """The same for every text inside lists and objects of plain JSON. Raises Rejected on anything else."""
        if isinstance(value, str):
            return self.guard(value)
        if isinstance(value, dict):
            return {self.guard(str(key)): self.guard_all(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.guard_all(item) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        raise Rejected(f"a {type(value).__name__} isn't a JSON value")

    def control_places(self, tokens_T: np.ndarray) -> list[int]:
        """Where the ids of control tokens stand."""
        last = len(self._is_control) - 1
        places = np.flatnonzero(self._is_control[np.minimum(tokens_T, last)])
        return [place for place in places.tolist() if tokens_T[place] <= last]

    def names(self, text: str) -> list[str]:
        """The names of control tokens that a user wrote, in guarded text: one at every mark."""
        if MARK not in text:
            return []
        matches = (self._name.match(text[mark.start() - 1 :].replace(MARK, "")) for mark in re.finditer(MARK, text))
        return [name[0] for name in matches if name]

    def name_starts(self, text: str) -> list[int]:
        """Where the names of control tokens begin in a text."""
        return [name.start() for name in self._name_start.finditer(text)]

    def controls(self, text: str) -> list[re.Match[str]]:
        """The control tokens a template wrote into `text`, in order."""
        return list(self._control.finditer(text))

    def encode(
        self, documents: Sequence[Sequence[str]], progress: Progress = unseen, *, places: bool = True
    ) -> list[list[Encoded]]:
        """The ids of every piece of every document, in few calls of the tokenizer. `progress` is told of characters;
        `places`: whether the pieces' places will be asked for, which takes the tokenizer longer.

        The pieces of a document are encoded apart from each other (no token spans two), all but the first as the
        continuation of what stands before.
        """
        encoded = [[Encoded() for _ in pieces] for pieces in documents]
        parts: list[tuple[_Part, Encoded, bool]] = []
        for pieces, outputs in zip(documents, encoded, strict=True):
            for index, (piece, output) in enumerate(zip(pieces, outputs, strict=True)):
                for number, part in enumerate(self._parts(piece)):
                    parts.append((part, output, bool(self._anchor) and index + number > 0))
        done = 0
        for call in _calls(parts):
            texts = ["\n" + part.text if continues else part.text for part, _, continues in call]
            recorded = self._recorded(texts, places)
            for (part, output, continues), text, (ids, record) in zip(call, texts, recorded, strict=True):
                skipped = len(self._anchor) if continues else 0
                if ids[:skipped] != self._anchor[:skipped]:
                    text, skipped = text[1:], 0
                    ((ids, record),) = self._recorded([text], places)
                output.ids.extend(ids[skipped:] if skipped else ids)
                if places:
                    output.parts.append(_places(part, text, record, len(ids), skipped))
                done += len(part.text)
            progress(done)
        return encoded

    def _parts(self, piece: str) -> Iterator[_Part]:
        """`piece` without its marks, a long text in portions."""
        for text in piece.split(MARK):
            begin = 0
            while len(text) - begin > 2 * PORTION and (end := self._seam(text, begin + PORTION)):
                yield _Part(text[begin:end], WORD if begin else INSIDE, large=True)
                begin = end
            yield _Part(text[begin:], WORD if begin else INSIDE, large=begin > 0)

    def _seam(self, text: str, begin: int) -> int:
        """A place from `begin` on where the text has a border of tokens anyway, as what stands around it shows; 0 where
        none is found."""
        for word in islice(SEAM.finditer(text, begin, begin + PORTION // 2), SEAMS):
            place = word.start() + 1
            left, right = text[place - AROUND : place], text[place : place + AROUND]
            first, second = self.encode([[left, right]])[0]
            if first.ids + second.ids == self._plain([left + right])[0]:
                return place
        return 0

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        return [ids for ids, _ in self._recorded(texts)]

    def _recorded(self, texts: Sequence[str], offsets: bool = True) -> list[tuple[list[int], Any]]:
        """The ids of each text, and where its tokens stand in it (None from a tokenizer that can't tell, and where it
        isn't asked for)."""
        if not texts:
            return []
        if not offsets and self._quick and len(texts) > 1:
            self._recorded(texts[:1])  # sets what the tokenizer remembers: nothing is cut, nothing filled up
            if self._words is not None:
                return [(ids, None) for ids in self._words.encode(texts)]
            encodings = self._tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            return [(encoding.ids, None) for encoding in encodings]
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )
        ids = encoded["input_ids"]
        return list(zip(ids, encoded.encodings or [None] * len(ids), strict=True))


def _takes_no_offsets(tokenizer: Any) -> bool:
    """Whether a call of this tokenizer is nothing but one of the library's that could leave out where tokens stand."""
    homes = [
        next((kind.__module__ for kind in type(tokenizer).__mro__ if name in vars(kind)), "")
        for name in ("__call__", CALL)
    ]
    own = not all(home.startswith("transformers.tokenization_utils") for home in homes)
    return not own and hasattr(getattr(tokenizer, "backend_tokenizer", None), "encode_batch_fast")


def _calls(parts: Sequence[tuple[_Part, Encoded, bool]]) -> Iterator[list[tuple[_Part, Encoded, bool]]]:
    """`parts` in runs that the tokenizer is given at once: its record of a token takes most of a kilobyte."""
    call: list[tuple[_Part, Encoded, bool]] = []
    size = 0
    for part in parts:
        if call and size + len(part[0].text) > 2 * PORTION:
            yield call
            call, size = [], 0
        call.append(part)
        size += len(part[0].text)
    if call:
        yield call


def _places(part: _Part, text: str, record: Any, count: int, skipped: int) -> Callable[[], np.ndarray]:
    """What tells the kinds of places in a part, found at once where keeping the tokenizer's record would be dear."""

    def find() -> np.ndarray:
        if record is None:
            return np.full(count - skipped, CHARACTER, np.uint8)
        kinds = places(text, record.offsets)[skipped:]
        kinds[:1] = part.place
        return kinds

    if not part.large:
        return find
    kinds = find()
    return lambda: kinds


def _any_of(names: Collection[str]) -> str:
    """A pattern for any of `names`, the longest first as tokenizers match them; of none, one that never matches."""
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)"
