"""Pages as a browser shows them: nothing sticks out at 360 px, no texts of a picture lie on each other, dark mode can
be read, no policy is violated.

A browser loads a harness that has the pages in frames as wide as a phone and a desk, in light and in dark mode, looks
at them from outside (so that each is the very page, policy included), and dumps what it found.
`python -m tests.analysis.test_page_in_browser FOLDER` writes the two sample pages, to be looked at.
"""

import json
import re
import shutil
import subprocess
import sys
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaw.adapter.file import Adapter, BaseId
from deltaw.analysis import pictures
from deltaw.analysis.checks import check_adapter
from deltaw.analysis.measure import measure
from deltaw.analysis.page import (
    Cell,
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
    render,
)
from deltaw.analysis.report import Report
from deltaw.analysis.summary import summarise
from deltaw.analysis.training import Training
from deltaw.config import AdapterSpec, parse_config
from deltaw.factors import LowRank
from tests.analysis.test_pictures import PICTURES, drawn
from tests.analysis.test_training import RESULT, STEPS

KINDS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


def a_report() -> Page:
    """A run's report, of random updates; one learnt nothing."""
    draws = [LowRank(torch.randn(8, 40), 1e-1 * torch.randn(30, 8)) for _ in range(4)]
    few = [measure(update, torch.randn(30, 40)) for update in draws]
    measures = {f"model.layers.{i}.{kind}": few[(i + j) % 4] for i in range(12) for j, kind in enumerate(KINDS)}
    measures["model.layers.0.self_attn.q_proj"] = measure(
        LowRank(torch.randn(8, 40), torch.zeros(30, 8)), torch.randn(30, 40)
    )
    training = Training(parse_config({"base": "b", "data": {"train": "t"}, "output": "o"}), RESULT, STEPS)
    findings = [Finding("problem", "`a` learnt nothing: see [the checks](#checks)"), *check_adapter(measures)]
    base = "builtin:smollm2-135m"
    return Report(
        Path("runs/demo"), Adapter(AdapterSpec(), {}, BaseId()), base, measures, summarise(measures), findings, training
    ).page()


