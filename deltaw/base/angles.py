"""Rotary angles, computed for each document alone.

Some models scale their rotary frequencies by the longest position in the pass (longrope, dynamic NTK), and some
remember the longest that they have seen. Beside a long document, a short one then gets other angles than alone, and so
do the documents after it. `Angles` stands in for such a module: it asks the module for the angles of every run of
consecutive positions (a document of a packed batch, a row of a padded one, a row's next token in generation) by itself,
after showing it position 0, which makes it forget what it remembers.

Which modules need this is found by trying, not by the name of a scaling: those whose angles for the first positions
change beside a far one, or after it. All others are left alone, so that ordinary models pay nothing.
"""

import inspect
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.base.stand_in import StandIn

NEAR = 3  # positions whose angles are compared
ROUNDING = 1e-6  # of a cosine of few radians, in float32


class Angles(StandIn):
    """A rotary module [..., B, L] -> angles [..., B, L, E], a tensor or a tuple of them, that heeds no company."""

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the original's for each run of consecutive positions alone."""
        planes = position_ids.shape[:-2]  # of positions in several dimensions, which are all the same in text
        position_BL = position_ids.flatten(0, -3)[0] if planes else position_ids
        if planes and (position_ids != position_BL).any():
            return self.original(x, position_ids, *args, **kwargs)
        angles: dict[tuple[int, int], Any] = {}  # by first position and length: equal runs are computed once
        rows = []
        for row_L in position_BL:
            runs = _runs(row_L.tolist())
            for first, length in runs:
                if (first, length) not in angles:
                    at_L = torch.arange(first, first + length, device=row_L.device, dtype=row_L.dtype)
                    for part_L in (at_L.new_zeros(1), at_L):
                        out = self.original(x, part_L.expand(*planes, 1, -1), *args, **kwargs)
                    angles[first, length] = out
            rows.append(_joined([angles[run] for run in runs], -2))
        return _joined(rows, -3)


def stand_in_for_angles(model: nn.Module, far: Iterable[int]) -> dict[str, Angles]:
    """Put `Angles` in the place of every rotary module that needs it, in place; `far` are positions on both sides of
    every border in the config. Returns them by path, with those that an earlier call put in."""
    x = torch.zeros(1, NEAR + 1, 1, device=next(model.parameters()).device)  # float32, in which little is rounded away
    stand_ins = {path: module for path, module in model.named_modules() if isinstance(module, Angles)}
    for path, module in list(model.named_modules()):
        if _is_rotary(module) and any(_keeps_company(module, x, far, options) for options in _kinds(module)):
            stand_ins[path] = Angles(module)
            model.set_submodule(path, stand_ins[path])
    return stand_ins


def _is_rotary(module: nn.Module) -> bool:
    """Whether it makes something of positions alone: no weights, and a forward that takes them."""
    if (
        isinstance(module, StandIn)
        or next(module.parameters(), None) is not None
        or next(module.buffers(), None) is None
    ):
        return False
    return list(inspect.signature(module.forward).parameters)[1:2] == ["position_ids"]


def _kinds(module: nn.Module) -> list[dict[str, str]]:
    """The further arguments that it may be called with: a kind of layer, where each has angles of its own."""
    if "layer_type" not in inspect.signature(module.forward).parameters:
        return [{}]
    rope_type = getattr(module, "rope_type", None)
    return [{"layer_type": kind} for kind in rope_type] if isinstance(rope_type, dict) else [{}]


@torch.no_grad()
def _keeps_company(module: nn.Module, x: Tensor, far: Iterable[int], options: dict[str, str]) -> bool:
    """Whether the angles of the first positions change beside a far one, or after it. Forgets what it was shown."""
    near = torch.arange(NEAR, device=x.device)

    def angles(positions: Tensor) -> list[Tensor]:
        out = module(x, positions[None], **options)
        return [part[..., :NEAR, :].clone() for part in (out if isinstance(out, tuple) else (out,))]

    try:
        alone = angles(near)
        beside = (angles(torch.cat([near, near.new_tensor([position])])) + angles(near) for position in far)
        pairs = (pair for seen in beside for pair in zip(alone + alone, seen, strict=True))
        changed = any(float((a - b).abs().max()) > ROUNDING for a, b in pairs)
        module(x, near[None, :1], **options)
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError):
        return False  # called in a way of its own: what it does shows in the probe
    return changed


def _runs(positions: list[int]) -> list[tuple[int, int]]:
    """(first, length) of each run of consecutive positions."""
    cuts = [0, *(i for i in range(1, len(positions)) if positions[i] != positions[i - 1] + 1), len(positions)]
    return [(positions[a], b - a) for a, b in pairwise(cuts)]


def _joined(parts: list[Any], dim: int) -> Any:
    """Tensors laid end to end, tuples member by member."""
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(members, dim) for members in zip(*parts, strict=True))
    return torch.cat(parts, dim)
