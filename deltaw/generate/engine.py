"""Token ids -> token ids, on any causal language model of transformers that can go on from a cache.

One decoding loop serves both faces: `generate` for many prompts, `stream` for one, token by token. Each prompt gets
what it gets alone: prompts of different lengths are padded on the left and decoded together only where the model has
shown that this changes nothing (together.py), others with those of their own length. They go longest first, so that
little is padded; a row that has ended is dropped from the cache when an eighth of the rows have, since on a CPU a step
costs what its rows cost.

transformers' own `model.generate` was the first choice, and measured: it took as long as a plain loop over `forward`
(5.8 s against 5.5 s for 64 prompts of 32 new tokens on SmolLM2-135M, 2 cores), but it keeps finished rows until the
last one ends, copies the head (see `State`), and mixes the checkpoint's generation_config (a temperature, a
repetition penalty) into what was asked for. 500 prompts of 15 tokens take about 35 s here when none stops before 32
new tokens, 19 s when they stop after 6 on average; batches of 128 are 10 to 25 % faster than of 64.

Sampling is reproducible for each prompt, not for each batch: prompt i draws its uniform numbers from a
generator of its own, seeded by (seed, i), and each token is the inverse of the cumulative distribution at one
such number. So batch size and company change nothing beyond rounding, no global generator is touched, and
`stream` equals `generate`.

Greedy decoding in another batch size may differ where two tokens nearly tie: the kernels round differently.

Letters: R rows alive, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet

import torch
from pydantic import Field
from torch import Tensor, nn

from deltaw.config import Strict
from deltaw.errors import InputError, RunError
from deltaw.generate.cache import State, context, in_eval_mode, padded, text_config
from deltaw.generate.together import Together, come_to_rest

TOKENS_AT_ONCE = 65_536  # rows x length: bounds the cache (4 GB for an 8B model), whatever batch_size says
DROP = 8  # copy the cache without its finished rows when 1/DROP of them are


class Sampling(Strict):
    """How tokens are chosen. temperature 0: greedy; top_k 0, top_p 1: all tokens; seed None: a random one."""

    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    seed: int | None = Field(default=None, ge=0, lt=2**62)


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: AbstractSet[int],
    *,
    batch_size: int = 128,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The new tokens of every prompt, in the order of `prompts`; the stop token that ended one is left out.

    `progress` is called with the number of finished prompts after each batch. Raises InputError for an empty
    prompt, one that fills the model's context, or an id outside its vocabulary.
    """
    _check(model, prompts)
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")
    new: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    done = 0
    together = _together(model, prompts, sampling)
    while done < len(order):
        batch = _batch(model, prompts, order[done:], sampling, batch_size, together)
        for step in _decode(model, prompts, batch, sampling, stop_ids, together):
            for index, token in step:
                new[index].append(token)
        done += len(batch)
        if progress is not None:
            progress(done)
    return new


def stream(model: nn.Module, prompt: Sequence[int], sampling: Sampling, stop_ids: AbstractSet[int]) -> Iterator[int]:
    """The new tokens of one prompt, each as soon as it is known. Closing the iterator ends the work.

    Raises InputError as `generate` does, at the call and not at the first token.
    """
    _check(model, [prompt])
    steps = _decode(model, [prompt], [0], sampling, stop_ids, _together(model, [prompt], sampling))
    return (token for step in steps for _, token in step)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; every module's own mode restored afterwards."""
    with in_eval_mode(model), torch.inference_mode():
        yield


