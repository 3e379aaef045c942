"""Would it pay to merge, y = x (W + s B A)ᵀ once per step, and leave out the low-rank branch?

    python benchmarks/merged.py

One gate projection of SmolLM2-135M (1536 x 576), rank 16, a first update of 1e-5 .. 1e-3 of the weight: the share
of the update's effect that is lost, against float64, and the time of forward + ∂L/∂x, merging included.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.kernels.lora import lora_linear_plain

N, M, R, SCALE = 576, 1536, 16, 2.0


def milliseconds(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(15):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def beside(x: Tensor, w: Tensor, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    y = F.linear(x, w).addmm_(x @ a.T, b.T, alpha=SCALE)
    (g @ w).addmm_(g @ b, a, alpha=SCALE)
    return y


def merged(x: Tensor, w: Tensor, a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    both = w.addmm(b, a, alpha=SCALE)
    y = F.linear(x, both)
    g @ both
    return y


def lost(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> float:
    """Share of the update's effect on y that merging in this dtype loses; the base's own rounding is left out."""
    wide = [t.double() for t in (x, w, a, b)]
    effect = lora_linear_plain(wide[0], wide[1], None, *wide[2:], SCALE) - F.linear(*wide[:2])
    left = F.linear(wide[0], w.addmm(b, a, alpha=SCALE).double() - wide[1])
    return float((left - effect).norm() / effect.norm())


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        for T in (768, 2048):
            x, w, g = torch.randn(T, N).to(dtype), (0.05 * torch.randn(M, N)).to(dtype), torch.randn(T, M).to(dtype)
            a, b = torch.randn(R, N).to(dtype) / N**0.5, torch.randn(M, R).to(dtype) / R**0.5
            given = (x, w, a, b, g)
            times = [milliseconds(partial(call, *given)) for call in (beside, merged)]
            small = {size: (b * (size * 0.05 * N**0.5 / SCALE)).to(dtype) for size in (1e-5, 1e-4, 1e-3)}
            shares = [f"{size:.0e}: {100 * lost(x, w, a, part):.0f} %" for size, part in small.items()]
            what = f"{str(dtype)[6:]:8} {T} tokens: beside {times[0]:.2f} ms, merged {times[1]:.2f} ms"
            print(f"{what}; lost of an update of {', '.join(shares)}")


if __name__ == "__main__":
    main()
