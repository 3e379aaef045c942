"""What the comparison of two sides rests on: distances, partings, formats' errors, and rounding put into a model."""

import math

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaw.shipping.verify.alike import SMALLEST, Parting, compared_ids, distance, odds_moved, parting
from deltaw.shipping.verify.noise import noisy
from deltaw.shipping.verify.sides.formats import BLOCKS, UNIT, described, error, exact, known, rms
from deltaw.shipping.verify.sides.side import Answer, Logs, Numbers
from deltaw.shipping.verify.verdict import Tolerance, assumed, effect_of, reasons_of, strength
from tests.architectures import PACKED, tiny

V = 40


def some(seed: int, positions: int = 3, spread: float = 3.0) -> Logs:
    generator = torch.Generator().manual_seed(seed)
    return Logs((spread * torch.randn(positions, V, generator=generator)).log_softmax(-1))


def top(logs: Logs, count: int) -> Logs:
    values, ids = logs.values_PK.topk(count)
    return Logs(values, ids)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 999), st.integers(1, V), st.integers(1, V))
def test_the_likeliest_alone_give_a_lower_bound_that_the_whole_reaches(seed: int, one: int, other: int) -> None:
    a, b = some(seed), some(seed + 1)
    whole = distance(a, b).kl_P
    true = (a.values_PK.exp() * (a.values_PK - b.values_PK)).sum(1)
    torch.testing.assert_close(whole, true.double(), rtol=1e-4, atol=1e-6)
    for x, y in ((a, top(b, other)), (top(a, one), b), (top(a, one), top(b, other))):
        ids = compared_ids(x, y)
        rests = (
            [1 - logs.of(ids).double().exp().sum(1) for logs in (a, b)]
            if ids is not None
            else [whole * 0, whole * 0 + 1]
        )
        # What sums of float32 logarithms and probabilities are off by, where the rest is the difference to 1.
        slack = 2e-5 * (1 + whole) + rests[0].clamp_min(0) * 3e-7 / rests[1].clamp_min(SMALLEST)
        assert (distance(x, y).kl_P <= whole + slack).all()
    assert (distance(top(a, V), top(b, V)).kl_P - whole).abs().max() < 1e-4
    assert distance(a, a).kl < 1e-12 and distance(a, a).largest == 0


def test_vocabularies_of_padded_lengths_are_compared_where_both_have_rows() -> None:
    a = some(0)
    padded = Logs(torch.cat([a.values_PK, torch.full((3, 5), -60.0)], 1))
    assert distance(a, padded).kl < 1e-6 and distance(padded, a).kl < 1e-6


def test_of_gives_what_is_not_among_the_likeliest_as_unknown() -> None:
    logs = Logs(torch.tensor([[-0.1, -3.0]]), torch.tensor([[7, 2]]))
    assert logs.of(torch.tensor([[2, 5, 7]])).tolist() == [[pytest.approx(-3), -math.inf, pytest.approx(-0.1)]]


def said(*ids: int, ended: bool = False) -> Answer:
    return Answer(" ".join(map(str, ids[: len(ids) - ended])), ids, ended)


