"""Comparing two sides: the same held-out prompts go through both, and both must answer alike.

    1  both sides are opened, which is cheap and shows what can't work
    2  each side's own tokenizer writes the prompts: ids against ids
    3  each answers its own prompts greedily: ids against ids
    4  log-probabilities along A's answers, on A's ids for both, so that a flipped token or a changed template
       doesn't hide whether the weights are the same
    5  rounding errors of both sides' formats put into whichever model runs here, and the adapter switched off: what is
       allowed (verdict.py)

One torch model is in memory at a time: A is asked everything before B is loaded. Rounding is measured on A if it runs
here: B may be what is wrong, and a broken model can be more sensitive than a correct one.

The prompts come from A if it is a run, else from B, else from `data`, else from built-in text (prompts.py). Not to be
confused with training/verify.py, which is about resuming.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from os import fspath
from pathlib import Path
from typing import Any

from deltaw.base.gguf import folder_of
from deltaw.base.source import cache_root
from deltaw.config.places import placed
from deltaw.errors import InputError
from deltaw.evaluation.held_out import spread
from deltaw.shipping.verify.alike import Distance, Parting, compared_ids, distance, parting
from deltaw.shipping.verify.prompts import file_prompts, general_prompts, held_out_prompts
from deltaw.shipping.verify.sides.adapted import Adapted
from deltaw.shipping.verify.sides.open import goes_on_a_base, open_side
from deltaw.shipping.verify.sides.server import Server
from deltaw.shipping.verify.sides.side import Answer, Asked, Logs, Prompt, Row, Side
from deltaw.shipping.verify.verdict import (
    NO_EFFECT,
    Compared,
    Effect,
    Tolerance,
    Verification,
    assumed,
    effect_of,
    measured,
    reasons_of,
)
from deltaw.show.progress import Display

PROMPTS, TOKENS = 20, 32
SEEDS, NOISY_ROWS = 3, 8
WORDS = 48  # tokens that are decoded on both sides, to see whether the vocabularies are the same


@dataclass
class _Heard:
    """One side's answers to all prompts."""

    ids: list[tuple[int, ...] | None] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    logs: list[Logs] | None = None
    base: list[Logs] | None = None


def verify(
    a: str | Path,
    b: str | Path,
    *,
    data: str | Path | None = None,
    prompts: int = PROMPTS,
    tokens: int = TOKENS,
    base: str | Path | None = None,
    display: Display | None = None,
) -> Verification:
    """Whether two sides (sides/open.py says how they are written) answer alike. Raises InputError, RunError; sides that
    answer differently aren't an error: the result's `agree` is False.

    `base`: the base for adapters, instead of the one that they name. `tokens`: the longest answer.
    """
    if prompts < 1 or tokens < 1:
        raise InputError(f"{prompts} prompts of {tokens} tokens: at least one of each is needed")
    display = display or Display(quiet=True)
    with ExitStack() as closing:
        one, other = _opened(fspath(a), fspath(b), fspath(base) if base else None, closing, display)
        chosen = _prompts([one, other], fspath(data) if data else None, prompts, display)
        if not one.tells_ids and other.tells_ids:  # log-probabilities are asked for along the first one's ids
            one, other = other, one
        return _compared(one, other, chosen, tokens, display)


def _opened(a: str, b: str, base: str | None, closing: ExitStack, display: Display) -> tuple[Side, Side]:
    """Both sides. One that doesn't name its base (an MLX folder), or names one that isn't available here (from a run on
    a local file), goes on the other side's base."""
    sides: dict[str, Side] = {}
    for name in sorted(dict.fromkeys((a, b)), key=lambda name: (name.startswith(("mlx:", "peft:")), name != a)):
        known = next((side.source.name for side in sides.values() if side.source), None)
        try:
            side = open_side(name, base=base or (known if name.startswith("mlx:") else None), display=display)
        except InputError as error:
            if base is not None or known is None or not goes_on_a_base(name):
                raise
            try:
                side = open_side(name, base=known, display=display)
            except InputError:
                raise error from None
            side.notes.append(f"{name} doesn't name a base that is available here: it goes on {known}")
        sides[name] = side
        closing.callback(side.close)
    return sides[a], sides[b]


