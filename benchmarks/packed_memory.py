"""Peak memory of a fine-tuning step on a packed base of a Llama shape, with random weights that no file holds.

    python -m benchmarks.packed_memory 1b --weights nf4 --tokens 2048

Each tensor is drawn as it would be read, packed and let go (base/streamed.py), so no disk is needed and the loading is
the real one. One step of AdamW on a LoRA of rank 16 on all linear layers, layers recomputed and few holes in the heap,
as a run does where memory is short. Printed: the base's bytes, and the peak of the process (resident) after loading and
after the step.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.figures import Measured, note
from deltaw.adapter.attach import attach
from deltaw.base.batch import Batch
from deltaw.base.forward import plan_forward
from deltaw.base.load import open_skeleton
from deltaw.base.packing import Packing
from deltaw.base.recompute import Recompute, blocks_of
from deltaw.base.source import Source
from deltaw.base.streamed import StreamPlan, fill, make_buffers
from deltaw.config import AdapterSpec
from deltaw.show.progress import Display
from deltaw.training.memory import bound_caches, few_holes

SHAPES = {  # hidden, MLP, layers, heads, key-value heads, head size, tied
    "tiny": (256, 512, 2, 4, 2, 64, True),
    "1b": (2048, 8192, 16, 32, 8, 64, True),
    "8b": (4096, 14336, 32, 32, 8, 128, False),
}
VOCABULARY = 128_256
WANTED = {("1b", "nf4", 2048): 3.0, ("8b", "nf4", 2048): 12.0}  # GB


def config_of(shape: str) -> LlamaConfig:
    """Llama 3.2 1B's, Llama 3.1 8B's."""
    hidden, mlp, layers, heads, pairs, size, tied = SHAPES[shape]
    return LlamaConfig(
        vocab_size=VOCABULARY if shape != "tiny" else 512,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        head_dim=size,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
    )


def load(shape: str, weights: str, dtype: torch.dtype, display: Display) -> torch.nn.Module:
    """The model, packed tensor by tensor."""
    model = open_skeleton(Source(shape, Path(shape)), config_of(shape), dtype).requires_grad_(False).eval()
    assert make_buffers(model)
    sharing: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        sharing.setdefault(id(parameter), []).append(name)
    shapes = {names[0]: parameters[names[0]].shape for names in sharing.values()}
    generator = torch.Generator().manual_seed(0)

    def read(_: Path, name: str) -> Tensor:
        tensor = torch.empty(shapes[name], dtype=torch.bfloat16)
        return tensor.normal_(0, 0.02, generator=generator) if tensor.ndim > 1 else tensor.fill_(1)

    plan = StreamPlan(model, {Path("random"): list(shapes)}, {names[0]: names for names in sharing.values()})
    with display.task(f"drawing and packing {shape}", plan.count) as progress:
        for _ in fill(plan, Packing(weights, dtype, model), dtype, torch.device("cpu"), progress, read):  # type: ignore[arg-type]
            pass
    return model


def peak() -> float:
    """GB, of this process since it began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--weights", default="nf4", choices=("nf4", "int8", "bfloat16"))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--record", action="store_true", help="keep the figure for docs/performance.md")
    asked = parser.parse_args()
    bound_caches()
    few_holes(torch.device("cpu"))
    began = time.perf_counter()
    model = load(asked.shape, asked.weights, getattr(torch, asked.dtype), Display())
    loaded, load_seconds = peak(), time.perf_counter() - began
    forward = plan_forward(model)
    attached = attach(model, AdapterSpec(rank=16), generator=torch.Generator().manual_seed(0))
    recompute = Recompute(model, blocks_of(model, attached.paths), draws=False)
    optimizer = torch.optim.AdamW(attached.parameters, lr=1e-4)
    ids = torch.randint(3, model.config.vocab_size, (asked.tokens,), generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr]
    began = time.perf_counter()
    loss, count = forward.loss(Batch.of(ids, [0, asked.tokens], ids.roll(-1)))
    (loss / count).backward()
    optimizer.step()
    step_seconds = time.perf_counter() - began
    recompute.remove()
    result = {
        "shape": asked.shape,
        "weights": asked.weights,
        "tokens": asked.tokens,
        "base_gb": sum(parameter.nbytes for parameter in set(model.parameters())) / 1e9,
        "peak_loaded_gb": loaded,
        "peak_gb": peak(),
        "load_seconds": load_seconds,
        "step_seconds": step_seconds,
        "loss": loss.item() / count,
    }
    if asked.record:
        name = f"peak of a step, {asked.shape.upper()} under {asked.weights}, {asked.tokens:,} tokens"
        bound = WANTED.get((asked.shape, asked.weights, asked.tokens))
        note(Measured("When it doesn't fit", name, result["peak_gb"], "GB", bound, at_most=True))  # type: ignore[arg-type]
    print(json.dumps({name: round(value, 3) if isinstance(value, float) else value for name, value in result.items()}))


if __name__ == "__main__":
    main()
