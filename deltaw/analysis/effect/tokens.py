"""Base against tuned, token by token: where the update helped, where it hurt, and where the model's beliefs moved most.

    change       tuned loss − base loss at a label, in nats: below 0 the update helped
    clear        a change of more than `CLEAR` nats, a tenth: p(label) moved by more than about 10 % of itself
    same guess   both models' first guess is the same token
    half of KL   the share of tokens, largest KL first, that hold half of the whole divergence: near 50 % it is spread
                 evenly over the text, near 0 a few tokens are all of it

Means have intervals (95 %, bootstrap over rows: tokens of one row aren't independent).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from deltaw.analysis.effect.passes import AtLabels, OfRows
from deltaw.data.render import Renderer
from deltaw.evaluation.intervals import Interval, Scores, interval

CLEAR = 0.1
SHOWN, CONTEXT = 6, 10  # tokens of a table, and of what stands before one
CURVE = 101  # points


@dataclass(frozen=True)
class Token:
    """A label: what stands before it, which row it is of, and what both models made of it."""

    origin: str
    before: str
    token: str
    base_guess: str
    tuned_guess: str
    base_loss: float
    tuned_loss: float
    kl: float


@dataclass(frozen=True)
class Tokens:
    """All labels of one kind of rows; the module's docstring defines the figures. `curve`: the change at each per cent
    of the tokens, from the most helped to the most hurt."""

    labels: int
    rows: int
    change: Interval
    helped: Interval
    hurt: Interval
    same_guess: Interval
    half_of_kl: float | None
    curve: list[float]
    most_helped: list[Token]
    most_hurt: list[Token]
    most_moved: list[Token]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def by_token(rows: OfRows, renderer: Renderer) -> Tokens:
    """The figures of one kind of rows."""
    base, tuned = AtLabels.joined(rows.base), AtLabels.joined(rows.tuned)
    row_K, change_K = np.array(rows.row_K), (tuned.loss_K - base.loss_K).double().numpy()
    kl_K = tuned.kl_K.double().numpy()

    def mean(values_K: np.ndarray) -> Interval:
        columns = [np.bincount(row_K, weights=x_K, minlength=len(rows.documents)) for x_K in (values_K, values_K**0)]
        return interval(Scores(np.stack(columns, 1)), seed=0)

    def token(number: int) -> Token:
        row, at = rows.documents[rows.row_K[number]], rows.at_K[number]
        ids = row.tokens.tolist()
        spans = [ids[max(0, at - CONTEXT) : at], [ids[at]], *([guess] for guess in guesses_K2[number].tolist())]
        before, own, base_guess, tuned_guess = (renderer.decode(span, skip_special=False) for span in spans)
        losses = float(base.loss_K[number]), float(tuned.loss_K[number])
        return Token(row.origin, before, own, base_guess, tuned_guess, *losses, float(kl_K[number]))

    guesses_K2 = np.stack([base.guess_K.numpy(), tuned.guess_K.numpy()], 1)
    order_K, largest_K = np.argsort(change_K, kind="stable"), np.argsort(-kl_K, kind="stable")
    return Tokens(
        labels=len(change_K),
        rows=len(rows.documents),
        change=mean(change_K),
        helped=mean((change_K < -CLEAR).astype(float)),
        hurt=mean((change_K > CLEAR).astype(float)),
        same_guess=mean((guesses_K2[:, 0] == guesses_K2[:, 1]).astype(float)),
        half_of_kl=_half(kl_K[largest_K]),
        curve=np.quantile(change_K, np.linspace(0, 1, CURVE)).tolist(),
        most_helped=[token(number) for number in order_K[:SHOWN] if change_K[number] < 0],
        most_hurt=[token(number) for number in order_K[::-1][:SHOWN] if change_K[number] > 0],
        most_moved=[token(number) for number in largest_K[:SHOWN] if kl_K[number] > 0],
    )


def _half(descending_K: Sequence[float] | np.ndarray) -> float | None:
    """The share of the first numbers whose sum is half of the whole; None where there is nothing."""
    sums_K = np.cumsum(descending_K)
    if not len(sums_K) or not np.isfinite(sums_K[-1]) or sums_K[-1] <= 0:
        return None
    return float((np.searchsorted(sums_K, sums_K[-1] / 2) + 1) / len(sums_K))
