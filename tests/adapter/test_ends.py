"""Trained tokens, LoRA and whole matrices at a model's two ends, tied and untied: what holds of every update holds of
these, PEFT reads and writes them with equal logits, and nothing of the vocabulary's size trains for a token."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from deltaw.adapter.algebra import resize, scaled
from deltaw.adapter.attach import Attached, attach, detach
from deltaw.adapter.ends import Ends
from deltaw.adapter.file import Adapter, BaseId
from deltaw.base.batch import Batch
from deltaw.base.forward import Forward, plan_forward
from deltaw.config import AdapterSpec
from deltaw.data.added import Token
from deltaw.errors import InputError
from deltaw.generate.engine import Engine, generate
from deltaw.generate.sampling import Sampling
from deltaw.replaced import Rows, Whole

WORDS, STARTS = 97, [0, 11, 12, 30]
IDS = torch.randint(WORDS, (30,), generator=torch.Generator().manual_seed(3))
IDS[3], IDS[7], IDS[20] = 5, 40, 40
BATCH = Batch.of(IDS, STARTS, IDS.roll(-1))
TOKENS = (Token("b", 40), Token("a", 5))
ADDED = (Token("b", 40), Token("<new>", WORDS, (3, 4)), Token("<newer>", WORDS + 1, ()))
KINDS: dict[str, dict[str, Any]] = {
    "tokens": {"tokens": ("b", "a")},
    "embedding": {"also": {"embed_tokens": "lora"}},
    "head": {"also": {"lm_head": "lora"}},
    "both": {"also": ["embed_tokens", "lm_head"]},
    "whole embedding": {"also": {"embed_tokens": "whole"}},
    "whole head": {"also": {"embed_tokens": "lora", "lm_head": "whole"}},
    "whole": {"also": {"embed_tokens": "whole", "lm_head": "whole"}},
}
PEFTS: dict[str, dict[str, Any]] = {
    "tokens": {"trainable_token_indices": [40, 5]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "whole head": {"modules_to_save": ["lm_head"]},
}
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def model_of(tied: bool, name: str = "llama", **changes: Any) -> nn.Module:
    """A frozen random model, weights wide enough that both of its ends matter."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": WORDS, "initializer_range": 0.2}
    config = AutoConfig.for_model(name, tie_word_embeddings=tied, **{**sizes, **changes})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()


def put(model: nn.Module, kind: str, **options: Any) -> Attached:
    tokens = TOKENS if kind == "tokens" else ()
    return attach(model, AdapterSpec(rank=4, alpha=8, targets="q_proj", **KINDS[kind]), tokens=tokens, **options)


