"""How a text is asked: as it is, or as a user's message through the chat template.

An adapter answers what looks like its training. So the form follows the training, which the adapter's record tells
(`BaseId`): whether its rows went through the chat template, and the system prompt, where all of them had the same one.
A text becomes what a row of that training would have been; messages are given as they are, since whoever writes them
says himself what they begin with.

Where nothing is recorded (another tool's adapter, a base by itself) a text is a chat if there is a template: bases that
have one are nearly all tuned to chats, and every other program asks them so.

Rejected: leaving the system prompt out (a template may write one of its own in its place, which the adapter never saw);
guessing from the prompt.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from deltaw.data.document import Chat, Completion, Message, Single
from deltaw.errors import InputError
from deltaw.show.text import one_line

Prompt = str | Sequence[dict[str, Any]]  # a text, or a chat's messages
PLAIN = "plain"  # in place of a template's fingerprint: trained on texts as they are
LOOKED_AT = 200  # documents in which an example is looked for
LONGEST = 60  # characters of an example


@dataclass(frozen=True)
class Asking:
    """`chat`: through the template, with `system` in front if there is one. `why`, and how to have it `otherwise`: in
    words for people."""

    chat: bool
    system: str = ""
    why: str = ""
    otherwise: str = ""

    @property
    def start(self) -> list[Message]:
        """What a chat begins with."""
        return [{"role": "system", "content": self.system}] if self.system else []

    def prompt(self, text: str) -> Prompt:
        """What the model is given of a text."""
        return [*self.start, {"role": "user", "content": text}] if self.chat else text

    def words(self) -> str:
        """A line for people: how a text is asked, why, and how to have it otherwise."""
        system = f', with the system prompt "{one_line(self.system, 60)}"' if self.system else ""
        otherwise = f" ({self.otherwise})" if self.otherwise else ""
        return f"asked as {'a chat' if self.chat else 'plain text'}{system}: {self.why}{otherwise}"

    def changed(self, *, chat: bool | None = None, system: str | None = None, template: bool = True) -> "Asking":
        """The same as the user wants it; None leaves it. `template`: whether there is one. Raises InputError."""
        if chat and not template:
            raise InputError("this base has no chat template, so it can't be asked as a chat", fix="leave --chat out")
        new = self
        if chat is not None and chat != self.chat:
            new = Asking(chat, why=f"{'--chat' if chat else '--raw'} was given, though {self.why}")
        if system is None:
            return new
        if not new.chat:
            fix = "leave --system out" + (", or ask as a chat: --chat" if template else "")
            raise InputError(f"a system prompt needs a chat, and texts are asked as they are: {new.why}", fix=fix)
        return replace(new, system=system)


def known(template: str, system: str, *, has_template: bool, adapter: bool) -> Asking:
    """How a text is asked of an opened model: `template` and `system` as the adapter's record has them."""
    as_it_is = "--raw asks the text as it is"
    if not has_template:
        return Asking(False, why="the base has no chat template")
    if template in (PLAIN, "none"):  # "none": no template when it was trained, and one by now
        return Asking(False, "", "the adapter was trained on plain text", "--chat asks as a chat")
    if template:
        return Asking(True, system, "the adapter was trained on chats", as_it_is)
    unknown = ", and the adapter doesn't say how it was trained" if adapter else ""
    return Asking(True, system, f"the base has a chat template{unknown}", as_it_is)


def behind(document: Single, system: str) -> Single:
    """A chat that has no system prompt with this one; anything else as it is."""
    if not isinstance(document, Chat) or _system(document):
        return document
    return replace(document, messages=(*Asking(True, system).start, *document.messages))


RAW = Asking(False)


def of_training(documents: Iterable[Single]) -> Asking:
    """How rows of this kind are asked: as chats, with the system prompt that all of them begin with."""
    first, systems = True, set[str]()
    for document in documents:
        if first and not isinstance(document, Chat):
            return Asking(False)
        first = False
        systems.add(_system(document))
        if len(systems) > 1:
            return Asking(True)
    return Asking(True, *systems)


def question_of(documents: Iterable[Single]) -> str:
    """A short question of these rows, for a command line that people paste; empty where there is none."""
    questions = (text for document in islice(documents, LOOKED_AT) for text in _questions(document))
    short = (text for text in questions if len(text) <= LONGEST and text.strip() == one_line(text, LONGEST))
    return next((text for text in short if text not in ("", "-")), "")


def _system(document: Single) -> str:
    if not isinstance(document, Chat) or document.messages[0]["role"] != "system":
        return ""
    return str(document.messages[0]["content"])


def _questions(document: Single) -> Iterator[str]:
    match document:
        case Completion(prompt=prompt):
            yield prompt
        case Chat(messages=messages):
            yield from [message["content"] for message in messages if message["role"] == "user"][:1]
        case _:
            yield " ".join(document.text.split()[:5])
