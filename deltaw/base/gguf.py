"""Reading GGUF: a `.gguf` file -> an ordinary model folder in the cache, made once.

Three steps, kept apart. The header is walked with every count checked (gguf_header.py), so that a hostile file costs
milliseconds and no memory. Its contents are turned into the fields of a config, all or nothing (gguf_meaning.py,
gguf_tokens.py). Only a file that passes both is given to transformers, which dequantises it (about 20 s for 135M
parameters, nearly all of it parsing metadata); every number in the file must have become one of the model's, and
that is written to the cache as safetensors + config + tokenizer.

The cache holds bfloat16, not float32: it is half as large, it is the dtype that training uses, and a 4-bit weight
loses nothing that matters. Rounding moves a weight by at most 2^-8 of itself (measured on SmolLM2's Q4_1: 0.389 % at
worst, 0.14 % of a tensor's norm), while Q4_1 itself has 16 levels for each block of 32 weights.

The cache's key is the file's SHA-256 (of all parts', where it comes in parts, gguf_parts.py), so that a copied or
renamed file is found again; the hash is remembered (files/content.py), so that a second opening reads nothing. A
conversion runs under a file lock, in a hidden folder beside the final one, is fsynced and renamed: a folder that can
be seen is complete, and whoever waited uses it.

Rejected: the config that transformers' reader makes (it passes over what it doesn't know, such as the scaling of
rotary positions), dequantising on every start (20 s), and training on the quantised weights (the base would be
approximated twice).
"""

import contextlib
import hashlib
import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deltaw.base.gguf_meaning import Meaning, read_meaning
from deltaw.base.gguf_tokens import SPLITTINGS, Splitting, read_splitting, write_tokenizer
from deltaw.errors import InputError, RunError, listed
from deltaw.files.atomic import replacing_folder
from deltaw.files.content import content_hash
from deltaw.files.gguf_header import Header, architecture
from deltaw.files.gguf_parts import join, parts_of, read_model
from deltaw.files.lock import LOCK, locked
from deltaw.show.progress import QUIET, Display

FORMAT = "v2"  # of the converted folder; a change makes every file convert again
MODEL_TYPES = {
    "gemma3": "gemma3_text",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
}  # transformers' names, where they aren't llama.cpp's

# llama.cpp's names of what transformers calls otherwise, beside those that differ by a dash or a line only.
LLAMA_CPP_NAMES = {
    "cohere": "command-r",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "ernie4_5_moe": "ernie4_5-moe",
    "falcon_mamba": "mamba",
    "gpt_bigcode": "starcoder",
    "granitemoehybrid": "granitehybrid",
    "hunyuan_v1_dense": "hunyuan-dense",
    "hunyuan_v1_moe": "hunyuan-moe",
    "internlm3": "llama",
    "minimax_m2": "minimax-m2",
    "ministral3": "mistral3",
    "mistral": "llama",
    "mixtral": "llama",
    "olmo3": "olmo2",
    "phi": "phi2",
    "qwen3_5_moe_text": "qwen35moe",
    "qwen3_5_text": "qwen35",
}

# What transformers' reader tells by which tensors there are, or knows of an architecture; the rest is ours.
FROM_TENSORS = ("tie_word_embeddings", "use_qkv_bias", "use_parallel_residual", "norm_topk_prob")


def llama_cpp_name(model_type: str) -> str | None:
    """llama.cpp's name of an architecture, or None for one that it isn't known to have."""
    from gguf.constants import MODEL_ARCH_NAMES

    bare = model_type.removesuffix("_text")
    names = (LLAMA_CPP_NAMES.get(model_type, model_type), bare, bare.replace("_", ""), bare.replace("_", "-"))
    return next((name for name in names if name in MODEL_ARCH_NAMES.values()), None)


def stored_names(header: Header, names: Iterable[str]) -> dict[str, str]:
    """What a file calls a model's tensors, by the model's names; those that it isn't known to have are left out.

    transformers' own table of this is made anew for each of a model's modules, which takes 10 s."""
    from gguf.constants import MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    kind = architecture(header)
    blocks = header.metadata.get(f"{kind}.block_count")
    number = next((number for number, name in MODEL_ARCH_NAMES.items() if name == kind), None)
    if number is None or not isinstance(blocks, int):
        return {}
    known = get_tensor_name_map(number, blocks)
    found: dict[str, str] = {}
    for name in names:
        for asked in (name, name.partition(".")[2]):
            stored = known.get_name(asked, try_suffixes=(".weight", ".bias"))
            if stored in header.shapes:
                found.setdefault(name, stored)
    return found


