"""What a transformers model's tensors are called in GGUF, and how they are stored there.

The names come from gguf's own table for each architecture. The numbers are the model's own, except for these, which
llama.cpp's mathematics expects (letters: H heads, E size of a head, M outputs, N inputs):

    llama, Mistral     rows of q and k, and their biases, in pairs (i, i + E/2) of each head: llama.cpp rotates
                       neighbours, transformers halves. Per head [2, E/2] -> [E/2, 2]; k has its own number of heads
    Gemma, Nemotron    norms + 1: transformers adds the one when it runs, llama.cpp doesn't
    GPT-2              Conv1D's [N, M] turned to [M, N]
    experts            gate and up, which transformers stacks in one tensor, are two
    shared expert      the gate's one row is a vector

Phi-3's fused q, k, v and gate, up stay fused in the same order, and in other architectures than llama's both sides
rotate halves. An update ΔW = scale · B A of W's rows has its rows in B, so what is done to W's rows is done to B's, and
A stays. deltaw's reader of GGUF (base/gguf_meaning.py) is the other direction, through transformers.

A model that isn't in `TYPES` is refused: its names would fit many architectures, and nobody has checked its numbers
against llama.cpp's.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from deltaw.errors import InputError
from deltaw.factors import LowRank

# transformers' model types -> llama.cpp's architectures.
TYPES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",  # with a tower for pictures, which GGUF keeps in a file of its own
    "phi3": "phi3",
    "gpt2": "gpt2",
    "starcoder2": "starcoder2",
    "stablelm": "stablelm",
    "nemotron": "nemotron",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
NORMS_LESS_ONE = ("gemma2", "gemma3", "nemotron")
WINDOW = "sliding_attention"
TOWER = "language_model."  # where a model that sees pictures keeps the one that reads


def family(config: Any) -> "Family":
    """The rules for a model with this config of transformers. Raises InputError where there are none."""
    if config.model_type not in TYPES:
        raise InputError(
            f"a model of the type {config.model_type!r} can't be written as GGUF",
            fix=f"as GGUF: {', '.join(TYPES)}; for others use deltaw merge and llama.cpp's own converter",
        )
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise InputError("writing GGUF needs a package", fix="pip install 'deltaw[gguf]'") from None
    return Family(config)


class Family:
    """The names and rules of one model. `architecture` is llama.cpp's word for it."""

    def __init__(self, config: Any) -> None:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        self.architecture = TYPES[config.model_type]
        text = config.get_text_config()
        self._heads = {"q_proj": text.num_attention_heads}
        self._heads["k_proj"] = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        self.differs = _window(self.architecture, text)
        """What llama.cpp doesn't do as the model does, in words; empty where there is nothing."""
        number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == self.architecture)
        self._names = get_tensor_name_map(number, text.num_hidden_layers)

    def tensor(self, parameter: str) -> str:
        """The name in GGUF of a parameter that is one tensor there. Raises InputError where it has none."""
        path, kind = _split(parameter)
        name = None if ".experts." in path else self._names.get_name(path.replace(TOWER, "", 1))
        if name is None:
            raise InputError(f"{parameter:.120}: has no place in a GGUF of the architecture {self.architecture}")
        return name + kind

    def stored(self, parameter: str, weight: Tensor) -> dict[str, Tensor]:
        """A parameter as the tensors that GGUF has for it, by name; rows are M as in torch. Views where they do, so
        that it can be asked for the shapes of tensors on the meta device."""
        path, _ = _split(parameter)
        last = path.rpartition(".")[2]
        if ".experts." in f"{path}.":
            return self._experts(path, weight)
        if last in self._heads and self.architecture == "llama":
            weight = permuted(weight, self._heads[last])
        elif last == "shared_expert_gate":
            weight = weight[0]
        elif self.architecture in NORMS_LESS_ONE and parameter.endswith("norm.weight"):
            weight = weight.float() + 1  # in bfloat16 the one would swallow digits
        elif self.architecture == "gpt2" and weight.ndim == 2 and ".h." in f".{path}":
            weight = weight.T
        return {self.tensor(parameter): weight}

    def factors(self, path: str, low: LowRank) -> LowRank:
        """The update of a module's weight as one of the tensor that GGUF stores for it."""
        last = path.rpartition(".")[2]
        if last in self._heads and self.architecture == "llama":
            return replace(low, b_MR=permuted(low.b_MR, self._heads[last]))
        return low

    def _experts(self, path: str, weight: Tensor) -> dict[str, Tensor]:
        before, _, last = path.rpartition(".")
        names = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.get(last)
        block = self._names.get_name(f"{before.removesuffix('.experts')}.gate")  # the router, by one of its names
        if names is None or block is None or weight.ndim != 3:
            raise InputError(f"{path:.120}: has no place in a GGUF of the architecture {self.architecture}")
        stem = block.removesuffix("_gate_inp")
        parts = weight.chunk(len(names), dim=1)
        return {f"{stem}_{name}_exps.weight": part for name, part in zip(names, parts, strict=True)}


def permuted(rows: Tensor, heads: int) -> Tensor:
    """Rows [H (2 E/2), ...] of halves as rows [H (E/2 2), ...] of neighbours."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _window(architecture: str, config: Any) -> str:
    """llama.cpp knows windows of Gemma's alone. It runs the others without, which shows behind the first window."""
    window, layers = getattr(config, "sliding_window", None), getattr(config, "layer_types", None) or [WINDOW]
    if architecture.startswith("gemma") or not window or WINDOW not in layers:
        return ""
    if window >= config.max_position_embeddings:
        return ""
    return (
        f"llama.cpp attends to all tokens where the model sees the last {window:,}: it answers differently after them"
    )


def _split(parameter: str) -> tuple[str, str]:
    """A parameter's module path, and ".weight", ".bias" or nothing."""
    for kind in (".weight", ".bias"):
        if parameter.endswith(kind):
            return parameter.removesuffix(kind), kind
    return parameter, ""
