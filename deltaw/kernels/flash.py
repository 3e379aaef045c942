"""Kernels of causal attention over packed documents, by name: PyTorch's own, and those of packages that are there.

    FlashAttention-2   PyTorch's, on every GPU since Ampere
    FlashAttention-3   the module flash_attn_interface, which is built for Hopper
    FlashAttention-4   the package flash-attn-4, in Python: it compiles its kernels when they are first called, for
                       Hopper, Blackwell or later, and keeps them on disk

Each is a function of the same arguments (`Attend`), differentiable, and may be recorded in a CUDA graph. Which one is
the fastest depends on the chip, the release and the model's heads, so nobody is trusted: race.py tries them on the
model's own shapes and `prefer`s one for the calls that are like those. All other calls are PyTorch's.

The packages are called by the functions they are made to be called by. Rejected: PyTorch's own switch
(`torch.nn.attention.activate_flash_attention_impl`). It puts a package's kernels below every attention of the process,
transformers' too, and it calls FlashAttention-4 by internal functions: PyTorch 2.11 to 2.13 expect two results of them,
of which 4.0.0b20 returns four and 4.0.0b36 five.

Letters: T tokens, J keys, H query heads, K key/value heads, E head size, S documents + 1.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

OWN = "FlashAttention-2"  # PyTorch's


class Heads(NamedTuple):
    """A model's attention, as far as kernels are made for it."""

    query: int
    shared: int  # key/value heads
    size: int
    dtype: torch.dtype

    @staticmethod
    def of(q_THE: Tensor, k_TKE: Tensor) -> "Heads":
        return Heads(q_THE.shape[1], k_TKE.shape[1], q_THE.shape[2], q_THE.dtype)


class Attend(Protocol):
    def __call__(
        self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, starts_S: Tensor, longest: int, scale: float, /
    ) -> Tensor:
        """[T, H, E]: causal within each document, of which none has more than `longest` tokens and some may be empty.
        `starts_S`: int32 offsets on q's device, the total last."""


Offer = Callable[[], Attend | None]  # None: it isn't installed, or isn't made for this chip

_preferred: dict[Heads, Attend] = {}


def preferred(q_THE: Tensor, k_TKE: Tensor) -> Attend | None:
    """What calls with these heads are done by; None for PyTorch's own."""
    return _preferred.get(Heads.of(q_THE, k_TKE)) if _preferred else None


def prefer(heads: Heads, attend: Attend | None) -> None:
    """From now on, in this process. None: PyTorch's own."""
    _preferred.pop(heads, None)
    if attend is not None:
        _preferred[heads] = attend


def offers(device: torch.device, kept: Path) -> Mapping[str, Offer]:
    """The kernels that packages may offer on `device`, by name. `kept`: the folder for kernels that are compiled."""
    major, _ = torch.cuda.get_device_capability(device)
    return {
        "FlashAttention-3": lambda: _flash_attention_3() if major == 9 else None,
        "FlashAttention-4": lambda: _flash_attention_4(kept) if major >= 9 else None,
    }


def _flash_attention_3() -> Attend | None:
    try:
        from flash_attn_interface import flash_attn_varlen_func
    except ModuleNotFoundError as missing:
        if missing.name == "flash_attn_interface":
            return None
        raise  # it is there, but something that it needs isn't
    return _of_package(flash_attn_varlen_func)


def _flash_attention_4(kept: Path) -> Attend | None:
    # Read when the package is imported: without it every process would compile its kernels again, and they are code,
    # so they aren't kept where it would keep them, in a folder that all users of a machine may write to.
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(kept))
    try:
        from flash_attn.cute import flash_attn_varlen_func
    except ModuleNotFoundError as missing:
        if missing.name in ("flash_attn", "flash_attn.cute"):
            return None
        raise
    return _of_package(flash_attn_varlen_func)


def _of_package(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> Attend:
    """`flash_attn_varlen_func`, whose arguments are called alike in both packages."""

    def attend(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, starts_S: Tensor, longest: int, scale: float, /) -> Tensor:
        out = function(
            q_THE,
            k_TKE,
            v_TKE,
            cu_seqlens_q=starts_S,
            cu_seqlens_k=starts_S,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=scale,
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return out[0] if isinstance(out, tuple) else out

    return attend
