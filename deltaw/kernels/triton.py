"""The GPU's versions of the memory-bound kernels, in Triton: each reads its inputs once and writes its outputs once.

    rms_norm_forward    y = x · r ∘ (offset + w),  r = (mean(x²) + ε)^−½
    rms_norm_backward   dx = r · (h − x · r² · mean(h ∘ x)),  h = dy ∘ (offset + w)
    rotary_turn         y₁ = x₁ ∘ cos − sign · x₂ ∘ sin,  y₂ = x₂ ∘ cos + sign · x₁ ∘ sin,  the rest of a head as it is
    gated_forward       inner = act(g) ∘ u
    gated_backward      inner again,  dg = d ∘ u ∘ act′(g),  du = d ∘ act(g)
    cross_entropy_      loss = logsumexp(z) − z[label] and, in the place of the logits, ∂loss/∂logits

The formulas are those of norm.py, rotary.py, lora.py and logprobs.py, which derive them and which stay the twins that
these are tested against. What a GPU adds is the cost of a pass: the gated MLP's backward in PyTorch's operations reads
or writes a [T, I] tensor fourteen times, here six. Everything is float32 inside and rounded once, on the way out.

Layout. Norm: a program takes whole rows, as many as fill a tile (rows of 64 come 64 at a time, one of 16384 alone); a
row is one block, so mean and result need no second pass. Rotation: one program per token, so that its angles are read
once for all heads. Gated MLP: flat. Cross-entropy: one program per row, in two passes over blocks of the vocabulary:
running maximum and sum (Milakov & Gimelshein 2018), then the gradient in place; at 262144 bf16 logits per row is 512
KiB, which the second pass should find in the L2 cache.

Rejected. A matrix product fused with the loss (Apple's cut cross-entropy): saves the chunk of logits but makes the
products twice, and chunks already bound the memory. Norm fused with the residual's addition: saves a read and a write
of five, but needs the decoder layer rewritten. libdevice's tanh: not in the interpreter that
tests these on a CPU. Autotuning: its search costs seconds per shape, and these kernels wait for memory. `/` where a
result's last bits count: a GPU makes it of an approximate reciprocal, off by up to two units in the last place, which
1 − tanh² hands on to the gradient whole; `div_rn` rounds once, and where a row has one divisor it is a factor.

Tested on a CPU with Triton's interpreter, compiled for an sm_90, and run on an H100 when one is at hand.

This is the only file that imports triton. Nothing in it is needed on a CPU; device.py says which tensors it takes.

Letters: T rows, D features, H heads, E head size, R entries that turn, I inner size, C rows of logits, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltaw.kernels.device import WIDEST

TILE = 4096  # elements that a program of the norm takes, in whole rows
FLAT = 1024
VOCABULARY = 8192  # logits at a time


def rms_norm_forward(x_TD: Tensor, w_D: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """(y [..., D] in x's dtype, r [..., 1] in float32)."""
    x, tile = _rows(x_TD), _tile(x_TD)
    y = torch.empty(x_TD.shape, dtype=x.dtype, device=x.device)
    r_T1 = torch.empty(*x_TD.shape[:-1], 1, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(len(x), tile["ROWS"]),)
    with torch.cuda.device_of(x):
        _rms_norm_forward[grid](x, w_D.contiguous(), y, r_T1, len(x), x.stride(0), eps, offset, D=x.shape[1], **tile)
    return y, r_T1


def rms_norm_backward(grad_TD: Tensor, x_TD: Tensor, w_D: Tensor, r_T1: Tensor, offset: float = 0.0) -> Tensor:
    """dx [..., D] in grad's dtype."""
    grad, x, tile = _rows(grad_TD), _rows(x_TD), _tile(x_TD)
    dx = torch.empty(grad_TD.shape, dtype=grad.dtype, device=grad.device)
    grid = (triton.cdiv(len(x), tile["ROWS"]),)
    pointers = (grad, x, w_D.contiguous(), r_T1.contiguous(), dx)
    with torch.cuda.device_of(x):
        _rms_norm_backward[grid](*pointers, len(x), grad.stride(0), x.stride(0), offset, D=x.shape[1], **tile)
    return dx


def rotary_turn(x_THE: Tensor, cos_TR: Tensor, sin_TR: Tensor, sign: int) -> Tensor:
    """[T, H, E] in x's dtype, turned by the angles (sign 1) or back (sign −1)."""
    (T, H, E), half = x_THE.shape, cos_TR.shape[1] // 2
    x, cos, sin = (_unit(part) for part in (x_THE, cos_TR, sin_TR))
    y = torch.empty(T, H, E, dtype=x.dtype, device=x.device)
    rest = E - 2 * half
    sizes = {"HEADS": _block(H), "PART": _block(half), "REST": _block(rest) if rest else 0}
    strides = (x.stride(0), x.stride(1), cos.stride(0), sin.stride(0))
    warps = min(max(sizes["HEADS"] * sizes["PART"] // 256, 1), 8)  # 8 entries, 16 bytes in bfloat16, a thread
    with torch.cuda.device_of(x):
        _rotary_turn[(T,)](x, cos, sin, y, *strides, SIGN=sign, H=H, E=E, HALF=half, **sizes, num_warps=warps)
    return y


def gated_forward(g_TI: Tensor, u_TI: Tensor, activation: str) -> Tensor:
    """act(g) ∘ u in g's dtype; `activation` is a key of lora.py's ACTIVATIONS."""
    g, u = g_TI.contiguous(), u_TI.contiguous()
    inner = torch.empty_like(g)
    with torch.cuda.device_of(g):
        _gated_forward[(triton.cdiv(g.numel(), FLAT),)](g, u, inner, g.numel(), ACT=activation, BLOCK=FLAT)
    return inner


def gated_backward(d_TI: Tensor, g_TI: Tensor, u_TI: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """(act(g) ∘ u, ∂L/∂g, ∂L/∂u) for d = ∂L/∂(act(g) ∘ u), all in g's dtype."""
    d, g, u = d_TI.contiguous(), g_TI.contiguous(), u_TI.contiguous()
    out = [torch.empty_like(g) for _ in range(3)]
    with torch.cuda.device_of(g):
        _gated_backward[(triton.cdiv(g.numel(), FLAT),)](d, g, u, *out, g.numel(), ACT=activation, BLOCK=FLAT)
    return out[0], out[1], out[2]


def cross_entropy_(z_CV: Tensor, labels_C: Tensor, scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """The losses in nats, [C] in float32; z, the head's raw product, becomes ∂(their sum)/∂z in its own dtype.

    The loss is taken of cap(scale · z). A label outside the vocabulary gives NaN.
    """
    if z_CV.stride(1) != 1:
        raise ValueError("the rows of z must be contiguous: it is overwritten")
    (C, V), labels = z_CV.shape, labels_C.contiguous()
    loss_C = torch.empty(C, dtype=torch.float32, device=z_CV.device)
    block = min(_block(V), VOCABULARY)
    cap, warps = 1.0 if softcap is None else softcap, 16 if block == VOCABULARY else 4
    options = {"CAPPED": softcap is not None, "BLOCK": block, "num_warps": warps}
    with torch.cuda.device_of(z_CV):
        _cross_entropy[(C,)](z_CV, labels, loss_C, z_CV.stride(0), V, scale, cap, **options)
    return loss_C


def _unit(x: Tensor) -> Tensor:
    """x itself where its last entries lie side by side, else a copy where they do."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor) -> Tensor:
    return _unit(x.reshape(-1, x.shape[-1]))


def _block(size: int) -> int:
    """The power of two that a block of `size` needs."""
    block: int = triton.next_power_of_2(size)
    return block


def _tile(x_TD: Tensor) -> dict[str, int]:
    """Rows, width and warps of one program of the norm."""
    size = x_TD.shape[-1]
    if size > WIDEST:
        raise ValueError(f"rows of {size} features: the kernel holds one in a block of at most {WIDEST}")
    block = _block(size)
    return {"ROWS": max(1, TILE // block), "BLOCK": block, "num_warps": 8 if block <= 8192 else 16}


@triton.jit
def _rms_norm_forward(
    x_at: tl.tensor,
    w_at: tl.tensor,
    y_at: tl.tensor,
    r_at: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    eps: tl.tensor,
    offset: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    seen = (row < rows)[:, None] & (col < D)[None, :]
    x = tl.load(x_at + row[:, None] * stride + col[None, :], mask=seen, other=0.0).to(tl.float32)
    gain = tl.load(w_at + col, mask=col < D, other=0.0).to(tl.float32) + offset
    r = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    tl.store(y_at + row[:, None] * D + col[None, :], x * r[:, None] * gain[None, :], mask=seen)
    tl.store(r_at + row, r, mask=row < rows)


@triton.jit
def _rms_norm_backward(
    grad_at: tl.tensor,
    x_at: tl.tensor,
    w_at: tl.tensor,
    r_at: tl.tensor,
    dx_at: tl.tensor,
    rows: tl.tensor,
    grad_stride: tl.tensor,
    x_stride: tl.tensor,
    offset: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    seen = (row < rows)[:, None] & (col < D)[None, :]
    x = tl.load(x_at + row[:, None] * x_stride + col[None, :], mask=seen, other=0.0).to(tl.float32)
    grad = tl.load(grad_at + row[:, None] * grad_stride + col[None, :], mask=seen, other=0.0).to(tl.float32)
    gain = tl.load(w_at + col, mask=col < D, other=0.0).to(tl.float32) + offset
    r = tl.load(r_at + row, mask=row < rows, other=0.0)
    h = grad * gain[None, :]
    mean = tl.sum(h * x, 1) / D
    dx = r[:, None] * (h - x * (r * r * mean)[:, None])
    tl.store(dx_at + row[:, None] * D + col[None, :], dx, mask=seen)


@triton.jit
def _rotary_turn(
    x_at: tl.tensor,
    cos_at: tl.tensor,
    sin_at: tl.tensor,
    y_at: tl.tensor,
    x_token: tl.tensor,
    x_head: tl.tensor,
    cos_token: tl.tensor,
    sin_token: tl.tensor,
    SIGN: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    PART: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, PART)[None, :]
    seen = (head < H) & (i < HALF)
    cos = tl.load(cos_at + token * cos_token + i, mask=i < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_at + token * sin_token + i, mask=i < HALF, other=0.0).to(tl.float32) * SIGN
    x_row = x_at + token * x_token + head * x_head
    y_row = y_at + (token * H + head) * E
    one = tl.load(x_row + i, mask=seen, other=0.0).to(tl.float32)
    two = tl.load(x_row + HALF + i, mask=seen, other=0.0).to(tl.float32)
    tl.store(y_row + i, one * cos - two * sin, mask=seen)
    tl.store(y_row + HALF + i, two * cos + one * sin, mask=seen)
    if REST > 0:
        j = 2 * HALF + tl.arange(0, REST)[None, :]
        inside = (head < H) & (j < E)
        tl.store(y_row + j, tl.load(x_row + j, mask=inside, other=0.0), mask=inside)


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
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


@triton.jit
def _act(g: tl.tensor, ACT: tl.constexpr) -> tl.tensor:
    """(act(g), act′(g)); what a caller does not use, the compiler drops."""
    if ACT == "silu":
        s = tl.sigmoid(g)
        value = g * s
        slope = s * (1.0 + g * (1.0 - s))
    elif ACT == "gelu":
        below = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        value = g * below
        slope = below + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    else:
        tl.static_assert(ACT == "gelu_tanh")
        t, bend = _tanh(0.7978845608028654 * g * (1.0 + 0.044715 * g * g))
        value = 0.5 * g * (1.0 + t)
        slope = 0.5 * (1.0 + t) + 0.5 * g * bend * 0.7978845608028654 * (1.0 + 0.134145 * g * g)
    return value, slope


@triton.jit
def _gated_forward(
    g_at: tl.tensor, u_at: tl.tensor, inner_at: tl.tensor, size: tl.tensor, ACT: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seen = i < size
    g = tl.load(g_at + i, mask=seen, other=0.0).to(tl.float32)
    u = tl.load(u_at + i, mask=seen, other=0.0).to(tl.float32)
    value, _ = _act(g, ACT)
    tl.store(inner_at + i, value * u, mask=seen)


@triton.jit
def _gated_backward(
    d_at: tl.tensor,
    g_at: tl.tensor,
    u_at: tl.tensor,
    inner_at: tl.tensor,
    dg_at: tl.tensor,
    du_at: tl.tensor,
    size: tl.tensor,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seen = i < size
    d = tl.load(d_at + i, mask=seen, other=0.0).to(tl.float32)
    g = tl.load(g_at + i, mask=seen, other=0.0).to(tl.float32)
    u = tl.load(u_at + i, mask=seen, other=0.0).to(tl.float32)
    value, slope = _act(g, ACT)
    tl.store(inner_at + i, value * u, mask=seen)
    tl.store(dg_at + i, d * u * slope, mask=seen)
    tl.store(du_at + i, d * value, mask=seen)


@triton.jit
def _cross_entropy(
    z_at: tl.tensor,
    labels_at: tl.tensor,
    loss_at: tl.tensor,
    stride: tl.tensor,
    V: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    z_row = z_at + row * stride
    label = tl.load(labels_at + row)
    known = (label >= 0) & (label < V)
    at_label = scale * tl.load(z_row + label, mask=known, other=0.0).to(tl.float32)
    if CAPPED:
        at_label = cap * _tanh(tl.div_rn(at_label, cap))[0]
    # Finite, so that a block of −∞ does not make ∞ − ∞.
    top = tl.full((), -3.0e38, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z = scale * tl.load(z_row + col, mask=col < V, other=0.0).to(tl.float32)
        if CAPPED:
            z = cap * _tanh(tl.div_rn(z, cap))[0]
        z = tl.where(col < V, z, -float("inf"))
        higher = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
        top = higher
    loss = tl.log(total) + (top - at_label)  # large ones cancel before anything is rounded to their size
    tl.store(loss_at + row, tl.where(known, loss, float("nan")))
    share = tl.div_rn(1.0, total)
    # Every warp must have read the label's logit before any overwrites it.
    tl.debug_barrier()
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z = scale * tl.load(z_row + col, mask=col < V, other=0.0).to(tl.float32)
        slope = scale
        if CAPPED:
            t, bend = _tanh(tl.div_rn(z, cap))
            z = cap * t
            slope = scale * bend
        d = slope * (tl.exp(z - top) * share - tl.where(col == label, 1.0, 0.0))
        tl.store(z_row + col, d, mask=col < V)
