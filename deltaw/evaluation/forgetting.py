"""What fine-tuning forgot: the base and the adapted model on general text that it wasn't trained on.

    cross-entropy   of the text under each; the rise is what was lost     ("LoRA Learns Less and Forgets Less", §3)
    KL(base ‖ adapted)   over the whole vocabulary at each token: how far the model's own beliefs have moved, whether or
                         not the text shows it. With the adapter off the model *is* the base, so both cost two passes.

Texts are measured without their end-of-text token: a fine-tune that learnt to stop would seem to know them better.
Sums over tokens, divided once. The rows are read as they come, cut to LENGTH tokens: a probe, not a benchmark. So each
figure has the interval in which 95 % of what other passages of the kind would give lie: passages are drawn again, with
replacement, RESAMPLES times (Efron's bootstrap, seeded). Tokens of one passage aren't independent, passages are. Base
and adapted model stay paired, so what makes a passage hard for both drops out. One passage alone has no interval.

Letters: K tokens with a label, V vocabulary, P passages, B resamples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from deltaw.base.batch import Batch
from deltaw.config import DataConfig
from deltaw.data.example import Example
from deltaw.data.prepare import prepare
from deltaw.data.render import Renderer
from deltaw.data.weighed import Weighed
from deltaw.errors import InputError
from deltaw.evaluation.batches import batches
from deltaw.evaluation.scoring import passes
from deltaw.kernels.logprobs import IGNORE
from deltaw.model import Model
from deltaw.show.progress import Display

ROWS, LENGTH = 64, 256  # at most; the builtin text has 18 passages
TOKENS_AT_ONCE = 512  # logits of the whole vocabulary, a few times over
RESAMPLES, COVERED = 2000, 0.95


@dataclass(frozen=True)
class Forgetting:
    """Nats per token on `tokens` tokens of general text: the base's loss, the adapted model's, KL(base ‖ adapted). The
    intervals are of the rise, `loss_after` − `loss_before`, and of the divergence; None for a single passage."""

    source: str
    tokens: int
    loss_before: float
    loss_after: float
    kl: float
    passages: int = 0
    rise_interval: tuple[float, float] | None = None
    kl_interval: tuple[float, float] | None = None

    @property
    def is_finite(self) -> bool:
        """Whether all three are numbers (a model that rules words out altogether has no divergence)."""
        return all(math.isfinite(value) for value in (self.loss_before, self.loss_after, self.kl))


def general_text(source: str, renderer: Renderer, longest: int | None = None) -> list[Example]:
    """The rows to measure on, in any form of data, cut to `LENGTH` or `longest`. Raises InputError where they can't be
    read."""
    data = DataConfig(train=source, max_length=min(LENGTH, longest or LENGTH), too_long="truncate", limit=ROWS)
    rows = prepare(data, Renderer(renderer.tokenizer)).train
    return [without_end(row, renderer.stop_ids) for row in rows]


def forgetting(model: Model, source: str, examples: Sequence[Example], display: Display) -> Forgetting:
    """Both losses and the divergence. `model` must carry an adapter, switched on."""
    assert model.attached is not None
    sums_P4, done = torch.zeros(len(examples), 4, dtype=torch.float64), 0
    rows, ask, at_once = Weighed(examples), partial(_of_labels, model), TOKENS_AT_ONCE
    recorded = passes(model.forward, ask, rows, at_once=at_once, say=display.say)
    with recorded as passed, display.task("forgetting", len(examples)) as progress:
        for numbers, batch in batches(model.forward, rows, at_once=at_once):
            sums_P4[numbers] = batch.by_document(passed(batch).double().cpu())
            done += len(numbers)
            progress(done)
    sums_P4 = sums_P4[sums_P4[:, 3] > 0]
    if not len(sums_P4):
        raise InputError(f"evaluate.general: {source} has no token to measure on")
    before, after, kl, tokens = sums_P4.sum(0).tolist()
    rise, divergence = (_interval(part_P, sums_P4[:, 3]) for part_P in (sums_P4[:, 1] - sums_P4[:, 0], sums_P4[:, 2]))
    return Forgetting(source, int(tokens), before / tokens, after / tokens, kl / tokens, len(sums_P4), rise, divergence)


def _of_labels(model: Model, batch: Batch) -> Tensor:
    """[K, 4]: at each label of a batch the losses before and after, the divergence, 1."""
    assert model.attached is not None
    rows = batch.labels_T != IGNORE if batch.rows_K is None else batch.rows_K
    labels_K1 = batch.labels_T[rows][:, None].clamp_min(0)  # a filled batch has rows without a label
    after_KV = model.forward.logits(batch)[rows].log_softmax(-1)
    with model.attached.disabled():
        before_KV = model.forward.logits(batch)[rows].log_softmax(-1)
    losses = [-logp_KV.gather(1, labels_K1).squeeze(1) for logp_KV in (before_KV, after_KV)]
    kl_K = (before_KV.exp() * (before_KV - after_KV)).sum(1)
    return torch.stack([*losses, kl_K, torch.ones_like(kl_K)], 1)


def _interval(part_P: Tensor, tokens_P: Tensor) -> tuple[float, float] | None:
    """Where Σ part / Σ tokens lies for other draws of as many passages."""
    if len(part_P) < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    drawn_BP = torch.randint(len(part_P), (RESAMPLES, len(part_P)), generator=generator)
    ratios_B = part_P[drawn_BP].sum(1) / tokens_P[drawn_BP].sum(1)
    low, high = ratios_B.quantile(torch.tensor([0.5 - COVERED / 2, 0.5 + COVERED / 2], dtype=torch.float64)).tolist()
    return low, high


def without_end(row: Example, stops: set[int]) -> Example:
    """The row without a token that ends its text."""
    cut = slice(None, -1 if int(row.tokens[-1]) in stops else None)
    return replace(row, tokens=row.tokens[cut], loss_mask=row.loss_mask[cut])
