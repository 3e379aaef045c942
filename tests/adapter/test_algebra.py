"""Adapters made smaller, padded and scaled: against the dense matrices, and against PEFT."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor

from deltaw.adapter.algebra import (
    adapter_of,
    energy_shares,
    mixed,
    pad_all,
    resize,
    resize_global,
    scaled,
)
from deltaw.adapter.attach import attach
from deltaw.adapter.file import Adapter, BaseId
from deltaw.config import AdapterSpec
from deltaw.errors import InputError
from deltaw.factors import LowRank
from deltaw.kinds import Dense, DoRA
from tests.adapter.test_file import SPECS, logits, made, same
from tests.architectures import tiny

BASE = BaseId("someone/tiny", "abc", "sha256:" + "0" * 64)
SHAPES = {"h.0.q": (7, 5), "h.0.up": (9, 6), "h.1.q": (7, 5), "q": (6, 8)}


def drawn(spec: AdapterSpec, seed: int = 0, size: float = 1.0, dtype: torch.dtype = torch.float64) -> Adapter:
    """Random factors of `spec` for SHAPES, of sizes that differ by module."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for at, (path, (m, n)) in enumerate(SHAPES.items()):
        a, b = (
            torch.randn(*s, generator=generator, dtype=dtype)
            for s in ((spec.rank_of(path), n), (m, spec.rank_of(path)))
        )
        factors[path] = LowRank(a * size, b * 3.0**-at, spec.scale(path))
    return Adapter(spec, factors, BASE)


def dense(adapter: Adapter) -> dict[str, Tensor]:
    return {path: update.dense() for path, update in adapter.factors.items()}


def assert_same_update(got: Adapter, wanted: Adapter) -> None:
    assert got.factors.keys() == wanted.factors.keys()
    for path, delta in dense(wanted).items():
        torch.testing.assert_close(got.factors[path].dense(), delta, rtol=1e-12, atol=1e-12 * float(delta.abs().max()))


def assert_untouched(got: Adapter, wanted: Adapter) -> None:
    """The very numbers, scale included."""
    assert got.factors.keys() == wanted.factors.keys()
    for path, update in wanted.factors.items():
        new = got.factors[path]
        assert torch.equal(new.a_RN, update.a_RN) and torch.equal(new.b_MR, update.b_MR) and new.scale == update.scale


def assert_described(adapter: Adapter) -> None:
    """What Adapter.save asks of a spec."""
    for path, update in adapter.factors.items():
        assert (update.rank, update.scale) == (adapter.spec.rank_of(path), adapter.spec.scale(path))


ranks = st.integers(1, 5)
specs = st.builds(
    AdapterSpec,
    rank=ranks,
    alpha=st.floats(0.01, 100),
    targets=st.just(("q", "up")),
    scaling=st.sampled_from(["lora", "rslora"]),
    rank_overrides=st.dictionaries(st.sampled_from([*SHAPES, "up"]), ranks),
    alpha_overrides=st.dictionaries(st.sampled_from([*SHAPES, "up"]), st.floats(0.01, 100)),
)
quick = settings(deadline=None, max_examples=40)


# The spec


@quick
@given(spec=specs, new=st.lists(st.tuples(ranks, st.floats(-9, 9)), min_size=4, max_size=4))
def test_a_spec_is_found_for_any_factors(spec: AdapterSpec, new: list[tuple[int, float]]) -> None:
    assume(all(scale == 0 or abs(scale) > 1e-9 for _, scale in new))
    like = drawn(spec)
    factors = {
        path: LowRank(torch.randn(r, n, dtype=torch.float64), torch.randn(m, r, dtype=torch.float64), s)
        for (path, (m, n)), (r, s) in zip(SHAPES.items(), new, strict=True)
    }
    adapter = adapter_of(factors, like)
    assert_described(adapter)
    for path, update in factors.items():
        assert adapter.factors[path].scale == pytest.approx(abs(update.scale) or 1.0, rel=1e-15)
        torch.testing.assert_close(adapter.factors[path].dense(), update.dense(), rtol=1e-13, atol=1e-13)
    assert adapter.base == BASE and adapter.spec.targets == spec.targets
    some = adapter_of({"h.1.q": factors["h.1.q"]}, like)
    assert some.spec.targets == ("h.1.q",) and not some.spec.rank_overrides and not some.spec.alpha_overrides


