"""Steps of several runs together: each takes its own next step, on its own rows, and the base's products are shared.

    run 0    | step 7: batch 0 · batch 1 |        the batches of number 0 of all runs are laid end to end, as far as
    run 1    | step 3: batch 0           |   →    they fit into tokens_per_batch; then those of number 1; …
    run 2    | step 7: batch 0 · batch 1 |        [0.0 1.0 2.0] [0.1 2.1]

A run's own batches stay whole. So its gradient is the sum of the same batches as by itself, its dropout draws for the
same rows from the same stream, and all that differs is how many rows stand beside its own in a product: rounding.
What is gained is gained where own batches are small, for a product of 64 rows reaches two thirds of the rate of one of
512; of runs whose batches are as large as `tokens_per_batch` nothing is joined, and nothing would be gained.

A run ends by itself: after its last step, by its patience, or because it can't go on (watch.py), and the others go on.

On a GPU a run whose steps can be recorded (training/captured.py) takes them by itself, one run after the other up to
the same share. Together they aren't recorded, and then the host is what takes the time: some 150 launches per layer,
and the thin products of each run's factors beside the base's, which don't become fewer. Recorded, the device works
alone, and sharing would save it little: from some 300 rows on a product isn't bound by reading its matrix. Rejected:
recording common steps. Which rows are whose is the host's to say, so each layout of segments would be a size of its
own, filled up by run; it would gain only where a run's batches are of a few hundred tokens. Runs that can't be recorded
go on together.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from deltaw.base.batch import Batch
from deltaw.base.forward import Forward
from deltaw.show.progress import Board
from deltaw.show.text import counted
from deltaw.sweep.live import Live
from deltaw.training.captured import Captured, captured_on
from deltaw.training.contention import Contention
from deltaw.training.memory import Heap, bounded
from deltaw.training.step import step_together
from deltaw.training.stop import StopRequest
from deltaw.training.watch import CannotGoOn


def lay(steps: Mapping[int, Sequence[Batch]], capacity: int) -> tuple[list[Batch], list[int]]:
    """The batches of a step of each run, by the number of its adapter, as common ones of up to `capacity` tokens (or
    one run's batch); and the number that each has in its runs' own steps. A single run's are left as they are."""
    if len(steps) == 1:
        (batches,) = steps.values()
        return list(batches), list(range(len(batches)))
    common, numbers = list[Batch](), list[int]()
    for number in range(max(map(len, steps.values()))):
        part, size = list[Batch](), 0
        for update, batches in steps.items():
            if number >= len(batches):
                continue
            batch = batches[number].owned(update)
            if part and size + len(batch.tokens_T) > capacity:
                common.append(Batch.joined(part))
                part, size = [], 0
            part.append(batch)
            size += len(batch.tokens_T)
        common += [Batch.joined(part)] if part else []
        numbers += [number] * (len(common) - len(numbers))
    return common, numbers


class Joint:
    """Takes the steps of `live`, from which runs leave as they end. `ended`: told of each that does, and why if not
    because it is done; `say`: where a line goes that says how steps are taken."""

    def __init__(
        self,
        live: list[Live],
        forward: Forward,
        stop: StopRequest,
        contention: Contention,
        ended: Callable[[Live, CannotGoOn | None], object],
        say: Callable[[str], None],
    ) -> None:
        self.live, self._forward, self._stop, self._contention, self._ended = live, forward, stop, contention, ended
        self._say = say
        self._heap, self._first = Heap(live[0].opened.device), True
        self._all, self._began, self._tokens = list(live), time.monotonic(), 0
        self._capacity = max(one.opened.config.train.batch_tokens for one in live)

    def take_until(self, share: float, board: Board) -> None:
        """All steps up to this share of each run's; those that are done then, or can't go on, leave."""
        self._leave()
        for one in list(self.live):
            self._take_alone(one, share, board)
        while taking := [one for one in self.live if one.is_before(share)]:
            self._take(taking)
            if taking[0].opened.device.type == "cpu":
                self._contention.stepped()
            self._show(board)
            self._leave()
            self._heap.tidy()
        self._show(board)

    def save(self) -> None:
        """Each as it stands."""
        for one in self.live:
            if one.learner.state.step:
                one.underway.save()

    def drop(self, names: Sequence[str]) -> None:
        """Stop these runs where they are, saved."""
        for one in [one for one in self.live if one.name in names]:
            one.underway.save()
            self.live.remove(one)
            one.leave()

    def _take_alone(self, one: Live, share: float, board: Board) -> None:
        """The steps of a run up to this share, recorded, where its device can."""
        device, longest = one.opened.device, one.opened.longest
        if not one.is_before(share):
            return
        captured = captured_on(device, self._forward, one.learner, longest, self._say, one.steps.fetch)
        if captured is None:
            return
        if len(self.live) > 1:
            self._say("steps are recorded, so runs take them one after the other: together they would be slower")
        try:
            while one in self.live and one.is_before(share) and not (one.underway.is_over or captured.why_not):
                self._take([one], captured)
                self._show(board)
        finally:
            captured.release()
        self._leave()

    def _take(self, taking: Sequence[Live], captured: Captured | None = None) -> None:
        """One step of each, and what is due after it. `captured`: the passes of the only one."""
        steps = [next(one.steps) for one in taking]
        batches, numbers = lay(
            {one.opened.attached.number: its for one, (its, _) in zip(taking, steps, strict=True)}, self._capacity
        )
        lost = list[tuple[Live, CannotGoOn]]()
        with self._stop.held():
            learners, positions = [one.learner for one in taking], [position for _, position in steps]
            alone = taking[0].opened.attached.leading() if len(taking) == 1 else nullcontext()  # its batches don't say
            with bounded(taking[0].opened.device) if self._first else nullcontext(), alone:
                retains = {one.opened.attached.number: one.retain for one in taking if one.retain is not None}
                more: dict[str, Any] = {"numbers": numbers, "captured": captured, "retains": retains}
                taken = step_together(self._forward, learners, batches, positions, **more)
            self._first = False  # the step that shows whether there is memory enough
            self._tokens += sum(len(batch.tokens_T) for batch in batches)
            for one, result in zip(taking, taken, strict=True):
                if result.ended is None:
                    one.underway.note(result.record)
                else:
                    lost.append((one, result.ended))
            self._lose(lost)
        for one in taking:
            if one in self.live:
                try:
                    one.underway.do_what_is_due()
                except CannotGoOn as error:
                    self._lose([(one, error)])

    def _lose(self, lost: Sequence[tuple[Live, CannotGoOn]]) -> None:
        """Runs that can't go on: saved as far as they came, and off the model."""
        for one, error in lost:
            if one.learner.state.step:
                one.underway.save()
            self.live.remove(one)
            one.leave()
            self._ended(one, error)

    def _leave(self) -> None:
        """Runs that are done."""
        for one in [one for one in self.live if one.underway.is_over]:
            one.finish(self._contention.waited)
            self.live.remove(one)
            self._ended(one, None)

    def _show(self, board: Board) -> None:
        rows = [one.cells for one in self._all if one in self.live]
        speed = self._tokens / (time.monotonic() - self._began)
        done = sum(one.learner.state.step for one in self._all)
        board(done, rows, f"{counted(len(self.live), 'run')}, {speed:.0f} tokens/s")
