"""How the next token is chosen from the logits.

Sampling is reproducible for each prompt, not for each batch: a prompt draws its uniform numbers from a generator of its
own, seeded by (seed, number of the prompt), and each token is the inverse of the cumulative distribution at one such
number. So the number of rows and their company change nothing beyond rounding, and no global generator is touched.

Letters: R rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from deltaw.config import Strict
from deltaw.errors import RunError


class Sampling(Strict):
    """How tokens are chosen. temperature 0: greedy; top_k 0, top_p 1: all tokens; seed None: a random one."""

    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    seed: int | None = Field(default=None, ge=0, lt=2**62)

    @property
    def rule(self) -> tuple[float, float, int]:
        """What two rows must share for their tokens to be chosen together."""
        return self.temperature, self.top_p, self.top_k


class RowsFailed(RunError):
    """Rows that can't go on, beside others that can: their places, or what the caller knows them by."""

    def __init__(self, what: str, rows: Sequence[int], fix: str | None = None) -> None:
        self.rows = tuple(rows)
        super().__init__(what, fix=fix)


class NotFinite(RowsFailed):
    """Logits that are NaN or infinite."""

    def __init__(self, what: str, rows: Sequence[int]) -> None:
        super().__init__(what, rows, fix="use dtype float32, or an older checkpoint")


def choose(logits_RV: Tensor, sampling: Sampling, u_R: Tensor, numbers: Sequence[int] = ()) -> Tensor:
    """The next token id of each row [R]; u_R are uniform numbers in [0, 1), unused when greedy.

    Raises NotFinite, which names the prompts by their `numbers`.
    """
    largest_R = logits_RV.amax(-1)
    if not bool(largest_R.isfinite().all()):
        broken = (~largest_R.isfinite()).nonzero()[:, 0].tolist()
        named = sorted(numbers[row] for row in broken) if numbers else []
        prompts = f" for prompt {named[0]}" + (f" and {len(named) - 1} more" if named[1:] else "") if named else ""
        raise NotFinite(f"the model's logits are NaN or infinite{prompts}", broken)
    if sampling.temperature == 0:
        return _first_of(logits_RV, largest_R)
    # Less the maximum before the division: a tiny temperature would overflow to inf - inf.
    logits_RV = logits_RV.float()
    logits_RV = (logits_RV - logits_RV.amax(-1, keepdim=True)) / max(sampling.temperature, 1e-6)
    order_RV = None
    if 0 < sampling.top_k < logits_RV.shape[1]:
        logits_RV, order_RV = logits_RV.topk(sampling.top_k)
    elif sampling.top_p < 1:
        logits_RV, order_RV = logits_RV.sort(descending=True)
    p_RV = logits_RV.softmax(-1)
    if sampling.top_p < 1:
        # The smallest set of tokens whose sum reaches top_p: a token stays if those before it don't reach it.
        p_RV = p_RV.masked_fill(p_RV.cumsum(-1) - p_RV >= sampling.top_p, 0)
    cumulative_RV = p_RV.double().cumsum(-1)
    target_R1 = u_R.double()[:, None] * cumulative_RV[:, -1:]
    # right=True: the first place whose sum is above the target, never a token of probability 0.
    place_R1 = torch.searchsorted(cumulative_RV, target_R1, right=True).clamp_max(p_RV.shape[1] - 1)
    return (place_R1 if order_RV is None else order_RV.gather(1, place_R1))[:, 0]


def _first_of(logits_RV: Tensor, largest_R: Tensor) -> Tensor:
    """Where each row's largest first stands, as `argmax`, which takes 15 times as long as the largest alone."""
    vocabulary, size = logits_RV.shape[1], 256
    if vocabulary % size:
        return logits_RV.argmax(-1)
    parts_RPS = logits_RV.unflatten(1, (-1, size))
    part_R = (parts_RPS.amax(-1) == largest_R[:, None]).byte().argmax(-1)
    within_RS = parts_RPS[torch.arange(len(part_R), device=part_R.device), part_R]
    return part_R * size + within_RS.argmax(-1)


def uniform_numbers(sampling: Sampling, number: int, count: int) -> list[float]:
    """`count` uniform numbers for prompt `number`, one for each new token; zeros when greedy."""
    if sampling.temperature == 0:
        return [0.0] * count
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed((sampling.seed * 1_000_003 + number) % 2**63)
    drawn: list[float] = torch.rand(count, dtype=torch.float64, generator=generator).tolist()
    return drawn
