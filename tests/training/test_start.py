"""Warm start: a run that trains on from an adapter has its numbers, its sizes and its history."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaw.adapter.algebra import pad_all
from deltaw.adapter.attach import attach
from deltaw.adapter.file import Adapter
from deltaw.config import AdapterSpec, TrainConfig, load_config, parse_config
from deltaw.errors import InputError, RunError
from deltaw.factors import LowRank
from deltaw.training.checkpoint import list_checkpoints, read_checkpoint
from deltaw.training.plan import plan
from deltaw.training.run import resume, train
from deltaw.training.stop import Stopped
from deltaw.training.verify import verify_resume
from deltaw.training.watch import Watch
from tests.tiny import Said, run_file, tiny_base
from tests.training.finished import KINDS, config
from tests.training.test_length import files
from tests.training.test_loop import QUIET, digest, metrics, stop_at


def after(folder: Path, kind: str, output: str = "", said: Said | None = None, **options: Any) -> Path:
    """A run of its own that starts from a run of that kind."""
    options = {"steps": 3, **options}
    adapter = {"from": str(folder / kind), **options.pop("adapter", {})}
    run = config(folder, output or f"after {kind}", adapter=adapter, **options)
    train(run, replace=True, display=said or QUIET)
    return Path(run.output)


def plain(folder: Path) -> Path:
    """The run after "lora" of which several tests want to know something."""
    run = folder / "after lora"
    return run if (run / "result.json").is_file() else after(folder, "lora")


def refused(folder: Path, adapter: dict[str, Any], **options: Any) -> str:
    with pytest.raises(InputError) as error:
        train(config(folder, "refused", adapter=adapter, **options), display=QUIET)
    assert not (folder / "refused").exists()
    assert len(str(error.value).splitlines()) <= 5
    return str(error.value)


def test_the_adapter_that_comes_out_has_no_start_of_its_own(place: Path) -> None:
    run = config(place, "value", adapter={"from": str(place / "lora")}, steps=1)
    assert train(run, replace=True, display=QUIET).spec.start is None
    with pytest.raises(ValueError, match=r"Adapter\.load"):
        attach(torch.nn.Sequential(torch.nn.Linear(8, 8)), run.adapter)


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_at_the_other_ones_numbers_and_records_whose_they_are(place: Path, kind: str) -> None:
    start, said = Adapter.load(place / kind / "adapter"), Said()
    run = after(place, kind, "still", said, lr=1e-9)
    for path, update in Adapter.load(run / "adapter").factors.items():
        assert update.scale == start.factors[path].scale
        for name, tensor in update.tensors().items():  # three steps at a rate of next to nothing
            torch.testing.assert_close(tensor, start.factors[path].tensors()[name], atol=1e-7, rtol=0)
    result = json.loads((run / "result.json").read_text())
    began = json.loads((place / kind / "result.json").read_text())
    assert result["eval"]["start"]["loss"] == pytest.approx(result["eval"]["after"]["loss"], rel=1e-4)
    assert result["eval"]["start"]["loss"] < result["eval"]["before"]["loss"]
    history = Adapter.load(run / "adapter").history
    assert history.data == "more.jsonl" and history.steps == 3
    assert history.started_from and history.started_from.fingerprint == start.fingerprint
    assert (history.started_from.name, history.started_from.data) == (kind, "train.jsonl")
    assert history.started_from.steps == began["steps"]
    assert result["history"] == history.to_json()
    assert "private" not in (run / "adapter/deltaw.json").read_text() + (run / "adapter/README.md").read_text()
    written = load_config(run / "config.yaml")
    assert (written.adapter.rank, written.adapter.full) == (start.spec.rank, start.spec.full)
    assert any("rank 8" in line for line in said.lines) == (kind == "pissa")


@pytest.mark.parametrize("kind", ["dora", "ranks"])
def test_stopped_and_resumed_it_has_the_same_bits_also_when_its_start_is_gone(
    place: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    whole = after(place, kind, "whole")
    copy = cut_off(place, kind, monkeypatch)
    shutil.rmtree(copy)
    resume(place / "cut", display=QUIET)
    assert digest(place / "cut") == digest(whole)
    began = Adapter.load(place / "cut/adapter").history.started_from
    assert began and began.fingerprint == Adapter.load(place / kind / "adapter").fingerprint


def cut_off(place: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run "cut" that was stopped after its second step; the copy that it started from."""
    copy = shutil.copytree(place / kind, place / "copy", dirs_exist_ok=True)
    with monkeypatch.context() as patch:
        stop_at(patch, 2, signal.SIGTERM)
        with pytest.raises(Stopped):
            after(place, "copy", "cut")
    return copy


def test_a_start_that_changed_meanwhile_is_noticed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = cut_off(place, "lora", monkeypatch)
    shutil.copytree(plain(place) / "adapter", copy / "adapter", dirs_exist_ok=True)
    shutil.copytree(place / "cut", place / "not saved", dirs_exist_ok=True)
    shutil.rmtree(place / "not saved/checkpoints")
    before, said = files(place / "not saved"), Said()
    with pytest.raises(InputError, match="has changed"):
        resume(place / "not saved", display=QUIET)
    assert files(place / "not saved") == before
    moved = [f"adapter.from={place / 'lora'}"]
    with pytest.raises(InputError, match="--allow"):
        resume(place / "cut", moved, display=QUIET)
    resume(place / "cut", display=said)  # which has a checkpoint: all that it was is there
    assert any("has changed" in line for line in said.lines)
    assert digest(place / "cut") == digest(plain(place))
    began = Adapter.load(place / "cut/adapter").history.started_from
    assert began and began.fingerprint == Adapter.load(place / "lora/adapter").fingerprint
    resume(place / "not saved", moved, allow=True, display=QUIET)
    assert digest(place / "not saved") == digest(plain(place))