def _prompts(sides: Sequence[Side], data: str | None, count: int, display: Display) -> list[Prompt]:
    adapted = [side for side in sides if isinstance(side, Adapted)]
    if data is not None:
        return file_prompts(data, count, [side.trained.renderer for side in adapted], display)
    for side in adapted:
        if side.trained.config is not None:
            local = placed(side.trained.config, side.trained.sources[0])
            return held_out_prompts(local, side.trained.renderer, count, display)
    chats = all(side.chats for side in adapted) if adapted else any(side.chats for side in sides)
    display.say("neither side is a run and --data isn't given: asking built-in text")
    return general_prompts(count, chats=chats)


def _compared(a: Side, b: Side, prompts: list[Prompt], tokens: int, display: Display) -> Verification:
    _same_gguf(a, b)
    _same_gguf(b, a)
    display.say(f"loading {a.name}")
    a.load()
    prompts, ids, long = _fitting(a, b, prompts, tokens)
    heard_a = _Heard(ids, _answers(a, prompts, ids, tokens, display))
    rows = [
        Row(given, answer.ids)
        for given, answer in zip(ids, heard_a.answers, strict=True)
        if given is not None and answer.ids
    ]
    heard_a.logs, heard_a.base = _logs(a, rows, display), a.base_logs(rows) if rows else None
    draws = _draws(a, b, a, rows, display)
    if a.measurable and b.measurable:  # so that one model is in memory at a time
        a.close()
    display.say(f"loading {b.name}")
    b.load()
    ids = b.ids(prompts)
    heard_b = _Heard(ids, _answers(b, prompts, ids, tokens, display))
    known = _same_words(a, b, heard_a)
    if known and len(rows) == len(prompts):
        heard_b.logs = _logs(b, rows, display)
        if heard_a.base is None:
            heard_b.base = b.base_logs(rows)
    draws = draws or (_draws(a, b, b, rows, display) if heard_b.logs is not None else [])
    tolerance = _tolerance(a, b, heard_a, heard_b, draws)
    verification = _judged(a, b, prompts, heard_a, heard_b, tolerance, known)
    if known and (reason := _long_parting(a, b, long)):
        verification.reasons.append(reason)
    return verification


def _same_gguf(adapted: Side, server: Side) -> None:
    """If one side goes on the very GGUF that the other was made from, their weights differ only by the bfloat16 that
    deltaw reads them in, and not even by that where it keeps the GGUF's blocks."""
    source = adapted.source
    if source is None or source.gguf is None or not isinstance(server, Server) or server.file is None:
        return
    if folder_of(server.file, cache_root() / "gguf") == source.directory:
        kept = isinstance(adapted, Adapted) and adapted.weights == "keep"
        weights, how = ("float32", "in its own blocks") if kept else ("bfloat16", "read as bfloat16")
        why = f"the other side's base is this very GGUF, {how}"
        server.numbers = replace(server.numbers, weights=weights, why=f"{server.numbers.why}; {why}")


def _fitting(
    a: Side, b: Side, prompts: list[Prompt], tokens: int
) -> tuple[list[Prompt], list[tuple[int, ...] | None], list[Prompt]]:
    """The prompts that leave room for an answer, with A's ids, and those that don't."""
    ids = a.ids(prompts)
    room = min((side.context for side in (a, b) if side.context), default=None)
    fit = [n for n, one in enumerate(ids) if one is None or room is None or len(one) + tokens <= room]
    if not fit:
        raise InputError(
            f"no prompt leaves room for an answer of {tokens} tokens in a context of {room}",
            fix="give shorter ones with --data",
        )
    long = [prompt for n, prompt in enumerate(prompts) if n not in set(fit)]
    if long:
        a.notes.append(
            f"{len(long)} of {len(prompts)} prompts leave no room for an answer in a context of {room}, so only "
            "their ids "
            "are compared"
        )
    return [prompts[n] for n in fit], [ids[n] for n in fit], long


