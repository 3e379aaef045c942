"""metrics.jsonl and TensorBoard."""

import json
import sys
import types
from pathlib import Path

import pytest

from deltaw.run import Run
from deltaw.training.log import EventLog


@pytest.mark.parametrize("installed", [False, True])
def test_records_go_to_the_file_and_to_tensorboard_when_it_is_there(
    tmp_path: Path, monkeypatch, installed: bool
) -> None:
    written = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert purge_step == 3  # what a resumed run writes again
            assert folder == str(tmp_path / "tensorboard")

        def add_scalar(self, *point: object) -> None:
            written.append(point)

        def close(self) -> None:
            written.append("closed")

    fake = types.SimpleNamespace(SummaryWriter=SummaryWriter) if installed else None
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    log = EventLog(Run(tmp_path), step=2)
    log.write({"step": 3, "loss": 1.5})
    log.write({"step": 4, "skipped": "a spike", "rows": []})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 3, "loss": 1.5}, {"step": 4, "skipped": "a spike", "rows": []}]
    assert written == ([("loss", 1.5, 3), "closed"] if installed else [])
