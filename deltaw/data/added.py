"""Tokens that a run trains by name, in the base's tokenizer: those that it has, and those that are added to it.

An added token isn't flagged special: it stands in rows and in answers, and is one token wherever its text is. Its
number is the next that the tokenizer has free, which may be beyond the base's last row; adding the same texts to the
same tokenizer gives the same numbers, so texts are all that an adapter has to remember. What the tokenizer made of the
text before is kept, since its row begins there (adapter/rows.py).

One that the tokenizer has and flags special (a reserved one) may stand in rows, too, where it is named: unless the chat
template writes it or it begins or ends texts, since of these a user's text mustn't make any (encode.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AddedToken

from deltaw.errors import InputError, listed


@dataclass(frozen=True)
class Token:
    """A text with a token of its own. `pieces`: the tokens that it was before, of one that was added."""

    text: str
    id: int
    pieces: tuple[int, ...] = ()


def add_tokens(tokenizer: Any, texts: Sequence[str]) -> tuple[Token, ...]:
    """Each text as a token of `tokenizer`, which gets what it lacks. Raises InputError for what can't be one."""
    before = {text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts}
    unknown = {text for text, ids in before.items() if tokenizer.unk_token_id in ids and text != tokenizer.unk_token}
    pieces = {text: ids for text, ids in before.items() if len(ids) != 1 or text in unknown}
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in pieces])
    numbers = {text: tokenizer.convert_tokens_to_ids(text) if text in pieces else before[text][0] for text in texts}
    tokens = tuple(Token(text, numbers[text], pieces.get(text, ())) for text in texts)
    wrong = [
        f"{token.text!r:.60}: encoded as {ids[:8]}, not as its own token {token.id}"
        for token in tokens
        if (ids := tokenizer(token.text, add_special_tokens=False)["input_ids"]) != [token.id]
    ]
    if wrong:
        raise InputError(
            f"adapter.tokens: these aren't one token:\n{listed(wrong)}", fix="name whole tokens, as written"
        )
    return tokens


def plain_ids(tokenizer: Any, tokens: Sequence[Token], template: str) -> frozenset[int]:
    """Those among them that the tokenizer flags special although they mean nothing to it or to the chat template."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    own = {str(value) for value in tokenizer.special_tokens_map.values() if isinstance(value, str)}
    return frozenset(t.id for t in tokens if t.text in special and t.text not in own and t.text not in template)


def unread(tokenizer: Any, tokens: Mapping[int, str], template: str) -> list[str]:
    """Those of a trained adapter's tokens that the base's own tokenizer doesn't read and write as such in texts."""
    plain = plain_ids(tokenizer, [Token(text, id) for id, text in tokens.items()], template)
    ids = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in tokens.values()}
    return [text for id, text in tokens.items() if id in plain or ids[text] != [id]]


def special_ids(tokenizer: Any) -> frozenset[int]:
    """All that the tokenizer flags special."""
    added = (id for id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset((*tokenizer.all_special_ids, *added))
