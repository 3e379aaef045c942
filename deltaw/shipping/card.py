"""The model card: README.md as the hub reads it, and the report beside it.

    front matter    base_model and its relation, licence if it is known, library, tags: the hub sorts repositories by
                    these. base_model only if the base is on the hub
    what it is      kind, rank, modules, parameters
    training        data, form and the settings that matter, from the run
    figures         before and after, and on how many rows
    loading         the destination's own code
    limits          what the run's checks and the run itself noticed, and what differs from the base it was trained on
    made with       versions

An adapter without a run gets what its folder tells. Nothing reveals the machine it was made on: a user's file is named
by its last part, and the report beside the card loses such paths, too.

This card replaces the line or two that training writes (adapter/file.py).
"""

import html
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deltaw.analysis.checks import check_run
from deltaw.analysis.training import Training, read_training
from deltaw.base.source import BUILTINS, HUB_ID
from deltaw.config import RunConfig
from deltaw.config.sources import public, sources_of
from deltaw.errors import RunError
from deltaw.files.atomic import write_text_atomic
from deltaw.files.paths import public_name
from deltaw.shipping.beside import missing_stop
from deltaw.shipping.trained import Trained
from deltaw.shipping.usage import base_name, chats
from deltaw.show.text import counted, figure_name
from deltaw.version import VERSION

CARD, REPORT = "README.md", "report.html"
Relation = Literal[
    "adapter", "finetune", "quantized"
]  # to the base; "merge" is the hub's word for several models in one


@dataclass(frozen=True)
class Form:
    """What is shipped: its relation to the base, the library that loads it, more tags."""

    relation: Relation
    library: str
    tags: tuple[str, ...] = ()


def write_card(folder: Path, trained: Trained, form: Form, usage: str) -> None:
    """Write README.md into `folder`, and the run's report if it has one. Raises RunError for what the disk refuses."""
    report = trained.run.report if trained.run else None
    with_report = report is not None and report.is_file()
    if report is not None and with_report:
        write_text_atomic(folder / REPORT, _without_paths(_text(report), trained.config))
    write_text_atomic(folder / CARD, card(trained, form, usage, with_report=with_report))


def card(trained: Trained, form: Form, usage: str, *, with_report: bool = False) -> str:
    """The whole README.md."""
    training = read_training(trained.run.folder, trained.config) if trained.run else None
    sections = [
        (_title(trained, form), _what(trained, form)),
        ("Training", _training(trained, training)),
        ("Figures", _figures(training, with_report)),
        ("How to load it", usage.strip()),
        ("Limits", _bullets(_limits(trained, training, form))),
        ("How it was made", _made(trained, training)),
    ]
    (title, first), *rest = sections
    text = f"{_front_matter(trained, form)}\n# {title}\n\n{first}\n"
    return text + "".join(f"\n## {name}\n\n{body}\n" for name, body in rest if body)


def _front_matter(trained: Trained, form: Form) -> str:
    """YAML written as JSON, whose strings and lists YAML reads the same way."""
    fields: dict[str, Any] = {}
    if HUB_ID.fullmatch(base_name(trained)):
        fields |= {"base_model": base_name(trained), "base_model_relation": form.relation}
    builtin = next((b for b in BUILTINS.values() if b.upstream == base_name(trained)), None)
    if builtin:
        fields["license"] = builtin.licence
    fields |= {"library_name": form.library, "pipeline_tag": "text-generation"}
    kind = trained.adapter.spec.kind
    fields["tags"] = list(dict.fromkeys((kind, *form.tags, "deltaw")))
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "---", ""])


def _title(trained: Trained, form: Form) -> str:
    if form.relation == "adapter":
        return f"{'DoRA' if trained.adapter.spec.magnitude else 'LoRA'} adapter for {base_name(trained)}"
    return f"{base_name(trained)}, fine-tuned"


