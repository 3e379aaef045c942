"""train.tokens_per_batch: auto on a GPU, here with the memory of its small passes made up."""

import re
from pathlib import Path

import pytest

from deltaw.config import parse_config
from deltaw.show.progress import Display
from deltaw.training import batch_size
from deltaw.training.fit import Point
from deltaw.training.opening import open_run
from tests.tiny import run_file


class Lines(Display):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str = "") -> None:
        self.lines.append(text)


@pytest.mark.parametrize(
    ("free", "tokens", "part"), [(10.0, 400, "a whole step"), (0.5, 100, "a step of 400 in parts")]
)
def test_the_line_says_what_was_chosen_and_what_others_would_take(
    folder: Path, monkeypatch: pytest.MonkeyPatch, free: float, tokens: int, part: str
) -> None:
    fields, gib = run_file(folder), 2**30
    opened = open_run(parse_config({**fields, "train": {**fields["train"], "tokens_per_step": 400}}), Lines())
    points = [Point(count, count, int(gib * (1 + count / 500)), 0.1) for count in (128, 256)]
    monkeypatch.setattr(batch_size, "measure", lambda *args, **options: iter(points))
    monkeypatch.setattr(batch_size, "held_memory", lambda device: gib)
    monkeypatch.setattr(batch_size, "free_memory", lambda device: int(free * gib))
    monkeypatch.setattr(batch_size, "LEAST", 16)
    display = Lines()
    assert batch_size._measured(opened, display) == tokens
    (line,) = display.lines
    assert line.startswith(f"batches of up to {tokens} tokens, {part}: about {1 + tokens / 500:.1f} GiB")
    others = re.findall(r"([0-9]+) about ([0-9.]+) GiB", line.split(";")[1])
    assert others == [(str(n), f"{1 + n / 500:.1f}") for n in (tokens // 2, 2 * tokens)]
