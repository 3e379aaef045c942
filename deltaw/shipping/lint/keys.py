"""What a tensor in an adapter's file is for, read off its name.

    base_model.model.<module path>.lora_A.weight
    ^ prefix                       ^ part

Tools that save a model's own state dict rather than PEFT's leave the prefix out, or leave the adapter's name in
(`.lora_A.default.weight`); both are read here and told apart, since not every destination reads both.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

PREFIX = "base_model.model."
# The part of a tensor that isn't one of PEFT's own.
FULL, NORM, UNKNOWN = "full", "norm", "unknown"
A, B, MAGNITUDE, BIAS = "lora_A", "lora_B", "lora_magnitude_vector", "bias of B"
EMBEDDING_A, EMBEDDING_B, TOKENS, COPY = "lora_embedding_A", "lora_embedding_B", "trainable_tokens_delta", "base_layer"
_PART = re.compile(
    rf"\.(?P<part>{A}|{B}|{EMBEDDING_A}|{EMBEDDING_B}|{MAGNITUDE}|{TOKENS})"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.(?P<kind>weight|bias))?$"
)
LORA_MARK = re.compile(r"lora_|_delta|magnitude|ia3|hada|lokr|oft_|vera_")  # in the names of any tool's adapter tensors


@dataclass(frozen=True)
class Key:
    """A tensor: its name in the file, the module's path, its part, and how the name differs from PEFT's."""

    name: str
    path: str
    part: str
    prefixed: bool
    adapter: str = ""  # the adapter's name, if it was left in

    @property
    def expert(self) -> bool:
        """Whether it belongs to experts stored as one parameter, not to a layer."""
        *parents, last = ["", *self.path.split(".")]
        return last == "experts" or (last == COPY and parents[-1] == "experts")


def parse(name: str) -> Key:
    prefixed = name.startswith(PREFIX)
    path = name.removeprefix(PREFIX)
    if match := _PART.search(path):
        part = match["part"]
        part = BIAS if (part, match["kind"]) == (B, "bias") else part
        return Key(name, path[: match.start()].removesuffix(".token_adapter"), part, prefixed, match["adapter"] or "")
    stem, dot, kind = path.rpartition(".")
    if not dot or kind not in ("weight", "bias") or LORA_MARK.search(stem):
        return Key(name, path, UNKNOWN, prefixed)
    if stem.endswith(f".{COPY}"):
        return Key(name, stem.removesuffix(f".{COPY}"), COPY, prefixed)
    norm = "norm" in stem.rpartition(".")[2] or stem.rpartition(".")[2].startswith("ln_")
    return Key(name, stem, NORM if norm else FULL, prefixed)


class Names:
    """Names of modules as a config lists them, paths or their dotted ends (`config.names_module`), looked up fast."""

    def __init__(self, names: Iterable[str]) -> None:
        self.all = set(names)
        self._lasts = {name.rpartition(".")[2] for name in self.all}

    def of(self, path: str) -> str | None:
        """The longest of them that names `path`."""
        parts = path.split(".")
        if parts[-1] not in self._lasts:
            return None
        ends = (".".join(parts[at:]) for at in range(len(parts)))
        return next((end for end in ends if end in self.all), None)


def named(keys: Iterable[Key], *parts: str) -> list[str]:
    """The names of the tensors whose part is one of `parts`."""
    return [key.name for key in keys if key.part in parts]
