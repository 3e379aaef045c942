"""Ollama's Modelfile: what to load, how a conversation is written, where an answer ends, how long it may be.

Ollama doesn't run a GGUF's Jinja template. It wants a Go template, and without one it takes whichever of its own looks
most like the Jinja text, or none. So one is derived from what the template that was trained under *writes*, whoever's
it is. Three questions with two answers, each a word that can be recognised in the output, give

    bare    user₁  turn  answer₁  next  user₂  turn  answer₂  next  user₃  ask
    opens  system  closes user₁  turn  …                                            with a system message

`bare` holds a default system message if the template has one, and both ends of a system message may lie within the
first user's turn (Llama 2, Gemma). As a Go template:

    {{ if .System }}opens{{ .System }}closes{{ else }}bare{{ end }}
    {{ range }} user: {{ .Content }}turn, in the last message ask    assistant: {{ .Content }}next, not in the last one

A template that writes anything else (the system message at the end, what depends on a message's number or text) doesn't
fit: the parts are put together again for conversations of other lengths and texts, and compared with what the
template writes. If they differ, no TEMPLATE is written, and a note says so.

The server itself adds the tokenizer's first token (`Renderer.opening`), so it is removed from `opens` and `bare`.
Quoting: a Modelfile's text ends at three quotes and loses what isn't printable, Go's ends at two braces; such pieces
are written as Go's string literals. A Modelfile has no escapes outside of that.

Rejected: a table of families by name (a template may be the user's own), and translating Jinja (a language into a
smaller one).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from deltaw.data.render import Renderer
from deltaw.errors import InputError
from deltaw.shipping.trained import Trained
from deltaw.shipping.usage import chats

FILE = "Modelfile"
SYSTEM, ANSWERS = "qzsystem", ("qzanswer1", "qzanswer2")
USERS = ("qzuser1", "qzuser2", "qzuser3")
# What the parts are held to: (system, user, answer, user, …).
TALKS = (
    ("", "Why?"),
    ("Be brief.", "What is 2 + 2?"),
    ("", "List:\n- a\n- b", 'It\'s {four}: "4".', "Sure?"),
    ("You know <b>it</b> all.", "1", "2", "3", "4", "5", "6", "7"),
)


@dataclass(frozen=True)
class Turns:
    """What a template writes around texts. `system`: (opens, closes), or None where it has no system message."""

    bare: str
    turn: str
    next: str
    ask: str
    system: tuple[str, str] | None = None

    def write(self, talk: Sequence[str]) -> str:
        """The text of (system, user, answer, user, …), to be answered."""
        text = self.bare
        if talk[0]:
            assert self.system is not None
            text = talk[0].join(self.system)
        for number, content in enumerate(talk[1:], 1):
            between = self.next if number % 2 == 0 else self.ask if number == len(talk) - 1 else self.turn
            text += content + between
        return text

    def go(self) -> str:
        """The same as Ollama's Go template."""
        bare, turn, following, ask = map(go_text, (self.bare, self.turn, self.next, self.ask))
        last = "eq (len (slice $.Messages $i)) 1"
        if self.system:
            opens, closes = map(go_text, self.system)
            bare = f"{{{{ if .System }}}}{opens}{{{{ .System }}}}{closes}{{{{ else }}}}{bare}{{{{ end }}}}"
        if ask != turn:
            turn = f"{{{{ if {last} }}}}{ask}{{{{ else }}}}{turn}{{{{ end }}}}"
        return (
            bare + "{{ range $i, $_ := .Messages }}"
            '{{ if eq .Role "user" }}{{ .Content }}' + turn + '{{ else if eq .Role "assistant" }}{{ .Content }}'
            f"{{{{ if not ({last}) }}}}{following}{{{{ end }}}}"
            "{{ end }}{{ end }}"
        )


