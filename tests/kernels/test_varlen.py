"""varlen_attention: which way is taken, what PyTorch's function is told, and the padded way against the plain twin.

FlashAttention itself runs on a GPU only; here a stand-in with its arguments takes its place.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaw.kernels import varlen as kernel
from deltaw.kernels.attention import packed_attention_plain
from deltaw.kernels.varlen import applies, padded_attention, varlen_attention

H, K, E = 4, 2, 8
TORCH_2_10 = {"is_causal": None, "return_aux": None}
TORCH_2_11 = {"return_aux": None, "scale": None, "window_size": None}
TORCH_2_13 = {**TORCH_2_11, "enable_gqa": None}


def starts_of(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def qkv(total: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(total, heads, E, dtype=torch.float64, requires_grad=True) for heads in (H, K, K))


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6), scale=st.sampled_from([None, 0.2]))
def test_the_padded_way_equals_the_plain_twin(lengths: list[int], scale: float | None) -> None:
    starts = starts_of(lengths)
    inputs, grad = qkv(starts[-1]), torch.randn(starts[-1], H, E, dtype=torch.float64)
    fast = padded_attention(*inputs, torch.tensor(starts, dtype=torch.int32), max(lengths), scale=scale)
    plain = packed_attention_plain(*inputs, starts, scale=scale)
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-12)
    pairs = zip(torch.autograd.grad(fast, inputs, grad), torch.autograd.grad(plain, inputs, grad), strict=True)
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


def on_gpu(dtype: torch.dtype = torch.bfloat16, size: int = 64, heads: int = H) -> Any:
    """As much of a GPU's tensor as the choice looks at: 100 tokens."""
    fake = SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda", 0), shape=(100, heads, size))
    return type("Fake", (SimpleNamespace,), {"__len__": lambda self: 100})(**vars(fake))


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_has_flash", lambda device: True)
    monkeypatch.setattr(kernel, "_parameters", lambda: TORCH_2_13)


@pytest.mark.parametrize(
    ("tensor", "documents", "longest", "options", "way"),
    [
        ({}, 9, 60, {}, "flash"),
        ({}, 9, 60, {"window": 7, "scale": 0.1}, "flash"),
        ({"dtype": torch.float16, "size": 256}, 9, 60, {}, "flash"),
        ({}, 2, 50, {"softcap": 50.0}, None),
        ({"dtype": torch.float32}, 2, 50, {}, "padded"),
        ({"dtype": torch.float32}, 2, 63, {}, None),  # 126 places for 100 tokens
        ({"dtype": torch.float32}, 2, 50, {"window": 49}, None),
        ({"dtype": torch.float32}, 2, 50, {"window": 50}, "padded"),  # no document is that long
        ({"size": 512}, 2, 50, {}, "padded"),
        ({"size": 60}, 9, 60, {}, None),
    ],
)
def test_the_way(flash: None, tensor: dict, documents: int, longest: int, options: dict, way: str | None) -> None:
    q, k = on_gpu(**tensor), on_gpu(**tensor, heads=K)
    every = {"scale": None, "window": None, "softcap": None, **options}
    assert kernel._way(q, k, documents, longest, **every) == way
    assert applies(q, k, documents, longest, **options) == (way is not None)


def test_an_older_gpu_takes_the_padded_way(flash: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_has_flash", lambda device: False)
    assert kernel._way(on_gpu(), on_gpu(), 2, 50, None, None, None) == "padded"


def test_a_cpu_has_neither() -> None:
    q = torch.zeros(100, H, 64, dtype=torch.bfloat16)
    assert not applies(q, q, 1, 100)
    with pytest.raises(ValueError, match="no GPU attention"):
        varlen_attention(q, q, q, torch.tensor([0, 100], dtype=torch.int32), 100)


@pytest.mark.parametrize(
    ("parameters", "scale", "window", "wanted"),
    [
        (TORCH_2_13, None, None, {"window_size": (-1, 0), "enable_gqa": True}),
        (TORCH_2_13, 0.3, 5, {"window_size": (4, 0), "enable_gqa": True, "scale": 0.3}),
        (TORCH_2_11, 0.3, 1, {"window_size": (0, 0), "scale": 0.3}),
        (TORCH_2_10, None, None, {"is_causal": True}),
        (TORCH_2_10, E**-0.5, None, {"is_causal": True}),
        (TORCH_2_10, 0.3, None, None),
        (TORCH_2_10, None, 5, None),
        ({}, None, None, None),
    ],
)
def test_keywords_of_each_pytorch(parameters: dict, scale: float | None, window: int | None, wanted: Any) -> None:
    q, k, _ = qkv(3)
    assert kernel._keywords(parameters, q, k, scale, window) == wanted


def test_this_pytorchs_function_is_one_of_those() -> None:
    q, k, _ = qkv(3)
    assert kernel._keywords(kernel._parameters(), q, k, None, None) is not None


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"window": 99}, {"window": 1, "scale": 0.2}])
def test_what_flash_attention_is_told(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in computes what PyTorch documents for these arguments."""

    def fake(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32 and max_q == max_k == 9
        assert enable_gqa and window_size[1] == 0
        window = None if window_size[0] == -1 else window_size[0] + 1
        return packed_attention_plain(q, k, v, cu_seq_q.tolist(), scale=scale, window=window)

    monkeypatch.setattr(kernel, "_way", lambda *arguments: "flash")
    monkeypatch.setattr(kernel, "_parameters", lambda: TORCH_2_13)
    monkeypatch.setattr(kernel.varlen, "varlen_attn", fake)
    starts = starts_of([9, 3, 7])
    inputs = qkv(19)
    got = varlen_attention(*inputs, torch.tensor(starts, dtype=torch.int32), 9, **options)
    torch.testing.assert_close(got, packed_attention_plain(*inputs, starts, **options))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention runs on a GPU only")
@pytest.mark.parametrize("options", [{}, {"window": 20}, {"scale": 0.2}])
def test_error_on_a_gpu_is_within_the_plain_twins(options: dict) -> None:
    starts = starts_of([130, 7, 300])
    inputs = [torch.randn(starts[-1], heads, 64, device="cuda") for heads in (H, K, K)]
    grad = torch.randn(starts[-1], H, 64, device="cuda").bfloat16()

    def run(call, values):
        leaves = [v.detach().requires_grad_() for v in values]
        out = call(*leaves)
        return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    half = [x.bfloat16() for x in inputs]
    truth = run(lambda *x: packed_attention_plain(*x, starts, **options), [x.double() for x in half])
    plain = run(lambda *x: packed_attention_plain(*x, starts, **options), half)
    offsets = torch.tensor(starts, dtype=torch.int32, device="cuda")
    fast = run(lambda *x: varlen_attention(*x, offsets, 300, **options), half)
    for f, p, t in zip(fast, plain, truth, strict=True):
        rounding = torch.finfo(torch.bfloat16).eps * t.abs().max()
        assert (f - t).abs().max() <= (p - t).abs().max() + rounding
