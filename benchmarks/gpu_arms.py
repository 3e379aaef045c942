"""The arms of gpu.py: deltaw and its peers, each the steps on a batch and what they train. gpu.py says what each is."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_models import Batch, build_model, free_memory, longest_of

RANK, ALPHA, LR, CLIP = 16, 32.0, 1e-4, 1.0


@dataclass
class Arm:
    """Parameters go by "<module path>.A" and ".B".

    `passed(batch)`: forward and backward; the loss, a mean over its labels, and the gradients in `grad`.
    `step(batch, coming)`: one update; the loss before it. `coming`: the batch of the next one.
    `prepare(some)`: sees the batches of a size before any is timed.
    """

    parameters: dict[str, nn.Parameter]
    passed: Callable[[Batch], Tensor | float]
    step: Callable[[Batch, Batch], Tensor | float]
    note: str
    prepare: Callable[[Sequence[Batch]], None] = field(default=lambda some: None)
    pads: bool = False

    @staticmethod
    def plain(
        parameters: dict[str, nn.Parameter],
        loss: Callable[[Batch], Tensor],
        optimizer: torch.optim.Optimizer,
        note: str,
        *,
        pads: bool = False,
    ) -> "Arm":
        """Of a loss that is differentiable, each operation launched by itself; nothing waits for the device."""

        def passed(batch: Batch) -> Tensor:
            value = loss(batch)
            value.backward()
            return value.detach()

        def step(batch: Batch, coming: Batch) -> Tensor:
            value = passed(batch)
            nn.utils.clip_grad_norm_(list(parameters.values()), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return value

        return Arm(parameters, passed, step, note, pads=pads)

    def forget(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None


def deltaw_arm(shape: str, device: str, way: str = "") -> Arm:
    from deltaw.adapter.attach import attach
    from deltaw.base.forward import plan_forward
    from deltaw.config import AdapterSpec, TrainConfig
    from deltaw.training.attention import choose_attention
    from deltaw.training.optim import make_optimizer, set_rate

    model = build_model(shape, device)
    forward = plan_forward(model)
    attached = attach(model, AdapterSpec(rank=RANK, alpha=ALPHA))
    parameters: dict[str, nn.Parameter] = {}
    for path, layer in attached.layers.items():
        parameters |= {f"{path}.A": layer.lora_a, f"{path}.B": layer.lora_b}
    note = f"{forward.describe()}, {attached.describe()}"
    if way == "":
        given: Any = SimpleNamespace(base=SimpleNamespace(model=model, device=model.device, dtype=model.dtype))
        given.forward, said = forward, list[str]()
        choose_attention(given, longest_of(shape), said.append)  # as a run does when its model is opened
        return _captured(parameters, forward, attached, longest_of(shape), "; ".join([note, *said]))
    optimizer = make_optimizer(attached, TrainConfig(lr=LR))
    set_rate(optimizer, LR)

    def loss(batch: Batch) -> Tensor:
        total, count = forward.loss(batch.packed)
        return total / count

    return Arm.plain(parameters, loss, optimizer, note)


class Steps:
    """What `deltaw train` does of a step on a device, on batches of up to `size` tokens: passes, clip and update,
    recorded once and replayed. Without a GPU the same runs as it is."""

    def __init__(self, forward: Any, attached: Any, size: int, longest: int) -> None:
        from deltaw.config import TrainConfig
        from deltaw.training.captured import Captured, captured_on
        from deltaw.training.checkpoint import TrainState
        from deltaw.training.learner import Learner
        from deltaw.training.optim import set_rate

        self.said: list[str] = []
        self._coming: list[Any] = []
        config = TrainConfig(lr=LR, clip=CLIP, tokens_per_batch=size)
        self.learner = Learner(attached, config, 1000, TrainState(), self.said.append)
        set_rate(self.learner.optimizer, LR)
        given = (forward, self.learner, longest, self.said.append)
        device = attached.parameters[0].device
        captured = captured_on(device, *given, lambda: self._coming)
        self.captured = captured or Captured(*given, None, lambda: self._coming)

    def passed(self, batches: Sequence[Any], coming: Sequence[Any]) -> tuple[float, Callable[[], object]]:
        """Forward and backward of a step's batches, which lie on the host; the gradients, clipped, are in `grad`. (The
        mean loss, the update.)"""
        self._coming = list(coming)
        count = sum(batch.supervised for batch in batches)
        ran = self.captured.run(batches, count)
        if ran is None:
            raise RuntimeError(f"steps aren't captured: {self.captured.why_not}")
        return sum(ran.losses.values()) / count, ran.update

    def step(self, batches: Sequence[Any], coming: Sequence[Any]) -> float:
        """One update; the mean loss before it."""
        loss, update = self.passed(batches, coming)
        update()
        return loss

    def meet(self, some: Sequence[Sequence[Any]]) -> None:
        """So many steps that every size of these steps' batches is recorded: it runs as it is at first, then it is."""
        for batches in [*some, *some]:
            self.step(batches, batches)

    def release(self) -> None:
        self.captured.release()


def _captured(parameters: dict[str, nn.Parameter], forward: Any, attached: Any, longest: int, note: str) -> Arm:
    one: list[Steps] = []

    def prepare(some: Sequence[Batch]) -> None:
        while one:
            one.pop().release()
        one.append(Steps(forward, attached, len(some[0].tokens_T), longest))
        one[0].meet([[batch.on_host] for batch in some])
        arm.note = "; ".join([note, *one[0].said])

    def passed(batch: Batch) -> float:
        return one[0].passed([batch.on_host], [batch.on_host])[0]

    def step(batch: Batch, coming: Batch) -> float:
        return one[0].step([batch.on_host], [coming.on_host])

    arm = Arm(parameters, passed, step, note, prepare)
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
    # What it asks the network for is put off at once, and what it writes isn't left here.
    os.environ |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp(prefix="unsloth-"))
    from unsloth import FastLanguageModel  # isort: skip, it wants to be imported before transformers

    with tempfile.TemporaryDirectory() as folder:  # it loads from a folder only
        build_model(shape, device).save_pretrained(folder)
        _save_tokenizer(folder)
        free_memory()
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=longest_of(shape), dtype=torch.bfloat16, load_in_4bit=False
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
    return Arm.plain(parameters, loss, optimizer, note, pads=True)


def _save_tokenizer(folder: str) -> None:
    """The least that a loader takes for one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)


ARMS: dict[str, tuple[Callable[[str, str, str], Arm], str]] = {
    "deltaw": (deltaw_arm, ""),
    "deltaw-uncaptured": (deltaw_arm, "uncaptured"),
    "peft": (peft_arm, ""),
    "peft-bf16": (peft_arm, "bf16"),
    "peft-liger": (peft_arm, "liger"),
    "unsloth": (unsloth_arm, ""),
}
