"""Which form of an adapter or a model a name stands for, and what all forms have in common.

peft     a run, or a folder with adapter_config.json, adapter_model.safetensors or delta.safetensors
gguf     a .gguf file, an adapter's or a whole model's
mlx      a folder with adapters.safetensors
model    a folder with config.json: a merged model
"""

from pathlib import Path
from typing import Literal

from deltaw.adapter.file import CONFIG, DELTAS, WEIGHTS, is_run
from deltaw.base.source import HUB_ID
from deltaw.errors import InputError
from deltaw.shipping.lint.finding import (
    DESTINATIONS,
    LLAMA_CPP,
    MLX,
    OLLAMA,
    PEFT,
    REFUSED,
    TRANSFORMERS,
    VLLM,
    Finding,
    code,
    some,
)

Form = Literal["peft", "gguf", "mlx", "model"]
READERS: dict[Form, tuple[str, ...]] = {  # the programs that read it as it is, the one that it was made for first
    "peft": (PEFT, TRANSFORMERS, VLLM),
    "gguf": (LLAMA_CPP, OLLAMA),
    "mlx": (MLX,),
    "model": (TRANSFORMERS, VLLM),
}
CONVERTS: dict[Form, tuple[str, ...]] = {"peft": (LLAMA_CPP, OLLAMA), "model": (PEFT, LLAMA_CPP, OLLAMA, MLX)}
MLX_WEIGHTS = "adapters.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"  # PEFT's before safetensors
FILES = (CONFIG, WEIGHTS, DELTAS, PICKLED_WEIGHTS)  # any of them is a sign of PEFT's layout
OTHER_FORM = code(
    "DW108",
    "a form that the destination can't read: mlx-lm reads no folder in PEFT's layout, PEFT and vLLM read no GGUF",
    {MLX: REFUSED},
    "export it for the place where it will run",
)


def form_of(path: Path) -> Form:
    """The form of what lies at `path`, a run's included. Raises InputError for anything else."""
    if is_run(path):
        return "peft"
    if path.is_file():
        if path.suffix == ".gguf":
            return "gguf"
        raise InputError(f"{path} is a file, not a folder", fix=f"name its folder: {path.parent}")
    if not path.is_dir():
        download = f"from the hub: hf download {path} --local-dir {path.name}" if HUB_ID.fullmatch(str(path)) else None
        raise InputError(f"{path}: no such adapter", fix=download)
    if (path / MLX_WEIGHTS).is_file():
        return "mlx"
    if any((path / file).is_file() for file in FILES):
        return "peft"
    if (path / "config.json").is_file():
        return "model"
    fix = "name a run, an adapter's folder or a .gguf file"
    if inside := sorted(path.glob("*.gguf")):
        fix = f"name the file itself: {inside[0]}"
    elif folders := sorted({file.parent for name in (CONFIG, MLX_WEIGHTS) for file in path.glob(f"*/{name}")}):
        fix = f"name one of the folders in it: {some([folder.name for folder in folders], 4)}"
    raise InputError(f"{path}: holds no adapter", fix=fix)


def other_form(form: Form, fix: str) -> Finding:
    """The finding for destinations that read only other forms."""
    strangers = [place for place in DESTINATIONS if place not in READERS[form] + CONVERTS.get(form, ())]
    kind = {"peft": "in PEFT's layout", "gguf": "a GGUF", "mlx": "in mlx-lm's layout", "model": "a whole model"}[form]
    *most, last = [DESTINATIONS[place] for place in strangers]
    names = f"{', '.join(most)} and {last}" if most else last
    return OTHER_FORM.finding(f"it is {kind}, which {names} can't read", fix, dict.fromkeys(strangers, REFUSED))
