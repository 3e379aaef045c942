"""Decoding: the batch equals each prompt alone, sampling is reproducible, the model comes back as it was."""

import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.errors import InputError, RunError
from deltaw.generate import engine
from deltaw.generate.engine import Engine, generate, stream
from deltaw.generate.sampling import Sampling, choose
from tests.bases import tiny_llama

torch.manual_seed(0)
PROMPTS = [torch.randint(0, 97, (length,)).tolist() for length in (3, 11, 1, 7, 35, 7)]
STOP = {5, 17, 60}


@torch.no_grad()
def reference(model: PreTrainedModel, prompt: list[int], limit: int, stop: set[int]) -> list[int]:
    """Greedy decoding without cache, batch or padding."""
    ids = list(prompt)
    while len(ids) < min(len(prompt) + limit, 48):
        token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in stop:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("stop", [set(), STOP])
def test_batches_equal_single_greedy_steps(model: PreTrainedModel, stop: set[int]) -> None:
    model.double()  # no near ties
    sampling = Sampling(max_new_tokens=24)
    expected = [reference(model, prompt, 24, stop) for prompt in PROMPTS]
    for batch_size in (1, 4, 64):
        assert generate(model, PROMPTS, sampling, stop, batch_size=batch_size) == expected
    assert [list(stream(model, prompt, sampling, stop)) for prompt in PROMPTS[:4]] == expected[:4]
    # The prompt of 35 tokens fills the context of 48 before its 24 tokens are out, unless it stops.
    assert stop or sorted({len(tokens) for tokens in expected}) == [13, 24]


def test_sampling_is_reproducible_for_each_prompt(model: PreTrainedModel) -> None:
    model.double()
    sampling = Sampling(max_new_tokens=12, temperature=1.3, top_p=0.9, top_k=40, seed=7)
    state = torch.get_rng_state()
    first = generate(model, PROMPTS, sampling, STOP)
    assert torch.equal(state, torch.get_rng_state())
    assert generate(model, PROMPTS, sampling, STOP, batch_size=2) == first
    assert list(stream(model, PROMPTS[0], sampling, STOP)) == first[0]
    assert generate(model, PROMPTS, sampling.model_copy(update={"seed": 8}), STOP) != first
    free = sampling.model_copy(update={"seed": None})
    assert generate(model, PROMPTS, free, set()) != generate(model, PROMPTS, free, set())


def test_the_model_comes_back_as_it_was(model: PreTrainedModel) -> None:
    model.train()
    block = next(module for name, module in model.named_modules() if name.endswith(".0"))
    block.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    generate(model, PROMPTS[:2], Sampling(max_new_tokens=3), STOP)
    tokens = stream(model, PROMPTS[0], Sampling(max_new_tokens=9), set())
    next(tokens)
    assert modes == [module.training for module in model.modules()]
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    tokens.close()
    assert list(tokens) == []
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    model(input_ids=torch.tensor([[1, 2]])).logits.sum().backward()  # nothing was turned into an inference tensor


def test_progress_counts_prompts(model: PreTrainedModel) -> None:
    seen: list[int] = []
    generate(model, PROMPTS, Sampling(max_new_tokens=2), set(), batch_size=4, progress=seen.append)
    assert seen == [4, 6]
    assert generate(model, [], Sampling(), set()) == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ([1] * 48, "48 tokens"), ([97], "vocabulary of 97"), ([-1], "vocabulary")],
)
def test_impossible_prompts_are_named(model: PreTrainedModel, prompt: list[int], message: str) -> None:
    with pytest.raises(InputError, match=f"prompt 1 .*{message}"):
        generate(model, [[1], prompt], Sampling(), set())
    with pytest.raises(InputError, match=message):
        stream(model, prompt, Sampling(), set())  # at the call, before the first token


def test_sampling_follows_the_distribution() -> None:
    logits_RV = torch.tensor([[0.1, 0.5, 0.0, 0.4]]).log().expand(20_000, 4)
    u_R = (torch.arange(20_000) + 0.5) / 20_000

    def shares(sampling: Sampling) -> list[float]:
        return [round(x / 20_000, 3) for x in choose(logits_RV, sampling, u_R).bincount(minlength=4).tolist()]

    assert shares(Sampling(temperature=1.0)) == [0.1, 0.5, 0, 0.4]
    assert shares(Sampling(temperature=1.0, top_k=2)) == [0, 0.556, 0, 0.444]
    assert shares(Sampling(temperature=1.0, top_p=0.85)) == [0, 0.556, 0, 0.444]
    assert shares(Sampling(temperature=1.0, top_p=0.4)) == [0, 1, 0, 0]
    assert shares(Sampling(temperature=1e-9)) == [0, 1, 0, 0]
    assert shares(Sampling()) == [0, 1, 0, 0]
    low, high = choose(logits_RV[:2], Sampling(temperature=1.0), torch.tensor([0.0, 1.0])).tolist()
    assert (low, high) == (0, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_logits_are_an_error(value: float) -> None:
    logits_RV: Tensor = torch.zeros(2, 4)
    logits_RV[1, 2] = value
    for sampling in (Sampling(), Sampling(temperature=1.0)):
        with pytest.raises(RunError, match="NaN"):
            choose(logits_RV, sampling, torch.zeros(2))


def test_the_checkpoints_own_sampling_is_ignored(model: PreTrainedModel) -> None:
    plain = generate(model, PROMPTS, Sampling(max_new_tokens=8), set())
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0)
    assert generate(model, PROMPTS, Sampling(max_new_tokens=8), set()) == plain


def test_all_rows_together_keep_to_the_bound(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model.double()
    sampling = Sampling(max_new_tokens=5)
    expected = generate(model, PROMPTS, sampling, set())
    monkeypatch.setattr(engine, "TOKENS_AT_ONCE", 30)
    rows = []
    model.base_model.register_forward_hook(lambda *call: rows.append(len(call[2][0])))
    assert generate(model, PROMPTS, sampling, set()) == expected  # also the prompt of 35 tokens, which is alone
    assert max(rows) == 2


def test_broken_logits_name_their_prompt() -> None:
    model = tiny_llama()
    model.get_input_embeddings().weight.data[7] = math.nan
    sound = next(prompt for prompt in PROMPTS if 7 not in prompt)
    with pytest.raises(RunError, match="prompt 1"):
        generate(model, [sound, [7], [8, 7]], Sampling(max_new_tokens=3), set())


def test_rows_come_and_go_in_batches_too(model: PreTrainedModel) -> None:
    model.double()
    sampling = Sampling(max_new_tokens=9)
    expected = generate(model, PROMPTS, sampling, set())
    running = Engine(model, batch_size=3)
    ids: list[int] = []
    got: dict[int, list[int | None]] = {}
    for step in range(80):
        if step % 2 == 0 and len(ids) < len(PROMPTS):
            ids.append(running.add(PROMPTS[len(ids)], sampling))
        if step == 3:
            running.cancel(ids[0])
        for id, token, *_ in running.step():
            got.setdefault(id, []).append(token)
    assert not running.busy
    assert got[ids[0]] == expected[0][:3]
    assert [got[id] for id in ids[1:]] == [[*answer, None] for answer in expected[1:]]


@pytest.mark.parametrize("vocabulary", [256, 300, 1024])
def test_greedy_takes_the_first_of_the_largest(vocabulary: int) -> None:
    logits_RV = torch.randint(0, 20, (9, vocabulary), generator=torch.Generator().manual_seed(0)).float()  # many ties
    assert torch.equal(choose(logits_RV, Sampling(), torch.zeros(9)), logits_RV.argmax(-1))
