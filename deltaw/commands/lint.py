"""`deltaw lint`: what becomes of an adapter in each place where it may run (shipping/lint/lint.py)."""

from collections.abc import Sequence

from deltaw.shipping.lint.lint import lint
from deltaw.show.progress import Display
from deltaw.show.result import Result


def lint_named(adapter: str, *, base: str | None, to: Sequence[str], max_lora_rank: int, display: Display) -> Result:
    """Exit code 1 where it shouldn't be shipped."""
    verdict = lint(adapter, base=base, to=to, max_lora_rank=max_lora_rank, display=display)
    return Result(verdict.to_json(), verdict.text(), verdict.exit_code)
