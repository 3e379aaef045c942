"""Numbers that are none, and runs that only look as if they learnt (23-29)."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.adapter.file import Adapter
from deltaw.base.batch import Batch
from deltaw.config import AdapterSpec, TrainConfig, parse_config
from deltaw.errors import DeltawError, RunError
from deltaw.files.safetensors import load_safetensors, save_safetensors
from deltaw.kernels.logprobs import IGNORE
from deltaw.model import open_model
from deltaw.training import learner, opening
from deltaw.training import run as loop
from deltaw.training.checkpoint import FACTORS, TrainState, list_checkpoints
from deltaw.training.recomputing import Choice
from deltaw.training.run import resume, train
from deltaw.training.watch import Unfit, check_loss, note_skip, note_update
from tests.faults.common import (
    QUIET,
    changed,
    clear_error,
    config,
    copy,
    digest,
    finished_run,
    metrics,
    place,
)
from tests.faults.fault import expect, fault
from tests.tiny import run_file, tiny_base

BAD = (math.nan, math.inf, -math.inf)


class Poisoned:
    """A forward whose loss, in its `call`-th training batch (from 1), is `harm`ed."""

    def __init__(self, forward: Any, call: int, harm: Callable[[Tensor], Tensor]) -> None:
        self._forward, self._call, self._harm, self._calls = forward, call, harm, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._forward, name)

    def loss(self, *batch: Any) -> tuple[Tensor, int]:
        loss, count = self._forward.loss(*batch)
        if torch.is_grad_enabled():
            self._calls += 1
            if self._calls == self._call:
                loss = self._harm(loss)
        return loss, count


class InfiniteGradient(torch.autograd.Function):
    """The identity, whose gradient is infinite: a loss that looks well and isn't."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * math.inf


