"""A model's limits: which token ids it can be given, and how many in a row. They are known before the weights are read.

    vocabulary    rows of the embedding table, or of the head where that has fewer; an id beyond it is an index error
    table         positions of a table (learned, or computed once): a row beyond it is an index error
    context       positions that the config says the model was made for: beyond them rotary models give something, badly

All rows are checked before the first step, since a single one may come in the third hour. A table is found
on the modules of the model (without weights, on the meta device) by being one: an embedding that isn't the tokens', or
a buffer, named for positions. Some of its rows may be spoken for: OPT's first two (`offset`), RoBERTa's up to its
padding. What shows neither in the modules nor in the config shows when the longest row beyond the context is tried
(training/preflight.py).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import nn

from deltaw.base.frozen import stored_of
from deltaw.base.language import language_part
from deltaw.errors import InputError, listed
from deltaw.show.text import percent

POSITIONS = ("pos", "wpe")  # in the last part of the name of a table
STATED = ("max_position_embeddings", "max_seq_len")  # in a config


class Rows(Protocol):
    """Rows of data as token ids: how many each has, its largest (arrays), and where it came from."""

    @property
    def lengths(self) -> Any: ...
    @property
    def highest(self) -> Any: ...
    def origin(self, number: int) -> str: ...


@dataclass(frozen=True)
class Limits:
    """None where there is none, or none is known."""

    vocabulary: int | None = None
    table: int | None = None
    context: int | None = None

    @staticmethod
    def of(model: nn.Module) -> "Limits":
        """Those of a causal language model, with or without its weights."""
        tokens = model.get_input_embeddings()  # type: ignore[operator]
        ends = [tokens, model.get_output_embeddings()]  # type: ignore[operator]
        rows = [stored.shape[0] for end in ends if (stored := stored_of(end)) is not None]
        config = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
        return Limits(min(rows, default=None), min(_tables(model, tokens), default=None), context_of(config))

    @property
    def longest(self) -> int | None:
        """The longest row that nothing speaks against."""
        return min((limit for limit in (self.table, self.context) if limit is not None), default=None)

    def knowing(self, ids: Iterable[int]) -> "Limits":
        """The same of a model that has these words, too: those that an adapter adds."""
        if self.vocabulary is None:
            return self
        return replace(self, vocabulary=max(self.vocabulary, *(id + 1 for id in ids), 0))

    def check(self, rows: Rows, name: str = "data") -> None:
        """Raise InputError where the model can't be given some of `rows`, and name them."""
        beyond = (rows.highest >= self.vocabulary).nonzero()[0] if self.vocabulary else ()
        if len(beyond):
            raise InputError(
                f"{name}: {_rows(len(beyond))} with a token for which the base has no embedding (it has "
                f"{self.vocabulary:,})\n"
                + listed([f"{rows.origin(n)}: token id {rows.highest[n]}" for n in beyond], 2),
                fix="the tokenizer has more tokens than the weights: use this base's own, or leave these rows out",
            )
        long = (rows.lengths > self.table).nonzero()[0] if self.table else ()
        if len(long):
            raise InputError(
                f"{name}: {_rows(len(long))} longer than the base's table of {self.table:,} positions\n"
                + listed([f"{rows.origin(n)}: {rows.lengths[n]:,} tokens" for n in long], 2),
                fix=f"set data.max_length to {self.table}: texts are then split; of other rows, data.too_long decides "
                "whether they are left out or cut",
            )

    def warnings(self, rows: Rows) -> list[str]:
        """A warning for rows that can be given but are longer than the model was made for."""
        lengths = rows.lengths
        long = int((lengths > self.context).sum()) if self.context else 0
        if not long:
            return []
        longest = int(lengths.argmax())
        return [
            f"{_rows(long)} ({percent(long / len(lengths), 1)}) longer than the {self.context:,} tokens that "
            f"the base was made for, the longest {lengths[longest]:,} ({rows.origin(longest)}); data.max_length bounds "
            "them",
        ]


def context_of(config: Any) -> int | None:
    """The most tokens that a text config says the model was made for; None where it doesn't say (ALiBi, state spaces).

    Dynamic NTK keeps the trained length in max_position_embeddings, and goes on to `factor` times it.
    """
    stated = [value for name in STATED if isinstance(value := getattr(config, name, None), int) and value > 0]
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict)]
    factors = [kind.get("factor") or 1 for kind in kinds if "dynamic" in str(kind.get("rope_type"))]
    return int(min(stated) * max([1, *factors])) if stated else None


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count > 1)}"


def _tables(model: nn.Module, tokens: nn.Module | None) -> Iterator[int]:
    """How many positions each of the language model's tables has."""
    reads_text = language_part(model)
    for path, module in model.named_modules():
        if not reads_text(path):
            continue
        if isinstance(module, nn.Embedding) and module is not tokens and _is_of_positions(path):
            padding = -1 if module.padding_idx is None else module.padding_idx
            yield module.num_embeddings - int(getattr(module, "offset", padding + 1))
    for path, buffer in model.named_buffers():
        if reads_text(path) and _is_of_positions(path) and buffer.dim():
            yield buffer.shape[-1] if path.endswith("_ids") else buffer.shape[0]


def _is_of_positions(path: str) -> bool:
    return any(part in path.rpartition(".")[2] for part in POSITIONS)
