"""A `DataConfig` -> examples to train on, examples held out, and a report of everything that was left out.

Rows are taken in the order of a hash of (seed, content): first the held-out ones, then those to train on, as far as
`limit`; afterwards both stand in file order again. So the choice is random (a sorted dictionary isn't cut to the words
in a) and doesn't change when the file is sorted otherwise; copies of a row stand together, so that hardly any is on
both sides of the border; and rows that aren't used aren't tokenised. So the held-out rows can be prepared alone, the
very same ones (`prepare_held_out`). A text in pieces counts as one row: all its pieces are held out or none is, so that
no model is measured on a text that it was trained on the rest of. If the source is one document there is no other way
than to hold out some of its pieces. Rejected: a seeded shuffle of row numbers, which is random and nothing else.

A row can fail to be read, to have the source's form, or to be rendered; all three are *unusable*, and more
than `bad_rows` of them is an error before any training. A row that is too long is counted apart, since the
file is not at fault. Duplicates and rows on both sides of the border are reported, not removed: a set may
repeat a row on purpose.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice

from deltaw.config import DataConfig
from deltaw.data.document import Chat, Document
from deltaw.data.example import Example, fingerprint
from deltaw.data.forms import Reads, form_of
from deltaw.data.read import read_rows
from deltaw.data.render import Renderer
from deltaw.data.report import DataReport, Reading, report_of
from deltaw.data.row import Problem, Row
from deltaw.data.text_files import documents
from deltaw.errors import InputError, Rejected, listed
from deltaw.show.progress import QUIET, Display, Progress, unseen

CHUNK, CHARACTERS = 512, 4_000_000  # rows and characters tokenised in one call
LONG = 500_000  # characters of a row that take the tokenizer a while

Placed = tuple[int, int, Example]  # row in the file, piece of the row


@dataclass(frozen=True)
class Dataset:
    """Examples in file order, and how they came about."""

    train: list[Example]
    eval: list[Example]
    report: DataReport
    chat: bool = False  # the rows went through the chat template

    @cached_property
    def fingerprint(self) -> str:
        """Of every token and mask, in order: equal where a run may be resumed."""
        return fingerprint(self.train, self.eval)


def prepare(config: DataConfig, renderer: Renderer, *, reads: Reads = "auto", display: Display = QUIET) -> Dataset:
    """Read, recognise, render and split. `reads`: how pairs are read where the config leaves it open.

    Raises InputError when a source can't be read, too many of its rows are unusable, nothing is left to train on, or
    there are too few rows to hold out as many as asked.
    """
    source = _open(config.train, config, renderer, reads)
    sources = [source]
    held_out: list[Placed] = []
    with display.task("reading data", _size(source.rows)) as progress:
        stream = _units(source, renderer, config, progress)
        if isinstance(config.eval, int):
            held_out = _taken(stream, config.eval)
        train = _taken(stream, config.limit)
        progress(_size(source.rows))  # rows beyond data.limit are never looked at
    _check(source, config, usable=bool(train or held_out))
    if not train:
        raise _none_left(source, held_out, config)
    if isinstance(config.eval, str):
        other = _open(config.eval, config, renderer, reads)
        with display.task("reading held-out rows", _size(other.rows)) as progress:
            held_out = _taken(_units(other, renderer, config, progress))
        _check(other, config, usable=bool(held_out))
        sources.append(other)
    chat = isinstance(source.form.normalise(source.rows[train[0][0]]), Chat)
    parts = _in_file_order(train), _in_file_order(held_out)
    return Dataset(*parts, report_of(sources, *parts, renderer, chat), chat)


def prepare_held_out(config: DataConfig, renderer: Renderer) -> list[Example]:
    """`prepare(config, renderer).eval` without rendering what is trained on. Raises InputError as `prepare` does where
    it comes to the held-out rows; rows to train on are not judged.
    """
    if isinstance(config.eval, str):
        source = _open(config.eval, config, renderer)
        held_out = _taken(_units(source, renderer, config, unseen))
        _check(source, config, usable=bool(held_out))
        return _in_file_order(held_out)
    count = config.eval or 0
    source = _open(config.train, config, renderer)
    units = list(islice(_units(source, renderer, config, unseen), count))
    if len(units) < count or source.bad_share > config.bad_rows:  # how bad they are is to be told of all of them
        return prepare(config, renderer).eval
    return _in_file_order([piece for unit in units for piece in unit])


def _taken(units: Iterator[list[Placed]], count: int | None = None) -> list[Placed]:
    return [piece for unit in islice(units, count) for piece in unit]


def _in_file_order(part: list[Placed]) -> list[Example]:
    return [example for *_, example in sorted(part, key=lambda item: item[:2])]


def _open(name: str, config: DataConfig, renderer: Renderer, reads: Reads = "auto") -> Reading:
    rows, problems = read_rows(name)
    if config.split_text:
        rows = documents(rows, config.split_text)
    if not rows:
        if problems:
            what = f"{name}: none of its lines can be read\n{listed([str(p) for p in problems])}"
            raise InputError(what, fix="fix them, or name another file")
        raise InputError(f"{name}: no rows in it", fix="put rows into it, or name another file")
    form = form_of(rows, config, templated=renderer.template is not None, reads=reads)
    splits = form.name == "text" and config.too_long in ("auto", "split")
    if not splits and (config.too_long == "split" or config.overlap):
        setting = "too_long: split" if config.too_long == "split" else f"overlap: {config.overlap}"
        raise InputError(
            f"data.{setting} is for texts, and {name} has {form.description}: a piece of an answer without its "
            "question teaches nothing",
            fix="leave it out, or set data.too_long: truncate to keep the beginnings of rows that are too long",
        )
    return Reading(name, rows, problems, form, splits)


def _units(source: Reading, renderer: Renderer, config: DataConfig, progress: Progress) -> Iterator[list[Placed]]:
    """The usable rows in random order, each as its pieces; of a single document each piece is one. Only what is taken
    is counted."""
    rows, before = source.rows, 0
    in_characters = _size(rows) > len(rows)
    for chunk in _chunks(rows, _random_order(rows, config.seed)):
        within = partial(_beyond, progress, before) if in_characters else unseen
        results = _render([rows[position] for position in chunk], source, renderer, config, within)
        for position, result in zip(chunk, results, strict=True):
            source.seen += 1
            pieces = _fit(result, source, rows[position].origin, config)
            placed = [(position, number, piece) for number, piece in enumerate(pieces)]
            if source.by_piece:
                yield from ([placed[number]] for number in _shuffled(pieces, config.seed))
            elif placed:
                yield placed
        before += sum(_characters(rows[position]) for position in chunk) if in_characters else len(chunk)
        progress(before)


def _beyond(progress: Progress, before: int, done: int) -> None:
    progress(before + done)


def _chunks(rows: Sequence[Row], order: Sequence[int]) -> Iterator[list[int]]:
    """`order` in runs of at most CHUNK rows and CHARACTERS characters, or of one row."""
    chunk: list[int] = []
    size = 0
    for position in order:
        more = _characters(rows[position])
        if chunk and (len(chunk) == CHUNK or size + more > CHARACTERS):
            yield chunk
            chunk, size = [], 0
        chunk.append(position)
        size += more
    if chunk:
        yield chunk


def _characters(row: Row) -> int:
    return sum(len(value) for value in row.value.values() if isinstance(value, str))


def _size(rows: Sequence[Row]) -> int:
    """What there is to read: rows, or their characters where one of them takes the tokenizer a while."""
    sizes = [_characters(row) for row in rows]
    return sum(sizes) if max(sizes) > LONG else len(rows)


def _shuffled(pieces: Sequence[Example], seed: int) -> list[int]:
    """The pieces' numbers in the order of a hash of their tokens, as rows are (`_random_order`)."""
    key = str(seed).encode()[-64:]
    digests = [hashlib.blake2b(piece.tokens.tobytes(), digest_size=16, key=key).digest() for piece in pieces]
    return sorted(range(len(pieces)), key=lambda number: (digests[number], number))


