"""open_base: a name -> a frozen transformers model, checked. The only file that builds transformers models.

What can silently go wrong in `from_pretrained` is made loud here:

    weights missing from the files (random values in their place), or left over: an error, not a log line
    an encoder-decoder, a classifier, an unknown architecture: refused, by name
    NaN or Inf in the weights: refused, by tensor
    code in the model folder: never run (trust_remote_code is False, and no option turns it on)

dtype "auto" means the faster of bfloat16 and float32 on this machine (dtype.py). float16 has three digits more than
bfloat16, and ends at 65,504: weights beyond that are refused here; an activation beyond it is a loss that isn't finite,
which stops the run.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from os import fspath
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from deltaw.base.blocks import Unallocated, check_keep, load_blocks
from deltaw.base.dtype import fast_dtype
from deltaw.base.fingerprint import fingerprint_of
from deltaw.base.loading import check_loading, quiet
from deltaw.base.packed import describe_packed, matrices, pack_modules
from deltaw.base.packing import QUANTISED, Packing, check_packing
from deltaw.base.source import Source, find_base
from deltaw.base.streamed import fill, open_plan
from deltaw.config import BaseWeights, Dtype
from deltaw.errors import InputError, RunError, listed
from deltaw.files.shards import read_tensors
from deltaw.show.progress import QUIET, Display
from deltaw.show.text import counted


@dataclass(frozen=True, repr=False)
class Base:
    """A frozen model in eval mode and where it came from. `dtype`: of its activations, and of its weights where
    `weights`, how they are kept, is auto. `fingerprint`: as in fingerprint.py, of the weights as they were read."""

    model: nn.Module
    source: Source
    dtype: torch.dtype
    device: torch.device
    fingerprint: str
    weights: BaseWeights = "auto"

    @property
    def rounded(self) -> str:
        """The form in which its matrices lost digits; empty where they lost none."""
        return self.weights if self.weights in QUANTISED else ""

    @property
    def kept(self) -> str:
        """How its weights are kept, if packed, and what that saves; else ""."""
        return describe_packed(self.model)

    def __repr__(self) -> str:
        return f"Base({self.source.name}, {str(self.dtype).removeprefix('torch.')} on {self.device})"


def open_base(
    name: str | Path | Source,
    *,
    dtype: Dtype = "auto",
    device: str = "auto",
    display: Display = QUIET,
    config: Any = None,
    weights: BaseWeights = "auto",
) -> Base:
    """Load a base, frozen, in eval mode, checked. `config`: its config, where it was read already (`read_config`).
    `weights`: how its matrices are kept in memory. Raises InputError, or RunError when memory runs out."""
    source = name if isinstance(name, Source) else find_base(fspath(name), display=display)
    place = pick_device(device)
    number = fast_dtype(place.type) if dtype == "auto" else getattr(torch, dtype)
    config = config or read_config(source)
    try:
        if weights == "auto":
            model, print_ = _dense(source, config, number, place)
        elif weights == "keep":
            model, print_ = _kept(source, config, number, place, display)
        else:
            model, print_ = _packed(source, config, number, place, weights, display)
    except (MemoryError, torch.OutOfMemoryError):
        form = {"auto": str(number), "keep": "its blocks"}.get(weights, weights)
        fix = "use a smaller base" if weights == "keep" else "use a smaller base, or base_weights: nf4"
        raise RunError(f"{source.name}: not enough memory on {place} for its weights in {form}", fix=fix) from None
    except (InputError, RunError):
        raise
    except Exception as error:  # whatever a foreign reader makes of a stranger's files
        raise _unreadable(source, error) from None
    return Base(model, source, number, place, print_, weights)


def _dense(source: Source, config: Any, dtype: torch.dtype, place: torch.device) -> tuple[nn.Module, str]:
    """The model with all its numbers in `dtype`, as transformers loads it, and its fingerprint."""
    with quiet():
        model, info = AutoModelForCausalLM.from_pretrained(
            source.directory,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    check_loading(source.directory, info)
    model = model.to(place).requires_grad_(False).eval()
    check_finite(model, source.directory)
    return model, fingerprint(model)


def _packed(
    source: Source, config: Any, dtype: torch.dtype, place: torch.device, weights: BaseWeights, display: Display
) -> tuple[nn.Module, str]:
    """The model with its matrices packed, tensor by tensor where its files allow it; the dense one's fingerprint."""
    model = open_skeleton(source, config, dtype).requires_grad_(False).eval()
    check_packing(weights, model)
    packing = Packing(weights, dtype, model)
    if plan := open_plan(model, source.directory):
        broken: list[str] = []
        with display.task(f"reading {source.name} into {weights}, tensors", plan.count) as progress:
            tensors = fill(plan, packing, dtype, place, progress)
            print_ = fingerprint_of((_noted(name, tensor, dtype, broken) for name, tensor in tensors), model.config)
        _refuse_broken(broken, source.directory, dtype)
        model = model.to(place)  # buffers
    else:
        display.say(
            f"{source.name}: transformers rearranges its files, so its weights stand in 16 bits before they are packed"
        )
        stored = torch.bfloat16 if dtype.itemsize > 2 else dtype
        model, print_ = _dense(source, config, stored, place)
        with display.task(f"packing {source.name} into {weights}, matrices", len(matrices(model))) as progress:
            pack_modules(model, packing, progress)
        if stored != dtype:
            model.to(dtype)  # norms, biases: parts are integers, which this leaves alone
    for line in packing.notes(model):
        display.say(line)
    return model, print_


