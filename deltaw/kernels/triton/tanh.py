"""tanh and its slope, to the last digits of both."""

import triton
import triton.language as tl


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """(tanh x, 1 − tanh² x). Far from 0 from q = 1 − tanh |x| = 2e / (1 + e), e = exp(−2|x|), since 1 − t² = q (2 − q)
    keeps its digits where t is near 1; near 0, where 1 − q would lose them, Cephes's odd polynomial (tanhf)."""
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    q = tl.div_rn(2.0 * e, 1.0 + e)
    s = a * a
    p = (((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1) * s
    low = a + a * (s * (p - 3.33332819422e-1))
    near = a < 0.625
    t = tl.where(near, low, 1.0 - q)
    return tl.where(x < 0, -t, t), tl.where(near, 1.0 - low * low, q * (2.0 - q))
