"""A conversation in the terminal: one adapter, one base, and a switch between them."""

import sys
from typing import Any

from deltaw.model import Model

HELP = "/base asks the plain base, /adapter the adapter, /new forgets the conversation, Ctrl-D leaves"


def talk(model: Model, *, system: str | None, use_adapter: bool, sampling: dict[str, Any]) -> None:
    """Read lines from stdin, stream answers to stdout, until the end of input.

    A model without a chat template, or an adapter that was trained on plain prompts, gets each line as a prompt of its
    own; otherwise the conversation so far goes through the template.
    """
    history = [{"role": "system", "content": system}] if system else []
    start = list(history)
    plain = model.plain_prompts
    print(HELP + ("; each line is a prompt of its own" if plain else ""), file=sys.stderr)
    while True:
        line = _read("base> " if not use_adapter else "> ")
        if line is None:
            return
        if line in ("/base", "/adapter"):
            use_adapter = line == "/adapter"
        elif line == "/new":
            history = list(start)
        elif line.startswith("/"):
            print(HELP, file=sys.stderr)
        elif line:
            history.append({"role": "user", "content": line})
            answer = _answer(model, line if plain else history, use_adapter, sampling)
            history.append({"role": "assistant", "content": answer})


def _answer(model: Model, prompt: Any, use_adapter: bool, sampling: dict[str, Any]) -> str:
    """Streamed; Ctrl-C cuts the answer short and the conversation goes on."""
    answer = ""
    try:
        for piece in model.stream(prompt, adapter=use_adapter, **sampling):
            answer += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print(flush=True)
    return answer


def _read(prompt: str) -> str | None:
    """One line without its end, or None at the end of input."""
    if sys.stdin.isatty():
        try:
            return input(prompt).strip()
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()
            return None
    line = sys.stdin.readline()
    return line.strip() if line else None
