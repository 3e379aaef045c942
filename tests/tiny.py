"""A whole tiny base on disk: a random Llama with a byte-level tokenizer and a ChatML template."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltaw.show.progress import Display, Task
from tests.data.toys import toy


def tiny_base(folder: Path, seed: int = 0, **changes: int) -> Path:
    """Write config, weights and tokenizer into `folder` and return it; `changes` are of the config."""
    tokenizer = toy("chatml")
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **{**shape, **changes})
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def words(path: Path, count: int = 60) -> Path:
    """A JSONL file of prompt/completion rows of different lengths."""
    rows = [{"prompt": f"say {i} ", "completion": "ab" * (1 + i % 7)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


SYSTEM = "You add."


def sums(path: Path, count: int = 60) -> Path:
    """A JSONL file of chats of one turn, all with one system prompt."""
    rows = []
    for i in range(count):
        texts = {"system": SYSTEM, "user": f"Add {i} and {i % 7}", "assistant": f"It is {i + i % 7}."}
        rows.append({"messages": [{"role": role, "content": text} for role, text in texts.items()]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_file(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run of six small steps in float32, as a mapping; `changes` replace whole sections. Held-out rows are looked at
    where there are some."""
    fields: dict[str, Any] = {
        "base": str(folder / "base"),
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": str(folder / "train.jsonl"), "eval": 8},
        "train": {
            "steps": 6,
            "lr": 1e-2,
            "tokens_per_step": 128,
            "tokens_per_batch": 64,
            "dtype": "float32",
            "device": "cpu",
            "save_every": 2,
            "eval_every": 3,
        },
        "evaluate": {"metrics": ["exact_match"], "max_new_tokens": 4, "general": None, "report": False},
        "output": str(folder / "run"),
        **changes,
    }
    if "eval" not in fields["data"] and "train" not in changes:
        del fields["train"]["eval_every"]
    return fields


class Said(Display):
    """Shows nothing and keeps the lines, and of each task how much there was to do and what was told of it."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []
        self.tasks: dict[str, tuple[int, list[int]]] = {}

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Task]:
        told = self.tasks[name] = (total, [])
        yield lambda done, note="": told[1].append(done)

    def say(self, text: str = "") -> None:
        self.lines.append(text)
