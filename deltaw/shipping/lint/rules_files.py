"""What is wrong with the files themselves, before their contents are checked.

`read` works whatever state the folder is in; whatever can't be read becomes one of the first findings. JSON that deltaw
refuses but other tools read (a key that appears twice) is read as they read it, and that is a finding.
"""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltaw.adapter.file import CONFIG, DELTAS, WEIGHTS
from deltaw.errors import InputError, command
from deltaw.files.safetensors import read_header
from deltaw.shipping.lint.finding import (
    LLAMA_CPP,
    LOADS,
    OLLAMA,
    REFUSED,
    UNSURE,
    VLLM,
    Finding,
    code,
    everywhere,
)
from deltaw.shipping.lint.forms import PICKLED_WEIGHTS, other_form
from deltaw.shipping.lint.subject import Subject, read_config

AGAIN = "download the file again"
CONFIG_UNREADABLE = code(
    "DW101",
    "adapter_config.json is missing or can't be read",
    everywhere(REFUSED),
    "download the complete folder again",
)
CONFIG_AMBIGUOUS = code(
    "DW102",
    "adapter_config.json is read differently by different tools (a key appears twice)",
    everywhere(UNSURE),
    "remove all but one of the entries",
)
WEIGHTS_MISSING = code("DW103", "there is no weights file", everywhere(REFUSED), "download the complete folder again")
PICKLED = code(
    "DW104",
    "the weights come only as a pickle, which runs code when it is opened; lint doesn't open it",
    everywhere(UNSURE),
    "ask its author for safetensors, or convert it in a sandbox",
)
WEIGHTS_UNREADABLE = code(
    "DW105", "adapter_model.safetensors is cut short or not a safetensors file", everywhere(REFUSED), AGAIN
)
FULL_TUNE = code(
    "DW106",
    "full fine-tuning (delta.safetensors), which only deltaw reads",
    everywhere(REFUSED),
    "merge it into a model folder, or extract a LoRA from it",
)
UNSHARED = code(
    "DW107",
    "only its owner can read the weights file (safetensors writes files that way)",
    dict.fromkeys((VLLM, LLAMA_CPP, OLLAMA), LOADS),
    "chmod 644 the file if a server runs as another user",
)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], list[Finding]]:
    """(config, shapes by tensor name, findings) of an adapter's folder; what can't be read is empty."""
    if (folder / DELTAS).is_file():
        fix = command("merge", folder, options=["-o", f"{folder.name}-merged"])
        return {}, {}, [FULL_TUNE.finding(f"{DELTAS} holds full fine-tuning, which no other tool reads", fix)]
    config, findings = _config(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    if (folder / WEIGHTS).is_file():
        try:
            shapes = dict(read_header(folder / WEIGHTS).shapes)
        except InputError as error:
            findings.append(WEIGHTS_UNREADABLE.finding(f"{WEIGHTS}: {_reason(error)}"))
    elif (folder / PICKLED_WEIGHTS).is_file():  # any other pickle is a trainer's state
        findings.append(PICKLED.finding(f"{PICKLED_WEIGHTS} is a pickle, and there is no {WEIGHTS}"))
    else:
        findings.append(WEIGHTS_MISSING.finding(f"{WEIGHTS} is missing"))
    return config, shapes, findings


def _config(folder: Path) -> tuple[dict[str, Any], list[Finding]]:
    try:
        config = read_config(folder)
        with (folder / CONFIG).open("rb") as file:
            marked = file.read(len(BOM_UTF8)) == BOM_UTF8
        what = f"{CONFIG} begins with a byte-order mark, which no other tool's JSON reader accepts"
        return config, [CONFIG_UNREADABLE.finding(what, "save it as UTF-8 without the mark")] * marked
    except InputError as error:
        try:
            with (folder / CONFIG).open("rb") as file:
                lenient = json.loads(file.read(1_000_001))  # a longer one is cut off and so isn't JSON
        except (OSError, ValueError, RecursionError):
            lenient = None
        if not isinstance(lenient, dict):
            return {}, [CONFIG_UNREADABLE.finding(f"{CONFIG}: {_reason(error)}")]
        return lenient, [CONFIG_AMBIGUOUS.finding(f"{CONFIG}: {_reason(error)}; most tools take the last one")]


def _reason(error: InputError) -> str:
    return error.what.partition(": ")[2][:200] or error.what[:200]


def early(s: Subject) -> Iterator[Finding]:
    yield from s.early


def unshared(s: Subject) -> Iterator[Finding]:
    file = s.folder / WEIGHTS
    if file.is_file() and not file.stat().st_mode & 0o004:
        yield UNSHARED.finding(
            f"{WEIGHTS} has mode {file.stat().st_mode & 0o777:04o}: another user's server can't read it"
        )


def form(s: Subject) -> Iterator[Finding]:
    if s.shapes:
        yield other_form(
            "peft", s.export("mlx") or "deltaw can't load it, so it can't convert it: see the other findings"
        )


RULES = (early, unshared, form)
