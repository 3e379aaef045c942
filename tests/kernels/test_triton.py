"""The GPU kernels, run by Triton's interpreter on a CPU (on a GPU with TRITON_INTERPRET=0) and compiled for an sm_90.

The budget is |fast − truth| ≤ |plain − truth| + one rounding, truth being the plain twin in float64. The interpreter
cuts a float32 off to bfloat16 where a GPU rounds it, which is less than that one rounding.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="the GPU kernels need triton")

import triton
import triton.language as tl

from deltaw.kernels import logprobs as head
from deltaw.kernels import norm, rotary
from deltaw.kernels import triton as gpu
from deltaw.kernels.logprobs import capped
from deltaw.kernels.lora import ACTIVATIONS
from deltaw.kernels.weight import DenseWeight

DEVICE = "cuda" if torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] == "0" else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Values = Sequence[Tensor]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).to(DEVICE)


def assert_within_budget(fast: Values, plain: Callable[..., Values], *inputs: Tensor) -> None:
    """`plain` is run twice: in the inputs' dtype and, for truth, in float64."""
    truth = plain(*(x.double() if x.is_floating_point() else x for x in inputs))
    for f, p, t in zip(fast, plain(*inputs), truth, strict=True):
        assert f.shape == t.shape and bool(f.isfinite().all())
        rounding = torch.finfo(f.dtype).eps * t.abs().max()
        assert (f.double() - t).abs().max() <= (p.double() - t).abs().max() + rounding


def with_gradients(call: Callable[..., Tensor], wanted: int) -> Callable[..., Values]:
    """(inputs..., d) -> the result and the gradients of the first `wanted` inputs for d = ∂L/∂result."""

    def run(*inputs: Tensor) -> Values:
        *values, d = inputs
        leaves = [v.detach().requires_grad_(i < wanted) for i, v in enumerate(values)]
        y = call(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves[:wanted], d.to(y.dtype))]

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 5, 64, 576])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(size: int, offset: float, dtype: torch.dtype) -> None:
    x, w, d = randn(3, 29, size, dtype=dtype), randn(size, dtype=dtype), randn(3, 29, size, dtype=dtype)
    y, r = gpu.rms_norm_forward(x, w, 1e-5, offset)
    dx = gpu.rms_norm_backward(d, x, w, r, offset)
    assert (y.dtype, r.dtype, dx.dtype, r.shape) == (dtype, torch.float32, dtype, (3, 29, 1))
    assert_within_budget([y, dx], with_gradients(lambda x, w: norm.rms_norm_plain(x, w, 1e-5, offset), 1), x, w, d)


def test_rms_norm_takes_the_widest_row_and_refuses_a_wider_one() -> None:
    x = randn(2, gpu.WIDEST)
    w = torch.ones(gpu.WIDEST, device=DEVICE)
    y, _ = gpu.rms_norm_forward(x, w, 1e-5)
    torch.testing.assert_close(y, norm.rms_norm_plain(x, w, 1e-5))
    with pytest.raises(ValueError, match="at most 16384"):
        gpu.rms_norm_forward(randn(1, gpu.WIDEST + 1), randn(gpu.WIDEST + 1), 1e-5)


def test_rms_norm_of_views() -> None:
    """A part of wider rows, and a gradient that is one number many times over."""
    x, w = randn(6, 40)[:, 8:24], randn(16)
    assert torch.equal(gpu.rms_norm_forward(x, w, 1e-5)[0], gpu.rms_norm_forward(x.contiguous(), w, 1e-5)[0])
    _, r = gpu.rms_norm_forward(x, w, 1e-5)
    one = torch.ones(1, device=DEVICE).expand(6, 16)
    assert torch.equal(gpu.rms_norm_backward(one, x, w, r), gpu.rms_norm_backward(one.contiguous(), x, w, r))


