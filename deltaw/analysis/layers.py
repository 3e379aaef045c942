"""The page of a report: which pictures, in which order, in which words.

Pictures are maps of layers (down) by kinds of module (across), since that is how a reader knows the model; a module
whose path has no layer stands in a row of its own. Every map's table is the map's numbers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from deltaw.analysis import plots
from deltaw.analysis.maps import layer_map
from deltaw.analysis.measure import BaseMeasures, Measures
from deltaw.analysis.page import (
    Block,
    Cell,
    Fact,
    Facts,
    Findings,
    Page,
    Picture,
    Sample,
    Samples,
    Section,
    Table,
    Text,
    number,
)
from deltaw.analysis.report import Report, Training
from deltaw.analysis.sentences import gist, kinds_of, place

Of = Callable[[Measures], float | None]

HOW_TO_READ = """
A fine-tune adds `ΔW` to a weight `W`. The singular values of `ΔW` say how strongly it acts in each of its directions:
the *directions in use* are the fewest that hold 90 % of `‖ΔW‖²`.

*Amplification* (LoRA §7.3) is what `ΔW` has in its own directions over what `W` has there. Large means that a direction
is stressed which the base has but hardly uses; beside it stand what `W` has in its strongest directions and what it
has, on average, in random ones.

*Reads* is the share of the update that looks at the top tenth of `W`'s input directions, *writes* the share that goes
into its top tenth of outputs, each less what chance would give.

