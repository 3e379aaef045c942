"""What lint can find: codes, what each does to an adapter at each destination, and the findings that carry them.

A code is data: its number, a title of a few words, its effect at each destination unless a rule knows better, and how
to fix it. Codes are never reused. docs/lint.md lists them all, and a test holds that list to this table; the
rules that find them stand beside their codes in rules_*.py.

    DW1xx  files         DW3xx  the config      DW5xx  the base             DW7xx  GGUF files
    DW2xx  tensors       DW4xx  numbers         DW6xx  chat and tokenizer   DW8xx  MLX's and merged models' folders

What a destination makes of an adapter, from best to worst:

    LOADS     it loads and answers as it was trained to
    UNSURE    nothing speaks against it, but something that matters can't be seen from here
    WRONG     it loads, mostly in silence, but doesn't answer as it was trained to
    REFUSED   it doesn't load

A destination's verdict is the worst of its findings. REFUSED ranks last not because it is worse than WRONG, but
because what doesn't load can't answer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum

PEFT, TRANSFORMERS, VLLM, LLAMA_CPP, OLLAMA, MLX = "peft", "transformers", "vllm", "llama.cpp", "ollama", "mlx"
DESTINATIONS = {  # each as its project spells it
    PEFT: "PEFT",
    TRANSFORMERS: "transformers",
    VLLM: "vLLM",
    LLAMA_CPP: "llama.cpp",
    OLLAMA: "Ollama",
    MLX: "MLX",
}


class Effect(IntEnum):
    """What a destination makes of an adapter."""

    LOADS = 0
    UNSURE = 1
    WRONG = 2
    REFUSED = 3

    @property
    def words(self) -> str:
        return _WORDS[self]


_WORDS = {
    Effect.LOADS: "loads",
    Effect.UNSURE: "loads, as far as can be told",
    Effect.WRONG: "loads, but answers wrongly",
    Effect.REFUSED: "refused",
}
LOADS, UNSURE, WRONG, REFUSED = Effect.LOADS, Effect.UNSURE, Effect.WRONG, Effect.REFUSED
Effects = Mapping[str, Effect]


def everywhere(effect: Effect) -> Effects:
    """The same at every destination."""
    return dict.fromkeys(DESTINATIONS, effect)


@dataclass(frozen=True)
class Finding:
    """One fact about an adapter: `what` it is and where, its effects, and the `fix`."""

    code: str
    what: str
    effects: Effects
    fix: str

    def worst_of(self, places: Iterable[str]) -> Effect:
        """Its worst effect at any of these destinations."""
        return max((self.effects.get(place, LOADS) for place in places), default=LOADS)


@dataclass(frozen=True)
class Code:
    """A kind of finding. `title` and `fix` are for the list in the docs, `effects` hold unless a rule says others."""

    number: str
    title: str
    effects: Effects
    fix: str

    def finding(self, what: str, fix: str | None = None, effects: Effects | None = None) -> Finding:
        return Finding(self.number, what, self.effects if effects is None else effects, fix or self.fix)


CODES: dict[str, Code] = {}


def code(number: str, title: str, effects: Effects, fix: str) -> Code:
    """A new code, entered into the table. Raises ValueError for a number that is taken."""
    if number in CODES:
        raise ValueError(f"{number} is already {CODES[number].title!r}")
    CODES[number] = Code(number, title, effects, fix)
    return CODES[number]


def some(names: "list[str] | tuple[str, ...]", limit: int = 2) -> str:
    """A few of many names, for a sentence; no name longer than a line."""
    shown = ", ".join(f"{name!r:.100}" if not name.isprintable() else f"{name:.100}" for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
