"""Pages: a stranger's words stay words, numbers read as one writes them, every block says what it has."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deltaw.analysis.page import (
    Block,
    Fact,
    Facts,
    Finding,
    Findings,
    Page,
    Picture,
    Sample,
    Samples,
    Section,
    Table,
    Text,
    Verdict,
    number,
    render,
    thinned,
    visible,
    write,
)
from deltaw.errors import RunError

SVG = '<svg viewBox="0 0 10 10"><path d="M0 0"></path></svg>'
MARKUP = {"code", "a", "wbr"}  # what the words themselves may bring along
VOID = {"meta", "wbr"}


class Reader(HTMLParser):
    """The tags of a document with their attributes, its texts, and whether every tag is closed in order."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.texts: list[str] = [""]
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(document)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag not in MARKUP:
            self.tags.append(tag)
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag not in MARKUP:
            self.tags.append("/" + tag)
            self.texts.append("")

    def handle_data(self, data: str) -> None:
        self.texts[-1] += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError("a comment")

    def unknown_decl(self, data: str) -> None:
        raise AssertionError("a declaration")


def page_of(words: str) -> Page:
    """Every block, with these words wherever words may stand."""
    table = Table([words, "n"], [[words, 1]], "caption " + words)
    blocks = [
        Text("text " + words),
        Facts([Fact(words, words, "note " + words), Fact(words, 1.5)]),
        Findings([Finding("warning", words)]),
        table,
        Picture(SVG, words, words, table),
        Verdict("not settled", "said " + words),
        Samples([Sample("p" + words, "b" + words, "a" + words, "t" + words)]),
    ]
    return Page(words, words, [Section(words, blocks), *[Section(words, [])] * 3])


def html(*blocks: Block) -> str:
    """What a page writes of the blocks."""
    return render(Page("t", "", [Section("s", blocks)])).split("<h2>s</h2>")[1].split("</section>")[0]


HOSTILE = [
    "<script>alert(1)</script>",
    "</svg></pre></style></title>",
    "\u202e\x00\x1b\ud800",
    "x" * 10_000,
    "&lt;&#x0;",
]
HOSTILE += ["<!--", "]]>", "'\" onload=alert(1) ", "`a` [b](#c) `", "\n\n\n", "[x](javascript:alert(1))"]


def hostile(test):  # type: ignore[no-untyped-def]
    for words in HOSTILE:
        test = example(words)(test)
    return given(st.text(max_size=60))(test)


@hostile
def test_a_strangers_words_bring_no_tags(words: str) -> None:
    paragraphs = re.sub(r"\n\s*\n", " ", words)  # an empty line makes a paragraph, on purpose
    plain, strange = Reader(render(page_of("x"))), Reader(render(page_of(paragraphs)))
    assert strange.tags == plain.tags
    assert {name for name, _ in strange.attributes} <= {name for name, _ in plain.attributes}
    hrefs = [value or "" for name, value in strange.attributes if name == "href"]
    assert all(re.fullmatch(r"#[a-z0-9-]+", href) for href in hrefs)


@hostile
def test_words_are_all_there_and_all_seen(words: str) -> None:
    reader = Reader(render(page_of(words)))
    seen = visible(words).replace("\r", "")
    assert f"\np{seen}" in reader.texts, "samples to the letter, after the line end that browsers drop"
    assert seen in reader.texts or not seen, "cells and headings too"
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", render(page_of(words)))


@given(st.integers(2_000, 20_000), st.integers(0, 19_999), st.sampled_from([1e3, -1e3]))
def test_a_long_row_is_thinned_and_keeps_every_spike(count: int, at: int, spike: float) -> None:
    values: list[float | None] = [math.sin(i) for i in range(count)]
    values[at % count] = spike
    places = thinned(values, 1000)
    assert len(places) <= 1000 and at % count in places and places == sorted(places)


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("\x00\x1b[31m\r", "⟨U+0000⟩⟨U+001B⟩[31m⟨U+000D⟩"),
        ("\u202eabc\u2069", "⟨U+202E⟩abc⟨U+2069⟩"),
        ("a\u200bb\u00adc\ufeff", "a⟨U+200B⟩b⟨U+00AD⟩c⟨U+FEFF⟩"),
        ("\ud800 \U000e0041", "⟨U+D800⟩ ⟨U+E0041⟩"),
        ("می\u200cخواهم 👩\u200d💻 日本語", "می\u200cخواهم 👩\u200d💻 日本語"),
    ],
)
def test_what_acts_unseen_is_made_visible(words: str, seen: str) -> None:
    assert visible(words) == seen


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (0, "0"),
        (0.0, "0"),
        (-0.0, "0"),
        (7, "7"),
        (True, "yes"),
        (False, "no"),
        (134_515_008, "134,515,008"),
        (-1234, "−1,234"),
        (10**18, "1.00e18"),
        (0.5, "0.500"),
        (-0.39215, "−0.392"),
        (9.999, "10.0"),
        (99.96, "100"),
        (999.4, "999"),
        (999.6, "1,000"),
        (1234.5, "1,234"),
        (0.001, "0.00100"),
        (0.00099999, "0.00100"),
        (0.000999, "9.99e−4"),
        (1.25e-5, "1.25e−5"),
        (3e-320, "3.00e−320"),
        (1.7e308, "1.70e308"),
    ],
)
def test_numbers_as_one_writes_them(value: float | None, said: str) -> None:
    assert number(value) == said


