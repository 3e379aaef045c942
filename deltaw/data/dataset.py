"""A `DataConfig` -> examples to train on, examples held out, and a report of everything that was left out.

Rows are taken in the order of a hash of (seed, content): first the held-out ones, then those to train on, as far as
`limit`; afterwards both stand in file order again. So the choice is random (a sorted dictionary isn't cut to the words
in a) and doesn't change when the file is sorted otherwise; copies of a row stand together, so that hardly any is on
both sides of the border; and rows that aren't used aren't tokenised. So the held-out rows can be prepared alone, the
very same ones (`prepare_held_out`). Rejected: a seeded shuffle of row numbers, which is random and nothing else.

A row can fail to be read, to have the source's form, or to be rendered; all three are *unusable*, and more
than `bad_rows` of them is an error before any training. A row that is too long is counted apart, since the
file is not at fault. Duplicates and rows on both sides of the border are reported, not removed: a set may
repeat a row on purpose.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice

import numpy as np

from deltaw.config import DataConfig
from deltaw.data.asking import RAW, Asking, of_training, question_of
from deltaw.data.document import Document
from deltaw.data.example import Example
from deltaw.data.forms import Form, detect_form
from deltaw.data.read import read_rows
from deltaw.data.render import Renderer
from deltaw.data.row import Problem, Row
from deltaw.errors import InputError, Rejected, listed
from deltaw.show.progress import QUIET, Display, Progress, unseen
from deltaw.show.text import counted, one_line

CHUNK = 512  # rows tokenised in one call
SHOWN = 10  # problems and origins kept in the report


@dataclass(frozen=True)
class DataReport:
    """What became of each row, in plain values: `dataclasses.asdict` is JSON. `share` is supervised over all tokens.

    `unused`, `left_out`: the columns and the fields of messages that no token comes of, with the share of rows in which
    they say something. `named_…`: rows in whose text names of control tokens stand, how many, and the first such row.
    """

    source: str
    form: str
    rows_read: int
    train_rows: int
    eval_rows: int
    unusable: int
    problems: list[str]
    too_long_dropped: int
    truncated: int
    too_long: list[str]
    untrained: int
    untrained_turns: int
    tokens: int
    supervised_tokens: int
    share: float
    duplicates: int
    overlap: int
    longest_row: int
    longest_origin: str
    unused: dict[str, float]
    left_out: dict[str, float]
    named_rows: int
    named_tokens: int
    named_origin: str
    warnings: list[str]


@dataclass(frozen=True)
class Dataset:
    """Examples in file order, and how they came about."""

    train: list[Example]
    eval: list[Example]
    report: DataReport
    asking: Asking = RAW  # how a text is asked that is to be answered as these rows are
    example: str = ""  # one that is short, of a row that was held out if any was

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every token and mask, in order: equal where a run may be resumed."""
        digest = hashlib.sha256()
        for part in (self.train, self.eval):
            digest.update(len(part).to_bytes(8, "little"))
            for example in part:
                digest.update(len(example.tokens).to_bytes(8, "little"))
                digest.update(example.tokens.tobytes())
                digest.update(example.loss_mask.tobytes())
        return digest.hexdigest()


@dataclass
class _Source:
    """One source on its way to examples, with what was left out so far."""

    name: str
    rows: list[Row]
    problems: list[Problem]
    form: Form
    seen: int = 0
    rejected: int = 0
    too_long_dropped: int = 0
    truncated: int = 0
    untrained: int = 0
    too_long: list[str] = field(default_factory=list)

    @property
    def bad_share(self) -> float:
        """Share of unusable rows: unreadable ones of all lines, rejected ones of the rows looked at."""
        unreadable = len(self.problems) - self.rejected
        return unreadable / (unreadable + len(self.rows)) + self.rejected / max(self.seen, 1)


def prepare(config: DataConfig, renderer: Renderer, *, display: Display = QUIET) -> Dataset:
    """Read, recognise, render and split.

    Raises InputError when a source can't be read, too many of its rows are unusable, nothing is left to train on, or
    there are too few rows to hold out as many as asked.
    """
    source = _open(config.train, config)
    sources = [source]
    held_out: list[tuple[int, Example]] = []
    with display.task("reading data", len(source.rows)) as progress:
        stream = _examples(source, renderer, config, progress)
        if isinstance(config.eval, int):
            held_out = list(islice(stream, config.eval))
        train = list(islice(stream, config.limit))
        progress(len(source.rows))  # rows beyond data.limit are never looked at
    _check(source, config, usable=bool(train or held_out))
    if not train:
        what = (
            f"{source.name}: {len(held_out)} usable rows, and data.eval takes {config.eval}, so none is left to train "
            "on"
        )
        raise InputError(what, fix="set data.eval lower, or give it a separate file")
    if isinstance(config.eval, str):
        other = _open(config.eval, config)
        with display.task("reading held-out rows", len(other.rows)) as progress:
            held_out = list(_examples(other, renderer, config, progress))
        _check(other, config, usable=bool(held_out))
        sources.append(other)
    asking = of_training(_documents(source, train))
    question = question_of(chain(_documents(sources[-1], held_out), _documents(source, train)))
    parts = _in_file_order(train), _in_file_order(held_out)
    return Dataset(*parts, _report(sources, *parts, renderer, asking.chat), asking, question)


