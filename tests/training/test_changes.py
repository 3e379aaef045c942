"""Settings changed between two halves of a run."""

from typing import Any

import pytest

from deltaw.config import RunConfig, parse_config
from deltaw.errors import InputError
from deltaw.training.changes import check_changes, differences

FIELDS: dict[str, Any] = {"base": "b", "data": {"train": "t.jsonl", "eval": 5}, "train": {"lr": 1e-3}, "output": "o"}


def config(**changes: Any) -> RunConfig:
    return parse_config({**FIELDS, **changes})


def test_nothing_changed_and_a_moved_folder_are_no_changes() -> None:
    assert check_changes(config(), config(output="elsewhere"), allow=False, run="r") == []


def test_a_difference_is_by_field_in_the_order_of_the_file() -> None:
    after = config(train={"lr": 2e-3, "keep": 5}, adapter={"rank": 8, "rank_overrides": {"q_proj": 2}})
    assert differences(config(), after) == {
        "adapter.rank": (16, 8),
        "train.lr": (1e-3, 2e-3),
        "train.keep": (2, 5),
        "adapter.rank_overrides.q_proj": (None, 2),
    }


def test_every_difference_is_listed_the_refused_ones_alone_when_there_are_any() -> None:
    after = config(train={"lr": 2e-3, "seed": 3})
    with pytest.raises(InputError, match=r"train.seed: 0 -> 3") as refused:
        check_changes(config(), after, allow=True, run="r")
    assert "train.lr" not in str(refused.value)
    with pytest.raises(InputError, match=r"train.lr: 0.001 -> 0.002\n.*--allow"):
        check_changes(config(), config(train={"lr": 2e-3}), allow=False, run="r")
    assert check_changes(config(), config(train={"lr": 2e-3}), allow=True, run="r") == ["train.lr: 0.001 -> 0.002"]


def test_a_file_may_be_named_otherwise_a_count_of_rows_may_not_change() -> None:
    named = config(data={"train": "moved.jsonl", "eval": 5})
    assert check_changes(config(), named, allow=True, run="r") == ["data.train: t.jsonl -> moved.jsonl"]
    with pytest.raises(InputError, match=r"data.eval: 5 -> 6"):
        check_changes(config(), config(data={"train": "t.jsonl", "eval": 6}), allow=True, run="r")
