"""Comparing two sides' answers: pure functions of ids, texts and log-probabilities.

    KL(A ‖ B)   of the next token, in nats, averaged over the positions of A's answers
    largest     the largest difference between the sides in one token's log-probability at one position
    gap         of two answers at their first differing token, where A took a and B took b:
                (log A(a) − log A(b)) + (log B(b) − log B(a)), how far the odds of the two moved from one side to the
                other. Each term is the margin by which a side chose. A gap that rounding could make is a near tie, not
                a fault; that takes two small margins, and a confident answer that changed has a large gap

If a side gives only the likeliest K, the tokens that both give are compared, and the rest of each distribution counts
as one more token. By the log-sum inequality that KL is a lower bound of the whole one, and nearly all of it if K tokens
hold nearly all of the probability. llama.cpp sums over the vocabulary in float32, so all its log-probabilities may be
off by 1e-5, more than F16 causes: the rest's probability counts only if it differs by more than SLACK.

Letters: P positions, K tokens compared, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.shipping.verify.sides.side import Answer, Logs

SMALLEST, SLACK = 1e-6, 1e-4  # of the rest's probability: the least that float32 sums leave, and a server's error


@dataclass(frozen=True, eq=False)
class Distance:
    """The KL and the largest difference at each position, in float64."""

    kl_P: Tensor
    largest_P: Tensor

    @property
    def kl(self) -> float:
        return float(self.kl_P.mean())

    @property
    def largest(self) -> float:
        return float(self.largest_P.max())

    @staticmethod
    def joined(parts: Sequence["Distance"]) -> "Distance":
        return Distance(torch.cat([part.kl_P for part in parts]), torch.cat([part.largest_P for part in parts]))


@dataclass(frozen=True)
class Parting:
    """Where two answers part: the position in the answer, each side's token there, and the gap (None: unknown)."""

    position: int
    token_a: int | None
    token_b: int | None
    gap: float | None


def compared_ids(a: Logs, b: Logs) -> Tensor | None:
    """The tokens that both sides give at each position, [P, K]; None for the whole vocabulary."""
    if a.ids_PK is None or b.ids_PK is None:
        return b.ids_PK if a.ids_PK is None else a.ids_PK
    return a.ids_PK


def distance(a: Logs, b: Logs, ids_PK: Tensor | None = None) -> Distance:
    """How far B is from A at each position, over the tokens `ids_PK` (default: those that both give)."""
    ids_PK = compared_ids(a, b) if ids_PK is None else ids_PK
    if ids_PK is None:
        shared = min(a.values_PK.shape[1], b.values_PK.shape[1])
        # Summed again in float64: the sums of float32 are off by more than two right sides are apart.
        a_PK, b_PK = (logs.values_PK.double().log_softmax(-1)[:, :shared] for logs in (a, b))
    else:
        a_PK, b_PK = (logs.of(ids_PK).double() for logs in (a, b))
    known_PK = torch.isfinite(a_PK) & torch.isfinite(b_PK)
    apart_PK = torch.where(known_PK, a_PK - b_PK, 0.0)
    if ids_PK is None and a.values_PK.shape == b.values_PK.shape:
        kl_P = (a_PK.exp() * apart_PK).sum(1)
    else:
        kl_P = _with_rest(a_PK.masked_fill(~known_PK, -torch.inf), b_PK.masked_fill(~known_PK, -torch.inf))
    return Distance(kl_P.clamp_min(0), apart_PK.abs().amax(1))


def _with_rest(a_PK: Tensor, b_PK: Tensor) -> Tensor:
    """KL over some tokens and the rest as one, by the chain rule: of being among them, plus the KL within them."""
    mass_a_P, mass_b_P = (values_PK.exp().sum(1).clamp(SMALLEST, 1 - SMALLEST) for values_PK in (a_PK, b_PK))
    mass_b_P = torch.where((mass_a_P - mass_b_P).abs() < SLACK, mass_a_P, mass_b_P)
    among_P = mass_a_P * (mass_a_P / mass_b_P).log() + (1 - mass_a_P) * ((1 - mass_a_P) / (1 - mass_b_P)).log()
    within_a_PK, within_b_PK = (values_PK.log_softmax(1) for values_PK in (a_PK, b_PK))
    apart_PK = torch.where(torch.isfinite(within_a_PK) & torch.isfinite(within_b_PK), within_a_PK - within_b_PK, 0.0)
    return among_P + mass_a_P * (within_a_PK.exp().nan_to_num() * apart_PK).sum(1)


def odds_moved(a: Logs, b: Logs) -> Tensor:
    """How far the odds of A's two likeliest tokens moved at each position, [P]; near ties are judged by it."""
    top_P2 = a.values_PK.topk(2).indices if a.ids_PK is None else a.ids_PK[:, :2]
    first, second = a.of(top_P2), b.of(top_P2)
    moved_P = ((first[:, 0] - first[:, 1]) - (second[:, 0] - second[:, 1])).abs().double()
    return torch.where(torch.isfinite(moved_P), moved_P, 0.0)


def parting(a: Answer, b: Answer, logs_a: Logs | None, logs_b: Logs | None, decode: Callable) -> Parting | None:
    """Where B's answer departs from A's, or None. Both were asked the same."""
    assert a.ids is not None
    if b.ids is None:
        return _text_parting(a, b, logs_a, decode)
    if a.ids == b.ids or (a.ended and b.ended and a.ids[:-1] == b.ids):  # some servers leave the last token out
        return None
    at = next((n for n, (x, y) in enumerate(zip(a.ids, b.ids, strict=False)) if x != y), min(len(a.ids), len(b.ids)))
    token_a, token_b = (ids[at] if at < len(ids) else None for ids in (a.ids, b.ids))
    return Parting(at, token_a, token_b, gap(logs_a, logs_b, at, token_a, token_b))


def gap(a: Logs | None, b: Logs | None, at: int, token_a: int | None, token_b: int | None) -> float | None:
    """How far the odds of the two tokens moved at a position, None if one of them isn't known there."""
    if a is None or b is None or token_a is None or token_b is None or at >= min(len(a.values_PK), len(b.values_PK)):
        return None
    pair_P2 = torch.tensor([[token_a, token_b]]).expand(max(len(a.values_PK), len(b.values_PK)), 2)
    (a_a, a_b), (b_a, b_b) = (logs.of(pair_P2[: len(logs.values_PK)])[at].tolist() for logs in (a, b))
    moved = (a_a - a_b) + (b_b - b_a)
    return moved if moved == moved and abs(moved) != float("inf") else None


def _text_parting(a: Answer, b: Answer, logs: Logs | None, decode: Callable) -> Parting | None:
    """By text alone: the token at which A's text stops being a prefix of B's, and A's own margin there."""
    assert a.ids is not None
    text = decode(a.ids[:-1] if a.ended else a.ids)
    if b.text.strip() == text.strip():
        return None
    words = b.text.lstrip()
    at = next((n for n in range(len(a.ids)) if not words.startswith(decode(a.ids[: n + 1]).lstrip())), len(a.ids) - 1)
    margin = None
    if logs is not None and at < len(logs.values_PK):
        best = logs.values_PK[at].topk(2).values
        margin = float(best[0] - best[1])
    return Parting(at, a.ids[at], None, margin)
