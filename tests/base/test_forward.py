"""plan_forward: what it finds out about a model is true; generation on deltaw's attention is transformers' own."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from deltaw.base import attention
from deltaw.base.attention import is_packed
from deltaw.base.batch import Batch
from deltaw.base.forward import plan_forward
from deltaw.base.passing import Passing
from deltaw.generate.engine import generate
from deltaw.generate.sampling import Sampling
from deltaw.kernels.logprobs import IGNORE
from tests.architectures import COMMON, PACKED, PADDED, tiny

LENGTHS = (6, 3, 11)
STARTS = torch.tensor([0, *LENGTHS]).cumsum(0)
BOTH = [torch.float32, torch.bfloat16]


def batch() -> tuple[Tensor, Tensor]:
    """(tokens, labels already shifted) of three documents; a document's last token has no label."""
    tokens = torch.randint(3, 97, (sum(LENGTHS),))
    labels = tokens.roll(-1)
    labels[STARTS[1:] - 1] = IGNORE
    return tokens, labels


@torch.no_grad()
def loss_apart(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """The sum over documents, each alone through the model's own forward."""
    logits = [model(input_ids=tokens[None, a:b], use_cache=False).logits[0] for a, b in pairwise(STARTS.tolist())]
    return F.cross_entropy(torch.cat(logits).float(), labels, ignore_index=IGNORE, reduction="sum")


def varied(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A tiny model with a config of its own, weights wide enough that scale and cap matter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**COMMON, **options})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.mul_(4)
    return model


# Leaks


class PeeksBack(nn.Module):
    """A layer's MLP that also sees, faintly, the token before, whichever document that belongs to."""

    def __init__(self, mlp: nn.Module, strength: float) -> None:
        super().__init__()
        self.mlp, self.strength = mlp, strength

    def forward(self, x: Tensor) -> Tensor:
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        return self.mlp(x) + self.strength * before


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("strength", [1.0, 1e-6])
def test_a_layer_that_mixes_neighbours_is_found_out_however_faintly(strength: float, dtype: torch.dtype) -> None:
    model = tiny("llama", dtype)
    layer = model.model.layers[1]
    layer.mlp = PeeksBack(layer.mlp, strength)
    own = model.config._attn_implementation
    forward = plan_forward(model)
    assert not forward.packed and "padded" in forward.describe()
    assert model.config._attn_implementation == own
    if dtype == torch.float32:
        tokens, labels = batch()
        loss, count = forward.loss(Batch.of(tokens, STARTS.tolist(), labels))
        torch.testing.assert_close(loss, loss_apart(model, tokens, labels), rtol=1e-5, atol=1e-5)
        assert count == sum(LENGTHS) - len(LENGTHS)


@pytest.fixture
def leaky(monkeypatch: pytest.MonkeyPatch) -> None:
    """deltaw's attention replaced by one that forgets where documents begin."""

    def forgetful(passing: Passing, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **more: Any) -> Any:
        return sdpa_attention_forward(module, q, k, v, mask, **more)

    monkeypatch.setattr(attention, "_attention", forgetful)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_attention_that_forgets_where_documents_begin_is_found_out(name: str, dtype: torch.dtype, leaky: None) -> None:
    model = tiny(name, dtype)
    forward = plan_forward(model)
    assert not forward.packed
    if dtype == torch.float32:
        tokens, labels = batch()
        loss, _ = forward.loss(Batch.of(tokens, STARTS.tolist(), labels))
        torch.testing.assert_close(loss, loss_apart(model, tokens, labels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", BOTH)
def test_alibi_is_padded_in_every_dtype(dtype: torch.dtype) -> None:
    assert not plan_forward(tiny("bloom", dtype)).packed


@pytest.mark.parametrize("name", [*PACKED, *PADDED])
def test_planning_changes_no_weight_and_leaves_no_hook(name: str) -> None:
    model = tiny(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan_forward(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model.get_input_embeddings()._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


# Heads

HEADS: dict[str, tuple[str, dict[str, Any], float, float | None]] = {
    "plain": ("llama", {}, 1.0, None),
    "granite divides": ("granite", {"logits_scaling": 4.0}, 0.25, None),
    "cohere multiplies": ("cohere", {"logit_scale": 0.125}, 0.125, None),
    "gemma 2 caps": ("gemma2", {"final_logit_softcapping": 5.0}, 1.0, 5.0),
    "tied": ("llama", {"tie_word_embeddings": True}, 1.0, None),
}


@pytest.mark.parametrize("which", HEADS)
def test_the_heads_scale_and_cap_are_found(which: str) -> None:
    name, options, scale, softcap = HEADS[which]
    model = varied(name, **options)
    tokens, labels = batch()
    truth = loss_apart(model, tokens, labels)
    forward = plan_forward(model)
    assert forward.head is not None and (forward.head.scale, forward.head.softcap) == (scale, softcap)
    loss, _ = forward.loss(Batch.of(tokens, STARTS.tolist(), labels))
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-5)


class Shifted(nn.Linear):
    """A head that no formula here describes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).roll(1, dims=-1)


@pytest.mark.parametrize("named", [{}, {"logit_scale": 3.0}])  # by the config, unknown to the model
def test_a_head_of_another_kind_is_left_to_the_model(named: dict[str, float]) -> None:
    model = tiny("llama")
    head = Shifted(32, 97, bias=False).requires_grad_(False)
    head.weight.copy_(model.lm_head.weight)
    model.lm_head = head
    model.config.update(named)
    tokens, labels = batch()
    truth = loss_apart(model, tokens, labels)
    forward = plan_forward(model)
    assert forward.head is None and forward.packed and "the model's own head" in forward.describe()
    loss, count = forward.loss(Batch.of(tokens, STARTS.tolist(), labels))
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-5)
    assert count == sum(LENGTHS) - len(LENGTHS)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_logits_are_the_models_own(name: str) -> None:
    model = tiny(name)
    tokens, _ = batch()
    parts = [model(input_ids=tokens[None, a:b], use_cache=False).logits[0] for a, b in pairwise(STARTS.tolist())]
    got = plan_forward(model).logits(Batch.of(tokens, STARTS.tolist()))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.cat(parts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_no_labels_cost_nothing_and_count_nothing(name: str) -> None:
    tokens, _ = batch()
    loss, count = plan_forward(tiny(name)).loss(Batch.of(tokens, STARTS.tolist()))
    assert (float(loss), count) == (0.0, 0)


# Generation on the attention that training uses

PROMPTS = [torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in
           (3, 11, 1, 7, 19)]  # fmt: skip
GENERATES = {
    "llama": {},
    "qwen3": {},
    "gpt2": {},
    "gpt_neox": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 4},
}


@pytest.mark.parametrize("name", GENERATES)
def test_greedy_answers_are_those_of_transformers_own_attention(name: str) -> None:
    """Ragged prompts, longer and shorter than the window; in float64, so that no two tokens nearly tie."""
    options = {**PACKED[name], **GENERATES[name]}
    own, ours = (varied(name, torch.float64, **options) for _ in range(2))
    own.set_attn_implementation("eager")
    assert plan_forward(ours).packed and is_packed(ours)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = own.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                           eos_token_id=None, pad_token_id=0)  # fmt: skip
        expected.append(out[0, len(prompt) :].tolist())
    assert generate(ours, PROMPTS, Sampling(max_new_tokens=12), set()) == expected
    assert len({tuple(answer) for answer in expected}) > 1
