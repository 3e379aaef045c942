"""`objective.reward` of a run file: what an answer is worth, in one way or in several that are added.

    reward: judge.py:helpful                                  a function of the user's own
    reward: phoneme_error_rate                                a verifier by its name, with its defaults
    reward: {kind: number_equal, tolerance: 0.01}             the same with options
    reward: reasoning_gym:chain_sum                           the scorer of one of that package's tasks
    reward: [number_equal, {kind: format, weight: 0.2}]       the weighted sum of several

Each kind is a class with the options that it has; what each gives and in which range is in `LOW`, `HIGH` and in
docs/rewards.md. It is written into config.yaml as the list of mappings that it stands for, so that a run records every
number that it used, also one that was a default. A function's file is looked for as a metric's is (evaluate.py).
"""

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainSerializer, PlainValidator, ValidationError, field_validator, model_validator

from deltaw.config.evaluate import CALLED_ELSEWHERE as METRICS_ELSEWHERE
from deltaw.config.evaluate import METRICS, located, own_metric
from deltaw.config.strict import Strict
from deltaw.errors import InputError
from deltaw.files.paths import expand, written

Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False, description="the longest that one answer takes")]
NAME = re.compile(r"\w[\w.:-]{0,63}")
TAG = re.compile(r"[A-Za-z_][\w-]{0,30}")
GYM = "reasoning_gym"
WRONG = "must be file.py:function, a verifier's name, {kind: …}, or a list of these"


class RewardConfig(Strict):
    """One reward: `kind`, its options, its weight in the sum, and the name under which a run reports it."""

    LOW: ClassVar[float] = 0.0
    HIGH: ClassVar[float] = 1.0
    kind: str
    weight: float = Field(1.0, ge=-1e3, le=1e3, allow_inf_nan=False, description="in the sum; below 0 it is a penalty")
    name: str = Field("", description="in the run's figures; left out, it is that of the kind or the function")

    @field_validator("weight")
    @classmethod
    def _counts(cls, value: float) -> float:
        if not value:
            raise ValueError("0 would make it count for nothing: leave the reward out")
        return value

    @field_validator("name")
    @classmethod
    def _plain(cls, value: str) -> str:
        if value and not NAME.fullmatch(value):
            raise ValueError("must be letters, digits, '_', '.', ':' and '-', at most 64, a letter or digit first")
        return value

    @property
    def called(self) -> str:
        return self.name or self.kind

    @property
    def file(self) -> Path | None:
        """The file of the user's that it runs, if there is one."""
        return None

    def wrapped(self, answer: str) -> str:
        """A row's own answer in the form that is asked for."""
        return answer

    def located(self, folder: Path) -> "RewardConfig":
        """With the whole path of a file that it names: in `folder`, else where deltaw was started."""
        return self


class FunctionReward(RewardConfig):
    """reward(prompt, completion, row) -> float | dict, in a process of its own."""

    LOW, HIGH = -math.inf, math.inf
    kind: Literal["function"] = "function"
    function: str = Field(description="file.py:function")
    seconds: Seconds = 10.0
    memory: int = Field(4096, ge=16, le=2**20, description="MB that it may take beyond what its file takes when loaded")

    @field_validator("function")
    @classmethod
    def _in_a_file(cls, value: str) -> str:
        if own_metric(value) is None:
            raise ValueError("must be file.py:function")
        return expand(value)

    @property
    def called(self) -> str:
        return self.name or self.function.rpartition(":")[2]

    @property
    def file(self) -> Path:
        return Path(self.function.rpartition(":")[0])

    def located(self, folder: Path) -> "FunctionReward":
        return self.model_copy(update={"function": located(self.function, folder)})


class _OfATag(RewardConfig):
    tag: str | None = Field(
        None, description="only what stands in the answer's last <tag>…</tag> counts; an answer without is worth 0"
    )

    @field_validator("tag")
    @classmethod
    def _a_tag(cls, value: str | None) -> str | None:
        return None if value is None else tag_named(value)

    def wrapped(self, answer: str) -> str:
        return answer if self.tag is None or f"<{self.tag}>" in answer else f"<{self.tag}>{answer}</{self.tag}>"