def _together(model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Together:
    """What the model has been found to allow for these prompts."""
    most = max((len(prompt) for prompt in prompts), default=1) + sampling.max_new_tokens
    with in_eval_mode(model):
        return Together.on(model, most, alone=len(prompts) < 2)


def _batch(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    order: list[int],
    sampling: Sampling,
    batch_size: int,
    together: Together,
) -> list[int]:
    """The prompts that are decoded next, of those numbered `order`, which go from long to short."""
    length = len(prompts[order[0]])
    tokens = min(length + sampling.max_new_tokens, context(model))
    rows = max(1, min(batch_size, TOKENS_AT_ONCE // tokens)) if together.company else 1
    padding = together.padding and not together.crosses(tokens)
    return [row for row in order[:rows] if padding or len(prompts[row]) == length]


def _decode(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    rows: list[int],
    sampling: Sampling,
    stop_ids: AbstractSet[int],
    together: Together,
) -> Iterator[list[tuple[int, int]]]:
    """Decode the prompts numbered `rows` together. Yields, a step at a time, (prompt number, new token)."""
    room = {row: min(sampling.max_new_tokens, context(model) - len(prompts[row])) for row in rows}
    if not together.crosses(max(len(prompts[row]) + room[row] for row in rows)):
        yield from _steps(model, prompts, rows, room, sampling, stop_ids, together)
        return
    try:
        come_to_rest(model)  # frequencies that an earlier pass has let grow
        yield from _steps(model, prompts, rows, room, sampling, stop_ids, together)
    finally:
        come_to_rest(model)


def _steps(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    rows: list[int],
    room: dict[int, int],
    sampling: Sampling,
    stop_ids: AbstractSet[int],
    together: Together,
) -> Iterator[list[tuple[int, int]]]:
    """`room`: how many tokens each row may become longer."""
    device = next(model.parameters()).device
    state = State(model, *padded([prompts[row] for row in rows], device))
    noise = {row: _uniform(sampling, row, max(room.values())) for row in rows}
    ended: set[int] = set()
    for step in range(max(room.values())):
        # Modes are set for each step and not across a yield: what the caller does in between is its own.
        with evaluating(model):
            logits_RV = state.forward()
            u_R = torch.tensor([noise[row][step] for row in rows], device=device)
            ids_R = choose(logits_RV, sampling, u_R)
        tokens = ids_R.tolist()
        fresh = [(row, token) for row, token in zip(rows, tokens, strict=True) if row not in ended]
        ended |= {row for row, token in fresh if token in stop_ids or step + 1 >= room[row]}
        yield [(row, token) for row, token in fresh if token not in stop_ids]
        alive = [i for i, row in enumerate(rows) if row not in ended]
        if not alive:
            return
        with torch.inference_mode():
            state.append(ids_R)
            if together.leaving and (len(rows) - len(alive)) * DROP >= len(rows):
                state.keep(torch.tensor(alive, device=device))
                rows = [rows[i] for i in alive]


def choose(logits_RV: Tensor, sampling: Sampling, u_R: Tensor) -> Tensor:
    """The next token id of each row [R]; u_R are uniform numbers in [0, 1), unused when greedy.

    Raises RunError for logits that are NaN.
    """
    if not torch.isfinite(logits_RV.amax()):
        raise RunError("the model's logits are NaN or infinite", fix="use dtype float32, or an older checkpoint")
    if sampling.temperature == 0:
        return logits_RV.argmax(-1)
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


def _uniform(sampling: Sampling, row: int, count: int) -> list[float]:
    """`count` uniform numbers for prompt `row`, one for each new token; zeros when greedy."""
    if sampling.temperature == 0:
        return [0.0] * count
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed((sampling.seed * 1_000_003 + row) % 2**63)
    drawn: list[float] = torch.rand(count, dtype=torch.float64, generator=generator).tolist()
    return drawn


def _check(model: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
    most, vocabulary = context(model), text_config(model).vocab_size
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"prompt {number} is empty", fix="begin with at least one token, such as bos")
        if len(prompt) >= most:
            raise InputError(
                f"prompt {number} has {len(prompt):,} tokens; the context, answer included, is {most:,}",
                fix="shorten it",
            )
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise InputError(f"prompt {number} holds ids outside the model's vocabulary of {vocabulary:,}")
