"""`deltaw inspect`: what a fine-tune did to the weights (analysis/report.py), as a page and as a few lines."""

from contextlib import nullcontext
from pathlib import Path

from deltaw.analysis.report import PAGE, inspect
from deltaw.files.lock import claimed_file
from deltaw.show.progress import Display
from deltaw.show.result import Result


def inspect_named(name: str, *, base: str | None, page: str | None, display: Display) -> Result:
    """The page goes into the folder that was named unless another place is given."""
    target = Path(page) if page else Path(name) / PAGE
    with claimed_file(target) if page or Path(name).is_dir() else nullcontext():  # else there is nothing to inspect
        report = inspect(name, base=base, page=target, display=display)
        path = report.write(page)
    return Result(report.to_json(), f"{report.gist()}\n\npage: {path}")