def test_the_commonest_rank_and_alpha_are_the_defaults() -> None:
    adapter, _ = resize(
        drawn(AdapterSpec(rank=4, alpha=8, rank_overrides={"up": 2}, alpha_overrides={"up": 4})), rank=3
    )
    assert (adapter.spec.rank, adapter.spec.alpha) == (3, 6)
    assert adapter.spec.rank_overrides == {"h.0.up": 2} and adapter.spec.alpha_overrides == {"h.0.up": 4}


# Smaller


@quick
@given(spec=specs, seed=st.integers(0, 99))
def test_at_its_own_rank_an_adapter_stays_as_it_is(spec: AdapterSpec, seed: int) -> None:
    adapter = drawn(spec, seed)
    largest = max(update.rank for update in adapter.factors.values())
    again, losses = resize(adapter, rank=largest)
    assert_untouched(again, adapter)
    assert_described(again)
    assert [loss.relative_error for loss in losses] == [0.0] * len(SHAPES)


@quick
@given(
    spec=specs, seed=st.integers(0, 99), rank=ranks, energy=st.floats(0.01, 1), by=st.sampled_from(["rank", "energy"])
)
def test_the_loss_is_what_the_dense_matrices_say_and_the_least_possible(
    spec: AdapterSpec, seed: int, rank: int, energy: float, by: str
) -> None:
    adapter = drawn(spec, seed)
    assume(by == "energy" or rank <= max(update.rank for update in adapter.factors.values()))
    smaller, losses = resize(adapter, rank=rank) if by == "rank" else resize(adapter, energy=energy)
    assert_described(smaller)
    assert [loss.module for loss in losses] == list(SHAPES)
    for loss in losses:
        full, cut = adapter.factors[loss.module], smaller.factors[loss.module]
        assert (loss.old_rank, loss.new_rank) == (full.rank, cut.rank)
        sigma = torch.linalg.svdvals(full.dense())
        error = float((full.dense() - cut.dense()).norm() / full.dense().norm())
        assert loss.relative_error == pytest.approx(error, abs=1e-12)
        assert error == pytest.approx(float(sigma[cut.rank :].norm() / sigma.norm()), abs=1e-12)
        if by == "rank":
            assert cut.rank == min(rank, full.rank)
        else:
            assert 1 - error**2 >= energy - 1e-9
            assert cut.rank == 1 or float(sigma[: cut.rank - 1].square().sum() / sigma.square().sum()) < energy


def test_a_loss_below_the_rounding_of_float32_is_told_apart() -> None:
    """σ₂ = 1e-8 σ₁, in float32 factors that don't show it in any one number."""
    turn_22 = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    update = LowRank(turn_22 @ torch.diag(torch.tensor([1.0, 1e-8])) @ turn_22.T, turn_22)
    adapter = Adapter(AdapterSpec(rank=2, alpha=2, targets=("q",)), {"q": update})
    sigma = torch.linalg.svdvals(update.b_MR.double() @ update.a_RN.double())
    _, (loss,) = resize(adapter, rank=1)
    assert loss.relative_error == pytest.approx(float(sigma[1] / sigma.norm()), rel=1e-6)


@quick
@given(spec=specs, seed=st.integers(0, 99), energy=st.floats(0.001, 1))
def test_a_global_budget_keeps_the_energy_with_the_least_rank(spec: AdapterSpec, seed: int, energy: float) -> None:
    adapter = drawn(spec, seed)
    smaller, losses = resize_global(adapter, energy)
    assert_described(smaller)
    sigma = {path: torch.linalg.svdvals(delta)[: adapter.factors[path].rank] for path, delta in dense(adapter).items()}
    pooled = torch.cat(list(sigma.values())).square().sort(descending=True).values
    total = float(pooled.sum())
    kept = sum(float(sigma[loss.module][: loss.new_rank].square().sum()) for loss in losses)
    assert kept >= (energy - 1e-9) * total
    wanted = 1 + int((pooled.cumsum(0) < energy * total * (1 - 1e-12)).sum())  # of all modules together
    threshold = float(pooled[min(wanted, len(pooled)) - 1])
    for loss in losses:
        assert loss.new_rank == max(1, int((sigma[loss.module].square() >= threshold * (1 - 1e-9)).sum()))
    lost = sum((loss.relative_error * float(sigma[loss.module].norm())) ** 2 for loss in losses)
    assert lost == pytest.approx(total - kept, abs=1e-9 * total)


