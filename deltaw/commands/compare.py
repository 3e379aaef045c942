"""`deltaw compare`: which directions two adapters share (analysis/compare.py), as a page and in a few lines."""

from pathlib import Path

from deltaw.adapter.file import Adapter
from deltaw.analysis.compare import compare
from deltaw.analysis.compare_page import in_words, page_of
from deltaw.analysis.page import write
from deltaw.files.lock import claimed_file
from deltaw.show.progress import Display
from deltaw.show.result import Result


def compare_named(one: str, other: str, page: str, *, display: Display) -> Result:
    """Writes the page. Raises InputError: adapters of other bases, no module in common."""
    with claimed_file(Path(page)):
        first, second = (Adapter.load(name) for name in (one, other))
        with display.task("comparing", len(first.factors.keys() & second.factors.keys())) as progress:
            comparison = compare(first, second, progress=progress)
        write(page_of(comparison, one, other), Path(page))
    text = "\n".join([*in_words(comparison, one, other), "", f"page: {page}"])
    return Result({"one": one, "other": other, **comparison.to_json()}, text)
