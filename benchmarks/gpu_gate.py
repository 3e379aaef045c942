"""Correctness first: the truth that every arm of gpu.py is held to before it is timed, and how it is held."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu_arms import ALPHA, RANK, Arm
from benchmarks.gpu_models import TOY, Batch, Effort, batches, build_model, fill_factors

LOSS_GATE, COSINE_GATE = 1e-3, 0.999


class Plain(nn.Module):
    """x Wᵀ + (α / r) x Aᵀ Bᵀ, left to autograd: the truth."""

    def __init__(self, weight_MN: Tensor) -> None:
        super().__init__()
        self.weight_MN = weight_MN
        self.A = nn.Parameter(weight_MN.new_empty(RANK, weight_MN.shape[1]))
        self.B = nn.Parameter(weight_MN.new_empty(weight_MN.shape[0], RANK))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_MN) + ALPHA / RANK * F.linear(F.linear(x, self.A), self.B)


def gate_batch(shape: str, device: str) -> Batch:
    """The one of many documents, of the smallest size."""
    size = (TOY if shape == "toy" else Effort()).sizes[0]
    return max(batches(shape, size, 4, device), key=lambda batch: len(batch.starts_S))


def save_truth(shape: str, batch: Batch, device: str, path: str) -> None:
    """Loss and gradients of the first step in float32, document by document, by transformers and autograd."""
    from safetensors.torch import save_file

    model = build_model(shape, device).float()
    linears = [(path, part) for path, part in model.base_model.named_modules() if isinstance(part, nn.Linear)]
    parameters: dict[str, nn.Parameter] = {}
    for name, linear in linears:
        plain = Plain(linear.weight)
        model.base_model.set_submodule(name, plain)
        prefix = f"{model.base_model_prefix}.{name}"
        parameters |= {f"{prefix}.A": plain.A, f"{prefix}.B": plain.B}
    fill_factors(parameters)
    total = 0.0
    for tokens in batch.tokens_T.split(batch.starts_S.diff().tolist()):
        logits = model(input_ids=tokens[None]).logits[0, :-1]
        loss = F.cross_entropy(logits, tokens[1:], reduction="sum") / batch.count
        loss.backward()
        total += float(loss.detach())
    found = {name: p.grad.cpu() for name, p in parameters.items() if p.grad is not None}
    save_file({"loss": torch.tensor(total, dtype=torch.float64), **found}, path)


def gate(arm: Arm, batch: Batch, truth: Mapping[str, Tensor]) -> tuple[bool, str]:
    """(whether the arm computes the same step, what was compared). Its gradients are dropped again."""
    arm.prepare([batch])
    fill_factors(arm.parameters)
    value = float(arm.passed(batch))
    found = {name: p.grad.float().cpu() for name, p in arm.parameters.items() if p.grad is not None}
    arm.forget()
    wanted = {name: value for name, value in truth.items() if name != "loss"}
    if found.keys() != wanted.keys():
        return False, f"gate: {len(found.keys() ^ wanted.keys())} factors without a partner"
    cosines = {}
    for half in "AB":
        names = sorted(name for name in found if name.endswith(half))
        pairs = [torch.cat([side[name].flatten().double() for name in names]) for side in (found, wanted)]
        cosines[half] = float(F.cosine_similarity(*pairs, dim=0))
    true = float(truth["loss"])
    text = f"loss {value:.5f}, in float32 {true:.5f}; cosine of dA {cosines['A']:.6f}, of dB {cosines['B']:.6f}"
    # Written so that a NaN fails.
    passed = abs(value - true) <= LOSS_GATE and min(cosines.values()) > COSINE_GATE
    return passed, f"gate {'passed' if passed else 'FAILED'}: {text}"
