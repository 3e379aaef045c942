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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain, pairwise

import numpy as np

from deltaw.config import DataConfig
from deltaw.data.asking import of_training, question_of
from deltaw.data.carry import Results, packed, unpacked
from deltaw.data.dataset import Dataset
from deltaw.data.document import Single
from deltaw.data.example import Example
from deltaw.data.examples import Builder, Examples, joined
from deltaw.data.forms import Reads
from deltaw.data.questions import Questions, as_prompt
from deltaw.data.render import Renderer
from deltaw.data.report import Reading, names, report_of
from deltaw.data.row import Problem, Row
from deltaw.data.sources import open_sources
from deltaw.data.taken import Placed, Taken
from deltaw.errors import InputError, Rejected, listed
from deltaw.files.forked import cores, in_processes
from deltaw.show.progress import QUIET, Display, Progress, unseen
from deltaw.show.text import counted

CHUNK, CHARACTERS = 512, 4_000_000  # rows and characters tokenised in one call
SHORTEST = 16  # tokens: shorter pieces aren't advised
LONG = 500_000  # characters of a row that take the tokenizer a while

SEVERAL = 8  # chunks from which on several processes render them
LOOKS = 8 * CHUNK  # rows that a process looks at in one go
SIZE = 16  # bytes of a digest
LEAVE_OUT = "set data.bad_rows to the share that may be left out"
CONTENT = json.JSONEncoder(sort_keys=True, default=str)

Place = tuple[int, int]  # source, row in it


class _Extent:
    """How much there is to read: rows, or their characters where one of them takes the tokenizer a while. `order`: the
    rows in random order."""

    def __init__(self, sources: Sequence[Reading], seed: int) -> None:
        places = [(number, position) for number, source in enumerate(sources) for position in range(len(source.rows))]
        every, digests = _looked_at(sources, places, str(seed).encode()[-64:])
        firsts = np.cumsum([0, *(len(source.rows) for source in sources)]).tolist()
        self.characters = [every[begin:end] for begin, end in pairwise(firsts)]
        self.rows = len(places)
        self.in_characters = max(every) > LONG
        self.total = sum(every) if self.in_characters else len(every)
        ranks = sorted(range(len(places)), key=lambda at: (digests[SIZE * at : SIZE * (at + 1)], at))
        self.order = [places[at] for at in ranks]

    def of(self, places: Sequence[Place]) -> int:
        """What these rows are of it."""
        if not self.in_characters:
            return len(places)
        return sum(self.characters[number][position] for number, position in places)


