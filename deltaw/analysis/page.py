"""Reports as one HTML file: blocks that say what they are, in a page that needs nothing else.

A `Page` has sections, a section has blocks, each block writes itself. No template language: a template can forget to
escape, a block can't, since `text()` is the only way from a string to HTML. Paths, prompts and what a model wrote are a
stranger's words, so that way also makes visible what would act unseen: control characters, marks that turn the reading
direction, letters without width. (The two joiners stay, which Persian and emoji need.) A content security policy
forbids whatever would slip through: no script runs, nothing is fetched.

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
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from deltaw.analysis.style import STYLE
from deltaw.files.atomic import write_text_atomic

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
THIN = "\u202f"  # a narrow space that doesn't break, between groups of three digits
Cell = str | int | float | None

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164"
    "\ud800-\udfff\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\U000e0000-\U000e0fff]"
)
_MARKUP = re.compile(r"(`[^`\n]+`|\[[^\[\]\n]+\]\(#[a-z0-9-]+\)|(?<!\S)\*[\w‖][^*`\[\]]*\w\*(?![\w*]))")


def visible(words: str) -> str:
    """The text with what can't be seen, save tabs and line ends, by its number: ⟨U+202E⟩."""
    return _UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", words)


def excerpt(words: str, most: int = 3000) -> str:
    """The text, of a long one the beginning and the end."""
    if len(words) <= most:
        return words
    return f"{words[: most // 2]}\n⟨{len(words) - most:,} characters left out⟩\n{words[len(words) - most // 2 :]}"


def text(words: str) -> str:
    """A stranger's words as HTML: made visible, escaped."""
    return escape(visible(words))


def number(value: float | None) -> str:
    """134 515 008, 1 235, 0.392, 1.25e−5, yes; "–" for None and NaN. No digit before the point is rounded away."""
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
    return (f"{mantissa}e{int(power_of_ten)}" if power_of_ten else mantissa).replace(",", THIN).replace("-", "−")


