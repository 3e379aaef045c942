"""`deltaw verify A B`: whether two places answer alike (shipping/verify/compare.py), with a page if one is wanted."""

from contextlib import nullcontext
from pathlib import Path

from deltaw.errors import InputError
from deltaw.files.lock import claimed_file
from deltaw.shipping.verify.compare import verify
from deltaw.show.progress import Display
from deltaw.show.result import Result


def verify_named(
    a: str,
    b: str,
    *,
    data: str | None,
    prompts: int,
    base: str | None,
    page: str | None,
    display: Display,
) -> Result:
    """Exit code 1 where they don't agree. Raises InputError and RunError, as `verify` does."""
    if page is not None and not Path(page).parent.is_dir():
        raise InputError(f"{page}: the page's folder doesn't exist", fix="make it, or choose another")
    if page is not None and Path(page).is_dir():
        raise InputError(f"{page} is a folder, and the page is a file", fix="name a file in it: -o page.html")
    with claimed_file(Path(page)) if page is not None else nullcontext():
        result = verify(a, b, data=data, prompts=prompts, base=base, display=display)
        text = result.text()
        if page is not None:
            from deltaw.shipping.verify.page import write_page  # matplotlib takes a second

            write_page(result, Path(page))
            text += f"\n\npage: {page}"
    return Result(result.to_json(), text, 0 if result.agree else 1)
