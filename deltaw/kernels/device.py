"""What a device's kernels accept: which tensors those in triton/, and the dtypes of half precision.

Float64 stays with PyTorch's own operations (truth in tests, and those kernels sum in float32), and so does a GPU
without triton (Windows builds of PyTorch come without it). Asked once per call, so the answer about triton is kept.
"""

import importlib.util
from functools import cache

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)  # precision: what matrix units and fused attention are made for
WIDEST = 16384  # features of a row that those kernels can hold


def on_gpu(x: Tensor, width: int = 1) -> bool:
    """Whether `deltaw.kernels.triton` is to be used for x, in rows of `width`."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32) and width <= WIDEST and _installed()


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
