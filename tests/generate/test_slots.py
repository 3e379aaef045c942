"""Slots of our own: rows join, grow, leave and are followed by others, and each gets what transformers gives it."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from deltaw.adapter.attach import attach
from deltaw.adapter.layer import LoRAUpdate
from deltaw.adapter.stand_ins import FusedAttention
from deltaw.base.forward import plan_forward
from deltaw.config import AdapterSpec
from deltaw.generate import slots
from deltaw.generate.cache import BASE, Row, evaluating
from deltaw.generate.engine import Engine, generate, stream
from deltaw.generate.sampling import Sampling
from deltaw.generate.slots import Slots
from deltaw.kernels import prepacked
from tests.generate.test_together import ALL, NEW, PROMPTS, STOP, alone, build, until_stop

OURS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "qwen3_moe", "dynamic", "starcoder2"]
LONG = [torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (90, 2, 61, 40, 63, 7)]


def adapted(name: str = "llama", **changes: Any) -> nn.Module:
    """With stand-ins and an update that matters."""
    kind, config = ALL[name]
    model = build(kind, {**config, **changes})
    plan_forward(model)
    attached = attach(model, AdapterSpec(rank=2, targets="all-linear"))
    for number, layer in enumerate(attached.layers.values()):
        assert isinstance(layer, LoRAUpdate)
        nn.init.normal_(layer.lora_b, std=0.1, generator=torch.Generator().manual_seed(number))
    return model.double().eval()


def whole(cache: Slots, rows: list[Row]) -> None:
    """They join, and their prompts are run."""
    cache.join(rows)
    while any(cache.stored[row] < len(row.prompt) for row in rows):
        list(cache.fill())


def holds(model: nn.Module) -> bool:
    with evaluating(model):
        return Slots.hold(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_matrices_give_the_models_own_answers(dtype: torch.dtype) -> None:
    """With an adapter or without, one row or several: log-probabilities are as near the truth as without copies."""
    if not prepacked._can(torch.device("cpu"), dtype):
        pytest.skip("this PyTorch has no prepacked products")
    model = adapted().to(dtype)
    assert holds(model)
    ids = [*LONG[2], *LONG[3]]
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        truth_T = wide(torch.tensor([ids])).logits[0].log_softmax(-1)[range(len(ids) - 1), ids[1:]].tolist()
    off = []
    for copies in (False, True):
        engine = Engine(model, batch_size=3, copies=copies)
        for prompt in (ids[:50], ids, ids[:70]):
            engine.add(prompt, Sampling(max_new_tokens=3), scored=0)
        told = [event.prompt for _ in range(8) for event in engine.step() if event.prompt]
        assert sorted(map(len, told)) == [49, 69, len(ids) - 1]
        off.append(max(abs(one.token - true) for row in told for one, true in zip(row, truth_T, strict=False)))
    assert off[1] <= off[0] + 4 * torch.finfo(dtype).eps
    made = {parameter for parameter in model.parameters() if prepacked._copies.get(parameter) is not None}
    linear = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    assert made == linear  # the head's among them


@pytest.mark.parametrize("name", OURS)
def test_each_prompt_gets_what_it_gets_alone(name: str) -> None:
    model = adapted(name)
    assert holds(model)
    truth = alone(model)
    sampling = Sampling(max_new_tokens=NEW)
    assert generate(model, PROMPTS, sampling, set()) == truth
    assert generate(model, PROMPTS, sampling, STOP, batch_size=2) == [until_stop(answer) for answer in truth]
    assert list(stream(model, PROMPTS[1], sampling, set())) == truth[1]
    assert len({tuple(answer) for answer in truth}) > 3


@pytest.mark.parametrize("name", ["phi3", "gpt_oss", "falcon_h1", "chunks"])
def test_what_does_not_hold_is_found(name: str) -> None:
    assert not holds(adapted(name))


def test_a_layer_without_its_stand_in_is_found() -> None:
    model = adapted()
    stand_in = next(module for module in model.modules() if isinstance(module, FusedAttention))
    model.model.layers[1].self_attn = stand_in.original  # type: ignore[union-attr, index]
    assert not holds(model)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_rows_join_grow_and_leave(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "SMALLEST", 4)  # so that rows move from shelf to shelf
    monkeypatch.setattr(slots, "PIECE", 50)
    model = adapted(name, max_position_embeddings=128)
    truth = alone(model, LONG)
    sampling = Sampling(max_new_tokens=NEW)
    engine = Engine(model, batch_size=4)
    ids: list[int] = []
    got: dict[int, list[int]] = {}
    for step in range(60):
        if step % 3 == 0 and len(ids) < 2 * len(LONG):  # every prompt twice
            ids.append(engine.add(LONG[len(ids) % len(LONG)], sampling))
        for id, token, *_ in engine.step():
            if token is not None:
                got.setdefault(id, []).append(token)
    assert not engine.busy
    assert [got[id] for id in ids] == truth + truth


def test_a_cancelled_row_is_gone_and_changes_nothing() -> None:
    model = adapted()
    sampling = Sampling(max_new_tokens=NEW)
    truth = generate(model, PROMPTS, sampling, set())
    engine = Engine(model, batch_size=3)
    first, *others = [engine.add(prompt, sampling) for prompt in PROMPTS]
    got: dict[int, list[int | None]] = {id: [] for id in (first, *others)}
    for step in range(100):
        if step == 2:
            engine.cancel(first)
            engine.cancel(others[-1])  # which waits still
        for id, token, *_ in engine.step():
            got[id].append(token)
    assert got[first] == truth[0][:2] and got[others[-1]] == []
    assert [got[id] for id in others[:-1]] == [[*answer, None] for answer in truth[1:-1]]
    engine.cancel(first)  # it has ended: nothing happens
    assert not engine.busy and engine.step() == []


def test_a_prompt_draws_alike_in_any_company() -> None:
    model = adapted()
    sampling = Sampling(max_new_tokens=NEW, temperature=1.5, top_k=30, seed=3)
    expected = generate(model, PROMPTS, sampling, set())
    assert generate(model, PROMPTS, sampling, set(), batch_size=2) == expected
    engine = Engine(model)
    engine.add(PROMPTS[1], Sampling(max_new_tokens=3))  # greedy, beside it
    id = engine.add(PROMPTS[4], sampling, number=4)
    tokens = [token for _ in range(NEW) for other, token, *_ in engine.step() if other == id and token is not None]
    assert tokens == expected[4]


def test_slots_are_used_again_and_hold_no_more_than_they_must() -> None:
    cache = Slots(adapted(max_position_embeddings=1024))

    def rows(lengths: list[int]) -> list[Row]:
        return [Row(n, (5,) * length, Sampling(), set(), n, room=8) for n, length in enumerate(lengths)]

    def places() -> int:
        return sum(
            stored[0, :, 0, :, 0].numel() for shelf in cache.shelves.values() for stored in shelf.stored.values()
        )

    with evaluating(cache.model):
        for _ in range(3):
            some = rows([3, 60, 5, 300])
            whole(cache, some)
            held = places()
            assert held <= 2 * (3 * slots.SMALLEST + 1.5 * 301)  # two layers
            cache.leave(some[0])
            cache.leave(some[1])
            again = rows([9, 60])
            whole(cache, again)
            assert places() == held
            for row in (*some[2:], *again):
                cache.leave(row)
            assert places() == 0 and cache.tokens == 0


def test_what_no_row_has_written_is_zero() -> None:
    cache = Slots(adapted())
    one, two = (Row(n, (5 + n,) * (9 - 4 * n), Sampling(), set(), n, room=8) for n in range(2))
    with evaluating(cache.model):
        whole(cache, [one, two])
        cache.leave(one)
    (shelf,) = cache.shelves.values()
    for stored in shelf.stored.values():
        assert stored[:, 0, :, :5].all() and not stored[:, 0, :, 5:].any() and not stored[:, 1:].any()


def test_rows_of_two_adapters_in_one_step() -> None:
    model = adapted()
    first = generate(model, PROMPTS, Sampling(max_new_tokens=NEW), set())
    other = attach(model, AdapterSpec(rank=3, targets="all-linear"))
    for layer in other.layers.values():
        assert isinstance(layer, LoRAUpdate)
        nn.init.normal_(layer.lora_b, std=0.2)
    model.double()
    engine = Engine(model, batch_size=9)
    asked = [(update, n) for n in range(len(PROMPTS)) for update in (other.number, BASE, 0)]
    ids = [engine.add(PROMPTS[n], Sampling(max_new_tokens=NEW), update=update) for update, n in asked]
    with pytest.raises(ValueError, match="all rows"):
        engine.add(PROMPTS[0], Sampling())
    got: dict[int, list[int]] = {id: [] for id in ids}
    while engine.busy:
        for id, token, *_ in engine.step():
            if token is not None:
                got[id].append(token)
    by_update = {update: [got[id] for id, (u, _) in zip(ids, asked, strict=True) if u == update] for update, _ in asked}
    assert by_update[0] == first
    base = build(*ALL["llama"])
    plan_forward(base)
    assert by_update[BASE] == generate(base, PROMPTS, Sampling(max_new_tokens=NEW), set())
    assert by_update[other.number] not in (first, by_update[BASE])
