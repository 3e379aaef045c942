"""`deltaw inspect`: an adapter, or a whole run, as one page and as JSON.

    inspect(folder) -> Report       reads the folder, finds the base's weights, measures, checks
    report.write()                  report.html: self-contained, for people          (sections.py lays it out)
    report.to_json()                the same numbers, for machines
    report.gist()                   a dozen lines for a terminal

A run folder adds what the training did: the loss curve, held-out figures before and after, answers, forgetting. An
adapter from any tool is measured as it is. Without the base's weights (the adapter doesn't name its base, or it isn't
available) the page shows what the update alone tells and says what is missing. What the update does to the model
(effect/) takes passes of it, so whoever wants it on the page brings it: a run's own report, at its end, is without.

The base is checked against the adapter's fingerprint before anything is measured: amplification against the wrong
weights would look like a result.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import fspath
from pathlib import Path
from typing import Any

from deltaw.adapter.expert_weights import WithExperts
from deltaw.adapter.file import Adapter
from deltaw.analysis.checks import check_adapter, check_run
from deltaw.analysis.effect.effect import Effect
from deltaw.analysis.effect.sections import BY_TOKEN, WITH_PARTS_OFF, of_effect
from deltaw.analysis.effect.words import in_words
from deltaw.analysis.measure import Measures, measure_adapter
from deltaw.analysis.page import Finding, Findings, Page, Section, write
from deltaw.analysis.run_sections import of_training, the_run
from deltaw.analysis.sections import in_short, of_weights
from deltaw.analysis.summary import summarise
from deltaw.analysis.training import Training, read_training
from deltaw.analysis.words import gist, sentence
from deltaw.base.fingerprint import describe, same_base
from deltaw.base.linear_weights import LinearWeights
from deltaw.base.load import fingerprint_of_files, open_base
from deltaw.base.source import Source, find_base
from deltaw.config.adapter import expert_of
from deltaw.errors import InputError, RunError
from deltaw.kernels.weight import Weight
from deltaw.named import Named
from deltaw.show.progress import Display
from deltaw.show.text import counted

PAGE = "report.html"
WITHOUT_BASE = "measured without the base"  # what a page says that lacks all that needs the base's weights


@dataclass(frozen=True, repr=False)
class Report:
    """A measured adapter. `base` names the weights it was measured against, or says why there were none."""

    folder: Path
    adapter: Adapter
    base: str
    measures: Mapping[str, Measures]
    summary: Mapping[str, Any]
    findings: list[Finding] = field(default_factory=list)
    training: Training | None = None
    without_base: str | None = None  # why it was measured without the base's weights, if it was
    effect: Effect | None = None  # what the update does to the model, where that was tried

    def __repr__(self) -> str:
        return (
            f"Report({self.folder}, {counted(len(self.measures), 'module')}, {counted(len(self.findings), 'finding')})"
        )

    @property
    def sentences(self) -> list[str]:
        """One per module."""
        return [sentence(path, m) for path, m in self.measures.items()]

    def gist(self) -> str:
        """The summary that a terminal shows."""
        signs = {"ok": "✓", "note": "·", "warning": "!", "problem": "✗"}
        checks = [f"{signs[level]} {words}" for level, words in self.findings]
        tried = ["", *in_words(self.effect)] if self.effect else []
        return "\n".join([*gist(self.measures, self.summary), *tried, "", *checks])

    def to_json(self) -> dict[str, Any]:
        """All measures, the summary, the findings; plain JSON."""
        return {
            "folder": str(self.folder),
            "base": self.base,
            "spec": self.adapter.spec.model_dump(mode="json", exclude={"start"}),
            "summary": dict(self.summary),
            "findings": [{"level": level, "text": words} for level, words in self.findings],
            "modules": {
                path: {"sentence": words, **m.to_json()}
                for (path, m), words in zip(self.measures.items(), self.sentences, strict=True)
            },
            "training": self.training.to_json() if self.training else None,
            "effect": self.effect.to_json() if self.effect else None,
        }

    def page(self) -> Page:
        """The whole report, for people (sections.py)."""
        spec = self.adapter.spec
        kind = "full fine-tuning" if spec.full else f"LoRA, rank {spec.rank}, alpha {spec.alpha:g}"
        sections = [in_short(self.measures, self.summary, self.training), Section("Checks", [Findings(self.findings)])]
        if self.training:
            sections += of_training(self.training)
        if self.effect:
            sections += of_effect(self.effect)
        if self.training:
            sections.append(the_run(self.training, self.folder))
        sections += of_weights(self.measures)
        return Page(f"{self.folder.name}: what the fine-tune did", f"{kind}, on {self.base}", sections)

    def write(self, path: str | Path | None = None) -> Path:
        """Write the page, into the folder unless a path is given. Raises RunError if it can't be written."""
        target = Path(path) if path else self.folder / PAGE
        if not target.parent.is_dir():
            raise RunError(f"{target}: no folder {target.parent}", fix="choose another --output")
        if self.without_base is not None:
            check_not_poorer(target, self.without_base)
        write(self.page(), target)
        return target


