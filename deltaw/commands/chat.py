"""A conversation in the terminal: one adapter, one base, and a switch between them."""

import sys
from typing import Any

from deltaw.errors import InputError
from deltaw.generate.sampling import Sampling
from deltaw.model import Model, open_model
from deltaw.show.progress import Display

HELP = "/base asks the base model, /adapter the adapter, /new starts over, Ctrl-D leaves"

Message = dict[str, str]


def chat_named(
    name: str, *, base: str | None, system: str | None, use_adapter: bool, sampling: dict[str, Any], display: Display
) -> None:
    """`deltaw chat`: a conversation has no Result; what was said is on the screen."""
    fields = Sampling.checked(**sampling).model_dump()  # before the weights are read
    talk(open_model(name, base=base, display=display), system=system, use_adapter=use_adapter, sampling=fields)


def talk(model: Model, *, system: str | None, use_adapter: bool, sampling: dict[str, Any]) -> None:
    """Read lines from stdin, stream answers to stdout, until the end of input.

    A model without a chat template, or an adapter that was trained on plain prompts, gets each line as a prompt of its
    own; otherwise the conversation so far goes through the template, without its oldest turns once it is too long.
    """
    start = [{"role": "system", "content": system}] if system else []
    turns: list[Message] = []
    plain, forgot = model.plain_prompts, False
    print(HELP + ("; each line is a prompt of its own" if plain else ""), file=sys.stderr)
    while True:
        line = _read("base> " if not use_adapter else "> ")
        if line is None:
            return
        if line in ("/base", "/adapter"):
            use_adapter = line == "/adapter"
        elif line == "/new":
            turns, forgot = [], False
        elif line.startswith("/"):
            print(HELP, file=sys.stderr)
        elif line:
            question = {"role": "user", "content": line}
            recent, why = ([], None) if plain else _recent(model, start, turns, question, sampling["max_new_tokens"])
            prompt = line if plain else [*start, *recent, question]
            if problem := _problem(model, prompt):
                print(problem, file=sys.stderr)
                continue
            if why and not forgot:
                print(f"(the oldest turns are left out: {why})", file=sys.stderr)
                forgot = True
            turns = [*recent, question, {"role": "assistant", "content": _answer(model, prompt, use_adapter, sampling)}]


def _recent(
    model: Model, start: list[Message], turns: list[Message], question: Message, answer: int
) -> tuple[list[Message], str | None]:
    """The latest of `turns` that fit beside the question and an answer of as many tokens, or of a quarter of the
    context; and why the others don't. A question goes with its answer: templates want roles that alternate.
    """
    room, why = model.context - min(answer, model.context // 4), None
    while turns:
        try:
            if len(model.renderer.prompt_ids([*start, *turns, question])) <= room:
                break
            why = f"the context holds {model.context:,} tokens"
        except InputError as error:  # an answer that can't be sent back
            why = error.what
        turns = turns[2:]
    return turns, why


def _problem(model: Model, prompt: Any) -> str | None:
    """Why the model can't be asked this, if it can't."""
    try:
        tokens = len(model.renderer.prompt_ids(prompt))
    except InputError as error:
        return error.what
    if tokens < model.context:
        return None
    return f"this is {tokens:,} tokens, and the context holds {model.context:,}, answer included: shorten it"


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
