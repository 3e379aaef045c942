"""Answers scored by another model, behind any OpenAI-compatible endpoint (`POST …/chat/completions`).

The judge sees one answer at a time, not which side gave it, at temperature 0, and is asked for one number from 0 to
`best`; the score is that number over `best`. Its last line must hold one number and nothing that could be another
(`7`, `Score: 7`, `7/10`): else it is asked once more, and then the row has no score. A row without one counts for
neither side, and is named: a 0 would look like a judgement.

A refusal that may pass (408, 409, 425, 429, 5xx) and a connection that breaks are tried again, `TRIES` times in all,
after as long as the server asks for, at most `LONGEST_WAIT` seconds. Whatever else goes wrong ends the command. What
was judged is kept (files/journal.py), and isn't asked for again.

`AT_ONCE` requests run side by side, on threads that don't keep a process alive: Ctrl-C leaves at once.

Rejected: showing both answers and asking which is better (the order sways the judge, Zheng et al. 2023, so each pair
has to be asked twice, and then ties need a rule).
"""

import os
import queue
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deltaw.config.tasks import JudgeConfig
from deltaw.errors import InputError, RunError
from deltaw.evaluation.metrics import Answer
from deltaw.files.client import FIRST_SECONDS, KEY, Client, Refused
from deltaw.show.text import one_line

TRIES, LONGEST_WAIT, AT_ONCE = 5, 60.0, 4
PASSING = (408, 409, 425, 429)
PROMPT = """You are grading an answer.

[Question]
{prompt}

[Correct answer]
{truth}

[Answer to grade]
{answer}

Give a score from 0 (wrong or useless) to {best} (as good as the correct answer). Reply with the number alone."""
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Judged:
    """A score from 0 to 1, None where the judge gave none; and what it said."""

    score: float | None
    reply: str


class Judge:
    """Raises InputError where the key that the config names isn't in the environment."""

    def __init__(self, config: JudgeConfig) -> None:
        key = os.environ.get(config.key, "")
        if not key and config.key != KEY:
            raise InputError(f"judge.key: the environment variable {config.key} is not set, or empty", fix="export it")
        self.config = config
        self._client = Client(config.url, key=key)
        self._body: dict[str, Any] = {"model": config.model, "temperature": 0, "max_tokens": config.max_new_tokens}

    def check(self) -> str:
        """Whether it can be reached, before a model answers for it; returns a warning, empty where there is none. A
        server needn't list its models, and may know one by another name than it lists. Raises InputError."""
        try:
            listed = self._client.ask("/models", seconds=FIRST_SECONDS)
            names = [str(one["id"]) for one in listed["data"]]
        except Refused as refused:
            if refused.status == 401:
                fix = f"its key is taken from {self.config.key}"
                raise InputError(f"the judge at {self.config.url} refuses: {refused}", fix=fix) from None
            return ""
        except RunError as error:
            raise InputError(f"judge: {error.what}", fix="start it, or change judge.url") from None
        except (KeyError, TypeError):
            return ""
        if not names or self.config.model in names:
            return ""
        return f"the judge at {self.config.url} lists no model {self.config.model!r}: {one_line(', '.join(names), 200)}"

    def score(self, row: Answer) -> Judged:
        """Raises RunError where no answer comes."""
        reply = ""
        for _ in range(2):
            reply = self._reply(self._asked(row))
            if (number := score_in(reply, self.config.best)) is not None:
                return Judged(number / self.config.best, reply)
        return Judged(None, reply)

    def score_all(self, rows: Mapping[str, Answer]) -> Iterator[tuple[str, Judged]]:
        """Each row's score, as they come. Raises RunError where one can't be had."""
        waiting: queue.SimpleQueue[tuple[str, Answer]] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[str, Judged | Exception]] = queue.SimpleQueue()
        over = threading.Event()
        for item in rows.items():
            waiting.put(item)

        def work() -> None:
            while not over.is_set():
                try:
                    name, row = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((name, self.score(row)))
                except Exception as error:  # which whoever waits is told
                    done.put((name, error))

        for _ in range(min(AT_ONCE, len(rows))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in rows:
                name, result = done.get()
                if isinstance(result, Exception):
                    raise result
                yield name, result
        finally:
            over.set()

    def _asked(self, row: Answer) -> str:
        fields = {"prompt": row.prompt, "answer": row.given, "truth": row.truth, "best": str(self.config.best)}
        return re.sub(r"\{(prompt|answer|truth|best)\}", lambda match: fields[match[1]], self.config.prompt or PROMPT)

    def _reply(self, prompt: str) -> str:
        for attempt in range(1, TRIES + 1):
            try:
                body = {**self._body, "messages": [{"role": "user", "content": prompt}]}
                return _text(self._client.ask("/chat/completions", body))
            except Refused as refused:
                if refused.status == 400 and self._without_what_it_refuses(refused.words):
                    continue
                wait = refused.again_in
                if attempt == TRIES or not (refused.status in PASSING or refused.status >= 500):
                    fix = f"its key is taken from {self.config.key}" if refused.status in (401, 403) else None
                    raise RunError(f"the judge at {self.config.url} refuses: {refused}", fix=fix) from None
            except RunError:
                wait = None
                if attempt == TRIES:
                    raise
            time.sleep(min(LONGEST_WAIT, 2.0 ** (attempt - 1) if wait is None else wait))
        raise RunError(f"the judge at {self.config.url} refuses what it is asked")

    def _without_what_it_refuses(self, words: str) -> bool:
        """Newer models want the limit under another name, and no temperature. Whether there was something to change."""
        if "max_completion_tokens" in words and "max_tokens" in self._body:
            self._body = {**self._body, "max_completion_tokens": self.config.max_new_tokens}
            del self._body["max_tokens"]
            return True
        return "temperature" in words and self._body.pop("temperature", None) is not None


def score_in(reply: str, best: int) -> float | None:
    """The one number in a reply's last line, if it is a score."""
    lines = [line for line in reply.splitlines() if line.strip(" *_`#.")]
    if not lines:
        return None
    line = re.sub(rf"(?:/|\bout of\b)\s*{best}\b", " ", lines[-1])
    numbers = [float(number) for number in NUMBER.findall(line)]
    return numbers[0] if len(numbers) == 1 and 0 <= numbers[0] <= best else None


def _text(answer: Any) -> str:
    try:
        return str(answer["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError):
        raise RunError(f"the judge's answer isn't a chat completion: {str(answer)[:100]}") from None
