"""Going on: exactly where the run was, or not at all (14-21)."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import torch

from deltaw.data.loader import Loader
from deltaw.data.opening import open_dataset
from deltaw.files.safetensors import load_safetensors, save_safetensors
from deltaw.training.checkpoint import MANIFEST, MOMENTS, _manifest, list_checkpoints
from deltaw.training.run import resume, train
from tests.faults.common import (
    QUIET,
    changed,
    child,
    clear_error,
    command,
    config,
    copy,
    digest,
    expect_exit,
    finished_run,
    metrics,
    place,
    stopped_run,
    train_and_signal,
)
from tests.faults.fault import expect, fault
from tests.tiny import tiny_base, words

# (override, whether --allow lets it through)
CHANGES = [
    ("train.lr=1e-3", True),
    ("train.steps=8", True),
    ("train.schedule=cosine", True),
    ("train.warmup_steps=1", True),
    ("train.lr_ratio_b=4", True),
    ("train.weight_decay=0.1", True),
    ("train.clip=0.5", True),
    ("train.tokens_per_batch=32", True),
    ("train.save_every=1", True),
    ("train.eval_every=2", True),
    ("train.keep=1", True),
    ("train.skip_nonfinite=2", True),
    ("evaluate.samples=1", True),
    ("train.seed=1", False),
    ("train.tokens_per_step=64", False),
    ("train.dtype=bfloat16", False),
    ("adapter.rank=8", False),
    ("adapter.alpha=4", False),
    ("adapter.targets=[q_proj]", False),
    ("adapter.init=pissa", False),
    ("adapter.dropout=0.1", False),
    ("adapter.magnitude=true", False),
    ("data.seed=1", False),
    ("data.eval=4", False),
    ("data.limit=20", False),
    ("data.max_length=64", False),
    ("data.too_long=truncate", False),
]


@fault(
    14,
    "a setting changed before resuming, field by field: the difference is shown; what decides data, shapes or "
    "arithmetic is refused, the rest needs --allow",
    tries=len(CHANGES),
    sample=4,
)
def changed_setting(n: int, scratch: Path) -> None:
    override, allowed = CHANGES[(n * 7) % len(CHANGES)]
    run = copy(stopped_run(), scratch / "run")
    field = override.partition("=")[0]
    said = clear_error(
        lambda: resume(run, [override], display=QUIET), field, "->", "--allow" if allowed else "put them"
    )
    expect(("can't be resumed with these settings" in said) != allowed, said)
    if allowed:
        resume(run, [override], allow=True, display=QUIET)
        expect((run / "result.json").is_file(), "it didn't finish")
    else:
        clear_error(lambda: resume(run, [override], allow=True, display=QUIET), field)
        expect(not (run / "result.json").exists(), "it went on")


@fault(14, "the run folder's config.yaml edited by hand: the same difference is seen")
def edited_config(n: int, scratch: Path) -> None:
    run = copy(stopped_run(), scratch / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("lr: 0.01", "lr: 0.02").replace("rank: 4", "rank: 8"))
    clear_error(lambda: resume(run, display=QUIET), "adapter.rank: 4 -> 8")


@fault(15, "resumed on another base of the same shape, the files replaced or another folder named: refused", tries=2)
def other_base(n: int, scratch: Path) -> None:
    run = copy(stopped_run(), scratch / "run")
    tiny_base(scratch / "other", seed=1)
    override = [f"base={scratch / 'other'}"]
    if n == 0:
        clear_error(lambda: resume(run, override, allow=True, display=QUIET), "base", "changed after")
        return
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(place() / "base"), str(scratch / "other")))
    clear_error(lambda: resume(run, display=QUIET), "base:", "->", "--allow")


def _other_rows(file: Path, n: int) -> None:
    """Rows in another order, one changed, one more, one less, one twice."""
    lines = words(file).read_text().splitlines()
    kinds = [
        [lines[1], lines[0], *lines[2:]],
        [*lines[:30], lines[30].replace("ab", "ba"), *lines[31:]],
        [*lines, '{"prompt": "say more ", "completion": "ab"}'],
        lines[:-1],
        [*lines, lines[5]],
    ]
    file.write_text("\n".join(kinds[n % len(kinds)]) + "\n")


@fault(16, "the data reordered, changed, grown, shrunk or repeated before resuming: refused by fingerprint", tries=5)
def other_data(n: int, scratch: Path) -> None:
    run = copy(stopped_run(), scratch / "run")
    _other_rows(scratch / "train.jsonl", n)
    override = [f"data.train={scratch / 'train.jsonl'}"]
    clear_error(lambda: resume(run, override, allow=True, display=QUIET), "data", "changed after")


@fault(16, "the same data under another name: goes on, with --allow, to the same bits")
def moved_data(n: int, scratch: Path) -> None:
    run = copy(stopped_run(), scratch / "run")
    words(scratch / "elsewhere.jsonl")
    override = [f"data.train={scratch / 'elsewhere.jsonl'}"]
    clear_error(lambda: resume(run, override, display=QUIET), "data.train", "--allow")
    resume(run, override, allow=True, display=QUIET)
    expect(digest(run) == digest(finished_run()), "other bits")


@fault(17, "another number of batches per step (accumulation): every step has the same rows in the same order", tries=6)
def same_rows_in_any_batches(n: int, scratch: Path) -> None:
    _, _, dataset = open_dataset(config(scratch / "run"), QUIET)

    def rows(tokens_per_batch: int) -> list[list[str]]:
        loader = iter(Loader(dataset.train, 128, tokens_per_batch, seed=n))
        return [[origin for batch in next(loader)[0] for origin in batch.origins] for _ in range(20)]

    expect(rows(16) == rows(64) == rows(128), "other rows")


STATE_FILES = ("state.json", "factors.safetensors", "moments.safetensors", "manifest.sha256")


@fault(18, "a file of the only checkpoint missing, or the moments of a parameter: an error that names it", tries=5)
def missing_state(n: int, scratch: Path) -> None:
    run = copy(stopped_run(), scratch / "run")
    *old, newest = list_checkpoints(run / "checkpoints")
    for path in old:
        shutil.rmtree(path)
    if n < len(STATE_FILES):
        (newest / STATE_FILES[n]).unlink()
        clear_error(lambda: resume(run, display=QUIET), "all 1 checkpoints are broken", STATE_FILES[n])
        return
    moments = load_safetensors(newest / MOMENTS)
    moments.popitem()
    save_safetensors(moments, newest / MOMENTS)
    (newest / MANIFEST).write_text(_manifest(newest))
    clear_error(lambda: resume(run, display=QUIET), "optimiser state")


def _settings(n: int) -> tuple[int, dict[str, Any]]:
    """(steps, changes): mid-epoch and over its end, several batches per step, dropout, every kind of start."""
    adapters: list[dict[str, Any]] = [
        {"rank": 4, "alpha": 8},
        {"rank": 4, "alpha": 8, "dropout": 0.3},
        {"rank": 4, "alpha": 8, "init": "pissa"},
        {"rank": 4, "alpha": 8, "magnitude": True},
        {"rank": 4, "alpha": 8, "init": "eva"},
    ]
    return 16, {"adapter": adapters[n % len(adapters)], "train": {"steps": 16, "tokens_per_batch": 32, "eval_every": 3}}


@fault(
    19,
    "stopped after every step k, mid-epoch and beyond an epoch, several batches per step, five kinds of adapter: the "
    "same bits and the same metrics as the run that wasn't",
    tries=75,
    sample=3,
    at_once=15,
)
def stopped_at_every_step(n: int, scratch: Path) -> None:
    kind, step = divmod(n, 15)
    _, changes = _settings(kind)
    straight = scratch / f"straight-{kind}"
    if not straight.exists():
        train(config(straight, **changes), display=QUIET)
    ended = child(lambda: train_and_signal(config(scratch / "cut", **changes), step + 1, signal.SIGTERM))
    expect_exit(ended, 128 + signal.SIGTERM)
    resume(scratch / "cut", display=QUIET)
    expect(digest(scratch / "cut") == digest(straight), f"other bits after {step + 1}")
    expect(metrics(scratch / "cut") == metrics(straight), f"other metrics after {step + 1}")
    shutil.rmtree(scratch / "cut")


@fault(19, "killed in the middle of accumulating step k: the same bits", tries=12, sample=1)
def killed_while_accumulating(n: int, scratch: Path) -> None:
    from deltaw.training import run as loop

    calls: list[int] = []
    shutil.rmtree(scratch / "cut", ignore_errors=True)

    def work() -> None:
        step = loop.step

        def stepping(forward: Any, *args: Any) -> Any:
            loss_of = forward.loss

            def loss(batch: Any) -> Any:
                calls.append(1)
                if len(calls) == 2 + n:
                    os.kill(os.getpid(), signal.SIGKILL)
                return loss_of(batch)

            object.__setattr__(forward, "loss", loss)
            try:
                return step(forward, *args)
            finally:
                object.__delattr__(forward, "loss")

        loop.step = stepping
        train(config(scratch / "cut", train={"tokens_per_batch": 32, "save_every": 1}), display=QUIET)

    ended = child(work)
    expect(ended.code == 137, ended)
    straight = scratch / "straight"
    if not straight.exists():
        train(config(straight, train={"tokens_per_batch": 32, "save_every": 1}), display=QUIET)
    resume(scratch / "cut", display=QUIET)
    expect(digest(scratch / "cut") == digest(straight), "other bits")
    expect(metrics(scratch / "cut") == metrics(straight), "other metrics")


@fault(21, "the run folder moved, and opened by another relative path: goes on to the same bits", tries=2)
def moved_run(n: int, scratch: Path) -> None:
    copy(stopped_run(), scratch / "elsewhere" / "run")
    if n == 0:
        resume(scratch / "elsewhere" / "run", display=QUIET)
    else:

        def work() -> None:
            os.chdir(scratch / "elsewhere")
            command("train", "run", "--quiet")()

        expect_exit(child(work), 0)
    expect(digest(scratch / "elsewhere" / "run") == digest(finished_run()), "other bits")


@fault(21, "the best step's checkpoint is gone: said, and the last step's adapter is what is saved")
def best_is_gone(n: int, scratch: Path) -> None:
    run = copy(stopped_run(), scratch / "run")
    best = json.loads((list_checkpoints(run / "checkpoints")[-1] / "state.json").read_text())["best_step"]
    expect(best and best != 5, f"the best step is {best}")
    shutil.rmtree(run / "checkpoints" / f"step-{best:06}")
    said: list[str] = []
    with changed(QUIET, "say", said.append):
        resume(run, ["train.eval_every=100"], allow=True, display=QUIET)
    result = json.loads((run / "result.json").read_text())
    expect(result["best_step"] == 6 and any(f"step {best} was the best" in line for line in said), said)


@fault(19, "`verify-resume` says exact of a run that is, and not of one that isn't", tries=2)
def verified(n: int, scratch: Path) -> None:
    from deltaw.training.verify import verify_resume

    if n == 0:
        found = verify_resume(config(scratch / "run"), 4, QUIET)
        expect(found.exact and len(found.resumed) == 3, found.text())
        return
    from deltaw.training import run as loop

    step = loop.step

    def drifting(forward: Any, learners: Any, *args: Any) -> Any:
        records = step(forward, learners, *args)
        with torch.no_grad():
            for parameter in learners[0].attached.parameters:
                parameter.add_(1e-6 * torch.rand((), generator=RANDOM))
        return records

    with changed(loop, "step", drifting):
        expect(not verify_resume(config(scratch / "run"), 3, QUIET).exact, "a drift wasn't seen")


RANDOM = torch.Generator().manual_seed(0)


@fault(14, "a run that is finished, or isn't a run: refused, nothing touched", tries=2)
def finished_or_none(n: int, scratch: Path) -> None:
    if n == 0:
        run = copy(finished_run(), scratch / "run")
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
        clear_error(lambda: resume(run, display=QUIET), "finished")
        expect(all(path.read_bytes() == data for path, data in before.items()), "it was touched")
    else:
        (scratch / "mine").mkdir()
        clear_error(lambda: resume(scratch / "mine", display=QUIET), "isn't a run")
        expect(not any((scratch / "mine").iterdir()), "something was left there")


@fault(17, "resumed with other threads, device or PyTorch than before: said, since the last bits will differ", tries=3)
def other_conditions(n: int, scratch: Path) -> None:
    run = copy(stopped_run(), scratch / "run")
    newest = list_checkpoints(run / "checkpoints")[-1]
    state = json.loads((newest / "state.json").read_text())
    name = ("threads", "device", "torch")[n]
    state["conditions"][name] = "other"
    (newest / "state.json").write_text(json.dumps(state))
    (newest / MANIFEST).write_text(_manifest(newest))
    said: list[str] = []
    with changed(QUIET, "say", said.append):
        resume(run, display=QUIET)
    expect(any(f"{name} other -> " in line and "last bits" in line for line in said), said)
