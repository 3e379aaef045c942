"""What stands for another path in a path: `~` and environment variables, in a run file and on the command line.

A run file isn't read by a shell, so `~/data` and `$SCRATCH/run` are expanded here: at the borders, where a name becomes
a value, so that nothing inside knows of it. A variable that isn't set, or a user that doesn't exist, is an error and
not a folder of that name. What a run records is the path that came out, with `$` doubled, so that it reads as the same
again.

A dollar sign that is meant is written twice in a run file. On the command line the shell has been at it before: what
exists under the very name that was given is meant, whatever it holds (commands that deltaw prints rely on that).
"""

import difflib
import os
import re
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, PlainSerializer

from deltaw.errors import InputError

MANY = 10_000  # names of a folder that are looked at
LONGEST = 255  # bytes of a file's name, on nearly every file system
_VARIABLE = re.compile(r"\$(?:(?P<escaped>\$)|(?P<bare>[A-Za-z_]\w*)|\{(?P<braced>[^{}]*)\})", re.ASCII)


def expand(path: str) -> str:
    """`path` with `~`, `~user`, `$NAME` and `${NAME}` replaced, `$$` a dollar sign.

    Raises ValueError for a name that stands for nothing.
    """

    def value(match: re.Match[str]) -> str:
        if match["escaped"]:
            return "$"
        name = match["bare"] or match["braced"]
        if not os.environ.get(name):
            raise ValueError(f"the environment variable {name} is not set, or empty; for a dollar sign write $$")
        return os.environ[name]

    head, slash, tail = path.partition("/")
    if head.startswith("~"):
        home = os.path.expanduser(head)
        if home == head:
            raise ValueError(f"{head} is nobody's home; for a folder of that name write ./{head}")
        return home + slash + _VARIABLE.sub(value, tail)
    return _VARIABLE.sub(value, path)


def written(path: str) -> str:
    """What `expand` reads as `path`."""
    return path.replace("$", "$$")


def no_such(path: Path) -> InputError:
    """That nothing lies there, with what lies beside it: the nearest names, else the first few."""
    what, parent = f"{path}: no such file or folder", path.parent
    try:
        names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    except OSError:
        return InputError(what, fix=f"there is no folder {parent} either; relative paths start at {Path.cwd()}")
    if near := difflib.get_close_matches(path.name, names, n=2):
        return InputError(what, fix=f"did you mean {' or '.join(str(parent / name) for name in near)}?")
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return InputError(what, fix=f"{'here' if parent == Path() else f'in {parent}'}: {shown or 'nothing'}")


def similar(path: Path, folder: Path | None = None) -> str | None:
    """A hint at the name beside `path`, or in `folder`, that was probably meant."""
    folder = folder or path.parent
    names = [entry.name for entry in islice(folder.iterdir(), MANY)] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {folder / near[0]}?" if near else None


def _possible(path: str) -> str:
    """The path. Raises ValueError for what no file can be called."""
    if not path:
        raise ValueError("it is empty")
    if "\0" in path:
        raise ValueError("there is a NUL character in it")
    if any(len(os.fsencode(part)) > LONGEST for part in path.split("/")):
        raise ValueError(f"{path[:40]}… is too long a name: {LONGEST} bytes are what a disk takes")
    return path


# A path, or another name, in a run file.
PathText = Annotated[str, AfterValidator(expand), AfterValidator(_possible), PlainSerializer(written)]


def given(path: Any) -> Any:
    """A path, or several, from the command line. Raises ValueError."""
    if isinstance(path, list | tuple):
        return [given(each) for each in path]
    if path is None:
        return None
    _possible(str(path))
    if "$" in str(path) and Path(path).exists():
        return path
    return type(path)(expand(str(path)))


def public_name(name: str) -> str:
    """What may be told of a file or a folder to people elsewhere: a builtin's name, or the last part of the path."""
    if name.startswith("builtin:"):
        return name
    path = Path(name)
    return path.name if path.name not in ("", "..") else path.resolve().name
