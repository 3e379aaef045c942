"""Reading: every broken file is one InputError that names it. Writing: whole or not at all, with the right mode."""

import json
import os
import resource
import stat
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deltaw.errors import InputError, RunError
from deltaw.files.atomic import write_text_atomic
from deltaw.files.safetensors import load_safetensors, read_header, save_safetensors
from deltaw.files.strict_json import read_json
from tests.faults.common import child

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def container(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def tensor(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_safetensors(TENSORS, path, {"fingerprint": "sha256:0"})
    loaded = load_safetensors(path)
    assert loaded.keys() == TENSORS.keys()
    assert all(
        torch.equal(loaded[name], TENSORS[name]) and loaded[name].dtype == TENSORS[name].dtype for name in loaded
    )
    header = read_header(path)
    assert header.metadata == {"format": "pt", "fingerprint": "sha256:0"}
    assert header.shapes == {"a.weight": (2, 3), "b": (4,)}
    assert load_file(path).keys() == TENSORS.keys()


def test_views_and_parameters_can_be_saved(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    save_safetensors({"t": weight.t()}, tmp_path / "x.safetensors")
    assert torch.equal(load_safetensors(tmp_path / "x.safetensors")["t"], weight.detach().t())


def test_loaded_tensors_survive_a_save_over_their_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_safetensors(TENSORS, path)
    loaded = load_safetensors(path)
    save_safetensors({name: value + 1 for name, value in loaded.items()}, path)
    assert torch.equal(loaded["a.weight"], TENSORS["a.weight"])
    assert torch.equal(load_safetensors(path)["a.weight"], TENSORS["a.weight"] + 1)


HOSTILE = {
    "empty": b"",
    "short": b"\x01\x00",
    "length past the end": struct.pack("<Q", 10) + b"{}",
    "length 2^64-1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "no JSON": container(b"nonsense"),
    "a list": container([]),
    "UTF-16": container('{"a":1}'.encode("utf-16")),
    "nested deeply": container(b'{"a":' + b"[" * 100_000),
    "NaN": container(b'{"a":NaN}'),
    "an entry that is a number": container({"a": 1}),
    "negative shape": container({"a": tensor([-1], [0, 4])}, bytes(4)),
    "boolean shape": container({"a": tensor([True], [0, 4])}, bytes(4)),
    "overflowing shape": container({"a": tensor([2**62, 2**62], [0, 4])}, bytes(4)),
    "a shape of many sides": container({"a": tensor([1] * 9, [0, 4])}, bytes(4)),
    "shape against size": container({"a": tensor([2], [0, 4])}, bytes(4)),
    "negative offset": container({"a": tensor([1], [-4, 0])}, bytes(4)),
    "overlap": container({"a": tensor([1], [0, 4]), "b": tensor([1], [2, 6])}, bytes(6)),
    "hole": container({"a": tensor([1], [4, 8])}, bytes(8)),
    "the same name twice": container(
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    ),
    "unknown dtype": container({"a": tensor([1], [0, 4], "Q4")}, bytes(4)),
    "dtype no text": container({"a": tensor([1], [0, 4], 7)}, bytes(4)),
    "misaligned F4": container({"a": tensor([3], [0, 2], "F4")}, bytes(2)),
    "trailing bytes": container({"a": tensor([1], [0, 4])}, bytes(5)),
    "missing bytes": container({"a": tensor([1], [0, 4])}, bytes(3)),
    "metadata no text": container({"__metadata__": {"a": 1}}),
    "metadata no mapping": container({"__metadata__": []}),
    "empty name": container({"": tensor([0], [0, 0])}),
    "control character in a name": container({"a\x00b": tensor([0], [0, 0])}),
    "long name": container({"a" * 5000: tensor([0], [0, 0])}),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_file_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"hostile\.safetensors") as caught:
        load_safetensors(path)
    assert len(str(caught.value).splitlines()) <= 5


def test_caps_on_header_and_tensors(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:  # sparse: 99 MB of header
        file.write(struct.pack("<Q", 99_000_000))
        file.truncate(99_000_008)
    start = time.perf_counter()
    with pytest.raises(InputError, match="99,000,000 bytes"):
        load_safetensors(path)
    entry = tensor([0], [0, 0])
    path.write_bytes(container({str(i): entry for i in range(110_000)}))
    with pytest.raises(InputError, match="110,000 tensors"):
        load_safetensors(path)
    assert time.perf_counter() - start < 2  # 0.3 s on an idle machine
    with pytest.raises(InputError, match="at most 1 are"):
        path.write_bytes(container({"a": entry, "b": entry}))
        load_safetensors(path, max_tensors=1)


@pytest.mark.parametrize("spelt", ["data_offsets", "data\\u005foffsets"])
def test_what_would_take_minutes_to_look_at_is_refused_at_once(tmp_path: Path, spelt: str) -> None:
    path = tmp_path / "slow.safetensors"
    entry = json.dumps(tensor([0], [0, 0]))
    many = b"{" + b",".join(b'"%d":' % i + entry.encode() for i in range(150_000)) + b"}"
    for header in (json.dumps({"a": tensor([2**62] * 400_000, [0, 0])}).encode(), many):
        path.write_bytes(container(header.replace(b"data_offsets", spelt.encode())))
        start = time.perf_counter()
        with pytest.raises(InputError, match=r"slow\.safetensors"):
            load_safetensors(path)
        assert time.perf_counter() - start < 1


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    save_safetensors(TENSORS, tmp_path / "whole")
    data, path = (tmp_path / "whole").read_bytes(), tmp_path / "cut"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(InputError, match="cut"):
            load_safetensors(path)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4), st.binary(max_size=9))
def test_mutations_load_or_are_refused(tmp_path: Path, changes: list[tuple[int, int]], tail: bytes) -> None:
    path = tmp_path / "mutated"
    save_file(TENSORS, path)
    data = bytearray(path.read_bytes() + tail)
    for place, value in changes:
        data[place % len(data)] = value
    path.write_bytes(data)
    try:
        load_safetensors(path)
    except InputError as error:
        assert "mutated" in str(error) and len(str(error).splitlines()) <= 5


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(InputError, match=path.name):
            load_safetensors(path)
        with pytest.raises(InputError, match=path.name):
            read_json(path)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_mode_follows_the_umask_and_an_old_mode_is_kept(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_text_atomic(tmp_path / "t", "x")
        save_safetensors(TENSORS, tmp_path / "s")
    finally:
        os.umask(before)
    for name in "ts":
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask
    (tmp_path / "s").chmod(0o604)
    save_safetensors(TENSORS, tmp_path / "s")
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o604


def limited(path: Path) -> None:
    """A child's work: files may not grow beyond a limit, which is like a disk that is full there."""
    for limit in (0, 1, 8, 100, 4096, 100_000, 199_999):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            save_safetensors({"a": torch.ones(50_000)}, path)
        except RunError as error:
            assert "needs 195 KiB" in str(error) and "free" in str(error), error
        else:
            raise AssertionError(f"saved under a limit of {limit}")


def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_safetensors(TENSORS, path)
    old = path.read_bytes()
    assert child(lambda: limited(path)).code == 0
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
