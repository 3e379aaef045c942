"""A pass over prompts, or pieces of them: which tokens of which rows are in it, and what it carries to attention.

A long prompt joins over several steps, so that between two of its pieces every row that goes on gets its token. A piece
has at most `PIECE` tokens where nothing else is asked for. Measured on a CPU (SmolLM2-135M with an adapter, float32,
one core), a pass over prompts of

    tokens            64     128     256     512    1024    2048
    seconds         0.23    0.34    0.59    1.18    2.50    5.88
    tokens/s         285     379     431     433     409     348

beside 0.08 s for a step of one token: 256 is the least at which nothing is lost, and what a token may wait for. A GPU
needs more tokens to be busy. Where many short prompts begin together and only the end counts, pieces of 256 took 13 to
15 % longer than one of 4,096 (96 prompts, 12 new tokens each): the first rows went on while the last weren't there.

Prompts that begin in a piece lie end to end as in training (packed attention); one that goes on from an earlier piece,
or from a beginning that was kept (prefixes.py), attends to what its slot holds, its own tokens among it.

Letters: T tokens of a pass, H query heads, K key/value heads, E head size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deltaw.generate.cache import Row
from deltaw.generate.prefixes import SMALL
from deltaw.generate.shelf import Part, Shelf
from deltaw.kernels.attention import packed_attention
from deltaw.kernels.continued import continued_attention
from deltaw.kernels.documents import Documents

PIECE, GPU_PIECE = 256, 2048


class Run(NamedTuple):
    """The tokens of a row's prompt from `first` up to `end`, which are in one pass."""

    row: Row
    first: int
    end: int

    @property
    def whole(self) -> bool:
        """Whether the prompt is whole with it."""
        return self.end == len(self.row.prompt)

    def follows(self, other: "Run") -> bool:
        """Whether the other one runs tokens that this row could read instead of running them, enough to wait for."""
        after = self.first + SMALL
        return (
            self.row.key == other.row.key != b""
            and other.first <= self.first
            and len(self.row.prompt) > after
            and self.row.prompt[:after] == other.row.prompt[:after]
        )


def next_runs(begun: Mapping[Row, int], size: int) -> list[Run]:
    """The next piece of prompts of which so many tokens have been run, in the order in which they came.

    The first one gets half of it or more. What it leaves is for those that are whole with it, so that a short prompt
    isn't kept waiting by a long one, and then for all in their order.
    """
    if not begun:
        return []
    rests = {row: len(row.prompt) - first for row, first in begun.items()}
    shares = dict.fromkeys(begun, 0)
    head, *others = begun
    shares[head] = min(rests[head], size // 2)
    left = size - shares[head]
    for row in others:
        if rests[row] <= left:
            shares[row] = rests[row]
            left -= rests[row]
    for row in begun:
        more = min(left, rests[row] - shares[row])
        shares[row] += more
        left -= more
    return [Run(row, begun[row], begun[row] + share) for row, share in shares.items() if share]


@dataclass(frozen=True)
class Continued:
    """A run whose first tokens are stored: where it lies in the pass, and its slot."""

    span: slice
    shelf: Shelf
    place: int
    end: int


@dataclass(frozen=True)
class Filling:
    """What such a pass carries to attention. `fresh`: the runs that begin a prompt, at the rows `fresh_T`; None where
    there is none."""

    parts: Sequence[Part]
    fresh: Documents | None
    fresh_T: Tensor | slice
    continued: Sequence[Continued]

    def attention(
        self,
        layer: nn.Module,
        q_THE: Tensor,
        k_TKE: Tensor,
        v_TKE: Tensor,
        *,
        scale: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        for part in self.parts:
            part.store(layer, k_TKE, v_TKE)
        scale = q_THE.shape[2] ** -0.5 if scale is None else scale
        out_THE = q_THE
        if self.fresh is not None:
            q, k, v = (x[self.fresh_T] for x in (q_THE, k_TKE, v_TKE))
            out_THE = packed_attention(q, k, v, self.fresh, scale=scale, window=window, softcap=softcap)
        if not self.continued:
            return out_THE
        all_THE = torch.empty_like(q_THE)
        if self.fresh is not None:
            all_THE[self.fresh_T] = out_THE
        for run in self.continued:
            k_KLE, v_KLE = run.shelf.of(layer, k_TKE)[:, run.place, :, : run.end]
            all_THE[run.span] = continued_attention(
                q_THE[run.span], k_KLE, v_KLE, scale=scale, window=window, softcap=softcap
            )
        return all_THE
