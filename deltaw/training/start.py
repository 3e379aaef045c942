"""Warm start: a run that trains on from an adapter (`adapter: {from: …}`) instead of a fresh one.

The start may be a run or an adapter's folder, made by any tool, on the same base (by fingerprint). Its adapter decides
the kind, rank, alpha, scaling and targets; dropout, which is a matter of training, may be another. A setting beside
`from` that says otherwise is an error: it would be a different adapter, which `resize` or `extract` makes first. Only
what the run file states is held against it, and what the run records states all of it, so that a resumed run is checked
as a new one is.

    numbers     the start's factors (and DoRA's magnitudes, or ΔW), to the bit; the held-out loss of step 0 is its own
    initialiser none. A start that began at B A ≠ 0 (PiSSA …) is a plain LoRA of twice its run's rank (attach.py) and is
                trained on as that: cutting it back would change what it answers. `deltaw resize` does so on request
    empty rows  of A that are zero where B's column is zero, too (a padded adapter: `--uniform`), would never get a
                gradient. Such rows of A are drawn afresh: ΔW is the same, and they learn
    optimiser   fresh: its moments belong to other data
    dataset     any. A chat template other than the start's is said, not refused

The start's fingerprint (`Adapter.fingerprint`, over its numbers) is in the run's lineage.json, so a start that changes
between a stop and a resume is noticed. Without a checkpoint the run would begin at other numbers, and is refused. With
one nothing is needed of the start, so that it changed or is gone is only said: it may have been extended meanwhile.

Rejected: training a second adapter beside the first one, fused (two adapters to ship, of twice the size together).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.adapter.attach import Attached
from deltaw.adapter.ends import TOKENS, Ends, ways_of
from deltaw.adapter.file import Adapter, BaseId
from deltaw.adapter.history import History
from deltaw.adapter.init import fresh_factors
from deltaw.adapter.targets import explicit_targets, find_targets, targets_of
from deltaw.config import AdapterSpec, RunConfig
from deltaw.config.sources import public
from deltaw.errors import DeltawError, InputError, command, listed
from deltaw.files.paths import public_name
from deltaw.model import PLAIN
from deltaw.named import Named, is_run
from deltaw.replaced import Rows
from deltaw.run import Run
from deltaw.show.text import counted
from deltaw.updates import Update

ITS_OWN = (  # never another's
    "full", "rank", "alpha", "scaling", "magnitude", "rank_overrides", "alpha_overrides", "tokens", "also",
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    """An adapter to start from. `name`: what the run file calls it; `asked`: the spec that its run was asked for."""

    name: str
    adapter: Adapter
    history: History
    asked: AdapterSpec
    tokens: tuple[str, ...] = ()  # that it trains by name

    def put(self, attached: Attached, seed: int) -> int:
        """Give its numbers to a fresh adapter of its spec. How many of its rows were empty, and drawn afresh."""
        generator, empty = torch.Generator().manual_seed(seed), 0
        for path, layer in attached.layers.items():
            filled = {one: _filled(self.adapter.factors[one], generator) for one in layer.values(path)}
            layer.take_values(path, {one: update for one, (update, _) in filled.items()})
            empty += sum(rows for _, rows in filled.values())
        return empty

    def check_base(self, base: BaseId) -> None:
        """Raise InputError where it was trained on another base."""
        if wrong := self.adapter.base.mismatch(base):
            raise InputError(f"adapter.from: {self.name} doesn't belong to this base: {wrong}", fix="name its own base")

    def notes(self, template: str) -> Iterator[str]:
        """For logs. `template`: what the new adapter will record of its own."""
        yield f"it starts from {self.history.words()}"
        if self.asked.moves_base:
            rank = f"a LoRA of rank {self.adapter.spec.rank}, which is trained on"
            yield f"{self.name} began with init {self.asked.init}, so its adapter is {rank}"
        before = self.adapter.base.template
        if before and before != template:
            ways = {PLAIN: "on prompts as they are"}
            then, now = (ways.get(one, "through a chat template") for one in (before, template))
            here = now if then != now else "through another one"
            yield f"warning: {self.name} was trained {then}, and this run trains {here}"


def open_start(
    config: RunConfig,
    skeleton: nn.Module,
    recorded: History | None = None,
    *,
    needed: bool = True,
    say: Callable[[str], None] = print,
) -> tuple[RunConfig, Start | None]:
    """The config with what its adapter has from the start, and the start; none where the config names none, or where it
    isn't `needed` and isn't what it was. `recorded`: the start that the run began with, if it did.

    Raises InputError: no such adapter, another than the recorded one, one that doesn't fit the model, a config that
    says otherwise.
    """
    name = config.adapter.start
    if name is None:
        return config, None
    try:
        start = _opened(name, Path(config.output))
    except InputError as error:
        if needed:
            raise
        say(f"warning: the checkpoint has all that is needed, but {error.what}")
        return config, None
    if recorded is None or recorded.fingerprint == start.history.fingerprint:
        return _with_its_spec(config, start, skeleton), start
    if needed:
        raise InputError(
            f"{config.output} can't be resumed: the adapter that it was to start from, {name}, has changed",
            fix="put it back as it was, or begin again with the new one: deltaw train run.yaml --replace",
        )
    say(f"warning: {name}, which it started from, has changed since; the checkpoint has what it was")
    return config, None


def _opened(name: str, output: Path) -> Start:
    """Raises InputError where there is none, or the run would be written over it."""
    named = Named(name)
    try:
        if not named.holds_adapter:
            raise InputError(
                f"{name!r} is neither a run nor an adapter's folder",
                fix="name a folder that has config.yaml (a run) or adapter_config.json (an adapter)",
            )
        _check_apart(named.path, output)
        adapter, run = named.adapter, named.config
    except DeltawError as error:
        raise InputError(f"adapter.from: {error.what}", fix=error.fix) from None
    known = adapter.history if adapter.history.known or run is None else _told_by(Run(named.path), run)
    folder = named.path.parent if is_run(named.path.parent) else named.path  # a run's adapter/ is the run's
    history = known.model_copy(update={"name": public_name(str(folder)), "fingerprint": adapter.fingerprint})
    asked = run.adapter if run and run.adapter.start is None else adapter.spec
    return Start(name, adapter, history, asked, _tokens(named))


def _tokens(named: Named) -> tuple[str, ...]:
    """Raises InputError where the texts of its tokens aren't known."""
    texts, rows = named.tokens, [one for one in named.adapter.factors.values() if isinstance(one, Rows)]
    if any(len(texts) != len(one.index_K) for one in rows):
        raise InputError(
            f"{named.name} trains rows of tokens, and doesn't say of which", fix="put its tokenizer beside it"
        )
    return tuple(texts.values())


