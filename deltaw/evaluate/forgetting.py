"""What a fine-tune forgot: the base and the adapted model on general text that it was not trained on.

    cross-entropy   of the text under each; the rise is what was lost     ("LoRA Learns Less and Forgets Less", §3)
    KL(base ‖ adapted)   over the whole vocabulary at each token: how far the model's own beliefs have moved, whether or
                         not the text shows it. With the adapter off the model *is* the base, so both cost two passes.

Texts are measured without their end-of-text token: a fine-tune that learnt to stop would seem to know them better.
Sums over tokens, divided once. The rows are read as they come, cut to LENGTH tokens: a probe, not a benchmark.

Letters: T tokens, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from deltaw.base.generate import evaluating
from deltaw.config import DataConfig
from deltaw.data.dataset import prepare
from deltaw.data.example import Example
from deltaw.data.loader import fill
from deltaw.data.pack import pack
from deltaw.data.render import Renderer
from deltaw.errors import InputError
from deltaw.kernels.loss import IGNORE
from deltaw.model import Model
from deltaw.progress import Display

ROWS, LENGTH = 64, 256  # at most; the builtin text has 18 passages
TOKENS_AT_ONCE = 512  # logits of the whole vocabulary, a few times over


@dataclass(frozen=True)
class Forgetting:
    """Nats a token on `tokens` tokens of general text: the base's loss, the adapted model's, KL(base ‖ adapted)."""

    source: str
    tokens: int
    loss_before: float
    loss_after: float
    kl: float

    @property
    def is_finite(self) -> bool:
        """Whether all three are numbers (a model that rules words out altogether has no divergence)."""
        return all(math.isfinite(value) for value in (self.loss_before, self.loss_after, self.kl))


def general_text(source: str, renderer: Renderer, longest: int | None = None) -> list[Example]:
    """The rows to measure on, in any form of data, cut to `LENGTH` or `longest`. Raises InputError where they can't be
    read."""
    data = DataConfig(train=source, max_length=min(LENGTH, longest or LENGTH), too_long="truncate", limit=ROWS)
    rows = prepare(data, Renderer(renderer.tokenizer)).train
    return [_without_end(row, renderer.stop_ids) for row in rows]


@torch.no_grad()
def forgetting(model: Model, source: str, examples: Sequence[Example], display: Display) -> Forgetting:
    """Both losses and the divergence. `model` must carry an adapter, switched on."""
    assert model.attached is not None
    losses, kl, tokens, done = [0.0, 0.0], 0.0, 0, 0
    with evaluating(model.base.model), display.task("forgetting", len(examples)) as update:
        for documents in fill(range(len(examples)), [len(row.tokens) for row in examples], TOKENS_AT_ONCE):
            batch = pack([examples[n] for n in documents]).to(model.base.device)
            rows = batch.labels_T != IGNORE
            labels_T1 = batch.labels_T[rows][:, None]
            inputs = batch.tokens_T, batch.positions_T, batch.starts_S
            after_TV = model.forward.logits(*inputs)[rows].log_softmax(-1)
            with model.attached.disabled():
                before_TV = model.forward.logits(*inputs)[rows].log_softmax(-1)
            for side, logs_TV in enumerate((before_TV, after_TV)):
                losses[side] -= float(logs_TV.gather(1, labels_T1).sum())
            kl += float((before_TV.exp() * (before_TV - after_TV)).sum())
            tokens += len(labels_T1)
            done += len(documents)
            update(done)
    if not tokens:
        raise InputError(f"evaluate.general: {source} has no token to measure on")
    return Forgetting(source, tokens, losses[0] / tokens, losses[1] / tokens, kl / tokens)


def _without_end(row: Example, stops: set[int]) -> Example:
    cut = slice(None, -1 if int(row.tokens[-1]) in stops else None)
    return replace(row, tokens=row.tokens[cut], loss_mask=row.loss_mask[cut])
