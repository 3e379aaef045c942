"""The watchdog: tells a run that learns from one that only seems to. It watches every run.

A step that can't be applied is skipped, as often as the config allows; then the run stops:

    not finite     a loss or a gradient that is NaN or infinite
    spike          a loss many times the recent median (where `train.skip_spikes` asks for it)
    nothing        not one token of the step is trained

An update that changes nothing stops a run that has never learnt:

    no gradient    a module whose gradient was zero at each of the run's first updates
    still zero     a factor B that has not left zero after them
    too small      below the rounding of nearly all of a parameter's numbers, at no less than half the full rate

A run that has learnt reaches the last case as well, when nothing is left to learn: the gradient vanishes, and Adam's
step with it. That costs only time, so a warning is given once and the run goes on. The two are told apart by whether
the parameter has moved since the process began (or the run was resumed, or begins at a trained adapter, which B tells:
then an earlier process has seen it move).

The median is over losses of steps that were applied: a spike that is let into its own window would hide the next one,
and a NaN would hide them all (OLMo's trainer met that). Below `NOTHING` nats per token there is nothing to lose, so
there no step is a spike: a memorised run's median is 0, and everything is many times 0.

A step of sampled answers from which nothing can be learnt (all of a group have one reward, or all were cut off) counts
as skipped, too: ten in a row, and the run stops with what to do.

Where answers are weighed it warns once that the likelihood of the chosen ones falls (`Falling`): the run goes on, since
that may be wanted.

Too small is seldom B, which begins at zero, where any step is exact; A's numbers are some hundredths, of which float32
keeps 3e-9.

The queries and keys of attention have no gradient from a token that sees itself alone, the first of its row. Rows whose
trained tokens are all their second teach them nothing: where that is why a module is silent, the error says so.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor

from deltaw.adapter.attach import Attached
from deltaw.base.batch import Batch
from deltaw.config import TrainConfig
from deltaw.errors import RunError, listed
from deltaw.kernels.logprobs import IGNORE
from deltaw.training.checkpoint import TrainState

PATIENCE = 10  # updates until a module must have had a gradient
EVERY = 100  # updates between two looks at rounding
MOVED = 0.01  # share of a parameter's numbers that an update must change
WINDOW, ENOUGH = 64, 16  # losses the median is over, and how many it needs
IN_A_ROW = 10  # skipped steps for another reason than NaN
NOTHING = 0.01  # nats per token: what a loss is held to at least, before it is called a spike
KNOWN = 1e-6  # nats per token: rows that the model knows already
MOVES = ("b", "delta")  # zero where a fresh adapter begins
RECENT, FELL = 10, 0.05  # steps; share of its log-probability by which a chosen answer may become unlikelier
SAMPLE = 1024  # of a parameter's numbers, kept from the process's beginning


class Unfit(Exception):
    """This step can't be applied: `what` says why, `rows` are what it trained on; `fix`: what to do if it goes on."""

    def __init__(self, what: str, rows: Sequence[str], not_finite: bool = False, fix: str = "") -> None:
        super().__init__(what)
        self.what, self.rows, self.not_finite, self.fix = what, list(rows), not_finite, fix

    def __str__(self) -> str:
        shown = ", ".join(self.rows[:8]) + (f" and {len(self.rows) - 8} more" if len(self.rows) > 8 else "")
        return f"{self.what}; nothing was updated\nrows: {shown}"


class CannotGoOn(RunError):
    """This adapter can't be trained further as it is. It says nothing of others that learn on the same base."""


class TooManySkips(CannotGoOn):
    """One more step would have to be skipped than is allowed; nothing has been counted yet."""


def check_loss(loss: float, rows: Sequence[str], state: TrainState, config: TrainConfig) -> None:
    """Raise Unfit on a spike. `loss`: of the whole step, finite, in nats per token."""
    if config.skip_spikes is None or len(state.recent) < ENOUGH:
        return
    usual = max(NOTHING, median(state.recent))
    if loss > config.skip_spikes * usual:
        raise Unfit(f"the loss, {loss:.3f}, is {loss / usual:.1f} times the recent median of {usual:.3f}", rows)


def note_update(loss: float, state: TrainState, config: TrainConfig) -> None:
    """A step was applied."""
    state.in_a_row = 0
    if config.skip_spikes is not None:
        state.recent = [*state.recent, loss][-WINDOW:]


def note_skip(unfit: Unfit, state: TrainState, config: TrainConfig) -> None:
    """A step is skipped. Raises TooManySkips, before anything is counted, where that would be one too many."""
    step = f"step {state.step + 1}: {unfit}"
    if unfit.not_finite and state.not_finite >= config.skip_nonfinite:
        fix = "look at these rows, or lower train.lr; train.skip_nonfinite: 3 would skip three such steps"
        if config.dtype == "float16":
            fix = "float16 ends at 65,504: start again with train.dtype: bfloat16 or float32; or look at these rows"
        raise TooManySkips(step, fix=fix)
    if not unfit.not_finite and state.in_a_row >= IN_A_ROW:
        raise TooManySkips(
            step,
            fix=f"{IN_A_ROW} steps in a row were skipped before it: {unfit.fix or 'look at the data, or at train.lr'}",
        )
    state.skipped += 1
    state.not_finite += unfit.not_finite
    state.in_a_row += 1