@contextmanager
def poisoned(call: int, harm: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the block, a run's forward is Poisoned. What is tried before it is left out: it would count."""
    original = opening.plan_forward
    model = changed(opening, "plan_forward", lambda model: Poisoned(original(model), call, harm))
    untried = changed(loop, "choose", lambda opened, *more: (opened, Choice()))
    with model, untried, changed(loop, "short_form", lambda *args: None):
        yield


def batches_before(step: int, tokens_per_batch: int, scratch: Path) -> int:
    """Training batches in the steps before `step` (from 1)."""
    settings = config(scratch / "count", train={"tokens_per_batch": tokens_per_batch})
    counts: list[int] = []
    original = loop.step

    def counting(forward: Any, learners: Any, batches: Any, *more: Any) -> Any:
        counts.append(len(batches))
        return original(forward, learners, batches, *more)

    with changed(loop, "step", counting):
        train(settings, replace=True, display=QUIET)
    return sum(counts[: step - 1])


def factors_after(step: int, scratch: Path) -> dict[str, Tensor]:
    """Of a healthy run of six steps."""
    run = scratch / "healthy"
    if not run.exists():
        train(config(run, train={"save_every": 1, "keep": 9}), display=QUIET)
    return load_safetensors(run / f"checkpoints/step-{step:06}" / FACTORS)


def stopped_before(step: int, call: int, harm: Callable[[Tensor], Tensor], scratch: Path, *words: str) -> None:
    """A run with this harm stops, names the step and its rows, and its checkpoint is exactly that of step - 1."""
    run = scratch / "run"
    with poisoned(call, harm):
        said = clear_error(
            lambda: train(config(run), replace=True, display=QUIET),
            f"step {step}:",
            "nothing was updated",
            "train.jsonl:",
            *words,
        )
    expect(not (run / "result.json").exists(), "it went on")
    if step > 1:
        newest = list_checkpoints(run / "checkpoints")[-1]
        expect(newest.name == f"step-{step - 1:06}", f"{newest} after: {said}")
        kept, wanted = load_safetensors(newest / FACTORS), factors_after(step - 1, scratch)
        expect(all(torch.equal(kept[name], value) for name, value in wanted.items()), "the update was applied")
        resume(run, display=QUIET)  # without the harm
        expect(digest(run) == digest(scratch / "healthy"), "other bits after going on")


@fault(
    23,
    "a loss that is NaN or infinite at step k: not applied, the step and its rows named, resumable",
    tries=18,
    sample=2,
)
def bad_loss(n: int, scratch: Path) -> None:
    step, kind = n % 6 + 1, BAD[n // 6]
    call = batches_before(step, 64, scratch) + 1
    stopped_before(step, call, lambda loss: loss * 0 + kind, scratch, "loss of batch 1")


@fault(24, "an infinite gradient under a finite loss at step k: the same", tries=6, sample=1)
def bad_gradient(n: int, scratch: Path) -> None:
    call = batches_before(n + 1, 64, scratch) + 1
    stopped_before(n + 1, call, InfiniteGradient.apply, scratch, "gradient")


@fault(25, "NaN in one of several accumulated batches: the batch and its rows alone are named", tries=4, sample=1)
def bad_batch(n: int, scratch: Path) -> None:
    step, batch = n // 2 + 2, n % 2 + 1
    call = batches_before(step, 64, scratch) + batch
    stopped_before(step, call, lambda loss: loss * math.nan, scratch, f"loss of batch {batch} of")


@fault(23, "`skip_nonfinite: 1`: the first NaN is left out and counted, the second stops the run", tries=4, sample=1)
def skipped_then_stopped(n: int, scratch: Path) -> None:
    call = batches_before(n + 2, 64, scratch) + 1
    run = scratch / "run"
    with poisoned(call, lambda loss: loss * math.nan):
        train(config(run, train={"skip_nonfinite": 1}), replace=True, display=QUIET)
    lines = metrics(run)
    skipped = [line for line in lines if "skipped" in line]
    expect([line["step"] for line in skipped] == [n + 2] and skipped[0]["rows"], skipped)
    expect([line["step"] for line in lines if "eval_loss" not in line] == list(range(1, 7)), lines)
    adapter = Adapter.load(run / "adapter")
    expect(all(torch.isfinite(update.dense()).all() for update in adapter.factors.values()), "NaN was saved")
    state = json.loads((list_checkpoints(run / "checkpoints")[-1] / "state.json").read_text())
    expect((state["skipped"], state["not_finite"], state["step"]) == (1, 1, 6), state)

    always = changed(Poisoned, "loss", lambda self, *batch: (self._forward.loss(*batch)[0] * math.nan, 1))
    settings = config(run, train={"skip_nonfinite": 1}, data={"train": str(place() / "train.jsonl")}, evaluate={})
    with poisoned(0, lambda loss: loss), always:
        clear_error(
            lambda: train(settings, replace=True, display=QUIET), "step 2:", "nothing was updated", "skip_nonfinite"
        )


@fault(26, "spikes of 10 times the loss among healthy steps: each is skipped, no healthy step is", tries=50, sample=10)
def spikes(n: int, scratch: Path) -> None:
    random = torch.Generator().manual_seed(n)
    settings = TrainConfig(skip_spikes=4.0)
    state = TrainState()
    at = set((20 + torch.randperm(180, generator=random)[:12]).tolist())
    wrong = []
    for step in range(200):
        usual = 5.0 * math.exp(-step / 150) + 0.5
        loss = usual * (1 + 0.2 * float(torch.rand((), generator=random)))
        loss = loss * 10 if step in at else loss
        try:
            check_loss(loss, [], state, settings)
            note_update(loss, state, settings)
            skipped = False
        except Unfit as unfit:
            note_skip(unfit, state, settings)
            skipped = True
        if skipped != (step in at):
            wrong.append(step)
        expect(all(math.isfinite(value) and value < 10 for value in state.recent), "a spike is in the window")
        state.step += 1
    expect(not wrong, f"wrong at {wrong}")
    expect(state.skipped == 12, state.skipped)


@fault(26, "a loss that has risen for good: not skipped for ever, the run stops and says so")
def risen_for_good(n: int, scratch: Path) -> None:
    settings, state = TrainConfig(skip_spikes=4.0), TrainState(recent=[1.0] * 20)

    def on() -> None:
        for _ in range(100):
            try:
                check_loss(9.0, ["a:1"], state, settings)
            except Unfit as unfit:
                note_skip(unfit, state, settings)

    clear_error(on, "times the recent median of 1.000", "in a row")


@fault(27, "a step without one trained token: skipped, counted, named; a run of nothing else stops", tries=2, sample=2)
def nothing_trained(n: int, scratch: Path) -> None:
    original = loop.step

    def unlabelled(forward: Any, learners: Any, batches: list[Batch], *more: Any) -> Any:
        if n == 1 or learners[0].state.step == 2:
            labels = [torch.full_like(batch.labels_T, IGNORE) for batch in batches]
            batches = [replace(b, labels_T=l_T, supervised=0) for b, l_T in zip(batches, labels, strict=True)]
        return original(forward, learners, batches, *more)

    run = scratch / "run"
    with changed(loop, "step", unlabelled):
        if n == 1:
            work = lambda: train(config(run, train={"steps": 20}), replace=True, display=QUIET)  # noqa: E731
            clear_error(work, "step 11: none of its tokens", "in a row")
            return
        train(config(run), replace=True, display=QUIET)
    skipped = [line for line in metrics(run) if "skipped" in line]
    expect([line["step"] for line in skipped] == [3] and "none of its tokens" in skipped[0]["skipped"], skipped)


@fault(28, "NaN or infinity in one of the base's weights: refused, the tensor named", tries=6, sample=2)
def nan_in_base(n: int, scratch: Path) -> None:
    base = scratch / f"base-{n}"
    tiny_base(base)
    tensors = load_safetensors(base / "model.safetensors")
    name = sorted(tensors)[n * 3 % len(tensors)]
    tensors[name].reshape(-1)[n] = BAD[n % 3]
    save_safetensors(tensors, base / "model.safetensors")
    fields = {**run_file(place(), output=str(scratch / "run")), "base": str(base)}
    clear_error(lambda: train(parse_config(fields), display=QUIET), "NaN or Inf", name.removesuffix(".weight"))
    expect(not (scratch / "run").exists(), "a run was begun")


@fault(
    28,
    "NaN or infinity in one of an adapter's factors: refused, the tensor named; nor is one ever saved",
    tries=6,
    sample=2,
)
def nan_in_adapter(n: int, scratch: Path) -> None:
    folder = copy(finished_run() / "adapter", scratch / "adapter")
    tensors = load_safetensors(folder / "adapter_model.safetensors")
    name = sorted(tensors)[n * 5 % len(tensors)]
    tensors[name].reshape(-1)[n] = BAD[n % 3]
    save_safetensors(tensors, folder / "adapter_model.safetensors")
    clear_error(lambda: Adapter.load(folder), "NaN or infinity", name)
    clear_error(lambda: open_model(folder, base=str(place() / "base")), "NaN or infinity", name)
    whole = Adapter.load(finished_run() / "adapter")
    path, update = next(iter(whole.factors.items()))
    update.b_MR[0, 0] = BAD[n % 3]  # type: ignore[union-attr]
    try:
        whole.save(scratch / "saved")
    except RunError as error:
        expect(path in error.what and not (scratch / "saved").exists(), error)
    else:
        raise AssertionError("NaN was saved")


REFUSED = [
    ("train", "lr", 0), ("train", "lr", -1e-3), ("train", "lr", 2.0), ("train", "lr", "fast"), ("train", "clip", 0),
    ("train", "epochs", 0), ("train", "steps", 0), ("train", "tokens_per_step", 0), ("train", "weight_decay", -1),
    ("train", "skip_spikes", 0.5), ("train", "skip_nonfinite", -1), ("train", "keep", 0),
    ("adapter", "rank", 0), ("adapter", "rank", -4), ("adapter", "rank", 2.5), ("adapter", "rank", 33),
    ("adapter", "rank", True), ("adapter", "rank", "4"), ("adapter", "alpha", 0), ("adapter", "alpha", -1),
    ("adapter", "dropout", 1), ("adapter", "dropout", -0.1), ("data", "max_length", 0), ("data", "eval", 0),
]  # fmt: skip


@fault(
    29, "a rate, rank, alpha, dropout or count that can't be: refused, the field named", tries=len(REFUSED), sample=6
)
def impossible_setting(n: int, scratch: Path) -> None:
    section, name, value = REFUSED[n * 5 % len(REFUSED)]
    fields = run_file(place(), output=str(scratch / "run"))
    fields[section] = {**fields[section], name: value}
    clear_error(lambda: train(parse_config(fields), display=QUIET), name)
    expect(not (scratch / "run").exists(), "a run was begun")


@fault(29, "NaN and infinity where YAML can write them: refused, the field named", tries=8, sample=2)
def nan_setting(n: int, scratch: Path) -> None:
    section, name = (("train", "lr"), ("train", "clip"), ("adapter", "alpha"), ("adapter", "dropout"))[n % 4]
    value = ".nan" if n < 4 else ".inf"
    file = scratch / "run.yaml"
    file.write_text(config(scratch / "run").to_yaml())
    from deltaw.config import load_config

    clear_error(lambda: load_config(file, [f"{section}.{name}={value}"]), name)
    if section == "adapter" and name == "alpha":
        try:
            AdapterSpec.checked(alpha=float(value[1:]))
        except DeltawError:
            return
        raise AssertionError("AdapterSpec took it")


class Dead:
    """A forward whose loss no longer depends on the adapter: what a detached graph looks like."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward

    def __getattr__(self, name: str) -> Any:
        return getattr(self._forward, name)

    def loss(self, *batch: Any) -> tuple[Tensor, int]:
        loss, count = self._forward.loss(*batch)
        return (loss.detach() + 0 * loss if torch.is_grad_enabled() else loss), count


@fault(
    27,
    "a run that learns nothing (no gradient, factors that stay zero, a rate below rounding): stops, says why",
    tries=3,
    sample=3,
)
def watchdog(n: int, scratch: Path) -> None:
    run, original = scratch / "run", opening.plan_forward
    if n == 0:
        with changed(opening, "plan_forward", lambda model: Dead(original(model))):
            clear_error(lambda: train(config(run), display=QUIET), "got no gradient in 6 updates", "learn nothing")
    elif n == 1:
        with changed(learner, "set_rate", lambda optimizer, rate: [g.update(lr=0.0) for g in optimizer.param_groups]):
            clear_error(
                lambda: train(config(run), replace=True, display=QUIET), "still zero after 6 updates", "train.lr"
            )
    else:
        settings = config(run, train={"steps": 30, "lr": 1e-11})
        clear_error(lambda: train(settings, replace=True, display=QUIET), "below the rounding", "1e-11")
