"""Attention of one token per row over stored keys and values: the twin, truth, and rows of unlike lengths."""

import pytest
import torch
from torch import Tensor

from deltaw.kernels.attention import packed_attention_plain
from deltaw.kernels.decode import cached_attention, cached_attention_plain

LENGTHS = [5, 1, 9, 9]
H, K, E = 6, 2, 8


def inputs(dtype: torch.dtype, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, keys, values, bias; what no row has written is zero."""
    q_RHE = size * torch.randn(len(LENGTHS), H, E, dtype=torch.float64)
    k_RKLE, v_RKLE = torch.randn(2, len(LENGTHS), K, max(LENGTHS), E, dtype=torch.float64)
    hidden_RL = torch.arange(max(LENGTHS)) >= torch.tensor(LENGTHS)[:, None]
    bias_RL = torch.zeros(hidden_RL.shape, dtype=torch.float64).masked_fill(hidden_RL, -torch.inf)
    for x in (k_RKLE, v_RKLE):
        x.masked_fill_(hidden_RL[:, None, :, None], 0)
    return tuple(x.to(dtype) for x in (q_RHE, k_RKLE, v_RKLE, bias_RL))  # type: ignore[return-value]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("size", [0.1, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_within_the_plain_twins(dtype: torch.dtype, size: float, softcap: float | None) -> None:
    given = inputs(dtype, size)
    truth = cached_attention_plain(*(x.double() for x in given), scale=0.3, softcap=softcap)
    fast, plain = (f(*given, scale=0.3, softcap=softcap) for f in (cached_attention, cached_attention_plain))
    budget = (plain - truth).abs().max() + 2 * torch.finfo(dtype).eps * truth.abs().max()
    assert fast.dtype == dtype and (fast - truth).abs().max() <= budget


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_each_row_gets_what_the_last_token_of_its_document_gets(softcap: float | None) -> None:
    q_RHE, k_RKLE, v_RKLE, bias_RL = inputs(torch.float64)
    got = cached_attention(q_RHE, k_RKLE, v_RKLE, bias_RL, scale=0.3, softcap=softcap)
    for row, length in enumerate(LENGTHS):
        k_TKE, v_TKE = (x[row, :, :length].transpose(0, 1) for x in (k_RKLE, v_RKLE))
        q_THE = torch.zeros(length, H, E, dtype=torch.float64)
        q_THE[-1] = q_RHE[row]
        whole = packed_attention_plain(q_THE, k_TKE, v_TKE, [0, length], scale=0.3, softcap=softcap)
        torch.testing.assert_close(got[row], whole[-1])
