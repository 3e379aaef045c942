"""From a name to a verdict: which form of an adapter or a model it is, and what the rules find at each destination."""

from collections.abc import Sequence
from os import fspath
from pathlib import Path

from deltaw.adapter.file import is_run
from deltaw.errors import InputError, command
from deltaw.named import Named
from deltaw.shipping.lint import (
    rules_base,
    rules_chat,
    rules_config,
    rules_files,
    rules_folders,
    rules_gguf,
    rules_keys,
    rules_kinds,
    rules_values,
)
from deltaw.shipping.lint.base import look
from deltaw.shipping.lint.finding import Finding
from deltaw.shipping.lint.forms import form_of
from deltaw.shipping.lint.rules_config import MAX_RANKS
from deltaw.shipping.lint.subject import Subject, read_spec, recorded_base
from deltaw.shipping.lint.verdict import Verdict, destinations
from deltaw.show.progress import Display

RULES = (
    *rules_files.RULES,
    *rules_keys.RULES,
    *rules_config.RULES,
    *rules_kinds.RULES,
    *rules_values.RULES,
    *rules_base.RULES,
    *rules_chat.RULES,
)

ANY_KIND = (
    *rules_files.RULES,
    rules_config.kind,
    rules_config.task,
    rules_values.not_finite,
    rules_values.overflow,
    rules_base.named,
    rules_base.own,
    *rules_chat.RULES,
)  # what can be checked of a PEFT adapter that isn't a LoRA


def lint(
    adapter: str | Path,
    *,
    base: str | Path | None = None,
    to: str | Sequence[str] = (),
    max_lora_rank: int = 16,
    display: Display | None = None,
) -> Verdict:
    """What each destination makes of an adapter, deltaw's own or another tool's: a run, a folder in PEFT's or mlx-lm's
    layout, a .gguf file or a merged model's folder.

    `base`: what it goes on, if it doesn't say or that isn't available; `to`: the destinations that matter, one or
    several (default: all); `max_lora_rank`: the limit of the vLLM that will serve it. Raises InputError if there is no
    adapter.
    """
    display = display or Display(quiet=True)
    base = fspath(base) if base else None
    to = destinations([to] if isinstance(to, str) else to)
    if max_lora_rank not in MAX_RANKS:
        raise InputError(f"--max-lora-rank {max_lora_rank}: vLLM accepts only {', '.join(map(str, MAX_RANKS))}")
    path, name = Path(adapter).expanduser(), str(adapter)
    try:
        run, form = is_run(path), form_of(path)
    except OSError as error:  # a name too long for a path, a folder that may not be read
        raise InputError(f"{name:.200}: {error.strerror}") from None
    if run:
        return _folder(name, path / "adapter", Named(name), base, to, max_lora_rank, display)
    if form == "peft":
        return _folder(name, path, None, base, to, max_lora_rank, display)
    if form == "gguf":
        findings = rules_gguf.look(path, base, display)
    elif form == "mlx":
        findings = rules_folders.look_mlx(path, base, display)
    else:
        findings = rules_folders.look_model(name, path, base, display)
    return Verdict(name, form, base or "", tuple(findings), to)


def _folder(
    name: str,
    folder: Path,
    run: Named | None,
    base: str | None,
    to: tuple[str, ...],
    max_rank: int,
    display: Display,
) -> Verdict:
    """The verdict on an adapter's folder in PEFT's layout, a run's or any other."""
    if run and not folder.is_dir():
        raise InputError(f"{name} has no finished adapter yet", fix=f"finish it: {command('train', name)}")
    config, shapes, findings = rules_files.read(folder)
    recorded = recorded_base(folder, config)
    known = look(base or (run.base if run else None), recorded.name, recorded.revision, display)
    subject = Subject(
        name=name,
        folder=folder,
        config=config,
        shapes=shapes,
        early=tuple(findings),
        base=known.base,
        base_option=base,
        kind=known.kind,
        no_base=known.reason,
        recorded=recorded,
        spec=read_spec(folder),
        run=run.local if run else None,
        max_rank=max_rank,
        display=display,
    )
    rules = ANY_KIND if rules_config.other_kind(config) else RULES
    results: list[Finding] = [finding for rule in rules for finding in rule(subject)]
    return Verdict(name, "peft", known.base.source.name if known.base else recorded.name, tuple(results), to)