def prepare_held_out(config: DataConfig, renderer: Renderer) -> list[Example]:
    """`prepare(config, renderer).eval` without rendering what is trained on. Raises InputError as `prepare` does where
    it comes to the held-out rows; rows to train on are not judged.
    """
    if isinstance(config.eval, str):
        source = _open(config.eval, config)
        held_out = list(_examples(source, renderer, config, unseen))
        _check(source, config, usable=bool(held_out))
        return _in_file_order(held_out)
    count = config.eval or 0
    source = _open(config.train, config)
    held_out = list(islice(_examples(source, renderer, config, unseen), count))
    if len(held_out) < count or source.bad_share > config.bad_rows:  # how bad they are is to be told of all of them
        return prepare(config, renderer).eval
    return _in_file_order(held_out)


def _documents(source: _Source, part: Sequence[tuple[int, Example]]) -> Iterator[Document]:
    """The rows that these examples come of, as they were before they were rendered."""
    return (source.form.normalise(source.rows[position]) for position, _ in part)


def _in_file_order(part: list[tuple[int, Example]]) -> list[Example]:
    return [example for _, example in sorted(part, key=lambda item: item[0])]


def _open(name: str, config: DataConfig) -> _Source:
    rows, problems = read_rows(name)
    if not rows:
        if problems:
            what = f"{name}: none of its lines can be read\n{listed([str(p) for p in problems])}"
            raise InputError(what, fix="fix them, or name another file")
        raise InputError(f"{name}: no rows in it", fix="put rows into it, or name another file")
    return _Source(name, rows, problems, detect_form(rows, config.form))


def _examples(
    source: _Source, renderer: Renderer, config: DataConfig, progress: Progress
) -> Iterator[tuple[int, Example]]:
    """(position in the file, example) of the usable rows in random order; only what is taken is counted."""
    order = _random_order(source.rows, config.seed)
    for start in range(0, len(order), CHUNK):
        positions = order[start : start + CHUNK]
        results = _render([source.rows[position] for position in positions], source.form, renderer)
        for position, result in zip(positions, results, strict=True):
            source.seen += 1
            example = _fit(result, source, source.rows[position].origin, config)
            if example is not None:
                yield position, example
        progress(source.seen)


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


def _render(rows: Sequence[Row], form: Form, renderer: Renderer) -> list[Example | Rejected]:
    results: list[Example | Rejected | None] = []
    documents, origins = [], []
    for row in rows:
        try:
            documents.append(form.normalise(row))
            origins.append(row.origin)
            results.append(None)
        except Rejected as rejected:
            results.append(rejected)
    rendered = iter(renderer.render_all(documents, origins))
    return [next(rendered) if result is None else result for result in results]


def _fit(result: Example | Rejected, source: _Source, origin: str, config: DataConfig) -> Example | None:
    """The example if it can be used, cut to `max_length` where that is wanted. Counts what is lost."""
    if isinstance(result, Rejected):
        source.rejected += 1
        source.problems.append(Problem(origin, str(result)))
        return None
    if len(result.tokens) <= config.max_length:
        return result
    source.too_long.append(origin)
    if config.too_long == "drop":
        source.too_long_dropped += 1
        return None
    if not result.loss_mask[: config.max_length].any():
        source.untrained += 1
        return None
    source.truncated += 1
    return result.cut(config.max_length)


def _check(source: _Source, config: DataConfig, *, usable: bool) -> None:
    """Put what was left out in file order. Raises InputError when too many rows are unusable, or none is usable."""
    source.problems.sort(key=lambda problem: _place(problem.origin))
    source.too_long.sort(key=_place)
    table = listed([str(problem) for problem in source.problems])
    if source.problems and (source.bad_share > config.bad_rows or not usable):
        what = f"{source.name}: {len(source.problems)} of {_read(source)} rows can't be used"
        fix = ", or set data.bad_rows to the share that may be left out" if usable else ": no usable row is left"
        raise InputError(f"{what} ({source.form.description})\n{table}", fix=f"fix them{fix}")
    if not usable:
        lost = source.too_long_dropped + source.untrained
        what = (
            f"{source.name}: nothing to train on: all {lost} rows are longer than data.max_length {config.max_length}"
        )
        raise InputError(what, fix="set data.max_length higher, or data.too_long: truncate")


