"""The run's largest pieces are found without running it, tried before its first step, and leave no trace."""

import dataclasses
import math
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaw.base.batch import Batch
from deltaw.base.forward import Forward
from deltaw.config import parse_config
from deltaw.data.loader import LoaderState
from deltaw.errors import RunError
from deltaw.evaluation.forgetting import general_text
from deltaw.files.output import gib
from deltaw.run import Run
from deltaw.show.progress import Display
from deltaw.training import largest, measuring, preflight, shortage
from deltaw.training.checkpoint import save_checkpoint
from deltaw.training.fit import Fit
from deltaw.training.learner import Learner
from deltaw.training.memory import OutOfMemory
from deltaw.training.opening import Opened, open_run
from deltaw.training.preflight import check_disk, short_form, work_of
from deltaw.training.shortage import HEADROOM, explain, settings_that_fit
from tests.tiny import run_file

GIB = 1 << 30


def out_of_memory(*args: Any, **options: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


QUIET = Display(quiet=True)


def opened(folder: Path, *, train: dict[str, Any] | None = None, **changes: Any) -> tuple[Opened, Learner, Run]:
    fields = run_file(folder, **changes)
    config = parse_config({**fields, "train": {**fields["train"], **(train or {})}})
    made = open_run(config, QUIET)
    return made, made.learner(QUIET), Run(folder / "run")


@contextmanager
def watched() -> Iterator[list[int]]:
    """The sizes of the batches whose labels are scored in the block, for a loss or not."""
    seen, scores = list[int](), Forward.scores

    def counting(self: Forward, batch: Batch) -> Any:
        seen.append(len(batch.tokens_T))
        return scores(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Forward, "scores", counting)
        yield seen


@pytest.mark.parametrize("length", [{"steps": 6}, {"steps": None, "epochs": 2.5}, {"steps": 40}])
@pytest.mark.parametrize("position", [LoaderState(0, 0), LoaderState(0, 3), LoaderState(1, 1)])
def test_what_is_left_is_what_the_loader_will_give(folder: Path, length: dict, position: LoaderState) -> None:
    run, learner, _ = opened(folder, train={**length, "tokens_per_batch": 50})
    done = position.step + position.epoch * run.loader(learner.state).steps_in_epoch(0)
    learner.state = dataclasses.replace(learner.state, step=done, epoch=position.epoch, step_in_epoch=position.step)
    work = work_of(run, learner)
    steps = [step for step, _ in islice(run.loader(learner.state), max(0, run.total - done))]
    batches = [batch for step in steps for batch in step]
    assert work.steps == len(steps) == max(0, run.total - done)
    assert work.tokens == sum(len(batch.tokens_T) for batch in batches)
    assert work.supervised == sum(batch.supervised for batch in batches)
    assert work.longest_tokens == max((len(batch.tokens_T) for batch in batches), default=0)
    if steps:
        sizes = [[(len(batch.tokens_T), batch.supervised) for batch in step] for step in steps]
        largest = (work.longest_tokens, work.longest_supervised)
        assert work.first == max(tokens for tokens, _ in sizes[0])
        assert work.batches == len(next(step for step in sizes if largest in step))


def test_the_short_form_changes_nothing(folder: Path) -> None:
    changes = {"adapter": {"rank": 4, "alpha": 8, "dropout": 0.3}, "train": {"tokens_per_batch": 50}}
    run, learner, place = opened(folder, **changes)
    general = general_text("builtin:general", run.model.renderer)[:2]
    before = {name: value.clone() for name, value in run.model.base.model.state_dict().items()}
    drawn, state = torch.get_rng_state(), dataclasses.asdict(learner.state)
    short_form(run, learner, place, general)
    assert torch.equal(torch.get_rng_state(), drawn) and dataclasses.asdict(learner.state) == state
    assert all(torch.equal(value, before[name]) for name, value in run.model.base.model.state_dict().items())
    assert all(parameter.grad is None for parameter in run.attached.parameters) and not learner.optimizer.state
    assert not place.folder.exists()


@pytest.mark.parametrize(("share", "tried"), [(1.01, True), (0.0, False)])
def test_the_short_form_runs_the_largest_batch_unless_the_first_step_shows_as_much(
    folder: Path, monkeypatch, share: float, tried: bool
) -> None:
    run, learner, place = opened(folder, train={"tokens_per_batch": 50})
    work = work_of(run, learner)
    first, _ = next(iter(run.loader(learner.state)))
    assert work.first == max(len(batch.tokens_T) for batch in first)
    monkeypatch.setattr(preflight, "ALIKE", share)
    with watched() as sizes:
        short_form(run, learner, place)
    assert sizes == [work.longest_tokens] * tried


@pytest.mark.parametrize(("share", "tried"), [(0.0, True), (0.9, False)])
def test_general_text_is_tried_where_memory_is_short(folder: Path, monkeypatch, share: float, tried: bool) -> None:
    run, learner, place = opened(folder)
    general = general_text("builtin:general", run.model.renderer)[:2]
    seen: list[int] = []
    monkeypatch.setattr(preflight, "TIGHT", share)
    monkeypatch.setattr(measuring, "forgetting", lambda *args: seen.append(len(args[2])))
    short_form(run, learner, place, general)
    assert bool(seen) == tried


def test_the_short_form_of_a_resumed_run_evaluates_the_longest_rows(folder: Path, monkeypatch) -> None:
    run, learner, place = opened(folder)
    place.folder.mkdir()
    place.before.write_text("{}")
    monkeypatch.setattr(largest.batches, "TOKENS_AT_ONCE", 50)
    with watched() as sizes:
        short_form(run, learner, place)
    longest = sorted((len(row.tokens) for row in run.dataset.eval), reverse=True)
    assert sizes[-1] == sum(longest[: len(largest.largest_evaluation(run.dataset.eval))]) <= 50
    assert sizes[-1] + longest[-1] > 50 - max(longest)


def test_a_disk_that_is_too_small_is_seen_before_the_first_step(folder: Path, monkeypatch) -> None:
    (run, learner, place), usage = opened(folder), namedtuple("Usage", "total used free")
    needed = preflight.disk_needed(run, learner)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage(0, 0, needed))
    check_disk(run, learner, place)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage(0, 0, needed - 1))
    with pytest.raises(RunError, match=f"need {gib(needed)}, but only {gib(needed - 1)} are free"):
        short_form(run, learner, place)
    save_checkpoint(place.checkpoints, learner.saved(), 1)
    check_disk(run, learner, place)  # what lies there already needs no more room


