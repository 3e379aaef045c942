"""Mutations by the hundred thousand: a reader of strangers' files gives an InputError or what the file holds (33, 42).

A mutation is a pure function of its number. Most go where they do harm: into the header and its lengths.
"""

import random
import resource
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from deltaw.base.gguf import to_folder
from deltaw.errors import InputError
from deltaw.files.gguf_parts import read_model
from deltaw.files.safetensors import load_safetensors
from tests.base.test_gguf import HOSTILE as GGUF_CASES
from tests.base.test_gguf import write_gguf
from tests.faults.common import finished_run, place
from tests.faults.fault import expect, fault
from tests.files.test_safetensors import HOSTILE as CASES

PIECES = (
    b"", b"\x00", b"\xff" * 8, b"\x00" * 8, b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x01\x00\x00\x00\x00\x00\x00\x00",
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"-1", b"0", b"1e999", b"NaN", b"null", b"true", b"18446744073709551616",
    b'"F32"', b'"F4"', b'"I64"', b'"BOOL"', b'"shape"', b'"data_offsets"', b'"dtype"', b'"__metadata__":{},',
)  # fmt: skip
SMALL = 2_000  # bytes of tensor data that are enough to be mutated


@cache
def safetensors() -> bytes:
    """The header of a real adapter's few first tensors, and their data."""
    import torch
    from safetensors.torch import load_file, save

    tensors = load_file(finished_run() / "adapter/adapter_model.safetensors")
    few = {name: value[:2, :8].contiguous() for name, value in list(tensors.items())[:4]}
    few["other"] = torch.arange(6, dtype=torch.int64)
    return save(few, {"format": "pt"})


@cache
def gguf() -> bytes:
    """A tiny Llama as llama.cpp would write it."""
    return write_gguf(place() / "tiny.gguf").read_bytes()


def mutated(data: bytes, n: int, header: int, pieces: Sequence[bytes] = PIECES) -> bytes:
    """One to four changes: bits, bytes, pieces put in or taken out, the end cut off; nine in ten within `header`."""
    chance = random.Random(n)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        end = min(len(data), header if chance.random() < 0.9 else len(data)) or 1
        at = chance.randrange(end)
        kind = chance.randrange(7)
        if kind == 0:
            data = data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :] if data else b""
        elif kind == 1:
            data = data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
        elif kind == 2:
            data = data[:at] + chance.choice(pieces) + data[at:]
        elif kind == 3:
            piece = chance.choice(pieces)
            data = data[:at] + piece + data[at + len(piece) :]
        elif kind == 4:
            data = data[:at] + data[at + chance.randrange(1, 40) :]
        elif kind == 5:
            other = chance.randrange(end)
            data = data[:at] + data[other : other + chance.randrange(1, 60)] + data[at:]
        else:
            data = data[: chance.randrange(len(data) + 1)] if chance.random() < 0.3 else data[:at] + data[at + 1 :]
    return data


def survives(read: Callable[[Path], Any], path: Path, data: bytes) -> bool:
    """Whether `read` takes the file; it takes it or refuses it by name, soon, and without much memory."""
    path.write_bytes(data)
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read(path)
        taken = True
    except InputError as error:
        expect(path.name in error.what and len(str(error).splitlines()) <= 5, error)
        taken = False
    took, grown = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    expect(took < 1.0, f"{took:.2f} s")
    expect(grown * 1024 < 2 * len(data) + 2**24, f"{grown} KiB more, of a file of {len(data)} bytes")
    return taken


@fault(33, "a safetensors file of a known kind of brokenness", tries=len(CASES), sample=len(CASES), at_once=100)
def broken_safetensors(n: int, scratch: Path) -> None:
    expect(not survives(load_safetensors, scratch / "x.safetensors", list(CASES.values())[n]), list(CASES)[n])


@fault(
    33,
    "an adapter's weights with one to four mutations: an error that names the file, or tensors; within a second, twice "
    "the file's memory at most, no crash",
    tries=1_000_000,
    sample=1_000,
    at_once=50_000,
)
def mutated_safetensors(n: int, scratch: Path) -> None:
    data = safetensors()
    header = 8 + int.from_bytes(data[:8], "little")
    survives(load_safetensors, scratch / "x.safetensors", mutated(data, n, header))


def read_gguf(path: Path) -> object:
    return read_model([path])


@fault(42, "a GGUF of a known kind of brokenness", tries=len(GGUF_CASES), sample=len(GGUF_CASES), at_once=100)
def broken_gguf(n: int, scratch: Path) -> None:
    expect(not survives(read_gguf, scratch / "x.gguf", list(GGUF_CASES.values())[n]), list(GGUF_CASES)[n])


@fault(
    42,
    "a GGUF with one to four mutations, its header walked in Python before anything else: refused by name, or "
    "walked; no "
    "crash",
    tries=100_000,
    sample=200,
    at_once=10_000,
)
def mutated_gguf(n: int, scratch: Path) -> None:
    survives(read_gguf, scratch / "x.gguf", mutated(gguf(), n, 4_000))


@fault(
    42,
    "mutated GGUFs that the walk lets through, converted: a folder or an error, no crash",
    tries=100,
    sample=2,
    at_once=50,
)
def converted_gguf(n: int, scratch: Path) -> None:
    for number in range(10**6 + n * 1_000, 10**6 + (n + 1) * 1_000):
        if survives(read_gguf, scratch / "x.gguf", mutated(gguf(), number, 4_000)):
            break
    else:
        raise AssertionError("none of a thousand got through")
    try:
        to_folder(scratch / "x.gguf", scratch / f"cache-{n}")
    except InputError as error:
        expect("x.gguf" in error.what and len(str(error).splitlines()) <= 5, error)
