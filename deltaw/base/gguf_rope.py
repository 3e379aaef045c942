"""A GGUF's keys for rotary positions -> the `rope_parameters` of a transformers config that mean the same.

    no scaling   ω_i = θ^(−2i/d)
    linear       ω_i / F
    YaRN         between ω_i / F and ω_i by a ramp over i; cos and sin times m
    llama3       ω_i / f_i with the f_i in a tensor, `rope_freqs.weight`; a config has four numbers in its place
    longrope     ω_i / f_i with one of two such tensors, by the longest position

θ the base, d the rotated numbers of a head, F the factor. llama.cpp's m for YaRN is (1 + ln(F) / 10) · attn_factor,
divided by 1 + c · ln(F) / 10 where the file has a log multiplier c; transformers' is the first factor unless it is
told.

The four numbers of llama3 (F, low, high, L) give f_i = 1 where L / λ_i > high, F where L / λ_i < low, and between
them

    1 / f_i = (1 − s_i) / F + s_i     s_i = (L / λ_i − low) / (high − low)     λ_i = 2π / ω_i

Only L / low and L / high show in the f_i, so the numbers that were published are tried first, then L / low and L /
high are read off two of the f_i. Whatever comes out is believed only if it gives the tensor back, number by number.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from deltaw.base.gguf_keys import Keys

LLAMA3 = ((8192, 1.0, 4.0), (8192, 1.0, 2.0), (4096, 1.0, 4.0))  # (L, low, high) as published; the first is Llama's
SAME = 2e-5  # relative; the tensor was computed in float32 or float64 and is stored in float32
FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"


def rope_parameters(keys: Keys, theta: float, dim: int, context: int, tensors: dict[str, tuple[float, ...]]) -> Any:
    """The config's rope_parameters without what the architecture adds; refuses by `keys` what they can't say.

    `tensors`: those of FREQS, LONG, SHORT that the file holds.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    factor = keys.number("rope.scaling.factor", 0.0) or keys.number("rope.scale_linear", 0.0) or 1.0
    keys.take("rope.scale_linear")  # the old name; the new one goes first
    kind = keys.take("rope.scaling.type", "linear")
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    original = keys.number("rope.scaling.original_context_length", context)
    keys.take("rope.scaling.finetuned")  # a note
    if kind == "yarn":
        rope |= _yarn(keys, factor, attention, original)
    elif kind == "longrope" or LONG in tensors or SHORT in tensors:
        rope |= _longrope(keys, tensors, dim, factor, attention, original)
    else:
        if attention != 1.0:
            keys.refuse_key("rope.scaling.attn_factor", attention)
        if kind == "linear" and factor != 1.0:
            rope |= {"rope_type": "linear", "factor": float(factor)}
        elif kind not in ("none", "linear"):
            keys.refuse_key("rope.scaling.type", kind)
    if FREQS in tensors:
        found = llama3(tensors[FREQS], theta, dim, context)
        if found is None or rope["rope_type"] != "default":
            keys.refuse(f"{FREQS}: its factors don't belong to any rope scaling in transformers")
        else:
            rope |= found
    return rope


def _yarn(keys: Keys, factor: float, attention: float, original: float) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "yarn", "factor": float(factor)}
    rope["original_max_position_embeddings"] = int(original)
    for name in ("beta_fast", "beta_slow"):
        if f"rope.scaling.yarn_{name}" in keys:
            rope[name] = float(keys.number(f"rope.scaling.yarn_{name}"))
    keys.expect("rope.scaling.yarn_ext_factor", 1.0, -1.0)
    keys.expect("rope.scaling.yarn_attn_factor", 1.0)
    multiplier = keys.number("rope.scaling.yarn_log_multiplier", 0.0)
    if factor <= 1 or original <= 0:
        keys.refuse_key("rope.scaling.factor", factor)
    elif attention != 1.0 or multiplier:
        grown = 1 + 0.1 * math.log(factor)
        rope["attention_factor"] = attention * grown / (1 + 0.1 * multiplier * math.log(factor))
    return rope