def inspect(
    name: str | Path | Named,
    *,
    base: str | Path | None = None,
    base_is_known: bool = False,
    page: Path | None = None,
    effect: Effect | str | None = None,
    display: Display | None = None,
) -> Report:
    """Measure a run's adapter, or any adapter's. Raises InputError: no adapter, NaN in it, another base's weights, or
    none where `page`, which is to be replaced, was made with them.

    `base_is_known`: skip checking the base, which reads all of it (a run has just trained on it). `effect`: what trying
    the update showed (effect/effect.py), or why that wasn't done.
    """
    named, display = Named.of(name), display or Display(quiet=True)
    folder, tried = named.path, effect if isinstance(effect, Effect) else None
    adapter, training = named.adapter, read_training(folder, named.config)
    source, why = (tried.base, "") if tried else _source(named, fspath(base) if base else None, display)
    if source is None and page is not None:
        check_not_poorer(page, why)
    if source is not None and not base_is_known and not tried:  # for that, the model was opened on it
        _check_base(adapter, source, display)
    weights: Mapping[str, Weight] | None = None
    if source:
        weights = linear = LinearWeights(source.directory, adapter.fan_in_fan_out)
        if any(expert_of(path) is not None for path in adapter.factors):
            weights = WithExperts(linear, source)
    with display.task("measuring", len(adapter.factors)) as update:
        measures = measure_adapter(adapter, weights, progress=update)
    findings = check_adapter(measures)
    if training:
        findings = [*check_run(training), *findings]
    if source is None:
        findings.append(Finding("note", f"{WITHOUT_BASE}'s weights: {why}"))
    if isinstance(effect, str):
        findings.append(Finding("note", f"what the update does to the model wasn't tried: {effect}"))
    order = ("problem", "warning", "note", "ok")
    findings.sort(key=lambda finding: order.index(finding.level))
    without = why if source is None else None
    name_of = source.name if source else why
    return Report(folder, adapter, name_of, measures, summarise(measures), findings, training, without, tried)


def check_not_poorer(page: Path, why: str) -> None:
    """Raise InputError where a page without the base's weights would replace one that was made with them."""
    there = _written(page)
    if there is not None and WITHOUT_BASE not in there:
        raise InputError(
            f"{why}\n{page} was made with the base's weights, so it isn't replaced by a page without them",
            fix="name the base with --base, or write another page: -o page.html",
        )


def check_shows_more(page: Path, *, deep: bool, untried: str = "") -> None:
    """Raise InputError where a page that shows less of what the update does would replace one that shows more.
    `untried`: why it shows nothing of that."""
    there = _written(page) or ""
    another = "write another page: -o page.html"
    if untried and f"<h2>{BY_TOKEN}</h2>" in there:
        raise InputError(
            f"{untried}\n{page} shows what the update does, so it isn't replaced by a page without that", fix=another
        )
    if not deep and f"<h2>{WITH_PARTS_OFF}</h2>" in there:
        raise InputError(
            f"{page} was made with --deep, so it isn't replaced by a page that shows less",
            fix=f"go as deep again: --deep, or {another}",
        )


def _written(page: Path) -> str | None:
    """The page that is there; None without one. What can't be read can't be written either: its writer says why."""
    try:
        return page.read_text(encoding="utf-8", errors="replace") if page.is_file() else None
    except OSError:
        return None


def _source(named: Named, base: str | None, display: Display) -> tuple[Source | None, str]:
    """(the base's files, ""), or (None, why there are none). A base that was asked for by name must be available."""
    if base is not None:
        return find_base(base, display=display), ""
    try:
        return find_base(named.base, display=display), ""
    except InputError as error:
        return None, error.what


def _check_base(adapter: Adapter, source: Source, display: Display) -> None:
    """Raise InputError unless the adapter was trained on these files' base, as far as its record tells."""
    known = adapter.base.fingerprint
    if not known:
        return
    display.say(f"checking that the adapter was trained on {source.name}")
    fingerprint = fingerprint_of_files(source)
    if not same_base(fingerprint, known):
        fingerprint = open_base(source, dtype="bfloat16", device="cpu").fingerprint
    if not same_base(fingerprint, known):
        raise InputError(
            f"the adapter was trained on {adapter.base.name or 'another base'} ({describe(known)}), "
            f"but {source.name} is another base ({describe(fingerprint)})",
            fix="name its own base with --base",
        )
