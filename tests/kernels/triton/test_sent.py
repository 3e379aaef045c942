"""The operations send tensors on a GPU to its kernels."""

import pytest
import torch
from torch import Tensor

from deltaw.kernels import logprobs as head
from deltaw.kernels import norm, rotary
from deltaw.kernels.weight import DenseWeight
from tests.kernels.triton.budget import DEVICE, assert_within_budget, randn, with_gradients
from tests.kernels.triton.test_rotary import angles


def test_norm_and_rotary_are_sent_to_the_gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tensor on a GPU would see, with the question where it lies answered for it."""
    asked: list[int] = []

    def on_gpu(x: Tensor, width: int = 1) -> bool:
        asked.append(width)
        return True

    monkeypatch.setattr(norm, "on_gpu", on_gpu)
    monkeypatch.setattr(rotary, "on_gpu", on_gpu)
    x, w, d = randn(2, 4, 16), randn(16), randn(2, 4, 16)
    fast = with_gradients(lambda x, w: norm.rms_norm(x, w, 1e-5, 1.0), 1)(x, w, d)
    assert_within_budget(fast, with_gradients(lambda x, w: norm.rms_norm_plain(x, w, 1e-5, 1.0), 1), x, w, d)
    calls = [
        with_gradients(lambda x, delta, w, call=call: torch.cat(call(x, delta, w, 1e-5, 1.0)), 2)
        for call in (norm.add_rms_norm, norm.add_rms_norm_plain)
    ]
    delta, both = randn(2, 4, 16), randn(4, 4, 16)
    assert_within_budget(calls[0](x, delta, w, both), calls[1], x, delta, w, both)
    alone = with_gradients(lambda x, w: torch.cat(norm.add_rms_norm(x, None, w, 1e-5, 1.0)), 1)
    plain = with_gradients(lambda x, w: torch.cat([x, norm.rms_norm_plain(x, w, 1e-5, 1.0)]), 1)
    assert_within_budget(alone(x, w, both), plain, x, w, both)
    x, d, (cos, sin) = randn(5, 2, 8), randn(5, 2, 8), angles(5, 8, torch.float32)
    fast = with_gradients(rotary.rotary, 1)(x, cos, sin, d)
    assert_within_budget(fast, with_gradients(rotary.rotary_plain, 1), x, cos, sin, d)
    heads, out = randn(5, 4, 8), randn(5, 32)
    back = rotary.turn_back(*heads.split([2, 1, 1], 1), cos, sin, out).clone()
    torch.testing.assert_close(rotary.turn_(out.unflatten(1, (-1, 8))[:, :3], cos, sin), heads[:, :3])
    assert torch.equal(back[:, 24:], heads[:, 3]) and not torch.equal(back, heads.flatten(1))
    assert asked == [16, 16, 16, 1, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_log_probabilities_are_sent_to_the_gpu_kernel(
    softcap: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks, rows without a label left out, for a gradient that differs by token."""
    monkeypatch.setattr(head, "on_gpu", lambda x: x.dtype != torch.float64)
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * dtype.itemsize * 300)
    hidden, weight, d = randn(11, 16, dtype=dtype), randn(300, 16, dtype=dtype), randn(9)
    labels = torch.randint(300, (11,)).to(DEVICE)
    labels[[0, 7]] = head.IGNORE
    fast, plain = (
        with_gradients(lambda h, w, call=call: call(h, DenseWeight(w), labels, scale=0.3, softcap=softcap).logp_K, 1)
        for call in (head.linear_logprobs, head.linear_logprobs_plain)
    )
    assert_within_budget(fast(hidden, weight, d), plain, hidden, weight, d)
