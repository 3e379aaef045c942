"""A function in a file of the user's: its bytes read once, loaded as a module, and where in it something went wrong.

What is hashed is what runs. The file is loaded alone (it can import what is installed, not the files beside it), so
that the hash says all of it, and no __pycache__ is written beside it. Whether it may run is for whoever asks to decide
(evaluation/own_metric.py); metrics load it in this process, rewards in one of their own (rewards/worker.py).
"""

import contextlib
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from deltaw.errors import InputError
from deltaw.files.paths import no_such

LARGEST = 10_000_000  # bytes


@dataclass(frozen=True)
class Code:
    """A file as it was read; `sha256` is of these bytes."""

    file: Path
    source: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source).hexdigest()

    @staticmethod
    def read(file: Path, setting: str) -> "Code":
        """Raises InputError. A stranger's run may name a pipe, or gigabytes. `setting`: which names it."""
        try:
            if not file.is_file():
                raise no_such(file) if not file.exists() else InputError(f"{setting}: {file} isn't a file")
            if (size := file.stat().st_size) > LARGEST:
                raise InputError(f"{setting}: {file}: {size:,} bytes is too large for a file of functions")
            return Code(file, file.read_bytes())
        except OSError as error:
            raise InputError(f"{setting}: {file}: {error.strerror or error}") from None

    def function(self, name: str, setting: str) -> Callable[..., Any]:
        """What the file calls so. Raises InputError with the line where the file can't be loaded, or names what it has
        instead."""
        module = self._load()
        call = getattr(module, name, None)
        if not callable(call):
            own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
            what = f"{setting}: {self.file} has no function {name}"
            raise InputError(what, fix=f"it has {', '.join(own[:8]) or 'none'}")
        return call

    def _load(self) -> ModuleType:
        name = f"deltaw_own_{self.sha256[:16]}"
        spec = importlib.machinery.ModuleSpec(name, _Source(self), origin=str(self.file))
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses in it look themselves up there
        try:
            with quietly():
                spec.loader.exec_module(module)  # type: ignore[union-attr]
        except (Exception, SystemExit) as error:
            beside = isinstance(error, ModuleNotFoundError) and (self.file.parent / f"{error.name}.py").is_file()
            fix = "such a file is loaded alone: it can import what is installed, not the files beside it"
            raise InputError(f"{self.where(error)}: {reason(error)}", fix=fix if beside else None) from None
        return module

    def where(self, error: BaseException) -> str:
        """file:line of the innermost frame in the file."""
        if isinstance(error, SyntaxError) and error.filename == str(self.file):
            return f"{self.file}:{error.lineno}"
        lines = [frame.lineno for frame in self._frames(error)]
        return f"{self.file}:{lines[-1]}" if lines else str(self.file)

    def traced(self, error: BaseException, most: int) -> list[str]:
        """The last frames in the file, the innermost at the end, each with its line as it was when it was read."""
        lines = self.source.decode("utf-8", "replace").splitlines()
        shown = []
        for frame in self._frames(error)[-most:]:
            line = lines[frame.lineno - 1].strip() if frame.lineno and frame.lineno <= len(lines) else ""
            shown.append(f"line {frame.lineno}, in {frame.name}: {line}")
        return shown

    def _frames(self, error: BaseException) -> list[traceback.FrameSummary]:
        return [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(self.file)]


class _Source(importlib.abc.SourceLoader):
    """Loads the bytes that were hashed, and writes no __pycache__ beside the user's file."""

    def __init__(self, code: Code) -> None:
        self.code = code

    def get_filename(self, fullname: str) -> str:
        return str(self.code.file)

    def get_data(self, path: bytes | str) -> bytes:
        return self.code.source


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """What it prints goes to stderr: stdout is for results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def reason(error: BaseException) -> str:
    """Its kind and what it says."""
    try:
        text = error.msg if isinstance(error, SyntaxError) else str(error)
    except Exception:  # whatever was raised may be the user's own object
        text = ""
    return " ".join(f"{type(error).__name__}: {text}".rstrip(": ").split())


def as_number(value: Any) -> float | None:
    """A number, a truth value, or what converts itself (NumPy's, a tensor of one); None for anything else."""
    return float(value) if isinstance(value, int | float) or hasattr(value, "__float__") else None