def _random_order(rows: Sequence[Row], seed: int) -> list[int]:
    key = str(seed).encode()[-64:]

    def digest(position: int) -> tuple[bytes, int]:
        try:
            filled = {name: value for name, value in rows[position].value.items() if value is not None}
            content = json.dumps(filled, sort_keys=True, default=str).encode()
        except (RecursionError, TypeError):  # nested too deeply, or keys of several types: no JSON row is so
            content = rows[position].origin.encode()
        return hashlib.blake2b(content, digest_size=16, key=key).digest(), position

    return sorted(range(len(rows)), key=digest)


def _render(
    rows: Sequence[Row], source: Reading, renderer: Renderer, config: DataConfig, progress: Progress
) -> list[list[Example] | Rejected]:
    """Each row as an example or, where its source's texts are split, as pieces."""
    results: list[list[Example] | Rejected | None] = []
    given: list[Document] = []
    origins = []
    for row in rows:
        try:
            given.append(source.form.normalise(row))
            origins.append(row.origin)
            results.append(None)
        except Rejected as rejected:
            results.append(rejected)
    if source.splits:
        rendered = iter(renderer.render_pieces(given, origins, config.max_length, config.overlap, progress))
    else:
        whole = renderer.render_all(given, origins)
        rendered = iter([example if isinstance(example, Rejected) else [example] for example in whole])
    return [next(rendered) if result is None else result for result in results]