def _long_parting(a: Side, b: Side, prompts: list[Prompt]) -> str:
    """Why prompts that are too long to ask aren't at least written the same, or ""."""
    pairs = [_prompts_alike(a, b, x, y, True) for x, y in zip(a.ids(prompts), b.ids(prompts), strict=True)]
    wrong = [words for same, words in pairs if same is False]
    return f"{len(wrong)} prompts that were too long to ask are encoded differently: {wrong[0]}" if wrong else ""


def _answers(
    side: Side, prompts: Sequence[Prompt], ids: Sequence[tuple[int, ...] | None], tokens: int, display: Display
) -> list[Answer]:
    asked = [Asked(prompt, one) for prompt, one in zip(prompts, ids, strict=True)]
    with display.task(f"{side.name}: answers", len(asked)) as progress:
        return side.answers(asked, tokens, progress)


def _logs(side: Side, rows: Sequence[Row], display: Display) -> list[Logs] | None:
    if not rows:
        return None
    with display.task(f"{side.name}: log-probabilities", len(rows)) as progress:
        return side.logs(rows, progress)


def _same_words(a: Side, b: Side, heard: _Heard) -> bool:
    """Whether token ids mean the same on both sides, tried on those in use."""
    ids = {token for one in heard.ids for token in one or ()} | {t for one in heard.answers for t in one.ids or ()}
    tried = [(a.decode([token]), b.decode([token])) for token in spread(sorted(ids), WORDS)]
    known = [(x.strip(), y.strip()) for x, y in tried if x is not None and y is not None and "\ufffd" not in x + y]
    return not known or sum(x != y for x, y in known) <= len(known) // 10


def _draws(a: Side, b: Side, side: Side, rows: Sequence[Row], display: Display) -> list[list[Logs]]:
    """Draws of rounding errors in `side`, if its model runs here, on some of the rows."""
    if not side.measurable or not rows:
        return []
    chosen, draws = spread(rows, NOISY_ROWS), list[list[Logs]]()
    with display.task("measuring rounding errors", SEEDS) as progress:
        for seed in range(SEEDS):
            draws.append(side.noisy_logs(chosen, (a.numbers, b.numbers), seed) or [])
            progress(seed + 1)
    return draws


def _tolerance(a: Side, b: Side, one: _Heard, other: _Heard, draws: Sequence[Sequence[Logs]]) -> Tolerance:
    """The tolerance from the draws of A, else of B, over the tokens that are compared."""
    numbers = (a.numbers, b.numbers)
    clean = one.logs if a.measurable else other.logs
    if not draws or clean is None or one.logs is None:
        return assumed(numbers)
    chosen = spread(range(len(clean)), NOISY_ROWS)
    others = other.logs if other.logs is not None else one.logs
    ids = [compared_ids(one.logs[n], others[n]) for n in chosen]
    return measured(numbers, [clean[n] for n in chosen], draws, ids)


def _judged(
    a: Side, b: Side, prompts: Sequence[Prompt], one: _Heard, other: _Heard, allowed: Tolerance, known: bool
) -> Verification:
    notes = [*a.notes, *b.notes]
    if not known:
        notes.append("the two sides have different vocabularies: they are compared as text, without log-probabilities")
    kl = largest = effect = None
    positions = sum(len(answer.ids or ()) for answer in one.answers)
    if one.logs is not None and other.logs is not None:
        whole = Distance.joined([distance(x, y) for x, y in zip(one.logs, other.logs, strict=True)])
        kl, largest = whole.kl, whole.largest
        effect = _effect(one, other, kl)
        count = next((logs.ids_PK.shape[1] for logs in (*one.logs, *other.logs) if logs.ids_PK is not None), None)
        if count is not None:
            notes.append(f"the {count:,} likeliest tokens and the rest as one are compared, so KL is a lower bound")
        if effect is not None and effect.kl <= NO_EFFECT:
            notes.append("the adapter changes nothing on these prompts, so whether it is applied can't be seen")
    else:
        notes.append("there are no log-probabilities to compare, so the verdict rests on prompts and answers alone")
    rows = [_row(a, b, n, prompts[n], one, other, allowed, known) for n in range(len(prompts))]
    reasons = reasons_of(rows, kl, largest, allowed, effect, _stops_parting(a, b) if known else "")
    return Verification(
        a.name, b.name, (a.numbers, b.numbers), rows, positions, kl, largest, allowed, effect, reasons, notes
    )