def _what(trained: Trained, form: Form) -> str:
    adapter, spec = trained.adapter, trained.adapter.spec
    modules = len(adapter.factors)
    if spec.full:
        return f"Full fine-tuning: {counted(modules, 'weight')} changed, {adapter.parameters:,} numbers."
    ranks = sorted({update.rank for update in adapter.factors.values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    names = sorted({path.rpartition(".")[2] for path in adapter.factors})
    kind = "DoRA" if spec.magnitude else "rsLoRA" if spec.scaling == "rslora" else "LoRA"
    where = "" if form.relation == "adapter" else ", merged into the weights"
    size = f"{counted(modules, 'module')} ({', '.join(names)}), {counted(adapter.parameters, 'parameter')}"
    return f"{kind}, {rank}, alpha {spec.alpha:g}: {size}{where}."


def _training(trained: Trained, training: Training | None) -> str:
    asked = (
        ("prompts as they are, without a chat template")
        if not chats(trained)
        else "through the chat template in this folder"
    )
    lines = [f"prompts: {asked}"]
    if training is not None:
        lines = [*_data(training), *lines, *_settings(training)]
    return _bullets([*lines, *_lineage(trained)])


def _lineage(trained: Trained) -> Iterator[str]:
    """Which adapters it goes back to, the nearest first."""
    own, *earlier = trained.adapter.history.line
    if own.extension:
        yield f"the run was {own.extension}"
    yield from (f"started from the adapter {one.words()}" for one in earlier[:1])
    yield from (f"which started from {one.words()}" for one in earlier[1:])


def _data(training: Training) -> Iterator[str]:
    result, data = training.result, training.config.data
    rows = f", {counted(result['train_rows'], 'row')}" if result.get("train_rows") else ""
    tokens = f", {counted(result['epoch_tokens'], 'token')}" if result.get("epoch_tokens") else ""
    yield f"data: {public(data.train)}{rows}{tokens}"
    if form := result.get("form"):
        yield f"form: {form}"


def _settings(training: Training) -> Iterator[str]:
    result, train = training.result, training.config.train
    epochs = f"{training.epochs:.3g} x the data" if training.epochs else ""
    steps = f"{counted(result['steps'], 'step')}" if result.get("steps") else ""
    trained_on = f" ({result['supervised_tokens']:,} of them trained on)" if result.get("supervised_tokens") else ""
    tokens = f"{counted(result['tokens'], 'token')}{trained_on}" if result.get("tokens") else ""
    yield "length: " + ", ".join(part for part in (epochs, steps, tokens) if part)
    size = f", {train.tokens_per_step:,} tokens per step" if train.tokens_per_step else ""
    yield f"learning rate: {train.lr:g}, {train.schedule}{size}"
    spec = training.config.adapter
    if not spec.full and (spec.init, spec.dropout) != ("lora", 0.0):
        yield f"initialised by {spec.init}, dropout {spec.dropout:g}"


def _figures(training: Training | None, with_report: bool) -> str:
    if training is None:
        return ""
    table = [("", "before", "after"), ("---", "---:", "---:")]
    measured = training.result.get("eval") or {}
    before, after = measured.get("before") or {}, measured.get("after") or {}
    table += [(figure_name(name), _number(before.get(name)), _number(after[name])) for name in after]
    rows = measured.get("rows")
    notes = [f"Measured on {counted(rows, 'held-out row')}."] if after and rows else []
    if lost := training.result.get("forgetting"):
        table.append(("general text, loss", _number(lost.get("loss_before")), _number(lost.get("loss_after"))))
        size = f"{counted(lost['tokens'], 'token')} of " if lost.get("tokens") else ""
        notes.append(f"General text: {size}{public_name(lost.get('source', 'an unknown file'))}.")
    if len(table) == 2:
        return ""
    if with_report:
        notes.append(f"The full report: [{REPORT}]({REPORT}).")
    return "\n".join(f"| {' | '.join(row)} |" for row in table) + "\n\n" + " ".join(notes)


def _limits(trained: Trained, training: Training | None, form: Form) -> Iterator[str]:
    if training is not None:
        yield from (finding.words for finding in check_run(training) if finding.level in ("warning", "problem"))
        failed = training.raw.get("failed")
        yield from (
            f"no {name.replace('_', ' ')} was measured" for name in (failed if isinstance(failed, dict) else {})
        )
    quantised = trained.base.name in BUILTINS or trained.base.name.endswith(".gguf")
    if quantised and form.relation == "adapter" and form.library != "gguf":
        yield (
            "trained on the weights of a quantised GGUF of the base, so on the original weights answers may differ a "
            "little"
        )
    if trained.form_note:
        yield trained.form_note
    by_weight = sum(path.rpartition(".")[2] in trained.adapter.rewritten for path in trained.adapter.factors)
    if by_weight and form.library == "peft":
        yield f"{by_weight} modules are named by their weights, which PEFT reads from 0.17 on"
    if stop := missing_stop(trained):
        yield f"a turn ends with `{stop}`, which the base's own settings don't stop at: generation_config.json names it"


def _made(trained: Trained, training: Training | None) -> str:
    versions = (training.raw.get("versions") if training else None) or {}
    made = [f"{name} {version}" for name, version in versions.items()] if isinstance(versions, dict) else []
    text = f"Trained with {', '.join(made)}. " if made else ""
    base = trained.adapter.base.fingerprint
    of = f" The base's weights: `{base}`." if base else ""
    return f"{text}Exported by deltaw {VERSION}.{of}"


def _bullets(lines: Iterator[str] | list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{file}: can't be read: {error}", fix=f"make it again, or remove it: {file}") from None


def _without_paths(page: str, config: RunConfig | None) -> str:
    """The page with each of the run's files named by its last part."""
    if config is None:
        return page
    names = (
        config.base,
        *(source.path for source in sources_of(config.data.train)),
        *(source.path for source in sources_of(config.data.eval_sources or ())),
        config.data.template,
        config.evaluate.general,
        config.train.retain.data if config.train.retain else None,
        config.output,
        config.adapter.start,
    )
    for name in sorted({n for n in names if isinstance(n, str) and n.startswith(("/", "."))}, key=len, reverse=True):
        page = page.replace(html.escape(name), html.escape(Path(name).name))
    return page
