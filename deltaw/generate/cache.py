"""The state of decoding, carried from step to step: the rows, and what the model keeps of their tokens.

`Cache` is the engine's view of it, of which there are two: our own slots, where attention stands in (slots.py), and
batches on transformers' own caches for everything else (batches.py).

`State` is one such batch, on any causal language model that carries something from step to step. The model itself says
how a step's inputs are made (`prepare_inputs_for_generation`: Phi-3 forgets what it has cached when it goes over to its
long rotary frequencies, a state space takes no mask after the first pass) and what it carries: whatever its output
holds that its forward takes, be it keys and values, the state of a recurrence, or both. So there is no list of caches
here, and a prompt alone gets what transformers' own `generate` gives it.

Letters: R rows, L longest prompt, T tokens so far, V vocabulary.
"""

import abc
import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from deltaw.base.batch import segments_of
from deltaw.base.frozen import dtype_of
from deltaw.base.limits import context_of
from deltaw.base.passing import Pass, passing_of
from deltaw.errors import InputError
from deltaw.generate.grammar import Guide
from deltaw.generate.sampling import Sampling, uniform_numbers
from deltaw.kernels.segments import NOBODY, Segments

BASE = NOBODY  # in place of an update's number: the base alone


@dataclass(eq=False)
class Row:
    """A prompt and what has been added to it.

    `number` names it to its caller, and says with the seed which uniform numbers it draws; `room` is how many tokens it
    may become longer; `update` is which of the layers' updates it takes: a number, `BASE`, or None for the
    first. `key` says what that update is, by content; `logprobs`, how many of the likeliest tokens are told beside each
    new one (None: not even its own log-probability), at the temperature `heat`; `bias` is added to the logits of these
    tokens; `guide` says which tokens may come next; `scored`, how many of the likeliest tokens are told beside each of
    the prompt's own (None: nothing is told of these).
    """

    id: int
    prompt: tuple[int, ...]
    sampling: Sampling
    stop_ids: AbstractSet[int]
    number: int
    room: int
    update: int | None = None
    key: bytes = b""
    logprobs: int | None = None
    bias: Mapping[int, float] = field(default_factory=dict)
    guide: Guide | None = None
    scored: int | None = None
    heat: float = 1.0
    new: list[int] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)

    @property
    def reach(self) -> int:
        """The most tokens it can come to."""
        return len(self.prompt) + self.room

    @property
    def place(self) -> int:
        """The position of its last token, which a step is given."""
        return len(self.prompt) + len(self.new) - 1

    @property
    def last(self) -> int:
        return self.new[-1] if self.new else self.prompt[-1]

    @property
    def u(self) -> float:
        """The uniform number of its next token."""
        if not self.noise:
            self.noise = uniform_numbers(self.sampling, self.number, max(1, self.room))
        return self.noise[len(self.new)]


class Cache(abc.ABC):
    """Rows that are being decoded, and what the model keeps of their tokens."""

    # Rows join when 1/share of all places are free, or one has been for `patience` steps: a pass costs the same whether
    # few join or many.
    share: int
    patience: int

    @property
    @abc.abstractmethod
    def tokens(self) -> int:
        """How many tokens' keys and values it may come to hold with the rows that it has."""

    @abc.abstractmethod
    def first(self, waiting: Sequence[Row], tokens: int) -> list[Row]:
        """Those of `waiting`, in which there is one, that begin together now, such that `tokens` suffice; none where
        they must wait for rows that are running."""

    @abc.abstractmethod
    def join(self, rows: Sequence[Row]) -> None:
        """Give them places. Where that fails no row has joined."""

    @abc.abstractmethod
    def fill(self) -> Iterator[tuple[list[Row], Tensor]]:
        """Run prompts that have joined, or a piece of them: the rows whose prompts are whole now, if any are, and the
        logits [R, V] of their next tokens. Where that fails it may be done again."""

    @abc.abstractmethod
    def steps(self) -> Iterator[tuple[list[Row], Tensor]]:
        """Run the last token of every row whose prompt is whole, in one pass or in several: rows, and the logits [R, V]
        of their next. Rows may leave in between."""

    @abc.abstractmethod
    def leave(self, row: Row) -> None:
        """Let go of a row."""


def segments_for(updates: Sequence[int | None], starts: Sequence[int]) -> Segments | None:
    """As `segments_of`, of rows that all name their update (`BASE` is none) or none of which does."""
    named = [update for update in updates if update is not None]
    if not named:
        return None
    return segments_of(named, starts)


