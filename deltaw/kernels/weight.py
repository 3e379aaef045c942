"""`Weight`: a frozen matrix W [M, N], known by what can be done with it, not by how it is stored.

    matmul(x)    x Wᵀ (+ bias)   the layer's own product
    matmul_t(g)  g W             its backward, added onto what is there where that is given: sums of several layers ride
                                 on the products
    times(c)     W c             a few columns: DoRA's norms
    rows(index)  some rows of W  what looks at a weight piece by piece, or looks words up
    dense()      W itself        M N numbers: for what is truly about the matrix (a sum W + ΔW, a decomposition)

Kernels, adapted layers, DoRA's norms, fusing and analysis know nothing else, so a quantised matrix, blocks of a GGUF
file or a shard of a larger matrix take part by bringing these few methods; how a module brings its own is in
base/frozen.py. `DenseWeight` is the ordinary case: a view of a tensor, and the very calls that were made on the tensor.

None of these is differentiated: a weight gets no gradient, and ∂L/∂x is written by hand from `matmul_t` (lora.py). So a
Weight needs no autograd, and one whose `matmul` has none, or the wrong one (rounding), still trains right.

Rejected: a tensor subclass that dequantises itself (every operation would have to be thought of, and one that was not
would be silently slow), and `forward(x)` alone (∂L/∂x needs W itself, and a decomposition needs the matrix).

Letters: T rows of an input, N inputs, M outputs, R columns.
"""

import abc

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.kernels.prepacked import Prepacked, prepacked

AT_ONCE = 2**24  # numbers of a weight that are looked at in one piece
# Rows for which a CPU makes W xᵀ sooner than x Wᵀ where N is 2 M or more (an MLP's way down). One core, float32, ms:
#   rows                  6      8     12     16     32     64
#   576 x 1536  x Wᵀ   0.49   0.60   0.74   0.55   0.73   1.11
#               W xᵀ   0.44   0.46   0.46   0.46   0.53   1.23
#   2048 x 8192 x Wᵀ   10.5   15.1   20.8   11.7   15.0   22.0
#               W xᵀ   10.9   10.9   10.8   11.0   12.6   22.8
TURNED = range(8, 33)


class Weight(abc.ABC):
    """A frozen matrix. What its methods return is new, and the caller may write to it; `rows` and `dense` may be views
    of the base's own storage, which nobody writes to."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """(M, N): outputs, inputs."""

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype:
        """The type of the numbers that `rows` and `dense` give."""

    @property
    @abc.abstractmethod
    def device(self) -> torch.device:
        """Where it lies."""

    @abc.abstractmethod
    def matmul(self, x_TN: Tensor, bias_M: Tensor | None = None) -> Tensor:
        """x Wᵀ + bias, [..., M] in x's dtype."""

    def few(self, x_TN: Tensor, bias_M: Tensor | None = None) -> Tensor:
        """The same [T, M] for the rows of a step of decoding, in the order of sums that is fastest for so many."""
        return self.matmul(x_TN, bias_M)

    @abc.abstractmethod
    def matmul_t(self, g_TM: Tensor, onto: Tensor | None = None) -> Tensor:
        """g W [T, N], added in place onto `onto` where that is given."""

    @abc.abstractmethod
    def rows(self, index: Tensor | slice) -> Tensor:
        """Those rows of W, [·, N]."""

    def dense(self) -> Tensor:
        """W [M, N] itself."""
        return self.rows(slice(None))

    def times(self, c_NR: Tensor) -> Tensor:
        """W c [M, R]."""
        return self.matmul(c_NR.T).T

    def squares(self) -> Tensor:
        """‖wᵢ‖² [M] of the rows, in float32 or wider."""
        m, n = self.shape
        wide, step = torch.promote_types(self.dtype, torch.float32), max(1, AT_ONCE // n)
        parts = [self.rows(slice(start, start + step)) for start in range(0, m, step)]
        return torch.cat([part_KN.to(wide).square().sum(1) for part_KN in parts])


class DenseWeight(Weight):
    """The matrix of a tensor [M, N], which may be a view."""

    __slots__ = ("_copy", "_w_MN")

    def __init__(self, w_MN: Tensor) -> None:
        self._w_MN = w_MN
        self._copy: Prepacked | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self._w_MN.shape[0], self._w_MN.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self._w_MN.dtype

    @property
    def device(self) -> torch.device:
        return self._w_MN.device

    def matmul(self, x_TN: Tensor, bias_M: Tensor | None = None) -> Tensor:
        copy = self._prepacked() if torch.is_inference_mode_enabled() else None
        return F.linear(x_TN, self._w_MN, bias_M) if copy is None else copy.matmul(x_TN, bias_M)

    def _prepacked(self) -> Prepacked | None:
        if self._copy is None or not self._copy.current(self._w_MN):
            self._copy = prepacked(self._w_MN)
        return self._copy

    def few(self, x_TN: Tensor, bias_M: Tensor | None = None) -> Tensor:
        (m, n), rows = self._w_MN.shape, x_TN.shape[0]  # len is felt: it is Python
        wide = n >= 2 * m and rows in TURNED and x_TN.dtype == torch.float32 and not x_TN.is_cuda
        if not wide or (torch.is_inference_mode_enabled() and self._prepacked() is not None):
            return self.matmul(x_TN, bias_M)
        y_TM = torch.mm(self._w_MN, x_TN.T).T.contiguous()
        return y_TM if bias_M is None else y_TM.add_(bias_M)

    def matmul_t(self, g_TM: Tensor, onto: Tensor | None = None) -> Tensor:
        return g_TM @ self._w_MN if onto is None else onto.addmm_(g_TM, self._w_MN)

    def rows(self, index: Tensor | slice) -> Tensor:
        return self._w_MN[index]

    def dense(self) -> Tensor:
        return self._w_MN

    def times(self, c_NR: Tensor) -> Tensor:
        return self._w_MN @ c_NR

    def squares(self) -> Tensor:
        return self._w_MN.to(torch.promote_types(self.dtype, torch.float32)).square().sum(1)
