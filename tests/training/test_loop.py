"""The loop: learns, is exact to the token, resumes to the bit, and stops before it does harm."""

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaw.adapter.file import Adapter
from deltaw.config import parse_config
from deltaw.errors import InputError, RunError
from deltaw.show.progress import Display
from deltaw.training import opening
from deltaw.training import run as loop
from deltaw.training.run import resume, train
from deltaw.training.stop import Stopped
from tests.tiny import run_file, tiny_base, words

QUIET = Display(quiet=True)


def run(folder: Path, **changes: Any) -> Adapter:
    return train(parse_config(run_file(folder, **changes)), display=QUIET)


def digest(path: Path) -> str:
    return hashlib.sha256((path / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def changed(folder: Path, **train_options: Any) -> dict[str, Any]:
    return {"train": {**run_file(folder)["train"], **train_options}}


def metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_leaves_everything_it_promises(folder: Path) -> None:
    run(folder, **changed(folder, steps=20))
    result = json.loads((folder / "run/result.json").read_text())
    assert result["eval"]["after"]["loss"] < result["eval"]["before"]["loss"]
    assert {"base", "adapter", "trained_parameters", "steps", "tokens", "supervised_tokens", "seconds"} <= result.keys()
    assert {"tokens_per_second", "peak_memory_bytes", "eval", "dropped", "truncated"} <= result.keys()
    assert result["eval"]["after"].keys() == {"loss", "perplexity", "exact_match"}
    assert result["steps"] == 20 and result["tokens"] > result["supervised_tokens"] > 0
    for name in ("config.yaml", "metrics.jsonl", "adapter/adapter_config.json"):
        assert (folder / "run" / name).is_file()
    steps = [line["step"] for line in metrics(folder / "run") if "loss" in line]
    assert steps == list(range(1, 21))


def test_two_runs_of_one_seed_are_the_same_to_the_bit(folder: Path) -> None:
    run(folder)
    run(folder, output=str(folder / "again"))
    run(folder, output=str(folder / "other"), **changed(folder, seed=1))
    assert digest(folder / "run") == digest(folder / "again")
    assert digest(folder / "run") != digest(folder / "other")


def test_full_fine_tuning_learns_and_resumes_to_the_bit(folder: Path, monkeypatch) -> None:
    whole = run(folder, adapter="full")
    assert whole.spec.full and set(whole.spec.targets) >= {"q_proj", "down_proj"}
    result = json.loads((folder / "run/result.json").read_text())
    assert result["trained_parameters"] == whole.parameters == 2 * 32 * (32 + 16 + 16 + 32 + 3 * 48)
    assert result["eval"]["after"]["loss"] < result["eval"]["before"]["loss"]
    interrupted = run_file(folder, adapter="full", output=str(folder / "stopped"))
    stop_at(monkeypatch, 3, signal.SIGTERM)
    with pytest.raises(Stopped):
        train(parse_config(interrupted), display=QUIET)
    monkeypatch.undo()
    resumed = resume(folder / "stopped", display=QUIET)
    assert all(torch.equal(resumed.factors[p].delta_MN, u.delta_MN) for p, u in whole.factors.items())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_stopped_and_resumed_is_the_same_to_the_bit(folder: Path, monkeypatch, stop_after: int, dropout: float) -> None:
    adapter = {"rank": 4, "alpha": 8, "dropout": dropout}
    run(folder, adapter=adapter)
    stop_at(monkeypatch, stop_after, signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        run(folder, output=str(folder / "cut"), adapter=adapter)
    assert stopped.value.exit_code == 143
    monkeypatch.undo()
    resume(folder / "cut", display=QUIET)
    assert digest(folder / "cut") == digest(folder / "run")
    untimed = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in metrics(folder / n)] for n in ("cut", "run")
    ]
    assert untimed[0] == untimed[1]


def test_frozen_layers_are_computed_once_and_a_resumed_run_has_the_same_bits(folder: Path, monkeypatch) -> None:
    """Over two epochs, an adapter on the upper layer alone."""
    adapter = {"rank": 4, "alpha": 8, "targets": ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"]}
    said: list[str] = []
    monkeypatch.setattr(Display, "say", lambda self, text="": said.append(text))
    run(folder, adapter=adapter, **changed(folder, steps=24))
    assert any("1 frozen layers computed once" in line for line in said)
    said.clear()
    run(folder, output=str(folder / "short"), adapter=adapter, **changed(folder, steps=4))
    assert not any("computed once" in line for line in said)  # less than an epoch: nothing to gain
    stop_at(monkeypatch, 15, signal.SIGTERM)
    with pytest.raises(Stopped):
        run(folder, output=str(folder / "cut"), adapter=adapter, **changed(folder, steps=24))
    monkeypatch.undo()
    resume(folder / "cut", display=QUIET)
    assert digest(folder / "cut") == digest(folder / "run")


def test_a_crash_between_checkpoints_loses_only_the_steps_since(folder: Path, monkeypatch) -> None:
    run(folder)
    crash_at(monkeypatch, 4)
    with pytest.raises(RuntimeError, match="crash"):
        run(folder, output=str(folder / "cut"))
    monkeypatch.undo()
    with (folder / "cut/metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a line cut short
    (folder / "cut/checkpoints/.step-000004.new.tmp").mkdir()
    resume(folder / "cut", display=QUIET)
    assert digest(folder / "cut") == digest(folder / "run")
    assert len(metrics(folder / "cut")) == len(metrics(folder / "run"))


def test_a_damaged_checkpoint_is_skipped_and_all_damaged_is_an_error(folder: Path, monkeypatch) -> None:
    run(folder)
    crash_at(monkeypatch, 5)
    with pytest.raises(RuntimeError):
        run(folder, output=str(folder / "cut"))
    monkeypatch.undo()
    newest, oldest = (folder / "cut/checkpoints" / name for name in ("step-000004", "step-000002"))
    flip_bit(newest / "moments.safetensors")
    resume(folder / "cut", display=QUIET)
    assert digest(folder / "cut") == digest(folder / "run")
    (folder / "cut/result.json").unlink()
    for path in (folder / "cut/checkpoints").iterdir():
        flip_bit(path / "factors.safetensors")
    with pytest.raises(InputError, match="are broken"):
        resume(folder / "cut", display=QUIET)
    assert not oldest.exists()  # rotated away, by step


def test_accumulation_is_exact_to_the_token(folder: Path) -> None:
    """Batches of 16 tokens or one of 128: the same sums, so the same factors but for rounding."""
    whole = run(folder, **changed(folder, tokens_per_batch=128))
    parts = run(folder, output=str(folder / "parts"), **changed(folder, tokens_per_batch=16))
    for path, update in whole.factors.items():
        torch.testing.assert_close(parts.factors[path].dense(), update.dense(), rtol=1e-3, atol=1e-5)


def test_nan_stops_before_the_update_and_names_the_rows(folder: Path, monkeypatch) -> None:
    original = opening.plan_forward

    def poisoned(model):
        forward, calls = original(model), []

        class Poisoned:
            def __getattr__(self, name):
                return getattr(forward, name)

            def loss(self, *batch):
                if torch.is_grad_enabled():
                    calls.append(1)
                loss, count = forward.loss(*batch)
                return (loss * float("nan") if len(calls) == 4 else loss), count

        return Poisoned()

    monkeypatch.setattr(opening, "plan_forward", poisoned)
    with pytest.raises(RunError, match=r"step \d+: the loss of batch \d of \d is NaN.*\n?.*rows: .*train.jsonl:\d+"):
        run(folder)
    states = sorted((folder / "run/checkpoints").iterdir())
    assert states, "the state before the bad step is saved"
    assert not (folder / "run/result.json").exists()


def test_resume_refuses_other_data_and_a_finished_run(folder: Path, monkeypatch) -> None:
    stop_at(monkeypatch, 2, signal.SIGINT)
    with pytest.raises(Stopped) as stopped:
        run(folder)
    assert stopped.value.exit_code == 130
    monkeypatch.undo()
    words(folder / "train.jsonl", count=61)
    with pytest.raises(InputError, match="data changed"):
        resume(folder / "run", display=QUIET)
    words(folder / "train.jsonl")
    tiny_base(folder / "base", seed=1)
    with pytest.raises(InputError, match="base changed"):
        resume(folder / "run", display=QUIET)
    tiny_base(folder / "base")
    resume(folder / "run", display=QUIET)
    with pytest.raises(InputError, match="finished"):
        resume(folder / "run", display=QUIET)


def test_a_moved_run_resumes(folder: Path, monkeypatch) -> None:
    stop_at(monkeypatch, 2, signal.SIGTERM)
    with pytest.raises(Stopped):
        run(folder)
    monkeypatch.undo()
    (folder / "run").rename(folder / "moved")
    resume(folder / "moved", display=QUIET)
    assert (folder / "moved/result.json").is_file() and not (folder / "run").exists()


def test_output_is_checked_before_anything_is_read(folder: Path) -> None:
    (folder / "file").write_text("")
    (folder / "mine").mkdir()
    (folder / "mine/thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="not a folder"):
        run(folder, output=str(folder / "file/run"), base="nowhere")
    with pytest.raises(InputError, match="isn't a run"):
        run(folder, output=str(folder / "mine"), base="nowhere")
    with pytest.raises(InputError, match="isn't a run"):
        train(parse_config(run_file(folder, output=str(folder / "mine"))), replace=True, display=QUIET)
    assert (folder / "mine/thesis.txt").read_text() == "precious"
    run(folder)
    with pytest.raises(InputError, match="already holds a run"):
        run(folder)


def test_unwritable_output_is_an_error(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may write anywhere
    with pytest.raises(InputError, match="permission"):
        run(folder, output=str(folder / "locked/run"), base="nowhere")


@pytest.mark.parametrize(
    "wrong", [{"adapter": {"targets": ["w_pack"]}}, {"adapter": {"rank": 33}}, {"data": {"train": "no.jsonl"}}]
)
def test_what_can_be_seen_before_the_weights_are_read_is_seen_then(folder: Path, monkeypatch, wrong: dict) -> None:
    def read(*args: Any, **options: Any) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(opening, "open_base", read)
    with pytest.raises(InputError):
        run(folder, **wrong)
    assert not (folder / "run").exists()
    with pytest.raises(AssertionError, match="weights were read"):
        run(folder)


def test_lora_plus_scales_the_rate_of_b(folder: Path) -> None:
    """One step at rate 0 for A (ratio huge, rate tiny) moves only B."""
    slow = run(folder, **changed(folder, steps=1, lr=1e-9, warmup_steps=0, lr_ratio_b=1e6))
    fresh = run(folder, output=str(folder / "b"), **changed(folder, steps=1, lr=1e-12, warmup_steps=0))
    for path, update in slow.factors.items():
        torch.testing.assert_close(update.a_RN, fresh.factors[path].a_RN, rtol=0, atol=1e-7)
        assert update.b_MR.abs().max() > 1e-4 > fresh.factors[path].b_MR.abs().max()


def test_the_best_adapter_is_what_is_saved(folder: Path) -> None:
    """A rate that ruins the model after its first good steps: the result is the best step's, not the last's."""
    run(folder, **changed(folder, steps=12, lr=0.9, schedule="constant", eval_every=1))
    lines = metrics(folder / "run")
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    result = json.loads((folder / "run/result.json").read_text())
    assert result["best_step"] == min(losses, key=losses.__getitem__)
    assert result["eval"]["after"]["loss"] == pytest.approx(min(losses.values()), rel=1e-4)


def stop_at(monkeypatch, step: int, number: int) -> None:
    """Deliver a signal while update `step` is computed."""
    original = loop.step

    def stepping(forward, learners, *args):
        records = original(forward, learners, *args)
        if learners[0].state.step == step:
            os.kill(os.getpid(), number)
        return records

    monkeypatch.setattr(loop, "step", stepping)


def crash_at(monkeypatch, step: int) -> None:
    original = loop.step

    def stepping(forward, learners, *args):
        if learners[0].state.step == step:
            raise RuntimeError("crash")
        return original(forward, learners, *args)

    monkeypatch.setattr(loop, "step", stepping)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
