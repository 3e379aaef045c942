"""recipes/customers.yaml as its first lines say: ten adapters of ten files of rows."""

from pathlib import Path

import pytest

from deltaw.adapter.file import Adapter
from tests.sweep.test_sweep import named
from tests.tiny import tiny_base, words

ROOT = Path(__file__).parents[2]


def test_ten_customers_get_an_adapter_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_base(tmp_path / "base")
    (tmp_path / "customers").mkdir()
    files = [words(tmp_path / f"customers/{number}.jsonl", 12 + number) for number in range(10)]
    monkeypatch.chdir(tmp_path)
    names = ",".join(str(file.relative_to(tmp_path)) for file in files)
    small = ("base=base", "train.steps=2", "train.eval_every=1", "evaluate.samples=0", "train.device=cpu")
    result = named(ROOT / "recipes/customers.yaml", f"data.train={names}", *small)
    assert result.exit_code == 0 and result.data["winner"] is None, "losses on other rows aren't compared"
    prints = {Adapter.load(run["folder"]).fingerprint for run in result.data["runs"]}
    assert len(prints) == 10
