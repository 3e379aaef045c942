"""A conversation in the terminal: one adapter, one base, and a switch between them."""

import sys
from dataclasses import dataclass, field
from typing import Any

from deltaw.data.asking import Asking
from deltaw.errors import InputError
from deltaw.generate.sampling import Sampling
from deltaw.model import Model, open_model
from deltaw.show.progress import Display

HELP = {
    "/base": "asks the base model",
    "/adapter": "asks the adapter",
    "/new": "starts over (or /clear, /reset)",
    "/system TEXT": "sets the system prompt and starts over",
    '"""': "begins and ends a message of several lines",
    "/quit": "leaves (or /exit, exit, quit, Ctrl-D)",
    "/help": "shows this",
}
LEAVE = ("/quit", "/exit", "/bye", "/q", "exit", "quit")
NEW = ("/new", "/clear", "/reset")
QUOTES = '"""'

Message = dict[str, str]


def chat_named(
    name: str,
    *,
    base: str | None,
    chat: bool | None,
    system: str | None,
    use_adapter: bool,
    sampling: dict[str, Any],
    display: Display,
) -> None:
    """`deltaw chat`: a conversation has no Result; what was said is on the screen."""
    fields = Sampling.checked(**sampling).model_dump()  # before the weights are read
    model = open_model(name, base=base, chat=chat, system=system, display=display)
    talk(model, use_adapter=use_adapter, sampling=fields)


@dataclass
class Talk:
    """A conversation as it stands. `turns`: what was said so far, question and answer in turn."""

    model: Model
    asking: Asking
    use_adapter: bool
    turns: list[Message] = field(default_factory=list)
    forgot: bool = False

    def command(self, line: str) -> None:
        """Do what a line that begins with a slash says."""
        word, _, rest = line.partition(" ")
        if word in NEW:
            self.turns, self.forgot = [], False
        elif word == "/base" and not rest:
            self.use_adapter = False
        elif word == "/adapter" and not rest and self.model.attached is None:
            _say("there is no adapter: the base is asked")
        elif word == "/adapter" and not rest:
            self.use_adapter = True
        elif word == "/system":
            self._system(rest.strip())
        else:
            _say("\n".join(f"  {name:14}{what}" for name, what in HELP.items()))

    def _system(self, text: str) -> None:
        try:
            self.asking = self.asking.changed(system=text)
        except InputError as error:
            _say(f"({error.what})")
            return
        self.turns, self.forgot = [], False

    def ask(self, line: str, sampling: dict[str, Any]) -> None:
        """Answer a line, with the conversation so far in front of it where that is a chat."""
        question, start, why = {"role": "user", "content": line}, self.asking.start, None
        prompt: Any = line
        if self.asking.chat:
            recent, why = _recent(self.model, start, self.turns, question, sampling["max_new_tokens"])
            prompt = [*start, *recent, question]
        if problem := _problem(self.model, prompt):
            _say(f"({problem})")
            return
        if why and not self.forgot:
            _say(f"(the oldest turns are left out: {why})")
            self.forgot = True
        answer = _answer(self.model, prompt, self.use_adapter, sampling)
        if self.asking.chat:
            self.turns = [*recent, question, {"role": "assistant", "content": answer}]


def talk(model: Model, *, use_adapter: bool, sampling: dict[str, Any]) -> None:
    """Read lines from stdin, stream answers to stdout, until the end of input or a word that leaves.

    Where texts are asked as they are, each line is a prompt of its own; otherwise the conversation so far goes through
    the template, without its oldest turns once it is too long.
    """
    talk = Talk(model, model.asking, use_adapter and model.attached is not None)
    _say(model.asking.words() + ("" if model.asking.chat else "; each line is a prompt of its own"))
    _say("/help lists the commands, /quit or Ctrl-D leaves")
    while (line := _message("> " if talk.use_adapter or model.attached is None else "base> ")) is not None:
        if line in LEAVE:
            return
        if line.startswith("/") and "\n" not in line:
            talk.command(line)
        elif line:
            talk.ask(line, sampling)


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
        tokens = len(model.prompt_ids(prompt, chat=False))
    except InputError as error:
        return error.what
    if tokens < model.context:
        return None
    return f"this is {tokens:,} tokens, and the context holds {model.context:,}, answer included: shorten it"


def _answer(model: Model, prompt: Any, use_adapter: bool, sampling: dict[str, Any]) -> str:
    """Streamed; Ctrl-C cuts the answer short and the conversation goes on."""
    answer = ""
    try:
        for piece in model.stream(prompt, adapter=use_adapter, chat=False, **sampling):
            answer += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print(flush=True)
    return answer


def _message(prompt: str) -> str | None:
    """What the user says: a line, or what stands between lines that begin and end with three quotes. None at the end
    of input."""
    line = _read(prompt)
    if line is None or not line.startswith(QUOTES):
        return line
    lines = [line.removeprefix(QUOTES)]
    while not lines[-1].rstrip().endswith(QUOTES):
        following = _read("... ", whole=True)
        if following is None:
            return None
        lines.append(following)
    return "\n".join([*lines[:-1], lines[-1].rstrip().removesuffix(QUOTES)]).strip("\n")


def _read(prompt: str, whole: bool = False) -> str | None:
    """One line without its end, or None at the end of input; `whole`: with the blanks around it."""
    if sys.stdin.isatty():
        try:
            line = input(prompt)
        except (EOFError, KeyboardInterrupt):
            print()
            return None
    else:
        line = sys.stdin.readline()
        if not line:
            return None
    return line.removesuffix("\n") if whole else line.strip()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
