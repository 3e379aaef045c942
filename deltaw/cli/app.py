"""The application that the verbs register with, the options and the ways of printing that they share."""

import json
import sys
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Fine-tune language models with LoRA, see why it works, ship the result.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="An error is short; --debug before the verb shows where it came from.",
)


def as_path(value: Any) -> Any:
    """Of an option or argument that names files or folders: `~` and variables stand for what they stand for."""
    from deltaw.files.paths import given

    try:
        return given(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
BaseName = Annotated[
    str | None, typer.Option("--base", help="The base, where the adapter does not name it.", callback=as_path)
]


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    pass


def display(quiet: bool = False) -> Any:
    """Progress on stderr, or none."""
    from deltaw.show.progress import Display

    return Display(quiet=quiet)


def print_json(value: Any) -> None:
    """One JSON object on stdout; escaped where its letters can't be printed, so that nothing is lost."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    print(text)


def give(value: Any, text: str, as_json: bool) -> None:
    """A result on stdout: the JSON, or the text for people."""
    if as_json:
        print_json(value)
    else:
        print(text)
