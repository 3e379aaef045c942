"""MLX: adapters.safetensors and adapter_config.json as mlx_lm.load(base, adapter_path=…) reads them.

    lora_a [N, R] = Aᵀ      lora_b [R, M] = s Bᵀ      m [M], DoRA's magnitudes

transposed relative to PEFT; y += scale · (x lora_a) lora_b with one scale and one rank for all modules, so the scales
go into B, scale is 1, and rows of zeros make one rank. DoRA is the same formula there, m ∘ V / ‖V‖ by rows (a test
holds real mlx_lm to it).

Which modules get factors is said twice: `num_layers` blocks counted from the last one, and in each of them the modules
whose paths within the block are in `keys`. A module that both name but the file lacks starts with lora_b = 0 and
changes nothing. Other versions silently load tensors that match nothing (mlx_lm 0.32 refuses them), so the names
are checked here against its classes. They are transformers' own for most types; KNOWN has those for which real mlx_lm
gave the same logits as transformers with an adapter on every layer, and a type that isn't listed is refused: a merged
model, which mlx_lm converts itself, is the safe way then.

GPT-2's Conv1D is an ordinary linear layer there, and A, B are the same for both. Phi-3's fused layers are fused there.

Letters: M outputs, N inputs, R rank, s scale.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from deltaw.adapter.algebra import baked
from deltaw.errors import InputError, listed
from deltaw.factors import LowRank
from deltaw.files.atomic import write_text_atomic
from deltaw.files.safetensors import save_safetensors
from deltaw.shipping.beside import beside_size, write_beside
from deltaw.shipping.destination import Destination, Options, Written
from deltaw.shipping.peft import adapter_size, check_fits, refuse_experts, refuse_full, remade
from deltaw.shipping.trained import Trained
from deltaw.shipping.usage import mlx_usage
from deltaw.show.progress import Display
from deltaw.show.text import counted

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
# By model type: what transformers' paths begin with, and mlx_lm's.
KNOWN: dict[str, tuple[str, str]] = {
    **dict.fromkeys((
        "cohere", "cohere2", "ernie4_5", "gemma", "gemma2", "gemma3_text", "glm4", "granite", "helium",
        "hunyuan_v1_dense", "llama", "mistral", "mixtral", "nemotron", "olmo2", "olmo3", "olmoe", "phi", "phi3",
        "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2",
    ), ("", "")),
    "gemma3": ("model.language_model.", "language_model.model."),
    "gpt2": ("transformer.", "model."),
}  # fmt: skip
BLOCK = re.compile(r".*\.(?:layers|h)\.(?P<number>\d+)\.(?P<key>.+)")


class MlxAdapter(Destination):
    """A folder for mlx_lm.load(base, adapter_path=folder)."""

    def __init__(self, trained: Trained, options: Options) -> None:
        super().__init__(trained, options)
        refuse_full(trained)
        skeleton = trained.base_files.skeleton
        kind = str(skeleton.config.model_type)  # type: ignore[union-attr]
        if kind not in KNOWN:
            raise InputError(
                f"mlx_lm's names for the layers of {kind} aren't known here, and it may ignore names that it "
                "doesn't know",
                fix=f"convert the whole model: {remade('merge', trained)}   then: mlx_lm.convert --hf-path …",
            )
        refuse_experts(trained, "an adapter for mlx_lm")
        self.names = {path: mlx_name(path, kind) for path in trained.adapter.factors}
        outside = [path for path, name in self.names.items() if not BLOCK.fullmatch(name)]
        if outside:
            fix = f"the whole model: {remade('merge', trained)}"
            raise InputError(f"mlx_lm adapts the layers of the language model's blocks only:\n{listed(outside)}", fix)
        check_fits(trained, skeleton)
        self.blocks = int(skeleton.config.get_text_config().num_hidden_layers)  # type: ignore[union-attr, operator]

    def size(self) -> int:
        lows = lows_of(self.trained)
        rank = max(low.rank for low in lows.values())
        padding = sum(4 * (rank - low.rank) * sum(low.shape) for low in lows.values())
        return adapter_size(self.trained.adapter) + padding + beside_size(self.trained)

    def write(self, folder: Path, display: Display) -> Written:
        lows = baked(lows_of(self.trained))
        save_safetensors(self._tensors(lows), folder / WEIGHTS)
        write_text_atomic(folder / CONFIG, json.dumps(self._config(lows), indent=2) + "\n")
        write_beside(self.trained, folder)
        kind = "DoRA" if self.trained.adapter.spec.magnitude else "LoRA"
        rank = next(iter(lows.values())).rank
        return Written(mlx_usage(self.trained), [f"{kind} for mlx_lm: {counted(len(lows), 'module')}, rank {rank}"])

    def _tensors(self, lows: Mapping[str, LowRank]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for path, low in lows.items():
            name, magnitude_M = self.names[path], self.trained.adapter.factors[path].tensors().get("magnitude")
            tensors |= {f"{name}.lora_a": low.a_RN.T, f"{name}.lora_b": low.b_MR.T}
            if magnitude_M is not None:
                tensors[f"{name}.m"] = magnitude_M
        return {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}

    def _config(self, lows: Mapping[str, LowRank]) -> dict[str, object]:
        places = [match for name in self.names.values() if (match := BLOCK.fullmatch(name))]
        return {
            "fine_tune_type": self.trained.adapter.spec.kind,
            "num_layers": self.blocks - min(int(place["number"]) for place in places),
            "lora_parameters": {
                "rank": next(iter(lows.values())).rank,
                "scale": 1.0,
                "dropout": 0.0,
                "keys": sorted({place["key"] for place in places}),
            },
        }


def mlx_name(path: str, kind: str) -> str:
    """What mlx_lm calls the module of a path in a model of a known type; "" for one that it doesn't have."""
    ours, theirs = KNOWN[kind]
    return theirs + path.removeprefix(ours) if path.startswith(ours) else ""


def lows_of(trained: Trained) -> dict[str, LowRank]:
    """The low-rank part of each update of an adapter that isn't full fine-tuning."""
    return {path: LowRank.of(update.tensors(), update.scale) for path, update in trained.adapter.factors.items()}
