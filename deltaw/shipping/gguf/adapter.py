"""The adapter as one GGUF for llama.cpp and Ollama, with a Modelfile.

    general.type = adapter, general.architecture = the base's, adapter.type = lora, adapter.lora.alpha = R
    <tensor of the base>.lora_a [R, N], .lora_b [M, R], each a right before its b, float32

llama.cpp multiplies each update by alpha / its own rank, and by 1 where alpha is 0; other readers know one rank. So
rows of zeros give all updates the largest rank R, scales go into B, and alpha = R makes the scale exactly 1. Its own
converter copies PEFT's lora_alpha instead, so rsLoRA and modules with their own rank or alpha come out wrong. The
rows of B are where GGUF has the rows of W (names.py).

What llama.cpp would silently ignore is refused here, as is what it refuses: full fine-tuning, DoRA, anything
but linear layers, and a head that the base's GGUF doesn't have. A base whose head is tied to its embedding has no
`output.weight`, and an update of one tensor can't be two things. There is no largest rank.

float32, since B holds the scales: float16 ends at 6·10⁻⁸ and 65,504, and the file is small beside any base.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from deltaw.adapter.algebra import baked, low_rank_updates
from deltaw.base.frozen import FrozenLinear
from deltaw.config.adapter import expert_of
from deltaw.errors import InputError, command, listed
from deltaw.factors import LowRank
from deltaw.files.atomic import write_text_atomic
from deltaw.files.gguf_parts import parts_of, read_model
from deltaw.replaced import Rows, Whole
from deltaw.shipping.beside import missing_stop
from deltaw.shipping.destination import Destination, Options, Written
from deltaw.shipping.gguf.meta import MODELS
from deltaw.shipping.gguf.modelfile import FILE, modelfile
from deltaw.shipping.gguf.names import Family, family
from deltaw.shipping.trained import TEMPLATE, Trained
from deltaw.shipping.usage import base_name, chats, gguf_usage
from deltaw.show.progress import Display
from deltaw.show.text import counted

ADAPTER = "adapter.gguf"
HEAD = "output.weight"
PADDING, ENTRY, KEYS = 32, 200, 4096  # bytes at most, beside the numbers: a tensor's and all keys


class GgufAdapter(Destination):
    """`adapter.gguf` and a Modelfile, for a base that is a GGUF."""

    def __init__(self, trained: Trained, options: Options) -> None:
        super().__init__(trained, options)
        skeleton = trained.base_files.skeleton
        self.family = family(skeleton.config)
        _check_kind(trained)
        _check_experts(trained)
        self.tensors = _tensors(trained, skeleton, self.family)
        self.rank = next(iter(self.tensors.values())).rank
        file, about = _base_file(trained)
        self.modelfile, notes = modelfile(trained, file, adapter=ADAPTER, about=about)
        self.notes = [note for note in (self.family.differs, *notes, _stop_note(trained)) if note]
        own = trained.renderer.own_template or not chats(trained)
        self.template = "" if own else trained.renderer.template or ""  # a server takes the base's unless it is told

    def size(self) -> int:
        tensors = sum(4 * low.parameters + 2 * (PADDING + ENTRY) for low in self.tensors.values())
        return tensors + KEYS + len(self.modelfile.encode()) + len(self.template.encode())

    def write(self, folder: Path, display: Display) -> Written:
        self._write_gguf(folder / ADAPTER, display)
        write_text_atomic(folder / FILE, self.modelfile)
        if self.template:
            write_text_atomic(folder / TEMPLATE, self.template)
        file, about = _base_file(self.trained)
        kind = f"LoRA of rank {self.rank} for a {self.family.architecture} GGUF"
        lines = [f"{ADAPTER}: {kind}, {counted(len(self.tensors), 'module')}, all scales in B", *self.notes]
        if self.trained.base.gguf is not None:
            lines.append(f"the base's GGUF, which Ollama wants beside it: {self.trained.base.gguf}")
        more = {"file": ADAPTER, "rank": self.rank, "architecture": self.family.architecture, "notes": self.notes}
        usage = gguf_usage(self.trained, file, adapter=ADAPTER, template=TEMPLATE if self.template else "")
        return Written(f"{about}\n\n{usage}", lines, more)

    def _write_gguf(self, path: Path, display: Display) -> None:
        from gguf import GGUFWriter, Keys

        writer = GGUFWriter(path, self.family.architecture)
        writer.add_type("adapter")
        writer.add_name(f"LoRA for {self.trained.base.public_name}")
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, self.trained.base.public_name)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, float(self.rank))
        for name, low in self.tensors.items():
            for suffix, factor in _halves(low):
                writer.add_tensor_info(f"{name}.{suffix}", factor.shape, factor.dtype, factor.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with display.task(f"writing {ADAPTER}", len(self.tensors)) as progress:
            for done, low in enumerate(self.tensors.values(), 1):
                for _, factor in _halves(low):
                    writer.write_tensor_data(factor)
                progress(done)
        writer.close()


def _halves(low: LowRank) -> list[tuple[str, "np.ndarray"]]:
    halves = (("lora_a", low.a_RN), ("lora_b", low.b_MR))
    return [(suffix, factor.detach().float().contiguous().numpy()) for suffix, factor in halves]


def _check_kind(trained: Trained) -> None:
    """Raise InputError for what isn't two thin factors."""
    merge = _whole(trained)
    if trained.adapter.spec.full:
        raise InputError(
            f"{trained.name} is full fine-tuning, which an adapter can't hold",
            fix=f"{merge}   a LoRA: {command('extract', trained.name, options=['--rank', '16', '-o', 'lora'])}",
        )
    if trained.adapter.spec.magnitude:
        raise InputError(f"{trained.name} is DoRA, which llama.cpp doesn't load as an adapter", fix=merge)
    words = {Rows.kind: "trained tokens", Whole.kind: "modules that were trained whole"}
    if replaced := [words[update.kind] for update in trained.adapter.replaced.values()]:
        what = f"{trained.name} has {' and '.join(dict.fromkeys(replaced))}, which llama.cpp doesn't load as an adapter"
        raise InputError(what, fix=merge)
    if trained.adapter.embeddings:
        raise InputError(f"{trained.name} has LoRA on an embedding, which isn't written for llama.cpp here", fix=merge)