def test_a_checkpoint_takes_the_bytes_that_were_said(folder: Path) -> None:
    for adapter in ({"rank": 16}, {"rank": 8, "init": "pissa"}, {"full": True}):
        run, learner, place = opened(folder, adapter=adapter)
        path = save_checkpoint(place.checkpoints, learner.saved(), 1)
        written = sum(file.stat().st_size for file in path.iterdir())
        foretold = learner.checkpoint_bytes()
        assert 0 < written - foretold < 20_000, "headers and state.json, no tensor"
        assert 3 * foretold < preflight.disk_needed(run, learner) < 5 * foretold


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("shapes"), RunError("out of memory")])
def test_other_errors_are_not_explained(folder: Path, error: Exception) -> None:
    assert explain(error, *opened(folder)) is None


def test_an_explanation_has_the_estimate_three_settings_and_what_next(folder: Path) -> None:
    run, learner, place = opened(folder)
    said = str(explain(MemoryError(), run, learner, place)).splitlines()
    assert len(said) == 5 and "step 1 of 6" in said[0] and "a batch of 64 tokens takes about" in said[0]
    assert all(line.endswith("iB") and "train.tokens_per_batch=" in line for line in said[1:4])
    assert said[4].startswith("nothing has been trained yet") and "--allow" in said[4]
    saved = learner.saved()
    save_checkpoint(place.checkpoints, saved._replace(state=dataclasses.replace(saved.state, step=4)), 1)
    last = str(explain(MemoryError(), run, learner, place)).splitlines()[4]
    assert last.startswith("step-000004 remains; resume with: deltaw train")


