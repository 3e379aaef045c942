"""Packed modules: linear layers and embeddings of a base whose matrices are `PackedWeight`s (kernels/packed.py).

They stand in the model in the place of nn.Linear and nn.Embedding, and bring their weight as frozen.py asks. Their
parts are parameters of the module, so that they move with the model and are found by whatever walks it; two modules
that shared a tensor (a tied head) share its parts.

Packed is what has a matrix worth it: linear layers that can be wrapped, and a plain embedding of tokens. Norms, biases,
routers and whatever a model computes with by itself stay as they are.

Rejected: bitsandbytes' and torchao's own modules and tensor classes. They store what they like when they like (the
former packs its weight anew in eval mode), each brings an autograd of its own, and neither knows of the other's.

Letters: M outputs, N inputs.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaw.base.frozen import FrozenLinear, Stored
from deltaw.files.output import gib
from deltaw.kernels.lora import Projection, lora_linears
from deltaw.kernels.packed import PackedWeight
from deltaw.show.progress import Progress, unseen

LEAST = 2**10  # numbers of a matrix that is worth packing


class _Packed(nn.Module):
    """What holds the parts of one matrix."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        for name, part in weight.parts.items():
            self.register_parameter(name, _frozen(part))
        self._kind = weight.with_parts({})

    def frozen_weight(self) -> PackedWeight:
        """The matrix, of the parts as they are now."""
        return self._kind.with_parts({name: part for name, part in self._parameters.items() if name != "bias"})  # type: ignore[misc]

    @property
    def weight(self) -> Tensor:
        """W itself, unpacked anew: for a model that multiplies with it by itself (Mamba's dt_proj), not for us."""
        return self.frozen_weight().dense()

    @property
    def stored(self) -> Stored:
        """Its type, device and shape."""
        weight = self.frozen_weight()
        return Stored(weight.dtype, weight.device, torch.Size(weight.shape))

    def extra_repr(self) -> str:
        m, n = self._kind.shape
        return f"{type(self._kind).__name__}, {m} x {n}"


class PackedLinear(_Packed):
    """x Wᵀ + bias."""

    def __init__(self, weight: PackedWeight, bias_M: Tensor | None = None) -> None:
        super().__init__(weight)
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias_M is None else nn.Parameter(bias_M, requires_grad=False)

    def forward(self, x_TN: Tensor) -> Tensor:
        """[..., N] -> [..., M] in x's dtype."""
        return lora_linears(x_TN, [Projection(self.frozen_weight(), self.bias)])[0]


class PackedEmbedding(_Packed):
    """Rows of W by number."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__(weight)
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., N] in the weight's dtype."""
        return self.frozen_weight().rows(ids.reshape(-1)).view(*ids.shape, self.embedding_dim)


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """W [M, N] of each module that can be packed, by path; modules that share a tensor have one each."""
    words = model.get_input_embeddings()  # type: ignore[operator]
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        embedding = module is words and type(module) is nn.Embedding and module.max_norm is None
        if not path or not (embedding or (isinstance(module, nn.Linear | Conv1D) and FrozenLinear.can_wrap(module))):
            continue
        weight: Tensor = module.weight.detach()
        if weight.numel() >= LEAST:
            found[path] = weight.t() if isinstance(module, Conv1D) else weight
    return found


def pack_modules(
    model: nn.Module, pack: Callable[[str, Tensor], PackedWeight | None], progress: Progress = unseen
) -> list[str]:
    """Put packed modules in the place of what has a matrix, in place, and return their paths. `pack`: module path and
    W [M, N] -> how it is kept; None: as it is. Tensors that modules share are packed once, and each is let go when it
    is packed. `progress`: of modules."""
    sharing: dict[Tensor, list[str]] = {}
    for path in matrices(model):
        sharing.setdefault(model.get_submodule(path).weight, []).append(path)  # type: ignore[arg-type]
    paths, done = [], 0
    while sharing:
        own = next(iter(sharing))
        places = sharing.pop(own)
        transposed = isinstance(model.get_submodule(places[0]), Conv1D)
        if (weight := pack(places[0], own.detach().t() if transposed else own.detach())) is not None:
            put_packed(model, places, weight)
            paths += places
        del own
        progress(done := done + len(places))
    return paths


def put_packed(model: nn.Module, paths: Iterable[str], weight: PackedWeight) -> None:
    """Put one matrix, packed, into the place of modules that share it."""
    weight = weight.with_parts({name: _frozen(part) for name, part in weight.parts.items()})
    for path in paths:
        module = model.get_submodule(path)
        made = (
            PackedEmbedding(weight) if isinstance(module, nn.Embedding) else PackedLinear(weight, module.bias)  # type: ignore[arg-type]
        )
        model.set_submodule(path, made)


def describe_packed(model: nn.Module) -> str:
    """How a base's matrices are kept and what that saves, in a line; "" where none is packed."""
    packed = {id(next(module.parameters())): module for module in model.modules() if isinstance(module, _Packed)}
    weights = [module.frozen_weight() for module in packed.values()]
    if not weights:
        return ""
    forms = [form for form, _ in Counter(weight.form for weight in weights).most_common()]
    plain = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    held = sum(weight.nbytes for weight in weights) + sum(one.nbytes for one in plain)
    bfloat16 = all(form == "bfloat16" for form in forms)
    other, size = ("float32", 4) if bfloat16 else ("bfloat16", 2)
    numbers = sum(math.prod(weight.shape) for weight in weights) + sum(one.numel() for one in plain)
    return f"kept in {' and '.join(forms)}: {gib(held)} instead of {gib(size * numbers)} in {other}"


def _frozen(part: Tensor) -> nn.Parameter:
    return part if isinstance(part, nn.Parameter) else nn.Parameter(part, requires_grad=False)