def slug(title: str) -> str:
    """What `[words](#…)` points at: the section with this title."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"


class Block(Protocol):
    """Anything that writes itself as HTML."""

    def html(self) -> str: ...


@dataclass(frozen=True)
class Text:
    """Paragraphs, separated by empty lines; `code`, *emphasis* and [links](#section) are marked up, nothing else."""

    words: str

    def html(self) -> str:
        return "".join(f"<p>{_marked(part)}</p>" for part in re.split(r"\n\s*\n", self.words.strip()))


class Fact(NamedTuple):
    """A headline number with its label, and what to compare it with."""

    label: str
    value: Cell
    note: str = ""


@dataclass(frozen=True)
class Facts:
    """The headline numbers, as cards."""

    facts: Sequence[Fact]

    def html(self) -> str:
        return f'<dl class="facts">{"".join(map(self._card, self.facts))}</dl>'

    def _card(self, fact: Fact) -> str:
        note = f'<dd class="note">{_marked(fact.note)}</dd>' if fact.note else ""
        return f"<div><dt>{text(fact.label)}</dt><dd>{_cell(fact.value)}</dd>{note}</div>"


@dataclass(frozen=True)
class Table:
    """Rows under a head; numbers stand to the right, paths break at dots. ValueError if a row has another width."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    def __post_init__(self) -> None:
        if odd := [row for row in self.rows if len(row) != len(self.head)]:
            raise ValueError(f"{len(self.head)} columns, but a row has {len(odd[0])} cells: {odd[0]!r:.80}")

    def html(self) -> str:
        sides = [self._side(column) for column in range(len(self.head))]
        head = "".join(f'<th scope="col"{side}>{text(name)}</th>' for name, side in zip(self.head, sides, strict=True))
        rows = ("".join(f"<td{side}>{_cell(c)}</td>" for c, side in zip(row, sides, strict=True)) for row in self.rows)
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        caption = f"<caption>{_marked(self.caption)}</caption>" if self.caption else ""
        table = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f'<div class="wide" role="group" aria-label="{text(self.caption or "Table")}" tabindex="0">{table}</div>'

    def _side(self, column: int) -> str:
        words = [cell for row in self.rows if isinstance(cell := row[column], str)]
        longest = max(map(len, words), default=0)
        return ' class="long"' if longest > 20 else "" if words else ' class="number"'


@dataclass(frozen=True)
class Picture:
    """An inline SVG from plots.py (trusted), the words and the table that say the same. ValueError if no SVG."""

    svg: str
    caption: str
    alt: str
    table: Table

    def __post_init__(self) -> None:
        if not (self.svg.startswith("<svg ") and self.svg.endswith("</svg>")):
            raise ValueError(f"not an inline SVG: {self.svg[:40]!r}")

    def html(self) -> str:
        picture = f'<div class="wide" role="img" aria-label="{text(self.alt)}" tabindex="0">{self.svg}</div>'
        table = f"<details><summary>The numbers</summary>{self.table.html()}</details>"
        return f"<figure>{picture}<figcaption>{_marked(self.caption)}</figcaption>{table}</figure>"


@dataclass(frozen=True)
class Verdict:
    """Whether a published claim held here, and why one says so."""

    status: Literal["held", "did not hold", "too noisy"]
    words: str

    def html(self) -> str:
        look, sign, word = _VERDICTS[self.status]
        head = f'<p class="status">{_badge(sign)}{word}</p>'
        return f'<div class="verdict {look}">{head}{Text(self.words).html()}</div>'


Level = Literal["ok", "note", "warning", "problem"]


class Finding(NamedTuple):
    """Something that was looked at, and how it stands."""

    level: Level
    words: str


@dataclass(frozen=True)
class Findings:
    """A list of findings, in the order given."""

    findings: Sequence[Finding]

    def html(self) -> str:
        return f'<ul class="findings">{"".join(map(self._item, self.findings))}</ul>'

    def _item(self, finding: Finding) -> str:
        look, sign, word = _LEVELS[finding.level]
        return f'<li class="{look}"><p class="status">{_badge(sign)}{word}</p><p>{_marked(finding.words)}</p></li>'


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

    def html(self) -> str:
        return "".join(map(self._sample, self.samples))

    def _sample(self, sample: Sample) -> str:
        parts = zip(_PARTS, ("Prompt", *self.names, "Truth"), sample, strict=True)
        two = "" if sample.truth is not None else " two"
        return f'<dl class="sample{two}">{"".join(self._part(*part) for part in parts if part[2] is not None)}</dl>'

    def _part(self, look: str, name: str, words: str | None) -> str:
        shown = f"<pre>\n{text(words)}</pre>" if words else "<em>empty</em>"  # HTML drops a line end after <pre>
        return f'<div class="{look}"><dt>{text(name)}</dt><dd>{shown}</dd></div>'


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]

    def html(self, name: str) -> str:
        return f'<section id="{name}"><h2>{text(self.title)}</h2>{"".join(_flow(self.blocks))}</section>'


@dataclass(frozen=True)
class Page:
    """A report; with more than three sections it has a table of contents."""

    title: str
    subtitle: str
    sections: Sequence[Section]


def render(page: Page) -> str:
    """The page as one HTML document."""
    names = _names([section.title for section in page.sections])
    contents = ""
    if len(names) > 3:
        links = zip(names, page.sections, strict=True)
        items = "".join(f'<li><a href="#{name}">{text(section.title)}</a></li>' for name, section in links)
        contents = f'<nav aria-label="Contents"><ol>{items}</ol></nav>\n'
    sections = "\n".join(section.html(name) for section, name in zip(page.sections, names, strict=True))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(page.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{text(page.title)}</h1><p>{_marked(page.subtitle)}</p></header>\n"
        f"{contents}<main>\n{sections}\n</main>\n</body>\n</html>\n"
    )


def write(page: Page, path: Path) -> None:
    """The page as a file, at once or not at all. Raises RunError when the disk refuses."""
    write_text_atomic(path, render(page))


_PARTS = ("prompt", "before", "after", "truth")
_LEVELS = {
    "ok": ("good", "✓", "OK"),
    "note": ("plain", "i", "Note"),
    "warning": ("doubt", "!", "Warning"),
    "problem": ("bad", "✕", "Problem"),
}
_VERDICTS = {
    "held": ("good", "✓", "Held"),
    "did not hold": ("bad", "✕", "Did not hold"),
    "too noisy": ("doubt", "≈", "Too noisy to tell"),
}


def _marked(words: str) -> str:
    """Text with `code`, *emphasis* and [links](#section)."""
    parts = _MARKUP.split(words)
    for i in range(1, len(parts), 2):
        if parts[i].startswith("`"):
            parts[i] = f"<code>{text(parts[i][1:-1])}</code>"
        elif parts[i].startswith("*"):
            parts[i] = f"<em>{text(parts[i][1:-1])}</em>"
        else:
            label, _, target = parts[i][1:-1].rpartition("](#")
            parts[i] = f'<a href="#{target}">{text(label)}</a>'
    parts[::2] = map(text, parts[::2])
    return "".join(parts)


def _cell(value: Cell) -> str:
    return re.sub(r"(?<=[\w)])([./])(?=\w)", r"\1<wbr>", text(value)) if isinstance(value, str) else number(value)


def _badge(sign: str) -> str:
    return f'<span class="badge" aria-hidden="true">{sign}</span>'


def _flow(blocks: Sequence[Block]) -> list[str]:
    """The blocks one after the other; pictures that follow each other stand side by side where there is room."""
    parts: list[str] = []
    for i, block in enumerate(blocks):
        joins = isinstance(block, Picture) and i > 0 and isinstance(blocks[i - 1], Picture)
        if joins:
            parts[-1] = parts[-1].removesuffix("</div>") + block.html() + "</div>"
        else:
            parts.append(f'<div class="row">{block.html()}</div>' if isinstance(block, Picture) else block.html())
    return parts


def _names(titles: Sequence[str]) -> list[str]:
    """A name for each section, no two alike."""
    names: list[str] = []
    for title in titles:
        name, again = slug(title), 2
        while name in names:
            name, again = f"{slug(title)}-{again}", again + 1
        names.append(name)
    return names
