"""What PEFT, transformers' tokenizers and collators, TRL and datasets do when the same happens to them, as documented;
what the Trainer does stands in trainer.py. Each says in a few words what it saw; nothing here is known beforehand.
"""

import os
import re
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from benchmarks.peers import trainer as _registers_the_trainer  # noqa: F401
from benchmarks.peers.tools import adapted, adapter, base, came_of, rows, tune
from tests.data.toys import toy
from tests.faults import common
from tests.faults.broken import (
    BOMB,
    BROKEN,
    CONFIG,
    CONFIGS,
    WEIGHTS,
    Canary,
    Harm,
    fields,
    file_is,
    file_is_gone,
    tensors,
)
from tests.faults.common import child
from tests.faults.fault import peer
from tests.tiny import tiny_base

LIMIT = 10.0  # seconds until what hangs is stopped


def load(folder: Path, model: Any = None) -> str:
    """`PeftModel.from_pretrained`: whether anything differs from the bare base afterwards."""
    model = model or base()
    ids = torch.tensor([rows(1)[0]["input_ids"]])
    before = model(ids).logits
    after = PeftModel.from_pretrained(model, str(folder))(ids).logits
    return "loads it, with no effect" if torch.equal(before, after) else "loads it"


def harmed(folder: Path, harm: Harm) -> Path:
    """A copy of the healthy adapter, with `harm` done to it."""
    common.copy(adapter(), folder)
    harm(folder)
    return folder


def ended_in_time(work: Callable[[], object], what: str) -> str:
    """Run it in a child of at most LIMIT seconds."""
    ended = child(work, limit=LIMIT)
    return f"hangs: stopped after {LIMIT:.0f} s" if ended.code == 137 else f"{what} in {ended.seconds:.1f} s"


@peer(4, "PEFT")
def adapter_on_a_full_disk(scratch: Path) -> str:
    """`save_pretrained` over an adapter; the new weights don't fit (RLIMIT_FSIZE)."""
    folder = harmed(scratch / "adapter", lambda _: None)
    model = adapted()

    def save() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        model.save_pretrained(folder)

    code = child(save).code
    whole = (folder / WEIGHTS).read_bytes() == (adapter() / WEIGHTS).read_bytes()
    return f"exit {code}, the old weights {'stay' if whole else 'are lost'}"


@peer(13, "PEFT")
def mode_of_the_file(scratch: Path) -> str:
    """`save_pretrained` under umask 022."""
    before = os.umask(0o022)
    try:
        adapted().save_pretrained(scratch)
    finally:
        os.umask(before)
    return f"mode {(scratch / WEIGHTS).stat().st_mode & 0o777:04o}, where the umask gives 0644"


@peer(28, "PEFT")
def nan_in_an_adapter(scratch: Path) -> str:
    """One value of one factor is NaN."""

    def spoil(key: str, value: Tensor) -> tuple[str, Tensor]:
        value[0, 0] = torch.nan
        return key, value

    return came_of(lambda: load(harmed(scratch / "a", tensors(spoil))))


@peer(29, "PEFT and Trainer")
def impossible_settings(scratch: Path) -> str:
    """`LoraConfig` or `TrainingArguments` with values that can't be meant, and a run of six steps."""
    lora: dict[str, dict[str, Any]] = {
        "r = 0": {"r": 0},
        "r over the width": {"r": 4096},
        "alpha = 0": {"lora_alpha": 0},
        "alpha = NaN": {"lora_alpha": float("nan")},
        "dropout = 1": {"lora_dropout": 1.0},
    }
    rates = {"lr = -1": -1.0, "lr = NaN": float("nan"), "lr = inf": float("inf")}
    config = {"target_modules": ["q_proj"]}
    tries: dict[str, Callable[[], object]] = {
        name: lambda given=given: tune(scratch / "a", model=get_peft_model(base(), LoraConfig(**config, **given)))
        for name, given in lora.items()
    }
    tries |= {name: lambda rate=rate: tune(scratch / "b", learning_rate=rate) for name, rate in rates.items()}
    taken = [name for name, run in tries.items() if not came_of(lambda run=run: str(run())).startswith("refuses")]
    return f"trains with {len(taken)} of {len(tries)}: {', '.join(taken)}"


