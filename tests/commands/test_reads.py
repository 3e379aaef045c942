"""What lies under a name is read once per command: its config, adapter and base, the base's modules and tokenizer.

Counted at the functions that open them, wherever they are called from.
"""

import importlib
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltaw import commands, config, shipping
from deltaw.adapter import checkpoints
from deltaw.adapter.file import Adapter
from deltaw.base import load, source
from deltaw.data import prepare as preparing
from deltaw.data import render
from tests.test_cli import call

READERS = {
    "config": (config, "load_config"),
    "base": (load, "open_base"),
    "base found": (source, "find_base"),
    "skeleton": (load, "open_skeleton"),
    "tokenizer": (render, "open_tokenizer"),
    "all rows": (preparing, "prepare"),
}
RUN = {"config": 1, "adapter": 1, "base found": 1}
MEASURED = {**RUN, "base": 1, "tokenizer": 1}
SHIPPED = {**RUN, "skeleton": 1, "checkpoint": 1, "tokenizer": 1}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each reader was called: replaced in its own module and in every one that imported it, and none that is
    imported later may have it."""
    for package in (commands, shipping):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    counts: Counter[str] = Counter()

    def counting(what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            counts[what] += 1
            return real(*arguments, **options)

        return counted

    for what, (home, name) in READERS.items():
        real = getattr(home, name)
        for module in [m for key, m in sys.modules.items() if key.startswith("deltaw") and vars(m).get(name) is real]:
            monkeypatch.setattr(module, name, counting(what, real))
    monkeypatch.setattr(Adapter, "load", staticmethod(counting("adapter", Adapter.load)))
    init = checkpoints.Checkpoint.__init__
    monkeypatch.setattr(checkpoints.Checkpoint, "__init__", lambda *args: counting("checkpoint", init)(*args))
    return counts


@pytest.mark.parametrize(
    ("verb", "wanted"),
    [
        (["eval", "one"], MEASURED),
        (["resize", "one", "--max-loss-increase", "0.5%", "-o", "smaller"], MEASURED),
        (["resize", "one", "--rank", "2", "-o", "small"], {"adapter": 1}),
        (["scale", "one", "--factors", "0,1", "--data", "train.jsonl"], {**MEASURED, "all rows": 2}),  # general text
        (["scale", "one", "--to", "0.5", "-o", "half"], {"adapter": 1}),
        (["generate", "one", "say 3 ", "--max-tokens", "2"], MEASURED),
        (["inspect", "one", "-o", "page.html"], {**MEASURED, "all rows": 1}),  # general text
        (["export", "one", "--to", "peft", "-o", "peft"], SHIPPED),
        (["export", "one", "--to", "vllm", "-o", "vllm"], SHIPPED),
        (["merge", "one", "-o", "merged"], {**SHIPPED, "skeleton": 2, "checkpoint": 2}),  # the merged folder's, too
        (["lint", "one"], {**SHIPPED, "all rows": 1}),  # the first ones, whether they teach a stop
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_everything_is_read_once(
    folder: Path, reads: Counter[str], tmp_path: Path, verb: list[str], wanted: dict[str, int]
) -> None:
    output = [tmp_path / word if before == "-o" else word for before, word in zip(["", *verb], verb, strict=False)]
    code, _, err = call(*(folder / word if word in ("one", "train.jsonl") else word for word in output))
    assert code == 0, err
    assert dict(reads) == wanted
