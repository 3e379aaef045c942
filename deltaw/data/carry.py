"""What became of rows -> bytes -> the same, for a process that prepares them for another (files/forked.py).

    header    JSON, its length in front: for each row the number of its pieces or why it is rejected; for each example
              whose other fields aren't the default ones, those fields
    lengths   int32 [examples]
    tokens    int32, of all examples in a row
    masks     a bit per token

The examples that come out are views into the bytes that were given.
"""

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from deltaw.data.example import Example
from deltaw.errors import Rejected

Results = list[list[Example] | Rejected]  # of each row
OTHERS = {field.name: field.default for field in fields(Example)[3:]}


def packed(results: Results, origins: Sequence[str]) -> bytes:
    """`results` of the rows of these origins."""
    rows = [str(result) if isinstance(result, Rejected) else len(result) for result in results]
    named = [
        (example, origin)
        for result, origin in zip(results, origins, strict=True)
        if not isinstance(result, Rejected)
        for example in result
    ]
    odd = {number: others for number, pair in enumerate(named) if (others := _others(*pair))}
    examples = [example for example, _ in named]
    header = json.dumps([rows, odd]).encode()
    header += b" " * (-len(header) % 8)
    lengths = np.array([len(example.tokens) for example in examples], np.int32)
    tokens = np.concatenate([np.zeros(0, np.int32), *(example.tokens for example in examples)])
    masks = np.packbits(np.concatenate([np.zeros(0, bool), *(example.loss_mask for example in examples)]))
    sizes = np.array([len(header), len(lengths)], np.int64)
    return b"".join([sizes.tobytes(), header, lengths.tobytes(), tokens.tobytes(), masks.tobytes()])


def unpacked(data: bytearray, origins: Sequence[str]) -> Results:
    """What `packed` was given."""
    size, count = np.frombuffer(data, np.int64, 2).tolist()
    rows, odd = json.loads(data[16 : 16 + size])
    lengths = np.frombuffer(data, np.int32, count, 16 + size)
    begin = 16 + size + 4 * count
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if count else 0
    tokens = np.frombuffer(data, np.int32, total, begin)
    masks = np.unpackbits(np.frombuffer(data, np.uint8, -1, begin + 4 * total), count=total).view(bool)
    borders = [0, *ends.tolist()]
    results: Results = []
    number = 0
    for row, origin in zip(rows, origins, strict=True):
        if isinstance(row, str):
            results.append(Rejected(row))
            continue
        pieces = []
        for at in range(number, number + row):
            part = slice(borders[at], borders[at + 1])
            example = Example(tokens[part], masks[part], origin)
            pieces.append(replace(example, **_back(odd[str(at)])) if str(at) in odd else example)
        number += row
        results.append(pieces)
    return results


def _others(example: Example, origin: str) -> dict[str, object]:
    others = {name: getattr(example, name) for name, usual in OTHERS.items() if getattr(example, name) != usual}
    return others if example.origin == origin else {"origin": example.origin, **others}


def _back(others: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in others.items()}