@given(st.floats(-1e300, 1e300))
def test_a_number_keeps_three_digits(value: float) -> None:
    said = number(value)
    back = float(said.replace(",", "").replace("−", "-"))
    assert back == pytest.approx(value, rel=0.0051, abs=0)
    assert number(-value) == (said[1:] if said.startswith("−") else "−" + said if value else said)


def test_a_page_is_one_document_that_forbids_the_rest() -> None:
    document = render(page_of("x"))
    assert document == render(page_of("x"))
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head, body = document.split("</head>")
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in head
    assert head.index("Content-Security-Policy") < head.index("<style>"), "in force before anything else"
    assert document.startswith('<!DOCTYPE html>\n<html lang="en">') and 'name="viewport"' in head
    assert not re.search(r"<script|<link|<img|<iframe|https?:|url\(|@import|\bsrc=|\bon\w+=", document)
    assert "prefers-color-scheme:dark" in head and "@media print" in head
    assert "<style" not in body


def test_contents_are_listed_when_there_are_more_than_three_sections() -> None:
    sections = [Section(title, []) for title in ("Loss", "Loss", "Größe", "¿?", "In short!")]
    assert "<nav" not in render(Page("t", "s", sections[:3]))
    document = render(Page("t", "s", sections))
    links = re.findall(r'<li><a href="#([^"]+)">', document)
    assert links == re.findall(r'<section id="([^"]+)">', document)
    assert links == ["loss", "loss-2", "gr-e", "section", "in-short"]


def test_text_knows_paragraphs_code_and_anchors_only() -> None:
    found = html(Text("one `a<b`\nstill one\n\n[the loss](#loss) **no** <b> [x](http://y)"))
    assert found == (
        '<p>one <code>a&lt;b</code>\nstill one</p><p><a href="#loss">the loss</a> **no** &lt;b&gt; [x](http://y)</p>'
    )


def test_columns_of_numbers_stand_to_the_right_and_paths_break_at_dots() -> None:
    found = html(Table(["module", "n", "mixed"], [["model.layers.0.mlp.up_proj", 1234, "a"], ["b", None, 2]], "what"))
    assert '<th scope="col" class="number">n</th>' in found and '<th scope="col">mixed</th>' in found
    assert '<td class="number">1,234</td>' in found and '<td class="number">–</td>' in found
    assert '<td class="long">model.<wbr>layers.<wbr>0.<wbr>mlp.<wbr>up_proj</td>' in found
    assert "<caption>what</caption>" in found and "<td>2</td>" in found
    with pytest.raises(ValueError, match="2 columns, but a row has 1 cells"):
        Table(["a", "b"], [[1]])


def test_a_picture_has_words_and_a_table() -> None:
    found = html(Picture(SVG, "what it is", 'what it "shows"', Table(["a"], [[1]])))
    assert SVG in found and 'role="img" aria-label="what it &#34;shows&#34;"' in found
    assert "<figcaption>what it is</figcaption>" in found
    assert re.search(r"<details><summary>.+</summary>.*<table>", found)
    with pytest.raises(ValueError, match="not an inline SVG"):
        Picture("<p>no</p>", "", "", Table([], []))
    with pytest.raises(TypeError):
        Picture(SVG, "", "")  # type: ignore[call-arg]


def test_pictures_that_follow_each_other_share_a_row() -> None:
    picture = Picture(SVG, "", "", Table([], []))
    found = html(picture, picture, Text("x"), picture)
    assert [row.count("<figure>") for row in found.split('<div class="row">')[1:]] == [2, 1]


@pytest.mark.parametrize(
    ("status", "word"),
    [("held", "Held"), ("did not hold", "Did not hold"), ("not settled", "Not settled"), ("void", "Void")],
)
def test_a_verdict_is_a_word_before_it_is_a_colour(status, word: str) -> None:  # type: ignore[no-untyped-def]
    found = html(Verdict(status, "since `x`"))
    assert f"</span>{word}</p><p>since <code>x</code></p>" in found


def test_levels_differ_by_word_and_sign() -> None:
    found = html(Findings([Finding(level, level) for level in ("ok", "note", "warning", "problem")]))  # type: ignore[arg-type]
    assert len(set(re.findall(r'aria-hidden="true">(.)</span>', found))) == 4
    assert re.findall(r"</span>(\w+)</p>", found) == ["OK", "Note", "Warning", "Problem"]


def test_a_sample_leaves_out_what_is_not_known_and_says_what_is_empty() -> None:
    found = html(Samples([Sample("\n  two\tspaces", "", None, "t")]))
    assert "<pre>\n\n  two\tspaces</pre>" in found and "<em>empty</em>" in found
    assert re.findall(r"<dt>(\w+)</dt>", found) == ["Prompt", "Before", "Truth"]


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    page = page_of("\ud800 é")
    write(page, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render(page)
    with pytest.raises(RunError):
        write(page, tmp_path / "nowhere" / "report.html")


def test_emphasis_is_marked_up_and_a_strangers_stars_are_not() -> None:
    page = html(Text("The *directions in\nuse* are `a*b*c`."))
    assert "<em>directions in\nuse</em>" in page and "<code>a*b*c</code>" in page
    for words in ("layers.*.q and layers.*.k", "* a * b", "2*3*4", "**kw and **other", "a *", "*<b>*"):
        assert "<em>" not in html(Text(words)) and "<b>" not in html(Text(words))
