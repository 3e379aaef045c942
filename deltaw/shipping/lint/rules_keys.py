"""What the file holds: names, factors without their partners, and shapes, checked against the config and the base.

What PEFT and transformers do with each of these was tried (tests/shipping/test_lint_peft.py tries it again); what vLLM,
llama.cpp's converter and Ollama's do was read in their sources (docs/lint.md names the versions).
PEFT loads with `strict=False`: a tensor that fits no name is ignored, with a warning at most, and the model answers
as if it didn't exist."""

from collections.abc import Iterator

from deltaw.adapter.peft_config import is_rewritten_here, missed_by_peft, rewritten_names
from deltaw.files.patterns import LINEAR
from deltaw.shipping.lint.finding import (
    LLAMA_CPP,
    LOADS,
    OLLAMA,
    PEFT,
    REFUSED,
    TRANSFORMERS,
    UNSURE,
    VLLM,
    WRONG,
    Finding,
    code,
    everywhere,
    some,
)
from deltaw.shipping.lint.keys import EMBEDDING_A, EMBEDDING_B, FULL, NORM, PREFIX, UNKNOWN, A, B
from deltaw.shipping.lint.subject import Subject, Undecided
from deltaw.show.text import counted

AGAIN = "save it again with PEFT's save_pretrained, or download it again"
CONVERTED = {LLAMA_CPP: REFUSED, OLLAMA: REFUSED}
NO_PREFIX = code(
    "DW201",
    "tensor names without PEFT's prefix base_model.model.: PEFT ignores those tensors",
    {PEFT: WRONG},
    "put base_model.model. in front of each name, or save it with PEFT's save_pretrained",
)
ADAPTER_NAME = code(
    "DW202",
    "tensor names that contain the adapter's name (.lora_A.default.weight)",
    {TRANSFORMERS: WRONG, VLLM: REFUSED, **CONVERTED},
    "remove that name, or save it with PEFT's save_pretrained",
)
HALF = code(
    "DW203",
    "an A without its B, or a B without its A",
    {PEFT: WRONG, TRANSFORMERS: WRONG, VLLM: REFUSED, **CONVERTED},
    AGAIN,
)
RANK = code(
    "DW204",
    "tensors whose rank differs from the config's",
    {PEFT: REFUSED, TRANSFORMERS: REFUSED, VLLM: WRONG, LLAMA_CPP: UNSURE, OLLAMA: UNSURE},
    "write the tensors' own rank into r or rank_pattern, and the alpha that goes with it",
)
SHAPE = code(
    "DW205",
    "tensors whose size differs from the base's layer",
    {PEFT: REFUSED, TRANSFORMERS: REFUSED, VLLM: WRONG, **CONVERTED},
    "name the base that it was trained on",
)
NO_LAYER = code(
    "DW206",
    "tensors for layers that the base doesn't have",
    {PEFT: WRONG, TRANSFORMERS: WRONG, VLLM: WRONG, **CONVERTED},
    "name the base that it was trained on",
)
UNTARGETED = code(
    "DW207",
    "tensors for layers that target_modules doesn't name: PEFT ignores them",
    {PEFT: WRONG, TRANSFORMERS: WRONG},
    "add them to target_modules",
)
NO_TARGET = code(
    "DW208",
    "target_modules matches no layer of the base",
    {PEFT: REFUSED, TRANSFORMERS: REFUSED},
    "name in target_modules the layers that the tensors are for",
)
UNTRAINED_LAYERS = code(
    "DW209",
    "layers of the base that target_modules names but that have no tensors: they stay unchanged",
    dict.fromkeys((PEFT, TRANSFORMERS), LOADS),
    "nothing, if it was trained that way; otherwise get the complete file",
)
STRANGE = code(
    "DW210",
    "tensors that aren't part of a LoRA as PEFT writes it",
    {PEFT: WRONG, TRANSFORMERS: WRONG, VLLM: REFUSED, **CONVERTED},
    AGAIN,
)
EMPTY = code("DW211", "no factors at all", {**everywhere(WRONG)}, AGAIN)
NO_MATRIX = code(
    "DW212",
    "factors that aren't matrices of floating-point numbers",
    {PEFT: WRONG, TRANSFORMERS: WRONG, VLLM: UNSURE, LLAMA_CPP: UNSURE, OLLAMA: UNSURE},
    AGAIN,
)
UNDECIDED = code(
    "DW213",
    "patterns or target_modules that can't be matched, or not in reasonable time",
    {PEFT: REFUSED, TRANSFORMERS: REFUSED, VLLM: REFUSED},
    "write plain names instead",
)
RENAMED = code(
    "DW214",
    "layers that PEFT takes for experts, or renames, on this base: it drops their updates with a warning",
    {PEFT: WRONG, TRANSFORMERS: WRONG},
    "name them by their weights in target_parameters, as deltaw writes it",
)


