"""A GGUF's blocks: the numbers are those of gguf's own dequantisation, to the bit, whatever the blocks hold."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from torch import Tensor

from deltaw.kernels.blocks import FORMATS, BlockWeight, Format, parts_of

KINDS = pytest.mark.parametrize("number", list(FORMATS), ids=[kind.name for kind in FORMATS.values()])
SCALES = (0.0, -0.0, 2.0**-24, -(2.0**-24), 6e-5, 65504.0, -65504.0, 1.0)  # float16's extremes, among ordinary ones


def random_blocks(kind: Format, rows: int, blocks: int, seed: int = 0) -> Tensor:
    """Rows of blocks [M, bytes] whose codes are any bits, and whose scales are any finite float16."""
    random = np.random.default_rng(seed)
    raw = random.integers(0, 256, (rows, blocks, kind.nbytes), dtype=np.uint8)
    for at in {kind.d, kind.m} - {None}:
        halves = random.normal(0, 0.05, (rows, blocks)).astype(np.float16)
        extreme = random.random(halves.shape) < 0.3
        halves[extreme] = random.choice(np.array(SCALES, np.float16), extreme.sum())
        raw[..., at : at + 2] = halves[..., None].view(np.uint8)
    return torch.from_numpy(raw.reshape(rows, -1))


@KINDS
def test_the_numbers_are_ggufs_own(number: int) -> None:
    kind = FORMATS[number]
    assert (kind.size, kind.nbytes) == GGML_QUANT_SIZES[GGMLQuantizationType(number)]
    for blocks in (1, 3):
        raw = random_blocks(kind, 37, blocks, seed=blocks)
        weight = BlockWeight(kind, parts_of(kind, raw), torch.float32)
        wanted = torch.from_numpy(dequantize(raw.numpy(), GGMLQuantizationType(number)))
        assert weight.shape == wanted.shape and weight.unpack(slice(None)).dtype == torch.float32
        assert torch.equal(weight.dense().view(torch.int32), wanted.view(torch.int32))
        for some in (torch.tensor([5, 0, 5, 36]), torch.tensor([]).long()):
            assert torch.equal(weight.rows(some), wanted[some])
        assert torch.equal(weight.rows(slice(3, 9)), wanted[3:9])


@KINDS
def test_its_bytes_are_about_the_files(number: int) -> None:
    kind = FORMATS[number]
    raw = random_blocks(kind, 8, 2)
    weight = BlockWeight(kind, parts_of(kind, raw), torch.float32)
    assert raw.numel() <= weight.nbytes <= 1.03 * raw.numel()
    assert not any(part.is_floating_point() for part in weight.parts.values())
