"""Passes of the base, of the tuned model and of every state over the same rows, within a budget of tokens and seconds.

At each label: the loss −log p(label), and KL(base ‖ tuned) = Σ_v p_v (log p_v − log q_v) over the whole vocabulary.
Rows come in batches of at most `AT_ONCE` tokens. The base's log-probabilities of a batch, [K, V], are kept while all
states pass over it and then dropped, so memory doesn't grow with the budget; and wherever the time ends, all states
have seen the same rows, so that their differences are paired. A round is a batch of each kind of rows. A pass that is
timed before says how large batches may be for two rounds to fit; where not even one of the smallest does, which the
first round's own passes tell, whole groups of states are left out, the last first.

Rejected: a pass of the base beside each state's (twice the time), all of its log-probabilities kept (48 MB for each 256
labels of the smallest model), one state after another over all rows (what doesn't fit would have seen none).

Letters: K labels of a batch, V vocabulary, P documents (rows or passages), T tokens.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from deltaw.analysis.effect.states import NAMES, State, Trained
from deltaw.base.batch import Batch
from deltaw.data.example import Example
from deltaw.data.examples import lengths_of
from deltaw.data.loader import fill
from deltaw.data.pack import pack
from deltaw.generate.cache import evaluating
from deltaw.kernels.logprobs import IGNORE
from deltaw.model import Model
from deltaw.show.progress import Display

AT_ONCE, LEAST = 256, 48  # tokens of a batch, or labels of a longer row; [256, V] a few times over
CHUNK = 64  # labels whose distributions are compared at once
Rows = Mapping[str, Sequence[Example]]  # by kind: "task", "general"


@dataclass(frozen=True)
class Budget:
    """What may be spent: tokens of each kind of rows, and seconds."""

    tokens: int
    seconds: float


@dataclass(frozen=True, eq=False)
class AtLabels:
    """What a model says at labels: −log p(label), KL(base ‖ it), its first guess."""

    loss_K: Tensor
    kl_K: Tensor
    guess_K: Tensor

    @staticmethod
    def joined(parts: Sequence["AtLabels"]) -> "AtLabels":
        """One after the other."""
        columns = zip(*((part.loss_K, part.kl_K, part.guess_K) for part in parts), strict=True)
        return AtLabels(*(torch.cat(column) for column in columns))


@dataclass(eq=False)
class OfRows:
    """One kind of rows, as far as they were passed over. `sums`: by state, [P, 3] float64 of each document: losses, KL,
    labels. `row_K` and `at_K`: which document each label belongs to, and its place there."""

    documents: list[Example] = field(default_factory=list)
    sums: dict[str, list[Tensor]] = field(default_factory=dict)
    base: list[AtLabels] = field(default_factory=list)
    tuned: list[AtLabels] = field(default_factory=list)
    row_K: list[int] = field(default_factory=list)
    at_K: list[int] = field(default_factory=list)

    def stats(self, state: str) -> np.ndarray:
        """[P, 3] of a state."""
        return torch.cat(self.sums[state]).numpy()

    @property
    def tokens(self) -> int:
        """How many were passed over in each state."""
        return int(lengths_of(self.documents).sum())


@dataclass(frozen=True, eq=False)
class Passes:
    """What was measured: `states` in all of `rows`; `left_out`, in words, what the time didn't suffice for."""

    rows: Mapping[str, OfRows]
    states: Sequence[State]
    left_out: tuple[str, ...]
    seconds: float


def key(state: State) -> str:
    """What a state's sums are found under; "base" and "tuned" are the other two."""
    return f"{state.group} {state.name}"


@torch.no_grad()
def pass_over(
    model: Model, rows: Rows, states: Sequence[State], trained: Trained, budget: Budget, display: Display
) -> Passes:
    """All states over `rows`, as far as the budget goes: at least the base and the tuned model over one batch of each
    kind."""
    begun = time.monotonic()
    fitting = budget.seconds / (2 * len(rows) * (2 + len(states)) * _seconds_per_token(model, rows))
    batches = {kind: _batches(examples, int(max(LEAST, min(AT_ONCE, fitting)))) for kind, examples in rows.items()}
    rounds = list(zip_longest(*batches.values()))
    found: dict[str, OfRows] = {kind: OfRows() for kind in rows}
    states, left_out = list(states), list[str]()
    rate, done = 0.0, 0
    total = sum(len(part) for part in batches.values()) * (2 + len(states))
    with evaluating(model.base.model), display.task("trying the update", total) as progress:
        for number, batches_of_round in enumerate(rounds):
            began = time.monotonic()
            room = budget.seconds - (began - begun)
            tokens = sum(sum(len(row.tokens) for row in batch) for batch in batches_of_round if batch)
            if number and rate * tokens * (2 + len(states)) > room:
                left_out.append(f"{len(rounds) - number} of {len(rounds)} batches of rows")
                break
            for kind, examples in zip(rows, batches_of_round, strict=True):
                if examples is None:
                    continue
                before_KV = _base(model, examples, found[kind])
                if not rate:  # the first pair of passes: what one costs
                    rate = (time.monotonic() - began) / (2 * sum(len(row.tokens) for row in examples))
                    left_out += _leave_out(states, room / (rate * tokens) - 2)
                for state in states:
                    with state.worn(model.attached, trained):  # type: ignore[arg-type]
                        _state(model, examples, before_KV, found[kind], key(state))
                    done += 1
                    spent = (time.monotonic() - begun) / budget.seconds  # the time may end before the rows do
                    progress(max(done, min(total - 1, int(total * spent))))
                done += 2
            rate = (time.monotonic() - began) / (tokens * (2 + len(states)))
        progress(total)
    return Passes(found, states, tuple(left_out), time.monotonic() - begun)


