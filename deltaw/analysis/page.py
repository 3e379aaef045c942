"""Reports as one HTML file: plain values that say what they are, and one jinja2 template that writes them.

A `Page` has sections, a section has blocks; template.py has a macro for each kind of block. Paths, prompts and what a
model wrote are a stranger's words. So the template escapes every value, and every string passes through `visible`
before: control characters, marks that turn the reading direction, letters without width are shown by their number. (The
two joiners stay, which Persian and emoji need.) A content security policy forbids whatever would slip through: no
script runs, nothing is fetched.

    one file       works offline, by mail, as an archive; the same page gives the same bytes
    no script      light or dark follow the reader's system, details open by themselves, hover texts are SVG titles
    any width      tables and pictures that are too wide scroll in a box of their own, the page never does
    any reader     headings, captions and scopes; a `Picture` is not made without a text and a table that say the same;
                   a status is a word and a sign before it is a colour
    numbers        all through `number()`: three significant digits, but no digit before the point is rounded away

Rejected: Markdown (whitespace and HTML in model outputs), a chart library in the page (a script, and half a megabyte).
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup, escape

from deltaw.analysis.template import PAGE, STYLE
from deltaw.files.atomic import write_text_atomic


class Link(NamedTuple):
    """Words in a table that lead to a file beside the page: `place` is relative to it, and percent-encoded."""

    words: str
    place: str


Cell = str | int | float | Link | None

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164"
    "\ud800-\udfff\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\U000e0000-\U000e0fff]"
)
_BREAKS = re.compile(r"(?<=[\w)])(?!(?<=\d)\.\d)([./])(?=\w)")
_MARKUP = re.compile(r"(`[^`\n]+`|\[[^\[\]\n]+\]\(#[a-z0-9-]+\)|(?<!\S)\*[\w‖][^*`\[\]]*\w\*(?![\w*]))")


def visible(words: str) -> str:
    """The text with what can't be seen, save tabs and line ends, by its number: ⟨U+202E⟩."""
    return _UNSEEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", words)


def excerpt(words: str, most: int = 3000) -> str:
    """The text, of a long one the beginning and the end."""
    if len(words) <= most:
        return words
    return f"{words[: most // 2]}\n⟨{len(words) - most:,} characters left out⟩\n{words[len(words) - most // 2 :]}"


def evenly(length: int, most: int) -> list[int]:
    """At most `most` places of a row, the first and the last among them."""
    return list(range(length)) if length <= most else [round(i * (length - 1) / (most - 1)) for i in range(most)]


