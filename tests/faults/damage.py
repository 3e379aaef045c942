"""What lies on the disk is not what was written: forgotten, damaged, left over, misdated, in use (6-9, 12, 13, 22)."""

import contextlib
import os
import random
import shutil
import stat
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from deltaw.adapter.file import Adapter
from deltaw.factors import LowRank
from deltaw.files.atomic import write_text_atomic
from deltaw.files.safetensors import save_safetensors
from deltaw.training.checkpoint import is_whole, latest_checkpoint, list_checkpoints
from deltaw.training.run import resume, train
from tests.faults.common import (
    QUIET,
    changed,
    child,
    command,
    config,
    copy,
    digest,
    expect_exit,
    finished_run,
    stopped_run,
)
from tests.faults.crash import finish
from tests.faults.disk import STYLES, Cut, PowerCut
from tests.faults.fault import expect, fault
from tests.faults.storage import FILES, committed, newest, save

SAVES = 4


def saves_until_cut(at: int, style: str, seed: int, scratch: Path) -> tuple[int, int]:
    """(the last step whose save had returned when the power went at the `at`th fsync, fsyncs made)."""
    root, acknowledged = scratch / "disk", 0
    for folder in (root, scratch / "left"):
        shutil.rmtree(folder, ignore_errors=True)
    (root / "run").mkdir(parents=True)
    with PowerCut(root, at, scratch / "left", style, seed) as power:
        try:
            for step in range(1, SAVES + 1):
                save(root / "run" / "checkpoints", step)
                acknowledged = step
        except Cut:
            pass
    return acknowledged, power.synced


@fault(
    6,
    "the power is cut at the kth fsync of four saves, and what wasn't fsynced is gone, in three ways a file "
    "system may do it: "
    "the last checkpoint whose save had returned is there and is the one taken",
    tries=150,
    sample=9,
    at_once=50,
)
def power_cut_in_a_save(n: int, scratch: Path) -> None:
    _, total = saves_until_cut(10**9, STYLES[n % 3], n, scratch)
    acknowledged, _ = saves_until_cut(1 + n // 3 * 7 % total, STYLES[n % 3], n, scratch)
    left = scratch / "left" / "run" / "checkpoints"
    expect(newest(left) >= acknowledged, f"{newest(left)} is taken, {acknowledged} was acknowledged")
    if STYLES[n % 3] != "mixed" and left.exists():  # there an old one may be half deleted
        expect(all(is_whole(path) for path in list_checkpoints(left)), os.listdir(left))


@fault(
    6,
    "the power is cut at the kth fsync of a whole run: it goes on, from its last checkpoint or from the start, "
    "to the same bits",
    tries=50,
    sample=2,
    at_once=10,
)
def power_cut_in_a_run(n: int, scratch: Path) -> None:
    finished_run()
    root, left = scratch / "disk", scratch / "left"
    for folder in (root, left):
        shutil.rmtree(folder, ignore_errors=True)
    root.mkdir()
    with PowerCut(root, 1 + n * 13 % 64, left, STYLES[n % 3], n) as power, contextlib.suppress(Cut):
        train(config(root / "run"), display=QUIET)
    expect(power.synced >= 60 or power.synced == power.at, f"{power.synced} fsyncs")
    finish(left / "run")


@fault(
    7,
    "one bit flipped anywhere in the newest checkpoint, state and manifest included: seen, reported, the one "
    "before is taken",
    tries=1_000,
    sample=30,
    at_once=500,
)
def flipped_bit(n: int, scratch: Path) -> None:
    folder = scratch / "checkpoints"
    if not folder.exists():
        copy(committed(), folder)
    chance = random.Random(n)
    file = folder / "step-000002" / FILES[n % 4 if n < 400 else 0 if chance.random() < 0.5 else 1]
    whole = file.read_bytes()
    data = bytearray(whole)
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)
    said: list[str] = []
    with changed(QUIET, "say", said.append):
        expect(newest(folder) == 1, f"{newest(folder)} was taken")
    expect(said and "skipped" in said[0] and file.name in said[0], said)
    file.write_bytes(whole)
    expect(newest(folder) == 2, "the whole one wasn't taken")