def angles(tokens: int, entries: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    half = torch.rand(tokens, entries // 2).repeat(1, 2) * 6
    return half.cos().to(dtype).to(DEVICE), half.sin().to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size", "entries"), [(3, 8, 8), (4, 10, 4), (1, 6, 6), (9, 64, 64)])
def test_rotary(heads: int, size: int, entries: int, dtype: torch.dtype) -> None:
    x, d, (cos, sin) = (
        randn(13, heads, size, dtype=dtype),
        randn(13, heads, size, dtype=dtype),
        angles(13, entries, dtype),
    )
    y, dx = gpu.rotary_turn(x, cos, sin, 1), gpu.rotary_turn(d, cos, sin, -1)
    assert y.dtype == dx.dtype == dtype
    assert_within_budget([y, dx], with_gradients(rotary.rotary_plain, 1), x, cos, sin, d)


def test_rotary_of_a_view() -> None:
    """Queries as a part of q, k, v side by side, and heads before tokens."""
    cos, sin = angles(5, 8, torch.float32)
    for x in (randn(5, 6, 8)[:, 2:4], randn(3, 5, 8).transpose(0, 1), randn(5, 8, 3).transpose(1, 2)):
        assert torch.equal(gpu.rotary_turn(x, cos, sin, 1), gpu.rotary_turn(x.contiguous(), cos, sin, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated(activation: str, dtype: torch.dtype) -> None:
    g, u, d = (randn(37, 61, dtype=dtype) * 3 for _ in range(3))
    plain = with_gradients(lambda g, u: ACTIVATIONS[activation].forward(g) * u, 2)
    inner, dg, du = gpu.gated_backward(d, g, u, activation)
    assert_within_budget([inner, dg, du], plain, g, u, d)
    # Not compared with each other: a GPU's compiler may contract the same formula otherwise in two kernels.
    assert_within_budget([gpu.gated_forward(g, u, activation), dg, du], plain, g, u, d)


@pytest.mark.filterwarnings("ignore:overflow")  # the interpreter's exp; a GPU gives infinity without a word
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_far_out(activation: str) -> None:
    """Where exp and erf run to their ends: no NaN, and the slope is 0 or 1."""
    g = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4]], device=DEVICE)
    one = torch.ones_like(g)
    inner, dg, _ = gpu.gated_backward(one, g, one, activation)
    torch.testing.assert_close(inner, g.clamp(min=0))
    torch.testing.assert_close(dg, torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]], device=DEVICE))


@triton.jit
def _tanh_of(x_at, t_at, slope_at, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    t, slope = gpu._tanh(tl.load(x_at + i))
    tl.store(t_at + i, t)
    tl.store(slope_at + i, slope)


def test_tanh_and_its_slope_keep_their_digits_from_tiny_to_saturated() -> None:
    """tanh to 4 units in the last place, near 0, too; 1 − tanh², which vanishes far out, to 3e-6 of itself."""
    x = torch.cat([torch.logspace(-12, 1.2, 2048), -torch.logspace(-12, 1.2, 2048)]).to(DEVICE)
    t, slope = torch.empty_like(x), torch.empty_like(x)
    _tanh_of[(1,)](x, t, slope, BLOCK=4096)
    truth = x.double().tanh()
    bend = x.double().cosh() ** -2
    eps = torch.finfo(torch.float32).eps
    assert ((t - truth).abs() <= 4 * eps * truth.abs()).all()
    assert ((slope - bend).abs() <= 3e-6 * bend).all()


def cross_entropy(scale: float, softcap: float | None) -> Callable[..., Values]:
    def run(z: Tensor, labels: Tensor) -> Values:
        leaf = z.detach().requires_grad_()
        wide = torch.promote_types(z.dtype, torch.float32)
        losses = F.cross_entropy(capped(scale * leaf.to(wide), softcap), labels, reduction="none")
        return [losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]]

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [7, 300, 3 * gpu.VOCABULARY + 5])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 2.0), (0.3, 2.0)])
def test_cross_entropy(size: int, scale: float, softcap: float | None, dtype: torch.dtype) -> None:
    z, labels = randn(5, size, dtype=dtype) * 4, torch.randint(size, (5,)).to(DEVICE)
    d = z.clone()
    losses = gpu.cross_entropy_(d, labels, scale, softcap)
    assert (losses.dtype, d.dtype) == (torch.float32, dtype)
    assert_within_budget([losses, d], cross_entropy(scale, softcap), z, labels)