def _longrope(
    keys: Keys, tensors: dict[str, tuple[float, ...]], dim: int, factor: float, attention: float, original: float
) -> dict[str, Any]:
    long, short = tensors.get(LONG), tensors.get(SHORT)
    if keys.architecture != "phi3" or long is None or short is None or {len(long), len(short)} != {dim // 2}:
        keys.refuse(f"{LONG}, {SHORT}: only Phi-3 with both of {dim // 2} numbers is known")
        return {}
    if factor != 1.0:
        keys.refuse_key("rope.scaling.factor", factor)
    return {
        "rope_type": "longrope",
        "short_factor": list(short),
        "long_factor": list(long),
        "attention_factor": float(attention),
        "original_max_position_embeddings": int(original),
    }


def llama3(factors: tuple[float, ...], theta: float, dim: int, context: int) -> dict[str, Any] | None:
    """The rope_parameters whose llama3 (or linear) scaling divides the frequencies by exactly these, or None."""
    if len(factors) != dim // 2 or not all(0 < value < float("inf") for value in factors):
        return None
    if set(factors) == {1.0}:
        return {}
    if len(set(factors)) == 1:
        return {"rope_type": "linear", "factor": _round(factors[0])}
    lengths = [2 * math.pi * theta ** (2 * i / dim) for i in range(dim // 2)]
    for factor, original, low, high in _candidates(factors, lengths, context):
        if original >= 1 and 0 < low < high:
            made = [_divisor(length, factor, original, low, high) for length in lengths]
            if all(abs(a - b) <= SAME * b for a, b in zip(factors, made, strict=True)):
                parameters = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
                return {"rope_type": "llama3", **parameters, "original_max_position_embeddings": original}
    return None


def _divisor(length: float, factor: float, original: int, low: float, high: float) -> float:
    """f_i of the formula above."""
    turns = original / length
    if turns > high:
        return 1.0
    if turns < low:
        return factor
    share = (turns - low) / (high - low)
    return 1 / ((1 - share) / factor + share)


def _round(factor: float) -> float:
    """The number of few digits that this is in float32, if it is one."""
    near = round(factor, 3)
    return near if abs(near - factor) < 1e-6 * factor else factor


def _candidates(
    factors: tuple[float, ...], lengths: list[float], context: int
) -> Iterator[tuple[float, int, float, float]]:
    """(F, L, low, high), the likeliest first."""
    likely = _round(factors[-1])
    every = [likely] + [float(f) for f in (32, 8, 16, 4, 2, 64) if f > likely]  # the last may not be divided in full
    for factor in every:
        published = [*LLAMA3, *((context // n, 1.0, 4.0) for n in (1, 2, 4, 8, 16, 32, 64))]
        yield from ((factor, original, low, high) for original, low, high in published)
    for factor in every:
        between = [(n, f) for n, f in zip(lengths, factors, strict=True) if 1 + SAME < f < factor * (1 - SAME)]
        shares = [(length, (1 / f - 1 / factor) / (1 - 1 / factor)) for length, f in between]
        for border in _borders(shares, lengths, factors):
            yield from _scaled(factor, *border)


def _borders(
    shares: list[tuple[float, float]], lengths: list[float], factors: tuple[float, ...]
) -> Iterator[tuple[float, float]]:
    """(wavelength above which F divides, wavelength below which nothing does)."""
    if len(shares) >= 2:  # s = a / λ − b, at the two ends
        (near, s_near), (far, s_far) = shares[0], shares[-1]
        a = (s_near - s_far) / (1 / near - 1 / far)
        b = a / near - s_near
        if a > 0 and b > 0:
            yield a / b, a / (1 + b)
    elif shares:
        length, share = shares[0]
        for ratio in (4.0, 2.0, 8.0, 3.0, 16.0, 32.0):  # high / low
            b = 1 / (ratio - 1)
            a = (share + b) * length
            yield a / b, a / (1 + b)
        here = 1 / length
        after = 1 / min((longer for longer in lengths if longer > length), default=2 * length)
        before = 1 / max((shorter for shorter in lengths if shorter < length), default=length / 2)
        for step in (0.25, 0.5, 0.75, 0.97):  # one border between two 1 / λ, the other where this share puts it
            low = after + step * (here - after)
            yield 1 / low, 1 / (low + (here - low) / share)
            high = before + step * (here - before)
            if here > share * high:
                yield (1 - share) / (here - share * high), 1 / high
    else:  # a step: anywhere between the two lengths
        for (shorter, f), (longer, g) in pairwise(zip(lengths, factors, strict=True)):
            if f != g:
                yield shorter * (longer / shorter) ** 0.75, shorter * (longer / shorter) ** 0.25


def _scaled(factor: float, long: float, short: float) -> Iterator[tuple[float, int, float, float]]:
    """The two borders as L, low, high, with L an integer: first with low = 1 and a round high."""
    yield factor, round(long), 1.0, float(round(long / short))
    yield factor, round(long), round(long) / long, round(long) / short
