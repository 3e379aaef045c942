"""sweep.html: how the runs of a sweep compare, on one page in the style of all reports (analysis/page.py).

    which is best      the verdict, the headline numbers
    settings           a bar for each: how far its mean over the seeds lies above the best one's (bars of losses would
                       all look alike), the whisker one standard deviation of its seeds; and a table with the interval
                       that says whether it is noise
    learning rate      held-out loss against the rate, a curve for each combination of the others, a band from the best
                       to the worst seed (where a rate varies)
    on the way         held-out losses at each evaluation, a curve for each of the best runs
    all runs           with a link to each one's own report

Nothing here is measured: all of it is in the run folders and in sweep.json.
"""

import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from deltaw.analysis import pictures
from deltaw.analysis.page import (
    Block,
    Cell,
    Fact,
    Facts,
    Link,
    Page,
    Picture,
    Section,
    Table,
    Text,
    number,
    write,
)
from deltaw.run import Run
from deltaw.show.text import counted, figure_name
from deltaw.sweep.folder import SweepFolder
from deltaw.sweep.grid import SEED, words
from deltaw.sweep.standing import Ranking, Setting, Standing

RATE = "train.lr"
BARS, CURVES = 24, 6  # settings of a picture, runs of one

ABOUT = """
A *setting* is what runs have in common that differ in their seed alone. The seed decides where an adapter begins and in
which order its rows come, so how far the runs of one setting lie apart is what chance does. The winner is the best run
of the setting with the lowest mean.

*Behind* is how much worse a setting is than the best one: the mean of the differences between runs of the same seed,
with Student's interval over the seeds. Its level is raised for the number of settings that were compared, since the
best of many is in part the luckiest. Where the interval holds 0, the lead is no more than noise, and the cheaper or
gentler of the two settings is as good a choice. With one seed there is no interval.

The losses are means over the same held-out rows, in nats per trained token. That the rows are few is no part of the
interval: all runs are measured on the same ones.
"""


def write_page(sweep: SweepFolder, ranking: Ranking) -> None:
    """Write it. Raises RunError when the disk refuses."""
    write(page_of(sweep, ranking), sweep.page)


def page_of(sweep: SweepFolder, ranking: Ranking) -> Page:
    """The page."""
    sections = [Section("Which is best", _best(sweep, ranking))]
    if ranking.settings:
        sections.append(Section("Settings", [_bars(ranking.settings), _settings(ranking.settings)]))
    if (curve := _rate_curve(ranking)) is not None:
        sections.append(Section("Learning rate", [curve]))
    if (way := _on_the_way(ranking)) is not None:
        sections.append(Section("On the way", [way]))
    if sweep.rungs:
        sections.append(Section("What was stopped early", [_halved(sweep)]))
    sections += [Section("All runs", [_runs(sweep, ranking)]), Section("How to read this", [Text(ABOUT)])]
    base = sweep.grid.variants[0].config.base
    what = f"{counted(len(ranking.runs), 'run')} on {Path(base).name or base}"
    return Page(f"Sweep {sweep.path.name}", what, sections)


def _best(sweep: SweepFolder, ranking: Ranking) -> list[Block]:
    winner, facts = ranking.winner, list[Fact]()
    if winner is not None:
        facts.append(Fact("the winner", winner.variant.name))
        facts.append(Fact("held-out loss", winner.loss, "nats per trained token"))
        facts += [Fact(figure_name(name), value) for name, value in (winner.metrics or {}).items()]
    finished = sum(run.loss is not None or run.state == "finished" for run in ranking.runs)
    facts.append(Fact("runs finished", f"{finished} of {len(ranking.runs)}"))
    return [Facts(facts), Text(ranking.verdict())]


def _bars(settings: Sequence[Setting]) -> Picture:
    shown = settings[:BARS]
    names, above = [setting.words for setting in shown], [setting.mean - settings[0].mean for setting in shown]
    spreads = [_spread(list(setting.losses.values())) for setting in shown]
    label = "held-out loss above the best"
    svg = pictures.bars(names, {label: above}, y_label=label, errors={label: spreads})
    means = [setting.mean for setting in shown]
    rows: list[list[Cell]] = [[name, *these] for name, *these in zip(names, means, above, spreads, strict=True)]
    whiskers = "; whiskers are one standard deviation of its seeds" if any(spreads) else ", one seed each"
    left_out = f" The best {BARS} of {len(settings)}." if len(settings) > BARS else ""
    return Picture(
        svg,
        f"How far each setting's mean held-out loss lies above the best one's{whiskers}.{left_out}",
        "held-out loss by setting, above that of the best",
        Table(["setting", "mean loss", "above the best", "standard deviation"], rows),
    )


def _spread(losses: list[float]) -> float | None:
    return statistics.stdev(losses) if len(losses) > 1 else None


def _settings(settings: Sequence[Setting]) -> Table:
    rows: list[list[Cell]] = []
    for setting in settings:
        lead = setting.lead
        ends = "" if lead is None or lead.low is None else f"{_signed(lead.low)} to {_signed(lead.high)}"
        noise = {True: "more than noise", False: "no more than noise", None: "one seed" if lead else ""}[
            setting.is_behind
        ]
        losses = list(setting.losses.values())
        behind = None if lead is None else lead.value
        rows.append([setting.words, len(losses), setting.mean, min(losses), max(losses), behind, ends, noise])
    head = ["setting", "seeds", "mean loss", "best", "worst", "behind", "interval", "is it noise?"]
    return Table(head, rows, "Each setting beside the best one")


