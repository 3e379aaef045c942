"""The sections of a report's page (report.py puts them together): its pictures, tables and sentences.

Pictures are maps of layers (down) by kinds of module (across), since that is how a reader knows the model; a module
whose path has no layer gets a row of its own. Every map's table holds the map's numbers.
"""

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from deltaw.analysis import pictures
from deltaw.analysis.maps import layer_map
from deltaw.analysis.measure import BaseMeasures, Measures
from deltaw.analysis.page import (
    Block,
    Cell,
    Fact,
    Facts,
    Picture,
    Sample,
    Samples,
    Section,
    Table,
    Text,
    evenly,
    excerpt,
    number,
    thinned,
)
from deltaw.analysis.summary import noise_of
from deltaw.analysis.training import ANSWER, Metrics, Training
from deltaw.analysis.words import columns_of, gist
from deltaw.show.text import counted

LOSSES = {"training": "loss", "held out": "eval_loss"}
ROWS, FIGURES, INDICES = 300, 40, 64  # in a table of the page; a page must not grow with the run

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

*Intruders* are leading directions of `W + ΔW` that resemble none of `W`'s (largest |cosine| below 0.5).

Merged into bfloat16 weights, the update is rounded together with `W`. The part *kept* still
points along `ΔW`; the *noise* that rounding adds points everywhere and is given as a share of `‖ΔW‖`.
"""


def in_short(measures: Mapping[str, Measures], summary: Mapping[str, Any], training: Training | None) -> Section:
    """The headline numbers, and the main results in sentences."""
    used = [m for m in measures.values() if m.numerical_rank]
    facts = [Fact("parameters trained", summary["parameters"], f"in {counted(summary['modules'], 'module')}")]
    if used:
        middle = median(m.energy_rank for m in used)
        middle = int(middle) if middle == int(middle) else middle
        most = max(m.rank for m in used)
        facts.append(Fact("directions in use", middle, f"of {most} (median): 90 % of the energy, not of the function"))
    if "relative" in summary:
        facts.append(Fact("weights changed by", f"{summary['relative']:.2%}", "‖ΔW‖ over ‖W‖, all modules"))
        medians = summary["median"]
        if "amplification_top" in medians:
            chance = number(medians.get("amplification_top_chance"))
            facts.append(Fact("amplification", medians["amplification_top"], f"by chance {chance}; medians"))
        if (percentile := summary["percentile"]) is not None:
            facts.append(Fact("W there, percentile", f"{percentile:.0%}", "of random directions; chance is 50 %"))
        facts.append(
            Fact("intruders", summary["intruders"], f"of {number(summary['intruders_of'])} leading directions")
        )
    if training:
        facts += _run_facts(training.result)
    return Section("In short", [Facts(facts), Text("\n\n".join(gist(measures, summary)))])


def _run_facts(result: Mapping[str, Any]) -> list[Fact]:
    sides = [result.get("eval", {}).get(side, {}).get("loss") for side in ("before", "after")]
    facts = []
    if None not in sides:
        facts.append(Fact("held-out loss", sides[1], f"{number(sides[0])} before"))
    if (kl := result.get("forgetting", {}).get("kl")) is not None:
        facts.append(Fact("KL from the base", kl, "nats per token of general text"))
    if (speed := result.get("tokens_per_second")) is not None:
        facts.append(Fact("tokens per second", speed, f"{number(result.get('tokens'))} tokens"))
    if (peak := result.get("peak_memory_bytes")) is not None:
        facts.append(Fact("peak memory, GiB", peak / 2**30, result.get("machine", {}).get("device", "")))
    return facts


def of_training(training: Training) -> list[Section]:
    """Sections on a run's own figures: learning, forgetting, answers."""
    result = training.result
    sections = [Section("Learning", [*_curve(training.metrics), *_before_after(result)])]
    if lost := result.get("forgetting"):
        sections.append(Section("What it forgot", _forgot(lost)))
    if result.get("answers"):
        samples = [Sample(*(row[part] and excerpt(row[part]) for part in ANSWER)) for row in result["answers"]]
        sections.append(Section("Answers", [Samples(samples)]))
    return sections


def _forgot(lost: Mapping[str, Any]) -> list[Block]:
    before, after, kl = (lost.get(name) for name in ("loss_before", "loss_after", "kl"))
    rise = None if before is None or after is None else after - before
    rows: list[list[Cell]] = [
        ["loss", before, after, rise, *(lost.get("rise_interval") or (None, None))],
        ["KL", 0.0, kl, kl, *(lost.get("kl_interval") or (None, None))],
    ]
    passages = f"{number(lost['passages'])} passages, " if lost.get("passages") else ""
    tokens = f"{passages}{number(lost.get('tokens'))} tokens of `{lost.get('source', '–')}`"
    words = [
        "The loss and KL(base ‖ adapted) on general text, in nats per token.",
        f"They were measured on {tokens}, which it wasn't trained on.",
        "On other passages of this kind, 95 % of changes would lie within the interval (bootstrap over passages).",
        "`deltaw scale` shows what a smaller factor would keep and what it would cost.",
    ]
    return [Table(["", "base", "adapted", "change", "95 % from", "to"], rows), Text(" ".join(words))]


def _curve(metrics: Metrics) -> list[Block]:
    steps = [line for line in metrics if "loss" in line]
    if len(steps) < 2:
        return []
    series = {}
    for label, name in LOSSES.items():
        if lines := [line for line in metrics if name in line]:
            series[label] = ([line["step"] for line in lines], [line[name] for line in lines])
    shown = [steps[i] for i in thinned([line["loss"] for line in steps], ROWS)]
    rows: list[list[Cell]] = [[line.get(name) for name in ("step", "loss", "lr", "grad_norm")] for line in shown]
    some = f"{len(shown)} of {number(len(steps))} steps: the highest and the lowest loss of each stretch"
    caption = f"{some}; all of them: `metrics.jsonl`, `deltaw inspect --json`" if len(shown) < len(steps) else ""
    table = Table(["step", "loss", "learning rate", "gradient norm"], rows, caption)
    svg = pictures.lines(series, x_label="step", y_label="loss, nats per token")
    return [Picture(svg, "Loss by step.", f"Training loss over {counted(len(steps), 'step')}", table)]


def _before_after(result: Mapping[str, Any]) -> list[Block]:
    before, after = (result.get("eval", {}).get(side, {}) for side in ("before", "after"))
    if not before or not after:
        return []
    rows: list[list[Cell]] = [[name.replace("_", " "), before.get(name), after[name]] for name in list(after)[:FIGURES]]
    return [Table(["", "base", "adapted"], rows, f"On {number(result['eval'].get('rows'))} held-out rows")]


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