def move(attached: Attached, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attached.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def logits(forward: Forward, batch: Batch = BATCH) -> Tensor:
    with torch.no_grad():
        return forward.logits(batch)


def alone(model: Any, ids: Tensor = IDS) -> Tensor:
    """Logits of the documents by the model's own code."""
    with torch.no_grad():
        parts = [model(input_ids=ids[None, start:end]).logits[0] for start, end in itertools.pairwise(STARTS)]
    return torch.cat(parts).float()


def near(mine: Tensor, other: Tensor) -> bool:
    return torch.allclose(mine, other, rtol=1e-4, atol=1e-4)


def begins_at(base: Tensor, mine: Tensor, kind: str) -> bool:
    """To the bit; the columns of trained tokens are a product of their own, which may be summed in another order."""
    own = torch.zeros(base.shape[1], dtype=torch.bool)
    own[[token.id for token in TOKENS if kind == "tokens"]] = True
    return torch.equal(mine[:, ~own], base[:, ~own]) and torch.allclose(mine[:, own], base[:, own], 1e-6, 1e-6)


@TIED
@pytest.mark.parametrize("kind", KINDS)
def test_ends_hold_what_every_update_holds(tied: bool, kind: str, tmp_path: Path) -> None:
    model = model_of(tied)
    other, before = copy.deepcopy(model), {name: value.clone() for name, value in model.state_dict().items()}
    forward = plan_forward(model)
    base = logits(forward)
    attached = put(model, kind, fuse=())
    assert begins_at(base, logits(forward), kind)
    move(attached)
    with attached.disabled():
        assert torch.equal(logits(forward), base)

    loss, _ = forward.loss(BATCH)  # the fused head's gradient is that of the logits themselves
    loss.backward()
    gradients = [parameter.grad for parameter in attached.parameters]
    for parameter in attached.parameters:
        parameter.grad = None
    plain = F.cross_entropy(forward.logits(BATCH), BATCH.labels_T, reduction="sum")
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    for gradient, parameter in zip(gradients, attached.parameters, strict=True):
        assert parameter.grad is not None and parameter.grad.any()
        assert gradient is not None and torch.allclose(gradient, parameter.grad, rtol=1e-3, atol=1e-4)
    assert all(value.grad is None for name, value in model.named_parameters() if name in before)

    tuned = logits(forward)
    assert not near(tuned, base)
    adapter = detach(attached)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    back = Adapter.load(adapter.save(tmp_path))
    assert back.fingerprint == adapter.fingerprint and back.spec.tokens == adapter.spec.tokens
    attached = attach(model, back, tokens=TOKENS if kind == "tokens" else ())
    assert near(logits(forward), tuned)
    assert near(alone(PeftModel.from_pretrained(other, tmp_path)), tuned)


@TIED
@pytest.mark.parametrize("kind", PEFTS)
def test_what_peft_made_answers_the_same_here(tied: bool, kind: str, tmp_path: Path) -> None:
    model = model_of(tied)
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **PEFTS[kind]}))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    peft.save_pretrained(tmp_path)
    wanted = alone(peft.eval())
    forward = plan_forward(model)
    attached = attach(model, Adapter.load(tmp_path))
    assert near(logits(forward), wanted)
    again = detach(attached).save(tmp_path / "again")
    assert near(alone(PeftModel.from_pretrained(model_of(tied), again)), wanted)


@TIED
def test_added_tokens_need_no_other_base(tied: bool, tmp_path: Path) -> None:
    model, batch = model_of(tied), BATCH.relabelled(BATCH.labels_T)
    forward = plan_forward(model)
    base = logits(forward)
    attached = attach(model, AdapterSpec(rank=4, targets="q_proj", tokens=[t.text for t in ADDED]), tokens=ADDED)
    fresh = logits(forward)
    assert fresh.shape[1] == WORDS + 2 and near(fresh[:, :WORDS], base)
    words = model.get_input_embeddings().base.weight.dense()  # type: ignore[operator, union-attr]
    rows = next(iter(attached.adapter(BaseId()).replaced.values())).tensors()["rows"]
    assert torch.allclose(rows[1], words[[3, 4]].mean(0)) and torch.allclose(rows[2], words.mean(0), atol=1e-6)
    move(attached)
    ids = IDS.clone()
    ids[[2, 15]] = torch.tensor([WORDS, WORDS + 1])
    batch = Batch.of(ids, STARTS, ids.roll(-1))
    with attached.disabled():
        assert near(logits(forward)[:, :WORDS], base) and logits(forward, batch).isfinite().all()
    forward.loss(batch)[0].backward()
    assert sum(p.numel() for p in attached.layers[Ends.of(model).paths[0]].parameters()) == 3 * 32
    tuned = logits(forward, batch)
    other = model_of(tied)
    other.resize_token_embeddings(WORDS + 2)  # type: ignore[operator]
    adapter = detach(attached)
    assert near(alone(PeftModel.from_pretrained(other, adapter.save(tmp_path)), ids), tuned)
    attach(model, AdapterSpec(rank=1, targets="q_proj"))
    with pytest.raises(InputError, match="beside"):
        attach(model, adapter, tokens=ADDED)


