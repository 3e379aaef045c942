"""Our own slots for keys and values: rows of any length join, decode side by side and leave, and none is padded.

Where attention stands in (adapter/stand_ins.py), a pass carries one of two things to it (`Pass.cache`):

    Filling     prompts, or pieces of them, laid end to end; their keys and values go to their slots (filling.py);
    GoingOn     one token per row: its key and value go to its slot, and it attends to what is there (going.py).

Slots of one capacity stand on a shelf (shelf.py). Rows of a shelf are read together up to the longest of them, so that
a short row doesn't pay for a long one: capacities go up by half from 64, and a row that has filled its slot moves to
the next shelf. A prompt that isn't whole with its first piece has its slot on a shelf apart until it is: the rows that
go on are all of their shelves.

On a GPU steps are recorded and replayed (captured.py), and capacities are powers of two.

The beginnings of rows that name their key are kept when they are whole and when they leave, and read by rows that come
later (prefixes.py). A row that begins as one does that is being filled waits for it, and reads what it has made.

What the model says of a prompt's own tokens is told from the pass that fills its slot, where that is asked for: so a
prompt that is measured runs once. It reads no beginning of another row then, which has no logits.

The model is run with one row per sequence ([R, 1]) and not with all rows as one sequence, since angles that depend on a
document's company (base/angles.py) are asked for by row.

`Slots.hold` tries it, like everything here: the model's own decoding, a row at a time, must come to the same logits
when rows join, in one piece or in two, grow and leave. An attention without a stand-in shows there, too: it would see
one token alone.

Rejected: pages of fixed size with a table per row (PagedAttention): on a CPU gathering the pages costs what reading
them costs, and on a GPU it takes a kernel of its own. One pass for the rows that go on and the prompts that join: a
step's fixed cost would be paid once, but angles are asked for by row in the one and by document in the other.

Letters: T tokens of prompts, R rows, V vocabulary.
"""

import inspect
import weakref
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.adapter.ready import Ready
from deltaw.adapter.stand_ins import FusedAttention
from deltaw.base.attention import is_packed
from deltaw.base.frozen import InParts, dtype_of
from deltaw.base.head import find_head
from deltaw.base.packed import PackedLinear
from deltaw.base.passing import Pass, passing_of
from deltaw.base.probe import REFUSALS
from deltaw.generate.cache import Cache, Row, segments_for, text_config
from deltaw.generate.captured import SMALLEST as DOUBLING_FROM
from deltaw.generate.captured import Captured
from deltaw.generate.filling import GPU_PIECE, PIECE, Continued, Filling, Run, next_runs
from deltaw.generate.going import GoingOn
from deltaw.generate.logprobs import LOGITS_AT_ONCE, Logprobs, logprobs_of
from deltaw.generate.prefixes import Prefixes
from deltaw.generate.sampling import Sampling
from deltaw.generate.shelf import SMALLEST, Part, Shelf, power_of_two
from deltaw.generate.together import Trial
from deltaw.kernels.documents import Documents
from deltaw.kernels.graphs import Record

PLAIN = nn.Linear, PackedLinear  # heads that are a product and nothing else
KEPT = 16_384  # tokens of rows that have left, beside those of the rows themselves