def _told_by(run: Run, config: RunConfig) -> History:
    """The history of a run's adapter from before adapters had one."""
    try:
        result = run.read_json(run.result)
    except InputError:
        result = {}
    counts: dict[str, Any] = {name: result[name] for name in ("steps", "tokens") if type(result.get(name)) is int}
    return History(data=public(config.data.train), **counts)


def _check_apart(start: Path, output: Path) -> None:
    """Raise InputError where the run would be written over its own start."""
    start, output = start.resolve(), output.resolve()
    if start == output or output in start.parents:
        raise InputError(f"output {output} is what it starts from", fix="choose another output")


def _with_its_spec(config: RunConfig, start: Start, skeleton: nn.Module) -> RunConfig:
    """The config with the start's spec; its own dropout, where it states one. Raises InputError where it states
    others."""
    asked, adapter = config.adapter, start.adapter
    paths = targets_of(skeleton, adapter.spec, Ends.of(skeleton).body(adapter.factors)).paths
    ways = ways_of(skeleton, adapter.factors)
    also = {path: way for path, way in ways.items() if way != TOKENS}
    spec = adapter.spec.model_copy(update={"also": also, "tokens": start.tokens})
    wrong = [
        f"{name}: {_word(getattr(asked, name))}, and its own is {_word(getattr(spec, name))}"
        for name in ITS_OWN
        if name in asked.model_fields_set
        and getattr(asked, name) != getattr(spec, name)
        and (start.asked.moves_base or getattr(asked, name) != getattr(start.asked, name))
    ]
    if "targets" in asked.model_fields_set and not _same_targets(asked, start, skeleton, paths):
        wrong.append(f"targets: {_word(asked.targets)}, and its own are {_word(explicit_targets(skeleton, paths))}")
    if wrong:
        resize = command("resize", start.name, options=["--rank", str(asked.rank), "-o", f"rank-{asked.rank}"])
        lower = "rank" in asked.model_fields_set and asked.rank < adapter.spec.rank and not adapter.spec.full
        raise InputError(
            f"adapter: these differ from those of {start.name}, which it starts from:\n{listed(wrong, 2)}",
            fix="leave them out: they come from it" + (f"; start from a smaller one: {resize}" if lower else ""),
        )
    own: dict[str, Any] = {"start": asked.start, "targets": explicit_targets(skeleton, paths)}
    own |= {"dropout": asked.dropout} if "dropout" in asked.model_fields_set else {}
    config = config.model_copy(update={"adapter": spec.model_copy(update=own)})
    if idle := config.without_effect():
        raise InputError("; ".join(idle))
    return config


def _same_targets(asked: AdapterSpec, start: Start, skeleton: nn.Module, paths: tuple[str, ...]) -> bool:
    """Whether the targets that a run file states are the start's, in these words or others."""
    if asked.targets in (start.adapter.spec.targets, start.asked.targets):
        return True
    spec = start.adapter.spec.model_copy(update={"targets": asked.targets, "rank_overrides": {}, "alpha_overrides": {}})
    return set(find_targets(skeleton, spec).paths) == set(paths)


def _filled(update: Update, generator: torch.Generator) -> tuple[Update, int]:
    """The update with its empty rows of A drawn afresh, and how many these are. ΔW is the same."""
    tensors: Mapping[str, Tensor] = update.tensors()
    if "b" not in tensors:
        return update, 0
    empty_R = ~tensors["a"].any(dim=1) & ~tensors["b"].any(dim=0)
    if not (count := int(empty_R.sum())):
        return update, 0
    a_RN = torch.where(empty_R[:, None], fresh_factors(*_sizes(tensors), generator)[0], tensors["a"])
    return update.of({**tensors, "a": a_RN}, update.scale), count


def _sizes(tensors: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """R, M, N."""
    return tensors["a"].shape[0], tensors["b"].shape[0], tensors["a"].shape[1]


def described(empty: int) -> list[str]:
    """For logs: rows that were empty in the start."""
    if not empty:
        return []
    return [
        f"{counted(empty, 'row of its A was', 'rows of its A were')} empty, and drawn afresh so that they can learn"
    ]


def _word(value: Any) -> str:
    text = ", ".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:59] + "…"
