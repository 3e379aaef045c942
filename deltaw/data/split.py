"""A long text -> pieces, without losing a token or training one twice.

    document   bos t₁ t₂ … tₙ eos
    pieces     bos t₁ … tₖ  |  bos tₖ₋ₒ … tₖ tₖ₊₁ … tₘ  |  bos … tₙ eos       o = `overlap`, at least one

The text is tokenised whole, once, and its tokens are cut: pieces that were tokenised apart would have other tokens at
their borders than the text has there. Each piece begins as the tokenizer begins a text (bos or nothing) and goes on
with the last `overlap` tokens of the piece before, which it is shown but not trained on. At least one is shown, since a
token is trained by predicting it from what stands before it: so all tokens but the document's first are trained, each
exactly once. eos stands at the document's end alone.

Where a piece ends: of the places within reach the best kind, of that kind the latest.

    kind        section     paragraph    line         sentence     word         character
    reach       a quarter   a half       a quarter    a quarter    an eighth    all of the piece

A blank line ends a paragraph, two of them or a Markdown heading behind it a section: so a heading, if it can be told,
stays with what it is the heading of. The reach ends early enough that the document's last piece isn't a scrap (`TAIL`).
A token that is only a part of a character (byte-level tokenizers cut them in several) is never parted from the rest
while there is another place.

Rejected: pieces of equal length (they end anywhere); filling each piece to the last token (cuts sentences, and gains
nothing: packing fills the batches); tokenising each paragraph alone (other tokens at the borders).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from deltaw.data.example import Example

INSIDE, CHARACTER, WORD, SENTENCE, LINE, PARAGRAPH, SECTION = range(7)
REACH = {SECTION: 4, PARAGRAPH: 2, LINE: 4, SENTENCE: 4, WORD: 8}  # the last quarter of a piece, half, …
TAIL = 4  # the last piece is at least a quarter of a full one
ENDS, WIDE_ENDS, CLOSING = ".!?…", "。！？｡", "\"'”’»)]}』」）"  # wide ones need no blank behind them


def split(example: Example, kinds: np.ndarray, length: int, overlap: int = 0, bos: Sequence[int] = ()) -> list[Example]:
    """Pieces of at most `length` tokens. `kinds` [T]: what kind of place stands in front of each token (`places`);
    `bos`: what the tokenizer puts in front of a text."""
    tokens, count = example.tokens, len(example.tokens)
    if count <= length:
        return [example]
    opening = np.array(bos, np.int32)[: max(0, length - 2)]
    shown = max(0, min(max(overlap, 1), length - len(opening) - 1))
    first = len(opening) if np.array_equal(tokens[: len(opening)], opening) else 0  # bos isn't shown twice
    pieces, begin = [], 0
    while begin < count:
        context = tokens[max(first, begin - shown) : begin] if begin else tokens[:0]
        head = np.concatenate([opening, context]) if begin else context
        end = _end(kinds, begin, length - len(head))
        mask = np.concatenate([np.zeros(len(head), bool), example.loss_mask[begin:end]])
        body = np.concatenate([head, tokens[begin:end]])
        pieces.append(replace(example, tokens=body, loss_mask=mask, context=len(head), goes_on=end < count))
        begin = end
    names = (f"{example.origin} (piece {number} of {len(pieces)})" for number in range(1, len(pieces) + 1))
    return [replace(piece, origin=name) for piece, name in zip(pieces, names, strict=True)]


def _end(kinds: np.ndarray, begin: int, room: int) -> int:
    """Where a piece that begins at `begin` ends, if it has `room` for so many tokens."""
    count = len(kinds)
    if count - begin <= room:
        return count
    last = max(begin + 1, min(begin + room, count - room // TAIL))
    for kind, part in REACH.items():
        first = max(begin + 1, last - room // part)
        places = np.flatnonzero(kinds[first : last + 1] >= kind)
        if len(places):
            return first + int(places[-1])
    whole = np.flatnonzero(kinds[begin + 1 : last + 1] >= CHARACTER)
    return begin + 1 + int(whole[-1]) if len(whole) else last


def places(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """The kind of place in front of each token, uint8 [T]. `offsets`: where each token stands in `text`, as the
    tokenizer says (some leave out the blanks at a token's ends)."""
    if not len(offsets) or not text:
        return np.zeros(len(offsets), np.uint8)
    starts_T, ends_T = np.array(offsets, np.int64).T
    left = np.concatenate([[0], ends_T[:-1]])  # where what stands before the border ends
    marks = _Marks(text)
    newlines, before = marks.newlines[left], marks.before[left]
    kinds = np.full(len(starts_T), CHARACTER, np.uint8)
    blank = (left < starts_T) | marks.space[left] | marks.space[np.minimum(starts_T, len(text) - 1) + 1]
    kinds[blank] = WORD
    kinds[marks.sentence[before] & blank | marks.wide[before]] = SENTENCE
    after = marks.after[np.maximum(starts_T, left)]
    ended = ~marks.newline[after]  # a border inside a run of newlines is no better
    kinds[ended & (newlines >= 1)] = LINE
    kinds[ended & (newlines >= 2)] = PARAGRAPH
    kinds[ended & ((newlines >= 3) | (newlines == 2) & marks.heading[after])] = SECTION
    kinds[starts_T < left] = INSIDE
    kinds[0] = INSIDE
    return kinds


class _Marks:
    """What stands at each place of a text. Arrays have an item more than the text: item p tells of the character in
    front of place p, and `after` of the one behind it."""

    def __init__(self, text: str) -> None:
        code = np.frombuffer(("\0" + text).encode("utf-32-le", "surrogatepass"), np.uint32)
        index = np.arange(len(code))
        self.newline = code == ord("\n")
        self.heading = code == ord("#")
        self.space = self.newline | np.isin(code, [ord(c) for c in " \t\r\v\f\xa0\u3000"])
        blank = self.space & ~self.newline
        solid = np.maximum.accumulate(np.where(self.space, 0, index))  # the last that isn't white, at or before
        count = np.cumsum(self.newline)
        self.newlines = count - count[solid]
        """Newlines in the white space that ends here."""
        closing = np.isin(code, [ord(c) for c in CLOSING])
        self.before = np.maximum.accumulate(np.where(self.space | closing, 0, index))
        """The last character before here that is neither white nor closes a quotation."""
        self.sentence = np.isin(code, [ord(c) for c in ENDS])
        self.wide = np.isin(code, [ord(c) for c in WIDE_ENDS])
        following = np.minimum.accumulate(np.where(blank, len(code) - 1, index)[::-1])[::-1]
        self.after = np.append(following[1:], len(code) - 1)
        """The next character from here on that isn't a blank."""