def test_settings_fit_and_name_what_helps(folder: Path) -> None:
    run, learner, _ = opened(folder, train={"tokens_per_batch": 4096, "tokens_per_step": 4096})
    work = dataclasses.replace(work_of(run, learner), longest=list(run.dataset.train) * 8)
    tokens = work.longest_tokens
    fit = Fit(1.0 * GIB, 3 * GIB / tokens, 0.0)
    found = settings_that_fit(run, work, fit, 2.8 * GIB)
    assert [setting.text for setting in found] == [
        f"train.tokens_per_batch={int(HEADROOM * 0.6 * tokens) // 64 * 64}",
        f"train.dtype=bfloat16 train.tokens_per_batch={found[1].tokens}",
        f"train.tokens_per_batch={int(HEADROOM * 0.3 * tokens) // 64 * 64}",
    ]
    assert all(setting.bytes <= (1 + HEADROOM * 1.8) * GIB for setting in found) and found[1].tokens > found[0].tokens
    tighter = settings_that_fit(run, work, fit, 1.5 * GIB)
    assert all(setting.bytes <= 1.45 * GIB for setting in tighter) and len(tighter) == 3
    assert tighter[1].text == f"train.dtype=bfloat16 train.tokens_per_batch={tighter[1].tokens}"
    shorter = settings_that_fit(run, work, fit, 1.01 * GIB)[0]
    assert shorter.text == f"train.tokens_per_batch={shorter.tokens} data.max_length={shorter.tokens}"
    assert settings_that_fit(run, work, fit, 0.9 * GIB) == []  # the weights alone are more
    surely = settings_that_fit(run, work, fit, 9 * GIB)  # it failed although it should have fitted
    assert [setting.tokens for setting in surely] == [tokens // part // 64 * 64 for part in (2, 4, 8)]


def test_where_only_a_smaller_base_fits_it_says_so(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(shortage, "measure", out_of_memory)
    said = str(explain(MemoryError(), *opened(folder)))
    assert "only a smaller base would fit" in said and "so do smaller ones" in said


@pytest.mark.parametrize(
    ("target", "doing", "setting"),
    [
        ("deltaw.evaluation.forgetting.batches", "measuring what was forgotten", "evaluate.general=null"),
        ("deltaw.generate.batches.padded", "answering rows", "evaluate.max_new_tokens=2"),
        ("deltaw.evaluation.scoring.batches", "measuring the loss on held-out rows", "data.max_length="),
    ],
)
def test_an_evaluation_that_is_too_large_is_told_apart(
    folder: Path, monkeypatch, target: str, doing: str, setting: str
) -> None:
    run, learner, place = opened(folder)
    place.folder.mkdir()
    monkeypatch.setattr(target, out_of_memory)
    with pytest.raises(OutOfMemory) as caught:
        measuring.measure_base(run, place, measuring.Attempts(run.device, QUIET.say, lambda error: None), QUIET)
        measuring.what_was_forgotten(run.model, run.dataset.train[:2])
    said = str(explain(caught.value, run, learner, place))
    assert doing in said.splitlines()[0] and setting in said and 4 <= len(said.splitlines()) <= 5


def test_rounding_keeps_to_sizes_that_people_choose() -> None:
    assert [shortage._rounded(n) for n in (0, 3.9, 4, 15, 63.9, 64, 127, 128, 1000)] == [
        0,
        0,
        4,
        8,
        32,
        64,
        64,
        128,
        960,
    ]
    assert shortage._rounded(-math.pi) == 0
