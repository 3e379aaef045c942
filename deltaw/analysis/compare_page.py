"""What two adapters have in common (compare.py), as a page and in a few lines.

φ is shown above chance (compare.py): in 576 dimensions the first 64 directions of any two updates share a tenth by
chance alone, which would look like a result.
"""

from pathlib import Path

from deltaw.analysis import pictures
from deltaw.analysis.compare import Comparison
from deltaw.analysis.maps import layer_map
from deltaw.analysis.page import Block, Cell, Fact, Facts, Page, Picture, Section, Table, Text, evenly, number
from deltaw.analysis.words import KINDS, kinds_of, short, title
from deltaw.show.text import counted

SHOWN, ROWS = 20, 300  # directions of a picture, modules of the table: a page must not grow with the adapters

ABOUT = """
`φ(i, j)` is how much the first `i` directions of one update and the first `j` of the other have in common, as a share
of the smaller number (LoRA §7.2): 1 is the same subspace, and two random ones have `max(i, j)` over the dimension on
average. The *cosine* compares the updates themselves: 1 is the same direction in the space of all weights, 0 unrelated,
below 0 opposed. Two adapters may share their directions and do opposite things in them.
"""


def page_of(comparison: Comparison, one: str, other: str) -> Page:
    """The page on two adapters, named `one` and `other`."""

    def grid(values: list[list[float]], label: str, caption: str) -> Picture:
        i, j = (evenly(n, SHOWN) for n in (len(values), len(values[0])))
        shown = [[values[row][column] for column in j] for row in i]
        rows, columns = ([str(place + 1) for place in places] for places in (i, j))
        svg = pictures.heatmap(shown, row_labels=rows, column_labels=columns, value_label=label, diverging=True)
        cells: list[list[Cell]] = [[row, *line] for row, line in zip(rows, shown, strict=True)]
        return Picture(svg, caption, f"{label}: {one} down, {other} across", Table(["", *columns], cells, label))

    order = kinds_of(comparison.modules)
    grids: list[Block] = [
        grid(
            side["right"].excess_IJ.tolist(),
            f"{short(kind)}: φ above chance",
            f"Input directions of `{kind}`, averaged over the modules.",
        )
        for kind, side in sorted(comparison.kinds.items(), key=lambda item: order.index(item[0]))[:KINDS]
    ]
    cosines = layer_map(
        {path: m.cosine for path, m in comparison.modules.items()},
        "cosine of the updates",
        "Do the two updates do the same?",
        diverging=True,
    )
    sections = [
        Section("In short", [Facts(_facts(comparison)), Text("\n\n".join(in_words(comparison, one, other)))]),
        Section("Shared directions", grids or [Text("No module has directions to compare.")]),
        Section("Module by module", [cosines, _table(comparison)]),
        Section("How to read this", [Text(ABOUT)]),
    ]
    return Page(f"{Path(one).name} and {Path(other).name}", "Two adapters on one base", sections)


def in_words(comparison: Comparison, one: str, other: str) -> list[str]:
    """The main results, in sentences."""
    if comparison.cosine is None:
        return [f"One of {one} and {other} is zero in every module, so there is nothing to compare."]
    middle = comparison.medians
    norms = f"{comparison.frobenius[0]:.3g} and {comparison.frobenius[1]:.3g}"
    over = f"Over {counted(len(comparison.modules), 'module')} the updates have a cosine of {comparison.cosine:.3f}"
    lines = [f"{over}; ‖ΔW‖ is {norms}."]
    if (top := middle.get("right_phi_1")) is not None:
        chance = top - (middle.get("right_excess_1") or 0.0)
        lines.append(f"Their first input directions have φ = {top:.2f} (median), by chance {chance:.3f}.")
    if (last := middle.get("right_phi_last")) is not None:
        excess = middle.get("right_excess_last") or 0.0
        lines.append(f"Over all directions that both have, φ = {last:.2f}, by chance {last - excess:.2f}.")
    for name, paths in zip((one, other), comparison.only, strict=True):
        if paths:
            lines.append(f"{len(paths)} modules are only in {name}, such as {title(paths[0])}.")
    if comparison.replaced:
        lines.append(f"Not compared: {', '.join(comparison.replaced)}, where new rows took the place of the base's.")
    return lines


def _facts(comparison: Comparison) -> list[Fact]:
    middle = comparison.medians
    facts = [
        Fact("cosine of the updates", comparison.cosine, f"over {counted(len(comparison.modules), 'module')}"),
        Fact("distance", comparison.distance, "‖ΔW₁ − ΔW₂‖ over ‖ΔW₁‖"),
    ]
    for pair, label in (("1", "first directions"), ("4", "first four"), ("last", "all directions")):
        if (phi := middle.get(f"right_phi_{pair}")) is not None:
            excess = middle.get(f"right_excess_{pair}") or 0.0
            facts.append(Fact(f"φ, {label}", phi, f"{number(phi - excess)} by chance"))
    return facts


def _table(comparison: Comparison) -> Table:
    head = ["module", "cosine", "distance", "‖ΔW₁‖", "‖ΔW₂‖", "φ(1, 1) in", "φ(R, R) in", "φ(1, 1) out", "φ(R, R) out"]
    rows: list[list[Cell]] = []
    sizes = {path: sum(m.frobenius) for path, m in comparison.modules.items()}
    most = set(sorted(sizes, key=lambda path: -sizes[path])[:ROWS])
    for path in filter(most.__contains__, comparison.modules):
        m = comparison.modules[path]
        sides = [side.pairs.get(pair, {}).get("phi") for side in (m.right, m.left) for pair in ("1", "last")]
        rows.append([path, m.cosine, m.distance, *m.frobenius, *sides])
    caption = f"The {ROWS} largest of {number(len(sizes))}; all of them: `deltaw compare --json`"
    return Table(head, rows, caption if len(rows) < len(sizes) else "")
