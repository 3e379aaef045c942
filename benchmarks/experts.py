"""LoRA on experts: training steps of deltaw and of PEFT (`target_parameters`), in turns, from the same factors.

    python -m benchmarks.experts [--record] [--steps 6] [--experts 32] [--hidden 384] [--tokens 256]

A random mixture of four layers in float32 with two of its experts for each token, adapted in all its linear layers and
all its experts. A step is forward, backward and AdamW's update on documents of 64 random tokens, all trained; the first
losses must agree. PEFT runs the model by transformers' implementations of experts that a CPU has, the fastest counts.
Seconds are those of this process's CPU where `--cpu` is given, for a machine that others use. What a module of experts
costs with an update of rank 1 is told beside the model's own.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.figures import Measured, note
from deltaw.adapter.attach import attach
from deltaw.adapter.experts import AdaptedExperts
from deltaw.adapter.file import BaseId
from deltaw.base.batch import Batch
from deltaw.base.forward import plan_forward
from deltaw.config import AdapterSpec, TrainConfig
from deltaw.training.optim import make_optimizer

SECTION = "LoRA on experts"
WANTED = 3.0
LENGTH, VOCABULARY = 64, 2048


def mixture(experts: int, hidden: int) -> nn.Module:
    """A random Qwen3-MoE."""
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, head_dim=hidden // 8, num_experts=experts, num_experts_per_tok=2,
        moe_intermediate_size=hidden, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config).float().requires_grad_(False)
    return model


def tokens(count: int, seed: int) -> Tensor:
    """Documents of random tokens, [documents, LENGTH]."""
    return torch.randint(VOCABULARY, (count // LENGTH, LENGTH), generator=torch.Generator().manual_seed(seed))


Step = Callable[[Tensor], float]


def deltaw_step(model: nn.Module, rank: int) -> tuple[Step, Any]:
    """(a step, what it is attached to)."""
    forward = plan_forward(model)
    attached = attach(model, AdapterSpec(rank=rank, alpha=2.0 * rank, targets=("all-linear", "experts")))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in attached.parameters:
            parameter.normal_(0, 0.02, generator=generator)
    optimizer = make_optimizer(attached, TrainConfig())

    def step(rows: Tensor) -> float:
        labels = rows.roll(-1, 1)
        labels[:, -1] = -100
        loss, count = forward.loss(Batch.of(rows.flatten(), list(range(0, rows.numel() + 1, LENGTH)), labels.flatten()))
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach()) / count

    return step, attached


def peft_step(model: nn.Module, folder: str, way: str) -> Step:
    """The same with PEFT's model of the saved adapter."""
    model.set_experts_implementation(way)  # type: ignore[operator]
    tuned = PeftModel.from_pretrained(model, folder, is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3)

    def step(rows: Tensor) -> float:
        loss = tuned(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def turns(steps: dict[str, Step], count: int, size: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds per step of each, by the median; the first of each warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(count + 1):
        rows = tokens(size, number)
        for name, step in steps.items():
            began = clock()
            loss = step(rows)
            if number:
                seconds[name].append(clock() - began)
            else:
                print(f"{name}: {loss:.6f} at first", flush=True)
    return {name: statistics.median(some) for name, some in seconds.items()}


def frozen(model: nn.Module, size: int, count: int, clock: Callable[[], float]) -> float:
    """How fast an adapted module of experts is whose update is rank 1, beside the fastest of the model's own ways."""
    own = next(module for path, module in model.named_modules() if path.endswith("mlp.experts"))
    holder = nn.ModuleDict({"experts": copy.deepcopy(own)})
    attach(holder, AdapterSpec(rank=1, alpha=1.0, targets="experts"), fuse=())
    mine = holder["experts"]
    assert isinstance(mine, AdaptedExperts)
    generator = torch.Generator().manual_seed(3)
    x_TN = torch.randn(size, own.down_proj.shape[1], generator=generator).requires_grad_()
    experts_TK = torch.randint(own.num_experts, (size, 2), generator=generator)
    weights_TK = torch.rand(size, 2, generator=generator)

    def run(module: nn.Module) -> float:
        total = module(x_TN, experts_TK, weights_TK).sum()
        total.backward()
        return float(total.detach())

    steps: dict[str, Step] = {"deltaw": lambda _: run(mine)}
    for way in ("eager", "grouped_mm"):
        other = copy.deepcopy(own)
        other.config = copy.deepcopy(own.config)
        other.config._experts_implementation = way
        steps[way] = lambda _, other=other: run(other)  # type: ignore[misc]
    seconds = turns(steps, count, LENGTH, clock)
    print({name: f"{1e3 * some:.1f} ms" for name, some in seconds.items()})
    return min(some for name, some in seconds.items() if name != "deltaw") / seconds["deltaw"]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--steps", type=int, default=6)
    asked.add_argument("--experts", type=int, default=32)
    asked.add_argument("--hidden", type=int, default=384)
    asked.add_argument("--tokens", type=int, default=256)
    asked.add_argument("--rank", type=int, default=16)
    asked.add_argument("--cpu", action="store_true", help="seconds of this process's CPU")
    asked.add_argument("--record", action="store_true")
    options = asked.parse_args()
    clock = time.process_time if options.cpu else time.perf_counter
    model = mixture(options.experts, options.hidden)
    ratio_frozen = frozen(model, options.tokens, options.steps, clock)
    print(f"frozen products: {ratio_frozen:.2f} x as fast as the model's own")
    plain = copy.deepcopy(model)
    step, attached = deltaw_step(model, options.rank)
    with tempfile.TemporaryDirectory() as folder:
        attached.adapter(BaseId("random")).save(folder)
        steps = {"deltaw": step}
        for way in ("eager", "grouped_mm"):
            steps[f"PEFT, {way}"] = peft_step(copy.deepcopy(plain), folder, way)
        seconds = turns(steps, options.steps, options.tokens, clock)
    best = min(some for name, some in seconds.items() if name != "deltaw")
    for name, some in seconds.items():
        print(f"{name}: {some:.2f} s per step, {options.tokens / some:.0f} tokens/s")
    print(f"deltaw: {best / seconds['deltaw']:.2f} x as fast as the fastest of PEFT")
    if options.record:
        note(Measured(SECTION, "a mixture trained with LoRA on its experts, of PEFT's speed",
                      round(best / seconds["deltaw"], 2), bound=WANTED))  # fmt: skip
        note(Measured(SECTION, "frozen experts' products, of the model's own speed", round(ratio_frozen, 2), bound=1.0))


if __name__ == "__main__":
    main()
