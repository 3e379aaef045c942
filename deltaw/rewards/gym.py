"""What the scorer of a row's task in reasoning-gym gives, from 0 to 1 (data/gym.py makes such rows).

The scorers are a package's, and meet whatever a model writes: some give it to a computer algebra system, which
evaluates it. So they run shut in (rewards/worker.py). One that raises, or is late, is undone by the answer, since it
has scored the row's own before the run began: such an answer is worth 0, and the part `unreadable` is 1, so that a
run's figures show how many there are.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from deltaw.config.reward import GymReward
from deltaw.data.row import Row
from deltaw.errors import Rejected
from deltaw.files.bounded import Failed
from deltaw.rewards.compared import inside
from deltaw.rewards.process import Process
from deltaw.rewards.scored import Asked, Value, failed

UNREADABLE = "unreadable"


class Gym:
    def __init__(self, config: GymReward) -> None:
        self._config = config
        self._samples: dict[str, tuple[str, dict[str, object]]] = {}  # a task's own answer, and its entry
        self._process: Process | None = None

    def check(self, row: Row) -> None:
        task = self._task(row.value)
        if task is None or not isinstance(row.value.get("question"), str) or "answer" not in row.value:
            raise Rejected("it isn't an entry of reasoning-gym (question, answer, metadata)")
        if self._config.task not in (None, task):
            raise Rejected(f"it is an entry of {task}, not of {self._config.task}")
        if task not in self._samples:
            self._samples[task] = (str(row.value["answer"] or ""), row.value)

    def score(self, asked: Sequence[Asked]) -> list[Value]:
        values: list[Value] = []
        while len(values) < len(asked):
            try:
                for value in self._scored(asked[len(values) :]):
                    values.append(value)
            except Failed:  # late, or dead: the next one gets another process
                values.append(Value(0.0, {UNREADABLE: 1.0}))
        return values

    def close(self) -> None:
        if self._process is not None:
            self._process.close()

    def _scored(self, asked: Sequence[Asked]) -> Iterator[Value]:
        if self._process is None:
            spec = {"kind": "reasoning_gym", "samples": [[task, *one] for task, one in self._samples.items()]}
            process = Process(spec, f"the reward {self._config.called}", self._config.seconds)
            process.open()
            self._process = process
        questions = []
        for one in asked:
            task, text = self._task(one.row), inside(one.completion, self._config.tag)
            questions.append([task, None if text is None else text.strip(), one.row])
        for answer, one in zip(self._process.answers(questions), asked, strict=True):
            yield self._value(answer, one)

    def _value(self, answer: dict[str, Any], one: Asked) -> Value:
        if "wrong" in answer:
            raise failed(one, f"reasoning-gym's {self._task(one.row)} gave {answer['wrong']}, which isn't from 0 to 1")
        return Value(answer["value"], answer["parts"])

    def _task(self, row: dict[str, object]) -> str | None:
        metadata = row.get("metadata")
        task = metadata.get("source_dataset") if isinstance(metadata, dict) else None
        return task if isinstance(task, str) else None
