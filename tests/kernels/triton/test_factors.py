"""All factors spread in one launch, against the twin that copies them one by one."""

import pytest
import torch
from torch import Tensor

from deltaw.kernels import spread as spreading
from deltaw.kernels.spread import Spread
from deltaw.kernels.triton.factors import BLOCK
from tests.kernels.triton.budget import DEVICE, DTYPES, randn

SHAPES = [(1, 1), (3, 5), (16, 200), (200, 16), (0, 4), (4, 0), (2, BLOCK), (1, BLOCK + 1)]


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spreading, "on_gpu", lambda x: x.dtype != torch.float64)


def parts_of(dtype: torch.dtype) -> list[tuple[Tensor, Tensor, float]]:
    """Destinations inside a wider matrix, in one that lies the other way round, and on their own."""
    parts = []
    for number, shape in enumerate(SHAPES):
        m, n = shape
        inside, across, own = randn(m + 2, n + 3)[1:-1, 2:-1], randn(n, m).T, randn(m, n)
        for number_in, like in enumerate((inside, across, own)):
            destination = torch.empty_strided((m, n), like.stride(), dtype=dtype, device=DEVICE).fill_(7)
            parts.append((randn(m, n), destination, 0.5 + number + number_in / 3))
    return parts


@pytest.mark.parametrize("dtype", DTYPES)
def test_spread(dtype: torch.dtype, on_a_gpu: None) -> None:
    parts = parts_of(dtype)
    one = Spread(parts)
    for _ in range(2):
        one.spread()
        for source, destination, scale in parts:
            if dtype == torch.float32 or DEVICE == "cuda":
                assert torch.equal(destination, (source * scale).to(dtype))
            else:  # the interpreter cuts off where a GPU rounds
                torch.testing.assert_close(
                    destination.float(), source * scale, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny
                )
            source.mul_(-3)  # in place: the next one sees it


def test_spread_writes_into_a_larger_matrix_and_beside_nothing(on_a_gpu: None) -> None:
    """[[W, sB], [A, 0]]: the factors in their places, W and the corner as they were."""
    whole, a, b = randn(40 + 4, 30 + 4), randn(4, 30), randn(40, 4)
    before = whole.clone()
    Spread([(a, whole[40:, :30], 1.0), (b, whole[:40, 30:], 0.25)]).spread()
    before[40:, :30], before[:40, 30:] = a, 0.25 * b
    assert torch.equal(whole, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_twin_takes_what_a_gpu_does_not(dtype: torch.dtype) -> None:
    source = torch.randn(3, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
    destination = torch.zeros(3, 4, dtype=dtype, device=DEVICE)
    Spread([(source, destination, 0.3)]).spread()
    assert torch.equal(destination, (source.detach() * 0.3).to(dtype))
    Spread([]).spread()


def test_what_the_kernel_would_read_wrongly_is_refused(on_a_gpu: None) -> None:
    x = randn(4, 4)
    for source, destination in (
        (x, x[:3]),
        (x.T, x),
        (x[:, :2], x[:, :2]),
        (x.bfloat16(), x),
        (x[0], x[0]),
        (x, x.double()),
    ):
        with pytest.raises(ValueError):
            Spread([(source, destination, 1.0)])
    with pytest.raises(ValueError):
        Spread([(x, x.clone(), 1.0), (x, x.bfloat16(), 1.0)])


@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph")
def test_spread_in_a_cuda_graph() -> None:
    parts = parts_of(torch.bfloat16)
    one = Spread(parts)
    one.spread()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one.spread()
    for source, *_ in parts:
        source.add_(1)
    graph.replay()
    assert all(torch.equal(destination, (source * scale).bfloat16()) for source, destination, scale in parts)