def _looked_at(sources: Sequence[Reading], places: Sequence[Place], key: bytes) -> tuple[list[int], bytes]:
    """How many characters each row has, and the digests of their contents, end to end."""

    def work(number: int) -> bytes:
        part = [sources[of].rows[position] for of, position in places[LOOKS * number : LOOKS * (number + 1)]]
        counts = np.array(list(map(_characters, part)), np.int64)
        return counts.tobytes() + b"".join(digest(row, key) for row in part)

    parts, processes = -(-len(places) // LOOKS), cores()
    alone = processes == 1 or len(places) < SEVERAL * CHUNK
    results = map(work, range(parts)) if alone else in_processes(work, parts, processes)
    counts, digests = [], []
    for result in results:
        size = len(result) * 8 // (8 + SIZE)
        counts += np.frombuffer(result[:size], np.int64).tolist()
        digests.append(bytes(result[size:]))
    return counts, b"".join(digests)


def _characters(row: Row) -> int:
    return sum(len(value) for value in row.value.values() if isinstance(value, str))


def prepare(config: DataConfig, renderer: Renderer, *, reads: Reads = "auto", display: Display = QUIET) -> Dataset:
    """Read, recognise, render and split. `reads`: how pairs are read where the config leaves it open.

    Raises InputError when a source can't be read, too many of its rows are unusable, nothing is left to train on, or
    there are too few rows to hold out as many as asked.
    """
    sources, builder = open_sources(config.train, config, renderer, reads), Builder()
    extent = _Extent(sources, config.seed)
    with display.task("reading data", extent.total) as progress:
        wanted = None if config.limit is None else config.limit + config.held_out_of(extent.rows)
        count, stream = _held_out_of(sources, _units(sources, renderer, config, progress, extent, wanted), config)
        held_out, train = Taken(builder, stream, count), Taken(builder, stream, config.limit)
        progress(extent.total)  # rows beyond data.limit are never looked at
    _check(sources, config, usable=bool(train or held_out))
    if not train:
        raise _none_left(sources, held_out, config)
    others = sources
    if config.eval_sources is not None:
        others = open_sources(config.eval_sources, config, renderer, reads)
        extent = _Extent(others, config.seed)
        with display.task("reading held-out rows", extent.total) as progress:
            held_out = Taken(builder, _units(others, renderer, config, progress, extent))
        _check(others, config, usable=bool(held_out))
    _assign(sources, others, train, held_out, builder.finish())
    asking = of_training(_documents(sources, train))
    question = question_of(chain(_documents(others, held_out), _documents(sources, train)))
    chat = any(source.is_chat for source in sources)
    parts = joined([one.train for one in sources]), joined([one.held_out for one in others])
    report = report_of(sources, others, *parts, renderer, chat)
    asked = (Questions(sources), Questions(others)) if renderer.shape == "prompts" else ()
    return Dataset(*parts, report, replace(asking, chat=chat), question, questions=asked)


def prepare_held_out(config: DataConfig, renderer: Renderer) -> Examples:
    """`prepare(config, renderer).eval` without rendering what is trained on. Raises InputError as `prepare` does where
    it comes to the held-out rows; rows to train on are not judged.
    """
    if config.eval_sources is not None:
        sources = open_sources(config.eval_sources, config, renderer)
        builder = Builder()
        held_out = Taken(builder, _units(sources, renderer, config, unseen, _Extent(sources, config.seed)))
        _check(sources, config, usable=bool(held_out))
        return builder.finish().take(held_out.in_file_order)
    sources = open_sources(config.train, config, renderer)
    extent, builder = _Extent(sources, config.seed), Builder()
    wanted = config.held_out_of(extent.rows)
    count, stream = _held_out_of(sources, _units(sources, renderer, config, unseen, extent, wanted), config)
    held_out = Taken(builder, stream, count)
    bad = any(source.bad_share > config.bad_rows for source in sources)
    if held_out.units < count or bad:  # how bad they are is to be told of all of them
        return prepare(config, renderer).eval
    return builder.finish().take(held_out.in_file_order)


def _documents(sources: Sequence[Reading], part: Taken) -> Iterator[Single]:
    """The rows that these examples come of, as they were before they were rendered."""
    for number, position in part.whole_rows():
        yield sources[number].form.normalise(sources[number].rows[position]).answers[0][0]


def _held_out_of(
    sources: Sequence[Reading], units: Iterator[list[Placed]], config: DataConfig
) -> tuple[int, Iterator[list[Placed]]]:
    """How many of the units are held out; a share of a single document is of its pieces."""
    if isinstance(config.eval, float) and len(sources) == 1 and sources[0].by_piece:
        pieces = list(units)
        return config.held_out_of(len(pieces)), iter(pieces)
    return config.held_out_of(sum(len(source.rows) for source in sources)), units


def _assign(sources: list[Reading], others: list[Reading], train: Taken, held_out: Taken, examples: Examples) -> None:
    """Give each source its rows: those to train on as often as its weight says, in file order."""
    for number, source in enumerate(sources):
        source.train = examples.take(train.of_source(number, source.weight, by_piece=source.by_piece))
    for number, source in enumerate(others):
        source.held_out = examples.take(held_out.of_source(number))


def _units(
    sources: Sequence[Reading],
    renderer: Renderer,
    config: DataConfig,
    progress: Progress,
    extent: _Extent,
    wanted: int | None = None,
) -> Iterator[list[Placed]]:
    """The usable rows of all sources in random order, each as its pieces; of a single document each piece is one. Only
    what is taken is counted; `wanted` is how many that will be, None for all."""
    before = 0
    for chunk, results in _rendered(sources, renderer, config, progress, extent, wanted):
        for (number, position), result in zip(chunk, results, strict=True):
            source = sources[number]
            source.seen += 1
            pieces = _fit(result, source, source.rows.origin(position), config)
            placed = [(number, position, at, piece) for at, piece in enumerate(pieces)]
            if source.by_piece and len(sources) == 1:
                yield from ([placed[at]] for at in _shuffled(pieces, config.seed))
            elif placed:
                yield placed
        before += extent.of(chunk)
        progress(before)


def _rendered(
    sources: Sequence[Reading],
    renderer: Renderer,
    config: DataConfig,
    progress: Progress,
    extent: _Extent,
    wanted: int | None,
) -> Iterator[tuple[list[Place], Results]]:
    """The rows in random order, a chunk at a time, with what became of each. Where there are many, processes render
    them; the tokenizer's threads do it where a single row takes it a while."""
    chunks = _chunks(extent, extent.order)
    processes = cores()
    few = min(extent.rows, extent.rows if wanted is None else wanted) < SEVERAL * CHUNK
    if processes == 1 or extent.in_characters or few:
        before = 0
        for chunk in chunks:
            within = partial(_beyond, progress, before) if extent.in_characters else unseen
            yield chunk, _render(chunk, sources, renderer, config, within)
            before += extent.of(chunk)
        return
    every = list(chunks)

    def origins(chunk: list[Place]) -> list[str]:
        return [sources[number].rows.origin(position) for number, position in chunk]

    def work(number: int) -> bytes:
        return packed(_render(every[number], sources, renderer, config, unseen), origins(every[number]))

    with closing(in_processes(work, len(every), processes)) as results:
        for chunk, result in zip(every, results, strict=True):
            yield chunk, unpacked(result, origins(chunk))


def _beyond(progress: Progress, before: int, done: int) -> None:
    progress(before + done)


def _chunks(extent: _Extent, order: Sequence[Place]) -> Iterator[list[Place]]:
    """`order` in runs of at most CHUNK rows and CHARACTERS characters, or of one row."""
    chunk: list[Place] = []
    size = 0
    for number, position in order:
        more = extent.characters[number][position]
        if chunk and (len(chunk) == CHUNK or size + more > CHARACTERS):
            yield chunk
            chunk, size = [], 0
        chunk.append((number, position))
        size += more
    if chunk:
        yield chunk


def _shuffled(pieces: Sequence[Example], seed: int) -> list[int]:
    """The pieces' numbers in the order of a hash of their tokens, as rows are (`digest`)."""
    key = str(seed).encode()[-64:]
    digests = [hashlib.blake2b(piece.tokens.tobytes(), digest_size=16, key=key).digest() for piece in pieces]
    return sorted(range(len(pieces)), key=lambda number: (digests[number], number))


def digest(row: Row, key: bytes) -> bytes:
    """What the order of the choice is sorted by. `key`: of the seed."""
    try:
        filled = {name: value for name, value in row.value.items() if value is not None}
        content = CONTENT.encode(filled).encode()
    except (RecursionError, TypeError):  # nested too deeply, or keys of several types: no JSON row is so
        content = row.origin.encode()
    return hashlib.blake2b(content, digest_size=SIZE, key=key).digest()


def _render(
    places: Sequence[Place], sources: Sequence[Reading], renderer: Renderer, config: DataConfig, progress: Progress
) -> list[list[Example] | Rejected]:
    """Each row as an example or, where its source's texts are split, as pieces."""
    results: dict[Place, list[Example] | Rejected] = {}
    whole: dict[tuple[Place, int], tuple[Single, str]] = {}  # by place and part
    split: dict[Place, tuple[Single, str]] = {}
    for place in places:
        source = sources[place[0]]
        row = source.rows[place[1]]
        try:
            for single, part in source.form.normalise(row).answers:
                if source.splits:
                    split[place] = single, row.origin
                else:
                    whole[place, part] = single, row.origin
        except Rejected as rejected:
            results[place] = rejected
    if split:
        pieces = renderer.render_pieces(*_apart(split.values()), config.max_length, config.overlap, progress)
        results |= zip(split, pieces, strict=True)
    if whole:
        for (place, part), example in zip(whole, renderer.render_all(*_apart(whole.values())), strict=True):
            before = results.get(place, [])
            if isinstance(before, Rejected) or isinstance(example, Rejected):
                results[place] = before if isinstance(before, Rejected) else example  # type: ignore[assignment]
            elif renderer.shape == "prompts":
                results[place] = [as_prompt(replace(example, part=part), config.max_length)]
            elif any(example.equals(one) for one in before):
                results[place] = Rejected("chosen and rejected are the same once the template has written them")
            else:
                results[place] = [*before, replace(example, part=part) if part else example]
    return [results[place] for place in places]


def _apart(given: Iterable[tuple[Single, str]]) -> tuple[list[Single], list[str]]:
    pairs = list(given)
    return [document for document, _ in pairs], [origin for _, origin in pairs]


def _fit(result: list[Example] | Rejected, source: Reading, origin: str, config: DataConfig) -> list[Example]:
    """The examples that can be used, cut to `max_length` where that is wanted. Counts what is lost."""
    if isinstance(result, Rejected):
        source.rejected += 1
        source.problems.append(Problem(origin, str(result)))
        return []
    source.tokens_read += sum(len(piece.tokens) - piece.context for piece in result)
    if len(result) > 1 and not result[0].part:
        source.split_rows += 1
        source.pieces += len(result)
    longest = max(len(piece.tokens) for piece in result)
    if longest <= config.max_length:
        return result
    source.too_long.append(origin)
    source.longest_dropped = max(source.longest_dropped, longest)
    if config.too_long != "truncate":
        source.too_long_dropped += 1
        return []
    cut = [example.cut(config.max_length) for example in result]
    alike = len(cut) > 1 and cut[0].equals(cut[1])  # of a pair: they part behind the cut
    if alike or not all(example.loss_mask.any() for example in cut):
        source.untrained += 1
        return []
    source.truncated += 1
    return cut


def _check(sources: Sequence[Reading], config: DataConfig, *, usable: bool) -> None:
    """Put what was left out in file order. Raises InputError when too many rows of a source are unusable, or none of
    any is usable."""
    for source in sources:
        source.problems.sort(key=lambda problem: _place(problem.origin))
        source.too_long.sort(key=_place)
        table = listed([str(problem) for problem in source.problems])
        if source.problems and (source.bad_share > config.bad_rows or not usable):
            what = f"{source.name}: {len(source.problems)} of {source.count} rows can't be used"
            fix = f", or {LEAVE_OUT}" if usable else ": no usable row is left"
            raise InputError(f"{what} ({source.form.description})\n{table}", fix=f"fix them{fix}")
    if not usable:
        lost = sum(source.too_long_dropped + source.untrained for source in sources)
        what = (
            f"{names(sources)}: nothing to train on: all {lost} rows are longer than data.max_length "
            f"{config.max_length}"
        )
        untrained = any(source.untrained for source in sources)
        if untrained:
            what += ", and what is to be trained comes after that"
        longest = max(source.longest_dropped for source in sources)
        fix = f"set data.max_length higher: the longest row has {longest:,} tokens"
        raise InputError(what, fix=fix if untrained else f"{fix}; or data.too_long: truncate")


def _none_left(sources: Sequence[Reading], held_out: Taken, config: DataConfig) -> InputError:
    """`data.eval` takes all there is."""
    source = sources[0]
    if source.by_piece and len(sources) == 1:
        smaller = source.tokens_read // (5 * config.held_out_of(1))
        shorter = f"set data.max_length to {smaller} or so for more pieces, " if smaller >= SHORTEST else ""
        return InputError(
            f"{source.name}: one document in {counted(len(held_out), 'piece')}, and data.eval takes {config.eval}, so "
            "none is left to train on",
            fix=f"set data.eval lower, {shorter}or give it a separate file",
        )
    count = sum(1 for _ in held_out.whole_rows())
    whole = ": texts are held out whole" if any(source.split_rows for source in sources) else ""
    usable = counted(count, "usable row")
    return InputError(
        f"{names(sources)}: {usable}, and data.eval takes {config.eval}, so none is left to train on",
        fix=f"set data.eval lower{whole}, or give it a separate file",
    )


def _place(origin: str) -> tuple[str, int]:
    """Sorts origins as people count: `a:9` before `a:10`."""
    name, _, number = origin.rpartition(":")
    return name, int(number)
