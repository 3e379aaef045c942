"""`file.py:function`: reward(prompt, completion, row) -> float | dict, the user's own.

A number is the reward (True is 1, False 0). Of a dict of numbers `reward` is, if it has that, else their sum; the
others are told as parts. None, texts, NaN, infinities and what is beyond 1e30 are no rewards. Nothing that goes wrong
becomes a 0: it is an error that names the row and the line, since a 0 would be learnt from.

Whose code runs is as with metrics (evaluation/own_metric.py): what the user's run file names runs, what a run folder
names only if these bytes ran on request before, or with --allow-code.
"""

from collections.abc import Sequence
from typing import Any

from deltaw.config.reward import FunctionReward, RewardConfig
from deltaw.data.row import Row
from deltaw.errors import RunError
from deltaw.evaluation.own_metric import Consent, check_consent
from deltaw.files.bounded import Failed, Late
from deltaw.files.own_code import Code
from deltaw.rewards.process import Process
from deltaw.rewards.scored import Asked, Value, failed
from deltaw.show.text import one_line


class Function:
    """Opened: the file is loaded, in its process. Raises InputError."""

    def __init__(self, config: FunctionReward, consent: Consent) -> None:
        file, self._function = config.file, config.function.rpartition(":")[2]
        self._code = Code.read(file, "reward")
        check_consent(self._code, self._function, consent, what="rewarded")
        spec = {
            "kind": "function",
            "file": str(file),
            "source": self._code.source.hex(),
            "function": self._function,
            "memory": config.memory,
        }
        self._process = Process(spec, f"the reward {config.called}", config.seconds)
        self._process.open()

    def check(self, row: Row) -> None:
        """It takes any row."""

    def score(self, asked: Sequence[Asked]) -> list[Value]:
        questions = [[one.prompt, one.completion, one.row] for one in asked]
        return self._process.scored(asked, questions, self._value, self._explained)

    def close(self) -> None:
        self._process.close()

    def _explained(self, error: Failed) -> tuple[str, str]:
        late = isinstance(error, Late)
        fix = "make it faster, or give the reward more: seconds: …" if late else "call it by hand with that row"
        return f"{self._code.file}: {self._function}: {error}", fix

    def _value(self, answer: dict[str, Any], one: Asked) -> Value:
        if "wrong" in answer:
            what = f"{self._code.file}: {self._function} gave {answer['wrong']}, which isn't a finite number below 1e30"
            raise failed(one, what, f"a reward is a number, or a dict of numbers; the answer was {quoted(one)}")
        if "raised" in answer:
            trace = "".join(f"\n  {one_line(frame)}" for frame in answer["trace"])
            raise RunError(f"{answer['where']}, on {one.named}: {one_line(answer['raised'])}{trace}",
                           fix=f"the answer was {quoted(one)}")  # fmt: skip
        return Value(answer["value"], {name: part for name, part in answer["parts"].items() if name != "reward"})


def code_of(rewards: Sequence[RewardConfig]) -> dict[str, str]:
    """sha256 of the file of each that runs one, for the run's record: who resumes with another one is told. Raises
    InputError."""
    return {one.called: Code.read(one.file, "reward").sha256 for one in rewards if one.file is not None}


def quoted(one: Asked) -> str:
    """What was answered, in a few words."""
    return f"“{one_line(one.completion, 60)}”" if one.completion else "empty"