class Slots(Cache):
    """Rows in slots of our own. Only for a model of which `Slots.hold` says that it may."""

    share, patience = 8, 8

    def __init__(
        self,
        model: nn.Module,
        piece: int | None = None,
        *,
        own_head: bool | None = None,
        record: Record | None = None,
    ) -> None:
        """`piece`: the most tokens of prompts in a pass. `own_head`: the head is made here; None: as was tried.
        `record`: how steps are recorded; None: they aren't."""
        self.model: Any = model
        self.device = next(model.parameters()).device
        self.piece = piece or (GPU_PIECE if self.device.type == "cuda" else PIECE)
        self.shelves: dict[int, Shelf] = {}  # by capacity: of the rows that go on
        self.filling: dict[int, Shelf] = {}  # and of those whose prompts are in pieces
        self.shelf_of: dict[Row, Shelf] = {}
        self.stored: dict[Row, int] = {}  # how many of its tokens' keys and values a row has, in the order they came
        self.scores: dict[Row, list[Logprobs]] = {}  # of prompts' tokens, for rows that ask
        self.prefixes = Prefixes(KEPT)
        parts = any(isinstance(module, InParts) for module in model.modules())  # their weights come and go
        self.ready = None if parts else Ready(model, doubling=record is not None)
        self.own_head = _own_head(model) if own_head is None else own_head
        self.captured: Captured | None = None
        if record is not None and self.ready is not None:
            self.captured = Captured(self._run, self._stepped, self._holds_shelf, self.ready, record)

    @property
    def tokens(self) -> int:
        return sum(row.reach for row in self.stored)

    def first(self, waiting: Sequence[Row], tokens: int) -> list[Row]:
        chosen: list[Row] = []
        for row in waiting:
            tokens -= row.reach
            if tokens < 0 and (chosen or self.stored):
                break
            chosen.append(row)
        return chosen

    def join(self, rows: Sequence[Row]) -> None:
        self.stored |= dict.fromkeys(rows, 0)

    def fill(self) -> Iterator[tuple[list[Row], Tensor]]:
        runs = self._runs()
        if not runs:
            return
        try:
            logits_RV = self._filled(runs)
        except BaseException:
            for row, _, _ in runs:
                self._free(row)
                self.stored[row] = 0
                self.scores.pop(row, None)
            raise
        for row, _, end in runs:
            self.stored[row] = end
            self._keep(row)
        whole = [run.row for run in runs if run.whole]
        yield whole, logits_RV[: len(whole)]

    def _runs(self) -> list[Run]:
        """The next piece. A row that begins as another one of it does waits for that one, to read what it makes."""
        begun: dict[Row, int] = {}
        for row, stored in self.stored.items():
            if stored < len(row.prompt):
                # The last token is run in any case: its logits are wanted.
                kept = self.prefixes.count(row.key, row.prompt[:-1]) if row.scored is None else 0
                begun[row] = max(stored, kept)
        size = self.piece
        if any(row.scored is not None for row in begun):
            size = max(1, min(size, LOGITS_AT_ONCE // text_config(self.model).vocab_size))
        runs = next_runs(begun, size)
        follow = {run.row for n, run in enumerate(runs) if any(run.follows(other) for other in runs[:n])}
        free = {row: first for row, first in begun.items() if row not in follow or row.scored is not None}
        return next_runs(free, size)

    def _filled(self, runs: Sequence[Run]) -> Tensor:
        """Run them. Logits [R, V] of the next token of each that is whole."""
        ordered = sorted(runs, key=lambda run: run.row.update or 0)
        starts = [0, *accumulate(end - first for _, first, end in ordered)]
        tokens_T = torch.tensor([t for row, first, end in ordered for t in row.prompt[first:end]], device=self.device)
        positions_T = torch.cat([torch.arange(first, end, device=self.device) for _, first, end in ordered])
        self._place(ordered)
        cache = self._carried(ordered, starts, positions_T)
        kept = [run.row.update for run in runs if run.whole] or [ordered[0].row.update]
        ready = self._ready([run.row.update for run in ordered for _ in range(run.first, run.end)])
        this = Pass(
            segments=segments_for([run.row.update for run in ordered], starts),
            kept=segments_for(kept, range(len(kept) + 1)),
            cache=cache,
            ready=ready if ready is not None and ready.places.dense else None,
        )
        spans = {run: range(starts[at], starts[at + 1]) for at, run in enumerate(ordered)}
        asked = {
            run: span if run.row.scored is not None else span[-1:] if run.whole else () for run, span in spans.items()
        }
        wanted_R = torch.tensor(
            [at for run in runs for at in asked[run]] or [0], device=self.device
        )  # some it must give
        logits_RV = self._run(this, tokens_T[None], positions_T[None], wanted_R)
        parts = logits_RV[: sum(map(len, asked.values()))].split([len(asked[run]) for run in runs])
        for run, part_RV in zip(runs, parts, strict=True):
            self._score(run, part_RV)
        lasts = [part_RV[-1] for run, part_RV in zip(runs, parts, strict=True) if run.whole]
        return torch.stack(lasts) if lasts else logits_RV[:0]

    def _score(self, run: Run, logits_RV: Tensor) -> None:
        """Keep what the logits say of the prompt's tokens that follow the run's, where that is asked for."""
        row, first, end = run
        following = row.prompt[first + 1 : end + 1]
        if row.scored is not None and following:
            told = logprobs_of(logits_RV[: len(following)], following, row.scored)
            self.scores.setdefault(row, []).extend(told)

    def _place(self, runs: Sequence[Run]) -> None:
        """Give the runs' rows the slots that they need now, with what is kept of their beginnings."""

        def needed(run: Run) -> tuple[bool, int]:
            return run.whole, self._capacity(len(run.row.prompt) + 1)

        for (whole, capacity), some in groupby(sorted(runs, key=needed), needed):
            shelf = self._shelf(self.shelves if whole else self.filling, capacity)
            new = [row for row, _, _ in some if self.shelf_of.get(row) is not shelf]
            shelf.add([row for row in new if row not in self.shelf_of])
            for row in new:
                self._move(row, shelf)
        for row, first, _ in runs:
            stored = self.stored[row]
            if first > stored:
                for at, part in self.prefixes.parts(row.key, row.prompt[:first], stored):
                    self.shelf_of[row].write(row, at, part)

    def _carried(self, runs: Sequence[Run], starts: Sequence[int], positions_T: Tensor) -> Filling:
        """What a pass over runs that begin at `starts` carries to attention."""
        spans = [torch.arange(start, end, device=self.device) for start, end in pairwise(starts)]
        by_shelf: dict[Shelf, list[int]] = {}
        for n, run in enumerate(runs):
            by_shelf.setdefault(self.shelf_of[run.row], []).append(n)
        parts, continued, fresh = [], [], []
        for shelf, numbers in by_shelf.items():
            at = {row: place for place, row in enumerate(shelf.rows)}
            places = [at[runs[n].row] for n in numbers]
            lengths_N = torch.tensor([len(spans[n]) for n in numbers], device=self.device)
            places_T = torch.tensor(places, device=self.device).repeat_interleave(lengths_N)
            tokens_T = torch.cat([spans[n] for n in numbers])
            rows = slice(None) if len(by_shelf) == 1 else tokens_T
            parts.append(Part(shelf, rows, places_T, positions_T[tokens_T]))
            for n, place in zip(numbers, places, strict=True):
                if runs[n].first:
                    continued.append(Continued(slice(starts[n], starts[n + 1]), shelf, place, runs[n].end))
                else:
                    fresh.append(n)
        fresh.sort()
        documents = Documents([0, *accumulate(len(spans[n]) for n in fresh)], self.device) if fresh else None
        fresh_T = torch.cat([spans[n] for n in fresh]) if fresh and continued else slice(None)
        return Filling(parts, documents, fresh_T, continued)

    def steps(self) -> Iterator[tuple[list[Row], Tensor]]:
        self._grow()
        shelves = [shelf for shelf in self.shelves.values() if shelf.rows]
        if not shelves:
            return
        rows = [row for shelf in shelves for row in shelf.rows]
        logits_RV = self.captured.step(shelves, [*self.stored]) if self.captured else self._stepped(shelves)
        self.stored |= {row: row.place + 1 for row in rows}
        yield rows, logits_RV

    def _stepped(self, shelves: Sequence[Shelf]) -> Tensor:
        """Logits [R, V] of the next tokens of all of their rows."""
        rows: list[Row] = []
        parts, ends = [], []
        for shelf in shelves:
            which = slice(len(rows), len(rows := [*rows, *shelf.rows]))
            ats = [row.place for row in shelf.rows]
            ats_R = torch.tensor(ats, device=self.device)
            parts.append(Part(shelf, which, torch.arange(len(shelf.rows), device=self.device), ats_R))
            ends.append((min(ats) + 1, max(ats) + 1))
        updates = [row.update for row in rows]
        segments = segments_for(updates, range(len(rows) + 1))
        ids_R1 = torch.tensor([[row.last] for row in rows], device=self.device)
        positions_R1 = torch.tensor([[row.place] for row in rows], device=self.device)
        this = Pass(segments=segments, cache=GoingOn(parts, ends), ready=self._ready(updates))
        return self._run(this, ids_R1, positions_R1)

    def _ready(self, updates: Sequence[int | None]) -> Ready | None:
        """What a pass whose rows take these updates has ready of its layers."""
        if self.ready is not None:
            self.ready.begin(updates, self.device, [row.update for row in self.stored])
        return self.ready

    def _grow(self) -> None:
        """Move rows that have filled their slots to larger ones."""
        for shelf in list(self.shelves.values()):
            for row in [row for row in shelf.rows if row.place >= shelf.capacity]:
                self._move(row, self._shelf(self.shelves, self._capacity(row.place + 1)))

    def _shelf(self, shelves: dict[int, Shelf], capacity: int) -> Shelf:
        """That of a capacity."""
        return shelves.setdefault(capacity, Shelf(capacity, doubling=self.captured is not None))

    def _holds_shelf(self, shelf: Shelf) -> bool:
        return self.shelves.get(shelf.capacity) is shelf

    def _capacity(self, tokens: int) -> int:
        """The size of the smallest slot that holds so many."""
        if self.captured is not None:
            return power_of_two(max(tokens, DOUBLING_FROM))
        capacity = SMALLEST
        while capacity < tokens:
            capacity += capacity // 2
        return capacity

    def _move(self, row: Row, shelf: Shelf) -> None:
        """To another shelf, where it has a slot already if it comes from none."""
        old = self.shelf_of.get(row)
        if old is not None:
            shelf.take(row, old)
            self._free(row)
        self.shelf_of[row] = shelf

    def _free(self, row: Row) -> None:
        """Take a row's slot from it."""
        shelf = self.shelf_of.pop(row, None)
        if shelf is not None:
            shelf.remove(row)
            stays = self.captured is not None and shelf.small and self._holds_shelf(shelf)
            for shelves in (self.shelves, self.filling):
                if not shelf.rows and not stays and shelves.get(shelf.capacity) is shelf:
                    del shelves[shelf.capacity]
                    if self.captured is not None:
                        self.captured.let_go()

    def _keep(self, row: Row) -> None:
        """Keep what it has for others, where it names its key."""
        if row.key and row in self.shelf_of:
            tokens = (*row.prompt, *row.new)[: self.stored[row]]
            self.prefixes.keep(row.key, tokens, self.shelf_of[row].read(row))

    def clear(self) -> None:
        """Let go of all that is kept for rows to come."""
        self.prefixes.clear()
        if self.captured is not None:
            self.captured.release()
        self.shelves = {capacity: shelf for capacity, shelf in self.shelves.items() if shelf.rows}

    def leave(self, row: Row) -> None:
        if row in self.stored:
            self._keep(row)
            self._free(row)
            self.scores.pop(row, None)
            del self.stored[row]

    def _run(self, this: Pass, ids: Tensor, positions: Tensor, at_R: Tensor | None = None) -> Tensor:
        """Logits [R, V] of the rows of tokens, or of those at `at_R` of the only row. A head that is a plain product is
        made here, where its matrix may be prepacked (kernels/prepacked.py)."""
        inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False, "return_dict": True}
        module = self.model.get_output_embeddings() if self.own_head else None
        with passing_of(self.model).running(this):
            if type(module) not in PLAIN:  # one with updates is the model's to run
                options = {} if at_R is None else {"logits_to_keep": at_R}
                logits: Tensor = self.model(**inputs, **options).logits
                return logits[:, -1] if at_R is None else logits[0]
            hidden: Tensor = self.model.base_model(**inputs).last_hidden_state
        head = find_head(self.model)
        assert head is not None
        return head.logits(hidden[:, -1] if at_R is None else hidden[0, at_R])

    @staticmethod
    def hold(model: nn.Module) -> bool:
        """Whether rows in slots get what they get alone, as the model, in eval mode, is now. Tried once per model."""
        stand_ins = [module for module in model.modules() if isinstance(module, FusedAttention)]
        if not stand_ins or not is_packed(model) or not all(stand_in.enabled for stand_in in stand_ins):
            return False
        dtype = dtype_of(model)
        if _tried.get(stand_ins[0], (None,))[0] != dtype:
            ways = [own_head for own_head in (True, False) if own_head <= (find_head(model) is not None)]
            _tried[stand_ins[0]] = dtype, next((own_head for own_head in ways if _holds(model, own_head)), None)
        return _tried[stand_ins[0]][1] is not None


# Whether the head may be made here, where rows may be in slots. Spares the passes.
_tried: weakref.WeakKeyDictionary[nn.Module, tuple[Any, bool | None]] = weakref.WeakKeyDictionary()


def _own_head(model: nn.Module) -> bool:
    first = next((module for module in model.modules() if isinstance(module, FusedAttention)), None)
    return first is not None and bool(_tried.get(first, (None, None))[1])


@torch.no_grad()
def _holds(model: nn.Module, own_head: bool) -> bool:
    """Two rows join, go on, one leaves, and another joins the one that is left, which takes the same step again. The
    first two join in pieces, the third at once."""
    if not {"position_ids", "logits_to_keep"} <= set(inspect.signature(model.forward).parameters):
        return False
    try:
        trial = Trial(model)
        truth_2RV = torch.stack([trial.logits([ids])[:, 0] for ids in (trial.short, trial.long)], 1)
        slots, token = Slots(model, piece=8, own_head=own_head), int(trial.other[0])
        short, long, again = (
            Row(n, tuple(ids.tolist()), Sampling(), set(), n, room=2)
            for n, ids in enumerate((trial.short, trial.long, trial.short))
        )
        first_RV = _joined(slots, [short, long])
        short.new, long.new, again.new = [token], [token], []
        ((_, second_RV),) = slots.steps()
        slots.leave(short)
        third_V = _joined(slots, [again])[0]
        again.new = [token]
        ((rows, fourth_RV),) = slots.steps()
    except REFUSALS:
        return False
    own_2RV = torch.stack([first_RV, second_RV]).double()
    late_2RV = torch.stack([torch.stack([third_V, first_RV[1]]), fourth_RV[[rows.index(again), rows.index(long)]]])
    return all(trial.apart(mine, truth_2RV) <= trial.units for mine in (own_2RV, late_2RV.double()))


def _joined(slots: Slots, rows: Sequence[Row]) -> Tensor:
    """Logits [R, V] of the next token of rows that join."""
    slots.join(rows)
    logits_V: dict[Row, Tensor] = {}
    while len(logits_V) < len(rows):
        for whole, logits_RV in slots.fill():
            logits_V |= zip(whole, logits_RV, strict=True)
    return torch.stack([logits_V[row] for row in rows])