class ComparedReward(_OfATag):
    """A metric of the answer against the row's own: what is better higher as it is, an error rate as 1 − rate, no less
    than 0."""

    kind: Literal[
        "exact_match",
        "contains",
        "f1",
        "rouge_l",
        "character_error_rate",
        "word_error_rate",
        "phoneme_error_rate",
        "number_equal",
    ]
    against: str | None = Field(None, min_length=1, description="the row's field with the truth; null: its own answer")
    tolerance: float | None = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="number_equal: |a − b| ≤ tolerance · max(1, |b|); null: 1e-6"
    )

    @model_validator(mode="after")
    def _of_numbers(self) -> "ComparedReward":
        if self.tolerance is not None and self.kind != "number_equal":
            raise ValueError(f"tolerance is an option of number_equal, and {self.kind} has none: leave it out")
        return self


class RegexReward(RewardConfig):
    """1 where the pattern is found in the answer (`whole`: where it is all of the answer), else 0."""

    kind: Literal["regex"] = "regex"
    pattern: str = Field(min_length=1, max_length=10_000)
    whole: bool = False
    seconds: Seconds = 2.0

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"isn't a regular expression: {error}") from None
        return value


class JSONReward(RewardConfig):
    """1 where the answer is JSON, and fits the schema if there is one; else 0."""

    kind: Literal["json_schema"] = "json_schema"
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="null: any JSON will do")
    against: str | None = Field(None, min_length=1, description="the row's field with its own schema")

    @model_validator(mode="after")
    def _one_schema(self) -> "JSONReward":
        if self.schema_ is not None and self.against is not None:
            raise ValueError("has a schema of its own and one per row (against): only one of them can count")
        return self


class TestsReward(RewardConfig):
    """1 where the program in the answer passes the row's tests, in the sandbox of pass_at_1; else 0."""

    kind: Literal["pass_at_1"] = "pass_at_1"
    seconds: Seconds = 10.0