def prefix(s: Subject) -> Iterator[Finding]:
    bare = [key.name for key in s.keys if not key.prefixed]
    if bare:
        yield NO_PREFIX.finding(f"{len(bare)} of {len(s.keys)} names don't begin with {PREFIX}: {some(bare)}")


def adapter_name(s: Subject) -> Iterator[Finding]:
    named = [key.name for key in s.keys if key.adapter]
    if named:
        yield ADAPTER_NAME.finding(f"{len(named)} of {len(s.keys)} names contain the adapter's name: {some(named)}")


def halves(s: Subject) -> Iterator[Finding]:
    pairs = ({A, B}, {EMBEDDING_A, EMBEDDING_B})
    single = [parts for parts in s.factors.values() if not any(pair <= parts.keys() for pair in pairs)]
    if single:
        names = [key.name for parts in single for key in parts.values()]
        yield HALF.finding(f"{len(single)} of {len(s.factors)} modules have only one factor: {some(names)}")


def ranks(s: Subject) -> Iterator[Finding]:
    default = s.default_rank
    if default is None:
        return
    try:
        own = s.pattern("rank_pattern")
    except Undecided:
        return
    wrong = []
    for path in s.layers:
        wanted = own.get(path, default)
        for part, side in ((A, 0), (B, 1)):
            key = s.factors[path].get(part)
            if key is None or len(shape := s.shapes[key.name]) != 2 or type(wanted) is not int:
                continue
            if shape[side] != wanted:
                wrong.append(f"{key.name} is {shape}, but the config says rank {wanted}")
    if wrong:
        yield RANK.finding(f"{counted(len(wrong), 'tensor')}: {some(wrong)}")


def matrices(s: Subject) -> Iterator[Finding]:
    factors = [key.name for parts in s.factors.values() for key in parts.values()]
    wrong = [name for name in factors if len(s.shapes[name]) != 2]
    wrong += [name for name in factors if name in s.numbers and not s.numbers[name].floating]
    if wrong:
        yield NO_MATRIX.finding(f"{len(wrong)} factors aren't matrices of floating-point numbers: {some(wrong)}")


def strange(s: Subject) -> Iterator[Finding]:
    names = [key.name for key in s.keys if key.part == UNKNOWN]
    if names:
        yield STRANGE.finding(f"{len(names)} of {len(s.keys)} tensors: {some(names)}")


def empty(s: Subject) -> Iterator[Finding]:
    if not s.factors and not s.early:
        yield EMPTY.finding(
            "the file holds no factors, so it changes nothing" if s.keys else "the file holds no tensors"
        )


def layers_of_the_base(s: Subject) -> Iterator[Finding]:
    """Compares names and sizes with the base's own."""
    if s.base is None:
        return
    places = {**s.base.embeddings, **s.base.linear}
    gone = [path for path in s.factors if path not in places and not _experts(s, path)]
    if gone:
        last_names = {path.rpartition(".")[2] for path in places}
        known = all(path.rpartition(".")[2] in last_names for path in gone)
        words = f"{len(gone)} of {len(s.factors)} modules aren't in {s.base.source.name}: {some(gone)}"
        yield NO_LAYER.finding(words, effects={**NO_LAYER.effects, VLLM: WRONG if known else REFUSED})
    wrong, larger = [], False
    for path, parts in s.factors.items():
        if path not in places:
            continue
        outputs, inputs = places[path]
        for part, side, wanted in (
            (A, 1, inputs),
            (B, 0, outputs),
            (EMBEDDING_A, 1, outputs),
            (EMBEDDING_B, 0, inputs),
        ):
            key = parts.get(part)
            if key and len(shape := s.shapes[key.name]) == 2 and shape[side] != wanted:
                wrong.append(f"{key.name} is {shape}, but the base's layer is {places[path]}")
                larger |= shape[side] > wanted
    for key in s.keys:
        own = s.base.parameters.get(f"{key.path}.{key.name.rpartition('.')[2]}")
        if key.part in (FULL, NORM) and own not in (None, s.shapes[key.name]):
            wrong, larger = [*wrong, f"{key.name} is {s.shapes[key.name]}, but the base's is {own}"], True
    if wrong:  # vLLM copies into a buffer of the layer's size: what is smaller fits
        words = f"{len(wrong)} tensors don't fit {s.base.source.name}: {some(wrong)}"
        fix = _resized(s) if len(wrong) == len(_ends(s)) else None
        yield SHAPE.finding(words, fix, {**SHAPE.effects, VLLM: REFUSED if larger else WRONG})


