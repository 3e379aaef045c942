"""What the model says of tokens: their log-probabilities and the likeliest others, by row of logits or for a prompt.

They are of the model's own distribution, before a bias and a temperature, in float32 (but where a row asks for those at
its temperature: engine.py).

A prompt is scored in one pass, and all of its logits are never there together (a prompt of 8,192 tokens would need
1.6 GB for a vocabulary of 49,152): the pass is asked for the last token's alone, the hidden rows that enter the head
are watched on their way, and the head is put to them a chunk at a time. Whether the head is the plain product that it
is taken for (base/head.py) shows at the last token, whose logits the model itself gives; where it isn't, the model is
asked for each chunk of logits in a pass of its own.

Letters: R rows, T tokens of a prompt, D hidden size, V vocabulary.
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaw.base.attention import is_packed
from deltaw.base.frozen import dtype_of
from deltaw.base.head import find_head
from deltaw.base.passing import Pass, passing_of
from deltaw.base.probe import rounding
from deltaw.generate.cache import segments_for
from deltaw.kernels.documents import Documents
from deltaw.kernels.segments import Segments

LOGITS_AT_ONCE = 1 << 24  # numbers: 64 MB in float32


class Logprobs(NamedTuple):
    """The log-probability of a token, and the likeliest tokens in its place with theirs, the best first."""

    token: float
    top: tuple[tuple[int, float], ...] = ()


def logprobs_of(logits_RV: Tensor, tokens: Sequence[int], top: int) -> list[Logprobs]:
    """What each row says of its token, and of its `top` likeliest ones."""
    logp_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)).log_softmax(-1)
    chosen = logp_RV.gather(1, torch.tensor(tokens, device=logp_RV.device)[:, None])[:, 0].tolist()
    values_RN, ids_RN = logp_RV.topk(min(top, logp_RV.shape[1]))
    pairs = [tuple(zip(*row, strict=True)) for row in zip(ids_RN.tolist(), values_RN.tolist(), strict=True)]
    return [Logprobs(token, row) for token, row in zip(chosen, pairs, strict=True)]


def score(model: nn.Module, prompt: Sequence[int], *, update: int | None, top: int) -> list[Logprobs]:
    """What the model, in eval mode, says of the tokens of a prompt but the first."""
    following, scored = list(prompt[1:]), list[Logprobs]()
    for logits_RV in _logits(model, prompt, update):
        tokens = following[len(scored) : len(scored) + len(logits_RV)]  # the last row's next token isn't known
        if tokens:
            scored += logprobs_of(logits_RV[: len(tokens)], tokens, top)
    return scored


def _logits(model: Any, prompt: Sequence[int], update: int | None) -> Iterator[Tensor]:
    """The logits of a prompt's tokens in order, some rows at a time."""
    device, length = next(model.parameters()).device, len(prompt)
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": torch.tensor([list(prompt)], device=device)}
    if "position_ids" in accepted:
        inputs["position_ids"] = torch.arange(length, device=device)[None]
    documents = Documents([0, length], device) if is_packed(model) else None

    def taken(rows: Tensor) -> Segments | None:
        return segments_for([update], [0, len(rows)])

    def run(rows: Tensor) -> Tensor:
        more = {"logits_to_keep": rows} if "logits_to_keep" in accepted else {}
        kept = taken(rows) if more else None
        this = Pass(documents=documents, segments=segments_for([update], [0, length]), kept=kept)
        with passing_of(model).running(this):
            out: Tensor = model(**inputs, **more, use_cache=False, return_dict=True).logits[0]
        return out

    watched: list[Tensor] = []
    head = find_head(model)
    hook = None if head is None else model.base_model.register_forward_hook(lambda *call: watched.append(call[2][0][0]))
    try:
        own_RV = run(torch.tensor([length - 1], device=device))
    finally:
        if hook is not None:
            hook.remove()
    rows = max(1, LOGITS_AT_ONCE // own_RV.shape[1])
    if len(own_RV) == length:  # a model that can't be asked for some of them
        yield from own_RV.split(rows)
    elif head is not None and _same(head.logits(watched[-1][-1:], taken(own_RV)), own_RV, rounding(dtype_of(model))):
        yield from (head.logits(hidden_RD, taken(hidden_RD)) for hidden_RD in watched[-1].split(rows))
    else:
        yield from (run(some) for some in torch.arange(length, device=device).split(rows))


def _same(mine: Tensor, own: Tensor, unit: float) -> bool:
    return bool((mine - own).double().square().mean().sqrt() <= max(unit, 1e-6) * own.double().std())
