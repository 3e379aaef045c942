"""Pages as a browser shows them: nothing sticks out at 360 px, dark mode can be read, no policy is violated.

A browser loads a harness that has the pages in frames as wide as a phone and a desk, in light and in dark mode, looks
at them from outside (so that each is the very page, policy included), and dumps what it found.
`python -m tests.analysis.test_page_in_browser FOLDER` writes the two sample pages, to be looked at.
"""

import json
import math
import random
import re
import shutil
import subprocess
import sys
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from deltaw.analysis import pictures
from deltaw.analysis.page import (
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

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHORT = [name.removesuffix("_proj") for name in MODULES]


def rows_of(values: list[list[float | None]]) -> Table:
    return Table(["layer", *SHORT], [[i, *row] for i, row in enumerate(values)])


def a_report() -> Page:
    """An adapter's report with every block but the verdict; the numbers are made up."""
    dice = random.Random(0)
    layers = [str(i) for i in range(30)]
    norms: list[list[float | None]] = [
        [0.4 + 0.9 * math.exp(-(((i - 19) / 8) ** 2)) * (1 + 0.4 * (j > 3)) + dice.gauss(0, 0.06) for j in range(7)]
        for i in range(30)
    ]
    ranks: list[list[float | None]] = [[4 + 9 * dice.random() ** 2 + j / 3 for j in range(7)] for _ in range(30)]
    phi: list[list[float | None]] = [[dice.gauss(0.02 * (j - 3), 0.1) for j in range(7)] for _ in range(30)]
    norms[0][5] = phi[0][5] = None
    steps = list(range(1, 801))
    loss = [2.4 * math.exp(-step / 160) + 0.42 + dice.gauss(0, 0.06) for step in steps]
    evals = list(range(0, 801, 100))
    held = [2.4 * math.exp(-step / 170) + 0.50 for step in evals]
    sigma = {
        f"layer {i}, {name}": [9 * math.exp(-k / speed) + 0.02 for k in range(16)]
        for i, name, speed in [(2, "q_proj", 2.2), (14, "v_proj", 4.0), (19, "down_proj", 7.5), (29, "gate_proj", 5.0)]
    }
    heat = {"row_labels": layers, "column_labels": SHORT}
    return Page(
        "runs/sql-first",
        "`builtin:smollm2-135m` · rank 16, α 32, scale 2.0 · 210 modules in 30 layers",
        [
            Section(
                "In short",
                [
                    Facts(
                        [
                            Fact("held-out loss", 0.507, "before: 2.914"),
                            Fact("exact match", "71.4 %", "before: 3.2 %"),
                            Fact("trained parameters", 4_884_480, "3.63 % of the base"),
                            Fact("effective rank", 6.31, "of 16"),
                            Fact("steps", 800, "in 12 min 40 s"),
                            Fact("tokens per second", 4312.7),
                            Fact("size of the file", "19.6 MB"),
                            Fact("lost in a bfloat16 merge", "1.3 %"),
                        ]
                    ),
                    Findings(
                        [
                            Finding("ok", "all 209 measured modules learnt something"),
                            Finding(
                                "note",
                                "6.3 directions of 16 hold 90 % of ΔW in the median module: `deltaw resize --rank 8` "
                                "would keep 97 % of it",
                            ),
                            Finding(
                                "warning",
                                "the loss rose from 0.47 to 0.91 at step 412, then fell again: see [the loss](#loss)",
                            ),
                            Finding("problem", "`model.layers.0.mlp.up_proj`: its update is exactly zero"),
                        ]
                    ),
                ],
            ),
            Section(
                "Loss",
                [
                    Text("Nats per supervised token. The held-out rows were never trained on."),
                    Picture(
                        pictures.lines(
                            {"training": (steps, loss), "held out": (evals, held)},
                            x_label="step",
                            y_label="loss (nats per token)",
                            bands={"held out": (evals, [h - 0.05 for h in held], [h + 0.05 for h in held])},
                            marks={"spike": ([412], [0.91])},
                            baseline=("full fine-tuning", 0.44),
                        ),
                        "Loss against steps; the band is the standard error over the held-out rows.",
                        "Loss falls from 2.9 to about 0.5 within 600 steps and stays there.",
                        Table(["step", "held-out loss"], list(zip(evals, held, strict=True))),
                    ),
                ],
            ),
            Section(
                "Where it learnt",
                [
                    Text(
                        "How large the update is against the weight it changes, and how many of its 16 directions it "
                        "uses.\n\nThe middle layers move most, the MLP more than attention."
                    ),
                    Picture(
                        pictures.heatmap(norms, value_label="‖ΔW‖ / ‖W‖, %", **heat),
                        "Relative size of the update by layer (down) and module (across).",
                        "Heat map; the largest updates are in layers 15 to 24, in the MLP.",
                        rows_of(norms),
                    ),
                    Picture(
                        pictures.heatmap(ranks, value_label="effective rank", **heat),
                        "Effective rank of the update, of 16.",
                        "Heat map of effective ranks between 4 and 15.",
                        rows_of(ranks),
                    ),
                    Picture(
                        pictures.heatmap(phi, value_label="φ less its random baseline", diverging=True, **heat),
                        "Overlap with the top directions of W: 0 is what chance gives.",
                        "Heat map of differences between −0.3 and 0.3.",
                        rows_of(phi),
                    ),
                    Picture(
                        pictures.heatmap(
                            [[phi[i][j] for i in range(30)] for j in range(7)],
                            value_label="φ less its random baseline",
                            diverging=True,
                            row_labels=MODULES,
                            column_labels=layers,
                        ),
                        "The same, lying down.",
                        "Heat map of differences between −0.3 and 0.3.",
                        rows_of(phi),
                    ),
                ],
            ),
            Section(
                "Spectra",
                [
                    Picture(
                        pictures.spectrum(sigma),
                        "Singular values of four updates, on a logarithmic axis.",
                        "Four falling curves.",
                        Table(["index", *sigma], [[k + 1, *(s[k] for s in sigma.values())] for k in range(16)]),
                    ),
                    Table(
                        ["module", "‖ΔW‖", "stable rank", "effective rank", "rank at 90 %"],
                        [
                            [
                                f"model.layers.{i}.{'mlp' if j > 3 else 'self_attn'}.{MODULES[j]}",
                                1.3 * i + j,
                                2.1,
                                6.04,
                                7,
                            ]
                            for i, j in [(19, 6), (20, 6), (18, 5), (21, 4), (2, 0)]
                        ]
                        + [["model.layers.0.mlp.up_proj", 0.0, None, float("nan"), 0]],
                        "The five largest updates, and the one that is zero.",
                    ),
                ],
            ),
            Section(
                "Samples",
                [
                    Text("The first rows of the held-out data, answered greedily."),
                    Samples(
                        [
                            Sample(
                                "How many heads of departments are older than 56?\n\nCREATE TABLE head (age INTEGER)",
                                "The heads of departments are older than 56. The heads of departments are older",
                                "SELECT COUNT(*) FROM head WHERE age > 56",
                                "SELECT COUNT(*) FROM head WHERE age > 56",
                            ),
                            Sample(
                                "<script>alert(1)</script>\t</pre></svg>\u202eabc\x00 & \"quotes\" 'too'",
                                "x" * 2000,
                                "",
                                "مرحبا بالعالم 日本語",
                            ),
                        ]
                    ),
                ],
            ),
        ],
    )


def a_study() -> Page:
    """A study's page; the numbers are made up."""
    ranks, rates = [1, 4, 16, 64], [1e-4, 3e-4, 1e-3, 3e-3]
    curve = {f"rank {r}": (rates, [0.9 + 0.4 / (1 + r * 0.4) * (3e-4 / lr) ** 0.3 for lr in rates]) for r in ranks}
    cells: list[list[float | None]] = [list(ys) for _, ys in curve.values()]
    cells[3][3] = None
    data = ["SQL", "translation, English to German", "arithmetic"]
    score = {"LoRA": [71.4, 33.2, 55.1], "full fine-tuning": [72.0, 34.9, 56.0], "base": [3.2, 11.0, 8.5]}
    return Page(
        "The rank hardly matters once the learning rate is right",
        "Hu et al. 2021, table 6 · `deltaw study rank` · 3 seeds, 48 runs",
        [
            Section(
                "Verdict",
                [
                    Verdict(
                        "held",
                        "At its best learning rate each rank from 4 to 64 ends within 0.02 nats of the others; seeds "
                        "differ by 0.03. Rank 1 falls behind by 0.11.",
                    ),
                    Verdict("did not hold", "Rank 64 lost 0.3 nats at every rate."),
                    Verdict("too noisy", "The ranks differ by 0.02 nats, the seeds by 0.03."),
                ],
            ),
            Section(
                "Figures",
                [
                    Picture(
                        pictures.lines(
                            curve, x_label="learning rate", y_label="held-out loss", log_x=True, baseline=("base", 2.0)
                        ),
                        "Held-out loss by learning rate and rank.",
                        "Four curves that fall with the learning rate and meet at the right.",
                        Table(["rank", *map(str, rates)], [[r, *c] for r, c in zip(ranks, cells, strict=True)]),
                    ),
                    Picture(
                        pictures.heatmap(
                            cells,
                            row_labels=[f"rank {r}" for r in ranks],
                            column_labels=[f"{lr:g}" for lr in rates],
                            value_label="held-out loss",
                        ),
                        "The same as cells.",
                        "Heat map of losses.",
                        Table(["rank", *map(str, rates)], [[r, *c] for r, c in zip(ranks, cells, strict=True)]),
                    ),
                    Picture(
                        pictures.heatmap(
                            [[0.3, -0.12, 0.02], [-0.3, 0.0, None]],
                            row_labels=["rank 4", "rank 64"],
                            column_labels=["seed 0", "seed 1", "seed 2"],
                            value_label="difference to rank 16",
                            diverging=True,
                        ),
                        "Differences.",
                        "Heat map of differences.",
                        Table(["rank", "seed 0", "seed 1", "seed 2"], [[4, 0.3, -0.12, 0.02], [64, -0.3, 0.0, None]]),
                    ),
                    Picture(
                        pictures.bars(
                            data,
                            score,
                            y_label="score, %",
                            errors={"LoRA": [1.2, 0.8, 2.2], "full fine-tuning": [1.0, 1.3, 0.4]},
                            baseline=("majority class", 12.0),
                        ),
                        "Scores; whiskers are the standard deviation over seeds.",
                        "Bars: LoRA close behind full fine-tuning, both far above the base.",
                        Table(["task", *score], [[d, *(v[i] for v in score.values())] for i, d in enumerate(data)]),
                    ),
                    Picture(
                        pictures.bars(
                            [f"model.layers.{i}.mlp.down_proj" for i in range(8)],
                            {"norm": [10.0**-i for i in range(8)]},
                            y_label="‖ΔW‖",
                            log_y=True,
                        ),
                        "A logarithmic axis and long names.",
                        "Bars that fall by a tenth each.",
                        Table(["module", "norm"], [[f"down_proj {i}", 10.0**-i] for i in range(8)]),
                    ),
                    Picture(
                        pictures.scatter(
                            {
                                "attention": ([0.1, 0.2, 0.25, 0.9], [3.0, 3.3, 3.1, 9.0]),
                                "MLP": ([0.5, 0.6, 1.4], [5.0, 12.0, 14.0]),
                            },
                            x_label="‖ΔW‖ / ‖W‖, %",
                            y_label="effective rank",
                            labels={"attention": ["q", "k", "v", "o"], "MLP": ["gate", "up", "down_proj"]},
                        ),
                        "Size against rank.",
                        "Seven points; the larger updates have the higher ranks.",
                        Table(["module", "size", "rank"], [["q", 0.1, 3.0]]),
                    ),
                ],
            ),
            Section(
                "How it was run",
                [Text("48 runs of `deltaw train`, one for each rank, rate and seed, on the same 4,096 rows.")],
            ),
        ],
    )


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
FLAGS += ["--enable-logging=stderr", "--dump-dom"]
DARK = "--blink-settings=preferredColorScheme=0"
WIDTHS = (360, 1280)
# A page that does all that ours must not: the measure has to see it.
CANARY = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<script>document.title = "ran"</script>
<p style="width:3000px;color:#999;background:#aaa">unreadable</p><svg width="0"></svg>"""

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
        assert seen["texts"] > 20 and seen["drawn"] > 20
        assert seen["worst"][0] >= 4.5, seen["worst"]
        assert (max(seen["ground"]) < 64) if dark else (min(seen["ground"]) > 240)
    phone, desk = ours[0], ours[1]
    assert (phone["width"], desk["width"]) == WIDTHS
    assert phone["columns"] == 1 and desk["columns"] == 2, "pictures stand side by side where there is room"
    assert phone["wide"] and not desk["wide"], "wide pictures scroll in their own boxes"
    # The measure sees what is wrong, and the policy stops the script: in both frames of the canary, nowhere else.
    assert canary["reach"] > canary["width"] and canary["worst"][0] < 2
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