class State:
    """A batch of rows: the tokens so far, their positions, the mask, what the model carries. All take one `update`."""

    def __init__(self, model: nn.Module, ids_RL: Tensor, mask_RL: Tensor, update: int | None = None) -> None:
        self.model: Any = model
        self.update = update
        self.ids, self.mask = ids_RL, mask_RL
        # Padding gets position 0: it is masked out, and a negative position would index a table from its end.
        self.positions = (mask_RL.cumsum(1) - 1).clamp_min(0)
        self.carried: dict[str, Any] = {}  # under the model's own names
        self.begun = False
        self.accepted = inspect.signature(model.forward).parameters

    def forward(self) -> Tensor:
        """Logits [R, V] of the next token of every row. Raises InputError for a model that carries nothing."""
        out = self._run()
        self.carried |= {name: out[name] for name in out if name in self.accepted and out[name] is not None}
        if not self.carried and "past_key_values" in self.accepted:  # writes into one that it's given, hands none back
            self.carried = {"past_key_values": DynamicCache(config=text_config(self.model))}
            out = self._run()
        if not self.carried:
            raise InputError(
                f"{type(self.model).__name__} has no cache that deltaw can continue from, so it can't generate with it",
                fix="turn answers off: evaluate.samples=0 and no evaluate.metrics",
            )
        self.begun = True
        logits_RV: Tensor = out.logits[:, -1]
        return logits_RV

    def _run(self) -> Any:
        optional = {"position_ids": self.positions} if "position_ids" in self.accepted else {}
        inputs = self.model.prepare_inputs_for_generation(
            self.ids,
            next_sequence_length=1 if self.begun else None,
            is_first_iteration=not self.begun,
            attention_mask=self.mask,
            use_cache=True,
            **self.carried,
            **optional,
        )
        if "logits_to_keep" in self.accepted:
            # An index, not the number 1: that makes a strided slice, for which torch copies the head once for each row
            # (64 rows on SmolLM2-135M: 3.6 GB, and a first step of 5.3 s instead of 1.2 s).
            length = inputs["input_ids"].shape[1]
            inputs["logits_to_keep"] = torch.tensor([length - 1], device=self.ids.device)
        ids = inputs["input_ids"]
        segments = segments_for([self.update], [0, ids.numel()])
        kept = segments_for([self.update], [0, len(ids)]) if "logits_to_keep" in self.accepted else None
        with passing_of(self.model).running(Pass(segments=segments, kept=kept)):
            return self.model(**{**inputs, "return_dict": True})

    def append(self, ids_R: Tensor) -> None:
        """Go on with one new token per row."""
        self.ids = torch.cat([self.ids, ids_R[:, None]], dim=1)
        # A row that has filled the context may stay for a few steps after it ended.
        following = (self.positions[:, -1:] + 1).clamp_max(context(self.model) - 1)
        self.positions = torch.cat([self.positions, following], dim=1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids_R), 1)], dim=1)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these. Raises AttributeError where what is carried can't let go of a row."""
        for cache in self.carried.values():
            # batch_select_indices would be the name for it, but the layers of state spaces and hybrids lack it.
            cache.reorder_cache(rows)
        self.ids, self.positions, self.mask = self.ids[rows], self.positions[rows], self.mask[rows]


def padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, mask), both int64 [R, L], padded on the left with id 0."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@contextlib.contextmanager
def in_eval_mode(model: nn.Module, modules: Sequence[nn.Module] | None = None) -> Iterator[None]:
    """Eval mode inside; every module's own mode restored afterwards. `modules`: the model's, where they are known."""
    training = [module for module in (model.modules() if modules is None else modules) if module.training]
    if training:  # setting modes goes through all modules, which is felt in a step of one token
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def evaluating(model: nn.Module, modules: Sequence[nn.Module] | None = None) -> Iterator[None]:
    """Eval mode and no gradients inside; every module's own mode restored afterwards."""
    with in_eval_mode(model, modules), torch.inference_mode():
        yield


def text_config(model: Any) -> Any:
    """The language model's own config, also where it is part of a larger one."""
    return model.config.get_text_config(decoder=True)


def context(model: nn.Module) -> int:
    """The most tokens the model can hold; without a stated limit a large number."""
    return context_of(text_config(model)) or 2**31


def bytes_per_token(model: Any) -> int:
    """What a generated token leaves behind for the next ones: a key and a value in each layer of attention.

    0 where the config has no heads: the state of a recurrence doesn't grow.
    """
    config = text_config(model)
    asked = _most(config, "num_attention_heads")
    heads = _most(config, "num_key_value_heads") or asked
    size = _most(config, "head_dim") or _most(config, "hidden_size") // max(1, asked)
    return 2 * _most(config, "num_hidden_layers") * heads * size * dtype_of(model).itemsize


def _most(config: Any, name: str) -> int:
    """A size in a config, the largest where each layer has its own, 0 where there is none."""
    value = getattr(config, name, None)
    return max((v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int)), default=0)