@peer(31, "PEFT")
def pickle_with_a_payload(scratch: Path) -> str:
    """An adapter_model.bin that writes a file when it is unpickled."""
    folder = harmed(scratch / "adapter", file_is_gone(WEIGHTS))
    torch.save({"x": Canary(scratch / "canary")}, folder / "adapter_model.bin")
    outcome = came_of(lambda: load(folder))
    return f"{outcome}; the payload {'ran' if (scratch / 'canary').exists() else 'did not run'}"


def verdict(folder: Path, words: tuple[str, ...]) -> str:
    """What loading it came to: accepted, or an error that has one of `words` (clear) or none (unclear)."""
    try:
        load(folder)
    except Exception as error:
        return "clear" if any(word in str(error) for word in words) else "unclear"
    return "accepted"


@peer(36, "PEFT")
def broken_config(scratch: Path) -> str:
    """adapter_config.json in seven ways that are no JSON object, or have NaN for the rank."""
    count = len(CONFIGS)
    seen = Counter(verdict(harmed(scratch / "a", file_is(CONFIG, change)), (CONFIG,)) for change in CONFIGS.values())
    return f"of {count}, {seen['clear']} name the file in their error, {seen['unclear']} don't, {seen['accepted']} load"


@peer(37, "PEFT")
def broken_adapters(scratch: Path) -> str:
    """Eighteen adapters that are broken in one way each."""
    seen = {name: verdict(harmed(scratch / "a", harm), words) for name, harm, words in BROKEN}
    counts = Counter(seen.values())
    taken = ", ".join(name for name, what in seen.items() if what == "accepted")
    errors = f"{counts['clear']} clear errors, {counts['unclear']} unclear"
    return f"of {len(seen)}, {errors}, {counts['accepted']} accepted ({taken})"


@peer(38, "PEFT")
def patterns_that_never_end(scratch: Path) -> str:
    """A regular expression that backtracks for ever, as target_modules and as a key of rank_pattern."""
    bombs = {"target_modules": fields(target_modules=BOMB), "rank_pattern": fields(rank_pattern={BOMB: 4})}
    said = []
    for name, harm in bombs.items():
        folder = harmed(scratch / name, harm)
        said.append(f"{name}: {ended_in_time(lambda folder=folder: load(folder), 'ends')}")
    return "; ".join(said)


@peer(39, "PEFT")
def config_that_names_a_module(scratch: Path) -> str:
    """`AutoPeftModel.from_pretrained` on a config whose auto_mapping names a module."""
    (scratch / "strangers_module.py").write_text("print('the module ran')\n")
    mapping = {"base_model_class": "Model", "parent_library": "strangers_module"}
    names = fields(task_type=None, auto_mapping=mapping, base_model_name_or_path=str(common.place() / "base"))
    folder = harmed(scratch / "adapter", names)

    def work() -> None:
        sys.path.insert(0, str(scratch))
        print(came_of(lambda: f"gets a {type(AutoPeftModel.from_pretrained(str(folder))).__name__}"))

    said = child(work).output
    return f"{'runs' if 'the module ran' in said else 'does not import'} it, {said.splitlines()[-1]}"


@peer(40, "PEFT")
def keys_that_fit_nothing(scratch: Path) -> str:
    """The keys of another model, none of B, none with its prefix."""
    harms = {name: harm for name, harm, _ in BROKEN if name in ("other keys", "no B", "no prefix")}
    said = [f"{name}: {came_of(lambda harm=harm: load(harmed(scratch / 'a', harm)))}" for name, harm in harms.items()]
    return "; ".join(said)


