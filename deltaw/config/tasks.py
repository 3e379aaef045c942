"""A task file, for `deltaw eval --tasks`: what is asked, of which rows, and how the answers are scored.

    tasks:
      - name: pronounce
        data: words.jsonl               # any source of data.train, or rows; left out: the run's own held-out rows
        metrics: [exact_match, phoneme_error_rate]
      - name: which
        form: choices                   # the likeliest of a row's choices
        data: choices.jsonl
    judge: {url: "http://127.0.0.1:8000/v1", model: a-model}

It stands by itself: nothing of a run's settings is taken over but how the adapter was trained to be asked. Names of
files are looked for beside the task file, then where deltaw was started. A setting that would have no effect is
refused, as in a run file.

The names of tasks and metrics are those of the results, so neither may come twice.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator

from deltaw.config.data import ColumnName, apart
from deltaw.config.evaluate import CALLED_ELSEWHERE, METRICS, located, metric_key, own_metric, unknown
from deltaw.config.load import read_yaml, shipped
from deltaw.config.places import place
from deltaw.config.problems import refusal
from deltaw.config.sources import Sources, SourceValue, sources_of, with_names
from deltaw.config.strict import Count, Seed, Strict, one_or_several
from deltaw.errors import InputError
from deltaw.files.paths import expand

CHOICES = {"accuracy": True, "accuracy_norm": True, "accuracy_bytes": True}  # whether higher is better
PASSES, JUDGED, CHRF = "pass_at_1", "judge", "chrf"
GENERATE = {**METRICS, CHRF: True, PASSES: True, JUDGED: True}
ELSEWHERE = {
    "choices": {"acc": "accuracy", "accnorm": "accuracy_norm", "accbytes": "accuracy_bytes"},
    "generate": {**CALLED_ELSEWHERE, "chrf2": CHRF, "pass1": PASSES, "pass@1": PASSES, "llmjudge": JUDGED},
}
WORDS = {  # lm-eval's: what to write instead
    "task": "did you mean 'name'?",
    "dataset_path": "did you mean 'data'?",
    "dataset_name": "write 'data': org/name:split, or a file",
    "test_split": "write it into 'data': org/name:split",
    "output_type": "did you mean 'form'?",
    "metric_list": "did you mean 'metrics'?",
    "doc_to_text": "write 'prompt': a text with {column} in it",
    "doc_to_target": "write 'columns': {answer: its column}",
    "doc_to_choice": "write 'columns': {choices: its column}",
    "generation_kwargs": "did you mean 'max_new_tokens'? Answers are greedy",
    "num_fewshot": "did you mean 'shots'?",
    "fewshot_split": "write 'shots_from': org/name:split, or a file",
}
Column = Literal[ColumnName, "choices", "test", "entry_point"]
TASK = re.compile(r"\w[\w.-]{0,63}")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class JudgeConfig(Strict):
    """A model that scores answers, behind any OpenAI-compatible endpoint."""

    url: str = Field(pattern=r"^https?://[^@\s]+$", description="http://host:port/v1, without a password")
    model: str = Field(min_length=1)
    key: str = Field("DELTAW_API_KEY", description="the environment variable that holds the key")
    prompt: str | None = Field(None, description="what it is asked, with {prompt}, {answer} and {truth}")
    best: int = Field(10, ge=1, le=1000, description="the best score that it may give; the worst is 0")
    max_new_tokens: int = Field(256, ge=1, le=65536)

    @field_validator("key")
    @classmethod
    def _a_name(cls, value: str) -> str:
        if not VARIABLE.fullmatch(value):
            raise ValueError("must be the name of an environment variable, never the key itself")
        return value

    @field_validator("prompt")
    @classmethod
    def _shows_the_answer(cls, value: str | None) -> str | None:
        if value is not None and "{answer}" not in value:
            raise ValueError("has no {answer}, so the judge would never see one")
        return value


class TaskConfig(Strict):
    """What is asked of which rows, and how the answers are scored."""

    name: str
    data: Sources | None = Field(None, description="null: the rows that the run held out")
    form: Literal["generate", "choices"] = "generate"
    metrics: tuple[str, ...] = ()
    columns: Annotated[dict[Column, str], AfterValidator(apart)] = Field(
        {}, description="what your columns are called, as in {choices: endings}"
    )
    prompt: str | None = Field(None, description="what is asked of a row, with its columns as {column}")
    chat: bool | None = Field(None, description="as a chat, or as plain text; null: as the adapter was trained")
    system: str | None = Field(None, description="a system prompt; null: the one that the adapter was trained with")
    limit: Count | None = Field(None, description="so many rows, chosen at random by seed")
    seed: Seed = Field(0, description="of the choice of rows, and of the intervals")
    shots: int = Field(0, ge=0, le=64, description="so many examples with their answers in front of what is asked")
    shots_from: Sources | None = Field(None, description="rows to show; null: of data, which aren't asked then")
    max_new_tokens: int | None = Field(None, ge=1, le=65536, description="null: 64, or 512 for programs")
    judge: JudgeConfig | None = Field(None, strict=False)

    @field_validator("name")
    @classmethod
    def _short_and_plain(cls, value: str) -> str:
        if not TASK.fullmatch(value):
            raise ValueError(
                "must be letters, digits, '_', '.' and '-', no blanks, at most 64, a letter or digit first"
            )
        return value

    @field_validator("metrics", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return one_or_several(value)

    @field_validator("metrics")
    @classmethod
    def _known(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        form = info.data.get("form", "generate")
        known = CHOICES if form == "choices" else GENERATE
        for name in value:
            if name not in known and (form == "choices" or not own_metric(name)):
                other = GENERATE if form == "choices" else CHOICES
                if name in other:
                    raise ValueError(f"{name} isn't for form {form}, which has {', '.join(known)}")
                shown = f"{name if name.isprintable() else ascii(name):.80}"
                raise ValueError(f"{shown} {unknown(name, known, ELSEWHERE[form])}")
        names = [metric_key(name) for name in value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"has {twice} twice")
        if PASSES in value and len(value) > 1:
            raise ValueError(f"{PASSES} stands alone: its rows have tests, and no answer to compare with")
        return tuple(name if name in known else expand(name) for name in value)

    @model_validator(mode="after")
    def _all_has_an_effect(self) -> "TaskConfig":
        idle = {
            "max_new_tokens": self.max_new_tokens is not None and self.form == "choices" and "form: generate",
            "system": self.system is not None and (self.data is None or self.chat is False) and "data asked as a chat",
            "judge": self.judge is not None and JUDGED not in self.metrics and f"{JUDGED} among the metrics",
            "columns": bool(self.columns) and self.data is None and "data",
            "prompt": self.prompt is not None and self.data is None and "data",
            "chat": self.chat is not None and self.data is None and "data",
            "shots": self.shots > 0 and self.data is None and "data",
            "shots_from": self.shots_from is not None and not self.shots and "shots",
        }
        if wrong := [f"{name} does nothing without {what}" for name, what in idle.items() if what]:
            raise ValueError("; ".join(wrong))
        if self.data is None and (self.form == "choices" or PASSES in self.metrics):
            raise ValueError(
                f"data is missing: held-out rows have no {'choices' if self.form == 'choices' else 'tests'}"
            )
        if self.shots and PASSES in self.metrics:
            raise ValueError(f"shots: rows of {PASSES} have tests, and no answer to show")
        if self.data is not None and any(source.weight != 1 for source in sources_of(self.data)):
            raise ValueError("data: a weight says how often a row is trained on, and here each counts once")
        if self.prompt is not None and not re.search(r"\{[^{}]+\}", self.prompt):
            raise ValueError("prompt names no {column}, so every row would be asked the same")
        return self

    @property
    def scored_by(self) -> tuple[str, ...]:
        """The metrics, those that a form has by itself where none is named."""
        return self.metrics or (("accuracy", "accuracy_norm") if self.form == "choices" else ("exact_match",))

    @property
    def longest(self) -> int:
        """The most tokens of an answer."""
        return self.max_new_tokens or (512 if PASSES in self.metrics else 64)


class TaskFile(Strict):
    """Tasks, and the judge of those that name none of their own."""

    tasks: tuple[TaskConfig, ...] = Field(strict=False)
    judge: JudgeConfig | None = Field(None, strict=False)

    @model_validator(mode="after")
    def _together(self) -> "TaskFile":
        if not self.tasks:
            raise ValueError("tasks is empty")
        names = [task.name for task in self.tasks]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two tasks are called {twice}")
        alone = [task.name for task in self.tasks if JUDGED in task.metrics and not task.judge and not self.judge]
        if alone:
            raise ValueError(f"{', '.join(alone)}: scored by a judge, and there is no judge: {{url: …, model: …}}")
        if self.judge and not any(JUDGED in task.metrics and not task.judge for task in self.tasks):
            raise ValueError(f"judge does nothing: no task without its own has the metric {JUDGED}")
        return self

    def located(self, folder: Path) -> tuple[TaskConfig, ...]:
        """The tasks, each with its judge, and with the files that they name where those are."""
        return tuple(task.model_copy(update=dict(self._changed(task, folder))) for task in self.tasks)

    def _changed(self, task: TaskConfig, folder: Path) -> Iterator[tuple[str, Any]]:
        yield "metrics", tuple(located(name, folder) for name in task.metrics)
        for name in ("data", "shots_from"):
            if isinstance(value := getattr(task, name), str | tuple):
                yield name, _placed(value, folder)
        if task.judge is None and JUDGED in task.metrics:
            yield "judge", self.judge


def _placed(data: SourceValue, folder: Path) -> SourceValue:
    return with_names(data, lambda name: place(name, [folder]))


def load_tasks(path: Path) -> tuple[TaskConfig, ...]:
    """The tasks of a file. Raises InputError that lists every problem."""
    raw, node = read_yaml(path, "a task file is a mapping with tasks")
    try:
        file = TaskFile.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise InputError(refusal(error, TaskFile, str(path), file=str(path), node=node, words=WORDS)) from None
    except (TypeError, ValueError) as problem:
        raise InputError(f"{path} has 1 problem:\n  {path}: {problem}") from None
    return file.located(shipped(path).parent)
