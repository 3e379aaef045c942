"""`deltaw generate`: one prompt continued."""

import sys
from collections.abc import Callable
from typing import Any

from deltaw.errors import InputError
from deltaw.generate.sampling import Sampling
from deltaw.model import open_model
from deltaw.show.progress import Display
from deltaw.show.result import Result

STDIN = "-"


def generate_named(
    name: str,
    prompt: str,
    *,
    base: str | None,
    use_adapter: bool,
    as_chat: bool,
    sampling: dict[str, Any],
    show: Callable[[str], None],
    display: Display,
) -> Result:
    """`show` is given the answer piece by piece as it comes, so the Result's text is empty: all has been shown."""
    text = _stdin() if prompt == STDIN else prompt
    asked = [{"role": "user", "content": text}] if as_chat else text
    fields = Sampling.checked(**sampling).model_dump()  # before the weights are read
    model = open_model(name, base=base, display=display)
    answer = ""
    for piece in model.stream(asked, adapter=use_adapter, **fields):
        answer += piece
        show(piece)
    return Result({"prompt": text, "text": answer, "adapter": model.attached is not None and use_adapter}, "")


def _stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"stdin isn't {error.encoding} text", fix="send the prompt as UTF-8") from None
