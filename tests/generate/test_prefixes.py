"""Beginnings that are kept and prompts in pieces: each row gets what it gets alone, and never another update's."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltaw.adapter.attach import attach, detach
from deltaw.adapter.layer import LoRAUpdate
from deltaw.config import AdapterSpec
from deltaw.generate.cache import BASE, Row, evaluating
from deltaw.generate.engine import Engine, generate
from deltaw.generate.filling import Run, next_runs
from deltaw.generate.prefixes import SMALL, Prefixes, common
from deltaw.generate.sampling import Sampling
from deltaw.generate.slots import Slots
from tests.generate.test_slots import OURS, adapted
from tests.generate.test_together import ALL, alone, build

KEY = b"one update"
SYSTEM = torch.randint(3, 97, (41,), generator=torch.Generator().manual_seed(5)).tolist()
# They share 41 tokens, 44, all of another one, and none.
TURNS = [SYSTEM, [*SYSTEM, 5, 6, 7, 8], [*SYSTEM, 5, 6, 7, 9, 10], [*SYSTEM, *range(20, 50)], SYSTEM[::-1], SYSTEM]
NEW = Sampling(max_new_tokens=6)


def answered(engine: Engine, prompts: list[list[int]], at_once: int = 99, **asked: Any) -> list[list[int]]:
    """Added some at a time."""
    answers: list[list[int]] = []
    for first in range(0, len(prompts), at_once):
        ids = [engine.add(prompt, NEW, **asked) for prompt in prompts[first : first + at_once]]
        got: dict[int, list[int]] = {id: [] for id in ids}
        while engine.busy:
            for id, token, *_ in engine.step():
                if token is not None:
                    got[id].append(token)
        answers += got.values()
    return answers


def moved(model: nn.Module, seed: int) -> Any:
    """Another update that matters."""
    attached = attach(model, AdapterSpec(rank=2, targets="all-linear"))
    for number, layer in enumerate(attached.layers.values()):
        assert isinstance(layer, LoRAUpdate)
        nn.init.normal_(layer.lora_b, std=0.2, generator=torch.Generator().manual_seed(seed + number))
    model.double()
    return attached


def logits_of(cache: Slots, prompt: list[int], key: bytes) -> Tensor:
    """Of the next token; the row leaves again."""
    row = Row(0, tuple(prompt), NEW, set(), 0, room=6, key=key)
    cache.join([row])
    while cache.stored[row] < len(prompt):
        for _, logits_RV in cache.fill():
            last = logits_RV
    cache.leave(row)
    return last[0]


@pytest.mark.parametrize("name", OURS)
def test_kept_beginnings_and_pieces_change_nothing(name: str) -> None:
    model = adapted(name)
    with evaluating(model):
        plain, pieces, kept = Slots(model), Slots(model, piece=7), Slots(model)
        for prompt in ([*SYSTEM[:13], *turn[41:44]] for turn in TURNS[:4]):  # below the border of "dynamic"
            whole = logits_of(plain, prompt, b"")
            for cache, key in ((pieces, b""), (kept, KEY), (kept, KEY)):
                torch.testing.assert_close(logits_of(cache, prompt, key), whole, rtol=1e-9, atol=1e-9)
        assert plain.prefixes.reused == pieces.prefixes.reused == 0 < kept.prefixes.reused


@pytest.mark.parametrize(("name", "piece"), [("llama", 256), ("gemma2", 9)])
def test_rows_that_begin_alike_get_what_they_get_alone(name: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(name)
    expected = generate(model, TURNS, NEW, set())
    together, in_turn = (Engine(model, piece=piece) for _ in range(2))
    assert answered(together, TURNS, key=KEY) == expected
    assert answered(in_turn, TURNS, at_once=1, key=KEY) == expected
    assert min(together.reused, in_turn.reused) >= 3 * len(SYSTEM)  # also of rows that came at once
    assert answered(Engine(model, piece=piece), TURNS) == expected


def test_a_chats_next_turn_goes_on_from_the_last_ones_answer() -> None:
    model, chat = adapted(), list(SYSTEM)
    engine = Engine(model)
    for turn in range(3):
        reused = engine.reused
        (answer,) = answered(engine, [chat], key=KEY)
        assert [answer] == generate(model, [chat], NEW, set())
        assert turn == 0 or engine.reused - reused == len(chat) - 3  # but the answer's last token and the two new ones
        chat += [*answer, 11 + turn, 12]


def test_another_update_under_the_same_number_reads_nothing_of_the_first() -> None:
    model = adapted()
    engine, first = Engine(model), moved(model, 1)
    answers = answered(engine, TURNS, update=first.number, key=b"first")
    detach(first)
    second = moved(model, 50)
    assert second.number == first.number
    reused = engine.reused
    replaced = answered(engine, [SYSTEM], update=second.number, key=b"second")
    assert engine.reused == reused and replaced == answered(Engine(model), [SYSTEM], update=second.number)
    assert replaced[0] != answers[0]
    nameless = answered(engine, [SYSTEM, SYSTEM], at_once=1, update=second.number)
    assert engine.reused == reused and nameless == replaced * 2


def test_rows_of_several_updates_and_of_none_share_by_key_alone() -> None:
    model = adapted()
    updates = [moved(model, 1).number, moved(model, 50).number, 0, BASE]
    engine = Engine(model, batch_size=3, piece=33)
    expected = {update: answered(Engine(model), TURNS, update=update) for update in updates}
    assert len({str(answers) for answers in expected.values()}) == len(updates)
    asked = [(update, n) for n in range(len(TURNS)) for update in updates]
    random.Random(0).shuffle(asked)
    ids = {engine.add(TURNS[n], NEW, update=u, key=b"%d" % u): (u, n) for u, n in asked}
    got: dict[int, list[int]] = {id: [] for id in ids}
    while engine.busy:
        for id, token, *_ in engine.step():
            if token is not None:
                got[id].append(token)
    assert all(got[id] == expected[update][n] for id, (update, n) in ids.items())
    assert engine.reused > len(asked) * len(SYSTEM) // 3


def test_rows_that_go_on_get_a_token_between_two_pieces() -> None:
    model = adapted()
    expected = generate(model, [SYSTEM[:3], SYSTEM, SYSTEM[:4]], Sampling(max_new_tokens=20), set())
    engine = Engine(model, piece=8)
    sampling = Sampling(max_new_tokens=20)
    going = engine.add(SYSTEM[:3], sampling)
    engine.step()
    long, short = engine.add(SYSTEM, sampling), engine.add(SYSTEM[:4], sampling)
    got: dict[int, list[int]] = {going: expected[0][:1], long: [], short: []}
    steps = 0
    while engine.busy:
        steps += 1
        for id, token, *_ in engine.step():
            if token is not None:
                got[id].append(token)
        assert len(got[going]) == min(20, steps + 1)
        assert got[short]  # it isn't kept waiting by the long one
        assert bool(got[long]) == (steps >= 6)
    assert [got[going], got[long], got[short]] == expected


def test_cancelling_within_a_long_prompt_frees_everything() -> None:
    model = adapted()
    for key in (b"", KEY):
        engine = Engine(model, piece=8)
        cache = engine._slots
        assert cache is not None
        other = engine.add(SYSTEM[:4], NEW)
        long = [engine.add(SYSTEM, NEW, key=key) for _ in range(2)]
        for _ in range(3):
            engine.step()
        assert 0 < max(cache.stored.values()) < len(SYSTEM)
        for id in long:
            engine.cancel(id)
        assert len(cache.stored) == len(cache.shelf_of) == sum(len(s.rows) for s in cache.shelves.values()) == 1
        assert not cache.filling and cache.prefixes.count(KEY, tuple(SYSTEM)) == (20 if key else 0)
        engine.cancel(other)
        assert not engine.busy and cache.tokens == 0 and not cache.shelves and not cache.stored
        engine.close()
        assert cache.prefixes.cost == 0


def test_a_piece_that_fails_is_run_again() -> None:
    model = adapted()
    engine = Engine(model)
    ids = [engine.add(prompt, NEW, key=KEY) for prompt in TURNS[:3]]
    hook = model.base_model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        engine.step()
    hook.remove()
    assert engine._slots is not None and not engine._slots.shelf_of
    got: dict[int, list[int]] = {id: [] for id in ids}
    while engine.busy:
        for id, token, *_ in engine.step():
            if token is not None:
                got[id].append(token)
    assert list(got.values()) == generate(model, TURNS[:3], NEW, set())


@pytest.mark.parametrize("ours", [True, False])
def test_a_row_waits_for_company_but_not_for_long(ours: bool) -> None:
    """Two places are free beside 14 long answers, of 16 that more rows than two wait for: they join after all."""
    model = adapted() if ours else build(*ALL["llama"])
    engine = Engine(model, batch_size=17)
    for _ in range(16):
        engine.add([5, 6], Sampling(max_new_tokens=100))
    engine.step()
    late = [engine.add([7, 8], Sampling(max_new_tokens=100)) for _ in range(3)]
    steps = next(n for n in range(1, 100) if any(event.id in late for event in engine.step()))
    assert 8 <= steps <= (10 if ours else 66)
    engine.close()


def stored(tokens: tuple[int, ...]) -> dict[nn.Module, Tensor]:
    """Keys and values that say of which tokens they are."""
    sums = torch.tensor(tokens, dtype=torch.float64).cumsum(0)
    return {LAYER: torch.stack([sums, -sums])[:, None, :, None].expand(2, 3, len(tokens), 2)}


LAYER = nn.Identity()


@pytest.mark.parametrize("seed", range(5))
def test_what_is_kept_is_what_was_given_within_the_limit(seed: int) -> None:
    generator = random.Random(seed)
    prefixes = Prefixes(limit=12 * SMALL)
    for _ in range(120):
        key = generator.choice([b"a", b"b"])
        tokens = tuple(generator.choice([1, 2]) for _ in range(generator.randint(1, 6)))
        tokens = tuple(token for token in tokens for _ in range(SMALL // 3))
        count = prefixes.count(key, tokens)
        first = generator.randint(0, count)
        parts = dict(prefixes.parts(key, tokens[:count], first))
        at = first
        for place, part in parts.items():
            assert place == at
            at += part[LAYER].shape[2]
            assert torch.equal(part[LAYER], stored(tokens)[LAYER][:, :, place:at])
        assert at == count or not parts
        prefixes.keep(key, tokens, stored(tokens))
        assert prefixes.cost <= prefixes.limit
        assert prefixes.cost == sum(node.cost for node in prefixes._nodes())
        assert prefixes.count(key, tokens) == len(tokens)  # what was used last stays
    assert prefixes.reused > 0
    prefixes.keep(b"", (1, 2, 3), stored((1, 2, 3)))
    assert prefixes.count(b"", (1, 2, 3)) == 0


def test_common_beginnings() -> None:
    for length in range(40):
        one = tuple(range(length))
        for at in range(length):
            assert common(one, (*one[:at], -1, *one[at + 1 :])) == at
        assert common(one, one) == common(one, (*one, 5)) == length


@pytest.mark.parametrize("seed", range(5))
def test_pieces_are_full_and_the_first_row_is_never_kept_waiting(seed: int) -> None:
    generator = random.Random(seed)
    rests = [generator.choice([1, 5, 40, 900]) for _ in range(9)]
    begun = {Row(n, (5,) * (rest + n), NEW, set(), n, room=1): n for n, rest in enumerate(rests)}
    runs: list[Run] = next_runs(begun, 64)
    assert sum(end - first for _, first, end in runs) == min(64, sum(rests))
    assert all(first == begun[row] and first < end <= len(row.prompt) for row, first, end in runs)
    assert runs[0].row.id == 0 and runs[0].end - runs[0].first >= min(rests[0], 32)
    assert next_runs({}, 64) == []


def test_transformers_own_caches_do_without() -> None:
    model = build(*ALL["llama"])
    expected = alone(model, TURNS[:2])
    engine = Engine(model)
    assert answered(engine, TURNS[:2], key=KEY) == [answer[:6] for answer in expected] and engine.reused == 0
