"""Running a causal LM on documents laid end to end: the loss and the logits of a packed batch.

Not every architecture can be packed (state-space layers mix neighbours, ALiBi is part of the mask, attention sinks are
a separate argument, some windows are only in the mask), and not every head is a plain product. Nothing is taken on
trust: `plan_forward` tries what it would do on two documents (probe.py) and takes the first way that gives the model's
own answers: all documents packed into one row (attention.py), one row each, padded to the longest, or each in a pass of
its own. Whether packed documents may continue others (kernels/tree.py) is tried, too. `Forward.describe()` says which
way it is, and why no faster one.

Letters: T tokens of a batch, S documents + 1, B documents of a padded batch, L the longest, D hidden, V vocabulary.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.base.angles import stand_in_for_angles
from deltaw.base.attention import is_packed, packed_attention_of
from deltaw.base.batch import Batch, segments_of
from deltaw.base.head import Head, find_head
from deltaw.base.objective import Objective, sft
from deltaw.base.passing import Pass, passing_of
from deltaw.base.prefix import Prefix
from deltaw.base.probe import REFUSALS, Probe, borders, masks_are_told, uncrossed
from deltaw.base.recompute import Recompute
from deltaw.base.small import small_copy
from deltaw.errors import InputError
from deltaw.kernels.divergence import divergence_of
from deltaw.kernels.logprobs import Logprobs, logprobs_of
from deltaw.show.progress import Progress

PACKED, PADDED, APART = "packed documents", "padded batches", "one document at a time"


@dataclass(frozen=True)
class Forward:
    """How a model is run: packed, padded or apart, with the head fused into the loss or through the model's own.

    Built by `plan_forward`. Knows nothing of adapters: they sit inside the model's linear layers.
    """

    model: nn.Module
    head: Head | None
    way: str
    why: str = ""  # what forbids a faster way
    prefix: Prefix | None = None  # frozen layers that are not computed again
    recompute: Recompute | None = None  # layers that keep their input alone, and run again in the backward
    attention: str = ""  # that the model was left on, where documents are packed
    continues: bool = False  # documents may continue others, where they are packed
    positions: bool = False  # a padded batch says where its documents end: the model's angles depend on it
    temperature: float = 1.0  # that the logits are divided by, whatever is asked of them

    @property
    def packed(self) -> bool:
        return self.way == PACKED

    @property
    def shares(self) -> bool:
        """Whether a beginning that examples share is computed once: not on a GPU, where recorded passes know offsets
        alone (training/captured.py)."""
        return self.continues and next(self.model.parameters()).device.type == "cpu"

    def describe(self) -> str:
        """One line for logs: which path runs."""
        batches = f"{self.way} ({self.why})" if self.why else self.way
        head = "fused head and loss" if self.head else "the model's own head"
        below = f", {self.prefix.first} frozen layers computed once" if self.prefix else ""
        again = f", {self.recompute.describe()}" if self.recompute else ""
        return f"{batches}, {head}{below}{again}"

    def loss(self, batch: Batch, objective: Objective = sft) -> tuple[Tensor, int]:
        """(the objective's sum, what it counts); by default of cross-entropies in nats, and of labelled tokens."""
        return objective(self.scores(batch), batch), objective.count(batch)

    def logprobs(self, batch: Batch) -> Tensor:
        """[K] in float32: the log-probability of each labelled token, in order."""
        return self.scores(batch).logp_K

    def scores(self, batch: Batch) -> Logprobs:
        """What the head says of the labels: all that an objective is a function of."""
        if not batch.supervised:
            nothing = torch.zeros(0, device=batch.tokens_T.device)
            return Logprobs(nothing, nothing.sum())
        hidden_TX = self.rows(batch)
        if self.head is not None:
            return self.head.logprobs(hidden_TX, batch.labels_T, batch.rows_K, batch.segments())
        return logprobs_of(self._tempered(hidden_TX), batch.labels_T, batch.rows_K)

    def scores_and_drift(self, batch: Batch) -> tuple[Logprobs, Tensor]:
        """The same, and KL(base ‖ tuned) [R] of the rows that are held to the base: of one pass."""
        retained = batch.retained
        assert retained is not None and retained.base_RX is not None
        hidden_TX, base_RX = self.rows(batch), retained.base_RX
        row_R = torch.tensor(retained.rows, device=hidden_TX.device)
        if self.head is not None:
            return self.head.logprobs_and_divergence(hidden_TX, batch.labels_T, row_R, base_RX)
        return logprobs_of(hidden_TX, batch.labels_T), divergence_of(hidden_TX[row_R], base_RX)

    def logits(self, batch: Batch) -> Tensor:
        """[T, V] in float32: for tests and small inputs; training never forms it."""
        hidden_TX = self.rows(batch)
        if self.head is not None:
            return self.head.logits(hidden_TX, batch.segments())
        return self._tempered(hidden_TX).float()

    def at(self, temperature: float) -> "Forward":
        """The same whose log-probabilities are of the logits divided by a temperature: of what is sampled at it."""
        if temperature == self.temperature:
            return self
        head = self.head and self.head.at(temperature / self.temperature)
        return dataclasses.replace(self, head=head, temperature=temperature)

    def _tempered(self, logits_TV: Tensor) -> Tensor:
        if self.temperature == 1:
            return logits_TV
        return logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)) / self.temperature

    def above(self, layers: str, first: int, batches: Iterable[Batch], progress: Progress) -> "Forward":
        """This forward for passes over the documents of `batches`, begun at layer `first` of the module list `layers`.

        Right as long as nothing below changes. Itself where that can't be done.
        """
        if not self.packed or not first:
            return self
        prefix = Prefix(self.model, layers, first)
        if prefix.fill(dataclasses.replace(self, prefix=prefix).rows, batches, progress):
            return dataclasses.replace(self, prefix=prefix)
        prefix.remove()
        return self

    def rows(self, batch: Batch) -> Tensor:
        """A row per token: hidden [T, D] where the head is known, else logits [T, V]."""
        tokens_T = batch.tokens_T
        if batch.documents.tree is not None and not self.continues:
            raise ValueError("this model can't be run on documents that continue others: give it batch.unshared()")
        if self.packed:
            self._check_attention()
            below = self.prefix.kept(batch) if self.prefix else None
            this = Pass(documents=batch.documents, segments=batch.segments(), below=below)
            return self._run(this, input_ids=tokens_T[None], position_ids=batch.positions_T[None]).squeeze(0)
        starts = batch.starts
        if self.way == APART or len(starts) == 2:  # nothing is padded
            parts = batch.updates or (None,) * (len(starts) - 1)
            return torch.cat(
                [
                    self._run(_of_one(update, end - start), input_ids=tokens_T[None, start:end]).squeeze(0)
                    for update, (start, end) in zip(parts, pairwise(starts), strict=True)
                ]
            )
        longest = batch.documents.longest
        length_B = torch.tensor([end - start for start, end in pairwise(starts)], device=tokens_T.device)
        real_BL = torch.arange(longest, device=tokens_T.device) < length_B[:, None]
        ids_BL = tokens_T.new_zeros(real_BL.shape)
        ids_BL[real_BL] = tokens_T
        more: dict[str, Any] = {}
        if self.positions:
            more["position_ids"] = torch.zeros_like(ids_BL)
            more["position_ids"][real_BL] = batch.positions_T
        this = Pass(segments=segments_of(batch.updates, [n * longest for n in range(len(starts))]))
        return self._run(this, input_ids=ids_BL, attention_mask=real_BL.long(), **more)[real_BL]

    def _check_attention(self) -> None:
        """Raise InputError for a copied model, or one whose attention was set since it was planned: its documents would
        see one another."""
        now = self.model.config._attn_implementation  # type: ignore[union-attr]
        own = not is_packed(self.model) or passing_of(self.model).attention == now
        if self.attention and (now != self.attention or not own):
            raise InputError("this model isn't on the attention it was planned with", fix="call plan_forward again")

    def _run(self, this: Pass, **inputs: Any) -> Tensor:
        with passing_of(self.model).running(this):
            if self.head is None:
                out: Tensor = self.model(**inputs, use_cache=False).logits
            else:
                out = self.model.base_model(**inputs, use_cache=False).last_hidden_state  # type: ignore[operator]
        return out


