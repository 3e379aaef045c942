"""The arms of gpu.py: deltaw and its peers, each a loss of a batch and what trains. gpu.py says what each is."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_models import LONGEST, Batch, build_model, free_memory

RANK, ALPHA, LR, CLIP = 16, 32.0, 1e-4, 1.0


@dataclass
class Arm:
    """`loss(batch)`: the mean over its labels, differentiable. Parameters go by "<module path>.A" and ".B".

    `prepare` sees the first batch of each size; `fixed` arms then see that batch alone.
    """

    parameters: dict[str, nn.Parameter]
    loss: Callable[[Batch], Tensor]
    optimizer: torch.optim.Optimizer
    note: str
    prepare: Callable[[Batch], None] = field(default=lambda batch: None)
    fixed: bool = False
    pads: bool = False

    def step(self, batch: Batch) -> Tensor:
        """One update; the loss before it, still on the device."""
        loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(list(self.parameters.values()), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def deltaw_arm(shape: str, device: str, way: str = "") -> Arm:
    from deltaw.adapter.attach import attach
    from deltaw.base.forward import plan_forward
    from deltaw.config import AdapterSpec, TrainConfig
    from deltaw.training.optim import make_optimizer, set_rate

    model = build_model(shape, device)
    forward = plan_forward(model)
    attached = attach(model, AdapterSpec(rank=RANK, alpha=ALPHA))
    optimizer = make_optimizer(attached, TrainConfig(lr=LR))
    set_rate(optimizer, LR)
    parameters: dict[str, nn.Parameter] = {}
    for path, layer in attached.layers.items():
        parameters |= {f"{path}.A": layer.lora_a, f"{path}.B": layer.lora_b}
    note = f"{forward.describe()}, {attached.describe()}"
    if way == "graph":
        return _graphed(model, forward, Arm(parameters, lambda batch: torch.empty(0), optimizer, note, fixed=True))
    if way == "compile":
        for layer in model.base_model.layers:
            layer.compile(dynamic=False)

    def loss(batch: Batch) -> Tensor:
        total, count = forward.loss(batch.packed)
        return total / count

    # A size is compiled for itself.
    prepare = (lambda batch: torch._dynamo.reset()) if way == "compile" else (lambda batch: None)
    return Arm(parameters, loss, optimizer, note, prepare)


class Body(nn.Module):
    """A model up to its head, on documents that do not change."""

    def __init__(self, model: Any, batch: Batch) -> None:
        from deltaw.base.passing import Pass, passing_of

        super().__init__()
        self.base = model.base_model
        self.positions_T = batch.positions_T
        self.passing, self.this = passing_of(model), Pass(documents=batch.packed.documents)

    def forward(self, tokens_T: Tensor) -> Tensor:
        with self.passing.running(self.this):
            out = self.base(input_ids=tokens_T[None], position_ids=self.positions_T[None], use_cache=False)
        return out.last_hidden_state[0]


def _graphed(model: Any, forward: Any, arm: Arm) -> Arm:
    if not forward.packed or forward.head is None:
        raise RuntimeError("graphs need packed documents and a fused head")
    bodies: list[Any] = []

    def prepare(batch: Batch) -> None:
        bodies.clear()
        free_memory()
        bodies.append(torch.cuda.make_graphed_callables(Body(model, batch), (batch.tokens_T,)))

    def loss(batch: Batch) -> Tensor:
        return forward.head.logprobs(bodies[0](batch.tokens_T), batch.labels_T).loss / batch.count

    arm.prepare, arm.loss = prepare, loss
    return arm


def peft_arm(shape: str, device: str, way: str = "") -> Arm:
    import peft
    from peft.helpers import disable_input_dtype_casting

    note = f"peft {peft.__version__}"
    if way == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
        note += f", liger_kernel {version('liger_kernel')}"
    spec = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(build_model(shape, device), spec, autocast_adapter_dtype=way != "bf16").train()

    def loss(batch: Batch) -> Tensor:
        with disable_input_dtype_casting(model), torch.autocast(device, torch.bfloat16, enabled=way != "bf16"):
            return _transformers_loss(model, batch)

    return _peft_like(model, loss, note)


def unsloth_arm(shape: str, device: str, way: str = "") -> Arm:
    from unsloth import FastLanguageModel  # isort: skip, it wants to be imported before transformers

    with tempfile.TemporaryDirectory() as folder:  # it loads from a folder only
        build_model(shape, device).save_pretrained(folder)
        _save_tokenizer(folder)
        free_memory()
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=LONGEST, dtype=torch.bfloat16, load_in_4bit=False
        )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, lora_dropout=0, target_modules=names, use_gradient_checkpointing=False
    )
    FastLanguageModel.for_training(model, use_gradient_checkpointing=False)

    def loss(batch: Batch) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return _transformers_loss(model, batch)

    return _peft_like(model, loss, f"unsloth {version('unsloth')}")


def _transformers_loss(model: Any, batch: Batch) -> Tensor:
    out: Tensor = model(input_ids=batch.ids_BL, labels=batch.padded_BL, num_items_in_batch=batch.count).loss
    return out


def _peft_like(model: nn.Module, loss: Callable[[Batch], Tensor], note: str) -> Arm:
    parameters: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            path, _, half = name.removeprefix("base_model.model.").removesuffix(".default.weight").rpartition(".lora_")
            parameters[f"{path}.{half}"] = parameter
    optimizer = torch.optim.AdamW(parameters.values(), lr=LR, weight_decay=0.0, fused=True)
    return Arm(parameters, loss, optimizer, note, pads=True)


def _save_tokenizer(folder: str) -> None:
    """The least that a loader takes for one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)


ARMS: dict[str, tuple[Callable[[str, str, str], Arm], str]] = {
    "deltaw": (deltaw_arm, ""),
    "deltaw-graph": (deltaw_arm, "graph"),
    "deltaw-compile": (deltaw_arm, "compile"),
    "peft": (peft_arm, ""),
    "peft-bf16": (peft_arm, "bf16"),
    "peft-liger": (peft_arm, "liger"),
    "unsloth": (unsloth_arm, ""),
}