class Falling:
    """Warns once where the chosen answers have become unlikelier than under the reference: an objective of preferences
    asks only that the rejected ones fall further, and what rises instead may be an answer that nobody chose."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._seen, self._warned = say, deque[tuple[float, float]](maxlen=RECENT), False

    def see(self, figures: Mapping[str, float], step: int) -> None:
        """What the objective reports of a step that was applied."""
        if self._warned or "chosen_change" not in figures or "logp_chosen" not in figures:
            return
        self._seen.append((figures["chosen_change"], figures["logp_chosen"]))
        change, logp = (sum(values) / len(self._seen) for values in zip(*self._seen, strict=True))
        if len(self._seen) == RECENT and change < -max(1.0, FELL * abs(logp)):
            self._warned = True
            self._say(
                f"warning: step {step}: the likelihood of chosen answers falls: by {-change:.1f} nats each, to "
                f"{logp:.1f}, over the last {RECENT} steps; lower train.lr, raise objective.beta, or hold it up with "
                "objective.sft_weight (dpo, ipo, simpo)"
            )


class Watch:
    """Watches the updates of one process. `with watch.update(rate, loss, batches): optimizer.step()`.

    `steps`: of the whole run; `taken`: updates of it before this process; `say`: where a warning goes.
    """

    def __init__(
        self, attached: Attached, config: TrainConfig, steps: int, *, taken: int = 0, say: Callable[[str], None] = print
    ) -> None:
        self._layers = {path: layer.trained() for path, layer in attached.layers.items()}
        self._silent = set(self._layers)
        self._config, self._patience, self._say = config, min(PATIENCE, steps), say
        self._updates = self._taken = taken
        self._learnt = bool(taken) or any(t[n].any() for t in self._layers.values() for n in MOVES if n in t)
        self._alone = self._known = True  # all labels so far: the second of their row, of rows known already
        self._warned = False
        self._first = {path: {n: _sampled(p) for n, p in trained.items()} for path, trained in self._layers.items()}

    @contextmanager
    def update(self, rate: float, loss: float, batches: Sequence[Batch]) -> Iterator[None]:
        """Around the optimiser's step, while the gradients exist. Raises CannotGoOn where the run learns nothing."""
        self._updates += 1
        if self._updates <= self._patience:
            self._known &= loss < KNOWN and not any(b.rewarded for b in batches)
            self._alone &= not any(((b.labels_T != IGNORE) & (b.positions_T > 0)).any() for b in batches)
            self._silent -= self._with_gradient()
        look = self._updates % EVERY == PATIENCE and 2 * rate >= self._config.lr
        before = self._copy() if look else {}
        yield
        if self._updates == self._patience:
            self._check_alive()
        if look:
            self._check_moved(before)

    def _copy(self) -> dict[str, dict[str, Tensor]]:
        return {path: {n: p.detach().clone() for n, p in trained.items()} for path, trained in self._layers.items()}

    def _with_gradient(self) -> set[str]:
        pairs = [
            (path, parameter.grad)
            for path in self._silent
            for parameter in self._layers[path].values()
            if parameter.grad is not None
        ]
        if not pairs:
            return set()
        largest = torch.stack(torch._foreach_norm([grad for _, grad in pairs], math.inf)).tolist()
        return {path for (path, _), value in zip(pairs, largest, strict=True) if value}

    def _check_alive(self) -> None:
        seen = self._updates - self._taken
        if self._silent:
            raise CannotGoOn(
                f"{len(self._silent)} of {len(self._layers)} adapted modules got no gradient in {seen} updates: they "
                f"learn nothing\n{listed(sorted(self._silent), 1)}",
                fix=self._why_silent(),
            )
        still = [f"{path}.{n}" for path, t in self._layers.items() for n in MOVES if n in t and not t[n].any()]
        if still:
            raise CannotGoOn(
                f"{len(still)} factors are still zero after {seen} updates\n{listed(still, 1)}",
                fix="raise train.lr, or choose other adapter.targets",
            )

    def _why_silent(self) -> str:
        if self._known:
            who = "the adapter that it starts from" if self._learnt and not self._taken else "the base"
            return f"the loss was 0 in all of them: {who} already knows these rows, so there is nothing to learn"
        if self._alone:
            return (
                "only the second token of each row is trained, and it sees a single token, so attention has "
                "nothing to choose: "
                "give the rows longer prompts, or set adapter.targets to mlp"
            )
        return "choose other adapter.targets: these don't reach the loss"

    def _check_moved(self, before: dict[str, dict[str, Tensor]]) -> None:
        named = {
            (path, name): (parameter.detach(), parameter.grad)
            for path, trained in self._layers.items()
            for name, parameter in trained.items()
            if parameter.grad is not None
        }
        shares = [
            torch.stack([(now != before[path][name]).float().mean(), (grad != 0).float().mean()])
            for (path, name), (now, grad) in named.items()
        ]
        asked = torch.stack(shares).tolist() if shares else []  # at once: on a GPU each question waits for it
        stuck = [which for which, (moved, wanted) in zip(named, asked, strict=True) if moved < MOVED < wanted]
        never = [f"{path}.{name}" for path, name in stuck if not self._has_moved(path, name)]
        if never:
            raise CannotGoOn(
                f"the update is below the rounding of {len(never)} parameters: they don't move\n{listed(never, 1)}",
                fix=f"raise train.lr, which is {self._config.lr:g}",
            )
        if stuck and not self._warned:
            self._warned = True
            self._say(
                f"warning: since update {self._updates} at the latest, {len(stuck)} parameters that used to move have "
                "stopped: at this rate nothing is left to learn from these rows"
            )

    def _has_moved(self, path: str, name: str) -> bool:
        now = _sampled(self._layers[path][name])
        return bool(self._learnt or (now != self._first[path][name]).float().mean() >= MOVED)


def _sampled(parameter: Tensor) -> Tensor:
    """A copy of some of its numbers, evenly spread."""
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLE)].clone()
