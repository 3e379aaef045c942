"""Adapters that are broken in one way each: deltaw (files.py) and PEFT (benchmarks/peers) are given the same ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Harm = Callable[[Path], object]  # done to the copy of an adapter


def file_is(name: str, change: Callable[[bytes], bytes]) -> Harm:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def file_is_gone(name: str) -> Harm:
    return lambda folder: (folder / name).unlink()


def tensors(change: Callable[[str, Tensor], tuple[str, Tensor] | None]) -> Harm:
    """Every tensor is changed, or left out."""

    def harm(folder: Path) -> None:
        items = [change(key, value) for key, value in load_file(folder / WEIGHTS).items()]
        save_file(dict(item for item in items if item), folder / WEIGHTS, metadata={"format": "pt"})

    return harm


def fields(**values: Any) -> Harm:
    return lambda folder: (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | values))


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "sang")


CONFIGS: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "BOM": lambda data: b"\xef\xbb\xbf" + data,
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "NaN": lambda data: data.replace(b'"r": 4', b'"r": NaN'),
    "nested": lambda data: b'{"a": ' * 100_000 + b"1" + b"}" * 100_000,
    "a list": lambda data: b"[" + data + b"]",
}


# What is done to an adapter, and words of which a clear error has one: the file, or the field or tensor that is wrong.
BROKEN: tuple[tuple[str, Harm, tuple[str, ...]], ...] = (
    ("header cut off", file_is(WEIGHTS, lambda data: data[:20]), (WEIGHTS,)),
    ("data cut off", file_is(WEIGHTS, lambda data: data[:-100]), (WEIGHTS,)),
    ("empty weights", file_is(WEIGHTS, lambda data: b""), (WEIGHTS,)),
    ("no weights", file_is_gone(WEIGHTS), (WEIGHTS,)),
    ("all NaN", tensors(lambda key, value: (key, value * torch.nan)), (WEIGHTS, "NaN", "lora")),
    ("no B", tensors(lambda key, value: None if "lora_B" in key else (key, value)), (WEIGHTS, "lora_B")),
    ("other keys", tensors(lambda key, value: (key.replace("layers", "blocks"), value)), (WEIGHTS, "blocks")),
    ("no prefix", tensors(lambda key, value: (key.removeprefix("base_model.model."), value)), (WEIGHTS, "base_model")),
    ("other shapes", tensors(lambda key, value: (key, value[:-1].contiguous())), (WEIGHTS, "lora_A", "lora_B")),
    ("config cut off", file_is(CONFIG, lambda data: data[:100]), (CONFIG,)),
    ("empty config", file_is(CONFIG, lambda data: b""), (CONFIG,)),
    ("no config", file_is_gone(CONFIG), (CONFIG,)),
    ("alpha NaN", fields(lora_alpha=float("nan")), (CONFIG, "alpha")),
    ("rank 0", fields(r=0), (CONFIG, "`r`", "rank")),
    ("rank as text", fields(r="4"), (CONFIG, "`r`", "rank")),
    ("rank null", fields(r=None), (CONFIG, "`r`", "rank")),
    ("no such module", fields(target_modules=["nowhere"]), (CONFIG, "nowhere")),
    ("unknown kind", fields(peft_type="NEW"), (CONFIG, "peft_type")),
)


BOMB = r"([a-z_.0-9]+)+!"
