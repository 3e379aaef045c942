"""Causal attention over documents laid end to end, on a GPU, through PyTorch's own kernels.

The same function as `packed_attention`, by one of two ways:

    flash    torch.nn.attention.varlen (FlashAttention over cumulative offsets): half precision, no padding, windows,
             shared key/value heads; nothing of T² is ever held. Plain causal calls may be done by another kernel
             that was raced against it (race.py)
    padded   scaled_dot_product_attention over [documents, longest], for what the first cannot do (float32, an older
             GPU, odd head sizes), where filling up costs little

Where neither applies (a soft cap, documents of very unlike lengths in float32) `applies` says no, and
`packed_attention` does the work by batched products, on a GPU as on a CPU.

PyTorch's function has grown: 2.10 has `is_causal` and neither scale nor window; 2.11 has both, and windows only; from
2.12 shared heads must be announced. Its signature is read, not its version. Nothing here waits for the GPU: offsets
stay there, and the longest document's length comes from the host, which knows it.

Rejected: FlexAttention (compiles a kernel per mask, seconds at start); cuDNN's attention over padded rows (its sizes
must be padded to like lengths first); flash-attn 2, the package (another build for every PyTorch and CUDA, of the
kernels that PyTorch has).

Letters: T tokens, H query heads, K key/value heads, E head size, S documents + 1, D documents, L the longest.
"""

import inspect
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen

from deltaw.kernels.device import HALF
from deltaw.kernels.flash import preferred

FILL = 1.25  # padded places per token, at most
AMPERE = (8, 0)  # FlashAttention-2 needs it


def applies(
    q_THE: Tensor,
    k_TKE: Tensor,
    documents: int,
    longest: int,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    continued: bool = False,
) -> bool:
    """Whether `varlen_attention` can do this call, and well. `continued`: documents may see more keys than they have
    queries."""
    way = _way(q_THE, k_TKE, documents, longest, scale, window, softcap)
    return way == "flash" if continued else way is not None


def varlen_attention(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    starts_S: Tensor,
    longest: int,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    seen: tuple[Tensor, int] | None = None,
) -> Tensor:
    """[T, H, E] in q's dtype, differentiable. `starts_S`: int32 offsets on q's device, the total last.

    `window` w: a token sees itself and the w − 1 before it. `seen`: the offsets of the keys and the most of one
    document, where they are more than its queries: the last query is then the last key's token. ValueError where
    `applies` says no.
    """
    keys_S, most = seen or (starts_S, longest)
    way = _way(q_THE, k_TKE, len(starts_S) - 1, most, scale, window, softcap)
    if way == "flash":
        window = _window(window, most)
        is_raced = window is None and seen is None and v_TKE.shape == k_TKE.shape
        if is_raced and (attend := preferred(q_THE, k_TKE)):
            return attend(q_THE, k_TKE, v_TKE, starts_S, longest, q_THE.shape[2] ** -0.5 if scale is None else scale)
        return _own(q_THE, k_TKE, v_TKE, (starts_S, longest), (keys_S, most), scale, window)
    if way == "padded" and seen is None:
        return padded_attention(q_THE, k_TKE, v_TKE, starts_S, longest, scale=scale)
    raise ValueError("no GPU attention for this call (soft cap, window in float32, or very unlike lengths)")


def own_attention(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, starts_S: Tensor, longest: int, scale: float, /
) -> Tensor:
    """The flash way by PyTorch's own kernel, whatever is preferred."""
    return _own(q_THE, k_TKE, v_TKE, (starts_S, longest), (starts_S, longest), scale, None)


def _own(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    queries: tuple[Tensor, int],
    keys: tuple[Tensor, int],
    scale: float | None,
    window: int | None,
) -> Tensor:
    """`queries`, `keys`: their offsets, and the most of one document."""
    extra = _keywords(_parameters(), q_THE, k_TKE, scale, window)
    assert extra is not None
    (starts_S, longest), (keys_S, most) = queries, keys
    out = varlen.varlen_attn(q_THE, k_TKE, v_TKE, starts_S, keys_S, longest, most, **extra)
    assert isinstance(out, Tensor)  # nothing else was asked for
    return out


def padded_attention(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, starts_S: Tensor, longest: int, *, scale: float | None = None
) -> Tensor:
    """The padded way. What fills a row up is copied from real tokens; causality hides it, and its rows are dropped."""
    T, shared = len(q_THE), q_THE.shape[1] // k_TKE.shape[1]
    starts_S = starts_S.long()
    at_DL = (starts_S[:-1, None] + torch.arange(longest, device=q_THE.device)).clamp_(max=T - 1)
    q_DHLE, k_DKLE, v_DKLE = (x[at_DL].transpose(1, 2) for x in (q_THE, k_TKE, v_TKE))
    if shared > 1:  # the memory-saving kernel has no shared heads of its own
        k_DKLE, v_DKLE = k_DKLE.repeat_interleave(shared, 1), v_DKLE.repeat_interleave(shared, 1)
    out_DHLE = F.scaled_dot_product_attention(q_DHLE, k_DKLE, v_DKLE, is_causal=True, scale=scale)
    token_T = torch.arange(T, device=q_THE.device)
    document_T = torch.bucketize(token_T, starts_S, right=True) - 1
    return out_DHLE.transpose(1, 2)[document_T, token_T - starts_S[document_T]]


def _way(
    q_THE: Tensor,
    k_TKE: Tensor,
    documents: int,
    longest: int,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> str | None:
    """Which of the two ways, or None."""
    if not q_THE.is_cuda or softcap is not None:
        return None
    window = _window(window, longest)
    size = q_THE.shape[2]
    fits = q_THE.dtype in HALF and size % 8 == 0 and size <= 256 and _has_flash(q_THE.device)
    if fits and _keywords(_parameters(), q_THE, k_TKE, scale, window) is not None:
        return "flash"
    return "padded" if window is None and documents * longest <= FILL * len(q_THE) else None


def _window(window: int | None, longest: int) -> int | None:
    """None where no document is long enough to notice."""
    return None if window is None or window >= longest else window


def _keywords(
    parameters: Mapping[str, Any], q_THE: Tensor, k_TKE: Tensor, scale: float | None, window: int | None
) -> dict[str, Any] | None:
    """What this PyTorch's varlen_attn wants beside the tensors, or None where it cannot do the call."""
    extra: dict[str, Any] = {}
    if "window_size" in parameters:  # (−1, 0) is plain causal; (w − 1, 0): so many before the token itself
        extra["window_size"] = (-1 if window is None else window - 1, 0)
    elif "is_causal" in parameters and window is None:
        extra["is_causal"] = True
    else:
        return None
    if scale is not None:
        if "scale" in parameters:
            extra["scale"] = scale
        elif not math.isclose(scale, q_THE.shape[2] ** -0.5):
            return None
    if "enable_gqa" in parameters:
        extra["enable_gqa"] = q_THE.shape[1] != k_TKE.shape[1]
    return extra


@cache
def _parameters() -> Mapping[str, Any]:
    return inspect.signature(varlen.varlen_attn).parameters


@cache
def _has_flash(device: torch.device) -> bool:
    built = torch.backends.cuda.is_flash_attention_available()
    return built and torch.version.hip is None and torch.cuda.get_device_capability(device) >= AMPERE
