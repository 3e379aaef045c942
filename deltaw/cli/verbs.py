"""`deltaw --help`: the verbs in the order of a day's work, and what is said to a name that isn't one.

A verb belongs to exactly one group; one that stands in none is shown at the end, and a test fails. Names of other tools
(`fuse`, `quantize`, `finetune`) are answered with the verb that does it here, files and folders with the verb that
takes them, slips of the finger with the nearest verb.
"""

import difflib
from pathlib import Path
from typing import Any

from typer.core import TyperGroup

from deltaw.cli.elsewhere import ELSEWHERE
from deltaw.errors import InputError, command

GROUPS = {
    "Start": ("demo", "doctor", "preview", "plan", "cache"),
    "Train": ("train", "sweep", "runs", "eval", "verify-resume"),
    "Ask": ("chat", "generate", "serve"),
    "Understand": ("inspect", "compare", "decompose", "study"),
    "Reshape": ("resize", "scale", "combine", "extract"),
    "Ship": ("lint", "merge", "export", "verify"),
}
WHOLE = 10_000  # characters: a description is shown in full, over several lines where the terminal is narrow


class Verbs(TyperGroup):
    """The application's verbs."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """By group, with a first sentence each."""
        groups = {title: [name for name in names if name in self.commands] for title, names in GROUPS.items()}
        grouped = {name for names in groups.values() for name in names}
        groups["Other"] = [name for name in self.commands if name not in grouped]
        widest = max(map(len, self.commands))
        for title, names in groups.items():
            if names:
                with formatter.section(title):
                    formatter.write_dl([(f"{n:{widest}}", self.commands[n].get_short_help_str(WHOLE)) for n in names])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The verb and its arguments. Raises InputError for a name that is no verb."""
        name = args[0]
        if name in self.commands or name.startswith("-"):
            return super().resolve_command(ctx, args)
        raise InputError(f"deltaw {name}: no such verb", fix=_advice(name, list(self.commands)))


def _advice(name: str, verbs: list[str]) -> str:
    word = name.lower().replace("_", "-")
    if word in verbs:
        return f"did you mean {word}?"
    if word in ELSEWHERE:
        return ELSEWHERE[word]
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return f"a run file is trained: {command('train', path)}"
    if (path / "config.yaml").is_file():
        return f"a run is asked, measured, inspected, …: {command('chat', path)}"
    near = difflib.get_close_matches(word, verbs, n=2)
    return f"did you mean {' or '.join(near)}?" if near else "see deltaw --help"


def usage(error: Any) -> str:
    """What is printed of an error that the command line's parser raised: what is wrong, what is near, whose --help."""
    ctx, what = getattr(error, "ctx", None), error.format_message()
    whose = ctx.command_path if ctx else "deltaw"
    option = getattr(error, "option_name", None) if hasattr(error, "possibilities") else None
    if option is None or ctx is None:
        return f"error: {what.rstrip('.')}\nsee {whose} --help"
    advice = _near_option(option, ctx)
    return f"error: {whose} has no option {option}{advice}\nsee {whose} --help"


def _near_option(option: str, ctx: Any) -> str:
    from deltaw.config import setting_meant  # pydantic takes a while

    word = option.partition("=")[0].lower().replace("_", "-")
    if isinstance(ctx.command, TyperGroup) and any(word in _options(verb) for verb in ctx.command.commands.values()):
        return "; options of a verb stand after it"
    settings = any(parameter.name == "overrides" for parameter in ctx.command.params)
    if settings and (meant := setting_meant(option)):
        return f"; settings stand behind the run file, as key=value: {meant}"
    if near := difflib.get_close_matches(word, _options(ctx.command), n=2, cutoff=0.65):
        return f"; did you mean {' or '.join(near)}?"
    return "; settings of the run file are written without dashes: train.lr=1e-3" if settings else ""


def _options(command: Any) -> list[str]:
    names = [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]
    return [name for name in names if name.startswith("-")]
