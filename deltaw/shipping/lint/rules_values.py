"""Numbers that are broken, untrained, all the same, or too large for float16."""

from collections.abc import Iterator

from deltaw.shipping.lint.finding import LLAMA_CPP, MLX, OLLAMA, UNSURE, VLLM, WRONG, Finding, code, everywhere, some
from deltaw.shipping.lint.keys import EMBEDDING_B, A, B
from deltaw.shipping.lint.subject import Subject

HALF_MOST = 65504.0  # the largest number of float16
NOT_FINITE = code(
    "DW401", "NaN or infinity in the tensors", everywhere(WRONG), "train it again, from an earlier checkpoint"
)
UNTRAINED = code("DW402", "every B is zero: it was never trained and changes nothing", everywhere(WRONG), "train it")
CONSTANT = code(
    "DW403",
    "tensors that repeat one number, or modules that are all alike: training never leaves that",
    everywhere(UNSURE),
    "download the file again, or train it again",
)
OVERFLOW = code(
    "DW404",
    "numbers that float16 can't hold: they become infinite if it is served in float16",
    dict.fromkeys((VLLM, LLAMA_CPP, OLLAMA, MLX), UNSURE),
    "serve it in bfloat16 or float32",
)


def not_finite(s: Subject) -> Iterator[Finding]:
    if names := [name for name, seen in s.numbers.items() if seen.floating and not seen.finite]:
        yield NOT_FINITE.finding(f"{len(names)} of {len(s.numbers)} tensors: {some(names)}")


def untrained(s: Subject) -> Iterator[Finding]:
    seen = [
        s.numbers.get(key.name)
        for parts in s.factors.values()
        for part, key in parts.items()
        if part in (B, EMBEDDING_B)
    ]
    if seen and all(numbers is not None and numbers.zero for numbers in seen):
        yield UNTRAINED.finding(f"all {len(seen)} B factors are zero")


def constant(s: Subject) -> Iterator[Finding]:
    names = [
        key.name
        for parts in s.factors.values()
        for part, key in parts.items()
        if (seen := s.numbers.get(key.name)) and seen.constant and not (part in (B, EMBEDDING_B) and seen.zero)
        if s.shapes[key.name] != (1, 1)
    ]
    if names:
        yield CONSTANT.finding(f"{len(names)} tensors repeat a single number: {some(names)}")
        return
    alike: dict[str, set[tuple[float, float]]] = {A: set(), B: set()}
    for parts in s.factors.values():
        for part, key in parts.items():
            if part in alike and (seen := s.numbers.get(key.name)) and seen.finite and not seen.zero:
                alike[part].add((seen.least, seen.most))
    if len(s.factors) > 1 and len(alike[A]) == 1 and len(alike[B]) == 1:
        yield CONSTANT.finding(f"the factors of all {len(s.factors)} modules have the same extremes")


def overflow(s: Subject) -> Iterator[Finding]:
    if names := [name for name, seen in s.numbers.items() if seen.finite and seen.peak > HALF_MOST]:
        peak = max(s.numbers[name].peak for name in names)
        yield OVERFLOW.finding(
            f"{len(names)} tensors reach {peak:.3g}, but float16 ends at {HALF_MOST:,.0f}: {some(names)}"
        )


RULES = (not_finite, untrained, constant, overflow)
