"""`deltaw train`, and `deltaw demo`, which is a run file that comes with deltaw.

What can be refused by looking at the run file and the run folder alone is refused before torch is imported, which takes
seconds: hence the imports inside functions.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from deltaw.commands.demo import check_packages, demo_config
from deltaw.config import RunConfig, load_config
from deltaw.errors import DeltawError, InputError
from deltaw.files.paths import written
from deltaw.machine.waiting import choose_waiting
from deltaw.run import Run
from deltaw.show.progress import Display
from deltaw.show.result import Result
from deltaw.training.stop import Stopped
from deltaw.training.world import World


def train_named(
    run: Path,
    overrides: Sequence[str],
    *,
    replace: bool,
    allow: bool,
    extend: bool,
    allow_code: bool,
    display: Display,
) -> Result | None:
    """A run file is trained, an interrupted run's folder is resumed. `replace` is for the former; for the latter are
    `allow`, to go on with other settings, `extend`, to go on although it is finished, and `allow_code`, to run the code
    of a metric that it names. None in a process whose result another one shows (torchrun)."""
    if not run.is_dir():
        if extend:
            raise InputError(f"{run} isn't a run's folder, and only a finished run can be extended")
        return _train(load_config(run, overrides), replace, display)
    if World.of_environment().is_alone:
        Run(run).check_resumable(overrides, extend=extend)
        choose_waiting(display.say)

    def work() -> None:
        from deltaw.training.run import resume

        resume(run, overrides, allow=allow, extend=extend, allow_code=allow_code, display=display)

    return _shown(work, run)


def demo_named(output: str, *, display: Display) -> Result | None:
    """The demo into a run folder, in place of an earlier one there. Raises InputError where its packages aren't."""
    check_packages()
    return _train(demo_config(written(output)), True, display)


def _train(config: RunConfig, replace: bool, display: Display) -> Result | None:
    if World.of_environment().is_alone:  # else rank 0 tells the others, once they are joined
        Run.check(config, replace=replace)
        choose_waiting(display.say)

    def work() -> None:
        from deltaw.training.run import train

        train(config, replace=replace, display=display)

    return _shown(work, Path(config.output))


def _shown(work: Callable[[], None], folder: Path) -> Result | None:
    """What came of `work`, in the process that tells it: an error is said once, however many processes end with it."""
    world = World.of_environment()
    try:
        work()
    except (DeltawError, Stopped) as error:
        if not world.speaks:
            raise SystemExit(error.exit_code) from None
        raise
    return _summary(folder) if world.is_first else None


def _summary(folder: Path) -> Result:
    from deltaw.training.result import summary

    run = Run(folder)
    return Result(run.read_json(run.result), summary(run))
