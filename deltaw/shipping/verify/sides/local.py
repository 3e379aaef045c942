"""The part that all sides running here in torch share: greedy answers, log-probabilities along an answer, and the two
measurements that a tolerance needs, the same with rounding errors put in and without the adapter.

Everything is computed in float32 if memory allows, so that a difference comes from the other side or the file and not
from rounding here. Rows are padded on the right: what comes after a position doesn't change it.

Letters: B rows of a batch, L their longest, P positions, V vocabulary.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.base.frozen import embedding_of
from deltaw.base.linear_weights import HEADER_BYTES, TENSORS
from deltaw.base.source import Source
from deltaw.config import Dtype
from deltaw.errors import InputError
from deltaw.files.safetensors import read_header
from deltaw.files.shards import shards
from deltaw.files.strict_json import read_json
from deltaw.files.template import Template
from deltaw.generate.cache import context, evaluating
from deltaw.generate.engine import generate
from deltaw.generate.sampling import Sampling
from deltaw.shipping.beside import GENERATION_CONFIG
from deltaw.shipping.merge.rewrite import TYPES
from deltaw.shipping.verify.noise import noisy
from deltaw.shipping.verify.sides.side import Answer, Asked, Logs, Numbers, Progress, Prompt, Row, Side

AT_ONCE = 2**25  # logits in memory together
Switch = Callable[[], AbstractContextManager[None]]


class Local:
    """A torch model that answers. `off`: without its adapter, None for one that has none; `plain`: by the model's own
    modules and not by what stands in for them, so that each of them can be looked into."""

    def __init__(
        self,
        model: nn.Module,
        stops: set[int],
        decode: Callable[[Sequence[int]], str],
        *,
        off: Switch | None = None,
        plain: Switch = nullcontext,
    ) -> None:
        self.model, self._stops, self._decode = model, stops, decode
        self.off, self._plain = off, plain

    def answers(self, asked: Sequence[Asked], tokens: int, progress: Progress) -> list[Answer]:
        """Greedily, the token that ends an answer included."""
        prompts = [one.ids or () for one in asked]
        ids = generate(self.model, prompts, Sampling(max_new_tokens=tokens), self._stops, progress=progress)
        room = [min(tokens, context(self.model) - len(prompt)) for prompt in prompts]
        ended = [len(new) < most for new, most in zip(ids, room, strict=True)]
        return [
            Answer(self._decode(new), (*new, self._end(prompt, new)) if end else tuple(new), end)
            for prompt, new, end in zip(prompts, ids, ended, strict=True)
        ]

    def logs(self, rows: Sequence[Row], progress: Progress) -> list[Logs]:
        """At every position of the answers, over the whole vocabulary."""
        logs_of: list[Logs | None] = [None] * len(rows)
        device = next(self.model.parameters()).device
        done = 0
        with evaluating(self.model):
            for numbers in self._batches(rows):
                chosen = [rows[number] for number in numbers]
                ids_BL, mask_BL = _padded([(*row.prompt, *row.answer) for row in chosen], device)
                logits_BLV = self.model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).logits
                for number, row, logits_LV in zip(numbers, chosen, logits_BLV, strict=True):
                    first = len(row.prompt) - 1
                    logits_PV = logits_LV[first : first + len(row.answer)].float()
                    logs_of[number] = Logs(logits_PV.log_softmax(-1).cpu())
                done += len(chosen)
                progress(done)
        return [logs for logs in logs_of if logs is not None]

    def noisy_logs(self, rows: Sequence[Row], sides: Sequence[Numbers], seed: int) -> list[Logs]:
        """The same with the rounding errors of `sides` put in."""
        with self._plain(), noisy(self.model, sides, seed):
            return self.logs(rows, _silent)

    def base_logs(self, rows: Sequence[Row]) -> list[Logs] | None:
        """The same without the adapter, None where there is none."""
        if self.off is None:
            return None
        with self.off():
            return self.logs(rows, _silent)

    def _end(self, prompt: Sequence[int], answer: Sequence[int]) -> int:
        """Which of the stop tokens ended an answer."""
        if len(self._stops) == 1:
            return next(iter(self._stops))
        (logs,) = self.logs([Row(tuple(prompt), (*answer, 0))], _silent)
        return int(logs.values_PK[-1].argmax())

    def _batches(self, rows: Sequence[Row]) -> Iterator[list[int]]:
        """Numbers of rows of like length, few enough that their logits fit."""
        vocabulary = embedding_of(self.model).shape[0]
        lengths = [len(row.prompt) + len(row.answer) for row in rows]
        batch: list[int] = []
        for number in sorted(range(len(rows)), key=lambda n: lengths[n]):
            if batch and (len(batch) + 1) * lengths[number] * vocabulary > AT_ONCE:
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch


class Running(Side):
    """A side whose model runs here: `load` gives it a `local`."""

    measurable = True
    local: Local | None = None

    def answers(self, asked: Sequence[Asked], tokens: int, progress: Progress) -> list[Answer]:
        assert self.local is not None
        return self.local.answers(asked, tokens, progress)

    def logs(self, rows: Sequence[Row], progress: Progress) -> list[Logs] | None:
        assert self.local is not None
        return self.local.logs(rows, progress)

    def noisy_logs(self, rows: Sequence[Row], sides: Sequence[Numbers], seed: int) -> list[Logs] | None:
        return None if self.local is None else self.local.noisy_logs(rows, sides, seed)

    def base_logs(self, rows: Sequence[Row]) -> list[Logs] | None:
        return None if self.local is None else self.local.base_logs(rows)

    def close(self) -> None:
        self.local = None


class Words:
    """A folder's tokenizer as everybody else uses it: the template's text encoded as it stands, control tokens read."""

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        own = tokenizer.chat_template
        source = template or (own.get("default") if isinstance(own, dict) else own)
        self._template = Template(source, tokenizer.special_tokens_map) if source else None

    @property
    def has_template(self) -> bool:
        return self._template is not None

    def ids(self, prompt: Prompt) -> tuple[int, ...]:
        if not prompt.is_chat:
            return tuple(self.tokenizer(prompt.content)["input_ids"])
        if self._template is None:
            raise InputError(
                f"{self.tokenizer.name_or_path}: no chat template, and the prompts are chats",
                fix="put the one that it was trained under into that folder, as chat_template.jinja",
            )
        text = self._template.render(prompt.content, prompt.tools, generation_prompt=True)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def stops_of(model: nn.Module, folder: Path | None = None) -> set[int]:
    """Where transformers' own `generate` ends: the generation config's tokens (that in `folder`, where there is one).
    Where it names none, nowhere: the tokenizer's eos isn't asked."""
    own = folder / GENERATION_CONFIG if folder is not None else None
    stops = read_json(own, allow_nan=True).get("eos_token_id") if own is not None and own.is_file() else None
    if stops is None:
        stops = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {int(stop) for stop in (stops if isinstance(stops, list) else [stops]) if stop is not None}


def stored_type(source: Source) -> str:
    """The type in which most of a folder's numbers are stored."""
    sizes: Counter[str] = Counter()
    for file, names in shards(source.directory).items():
        header = read_header(file, max_header_bytes=HEADER_BYTES, max_tensors=TENSORS)
        for name in names:
            first, last = header.spans[name]
            sizes[header.dtypes[name]] += last - first
    word = sizes.most_common(1)[0][0]
    return str(TYPES[word]).removeprefix("torch.") if word in TYPES else word


def working_type(source: Source) -> Dtype:
    """float32 where the weights and half as much again fit into memory, else the faster one."""
    needed = 6 * sum(
        torch.Size(shape).numel()
        for file in shards(source.directory)
        for shape in read_header(file, max_header_bytes=HEADER_BYTES, max_tensors=TENSORS).shapes.values()
    )
    if torch.cuda.is_available():
        return "float32" if needed < torch.cuda.mem_get_info()[0] else "auto"
    with contextlib.suppress(OSError):
        free = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
        return "float32" if free is None or needed < 1024 * int(free[1]) else "auto"
    return "float32"


def running(dtype: Dtype, weights: str) -> Numbers:
    """The numbers of a model that runs here in `dtype`, its stored weights being of the format `weights`."""
    kind = "bfloat16" if dtype == "auto" else dtype
    return Numbers(weights, (kind,), f"run here in {kind}")


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids_BL = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_BL = torch.zeros_like(ids_BL)
    for number, row in enumerate(rows):
        ids_BL[number, : len(row)] = torch.tensor(row)
        mask_BL[number, : len(row)] = 1
    return ids_BL.to(device), mask_BL.to(device)


def _silent(_: int) -> None:
    pass
