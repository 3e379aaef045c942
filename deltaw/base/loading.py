"""What every load through transformers needs: silence, and a check that all weights found their places."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from deltaw.errors import InputError, listed


def check_loading(where: Path, info: Mapping[str, Any]) -> None:
    """Raise InputError unless the files held exactly the model's weights (transformers' loading info)."""
    problems = [f"{name}: not in the files" for name in sorted(info["missing_keys"])]
    problems += [f"{name}: no place for it in the model" for name in sorted(info["unexpected_keys"])]
    problems += [f"{_first(item)}: wrong shape" for item in info.get("mismatched_keys", ())]
    problems += [str(message).splitlines()[0] for message in info.get("error_msgs", ())]
    if problems:
        raise InputError(
            f"{where}: the weights don't fit config.json:\n{listed(problems, 2)}",
            fix="download the whole model again",
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars and log lines below an error; afterwards as it was."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first(item: Any) -> str:
    return str(item[0] if isinstance(item, tuple) else item)
