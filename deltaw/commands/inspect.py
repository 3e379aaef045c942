"""`deltaw inspect`: what a fine-tune did to the weights (analysis/report.py) and what that does to the model
(analysis/effect/effect.py), as a page and as a few lines.

The update is tried where there is something to try it on: with a run, which has rows, or on a data file. Otherwise, and
where the base isn't here or doesn't fit into memory, the page says why it wasn't. What was asked for in so many words
(a data file, --deep) is an error instead. A page that shows more is never replaced by one that shows less.
"""

from contextlib import nullcontext
from pathlib import Path

import torch

from deltaw.analysis.effect.effect import Effect, effect_of
from deltaw.analysis.report import PAGE, check_shows_more, inspect
from deltaw.errors import InputError
from deltaw.files.lock import claimed_file
from deltaw.named import Named
from deltaw.show.progress import Display
from deltaw.show.result import Result
from deltaw.training.memory import OutOfMemory, bounded, working_on


def inspect_named(
    name: str, data: str | None, *, base: str | None, page: str | None, deep: bool, display: Display
) -> Result:
    """The page goes into the folder that was named unless another place is given."""
    named = Named(name)
    target = Path(page) if page else Path(name) / PAGE
    with claimed_file(target) if page or Path(name).is_dir() else nullcontext():  # else there is nothing to inspect
        check_shows_more(target, deep=deep)  # before minutes of work
        effect = _tried(named, data, base, deep, display)
        report = inspect(named, base=base, page=target, effect=effect, display=display)  # a base that is missing first
        if isinstance(effect, str):
            check_shows_more(target, deep=deep, untried=effect)
        path = report.write(page)
    return Result(report.to_json(), f"{report.gist()}\n\npage: {path}")


def _tried(named: Named, data: str | None, base: str | None, deep: bool, display: Display) -> Effect | str:
    """What the update does, or why it wasn't tried."""
    try:
        with bounded(torch.device("cpu")), working_on("trying the update on its base"):
            return effect_of(named, data, base=base, deep=deep, display=display)
    except (InputError, OutOfMemory) as error:
        if data is not None or deep:
            raise
        return error.what
