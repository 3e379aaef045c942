"""FrozenLinear: what an adapter needs to know about the layer underneath, and no more.

`torch.nn.Linear` stores its weight `[out, in]`, GPT-2's `Conv1D` stores it `[in, out]`, and a quantised layer stores no
matrix at all. The adapter's mathematics (y = x Wᵀ + b) should see that difference in only one place, so this module
gives all of them the same face: `weight` is a `Weight` (kernels/weight.py), for the first two a *view* and never a
copy, and `forward` calls the wrapped module itself, so that a fresh adapter is exactly the base, bit for bit, whatever
kernel the base's own forward picks.

A module of another kind takes part by saying what its weight is: it `BringsWeight`. Its claim to compute x Wᵀ + b
is tried by attach (adapter/trial.py).

Wrapping writes nothing, `requires_grad` included: the base was frozen once, in `open_base`. `.module` is the
original object, so unwrapping means putting it back.

Otherwise only what computes x Wᵀ + b from its own weight can be wrapped, since an adapted layer computes that itself:
the two classes, their subclasses that leave `forward` as it is, and those whose own gives the same (Falcon's). That
is found by value, on a copy of a few numbers in float64, where a quantising layer can't pass for rounding. A router or
such a layer, though it inherits from nn.Linear, is refused, as is one whose weight is neither brought nor a plain
matrix.

Rejected: converting Conv1D to Linear (it would write to the base and change its state dict), and subclassing
nn.Linear (its constructor allocates a weight of its own).

Letters: N in, M out, T rows.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaw.kernels.weight import DenseWeight, Weight

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@runtime_checkable
class BringsWeight(Protocol):
    """A module that computes x Wᵀ + bias and says what W is, however it stores it."""

    bias: Tensor | None

    def frozen_weight(self) -> Weight:
        """Its weight as it is now. Asked for in every pass, so it makes no copy."""


@runtime_checkable
class InParts(Protocol):
    """A module whose parameters are whole only in its forward: FSDP's (training/sharding.py)."""

    def unshard(self) -> Any:
        """Make them whole."""

    def reshard(self) -> Any:
        """Keep only this process's part."""


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Inside, the module's parameters are whole, outside of its forward, too."""
    if isinstance(module, InParts):
        module.unshard()
        try:
            yield
        finally:
            module.reshard()
    else:
        yield


def has_weight(module: nn.Module) -> bool:
    """Whether `weight_of` has an answer."""
    return isinstance(module, nn.Linear | Conv1D | BringsWeight)


def weight_of(module: nn.Module) -> Weight:
    """The weight of a linear layer, also of one that can't be wrapped. Raises TypeError for what isn't one."""
    if type(module) is not nn.Linear and isinstance(module, BringsWeight):
        return module.frozen_weight()
    if isinstance(module, nn.Linear):
        return DenseWeight(module.weight)
    if isinstance(module, Conv1D):
        return DenseWeight(module.weight.t())
    raise TypeError(f"{type(module).__name__} has no linear layer's weight")


def dtype_of(model: nn.Module) -> torch.dtype:
    """The type of a model's activations: its embedding's numbers, also where they are kept in another form."""
    return embedding_of(model).dtype


def embedding_of(model: nn.Module) -> "Stored":
    """Type, device and shape [V, D] of a model's embedding of tokens."""
    stored = stored_of(model.get_input_embeddings())  # type: ignore[operator]
    assert stored is not None
    return stored


def stored_of(module: nn.Module | None) -> "Stored | None":
    """Type, device and shape of a module's matrix, without making one that is packed; None where it has none."""
    stored: Stored | None = getattr(module, "stored", None)  # of a packed one (packed.py)
    if stored is None and isinstance(weight := getattr(module, "weight", None), Tensor):
        return Stored.of(weight)
    return stored


@dataclass(frozen=True)
class Stored:
    """A weight's description. No tensor, so that using it past its layer, and the update, is an error (products with a
    tensor on the meta device, for one, give whatever lies in memory)."""

    dtype: torch.dtype
    device: torch.device
    shape: torch.Size

    @staticmethod
    def of(weight: Tensor) -> "Stored":
        """That of a tensor."""
        return Stored(weight.dtype, weight.device, weight.shape)


