"""Attention of a run over what its sequence has stored: the twin, truth, and packed attention of the whole."""

import pytest
import torch

from deltaw.kernels.attention import packed_attention_plain
from deltaw.kernels.continued import continued_attention, continued_attention_plain
from deltaw.kernels.documents import CHUNK

H, K, E, L = 6, 2, 8, 2 * CHUNK + 9


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (90, 2.0), (None, 2.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_within_the_plain_twins(dtype: torch.dtype, window: int | None, softcap: float | None) -> None:
    given = [30 * torch.randn(CHUNK + 3, H, E), *torch.randn(2, K, L, E)]
    given = [x.to(dtype) for x in given]
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    truth = continued_attention_plain(*(x.double() for x in given), **options)  # type: ignore[arg-type]
    fast, plain = (f(*given, **options) for f in (continued_attention, continued_attention_plain))  # type: ignore[arg-type]
    budget = (plain - truth).abs().max() + 2 * torch.finfo(dtype).eps * truth.abs().max()
    assert fast.dtype == dtype and (fast - truth).abs().max() <= budget


@pytest.mark.parametrize("window", [None, 1, 5, 70, 500])
@pytest.mark.parametrize("run", [1, CHUNK, CHUNK + 1, L])
def test_a_run_gets_what_it_gets_in_the_whole(run: int, window: int | None) -> None:
    q_LHE = torch.randn(L, H, E, dtype=torch.float64)
    k_KLE, v_KLE = torch.randn(2, K, L, E, dtype=torch.float64)
    options = {"scale": 0.3, "window": window}
    whole = packed_attention_plain(q_LHE, k_KLE.transpose(0, 1), v_KLE.transpose(0, 1), [0, L], **options)  # type: ignore[arg-type]
    for f in (continued_attention, continued_attention_plain):
        torch.testing.assert_close(f(q_LHE[L - run :], k_KLE, v_KLE, **options), whole[L - run :])  # type: ignore[arg-type]
