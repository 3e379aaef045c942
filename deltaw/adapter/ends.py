"""The two ends of a language model, the embedding and the head, and how an adapter trains them beside linear layers.

    tokens    some rows of both (rows.py); one update in both places where they are one matrix (tied)
    lora      a LoRA, of the one that is named (whole.py)
    whole     another matrix, of the one that is named

`adapter.also` names either by the last part of its path, as PEFT does (`embed_tokens`, `lm_head`; GPT-2's `wte`). On a
tied base what is named gets an update of its own and the other stays the base's: that is what PEFT makes of such a
file, with a warning, and it is said in the log here. One end can't be trained in two ways.

A trained adapter brings updates by path; those of the two ends are told from linear layers' by the model, not by names.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from deltaw.adapter.layer import AdaptedLinear
from deltaw.adapter.layer_update import Carried, LayerUpdate
from deltaw.adapter.rows import RowsUpdate
from deltaw.adapter.vocabulary import AdaptedEmbedding, AdaptedHead
from deltaw.adapter.whole import EndLoRA, WholeUpdate
from deltaw.base.frozen import FrozenEmbedding, FrozenLinear
from deltaw.config import AdapterSpec, names_module
from deltaw.data.added import Token
from deltaw.errors import InputError, listed
from deltaw.replaced import MERGE
from deltaw.updates import Update

TOKENS, LORA, WHOLE = "tokens", "lora", "whole"


@dataclass(frozen=True)
class Ends:
    """The paths of a model's embedding and head, and whether these are one matrix. `None` where it has none."""

    embedding: str | None
    head: str | None
    tied: bool = False

    @staticmethod
    def of(model: nn.Module) -> "Ends":
        """A model's own; of a module of somebody's own, none."""
        if not hasattr(model, "get_input_embeddings") or not hasattr(model, "get_output_embeddings"):
            return Ends(None, None)
        words, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
        paths = {id(module): path for path, module in model.named_modules()}
        one, other = _matrix(words), _matrix(head)
        return Ends(paths.get(id(words)), paths.get(id(head)), one is not None and one is other)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(path for path in (self.embedding, self.head) if path)

    def body(self, updates: Mapping[str, Update]) -> dict[str, Update]:
        """The updates of anything else."""
        return {path: update for path, update in updates.items() if path not in self.paths}

    def of_tokens(self) -> tuple[str, ...]:
        """Where the rows of tokens are trained: once where the two are one."""
        return self.paths[:1] if self.tied else self.paths

    def named(self, name: str) -> str | None:
        """The path of the end that a name means."""
        return next((path for path in self.paths if names_module(name, path)), None)


def _matrix(module: nn.Module | None) -> object:
    """The tensor that holds a module's matrix."""
    if isinstance(module, AdaptedLinear):
        module = module.base.module
    return next(iter(module.parameters(recurse=False)), None) if module is not None else None


def find_ends(model: nn.Module, spec: AdapterSpec) -> dict[str, str]:
    """What a fresh adapter trains of the ends: path -> tokens, lora or whole. Raises InputError."""
    ends = Ends.of(model)
    ways = dict.fromkeys(ends.of_tokens(), TOKENS) if spec.tokens else {}
    for name, way in spec.also.items():
        path = ends.named(name)
        if path is None:
            fix = f"write {' or '.join(path.rpartition('.')[2] for path in ends.paths) or 'nothing'}"
            raise InputError(f"adapter.also: {name!r:.60} is neither the embedding nor the head of this model", fix=fix)
        if path in ways or (spec.tokens and path in ends.paths):
            raise InputError(
                f"adapter: {path} can't be trained in two ways: by tokens, and by also as {way}",
                fix="leave adapter.tokens out: also trains its rows, too" if way == WHOLE else "leave one of them out",
            )
        ways[path] = way
    check_ends(model, ways)
    return ways


