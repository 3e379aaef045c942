"""`deltaw doctor`: what this machine has, and what follows for training on it (machine/).

The Result's data is for bug reports: figures and versions, no path, no user's or host's name. The text, for the user's
own eyes, also says where the caches lie.

    demo        its seconds are in proportion to the products' rate: 283 s at 318 GFLOP/s (two Xeon cores, float32)
    fits        a base takes its weights in the dtype that would be chosen, and training it about SPARE beside them: of
                the demo's 1.8 GiB the weights are 0.3 (`deltaw plan` measures a run of one's own)
"""

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deltaw.commands.demo import missing_packages
from deltaw.files.output import gib
from deltaw.machine import look
from deltaw.machine.cores import Cores, measure_cores
from deltaw.show.progress import Display
from deltaw.show.result import Result
from deltaw.show.table import table
from deltaw.show.text import counted
from deltaw.training.memory import UNLIMITED, free_memory

DEMO_GFLOP = 283 * 318
SPARE = 1.6 * 2**30
SIZES = (0.135, 0.36, 0.5, 1, 1.7, 3, 4, 7, 8, 14, 32, 70)  # billions of parameters, as bases come
STEPS = 5  # of the progress


@dataclass(frozen=True)
class Machine:
    """All that was seen."""

    cores: Cores
    versions: dict[str, str | None]
    packages: dict[str, str | None]
    gpus: list[dict[str, Any]]
    driver: dict[str, str | None]
    caches: list[look.Cache]
    total: int | None
    free: int | None  # None where the system doesn't tell
    disk: int
    builtin: bool

    @property
    def dtype(self) -> str:
        """What `dtype: auto` will be."""
        return ("bfloat16" if self.gpus[0]["bfloat16"] else "float32") if self.gpus else self.cores.dtype

    @property
    def largest(self) -> float | None:
        """The largest base that fits, in billions of parameters; None where not even the smallest does, or nothing is
        known."""
        room = self.gpus[0]["free_bytes"] if self.gpus else self.free
        each = 2 if self.dtype == "bfloat16" else 4
        fitting = [size for size in SIZES if room is not None and size * 1e9 * each + SPARE <= room]
        return max(fitting, default=None)

    @property
    def demo_minutes(self) -> float:
        """On the CPU."""
        return DEMO_GFLOP / self.cores.rates[self.cores.dtype] / 60


def doctor_named(*, display: Display) -> Result:
    """Look, and say what follows."""
    machine = _examined(display)
    follows = _what_follows(machine)
    return Result(_data(machine, follows), _text(machine, follows))


def _examined(display: Display) -> Machine:
    with display.task("looking at this machine", STEPS) as progress:
        progress(0, "rates of products")
        cores = measure_cores(lambda: progress(1, "whether the cores are free"))
        progress(2, "memory and GPUs")
        free = free_memory(torch.device("cpu"))
        gpus, driver = look.gpus(), dict(look.driver())
        progress(3, "caches")
        caches = look.caches()
        progress(4, "packages")
        machine = Machine(
            cores=cores,
            versions=look.versions(),
            packages=look.packages(),
            gpus=gpus,
            driver=driver,
            caches=caches,
            total=look.total_memory(),
            free=None if free >= UNLIMITED else free,
            disk=shutil.disk_usage(Path.cwd()).free,
            builtin=look.builtin_model(),
        )
        progress(STEPS)
    return machine


def _data(machine: Machine, follows: list[str]) -> dict[str, Any]:
    return {
        "versions": machine.versions,
        "cores": asdict(machine.cores),
        "memory": {"total_bytes": machine.total, "free_bytes": machine.free},
        "disk": {"free_bytes": machine.disk},
        "caches": {cache.name: cache.to_json() for cache in machine.caches},
        "gpus": machine.gpus,
        "driver": machine.driver,
        "packages": machine.packages,
        "builtin_model": machine.builtin,
        "dtype": machine.dtype,
        "largest_base": machine.largest,
        "demo_minutes": None if machine.gpus else machine.demo_minutes,
        "follows": follows,
    }