@TIED
def test_rows_of_many_adapters_in_one_pass(tied: bool) -> None:
    """Each document with its own adapter gets what it gets alone, in a pass and in the engine's steps."""
    model = model_of(tied)
    forward, adapters = plan_forward(model), []
    for seed, kind in enumerate(("tokens", "both", "whole")):
        attached = put(model, kind)
        move(attached, seed)
        adapters.append(detach(attached))
    prompts = [IDS[start:end].tolist() for start, end in ((0, 11), (11, 19), (12, 30))]
    single, answers = [], []
    for adapter, prompt in zip(adapters, prompts, strict=True):
        attached = attach(model, adapter, tokens=TOKENS)
        ids = torch.tensor(prompt)
        single.append(logits(forward, Batch.of(ids, [0, len(ids)])))
        answers.append(generate(model, [prompt], Sampling(max_new_tokens=5), set())[0])
        detach(attached)
    carried = [attach(model, adapter, tokens=TOKENS) for adapter in adapters]
    ids, lengths = torch.tensor([token for prompt in prompts for token in prompt]), [len(p) for p in prompts]
    starts = [0, *itertools.accumulate(lengths)]
    together = Batch.of(ids, starts, ids.roll(-1), updates=tuple(one.number for one in carried))
    assert near(logits(forward, together), torch.cat(single))
    parts = [
        forward.loss(Batch.of(ids[a:b], [0, b - a], together.labels_T[a:b], updates=(one.number,)))[0].item()
        for one, (a, b) in zip(carried, itertools.pairwise(starts), strict=True)
    ]
    assert forward.loss(together)[0].item() == pytest.approx(sum(parts), rel=1e-5)
    assert decoded(model, prompts, [one.number for one in carried]) == answers


def decoded(model: nn.Module, prompts: list[list[int]], updates: list[int]) -> list[list[int]]:
    """Five tokens of each, side by side."""
    engine = Engine(model)
    asked = [
        engine.add(prompt, Sampling(max_new_tokens=5), set(), number=n, update=update)
        for n, (prompt, update) in enumerate(zip(prompts, updates, strict=True))
    ]
    tokens: dict[int, list[int]] = {id: [] for id in asked}
    going = set(asked)
    while going:
        for event in engine.step():
            if event.token is None:
                going.remove(event.id)
            else:
                tokens[event.id].append(event.token)
    engine.close()
    return [tokens[id] for id in asked]


@TIED
@pytest.mark.parametrize("kind", ["tokens", "both", "whole"])
def test_merged_into_a_loaded_model_and_out_again(tied: bool, kind: str) -> None:
    model = model_of(tied)
    before = alone(model)
    attached = put(model, kind, fuse=())
    move(attached)
    tuned = alone(model)
    adapter = detach(attached)
    with adapter.merge_into(model) as merged:
        assert near(alone(merged), tuned)
    assert torch.equal(alone(model), before)


def test_resize_leaves_rows_alone_and_a_multiple_of_them_is_refused() -> None:
    attached = put(model_of(True), "tokens")
    move(attached)
    adapter = detach(attached)
    smaller, _ = resize(adapter, rank=2)
    (rows,) = (update for update in smaller.factors.values() if isinstance(update, Rows))
    assert torch.equal(rows.rows_KD, adapter.replaced["model.embed_tokens"].tensors()["rows"])
    assert {update.rank for update in smaller.body.values()} == {2} and smaller.spec.tokens == ("b", "a")
    with pytest.raises(InputError, match="scaled"):
        scaled(adapter, 0.5)


def test_ends_say_what_is_wrong() -> None:
    model = model_of(False)
    for fields, word in (
        ({"also": {"q_proj": "whole"}}, "neither the embedding nor the head"),
        ({"tokens": ("b", "a"), "also": {"lm_head": "whole"}}, "two ways"),
    ):
        with pytest.raises(InputError, match=word):
            attach(model, AdapterSpec(rank=2, targets="q_proj", **fields), tokens=TOKENS)
    with pytest.raises(ValueError, match="add_tokens"):
        attach(model, AdapterSpec(rank=2, tokens=("b",)))
    whole = Whole(torch.zeros(WORDS + 3, 32))
    adapter = detach(put(model, "whole head"))
    adapter = Adapter(adapter.spec, {**adapter.body, "lm_head": whole})
    with pytest.raises(InputError, match="tokens more"):
        attach(model, adapter)


def test_a_scaled_embedding_scales_its_rows() -> None:
    """Gemma multiplies what it looks up."""
    model = model_of(True, "gemma", head_dim=8)
    forward = plan_forward(model)
    base = logits(forward)
    for kind in ("tokens", "embedding", "whole embedding"):
        attached = put(model, kind, fuse=())
        assert begins_at(base, logits(forward), kind)
        detach(attached)
