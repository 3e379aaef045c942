"""What became of each row of the sources, in plain values and in sentences."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from deltaw.data.document import Chat
from deltaw.data.example import Example
from deltaw.data.forms import Form
from deltaw.data.render import Renderer
from deltaw.data.row import Problem, Row
from deltaw.show.text import counted, one_line

SHOWN = 10  # problems and origins kept in the report


@dataclass
class Reading:
    """One source on its way to examples, with what was left out so far. `splits`: texts that are too long are split;
    `by_piece`: it is one document, of which pieces are held out."""

    name: str
    rows: list[Row]
    problems: list[Problem]
    form: Form
    splits: bool = False
    seen: int = 0
    rejected: int = 0
    too_long_dropped: int = 0
    truncated: int = 0
    untrained: int = 0
    split_rows: int = 0
    pieces: int = 0
    tokens_read: int = 0
    longest_dropped: int = 0
    too_long: list[str] = field(default_factory=list)
    weight: float = 1.0
    notes: list[str] = field(default_factory=list)
    train: list[Example] = field(default_factory=list)  # each as often as an epoch sees it
    held_out: list[Example] = field(default_factory=list)

    @property
    def by_piece(self) -> bool:
        return self.splits and len(self.rows) == 1

    @property
    def is_chat(self) -> bool:
        """Whether its rows go through the chat template; of no rows to train on it isn't asked."""
        first = next(iter(self.train), None)
        origin = first.origin if first else None
        row = next((row for row in self.rows if row.origin == origin), None)
        return row is not None and isinstance(self.form.normalise(row), Chat)

    @property
    def count(self) -> int:
        """Rows, those that can't be read included."""
        return len(self.rows) + len(self.problems) - self.rejected

    @property
    def bad_share(self) -> float:
        """Share of unusable rows: unreadable ones of all lines, rejected ones of the rows looked at."""
        unreadable = len(self.problems) - self.rejected
        return unreadable / (unreadable + len(self.rows)) + self.rejected / max(self.seen, 1)


@dataclass(frozen=True)
class Share:
    """A source's part in an epoch: of its `train_rows` rows to train on so many `visits`, a `share` of the tokens that
    are trained."""

    name: str
    form: str
    weight: float
    rows_read: int
    train_rows: int
    eval_rows: int
    visits: int
    tokens: int
    supervised_tokens: int
    share: float


