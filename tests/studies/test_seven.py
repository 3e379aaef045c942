"""Seven studies, from beginning to page on a model of no size; their rules on planted effects, and on none."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast
from zlib import crc32

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaw.data.builtin import pronunciation
from deltaw.data.row import Row
from deltaw.factors import LowRank
from deltaw.linalg.rounding import survival
from deltaw.show.progress import Display
from deltaw.studies import accum, batch, init, merge4, plus, rl_rank, rslora, tiny
from deltaw.studies.bench import NEW_TASK, Arm, Trained, begun, lora
from deltaw.studies.lab import Lab
from deltaw.studies.page import write_outcome
from deltaw.studies.statistics import Exact, Paired, Quotient
from deltaw.studies.study import Outcome, find_study, judge

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
SOUNDS = {"a": "AE", "b": "B", "e": "EH", "i": "IH", "o": "OW", "s": "S", "t": "T", "z": "Z"}
WORDS = [
    Row(pronunciation("".join(word), " ".join(SOUNDS[letter] for letter in word)), f"word {number}")
    for number, word in enumerate(itertools.product(SOUNDS, repeat=3))
]


class Quick(tiny.Tiny):
    """Trainings are three steps long at most."""

    def train(self, arm: Arm, seed: int) -> Trained:
        return super().train(dataclasses.replace(arm, steps=min(3, arm.steps), tokens=min(128, arm.tokens)), seed)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A lab on a bench that is hardly pretrained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "CONFIG", {**tiny.CONFIG, **SMALL, "num_key_value_heads": 2})
        patch.setattr(tiny, "ROWS", dict.fromkeys(tiny.ROWS, 100))
        patch.setattr(rl_rank, "ROWS", tiny.ROWS)
        patch.setattr(tiny, "BASE_STEPS", 2)
        patch.setattr(tiny, "HELD_OUT", 20)
        for module in (tiny, rl_rank):
            patch.setattr(module, "read_builtin", lambda name: iter(WORDS))
        patch.setattr(accum, "ROWS", 4)
        patch.setattr(rl_rank, "ARMS", {name: rl_rank.ARMS[name] for name in ("rank 1", "full")})
        patch.setattr(rl_rank, "RULE", dataclasses.replace(rl_rank.RULE, seeds=(0, 1)))
        for name, value in {"STEPS": 2, "WORDS": 2, "SAMPLES": 2, "MEASURED": 20, "ANSWER": 4}.items():
            patch.setattr(rl_rank, name, value)
        patch.setattr(rl_rank, "known_words", lambda bench: some_words())
        lab = Lab(tmp_path_factory.mktemp("lab"), Display(quiet=True))
        bench = Quick(lab.folder, lab.display)
        lab.__dict__.update(bench=bench, tiny=bench)  # where cached_property looks first
        yield lab


def some_words() -> list[rl_rank.Word]:
    return [
        rl_rank.Word(*(list(part.encode()) for part in (f"{word}>", word.upper(), word.upper().replace("T", "D"))))
        for word in ("to", "tea", "sat", "zest") * 8
    ]


@pytest.mark.parametrize("name", ["accum", "rl-rank"])
def test_a_study_runs_and_its_page_says_what_it_found(name: str, small: Lab) -> None:
    study = find_study(name)
    record = write_outcome(study.RULE, study.run(small), small, 1.0)
    assert record["rule"]["hash"] == study.RULE.hash and record["rule"]["name"] == name
    page = (small.folder / f"{name}.html").read_text(encoding="utf-8")
    assert "<svg" in page and study.RULE.hash in page
    assert json.loads((small.folder / f"{name}.json").read_text(encoding="utf-8")) == record


# Planted trainings: a noise that both sides of a pair share, and one of each training's own.

Planted = Callable[[Arm, int], float]


class MadeUp:
    """A bench whose trainings end as they are told to; a rate is best where `valley` says."""

    def __init__(self, loss: Planted, best: Callable[[Arm], float], late: Planted | None = None) -> None:
        self._loss, self._best, self._late = loss, best, late

    def train(self, arm: Arm, seed: int) -> Trained:
        shared = np.random.RandomState(seed).normal(0, 0.05)
        own = np.random.RandomState([seed, crc32(arm.key().encode())]).normal(0, 0.002)
        off = 0.1 * np.log(arm.lr / self._best(arm)) ** 2

        def noisy(planted: Planted) -> float:
            return float(planted(arm, seed) * np.exp(shared + own + off))

        last = noisy(self._late or self._loss)
        curve = [noisy(self._loss)] * 100 + [last] * (arm.steps - 100)
        return Trained(last, 9.0, 1.0, 1.0, 0.1, tuple(curve), "")

    by_seed, losses, tuned = tiny.Tiny.by_seed, tiny.Tiny.losses, tiny.Tiny.tuned


def verdict(study: Any, bench: Any) -> str:
    outcome: Outcome = study.run(cast(Lab, SimpleNamespace(bench=bench)))
    return judge(study.RULE, outcome).verdict


@pytest.mark.parametrize(
    ("gain", "expected"), [(0.97, ("held",)), (1.0, ("did not hold", "not settled")), (1.03, ("did not hold",))]
)
def test_plus_wants_more_than_a_percent(gain: float, expected: tuple[str, ...]) -> None:
    def loss(arm: Arm, seed: int) -> float:
        return gain if arm.train else 1.0

    assert verdict(plus, MadeUp(loss, lambda arm: 6e-3 / arm.train.get("lr_ratio_b", 1.0))) in expected


def test_a_rate_that_is_best_beyond_every_grid_settles_nothing() -> None:
    assert verdict(plus, MadeUp(lambda arm, seed: 0.1, lambda arm: 1.0)) == "not settled"


@pytest.mark.parametrize(
    ("growth", "expected"), [(0.04, ("held",)), (0.0, ("did not hold",)), (-0.04, ("did not hold",))]
)
def test_batch_wants_a_gap_that_grows(growth: float, expected: tuple[str, ...]) -> None:
    def loss(arm: Arm, seed: int) -> float:
        return 1.0 if arm.adapter == "full" else 1.1 + (growth if arm.tokens == max(batch.SIZES) else 0.0)

    bench = MadeUp(loss, lambda arm: 1.5e-3 if arm.adapter == "full" else 6e-3)
    assert verdict(batch, bench) in expected


def test_batch_gives_every_size_as_much_data() -> None:
    seen = [batch.arm_of("LoRA", size).steps * size for size in batch.SIZES]
    assert max(seen) / min(seen) < 1.015


@pytest.mark.parametrize(
    ("early", "late", "expected"),
    [(0.5, 0.0, ("held",)), (0.5, 0.4, ("did not hold",)), (0.0, 0.0, ("not settled", "did not hold"))],
)
def test_init_wants_a_gain_that_fades(early: float, late: float, expected: tuple[str, ...]) -> None:
    def gain(by: float) -> Planted:
        return lambda arm, seed: 3.0 - (by if dict(cast(Any, arm.adapter)).get("init") == "pissa" else 0.0)

    assert verdict(init, MadeUp(gain(early), lambda arm: 1e-2, gain(late))) in expected


def test_init_reads_five_steps_around_one() -> None:
    trained = Trained(1, 2, 1, 1, 0, tuple(float(n) for n in range(1, 151)), "")
    assert init.around(trained, 20) == 20 and init.around(trained, 150) == 148 and init.around(trained, 1) == 2


@pytest.mark.parametrize("start", [name for name in init.STARTS if name != "lora"])
def test_every_start_leaves_the_model_as_it_was(start: str, small: Lab) -> None:
    attached = begun(small.tiny.forward, init.arm_of(start), small.tiny.rows(NEW_TASK), 0)
    try:
        assert all(float(layer.factors().dense().norm()) < 1e-4 for layer in attached.layers.values())
        assert all(bool(cast(Any, layer).acting()[0].any()) for layer in attached.layers.values())
    finally:
        tiny.detach(attached)


# rslora


def test_what_an_update_adds_is_its_size_beside_the_weights_own(small: Lab) -> None:
    """ΔW = c W gives c in every module, wherever its inputs lie."""
    forward, rows = small.tiny.forward, small.tiny.held_out(NEW_TASK)
    trained = small.tiny.train(Arm(lora(16)), 0).adapter()
    for share in (0.5, 0.01):
        factors = {}
        for path in trained.factors:
            w_MN = small.tiny.weights[path].dense()
            u_MK, s_K, vt_KN = torch.linalg.svd(w_MN, full_matrices=False)
            factors[path] = LowRank(vt_KN, u_MK * s_K, share)
        spec = trained.spec.model_copy(update={"rank": 32, "alpha": 32 * share})
        adapter = dataclasses.replace(trained, factors=factors, spec=spec)
        assert rslora.added(forward, adapter, rows) == pytest.approx(np.log(share), abs=1e-3)


@pytest.mark.parametrize(
    ("root", "plain", "expected"),
    [(0.0, -0.5, "held"), (0.3, -0.5, "did not hold"), (0.0, 0.0, "did not hold"), (0.0, -0.25, "not settled")],
)
def test_rslora_wants_one_slope_flat_and_the_other_falling(root: float, plain: float, expected: str) -> None:
    noise = np.random.RandomState(1).normal(0, 0.02, (2, 5))
    slopes = [Paired(tuple(slope + own)) for slope, own in zip((root, plain), noise, strict=True)]
    outcome = Outcome(dict(zip((rslora.RSLORA, rslora.LORA), slopes, strict=True)), [], {})
    assert judge(rslora.RULE, outcome).verdict == expected


def test_a_slope_is_over_the_ranks_logarithm() -> None:
    assert rslora.slope({rank: 3 - 0.5 * np.log(rank) for rank in (4, 16, 64)}) == pytest.approx(-0.5)


def test_both_scales_are_one_training_where_they_are_equal() -> None:
    assert rslora.arm_of("α/r", 16) == rslora.arm_of("α/√r", 16)
    specs = {rank: rslora.arm_of("α/√r", rank).spec.scale("") for rank in rslora.RANKS}
    assert specs == pytest.approx({rank: 8 / rank**0.5 for rank in rslora.RANKS})


# accum


def test_accum_is_exact_and_the_mean_of_means_is_not(small: Lab) -> None:
    found = accum.run(small)
    assert judge(accum.RULE, found).verdict == "held"
    values = {name: estimate.value for name, estimate in found.estimates.items()}
    assert values[accum.EVEN] < 1e-12 < values[accum.PRODUCT] < 1e-4
    assert len(set(found.figures["labels"])) > 1


@pytest.mark.parametrize(
    ("once", "means", "expected"), [(1e-15, 0.1, "held"), (1e-6, 0.1, "did not hold"), (1e-15, 1e-3, "did not hold")]
)
def test_accum_wants_an_identity_and_a_miss(once: float, means: float, expected: str) -> None:
    outcome = Outcome({accum.ONCE: Exact(once), accum.MEANS: Exact(means)}, [], {})
    assert judge(accum.RULE, outcome).verdict == expected


# merge4


@given(st.integers(1, 70), st.integers(0, 2**16))
def test_numbers_on_the_grid_stay_there(width: int, seed: int) -> None:
    w_MN = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    on_grid = merge4.four_bits(w_MN)
    torch.testing.assert_close(merge4.four_bits(on_grid), on_grid)
    blocks = [part.abs().amax(1) for part in w_MN.split(merge4.BLOCK, 1)]
    errors = [part.abs().amax(1) for part in (on_grid - w_MN).split(merge4.BLOCK, 1)]
    assert all(bool((e <= b / merge4.MOST / 2 * 1.001).all()) for e, b in zip(errors, blocks, strict=True))
    assert all(len(set(row[: merge4.BLOCK].tolist())) <= 15 for row in on_grid)


def test_a_light_update_survives_off_the_grid_alone() -> None:
    w_MN, delta_MN = (torch.randn(256, 256, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    light = 0.03 * delta_MN
    off = survival(w_MN, light, merge4.four_bits)
    on = survival(merge4.four_bits(w_MN), light, merge4.four_bits)
    assert off.kept == pytest.approx(1, abs=0.05) and on.kept < 0.05


@pytest.mark.parametrize(
    ("off", "on", "expected"), [(1.0, 0.0, "held"), (1.0, 0.5, "did not hold"), (0.5, 0.0, "did not hold")]
)
def test_merge4_wants_all_off_the_grid_and_nothing_on_it(off: float, on: float, expected: str) -> None:
    noise = np.random.RandomState(2).normal(0, 0.01, 5)
    estimates: dict[str, Any] = {}
    for base, kept in zip(merge4.BASES, (off, on), strict=True):
        estimates[merge4.KEPT[base]] = Paired(tuple(kept + noise))
        estimates[merge4.GAIN[base]] = Quotient(tuple(kept + noise), tuple(1 + 0.1 * noise))
    assert judge(merge4.RULE, Outcome(estimates, [], {})).verdict == expected


# rl-rank


@pytest.mark.parametrize(
    ("gap", "deviation", "expected"),
    [(0.0, 0.01, "held"), (-0.1, 0.01, "did not hold"), (0.0, 0.1, "not settled")],
)
def test_rl_rank_wants_no_more_than_a_little_less(gap: float, deviation: float, expected: str) -> None:
    values = gap + deviation * np.array([-1.2, -0.5, 0.1, 0.6, 1.0])
    outcome = Outcome({rl_rank.GAP: Paired(tuple(values))}, [], {})
    assert judge(rl_rank.RULE, outcome).verdict == expected


def test_a_reward_is_one_in_the_accent_and_none_in_its_own_way() -> None:
    word = rl_rank.Word([1], list(b"KAET"), list(b"KAAD"))
    assert rl_rank.reward(word.own, word) == 0 and rl_rank.reward(word.accent, word) == 1
    assert rl_rank.reward(list(b"KAED"), word) == 0.5 and rl_rank.reward(list(b"ZZZZZZZZZ"), word) == -1


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), max_size=6))
def test_edits_are_a_distance(one: list[int], other: list[int]) -> None:
    found = rl_rank.edits(one, other)
    assert found == rl_rank.edits(other, one) and (found == 0) == (one == other)
    assert abs(len(one) - len(other)) <= found <= max(len(one), len(other))


def test_advantages_are_a_words_own_and_nothing_where_all_answers_are_alike() -> None:
    found = rl_rank.advantages(np.array([1.0, 0.0, 5.0, 5.0]), 2)
    assert found[0] == -found[1] > 0 and found[2] == found[3] == 0
    assert not rl_rank.advantages(np.ones(4), 2).any()


def test_reward_moves_the_model_towards_it(small: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is rewarded for one byte comes to say it."""
    monkeypatch.setattr(rl_rank, "STEPS", 40)
    monkeypatch.setattr(rl_rank, "WORDS", 4)
    monkeypatch.setattr(rl_rank, "SAMPLES", 8)
    monkeypatch.setattr(rl_rank, "reward", lambda answer, word: answer.count(ord("A")) / 4)
    rewarded = rl_rank.Rewarded(small.tiny)
    learnt = rewarded._train(Arm("full", lr=3e-3), 0)
    assert learnt.after > learnt.before + 0.2 and learnt.curve[-1] > learnt.curve[0]