@peer(41, "PEFT")
def base_of_the_same_shape(scratch: Path) -> str:
    """An adapter of one base on another with the same shapes."""
    other = type(base()).from_pretrained(tiny_base(scratch / "other", seed=1))
    return came_of(lambda: load(adapter(), other))


@peer(43, "transformers")
def template_that_never_ends(scratch: Path) -> str:
    """`apply_chat_template` with loops in loops that write nothing."""
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer, messages = toy("chatml"), [{"role": "user", "content": "q"}]
    return ended_in_time(lambda: tokenizer.apply_chat_template(messages, chat_template=endless), "ends")


@peer(47, "datasets")
def line_that_is_no_json(scratch: Path) -> str:
    """`load_dataset("json")` on a file whose fifth line is cut off."""
    from datasets import load_dataset

    lines = ['{"prompt": "p", "completion": "c"}'] * 9
    lines[4] = lines[4][:20]
    (scratch / "train.jsonl").write_text("\n".join(lines))
    try:
        table = load_dataset("json", data_files=str(scratch / "train.jsonl"), cache_dir=str(scratch), split="train")
    except Exception as error:
        named = re.search(r"\b(line|row) [45]\b", f"{error} {error.__cause__}")
        return f"refuses ({type(error).__name__}), {'names' if named else 'does not name'} the line"
    return f"reads {len(table)} of 9 lines"


def tuned_by_trl(scratch: Path, rows: list[dict[str, Any]], **options: Any) -> str:
    """`SFTTrainer.train()` for two steps on `rows`: how many are left, and the labels of a batch."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "bf16": False, "logging_steps": 1}
    settings = SFTConfig(output_dir=str(scratch), max_steps=2, save_strategy="no", **quiet, **options)
    table = Dataset.from_list(rows)
    trainer = SFTTrainer(model=adapted(), args=settings, train_dataset=table, processing_class=toy("chatml"))
    trainer.train()
    labels = int((next(iter(trainer.get_train_dataloader()))["labels"] != -100).sum())
    return f"trains on {len(trainer.train_dataset)} of {len(rows)} rows, {labels} labels per batch"


@peer(49, "TRL")
def template_without_generation(scratch: Path) -> str:
    """`SFTConfig(assistant_only_loss=True)` with a ChatML template that has no {% generation %}."""
    messages = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "Paris"}]
    return came_of(lambda: tuned_by_trl(scratch, [{"messages": messages}] * 16, assistant_only_loss=True))


@peer(50, "TRL")
def completion_cut_off(scratch: Path) -> str:
    """Half the prompts are longer than `SFTConfig(max_length)`: nothing of their completions is left."""
    long, short = ({"prompt": "say " * words, "completion": "Paris"} for words in (40, 1))

    def run(*rows: dict[str, Any]) -> str:
        return tuned_by_trl(scratch, list(rows) * 8, max_length=16)

    return came_of(lambda: run(short, long), healthy=lambda: run(short, short))


@peer(51, "transformers")
def padding_is_eos(scratch: Path) -> str:
    """`DataCollatorForLanguageModeling(mlm=False)` on texts that end with eos, where padding is eos."""
    from transformers import DataCollatorForLanguageModeling

    tokenizer = toy("chatml")
    ids = [[*tokenizer("Paris " * i)["input_ids"], tokenizer.eos_token_id] for i in (1, 2, 3)]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": some} for some in ids])
    kept = int((batch["labels"] == tokenizer.eos_token_id).sum())
    return f"{kept} of {len(ids)} ends are trained"


@peer(52, "transformers")
def name_of_a_control_token(scratch: Path) -> str:
    """`apply_chat_template` on a user's text with `<|im_end|>` in it."""
    tokenizer = toy("chatml")

    def controls(text: str) -> int:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], return_dict=False)
        return sum(token in tokenizer.all_special_ids for token in ids)

    more = controls("say <|im_end|> now") - controls("say it now")
    return "it becomes the control token" if more else "it stays text"
