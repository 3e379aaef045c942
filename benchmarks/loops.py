"""The two bare training loops, PEFT's and deltaw's: one step forward and backward, clip, AdamW.

Both start from the same base bytes and the same file of factors, see the same batches, divide the sum of the losses by
the step's supervised tokens, clip at 1 and take AdamW (fused, betas of PyTorch, no decay) at a constant rate. PEFT gets
padded batches with a mask, sdpa attention, labels of -100 and no cache, which is how its own examples run it; deltaw's
loop does what training/step.py does, through the same functions. B is not zero as it is in a fresh adapter, since dA
would be: nothing could be compared at the first step.

`--without TECHNIQUE` takes one of deltaw's parts out and puts its plain twin in: the ablation rows.

Letters: B rows of a batch, L the longest.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.workloads import BASE, Step, batches, supervised
from deltaw.adapter.attach import attach
from deltaw.adapter.file import Adapter, BaseId
from deltaw.adapter.init import fresh_factors
from deltaw.adapter.stand_ins import KINDS
from deltaw.adapter.targets import explicit_targets, find_targets
from deltaw.base.forward import PADDED, plan_forward
from deltaw.base.frozen import FrozenLinear
from deltaw.base.load import open_base, open_skeleton, quiet
from deltaw.base.source import find_base
from deltaw.config import AdapterSpec, TrainConfig
from deltaw.data.pack import pack
from deltaw.factors import LowRank
from deltaw.kernels.logprobs import IGNORE
from deltaw.training.optim import make_optimizer, set_rate

SPEC = AdapterSpec(rank=16, alpha=32.0, targets="all-linear")
TRAIN = TrainConfig(lr=1e-3, schedule="constant", warmup_steps=0)
B_STD = 0.01  # of the first factors' B
TECHNIQUES = ("packing", "loss", *KINDS)


@dataclass(frozen=True)
class Loop:
    """A model in training. `loss(rows, count)`: the sum of the losses of a batch over `count`, as a tensor.

    `parameters` go by "<module path>.A" and ".B".
    """

    path: str
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    loss: Callable[[Step, int], Tensor]

    def backward(self, step: Step) -> float:
        """The step's mean loss; its gradient is added to the parameters'."""
        count, total = supervised(step), 0.0
        for rows in batches(step):
            loss = self.loss(rows, count)
            total += float(loss.detach())
            loss.backward()
        return total

    @torch.no_grad()
    def evaluate(self, step: Step) -> float:
        """The step's mean loss."""
        count = supervised(step)
        return sum(float(self.loss(rows, count)) for rows in batches(step))

    def step(self, rows: Step) -> float:
        """One update; the loss before it."""
        loss = self.backward(rows)
        nn.utils.clip_grad_norm_(list(self.parameters.values()), TRAIN.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def gradients(self) -> dict[str, Tensor]:
        """What `backward` left, in float32."""
        return {name: p.grad.float() for name, p in self.parameters.items() if p.grad is not None}


def save_factors(folder: Path, seed: int = 0) -> Path:
    """The factors that every arm starts from, as a PEFT folder. Reads no weights."""
    skeleton = open_skeleton(find_base(BASE))
    paths = find_targets(skeleton, SPEC).paths
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for path in paths:
        layer = FrozenLinear(skeleton.get_submodule(path))
        a_RN, b_MR = fresh_factors(SPEC.rank, layer.out_features, layer.in_features, generator)
        factors[path] = LowRank(a_RN, b_MR.normal_(std=B_STD, generator=generator), SPEC.scale(path))
    spec = SPEC.model_copy(update={"targets": explicit_targets(skeleton, paths)})
    return Adapter(spec, factors, BaseId()).save(folder)


def peft_model(factors: Path, dtype: torch.dtype, *, masters: bool = True) -> Any:
    """PEFT on the base as its documentation builds it. `masters`: float32 factors, PEFT's default."""
    from peft import PeftModel  # here, so that deltaw's memory and start-up are not charged for it

    with quiet():
        base = AutoModelForCausalLM.from_pretrained(
            find_base(BASE).directory, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        )
        base.config.use_cache = False
        return PeftModel.from_pretrained(base, factors, is_trainable=True, autocast_adapter_dtype=masters).train()


def peft_loop(factors: Path, dtype: torch.dtype, *, compiled: bool = False) -> Loop:
    """PEFT, eager or under torch.compile."""
    model = peft_model(factors, dtype)
    run = torch.compile(model) if compiled else model

    def loss(rows: Step, count: int) -> Tensor:
        out: Tensor = run(**padded(rows), num_items_in_batch=count).loss
        return out

    parameters = peft_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=TRAIN.lr, weight_decay=TRAIN.weight_decay, fused=True)
    return Loop("padded batches, sdpa" + ", torch.compile" * compiled, parameters, optimizer, loss)


def peft_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's factors under the names used here."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            path, _, half = name.removeprefix("base_model.model.").removesuffix(".default.weight").rpartition(".lora_")
            found[f"{path}.{half}"] = parameter
    return found


def padded(rows: Step) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels [B, L], padded at the end to the longest row; labels not yet shifted."""
    shape = len(rows), max(len(row.tokens) for row in rows)
    ids_BL, real_BL = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels_BL = torch.full(shape, IGNORE)
    for number, row in enumerate(rows):
        ids, trained = torch.from_numpy(row.tokens).long(), torch.from_numpy(row.loss_mask)
        ids_BL[number, : len(ids)], real_BL[number, : len(ids)] = ids, 1
        labels_BL[number, : len(ids)] = ids.where(trained, IGNORE)
    return {"input_ids": ids_BL, "attention_mask": real_BL, "labels": labels_BL}


def deltaw_loop(factors: Path, dtype: torch.dtype, *, without: str | None = None) -> Loop:
    """deltaw as `deltaw train` runs it, or without one of TECHNIQUES. Raises ValueError on another."""
    if without is not None and without not in TECHNIQUES:
        raise ValueError(f"no technique {without!r}; known: {', '.join(TECHNIQUES)}")
    base = open_base(BASE, dtype=str(dtype).removeprefix("torch."), device="cpu")  # type: ignore[arg-type]
    forward = plan_forward(base.model)
    attached = attach(base.model, Adapter.load(factors), fuse=[kind for kind in KINDS if kind != without])
    if without == "packing":
        base.model.set_attn_implementation("sdpa")  # type: ignore[operator]
        forward = dataclasses.replace(forward, way=PADDED)
    elif without == "loss":
        forward = dataclasses.replace(forward, head=None)
    optimizer = make_optimizer(attached, TRAIN)
    set_rate(optimizer, TRAIN.lr)

    def loss(rows: Step, count: int) -> Tensor:
        batch = pack(rows)
        total, _ = forward.loss(batch)
        return total / count

    parameters: dict[str, nn.Parameter] = {}
    for path, layer in attached.layers.items():
        parameters |= {f"{path}.A": layer.lora_a, f"{path}.B": layer.lora_b}
    path = f"{forward.describe()}, {attached.describe()}"
    return Loop(path, parameters, optimizer, loss)
