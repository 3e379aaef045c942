"""What `data.train` or `data.eval` names -> one `Reading` per source, and how often its rows are seen in an epoch.

A weight w of a source with n rows to train on: an epoch has each of them ⌊w⌋ times and, for what is left of w, the
first ⌊(w − ⌊w⌋) n⌋ in the order of the seeded hash once more (prepare.py), one row at least. The choice is the same in
every epoch: so the epoch's rows are one list, which the fingerprint, the plan and the preview see as they see any
other, and a run resumes in it as in any other. Held-out rows are taken before and count once, whatever the weight.

Rejected: drawing rows at random by weight (an epoch would have no end, and a row that is never drawn isn't missed); a
new choice for each epoch (what a run sees would hang on a setting of its length).
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path, PurePath

from deltaw.config import DataConfig
from deltaw.config.sources import ROWS, SourceValue, label, rows_given, sources_of
from deltaw.data.forms import Reads
from deltaw.data.preferences import form_for
from deltaw.data.questions import form_of_prompts
from deltaw.data.read import read_into
from deltaw.data.render import Renderer
from deltaw.data.report import Reading
from deltaw.data.row import Problem, Row
from deltaw.data.rows import Rows
from deltaw.data.text_files import documents
from deltaw.errors import InputError, listed

Raw = tuple[str, float, Rows, list[Problem], list[str]]  # name, weight, rows, problems, notes


def open_sources(value: SourceValue, config: DataConfig, renderer: Renderer, reads: Reads = "auto") -> list[Reading]:
    """Every source read and its form recognised. Raises InputError."""
    return [_reading(raw, config, renderer, reads) for raw in read_sources(value, config)]


def read_sources(value: SourceValue, config: DataConfig) -> list[Raw]:
    """The rows of every source as they stand there. Where two sources call rows by the same names, origins say which is
    meant. Raises InputError, also where a source has none."""
    raws = list(_raw(value, config))
    for name, _, rows, problems, _ in raws:
        if not rows and problems:
            what = f"{name}: none of its lines can be read\n{listed([str(p) for p in problems])}"
            raise InputError(what, fix="fix them, or name another file")
        if not rows:
            raise InputError(f"{name}: no rows in it", fix="put rows into it, or name another file")
    names = [rows.files() | {_file(one.origin) for one in problems} for _, _, rows, problems, _ in raws]
    alike = {name for one in names for name in one if sum(name in other for other in names) > 1}
    return [_distinct(raw, alike) for raw in raws] if alike else raws


def _raw(value: SourceValue, config: DataConfig) -> Iterator[Raw]:
    if given := rows_given(value):
        yield label(value), 1.0, Rows(Row(row, f"{ROWS}:{number}") for number, row in enumerate(given, 1)), [], []
        return
    for source in sources_of(value):
        notes: list[str] = []
        rows = Rows()
        problems = read_into(rows, source.path, encoding=config.encoding, note=notes.append)
        if config.split_text:
            rows = Rows(documents(rows, config.split_text))
        yield source.path, source.weight, rows, problems, notes


def _distinct(raw: Raw, alike: set[str]) -> Raw:
    name, weight, rows, problems, notes = raw
    folder = name if Path(name).is_dir() else str(PurePath(name).parent)

    def called(origin: str) -> str:
        return f"{folder}/{origin}" if _file(origin) in alike else origin

    rows.rename(folder, alike)
    return name, weight, rows, [replace(one, origin=called(one.origin)) for one in problems], notes


def _file(origin: str) -> str:
    return origin.rpartition(":")[0]


def _reading(raw: Raw, config: DataConfig, renderer: Renderer, reads: Reads) -> Reading:
    name, weight, rows, problems, notes = raw
    templated = renderer.template is not None
    if renderer.shape == "prompts":
        form = form_of_prompts(rows, config, templated=templated, reads=reads)
    else:
        form = form_for(renderer.shape, rows, config, templated=templated, reads=reads)
    splits = form.name == "text" and config.too_long in ("auto", "split")
    if not splits and (config.too_long == "split" or config.overlap):
        setting = "too_long: split" if config.too_long == "split" else f"overlap: {config.overlap}"
        raise InputError(
            f"data.{setting} is for texts, and {name} has {form.description}: a piece of an answer without its "
            "question teaches nothing",
            fix="leave it out, or set data.too_long: truncate to keep the beginnings of rows that are too long",
        )
    return Reading(name, rows, problems, form, splits, weight=weight, notes=notes)


def visits(count: int, weight: float) -> list[int]:
    """How often each of `count` rows, in the order of the choice, is seen in an epoch."""
    exact = Fraction(repr(weight))  # the number that was written, not the binary one beside it
    whole = math.floor(exact)
    more = math.floor((exact - whole) * count)
    if not whole and not more:
        more = min(count, 1)
    return [whole + (number < more) for number in range(count)]