def to_folder(path: Path, cache: Path, *, display: Display = QUIET) -> Path:
    """The model folder made from a GGUF file: out of `cache`, or converted into it now.

    `display` shows a line before the conversion. Raises InputError for a file that can't be used,
    RunError when the cache can't be written.
    """
    parts, folder = parts_of(path), folder_of(path, cache)
    if folder.is_dir():
        return folder
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise InputError(f"{path}: reading GGUF needs a package", fix="pip install 'deltaw[gguf]'") from None
    header = read_model(parts)
    meaning, splitting = read_meaning(path, header), read_splitting(path, header)
    with locked(cache / f"{folder.name}{LOCK}", f"the cache {cache}", wait=True):
        if not folder.is_dir():
            display.say(f"converting {path.name} to safetensors, once (about 20 s for 135M parameters)")
            if splitting == SPLITTINGS["default"]:
                display.say(f"{path.name} doesn't say how its tokenizer splits text: it is split as in llama.cpp")
            with replacing_folder(folder, fix="free some space, or set DELTAW_CACHE to another disk") as temporary:
                _convert(parts, header, meaning, splitting, temporary)
    return folder


def folder_of(path: Path, cache: Path) -> Path:
    """Where `to_folder` puts a GGUF file's folder, by its content: two files that share it hold the same model."""
    try:
        (cache / "known").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{cache}: can't be written: {error}", fix="point DELTAW_CACHE at another folder") from None
    hashes = [content_hash(part, cache / "known") for part in parts_of(path)]
    key = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    return cache / f"{key[:32]}-{FORMAT}"


def _convert(parts: list[Path], header: Header, meaning: Meaning, splitting: Splitting | None, folder: Path) -> None:
    """Dequantise with transformers and save model, config and tokenizer into `folder`, all bfloat16."""
    path = parts[0]
    file = path.absolute()  # by a bare name, transformers takes the file of that name in the working directory
    if len(parts) > 1:
        file = (folder / path.name).absolute()
        join(parts, header, file)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from deltaw.base.loading import check_loading, quiet

    try:
        # The dequantiser's progress bar listens to nothing but stderr.
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            begins = {"add_bos_token": True} if splitting is not None and splitting.bos else {}  # unless the file says
            tokenizer = AutoTokenizer.from_pretrained(
                file.parent, gguf_file=str(file), trust_remote_code=False, **begins
            )
            model, info = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=str(file),
                config=_config(
                    path, file, header, meaning, MODEL_TYPES.get(architecture(header), architecture(header))
                ),
                dtype=torch.bfloat16,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except (MemoryError, KeyboardInterrupt, InputError):
        raise
    except Exception as error:  # whatever a foreign reader makes of a stranger's file
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise InputError(
            f"{path}: transformers can't read this model ({type(error).__name__}: {reason})",
            fix="use a safetensors version of the model",
        ) from None
    check_loading(path, info)
    _check_all_used(path, header, meaning, model)
    config = _config(path, file, header, meaning, meaning.model_type or model.config.model_type)
    with quiet():
        _plain(model, config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    write_tokenizer(folder, header, splitting)
    if len(parts) > 1:
        file.unlink()


def _config(path: Path, file: Path, header: Header, meaning: Meaning, model_type: str) -> Any:
    """The config with the fields that the file means, every one of them checked to be there."""
    from transformers import AutoConfig

    read = AutoConfig.from_pretrained(file.parent, gguf_file=str(file), trust_remote_code=False).to_dict()
    read = {name: read[name] for name in FROM_TENSORS if name in read}
    ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    read |= {name: header.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in ids.items()}
    names = type(AutoConfig.for_model(model_type)).attribute_map
    config = AutoConfig.for_model(model_type, **read | {names.get(k, k): v for k, v in meaning.config.items()})
    for name, wanted in meaning.config.items():
        arrived = getattr(config, name, None)
        if not (arrived == wanted or (isinstance(wanted, dict) and _within(wanted, arrived))):
            raise InputError(
                f"{path}: {name} is {str(wanted)[:80]}, but {model_type} turned it into {str(arrived)[:80]}",
                fix="use the safetensors version of the model",
            )
    return config


def _within(wanted: dict[str, Any], arrived: Any) -> bool:
    return isinstance(arrived, dict) and all(
        _within(value, arrived.get(name)) if isinstance(value, dict) else arrived.get(name) == value
        for name, value in wanted.items()
    )


def _check_all_used(path: Path, header: Header, meaning: Meaning, model: Any) -> None:
    """Raise InputError unless every number in the file became one of the model's.

    All parameters were filled, so if their numbers are as many as the file's, nothing was left over. Counting needs no
    knowledge of who renames what; the names are only for the message.
    """
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    shapes = {name: shape for name, shape in header.shapes.items() if name not in meaning.tensors}
    surplus = sum(map(math.prod, shapes.values())) - sum(weight.numel() for weight in model.parameters())
    if surplus:
        known = get_gguf_hf_weights_map(model, TENSOR_PROCESSORS.get(architecture(header), TensorProcessor)())
        names = [name for name in shapes if name not in known] or ["by number, not by name"]
        raise InputError(
            f"{path}: {surplus:,} numbers in it have no place in a {model.config.model_type} model:\n{listed(names)}",
            fix="use the safetensors version of the model",
        )


def _plain(model: Any, config: Any) -> Any:
    """The same weights in a model that doesn't think it is quantised (such a one refuses to be saved)."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain
