"""Loading a base tensor by tensor: each is read, checked, packed and let go before the next, so that beside the packed
model there is never more than one dense tensor.

    skeleton    the modules on the meta device, without numbers
    buffers     those that no file holds (rotary frequencies, an embedding's scale), made by the model's own rule
    tensors     in the order of the files, each through the fingerprint and into its place

`open_plan` tells beforehand whether the files can be read like this: their names are the model's, each tensor has its
shape and a floating type, and the model can make its buffers. Where transformers renames or fuses what the files hold,
or where a model keeps some weights in float32 whatever is asked, it isn't; such a base is loaded by transformers first
(load.py). So is one with a fault in its files: transformers' loader is what names it.

Buffers are made as transformers' own loader does it, by the `_init_weights` of the model that owns them, on memory
that was filled with a mark: a buffer that still has the mark afterwards wasn't made, and then the base isn't read like
this. Parameters have no memory yet, so nothing is drawn for them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D

from deltaw.base.packed import matrices, put_packed
from deltaw.files.safetensors import read_header, read_tensor
from deltaw.files.shards import shards
from deltaw.kernels.packed import PackedWeight
from deltaw.show.progress import Progress

TYPES = {"F64", "F32", "BF16", "F16"}
Pack = Callable[[str, Tensor], PackedWeight | None]


@dataclass(frozen=True)
class StreamPlan:
    """Which tensor of which file goes where: `places`, names of parameters that share it."""

    skeleton: nn.Module
    files: dict[Path, list[str]]
    places: dict[str, list[str]]

    @property
    def count(self) -> int:
        return len(self.places)


def open_plan(skeleton: nn.Module, folder: Path) -> StreamPlan | None:
    """How a folder's tensors fill a skeleton, whose buffers it makes; None where they must go through transformers."""
    files = shards(folder)
    sharing: dict[int, list[str]] = {}
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        sharing.setdefault(id(parameter), []).append(name)
    names = [name for some in files.values() for name in some]
    places = {name: sharing.pop(id(parameters[name]), []) for name in names if name in parameters}
    if sharing or len(places) < len(names) or not all(places.values()) or set(skeleton.state_dict()) - set(parameters):
        return None
    for file, some in files.items():
        header = read_header(file, max_header_bytes=100_000_000, max_tensors=1_000_000)
        for name in some:
            if header.shapes[name] != tuple(parameters[name].shape) or header.dtypes[name] not in TYPES:
                return None
    if _is_converted(skeleton, names) or not make_buffers(skeleton):
        return None
    return StreamPlan(skeleton, files, places)


def fill(
    plan: StreamPlan,
    pack: Pack,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    read: Callable[[Path, str], Tensor] = read_tensor,
) -> Iterator[tuple[str, Tensor]]:
    """Read every tensor into its place, in `pack`'s form or in `dtype`, and yield its name and its numbers as the file
    has them."""
    model, packable = plan.skeleton, set(matrices(plan.skeleton))
    for number, (file, name) in enumerate((file, name) for file, some in plan.files.items() for name in some):
        tensor = read(file, name)
        yield name, tensor
        tensor, owners = tensor.to(device), [place.rpartition(".")[::2] for place in plan.places[name]]
        paths = [path for path, attribute in owners if path in packable and attribute == "weight"]
        transposed = paths and isinstance(model.get_submodule(paths[0]), Conv1D)
        packed = pack(paths[0], tensor.t() if transposed else tensor) if len(paths) == len(owners) else None
        if packed is not None:
            put_packed(model, paths, packed)
        else:
            parameter = nn.Parameter(tensor.to(dtype), requires_grad=False)
            for path, attribute in owners:
                model.get_submodule(path).register_parameter(attribute, parameter)
        del tensor, packed
        progress(number + 1)


def _is_converted(skeleton: nn.Module, names: list[str]) -> bool:
    """Whether transformers would rename or rework some of these tensors, or hold some in a type of its own."""
    kept = (getattr(skeleton, f"_keep_in_fp32_modules{suffix}", None) for suffix in ("", "_strict"))
    transforms = get_model_conversion_mapping(skeleton)
    return any(kept) or any(one.rename_source_key(name)[1] is not None for one in transforms for name in names)


@torch.no_grad()
def make_buffers(skeleton: nn.Module) -> bool:
    """Give the skeleton's buffers their numbers, on the CPU. False where the model doesn't make one of them."""
    owners: dict[str, nn.Module] = {}
    model, models = skeleton, dict[str, nn.Module]()
    for path, module in skeleton.named_modules():
        parent = max((name for name in models if not name or path.startswith(name + ".")), key=len, default=None)
        if hasattr(module, "_init_weights"):
            models[path] = model = module
        elif parent is not None:
            model = models[parent]
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, _marked(buffer), persistent=False)
            owners[path] = model
    for path, model in owners.items():
        model._init_weights(skeleton.get_submodule(path))  # type: ignore[operator]
    return not any(_is_marked(buffer) for buffer in skeleton.buffers())


def _marked(buffer: Tensor) -> Tensor:
    mark = float("nan") if buffer.is_floating_point() else torch.iinfo(torch.int8).min
    return torch.full(buffer.shape, mark, dtype=buffer.dtype, device="cpu")


def _is_marked(buffer: Tensor) -> bool:
    if buffer.dtype == torch.bool or buffer.is_complex():
        return True  # no value to mark it by
    marks = buffer.isnan() if buffer.is_floating_point() else buffer == torch.iinfo(torch.int8).min
    return bool(marks.any())
