"""What the benchmarks train on: real text at its real lengths, as fixed token lists, the same for every arm.

    dense    4 x 512 tokens per step, all supervised                 Python's language reference, cut to size
    words    45 words per step, about 768 tokens, half supervised    the demo's rows
    chats    16 short chats a step, 42-78 tokens each, only the    headlines, sarcastic or not
             answer (two tokens) supervised
    long     texts of 512-2048 tokens, about 4096 per step, all      the language reference again, one text per topic
             supervised
    few      7 words per step, about 120 tokens                      for curves.py

A workload is a list of steps, a step a list of examples; both depend on (name, seed) and nothing else. The language
reference is the one long English text that ships with Python itself (`pydoc_data`), so no network is needed.

Rows of like length share a step, by transformers' own recipe for `group_by_length` (groups of fifty batches are sorted
by length), and the steps are then shuffled. That costs deltaw nothing and gains it nothing: it is there because it
saves the padding arms most of their padding. Rejected: an order at random, which makes padding look worse than it
must be; documents cut to one length, which hides it.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from deltaw.base.source import find_base
from deltaw.commands.demo import demo_config
from deltaw.config import parse_config
from deltaw.data.example import Example
from deltaw.data.opening import open_dataset
from deltaw.data.render import open_tokenizer
from deltaw.show.progress import Display

Step = list[Example]
BASE = demo_config().base
GROUP = 50  # batches that are sorted together, transformers' figure
TOKENS_PER_BATCH = 2048  # deltaw's default; every bare loop splits a longer step at the same places
SHORTEST, LONGEST = 512, 2048  # of the long texts


def workload(name: str, count: int, seed: int = 0) -> list[Step]:
    """`count` steps of the workload `name`, again from its start where it has fewer. ValueError on an unknown name."""
    if name not in WORKLOADS:
        raise ValueError(f"no workload {name!r}; known: {', '.join(WORKLOADS)}")
    return list(itertools.islice(itertools.cycle(WORKLOADS[name](seed)), count))


def tokens(step: Step) -> int:
    """Tokens of a step; padding is none."""
    return sum(len(example.tokens) for example in step)


def supervised(step: Step) -> int:
    """Tokens of a step that have a label. The first of a document has none: nothing predicts it."""
    return sum(int(example.loss_mask[1:].sum()) for example in step)


def batches(step: Step, limit: int = TOKENS_PER_BATCH) -> list[Step]:
    """A step in order, cut into batches of at most `limit` tokens, whose gradients are summed."""
    cut: list[Step] = []
    for example in step:
        if not cut or tokens(cut[-1]) + len(example.tokens) > limit:
            cut.append([])
        cut[-1].append(example)
    return cut


def grouped(examples: Sequence[Example], rows: int, seed: int) -> list[Step]:
    """Steps of `rows` examples of like length, in an order drawn from `seed`; a last, short step is left out."""
    random = np.random.RandomState(seed)
    order = random.permutation(len(examples))
    groups = [order[start : start + GROUP * rows] for start in range(0, len(order), GROUP * rows)]
    ranked = [number for group in groups for number in sorted(group, key=lambda n: -len(examples[n].tokens))]
    steps = [[examples[n] for n in ranked[start : start + rows]] for start in range(0, len(ranked), rows)]
    if len(steps[-1]) < rows:
        steps.pop()
    return [steps[number] for number in random.permutation(len(steps))]


def pieces(texts: Iterable[Sequence[int]], random: np.random.RandomState) -> list[Sequence[int]]:
    """Texts of SHORTEST to LONGEST tokens: whole ones that fit, longer ones cut at lengths drawn evenly between."""
    found = []
    for text in texts:
        while len(text) > LONGEST:
            length = random.randint(SHORTEST, LONGEST + 1)
            found.append(text[:length])
            text = text[length:]
        if len(text) >= SHORTEST:
            found.append(text)
    return found


def filled(examples: Sequence[Example], capacity: int, seed: int) -> list[Step]:
    """Steps of at most `capacity` tokens, in an order drawn from `seed`, the rows of each by length."""
    order = np.random.RandomState(seed).permutation(len(examples))
    steps = batches([examples[number] for number in order], capacity)
    return [sorted(step, key=lambda example: -len(example.tokens)) for step in steps]


def _dense(seed: int) -> list[Step]:
    text = list(itertools.chain.from_iterable(_reference()))
    rows = [_all(text[start : start + 512], f"topics:{start}") for start in range(0, len(text) - 511, 512)]
    order = np.random.RandomState(seed).permutation(len(rows))
    return [[rows[number] for number in order[start : start + 4]] for start in range(0, len(rows) - 3, 4)]


def _long(seed: int) -> list[Step]:
    texts = pieces(_reference(), np.random.RandomState(seed))
    return filled([_all(text, f"piece:{number}") for number, text in enumerate(texts)], 4096, seed)


def _words(seed: int) -> list[Step]:
    return grouped(_rows("builtin:cmudict", 45 * GROUP), 45, seed)


def _few(seed: int) -> list[Step]:
    # Not grouped: the curves are to show learning, and words of one length at a time would be a rough road.
    rows = _rows("builtin:cmudict", 2500)
    order = np.random.RandomState(seed).permutation(len(rows))
    return [[rows[number] for number in order[start : start + 7]] for start in range(0, len(rows) - 6, 7)]


def _chats(seed: int) -> list[Step]:
    return grouped(_rows("builtin:sarcasm", 16 * GROUP), 16, seed)


WORKLOADS: dict[str, Callable[[int], list[Step]]] = {
    "dense": _dense,
    "words": _words,
    "chats": _chats,
    "long": _long,
    "few": _few,
}


def _all(ids: Sequence[int], origin: str) -> Example:
    return Example(np.array(ids, np.int32), np.arange(len(ids)) > 0, origin)


@cache
def _rows(source: str, limit: int) -> list[Example]:
    """The first `limit` rows of a data set as the project itself prepares them."""
    raw: dict[str, Any] = {"base": BASE, "data": {"train": source, "limit": limit}, "output": "runs/unused"}
    _, _, dataset = open_dataset(parse_config(raw), Display(quiet=True))
    return dataset.train


@cache
def _reference() -> list[list[int]]:
    """The language reference, a list of tokens per topic, by topic."""
    directory: Path = find_base(BASE).directory
    encode = open_tokenizer(directory)
    return [list(encode(text)["input_ids"]) for _, text in sorted(topics.items())]
