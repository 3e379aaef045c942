"""LoRA training on one GPU: deltaw, its peers and the bare matrix product, in one CSV.

    benchmarks/gpu.sh                                             all of it, at most nine minutes
    python benchmarks/gpu.py --arms deltaw,peft --models 1b --sizes 2048
    python benchmarks/gpu.py --device cpu --toy                   the same code on a tiny model

Models have the shapes of SmolLM2-135M, Llama 3.2 1B and Llama 3.1 8B and random weights, the same for every arm;
nothing is fetched. Text is the language reference that ships with Python, a token a word or sign and its id by
frequency, in documents at their real lengths up to 2048 (a longer one in pieces of random lengths), those of like
length together, as transformers' `group_by_length` does. Beside deltaw this is one file, however long, so that it can
be carried to a machine.
Batches have exactly so many real tokens; padding is never counted. Rank 16 on all linear layers, float32 factors, no
checkpointing, clip at 1, AdamW (fused).

Arms, each in a process of its own:

    gemm            8192³ in bf16: the rate that the shares are of; and a model's own products, back to back
    deltaw          packed documents
    deltaw-graph    its body (not head, loss and optimiser) replayed as CUDA graphs; one set of document lengths
    deltaw-compile  its decoder layers under torch.compile
    peft            right padding and no mask (causal attention needs none), SDPA, autocast, input casting off
    peft-bf16       factors in bf16 and no autocast: less exact, and PEFT's fastest
    peft-liger      peft with Liger's kernels, its fused head and loss among them
    unsloth         its own loader and trainer-free loop

Correctness first: an arm's loss at step 0 must be within 1e-3 of a float32 run of plain autograd over single documents,
and its dA and dB must have a cosine above 0.999 with that run's, at the 135M shape. An arm that fails is not timed.
Its loss on the first batch of each size is in its row, too, and marked where it differs from the first arm's. What
cannot run has a row that says why. A share is tokens/s · 4 (N_blocks + N_head) / rate.
"""

import argparse
import bisect
import collections
import csv
import datetime
import gc
import importlib.util
import itertools
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RANK, ALPHA, LR, CLIP, IGNORE = 16, 32.0, 1e-4, 1.0, -100
BUDGET = 530  # seconds for everything
LEAST = 20  # seconds that must be left to start a process
LONGEST_RUN = 150  # seconds that a process may take
LOSS_GATE, COSINE_GATE = 1e-3, 0.999
LONGEST = 2048  # tokens of a document

SHAPES: dict[str, dict[str, Any]] = {
    "135m": {"layers": 30, "hidden": 576, "inner": 1536, "heads": (9, 3), "vocabulary": 49152, "tied": True},
    "1b": {"layers": 16, "hidden": 2048, "inner": 8192, "heads": (32, 8), "vocabulary": 128256, "tied": True},
    "8b": {"layers": 32, "hidden": 4096, "inner": 14336, "heads": (32, 8), "vocabulary": 128256, "tied": False},
    "toy": {"layers": 2, "hidden": 64, "inner": 96, "heads": (4, 2), "vocabulary": 512, "tied": True, "longest": 40},
}
NEEDS = {  # arm: the package without which it is skipped
    "deltaw": "deltaw",
    "peft": "peft",
    "unsloth": "unsloth",
    "peft-liger": "liger_kernel",
    "deltaw-graph": "deltaw",
    "peft-bf16": "peft",
    "deltaw-compile": "deltaw",
}  # in the order in which they run, should time run out
SMALL = {"deltaw-graph": ("135m", "toy"), "deltaw-compile": ("135m", "1b", "toy")}  # arms for these models only
COLUMNS = ("date", "gpu", "torch", "cuda", "arm", "model", "tokens", "tokens_per_s", "share_of_gemm")
COLUMNS += ("allocated_gib", "reserved_gib", "note")

Row = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    """How much is measured: of `steps` timed ones at least three, however long they take."""

    sizes: tuple[int, ...] = (2048, 4096, 8192, 16384)
    warm: int = 3
    steps: int = 12
    seconds: float = 5.0
    square: int = 8192


TOY = Effort(sizes=(64, 128), warm=1, steps=3, seconds=1.0, square=64)


# Data