def _noted(name: str, tensor: Tensor, dtype: torch.dtype, broken: list[str]) -> Tensor:
    """The tensor, which is looked at once: its name goes to the others that can't be used."""
    if not _finite(tensor.to(dtype) if dtype == torch.float16 else tensor):
        broken.append(name)
    return tensor


def _kept(
    source: Source, config: Any, dtype: torch.dtype, place: torch.device, display: Display
) -> tuple[nn.Module, str]:
    """The model in its GGUF's own blocks (blocks.py), never unpacked as a whole, and the dense one's fingerprint."""
    header = check_keep(source)
    # A model draws its first weights from the global generator.
    with quiet(), torch.random.fork_rng(devices=[]), Unallocated():
        model: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)
    dense = load_blocks(model, source, header, dtype)
    model = model.to(place).requires_grad_(False).eval()
    if dense:
        display.say(
            f"{source.name}: {counted(len(dense), 'matrix isn', 'matrices aren')}'t kept in blocks, but in "
            f"{str(dtype)[6:]}: {', '.join(dense[:3])}{', …' if dense[3:] else ''}"
        )
    check_finite(model, source.directory)
    return model, fingerprint_of_files(source)


def check_weights(source: Source, weights: BaseWeights, skeleton: nn.Module) -> None:
    """Raise InputError where the base's weights can't be kept like this; reads none of them."""
    if weights == "keep":
        check_keep(source)
    check_packing(weights, skeleton)


def as_kept(source: Source, weights: BaseWeights) -> BaseWeights:
    """How to keep a base that stands in for the one that a run was on: blocks are kept where there are some."""
    return "auto" if weights == "keep" and source.gguf is None else weights


def open_skeleton(source: Source, config: Any = None, dtype: torch.dtype | None = None) -> nn.Module:
    """The base's modules without its weights (on the meta device): enough to see which layers an adapter would find,
    before gigabytes are read. `config`: as for `open_base`."""
    config = copy.deepcopy(config or read_config(source))  # the model makes it its own
    try:
        with quiet(), torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # as in open_base
        raise _unreadable(source, error) from None
    return model


def pick_device(name: str) -> torch.device:
    """A torch device by name; "auto" is the GPU, else the CPU. Raises InputError when it isn't there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.zeros(1, device=name)
        place.cpu()  # the meta device fails here
        return place.device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise InputError(f"device {name!r} can't be used here: {reason}", fix="use device: auto or cpu") from None


def fingerprint(model: nn.Module) -> str:
    """That of the model's parameters and its config, as in base/fingerprint.py.

    Equal for one model in bfloat16 and float32, in one file, shards or GGUF cache. Tied weights count once.
    Compute it on the plain model: an adapter's parameters would count, too.
    """
    return fingerprint_of(model.parameters(), getattr(model, "config", None))


def fingerprint_of_files(source: Source) -> str:
    """The same of a folder's tensors, one in memory at a time: equal where the files hold the parameters alone."""
    return fingerprint_of((tensor for _, tensor in read_tensors(source.directory)), read_config(source))


def check_finite(model: nn.Module, where: Path) -> None:
    """Raise InputError naming every parameter that holds NaN or Inf. One pass, no copies."""
    broken = [name for name, weight in model.named_parameters() if not _finite(weight.detach())]
    _refuse_broken(broken, where, next(model.parameters()).dtype)


def _refuse_broken(broken: Sequence[str], where: Path, dtype: torch.dtype) -> None:
    if broken and dtype == torch.float16:
        raise InputError(
            f"{where}: {len(broken)} tensors have numbers that float16 can't hold, or no numbers:\n{listed(broken, 2)}",
            fix="set train.dtype: bfloat16 or float32",
        )
    if broken:
        raise InputError(
            f"{where}: {len(broken)} tensors hold NaN or Inf:\n{listed(broken, 2)}", fix="download the model again"
        )


def read_config(source: Source) -> Any:
    """The transformers config of a decoder-only model, or InputError."""
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source.directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as above
        raise _unreadable(source, error) from None
    if getattr(config, "is_encoder_decoder", False) or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(
            f"{source.name}: {config.model_type!r} isn't a causal language model that transformers knows",
            fix="use a decoder-only model: Llama, Qwen, Gemma, Mistral, SmolLM, GPT-2, …",
        )
    named = config.architectures
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if named and not (isinstance(named, list) and named[0] in known):
        raise InputError(
            f"{source.name}: config.json's architectures, {str(named)[:80]}, isn't a causal language model",
            fix="use the checkpoint with a language-model head (…ForCausalLM)",
        )
    return config


def _unreadable(source: Source, error: Exception) -> InputError:
    reason = next((line for line in str(error).splitlines() if line.strip()), "")[:200]
    return InputError(
        f"{source.directory}: transformers can't load it ({type(error).__name__}: {reason})",
        fix="check that the folder is whole and that its model_type is a standard one",
    )


def _finite(weight: Tensor) -> bool:
    # aminmax hands NaN on and reads each element once: 0.02 s for 135M weights; isfinite().all() takes 0.2 s.
    if weight.numel() == 0 or not weight.is_floating_point():
        return True
    return all(torch.isfinite(extreme) for extreme in torch.aminmax(weight))