def _leave_out(states: list[State], fit: float) -> list[str]:
    """Take the last groups of states out until no more than `fit` are left; their names."""
    gone: list[str] = []
    while states and len(states) > fit:
        group = states[-1].group
        gone.append(NAMES[group])
        states[:] = [state for state in states if state.group != group]
    return gone


def _seconds_per_token(model: Model, rows: Rows) -> float:
    """Of a pass of the tuned model over the first row: the second one, for the first fills caches."""
    row = min((examples[0] for examples in rows.values()), key=lambda row: len(row.tokens))
    with evaluating(model.base.model):
        for _ in range(2):
            began = time.monotonic()
            _logp(model, _packed(model, [row]))
    return (time.monotonic() - began) / len(row.tokens)


def _batches(examples: Sequence[Example], most: int) -> list[list[Example]]:
    groups = fill(range(len(examples)), lengths_of(examples), most)
    return [[examples[number] for number in numbers] for numbers in groups]


def _packed(model: Model, examples: Sequence[Example]) -> Batch:
    """The rows as a batch; of a long one its first labels alone."""
    batch = pack(examples)
    place_K = (batch.labels_T != IGNORE).nonzero().squeeze(1)
    if len(place_K) > AT_ONCE:
        labels_T = batch.labels_T.clone()
        labels_T[place_K[AT_ONCE:]] = IGNORE
        batch = batch.relabelled(labels_T)
    return batch.to(model.base.device)


def _logp(model: Model, batch: Batch) -> Tensor:
    """[K, V] in float32, of the rows that have a label."""
    rows_T = batch.labels_T != IGNORE
    hidden_KX, head = model.forward.rows(batch)[rows_T], model.forward.head
    logits_KV = hidden_KX.float() if head is None else head.logits(hidden_KX)
    return logits_KV.log_softmax(-1)


def _base(model: Model, examples: Sequence[Example], found: OfRows) -> Tensor:
    """The base's log-probabilities [K, V], noted; then the tuned model's."""
    batch = _packed(model, examples)
    assert model.attached is not None
    with model.attached.disabled():
        before_KV = _logp(model, batch)
    place_K = (batch.labels_T != IGNORE).nonzero().squeeze(1).tolist()
    for place in place_K:
        row = int(np.searchsorted(batch.starts, place, "right")) - 1
        found.row_K.append(len(found.documents) + row)
        found.at_K.append(place - batch.starts[row] + 1)  # of the token that is the label
    found.documents += examples
    found.base.append(_note(batch, before_KV, before_KV, found, "base"))
    found.tuned.append(_note(batch, _logp(model, batch), before_KV, found, "tuned"))
    return before_KV


def _state(model: Model, examples: Sequence[Example], before_KV: Tensor, found: OfRows, name: str) -> None:
    batch = _packed(model, examples)
    _note(batch, _logp(model, batch), before_KV, found, name)


def _note(batch: Batch, after_KV: Tensor, before_KV: Tensor, found: OfRows, name: str) -> AtLabels:
    labels_K1 = batch.labels_T[batch.labels_T != IGNORE][:, None]
    loss_K = -after_KV.gather(1, labels_K1).squeeze(1)
    chunks = zip(before_KV.split(CHUNK), after_KV.split(CHUNK), strict=True)
    kl_K = torch.cat([_divergence(p_CV, q_CV) for p_CV, q_CV in chunks])
    columns_K3 = torch.stack([loss_K, kl_K, torch.ones_like(kl_K)], 1).double().cpu()
    found.sums.setdefault(name, []).append(batch.to("cpu").by_document(columns_K3))
    return AtLabels(loss_K.cpu(), kl_K.cpu(), after_KV.argmax(1).cpu())


def _divergence(logp_CV: Tensor, logq_CV: Tensor) -> Tensor:
    """[C]: KL(p ‖ q). A word that p rules out altogether adds nothing; rounding can't make it negative."""
    p_CV = logp_CV.exp()
    return torch.where(p_CV > 0, p_CV * (logp_CV - logq_CV), 0).sum(1).clamp(min=0)
