"""The sections of a report's page on the weights (report.py puts all together): pictures, tables and sentences.

Pictures are maps of layers (down) by kinds of module (across), since that is how a reader knows the model; a module
whose path has no layer gets a row of its own. Every map's table holds the map's numbers.
"""

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from deltaw.analysis import pictures
from deltaw.analysis.maps import layer_map
from deltaw.analysis.measure import NEAR, BaseMeasures, Measures
from deltaw.analysis.page import (
    Block,
    Cell,
    Fact,
    Facts,
    Picture,
    Section,
    Table,
    Text,
    evenly,
    number,
)
from deltaw.analysis.run_sections import figures
from deltaw.analysis.summary import noise_of
from deltaw.analysis.training import Training
from deltaw.analysis.words import columns_of, gist
from deltaw.show.text import counted, percent

ROWS, INDICES = 300, 64  # in a table of the page; a page must not grow with the model

Of = Callable[[Measures], float | None]

HOW_TO_READ = """
A fine-tune adds `ΔW` to a weight `W`. The singular values of `ΔW` say how strongly it acts in each of its directions:
the *directions in use* are the fewest that hold 90 % of the energy `‖ΔW‖²`. Energy is not function: cut to 16, 4 and 1
of its 64 directions, the adapter of deltaw's study `compress` lost 0.005, 0.021 and 0.128 nats per token. Only a
trial tells what the faint directions do: `deltaw resize --max-loss-increase` runs one.

*Amplification* (LoRA §7.3) is what `ΔW` has in its directions in use over what `W` has there. By itself it says how
strong `ΔW` is, not which directions it chose: *by chance* is what it would be in as many random directions. The
*percentile* tells the two apart: the share of random directions in which `W` has less than in those of `ΔW`. Far above
50 %, the update works where `W` is already strong; far below, where `W` is weak; near 50 %, it doesn't depend on `W`.
A single module's percentile can be anything from 0 to 100 % by chance alone; only the mean of many modules counts.

*Reads* is the share of the update that reads from the top tenth of `W`'s input directions, *writes* the share that goes
into the top tenth of its output directions, each minus what chance would give.

*Intruders* are leading directions of `W + ΔW` that resemble none of `W`'s (largest |cosine| below 0.5). Those with most
of their energy in `W`'s first 20 directions are nothing new: where these are about equally strong, a small update turns
them among themselves. Only those outside come from the update.

Merged into bfloat16 weights, the update is rounded together with `W`. The part *kept* still
points along `ΔW`; the *noise* that rounding adds points everywhere and is given as a share of `‖ΔW‖`.
"""


def in_short(measures: Mapping[str, Measures], summary: Mapping[str, Any], training: Training | None) -> Section:
    """The headline numbers (what it learnt, what it forgot, then how), and the main results in sentences."""
    facts = [*(figures(training.result) if training else []), *_update_facts(measures, summary)]
    return Section("In short", [Facts(facts), Text("\n\n".join(gist(measures, summary)))])


def _update_facts(measures: Mapping[str, Measures], summary: Mapping[str, Any]) -> list[Fact]:
    """The update's size and directions."""
    used = [m for m in measures.values() if m.numerical_rank]
    facts = [Fact("parameters trained", summary["parameters"], f"in {counted(summary['modules'], 'module')}")]
    if "relative" in summary:
        facts.append(Fact("weights changed by", percent(summary["relative"], 2), "‖ΔW‖ over ‖W‖, all modules"))
    if used:
        middle = median(m.energy_rank for m in used)
        middle = int(middle) if middle == int(middle) else middle
        most = max(m.rank for m in used)
        facts.append(Fact("directions in use", middle, f"of {most} (median): 90 % of the energy, not of the function"))
    if "relative" in summary:
        medians = summary["median"]
        if "amplification_top" in medians:
            chance = number(medians.get("amplification_top_chance"))
            facts.append(Fact("amplification", medians["amplification_top"], f"by chance {chance}; medians"))
        if (share := summary["percentile"]) is not None:
            facts.append(Fact("W there, percentile", percent(share), "of random directions; chance is 50 %"))
        facts.append(
            Fact(
                "intruders",
                summary["intruders"],
                f"of {number(summary['intruders_of'])} leading directions; "
                f"{number(summary['outside'])} mostly outside W's first {NEAR}",
            )
        )
    return facts


def against(of: Callable[[BaseMeasures], float | None]) -> Of:
    """The same quantity for a module, None if it wasn't measured against its base."""
    return lambda m: None if m.base is None else of(m.base)


def of_weights(measures: Mapping[str, Measures]) -> list[Section]:
    """Sections on the weights: where they changed, in which directions, and each module's numbers."""
    return [
        Section("Where it changed", _where(measures)),
        Section("Directions", _directions(measures)),
        Section("Module by module", [_modules(measures)]),
        Section("How to read this", [Text(HOW_TO_READ)]),
    ]


