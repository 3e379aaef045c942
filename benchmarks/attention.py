"""Attention over packed documents on this machine: packed_attention against scaled_dot_product_attention.

    python benchmarks/attention.py

Forward + backward in milliseconds (median of 15), bf16, SmolLM2-135M's heads: 9 query, 3 key/value, of 64. SDPA gets
documents of one length as a batch, the best case for it.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.kernels.attention import packed_attention
from deltaw.kernels.documents import Documents

H, K, E = 9, 3, 64
SHAPES = [(80, 25), (32, 64), (8, 256), (4, 512), (1, 2048)]  # documents, tokens each


def milliseconds(call: Callable[[], object], rounds: int = 15) -> float:
    """Median time of a call, after a warm-up."""
    call()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]


def main() -> None:
    print("documents    SDPA, heads expanded    SDPA, enable_gqa    packed_attention")
    for docs, length in SHAPES:
        q, k, v = leaves((docs, H, length, E), (docs, K, length, E), (docs, K, length, E))
        grad = torch.randn(docs, H, length, E).bfloat16()

        def expanded(q: Tensor = q, k: Tensor = k, v: Tensor = v, grad: Tensor = grad) -> object:
            wide = (x.repeat_interleave(H // K, 1) for x in (k, v))
            out = F.scaled_dot_product_attention(q, *wide, is_causal=True)
            return torch.autograd.grad(out, (q, k, v), grad)

        def grouped(q: Tensor = q, k: Tensor = k, v: Tensor = v, grad: Tensor = grad) -> object:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return torch.autograd.grad(out, (q, k, v), grad)

        total = docs * length
        packed_qkv = leaves((total, H, E), (total, K, E), (total, K, E))
        documents = Documents([length * i for i in range(docs + 1)])
        packed_grad = torch.randn(total, H, E).bfloat16()

        def packed(
            qkv: list[Tensor] = packed_qkv, documents: Documents = documents, grad: Tensor = packed_grad
        ) -> object:
            return torch.autograd.grad(packed_attention(*qkv, documents), qkv, grad)

        row = [milliseconds(call) for call in (expanded, grouped, packed)]
        print(f"{f'{docs} x {length}':10} {row[0]:17.1f} ms {row[1]:18.1f} ms {row[2]:16.1f} ms")


if __name__ == "__main__":
    main()
