"""One step of decoding on any causal language model of transformers that carries something from step to step.

The model says itself how a step's inputs are made (`prepare_inputs_for_generation`: Phi-3 forgets what it has cached
when it goes over to its long rotary frequencies, a state space takes no mask after the first pass) and what it carries:
whatever its output holds that its forward takes, be it keys and values, the state of a recurrence, or both. So there
is no list of caches here, and a prompt alone gets what transformers' own `generate` gives it.

Letters: R rows, L longest prompt, T tokens so far, V vocabulary.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from deltaw.base.limits import context_of
from deltaw.errors import InputError


class State:
    """What decoding carries from step to step: the tokens so far, their positions, the mask, the cache."""

    def __init__(self, model: nn.Module, ids_RL: Tensor, mask_RL: Tensor) -> None:
        self.model: Any = model
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
                f"{type(self.model).__name__} has no cache that deltaw can go on from, so it can't generate with it",
                fix="leave answers out: evaluate.samples=0 and no evaluate.metrics",
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
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's own mode restored afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def text_config(model: Any) -> Any:
    """The language model's own config, also where it is part of a larger one."""
    return model.config.get_text_config(decoder=True)


def context(model: nn.Module) -> int:
    """The most tokens the model can hold; without a stated limit a large number."""
    return context_of(text_config(model)) or 2**31