def _check_experts(trained: Trained) -> None:
    """Raise InputError for updates of experts, which this file's form isn't tried for."""
    if experts := [path for path in trained.adapter.factors if expert_of(path) is not None]:
        raise InputError(
            f"{trained.name} changes experts ({experts[0]}, …), which isn't written as an adapter for llama.cpp",
            fix=_whole(trained),
        )


def _whole(trained: Trained) -> str:
    """What helps where no adapter does: a whole model, by llama.cpp's converter where it isn't written as GGUF here."""
    config: Any = trained.base_files.skeleton.config
    if config.model_type not in MODELS:
        merge = command("merge", trained.name, options=["-o", "merged"])
        return f"the whole model: {merge}   then llama.cpp's own converter"
    options = ["--to", "gguf", "--merged", "-o", "merged-gguf"]
    return f"the whole model: {command('export', trained.name, options=options)}"


def _tensors(trained: Trained, skeleton: nn.Module, names: Family) -> dict[str, LowRank]:
    """The updates by the tensors that they go on. Raises InputError listing those that would not arrive."""
    tensors, problems, modules = {}, [], dict(skeleton.named_modules())
    for path, low in baked(low_rank_updates(trained.adapter, "written as GGUF")).items():
        try:
            _check_layer(modules.get(path), path, low)
            name, placed = names.tensor(f"{path}.weight"), names.factors(path, low)
            if name == HEAD and not _has_head(trained, skeleton):
                raise InputError(f"{path}: the base's GGUF has no head of its own, the embedding is its head, too")
            if not torch.isfinite(placed.b_MR).all():
                raise InputError(f"{path}: its scale times B is too large for float32")
            tensors[name] = placed
        except InputError as error:
            problems.append(error.what)
    if problems:
        raise InputError(
            f"{trained.name}: llama.cpp can't apply {len(problems)} of {len(trained.adapter.factors)} updates:\n"
            f"{listed(problems)}",
            fix=_whole(trained),
        )
    return tensors


def _check_layer(module: nn.Module | None, path: str, low: LowRank) -> None:
    if module is None:
        raise InputError(f"{path:.120}: the base has no such module")
    if not FrozenLinear.can_wrap(module):
        raise InputError(f"{path:.120}: isn't a linear layer")
    shape = FrozenLinear(module).weight.shape
    if shape != low.shape:
        raise InputError(f"{path:.120}: the update is {low.shape}, the layer {shape}")


def _has_head(trained: Trained, skeleton: nn.Module) -> bool:
    if trained.base.gguf is not None:
        return HEAD in read_model(parts_of(trained.base.gguf)).shapes
    head, embedding = skeleton.get_output_embeddings(), skeleton.get_input_embeddings()  # type: ignore[operator]
    return head.weight is not embedding.weight


def _base_file(trained: Trained) -> tuple[str, str]:
    """The name of the base's GGUF, and what to say of it."""
    file = trained.base.gguf
    if file is not None and file.name.isprintable():
        return file.name, f"The base is the GGUF that it was trained on, {base_name(trained)}: put it beside this file."
    return "base.gguf", f"The base is {base_name(trained)} as GGUF: put it beside this file, by the name base.gguf."


def _stop_note(trained: Trained) -> str:
    stop = missing_stop(trained)
    return f"turns end with {stop}: see that the base's GGUF has it as its eos or eot token" if stop else ""
