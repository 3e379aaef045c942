"""benchmarks/gpu_decode.py on a CPU with a tiny model: its logic, not its figures."""

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_decode


def test_both_arms_have_rows_whose_tokens_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_decode.main(["--device", "cpu", "--toy", "--new", "5"]) == 0
    with (tmp_path / "gpu.csv").open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        assert tuple(table.fieldnames or ()) == gpu.COLUMNS
        rows = list(table)
    assert [(row["arm"], row["tokens"]) for row in rows] == [
        (arm, count) for count in ("1", "16", "16") for arm in ("decode-uncaptured", "decode")
    ]
    assert all(float(row["tokens_per_s"]) > 0 and "NOT" not in row["note"] for row in rows)
    for row in rows[1::2]:
        assert "0 recorded" not in row["note"] and f"{row['tokens']} of {row['tokens']} rows agree" in row["note"]


def test_out_of_time_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_decode.main(["--device", "cpu", "--toy", "--budget", "0"]) == 0
    assert (tmp_path / "gpu.csv").read_text(encoding="utf-8").count("out of time") == len(gpu_decode.CASES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured() -> None:
    assert gpu_decode.main([]) == 2