def _place(origin: str) -> tuple[str, int]:
    """Sorts origins as people count: `a:9` before `a:10`."""
    name, _, number = origin.rpartition(":")
    return name, int(number)


def _read(source: _Source) -> int:
    return len(source.rows) + len(source.problems) - source.rejected


def _report(
    sources: list[_Source], train: list[Example], held_out: list[Example], renderer: Renderer, chat: bool
) -> DataReport:
    keys = Counter(_key(example) for example in train)
    tokens = sum(len(example.tokens) for example in train)
    supervised = sum(int(example.loss_mask.sum()) for example in train)
    examples = [*train, *held_out]
    named = [example for example in examples if example.names]
    longest = max(examples, key=lambda example: len(example.tokens))
    report = DataReport(
        source=sources[0].name,
        form=sources[0].form.description,
        rows_read=sum(_read(source) for source in sources),
        train_rows=len(train),
        eval_rows=len(held_out),
        unusable=sum(len(source.problems) for source in sources),
        problems=[str(problem) for source in sources for problem in source.problems][:SHOWN],
        too_long_dropped=sum(source.too_long_dropped for source in sources),
        truncated=sum(source.truncated for source in sources),
        too_long=[origin for source in sources for origin in source.too_long][:SHOWN],
        untrained=sum(source.untrained for source in sources),
        untrained_turns=sum(example.untrained_turns for example in train),
        tokens=tokens,
        supervised_tokens=supervised,
        share=supervised / tokens,
        duplicates=len(train) - len(keys),
        overlap=sum(_key(example) in keys for example in held_out),
        longest_row=len(longest.tokens),
        longest_origin=longest.origin,
        unused=_shares([example.unused for example in examples]),
        left_out=_shares([example.left_out for example in examples]),
        named_rows=len(named),
        named_tokens=sum(len(example.names) for example in named),
        named_origin=named[0].origin if named else "",
        warnings=[*renderer.end_of_turn_problems(train), *(renderer.header_problems() if chat else ())],
    )
    report.warnings.extend(_warnings(report))
    if named:
        report.warnings.append(_named(report, sorted({name for example in named for name in example.names}), chat))
    return report


def _shares(names: Sequence[Sequence[str]]) -> dict[str, float]:
    """In what share of the rows each name stands, the commonest first."""
    counts = Counter(name for some in names for name in dict.fromkeys(some))
    return {name: count / len(names) for name, count in counts.most_common()}


def _key(example: Example) -> bytes:
    content = example.tokens.tobytes() + np.packbits(example.loss_mask).tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def _warnings(report: DataReport) -> list[str]:
    lines = {
        "row can't|rows can't": (report.unusable, f"be used; the first: {one_line(''.join(report.problems[:1]))}"),
        "row was|rows were": (report.too_long_dropped, "longer than data.max_length and left out"),
        "long row was|long rows were": (report.truncated, "cut at data.max_length"),
        "row has|rows have": (report.untrained, "nothing to train within data.max_length"),
        "answer isn't|answers aren't": (report.untrained_turns, "trained: the template rewrites earlier turns"),
        "training row is a copy|training rows are copies": (report.duplicates, "of another"),
        "held-out row is|held-out rows are": (report.overlap, "also trained on"),
    }
    warnings = [f"{counted(count, *words.split('|'))} {what}" for words, (count, what) in lines.items() if count]
    if report.unused:
        warnings.append(f"columns that aren't used: {_listed(report.unused)}")
    if report.left_out:
        warnings.append(f"the chat template leaves out: {_listed(report.left_out)}")
    return warnings


def _named(report: DataReport, names: Sequence[str], chat: bool) -> str:
    where = (
        f"{counted(report.named_rows, 'row names', 'rows name')} control tokens in the text, {report.named_tokens} in "
        "all"
    )
    which = f"{one_line(', '.join(names), 60)}; the first: {report.named_origin}"
    how = "the model sees plain characters, which the preview shows with a backslash"
    return f"{where} ({which}): {how}" + ("" if chat else "; if the rows are rendered already, set data.rendered: true")


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "under 1%"


def _listed(shares: dict[str, float]) -> str:
    """`context (40% of rows), id (100%)`."""
    parts = [f"{one_line(name, 60)} ({_percent(share)})" for name, share in shares.items()]
    return one_line(", ".join(parts).replace("%)", "% of rows)", 1), 1000)
