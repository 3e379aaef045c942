"""Adapters combined: the sum is the sum, TIES and DARE are their definitions, and PEFT's where those are the same."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor

from deltaw.adapter.algebra import resize
from deltaw.adapter.combine import combine, dare, ties
from deltaw.adapter.file import Adapter, BaseId
from deltaw.config import AdapterSpec
from deltaw.errors import InputError
from deltaw.factors import LowRank
from deltaw.kinds import Dense
from tests.adapter.test_algebra import (
    SHAPES,
    answers_as_in_peft,
    assert_described,
    assert_same_update,
    assert_untouched,
    drawn,
    quick,
    specs,
)
from tests.adapter.test_file import SPECS, made
from tests.architectures import tiny

weights = st.floats(-3, 3).filter(lambda w: w == 0 or abs(w) > 1e-3)


def total(adapters: list[Adapter], by: list[float]) -> dict[str, Tensor]:
    """Σ w ΔW, dense, over the union of the modules."""
    sums: dict[str, Tensor] = {}
    for adapter, weight in zip(adapters, by, strict=True):
        for path, update in adapter.factors.items():
            sums[path] = sums.get(path, 0) + weight * update.dense()
    return sums


# The sum


@quick
@given(spec=specs, seed=st.integers(0, 99))
def test_one_adapter_of_weight_one_is_untouched(spec: AdapterSpec, seed: int) -> None:
    adapter = drawn(spec, seed)
    again, losses = combine([adapter], [1.0])
    assert_untouched(again, adapter)
    assert_described(again)
    assert again.spec.targets == spec.targets and again.spec.dropout == 0
    assert {loss.relative_error for loss in losses} == {0.0}


@pytest.mark.parametrize("which", [which for which, spec in SPECS.items() if not spec.magnitude])
def test_one_trained_adapter_is_untouched_whatever_its_spec(which: str) -> None:
    adapter = made(SPECS[which])
    again, _ = combine([adapter], [1.0])
    assert_untouched(again, adapter)
    assert again.spec == adapter.spec.model_copy(update={"dropout": 0.0})


@quick
@given(of=st.lists(st.tuples(specs, weights), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_the_linear_combination_is_the_sum(of: list[tuple[AdapterSpec, float]], seed: int) -> None:
    adapters, by = [drawn(spec, seed + at) for at, (spec, _) in enumerate(of)], [weight for _, weight in of]
    assume(any(by))
    added, losses = combine(adapters, by)
    assert_described(added)
    for (path, wanted), loss in zip(total(adapters, by).items(), losses, strict=True):
        size = sum(float(weight * a.factors[path].dense().norm()) ** 2 for a, weight in zip(adapters, by, strict=True))
        assert float((added.factors[path].dense() - wanted).norm()) <= 1e-12 * math.sqrt(size)
        assert loss.new_rank == added.factors[path].rank and loss.relative_error <= 1e-12
        if sum(map(bool, by)) > 1:
            assert added.factors[path].rank == int(torch.linalg.matrix_rank(wanted))


def test_the_sum_is_associative_and_commutative() -> None:
    a, b, c = (drawn(AdapterSpec(rank=rank, alpha=3), seed) for seed, rank in enumerate((1, 2, 3)))
    whole, _ = combine([a, b, c], [1, -2, 0.5])
    left, _ = combine([combine([a, b], [1, -2])[0], c], [1, 0.5])
    right, _ = combine([combine([c, b], [0.25, -1])[0], a], [2, 1])
    assert_same_update(left, whole)
    assert_same_update(right, whole)


def test_two_halves_of_one_adapter_are_the_adapter_at_its_rank() -> None:
    adapter = drawn(AdapterSpec(rank=3))
    again, losses = combine([adapter, adapter], [0.5, 0.5])
    assert_same_update(again, adapter)
    assert {(loss.old_rank, loss.new_rank) for loss in losses} == {(6, 3)}


def test_a_direction_is_judged_by_its_own_size_not_by_the_largest_factor() -> None:
    """Factors of 10⁶ and 10⁻⁶ make an update of size 1 like any other."""
    a, b = drawn(AdapterSpec(rank=1, alpha=1), 1), drawn(AdapterSpec(rank=1, alpha=1), 2)
    a, b = (
        Adapter(x.spec, {p: LowRank(size * u.a_RN, u.b_MR / size) for p, u in x.factors.items()})
        for x, size in ((a, 1e6), (b, 1e-6))
    )
    assert {loss.new_rank for loss in combine([a, b], [1, 1])[1]} == {2}


@quick
@given(specs=st.tuples(specs, specs), by=st.tuples(weights, weights), rank=st.integers(1, 6))
def test_a_rank_cuts_the_sum_at_the_stated_error(specs: Any, by: Any, rank: int) -> None:
    assume(all(by))
    adapters = [drawn(spec, at) for at, spec in enumerate(specs)]
    smaller, losses = combine(adapters, by, rank=rank)
    assert_described(smaller)
    for loss, (path, wanted) in zip(losses, total(adapters, list(by)).items(), strict=True):
        sigma = torch.linalg.svdvals(wanted)
        error = float((smaller.factors[path].dense() - wanted).norm() / wanted.norm())
        assert loss.relative_error == pytest.approx(error, abs=1e-10)
        assert error == pytest.approx(float(sigma[rank:].norm() / sigma.norm()), abs=1e-10)
        assert loss.new_rank == min(rank, int(torch.linalg.matrix_rank(wanted)))


def test_an_energy_is_kept_by_every_module() -> None:
    adapters = [drawn(AdapterSpec(rank=3), seed) for seed in (0, 1)]
    smaller, losses = combine(adapters, [1, 1], energy=0.9)
    assert all(1 - loss.relative_error**2 >= 0.9 for loss in losses)
    assert_same_update(smaller, resize(combine(adapters, [1, 1])[0], energy=0.9)[0])


def test_modules_in_only_some_of_the_adapters_count_as_zero_in_the_others() -> None:
    a, b = drawn(AdapterSpec(rank=2)), drawn(AdapterSpec(rank=3, scaling="rslora"), 1)
    a, b = replace(a, factors={"q": a.factors["q"]}), replace(b, factors={p: b.factors[p] for p in ("h.0.q", "h.0.up")})
    both, _ = combine([a, b], [1, -1])
    assert both.spec.targets == ("q", "h.0.q", "h.0.up")
    assert torch.equal(both.factors["q"].b_MR, a.factors["q"].b_MR)
    assert torch.equal(both.factors["h.0.q"].b_MR, -b.factors["h.0.q"].b_MR)
    assert_same_update(both, replace(both, factors={p: Dense(d) for p, d in total([a, b], [1, -1]).items()}))
    assert combine([a, b], [0, 1])[0].factors.keys() == b.factors.keys()
    wider = drawn(AdapterSpec(rank=2, targets="all-linear"))
    assert combine([a, wider], [1, 1])[0].spec.targets == "all-linear"


def test_a_module_that_cancels_is_zero_at_rank_one_and_a_model_that_cancels_is_refused() -> None:
    a, b = drawn(AdapterSpec(rank=3)), drawn(AdapterSpec(rank=3), 1)
    b = replace(b, factors={**b.factors, "q": a.factors["q"]})
    rest, losses = combine([a, b], [1, -1])
    assert rest.factors["q"].rank == 1 and not rest.factors["q"].dense().any()
    assert [loss.relative_error for loss in losses if loss.module == "q"] == [0.0]
    for adapters, by in (([a, a], [1, -1]), ([a], [0]), ([a, a, a], [0.1, 0.2, -0.3])):
        with pytest.raises(InputError, match="zero in every module"):
            combine(adapters, by)


def test_the_base_is_the_one_that_is_known() -> None:
    a, b = drawn(AdapterSpec()), drawn(AdapterSpec(), 1)
    unknown = replace(a, base=BaseId("a name", template="plain"))
    assert combine([unknown, b], [1, 1])[0].base == replace(b.base, template="plain")


# TIES and DARE


def test_ties_by_hand() -> None:
    """Two adapters of four entries, half of them kept. Entry by entry: kept by both and agreeing; kept by both and
    disagreeing, the larger wins; kept by neither."""
    deltas = torch.tensor([[[4.0, -3.0, 1.0, 0.5]], [[2.0, 1.0, 0.25, 0.5]]])
    wanted = torch.tensor([[3.0, -3.0, 0.0, 0.0]])
    assert torch.equal(ties([1.0, 1.0], deltas, 0.5), wanted)
    assert torch.equal(ties([-1.0, -1.0], deltas, 0.5), -wanted)
    assert torch.equal(ties([1.0, -1.0], deltas, 0.5), torch.tensor([[4.0, -2.0, 0.0, 0.0]]))


def test_dare_is_the_sum_on_average_and_keeps_the_share() -> None:
    deltas = torch.randn(2, 5, 4)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([dare([1.0, 2.0], deltas, 0.25, generator) for _ in range(4000)])
    wanted = deltas[0] + 2 * deltas[1]
    spread = (3 * (deltas[0] ** 2 + 4 * deltas[1] ** 2) / 4000).sqrt()  # of the mean: (1 − p) / p of each square
    assert ((drawn.mean(0) - wanted).abs() < 5 * spread).all()
    once = dare([1.0], deltas[:1], 0.25, generator)
    assert torch.equal(once[once != 0], (deltas[0] / 0.25)[once != 0])


def test_at_density_one_dare_is_the_sum() -> None:
    adapters = [drawn(AdapterSpec(rank=2), seed) for seed in (0, 1)]
    got, _ = combine(adapters, [1, -0.5], method="dare", density=1.0, rank=4)
    assert_same_update(got, combine(adapters, [1, -0.5])[0])


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_what_entries_were_made_is_recompressed_at_the_stated_error(method: Any) -> None:
    adapters = [drawn(AdapterSpec(rank=rank), rank) for rank in (2, 3)]
    whole, losses = combine(adapters, [1, 0.5], method=method, rank=5, energy=None, seed=7)
    smaller, cut = combine(adapters, [1, 0.5], method=method, seed=7)
    other, _ = combine(adapters, [1, 0.5], method=method, seed=8)
    assert_described(smaller)
    assert {loss.new_rank for loss in cut} == {3} and all(loss.relative_error > 0.01 for loss in cut)
    assert {loss.new_rank for loss in losses} == {5}
    for path, loss in zip(SHAPES, cut, strict=True):
        if min(SHAPES[path]) == 5:  # then rank 5 is everything
            full = whole.factors[path].dense()
            error = float((smaller.factors[path].dense() - full).norm() / full.norm())
            assert loss.relative_error == pytest.approx(error, abs=1e-10)
    same = all(torch.equal(smaller.factors[p].b_MR, other.factors[p].b_MR) for p in SHAPES)
    assert same == (method == "ties")


def test_progress_counts_the_modules() -> None:
    seen = []
    combine([drawn(AdapterSpec())], [2], progress=seen.append)
    assert seen == list(range(1, len(SHAPES) + 1))


# Refusals


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": [1.0]}, "2 adapters but 1 weight"),
        ({"weights": [1.0, math.nan]}, "not nan"),
        ({"weights": [1.0, math.inf]}, "not inf"),
        ({"method": "slerp"}, "no method 'slerp'\nknown: linear, ties, dare"),
        ({"density": 0.5}, "for ties and dare only"),
        ({"method": "ties", "density": 0.0}, "above 0"),
        ({"method": "dare", "density": math.nan}, "above 0"),
        ({"rank": 0}, "at least 1"),
        ({"rank": 1, "energy": 0.5}, "one of the two"),
        ({"energy": 2.0}, "at most 1"),
        ({"adapters": [], "weights": []}, "no adapters"),
    ],
)
def test_impossible_combinations_are_refused(change: dict, said: str) -> None:
    given = {"adapters": [drawn(AdapterSpec()), drawn(AdapterSpec(), 1)], "weights": [1.0, 1.0], **change}
    with pytest.raises(InputError, match=said):
        combine(given.pop("adapters"), given.pop("weights"), **given)


def test_adapters_that_do_not_belong_together_are_named() -> None:
    a = drawn(AdapterSpec(rank=2))
    elsewhere = replace(a, base=BaseId("someone/other", None, "sha256:" + "f" * 64))
    with pytest.raises(
        InputError, match=r"adapters 1 and 3 .*someone/tiny \(sha256:0+\) and someone/other \(sha256:f+"
    ):
        combine([a, a, elsewhere], [1, 1, 1])
    wider = replace(a, factors={**a.factors, "q": LowRank(torch.ones(2, 8), torch.ones(8, 2), a.spec.scale("q"))})
    with pytest.raises(
        InputError, match=r"adapters 1 and 2 differ in the shape of 1 modules:\n  q: \(6, 8\) and \(8, 8"
    ):
        combine([a, wider], [1, 1])
    full = Adapter(AdapterSpec(full=True), {"q": Dense(torch.ones(6, 8))}, a.base)
    for adapters in ([a, full], [full]):
        with pytest.raises(InputError, match="full fine-tuning"):
            combine(adapters, [1.0] * len(adapters))


# PEFT


def in_peft(adapters: list[Adapter], by: list[float], kind: str, folder: Path, **options: Any) -> dict[str, Tensor]:
    """PEFT's own combination, as dense updates [M, N] by module path."""
    for at, adapter in enumerate(adapters):
        adapter.save(folder / str(at))
    model = PeftModel.from_pretrained(tiny("llama"), folder / "0", adapter_name="0")
    for at in range(1, len(adapters)):
        model.load_adapter(folder / str(at), adapter_name=str(at))
    names = [str(at) for at in range(len(adapters))]
    model.base_model.add_weighted_adapter(names, by, "sum", combination_type=kind, **options)
    modules = dict(model.base_model.model.named_modules())
    return {path: modules[path].get_delta_weight("sum") for adapter in adapters for path in adapter.factors}