def _of_one(update: int | None, rows: int) -> Pass:
    """The pass of one document alone."""
    return Pass(segments=None if update is None else segments_of((update,), (0, rows)))


@torch.no_grad()
def plan_forward(model: nn.Module) -> Forward:
    """The fastest way to run `model` that gives its own answers: tried on two documents, not assumed.

    A packed model is left on the `deltaw` attention, any other on the one it came with. Rotary angles that depend on a
    document's company no longer do, however the model is run (angles.py).
    """
    numbers = borders(model.config.to_dict())  # type: ignore[union-attr, operator]
    far = sorted({n for number in numbers for n in (number - 1, number, number + 1, 2 * number)})
    positions = bool(stand_in_for_angles(model, far))
    probe = Probe.on(model)
    apart = Forward(model, find_head(model), APART, positions=positions)
    if not probe.fits_apart(apart.logits):
        apart = dataclasses.replace(apart, head=None)  # the model's own way, which needs no proof
    packed = dataclasses.replace(apart, way=PACKED)
    own = model.config._attn_implementation  # type: ignore[union-attr]
    why = _why_not_packed(model, probe, packed) or _why_not_further(model)
    if not why:
        continues = probe.shares(dataclasses.replace(packed, continues=True).logits)
        now = str(model.config._attn_implementation)  # type: ignore[union-attr]
        return dataclasses.replace(packed, attention=now, continues=continues)
    model.set_attn_implementation(own)  # type: ignore[operator]
    padded = dataclasses.replace(apart, way=PADDED, why=why)
    try:
        fits = probe.fits(padded.logits)
    except REFUSALS:
        fits = False
    return padded if fits else dataclasses.replace(apart, why=f"{why}, and rows of a padded batch aren't alone")


def _why_not_packed(model: nn.Module, probe: Probe, packed: Forward) -> str:
    """What forbids packing, in words; "" for nothing, and then the model is on the `deltaw` attention."""
    try:
        if not masks_are_told(model):
            return "this model's masks hide more than attention is told"
        model.set_attn_implementation(packed_attention_of(model))  # type: ignore[operator]
        if probe.fits(packed.logits) and probe.isolated(model, packed.logits):
            return ""
    except NotImplementedError as error:
        return str(error)
    except REFUSALS:
        return "this model can't be run packed"
    return "this model mixes packed documents"


def _why_not_further(model: nn.Module) -> str:
    """The same, beyond the borders that were too far for a pass of the model itself: tried on a small copy of it."""
    small = small_copy(model) if uncrossed(model) else None
    if small is None:
        return ""
    stand_in_for_angles(small, sorted(borders(small.config.to_dict())))  # type: ignore[union-attr, operator]
    why = _why_not_packed(small, Probe.on(small), Forward(small, None, PACKED))
    return f"{why} in a small copy of it" if why else ""