*Intruders* are leading directions of `W + ΔW` that resemble none of `W`'s (largest |cosine| below 0.5).
"""


def page_of(report: Report) -> Page:
    """The whole report."""
    spec = report.adapter.spec
    kind = "full fine-tuning" if spec.full else f"LoRA, rank {spec.rank}, alpha {spec.alpha:g}"
    sections = [Section("In short", [*_facts(report), Text("\n\n".join(gist(report.measures, report.summary)))])]
    sections.append(Section("Checks", [Findings(report.findings)]))
    if report.training:
        sections += _training_sections(report.training)
    sections += [
        Section("Where it changed", _where(report.measures)),
        Section("Directions", _directions(report.measures)),
        Section("Module by module", [_modules(report)]),
        Section("How to read this", [Text(HOW_TO_READ)]),
    ]
    return Page(f"{report.folder.name}: what the fine-tune did", f"{kind}, on {report.base}", sections)


def _facts(report: Report) -> list[Block]:
    summary, used = report.summary, [m for m in report.measures.values() if m.numerical_rank]
    facts = [Fact("parameters trained", summary["parameters"], f"in {summary['modules']} modules")]
    if used:
        middle = median(m.energy_rank for m in used)
        middle = int(middle) if middle == int(middle) else middle
        facts.append(Fact("directions in use", middle, f"of {max(m.rank for m in used)}, median over modules"))
    if "relative" in summary:
        facts.append(Fact("weights changed by", f"{summary['relative']:.2%}", "‖ΔW‖ over ‖W‖, all modules"))
        tops = [m.base.amplification_top.factor for m in used if m.base]
        known = [factor for factor in tops if factor is not None]
        if known:
            facts.append(Fact("amplification", median(known), "in the directions in use, median"))
        facts.append(
            Fact("intruders", summary["intruders"], f"of {number(summary['intruders_of'])} leading directions")
        )
    if report.training:
        facts += _run_facts(report.training.result)
    return [Facts(facts)]


def _run_facts(result: Mapping[str, Any]) -> list[Fact]:
    before, after = result["eval"]["before"], result["eval"]["after"]
    facts = []
    if before and after:
        facts.append(Fact("held-out loss", after["loss"], f"{number(before['loss'])} before"))
    if lost := result.get("forgetting"):
        facts.append(Fact("KL from the base", lost["kl"], "nats a token of general text"))
    facts.append(Fact("tokens a second", result["tokens_per_second"], f"{number(result['tokens'])} tokens"))
    facts.append(Fact("peak memory, GiB", result["peak_memory_bytes"] / 2**30, result["machine"]["device"]))
    return facts


def _training_sections(training: Training) -> list[Section]:
    result = training.result
    sections = [Section("Learning", [*_curve(training.metrics), *_before_after(result)])]
    if lost := result.get("forgetting"):
        rows: list[list[Cell]] = [
            ["loss on general text", lost["loss_before"], lost["loss_after"], lost["loss_after"] - lost["loss_before"]]
        ]
        words = (
            f"Measured on {number(lost['tokens'])} tokens of `{lost['source']}`, which was not trained on. The "
            f"model's "
            f"beliefs moved by {number(lost['kl'])} nats a token, KL(base ‖ adapted); 0 is the base itself. "
            "`deltaw scale` shows what a smaller factor would keep and cost."
        )
        sections.append(Section("What it forgot", [Table(["", "base", "adapted", "change"], rows), Text(words)]))
    if result["answers"]:
        samples = [Sample(row["prompt"], row["before"], row["after"], row["truth"]) for row in result["answers"]]
        sections.append(Section("Answers", [Samples(samples)]))
    return sections


def _curve(metrics: Sequence[Mapping[str, Any]]) -> list[Block]:
    steps = [line for line in metrics if "loss" in line]
    evals = [line for line in metrics if "eval_loss" in line]
    if len(steps) < 2:
        return []
    series = {"training": ([line["step"] for line in steps], [line["loss"] for line in steps])}
    if evals:
        series["held out"] = ([line["step"] for line in evals], [line["eval_loss"] for line in evals])
    rows: list[list[Cell]] = [[line["step"], line["loss"], line["lr"], line["grad_norm"]] for line in steps]
    table = Table(["step", "loss", "learning rate", "gradient norm"], rows)
    svg = plots.lines(series, x_label="step", y_label="loss, nats a token")
    return [Picture(svg, "Loss by step.", f"Training loss over {len(steps)} steps", table)]


def _before_after(result: Mapping[str, Any]) -> list[Block]:
    before, after = result["eval"]["before"], result["eval"]["after"]
    if not before or not after:
        return []
    rows: list[list[Cell]] = [[name.replace("_", " "), before[name], after[name]] for name in after]
    return [Table(["", "base", "adapted"], rows, f"On {number(result['eval']['rows'])} held-out rows")]


def against(of: Callable[[BaseMeasures], float | None]) -> Of:
    """The same of a module, None where it wasn't measured against its base."""
    return lambda m: None if m.base is None else of(m.base)


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
        _map(measures, lambda m: m.energy_rank, "directions in use", "The fewest directions with 90 % of the update."),
        _spectra(measures),
    ]
    if any(m.base for m in measures.values()):
        blocks += [
            _map(
                measures,
                against(lambda b: math.log10(f) if (f := b.amplification_top.factor) else None),
                "amplification, power of ten",
                "What the update has in its directions in use, over what `W` has there: 1 stands for ten times.",
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
        blocks.append(_map(measures, against(lambda b: b.intruders), "intruders", "New leading directions, of ten."))
    return blocks


def _map(measures: Mapping[str, Measures], of: Of, label: str, caption: str, *, diverging: bool = False) -> Picture:
    values = {path: of(m) if m.numerical_rank else None for path, m in measures.items()}
    return layer_map(values, label, caption, diverging=diverging)


def _spectra(measures: Mapping[str, Measures]) -> Picture:
    """Each kind's mean spectrum, relative to the first singular value."""
    groups: dict[str, list[list[float]]] = {kind: [] for kind in kinds_of(measures)}
    for path, m in measures.items():
        if m.numerical_rank:
            groups[place(path)[1]].append([value / m.spectrum[0] for value in m.spectrum])
    means = {kind: [sum(each) / len(each) for each in zip(*spectra, strict=False)] for kind, spectra in groups.items()}
    length = max(map(len, means.values()), default=0)
    rows: list[list[Cell]] = [
        [i + 1, *(mean[i] if i < len(mean) else None for mean in means.values())] for i in range(length)
    ]
    shown = {kind: [value for value in mean if value > 0] for kind, mean in means.items()}
    return Picture(
        plots.spectrum(shown),
        "Singular values of the updates over the largest, mean of each kind. A steep fall: fewer directions would do.",
        "One falling curve a kind of module",
        Table(["index", *means], rows),
    )


def _modules(report: Report) -> Table:
    head = ["module", "directions in use", "of", "effective rank", "stable rank", "‖ΔW‖"]
    with_base = any(m.base for m in report.measures.values())
    if with_base:
        head += ["‖ΔW‖/‖W‖, %", "amplification", "lost in bfloat16, %", "intruders"]
    rows = []
    for path, m in report.measures.items():
        row: list[Cell] = [path, m.energy_rank, m.rank, m.effective_rank, m.stable_rank, m.frobenius]
        if m.base:
            row += [100 * m.base.relative, m.base.amplification_top.factor, 100 * m.base.merge_error, m.base.intruders]
        rows.append(row)
    return Table(head, rows)
