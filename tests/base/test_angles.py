"""Rotary scaling that depends on the longest position: a document's angles are its own, in any company, at any time."""

import copy
from functools import cache
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from deltaw.adapter.attach import attach
from deltaw.base.angles import Angles, stand_in_for_angles
from deltaw.base.batch import Batch
from deltaw.base.forward import Forward, plan_forward
from deltaw.base.prefix import lowest_layer
from deltaw.config import AdapterSpec
from deltaw.generate.engine import generate
from deltaw.generate.sampling import Sampling
from deltaw.kernels.logprobs import IGNORE
from tests.architectures import COMMON, MOE

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
FACTORS = [4.0, 4.0, 8.0, 16.0]
LONG = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 4, "long_factor": FACTORS, "factor": 4.0,
        "original_max_position_embeddings": 12}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 16.0}
SECTIONS = {"mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
SHORT = {"max_position_embeddings": 16}
# name -> (type, options, the border, whether it is packed)
SCALED: dict[str, tuple[str, dict[str, Any], int, bool]] = {
    "phi3 longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 12}, 12, True),
    "llama longrope": ("llama", {"rope_parameters": LONG}, 12, True),
    "llama dynamic": ("llama", {"rope_parameters": DYNAMIC} | SHORT, 16, True),
    "gemma3 dynamic in one kind of layer": (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": PLAIN, "full_attention": DYNAMIC}} | WINDOW | SHORT,
        16,
        True,
    ),
    "gemma3 longrope in one kind of layer": (
        "gemma3_text", {"rope_parameters": {"sliding_attention": LONG, "full_attention": PLAIN}} | WINDOW, 12, True
    ),
    "qwen3_5 dynamic, positions in three dimensions": (
        "qwen3_5_text",
        {"rope_parameters": DYNAMIC | SECTIONS, "layer_types": ["full_attention"] * 2} | SHORT,
        16, True,
    ),
    "gpt_oss dynamic, padded": ("gpt_oss", MOE | {"rope_parameters": DYNAMIC} | SHORT, 16, False),
    "gpt_oss longrope, padded": ("gpt_oss", MOE | {"rope_parameters": LONG}, 12, False),
}  # fmt: skip
UNSCALED: dict[str, dict[str, Any]] = {
    "default": PLAIN,
    "linear": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 12},
    "llama3": {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 12},
}  # fmt: skip


@cache
def made(which: str) -> nn.Module:
    name, options, _, _ = SCALED[which]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**COMMON, **options})).eval()
    for parameter in model.requires_grad_(False).parameters():
        if parameter.ndim >= 2:
            parameter.mul_(10)
    return model


def fresh(which: str) -> nn.Module:
    """A model that never saw a document."""
    return copy.deepcopy(made(which))


@cache
def planned(which: str) -> Forward:
    """One for all documents of a test: what it saw before is part of what is tested."""
    return plan_forward(fresh(which))


def document(length: int) -> Tensor:
    return torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def alone(which: str, tokens: Tensor) -> Tensor:
    """The logits of a model that has seen nothing else, ever."""
    return fresh(which)(input_ids=tokens[None], use_cache=False).logits[0]


def packed(documents: list[Tensor], labels: Tensor | None = None) -> Batch:
    starts = [0, *accumulate(len(d) for d in documents)]
    return Batch.of(torch.cat(documents), starts, labels)


@pytest.mark.parametrize("which", SCALED)
def test_what_the_scaling_does_shows_at_these_lengths(which: str) -> None:
    """Or the tests below could not fail: a document's beginning is answered in another way than alone."""
    border = SCALED[which][2]
    long, short = document(3 * border), document(3 * border)[:5]
    assert (alone(which, long)[:5] - alone(which, short)).abs().max() > 100 * CLOSE["atol"]


@pytest.mark.parametrize("which", SCALED)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_every_document_gets_what_a_fresh_model_gives_it_alone(which: str, data: st.DataObject) -> None:
    border = SCALED[which][2]
    at = st.sampled_from([1, 5, border - 1, border, border + 1, 2 * border, 3 * border + 1])
    documents = [document(n) for n in data.draw(st.lists(at, min_size=1, max_size=4))]
    forward = planned(which)
    assert forward.packed == SCALED[which][3]
    with torch.no_grad():
        got = forward.logits(packed(documents))
    torch.testing.assert_close(got, torch.cat([alone(which, d) for d in documents]), **CLOSE)


