"""Answers that are held to JSON, to a schema of it, or to calls of tools. The home of llguidance.

A grammar says at each place which tokens may come next: those that, behind what has been written, can still become a
text of the schema, and the stop tokens where it is whole. The engine puts -inf on the logits of all others before a
token is chosen, in the rows that ask for it and no others; log-probabilities that are told stay the model's own. So
greedy decoding, sampling, seeds, biases, stop texts and streams are what they are without, among fewer tokens.

llguidance makes the mask from an automaton over bytes and a trie of the vocabulary: 0.2 ms for a vocabulary of 49,152
once its states are there, some 10 ms for a place that is new. It reads the schema, of which it refuses by name what it
doesn't keep, and works within fuel (`LIMITS`), since schemas come from strangers; what of them is let through at all is
serve/schema.py's.

White space between JSON's signs is bounded, `WHITE`: a small model would sooner write blanks for ever than what comes
next, which it finds unlikely.

Calls are held to the form in which the chat template writes them (data/tool_calls.py), and the arguments of each to its
function's schema. Grammars are in llguidance's dialect of Lark, in which nothing of a request stands but in quotes. A
text that can't be but one is encoded by the tokenizer, which would take a control token's name in it for the token; so
a grammar that has such a name goes without that.

Rejected: xgrammar and outlines-core, which compile a schema before the first token (seconds for large ones), and an own
automaton.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaw.data.tool_calls import HOLE, CallForm
from deltaw.errors import InputError, RunError

CALL_ID = "/[a-zA-Z0-9]{9}/"
KEPT = 32  # grammars, and tokenizers by what ends an answer
WHITE = r"[\x20\x0A\x09]{0,8}"
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,  # 1 to 2 kB each
    "max_grammar_size": 50_000,
    "max_items_in_row": 2_000,
    "precompute_large_lexemes": False,  # their words on the whole vocabulary: seconds
    "verbose_errors": False,
}

Part = str | int | None  # of what a model writes: a text as it stands, a control token, any id


def check_installed() -> None:
    """Raises InputError where llguidance isn't there."""
    try:
        import llguidance  # noqa: F401
    except ImportError:
        what = "answers can't be held to JSON here: the package llguidance isn't installed"
        raise InputError(what, fix="pip install 'deltaw[serve]'") from None


class Guide:
    """One row's way through a grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self, vocabulary: int) -> Tensor:
        """Which tokens may come next [V], on the CPU. Raises RunError where the grammar takes too long."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask_V = torch.from_numpy(np.unpackbits(bits, bitorder="little").view(np.bool_))[:vocabulary]
        if self._matcher.is_error() or not bool(mask_V.any()):
            raise RunError("the answer can't go on within its schema", fix="a simpler schema may hold")
        if len(mask_V) < vocabulary:  # rows of the embedding that are no token
            mask_V = torch.cat([mask_V, mask_V.new_zeros(vocabulary - len(mask_V))])
        return mask_V

    def take(self, token: int) -> None:
        """The token that was chosen. What goes wrong with it shows in the next `allowed`."""
        self._matcher.consume_token(token)


class Grammar:
    """A schema's grammar, for any number of rows."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def begin(self) -> Guide:
        """For a new row."""
        return Guide(self._matcher.deep_copy())


class Grammars:
    """Of one tokenizer, from any thread; a schema that comes again isn't read again."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._lock = threading.Lock()
        self._by_stops: dict[frozenset[int], Any] = {}
        self._made: OrderedDict[tuple[frozenset[int], str], Grammar] = OrderedDict()

    def of(self, schema: Mapping[str, Any], stop_ids: frozenset[int]) -> Grammar:
        """For answers that end with one of `stop_ids`. Raises InputError for a schema that can't be kept."""
        return self._kept(stop_ids, f"start: {_of_schema(schema)}")

    def of_calls(
        self, form: CallForm, functions: Mapping[str, Mapping[str, Any]], most: int, stop_ids: frozenset[int]
    ) -> Grammar:
        """For answers that are calls, 1 to `most`. `functions`: schemas of their arguments, by name."""
        return self._kept(stop_ids, of_calls(form, functions, most))

    def _kept(self, stop_ids: frozenset[int], source: str) -> Grammar:
        check_installed()
        if any(name in source for name in self._special):  # what is foretold would be encoded as the token itself
            source += '\n%llguidance {"no_forcing": true}'
        key = stop_ids, source
        with self._lock:  # one at a time: a stranger's schema may take all that it is given
            if key not in self._made:
                self._made[key] = self._read(*key)
                while len(self._made) > KEPT:
                    self._made.popitem(last=False)
            self._made.move_to_end(key)
            return self._made[key]

    def _read(self, stop_ids: frozenset[int], source: str) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        try:
            grammar = LLMatcher.grammar_from_lark(source)
        except ValueError as error:
            raise InputError(f"the schema can't be read: {error}") from None
        matcher = LLMatcher(self._vocabulary(stop_ids), grammar, log_level=0, limits=LLParserLimits(**LIMITS))
        if not matcher.is_error():
            matcher.compute_bitmask()  # what nothing fits shows at the first token
        if matcher.is_error():
            what = matcher.get_error().partition("\n")[0][:200]
            if "coerce_one_of" in what:
                what = "a value might be of two branches of oneOf, as far as can be told: send anyOf"
            raise InputError(f"the schema can't be kept: {what}")
        return Grammar(matcher)

    def _vocabulary(self, stop_ids: frozenset[int]) -> Any:
        if stop_ids not in self._by_stops:
            from llguidance.hf import from_tokenizer

            try:
                made = from_tokenizer(self._tokenizer, eos_token=sorted(stop_ids))
            except ValueError as error:
                raise InputError(f"answers can't be held to JSON with this base's tokenizer: {error}") from None
            if len(self._by_stops) >= KEPT:
                self._by_stops.clear()
            self._by_stops[stop_ids] = made
        return self._by_stops[stop_ids]


def of_calls(form: CallForm, functions: Mapping[str, Mapping[str, Any]], most: int) -> str:
    """The grammar of 1 to `most` calls."""

    def text(text: str) -> list[Part]:
        return _parts(text, form.tokens)

    preamble = f"({_written(text(form.preamble))})?" if form.preamble else ""
    following = ""
    if form.between is not None and most > 1:
        following = f"({_written(text(form.between))} call){{0,{most - 1}}}"
    lines = [
        f"start: {preamble} {_written(text(form.before))} call {following} {_written(text(form.after))}",
        f"call: {' | '.join(f'call{number}' for number in range(len(functions)))}",
    ]
    for number, (name, schema) in enumerate(functions.items()):
        opening = [*text(form.head), form.named(name), *text(form.middle)]
        lines.append(f"call{number}: {_written(opening)} arguments{number} {_written(text(form.foot))}")
        lines.append(f"arguments{number}: {_of_schema(schema)}")
    return "\n".join(lines)


def _of_schema(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITE}}, ensure_ascii=False)


def _parts(text: str, tokens: Mapping[str, int]) -> list[Part]:
    special = "|".join(map(re.escape, sorted((HOLE, *tokens), key=len, reverse=True)))
    return [None if part == HOLE else tokens.get(part, part) for part in re.split(f"({special})", text) if part]


def _written(parts: Iterable[Part]) -> str:
    """Parts of a text, one behind the other."""
    items: list[str] = []
    for texts, group in groupby(parts, lambda part: isinstance(part, str)):
        if texts:
            items.append(json.dumps("".join(map(str, group)), ensure_ascii=False))
        else:
            items += [CALL_ID if part is None else f"<[{part}]>" for part in group]
    return " ".join(items)