def test_cross_entropy_of_hard_rows() -> None:
    """Logits a thousand apart, and words ruled out by −∞, also for a whole block."""
    z = randn(3, gpu.VOCABULARY + 50)
    z[0] *= 1000
    z[1, 1:] = -torch.inf
    z[2, : gpu.VOCABULARY] = -torch.inf
    labels = torch.tensor([int(z[0].argmin()), 0, gpu.VOCABULARY + 1], device=DEVICE)
    d = z.clone()
    losses = gpu.cross_entropy_(d, labels)
    assert_within_budget([losses, d], cross_entropy(1.0, None), z, labels)


def test_cross_entropy_of_a_label_outside_is_not_a_number() -> None:
    losses = gpu.cross_entropy_(randn(3, 10), torch.tensor([10, -1, 4], device=DEVICE))
    assert losses.isnan().tolist() == [True, True, False]


def test_cross_entropy_writes_its_own_rows_only() -> None:
    whole = randn(4, 40)
    before = whole.clone()
    gpu.cross_entropy_(whole[:, 5:30], torch.zeros(4, dtype=torch.long, device=DEVICE))
    assert torch.equal(whole[:, :5], before[:, :5]) and torch.equal(whole[:, 30:], before[:, 30:])
    with pytest.raises(ValueError, match="contiguous"):
        gpu.cross_entropy_(randn(10, 3).T, torch.zeros(3, dtype=torch.long))


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
    x, d, (cos, sin) = randn(5, 2, 8), randn(5, 2, 8), angles(5, 8, torch.float32)
    fast = with_gradients(rotary.rotary, 1)(x, cos, sin, d)
    assert_within_budget(fast, with_gradients(rotary.rotary_plain, 1), x, cos, sin, d)
    assert asked == [16, 1, 1]


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


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from deltaw.kernels import triton as gpu

SCALARS = {name: "i32" for name in ("rows", "stride", "grad_stride", "x_stride", "x_token", "x_head", "cos_token",
                                    "sin_token", "size", "V")}
SCALARS |= {name: "fp32" for name in ("eps", "offset", "scale", "cap")}
POINTERS = {"r_at": "*fp32", "loss_at": "*fp32", "labels_at": "*i64"}

def build(kernel, warps, **fixed):
    names = kernel.arg_names
    types = {n: "constexpr" if n in fixed else SCALARS.get(n) or POINTERS.get(n, "*bf16") for n in names}
    even = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types[n] == "i32" or types[n][0] == "*"}
    source = ASTSource(kernel, types, {(names.index(n),): value for n, value in fixed.items()}, even)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    ptx = made.asm["ptx"]
    wide = "ld.global.v4" in ptx and "st.global.v4" in ptx
    print(kernel.__name__, "inexact" if "div.full" in ptx or "div.approx" in ptx else "exact", "v4" if wide else "-")

for size in (64, 2048, 16384):
    block = triton.next_power_of_2(size)
    fixed = dict(D=size, BLOCK=block, ROWS=max(1, gpu.TILE // block))
    build(gpu._rms_norm_forward, 16 if size > 8192 else 8, **fixed)
    build(gpu._rms_norm_backward, 16 if size > 8192 else 8, **fixed)
build(gpu._rotary_turn, 8, SIGN=-1, H=32, E=128, HALF=64, HEADS=32, PART=64, REST=0)
build(gpu._rotary_turn, 2, SIGN=1, H=9, E=80, HALF=32, HEADS=16, PART=32, REST=16)
for activation in ("silu", "gelu", "gelu_tanh"):
    build(gpu._gated_forward, 4, ACT=activation, BLOCK=gpu.FLAT)
    build(gpu._gated_backward, 4, ACT=activation, BLOCK=gpu.FLAT)
for capped in (False, True):
    build(gpu._cross_entropy, 16, CAPPED=capped, BLOCK=gpu.VOCABULARY)
"""


def test_every_kernel_compiles_for_hopper_and_moves_16_bytes_at_a_time(tmp_path) -> None:
    """The interpreter takes Python that the compiler does not; a GPU is not needed to ask the compiler. Nor to see
    which division it takes: the approximate one put the cross-entropy's gradient beyond its budget."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 16
    assert not [line for line in done.stdout.splitlines() if not line.endswith("v4")]
    assert done.stdout.count("_cross_entropy exact") == 2