def ways_of(model: nn.Module, updates: Mapping[str, Update]) -> dict[str, str]:
    """The same of trained updates. Raises InputError for one that is of no end, and no linear layer's either."""
    ends = Ends.of(model)
    ways = {path: update.kind for path, update in updates.items() if path in ends.paths}
    strays = [
        f"{path}: {'trained tokens' if update.kind == TOKENS else 'trained whole'}"
        for path, update in ends.body(updates).items()
        if update.kind in (TOKENS, WHOLE)
    ]
    strays += [f"{path}: {way}" for path, way in ways.items() if way not in (TOKENS, LORA, WHOLE)]
    if strays:
        raise InputError(
            f"only an embedding and a head can be trained like this here ({', '.join(ends.paths)}):\n{listed(strays)}",
            fix=MERGE,
        )
    check_ends(model, ways)
    problems = []
    for path, way in ways.items():
        shape, base = updates[path].shape, face(model, path, ends)
        own = (base.out_features, base.in_features)
        if way == TOKENS and ends.tied and path == ends.head:
            problems.append(f"{path}: rows of the head alone, which in this base is the embedding")
        if shape[1] != own[1] or (way != TOKENS and shape[0] != own[0]):
            resized = f": it had {shape[0] - own[0]} tokens more" if shape[1] == own[1] and shape[0] > own[0] else ""
            problems.append(f"{path}: update is {shape}, the base's is {own}{resized}")
    if problems:
        raise InputError(f"the adapter doesn't fit this model:\n{listed(problems)}")
    return ways


def check_ends(model: nn.Module, ways: Mapping[str, str]) -> None:
    """Raise InputError for what can't be trained like this, or what PEFT would read otherwise."""
    ends, problems = Ends.of(model), []
    for path, way in ways.items():
        module, head = model.get_submodule(path), path == ends.head
        kind = FrozenLinear if head else FrozenEmbedding
        if not kind.can_wrap(module) and not isinstance(module, AdaptedLinear):
            problems.append(f"{path} is a {type(module).__name__}, which can't be adapted")
        elif way in (TOKENS, WHOLE) and head and face(model, path, ends).bias_M is not None:
            problems.append(f"{path} has a bias, which PEFT leaves out (tokens) or expects in the file (whole)")
    if problems:
        raise InputError(f"adapter: {listed(problems).strip()}", fix="leave it out of adapter.tokens and adapter.also")


def face(model: nn.Module, path: str, ends: Ends) -> FrozenLinear | FrozenEmbedding:
    """The frozen module there."""
    module = model.get_submodule(path)
    if isinstance(module, AdaptedLinear):
        return module.base
    return FrozenEmbedding(module) if path == ends.embedding else FrozenLinear(module)


def make_layer(base: FrozenLinear | FrozenEmbedding, carried: Carried) -> AdaptedLinear:
    """The layer that stands in an end's place."""
    kind = AdaptedEmbedding if isinstance(base, FrozenEmbedding) else AdaptedHead
    return kind(base, carried)  # type: ignore[arg-type]


def maker(path: str, way: str, spec: AdapterSpec, tokens: Sequence[Token]) -> Callable[..., LayerUpdate]:
    """What makes a fresh update of an end."""
    if way == TOKENS:
        return lambda base: RowsUpdate(base, tokens)
    if way == WHOLE:
        return WholeUpdate
    return lambda base: EndLoRA(base, spec.rank_of(path), spec.scale(path))


def places_of(model: nn.Module, path: str, way: str) -> tuple[str, ...]:
    """Where an end's update stands: rows of a tied base in both."""
    ends = Ends.of(model)
    return ends.paths if way == TOKENS and ends.tied else (path,)


def tokens_of(spec: AdapterSpec, updates: Mapping[str, Update], known: Sequence[Token]) -> tuple[Token, ...]:
    """The tokens whose rows trained updates hold, in their order; `known`: what is known of them."""
    index = next((update.tensors()["index"].tolist() for update in updates.values() if update.kind == TOKENS), [])
    by_id = {token.id: token for token in known}
    texts = spec.tokens if len(spec.tokens) == len(index) else [""] * len(index)
    return tuple(by_id.get(id) or Token(text, id) for text, id in zip(texts, index, strict=True))


def notes_of(model: nn.Module, ways: Mapping[str, str]) -> list[str]:
    """For logs: what trains of the ends."""
    ends = Ends.of(model)
    lines = []
    for path, way in ways.items():
        places = " and ".join(places_of(model, path, way))
        words = {TOKENS: "rows of tokens", LORA: "LoRA", WHOLE: "the whole matrix, at a tenth of the rate"}
        lines.append(f"{places}: {words[way]}")
        if ends.tied and way != TOKENS and len(ways) == 1:
            other = next(one for one in ends.paths if one != path)
            lines.append(
                f"{path} and {other} are one matrix in this base: {path} alone changes, {other} stays as it is"
            )
    return lines