@dataclass(frozen=True)
class DataReport:
    """What became of each row, in plain values: `dataclasses.asdict` is JSON. `share` is supervised over all tokens.

    `unused`, `left_out`: the columns and the fields of messages that no token comes of, with the share of rows in which
    they say something. `named_…`: rows in whose text names of control tokens stand, how many, and the first such row.
    `split_rows` texts are in `pieces` pieces. `tokens_read`: of all rows that were looked at; `kept`: the share of them
    that is in the rows to train on and held out, what a piece shows again not counted. `notes` are no warnings.
    `tokens` and `supervised_tokens` are those of an epoch, in which weights count; rows count once.
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
    split_rows: int
    pieces: int
    tokens_read: int
    kept: float
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
    glued_rows: int
    notes: list[str]
    sources: list[Share]
    warnings: list[str]


def report_of(
    of_train: list[Reading],
    of_eval: list[Reading],
    epoch: list[Example],
    held_out: list[Example],
    renderer: Renderer,
    chat: bool,
) -> DataReport:
    """`of_eval`: the sources of the held-out rows, which may be those of the rows to train on."""
    sources = of_train if of_eval is of_train else [*of_train, *of_eval]
    train = list(dict.fromkeys(epoch))  # an example that is seen twice is one object
    keys = Counter(_key(example) for example in train)
    tokens = sum(len(example.tokens) for example in epoch)
    supervised = sum(int(example.loss_mask.sum()) for example in epoch)
    examples = [*train, *held_out]
    named = [example for example in examples if example.names]
    kept = sum(len(example.tokens) - example.context for example in examples)
    tokens_read = sum(source.tokens_read for source in sources)
    longest = max(examples, key=lambda example: len(example.tokens))
    report = DataReport(
        source=names(of_train),
        form="; ".join(dict.fromkeys(source.form.description for source in of_train)),
        rows_read=sum(source.count for source in sources),
        train_rows=len(train),
        eval_rows=len(held_out),
        unusable=sum(len(source.problems) for source in sources),
        problems=[str(problem) for source in sources for problem in source.problems][:SHOWN],
        too_long_dropped=sum(source.too_long_dropped for source in sources),
        truncated=sum(source.truncated for source in sources),
        too_long=[origin for source in sources for origin in source.too_long][:SHOWN],
        split_rows=sum(source.split_rows for source in sources),
        pieces=sum(source.pieces for source in sources),
        tokens_read=tokens_read,
        kept=kept / tokens_read,
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
        glued_rows=sum(example.glued for example in examples),
        notes=_notes(sources, len(held_out)),
        sources=[_share(source, supervised) for source in sources],
        warnings=[*renderer.end_of_turn_problems(train), *(renderer.header_problems() if chat else ())],
    )
    report.warnings.extend(_warnings(report, max(source.longest_dropped for source in sources)))
    if report.glued_rows:
        report.warnings.append(_glued(report, next(example for example in examples if example.glued)))
    if named:
        report.warnings.append(_named(report, sorted({name for example in named for name in example.names}), chat))
    return report


def names(sources: Sequence[Reading]) -> str:
    """The sources in a line."""
    return " + ".join(source.name for source in sources)


def _share(source: Reading, supervised: int) -> Share:
    trained = sum(int(example.loss_mask.sum()) for example in source.train)
    return Share(
        source.name,
        source.form.description,
        source.weight,
        source.count,
        len(dict.fromkeys(source.train)),
        len(source.held_out),
        len(source.train),
        sum(len(example.tokens) for example in source.train),
        trained,
        trained / supervised,
    )


def _shares(names: Sequence[Sequence[str]]) -> dict[str, float]:
    """In what share of the rows each name stands, the commonest first."""
    counts = Counter(name for some in names for name in dict.fromkeys(some))
    return {name: count / len(names) for name, count in counts.most_common()}


def _key(example: Example) -> bytes:
    content = example.tokens.tobytes() + np.packbits(example.loss_mask).tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def _notes(sources: Sequence[Reading], held_out: int) -> list[str]:
    notes = [note for source in sources for note in source.notes]
    notes += [note for note in dict.fromkeys(source.form.note for source in sources) if note]
    split_rows, pieces = sum(source.split_rows for source in sources), sum(source.pieces for source in sources)
    if split_rows:
        texts = counted(split_rows, "text was", "texts were")
        notes.append(f"{texts} longer than data.max_length and split into {pieces:,} pieces")
    if sources[0].by_piece and len(sources) == 1 and held_out:
        some = counted(held_out, "piece of it is", "pieces of it are")
        notes.append(f"there is one document, so {some} held out; of several, whole documents are")
    return notes


def _glued(report: DataReport, first: Example) -> str:
    where = (
        f"in {counted(report.glued_rows, 'row')} prompt and completion meet without a blank; the first: {first.origin}"
    )
    return (
        f"{where}; set data.join: ' ' or \"\\n\" to put one between, or data.form: chat on a base with a chat template"
    )


def _warnings(report: DataReport, longest_dropped: int) -> list[str]:
    keep = f"left out; data.max_length: {longest_dropped} would keep them all"
    lines = {
        "row can't|rows can't": (report.unusable, f"be used; the first: {one_line(''.join(report.problems[:1]))}"),
        "row was|rows were": (report.too_long_dropped, f"longer than data.max_length and {keep}"),
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
    parts = [f"{one_line(name, 60) or 'one without a name'} ({_percent(share)})" for name, share in shares.items()]
    return one_line(", ".join(parts).replace("%)", "% of rows)", 1), 1000)