def test_another_tools_adapter_and_one_inside_a_run_are_starts_as_well(place: Path) -> None:
    theirs = shutil.copytree(place / "lora/adapter", place / "theirs", dirs_exist_ok=True)
    (theirs / "deltaw.json").unlink()
    runs = [after(place, "theirs", "of theirs"), after(place, "lora/adapter", "of the inner"), plain(place)]
    assert len({digest(run) for run in runs}) == 1
    names = [Adapter.load(run / "adapter").history.started_from for run in runs]
    assert [name and name.name for name in names] == ["theirs", "lora", "lora"]


def test_the_second_in_a_row_knows_the_first(place: Path) -> None:
    line = Adapter.load(after(place, plain(place).name, "third", steps=1) / "adapter").history.line
    assert [one.name for one in line] == ["", "after lora", "lora"]


def test_what_its_adapter_is_comes_from_the_start(place: Path) -> None:
    said = refused(place, {"from": str(place / "lora"), "rank": 2, "alpha": 9.0})
    assert "rank: 2" in said and "alpha: 9" in said and "resize --rank 2" in said
    assert "targets" in refused(place, {"from": str(place / "lora"), "targets": "attention"})
    assert "scaling" in refused(place, {"from": str(place / "lora"), "scaling": "rslora"})
    assert "rank: 4" in refused(place, {"from": str(place / "pissa"), "rank": 4})
    assert "magnitude" in refused(place, {"from": str(place / "dora"), "magnitude": False})
    assert "lr_ratio_b" in refused(place, {"from": str(place / "full")}, lr_ratio_b=4.0)
    same = {"rank": 4, "alpha": 8, "targets": "all-linear", "dropout": 0.5}
    run = after(place, "lora", "same", adapter=same, steps=1)
    assert load_config(run / "config.yaml").adapter.dropout == 0.5
    assert load_config(after(place, "ranks", "same", steps=1) / "config.yaml").adapter.dropout == 0.2


def test_what_cannot_be_a_start_is_refused_by_name(place: Path) -> None:
    with pytest.raises(InputError, match="from"):
        parse_config(run_file(place, adapter={"from": "x", "init": "pissa"}))
    assert "nowhere" in refused(place, {"from": str(place / "nowhere")})
    assert "adapter.from" in refused(place, {"from": str(place / "base")})
    (place / "unfinished").mkdir(exist_ok=True)
    (place / "unfinished/config.yaml").write_text(load_config(place / "lora/config.yaml").to_yaml())
    assert "no finished adapter" in refused(place, {"from": str(place / "unfinished")})
    other = {"base": str(tiny_base(place / "other", seed=1))}
    fields = {**run_file(place, adapter={"from": str(place / "lora")}), **other, "output": str(place / "refused")}
    with pytest.raises(InputError, match="doesn't belong to this base"):
        train(parse_config(fields), display=QUIET)
    before = digest(place / "lora")
    for name in ("lora", "lora/adapter"):
        run = config(place, "lora", adapter={"from": str(place / name)})
        with pytest.raises(InputError, match="choose another output"):
            train(run, replace=True, display=QUIET)
    assert digest(place / "lora") == before


def test_plan_and_verify_resume_know_it(place: Path) -> None:
    asked = config(place, "rehearsed", adapter={"from": str(place / "pissa")})
    assert plan(asked, QUIET).steps == 6
    assert verify_resume(asked, 2, QUIET).exact
    assert not (place / "rehearsed").exists()


def test_empty_directions_of_a_start_learn(place: Path) -> None:
    """An adapter that was padded to one rank answers as it did, and all of its directions train."""
    whole = Adapter.load(place / "ranks/adapter")
    padded = pad_all(whole)
    padded.save(place / "padded")
    assert any(not update.a_RN.any(dim=1).all() for update in padded.factors.values())  # type: ignore[attr-defined]
    run = after(place, "padded", steps=2)
    losses = [metrics(one)[0]["eval_loss"] for one in (run, after(place, "ranks", steps=1))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for update in Adapter.load(run / "adapter").factors.values():
        assert isinstance(update, LowRank) and update.a_RN.any(dim=1).all() and update.b_MR.any(dim=0).all()


def test_the_held_out_loss_of_the_start_is_step_0_of_the_curve(place: Path) -> None:
    run = plain(place)
    first = metrics(run)[0]
    assert first["step"] == 0 and first["eval_loss"] > 0
    assert read_checkpoint(list_checkpoints(run / "checkpoints")[-1]).state.metrics_lines == len(metrics(run))


def test_the_watchdog_tells_a_start_that_has_learnt_all_from_a_fresh_one_that_never_moves() -> None:
    """Where nothing moves: an error for a fresh adapter, a warning for another."""
    for learnt in (False, True):
        spec, said = AdapterSpec(rank=2, targets="all-linear"), list[str]()
        model = torch.nn.Sequential(torch.nn.Linear(8, 8)).requires_grad_(False)
        attached = attach(model, spec)
        (layer,) = attached.layers.values()
        a, b = layer.trained().values()
        with torch.no_grad():
            b.fill_(0.1 if learnt else 0.0)
        watch = Watch(attached, TrainConfig(), 100, say=said.append)
        with torch.no_grad():
            b.fill_(0.1)
        try:
            for _ in range(10):
                a.grad, b.grad = torch.full_like(a, 1e-30), torch.full_like(b, 1e-30)
                with watch.update(5e-4, 1.0, []):
                    pass
        except RunError:
            assert not learnt
        else:
            assert learnt and said