def _text(machine: Machine, follows: list[str]) -> str:
    cores, version = machine.cores, machine.versions
    rates = ", ".join(f"{rate:,.0f} GFLOP/s in {dtype}" for dtype, rate in sorted(cores.rates.items()))
    total = f" of {gib(machine.total)}" if machine.total else ""
    rows = [
        ("deltaw", f"{version['deltaw']}, Python {version['python']}, {version['system']}"),
        ("torch", f"{version['torch']}, transformers {version['transformers'] or 'not installed'}"),
        ("CPU", f"{version['cpu'] or 'unknown'}, {counted(cores.threads, 'thread')}"),
        ("products", rates),
        ("cores' time", f"{cores.obtained:.0%} of it was had by this process"),
        ("memory", f"{gib(machine.free)} free{total}" if machine.free is not None else "the system doesn't tell"),
        ("disk", f"{gib(machine.disk)} free in this folder"),
        *((f"{c.name} cache", f"{'more than ' * c.partly}{gib(c.size)} in {c.path}") for c in machine.caches),
        *(("GPU", _card(card)) for card in machine.gpus),
        *([] if machine.gpus else [("GPU", "none that torch can use")]),
    ]
    missing = [(name, p.purpose, p.install) for name, p in look.PACKAGES.items() if machine.packages[name] is None]
    present = [f"{name} {version}" for name, version in machine.packages.items() if version is not None]
    lines = [table(rows), "", f"optional packages: {', '.join(present) or 'none'}"]
    if missing:
        lines += ["not installed:", table([(f"  {name}", purpose, install) for name, purpose, install in missing])]
    return "\n".join([*lines, "", *follows])


def _card(card: dict[str, Any]) -> str:
    memory = f"{gib(card['free_bytes'])} free of {gib(card['total_bytes'])}"
    return f"{card['name']}, {memory}, capability {card['capability']}"


def _what_follows(machine: Machine) -> list[str]:
    """Whole sentences, what the user does next last."""
    where = "the GPU" if machine.gpus else f"the CPU with {counted(machine.cores.threads, 'thread')}"
    lines = [f"Training will use {machine.dtype} on {where}."]
    if machine.free is not None or machine.gpus:
        lines.append(
            f"A base of {_billions(machine.largest)} fits into memory; deltaw plan run.yaml measures yours."
            if machine.largest
            else "Memory is short: even the demo's base may not fit. Close other programs."
        )
    if machine.cores.contested:
        share = machine.cores.obtained
        lines.append(f"Other programs take part of the cores (this one had {share:.0%}), so everything takes longer.")
    if (cores := machine.cores).threads < cores.cores and "OMP_NUM_THREADS" in os.environ:
        lines.append(f"OMP_NUM_THREADS keeps it to {counted(cores.threads, 'thread')} of {cores.cores} cores.")
    lines += _of_the_gpu(machine)
    if machine.disk < 2 * 2**30:
        lines.append(f"The disk is nearly full: {gib(machine.disk)} free, and the demo wants about 1 GiB.")
    _, install = missing_packages()
    if install:
        return [*lines, f"The demo needs more: {install}"]
    minutes = machine.demo_minutes
    took = "some minutes" if machine.gpus else f"about {counted(max(1, round(minutes)), 'minute')}"
    return [*lines, f"The demo takes {took} here: deltaw demo"]


def _of_the_gpu(machine: Machine) -> list[str]:
    """Why a GPU that is there isn't used."""
    driver = machine.driver
    if machine.gpus or driver["driver"] is None:
        return []
    if driver["torch_cuda"] is None:
        return [f"There is an NVIDIA driver ({driver['driver']}), but this torch is built for the CPU alone: install "
                "one for CUDA, see pytorch.org/get-started."]  # fmt: skip
    return [f"There is an NVIDIA driver ({driver['driver']}), but this torch, built for CUDA {driver['torch_cuda']}, "
            "can't use it: update the driver, or install a torch for an older CUDA."]  # fmt: skip


def _billions(size: float | None) -> str:
    return f"{size:g}B parameters" if size and size >= 1 else f"{1000 * (size or 0):.0f}M parameters"
