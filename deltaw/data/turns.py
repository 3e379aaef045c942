"""Where an answer begins and ends in a chat template's output.

It is proven on prefixes, for each assistant turn i, from three texts the template writes:

    p = messages[:i] with the generation prompt     q = messages[:i+1]     f = all messages

If q starts with p, the rest of q is what the model must write, and its last control token ends the turn; if f starts
with q up to there, the mask holds in f. Where the proof fails (a template that drops the thinking from earlier turns)
that turn is left untrained and counted; where it fails for every turn the row is rejected. Rejected: searching the text
for the answer (an answer may stand in the question), and `{% generation %}` (most templates have none, and where they
do the end-of-turn token often falls outside: the model then never stops).

That needs a template which writes the assistant's header when it is asked to, and nothing that belongs to no turn. Not
all do, so every text goes through a `Frame`, found on a conversation u1 a1 u2 of planted words:

    first | u1 | … | a1 | between | u2        what stands around the words in the three messages
                   | a1 | after               the same where the answer is the last

- `closing`: what is written at the end of any text, asked or not: the next answer's header, or an end of document. It
  is what `after` has beyond its common beginning with `between`: only what follows an answer in a longer chat, too,
  belongs to it. That beginning still reaches into the next header, which `<|eot|><|start|>assistant` and
  `<|eot|><|start|>user` share: it ends where `between` ends as `first` does (the header of the first message), or,
  where a default system prompt hides that, in front of a control token that opens a role.
- `header`: what is written in front of an answer, but never as a generation prompt. It is given to the model like one.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from deltaw.errors import Rejected
from deltaw.files.template import Asked

USER, ANSWER, NEXT = "qzuserzq", "qzanswerzq", "qznextzq"
Controls = Callable[[str], list[re.Match[str]]]


@dataclass(frozen=True, slots=True)
class Frame:
    """What a template writes that it wasn't asked for (`closing`), and what it doesn't when asked (`header`)."""

    header: str = ""
    closing: str = ""

    def whole(self, text: str) -> str:
        """The text of finished turns."""
        return text.removesuffix(self.closing)

    def opened(self, text: str) -> str:
        """The text of turns with the generation prompt."""
        return self.whole(text) + self.header if self.header else text


def trial(system: bool = False) -> Asked:
    """The conversation of planted words, for templates that want one behind a system message."""
    roles = zip(("user", "assistant", "user"), (USER, ANSWER, NEXT), strict=True)
    messages = [{"role": role, "content": text} for role, text in [("system", "qz")] * system + list(roles)]
    return Asked(messages, [], [(n + system, prompt) for n, prompt in ((2, False), (1, True), (1, False), (3, False))])


def find_frame(texts: Sequence[str | Rejected], controls: Controls, stops: Collection[str]) -> Frame:
    """The frame of a template, from what it writes of `trial()`. `stops` are the tokens known to end a turn."""
    answered, prompt, asked_nothing, longer = (text if isinstance(text, str) else "" for text in texts)
    if answered.count(ANSWER) != 1 or USER not in answered:
        return Frame()
    lead, after = answered.split(ANSWER)
    asks = prompt != asked_nothing
    closing = _closing(after, longer, controls, stops)
    always = not asks and lead.startswith(asked_nothing) and asked_nothing.endswith(closing)
    if not always and not (controls(closing) and controls(after.removesuffix(closing))):
        closing = ""  # neither a prompt nor an end of document: it may be all that ends the turn
    if asks:
        return Frame("", closing)
    given = asked_nothing if lead.startswith(asked_nothing) else asked_nothing.removesuffix(closing)
    header = lead.removeprefix(given) if given and lead.startswith(given) else ""
    return Frame(header if header.strip() else "", closing)  # a blank in front belongs to the answer, as with Mistral's


def _closing(after: str, longer: str, controls: Controls, stops: Collection[str]) -> str:
    match = re.fullmatch(f"(.*){USER}.*{ANSWER}(.*){NEXT}.*", longer, re.DOTALL)
    if not match or match[2].startswith(after):
        return ""
    first, between = match.groups()
    shared = _common(after, between)
    end = len(between) - _common(first[::-1], between[::-1])
    if not 0 < end <= shared:
        end = _in_front_of_header(between[:shared], controls, stops)
    # Never inside a control token: two that end alike look like the end of one header.
    return after[max([end, *(token.end() for token in controls(after) if token.start() < end)]) :]


def _common(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    return next(
        (i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )


def _in_front_of_header(shared: str, controls: Controls, stops: Collection[str]) -> int:
    """Where an answer's end ends, in what follows it as much as a header does."""
    tokens = controls(shared)
    if not tokens:
        return shared.rfind("\n") + 1 or len(shared)  # a header in words stands in a line of its own
    opens = tokens[-1].end() == len(shared) and (len(tokens) > 1 or tokens[-1][0] not in stops)
    return tokens[-1].start() if opens else tokens[-1].end()


def find_answer(prompt: str, upto: str, full: str, controls: Controls) -> tuple[int, int, int] | None:
    """(begin, end, control tokens inside) of the answer between p and q in f; None where that can't be proven."""
    tokens = controls(upto[len(prompt) :])
    end = len(prompt) + tokens[-1].end() if tokens else len(upto)
    if not upto.startswith(prompt) or not full.startswith(upto[:end]):
        return None
    if len(upto[len(prompt) : end].strip()) <= sum(len(token[0]) for token in tokens):
        return None  # nothing but control tokens: training on it would teach silence
    return len(prompt), end, len(tokens)