def _where(measures: Mapping[str, Measures]) -> list[Block]:
    if not any(m.base for m in measures.values()):
        return [_map(measures, lambda m: m.frobenius, "‖ΔW‖", "The size of each update.")]
    return [
        _map(measures, against(lambda b: 100 * b.relative), "‖ΔW‖ / ‖W‖, %", "How much each weight changed."),
        _map(
            measures,
            against(lambda b: 100 * b.direction_change),
            "1 − cosine of rows, %",
            "How far the rows of each weight turned, on average (DoRA's ΔD).",
        ),
        _map(
            measures,
            against(lambda b: 100 * b.magnitude_change),
            "length of rows, %",
            "How much the rows of each weight grew or shrank, on average (DoRA's ΔM).",
        ),
    ]


def _directions(measures: Mapping[str, Measures]) -> list[Block]:
    blocks: list[Block] = [
        _map(
            measures,
            lambda m: m.energy_rank,
            "directions in use",
            "The fewest directions that hold 90 % of the energy.",
        ),
        _spectra(measures),
    ]
    if any(m.base for m in measures.values()):
        blocks += [
            _map(
                measures,
                against(lambda b: None if (p := b.amplification_top.percentile) is None else 100 * (p - 0.5)),
                "W there, percentile − 50",
                "Does `W` have more in the directions in use than in random ones? Chance alone gives −50 to 50.",
                diverging=True,
            ),
            _map(
                measures,
                against(lambda b: 100 * (b.reads - b.reads_random)),
                "reads, % above chance",
                "How much more than chance the update reads from `W`'s top input directions.",
                diverging=True,
            ),
            _map(
                measures,
                against(lambda b: 100 * (b.writes - b.writes_random)),
                "writes, % above chance",
                "How much more than chance the update writes into `W`'s top output directions.",
                diverging=True,
            ),
        ]
    if any(m.base and m.base.intruders for m in measures.values()):
        blocks.append(
            _map(measures, against(lambda b: b.intruders), "intruders", "New leading directions, out of ten.")
        )
    return blocks


def _map(measures: Mapping[str, Measures], of: Of, label: str, caption: str, *, diverging: bool = False) -> Picture:
    values = {path: of(m) if m.numerical_rank else None for path, m in measures.items()}
    return layer_map(values, label, caption, diverging=diverging)


def _spectra(measures: Mapping[str, Measures]) -> Picture:
    """Each kind's mean spectrum, relative to the first singular value."""
    groups: dict[str, list[list[float]]] = {}
    for path, kind in columns_of(measures).items():
        m, mine = measures[path], groups.setdefault(kind, [])
        if m.numerical_rank:
            mine.append([value / m.spectrum[0] for value in m.spectrum])
    means = {kind: [sum(each) / len(each) for each in zip(*spectra, strict=False)] for kind, spectra in groups.items()}
    length = max(map(len, means.values()), default=0)
    rows: list[list[Cell]] = []
    for i in evenly(length, INDICES):
        rows.append([i + 1, *(mean[i] if i < len(mean) else None for mean in means.values())])
    shown = {kind: [value for value in mean if value > 0] for kind, mean in means.items()}
    return Picture(
        pictures.spectrum(shown),
        "Singular values relative to the largest, averaged per kind: how the energy falls, not what it does.",
        "One falling curve per kind of module",
        Table(["index", *means], rows),
    )


def _modules(measures: Mapping[str, Measures]) -> Table:
    head = ["module", "directions in use", "of", "effective rank", "‖ΔW‖"]
    if any(m.base for m in measures.values()):
        head[3:] = ["‖ΔW‖", "‖ΔW‖/‖W‖, %", "amplification", "by chance", "kept, %", "noise, %", "intruders"]
    most = set(sorted(measures, key=lambda path: -_size(measures[path]))[:ROWS])
    rows = []
    for path in filter(most.__contains__, measures):
        m = measures[path]
        row: list[Cell] = [path, m.energy_rank, m.rank, m.effective_rank, m.frobenius]
        if base := m.base:
            top, kept = base.amplification_top, base.merge_kept
            row[3:] = [m.frobenius, 100 * base.relative, top.factor, top.chance]
            row += [100 * kept, 100 * noise_of(kept, base.merge_error), base.intruders]
        rows.append(row)
    caption = f"The {ROWS} most changed of {number(len(measures))}; all of them: `deltaw inspect --json`"
    return Table(head, rows, caption if len(rows) < len(measures) else "")


def _size(m: Measures) -> float:
    return m.base.relative if m.base else m.frobenius
