"""`deltaw train`, and `deltaw demo`, which is a run file that comes with deltaw.

What can be refused by looking at the run file and the run folder alone is refused before torch is imported, which takes
seconds: hence the imports inside functions.
"""

from collections.abc import Sequence
from pathlib import Path

from deltaw.commands.demo import DEMO, check_packages
from deltaw.config import RunConfig, load_config, parse_config
from deltaw.files.paths import written
from deltaw.run import Run
from deltaw.show.progress import Display
from deltaw.show.result import Result


def train_named(run: Path, overrides: Sequence[str], *, replace: bool, allow: bool, display: Display) -> Result:
    """A run file is trained, an interrupted run's folder is resumed. `replace` is for the former, `allow` for the
    latter: it may go on with other settings."""
    if not run.is_dir():
        return _train(load_config(run, overrides), replace, display)
    Run(run).check_resumable()
    from deltaw.training.run import resume

    resume(run, overrides, allow=allow, display=display)
    return _summary(run)


def demo_named(output: str, *, display: Display) -> Result:
    """The demo into a run folder, in place of an earlier one there. Raises InputError where its packages aren't."""
    check_packages()
    return _train(parse_config({**DEMO, "output": written(output)}), True, display)


def _train(config: RunConfig, replace: bool, display: Display) -> Result:
    Run.check(config, replace=replace)
    from deltaw.training.run import train

    train(config, replace=replace, display=display)
    return _summary(Path(config.output))


def _summary(folder: Path) -> Result:
    from deltaw.training.result import summary

    run = Run(folder)
    return Result(run.read_json(run.result), summary(run))
