"""`deltaw verify A B`: whether two places answer alike (shipping/verify/compare.py), with a page if one is wanted."""

from contextlib import nullcontext
from pathlib import Path

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
    with claimed_file(Path(page)) if page is not None else nullcontext():
        result = verify(a, b, data=data, prompts=prompts, base=base, display=display)
        text = result.text()
        if page is not None:
            from deltaw.shipping.verify.page import write_page  # matplotlib takes a second

            write_page(result, Path(page))
            text += f"\n\npage: {page}"
    return Result(result.to_json(), text, 0 if result.agree else 1)