def _stops_parting(a: Side, b: Side) -> str:
    """How the sides' stop tokens differ, "" if they don't or a side doesn't say."""
    if a.stops is None or b.stops is None:
        return ""
    ways = [(a, b, a.stops - b.stops), (b, a, b.stops - a.stops)]
    return "; ".join(
        f"{', '.join(repr(one.decode([token])) for token in sorted(ids))} in {one.name} but not in {other.name}"
        for one, other, ids in ways
        if ids
    )


def _effect(one: _Heard, other: _Heard, kl: float) -> Effect | None:
    """The adapter's effect, measured on a side where it can be switched off."""
    assert one.logs is not None and other.logs is not None
    if one.base is not None:
        return effect_of(one.logs, other.logs, one.base, kl)
    return effect_of(other.logs, one.logs, other.base, kl) if other.base is not None else None


def _row(
    a: Side, b: Side, n: int, prompt: Prompt, one: _Heard, other: _Heard, allowed: Tolerance, known: bool
) -> Compared:
    ids_a, ids_b, answer_a, answer_b = one.ids[n], other.ids[n], one.answers[n], other.answers[n]
    same, words = _prompts_alike(a, b, ids_a, ids_b, known)
    decode: Callable[[Sequence[int]], str] = lambda ids: a.decode(ids) or ""  # noqa: E731
    logs = [heard.logs[n] if heard.logs is not None else None for heard in (one, other)]
    if not known or answer_a.ids is None:
        parted = None if answer_a.text.strip() == answer_b.text.strip() else Parting(0, None, None, None)
    else:
        parted = parting(answer_a, answer_b, logs[0], logs[1] if same is not False else None, decode)
    tie = parted is not None and parted.gap is not None and same is not False and parted.gap <= allowed.gap
    return Compared(
        prompt.origin,
        prompt.content if isinstance(prompt.content, str) else _chat(prompt.content),
        answer_a.text,
        answer_b.text,
        same,
        words,
        parted,
        tie,
        _parting_words(prompt, parted, decode) if parted else "",
    )


def _prompts_alike(
    a: Side, b: Side, x: tuple[int, ...] | None, y: tuple[int, ...] | None, known: bool
) -> tuple[bool | None, str]:
    """(whether both sides wrote a prompt the same, and where they part)."""
    if x is None or y is None:
        return None, ""
    if not known:
        x_text, y_text = a.decode(x), b.decode(y)
        return (None if x_text is None or y_text is None else x_text == y_text), "the texts differ"
    if x == y:
        return True, ""
    at = next((n for n, (i, j) in enumerate(zip(x, y, strict=False)) if i != j), min(len(x), len(y)))
    around = slice(max(0, at - 3), at + 5)
    return False, f"at token {at + 1}, {a.decode(x[around])!r} against {b.decode(y[around])!r}"


def _parting_words(prompt: Prompt, parted: Parting, decode: Callable[[Sequence[int]], str]) -> str:
    def named(token: int | None) -> str:
        return "the end" if token is None else repr(decode([token]))

    where = f"{prompt.origin}, token {parted.position + 1} of the answer"
    if parted.token_a is None and parted.token_b is None:
        return f"{prompt.origin}, other words"
    taken = f"{where}: {named(parted.token_a)} against "
    taken += "other words" if parted.token_b is None and parted.gap is not None else named(parted.token_b)
    return taken + ("" if parted.gap is None else f", their odds moved by {parted.gap:.2g}")


def _chat(messages: Sequence[dict[str, Any]]) -> str:
    return "\n".join(f"{message['role']}: {message.get('content', '')}" for message in messages)
