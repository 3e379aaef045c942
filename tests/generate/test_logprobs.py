"""Log-probabilities of new tokens and of prompts are the model's own, before a bias; a bias moves what is chosen."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.errors import InputError
from deltaw.generate import logprobs
from deltaw.generate.cache import BASE
from deltaw.generate.engine import Engine, Event, Logprobs
from deltaw.generate.sampling import Sampling
from tests.generate.test_prefixes import SYSTEM, moved
from tests.generate.test_slots import adapted
from tests.generate.test_together import ALL, build

PROMPT = SYSTEM[:17]


@torch.no_grad()
def truth(model: nn.Module, ids: list[int]) -> Tensor:
    """[T, V]: log-probabilities of what follows each token."""
    logits_TV: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits_TV.double().log_softmax(-1)


def told(given: Logprobs, truth_V: Tensor, token: int, top: int) -> bool:
    values, ids = truth_V.topk(top)
    return (
        math.isclose(given.token, float(truth_V[token]), abs_tol=1e-4)
        and [id for id, _ in given.top] == ids.tolist()
        and all(math.isclose(a, b, abs_tol=1e-4) for (_, a), b in zip(given.top, values.tolist(), strict=True))
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "mamba", "bloom"])  # slots, a soft cap, a state, no packing
@pytest.mark.parametrize("at_once", [1 << 24, 5 * 97])
def test_a_prompts_tokens_are_scored(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", at_once)
    model = adapted(name) if name in ("llama", "gemma2") else build(*ALL[name])
    logp_TV = truth(model, PROMPT)
    scored = Engine(model).score(PROMPT, top=3)
    assert len(scored) == len(PROMPT) - 1
    assert all(told(one, logp_TV[at], PROMPT[at + 1], 3) for at, one in enumerate(scored))
    assert Engine(model).score(PROMPT[:1]) == []


def test_a_head_that_is_no_plain_product_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 5 * 97)
    model = adapted()
    rows: list[int] = []
    model.register_forward_hook(lambda module, args, out: rows.append(out.logits.shape[1]))
    expected = Engine(model).score(PROMPT)
    plain, _ = max(rows), rows.clear()
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: 2 * out)  # type: ignore[operator]
    doubled = Engine(model).score(PROMPT)
    assert plain == 1 < max(rows) <= 5  # never more logits than at once
    logp_TV = truth(model, PROMPT)
    assert all(told(one, logp_TV[at], PROMPT[at + 1], 0) for at, one in enumerate(doubled))
    assert doubled[0].token != expected[0].token


def test_scores_are_an_updates_own_and_disturb_no_row() -> None:
    model = adapted()
    other = moved(model, 7).number
    engine = Engine(model)
    alone = {update: engine.score(PROMPT, update=update) for update in (0, other, BASE)}
    assert len({scored[3].token for scored in alone.values()}) == 3
    sampling = Sampling(max_new_tokens=6)

    def answer(update: int, *, scoring: bool) -> list[int | None]:
        engine.add(PROMPT, sampling, update=update)
        tokens: list[int | None] = []
        while engine.busy:
            tokens += [event.token for event in engine.step()]
            assert not scoring or engine.score(PROMPT, update=other) == alone[other]
        return tokens

    assert answer(0, scoring=True) == answer(0, scoring=False)


@pytest.mark.parametrize("ours", [True, False])
def test_new_tokens_are_told_to_the_rows_that_ask(ours: bool) -> None:
    model = adapted() if ours else build(*ALL["llama"])
    engine = Engine(model)
    warm = Sampling(max_new_tokens=5, temperature=1.0, seed=1)
    asked = {engine.add(PROMPT, warm, number=n, logprobs=top): top for n, top in enumerate((None, 0, 3, 500))}
    events: list[Event] = []
    while engine.busy:
        events += engine.step()
    for id, top in asked.items():
        own = [event for event in events if event.id == id]
        tokens = [event.token for event in own if event.token is not None]
        logp_TV = truth(model, [*PROMPT, *tokens])
        assert len(tokens) == 5 and own[-1] == Event(id, None)
        for at, event in enumerate(own[:-1]):
            assert event.token is not None and (event.logprobs is None) == (top is None)
            if event.logprobs is not None:
                assert told(event.logprobs, logp_TV[len(PROMPT) - 1 + at], event.token, min(top or 0, 97))


def test_a_bias_is_added_before_the_temperature_and_shown_to_nobody(model: PreTrainedModel) -> None:
    model.double()
    logp_V = truth(model, PROMPT)[-1]
    best, second = logp_V.topk(2)[1].tolist()
    gap = float(logp_V[best] - logp_V[second])
    for sampling in (Sampling(max_new_tokens=1), Sampling(max_new_tokens=1, temperature=1e-3, seed=0)):
        engine = Engine(model)
        for bias, token in (
            ({}, best),
            ({second: gap + 0.01}, second),
            ({second: gap - 0.01}, best),
            ({best: -100.0}, second),
            ({13: 100.0}, 13),
        ):
            engine.add(PROMPT, sampling)  # beside it: not touched
            engine.add(PROMPT, sampling, bias=bias, logprobs=1)
            plain, _, biased, _ = engine.step()
            assert (plain.token, biased.token) == (best, token)
            assert biased.logprobs is not None and told(biased.logprobs, logp_V, token, 1)


@pytest.mark.parametrize("bias", [{97: 1.0}, {-1: 1.0}, {3: math.nan}, {3: math.inf}])
def test_impossible_biases_are_refused(model: PreTrainedModel, bias: dict[int, float]) -> None:
    with pytest.raises(InputError, match="bias"):
        Engine(model).add(PROMPT, Sampling(), bias=bias)


def test_prompts_that_cannot_be_scored_are_refused(model: PreTrainedModel) -> None:
    engine = Engine(model)  # of a context of 48
    assert len(engine.score([5] * 48)) == 47
    for prompt in ([], [97], [5] * 49):
        with pytest.raises(InputError):
            engine.score(prompt)


@pytest.mark.parametrize("name", ["llama", "mamba"])  # in the pass that fills a slot, and in one of its own
@pytest.mark.parametrize("piece", [4, 256])
def test_a_prompt_is_told_by_the_row_that_runs_it(name: str, piece: int) -> None:
    """Whatever its company, in pieces or not, with an answer or none; and its beginning serves others."""
    model = adapted() if name == "llama" else build(*ALL[name])
    engine, passes = Engine(model, piece=piece), [0]
    wanted = engine.score(PROMPT, top=3)
    sampling = Sampling(max_new_tokens=4, temperature=1.0, seed=3)
    model.base_model.register_forward_hook(lambda *call: passes.__setitem__(0, passes[0] + len(call[2][0])))
    rows = {
        engine.add(PROMPT, sampling, key=b"k", scored=3): True,
        engine.add(PROMPT, sampling, key=b"k", scored=3, answer=False): False,
        engine.add(PROMPT, sampling, key=b"k"): None,
    }
    events: dict[int, list[Event]] = {}
    while engine.busy:
        for event in engine.step():
            events.setdefault(event.id, []).append(event)
    plain, alone = Engine(model), []
    plain.add(PROMPT, sampling)
    while plain.busy:
        alone += [event.token for event in plain.step()]
    for id, answered in rows.items():
        first, *others = events[id]
        assert [event.token for event in events[id]] == ([None] if answered is False else alone)
        assert not any(event.prompt for event in others)
        if answered is None:
            assert first.prompt is None
            continue
        assert first.prompt is not None and len(first.prompt) == len(PROMPT) - 1
        for mine, theirs in zip(first.prompt, wanted, strict=True):
            assert math.isclose(mine.token, theirs.token, abs_tol=1e-4)
            assert [id for id, _ in mine.top] == [id for id, _ in theirs.top]
    if name == "llama" and piece == 256:
        for _ in range(2):  # at first the model is tried
            passes[0] = 0
            engine.add(PROMPT, sampling, key=b"k", scored=0, answer=False)
            engine.step()
        assert passes[0] == 1 and not engine.busy  # one pass, and no more