def modelfile(trained: Trained, model: str, *, adapter: str = "", about: str = "") -> tuple[str, list[str]]:
    """(the Modelfile, what is to be said of it). `model`, `adapter`: files beside it; `about`: a comment on FROM."""
    renderer, notes = trained.renderer, []
    lines = [f"# {' '.join(about.split())}"] * bool(about) + [f"FROM ./{model}"]
    if adapter:
        lines.append(f"ADAPTER ./{adapter}")
    try:
        template, more = _template(renderer) if chats(trained) else ("{{ .Prompt }}", [])
        lines.append(f'TEMPLATE """{template}"""')
        notes += more
    except InputError as error:
        notes.append(f"no TEMPLATE for Ollama (llama.cpp runs the template itself): {error.what}")
        lines.append("# The chat template has no form in Go: Ollama chooses one itself, so answers may suffer.")
    for stop in (renderer.decode([id], skip_special=False) for id in sorted(renderer.stop_ids)):
        if not stop or not stop.isprintable() or '"' in stop:
            notes.append(f"no PARAMETER stop for the token {stop!r}: a Modelfile can't hold it")
        else:
            lines.append(f'PARAMETER stop "{stop}"')
    if trained.config is not None:
        lines.append(f"PARAMETER num_ctx {trained.config.data.max_length}")
    return "\n".join(lines) + "\n", notes


def read_turns(renderer: Renderer) -> Turns:
    """What the renderer's chat template writes. Raises InputError where that isn't turns, saying why."""
    talk = [text for pair in zip(USERS, ANSWERS, strict=False) for text in pair] + [USERS[-1]]
    bare = _between(_written(renderer, ("", *talk)), talk)
    turns = Turns(bare[0], bare[1], bare[2], bare[-1])
    try:
        with_system = _between(_written(renderer, (SYSTEM, *talk)), [SYSTEM, *talk])
        turns = replace(turns, system=(with_system[0], with_system[1]))
    except InputError:
        pass  # it has none, or puts it elsewhere: the second shows below
    for sample in TALKS:
        if sample[0] and turns.system is None:
            if _is_written(renderer, sample):
                raise InputError("the chat template doesn't write the system message in front")
        elif turns.write(sample) != _written(renderer, sample):
            raise InputError("what the chat template writes isn't the same around every message")
    return turns


def go_text(text: str) -> str:
    """`text` as part of a Go template that is to stand in a Modelfile."""
    return re.sub(r'\{+|"{3,}|[^\n\t -~]+', lambda part: _go_literal(part[0]), text)


def _go_literal(text: str) -> str:
    if text[0] not in '{"' and text.isprintable():
        return text
    if any("\ud800" <= sign <= "\udfff" for sign in text):
        raise InputError("the chat template writes half a character")
    signs = (f"\\{sign}" if sign in '"\\' else sign if " " <= sign <= "~" else f"\\U{ord(sign):08x}" for sign in text)
    return f'{{{{ "{"".join(signs)}" }}}}'


def _template(renderer: Renderer) -> tuple[str, list[str]]:
    turns, notes, opening = read_turns(renderer), [], renderer.opening
    if turns.system is None:
        notes.append("the chat template has no system message: Ollama's SYSTEM has no effect")
    if opening and turns.bare.startswith(opening):
        opens = turns.system and (turns.system[0].removeprefix(opening), turns.system[1])
        turns = replace(turns, bare=turns.bare.removeprefix(opening), system=opens)
    elif opening:
        notes.append(f"it was trained without {opening} in front of a chat, and Ollama puts it there")
    return turns.go(), notes


def _written(renderer: Renderer, talk: Sequence[str]) -> str:
    roles = ["system", *("user" if number % 2 == 0 else "assistant" for number in range(len(talk) - 1))]
    messages = [{"role": role, "content": text} for role, text in zip(roles, talk, strict=True) if text]
    return renderer.chat_prompt(messages)


def _is_written(renderer: Renderer, talk: Sequence[str]) -> bool:
    try:
        return talk[0] in _written(renderer, talk)
    except InputError:
        return False


def _between(text: str, words: Sequence[str]) -> list[str]:
    """What stands before, between and behind `words`. Raises InputError unless each is there once, in their order."""
    places = [text.find(word) for word in words]
    if any(text.count(word) != 1 for word in words) or places != sorted(places):
        raise InputError("the chat template doesn't write every message once, one after the other")
    ends = [(0, 0), *((place, place + len(word)) for place, word in zip(places, words, strict=True)), (len(text), 0)]
    return [text[end:begin] for (_, end), (begin, _) in pairwise(ends)]
