"""How the runs of a sweep stand: which setting is best, and what its lead is worth against noise.

Runs that differ in their seed alone are one setting, measured as often as it has seeds. Settings are ranked by the mean
of their held-out losses, and the winner is the best run of the best setting. Its lead over another setting is the mean
of the differences d between runs of one seed: the same order of the rows and the same start, so what these do to both
is no part of the difference.

    d̄ ± t(0.975, n − 1) · s / √n       of n seeds that both have (Student's t, evaluation/intervals.py)

With one seed there is no such interval, and the lead is said to be unknown: on small data two seeds of one setting
often differ by more than two rates do. The winner is the best of several, so its lead is flattered a little by having
been chosen: where there are k other settings the interval is at 1 − 0.05 / k (Bonferroni), which is what "more than
noise" means here.

Losses on different rows can't be compared, nor those of different objectives (another β is another loss): such runs
are listed, and nothing is ranked. A run that
halving stopped is not ranked among those that took all their steps.

All is read off the run folders, so that it can be read again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltaw.errors import InputError
from deltaw.evaluation.intervals import Interval, paired_t
from deltaw.run import Run, is_number
from deltaw.sweep.folder import SweepFolder
from deltaw.sweep.grid import SEED, Variant

FINISHED, UNDER_WAY, WAITING = "finished", "interrupted", "waiting"


@dataclass(frozen=True)
class Standing:
    """A run, as far as it has come. `loss`: on the held-out rows, of a finished run; `metrics`: the others there."""

    variant: Variant
    folder: str
    state: str
    why: str = ""
    loss: float | None = None
    metrics: Mapping[str, float] | None = None
    step: int = 0
    train_loss: float | None = None
    stopped_at: float | None = None  # the loss when halving stopped it
    has_report: bool = False

    def to_json(self) -> dict[str, Any]:
        figures = {"loss": self.loss, "metrics": dict(self.metrics or {}), "step": self.step}
        more = {"why": self.why, "train_loss": self.train_loss, "stopped_at": self.stopped_at}
        settings = dict(self.variant.settings)
        return {
            "name": self.variant.name,
            "folder": self.folder,
            "settings": settings,
            "state": self.state,
            **figures,
            **more,
        }


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed alone and were finished. `lead`: how much worse than the best setting, by seeds;
    None for the best, without ends where no two seeds are shared."""

    words: str
    settings: Mapping[str, Any]
    runs: tuple[Standing, ...]
    lead: Interval | None = None

    @property
    def losses(self) -> dict[int, float]:
        return {run.variant.seed: run.loss for run in self.runs if run.loss is not None}

    @property
    def mean(self) -> float:
        return sum(self.losses.values()) / len(self.losses)

    @property
    def best(self) -> Standing:
        return min(self.runs, key=lambda run: run.loss or 0.0)

    @property
    def is_behind(self) -> bool | None:
        """Whether it is worse than the best by more than noise; None where that can't be told."""
        return None if self.lead is None or self.lead.low is None else self.lead.low > 0

    def to_json(self) -> dict[str, Any]:
        lead = None if self.lead is None else {**self.lead.to_json(), "more_than_noise": self.is_behind}
        settings = {key: value for key, value in self.settings.items() if key != SEED}
        return {"settings": settings, "loss": self.mean, "seeds": self.losses, "behind": lead}


@dataclass(frozen=True)
class Ranking:
    """`settings`: the best first; none where losses can't be compared, for which `why` is the reason."""

    runs: tuple[Standing, ...]
    settings: tuple[Setting, ...] = ()
    why: str = ""

    @property
    def winner(self) -> Standing | None:
        return self.settings[0].best if self.settings else None

    def verdict(self) -> str:
        """What to make of the winner's lead, in one or two sentences."""
        if not self.settings:
            return self.why
        best, others = self.settings[0], self.settings[1:]
        if not others:
            return f"There is one setting: {best.words}."
        second = others[0]
        assert second.lead is not None
        start = (
            f"{best.words} has the lowest held-out loss, {best.mean:.4f}, {second.lead.value:.4f} below {second.words}"
        )
        if second.lead.low is None or second.lead.high is None:
            return f"{start}. With one seed each that may be chance: give train.seed=0,1,2 to see what chance does."
        ends = f"between {second.lead.low:+.4f} and {second.lead.high:+.4f}"
        if second.is_behind:
            return f"{start}. Over seeds the lead lies {ends}: more than noise."
        level = [one.words for one in others if not one.is_behind]
        return f"{start}. Over seeds the lead lies {ends}: no more than noise, so these do as well: {'; '.join(level)}."

    def to_json(self) -> dict[str, Any]:
        winner = self.winner
        return {
            "winner": None if winner is None else {"name": winner.variant.name, "folder": winner.folder},
            "verdict": self.verdict(),
            "settings": [setting.to_json() for setting in self.settings],
            "runs": [run.to_json() for run in self.runs],
        }