class GymReward(_OfATag):
    """What reasoning-gym's own scorer of the row's task gives."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    task: str | None = Field(None, description="null: whatever task a row is of")
    seconds: Seconds = 10.0

    @property
    def called(self) -> str:
        return self.name or self.task or self.kind


class FormatReward(RewardConfig):
    """1 where the answer is these tags, each once and in this order, with nothing but blanks between and around."""

    kind: Literal["format"] = "format"
    tags: tuple[str, ...] = Field(("think", "answer"), min_length=1, max_length=10)

    @field_validator("tags")
    @classmethod
    def _tags(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len({*map(tag_named, value)}) < len(value):
            raise ValueError("has a tag twice")
        return value

    def wrapped(self, answer: str) -> str:
        *first, last = self.tags
        answer = answer if f"<{last}>" in answer else f"<{last}>{answer}</{last}>"
        return "".join(f"<{tag}>…</{tag}>" for tag in first if f"<{tag}>" not in answer) + answer


class LengthReward(RewardConfig):
    """0 up to `free` characters, from there on falling to −1 at `most` (the overlong penalty of Yu et al. 2025)."""

    LOW, HIGH = -1.0, 0.0
    kind: Literal["length"] = "length"
    free: int = Field(ge=0, le=10**9, description="characters that cost nothing")
    most: int = Field(ge=1, le=10**9, description="characters from which on it is −1")

    @model_validator(mode="after")
    def _falls(self) -> "LengthReward":
        if self.most <= self.free:
            raise ValueError(f"most must be more than free ({self.free:,})")
        return self


KINDS: dict[str, type[RewardConfig]] = {
    **dict.fromkeys(METRICS, ComparedReward),
    "function": FunctionReward,
    "regex": RegexReward,
    "json_schema": JSONReward,
    "pass_at_1": TestsReward,
    GYM: GymReward,
    "format": FormatReward,
    "length": LengthReward,
}
CALLED_ELSEWHERE = {
    **METRICS_ELSEWHERE, "match": "exact_match", "regexp": "regex", "pattern": "regex", "json": "json_schema",
    "schema": "json_schema", "code": "pass_at_1", "codetests": "pass_at_1", "tests": "pass_at_1",
    "unittests": "pass_at_1", "humaneval": "pass_at_1", "reasoning": GYM, "formatreward": "format",
    "xmlformat": "format", "overlong": "length", "lengthpenalty": "length", "brevity": "length",
}  # fmt: skip


def tag_named(value: str) -> str:
    """Raises ValueError."""
    if not TAG.fullmatch(value):
        raise ValueError(f"{value!r:.40} isn't the name of a tag: write answer for <answer>…</answer>")
    return value


def _rewards(value: Any) -> tuple[RewardConfig, ...]:
    """Raises ValueError that says of each reward what is wrong with it."""
    given = value if isinstance(value, list | tuple) else [value]
    if not given:
        raise ValueError("is an empty list: " + WRONG)
    rewards = tuple(_reward(one, f"reward {number}: " if len(given) > 1 else "") for number, one in enumerate(given, 1))
    names = [one.called for one in rewards]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two rewards are called {twice}: give one of them a name")
    return rewards


def _reward(value: Any, place: str) -> RewardConfig:
    if isinstance(value, RewardConfig):
        return value
    if isinstance(value, str):
        value = _short(value)
    if not isinstance(value, Mapping):
        raise ValueError(place + WRONG)
    kind = value.get("kind", "function" if "function" in value else None)
    if kind is None:
        raise ValueError(f"{place}it has no kind: {_known()}")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{place}{_unknown(kind)}")
    model = KINDS[kind]
    try:
        return model.model_validate_json(json.dumps({**value, "kind": kind}))
    except ValidationError as error:
        raise ValueError(place + "; ".join(_problems(error, kind, model))) from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}{kind}: {error}") from None


def _short(value: str) -> dict[str, Any]:
    """What a reward that is a text alone stands for."""
    if own_metric(value):
        return {"kind": "function", "function": value}
    kind, _, task = value.partition(":")
    if kind.replace("-", "_") == GYM:
        return {"kind": GYM, "task": task or None}
    return {"kind": value}


def _problems(error: ValidationError, kind: str, model: type[RewardConfig]) -> Iterator[str]:
    options = {field.alias or name for name, field in model.model_fields.items()} - {"kind"}
    if kind != "number_equal":
        options -= {"tolerance"}
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            near = [name for name in options if name.startswith(key)] or difflib.get_close_matches(key, options, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(options))}"
            yield f"{kind} has no option {key!r:.40}; {hint}"
        elif problem["type"] == "missing":
            yield f"{kind} needs {key}"
        else:
            words = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            yield f"{kind}: {key} {words}" if key else f"{kind}: {words}"


def _unknown(kind: Any) -> str:
    shown = kind if isinstance(kind, str) and kind.isprintable() else ascii(kind)
    if not isinstance(kind, str):
        return f"{shown:.60} isn't a kind: {_known()}"
    plain = kind.lower().replace("-", "").replace("_", "").replace(" ", "")
    names = {**CALLED_ELSEWHERE, **{name: name for name in KINDS}}
    if near := difflib.get_close_matches(plain, names, n=1) or difflib.get_close_matches(kind.lower(), names, n=1):
        return f"{shown:.60} isn't a reward; did you mean {names[near[0]]}?"
    if kind.endswith(".py") or ".py:" in kind:
        return f"{shown:.60} names no function: write file.py:function"
    return f"{shown:.60} isn't a reward: {_known()}"


def _known() -> str:
    return f"{', '.join(kind for kind in KINDS if kind != 'function')}, or file.py:function"


def _dumped(rewards: tuple[RewardConfig, ...] | None) -> list[dict[str, Any]] | None:
    if rewards is None:
        return None
    dumped = [
        {key: value for key, value in one.model_dump(mode="json").items() if value not in (None, "")} for one in rewards
    ]
    return [{**one, "function": written(one["function"])} if "function" in one else one for one in dumped]


def parse_rewards(value: Any) -> tuple[RewardConfig, ...]:
    """What would stand behind `reward:`. Raises InputError."""
    try:
        return _rewards(value)
    except ValueError as error:
        raise InputError(f"reward: {error}") from None


Rewards = Annotated[tuple[RewardConfig, ...], PlainValidator(_rewards), PlainSerializer(_dumped)]