@dataclass(frozen=True)
class Batch:
    """Documents laid end to end (labels shifted, starts on the CPU), and padded at the end (labels not shifted)."""

    tokens_T: Tensor
    labels_T: Tensor
    positions_T: Tensor
    starts_S: Tensor
    ids_BL: Tensor
    padded_BL: Tensor
    count: int

    @cached_property
    def packed(self) -> Any:
        """As deltaw is given it: documents laid end to end, what they need for attention worked out."""
        from deltaw.base import batch

        return batch.Batch.of(self.tokens_T, self.starts_S.tolist(), self.labels_T)

    @staticmethod
    def of(documents: Sequence[Sequence[int]], device: str) -> "Batch":
        lengths = [len(document) for document in documents]
        tokens_T = torch.tensor(list(itertools.chain(*documents)))
        starts_S = torch.tensor([0, *itertools.accumulate(lengths)])
        labels_T = torch.cat([tokens_T[1:], tokens_T[:1]])
        labels_T[starts_S[1:] - 1] = IGNORE
        positions_T = torch.cat([torch.arange(length) for length in lengths])
        ids_BL = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        padded_BL = torch.full(ids_BL.shape, IGNORE)
        for row, document in enumerate(documents):
            ids_BL[row, : len(document)] = padded_BL[row, : len(document)] = torch.tensor(document)
        there = [x.to(device) for x in (tokens_T, labels_T, positions_T)]
        return Batch(*there, starts_S, ids_BL.to(device), padded_BL.to(device), sum(lengths) - len(lengths))


