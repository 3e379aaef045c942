"""A metric of the user's own: a function in a file, `file.py:function` in the run file.

    def politeness(answer: str, truth: str) -> float: ...      # a third parameter called `prompt` gets what was asked
    politeness.higher_is_better = False                        # True unless said

It is called once for each row; its figure is the mean over rows. files/own_code.py reads and loads the file: what is
hashed is what runs.

Whose code runs? The code that a run file names is its writer's wish: whoever types `deltaw train run.yaml` or
`--metrics file.py:function` asks for it. But a run folder names code, too, and may be a stranger's, whose files stay
files here: measuring it mustn't be enough to run it. So the hash of whatever was asked for is remembered in the user's
cache, and code that a run folder names runs without a question only if those very bytes ran on request before. Else the
user is told which file it is, and `--allow-code` is their word. Rejected: always asking (one's own runs would need the
option every day, and soon it would stand in every script), trusting paths (a changed file is other code), a copy of the
file in the run folder (then every run folder holds code to be trusted).

Rejected as well: a score of 0 for a row on which the function raises, which would look like a figure. The row is named
instead, and so is the line of the file.
"""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.base.source import cache_root
from deltaw.config import metric_key, own_metric
from deltaw.errors import InputError, RunError
from deltaw.evaluation.metrics import METRICS, Answer, Metric, Points
from deltaw.files.own_code import Code, as_number, quietly, reason
from deltaw.show.text import one_line


@dataclass(frozen=True)
class Consent:
    """Who names the code: `of_run`, a run folder, or the user where it is None; `allow`: the user agrees."""

    of_run: str | None = None
    allow: bool = False


ASKED_FOR = Consent()


def open_metrics(names: Sequence[str], consent: Consent = ASKED_FOR) -> tuple[Metric, ...]:
    """The metrics by name, the code of the user's own loaded. Raises InputError: code of a run folder that nobody has
    asked for yet, a file that can't be loaded or lacks the function."""
    return tuple(METRICS[name] if name in METRICS else _open(name, consent) for name in names)


def try_out(metrics: Sequence[Metric], row: Answer) -> None:
    """Call the user's own metrics once, with a row's truth as its answer. Raises InputError where that fails."""
    for metric in metrics:
        if metric.code:
            try:
                metric.score(row)
            except RunError as error:
                raise InputError(error.what, fix="it was tried with that row's truth as the answer") from None


def check_consent(code: Code, function: str, consent: Consent, *, what: str, otherwise: str = "") -> None:
    """Raises InputError where a run folder, not the user, names this code, and these bytes have never run on request.
    `what` the run is by it; `otherwise`: what to do instead of --allow-code."""
    known = cache_root() / "code" / code.sha256
    if consent.of_run is not None and not consent.allow and not known.is_file():
        raise InputError(
            f"{consent.of_run} is {what} by code: {function} in {code.file}, which has not run here before as it is "
            "now",
            fix=f"read it; then add --allow-code{otherwise}",
        )
    with contextlib.suppress(OSError):  # without a cache it asks again
        known.parent.mkdir(parents=True, exist_ok=True)
        known.touch()


def _open(name: str, consent: Consent) -> Metric:
    own = own_metric(name)
    assert own is not None  # EvaluateConfig has checked it
    file, function = Path(own[0]), own[1]
    code = Code.read(file, "evaluate.metrics")
    otherwise = ", or choose other metrics (deltaw eval: --metrics f1, or none)"
    check_consent(code, function, consent, what="measured", otherwise=otherwise)
    call = code.function(function, "evaluate.metrics")
    higher = getattr(call, "higher_is_better", True)
    if not isinstance(higher, bool):
        raise InputError(f"{file}: {function}.higher_is_better is {higher!r:.60}", fix="set it to True or False")
    # It may be dear, or answer otherwise next time.
    of = functools.cache(_Own(code, call, _wants_prompt(file, call)))
    return Metric(metric_key(name), higher, of, code.sha256)


def _wants_prompt(file: Path, call: Callable[..., Any]) -> bool:
    """Raises InputError where it can't be called with an answer and a truth, and a prompt if it has a place for it."""
    try:
        signature = inspect.signature(call)
    except (TypeError, ValueError):
        return False
    more = {"prompt": ""} if "prompt" in signature.parameters else {}
    try:
        signature.bind("", "", **more)
    except TypeError as error:
        what = f"{file}: {getattr(call, '__name__', 'it')}{signature} can't be called: {error}"
        raise InputError(what, fix="a metric takes (answer, truth), and prompt if it wants to") from None
    return bool(more)


@dataclass(frozen=True)
class _Own:
    """A row's points by the user's function. Raises RunError that names the row and the line."""

    code: Code
    call: Callable[..., Any]
    wants_prompt: bool

    def __call__(self, answer: Answer) -> Points:
        more = {"prompt": answer.prompt} if self.wants_prompt else {}
        try:
            with quietly():
                value = self.call(answer.given, answer.truth, **more)
                score = as_number(value)
        except (Exception, SystemExit) as error:
            where = self.code.where(error)
            raise RunError(f"{where}, on row {answer.origin}: {one_line(reason(error))}") from None
        if score is None or not math.isfinite(score):
            name = getattr(self.call, "__name__", "it")
            given = one_line(repr(value), 60)
            raise RunError(f"{self.code.file}: {name} gave {given} for row {answer.origin}, which isn't a number")
        return score, 1.0