def _ends(s: Subject) -> list[tuple[int, ...]]:
    """The sizes of whole embeddings and heads with more or fewer rows than the base's: tokens were added."""
    ends = [key for key in s.keys if s.base and key.part == FULL and key.path in (s.base.head, s.base.embedding)]
    own = {key.name: s.base.parameters.get(f"{key.path}.weight", ()) for key in ends if s.base}
    return [s.shapes[name] for name, size in own.items() if s.shapes[name] != size and s.shapes[name][1:] == size[1:]]


def _resized(s: Subject) -> str | None:
    rows = {size[0] for size in _ends(s)}
    return f"first give the base as many rows: model.resize_token_embeddings({rows.pop()})" if len(rows) == 1 else None


def _experts(s: Subject, path: str) -> bool:
    """Whether a path's factors belong to experts, which aren't a layer."""
    return any(key.expert for key in s.factors[path].values())


def targets(s: Subject) -> Iterator[Finding]:
    """Tensors that PEFT's targets don't name, and targets without tensors."""
    try:
        covered = s.covered(s.factors)
        known = s.covered({**s.base.linear, **s.base.embeddings}) if s.base else covered
    except Undecided:
        return
    if s.base and not known and not s.get("target_parameters"):
        names = some(s.texts("target_modules")) or "target_modules"
        yield NO_TARGET.finding(f"{names} matches no layer of {s.base.source.name}")
        return
    missed = [path for path in s.factors if path not in covered and not _experts(s, path)]
    if missed:
        yield UNTARGETED.finding(
            f"{len(missed)} of {len(s.factors)} modules have tensors but aren't named: {some(missed)}",
            f"add to target_modules: {some(sorted({path.rpartition('.')[2] for path in missed}), 8)}",
        )
    bare = sorted(known - covered - set(s.factors)) if s.factors else []
    if bare:
        yield UNTRAINED_LAYERS.finding(f"{len(bare)} layers are named but have no tensors: {some(bare)}")


def undecided(s: Subject) -> Iterator[Finding]:
    """Patterns on which PEFT and vLLM would hang or crash."""
    for field in ("rank_pattern", "alpha_pattern"):
        try:
            s.pattern(field)
        except Undecided as reason:
            yield UNDECIDED.finding(f"{field}: {reason}")
    targets = s.get("target_modules")
    if targets is None:
        return
    try:
        s.covered(s.factors)
    except Undecided as reason:
        certain = isinstance(targets, str) and not LINEAR.fullmatch(targets)
        effect = REFUSED if certain else UNSURE
        yield UNDECIDED.finding(f"the targets: {reason}", effects=dict.fromkeys((PEFT, TRANSFORMERS), effect))


def renamed(s: Subject) -> Iterator[Finding]:
    if s.base is None:
        return
    rewritten = rewritten_names(s.base.files.skeleton)
    taken = [
        path
        for path in s.layers
        if path.rpartition(".")[2] in rewritten and path in s.base.linear and not s.by_weight(path)
    ]
    missed = [path for path in missed_by_peft(s.base.files.skeleton, s.layers) if path not in taken]
    if taken or missed:
        words, effects = f"{len(taken) + len(missed)} modules: {some([*taken, *missed])}", dict(RENAMED.effects)
        if not missed and not is_rewritten_here(s.base.files.skeleton):
            words += "; not with the version of transformers installed here, but with others"
            effects = dict.fromkeys(effects, UNSURE)
        yield RENAMED.finding(words, s.export("peft") if taken else s.merge(), effects)


RULES = (
    prefix, adapter_name, halves, ranks, matrices, strange, empty, layers_of_the_base, targets, undecided, renamed,
)  # fmt: skip
