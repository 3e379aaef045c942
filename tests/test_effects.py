"""Settings that do nothing are refused, unless a run was begun with them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from deltaw.config import RunConfig, load_config, parse_config
from deltaw.errors import InputError
from deltaw.training.changes import check_changes

MINIMAL: dict[str, Any] = {"base": "b", "data": {"train": "t.jsonl"}, "output": "o"}
HELD_OUT: dict[str, Any] = {"data": {"train": "t.jsonl", "eval": 5}}


def config(**sections: Any) -> dict[str, Any]:
    return {**MINIMAL, **sections}


IDLE: dict[str, dict[str, Any]] = {
    "train.eval_every": {"train": {"eval_every": 5}},
    "train.sample_every": {"train": {"sample_every": 5}},
    "evaluate.metrics": {"evaluate": {"metrics": ["exact_match"]}},
    "evaluate.samples": {"evaluate": {"samples": 5}},
    "train.lr_ratio_b": {"train": {"lr_ratio_b": 4.0}, "adapter": "full"},
    "data.seed": {"data": {"train": "t.jsonl", "seed": 1}},
}
IDLE_BESIDE_ROWS: dict[str, dict[str, Any]] = {
    "data.seed": {"data": {"train": "t.jsonl", "eval": "e.jsonl", "seed": 1}},
}
SWITCHED_OFF: dict[str, dict[str, Any]] = {
    "train.epochs": {"train": {"epochs": 3, "steps": 5}},
    "train.sample_every": {**HELD_OUT, "train": {"sample_every": 5}, "evaluate": {"samples": 0}},
    "evaluate.max_new_tokens": {"evaluate": {"max_new_tokens": 8}},
}


@pytest.mark.parametrize("name", SWITCHED_OFF)
def test_what_others_switch_off_is_said(name: str) -> None:
    (line,) = parse_config(config(**SWITCHED_OFF[name])).switched_off()
    assert name in line
    assert parse_config(config(**HELD_OUT, evaluate={"max_new_tokens": 8})).switched_off() == []
    assert parse_config(MINIMAL).switched_off() == []


@pytest.mark.parametrize("sections", [*IDLE.items(), *IDLE_BESIDE_ROWS.items()], ids=lambda item: item[0])
def test_a_setting_without_an_effect_is_refused_by_name(sections: tuple[str, dict[str, Any]]) -> None:
    with pytest.raises(InputError) as refused:
        parse_config(config(**sections[1]))
    assert f"{sections[0]} does nothing" in refused.value.what


def test_all_of_them_are_named_at_once() -> None:
    with pytest.raises(InputError) as refused:
        parse_config(config(train={"eval_every": 5, "sample_every": 5}, evaluate={"samples": 4}))
    assert all(name in refused.value.what for name in ("eval_every", "sample_every", "evaluate.samples"))


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"evaluate": {"samples": 0, "general": None, "report": False}},
        {**HELD_OUT, "train": {"eval_every": 5, "sample_every": 5}, "evaluate": {"samples": 5, "max_new_tokens": 8}},
        {**HELD_OUT, "train": {"sample_every": 5}, "evaluate": {"metrics": ["exact_match"]}},
        {**HELD_OUT, "train": {"lr_ratio_b": 4.0, "steps": 5, "epochs": 3}},
        {"data": {"train": "t.jsonl", "limit": 5, "seed": 1}},
        {"data": {"train": "t.jsonl", "eval": 5, "seed": 1}},
    ],
)
def test_what_has_an_effect_or_is_a_default_is_accepted_and_so_is_its_file(sections: dict[str, Any]) -> None:
    accepted = parse_config(config(**sections))
    assert parse_config(yaml.safe_load(accepted.to_yaml())) == accepted


@pytest.mark.parametrize("sections", IDLE.values(), ids=IDLE)
def test_a_run_that_was_begun_so_is_still_read(tmp_path: Path, sections: dict[str, Any]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config(**sections)))
    with pytest.raises(InputError):
        load_config(file)
    (tmp_path / "metrics.jsonl").write_text("")
    began = load_config(file)
    assert isinstance(began, RunConfig)
    changed = load_config(file, ["train.lr=1e-4"])
    assert check_changes(began, changed, allow=True, run="r") == ["train.lr: 0.0005 -> 0.0001"]


def test_what_a_run_is_resumed_with_must_do_something_too() -> None:
    after = parse_config(config(train={"eval_every": 5}), begun=True)
    with pytest.raises(InputError, match=r"train\.eval_every does nothing"):
        check_changes(parse_config(MINIMAL), after, allow=True, run="r")


@pytest.mark.parametrize("value", [0, -1, 10**13, 2**63, 10**30, 1e300])
@pytest.mark.parametrize(
    "name",
    [
        "train.epochs", "train.steps", "train.warmup_steps", "train.tokens_per_step", "train.tokens_per_batch",
        "train.seed", "train.eval_every", "train.sample_every", "train.save_every", "train.keep", "train.lr_ratio_b",
        "train.skip_nonfinite", "data.eval", "data.max_length", "data.limit", "data.seed", "evaluate.samples",
        "evaluate.max_new_tokens", "adapter.rank",
    ],
)  # fmt: skip
def test_a_number_that_no_run_can_have_is_refused_by_its_name(name: str, value: float) -> None:
    section, field = name.split(".")
    least = 0 if field in ("warmup_steps", "seed", "skip_nonfinite", "samples") else 1
    fields = config(**HELD_OUT)
    fields = {**fields, section: {**fields.get(section, {}), field: value}}
    if value == 0 == least or (field == "seed" and value == 10**13):
        parse_config(fields)
        return
    with pytest.raises(InputError) as refused:
        parse_config(fields)
    assert name in refused.value.what
