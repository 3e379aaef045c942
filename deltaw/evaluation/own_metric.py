"""A metric of the user's own: a function in a file, `file.py:function` in the run file.

    def politeness(answer: str, truth: str) -> float: ...      # a third parameter called `prompt` gets what was asked
    politeness.higher_is_better = False                        # True unless said

It is called once for each row; its figure is the mean over rows. The file is read once: what is hashed is what runs. It
is loaded alone (it can import what is installed, not files beside it), so that the hash says all of it.

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
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from deltaw.base.source import cache_root
from deltaw.config import metric_key, own_metric
from deltaw.errors import InputError, RunError
from deltaw.evaluation.metrics import METRICS, Answer, Metric, Points
from deltaw.files.paths import no_such
from deltaw.show.text import one_line

LARGEST = 10_000_000  # bytes


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


def _open(name: str, consent: Consent) -> Metric:
    own = own_metric(name)
    assert own is not None  # EvaluateConfig has checked it
    file, function = Path(own[0]), own[1]
    source = _bytes(file)
    code = hashlib.sha256(source).hexdigest()
    known = cache_root() / "code" / code
    if consent.of_run is not None and not consent.allow and not known.is_file():
        raise InputError(
            f"{consent.of_run} is measured by code: {function} in {file}, which has not run here before as it is now",
            fix="read it; then add --allow-code, or choose other metrics (deltaw eval: --metrics f1, or none)",
        )
    with contextlib.suppress(OSError):  # without a cache it asks again
        known.parent.mkdir(parents=True, exist_ok=True)
        known.touch()
    module = _load(file, source, code)
    call = getattr(module, function, None)
    if not callable(call):
        own_ones = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        what = f"evaluate.metrics: {file} has no function {function}"
        raise InputError(what, fix=f"it has {', '.join(own_ones[:8]) or 'none'}")
    higher = getattr(call, "higher_is_better", True)
    if not isinstance(higher, bool):
        raise InputError(f"{file}: {function}.higher_is_better is {higher!r:.60}", fix="set it to True or False")
    of = functools.cache(_Own(file, call, _wants_prompt(file, call)))  # it may be dear, or answer otherwise next time
    return Metric(metric_key(name), higher, of, code)


def _bytes(file: Path) -> bytes:
    """Raises InputError. A stranger's run may name a pipe, or gigabytes."""
    try:
        if not file.is_file():
            raise no_such(file) if not file.exists() else InputError(f"evaluate.metrics: {file} isn't a file")
        if (size := file.stat().st_size) > LARGEST:
            raise InputError(f"evaluate.metrics: {file}: {size:,} bytes is too large for a metric")
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"evaluate.metrics: {file}: {error.strerror or error}") from None


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


class _Source(importlib.abc.SourceLoader):
    """Loads the bytes that were hashed, and writes no __pycache__ beside the user's file."""

    def __init__(self, file: Path, source: bytes) -> None:
        self.file, self.source = file, source

    def get_filename(self, fullname: str) -> str:
        return str(self.file)

    def get_data(self, path: bytes | str) -> bytes:
        return self.source


def _load(file: Path, source: bytes, code: str) -> ModuleType:
    """The file as a module. Raises InputError with the line where it fails."""
    name = f"deltaw_metric_{code[:16]}"
    spec = importlib.machinery.ModuleSpec(name, _Source(file, source), origin=str(file))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses in it look themselves up there
    try:
        with _quietly():
            spec.loader.exec_module(module)  # type: ignore[union-attr]
    except (Exception, SystemExit) as error:
        beside = isinstance(error, ModuleNotFoundError) and (file.parent / f"{error.name}.py").is_file()
        fix = "a metric's file is loaded alone: it can import what is installed, not the files beside it"
        raise InputError(f"{_where(error, file)}: {_reason(error)}", fix=fix if beside else None) from None
    return module


@dataclass(frozen=True)
class _Own:
    """A row's points by the user's function. Raises RunError that names the row and the line."""

    file: Path
    call: Callable[..., Any]
    wants_prompt: bool

    def __call__(self, answer: Answer) -> Points:
        more = {"prompt": answer.prompt} if self.wants_prompt else {}
        try:
            with _quietly():
                value = self.call(answer.given, answer.truth, **more)
                score = float(value) if isinstance(value, int | float) or hasattr(value, "__float__") else None
        except (Exception, SystemExit) as error:
            raise RunError(f"{_where(error, self.file)}, on row {answer.origin}: {_reason(error)}") from None
        if score is None or not math.isfinite(score):
            name = getattr(self.call, "__name__", "it")
            raise RunError(
                f"{self.file}: {name} gave {one_line(repr(value), 60)} for row {answer.origin}, which isn't a number"
            )
        return score, 1.0


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """What it prints goes to stderr: stdout is for results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _where(error: BaseException, file: Path) -> str:
    """file:line of the innermost frame in the file."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f"{file}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f"{file}:{lines[-1]}" if lines else str(file)


def _reason(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return one_line(f"{type(error).__name__}: {text}".rstrip(": "))
