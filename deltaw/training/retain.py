"""Remembering: on some general tokens of each step the model is held to what its base says (`train.retain`).

    step's gradient = ∂/∂θ [ Σ loss / supervised tokens + weight · Σ KL(base ‖ tuned) / general tokens of the step ]

The text is cut into pieces of at most `LENGTH` tokens, and of no more than a step takes. They are put in one order by
the run's seed, which is repeated for ever; step k takes those that begin within its part of it,

    k · share · tokens_per_step ≤ offset of a piece < (k + 1) · share · tokens_per_step

so which ones these are is a function of the seed and the step alone, their mean is the share that was asked for, and
nothing has to be saved to resume. They are in the packed pass of the task's rows, behind them: a pass of 77 tokens of
its own would run at two thirds of the speed. A model that isn't packed gets them in batches of their own (words padded
to the length of a passage would be mostly padding). They come on top of `tokens_per_batch`, as they come on top of
`tokens_per_step`: both say how much of the task is taken.

What the base has at these rows depends on nothing that trains. So it isn't computed beside them, as rows that take no
update, but before, by a pass with the adapter off and without a gradient: its backward, which nobody needs, would be
about half of its work, and its activations would be kept. It is done for `CHAPTER` tokens at once, in fixed groups of
pieces (a sum's last bits depend on the shape of the product, and a resumed run must come to the same ones), and the
hidden rows that enter the head are kept, D numbers per token instead of V, so that a text that comes again costs
nothing: the first `KEPT` bytes of them, beyond that they are computed each time. Several processes: each asks the base
for the pieces of its own batches; with a sharded base, where all must make the same passes, for all of them.

Letters: R rows that are held to the base, T tokens, X what `Forward.rows` gives per token.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from deltaw.adapter.attach import Attached
from deltaw.base.batch import Batch, Retained
from deltaw.base.forward import Forward
from deltaw.base.limits import Limits
from deltaw.config import DataConfig, RunConfig
from deltaw.config.sources import sources_of
from deltaw.data.cache import prepared
from deltaw.data.example import Example
from deltaw.data.examples import Examples, fingerprint
from deltaw.data.loader import Item, fill
from deltaw.data.pack import pack
from deltaw.data.render import Renderer
from deltaw.data.sources import open_sources
from deltaw.errors import InputError
from deltaw.evaluation.forgetting import LENGTH, without_end
from deltaw.kernels.logprobs import IGNORE
from deltaw.show.progress import Display
from deltaw.show.text import counted

FEW = 1024  # tokens: less is no sample of what a model knows
SHORTEST = 16  # tokens of a piece, where a step takes fewer
CHAPTER = 512  # tokens that the base is asked for at once, on a CPU: from here on a product has its full speed
KEPT = 256 << 20  # bytes of what the base gave
ALONE = (
    0.5  # of a pass forward and backward, that a forward takes: the weights are frozen, so it is one of two products
)
RUN = 32  # tokens in a row that two texts have in common where one has a part of the other


class Schedule:
    """Which pieces which step takes. `lengths`: of all of them; `quota`: tokens per step, on average."""

    def __init__(self, lengths: Sequence[int] | np.ndarray, quota: float, seed: int) -> None:
        lengths = np.asarray(lengths, np.int64)
        words = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, 0x4B4C]  # another order than that of the task's rows
        self.order = np.random.RandomState(words).permutation(len(lengths))
        self.offsets = np.concatenate([[0], np.cumsum(lengths[self.order])])
        self.quota = quota

    def begun(self, steps: int) -> int:
        """How many pieces the first `steps` steps take, counted over all repetitions."""
        rounds, rest = divmod(steps * self.quota, float(self.offsets[-1]))
        return int(rounds) * len(self.order) + int(self.offsets[:-1].searchsorted(rest, "left"))

    def of_step(self, step: int) -> list[int]:
        """The places in the order of the pieces of step `step`, from 0; one place twice where the text is short."""
        return [place % len(self.order) for place in range(self.begun(step), self.begun(step + 1))]

    def tokens(self, steps: int) -> int:
        """Of the first `steps` steps."""
        rounds, rest = divmod(self.begun(steps), len(self.order))
        return rounds * int(self.offsets[-1]) + int(self.offsets[rest])


def retained_text(config: RunConfig, renderer: Renderer, limits: Limits, display: Display) -> Examples:
    """The pieces of `train.retain.data`; none where it isn't asked. Raises InputError where it has no token.

    Rows that are no texts (chats, questions with answers) aren't torn apart: their beginnings are taken, of which every
    token counts, whoever wrote it."""
    retain = config.train.retain
    if retain is None:
        return Examples.of([])
    if retain.data in (source.path for source in sources_of(config.data.train)):
        raise InputError(
            f"train.retain.data is what is trained on, {retain.data}: the run would be held to the base on the very "
            "rows that it is to learn",
            fix="name other text: train.retain.data=builtin:general-train",
        )
    longest = min(LENGTH, limits.longest or LENGTH)
    piece = min(longest, max(SHORTEST, int(retain.share * config.train.step_tokens)))
    reader = Renderer(renderer.tokenizer, "all")
    data = DataConfig(train=retain.data, max_length=piece)
    try:
        if not all(source.splits for source in open_sources(data.train, data, reader)):
            data = DataConfig(train=retain.data, max_length=longest, too_long="truncate")
        rows = prepared(data, reader, display=display).train
    except InputError as error:
        raise InputError(f"train.retain.data: {error.what}", fix=error.fix) from None
    pieces = [piece for piece in (without_end(row, renderer.stop_ids) for row in rows) if len(piece.tokens)]
    if not pieces:
        raise InputError(f"train.retain.data: {retain.data} has no token")
    return Examples.of(pieces)


def scarce_text(config: RunConfig, pieces: Examples, steps: int) -> list[str]:
    """What is to be said of text that is too short to stand for what the base knows."""
    text = Text.of(config, pieces)
    if text is None or (whole := int(pieces.lengths.sum())) >= FEW or text.schedule.begun(steps) <= 2 * len(pieces):
        return []
    times = text.schedule.begun(steps) / len(pieces)
    return [
        f"train.retain.data has {counted(whole, 'token')}, which this run takes {times:.0f} times: what the base says "
        "of so little is learnt by heart, and the rest isn't kept; take more text, as builtin:general-train has"
    ]


def check_apart(config: RunConfig, retained: Sequence[Example], general: Sequence[Example]) -> None:
    """Raise InputError where what forgetting is measured on is also trained on."""
    if config.train.retain is None or not general:
        return
    stream = np.concatenate([row.tokens[row.context :] for row in retained])  # as the text was, whole
    known = {size: _runs(stream, size) for size in {min(RUN, len(row.tokens)) for row in general}}
    shared = [
        row.origin
        for row in general
        if np.isin(_runs(row.tokens, size := min(RUN, len(row.tokens))), known[size]).any()
    ]
    if shared:
        more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
        raise InputError(
            f"train.retain.data ({config.train.retain.data}) has text of evaluate.general: {shared[0]}{more}, so what "
            "was forgotten couldn't be measured",
            fix="take other text for one of the two: train.retain.data=builtin:general-train, "
            "evaluate.general=builtin:general",
        )


def _runs(tokens: np.ndarray, size: int) -> np.ndarray:
    """A number of 64 bits for every `size` tokens in a row: the same for the same ones, another for others (but once in
    2⁶⁴)."""
    count = max(0, len(tokens) - size + 1)
    sums = np.zeros(count, np.uint64)
    for place in range(size):
        sums *= np.uint64(0x9E3779B97F4A7C15)
        sums += tokens[place : place + count].astype(np.uint64) + np.uint64(1)
        sums ^= sums >> np.uint64(29)
    return sums


@dataclass(frozen=True)
class Text:
    """What a run retains: its pieces and when it takes them. `weight`: of the KL beside the task's loss."""

    pieces: Examples
    schedule: Schedule
    weight: float

    @staticmethod
    def of(config: RunConfig, pieces: Examples) -> "Text | None":
        """None where the config asks for none."""
        retain = config.train.retain
        if retain is None:
            return None
        quota = retain.share * config.train.step_tokens
        return Text(pieces, Schedule(pieces.lengths, quota, config.train.seed), retain.weight)

    @property
    def fingerprint(self) -> str:
        """Of every token, in order."""
        return fingerprint(self.pieces, Examples.of([]))

    def tokens(self, taken: int, total: int) -> int:
        """Of the steps after `taken`, up to `total`."""
        return self.schedule.tokens(total) - self.schedule.tokens(taken)

    def asked(self, tokens: int, width: int) -> int:
        """For how many tokens the base is asked in steps that take `tokens` of them: each once, where what it gives,
        `width` bytes per token, is kept."""
        whole = int(self.schedule.offsets[-1])
        return min(tokens, whole) if whole * width <= KEPT else tokens

    def at(self, places: Iterable[int]) -> list[Example]:
        """The pieces at these places of the order."""
        return [self.pieces[int(self.schedule.order[place])] for place in places]


