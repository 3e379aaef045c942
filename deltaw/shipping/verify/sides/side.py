"""A side: one place where a model answers, asked so that two of them can be compared.

    ids(prompt)            a prompt's token ids by its own tokenizer and chat template; None: not available
    answers(prompts)       its greedy answers: text, and ids if it gives them
    logs(rows)             next-token log-probabilities at the positions of a *given* answer, whoever gave it
    decode(ids)            text, special tokens shown
    numbers                the formats to which its weights and activations are rounded

The prompt goes to a side as text or as messages, never as ids, because the way from one to the other is what changes
silently when a model is shipped. The log-probabilities are asked for along one side's answer, token by token: free
answers part for good at the first near tie, and everything after it would show nothing.

`Logs` are float64-ready log-probabilities of all tokens, or of the likeliest K of each position where a server gives no
more. Sides whose model runs here (`Running`, local.py) can also say what rounding does to it (`noisy_logs`, noise.py),
and what it would answer without its adapter (`base_logs`).

Opening a side is cheap and shows what can't work; `load` reads weights. `close` leaves nothing running.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltaw.show.progress import Progress

if TYPE_CHECKING:
    from deltaw.base.source import Source


@dataclass(frozen=True)
class Prompt:
    """What is asked: a text to go on from, or a chat's messages. `origin`: the row that it comes from."""

    content: str | tuple[dict[str, Any], ...]
    origin: str
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.content, str)


@dataclass(frozen=True)
class Asked:
    """A prompt as one side gets it: `ids` if they are known, else the prompt itself."""

    prompt: Prompt
    ids: tuple[int, ...] | None


@dataclass(frozen=True)
class Answer:
    """What a side said. `ids` with the token that ended it; None where a server tells text only. `ended`: whether it
    stopped by itself before the limit."""

    text: str
    ids: tuple[int, ...] | None
    ended: bool


@dataclass(frozen=True)
class Row:
    """An answer along which log-probabilities are asked for."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Logs:
    """Log-probabilities at P positions: `values_PK` of the tokens `ids_PK`, or of all V in order where that is None."""

    values_PK: Tensor
    ids_PK: Tensor | None = None

    def of(self, ids_PK: Tensor) -> Tensor:
        """Those of the given tokens, −inf for one that isn't among them."""
        if self.ids_PK is None:
            known = ids_PK < self.values_PK.shape[1]
            values_PK = self.values_PK.gather(1, ids_PK.clamp_max(self.values_PK.shape[1] - 1))
            return values_PK.masked_fill(~known, -torch.inf)
        same_PKJ = ids_PK[:, :, None] == self.ids_PK[:, None, :]
        values_PK = (same_PKJ * self.values_PK.clamp_min(-1e9)[:, None, :]).sum(2)
        return values_PK.masked_fill(~same_PKJ.any(2), -torch.inf)


@dataclass(frozen=True)
class Numbers:
    """How a side's numbers are rounded: names in formats.py. `weights`: what its stored weights lost against what was
    trained ("float32": nothing); `activations`: what each layer's input is rounded to. `why`: how that is known."""

    weights: str = "float32"
    activations: tuple[str, ...] = ("float32",)
    why: str = ""


class Side(abc.ABC):
    """One side. Raises InputError when it is opened where it can't work, RunError when it fails later."""

    name: str
    numbers: Numbers
    notes: list[str]
    tells_ids = True
    measurable = False  # whether its model runs here, so that `noisy_logs` can be had
    source: "Source | None" = None  # the base, or the folder, of a side that runs here
    context: int | None = None  # the most tokens, where that is known
    chats: bool | None = None  # whether it has a template to write chats by, where that is known
    stops: frozenset[int] | None = None  # where its answers end, once it is loaded and if it says so

    def load(self) -> None:  # noqa: B027  (most have nothing to load)
        """Read the weights."""

    @abc.abstractmethod
    def ids(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...] | None]:
        """Each prompt as this side's own tokenizer and template write it. Needs no `load`."""

    @abc.abstractmethod
    def answers(self, asked: Sequence[Asked], tokens: int, progress: Progress) -> list[Answer]:
        """Greedy answers of at most `tokens` tokens."""

    @abc.abstractmethod
    def logs(self, rows: Sequence[Row], progress: Progress) -> list[Logs] | None:
        """Its log-probabilities at each position of the answers; None if it doesn't give any."""

    def noisy_logs(self, rows: Sequence[Row], sides: Sequence[Numbers], seed: int) -> list[Logs] | None:
        """The same with the rounding errors of `sides` put in; None if the model doesn't run here."""
        return None

    def base_logs(self, rows: Sequence[Row]) -> list[Logs] | None:
        """The same without the adapter; None if that isn't available."""
        return None

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str | None:
        """The text of `ids`, special tokens included; None if it can't be asked."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release everything."""