def test_each_energy_share_gives_its_own_budget() -> None:
    adapter = drawn(AdapterSpec(rank=4))
    shares = energy_shares(adapter)
    assert len(shares) == 4 * len(SHAPES) and float(shares[-1]) == pytest.approx(1)
    for k in range(1, len(shares) + 1):
        smaller, _ = resize_global(adapter, float(shares[k - 1]))
        counted = sum(update.rank for update in smaller.factors.values())
        assert counted == k or (counted > k and min(update.rank for update in smaller.factors.values()) == 1)


def test_an_update_of_zeros_keeps_rank_one_and_loses_nothing() -> None:
    adapter = drawn(AdapterSpec(rank=3))
    zeros = {path: LowRank(u.a_RN, torch.zeros_like(u.b_MR), u.scale) for path, u in adapter.factors.items()}
    for smaller, losses in (
        resize(Adapter(adapter.spec, zeros), energy=0.9),
        resize_global(Adapter(adapter.spec, zeros), 0.9),
    ):
        assert {(loss.new_rank, loss.relative_error) for loss in losses} == {(1, 0.0)}
        assert not any(delta.any() for delta in dense(smaller).values())


def test_a_rank_beyond_the_matrix_is_cut_to_it_without_loss() -> None:
    wide = LowRank(torch.randn(9, 5, dtype=torch.float64), torch.randn(7, 9, dtype=torch.float64), 2.0)
    adapter = Adapter(AdapterSpec(rank=9, alpha=18, targets=("q",)), {"q": wide})
    smaller, (loss,) = resize(adapter, rank=8)
    assert (loss.new_rank, loss.relative_error) == (5, 0.0)
    assert_same_update(smaller, adapter)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "one of the two"),
        ({"rank": 2, "energy": 0.5}, "one of the two"),
        ({"rank": 0}, "at least 1"),
        ({"rank": 5}, "above the adapter's own 4"),
        ({"energy": 0.0}, "not 0.0"),
        ({"energy": 1.01}, "not 1.01"),
        ({"energy": math.nan}, "not nan"),
    ],
)
def test_impossible_sizes_are_refused(wrong: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        resize(drawn(AdapterSpec(rank=4)), **wrong)
    if "energy" in wrong and "rank" not in wrong:
        with pytest.raises(InputError, match=said):
            resize_global(drawn(AdapterSpec(rank=4)), wrong["energy"])


def test_what_is_no_plain_lora_is_refused() -> None:
    full = Adapter(AdapterSpec(full=True), {"q": Dense(torch.ones(3, 4))})
    low = LowRank(torch.ones(1, 4), torch.ones(3, 1))
    dora = Adapter(AdapterSpec(rank=1, alpha=1, magnitude=True), {"q": DoRA(low, torch.ones(3))})
    for adapter, said in ((full, r"full fine-tuning has no factors.*\nextract"), (dora, r"DoRA's update.*\nmerge it")):
        for call in (
            lambda adapter: resize(adapter, rank=1),
            lambda adapter: resize_global(adapter, 0.5),
            lambda adapter: scaled(adapter, 0.5),
            pad_all,
            energy_shares,
        ):
            with pytest.raises(InputError, match=said):
                call(adapter)
    with pytest.raises(InputError, match="no modules"):
        resize(Adapter(AdapterSpec(), {}), rank=1)


# Scaled


@quick
@given(spec=specs, factor=st.floats(-10, 10))
def test_scaled_is_the_dense_matrix_times_the_factor(spec: AdapterSpec, factor: float) -> None:
    assume(factor == 0 or abs(factor) > 1e-6)
    adapter = drawn(spec)
    again = scaled(adapter, factor)
    assert_described(again)
    for path, update in adapter.factors.items():
        assert torch.equal(again.factors[path].a_RN, update.a_RN)
        assert torch.equal(again.factors[path].b_MR.abs(), (update.b_MR if factor else 0 * update.b_MR).abs())
        torch.testing.assert_close(again.factors[path].dense(), factor * update.dense(), rtol=1e-14, atol=0)


def test_scaled_by_one_and_by_two_and_back_is_the_adapter() -> None:
    adapter = drawn(AdapterSpec(rank=3, alpha=5, rank_overrides={"q": 2}, scaling="rslora"))
    assert_untouched(scaled(adapter, 1.0), adapter)
    assert scaled(adapter, 1.0).spec == adapter.spec
    assert_untouched(scaled(scaled(adapter, -2.0), -0.5), adapter)


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf, 1e308])
def test_a_scale_that_is_no_number_is_refused(factor: float) -> None:
    with pytest.raises(InputError):
        scaled(drawn(AdapterSpec(rank=1, alpha=16)), factor)


