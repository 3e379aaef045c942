"""A base that is sharded over the ranks trains what a whole one trains."""

import json
from pathlib import Path
from typing import Any

import pytest

from deltaw.adapter.file import Adapter
from deltaw.base import packed
from deltaw.show.progress import QUIET
from deltaw.training import run as loop
from deltaw.training.run import train
from tests.tiny import run_file, tiny_base, words
from tests.training.processes import together
from tests.training.test_distributed import same_run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    tiny_base(folder / "base")
    words(folder / "train.jsonl", 40)
    return folder


def fields(place: Path, name: str, **changes: Any) -> dict[str, Any]:
    made = run_file(place, output=str(place / name))
    made["evaluate"] = {"metrics": ["exact_match"], "samples": 2, "max_new_tokens": 3, "general": None, "report": False}
    made["train"] |= {"sample_every": 4, "shard": "always", "steps": 4, **changes.pop("train", {})}
    return {**made, **changes}


def held(model: Any, adapter: set[int]) -> int:
    """Bytes of the base's tensors in this process."""
    locals_ = [getattr(p, "to_local", lambda p=p: p)() for p in model.parameters() if id(p) not in adapter]
    return sum(local.nbytes for local in locals_)


@pytest.mark.parametrize("weights", ["auto", "bfloat16"])
def test_a_sharded_base_trains_what_a_whole_one_trains(
    place: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "LEAST", 1)
    name = f"whole-{weights}"
    train(fields(place, name, base_weights=weights), display=QUIET)

    def work(rank: int) -> None:
        taking = loop.Steps.take

        def take(steps: Any) -> None:
            adapter = {id(parameter) for parameter in steps.learner.attached.parameters}
            before = held(steps.opened.model.base.model, adapter)
            taking(steps)
            after = held(steps.opened.model.base.model, adapter)
            (place / f"{weights}.{rank}.json").write_text(json.dumps([before, after]))

        loop.Steps.take = take  # type: ignore[method-assign]
        adapter = train(fields(place, weights, base_weights=weights), display=QUIET)
        (place / f"{weights}.{rank}.txt").write_text(adapter.fingerprint)

    ended = together(2, work, timeout=5.0)
    assert [rank.code for rank in ended] == [0, 0], "\n".join(rank.output for rank in ended)
    same_run(place / weights, place / name)
    assert {(place / f"{weights}.{rank}.txt").read_text() for rank in range(2)} == {
        Adapter.load(place / weights).fingerprint
    }
    print([json.loads((place / f"{weights}.{rank}.json").read_text()) for rank in range(2)])
    results = [json.loads((place / run / "result.json").read_text()) for run in (name, weights)]
    assert results[0]["answers"] == results[1]["answers"]
    print(results[0]["eval"], results[1]["eval"], results[1]["failed"])
