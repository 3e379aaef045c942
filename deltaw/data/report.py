"""What became of each row of the sources, in plain values and in sentences."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from deltaw.base.parts import CHOSEN, DESIRABLE, REJECTED, UNDESIRABLE
from deltaw.data.document import Chat
from deltaw.data.examples import Examples, Kind, parts_of
from deltaw.data.forms import Form
from deltaw.data.render import Renderer
from deltaw.data.row import Problem
from deltaw.data.rows import Rows
from deltaw.show.text import counted, one_line

NONE = Examples.of([])
SHOWN = 10  # problems and origins kept in the report


@dataclass
class Reading:
    """One source on its way to examples, with what was left out so far. `splits`: texts that are too long are split;
    `by_piece`: it is one document, of which pieces are held out."""

    name: str
    rows: Rows
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
    train: Examples = NONE  # each as often as an epoch sees it
    held_out: Examples = NONE

    @property
    def by_piece(self) -> bool:
        return self.splits and len(self.rows) == 1

    @property
    def is_chat(self) -> bool:
        """Whether its rows go through the chat template; of no rows to train on it isn't asked."""
        origin = self.train.origin(0) if self.train else None
        number = next((number for number, one in enumerate(self.rows.origins()) if one == origin), None)
        return number is not None and isinstance(self.form.normalise(self.rows[number]).answers[0][0], Chat)

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

    @property
    def is_asked(self) -> bool:
        """Whether these are prompts, of which nothing is trained."""
        return self.form.startswith(PROMPTS)


PROMPTS = "prompts;"  # what the form of rows that are only asked begins with


def report_of(
    of_train: list[Reading],
    of_eval: list[Reading],
    epoch: Examples,
    held_out: Examples,
    renderer: Renderer,
    chat: bool,
) -> DataReport:
    """`of_eval`: the sources of the held-out rows, which may be those of the rows to train on."""
    sources = of_train if of_eval is of_train else [*of_train, *of_eval]
    train = epoch.distinct
    digests = train.digests()
    tokens, supervised = int(epoch.lengths.sum()), int(epoch.supervised.sum())
    lengths = np.concatenate([train.lengths, held_out.lengths])
    kinds = _Kinds(train, held_out)
    named = kinds.first(lambda kind: bool(kind.names))
    kept = int(lengths.sum()) - kinds.sum(lambda kind: kind.context)
    tokens_read = sum(source.tokens_read for source in sources)
    longest = int(lengths.argmax())
    report = DataReport(
        source=names(of_train),
        form="; ".join(dict.fromkeys(source.form.description for source in of_train)),
        rows_read=sum(source.count for source in sources),
        train_rows=len(train.units),
        eval_rows=len(held_out.units),
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
        untrained_turns=sum(kind.untrained_turns * count for kind, count, _ in train.kinds()),
        tokens=tokens,
        supervised_tokens=supervised,
        share=supervised / tokens,
        duplicates=len(digests) - len(np.unique(digests)),
        overlap=int(np.isin(held_out.digests(), digests).sum()),
        longest_row=int(lengths[longest]),
        longest_origin=kinds.origin(longest),
        unused=kinds.shares("unused"),
        left_out=kinds.shares("left_out"),
        named_rows=kinds.sum(lambda kind: bool(kind.names)),
        named_tokens=kinds.sum(lambda kind: len(kind.names)),
        named_origin=named,
        glued_rows=kinds.sum(lambda kind: kind.glued),
        notes=[*_notes(sources, len(held_out)), *_answers(train)],
        sources=[_share(source, supervised) for source in sources],
        warnings=[*_endings(renderer, train), *(renderer.header_problems() if chat else ()), *_one_sided(train)],
    )
    report.warnings.extend(_warnings(report, max(source.longest_dropped for source in sources)))
    if report.glued_rows:
        first, paired = kinds.first(lambda kind: kind.glued), CHOSEN in parts_of(train)
        report.warnings.append(_glued(report, first, "answer" if paired else "row"))
    if named:
        report.warnings.append(_named(report, sorted({name for kind, *_ in kinds.all for name in kind.names}), chat))
    return report


class _Kinds:
    """What the rows to train on and held out say beside their tokens, counted. `all`: (kind, rows, the first's number
    among both), in the order of these."""

    def __init__(self, train: Examples, held_out: Examples) -> None:
        self._train, self._held_out = train, held_out
        self.all = [*train.kinds(), *((kind, n, len(train) + at) for kind, n, at in held_out.kinds())]

    def sum(self, figure: Callable[[Kind], int]) -> int:
        """A figure of every row, added up."""
        return sum(figure(kind) * count for kind, count, _ in self.all)

    def first(self, wanted: Callable[[Kind], bool]) -> str:
        """The origin of the first row of such a kind; empty where there is none."""
        return next((self.origin(at) for kind, _, at in self.all if wanted(kind)), "")

    def origin(self, number: int) -> str:
        beyond = number - len(self._train)
        return self._train.origin(number) if beyond < 0 else self._held_out.origin(beyond)

    def shares(self, field: str) -> dict[str, float]:
        """In what share of the rows each name stands in a field, the commonest first."""
        counts: Counter[str] = Counter()
        for kind, count, _ in self.all:
            counts.update(dict.fromkeys(getattr(kind, field), count))
        rows = len(self._train) + len(self._held_out)
        return {name: count / rows for name, count in counts.most_common()}


def _endings(renderer: Renderer, train: Examples) -> list[str]:
    """What a model won't learn of ending; from prompts it learns nothing."""
    return [] if renderer.shape == "prompts" else renderer.end_of_turn_problems(train)


def names(sources: Sequence[Reading]) -> str:
    """The sources in a line."""
    return " + ".join(source.name for source in sources)


def _share(source: Reading, supervised: int) -> Share:
    trained = int(source.train.supervised.sum())
    return Share(
        source.name,
        source.form.description,
        source.weight,
        source.count,
        len(source.train.distinct.units),
        len(source.held_out.units),
        len(source.train.units),
        int(source.train.lengths.sum()),
        trained,
        trained / supervised,
    )


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


def _answers(train: Examples) -> list[str]:
    """What is weighed, where answers are."""
    count = Counter(parts_of(train).tolist())
    if count[DESIRABLE] + count[UNDESIRABLE]:
        good, bad = (counted(count[part], "answer") for part in (DESIRABLE, UNDESIRABLE))
        return [f"{good} found desirable, {bad} undesirable"]
    if not count[CHOSEN]:
        return []
    means = (train.supervised[parts_of(train) == part].mean() for part in (CHOSEN, REJECTED))
    return [
        "{} of answers: {:.0f} trained tokens in a chosen one on average, {:.0f} in a rejected one".format(
            counted(count[CHOSEN], "pair"), *means
        )
    ]


def _one_sided(train: Examples) -> list[str]:
    """Whether answers were all judged alike, which leaves nothing to tell apart."""
    there = {*parts_of(train).tolist()} & {DESIRABLE, UNDESIRABLE}
    if len(there) != 1:
        return []
    word, other = ("desirable", "undesirable") if DESIRABLE in there else ("undesirable", "desirable")
    return [f"every answer is {word}, so nothing says what a good one has that a bad one lacks: add {other} ones"]


def _glued(report: DataReport, first: str, of: str) -> str:
    where = f"in {counted(report.glued_rows, of)} prompt and completion meet without a blank; the first: {first}"
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
