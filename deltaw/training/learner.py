"""A learner: everything that changes for one adapter, and what a step does to it.

    factors, magnitudes    what trains, in the layers of `attached`
    moments                AdamW's two of each
    state                  counts, sums and the best step so far (checkpoint.py)
    watch                  whether it learns at all (watch.py)

A run is one forward and one or more learners; a step (step.py) takes them together. A learner knows nothing of the
forward, the run folder or the other learners, so what it does with a gradient depends only on that gradient and its own
state alone. `saved` and `restore` are each other's inverse, to the bit.

Dropout is drawn afresh for each batch, from a seed that is the first eight bytes of SHA-256 over "seed step batch" (in
decimal, steps and batches from 0). PyTorch's dropout takes no generator of its own, so its global one is borrowed for
the length of a batch and put back as it was. Rejected: Python's hash, which is a detail of the interpreter.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deltaw.adapter.attach import Attached
from deltaw.base.batch import Batch
from deltaw.base.objective import Objective, sft
from deltaw.config import TrainConfig
from deltaw.errors import InputError
from deltaw.training.checkpoint import Saved, TrainState
from deltaw.training.optim import learning_rate, make_optimizer, set_rate
from deltaw.training.watch import Falling, Unfit, Watch, note_skip, note_update

FIRST, SECOND = ".first", ".second"  # moments of AdamW


class Learner:
    """An adapter that learns, `total` steps long. `say`: where a warning goes; `objective`: what it minimises."""

    def __init__(
        self,
        attached: Attached,
        config: TrainConfig,
        total: int,
        state: TrainState,
        say: Callable[[str], None] = print,
        objective: Objective = sft,
    ) -> None:
        self.attached, self.config, self.total, self.state, self.say = attached, config, total, state, say
        self.objective = objective
        self.optimizer = make_optimizer(attached, config)
        self.falling = Falling(say)
        self._watch: Watch | None = None  # from the first update of this process on

    @contextmanager
    def dropping(self) -> Iterator[None]:
        """Inside, dropout is on."""
        if not self.attached.spec.dropout:
            yield
            return
        self._dropout(True)
        try:
            yield
        finally:
            self._dropout(False)

    @contextmanager
    def drawing(self, batch: int, *, apart: bool = False) -> Iterator[None]:
        """Inside, what is random depends on the run's seed, the step and the batch's number alone. `apart`: on its own
        rows, beside other learners that draw for theirs, each as it would alone."""
        if not self.attached.spec.dropout:
            yield
            return
        words = f"{self.config.seed} {self.state.step} {batch}".encode()
        device, seed = self.attached.parameters[0].device, int.from_bytes(hashlib.sha256(words).digest()[:8], "big")
        if apart:
            with self.attached.carried.drawing_apart(self.attached.number, seed, device):
                yield
            return
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    @property
    def undivided(self) -> bool:
        """Whether the sum of the losses goes backward, and not their mean (step.py)."""
        return self.config.dtype == "float16"

    def gradients(self) -> list[Tensor]:
        """Of all that trains; zeros, where there is none."""
        for parameter in self.attached.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.attached.parameters if parameter.grad is not None]

    def digest(self) -> str:
        """SHA-256 over the factors: equal where two processes hold the same adapter, to the bit."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self._factors().items()):
            sha.update(name.encode())
            sha.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return sha.hexdigest()

    def divide(self, count: int) -> None:
        """Make the gradient of a sum over `count` tokens (pairs, …) that of their mean."""
        for parameter in self.attached.parameters:
            if parameter.grad is not None:
                parameter.grad /= count

    def clip(self) -> float:
        """Scale the gradient down to a norm of at most `clip`; returns its norm before."""
        return float(nn.utils.clip_grad_norm_(self.attached.parameters, self.config.clip))

    def update(self, loss: float, batches: Sequence[Batch], taking: Callable[[], object] | None = None) -> float:
        """Take the optimiser's step (by `taking`, where that is given) and return its rate. Raises CannotGoOn where the
        updates so far have taught nothing."""
        rate = learning_rate(self.state.step, self.total, self.config)
        set_rate(self.optimizer, rate)
        if self._watch is None:
            taken = self.state.step - self.state.skipped
            self._watch = Watch(self.attached, self.config, self.total, taken=taken, say=self.say)
        with self._watch.update(rate, loss, batches):
            (taking or self.optimizer.step)()
        note_update(loss, self.state, self.config)
        return rate

    def skip(self, unfit: Unfit) -> None:
        """Skip this step. Raises TooManySkips, with the state as it was, where that would be one too many."""
        note_skip(unfit, self.state, self.config)
        self.say(f"skipped step {self.state.step + 1}: {unfit}")

    def note_evaluation(self, loss: float) -> bool:
        """Record the held-out loss at this step (of rewards: minus the reward); returns whether it is the best so
        far."""
        state = self.state
        state.evaluated = state.step
        best = math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss)
        if best:
            state.best_step, state.best_loss = state.step, loss
        state.no_better = 0 if best else state.no_better + 1
        return best

    @property
    def out_of_patience(self) -> bool:
        """Whether as many evaluations in a row weren't the best as `train.patience` allows."""
        return self.config.patience is not None and self.state.no_better >= self.config.patience

    def saved(self) -> Saved:
        """The learner as a checkpoint holds it. The tensors are the learner's own."""
        moments = {}
        for name, parameter in self._parameters().items():
            state = self.optimizer.state[parameter]  # empty before the first update
            moments[name + FIRST] = state["exp_avg"] if state else torch.zeros_like(parameter)
            moments[name + SECOND] = state["exp_avg_sq"] if state else torch.zeros_like(parameter)
        return Saved(self.state, self._factors(), moments)

    def restore(self, saved: Saved) -> None:
        """Restore a checkpoint's numbers. Raises InputError when they aren't this adapter's."""
        self.put_factors_back(saved)
        parameters = self._parameters()
        if saved.moments.keys() != {name + moment for name in parameters for moment in (FIRST, SECOND)}:
            raise InputError("the checkpoint's optimiser state belongs to other parameters than this adapter's")
        updates = saved.state.step - saved.state.skipped
        for name, parameter in parameters.items():
            self.optimizer.state[parameter] = {
                # fused AdamW keeps its count on the parameter's device
                "step": torch.tensor(float(updates), device=parameter.device),
                "exp_avg": saved.moments[name + FIRST].to(parameter.device),
                "exp_avg_sq": saved.moments[name + SECOND].to(parameter.device),
            }
        now = self.state
        self.state = dataclasses.replace(saved.state, config=now.config, conditions=now.conditions, code=now.code)
        self._watch = None

    def put_factors_back(self, saved: Saved) -> None:
        """The factors alone: of the best step, when a run ends. Raises InputError when they are not this adapter's."""
        if {n: t.shape for n, t in saved.factors.items()} != {n: t.shape for n, t in self._factors().items()}:
            raise InputError("the checkpoint's factors are not this adapter's: its rank or targets were changed")
        with torch.no_grad():
            for name, value in [*self._constants().items(), *self._parameters().items()]:
                value.copy_(saved.factors[name])

    def checkpoint_bytes(self) -> int:
        """Of one checkpoint: all that trains with two moments, and what an initialiser left; its texts are some KiB."""
        constants = sum(constant.nbytes for constant in self._constants().values())
        return 3 * sum(parameter.nbytes for parameter in self.attached.parameters) + constants

    def _dropout(self, on: bool) -> None:
        for layer in self.attached.layers.values():
            layer.train(on)

    def _parameters(self) -> dict[str, nn.Parameter]:
        layers = self.attached.layers.items()
        return {f"{path}.{name}": value for path, layer in layers for name, value in layer.trained().items()}

    def _constants(self) -> dict[str, Tensor]:
        layers = self.attached.layers.items()
        return {f"{path}.{name}": value for path, layer in layers for name, value in layer.constants().items()}

    def _factors(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._parameters().items()} | self._constants()