def thinned(values: Sequence[float | None], most: int) -> list[int]:
    """At most `most` places in a long row of numbers: of each of `most` / 2 stretches the least and the greatest."""
    size = math.ceil(len(values) / (most // 2))
    if size <= 2:
        return list(range(len(values)))
    places = []
    for begin in range(0, len(values), size):
        stretch = range(begin, min(len(values), begin + size))
        known = [(value, i) for i in stretch if (value := values[i]) is not None and math.isfinite(value)]
        places += sorted({min(known)[1], max(known)[1]}) if known else [begin]
    return places


def number(value: float | None) -> str:
    """134,515,008, 1,235, 0.392, 1.25e−5, yes; "–" for None and NaN. No digit before the point is rounded away."""
    if value is None or value != value:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    if isinstance(value, int) or abs(value) >= 999.5:
        short = f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.2e}"
    elif abs(value) >= 0.9995e-3:
        power = math.floor(math.log10(float(f"{abs(value):.2e}")))
        short = f"{value:.{2 - power}f}"
    else:
        short = f"{value:.2e}"
    mantissa, _, power_of_ten = short.partition("e")
    return (f"{mantissa}e{int(power_of_ten)}" if power_of_ten else mantissa).replace("-", "−")


@dataclass(frozen=True)
class Text:
    """Paragraphs, separated by empty lines; `code`, *emphasis* and [links](#section) are marked up, nothing else."""

    words: str


class Fact(NamedTuple):
    """A headline number with its label, and what to compare it with."""

    label: str
    value: Cell
    note: str = ""


@dataclass(frozen=True)
class Facts:
    """The headline numbers, as cards."""

    facts: Sequence[Fact]


@dataclass(frozen=True)
class Table:
    """Rows under a head; numbers stand to the right, paths break at dots. ValueError if a row has another width."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    def __post_init__(self) -> None:
        if odd := [row for row in self.rows if len(row) != len(self.head)]:
            raise ValueError(f"{len(self.head)} columns, but a row has {len(odd[0])} cells: {odd[0]!r:.80}")

    @cached_property
    def looks(self) -> list[Markup]:
        """Each column's class in HTML; every row asks for it."""
        looks = []
        for column in range(len(self.head)):
            words = [cell for row in self.rows if isinstance(cell := row[column], str)]
            words += [cell.words for row in self.rows if isinstance(cell := row[column], Link)]
            longest = max(map(len, words), default=0)
            looks.append(Markup(' class="long"' if longest > 20 else "" if words else ' class="number"'))
        return looks


@dataclass(frozen=True)
class Picture:
    """An inline SVG from pictures.py (trusted), the words and the table that say the same. ValueError if no SVG."""

    svg: str
    caption: str
    alt: str
    table: Table

    def __post_init__(self) -> None:
        if not (self.svg.startswith("<svg ") and self.svg.endswith("</svg>")):
            raise ValueError(f"not an inline SVG: {self.svg[:40]!r}")


@dataclass(frozen=True)
class Verdict:
    """Whether a published claim held here, and why one says so."""

    status: Literal["held", "did not hold", "not settled", "void"]
    words: str


Level = Literal["ok", "note", "warning", "problem"]


class Finding(NamedTuple):
    """Something that was looked at, and how it stands."""

    level: Level
    words: str


@dataclass(frozen=True)
class Findings:
    """A list of findings, in the order given."""

    findings: Sequence[Finding]


class Sample(NamedTuple):
    """One prompt, what the model answered before and after training, what was right; None: not known."""

    prompt: str
    before: str | None
    after: str | None
    truth: str | None


@dataclass(frozen=True)
class Samples:
    """Prompts and answers to the letter: monospaced, all whitespace kept, what can't be seen made visible. `names`: who
    answered, where it isn't one model before and after."""

    samples: Sequence[Sample]
    names: tuple[str, str] = ("Before", "After")


Block = Text | Facts | Table | Picture | Verdict | Findings | Samples


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it; pictures that follow each other stand side by side where there is room."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A report; with more than three sections it has a table of contents."""

    title: str
    subtitle: str
    sections: Sequence[Section]


def render(page: Page) -> str:
    """The page as one HTML document."""
    names = _names([section.title for section in page.sections])
    sections = list(zip(names, page.sections, strict=True))
    return _template().render(title=page.title, subtitle=page.subtitle, sections=sections, style=STYLE) + "\n"


def write(page: Page, path: Path) -> None:
    """The page as a file, at once or not at all. Raises RunError when the disk refuses."""
    write_text_atomic(path, render(page))


@cache
def _template() -> Template:
    def seen(value: Any) -> Any:
        return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    def of_kind(blocks: Sequence[Block]) -> Iterator[tuple[str, list[Block]]]:
        for kind, same in groupby(blocks, lambda block: type(block).__name__.lower()):
            yield kind, list(same)

    environment = Environment(autoescape=True, finalize=seen, undefined=StrictUndefined)
    environment.filters |= {"cell": _cell, "marked": _marked, "paragraphs": _paragraphs, "groupby_kind": of_kind}
    return environment.from_string(PAGE)


def _paragraphs(words: str) -> Markup:
    return Markup("").join(Markup(f"<p>{_marked(part)}</p>") for part in re.split(r"\n\s*\n", words.strip()))


def _marked(words: str) -> Markup:
    """Text with `code`, *emphasis* and [links](#section)."""
    parts = _MARKUP.split(words)
    html = [escape(visible(part)) for part in parts]
    for i in range(1, len(parts), 2):
        if parts[i].startswith("`"):
            html[i] = Markup("<code>{}</code>").format(visible(parts[i][1:-1]))
        elif parts[i].startswith("*"):
            html[i] = Markup("<em>{}</em>").format(visible(parts[i][1:-1]))
        else:
            label, _, target = parts[i][1:-1].rpartition("](#")
            html[i] = Markup('<a href="#{}">{}</a>').format(target, visible(label))
    return Markup("").join(html)


def _cell(value: Cell) -> Markup:
    """A number as one writes it, words, or words that lead elsewhere; paths may break after a dot or a slash."""
    if isinstance(value, Link):
        return Markup('<a href="./{}">{}</a>').format(value.place, visible(value.words))
    if not isinstance(value, str):
        return escape(number(value))
    return Markup(_BREAKS.sub(r"\1<wbr>", str(escape(visible(value)))))


def _names(titles: Sequence[str]) -> list[str]:
    """What `[words](#…)` points at: a name for each section, no two alike."""
    names: list[str] = []
    for title in titles:
        slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        name, again = slug, 2
        while name in names:
            name, again = f"{slug}-{again}", again + 1
        names.append(name)
    return names
