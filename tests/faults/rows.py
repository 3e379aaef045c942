"""Rows to do harm with, and what deltaw makes of them: shared by data.py and masks.py."""

import json
import random
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from deltaw.config import DataConfig
from deltaw.data.dataset import Dataset
from deltaw.data.example import Example
from deltaw.data.loader import Loader
from deltaw.data.prepare import prepare
from deltaw.data.render import Renderer
from tests.data.toys import CHATML, KINDS, toy
from tests.faults.common import place
from tests.faults.fault import expect

TOOLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + CHATML
END = {kind: controls[2] if kind == "llama3" else eos for kind, (_, _, eos, controls, _) in KINDS.items()}
WORDS = ["Paris", "the", "über", "a", "日本", "say", "->", "🙂", "[INST", "<|im_", "|>", "\n", "{{ x }}", "\u2028"]


@cache
def renderer(kind: str = "chatml", template: str | None = None) -> Renderer:
    """A renderer on a toy tokenizer, with its own template or another one."""
    if template is None:
        return Renderer(toy(kind))
    file = place() / f"{sha256(template.encode()).hexdigest()[:16]}.jinja"
    file.write_text(template, encoding="utf-8")
    return Renderer(toy(kind), template=str(file))


def write(folder: Path, rows: Sequence[Any], name: str = "train.jsonl") -> str:
    """Rows as JSON lines; what is bytes is a line already."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / name).write_bytes(b"".join(line + b"\n" for line in lines))
    return str(folder / name)


def read(folder: Path, rows: Sequence[Any], by: Renderer | None = None, **options: Any) -> Dataset:
    """What becomes of `rows`; everything unusable is tolerated unless `options` say otherwise."""
    train = write(folder, rows)
    return prepare(DataConfig(train=train, **{"bad_rows": 1.0, **options}), by or renderer())


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{number} ->", "completion": f" {number * 7}"} for number in range(count)]


def chat(*turns: str, **answer: Any) -> dict[str, Any]:
    """User and assistant by turns; `answer` are further fields of the assistant's messages."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn, **(answer if i % 2 else {})} for i, turn in enumerate(turns)]
    return {"messages": messages}


def said(dice: random.Random, extra: Sequence[str] = ()) -> str:
    """Some words, never blank."""
    words = [dice.choice([*WORDS, *extra]) for _ in range(dice.randint(1, 8))]
    return dice.choice((" ", "")).join(words).strip() or "x"


def trained(example: Example, kind: str) -> list[str]:
    """The texts of the stretches that are trained."""
    pieces = groupby(zip(example.tokens.tolist(), example.loss_mask.tolist(), strict=True), key=lambda pair: pair[1])
    texts = [renderer(kind).decode([token for token, _ in part], False) for on, part in pieces if on]
    return texts


def lines_of(items: Sequence[str]) -> list[int]:
    """The line numbers of `train.jsonl:118: …`."""
    return [int(item.split(":")[1]) for item in items]


def expect_sound(dataset: Dataset) -> None:
    """No example trains nothing or its first token, and no batch has no label."""
    for example in [*dataset.train, *dataset.eval]:
        expect(example.loss_mask[1:].any() and not example.loss_mask[0], f"{example.origin} trains nothing")
    for batches, _ in islice(Loader(dataset.train, 64, 32, 0), 20):
        expect(all(batch.supervised > 0 for batch in batches), "a batch without a label")
