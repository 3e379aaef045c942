"""The application that the verbs register with, the options that they share, and the one way to show a Result."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaw.cli.verbs import Verbs
from deltaw.errors import InputError
from deltaw.show.result import Result
from deltaw.training.world import World

if TYPE_CHECKING:
    from deltaw.show.progress import Display

app = typer.Typer(
    cls=Verbs,
    help="Fine-tune language models with LoRA, see why it works, ship the result.",
    invoke_without_command=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="deltaw VERB --help explains one. Errors are short; --debug shows where one came from.",
)


def as_path(value: Any) -> Any:
    """Of an option or argument that names files or folders: `~` and variables stand for what they stand for."""
    from deltaw.files.paths import given

    try:
        return given(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
BaseName = Annotated[
    str | None,
    typer.Option("--base", help="The base model, in place of the one that the adapter names.", callback=as_path),
]
AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        help="Run the metric's code that the run folder names: somebody's Python; with --tasks, the programs "
        "that the model writes, without files or network.",
    ),
]
Adapter = Annotated[str, typer.Argument(help="A run or an adapter folder, made by any tool.", callback=as_path)]
Output = Annotated[str, typer.Option("--output", "-o", help="The folder to write.", callback=as_path)]


def _version(wanted: bool) -> None:
    if wanted:
        from deltaw.version import VERSION

        print(f"deltaw {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
    elif sys.platform == "win32":  # files are locked by flock, memory is bounded by setrlimit
        raise InputError("deltaw doesn't run on Windows itself", fix="run it in WSL 2, which is a Linux")
    elif ctx.invoked_subcommand != "train" and not (world := World.of_environment()).is_alone:
        is_planned = ctx.invoked_subcommand == "plan"  # by rank 0
        if not world.is_first:
            raise typer.Exit(0 if is_planned else 2)
        if is_planned:
            return
        raise InputError(
            f"{ctx.invoked_subcommand} is for one process, and torchrun started {world.size}",
            fix="start it without torchrun: deltaw …",
        )


def examples(*lines: str) -> str:
    """The end of a verb's help: command lines as they are, each on its own line."""
    return "\b\n" + "\n  ".join(["Examples:" if len(lines) > 1 else "Example:", *lines])


def display(quiet: bool = False) -> "Display":
    """Progress on stderr, or none."""
    from deltaw.show.progress import Display

    return Display(quiet=quiet)


def show(result: Result | None, as_json: bool, *, now: bool = False) -> None:
    """A verb's Result on stdout, as JSON or as text for people, and its exit code. None: another process shows it.
    `now`: the verb goes on, and whoever reads a pipe mustn't wait for its end."""
    if result is None:
        return
    print(_json(result) if as_json else result.text, flush=now)
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def _json(result: Result) -> str:
    """On one line; escaped where its letters can't be printed, so that nothing is lost."""
    text = json.dumps(result.data, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(result.data)
    return text
