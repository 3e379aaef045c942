"""docs/math.md: its snippets print what it says they print, and its statements hold.

What other files test already (the algebra of LowRank, gradcheck, packing, exact accumulation) is left to them.
"""

import contextlib
import io
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deltaw.adapter.init import fresh_factors
from deltaw.config import AdapterSpec
from deltaw.factors import LowRank
from deltaw.kernels.attention import packed_attention
from deltaw.kernels.documents import Documents
from deltaw.kernels.lora import lora_linear
from deltaw.linalg.rank import full_rank_factorisation

PAGE = Path(__file__).parents[1] / "docs" / "math.md"
BLOCK = re.compile(r"^```python\n(.*?)^```\n\s*^```text\n(.*?)^```$", re.M | re.S)
SHAPES = [(4096, 4096), (14336, 4096), (1024, 4096), (49152, 576), (7, 5), (1, 9)]


def test_every_snippet_prints_what_the_page_says() -> None:
    """In order and in one namespace, as a reader would type them. A failure's line number is the page's."""
    page = PAGE.read_text()
    blocks = list(BLOCK.finditer(page))
    assert len(blocks) == page.count("```python") >= 6, "a python block lacks its text block"
    names: dict[str, Any] = {}
    for block in blocks:
        line = page.count("\n", 0, block.start(1))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + block[1], str(PAGE), "exec"), names)
        assert printed.getvalue() == block[2], f"{PAGE.name}, the block at line {line}"


def test_the_page_renders_on_github() -> None:
    """Fences and dollars are paired; Markdown eats a backslash before punctuation inside $...$ (not in ```math)."""
    prose = re.sub(r"^```.*?^```$", "", PAGE.read_text(), flags=re.M | re.S)
    assert "```" not in prose
    for line in prose.splitlines():
        assert line.count("$") % 2 == 0, line
        for inline in re.findall(r"\$([^$]*)\$", line):
            assert not re.search(r"\\[^A-Za-z]|[*<]", inline), inline


