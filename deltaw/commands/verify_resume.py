"""`deltaw verify-resume`: that a stopped run ends with the same bits (training/verify.py)."""

from collections.abc import Sequence
from pathlib import Path

from deltaw.config import load_config
from deltaw.show.progress import Display
from deltaw.show.result import Result


def verify_resume_named(run: Path, overrides: Sequence[str], *, steps: int, display: Display) -> Result:
    """Exit code 1 where the bits differ."""
    config = load_config(run, overrides)
    from deltaw.training.verify import verify_resume  # torch takes seconds, a wrong run file none

    verified = verify_resume(config, steps, display)
    return Result(verified.to_json(), verified.text(), 0 if verified.exact else 1)