def words(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def test_where_two_answers_part() -> None:
    a, b = some(1), some(2)
    assert parting(said(1, 2, 3), said(1, 2, 3), a, b, words) is None
    found = parting(said(1, 2, 3), said(1, 5, 3), a, b, words)
    x, y = a.values_PK[1], b.values_PK[1]
    assert found == Parting(1, 2, 5, pytest.approx(float((x[2] - x[5]) + (y[5] - y[2])), abs=1e-5))
    # One goes on where the other ends; some servers leave out the token that ended an answer.
    assert parting(said(1, 2, 0, ended=True), said(1, 2), a, b, words) == Parting(2, 0, None, None)
    assert parting(said(1, 2, 0, ended=True), Answer("1 2", (1, 2), True), a, b, words) is None
    text = Answer("1 2 9", None, False)
    found = parting(said(1, 2, 3), text, a, None, words)
    assert found.position == 2 and found.token_b is None and found.gap >= 0
    assert parting(said(1, 2, 3), Answer(" 1 2 3", None, False), a, None, words) is None


def test_the_strength_is_zero_of_the_same_and_one_of_the_base() -> None:
    a, base = [some(1)], [some(2)]
    assert strength(a, a, base) == 0
    assert strength(a, base, base) == pytest.approx(1)
    between = [Logs((0.7 * a[0].values_PK + 0.3 * base[0].values_PK).log_softmax(-1))]
    assert strength(a, between, base) == pytest.approx(0.3, abs=1e-3)
    assert strength(a, [top(between[0], V)], base) == pytest.approx(0.3, abs=1e-3)
    assert effect_of(a, base, base, distance(a[0], base[0]).kl).share == pytest.approx(1)


def test_a_coarse_type_is_no_excuse() -> None:
    wide = Tolerance(9.0, 90.0, 90.0, (2.0,), "")
    a, base = [some(1)], [some(2)]
    noisy_logs = [Logs((a[0].values_PK + 2 * some(3).values_PK).log_softmax(-1))]
    kl = distance(a[0], noisy_logs[0]).kl
    effect = effect_of(a, noisy_logs, base, kl)
    assert kl < wide.kl and reasons_of([], kl, 1.0, wide, effect)
    assert not reasons_of([], kl, 1.0, wide, None)


QUANTISED = [name for name in BLOCKS if name.startswith(("Q8_0", "Q5_", "Q4_")) and not name.endswith("K")]


@pytest.mark.parametrize("name", QUANTISED)
def test_a_blocks_error_is_that_of_ggufs_own_quantiser(name: str) -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    kind = gguf.GGMLQuantizationType[name]
    back = gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind)
    true = float(np.sqrt(np.mean((back - x.numpy()) ** 2)))
    assert 0.8 < float(error(name, x).square().mean().sqrt()) / true < 1.25


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_a_floats_error_is_that_of_casting(name: str) -> None:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    true = (x.to(getattr(torch, name)).float() - x).square().mean().sqrt()
    assert 0.9 < float(error(name, x).square().mean().sqrt() / true) < 1.1
    assert UNIT[name] == torch.finfo(getattr(torch, name)).eps / 2


def test_formats_by_name() -> None:
    assert known("IQ2_XS") == "Q2_K" and known("something new") == "bfloat16"
    assert exact("float32") and not exact("Q8_0")
    assert rms("Q8_0") < rms("Q5_0") < rms("Q4_0") and all(described(name) for name in (*UNIT, *BLOCKS))
    odd = torch.randn(3, 40)  # a last block that isn't full
    assert error("Q8_0", odd).shape == odd.shape
    fine, coarse = assumed([Numbers("bfloat16")]), assumed([Numbers("Q4_0", ("Q8_0",))])
    assert not fine.measured and fine.kl < coarse.kl and fine.gap < coarse.gap


IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))


def answers(model) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float().log_softmax(-1)


def moved(model, numbers: Numbers, seed: int = 0) -> float:
    clean = answers(model)
    with noisy(model, [numbers], seed):
        other = answers(model)
    return float((clean.exp() * (clean - other)).sum(-1).mean())


@pytest.mark.parametrize("name", PACKED)
def test_noise_goes_in_and_out_of_every_architecture(name: str) -> None:
    model = tiny(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    clean = answers(model)
    fine, coarse = moved(model, Numbers("bfloat16", ("bfloat16",))), moved(model, Numbers("Q4_0", ("Q8_0",)))
    assert 0 < fine < coarse
    assert moved(model, Numbers("bfloat16", ("bfloat16",))) == fine  # a seed is a draw
    assert torch.equal(answers(model), clean)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3", "gpt2"])
def test_it_is_as_large_as_real_rounding(name: str) -> None:
    """The model in bfloat16 beside itself in float32: weights and everything that flows are rounded for real."""
    model = tiny(name)
    real = float((answers(model).exp() * (answers(model) - answers(tiny(name, torch.bfloat16)))).sum(-1).mean())
    drawn = [moved(model, Numbers("bfloat16", ("bfloat16",)), seed) for seed in range(5)]
    assert real < 4 * max(drawn) and min(drawn) < 8 * real, (real, drawn)


def test_odds_that_moved() -> None:
    a, b = some(1), some(2)
    first, second = a.values_PK[0].topk(2).indices.tolist()
    x, y = a.values_PK[0], b.values_PK[0]
    wanted = abs(float((x[first] - x[second]) - (y[first] - y[second])))
    assert float(odds_moved(a, b)[0]) == pytest.approx(wanted, abs=1e-4)
    assert float(odds_moved(a, a).max()) == 0