def problem(t: int = 6, m: int = 5, n: int = 7, r: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w, a, b = (torch.randn(*shape, dtype=torch.float64) for shape in ((t, n), (m, n), (r, n), (m, r)))
    return x.requires_grad_(), w, a.requires_grad_(), b.requires_grad_()


@pytest.mark.parametrize("scale", [1.0, 0.5, -2.0])
def test_gradient_formulas_are_autograds(scale: float) -> None:
    """Section 5, in float64, for a loss that isn't linear in y; and the same through the full gradient F = Gᵀ x."""
    x, w, a, b = problem()
    w.requires_grad_()
    y = x @ w.T + scale * (x @ a.T) @ b.T
    loss = torch.logsumexp(y, 1).sum() + (y**3).mean()
    g, dw, da, db, dx = torch.autograd.grad(loss, (y, w, a, b, x))
    torch.testing.assert_close(db, scale * g.T @ (x @ a.T))
    torch.testing.assert_close(da, scale * (g @ b).T @ x)
    torch.testing.assert_close(dx, g @ w + scale * (g @ b) @ a)
    torch.testing.assert_close(dw, g.T @ x)
    torch.testing.assert_close(db, scale * dw @ a.T)
    torch.testing.assert_close(da, scale * b.T @ dw)


def test_first_step_moves_b_alone_and_two_zeros_never_move() -> None:
    x, w, _, _ = problem()
    a, b = (factor.double().requires_grad_() for factor in fresh_factors(3, 5, 7, torch.Generator().manual_seed(0)))
    da, db = torch.autograd.grad(lora_linear(x, w, None, a, b, 0.5).exp().sum(), (a, b))
    assert not da.any()
    assert db.abs().min() > 0
    dead = torch.zeros_like(a, requires_grad=True)
    da, db = torch.autograd.grad(lora_linear(x, w, None, dead, b, 0.5).exp().sum(), (dead, b))
    assert not da.any()
    assert not db.any()


def test_an_update_trained_from_zero_is_full_fine_tuning() -> None:
    """Section 3: ∂L/∂ΔW = ∂L/∂W, so Adam ends at the same W'."""
    x, start, _, _ = problem()
    x = x.detach()
    w, delta = start.clone().requires_grad_(), torch.zeros_like(start).requires_grad_()
    for trained, weight in ((w, lambda: w), (delta, lambda: start + delta)):
        optimizer = torch.optim.Adam([trained], lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            (x @ weight().T).exp().sum().backward()
            optimizer.step()
    torch.testing.assert_close(start + delta, w)


def test_notation_map() -> None:
    """Lecture notes' ΔW = A Bᵀ: their A is our B, their B is our Aᵀ; rows here are columns in the paper."""
    theirs_a, theirs_b = torch.randn(9, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    ours = LowRank(a_RN=theirs_b.T, b_MR=theirs_a)
    torch.testing.assert_close(ours.dense(), theirs_a @ theirs_b.T)
    column = torch.randn(7, dtype=torch.float64)
    torch.testing.assert_close(ours.apply(column[None])[0], theirs_a @ (theirs_b.T @ column))


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_break_even_rank(m: int, n: int) -> None:
    """Factors are fewer numbers than the matrix exactly for r < mn / (m + n), and the map's counts are LowRank's."""
    for rank in {1, 2, m * n // (m + n), m * n // (m + n) + 1}:
        if rank < 1:
            continue
        update = LowRank(torch.empty(rank, n, device="meta"), torch.empty(m, rank, device="meta"))
        assert update.parameters == rank * (m + n)
        assert (update.parameters < m * n) == (rank < m * n / (m + n))


def test_degrees_of_freedom_of_a_rank() -> None:
    """r (m + n − r): the rank of the map from the factors' variations to that of B A."""
    a, b = torch.randn(2, 6, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda a, b: (b @ a).flatten(), (a, b))
    joined = torch.cat([part.flatten(1) for part in jacobian], 1)
    assert int(torch.linalg.matrix_rank(joined)) == 2 * (5 + 6 - 2)


ROW = re.compile(r"^\| (gradient|Adam) \| (rsLoRA|LoRA)[^|]*\| ([\d.]+) \| ([\d.]+) \|$", re.M)


def test_scale_rules_and_the_first_step() -> None:
    """Section 4's table, measured: what a first step achieves, and how large it is, at rank 64 over rank 4."""
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(64, 256, generator=generator)

    def step(rule: str, rank: int, adam: bool) -> Tensor:
        a, _ = fresh_factors(rank, 64, 256, generator)
        s = AdapterSpec(rank=rank, scaling=rule).scale("any")
        db = s * full @ a.T
        return LowRank(a, -(db.sign() if adam else db), s).dense()

    rows = ROW.findall(PAGE.read_text())
    assert len(rows) == 4
    for optimizer, rule, along, size in rows:
        low, high = (step(rule.lower(), rank, optimizer == "Adam") for rank in (4, 64))
        assert float((high * full).sum() / (low * full).sum()) == pytest.approx(float(along), rel=0.15)
        assert float(high.norm() / low.norm()) == pytest.approx(float(size), rel=0.15)


def test_gradients_in_lecture_notes_notation() -> None:
    """Y = W X + A Bᵀ X: ∂L/∂A = G Xᵀ B and ∂L/∂B = X Gᵀ A, for a W that isn't square."""
    w, x, a, b = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 7), (7, 4), (5, 3), (7, 3)))
    a, b = a.requires_grad_(), b.requires_grad_()
    y = w @ x + a @ b.T @ x
    g, da, db = torch.autograd.grad(torch.logsumexp(y, 0).sum(), (y, a, b))
    torch.testing.assert_close(da, g @ x.T @ b)
    torch.testing.assert_close(db, x @ g.T @ a)


def test_a_step_is_the_full_gradient_seen_through_the_factors() -> None:
    """Section 4: −η s² (F Aᵀ A + B Bᵀ F) to first order, and what lies in neither's directions is lost."""
    f, a, b, s, rate = *(torch.randn(*shape, dtype=torch.float64) for shape in ((5, 7), (2, 7), (5, 2))), 0.5, 1e-6
    stepped = LowRank(a - rate * s * b.T @ f, b - rate * s * f @ a.T, s).dense()
    change = (stepped - LowRank(a, b, s).dense()) / rate
    torch.testing.assert_close(change, -(s**2) * (f @ a.T @ a + b @ b.T @ f), rtol=1e-4, atol=1e-4)
    unseen = f - b @ torch.linalg.pinv(b) @ f
    unseen = unseen - unseen @ torch.linalg.pinv(a) @ a
    assert float((b @ b.T @ unseen + unseen @ a.T @ a).norm()) < 1e-9 < float(unseen.norm())


def test_a_full_rank_factorisation_has_two_factors_of_full_rank() -> None:
    p_MR, q_NR = full_rank_factorisation(
        torch.randn(9, 4, dtype=torch.float64) @ torch.randn(4, 6, dtype=torch.float64)
    )
    assert p_MR.shape[1] == q_NR.shape[1] == 4 == int(torch.linalg.matrix_rank(q_NR))


class CountProducts(TorchDispatchMode):
    """Adds up 2 · (what a matrix product multiplies), forward and backward, hand-written or autograd's."""

    PRODUCTS: ClassVar = {"mm": 0, "addmm": 1, "addmm_": 1, "bmm": 0, "baddbmm": 1, "baddbmm_": 1}  # the first factor

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in self.PRODUCTS:
            at = self.PRODUCTS[name]
            self.flops += 2 * args[at].numel() * args[at + 1].shape[-1]
        return func(*args, **(kwargs or {}))


def test_flops_of_a_layer() -> None:
    """4 mn + 6 r (m + n) per token where W is frozen, 6 mn where it is trained."""
    t, m, n, r = 8, 20, 28, 3
    x, w, a, b = problem(t, m, n, r)
    with CountProducts() as lora:
        lora_linear(x, w, None, a, b, 0.5).sum().backward()
    assert lora.flops == t * (4 * m * n + 6 * r * (m + n))
    w.requires_grad_()
    with CountProducts() as full:
        (x @ w.T).sum().backward()
    assert full.flops == t * 6 * m * n


def test_attention_backward_costs_two_and_a_half_forwards() -> None:
    q, k, v = (torch.randn(16, 2, 4, requires_grad=True) for _ in range(3))
    with CountProducts() as forward:
        out = packed_attention(q, k, v, Documents([0, 16]))
    with CountProducts() as both:
        packed_attention(q, k, v, Documents([0, 16])).sum().backward()
    assert forward.flops == 2 * (2 * 16 * 16 * 2 * 4)
    assert both.flops == 3.5 * forward.flops
    assert out.shape == q.shape


def test_only_x_and_h_are_kept_for_the_backward() -> None:
    """T (n + r) numbers besides the weights."""
    x, w, a, b = problem(t=6, n=7, r=3)
    there = {value.data_ptr() for value in (w, a, b)}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        lora_linear(x, w, None, a, b, 0.5)
    assert sum(value.numel() for value in kept if value.data_ptr() not in there) == 6 * (7 + 3)


def test_rounding_eats_an_update_below_half_a_step() -> None:
    """Section 7: in bfloat16 an entry never moves for |Δ| < |w| / 512, always for |Δ| > |w| / 256 (towards Δ)."""
    w = torch.randn(4096).bfloat16().float()
    for sign in (1, -1):
        assert torch.equal((w * (1 + sign * 0.999 / 512)).bfloat16().float(), w)
        assert not (w * (1 + sign * 1.001 / 256)).bfloat16().float().eq(w).any()
