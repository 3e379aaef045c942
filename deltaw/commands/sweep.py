"""`deltaw sweep`: several runs on one base at once (deltaw/sweep/): of a run file with values to try, of several run
files, or in the folder of a sweep that was stopped.

The same command line resumes what it began. What the command line alone tells to be wrong is refused before torch is
imported, as in `deltaw train`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deltaw.errors import InputError, command
from deltaw.machine.waiting import choose_waiting
from deltaw.show.progress import Display
from deltaw.show.result import Result
from deltaw.show.table import fitted, terminal_width
from deltaw.show.text import counted, rounded
from deltaw.sweep.folder import START, SweepFolder, begun_before, held, is_sweep
from deltaw.sweep.grid import Grid, of_grid, of_runs

if TYPE_CHECKING:
    from deltaw.sweep.standing import Ranking


def sweep_named(
    names: Sequence[str],
    *,
    runs: bool,
    output: str | None,
    halving: bool,
    replace: bool,
    allow_code: bool,
    display: Display,
    width: int | None = None,
) -> Result:
    """`names`: a run file and settings; with `runs`, run files; or a sweep's folder. Raises InputError."""
    asked = _asked(names, runs=runs, output=output, halving=halving)
    if isinstance(asked, SweepFolder):
        sweep, new = asked, False
    else:
        before = None if replace else begun_before(asked)
        sweep, new = before or SweepFolder(asked), before is None
    if not sweep.to_train and not new:
        display.say("the sweep is finished")
    with held(sweep.grid, new=new, replace=replace):  # before anything is loaded
        pass
    choose_waiting(display.say)

    from deltaw.sweep.sweep import run_sweep

    ranking = run_sweep(sweep, new=new, replace=replace, allow_code=allow_code, display=display)
    data = {"folder": str(sweep.path), "page": str(sweep.page), **ranking.to_json()}
    failed = any(run.state == "failed" for run in ranking.runs)
    return Result(data, _text(sweep, ranking, width or terminal_width()), exit_code=int(failed))


def _asked(names: Sequence[str], *, runs: bool, output: str | None, halving: bool) -> Grid | SweepFolder:
    """What the command line asks for."""
    if not names:
        raise InputError("deltaw sweep wants a run file and values to try", fix=START)
    folder = Path(output) if output else None
    if runs:
        if settings := [name for name in names if "=" in name and not Path(name).exists()]:
            raise InputError(f"--runs takes run files, and {settings[0]} is a setting", fix="write it into the files")
        return of_runs([Path(name) for name in names], folder, halving=halving)
    first, *settings = names
    if Path(first).is_dir():
        if is_sweep(Path(first)) and not settings and folder is None:
            return SweepFolder.read(Path(first))
        if is_sweep(Path(first)):
            fix = f"resume it as it is: {command('sweep', Path(first))}"
            raise InputError(f"{first} is a sweep that has begun, and its settings stand", fix=fix)
        raise InputError(f"{first} isn't a sweep's folder", fix=START)
    if folder is not None:
        settings = [*settings, f"output={output}"]
    return of_grid(Path(first), settings, halving=halving)


def _text(sweep: SweepFolder, ranking: "Ranking", width: int) -> str:
    """The table of the runs, the best first, and what to make of it."""
    head = ["run", "state", "steps", "loss", "training loss"]
    rows = sorted(ranking.runs, key=lambda run: (run.loss is None, run.loss or 0.0))
    cells = [
        [
            run.variant.name,
            run.state,
            f"{run.step:,}",
            "" if run.loss is None else rounded(run.loss),
            "" if run.train_loss is None else rounded(run.train_loss),
        ]
        for run in rows
    ]
    text, _ = fitted(cells, head, align="llrrr", drop=["training loss", "steps"], width=width)
    lines = [text, "", counted(len(rows), "run"), ranking.verdict()]
    lines += [f"{run.variant.name}: {run.why}" for run in rows if run.why]
    lines.append(f"page:   {sweep.page}")
    if winner := ranking.winner:
        lines.append(f"winner: {winner.folder}\nnext:   {command('chat', Path(winner.folder))}")
    return "\n".join(lines)
