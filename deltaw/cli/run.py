"""Verbs on a run file or a run's folder."""

from pathlib import Path
from typing import Annotated

import typer

from deltaw.cli.app import AllowCode, Json, Quiet, app, as_path, display, examples, show

RunFile = Annotated[Path, typer.Argument(help="A run file.", callback=as_path)]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings that replace the run file's: key=value.")]


@app.command(epilog=examples("deltaw demo"))
def demo(
    output: Annotated[str, typer.Option(help="The run folder.", callback=as_path)] = "runs/demo", as_json: Json = False
) -> None:
    """Teach a small model to pronounce English words. Real data, 135M parameters, minutes on a CPU."""
    from deltaw.commands.train import demo_named

    show(demo_named(output, display=display()), as_json)


@app.command(
    epilog=examples(
        "deltaw train run.yaml train.lr=1e-3",
        "deltaw train runs/first    (resumes)",
        "deltaw train runs/first train.epochs=3 --extend    (goes on, when it is finished)",
        "deltaw train run.yaml adapter.from=runs/first    (starts from its adapter)",
        "deltaw train recipes/demo.yaml    (comes with deltaw, and so do text and chat-classification)",
    )
)
def train(
    run: Annotated[Path, typer.Argument(help="A run file, or the folder of a run to resume.", callback=as_path)],
    overrides: Overrides = None,
    replace: Annotated[bool, typer.Option("--replace", help="Discard an earlier run in the output folder.")] = False,
    allow: Annotated[bool, typer.Option("--allow", help="Resume even though settings have changed.")] = False,
    extend: Annotated[bool, typer.Option("--extend", help="Go on with a finished run: train.epochs=3.")] = False,
    allow_code: AllowCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an adapter, or resume an interrupted run."""
    from deltaw.commands.train import train_named

    options = {"replace": replace, "allow": allow, "extend": extend, "allow_code": allow_code}
    show(train_named(run, overrides or (), **options, display=display(quiet)), as_json)


@app.command(
    epilog=examples(
        "deltaw sweep run.yaml train.lr=1e-4,3e-4,1e-3 adapter.rank=4,16 train.seed=0,1,2",
        "deltaw sweep run.yaml train.lr=1e-4,3e-4,1e-3 --halving    (the worse half stops early)",
        "deltaw sweep --runs alice.yaml bob.yaml    (each its own data, one base)",
        "deltaw sweep runs/first    (resumes, and so does the same command line)",
    )
)
def sweep(
    names: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="A run file and values to try; or the folder of a sweep to resume."),
    ],
    runs: Annotated[bool, typer.Option("--runs", help="The names are run files, one for each run.")] = False,
    output: Annotated[str | None, typer.Option("--output", "-o", help="The sweep's folder.", callback=as_path)] = None,
    halving: Annotated[
        bool, typer.Option("--halving", help="Stop the worse half of the settings early, by held-out loss.")
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Discard earlier runs in the way.")] = False,
    allow_code: AllowCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train several adapters on one base at once. Values to compare, or many run files; one copy of the base."""
    from deltaw.commands.sweep import sweep_named

    flags = {"runs": runs, "halving": halving, "replace": replace, "allow_code": allow_code}
    show(sweep_named(names, output=output, **flags, display=display(quiet)), as_json)


@app.command("verify-resume", epilog=examples("deltaw verify-resume run.yaml"))
def verify_resume(
    run: RunFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=2, help="How many steps to take, stopping once after each.")] = 4,
    as_json: Json = False,
) -> None:
    """Prove that a stopped run ends with the same bits. It is tried with this run file, on this machine."""
    from deltaw.commands.verify_resume import verify_resume_named

    show(verify_resume_named(run, overrides or (), steps=steps, display=display(as_json)), as_json)


@app.command(epilog=examples("deltaw preview run.yaml -n 5"))
def preview(
    run: RunFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("-n", min=0, help="How many examples to show.")] = 3,
    as_json: Json = False,
) -> None:
    """Show what a run would train on. Examples with the trained tokens marked, counts, warnings; loads no model."""
    from deltaw.commands.preview import preview_named

    show(preview_named(run, overrides or (), rows=rows, display=display(as_json)), as_json)


@app.command(epilog=examples("deltaw plan run.yaml", "deltaw plan run.yaml train.tokens_per_batch=4096 --json"))
def plan(run: RunFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Rehearse a run: memory, time, disk, data. Takes about a minute and leaves nothing behind."""
    from deltaw.commands.plan import plan_named

    show(plan_named(run, overrides or (), display=display(as_json)), as_json)


@app.command(epilog=examples("deltaw runs", "deltaw runs experiments --sort loss"))
def runs(
    folder: Annotated[str, typer.Argument(help="The folder that the runs are in.", callback=as_path)] = "runs",
    by: Annotated[
        str, typer.Option("--sort", help="when (the newest first), name, loss, or a metric (the best first).")
    ] = "when",
    as_json: Json = False,
) -> None:
    """List the runs in a folder: settings, figures and how far each has come."""
    from deltaw.commands.runs import runs_named

    show(runs_named(folder, by=by), as_json)
