"""How an adapter came about: a value that its folder keeps, whoever wrote into it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.adapter.file import RECORD, Adapter
from deltaw.adapter.history import LONGEST, NOTHING, History
from deltaw.config import AdapterSpec
from deltaw.errors import InputError
from deltaw.factors import LowRank

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.floats(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*History.model_fields, "other"]), inner, max_size=4)
    ),
    max_leaves=12,
)
COUNTS = st.none() | st.integers(0, 10**9)


def histories(depth: int) -> Any:
    before = histories(depth - 1) if depth else st.none()
    return st.builds(
        History,
        name=st.text(max_size=8),
        fingerprint=st.text(max_size=8),
        steps=COUNTS,
        tokens=COUNTS,
        data=st.text(max_size=8),
        extended_after=st.lists(st.integers(0, 99), max_size=3).map(tuple),
        started_from=st.none() | before,
    )


def adapter(history: History = NOTHING, scale: float = 1.0) -> Adapter:
    factors = {"proj": LowRank(torch.arange(8.0).reshape(2, 4) + 1, torch.ones(3, 2), scale)}
    return Adapter(AdapterSpec(rank=2, alpha=2 * scale, targets=("proj",)), factors, history=history)


@settings(max_examples=40)
@given(histories(2))
def test_it_is_written_and_read(history: History) -> None:
    assert History.of(json.loads(json.dumps(history.to_json())), "f") == history
    assert history.words() and len(history.line) <= 3


@given(JSON)
def test_what_it_cannot_be_is_refused_and_names_its_file(raw: Any) -> None:
    try:
        History.of(raw, "the file")
    except InputError as error:
        assert "the file" in error.what and len(str(error).splitlines()) <= 5


def test_it_comes_with_the_folder_and_another_tools_has_none(tmp_path: Path) -> None:
    history = History(steps=3, data="t.jsonl", started_from=History(name="first", fingerprint="sha256:ab"))
    assert Adapter.load(adapter(history).save(tmp_path)).history == history
    assert "first" in (tmp_path / "README.md").read_text()
    assert "history" not in json.loads((adapter().save(tmp_path / "plain") / RECORD).read_text())
    (tmp_path / RECORD).unlink()
    assert Adapter.load(tmp_path).history == NOTHING


def test_one_without_end_is_refused(tmp_path: Path) -> None:
    adapter().save(tmp_path)
    record = json.loads((tmp_path / RECORD).read_text())
    chain: Any = None
    for _ in range(LONGEST + 1):
        chain = {"name": "x", "started_from": chain}
    (tmp_path / RECORD).write_text(json.dumps({**record, "history": chain}))
    with pytest.raises(InputError, match="history"):
        Adapter.load(tmp_path)


def test_the_fingerprint_is_of_the_numbers_and_of_nothing_else(tmp_path: Path) -> None:
    one = adapter()
    assert Adapter.load(one.save(tmp_path)).fingerprint == one.fingerprint
    assert adapter(History(steps=3)).fingerprint == one.fingerprint
    assert adapter(scale=2.0).fingerprint != one.fingerprint
    other = one.factors["proj"].map(lambda tensor: tensor.nextafter(torch.tensor(9.0)))
    assert Adapter(one.spec, {"proj": other}).fingerprint != one.fingerprint