# Uniform


@quick
@given(spec=specs.filter(lambda s: not s.alpha_overrides), energy=st.floats(0.05, 1))
def test_uniform_is_the_same_update_with_one_rank_and_alpha(spec: AdapterSpec, energy: float) -> None:
    smaller, losses = resize(drawn(spec), energy=energy)
    uniform, same_losses = resize(drawn(spec), energy=energy, uniform=True)
    assert losses == same_losses
    assert_described(uniform)
    assert not uniform.spec.rank_overrides and not uniform.spec.alpha_overrides and mixed(uniform) is None
    assert_same_update(uniform, smaller)
    largest = max(update.rank for update in smaller.factors.values())
    scales = {update.scale for update in smaller.factors.values()}
    for path, update in smaller.factors.items():
        padded = uniform.factors[path]
        assert padded.rank == largest
        assert torch.equal(padded.a_RN[: update.rank], update.a_RN)
        assert not padded.a_RN[update.rank :].any() and not padded.b_MR[:, update.rank :].any()
        if len(scales) == 1:
            assert torch.equal(padded.b_MR[:, : update.rank], update.b_MR)


def test_mixed_ranks_and_alphas_are_named() -> None:
    smaller, _ = resize_global(drawn(AdapterSpec(rank=4)), 0.9)
    assert "ranks from 1 to" in (mixed(smaller) or "") and "vLLM" in (mixed(smaller) or "")
    assert "alphas" in (mixed(drawn(AdapterSpec(rank=4, alpha_overrides={"q": 3.0}))) or "")
    assert mixed(drawn(AdapterSpec(rank=4))) is None
    assert mixed(drawn(AdapterSpec(rank=4, rank_overrides={"q": 4}))) is None
    assert mixed(drawn(AdapterSpec(rank=4, rank_overrides=dict.fromkeys(SHAPES, 3))))  # one rank, not the default's


def test_a_module_too_narrow_for_the_largest_rank_is_named() -> None:
    with pytest.raises(InputError, match=r"h\.0\.q has no room for rank 6; the most is 5\nresize to rank 5"):
        pad_all(drawn(AdapterSpec(rank=2, rank_overrides={"up": 6})))


# In PEFT


@pytest.mark.parametrize("which", ["rslora", "ranks", "both", "mlp"])
@pytest.mark.parametrize("uniform", [False, True])
def test_a_resized_adapter_answers_the_same_in_peft(which: str, uniform: bool, tmp_path: Path) -> None:
    adapter = made(SPECS[which])
    smaller, losses = resize(adapter, energy=0.8, uniform=uniform)
    assert any(loss.relative_error > 0.1 for loss in losses)
    assert bool(smaller.spec.rank_overrides) != uniform
    answers_as_in_peft(smaller, "llama", tmp_path)


@pytest.mark.parametrize("factor", [-0.5, 0.0, 0.3])
def test_a_scaled_adapter_answers_the_same_in_peft(factor: float, tmp_path: Path) -> None:
    answers_as_in_peft(scaled(made(AdapterSpec(rank=2, alpha=3), "gpt2"), factor), "gpt2", tmp_path)


def answers_as_in_peft(adapter: Adapter, name: str, folder: Path) -> None:
    adapter.save(folder)
    again = Adapter.load(folder)
    assert again.spec == adapter.spec
    here = logits(attach(tiny(name), again).model)
    assert same(here, logits(PeftModel.from_pretrained(tiny(name), folder)))
    assert same(here, logits(attach(tiny(name), adapter).model))


def test_an_adapter_that_is_uniform_stays_as_it_is_however_narrow_its_modules() -> None:
    """PEFT makes factors of any rank, above a module's width too: nothing is padded there."""
    spec = AdapterSpec(rank=6, alpha=3, targets=("q", "v"))
    factors = {name: LowRank(torch.randn(6, 4), torch.randn(5, 6), 0.5) for name in ("q", "v")}
    made = pad_all(Adapter(spec, factors))
    assert made.spec == spec
    assert all(torch.equal(made.factors[name].a_RN, factor.a_RN) for name, factor in factors.items())