def time_share(task: int, general: int, asked: int) -> float:
    """About which part of a run's training time the general text takes, of the tokens that are passed: those of the
    task, those beside them, those for which the base is asked."""
    besides = general + ALONE * asked
    return besides / (task + besides)


class Kept:
    """What the base gave, by chapter, the last one in any case, and the first ones as far as there is room."""

    def __init__(self, room: int | None = None) -> None:
        self._room = KEPT if room is None else room
        self._chapters: dict[int, list[Tensor]] = {}
        self._last = (-1, list[Tensor]())

    def chapter(self, number: int, ask: Callable[[int], list[Tensor]]) -> list[Tensor]:
        """Of a chapter, for which `ask` asks where it isn't known."""
        chapter = self._chapters.get(number)
        if chapter is None:
            chapter = self._last[1] if self._last[0] == number else ask(number)
            self._last = number, chapter
            size = sum(rows_TX.nbytes for rows_TX in chapter)
            if size <= self._room:
                self._chapters[number] = chapter
                self._room -= size
        return chapter


class Retain:
    """The text beside the batches of each step, and what the base says of it. `capacity`: tokens of a batch of its own;
    `kept`: where what the base gave is kept, which learners of the same text in the same order may share."""

    def __init__(
        self, text: Text, forward: Forward, attached: Attached, capacity: int, kept: Kept | None = None
    ) -> None:
        self.text, self.weight, self._forward, self._attached = text, text.weight, forward, attached
        self._capacity = capacity
        self._device = attached.parameters[0].device
        lengths, order = text.pieces.lengths, text.schedule.order
        chapter = CHAPTER if self._device.type == "cpu" else max(CHAPTER, capacity)
        self._chapters = fill(range(len(order)), lengths[order], chapter)
        self._chapter_of = {place: n for n, places in enumerate(self._chapters) for place in places}
        self._kept = Kept() if kept is None else kept

    @property
    def chapters(self) -> int:
        """How many there are in all of the text."""
        return len(self._chapters)

    def beside(self, items: Iterable[Item], step: int) -> Iterator[Item]:
        """The items of a loader that stands before step `step` (from 0), each with the text of its step."""
        for number, (batches, state) in enumerate(items, step):
            yield self._joined(batches, self.text.schedule.of_step(number)), state

    def _joined(self, batches: Sequence[Batch], places: Sequence[int]) -> list[Batch]:
        """Each piece behind the batch that is the smallest so far; in batches of their own where documents aren't
        packed."""
        if not self._forward.packed:
            sizes = [len(piece.tokens) for piece in self.text.at(places)]
            groups = fill(range(len(places)), sizes, self._capacity) if places else []
            return [*batches, *(self._packed([places[n] for n in group]) for group in groups)]
        taken: list[list[int]] = [[] for _ in batches]
        sizes = [len(batch.tokens_T) for batch in batches]
        for place, piece in zip(places, self.text.at(places), strict=True):
            smallest = min(range(len(batches)), key=lambda n: (sizes[n], n))
            taken[smallest].append(place)
            sizes[smallest] += len(piece.tokens)
        return [self._behind(batch, mine) for batch, mine in zip(batches, taken, strict=True)]

    def _behind(self, batch: Batch, places: Sequence[int]) -> Batch:
        if not places:
            return batch
        return batch.followed_by(self._packed(places))

    def _packed(self, places: Sequence[int]) -> Batch:
        """These pieces as a batch of their own, without labels."""
        batch = pack(self.text.at(places))
        batch = batch.relabelled(torch.full_like(batch.labels_T, IGNORE))
        return replace(batch, retained=Retained(tuple(pairwise(batch.starts)), tuple(places)))

    def base_of(self, place: int) -> Tensor:
        """What the base has at the rows of a piece."""
        number = self._chapter_of[place]
        return self._kept.chapter(number, self.ask)[self._chapters[number].index(place)]

    @torch.no_grad()
    def ask(self, number: int) -> list[Tensor]:
        """What the base has at the rows of each piece of a chapter: a pass with the adapter off."""
        batch = self._packed(self._chapters[number]).to(self._device)
        with self._attached.leading(), self._attached.disabled():
            rows_TX = self._forward.rows(batch)
        return list(rows_TX.split([end - start for start, end in pairwise(batch.starts)]))


Retains = Mapping[int, Retain]  # what holds each learner, by the number of its adapter


def informed(batch: Batch, retains: Retains) -> Batch:
    """The batch, which is on the device, with what the base has at the rows that are held to it."""
    retained = batch.retained
    if retained is None or retained.base_RX is not None:
        return batch
    owners = retained.owners or (next(iter(retains)),) * len(retained.pieces)
    bases = [retains[owner].base_of(place) for owner, place in zip(owners, retained.pieces, strict=True)]
    return replace(batch, retained=replace(retained, base_RX=torch.cat(bases)))