class FrozenLinear(nn.Module):
    """One interface over nn.Linear, Conv1D and what brings its weight. Raises TypeError where `can_wrap` refuses."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if not self.can_wrap(module):
            raise TypeError(
                f"{type(module).__name__} is neither nn.Linear nor Conv1D with a plain floating weight, nor brings one"
            )
        self.module = module

    @staticmethod
    def can_wrap(module: nn.Module) -> bool:
        """True for nn.Linear and Conv1D, and what computes the same, with a plain 2-D floating Parameter as weight, and
        for what brings its weight."""
        if isinstance(module, BringsWeight):
            return True
        if not isinstance(module, nn.Linear | Conv1D):  # before its weight, which others may have to make (packed.py)
            return False
        weight = module.weight
        # The exact type: bitsandbytes and torchao subclass nn.Linear and swap the parameter's class.
        return type(weight) is nn.Parameter and weight.ndim == 2 and weight.dtype in PLAIN and _computes_linear(module)

    @property
    def brings_weight(self) -> bool:
        """Whether the module's weight is in a form of its own, which no sum W + ΔW can be put into."""
        return isinstance(self.module, BringsWeight)

    @property
    def weight(self) -> Weight:
        """W [M, N], of the base's own storage."""
        return weight_of(self.module)

    @property
    def bias_M(self) -> Tensor | None:
        """The bias [out], or None."""
        return self.module.bias  # type: ignore[return-value]

    @property
    def transposed(self) -> bool:
        """Whether the module stores W as [in, out]."""
        return isinstance(self.module, Conv1D)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @torch.no_grad()
    def with_weight(self, w_MN: Tensor) -> nn.Module:
        """A new frozen layer with this weight, rounded once to the dtype of its own, and the same bias: of the module's
        own kind, an nn.Linear where the module brings its weight in a form of its own."""
        if not self.brings_weight:
            made = copy.deepcopy(self.module)
            made.weight.copy_(w_MN.T if self.transposed else w_MN)  # type: ignore[operator]
            return made
        (m, n), weight, bias_M = w_MN.shape, self.weight, self.bias_M
        linear = nn.Linear(n, m, bias=bias_M is not None, device="meta").to_empty(device=weight.device)
        linear = linear.to(weight.dtype).requires_grad_(False)
        linear.weight.copy_(w_MN)
        if bias_M is not None:
            linear.bias.copy_(bias_M)
        return linear

    def forward(self, x_TN: Tensor) -> Tensor:
        """x Wᵀ + b as the wrapped module computes it. x: [..., in] -> [..., out]."""
        y_TM: Tensor = self.module(x_TN)
        return y_TM

    @property
    def stored(self) -> Stored:
        """How the module stores its weight, as a model may ask of it."""
        shape = self.weight.shape[::-1] if self.transposed else self.weight.shape
        return Stored(self.weight.dtype, self.weight.device, torch.Size(shape))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class FrozenEmbedding(nn.Module):
    """The same face over an embedding of tokens, W [V, D]. Raises TypeError where `can_wrap` refuses."""

    transposed, brings_weight, bias_M = False, False, None

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if not self.can_wrap(module):
            raise TypeError(f"{type(module).__name__} isn't a plain embedding of tokens")
        self.module = module

    @staticmethod
    def can_wrap(module: nn.Module) -> bool:
        """True for what looks its rows up in a plain floating matrix, and for packed ones."""
        if hasattr(module, "frozen_weight"):
            return True
        return isinstance(module, nn.Embedding) and type(module.weight) is nn.Parameter and module.max_norm is None

    @property
    def weight(self) -> Weight:
        """W [V, D], of the base's own storage."""
        module: Any = self.module
        weight: Weight = module.frozen_weight() if hasattr(module, "frozen_weight") else DenseWeight(module.weight)
        return weight

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., D] as the wrapped module gives it."""
        y: Tensor = self.module(ids)
        return y

    def of(self, w_KD: Tensor, ids: Tensor) -> Tensor:
        """The same from another matrix, of as many rows and columns as it has: whatever else the module does with a row
        (Gemma scales it) is done with these."""
        weight = w_KD.to(self.weight.dtype)
        if not isinstance(self.module, nn.Embedding):
            return F.embedding(ids, weight)
        other: nn.Module = copy.copy(self.module)
        other._parameters = {"weight": weight}  # type: ignore[dict-item]
        other.padding_idx = None  # type: ignore[assignment]
        y: Tensor = other(ids)
        return y

    @torch.no_grad()
    def with_weight(self, w_VD: Tensor) -> nn.Module:
        """A new frozen module with this weight, rounded once to its own's dtype; a plain one where it is packed."""
        if isinstance(self.module, nn.Embedding):
            made = copy.deepcopy(self.module)
            made.num_embeddings, made.weight = len(w_VD), nn.Parameter(w_VD.to(made.weight.dtype), False)
            return made
        return nn.Embedding.from_pretrained(w_VD.to(self.weight.dtype))

    @property
    def stored(self) -> Stored:
        """How the module stores its weight."""
        return Stored(self.weight.dtype, self.weight.device, torch.Size(self.weight.shape))


@torch.no_grad()
def _computes_linear(module: nn.Linear | Conv1D) -> bool:
    """Whether `forward` is x Wᵀ + b: the class's own, or one that gives that for small numbers in their place."""
    if type(module).forward in (nn.Linear.forward, Conv1D.forward) and "forward" not in vars(module):
        return True
    generator = torch.Generator().manual_seed(0)
    w_MN, bias_M, x_TN = (
        torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((5, 3), (5,), (1, 4, 3))
    )
    small: nn.Module = copy.copy(module)
    small._parameters = {"weight": nn.Parameter(w_MN.T if isinstance(module, Conv1D) else w_MN)}
    small._parameters["bias"] = None if module.bias is None else nn.Parameter(bias_M)
    vars(small).update({"in_features": 3, "out_features": 5, "nx": 3, "nf": 5, "training": False})
    try:
        y = small(x_TN)
    except Exception:  # a stranger's code, on shapes it wasn't made for
        return False
    wanted = F.linear(x_TN, w_MN, None if module.bias is None else bias_M)
    return (
        isinstance(y, Tensor) and y.shape == wanted.shape and torch.allclose(y.double(), wanted, rtol=1e-5, atol=1e-6)
    )