@fault(
    7,
    "a file of the newest checkpoint cut off, empty, missing, a folder, or exchanged with the older one's: the same",
    tries=20,
    sample=5,
)
def damaged_file(n: int, scratch: Path) -> None:
    folder = copy(committed(), scratch / "checkpoints")
    file = folder / "step-000002" / FILES[n % 4]
    how = n // 4
    if how == 0:
        os.truncate(file, file.stat().st_size // 2)
    elif how == 1:
        os.truncate(file, 0)
    elif how == 2:
        file.unlink()
    elif how == 3:
        file.unlink()
        file.mkdir()
    else:
        other = folder / "step-000001" / file.name
        data = other.read_bytes()
        # The tensors of both are the same here: a byte more is what another step's would differ by.
        file.write_bytes(data if data != file.read_bytes() else data + b"\n")
    said: list[str] = []
    with changed(QUIET, "say", said.append):
        expect(newest(folder) == 1, f"{newest(folder)} was taken")
    expect(said and file.name in said[0], said)


@fault(7, "a run whose newest checkpoint is damaged: goes on from the one before to the same bits", tries=8, sample=1)
def damaged_run(n: int, scratch: Path) -> None:
    run = copy(stopped_run(), scratch / "run")
    file = list_checkpoints(run / "checkpoints")[-1] / FILES[n % 4]
    os.truncate(file, n // 4 * 100)
    ended = child(command("train", run))
    expect_exit(ended, 0)
    expect("checkpoint skipped" in ended.output and file.name in ended.output, ended.output[-300:])
    expect(digest(run) == digest(finished_run()), "other bits")


@fault(
    8, "all checkpoints damaged: exit 2, each named and why, nothing started over, nothing touched", tries=12, sample=3
)
def all_damaged(n: int, scratch: Path) -> None:
    run = copy(stopped_run(), scratch / "run")
    found = list_checkpoints(run / "checkpoints")
    for number, path in enumerate(found):
        os.truncate(path / FILES[(n + number) % 4], n * 3)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    ended = child(command("train", run, "--quiet"))
    expect_exit(ended, 2)
    expect(all(path.name in ended.output for path in found) and "damaged" in ended.output, ended.output)
    expect(all(path.read_bytes() == data for path, data in before.items()), "something was touched")


@fault(
    9,
    "what killed saves left (temporary files and folders of every kind, whole checkpoints among them): ignored, "
    "and swept",
    tries=4,
    sample=4,
)
def left_over(n: int, scratch: Path) -> None:
    run = copy(stopped_run(), scratch / "run")
    last = list_checkpoints(run / "checkpoints")[-1]
    (run / "adapter").mkdir()
    left = [
        Path(shutil.copytree(last, last.with_name(".step-000099.new.tmp"))),
        last.with_name(".step-000006.0123456789abcdef.tmp"),
        run / ".result.json.0123456789abcdef.tmp",
        run / "adapter" / ".adapter_config.json.0123456789abcdef.tmp",
    ]
    left[1].mkdir(exist_ok=True)
    for file in left[2:]:
        file.write_bytes(b"half")
    saved = latest_checkpoint(run / "checkpoints", QUIET)
    expect(saved is not None and saved.state.step == 5, "a leftover was taken")
    resume(run, display=QUIET)
    expect(not any(path.exists() for path in left), [path for path in left if path.exists()])
    expect(digest(run) == digest(finished_run()), "other bits")


def _other(adapter: Adapter) -> Adapter:
    factors = {path: LowRank(u.a_RN + 1, u.b_MR - 1, u.scale) for path, u in adapter.factors.items()}  # type: ignore[union-attr]
    return Adapter(adapter.spec, factors, adapter.base)


@fault(
    12,
    "an adapter saved over one that is loaded, here and by a reader that has the old file mapped: both have what "
    "they read",
    tries=10,
    sample=2,
)
def saved_over(n: int, scratch: Path) -> None:
    folder = copy(finished_run() / "adapter", scratch / "adapter")
    file = folder / "adapter_model.safetensors"
    ours, theirs = Adapter.load(folder), load_file(file)
    wanted = {name: value.clone() for name, value in theirs.items()}
    with safe_open(file, framework="pt") as mapped:
        for _ in range(1 + n % 3):
            _other(Adapter.load(folder)).save(folder)
        late = {name: mapped.get_tensor(name) for name in mapped.keys()}  # noqa: SIM118
    expect(all(torch.equal(value, wanted[name]) for name, value in theirs.items()), "what was loaded changed")
    expect(all(torch.equal(value, wanted[name]) for name, value in late.items()), "what is mapped changed")
    new = Adapter.load(folder)
    for path, update in ours.factors.items():
        shift = 1 + n % 3
        changed_ = new.factors[path].a_RN - update.a_RN  # type: ignore[union-attr]
        expect(torch.allclose(changed_, torch.full_like(changed_, shift), atol=1e-5), "the new file has other values")


@fault(13, "files saved under any umask: modes follow it, and a file that was there keeps its own", tries=16, sample=4)
def file_modes(n: int, scratch: Path) -> None:
    umask = (0o022, 0o002, 0o027, 0o077)[n % 4]
    place = scratch / f"{n}"
    place.mkdir()
    before = os.umask(umask)
    try:
        if n < 4:
            save(place / "checkpoints", 1)
            Adapter.load(finished_run() / "adapter").save(place / "adapter")
            files = [path for path in place.rglob("*") if path.is_file()]
            expect(len(files) == 8, files)
        else:
            files = [place / "a.json", place / "b.safetensors"]
            if n >= 8:
                for file in files:
                    file.touch()
                    file.chmod(0o640)
            write_text_atomic(files[0], "{}")
            save_safetensors({"x": torch.zeros(3)}, files[1])
    finally:
        os.umask(before)
    wanted = 0o640 if n >= 8 else 0o666 & ~umask
    modes = {oct(stat.S_IMODE(file.stat().st_mode)) for file in files}
    expect(modes == {oct(wanted)}, f"{modes}, not {oct(wanted)}")


@fault(
    22,
    "clocks that jump: modification times equal, reversed or in the future: the choice and the rotation are by step",
    tries=9,
    sample=3,
)
def clock_jump(n: int, scratch: Path) -> None:
    folder = copy(committed(), scratch / "checkpoints")
    for step in range(3, 6):
        for number, path in enumerate(list_checkpoints(folder)):
            moment = (10**9, 10**9 - 1000 * number, 4 * 10**9 + number)[n % 3]
            for part in (*path.iterdir(), path):
                os.utime(part, (moment, moment))
        save(folder, step)
    names = [path.name for path in list_checkpoints(folder)]
    expect(names == ["step-000004", "step-000005"] and newest(folder) == 5, names)