@cache
def reference(vocabulary: int, longest: int) -> list[list[int]]:
    """The language reference's texts and pieces, the shortest first, as ids by frequency."""
    texts = [re.findall(r"\w+|[^\w\s]", text) for _, text in sorted(topics.items())]
    ranked = [word for word, _ in collections.Counter(itertools.chain(*texts)).most_common()]
    number = {word: rank % vocabulary for rank, word in enumerate(ranked)}
    pieces, draw = [], random.Random(0)
    for text in texts:
        while text:
            length = len(text) if len(text) <= longest else draw.randint(longest // 8, longest)
            pieces.append([number[word] for word in text[:length]])
            text = text[length:]
    return sorted((piece for piece in pieces if len(piece) >= longest // 64 + 2), key=len)


def batches(shape: str, size: int, count: int, device: str) -> list[Batch]:
    """`count` batches of `size` tokens from all over the range of lengths: documents of like length, each cut a little.

    Cutting the last alone would leave it far shorter than the rest, and whoever pads would pay for that.
    """
    texts, found = reference(SHAPES[shape]["vocabulary"], SHAPES[shape].get("longest", LONGEST)), []
    ends = list(itertools.accumulate(map(len, texts)))
    for part in range(count):
        # From the middle of the part-th of `count` equal shares of all tokens, or so that enough are left.
        start = bisect.bisect_left(ends, min((part + 0.5) / count * ends[-1], ends[-1] - size + 1))
        before = ends[start - 1] if start else 0
        chosen = texts[start : bisect.bisect_left(ends, before + size) + 1]
        whole = sum(map(len, chosen))
        cuts = [round(end * size / whole) for end in itertools.accumulate(map(len, chosen), initial=0)]
        lengths = [after - before for before, after in itertools.pairwise(cuts)]
        found.append(Batch.of([text[:length] for text, length in zip(chosen, lengths, strict=True)], device))
    random.Random(0).shuffle(found)
    return found


# Model


def build_model(shape: str, device: str) -> Any:
    """In bfloat16, weights by the generator alone, so that every process has the same."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(_config(shape), dtype=torch.bfloat16, attn_implementation="sdpa")
    fill_weights(model)
    return model.requires_grad_(False).train()


def _config(shape: str) -> Any:
    from transformers import LlamaConfig

    s = SHAPES[shape]
    return LlamaConfig(
        vocab_size=s["vocabulary"],
        hidden_size=s["hidden"],
        intermediate_size=s["inner"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"][0],
        num_key_value_heads=s["heads"][1],
        tie_word_embeddings=s["tied"],
        max_position_embeddings=8192,
        use_cache=False,
    )


@torch.no_grad()
def fill_weights(model: nn.Module) -> None:
    """Matrices from N(0, 0.02²), norms about one."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    for _, weight in sorted(model.named_parameters()):
        weight.normal_(std=0.02, generator=generator)
        if weight.ndim == 1:
            weight.add_(1.0)


def products(shape: str) -> list[tuple[int, int]]:
    """(out, in) of a decoder layer's linear layers."""
    s = SHAPES[shape]
    d, i, kv = s["hidden"], s["inner"], s["hidden"] * s["heads"][1] // s["heads"][0]
    return [(d, d), (kv, d), (kv, d), (d, d), (i, d), (i, d), (d, i)]


def flops_per_token(shape: str) -> int:
    """4 (N_blocks + N_head)."""
    s = SHAPES[shape]
    blocks = s["layers"] * sum(rows * columns for rows, columns in products(shape))
    return 4 * (blocks + s["hidden"] * s["vocabulary"])


@torch.no_grad()
def fill_factors(parameters: Mapping[str, nn.Parameter]) -> None:
    """The same in every arm. B is not zero, or dA would be."""
    generator = torch.Generator().manual_seed(1)
    for name in sorted(parameters):
        parameter = parameters[name]
        std = 0.01 if name.endswith(".B") else parameter.shape[1] ** -0.5
        parameter.copy_(torch.empty(parameter.shape).normal_(std=std, generator=generator))


# Arms


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
        _free()
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
        _free()
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


# The gate


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
    fill_factors(arm.parameters)
    arm.prepare(batch)
    loss = arm.loss(batch)
    loss.backward()
    found = {name: p.grad.float().cpu() for name, p in arm.parameters.items() if p.grad is not None}
    arm.optimizer.zero_grad(set_to_none=True)
    wanted = {name: value for name, value in truth.items() if name != "loss"}
    if found.keys() != wanted.keys():
        return False, f"gate: {len(found.keys() ^ wanted.keys())} factors without a partner"
    cosines = {}
    for half in "AB":
        names = sorted(name for name in found if name.endswith(half))
        pairs = [torch.cat([side[name].flatten().double() for name in names]) for side in (found, wanted)]
        cosines[half] = float(F.cosine_similarity(*pairs, dim=0))
    value, true = float(loss.detach()), float(truth["loss"])
    text = f"loss {value:.5f}, in float32 {true:.5f}; cosine of dA {cosines['A']:.6f}, of dB {cosines['B']:.6f}"
    # Written so that a NaN fails.
    passed = abs(value - true) <= LOSS_GATE and min(cosines.values()) > COSINE_GATE
    return passed, f"gate {'passed' if passed else 'FAILED'}: {text}"


# The clock


class Clock:
    """Marks on the device's own time line, and its memory."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def gaps(self, marks: Sequence[Any]) -> list[float]:
        """Seconds from each mark to the next."""
        if not self.cuda:
            return [after - before for before, after in itertools.pairwise(marks)]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(marks)]

    def forget_peak(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> Row:
        if not self.cuda:
            return {}
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"allocated_gib": round(allocated / 2**30, 3), "reserved_gib": round(reserved / 2**30, 3)}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def median_seconds(run: Callable[[int], Any], clock: Clock, effort: Effort) -> tuple[float, int]:
    """(median of the calls run(0), run(1), ..., how many). The host is not made to wait between them."""
    for number in range(effort.warm):
        run(number)
    clock.forget_peak()
    until = time.monotonic() + effort.seconds
    marks = [clock.mark()]
    for number in range(effort.steps):
        if number >= 3 and time.monotonic() > until:
            break
        run(number)
        marks.append(clock.mark())
    gaps = clock.gaps(marks)
    return statistics.median(gaps), len(gaps)


# What a process does


def run_gemm(models: Sequence[str], effort: Effort, device: str) -> Iterator[Row]:
    """The square's row carries "rate", FLOP/s. A model's products: of up to four layers and the head, both ways."""
    clock, n = Clock(device), effort.square
    pairs = [[torch.randn(n, n, device=device).bfloat16() for _ in range(2)] for _ in range(2)]
    seconds, _ = median_seconds(lambda i: torch.mm(*pairs[i % 2]), clock, effort)
    rate = 2 * n**3 / seconds
    yield {"model": f"{n}^3", "tokens": n, "rate": rate, "note": f"{rate / 1e12:.4g} TFLOP/s"}
    pairs.clear()
    for model in models:
        layers = min(SHAPES[model]["layers"], 4)
        for size in effort.sizes:
            sizes = [*(products(model) * layers), (SHAPES[model]["vocabulary"], SHAPES[model]["hidden"])]
            w = [torch.randn(rows, columns, device=device).bfloat16() for rows, columns in sizes]
            x = {k: torch.randn(size, k, device=device).bfloat16() for pair in sizes[:-1] for k in pair}
            # The head a slice at a time: its output is never held for a whole batch
            part = max(1, size // 8)
            g = torch.randn(part, len(w[-1]), device=device).bfloat16()

            def run(_: int, w: list[Tensor] = w, x: dict[int, Tensor] = x, part: int = part, g: Tensor = g) -> None:
                for weight in w[:-1]:
                    torch.mm(x[weight.shape[1]], weight.T)
                    torch.mm(x[weight.shape[0]], weight)
                for start in range(0, len(x[w[-1].shape[1]]), part):
                    torch.mm(x[w[-1].shape[1]][start : start + part], w[-1].T)
                    torch.mm(g, w[-1])

            seconds, _ = median_seconds(run, clock, effort)
            numbers = [rows * columns for rows, columns in sizes]
            seconds *= flops_per_token(model) / (4 * sum(numbers))  # four layers stand for all
            yield {"model": model, "tokens": size, "tokens_per_s": size / seconds, "note": "its products alone"}
            del w, x, g, run
            _free()


def run_arm(arm: str, shape: str, effort: Effort, device: str, truth: str | None) -> Iterator[Row]:
    """Rows of one arm on one model: its gate, if there is a truth, then one row per size. Errors are rows."""
    where: Row = {"arm": arm, "model": shape}
    try:
        make, way = ARMS[arm]
        made = make(shape, device, way)
        if truth:
            from safetensors.torch import load_file

            passed, text = gate(made, gate_batch(shape, device), load_file(truth))
            yield {**where, "note": text, "passed": passed}
            if not passed:
                return
    except Exception as error:
        yield {**where, **_failed(error)}
        return
    clock = Clock(device)
    for size in effort.sizes:
        _free()
        try:
            some = batches(shape, size, 4, device)
            some = some[:1] if made.fixed else some
            made.prepare(some[0])
            fill_factors(made.parameters)
            losses: list[Tensor] = []

            def step(number: int, some: list[Batch] = some, losses: list[Tensor] = losses) -> None:
                losses.append(made.step(some[number % len(some)]))

            seconds, count = median_seconds(step, clock, effort)
            first, last = float(losses[0]), float(losses[-1])
            note = f"{made.note}; median of {count} steps; loss {first:.5f} at first"
            if made.pads:
                note += f"; padding {statistics.mean(batch.ids_BL.numel() / size for batch in some) - 1:.0%} more"
            if not math.isfinite(last):
                raise FloatingPointError(f"the loss became {last}")
            speed = {"tokens_per_s": size / seconds, "first_loss": first}
            yield {**where, "tokens": size, **speed, **clock.peak(), "note": note}
        except Exception as error:
            made.optimizer.zero_grad(set_to_none=True)
            yield {**where, "tokens": size, **_failed(error)}


def _failed(error: Exception) -> Row:
    traceback.print_exc()
    lines = str(error).strip().splitlines()
    name = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"error: {type(error).__name__}"
    return {"note": f"{name}: {lines[0] if lines else ''}"[:300], "passed": False}


def child(options: argparse.Namespace) -> Iterator[Row]:
    effort = _effort(options)
    if options.arm == "gemm":
        yield from run_gemm(options.models, effort, options.device)
    elif options.arm == "truth":
        shape = options.models[0]
        save_truth(shape, gate_batch(shape, options.device), options.device, options.truth)
        yield {"passed": True}
    else:
        yield from run_arm(options.arm, options.models[0], effort, options.device, options.truth)


# The whole


Spawn = Callable[[list[str], float], tuple[list[Row], str]]


def spawn(arguments: list[str], seconds: float) -> tuple[list[Row], str]:
    """(the rows a process printed, why it ended early or "")."""
    command = [sys.executable, __file__, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        out, problem = done.stdout, ""
        if done.returncode:
            said = done.stderr.strip().splitlines()
            problem = f"error: {said[-1] if said else f'exit status {done.returncode}'}"[:300]
    except subprocess.TimeoutExpired as late:
        out = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        problem = f"stopped after {seconds:.0f} s"
    return [json.loads(line[4:]) for line in out.splitlines() if line.startswith("ROW ")], problem


def run_all(options: argparse.Namespace, write: Callable[[Row], None], run: Spawn = spawn) -> None:
    """Every arm on every model, as long as time lasts; `write` gets each row at once."""
    end, gated = time.monotonic() + options.budget, "toy" if options.toy else "135m"
    common = ["--device", options.device, *(["--toy"] if options.toy else [])]
    sizes = ["--sizes", ",".join(map(str, _effort(options).sizes))]

    def started(*arguments: str) -> tuple[list[Row], str]:
        left = end - time.monotonic()
        if left < min(LEAST, options.budget):
            return [], "skip: out of time"
        return run([*arguments, *common], min(left, LONGEST_RUN))

    rate = None
    rows, problem = started("--arm", "gemm", "--models", ",".join(options.models), *sizes)
    for row in rows:
        rate = row.get("rate", rate)
        write({"arm": "gemm", **row, "share": _share(row, rate)})
    if problem:
        write({"arm": "gemm", "note": problem})
    with tempfile.TemporaryDirectory() as folder:
        truth = str(Path(folder) / "truth.safetensors")
        rows, problem = started("--arm", "truth", "--models", gated, "--truth", truth, *sizes)
        if problem or not rows:
            write({"arm": "truth", "model": gated, "note": problem or "error: nothing came back"})
            return
        passed: dict[str, bool] = {}
        losses: dict[tuple[str, int], tuple[str, float]] = {}
        shapes = [gated, *(shape for shape in options.models if shape != gated)]
        for arm, shape in itertools.product(options.arms, shapes):
            where = {"arm": arm, "model": shape}
            if importlib.util.find_spec(NEEDS[arm]) is None:
                if shape in options.models:
                    write({**where, "note": f"skip: {NEEDS[arm]} is not installed"})
                continue
            if shape not in SMALL.get(arm, (shape,)):
                continue
            if shape != gated and not passed.get(arm):
                write({**where, "note": "skip: its gate was not passed"})
                continue
            timed = sizes if shape in options.models else ["--sizes", ""]
            proof = ["--truth", truth] if shape == gated else []
            rows, problem = started("--arm", arm, "--models", shape, *timed, *proof)
            for row in rows:
                if proof and "tokens" not in row:
                    passed[arm] = bool(row.get("passed"))
                write({**_compared(row, losses), "share": _share(row, rate)})
            if problem:
                write({**where, "note": problem})


def _compared(row: Row, losses: dict[tuple[str, int], tuple[str, float]]) -> Row:
    """The row, its note in front of all else saying so if its first loss is not the first arm's on that batch."""
    if "first_loss" not in row:
        return row
    arm, wanted = losses.setdefault((row["model"], row["tokens"]), (row["arm"], row["first_loss"]))
    if abs(row["first_loss"] - wanted) <= LOSS_GATE:
        return row
    return {**row, "note": f"LOSS DIFFERS from {arm}'s {wanted:.5f}: {row['note']}"}


def _share(row: Row, rate: float | None) -> float | None:
    if not rate or "tokens_per_s" not in row:
        return None
    return row["tokens_per_s"] * flops_per_token(row["model"]) / rate


def _effort(options: argparse.Namespace) -> Effort:
    effort = TOY if options.toy else Effort()
    sizes = effort.sizes if options.sizes is None else options.sizes
    return Effort(sizes, effort.warm, effort.steps, effort.seconds, effort.square)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    def names(text: str) -> tuple[str, ...]:
        return tuple(filter(None, text.split(",")))

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arms", type=names, default=tuple(NEEDS), help=f"of {', '.join(NEEDS)}")
    parser.add_argument("--models", type=names, help=f"of {', '.join(SHAPES)}; all but toy")
    parser.add_argument("--sizes", type=lambda text: tuple(map(int, names(text))), help="real tokens of a batch")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--toy", action="store_true", help="a tiny model: tests this script, measures nothing")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--arm", help=argparse.SUPPRESS)  # in this process, rows to stdout
    parser.add_argument("--truth", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.models = options.models or (("toy",) if options.toy else ("135m", "1b", "8b"))
    unknown = sorted({*options.arms} - {*NEEDS}) + sorted({*options.models} - {*SHAPES})
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    return options


def conditions(device: str) -> Row:
    """The columns that say when and on what: the same in every row of a run."""
    cuda = device == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name() if cuda else f"none ({platform.machine()})",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else "",
    }


def main(arguments: Sequence[str] | None = None, run: Spawn = spawn) -> int:
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing was measured (--device cpu --toy tests the script)", file=sys.stderr)
        return 2
    if options.arm:
        for row in child(options):
            print("ROW " + json.dumps(row), flush=True)
        return 0
    fixed = conditions(options.device)
    path = Path(os.environ.get("OUT") or Path(__file__).parent) / "gpu.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="")
        table.writeheader()

        def write(row: Row) -> None:
            share, rate = row.get("share"), row.get("tokens_per_s")
            shown = {"share_of_gemm": "" if share is None else f"{share:.4f}"}
            shown["tokens_per_s"] = "" if rate is None else f"{rate:.1f}"
            table.writerow({**row, **fixed, **shown})
            file.flush()
            speed = "" if rate is None else f"{rate:,.0f} tokens/s" + (f", {share:.1%} of the rate" if share else "")
            memory = f", {row['allocated_gib']} GiB" if "allocated_gib" in row else ""
            head = f"{row['arm']:14} {row.get('model', ''):7} {row.get('tokens', ''):>6}"
            print(f"{head}  {speed}{memory}{'  ' if speed else ''}{row.get('note', '')}", flush=True)

        run_all(options, write, run)
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
