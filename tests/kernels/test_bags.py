"""Few rows by a matrix's codes: what float32 products of the unpacked matrix give, for every format of codes."""

import gc

import pytest
import torch

from deltaw.kernels import bags, copies
from deltaw.kernels.blocks import FORMATS, BlockWeight, parts_of
from deltaw.kernels.copies import making
from deltaw.kernels.int8 import to_int8
from deltaw.kernels.packed import CastWeight, PackedWeight
from tests.kernels.test_blocks import random_blocks

SHAPES = [(37, 1), (130, 3)]


def weights(m: int, blocks: int) -> dict[str, PackedWeight]:
    made: dict[str, PackedWeight] = {"int8": to_int8(torch.randn(m, 64 * blocks), torch.float32)}
    for kind in FORMATS.values():
        made[kind.name] = BlockWeight(kind, parts_of(kind, random_blocks(kind, m, blocks)), torch.float32)
    return made


@pytest.mark.parametrize(("m", "blocks"), SHAPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_products_by_codes_are_as_near_as_plain_ones(m: int, blocks: int, rows: int) -> None:
    """|fast − truth| ≤ |plain − truth| + the roundings of a sum: by output, in units of what its terms come to."""
    generator = torch.Generator().manual_seed(rows)
    for name, weight in weights(m, blocks).items():
        x_TN, bias_M = (torch.randn(shape, generator=generator) for shape in ((rows, weight.shape[1]), (m,)))
        w_MN = weight.dense().double()
        truth, terms = x_TN.double() @ w_MN.T + bias_M, x_TN.double().abs() @ w_MN.abs().T
        codes_MN, d_MG, m_MG = weight.coded(slice(None))  # type: ignore[misc]
        assert codes_MN.shape == w_MN.shape and codes_MN.min() >= -128 and codes_MN.max() <= 127
        # d q and m may cancel, which the unpacked matrix has rounded
        wide = codes_MN.abs().double().unflatten(1, (d_MG.shape[1], -1)) * d_MG.abs().double()[..., None]
        wide += 0 if m_MG is None else m_MG.abs().double()[..., None]
        terms = terms + x_TN.double().abs() @ wide.flatten(1).T + bias_M.abs()
        plain = (weight.matmul(x_TN, bias_M).double() - truth).abs()
        with torch.inference_mode(), making(True):
            assert bags.bags_for(weight, x_TN) is not None, name
            fast = (weight.matmul(x_TN, bias_M).double() - truth).abs()
        assert (fast <= plain + 8 * torch.finfo(torch.float32).eps * terms).all(), name


def test_only_few_rows_of_a_step_of_decoding_and_as_long_as_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x_TN = to_int8(torch.randn(8, 64), torch.float32), torch.randn(bags.FEW + 1, 64)
    with making(True):
        assert bags.bags_for(weight, x_TN[:1]) is None  # gradients may be asked for
    with torch.inference_mode(), making(True):
        with making(False):
            assert bags.bags_for(weight, x_TN[:1]) is None
        assert bags.bags_for(weight, x_TN) is None and bags.bags_for(weight, x_TN[:1].bfloat16()) is None
        assert bags.bags_for(CastWeight(torch.randn(8, 64).bfloat16(), torch.float32), x_TN[:1]) is None
        made = bags.bags_for(weight, x_TN[:1])
        assert made is not None and bags.bags_for(weight.with_parts(weight.parts), x_TN[:1]) is made
        del made
        before = len(bags._bags)
        del weight
        gc.collect()
        assert len(bags._bags) == before - 1
        monkeypatch.setattr(copies, "SPARE", 2**60)
        short = to_int8(torch.randn(8, 64), torch.float32)
        assert bags.bags_for(short, x_TN[:1]) is None
        assert torch.allclose(short.matmul(x_TN[:1]), x_TN[:1] @ short.dense().T, rtol=1e-5, atol=1e-5)