@pytest.mark.parametrize("which", SCALED)
def test_the_model_itself_answers_a_document_as_if_it_had_seen_no_other(which: str) -> None:
    model, border = planned(which).model, SCALED[which][2]
    for length in (3 * border, 5, border, 2 * border, border + 1):
        with torch.no_grad():
            own = model(input_ids=document(length)[None], use_cache=False).logits[0]
        torch.testing.assert_close(own, alone(which, document(length)), **CLOSE)


@pytest.mark.parametrize("which", SCALED)
def test_a_sum_over_documents_is_the_sum_of_their_losses(which: str) -> None:
    border, forward = SCALED[which][2], planned(which)

    def loss(documents: list[Tensor]) -> float:
        labels = torch.cat([d.roll(-1) for d in documents])
        labels[[end - 1 for end in accumulate(len(d) for d in documents)]] = IGNORE
        return float(forward.loss(packed(documents, labels))[0])

    documents = [document(n) for n in (5, 3 * border, border + 1)]
    assert loss(documents) == pytest.approx(sum(loss([d]) for d in documents), rel=1e-5)


@pytest.mark.parametrize("which", [which for which, (*_, packed) in SCALED.items() if packed])
def test_above_the_frozen_layers_and_with_stand_ins_too(which: str) -> None:
    border, model = SCALED[which][2], fresh(which)
    forward = plan_forward(model)
    every = attach(fresh(which), AdapterSpec(rank=2, alpha=4)).paths
    top = tuple(path for path in every if path.startswith("model.layers.1."))
    attached = attach(model, AdapterSpec(rank=2, alpha=4, targets=top))
    assert attached.stand_ins
    lowest = lowest_layer(attached.paths)
    documents = [document(n) for n in (5, 3 * border, border + 1)]
    batches = [packed(documents[:2]), packed(documents[2:])]
    assert lowest is not None
    above = forward.above(*lowest, batches, lambda done: None)
    assert above.prefix is not None
    with torch.no_grad():
        got = above.logits(packed(documents[::-1]))
    torch.testing.assert_close(got, torch.cat([alone(which, d) for d in documents[::-1]]), **CLOSE)


@pytest.mark.parametrize("which", SCALED)
def test_a_second_plan_is_the_first(which: str) -> None:
    model, border = fresh(which), SCALED[which][2]
    first, second = plan_forward(model), plan_forward(model)
    assert first.positions and second == first
    documents = packed([document(3 * border), document(5)])
    assert torch.equal(first.logits(documents), second.logits(documents))


@pytest.mark.parametrize("which", [which for which in SCALED if "longrope" in which])
def test_rows_of_a_batch_are_generated_as_each_alone(which: str) -> None:
    border, model = SCALED[which][2], planned(which).model
    prompts = [document(n).tolist() for n in (3, border - 2, border + 3)]
    sampling = Sampling(max_new_tokens=6)
    assert generate(model, prompts, sampling, set()) == [generate(model, [p], sampling, set())[0] for p in prompts]


@pytest.mark.parametrize("rope", UNSCALED)
def test_scaling_that_is_the_same_at_every_length_costs_nothing(rope: str) -> None:
    config = AutoConfig.for_model("llama", **{**COMMON, "rope_parameters": UNSCALED[rope]})
    model = AutoModelForCausalLM.from_config(config).eval()
    plan_forward(model)
    assert not any(isinstance(module, Angles) for module in model.modules())


def test_angles_are_asked_for_run_by_run() -> None:
    """What stands in hands each run of consecutive positions on alone, behind a position 0; equal runs once."""
    seen: list[list[int]] = []

    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("inv_freq", torch.ones(1))
            self.longest = 0

        def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
            seen.append(position_ids[0].tolist())
            self.longest = max(int(position_ids.max()), self.longest if position_ids.max() else 0)
            angles = position_ids[..., None] * self.inv_freq + self.longest
            return angles.cos(), angles.sin()

    model = nn.Sequential(nn.Linear(1, 1), Rotary())
    assert list(stand_in_for_angles(model, [50])) == ["1"]
    seen.clear()
    rows = torch.tensor([[0, 1, 2, 0, 1], [3, 0, 1, 2, 3]])
    cos, sin = model[1](torch.zeros(2, 5, 1), rows)
    assert seen == [[0], [0, 1, 2], [0], [0, 1], [0], [3], [0], [0, 1, 2, 3]]
    longest = torch.tensor([[2, 2, 2, 1, 1], [3, 3, 3, 3, 3]])
    torch.testing.assert_close(cos, (rows + longest).float()[..., None].cos())
    torch.testing.assert_close(sin, (rows + longest).float()[..., None].sin())