def _signed(value: float | None) -> str:
    return "" if value is None else ("+" if value >= 0 else "") + number(value)


def _rate_curve(ranking: Ranking) -> Picture | None:
    """Held-out loss against the learning rate; None where that doesn't vary."""
    curves: dict[str, dict[float, list[float]]] = {}
    for setting in ranking.settings:
        if RATE not in setting.settings:
            return None
        others = {key: value for key, value in setting.settings.items() if key not in (RATE, SEED)}
        name = words(others) if others else "held-out loss"
        curves.setdefault(name, {})[float(setting.settings[RATE])] = list(setting.losses.values())
    rates = sorted({rate for curve in curves.values() for rate in curve})
    if len(rates) < 2:
        return None
    series, bands, rows = {}, {}, list[list[Cell]]()
    for name, curve in curves.items():
        xs = sorted(curve)
        means = [sum(curve[x]) / len(curve[x]) for x in xs]
        series[name] = (xs, means)
        bands[name] = (xs, [min(curve[x]) for x in xs], [max(curve[x]) for x in xs])
        rows += [[name, x, mean, min(curve[x]), max(curve[x])] for x, mean in zip(xs, means, strict=True)]
    svg = pictures.lines(series, x_label="learning rate", y_label="held-out loss", log_x=True, bands=bands)
    head = ["curve", "learning rate", "mean loss", "best seed", "worst seed"]
    edge = _edge(ranking, rates)
    caption = f"Held-out loss against the learning rate; bands reach from the best to the worst seed.{edge}"
    return Picture(svg, caption, "held-out loss by learning rate", Table(head, rows))


def _edge(ranking: Ranking, rates: Sequence[float]) -> str:
    """That the best rate is the last one tried, if so: the best may lie beyond."""
    best = float(ranking.settings[0].settings[RATE])
    if best == rates[0]:
        return " The best rate is the lowest that was tried, so a lower one may be better."
    return " The best rate is the highest that was tried, so a higher one may be better." if best == rates[-1] else ""


def _on_the_way(ranking: Ranking) -> Picture | None:
    """Held-out losses at the evaluations of the best runs; None where there were none on the way."""
    known = sorted((run for run in ranking.runs if run.loss is not None), key=lambda run: run.loss or 0.0)[:CURVES]
    series, rows = {}, list[list[Cell]]()
    for run in known:
        points = [
            (line["step"], line["eval_loss"]) for line in Run(Path(run.folder)).read_metrics() if "eval_loss" in line
        ]
        points = [(step, loss) for step, loss in points if math.isfinite(loss)]
        if len(points) > 1:
            series[run.variant.name] = ([step for step, _ in points], [loss for _, loss in points])
            rows += [[run.variant.name, step, loss] for step, loss in points]
    if not series:
        return None
    svg = pictures.lines(series, x_label="step", y_label="held-out loss")
    some = f"The best {len(series)} of {len(ranking.runs)} runs" if len(series) < len(ranking.runs) else "All runs"
    caption = f"{some}: held-out loss at each evaluation."
    return Picture(svg, caption, "held-out loss by step", Table(["run", "step", "held-out loss"], rows))


def _halved(sweep: SweepFolder) -> Table:
    rows: list[list[Cell]] = [
        [f"{rung.share:.0%} of the steps", name, loss, "stopped" if name not in later else "went on"]
        for number_, rung in enumerate(sweep.rungs)
        for later in [_after(sweep, number_)]
        for name, loss in sorted(rung.losses.items(), key=lambda pair: pair[1] if pair[1] is not None else math.inf)
    ]
    return Table(["after", "run", "held-out loss", ""], rows, "What halving saw, and did")


def _after(sweep: SweepFolder, rung: int) -> set[str]:
    """The runs that were still there after that rung."""
    if rung + 1 < len(sweep.rungs):
        return set(sweep.rungs[rung + 1].losses)
    return {name for name in sweep.rungs[rung].losses if name not in sweep.ended}


def _runs(sweep: SweepFolder, ranking: Ranking) -> Table:
    """Every run, the best first, with a link to its report."""
    metrics = list(dict.fromkeys(name for run in ranking.runs for name in run.metrics or {}))
    order = sorted(ranking.runs, key=lambda run: (run.loss is None, run.loss or 0.0))
    least = min((run.loss for run in ranking.runs if run.loss is not None), default=0.0) if ranking.settings else None
    compared = [] if least is None else ["above the best"]
    head = ["run", "state", "steps", "held-out loss", *compared, *map(figure_name, metrics), "training loss", "report"]
    rows: list[list[Cell]] = [
        [
            run.variant.name,
            run.state + (f": {run.why}" if run.why else ""),
            run.step,
            run.loss,
            *([] if least is None else [None if run.loss is None else run.loss - least]),
            *((run.metrics or {}).get(name) for name in metrics),
            run.train_loss,
            _report(sweep, run),
        ]
        for run in order
    ]
    return Table(head, rows, "The best first; each is a run folder of its own")


def _report(sweep: SweepFolder, run: Standing) -> Cell:
    if not run.has_report:
        return None
    place = os.path.relpath(Run(Path(run.folder)).report, sweep.path)
    return Link("report", quote(place))
