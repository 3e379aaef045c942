"""`evaluate:` of a run file: what is measured on the held-out rows besides the loss.

A metric is one of `METRICS` (evaluation/metrics.py has their definitions) or a function of the user's own, written
`file.py:function` (evaluation/own_metric.py). Its file is looked for beside the run file, then where deltaw was
started, as data are; a run records the whole path, so that it is found again from anywhere.
"""

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, PlainSerializer, field_validator

from deltaw.config.strict import Strict, one_or_several
from deltaw.files.paths import PathText, expand, written

METRICS: dict[str, bool] = {  # whether higher is better
    "exact_match": True,
    "contains": True,
    "f1": True,
    "rouge_l": True,
    "character_error_rate": False,
    "word_error_rate": False,
    "phoneme_error_rate": False,
    "number_equal": True,
}
CALLED_ELSEWHERE = {
    "accuracy": "exact_match",
    "em": "exact_match",
    "includes": "contains",
    "rouge": "rouge_l",
    "rougel": "rouge_l",
    "cer": "character_error_rate",
    "wer": "word_error_rate",
    "per": "phoneme_error_rate",
    "math": "number_equal",
    "number": "number_equal",
    "numeric": "number_equal",
    "gsm8k": "number_equal",
    "mathverify": "number_equal",
}


def own_metric(name: str) -> tuple[str, str] | None:
    """(file, function) of `file.py:function`; None for any other name."""
    file, colon, function = name.rpartition(":")
    return (file, function) if colon and file.endswith(".py") and function.isidentifier() else None


def _metric(name: str) -> str:
    """A metric's name, `~` and variables in a file's replaced. Raises ValueError."""
    if own_metric(name):
        return expand(name)
    if name in METRICS:
        return name
    raise unknown(name, METRICS, CALLED_ELSEWHERE)


def unknown(name: str, metrics: Iterable[str], elsewhere: Mapping[str, str]) -> ValueError:
    """That there is no such metric, with the one that was probably meant."""
    near = [elsewhere.get(name.lower().replace("-", "").replace("_", ""), "")]
    near += difflib.get_close_matches(name, metrics, n=1)
    if hint := next(filter(None, near), None):
        return ValueError(f"isn't a metric; did you mean {hint}?")
    return ValueError(f"must be {', '.join(metrics)}, or file.py:function")


def _written(name: str) -> str:
    return written(name)


MetricName = Annotated[str, AfterValidator(_metric), PlainSerializer(_written)]  # not a path, though it may hold one


class EvaluateConfig(Strict):
    """What is measured on the held-out rows besides the loss."""

    section: ClassVar[str] = "evaluate"
    metrics: tuple[MetricName, ...] = ()
    general: PathText | None = Field(
        "builtin:general", description="text on which forgetting is measured; null: not measured"
    )
    max_new_tokens: int = Field(64, ge=1, le=65536)
    samples: int = Field(3, ge=0, le=100)
    report: bool = Field(True, description="write report.html at the end")

    @field_validator("metrics", mode="before")
    @classmethod
    def _metrics(cls, value: Any) -> Any:
        return one_or_several(value)

    @field_validator("metrics")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """A figure is known by its metric's name, which has no folder in it."""
        names = [metric_key(name) for name in value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"has {twice} twice")
        return value

    def located(self, folder: Path) -> "EvaluateConfig":
        """With the whole path of every file that holds a metric: in `folder`, else where deltaw was started."""
        return self.model_copy(update={"metrics": tuple(located(name, folder) for name in self.metrics)})


def metric_key(name: str) -> str:
    """The name under which a metric's figure stands in result.json: without the folder of its file."""
    own = own_metric(name)
    return f"{Path(own[0]).name}:{own[1]}" if own else name


def located(name: str, folder: Path) -> str:
    """A metric's name with the whole path of its file: in `folder`, else where deltaw was started."""
    own = own_metric(name)
    if own is None:
        return name
    beside = folder / own[0]
    return f"{os.path.abspath(beside if beside.is_file() else own[0])}:{own[1]}"
