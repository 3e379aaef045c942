"""A set on the hub -> rows, by the `datasets` library.

The library tries for minutes to reach a hub that can't be reached. So it is asked first whether anything answers
there, which takes seconds at most; an answer of any kind is one. Where the environment says to stay offline
(HF_HUB_OFFLINE, HF_DATASETS_OFFLINE) nobody is asked, and only what was downloaded before is read.
"""

import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltaw.data.arrow import columns
from deltaw.data.row import Item, Row
from deltaw.errors import InputError, first_line

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
SECONDS = 5.0  # for the hub to answer


def read_hub(name: str, split: str, near: str | None) -> Iterator[Item]:
    """The rows of `name` on the hub. `near`: a name nearby that exists, if the hub has no such set."""
    table = _table(name, split, near)
    schema = getattr(getattr(table, "features", None), "arrow_schema", None)
    for number, value in enumerate(table, 1):
        yield Row(columns(value, schema), f"{name}:{split}:{number}")


def files_of_hub(name: str, split: str) -> list[Path]:
    """The Arrow files in which the library keeps this revision of a set; none where it can't be had or has none."""
    try:
        return [Path(file["filename"]) for file in getattr(_table(name, split, None), "cache_files", [])]
    except InputError:
        return []  # which reading tells in full


def _table(name: str, split: str, near: str | None) -> Any:
    try:
        import datasets
    except ImportError:
        what = f"{name}: no such file or folder, and reading it from the hub needs the datasets package"
        raise InputError(what, fix=near or "name a file that exists, or pip install 'deltaw[hub-data]'") from None
    offline = next((variable for variable in OFFLINE if os.environ.get(variable, "").upper() in _YES), None)
    if not offline and (reason := _unreachable()):
        raise InputError(
            f"{name}: no such file or folder here, and the hub can't be reached ({reason})",
            fix=near or "look at the network, or name a local file; what was downloaded before: HF_HUB_OFFLINE=1",
        )
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises a dozen kinds, all of them about the name or the network
        reason = first_line(error)
        if offline:
            what = f"{name}:{split}: not among the sets that were downloaded before, and {offline} is set: {reason}"
            raise InputError(what, fix=near or f"unset {offline}, or name a local file") from None
        raise InputError(f"{name}:{split}: {reason}", fix=near) from None


_YES = ("1", "ON", "YES", "TRUE")  # as the library reads its variables


def _unreachable() -> str | None:
    """Why nothing answers where the hub is; None if something does."""
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=SECONDS).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        # Certificates are the library's business: it may know some that Python doesn't.
        return None if isinstance(reason, ssl.SSLError) else str(getattr(reason, "strerror", None) or reason)
    return None
