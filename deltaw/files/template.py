"""A chat template: untrusted Jinja -> text, in the bounded process (bounded.py).

Templates come from strangers and are programs, so none is compiled or run here. A row that is late, or that the worker
dies of, is rejected like any other that the template refuses; a template that does so `PATIENCE` times in a row is an
error, since a million rows at two seconds each are three weeks.

Many rows are sent at once, each with all the texts of it that masks are proven with (`render.py`): a round trip for
each text would cost as much as rendering it. Their answers come together, too. If one is late then it isn't known which
row that is due to; so what is missing is asked for once more, and this time each answer is told as soon as it is there.

Rejected: rendering in this process, as transformers does, with bounds on `*`, `range` and the output (a loop that
writes nothing needs a deadline, a million joined words need a limit of memory, and a signal's handler can interrupt
neither a C function nor another thread).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

from deltaw.errors import InputError, Rejected
from deltaw.files.bounded import Failed, line, worker

MAX_TEMPLATE = 2**20  # characters; the longest in use are under 100,000
SECONDS = 2.0
PATIENCE = 3
BATCH_ROWS, BATCH_BYTES = 256, 2**20
TOGETHER = 0.1  # seconds in which answers are gathered before they are told

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Asked(NamedTuple):
    """A row for a template: plain JSON, and the prefixes (n, generation prompt) of its messages to be written."""

    messages: Sequence[Any]
    tools: Sequence[Any]
    prefixes: Sequence[tuple[int, bool]]


class Unfinished(Rejected):
    """The template took too long over it, or too much memory."""


class Template:
    """A compiled chat template. `variables` are what it may name besides the messages (`eos_token`, …), `name` is what
    errors call it; `words` are the texts and attributes that it names."""

    def __init__(self, source: str, variables: Mapping[str, str], name: str = "the chat template") -> None:
        if len(source) > MAX_TEMPLATE:
            raise InputError(f"{name} has {len(source):,} characters; at most {MAX_TEMPLATE:,} are read")
        self._name = name
        self._failures = 0  # since the last row that came to an end
        self.fingerprint = sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        known = dict(variables)
        self._id = sha256(json.dumps([source, known]).encode()).hexdigest()
        self._compile = line({"id": self._id, "source": source, "variables": known, "alarm": _alarm()})
        try:
            with worker().asking(self._compile, SECONDS) as process:
                answer = process.answer()
        except Failed as failed:
            raise self._unusable(f"can't be compiled: {failed}") from None
        if "error" in answer:
            where = f" (line {answer['line']})" if answer["line"] else ""
            raise self._unusable(f"can't be compiled{where}: {answer['error']}")
        self.words: frozenset[str] = frozenset(answer["words"])

    def render(self, messages: Sequence[Any], tools: Sequence[Any], *, generation_prompt: bool) -> str:
        """The text of `messages`, which are plain JSON. Raises Rejected with whatever the template objects to."""
        (texts,) = self.render_rows([Asked(messages, tools, [(len(messages), generation_prompt)])])
        if isinstance(texts, Rejected):
            raise texts
        return str(texts[0])

    def render_rows(self, rows: Sequence[Asked]) -> list[list[str | Rejected] | Rejected]:
        """For each row the texts of its prefixes, or why there is none; a row without its first text has none at all.

        Raises InputError where several rows one after the other took too long or too much memory.
        """
        lines = [line(row) for row in rows]
        results: list[list[str | Rejected] | Rejected] = []
        late = TOGETHER
        while len(results) < len(lines):
            batch = _batch(lines[len(results) : len(results) + BATCH_ROWS])
            try:
                for answer in self._answers(batch, late):
                    results.append(_texts(answer))
                    self._failures = 0
                late = TOGETHER
            except Failed as failed:
                if late and len(batch) > 1:
                    late = 0.0
                    continue
                self._failures += 1
                if self._failures == PATIENCE:
                    raise self._unusable(f"can't be used: {failed}, {PATIENCE} rows in a row") from None
                results.append(Unfinished(f"the chat template can't render it: {failed}"))
        return results

    def _answers(self, lines: Sequence[bytes], late: float) -> Iterator[list[Any]]:
        """The worker's answer to every row, each in time. One that has just been started is told of the template."""
        request = b"".join([line({"id": self._id, "rows": len(lines), "late": late, "alarm": _alarm()}), *lines])
        with worker().asking(request, SECONDS) as process:
            answer = process.answer()
            if answer == {"unknown": True}:
                process.send(self._compile)
                process.answer()
                process.send(request)
                answer = process.answer()
            yield answer
            for _ in lines[1:]:
                yield process.answer()

    def _unusable(self, reason: str) -> InputError:
        return InputError(f"{self._name} {reason}", fix="set data.template to chatml, or to a .jinja file that works")


def _alarm() -> int:
    """Seconds after which the worker ends by itself, where nobody is left to end it."""
    return int(SECONDS) + 1


def _batch(lines: Sequence[bytes]) -> list[bytes]:
    """As many of them as may be sent at once, but one at least."""
    batch, size = [lines[0]], len(lines[0])
    for row in lines[1:]:
        size += len(row)
        if size > BATCH_BYTES:
            break
        batch.append(row)
    return batch


def _texts(answer: list[Any]) -> list[str | Rejected] | Rejected:
    """What the worker says of a row: its docstring has the form."""
    texts: list[str | Rejected] = []
    for item in answer:
        if isinstance(item, str):
            texts.append(Rejected(f"the chat template refuses it: {item}"))
            continue
        length, rest = item
        texts.append(str(texts[0])[:length] + rest if texts else rest)
    return texts[0] if isinstance(texts[0], Rejected) else texts