def a_study() -> Page:
    """Every kind of picture (test_pictures.py), and the blocks that no report has."""
    rows: list[list[Cell]] = [["model.layers.19.mlp.down_proj", 30.7, 7], ["lm_head", None, 0]]
    table = Table(["module", "‖ΔW‖", "rank"], rows, "Two modules")
    verdicts = [
        Verdict("held", "Within 0.02."),
        Verdict("did not hold", "Lost 0.3."),
        Verdict("not settled", "By 0.02."),
    ]
    shown = [Picture(drawn(name), f"What `{name}` is.", name, table) for name in PICTURES]
    hostile = "<script>alert(1)</script>\t</pre></svg>\u202eabc\x00 & \"quotes\" 'too'"
    samples = [Sample("two\n\nlines", "a " * 300, "b", "b"), Sample(hostile, "x" * 2000, "", "مرحبا بالعالم 日本語")]
    sections = [("Verdict", verdicts), ("Pictures", shown), ("Table", [table]), ("Samples", [Samples(samples)])]
    return Page("The rank hardly matters", "`deltaw study rank`", [Section(title, list(b)) for title, b in sections])


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
FLAGS += ["--enable-logging=stderr", "--dump-dom"]
DARK = "--blink-settings=preferredColorScheme=0"
WIDTHS = (360, 1280)
# A page that does all that ours must not: the measure has to see it.
CANARY = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<script>document.title = "ran"</script>
<p style="width:3000px;color:#999;background:#aaa">unreadable</p><svg width="0"></svg>
<svg viewBox="0 0 99 99"><text x="9" y="50">one</text><text x="12" y="52">other</text></svg>"""

# Every text's contrast to what lies behind it, as WCAG 2 has it; in pictures only of texts that follow the page's ink.
MEASURE = """
const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
const parts = colour => colour.match(/[\\d.]+/g).map(Number);
const ground = node => {
  for (; node; node = node.parentElement) {
    const colour = parts(getComputedStyle(node).backgroundColor);
    if (colour.length < 4 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
const contrast = (node, colour) => {
  const below = ground(node), {opacity, fillOpacity} = getComputedStyle(node), share = opacity * fillOpacity;
  const seen = parts(colour).slice(0, 3).map((part, i) => share * part + (1 - share) * below[i]);
  const [low, high] = [light(seen), light(below)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
};
// Pairs of a picture's texts that lie on each other (slanted ones have boxes that do), and texts that stick out of it.
const clashes = svg => {
  const all = [...svg.querySelectorAll("text")].filter(node => !node.getAttribute("transform"));
  const boxes = all.map(node => [node.getBoundingClientRect(), node.textContent]), whole = svg.getBoundingClientRect();
  const over = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2;
  const pairs = boxes.flatMap(([a, x], i) =>
    boxes.slice(i + 1).filter(([b]) => over(a, b)).map(([, y]) => x + " | " + y));
  const out = boxes.filter(([a]) => a.left < whole.left - 2 || a.right > whole.right + 2 || a.top < whole.top - 2
    || a.bottom > whole.bottom + 2).map(([, x]) => x);
  return [...pairs, ...out.map(x => x + " sticks out")];
};
const said = node => [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, all = [...page.body.querySelectorAll("*")];
    page.querySelectorAll("details").forEach(one => one.open = true);
    const texts = all.filter(node => said(node) && !node.closest("svg"));
    const inked = node => /currentColor/.test(node.getAttribute("style"));
    const drawn = [...page.querySelectorAll("svg text")].filter(inked);
    const worst = [...texts.map(node => [node, getComputedStyle(node).color]),
                   ...drawn.map(node => [node, getComputedStyle(node).fill])]
      .map(([node, colour]) => [contrast(node, colour), node.textContent.slice(0, 40)]).sort((a, b) => a[0] - b[0])[0];
    const boxes = [...page.querySelectorAll("svg")].map(node => node.getBoundingClientRect());
    return {
      width: frame.contentWindow.innerWidth, reach: page.documentElement.scrollWidth, title: page.title,
      texts: texts.length, drawn: drawn.length, worst, ground: ground(page.body),
      pictures: boxes.length, seen: boxes.filter(box => box.width > 100 && box.height > 60).length,
      wide: boxes.filter(box => box.right > frame.contentWindow.innerWidth).length,
      clashes: [...page.querySelectorAll("svg")].flatMap(clashes),
      details: page.querySelectorAll("details").length, tables: page.querySelectorAll("details table").length,
      columns: new Set([...page.querySelectorAll("figure")].map(node => node.getBoundingClientRect().left)).size,
    };
  });
  document.querySelector("#found").textContent = JSON.stringify(found);
});
"""


def browse(
    pages: list[str], folder: Path, *flags: str, widths: tuple[int, ...] = WIDTHS
) -> tuple[list[dict[str, Any]], list[str]]:
    """What was measured in a frame of each width for each page, and what the browser's console said."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no chromium or google-chrome on PATH; Debian: apt-get install chromium")
    frames = "".join(
        f'<iframe style="width:{width}px;height:800px;border:0" srcdoc="{escape(page)}"></iframe>'
        for page in pages
        for width in widths
    )
    harness = folder / "harness.html"
    text = f'<!DOCTYPE html><meta charset="utf-8"><pre id="found"></pre>{frames}<script>{MEASURE}</script>'
    harness.write_text(text, encoding="utf-8")
    command = [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, harness.as_uri()]
    ran = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60, check=True)
    match = re.search(r'<pre id="found">(.+?)</pre>', ran.stdout)
    assert match, ran.stderr[-2000:]
    return json.loads(unescape(match[1])), [line for line in ran.stderr.splitlines() if ":CONSOLE" in line]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pages_fit_and_can_be_read(dark: bool, tmp_path: Path) -> None:
    report, study = a_report(), a_study()
    found, console = browse([render(report), render(study), CANARY], tmp_path, *([DARK] if dark else []))
    *ours, canary, _ = found
    for seen, page in zip(ours, (report, report, study, study), strict=True):
        pictures = sum(isinstance(block, Picture) for section in page.sections for block in section.blocks)
        assert seen["title"] == page.title
        assert seen["reach"] <= seen["width"], "the page scrolls sideways"
        assert seen["pictures"] == seen["seen"] == seen["details"] == seen["tables"] == pictures > 0
        assert not seen["clashes"], "texts of a picture lie on each other"
        assert seen["texts"] > 20 and seen["drawn"] > 20
        assert seen["worst"][0] >= 4.5, seen["worst"]
        assert (max(seen["ground"]) < 64) if dark else (min(seen["ground"]) > 240)
    phone, desk = ours[0], ours[1]
    assert (phone["width"], desk["width"]) == WIDTHS
    assert phone["columns"] == 1 and desk["columns"] == 2, "pictures stand side by side where there is room"
    assert not phone["wide"] and not desk["wide"], "a phone shows a report's pictures whole"
    assert ours[2]["wide"] and not ours[3]["wide"], "a picture that can't shrink so far scrolls in a box of its own"
    # The measure sees what is wrong, and the policy stops the script: in both frames of the canary, nowhere else.
    assert canary["reach"] > canary["width"] and canary["worst"][0] < 2
    assert canary["clashes"] == ["one | other"]
    assert canary["pictures"] > canary["seen"] and not canary["title"]
    assert len(console) == len(WIDTHS) and all("Content Security Policy" in line for line in console), console


def test_a_strangers_words_stay_words(tmp_path: Path) -> None:
    hostile = ["<script>document.title='ran'</script>", "</pre></svg></style><img src=x onerror=alert(1)>"]
    hostile += ["\u202e\u2066\x00\x1b[31m", "x" * 10_000, "</title><base href=http://example.com>", "a.b/" * 2_000]
    pages = []
    for words in hostile:
        table = Table([words, "n"], [[words, 1.0]], words)
        heat = pictures.heatmap([[1.0, None]], row_labels=[words], column_labels=[words, words], value_label=words)
        line = pictures.lines({words: ([1, 2], [1.0, 2.0])}, x_label=words, y_label=words, baseline=(words, 1.5))
        blocks = [Text(words), Facts([Fact(words, words, words)]), Verdict("held", words), table]
        blocks += [Findings([Finding("note", words)]), Samples([Sample(words, words, words, words)])]
        blocks += [Picture(svg, words, words, table) for svg in (heat, line)]
        pages.append(render(Page(words, words, [Section(words, blocks), *[Section(words, [])] * 3])))
    found, console = browse(pages, tmp_path, widths=WIDTHS[:1])
    assert not console
    for seen, words in zip(found, hostile, strict=True):
        assert seen["title"].startswith(words[0] if words.isprintable() else "⟨U+202E⟩")
        assert seen["reach"] <= seen["width"], (words[:40], seen)
        assert seen["pictures"] == seen["seen"] == seen["tables"] == 2


if __name__ == "__main__":
    for name, page in (("report", a_report()), ("study", a_study())):
        Path(sys.argv[1], f"{name}.html").write_text(
            render(page).replace("<details>", "<details open>") if "open" in sys.argv else render(page),
            encoding="utf-8",
        )