def ranked(sweep: SweepFolder) -> Ranking:
    """How the runs stand now."""
    runs = tuple(_standing(sweep, variant) for variant in sweep.grid.variants)
    if len({_rows(variant) for variant in sweep.grid.variants}) > 1:
        return Ranking(runs, why="The runs have different data, so their losses can't be compared.")
    if len({variant.config.objective.model_dump_json() for variant in sweep.grid.variants}) > 1:
        what = "The runs have different objectives, so their losses can't be compared"
        return Ranking(
            runs, why=f"{what}: see accuracy and margin in their reports, or ask: deltaw eval RUN --tasks FILE."
        )
    measured = [run for run in runs if run.loss is not None]
    if not measured:
        none = all(variant.config.data.eval is None for variant in sweep.grid.variants)
        why = "No rows were held out, so nothing says which run is best: set data.eval."
        return Ranking(runs, why=why if none else "No run is finished and measured yet.")
    groups: dict[str, list[Standing]] = {}
    for run in measured:
        groups.setdefault(run.variant.setting, []).append(run)
    settings = [Setting(words, group[0].variant.settings, tuple(group)) for words, group in groups.items()]
    settings.sort(key=lambda setting: setting.mean)
    best, others = settings[0], settings[1:]
    with_leads = [Setting(one.words, one.settings, one.runs, _behind(one, best, len(others))) for one in others]
    return Ranking(runs, (best, *with_leads))


def _behind(one: Setting, best: Setting, others: int) -> Interval:
    seeds = sorted(one.losses.keys() & best.losses.keys())
    differences = [one.losses[seed] - best.losses[seed] for seed in seeds]
    apart = one.mean - best.mean
    if len(seeds) < 2:
        return Interval(apart, None, None)
    return paired_t(differences, level=1 - 0.05 / others)


def _rows(variant: Variant) -> str:
    """What its losses are of: runs that train on different rows may be measured on the same ones."""
    data = variant.config.data
    held_out_apart = data.eval is not None and not isinstance(data.eval, int | float)
    return (data.model_copy(update={"train": ""}) if held_out_apart else data).model_dump_json()


def _standing(sweep: SweepFolder, variant: Variant) -> Standing:
    run, ended = sweep.run(variant), sweep.ended.get(variant.name)
    lines = run.last_metrics()
    train_loss = next((line["loss"] for line in reversed(lines) if "loss" in line), None)
    step = max((line["step"] for line in lines), default=0)
    known: dict[str, Any] = {"step": step, "train_loss": train_loss, "has_report": run.report.is_file()}
    stopped = [rung.losses[variant.name] for rung in sweep.rungs if variant.name in rung.losses]
    if sweep.is_finished(variant):
        return Standing(variant, str(run.folder), FINISHED, **_figures(run), **known)
    if ended is not None:
        at = stopped[-1] if stopped and ended.state == "halved" else None
        return Standing(variant, str(run.folder), ended.state, ended.why, stopped_at=at, **known)
    return Standing(variant, str(run.folder), UNDER_WAY if run.config.is_file() else WAITING, **known)


def _figures(run: Run) -> dict[str, Any]:
    """Of a finished run; nothing of a result that can't be read."""
    try:
        after = run.read_json(run.result)["eval"]["after"] or {}
    except (InputError, KeyError, TypeError, AttributeError):
        return {}
    figures = {name: value for name, value in after.items() if is_number(value)}
    loss = figures.pop("loss", None)
    figures.pop("perplexity", None)
    return {"loss": loss, "metrics": figures}