def _fit(result: list[Example] | Rejected, source: Reading, origin: str, config: DataConfig) -> list[Example]:
    """The examples that can be used, cut to `max_length` where that is wanted. Counts what is lost."""
    if isinstance(result, Rejected):
        source.rejected += 1
        source.problems.append(Problem(origin, str(result)))
        return []
    source.tokens_read += sum(len(piece.tokens) - piece.context for piece in result)
    if len(result) > 1:
        source.split_rows += 1
        source.pieces += len(result)
    if len(result[0].tokens) <= config.max_length:
        return result
    (example,) = result
    source.too_long.append(origin)
    source.longest_dropped = max(source.longest_dropped, len(example.tokens))
    if config.too_long != "truncate":
        source.too_long_dropped += 1
        return []
    if not example.loss_mask[: config.max_length].any():
        source.untrained += 1
        return []
    source.truncated += 1
    return [example.cut(config.max_length)]


def _check(source: Reading, config: DataConfig, *, usable: bool) -> None:
    """Put what was left out in file order. Raises InputError when too many rows are unusable, or none is usable."""
    source.problems.sort(key=lambda problem: _place(problem.origin))
    source.too_long.sort(key=_place)
    table = listed([str(problem) for problem in source.problems])
    if source.problems and (source.bad_share > config.bad_rows or not usable):
        what = f"{source.name}: {len(source.problems)} of {source.count} rows can't be used"
        fix = ", or set data.bad_rows to the share that may be left out" if usable else ": no usable row is left"
        raise InputError(f"{what} ({source.form.description})\n{table}", fix=f"fix them{fix}")
    if not usable:
        lost = source.too_long_dropped + source.untrained
        what = (
            f"{source.name}: nothing to train on: all {lost} rows are longer than data.max_length {config.max_length}"
        )
        if source.untrained:
            what += ", and what is to be trained comes after that"
        fix = f"set data.max_length higher: the longest row has {source.longest_dropped:,} tokens"
        raise InputError(what, fix=fix if source.untrained else f"{fix}; or data.too_long: truncate")


def _none_left(source: Reading, held_out: Sequence[Placed], config: DataConfig) -> InputError:
    """`data.eval` takes all there is."""
    if source.by_piece:
        smaller = max(16, source.tokens_read // (5 * int(config.eval or 1)))
        return InputError(
            f"{source.name}: one document in {len(held_out)} usable pieces, and data.eval takes {config.eval}, so none "
            "is left to train on",
            fix=f"set data.eval lower, set data.max_length to {smaller} or so for more pieces, or give it a file",
        )
    count = len({position for position, *_ in held_out})
    whole = ": texts are held out whole" if source.split_rows else ""
    return InputError(
        f"{source.name}: {count} usable rows, and data.eval takes {config.eval}, so none is left to train on",
        fix=f"set data.eval lower{whole}, or give it a separate file",
    )


def _place(origin: str) -> tuple[str, int]:
    """Sorts origins as people count: `a:9` before `a:10`."""
    name, _, number = origin.rpartition(":")
    return name, int(number)