def assert_as(got: Adapter, wanted: dict[str, Tensor]) -> None:
    assert got.factors.keys() == wanted.keys()
    for path, delta in wanted.items():
        assert float((got.factors[path].dense() - delta).abs().max()) <= 2e-5 * float(delta.abs().max())


def pair() -> list[Adapter]:
    """Of different ranks, scales and modules: `up_proj` in both, the rest in one."""
    torch.manual_seed(1)
    specs = (
        AdapterSpec(rank=3, alpha=5, targets=("q_proj", "up_proj")),
        AdapterSpec(rank=2, alpha=7, targets=("v_proj", "up_proj"), scaling="rslora"),
    )
    return [made(spec) for spec in specs]


def test_the_sum_is_pefts_cat(tmp_path: Path) -> None:
    assert_as(combine(pair(), [0.7, 1.5])[0], in_peft(pair(), [0.7, 1.5], "cat", tmp_path))


def test_the_cut_sum_is_pefts_svd(tmp_path: Path) -> None:
    assert_as(combine(pair(), [0.7, -1.5], rank=3)[0], in_peft(pair(), [0.7, -1.5], "svd", tmp_path, svd_rank=3))


def test_the_cross_terms_of_pefts_linear_are_not_here(tmp_path: Path) -> None:
    two = [made(SPECS["rslora"]), made(SPECS["rslora"])]
    path = next(iter(two[0].factors))
    wanted = total(two, [1, 1])[path]
    theirs = in_peft(two, [1, 1], "linear", tmp_path)[path]
    ours = combine(two, [1, 1])[0].factors[path].dense()
    assert float((theirs - wanted).norm() / wanted.norm()) > 0.5
    assert float((ours - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_ties_is_pefts_ties_svd_for_positive_weights(density: float, tmp_path: Path) -> None:
    got, _ = combine(pair(), [0.7, 1.5], method="ties", density=density, rank=3)
    assert_as(got, in_peft(pair(), [0.7, 1.5], "ties_svd", tmp_path, density=density, svd_rank=3))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"method": "ties"}])
def test_a_combination_answers_the_same_in_peft(name: str, options: dict, tmp_path: Path) -> None:
    torch.manual_seed(1)
    two = [made(AdapterSpec(rank=2, alpha=3), name), made(AdapterSpec(rank=3, scaling="rslora"), name)]
    combined, _ = combine(two, [0.5, -0.5], **options)
    assert combined.fan_in_fan_out == (name == "gpt2")
    answers_as_in_peft(combined, name, tmp_path)
